"""Proximal Policy Optimization (Schulman et al. 2017): train a policy by raising the probability of what turned out well.

    python ppo.py --env franka --segment 32 --bootstrap critic

One file, read from top to bottom; equation numbers are the README's. `diff ppo.py apg.py` shows the two algorithms' difference.
"""

import dataclasses
import json
import os
import pathlib
import platform
import sys
import textwrap
import time
from typing import NoReturn

import torch
import tyro
import warp

import bridge
import envs
import models
from models import Actor, Critic, Normalizer


@dataclasses.dataclass
class Args:
    """Proximal Policy Optimization. Where the default is None, the task's tuned value is used."""

    env: str = "franka"
    """task: pointmass, navigation, pusht or franka"""
    segment: int | None = None
    """K, control steps of a rollout between updates: 1 to T, the episode's length"""
    bootstrap: str = "critic"
    """what stands for the return past a segment: none (0), critic (V of its last observation) or mc (the rest of the
    episode: the rollout goes on to its end, and returns are Monte Carlo)"""
    total_env_steps: int | None = None
    """control steps x environments to train for"""
    num_envs: int | None = None
    """N, environments stepped together"""
    learning_rate: float | None = None
    """Adam's, of actor and critic; decays linearly"""
    gamma: float | None = None
    """discount"""
    gae_lambda: float = 0.95
    """lambda of the advantages, and so of the critic's targets"""
    update_epochs: int = 4
    """passes of actor and critic over a segment"""
    num_minibatches: int = 8
    """minibatches a pass"""
    norm_adv: bool = True
    """normalise the advantages of each minibatch"""
    clip_coef: float = 0.2
    """how far a probability ratio may move from 1 and still raise the objective"""
    clip_vloss: bool = False
    """clip the critic's change in the same way, by clip_coef"""
    ent_coef: float = 0.0
    """weight of the policy's entropy in the objective"""
    target_kl: float = 0.0
    """end an update after the pass whose mean approximate KL exceeds this; 0: never"""
    max_grad_norm: float = 1.0
    """gradient norms of actor and critic are clipped to this"""
    hidden: int = 128
    """units in each of the two hidden layers of actor and critic"""
    seed: int = 1
    """of weights, starts and action noise; evaluation has its own, fixed one"""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    cuda_graph: bool = False
    """on a GPU, launch all work between two readings of results as one CUDA graph; not tried on a GPU yet"""
    threads: int = os.cpu_count() or 1
    """CPU threads that share a long physics launch; the result is the same for any number"""
    torch_threads: int = 1
    """CPU threads of torch: more cost time unless networks and batches are large and cores idle"""
    num_evals: int = 40
    """evaluations, spread evenly over the training"""
    checkpoint_seconds: float = 60.0
    """write a checkpoint when this long has passed since the last; one is written at each evaluation too"""
    max_skipped: int = 100
    """stop after this many iterations in a row in which an update was skipped, because a number was not finite"""
    tensorboard: bool = False
    """log for TensorBoard too, into the run folder, under CleanRL's names; needs `pip install tensorboard`"""
    wandb: bool = False
    """log to Weights & Biases too, under CleanRL's names; needs `pip install wandb`"""
    run_dir: str | None = None
    """where to write config.json, metrics.csv and checkpoint.pt; default runs/{env}__{algorithm}__{seed}__{time}"""
    resume: str | None = None
    """a run folder to go on from, with its own settings: leave out the other flags"""


