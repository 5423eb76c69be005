"""What both trainers share, so that it cannot differ: networks, normaliser, optimizer; flags, run folder and resume."""

import argparse
import dataclasses
import io
import json
import math
import os
import pathlib
import platform
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterator

import torch
import tyro
import warp
from torch import nn

import envs

METRICS = {  # columns of metrics.csv, and their names in TensorBoard: CleanRL's, where it has one
    "env_steps": "charts/env_steps", "gradient_steps": "charts/gradient_steps", "wall_seconds": "charts/wall_seconds",
    "eval_return": "charts/eval_return", "eval_success": "charts/eval_success", "eval_error": "charts/eval_error",
    "train_return": "charts/episodic_return", "actor_loss": "losses/policy_loss", "critic_loss": "losses/value_loss",
    "gradient_norm": "charts/gradient_norm", "skipped_steps": "charts/skipped_steps", "sps": "charts/SPS",
    "approx_kl": "losses/approx_kl", "clip_fraction": "losses/clipfrac",
    "explained_variance": "losses/explained_variance", "entropy": "losses/entropy",
}  # fmt: skip
CHECKPOINT_VERSION = 4
MIN_STD = 0.1  # of the action noise: it smooths contact, and with less of it every step would leave PPO's trust region
MAX_SKIPPED = 100  # iterations in a row with numbers that are not finite, after which a run gives up

# --- networks, normaliser, optimizer ------------------------------------------------------------------------------------


def mlp(inputs: int, outputs: int, hidden: int, output_gain: float) -> nn.Sequential:
    """Two hidden layers with SiLU: smooth, so that its derivative is a useful one. Orthogonal start."""
    layers = [nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, outputs)]
    for layer, gain in zip(layers[::2], (math.sqrt(2), math.sqrt(2), output_gain)):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Actor(nn.Module):
    """Tanh-squashed Gaussian: u = mu(o) + sigma eps, a = tanh(u), with sigma independent of the state."""

    def __init__(self, observation_size: int, action_size: int, hidden: int = 128, log_std: float = -1.0):
        super().__init__()
        self.mean = mlp(observation_size, action_size, hidden, output_gain=0.01)
        self.log_std = nn.Parameter(torch.full((action_size,), log_std))

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        """The deterministic action tanh(mu(o)) [..., A], of a normalised observation [..., O]."""
        return torch.tanh(self.mean(observation))

    def distribution(self, observation: torch.Tensor) -> torch.distributions.Normal:
        """The Gaussian of u, before the squashing: mean and stddev [..., A], of a normalised observation [..., O]."""
        return torch.distributions.Normal(self.mean(observation), self.log_std.exp(), validate_args=False)


class Critic(nn.Module):
    """State value V(o) [...], of a normalised observation [..., O]."""

    def __init__(self, observation_size: int, hidden: int = 128):
        super().__init__()
        self.value = mlp(observation_size, 1, hidden, output_gain=1.0)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.value(observation).squeeze(-1)


class Normalizer(nn.Module):
    """Observation (o - mean) / std with running statistics: frozen during a rollout, updated once after it."""

    def __init__(self, observation_size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(observation_size))  # buffers: `state_dict` carries them
        self.register_buffer("var", torch.ones(observation_size))
        self.register_buffer("count", torch.tensor(1e-4))

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return (observation - self.mean) / torch.sqrt(self.var + 1e-4)

    @torch.no_grad()
    def update(self, observation: torch.Tensor) -> None:
        """Merge in the statistics of observations [..., O] (Chan, Golub and LeVeque 1979, parallel variance)."""
        observation = observation.reshape(-1, observation.shape[-1])
        count, mean, var = observation.shape[0], observation.mean(0), observation.var(0, unbiased=False)
        total, delta = self.count + count, mean - self.mean
        self.var.copy_((self.count * self.var + count * var + delta**2 * self.count * count / total) / total)
        self.mean.add_(delta * count / total)
        self.count.copy_(total)


def make_optimizer(actor: Actor, critic: Critic, rates: tuple[float, float]) -> torch.optim.Adam:
    """Adam for both networks, a group with a learning rate each; fused, which is three times as fast for small ones."""
    groups = [{"params": list(network.parameters()), "lr": rate} for network, rate in zip((actor, critic), rates)]
    return torch.optim.Adam(groups, fused=True)


# --- flags and files ----------------------------------------------------------------------------------------------------


