"""What both trainers share, so that it cannot differ: networks, normaliser, optimizer; command line, run folder, resume."""

import dataclasses
import importlib.util
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

import bridge
import envs

CHECKPOINT_VERSION = 3
MAX_SKIPPED = 100  # iterations in a row with numbers that are not finite, after which a run gives up
METRICS = [
    "env_steps", "gradient_steps", "wall_seconds", "eval_return", "eval_success", "eval_error",
    "train_return", "actor_loss", "critic_loss", "gradient_norm", "skipped_steps", "sps",
    "approx_kl", "clip_fraction", "explained_variance", "entropy",
]  # fmt: skip

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
        """The Gaussian of u, before the squashing, for a normalised observation [..., O]: mean and stddev [..., A]."""
        return torch.distributions.Normal(self.mean(observation), self.log_std.exp(), validate_args=False)


class Critic(nn.Module):
    """State value V(o) [...], of a normalised observation [..., O]."""

    def __init__(self, observation_size: int, hidden: int = 128):
        super().__init__()
        self.value = mlp(observation_size, 1, hidden, output_gain=1.0)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.value(observation).squeeze(-1)


class Normalizer(nn.Module):
    """Observation (o - mean) / std with running statistics: frozen during a rollout, updated once after it.

    The statistics are buffers, so that `state_dict` carries them with the weights.
    """

    def __init__(self, observation_size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(observation_size))
        self.register_buffer("var", torch.ones(observation_size))
        self.register_buffer("count", torch.tensor(1e-4))

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return (observation - self.mean) * torch.rsqrt(self.var + 1e-4)

    @torch.no_grad()
    def update(self, observation: torch.Tensor) -> None:
        """Merge in the statistics of observations [..., O] (Chan, Golub and LeVeque 1979, parallel variance)."""
        observation = observation.reshape(-1, observation.shape[-1])
        count, mean, var = observation.shape[0], observation.mean(0), observation.var(0, unbiased=False)
        total, delta = self.count + count, mean - self.mean
        self.var.copy_((self.count * self.var + count * var + delta**2 * self.count * count / total) / total)
        self.mean.add_(delta * count / total)
        self.count.copy_(total)


def make_optimizer(actor: Actor, critic: Critic, learning_rate: float) -> torch.optim.Adam:
    """Adam with short memories: what a moving policy has learned from is soon out of date."""
    parameters = [*actor.parameters(), *critic.parameters()]
    return torch.optim.Adam(parameters, lr=learning_rate, betas=(0.7, 0.95), eps=1e-8, fused=True)


def set_learning_rate(optimizer: torch.optim.Adam, learning_rate: float, progress: float) -> None:
    """Linear decay to a hundredth of the first value; progress in [0, 1]."""
    optimizer.param_groups[0]["lr"] = learning_rate * max(1 - progress, 0.01)


def descend(
    loss: torch.Tensor, optimizer: torch.optim.Adam, actor: Actor, critic: Critic, max_grad_norm: float
) -> tuple[torch.Tensor, bool]:
    """One step of Adam, each network's gradient clipped by norm. No step where a gradient is not finite.

    Returns the norm of the actor's gradient before clipping [], and whether a step was taken.
    """
    optimizer.zero_grad()
    loss.backward()
    norms = [nn.utils.clip_grad_norm_(network.parameters(), max_grad_norm) for network in (actor, critic)]
    stepped = bool(torch.stack(norms).isfinite().all())
    if stepped:
        optimizer.step()
    return norms[0], stepped


# --- the command line -------------------------------------------------------------------------------------------------


