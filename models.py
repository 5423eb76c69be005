"""Shared by both trainers, so that they cannot diverge: networks, normalizer, optimizer; flags, run folder and resume."""

import argparse
import dataclasses
import json
import math
import pathlib
import signal
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import tyro
import warp
from torch import nn
from torch.optim.swa_utils import AveragedModel

import envs
from envs import UserError

METRICS = (  # columns of metrics.csv
    "env_steps", "gradient_steps", "wall_seconds", "eval_return", "eval_success", "eval_error", "actor_loss", "critic_loss",
    "gradient_norm", "skipped_steps", "sps", "approx_kl", "clip_fraction", "explained_variance", "entropy",
)  # fmt: skip
CHECKPOINT_VERSION = 6
HIDDEN = 128  # units in each of the two hidden layers of actor and critic
MIN_STD = 0.1  # floor of the action noise: it smooths contact, and without it PPO's probability ratios explode

# --- networks, normalizer, optimizer ------------------------------------------------------------------------------------


def mlp(inputs: int, outputs: int, output_gain: float) -> nn.Sequential:
    """Two hidden layers with SiLU, whose derivative is smooth; orthogonal initialization."""
    layers = [nn.Linear(inputs, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, outputs)]
    for layer, gain in zip(layers[::2], (math.sqrt(2), math.sqrt(2), output_gain)):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Actor(nn.Module):
    """Tanh-squashed Gaussian policy: u = mu(o) + sigma eps, a = tanh(u), with a state-independent sigma."""

    def __init__(self, observation_size: int, action_size: int, log_std: float = -1.0):
        super().__init__()
        self.mean = mlp(observation_size, action_size, output_gain=0.01)
        self.log_std = nn.Parameter(torch.full((action_size,), log_std))

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        """The deterministic action tanh(mu(o)) [..., A] for a normalized observation [..., O]."""
        return torch.tanh(self.mean(observation))

    def distribution(self, observation: torch.Tensor) -> torch.distributions.Normal:
        """The Gaussian of u, before squashing: mean and stddev [..., A], for a normalized observation [..., O]."""
        return torch.distributions.Normal(self.mean(observation), self.log_std.exp(), validate_args=False)


class Critic(nn.Module):
    """State value V(o) [...] of a normalized observation [..., O]."""

    def __init__(self, observation_size: int):
        super().__init__()
        self.value = mlp(observation_size, 1, output_gain=1.0)

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


def averaged(actor: Actor, eta: float) -> AveragedModel:
    """The averaged policy, which is evaluated and saved in place of the actor's current weights theta.

    After the n-th `update_parameters(actor)`, mean_n = mean_{n-1} + (eta + 1) / (n + eta) (theta_n - mean_{n-1}), which
    averages over about the last 1 / (eta + 1) of the training so far. eta = 0 keeps the current weights.
    Polynomial-decay averaging: Shamir and Zhang 2013, arXiv:1212.1824.
    """
    share = lambda n: (eta + 1) / (n + eta) if eta > 0 else 1.0
    return AveragedModel(actor, avg_fn=lambda mean, theta, n_before: mean + share(n_before + 1) * (theta - mean))


def make_optimizer(actor: Actor, critic: Critic) -> torch.optim.Adam:
    """Adam with two parameter groups, actor and critic; fused, which is three times as fast for networks this small."""
    groups = [{"params": network.parameters()} for network in (actor, critic)]
    return torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)


# --- flags and files ----------------------------------------------------------------------------------------------------