TUNED = {
    "pointmass": {"total_env_steps": 300_000, "num_envs": 32, "segment": 32, "learning_rate": 2e-3, "gamma": 0.95},
    "navigation": {"total_env_steps": 8_000_000, "num_envs": 512, "segment": 32, "learning_rate": 2e-3, "gamma": 0.95},
    "pusht": {"total_env_steps": 20_000_000, "num_envs": 512, "segment": 32, "learning_rate": 2e-3, "gamma": 0.97},
    "franka": {"total_env_steps": 20_000_000, "num_envs": 512, "segment": 32, "learning_rate": 4e-3, "gamma": 0.97},
}  # fmt: skip
LIMITS = {
    "total_env_steps": (1, 10**12), "num_envs": (1, 10**6), "update_epochs": (1, 1000), "num_minibatches": (1, 10**6),
    "hidden": (1, 10**4), "threads": (1, 1024), "torch_threads": (1, 1024), "num_evals": (1, 10**6), "max_skipped": (1, 10**9),
    "seed": (0, 2**63 - 1), "learning_rate": (1e-12, 10), "gamma": (0, 1), "gae_lambda": (0, 1), "clip_coef": (1e-6, 10),
    "max_grad_norm": (1e-12, 1e12), "ent_coef": (0, 100), "target_kl": (0, 1e6), "checkpoint_seconds": (0, 1e9),
}  # fmt: skip
ALGORITHM = "ppo"
METRICS = [
    "env_steps", "gradient_steps", "wall_seconds", "eval_return", "eval_success", "eval_error",
    "train_return", "actor_loss", "critic_loss", "gradient_norm", "skipped_steps", "sps",
    "approx_kl", "clip_fraction", "explained_variance", "entropy",
]  # fmt: skip


def fail(message: object, code: int = 2) -> NoReturn:
    """A user's mistake (exit code 2), or a run that cannot go on (1): told in one line."""
    print(f"{ALGORITHM}.py: {textwrap.shorten(str(message), 400, placeholder=' ...')}", file=sys.stderr)
    sys.exit(code)