def parse(Args: type, tuned: dict) -> object:
    """The command line's flags; where one was not given, the task's tuned value. With --resume, the run's own."""
    table = "\n\n".join(f"{env}: {', '.join(f'{k} {v}' for k, v in values.items())}" for env, values in tuned.items())
    args = tyro.cli(Args, description=f"{Args.__doc__}\n\n{table}")
    if args.resume is not None:
        if args != Args(resume=args.resume):
            raise ValueError("--resume goes on with the run's own settings: leave out all other flags")
        saved = json.loads((pathlib.Path(args.resume) / "config.json").read_text())
        return Args(**{f.name: saved.get(f.name) for f in dataclasses.fields(Args)} | {"resume": args.resume})
    for name, value in tuned[args.env].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    length = envs.EPISODE_LENGTH[args.env]
    if not 1 <= args.segment <= length:
        raise ValueError(f"--segment must be 1 to {length}, the episode's length in {args.env}; got {args.segment}")
    for name in ("total_env_steps", "update_epochs", "num_minibatches", "hidden", "num_evals"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    for package in ("tensorboard", "wandb"):
        if getattr(args, package) and importlib.util.find_spec(package) is None:
            raise ValueError(f"--{package} needs a package that is not there: pip install {package}")
    return args


def command(main: Callable) -> None:
    """Run `main`; a user's mistake, or a disk that is full, ends it with one line and exit code 2."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"{pathlib.Path(sys.argv[0]).name}: {' '.join(str(error).split())[:400]}", file=sys.stderr)
        sys.exit(2)


# --- files --------------------------------------------------------------------------------------------------------------


def write_whole(path: pathlib.Path, content: bytes) -> None:
    """Write to a temporary file, flush it to disk, rename: the file at `path` is the old one or the new one, never a part."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_checkpoint(path: pathlib.Path, checkpoint: dict) -> None:
    """Write a checkpoint whole: the one before it is there until this one is."""
    content = io.BytesIO()
    torch.save({"version": CHECKPOINT_VERSION, **checkpoint}, content)
    write_whole(path, content.getvalue())


def load_checkpoint(path: str | pathlib.Path, algorithm: str | None = None) -> dict:
    """Read a run folder's checkpoint, or a checkpoint file. Raises ValueError, in one line, if it is not a whole one of ours."""
    path = pathlib.Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    content = path.read_bytes()
    try:
        if zipfile.ZipFile(io.BytesIO(content)).testzip():  # torch.load ignores the checksums that torch.save writes
            raise ValueError("wrong checksum")
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
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
    """All that surrounds an algorithm: the run's folder, counters and clock; its log, evaluations, checkpoints and end.

    A part of its own checkpoint, with `state_dict` and `load_state_dict` as a network has them.
    """

    KEPT = ("env_steps", "gradient_steps", "skipped_steps", "skipped_in_a_row", "wall_seconds", "evals", "rows", "figures", "returns")

    def __init__(self, algorithm: str, args: object):
        self.algorithm, self.args, self.began = algorithm, args, time.perf_counter()
        folder = f"runs/{args.env}__{algorithm}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = pathlib.Path(args.resume or args.run_dir or folder)
        self.env_steps = self.gradient_steps = self.skipped_steps = self.skipped_in_a_row = self.evals = 0
        self.wall_seconds, self.rows, self.figures = 0.0, [",".join(METRICS) + "\n"], {}
        self.stopped = []  # Ctrl-C and SIGTERM wait here for the iteration's end; a second one ends the process at once
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        bridge.set_num_threads(args.threads)
        torch.set_num_threads(1)
        torch.manual_seed(args.seed)

    def _stop(self, number, frame):
        self.stopped.append(number)
        signal.signal(number, signal.SIG_DFL)

    def iterations(self, parts: dict, env: envs.Env) -> Iterator[float]:
        """Begin or resume, then yield the progress in [0, 1) for each iteration; evaluate, save and stop in between.

        parts: {name: what has a state_dict}, the checkpoint's contents. env: the one that is trained in.
        """
        args, parts = self.args, {**parts, "env": env, "run": self}
        # Returns are summed from an episode's start: nan, until the first one that began in this run.
        self.returns = torch.where(env.elapsed == 0, 0.0, torch.nan)  # [N]
        evaluation_env = envs.make(args.env, 256, args.device)
        policy = lambda observation: parts["actor"](parts["normalizer"](observation))
        compile_seconds = time.perf_counter() - self.began
        if args.resume is None:
            self.folder.mkdir(parents=True)
            versions = {"python": platform.python_version(), "torch": torch.__version__, "warp": warp.__version__}
            config = {"algorithm": self.algorithm, **vars(args), "versions": versions, "compile_seconds": compile_seconds}
            write_whole(self.folder / "config.json", (json.dumps(config, indent=1) + "\n").encode())
        else:
            checkpoint = load_checkpoint(self.folder, self.algorithm)
            try:
                for name, part in parts.items():
                    part.load_state_dict(checkpoint[name])
            except (KeyError, RuntimeError, TypeError, AttributeError) as error:
                raise ValueError(f"the checkpoint in {self.folder} does not fit {args.env}: {error}") from error
        write_whole(self.folder / "metrics.csv", "".join(self.rows).encode())  # no row that the checkpoint knows not of
        print(f"{args.env}: {args.total_env_steps:,} environment steps, K={args.segment}, {args.bootstrap}, into {self.folder}")
        log, saved = tracker(args, self.folder, self.env_steps), time.perf_counter()
        while True:
            due = self.env_steps >= self.evals * args.total_env_steps / args.num_evals
            if due:
                self.evals = self.env_steps * args.num_evals // args.total_env_steps + 1
                log(self._report(envs.score(evaluation_env, policy), next(iter(env.task.tolerances))))
            if due or self.stopped or time.perf_counter() - saved > args.checkpoint_seconds:
                states = {name: part.state_dict() for name, part in parts.items()}
                save_checkpoint(self.folder / "checkpoint.pt", {"algorithm": self.algorithm, "args": vars(args), **states})
                saved = time.perf_counter()
            if self.env_steps >= args.total_env_steps:
                break
            if self.stopped:
                print(f"stopped; go on with: python {self.algorithm}.py --resume {self.folder}", file=sys.stderr)
                sys.exit(128 + self.stopped[0])
            if self.skipped_in_a_row >= MAX_SKIPPED:
                print(f"{MAX_SKIPPED} iterations in a row had numbers that are not finite: stopped", file=sys.stderr)
                sys.exit(1)
            start = time.perf_counter()
            yield self.env_steps / args.total_env_steps
            self.wall_seconds += time.perf_counter() - start
        result = envs.score(evaluation_env, policy, measures=True)
        words = ", ".join(envs.in_words(name, value) for name, value in result.items())
        print(f"{words}, in {self.wall_seconds:.1f} s of training (+ {compile_seconds:.1f} s compiling)")
        print(f"run folder: {self.folder}")

    def count(self, reward: torch.Tensor, truncated: torch.Tensor, taken: int, skipped: int, **figures: float) -> None:
        """An iteration's result: reward, truncated [K, N]; steps of the optimizer taken and skipped; figures for the log."""
        self.env_steps += reward.numel()
        self.gradient_steps += taken
        self.skipped_steps += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        for r, ended in zip(reward, truncated):
            self.returns += r
            if ended.any():
                figures_of = self.returns[ended & self.returns.isfinite()].tolist()
                self.figures.setdefault("train_return", []).extend(figures_of)
                self.returns.masked_fill_(ended, 0.0)
        for name, value in figures.items():
            self.figures.setdefault(name, []).append(value)

    def _report(self, result, error_name):
        """Write, print and return the row of metrics.csv for an evaluation."""
        mean = {name: sum(values) / len(values) for name, values in self.figures.items() if values}
        row = dict.fromkeys(METRICS, float("nan")) | mean
        row |= {name: getattr(self, name) for name in ("env_steps", "gradient_steps", "skipped_steps")}
        row |= {"eval_return": result["return"], "eval_success": result["success"], "eval_error": result[error_name]}
        row |= {"wall_seconds": round(self.wall_seconds, 3)}
        if self.env_steps:
            row["sps"] = round(self.env_steps / self.wall_seconds, 1)
        self.rows.append(",".join(str(row[name]) for name in METRICS) + "\n")
        self.figures = {}
        write_whole(self.folder / "metrics.csv", "".join(self.rows).encode())
        speed = f"{row['sps']:7,.0f} steps/s" if self.env_steps else "(before training)"
        print(
            f"{self.env_steps:>10,} steps {self.wall_seconds:6.1f} s  return {result['return']:8.2f}  "
            f"success {result['success']:5.3f}  {error_name} {result[error_name]:.4f}  skipped {self.skipped_steps}  {speed}",
            flush=True,
        )
        return row

    def state_dict(self) -> dict:
        random = {"torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state_all()
        return {name: getattr(self, name) for name in self.KEPT} | {"random": random}

    def load_state_dict(self, saved: dict) -> None:
        for name in self.KEPT:
            setattr(self, name, saved[name])
        self.returns = self.returns.to(self.args.device)
        torch.set_rng_state(saved["random"]["torch"])
        if "cuda" in saved["random"]:
            torch.cuda.set_rng_state_all(saved["random"]["cuda"])


CLEANRL = {
    "train_return": "charts/episodic_return", "sps": "charts/SPS", "actor_loss": "losses/policy_loss",
    "critic_loss": "losses/value_loss", "approx_kl": "losses/approx_kl", "clip_fraction": "losses/clipfrac",
    "explained_variance": "losses/explained_variance", "entropy": "losses/entropy",
}  # fmt: skip


def tracker(args: object, folder: pathlib.Path, env_steps: int) -> Callable[[dict], None]:
    """A function that logs a row of metrics.csv where the flags `tensorboard` and `wandb` ask for it, by CleanRL's names."""
    loggers = []  # their packages are imported here, because most do without
    if args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder, purge_step=env_steps + 1)  # a resumed run goes on in the same curve
        loggers.append(lambda values, step: [writer.add_scalar(name, value, step) for name, value in values.items()])
        loggers.append(lambda values, step: writer.flush())
    if args.wandb:
        import wandb

        settings = {"id": folder.name, "name": folder.name, "dir": folder, "resume": "allow"}
        loggers.append(wandb.init(project="analytic-policy-gradients", config=vars(args), **settings).log)

    def log(row):
        values = {CLEANRL.get(name, f"charts/{name}"): value for name, value in row.items()}
        for logger in loggers:
            logger(values, step=row["env_steps"])

    return log
