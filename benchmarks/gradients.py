"""Diagnostics: norm and signal-to-noise ratio of APG's gradients, and accuracy of the critic's slope dV / dx.

    python benchmarks/gradients.py health results/checkpoints/*_apg.pt  # writes results/gradients.csv
    python benchmarks/gradients.py slope                                # trains policies; writes results/slope.csv
"""

import itertools
import pathlib
import sys
import tempfile

import torch
import tyro
from tyro.conf import Positional

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import apg
import envs
import evaluate
import models
from models import Actor, Critic, Normalizer


@torch.no_grad()
def spread_phases(env: envs.Env, actor: Actor, normalizer: Normalizer) -> None:
    """Bring each environment to a state of the policy's own, at a random time of an episode."""
    env.elapsed = torch.randint(env.episode_length, (env.num_envs,), generator=env.generator)
    apg.rollout(env, actor, None, normalizer, env.episode_length, gamma=1.0, costate_clip=0.0)


# --- norm and signal-to-noise ratio -------------------------------------------------------------------------------------


def health(paths: Positional[list[str]], num_envs: int = 64, draws: int = 32, clip: float = 10.0) -> None:
    """Norm and signal-to-noise ratio of APG's gradients, for trained policies, against segment length and bootstrap.

    The bootstrap `critic` is measured only if the checkpoint was trained with it.

    Args:
        paths: run folders or checkpoint files
        num_envs: environments per gradient
        draws: gradients, of independent noise, from which the ratio is taken
        clip: costate clip; each gradient is taken with and without it
    """
    rows = []
    for path in paths:
        checkpoint, env, *networks, normalizer = evaluate.load(path, num_envs)
        args = checkpoint["args"]
        lengths = [k for k in (1, 2, 4, 8, 16, 32, 64) if k < env.episode_length]
        cases = list(itertools.product(lengths + [env.episode_length], ("none", "critic")))
        if args["bootstrap"] != "critic":
            cases = [case for case in cases if case[1] == "none"]
        for (segment, bootstrap), costate_clip in itertools.product([*cases, (env.episode_length, "mc")], (0.0, clip)):
            settings = args["gamma"], segment, bootstrap, costate_clip
            norms, ratio = gradient_health(env, *networks, normalizer, *settings, draws)
            row = {"env": env.name, "bootstrap": bootstrap, "costate_clip": costate_clip, "segment": segment}
            row |= dict(zip(("low", "median", "high"), norms.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()))
            rows.append(row | {"signal_to_noise": ratio})
        print(env.name, flush=True)
    evaluate.write_csv(evaluate.RESULTS / "gradients.csv", rows)


def gradient_health(
    env: envs.Env, actor: Actor, critic: Critic, normalizer: Normalizer,
    gamma: float, segment: int, bootstrap: str, costate_clip: float, draws: int,
) -> tuple[torch.Tensor, float]:  # fmt: skip
    """Norms of g, eq. (4), per environment [N], root mean square over the segment and over draws of the noise.

    And the signal-to-noise ratio of the policy gradient, eq. (5): the norm of its mean over the draws, over its standard
    deviation.
    """
    torch.manual_seed(1)
    env.reset(1)
    if bootstrap != "mc":
        spread_phases(env, actor, normalizer)
    start, squares, gradients = env.state_dict(), 0.0, []
    for _ in range(draws):
        env.load_state_dict(start)  # the same states, other noise
        tail = critic if bootstrap == "critic" else None
        data, noise, J = apg.rollout(env, actor, tail, normalizer, segment, gamma, costate_clip)
        (g,) = torch.autograd.grad(J, noise)
        squares = squares + g.square().sum(-1).mean(0) / draws
        policy = actor.distribution(normalizer(data.observations))
        u = policy.mean + policy.stddev * data.eps
        parts = torch.autograd.grad((g * u).sum(-1).mean(), list(actor.parameters()))  # eq. (5)
        gradients.append(torch.cat([part.flatten() for part in parts]))
    gradients = torch.stack(gradients)
    spread = (gradients - gradients.mean(0)).square().sum(1).mean().sqrt()
    return squares.sqrt(), (gradients.mean(0).norm() / spread).item()


# --- the slope of V -----------------------------------------------------------------------------------------------------


def slope(tasks: tuple[str, ...] = ("navigation", "franka"), seeds: int = 3, states: int = 32, samples: int = 64) -> None:
    """Cosine of dV / dx with the costate that V stands for, at each evaluation of a training of APG with a critic.

    Args:
        tasks: trained with their own flags, but always with the critic
        seeds: number of seeds: 1 to this
        states: on-policy states per measurement
        samples: noise samples per state, over which the reference is averaged
    """
    rows = []

    def save(run, original=models.Run.save):  # and measure what was saved
        original(run)
        _, env, *networks, normalizer = evaluate.load(run.folder, states)
        with torch.random.fork_rng():
            cosine, correlation = compare_slopes(env, *networks, normalizer, run.args.gamma, samples)
        row = {"env": run.args.env, "seed": run.args.seed, "env_steps": run.env_steps}
        rows.append(row | {"cosine": cosine.median().item(), "correlation": correlation})

    models.Run.save = save
    for task, seed in itertools.product(tasks, range(1, seeds + 1)):
        with tempfile.TemporaryDirectory() as folder:
            sys.argv = ["apg.py", f"--env={task}", f"--seed={seed}", f"--run-dir={folder}/run", "--num-evals=20"]
            sys.argv.append("--bootstrap=critic")
            apg.main()
    evaluate.write_csv(evaluate.RESULTS / "slope.csv", rows)


def compare_slopes(
    env: envs.Env, actor: Actor, critic: Critic, normalizer: Normalizer, gamma: float, samples: int, horizon: int = 100
) -> tuple[torch.Tensor, float]:
    """V against the return over a horizon of 100 steps, averaged over noise samples, at on-policy states of all phases.

    Returns the cosine of their slopes, the costates dV / dx and dJ / dx, for each environment [N]; and the correlation of
    their values.
    """
    torch.manual_seed(1)
    spread_phases(env, actor, normalizer)
    start = env.state.detach().requires_grad_()
    value = critic(normalizer(env.observe(start)))
    (value_slope,) = torch.autograd.grad(value.sum(), start)

    state = start.repeat_interleave(samples, 0)  # (N samples, S)
    first, returns = state, 0.0
    for k in range(horizon):
        u = actor.distribution(normalizer(env.observe(state))).rsample()
        state, _, reward = env.dynamics(state, torch.tanh(u))
        returns = returns + gamma**k * reward
    mean_return = returns.unflatten(0, (-1, samples)).mean(1)  # (N,)
    (costate,) = torch.autograd.grad(mean_return.sum(), start)
    moving = (state != first).any(0)  # excludes constants, such as the target
    cosine = torch.cosine_similarity(value_slope[:, moving], costate[:, moving])
    return cosine, torch.corrcoef(torch.stack([value.detach(), mean_return.detach()]))[0, 1].item()


def main() -> None:
    torch.set_num_threads(1)
    tyro.extras.subcommand_cli_from_dict({"health": health, "slope": slope}, description=__doc__)


if __name__ == "__main__":
    models.command(main)