def checked(args: Args) -> Args:
    """Fill in the task's tuned values and refuse what cannot work, before anything is created."""
    if args.env not in TUNED:
        fail(f"unknown --env {args.env}: choose from {', '.join(TUNED)}")
    for name, value in TUNED[args.env].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    length = envs.EPISODE_LENGTH[args.env]
    if not 1 <= args.segment <= length:
        fail(f"--segment must be 1 to {length}, the episode's length in {args.env}; got {args.segment}")
    if args.bootstrap not in ("none", "mc", "critic"):
        fail(f"unknown --bootstrap {args.bootstrap}: choose from none, mc, critic")
    for name, (low, high) in LIMITS.items():
        if not low <= getattr(args, name) <= high:  # false for nan too
            fail(f"--{name.replace('_', '-')} must be {low:g} to {high:g}, got {getattr(args, name)}")
    if args.num_minibatches > args.num_envs * args.segment:
        fail(f"--num-minibatches {args.num_minibatches} exceeds a segment's {args.num_envs * args.segment} samples")
    samples = args.num_envs * (length if args.bootstrap == "mc" else args.segment)
    size = -(-samples // args.num_minibatches)  # of a minibatch, as torch's chunk rounds it
    if args.norm_adv and 1 in (size, samples % size):
        fail(f"--num-minibatches {args.num_minibatches} leaves one sample to a minibatch, and --norm-adv nothing of it")
    if not models.is_device(args.device):
        fail(f"--device {args.device} is not there, or neither cpu nor cuda")
    if args.cuda_graph and torch.device(args.device).type == "cpu":
        fail(f"--cuda-graph needs a CUDA device, and --device is {args.device}")
    for package in ("tensorboard", "wandb"):
        if getattr(args, package) and not models.is_installed(package):
            fail(f"--{package} needs a package that is not there: pip install {package}")
    return args


# --- the rollout and its advantages -----------------------------------------------------------------------------------


@torch.no_grad()
def rollout(env: envs.Env, actor: Actor, normalizer: Normalizer, steps: int) -> list[torch.Tensor]:
    """Run the policy for one segment; nothing is recorded for backpropagation.

    Returns, each with a leading axis of K steps: observation, next observation, u of eq. (2), reward, truncated.
    """
    record, observation = [], env.observe(env.state)
    for _ in range(steps):
        action, u = actor.sample(normalizer(observation))
        next_observation, reward, _, truncated, info = env.step(action)
        record.append((observation, info["final_obs"], u, reward, truncated))
        observation = next_observation
    return [torch.stack(column) for column in zip(*record)]


def gae(
    reward: torch.Tensor, truncated: torch.Tensor, value: torch.Tensor, next_value: torch.Tensor,
    gamma: float, gae_lambda: float,
) -> torch.Tensor:  # fmt: skip
    """A = d + gamma lambda A' with d = r + gamma V' - V, and d alone where the episode or the segment ends (eq. 6). [K, N]"""
    advantages, following = torch.empty_like(reward), torch.zeros_like(reward[0])
    for k in reversed(range(len(reward))):
        delta = reward[k] + gamma * next_value[k] - value[k]
        following = delta + gamma * gae_lambda * torch.where(truncated[k], 0.0, following)  # eq. (6)
        advantages[k] = following
    return advantages


# --- training ---------------------------------------------------------------------------------------------------------


def main() -> None:
    tuned = "\n\n".join(f"{env}: {', '.join(f'{k} {v}' for k, v in values.items())}" for env, values in TUNED.items())
    args = models.parse_flags(lambda: tyro.cli(Args, description=f"{Args.__doc__}\n\n{tuned}"), fail)
    checkpoint = None
    if args.resume is None:
        args = checked(args)
    else:
        given = {name: value for name, value in vars(args).items() if value != getattr(Args, name)}
        try:
            checkpoint = models.load_checkpoint(args.resume, ALGORITHM)
            args = checked(Args(**{**checkpoint["args"], "resume": args.resume}))
            done = checkpoint["counters"][0]
            complete = done >= args.total_env_steps
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            fail(error if type(error) is ValueError else f"{args.resume} has a checkpoint that is not ours: {error!r}")
        for name, value in given.items():
            if value != getattr(args, name):
                was = f"{name.replace('_', '-')} {value}: {getattr(args, name)} in {args.resume}"
                fail(f"--resume goes on with a run's own settings; leave out --{was}")
        if complete:
            print(f"{args.resume} is complete: {done:,} environment steps")
            return
    stopped = models.stop_signals()  # from here on Ctrl-C and SIGTERM wait for the next iteration's end
    bridge.set_num_threads(args.threads)
    torch.set_num_threads(args.torch_threads)
    torch.manual_seed(args.seed)

    stamp = time.strftime("%Y%m%d-%H%M%S")
    run_dir = pathlib.Path(args.resume or args.run_dir or f"runs/{args.env}__{ALGORITHM}__{args.seed}__{stamp}")
    if checkpoint is None:
        try:
            str(run_dir).encode()  # ValueError if it cannot be printed and written down
            run_dir.mkdir(parents=True)
        except (OSError, ValueError) as error:
            fail(f"cannot make run folder {str(run_dir)!r}: {getattr(error, 'strerror', error)}")

    compile_start = time.perf_counter()
    env = envs.make(args.env, args.num_envs, args.device, args.seed)
    evaluation_env = envs.make(args.env, 256, args.device)
    compile_seconds = time.perf_counter() - compile_start
    actor = Actor(env.observation_size, env.action_size, args.hidden).to(args.device)
    critic = Critic(env.observation_size, args.hidden).to(args.device)
    normalizer = Normalizer(env.observation_size).to(args.device)
    actor_optimizer = models.make_optimizer(actor, args.learning_rate)
    critic_optimizer = models.make_optimizer(critic, args.learning_rate)
    modules = {"actor": actor, "critic": critic, "normalizer": normalizer}
    modules |= {"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer}

    # In `mc` an iteration is a whole episode; otherwise it is one segment, and the environments' episodes are out of
    # step with each other, so that every segment sees all phases of an episode.
    steps = env.episode_length if args.bootstrap == "mc" else args.segment
    if args.bootstrap != "mc":
        env.elapsed = torch.randint(env.episode_length, (env.num_envs,), generator=env.generator, device=env.device)
    env_steps, gradient_steps, skipped_steps, wall_seconds, evals = 0, 0, 0, 0.0, 0
    episode_return = torch.zeros(env.num_envs, device=env.device)
    whole_episode = env.elapsed == 0  # a return counts only if it was summed from the episode's start
    metrics, skipped_in_a_row = [",".join(METRICS) + "\n"], 0
    log = {name: [] for name in ("train_return", "actor_loss", "critic_loss", "gradient_norm", *METRICS[-4:])}
    if checkpoint is not None:
        try:
            for name, module in modules.items():
                module.load_state_dict(checkpoint[name])
            env_steps, gradient_steps, skipped_steps, wall_seconds, evals = checkpoint["counters"]
            episodes = [x.to(args.device) for x in checkpoint["episodes"]]
            env.state, env.elapsed, env.settled, episode_return, whole_episode = episodes
            env.generator.set_state(checkpoint["env_generator"])
            torch.set_rng_state(checkpoint["torch_generator"])
            if checkpoint.get("cuda_generator") is not None:
                torch.cuda.set_rng_state(checkpoint["cuda_generator"], args.device)
            log, metrics, skipped_in_a_row = checkpoint["log"], checkpoint["metrics"], checkpoint["skipped_in_a_row"]
            content = "".join(metrics).encode()
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            fail(f"{args.resume} does not fit {args.env}: {error}")
        models.write_whole(run_dir / "metrics.csv", content)  # no row that the checkpoint knows not of
    else:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "warp": warp.__version__}
        config = dict(algorithm=ALGORITHM, **dataclasses.asdict(args), versions=versions, compile_seconds=compile_seconds)
        models.write_whole(run_dir / "config.json", (json.dumps(config, indent=1) + "\n").encode())
        models.write_whole(run_dir / "metrics.csv", metrics[0].encode())
    print(f"{args.env}: {args.total_env_steps:,} environment steps, K={args.segment}, {args.bootstrap}, into {run_dir}")

    # What --cuda-graph captures: nothing in it is read on the host then, and what lasts stays where it is.
    order = torch.zeros(steps * env.num_envs, dtype=torch.int64, device=env.device)
    samples = []  # inputs [K * N, O], u [K * N, A]; old log-densities, advantages, values, targets [K * N]

    def collect() -> tuple[torch.Tensor, torch.Tensor]:
        """Rollout, advantages and statistics.

        Returns figures: the share of variance that is unexplained, if all was finite, if the normaliser was updated; and
        returns [steps, N] of the episodes that ended at a step, nan elsewhere. Leaves `samples` for `learn`.
        """
        # Rollout. No gradient goes through the simulator.
        nonlocal samples
        start = env.state, env.elapsed, env.settled
        observations, next_observations, us, rewards, truncations = rollout(env, actor, normalizer, steps)

        # A segment with a number that is not finite teaches nothing; the environment concerned has started anew.
        finite = torch.stack([x.sum() for x in (observations, next_observations, us, rewards)]).isfinite().all()

        # Advantages, and the critic's targets.
        with torch.no_grad():
            inputs = normalizer(observations)  # [K, N, O]
            old_log_probs, _ = actor.log_prob(inputs, us)  # [K, N]
            values, next_values = critic(inputs), critic(normalizer(next_observations))  # [K, N]
            if args.bootstrap != "critic":  # nothing stands for the return past an end
                next_values[-1:].zero_()
                next_values.masked_fill_(truncations, 0.0)
            gae_lambda = 1.0 if args.bootstrap == "mc" else args.gae_lambda
            advantages = gae(rewards, truncations, values, next_values, args.gamma, gae_lambda)  # [K, N]
            targets = values + advantages
        samples = [x.flatten(0, 1) for x in (inputs, us, old_log_probs, advantages, values, targets)]
        merged = normalizer.update(observations, finite)

        # Returns of the episodes that ended, nan elsewhere. Then what the next iteration begins with, where this one found it.
        returns = []
        for reward, truncated in zip(rewards, truncations):
            episode_return.add_(reward)
            returns.append(episode_return.where(truncated & whole_episode, torch.nan))
            episode_return.masked_fill_(truncated, 0.0)
            whole_episode.logical_or_(truncated)
        with torch.no_grad():
            for place, now in zip(start, (env.state, env.elapsed, env.settled)):
                place.copy_(now)
        env.state, env.elapsed, env.settled = start
        return torch.stack([advantages.var() / targets.var(), finite, merged]), torch.stack(returns)

    def learn() -> torch.Tensor:
        """One pass: clipped steps of actor and critic on minibatches, in `order`, of the same segment.

        Returns a row for each minibatch: objective, critic loss, gradient norm, approximate KL, clip fraction, entropy, if
        the actor stepped, if the critic did.
        """
        figures = []
        for rows in order.chunk(args.num_minibatches):
            input, u, old_log_prob, advantage, old_value, target = (x.index_select(0, rows) for x in samples)
            if args.norm_adv:
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            log_prob, entropy = actor.log_prob(input, u)
            log_ratio = log_prob - old_log_prob
            ratio = log_ratio.exp()
            clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
            objective = torch.min(ratio * advantage, clipped * advantage).mean()  # eq. (7)
            actor_optimizer.zero_grad()
            (-objective - args.ent_coef * entropy.mean()).backward()
            gradient_norm, stepped = models.clipped_step(actor, actor_optimizer, args.max_grad_norm)

            value = critic(input)
            critic_loss = (value - target).square()
            if args.clip_vloss:
                clipped = old_value + (value - old_value).clamp(-args.clip_coef, args.clip_coef)
                critic_loss = torch.max(critic_loss, (clipped - target).square())
            critic_loss = critic_loss.mean()
            critic_optimizer.zero_grad()
            critic_loss.backward()
            _, fitted = models.clipped_step(critic, critic_optimizer, args.max_grad_norm)

            with torch.no_grad():
                kl = (ratio - 1 - log_ratio).mean()  # Schulman's low-variance estimate
                clip_fraction = ((ratio - 1).abs() > args.clip_coef).float().mean()
                row = [objective, critic_loss, gradient_norm, kl, clip_fraction, entropy.mean(), stepped, fitted]
                figures.append(torch.stack(row))
        return torch.stack(figures)

    if args.cuda_graph:
        env.capturable = True
        changed = [x for module in (actor, critic, normalizer) for x in module.state_dict().values()]
        changed += models.make_capturable(actor_optimizer) + models.make_capturable(critic_optimizer)
        changed += [env.state, env.elapsed, env.settled, episode_return, whole_episode]
        collect = bridge.cuda_graph(collect, changed, [env.generator])
        learn = bridge.cuda_graph(learn, changed)

    track = models.tracker(args, run_dir, env_steps)
    last_saved = time.perf_counter()
    while True:
        evaluate = env_steps >= evals * args.total_env_steps / args.num_evals
        if evaluate:
            evals = env_steps * args.num_evals // args.total_env_steps + 1
            result = envs.score(evaluation_env, lambda observation: actor(normalizer(observation)))
            error_name = next(iter(env.task.tolerances))
            sps = env_steps / wall_seconds if wall_seconds > 0 else float("nan")
            row = dict(
                env_steps=env_steps,
                gradient_steps=gradient_steps,
                wall_seconds=round(wall_seconds, 3),
                eval_return=result["return"],
                eval_success=result["success"],
                eval_error=result[error_name],
                **{name: sum(values) / len(values) if values else float("nan") for name, values in log.items()},
                skipped_steps=skipped_steps,
                sps=round(sps, 1),
            )
            metrics.append(",".join(str(row[name]) for name in METRICS) + "\n")
            models.write_whole(run_dir / "metrics.csv", "".join(metrics).encode())
            track(row)
            log = {name: [] for name in log}
            left = wall_seconds * max(args.total_env_steps / env_steps - 1, 0) if env_steps else 0.0
            print(
                f"{env_steps:>10,} steps {wall_seconds:6.1f} s  return {result['return']:8.2f}"
                f"  success {result['success']:5.3f}  {error_name} {result[error_name]:.4f}  skipped {skipped_steps}  "
                + (f"{sps:7,.0f} steps/s, {left:3.0f} s left" if env_steps else "(before training)"),
                flush=True,
            )
        if evaluate or stopped or time.perf_counter() - last_saved > args.checkpoint_seconds:
            models.save_checkpoint(
                run_dir / "checkpoint.pt",
                dict(
                    algorithm=ALGORITHM,
                    args=dataclasses.asdict(args),
                    counters=(env_steps, gradient_steps, skipped_steps, wall_seconds, evals),
                    episodes=(env.state.detach(), env.elapsed, env.settled, episode_return, whole_episode),
                    env_generator=env.generator.get_state(),
                    torch_generator=torch.get_rng_state(),
                    cuda_generator=torch.cuda.get_rng_state(args.device) if env.device.type == "cuda" else None,
                    log=log,
                    metrics=metrics,
                    skipped_in_a_row=skipped_in_a_row,
                    **{name: module.state_dict() for name, module in modules.items()},
                ),
            )
            last_saved = time.perf_counter()
        if env_steps >= args.total_env_steps:
            break
        if stopped:
            fail(f"stopped at {env_steps:,} steps; go on with: python {ALGORITHM}.py --resume {run_dir}", 128 + stopped[0])
        if skipped_in_a_row >= args.max_skipped:
            advice = "try a lower --learning-rate or --max-grad-norm"
            fail(f"{skipped_in_a_row} iterations in a row had numbers that are not finite: {advice}; {run_dir} is kept", 1)

        # One iteration, and what it tells.
        iteration_start, skipped_before = time.perf_counter(), skipped_steps
        for optimizer in (actor_optimizer, critic_optimizer):
            models.set_learning_rate(optimizer, args.learning_rate, env_steps / args.total_env_steps)
        figures, returns = collect()
        unexplained, finite, merged = figures.tolist()
        skipped_steps += not merged
        log["explained_variance"].append(1 - unexplained)
        for _ in range(args.update_epochs if finite else 0):
            torch.randperm(len(order), out=order)
            objective, critic_loss, gradient_norm, kl, clip_fraction, entropy, stepped, fitted = zip(*learn().tolist())
            gradient_steps += int(sum(stepped))
            skipped_steps += int(2 * len(stepped) - sum(stepped) - sum(fitted))
            log["actor_loss"] += [-x for x in objective]
            log["critic_loss"] += critic_loss
            log["gradient_norm"] += gradient_norm
            log["approx_kl"] += kl
            log["clip_fraction"] += clip_fraction
            log["entropy"] += entropy
            if args.target_kl > 0 and sum(kl) / len(kl) > args.target_kl:
                break
        skipped_in_a_row = 0 if skipped_steps == skipped_before else skipped_in_a_row + 1
        log["train_return"] += returns[returns.isfinite()].tolist()
        env_steps += steps * env.num_envs
        wall_seconds += time.perf_counter() - iteration_start

    result = envs.score(evaluation_env, lambda observation: actor(normalizer(observation)), measures=True)
    errors = ", ".join(envs.in_words(name, value) for name, value in result.items() if name not in ("return", "success"))
    print(
        f"success {result['success']:.3f}, {errors}, in {wall_seconds:.1f} s of training (+ {compile_seconds:.1f} s compiling)"
    )
    print(f"run folder: {run_dir}")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # disk full, folder gone: what was written whole before is still there
        fail(f"cannot write {error.filename or 'the output'}: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        fail("stopped before training began", 130)