def parse(Args: type, tuned: dict) -> object:
    """Read the command line. Defaults are those tuned for the task; with --resume, the flags that the run began with."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--env", default=Args.env)
    env = first.parse_known_args()[0].env
    if env not in envs.TASKS:
        raise UserError(f"unknown --env {env}: choose from {', '.join(envs.TASKS)}")
    defaults = Args(env=env, **tuned.get(env, {}))
    args = tyro.cli(Args, default=defaults, description=f"The defaults shown are those for {env}.")
    fields = dataclasses.fields(Args)
    if args.resume is not None:
        if args != Args(**tuned.get(Args.env, {}), resume=args.resume):
            raise UserError("--resume continues with the run's own flags: leave out all others")
        if not pathlib.Path(args.resume).is_dir():
            raise UserError(f"--resume takes a run folder; {args.resume} is not one")
        saved = load_checkpoint(args.resume)["args"] | {"resume": args.resume}
        return Args(**{field.name: saved[field.name] for field in fields if field.name in saved})
    for field in fields:
        low = {int: 1, float: 0}.get(field.type)  # `not >=` below refuses NaN, too
        if field.name not in ("seed", "log_std") and low is not None and not getattr(args, field.name) >= low:
            raise UserError(f"--{field.name.replace('_', '-')} must be at least {low}, got {getattr(args, field.name)}")
    length = envs.TASKS[env](torch.float32).episode_length
    if args.segment > length:
        raise UserError(f"--segment {args.segment} is longer than an episode of {env}, {length} steps")
    if args.bootstrap == "mc":  # with lambda = 1, targets are returns without V
        args.segment, args.gae_lambda = length, 1.0
    samples = args.num_envs * args.segment
    if samples < 2 * args.num_minibatches:  # with a single sample, PPO's normalized advantage is not defined
        raise UserError(f"--num-minibatches {args.num_minibatches} is too many for the {samples} samples of a segment")
    return args


def command(main: Callable) -> None:
    """Run `main`; a user error or a missing optional package ends it with one line and exit code 2."""
    try:
        main()
    except (UserError, ModuleNotFoundError) as error:
        hint = f": pip install {error.name}" if isinstance(error, ModuleNotFoundError) else ""
        print(f"{pathlib.Path(sys.argv[0]).name}: {' '.join(str(error).split())}{hint}", file=sys.stderr)
        sys.exit(2)


def write_atomically(path: pathlib.Path, write: Callable) -> None:
    """Let `write(file)` fill a temporary file, then rename it: `path` is the old file or the new one, never a part."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        write(file)
    temporary.replace(path)


def load_checkpoint(path: str | pathlib.Path, algorithm: str | None = None) -> dict:
    """Read a run folder's checkpoint, or a checkpoint file. Raises UserError if it is damaged or not one of ours."""
    path = pathlib.Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        version, trainer = checkpoint["version"], checkpoint["algorithm"]
    except Exception as error:  # torch raises a dozen types on a damaged file; to the user they all mean the same
        raise UserError(f"{path} is not a readable checkpoint of this project ({type(error).__name__})") from error
    if version != CHECKPOINT_VERSION:
        raise UserError(f"{path} has checkpoint version {version}; this program reads {CHECKPOINT_VERSION}")
    if algorithm not in (None, trainer):
        raise UserError(f"{path} was trained by {trainer}.py")
    return checkpoint


# --- a run --------------------------------------------------------------------------------------------------------------


