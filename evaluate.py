"""Score trained policies, and measure the gradients that they are trained with.

    python evaluate.py policy RUN_DIR_OR_CHECKPOINT
    python evaluate.py gradients RUN_DIR_OR_CHECKPOINT ...
"""

import csv
import pathlib
import sys

import torch
import tyro

import apg
import envs
from models import Actor, Critic, Normalizer, load_checkpoint


def load(path, num_envs, device="cpu", seed=envs.EVALUATION_SEED):
    """A checkpoint with its environments, actor, critic and normaliser."""
    checkpoint = load_checkpoint(path)
    args = checkpoint["args"]
    env = envs.make(args["env"], num_envs, device, seed)
    actor = Actor(env.observation_size, env.action_size, args["hidden"]).to(device)
    critic = Critic(env.observation_size, args["hidden"]).to(device)
    normalizer = Normalizer(env.observation_size).to(device)
    for name, module in dict(actor=actor, critic=critic, normalizer=normalizer).items():
        module.load_state_dict(checkpoint[name])
    return checkpoint, env, actor, critic, normalizer


def policy(path: tyro.conf.Positional[str], num_envs: int = 256, seed: int = envs.EVALUATION_SEED, device: str = "cpu"):
    """Print the return, success and errors of a checkpoint's deterministic policy over one episode an environment.

    Args:
        path: a run folder or a checkpoint file
        num_envs: episodes to average over
        seed: of the episodes' starts; the default is the one that training curves are scored on
        device: cpu, cuda, cuda:1, ...
    """
    checkpoint, env, actor, _, normalizer = load(path, num_envs, device, seed)
    result = envs.score(env, lambda observation: actor(normalizer(observation)), seed, measures=True)
    print(f"{env.name} ({checkpoint['algorithm']}, {checkpoint['counters'][0]:,} environment steps), {num_envs} episodes")
    for name, value in result.items():
        limit = env.task.tolerances.get(name)
        print(envs.in_words(name, value) + ("" if limit is None else f" (success: below {limit:g})"))


class OwnWeights:
    """An actor with weights of its own for each environment: one backward then gives every environment's gradient."""

    def __init__(self, actor, num_envs):
        own = lambda parameter: parameter.detach().expand(num_envs, *parameter.shape).clone().requires_grad_()
        self.mean = actor.mean
        self.weights = {name: own(parameter) for name, parameter in actor.mean.named_parameters()}
        self.log_std = own(actor.log_std)

    def sample(self, observation):
        mean_of = lambda weights, row: torch.func.functional_call(self.mean, weights, (row,))
        u = torch.vmap(mean_of)(self.weights, observation)
        u = u + self.log_std.exp() * torch.randn_like(u)
        return torch.tanh(u), u

    def gradients(self):
        """[N, P], one row an environment."""
        return torch.cat([p.grad.flatten(1) for p in (*self.weights.values(), self.log_std)], 1)


def gradients(paths: tyro.conf.Positional[list[str]], num_envs: int = 64, clip: float = 3.0, out: str = "results/gradients.csv"):
    """Policy gradient per environment against segment length, for each bootstrap, with and without costate clip.

    For each checkpoint's policy, and for a fresh one on the same task, the gradient of eq. (3) is taken for every
    environment by itself, with respect to the policy's weights, and divided by the number of control steps.

    Args:
        paths: run folders or checkpoint files
        num_envs: environments to take the gradient of
        clip: costate clip where it is on
        out: CSV file to write
    """
    rows = []
    for path in paths:
        for trained in (False, True):
            torch.manual_seed(0)
            checkpoint, env, actor, critic, normalizer = load(path, num_envs)
            gamma = checkpoint["args"]["gamma"]
            if not trained:
                actor, critic = Actor(env.observation_size, env.action_size), Critic(env.observation_size)
            lengths = [k for k in (1, 2, 4, 8, 16, 32, 64) if k < env.episode_length] + [env.episode_length]
            for segment in lengths:
                for bootstrap in ("none", "critic", "mc"):
                    for costate_clip in (0.0, clip):
                        g = gradient(env, actor, critic, normalizer, gamma, segment, bootstrap, costate_clip)
                        norms = g.norm(dim=1)
                        low, middle, high = (norms.nanquantile(q).item() for q in (0.05, 0.5, 0.95))
                        rows.append(
                            dict(
                                env=env.name,
                                policy="trained" if trained else "fresh",
                                bootstrap=bootstrap,
                                costate_clip=costate_clip,
                                segment=segment,
                                of_mean=g.mean(0).norm().item(),
                                low=low,
                                median=middle,
                                high=high,
                                largest=norms.max().item(),
                                nonfinite=(~norms.isfinite()).sum().item(),
                            )
                        )
                print(f"{env.name:10} {rows[-1]['policy']:8} K={segment}", flush=True)
    pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def gradient(env, actor, critic, normalizer, gamma, segment, bootstrap, costate_clip):
    """One policy gradient [N, P], as apg.py takes it but for each environment by itself, per control step."""
    torch.manual_seed(1)
    env.reset(1)
    steps = env.episode_length if bootstrap == "mc" else segment
    if bootstrap != "mc":  # from all phases of an episode
        env.elapsed = torch.randint(env.episode_length, (env.num_envs,), generator=env.generator)
        with torch.no_grad():
            observation = env.observe(env.state)
            for _ in range(env.episode_length):
                observation, *_ = env.step(actor.sample(normalizer(observation))[0])
    own = OwnWeights(actor, env.num_envs)
    value = (lambda observation: critic(normalizer(observation))) if bootstrap == "critic" else None
    hand_over = bootstrap == "mc"
    segments, _ = apg.rollout_in_segments(env, own, normalizer, steps, segment, gamma, hand_over, costate_clip, value)
    apg.backward(segments, 1.0)
    return own.gradients() / steps


def main():
    torch.set_num_threads(1)
    try:
        tyro.extras.subcommand_cli_from_dict({"policy": policy, "gradients": gradients}, description=__doc__)
    except (ValueError, KeyError, RuntimeError) as error:
        print(f"evaluate.py: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