def parse(Args: type, tuned: dict) -> object:
    """The command line's flags; their defaults are those tuned for the task. With --resume, the run's own flags."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--env", default=Args.env)
    env = first.parse_known_args()[0].env
    if env not in tuned:
        raise ValueError(f"unknown --env {env}: choose from {', '.join(tuned)}")
    defaults = Args(env=env, **tuned[env])
    args = tyro.cli(Args, default=defaults, description=Args.__doc__)
    if args.resume is not None:
        if args != Args(**tuned[Args.env], resume=args.resume):
            raise ValueError("--resume goes on with the run's own flags: leave out all others")
        saved = load_checkpoint(args.resume)["args"]
        return Args(**{field.name: saved.get(field.name) for field in dataclasses.fields(Args)} | {"resume": args.resume})
    length = envs.EPISODE_LENGTH[env]
    if not 1 <= args.segment <= length:
        raise ValueError(f"--segment must be 1 to {length}, the episode's length in {env}; got {args.segment}")
    for name in ("total_env_steps", "hidden", "num_evals", "update_epochs", "num_minibatches"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    return args


def command(main: Callable) -> None:
    """Run `main`; a mistake of the user's ends it with one line and exit code 2."""
    try:
        main()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"{pathlib.Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def write_whole(path: pathlib.Path, content: bytes) -> None:
    """Write to a temporary file, flush it to disk, rename: `path` is the old file or the new one, never a part."""
    with open(path.with_suffix(".tmp"), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def save_checkpoint(path: pathlib.Path, checkpoint: dict) -> None:
    """Write a checkpoint whole: the one before it is there until this one is."""
    content = io.BytesIO()
    torch.save({"version": CHECKPOINT_VERSION, **checkpoint}, content)
    write_whole(path, content.getvalue())


def load_checkpoint(path: str | pathlib.Path, algorithm: str | None = None) -> dict:
    """Read a run folder's checkpoint, or a checkpoint file. Raises ValueError if it is not a whole one of ours."""
    path = pathlib.Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    content = io.BytesIO(path.read_bytes())
    try:
        if zipfile.ZipFile(content).testzip():  # torch.load ignores the checksums that torch.save writes
            raise ValueError("wrong checksum")
        content.seek(0)
        checkpoint = torch.load(content, map_location="cpu", weights_only=True)
        version, trainer = checkpoint["version"], checkpoint["algorithm"]
    except Exception as error:  # torch raises a dozen types on a damaged file, and all mean the same to the user
        raise ValueError(f"{path} is not a readable checkpoint of ours ({type(error).__name__})") from error
    if version != CHECKPOINT_VERSION:
        raise ValueError(f"{path} has checkpoint version {version}; this program reads {CHECKPOINT_VERSION}")
    if algorithm not in (None, trainer):
        raise ValueError(f"{path} was trained by {trainer}.py")
    return checkpoint


# --- a run --------------------------------------------------------------------------------------------------------------


class Run:
    """All that surrounds an algorithm: the run's folder, counters and clock; its log, evaluations, checkpoints and end."""

    KEPT = ("counters", "skipped_in_a_row", "rows", "log", "returns")  # in a checkpoint

    def __init__(self, algorithm: str, args: object):
        self.algorithm, self.args, self.began, self.stopped = algorithm, args, time.perf_counter(), []
        folder = f"runs/{args.env}__{algorithm}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = pathlib.Path(args.resume or args.run_dir or folder)
        self.counters = {"env_steps": 0, "gradient_steps": 0, "skipped_steps": 0, "wall_seconds": 0.0}
        self.skipped_in_a_row, self.rows, self.log = 0, [",".join(METRICS)], {}
        self.writer = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)
        torch.set_num_threads(args.threads)
        torch.manual_seed(args.seed)

    def stop(self, number: int, frame: object) -> None:
        """Ctrl-C or SIGTERM: the run ends after this iteration. A second one ends the process at once."""
        self.stopped.append(number)
        signal.signal(number, signal.SIG_DFL)

    def iterations(self, parts: dict, env: envs.Env) -> Iterator[float]:
        """Begin or resume, then yield the progress in [0, 1) for each iteration; evaluate, save and stop in between.

        parts: {name: what has a state_dict}: with env, which is trained in, and this run, all that a checkpoint holds.
        """
        args, parts = self.args, {**parts, "env": env, "run": self}
        evaluation_env = envs.make(args.env, 256, args.device)
        policy = lambda observation: parts["actor"](parts["normalizer"](observation))
        self.returns = torch.where(env.elapsed == 0, 0.0, torch.nan)  # [N], from an episode's start; nan: not seen whole
        compile_seconds = time.perf_counter() - self.began
        if args.resume:
            checkpoint = load_checkpoint(self.folder, self.algorithm)
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
        elif self.folder.exists():
            raise ValueError(f"{self.folder} exists: go on with --resume, or name another --run-dir")
        if args.tensorboard or args.wandb:
            self.writer = tensorboard_writer(args, self.folder)
        if not args.resume:
            self.folder.mkdir(parents=True, exist_ok=True)  # TensorBoard's writer may have made it
            versions = {"python": platform.python_version(), "torch": torch.__version__, "warp": warp.__version__}
            config = {"algorithm": self.algorithm, **vars(args), "versions": versions, "compile_seconds": compile_seconds}
            write_whole(self.folder / "config.json", json.dumps(config, indent=1).encode())
        print(f"{args.env}: {args.total_env_steps:,} env steps, K={args.segment}, {args.bootstrap}, into {self.folder}")
        while True:
            env_steps, evaluations = self.counters["env_steps"], len(self.rows) - 1
            evaluated = self.rows[-1].startswith(f"{env_steps},")  # already, before a stop at this step
            due = env_steps >= args.total_env_steps * evaluations / args.num_evals and not evaluated
            if due:
                self.report(envs.score(evaluation_env, policy))
            if due or self.stopped:
                states = {name: part.state_dict() for name, part in parts.items()}
                save_checkpoint(self.folder / "checkpoint.pt", {"algorithm": self.algorithm, "args": vars(args), **states})
            if env_steps >= args.total_env_steps:
                break
            if self.stopped:
                print(f"stopped; go on with: python {sys.argv[0]} --resume {self.folder}", file=sys.stderr)
                sys.exit(128 + self.stopped[0])
            if self.skipped_in_a_row == MAX_SKIPPED:
                sys.exit(f"{MAX_SKIPPED} iterations in a row had numbers that are not finite; {self.folder} is kept")
            start = time.perf_counter()
            yield env_steps / args.total_env_steps
            self.counters["wall_seconds"] += time.perf_counter() - start
        result = envs.score(evaluation_env, policy, measures=True)
        print(", ".join(envs.in_words(name, value) for name, value in result.items()))
        print(f"{self.counters['wall_seconds']:.1f} s of training, {compile_seconds:.1f} s of compiling")
        print(f"run folder: {self.folder}")

    def count(self, reward: torch.Tensor, truncated: torch.Tensor, stepped: list[bool], figures: dict) -> None:
        """An iteration's result: reward, truncated [K, N]; for each minibatch, if the optimizer stepped; figures to log."""
        self.counters["env_steps"] += reward.numel()
        self.counters["gradient_steps"] += sum(stepped)
        self.counters["skipped_steps"] += len(stepped) - sum(stepped)
        self.skipped_in_a_row = 0 if all(stepped) else self.skipped_in_a_row + 1
        for name, value in figures.items():
            self.log.setdefault(name, []).append(value)
        for r, ended in zip(reward, truncated):
            self.returns += r
            if ended.any():
                self.log.setdefault("train_return", []).extend(self.returns[ended].tolist())
                self.returns[ended] = 0.0

    def report(self, result: dict) -> None:
        """Write the row of metrics.csv for an evaluation by `envs.score`, and print its line."""
        error_name, error = list(result.items())[2]  # the task's first, after return and success
        row = self.counters | {"eval_return": result["return"], "eval_success": result["success"], "eval_error": error}
        for name, values in self.log.items():
            row[name] = torch.tensor(values).nanmean().item()
        row["sps"] = row["env_steps"] / max(row["wall_seconds"], 1e-9)
        self.log = {}
        self.rows.append(",".join(f"{row.get(name, math.nan):.10g}" for name in METRICS))
        write_whole(self.folder / "metrics.csv", "\n".join([*self.rows, ""]).encode())
        if self.writer:
            for name in row:
                self.writer.add_scalar(METRICS[name], row[name], row["env_steps"])
            self.writer.flush()
        print(
            f"{row['env_steps']:>10,} steps {row['wall_seconds']:6.1f} s  return {row['eval_return']:8.2f}  success "
            f"{row['eval_success']:5.3f}  {error_name} {error:.4f}  skipped {row['skipped_steps']}  {row['sps']:7,.0f}/s",
            flush=True,
        )

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in self.KEPT} | {"random": torch.get_rng_state()}

    def load_state_dict(self, saved: dict) -> None:
        for name in self.KEPT:
            setattr(self, name, saved[name])
        self.returns = self.returns.to(self.args.device)
        torch.set_rng_state(saved["random"])


def tensorboard_writer(args: object, folder: pathlib.Path) -> object:
    """A writer for the run's folder, imported here because most do without. With --wandb, W&B copies what it is given."""
    from torch.utils.tensorboard import SummaryWriter

    if args.wandb:
        import wandb

        settings = {"id": folder.name, "resume": "allow", "config": vars(args), "sync_tensorboard": True}
        wandb.init(project="analytic-policy-gradients", **settings)
    return SummaryWriter(folder)