class Run:
    """Everything around an algorithm: the run folder, counters and clock, log, evaluations, checkpoints and the end.

    wall_seconds is training time, without compilation and evaluation. skipped_steps counts the optimizer steps left out
    because a number was not finite. `interrupted` is the number of the signal received (Ctrl-C, SIGTERM), or 0.
    """

    def __init__(self, algorithm: str, args: object):
        self.algorithm, self.args = algorithm, args
        folder = f"runs/{args.env}__{algorithm}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = pathlib.Path(args.resume or args.run_dir or folder)
        self.env_steps, self.gradient_steps, self.skipped_steps, self.wall_seconds = 0, 0, 0, 0.0
        self.rows, self.log = [], []  # of metrics.csv; the metrics of each minibatch since the last evaluation
        self.writer, self.interrupted = None, 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.interrupt)
        torch.set_num_threads(1)  # for tensors this small, more threads cost time
        torch.manual_seed(args.seed)

    def interrupt(self, number: int, frame: object) -> None:
        """The run stops after this iteration; a second signal ends the process at once."""
        self.interrupted = number
        signal.signal(number, signal.SIG_DFL)

    def start(self, env: envs.Env, policy: nn.Module, normalizer: Normalizer, **others: nn.Module) -> None:
        """Make the run folder and evaluate the initial policy, or load the checkpoint to resume from.

        A checkpoint holds the `state_dict` of each of these, and of the run.
        """
        args = self.args
        self.parts = {"env": env, "policy": policy, "normalizer": normalizer, "run": self, **others}
        self.act = lambda observation: policy(normalizer(observation))  # deterministic
        self.evaluation_env = envs.make(args.env, 256, args.device)
        if args.resume:
            checkpoint = load_checkpoint(self.folder, self.algorithm)
            for name, part in self.parts.items():
                part.load_state_dict(checkpoint[name])
        elif self.folder.exists():
            raise UserError(f"{self.folder} exists: continue it with --resume, or name another --run-dir")
        if args.track:
            from torch.utils.tensorboard import SummaryWriter  # here, because most runs do without

            if args.track == "wandb":
                import wandb

                wandb.init(project="apg", id=self.folder.name, resume="allow", config=vars(args), sync_tensorboard=True)
            self.writer = SummaryWriter(self.folder)  # Weights & Biases copies what TensorBoard is given
        print(f"{args.env}: {args.total_env_steps:,} env steps, K={args.segment}, {args.bootstrap}, into {self.folder}")
        if not args.resume:
            self.folder.mkdir(parents=True, exist_ok=True)  # TensorBoard's writer may have made it
            versions = {"python": sys.version.split()[0], "torch": torch.__version__, "warp": warp.__version__}
            config = json.dumps({"algorithm": self.algorithm, **vars(args), "versions": versions}, indent=1)
            (self.folder / "config.json").write_text(config)
            self.evaluate()
            self.save()
        self.clock_start = time.perf_counter()

    def count(self, env_steps: int, minibatches: int, metrics: list[dict]) -> None:
        """Count an iteration: its env steps, its minibatches, and the metrics of those that led to an optimizer step."""
        self.env_steps += env_steps
        self.gradient_steps += len(metrics)
        self.skipped_steps += minibatches - len(metrics)
        self.log += [{name: value.item() for name, value in minibatch.items()} for minibatch in metrics]
        self.wall_seconds += time.perf_counter() - self.clock_start
        self.clock_start = time.perf_counter()

    def evaluation_is_due(self) -> bool:
        """True num_evals times, evenly spaced over the training, the last time at its end."""
        return self.env_steps >= self.args.total_env_steps * len(self.rows) / self.args.num_evals

    def evaluate(self) -> None:
        """Score the policy, append a row to metrics.csv and print it as a line."""
        result = envs.score(self.evaluation_env, self.act)
        error_name, error = list(result.items())[2]  # the task's first error, after return and success
        row = {name: getattr(self, name) for name in ("env_steps", "gradient_steps", "wall_seconds", "skipped_steps")}
        row |= {"eval_return": result["return"], "eval_success": result["success"], "eval_error": error}
        row |= {name: np.mean([minibatch[name] for minibatch in self.log]) for name in (self.log or [{}])[0]}
        row["sps"] = row["env_steps"] / max(row["wall_seconds"], 1e-9)
        self.log = []
        self.rows.append(",".join(f"{row.get(name, math.nan):.10g}" for name in METRICS))
        text = "\n".join([",".join(METRICS), *self.rows, ""])
        write_atomically(self.folder / "metrics.csv", lambda file: file.write(text.encode()))
        if self.writer:
            for name in row:
                self.writer.add_scalar(name, row[name], row["env_steps"])
            self.writer.flush()
        print(
            f"{row['env_steps']:>10,} steps {row['wall_seconds']:6.1f} s  return {row['eval_return']:8.2f}  success "
            f"{row['eval_success']:5.3f}  {error_name} {error:.4f}  skipped {row['skipped_steps']}  {row['sps']:7,.0f}/s",
            flush=True,
        )

    def save(self) -> None:
        """Write checkpoint.pt, and restart the clock: evaluating and saving are not training."""
        checkpoint = {"version": CHECKPOINT_VERSION, "algorithm": self.algorithm, "args": vars(self.args)}
        checkpoint |= {name: part.state_dict() for name, part in self.parts.items()}
        write_atomically(self.folder / "checkpoint.pt", lambda file: torch.save(checkpoint, file))
        self.clock_start = time.perf_counter()

    def finish(self) -> None:
        """After the last iteration: print the result; or, where the run was interrupted, save it and say how to resume."""
        if self.interrupted and self.env_steps < self.args.total_env_steps:
            self.save()
            print(f"stopped; resume with: python {sys.argv[0]} --resume '{self.folder}'", file=sys.stderr)
            sys.exit(128 + self.interrupted)
        print(f"finished after {self.wall_seconds:.1f} s of training; run folder: {self.folder}")

    def state_dict(self) -> dict:
        """What a resumed run depends on; on a GPU, the noise after it differs from that of an uninterrupted run."""
        names = "env_steps", "gradient_steps", "skipped_steps", "wall_seconds", "rows", "log"
        return {name: getattr(self, name) for name in names} | {"random": torch.get_rng_state()}

    def load_state_dict(self, saved: dict) -> None:
        """Continue where `state_dict` was taken."""
        torch.set_rng_state(saved.pop("random"))
        vars(self).update(saved)
