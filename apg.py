"""Analytic Policy Gradients: train a policy by backpropagating the return through a differentiable simulator.

    python apg.py --env franka --segment 32 --bootstrap critic

One file, read from top to bottom; equation numbers are the README's.
"""

import contextlib
import copy
import dataclasses
import json
import os
import pathlib
import platform
import sys
import textwrap
import time
from collections.abc import Callable
from typing import NoReturn

import torch
import tyro
import warp
from torch.utils.checkpoint import checkpoint as checkpointed

import bridge
import envs
import models
from models import Actor, Critic, Normalizer


@dataclasses.dataclass
class Args:
    """Analytic Policy Gradients. Where the default is None, the task's tuned value is used."""

    env: str = "franka"
    """task: pointmass, navigation, pusht or franka"""
    segment: int | None = None
    """K, control steps between the cuts of backpropagation: 1 to T, the episode's length"""
    bootstrap: str | None = None
    """what stands for the return past a segment: none (0), critic (V of its last observation) or mc (the rest of the
    episode, and its gradient)"""
    costate_clip: float | None = None
    """bound on the norm of each environment's costate (gradient of its return in its state) at every step; 0: none"""
    recompute: bool = False
    """in mc, run each segment's rollout again when its backward pass comes: activations of K steps in memory, not of T"""
    total_env_steps: int | None = None
    """control steps x environments to train for"""
    num_envs: int | None = None
    """N, environments stepped together"""
    learning_rate: float | None = None
    """Adam's, of actor and critic; decays linearly"""
    gamma: float | None = None
    """discount"""
    td_lambda: float = 0.95
    """lambda of the critic's TD(lambda) targets"""
    target_rate: float = 0.8
    """how far the target critic moves towards the critic after each update, 0 to 1"""
    update_epochs: int | None = None
    """passes of the critic over a segment"""
    num_minibatches: int = 4
    """minibatches a pass of the critic"""
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
    "pointmass": {
        "total_env_steps": 50_000, "num_envs": 4, "segment": 32, "bootstrap": "critic", "costate_clip": 0.0,
        "learning_rate": 2e-3, "gamma": 0.95, "update_epochs": 2,
    },
    "navigation": {
        "total_env_steps": 500_000, "num_envs": 16, "segment": 8, "bootstrap": "none", "costate_clip": 0.0,
        "learning_rate": 2e-3, "gamma": 0.95, "update_epochs": 2,
    },
    "pusht": {
        "total_env_steps": 2_500_000, "num_envs": 32, "segment": 16, "bootstrap": "critic", "costate_clip": 3.0,
        "learning_rate": 2e-3, "gamma": 0.97, "update_epochs": 8,
    },
    "franka": {
        "total_env_steps": 2_500_000, "num_envs": 32, "segment": 32, "bootstrap": "critic", "costate_clip": 0.0,
        "learning_rate": 4e-3, "gamma": 0.95, "update_epochs": 4,
    },
}  # fmt: skip
LIMITS = {
    "total_env_steps": (1, 10**12), "num_envs": (1, 10**6), "update_epochs": (1, 1000), "num_minibatches": (1, 10**6),
    "hidden": (1, 10**4), "threads": (1, 1024), "torch_threads": (1, 1024), "num_evals": (1, 10**6), "max_skipped": (1, 10**9),
    "seed": (0, 2**63 - 1), "learning_rate": (1e-12, 10), "gamma": (0, 1), "td_lambda": (0, 1), "target_rate": (0, 1),
    "max_grad_norm": (1e-12, 1e12), "costate_clip": (0, 1e12), "checkpoint_seconds": (0, 1e9),
}  # fmt: skip
ALGORITHM = "apg"
METRICS = [
    "env_steps", "gradient_steps", "wall_seconds", "eval_return", "eval_success", "eval_error",
    "train_return", "actor_loss", "critic_loss", "gradient_norm", "skipped_steps", "sps",
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
    if args.recompute and args.bootstrap != "mc":
        fail(f"--recompute needs --bootstrap mc: with {args.bootstrap} there is only one segment at a time")
    if args.recompute and args.cuda_graph:
        fail("--recompute and --cuda-graph exclude each other: running a segment again resets random generators")
    if args.num_minibatches > args.num_envs * args.segment:
        fail(f"--num-minibatches {args.num_minibatches} exceeds a segment's {args.num_envs * args.segment} samples")
    if not models.is_device(args.device):
        fail(f"--device {args.device} is not there, or neither cpu nor cuda")
    if args.cuda_graph and torch.device(args.device).type == "cpu":
        fail(f"--cuda-graph needs a CUDA device, and --device is {args.device}")
    for package in ("tensorboard", "wandb"):
        if getattr(args, package) and not models.is_installed(package):
            fail(f"--{package} needs a package that is not there: pip install {package}")
    return args


# --- the gradient -----------------------------------------------------------------------------------------------------


def clip_costate(state: torch.Tensor, limit: float) -> None:
    """Bound each environment's costate norm when the backward pass comes through `state` [N, S]."""

    def bounded(costate):
        if costate is not None:  # None at a segment's end that nothing depends on
            norm = costate.norm(dim=1, keepdim=True)
            norm = norm.where(norm.isfinite(), torch.nan)  # a division by infinity would make it zero, and unseen
            return costate * (limit / norm.clamp(min=limit))

    state.register_hook(bounded)


def rollout(
    env: envs.Env, actor: Actor, normalizer: Normalizer, discount: torch.Tensor, steps: int, gamma: float,
    costate_clip: float = 0.0, value: Callable | None = None,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:  # fmt: skip
    """Run the policy for one segment, recording the graph.

    discount [N] of the first step; value [M, O] -> [M] is B of eq. (3), None for B = 0.
    Returns the objective of eq. (3), summed over environments, the discount of the step after, and what the critic
    learns from, each with a leading axis of K steps: observation, next observation, reward, truncated.
    """
    objective, record, observation = 0.0, [], env.observe(env.state)
    for step in range(steps):
        action, _ = actor.sample(normalizer(observation))
        next_observation, reward, _, truncated, info = env.step(action)
        final_observation = info["final_obs"]
        objective = objective + (discount * reward).sum()  # eq. (3), rewards
        ended = truncated if step < steps - 1 else torch.ones_like(truncated)
        if value is not None and env.capturable:  # without asking where, or if, there is an end
            tail = torch.where(ended, discount * value(final_observation), 0.0)
            objective = objective + gamma * tail.sum()  # eq. (3), tail
        elif value is not None and ended.any():
            objective = objective + gamma * (discount[ended] * value(final_observation[ended])).sum()  # eq. (3), tail
        record.append((observation.detach(), final_observation.detach(), reward.detach(), truncated))
        discount = torch.where(truncated, 1.0, gamma * discount)
        if costate_clip > 0:
            clip_costate(env.state, costate_clip)
            next_observation = env.observe(env.state)  # again, so that all of the state's gradient passes the hook
        observation = next_observation
    return objective, discount, [torch.stack(column) for column in zip(*record)]


def rollout_recomputed(env: envs.Env, *arguments: object) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """`rollout` without its activations: `backward` runs it again, from the same start with the same random numbers."""
    start = env.state, env.elapsed, env.settled, env.generator.get_state()  # torch's own generators are checkpointed's care

    @contextlib.contextmanager
    def back_at_start():
        end = env.state, env.elapsed, env.settled, env.generator.get_state()
        env.state, env.elapsed, env.settled, generator = start
        env.generator.set_state(generator)
        try:
            yield
        finally:  # an exception ends the second run as soon as it has computed all that backward needs
            env.state, env.elapsed, env.settled, generator = end
            env.generator.set_state(generator)

    contexts = lambda: (contextlib.nullcontext(), back_at_start())  # of the first run, of the second
    return checkpointed(rollout, env, *arguments, use_reentrant=False, context_fn=contexts)


def rollout_in_segments(
    env: envs.Env, actor: Actor, normalizer: Normalizer, steps: int, segment: int, gamma: float, hand_over: bool,
    costate_clip: float = 0.0, value: Callable | None = None, recompute: bool = False,
) -> tuple[list, list[torch.Tensor]]:  # fmt: skip
    """Roll out `steps`, cutting the graph every `segment` of them; with `hand_over`, costates can cross the cuts.

    Returns the segments for `backward`, and what `rollout` records, with a leading axis of `steps`.
    """
    segments, discount = [], torch.ones(env.num_envs, dtype=env.dtype, device=env.device)
    # Made before the segments: pieces kept from each would lie scattered through the memory that these free for the next.
    O, options = env.observation_size, {"device": env.device, "dtype": env.dtype}
    record = [torch.empty(steps, env.num_envs, *shape, **options) for shape in ((O,), (O,), ())]  # [T, N, O], [T, N]
    record.append(torch.empty(steps, env.num_envs, dtype=torch.bool, device=env.device))
    for cut in range(0, steps, segment):
        env.detach()
        start, length = env.state.requires_grad_(hand_over), min(segment, steps - cut)
        run = rollout_recomputed if recompute else rollout
        objective, discount, part = run(env, actor, normalizer, discount, length, gamma, costate_clip, value)
        segments.append((start, objective, env.state))
        for whole, column in zip(record, part):
            whole[cut : cut + length] = column
    return segments, record


def backward(segments: list, scale: float) -> None:
    """Differentiate segments from last to first; each hands its costate to the one before it (eq. 5).

    segments: (start state, objective, end state). The start states are leaves; where they ask for no gradient, as when
    there is only one segment, no costate is handed on.
    """
    costate = None
    for start, objective, end in reversed(segments):
        if costate is None:
            torch.autograd.backward(objective, torch.full_like(objective, scale))
        else:
            torch.autograd.backward([objective, end], [torch.full_like(objective, scale), costate])
        costate = start.grad


def td_lambda_targets(
    reward: torch.Tensor, truncated: torch.Tensor, next_value: torch.Tensor, gamma: float, td_lambda: float
) -> torch.Tensor:
    """G = r + gamma ((1 - lambda) V' + lambda G'), and V' alone where the episode or the segment ends (eq. 4). [K, N]"""
    targets, following = torch.empty_like(reward), next_value[-1]
    for k in reversed(range(len(reward))):
        mixed = (1 - td_lambda) * next_value[k] + td_lambda * following
        following = reward[k] + gamma * torch.where(truncated[k], next_value[k], mixed)  # eq. (4)
        targets[k] = following
    return targets


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
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    normalizer = Normalizer(env.observation_size).to(args.device)
    actor_optimizer = models.make_optimizer(actor, args.learning_rate)
    critic_optimizer = models.make_optimizer(critic, args.learning_rate)
    modules = {"actor": actor, "critic": critic, "target_critic": target_critic, "normalizer": normalizer}
    modules |= {"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer}

    # In `mc` an iteration is a whole episode, cut in segments; otherwise it is one segment, and the environments'
    # episodes are out of step with each other, so that every segment sees all phases of an episode.
    steps = env.episode_length if args.bootstrap == "mc" else args.segment
    if args.bootstrap != "mc":
        env.elapsed = torch.randint(env.episode_length, (env.num_envs,), generator=env.generator, device=env.device)
    costate_clip = args.costate_clip / (steps * env.num_envs)  # the gradient is of the mean over steps and environments
    value = (lambda observation: target_critic(normalizer(observation))) if args.bootstrap == "critic" else None
    env_steps, gradient_steps, skipped_steps, wall_seconds, evals = 0, 0, 0, 0.0, 0
    episode_return = torch.zeros(env.num_envs, device=env.device)
    whole_episode = env.elapsed == 0  # a return counts only if it was summed from the episode's start
    metrics, skipped_in_a_row = [",".join(METRICS) + "\n"], 0
    log = {name: [] for name in ("train_return", "actor_loss", "critic_loss", "gradient_norm")}
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
    orders = torch.zeros(args.update_epochs, steps * env.num_envs, dtype=torch.int64, device=env.device)

    def iteration() -> tuple[torch.Tensor, torch.Tensor]:
        """Rollout, gradient, steps of actor and critic, and statistics.

        Returns figures: each segment's objective, gradient norm, critic loss, if all was finite, if the actor stepped, updates
        that were skipped; and returns [steps, N] of the episodes that ended at a step, nan elsewhere.
        """
        # Rollout. States are detached at the start of each segment.
        start = env.state, env.elapsed, env.settled
        segments, (observations, next_observations, rewards, truncations) = rollout_in_segments(
            env, actor, normalizer, steps, args.segment, args.gamma, args.bootstrap == "mc", costate_clip, value, args.recompute
        )

        # A segment with a number that is not finite teaches nothing; the environment concerned has started anew.
        finite = torch.stack([x.sum() for x in (observations, next_observations, rewards)]).isfinite().all()

        # Actor: one step along the gradient of the mean objective.
        actor_optimizer.zero_grad()
        backward(segments, -1 / (steps * env.num_envs))
        gradient_norm, actor_stepped = models.clipped_step(actor, actor_optimizer, args.max_grad_norm, finite)
        updated = [actor_stepped]

        # Critic: TD(lambda) targets of the same segment, regressed in minibatches; then its slow average follows.
        critic_loss = torch.zeros_like(gradient_norm)
        if args.bootstrap == "critic" and (args.cuda_graph or finite):
            with torch.no_grad():
                next_values = value(next_observations)  # [K, N]
                targets = td_lambda_targets(rewards, truncations, next_values, args.gamma, args.td_lambda).flatten()
                inputs = normalizer(observations).flatten(0, 1)  # [K * N, O]
            for order in orders:
                if not args.cuda_graph:  # which finds them drawn: torch does not say that a graph may draw a permutation
                    torch.randperm(len(order), out=order)
                for rows in order.chunk(args.num_minibatches):
                    critic_loss = (critic(inputs.index_select(0, rows)) - targets[rows]).square().mean()
                    critic_optimizer.zero_grad()
                    critic_loss.backward()
                    _, stepped = models.clipped_step(critic, critic_optimizer, args.max_grad_norm, finite)
                    updated.append(stepped)
            rate = args.target_rate * finite if args.cuda_graph else args.target_rate
            for slow, fast in zip(target_critic.parameters(), critic.parameters()):
                slow.data.lerp_(fast.data, rate)
        updated.append(normalizer.update(observations, finite))

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
        figures = [objective.detach() for _, objective, _ in segments]
        figures += [gradient_norm, critic_loss.detach(), finite, actor_stepped, (~torch.stack(updated)).sum()]
        return torch.stack(figures), torch.stack(returns)

    if args.cuda_graph:
        env.capturable = True
        changed = [x for module in (actor, critic, target_critic, normalizer) for x in module.state_dict().values()]
        changed += models.make_capturable(actor_optimizer) + models.make_capturable(critic_optimizer)
        changed += [env.state, env.elapsed, env.settled, episode_return, whole_episode]
        iteration = bridge.cuda_graph(iteration, changed, [env.generator])

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
            advice = "try a smaller --segment, a --costate-clip or a lower --learning-rate"
            fail(f"{skipped_in_a_row} iterations in a row had numbers that are not finite: {advice}; {run_dir} is kept", 1)

        # One iteration, and what it tells.
        iteration_start = time.perf_counter()
        for optimizer in (actor_optimizer, critic_optimizer):
            models.set_learning_rate(optimizer, args.learning_rate, env_steps / args.total_env_steps)
        for order in orders if args.cuda_graph else ():
            torch.randperm(len(order), out=order)
        figures, returns = iteration()
        *objectives, gradient_norm, critic_loss, finite, stepped, skipped = figures.tolist()
        gradient_steps += int(stepped)
        skipped = int(skipped) if finite else 1
        skipped_steps += skipped
        skipped_in_a_row = skipped_in_a_row + 1 if skipped else 0
        log["actor_loss"].append(-sum(objectives) / (steps * env.num_envs))
        log["gradient_norm"].append(gradient_norm)
        if args.bootstrap == "critic" and finite:
            log["critic_loss"].append(critic_loss)
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
