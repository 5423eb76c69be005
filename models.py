"""What both algorithms share, so that it cannot differ: actor, critic, normaliser, optimizer, checkpoints, flags."""

import contextlib
import errno
import functools
import importlib.util
import io
import math
import os
import pathlib
import re
import signal
import stat
import zipfile
from collections.abc import Callable

import torch
from torch import nn

CHECKPOINT_VERSION = 2


def mlp(inputs: int, outputs: int, hidden: int, output_gain: float) -> nn.Sequential:
    """Two hidden layers with layer norm and ELU: smooth, so that its derivative is a useful one. Orthogonal start."""
    layers = []
    for width in (hidden, hidden):
        layers += [nn.Linear(inputs, width), nn.LayerNorm(width), nn.ELU()]
        inputs = width
    layers.append(nn.Linear(inputs, outputs))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, output_gain if layer is layers[-1] else math.sqrt(2))
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Actor(nn.Module):
    """Tanh-squashed Gaussian: u = mu(o) + sigma * eps, a = tanh(u), with sigma independent of the state."""

    def __init__(self, observation_size: int, action_size: int, hidden: int = 128, log_std: float = -1.0):
        super().__init__()
        self.mean = mlp(observation_size, action_size, hidden, output_gain=0.01)
        self.log_std = nn.Parameter(torch.full((action_size,), log_std))

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        """The deterministic action tanh(mu(o)) [..., A], of a normalised observation [..., O]."""
        return torch.tanh(self.mean(observation))

    def sample(self, observation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Action a [..., A] and u [..., A] before the squashing, both differentiable in the parameters (eq. 2)."""
        mean = self.mean(observation)
        u = mean + self.log_std.exp() * torch.randn_like(mean)  # eq. (2)
        return torch.tanh(u), u

    def log_prob(self, observation: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-density of u and entropy of its Gaussian, each [...]."""
        # Not validated: that would read values on the host, and wait for a GPU to have them.
        gaussian = torch.distributions.Normal(self.mean(observation), self.log_std.exp(), validate_args=False)
        return gaussian.log_prob(u).sum(-1), gaussian.entropy().sum(-1)


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
        return (observation - self.mean) / torch.sqrt(self.var + 1e-4)

    @torch.no_grad()
    def update(self, observation: torch.Tensor, allowed: torch.Tensor | bool = True) -> torch.Tensor:
        """Merge the statistics of observations [..., O] (Chan, Golub and LeVeque 1979, parallel variance). Returns if it did.

        Without effect, and False, unless allowed [], and if they came out infinite: every later observation would be
        normalised to zero. A bool tensor [] that is read on no host, so that a CUDA graph can hold all this.
        """
        observation = observation.reshape(-1, observation.shape[-1])
        count, mean, var = observation.shape[0], observation.mean(0), observation.var(0, unbiased=False)
        total, delta = self.count + count, mean - self.mean
        var = (self.count * self.var + count * var + delta**2 * self.count * count / total) / total
        merged = var.isfinite().all() & allowed
        for old, new in ((self.var, var), (self.mean, self.mean + delta * count / total), (self.count, total)):
            old.copy_(torch.where(merged, new, old))
        return merged


def make_optimizer(module: nn.Module, learning_rate: float) -> torch.optim.Adam:
    """Adam with short memories: the gradient of a moving policy through a simulator is soon out of date."""
    return torch.optim.Adam(module.parameters(), lr=learning_rate, betas=(0.7, 0.95), eps=1e-8)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float, progress: float) -> None:
    """Linear decay to a hundredth of the first value; progress in [0, 1]."""
    for group in optimizer.param_groups:
        rate = learning_rate * max(1 - progress, 0.01)
        group["lr"] = group["lr"].fill_(rate) if group["capturable"] else rate


def make_capturable(optimizer: torch.optim.Adam) -> list[torch.Tensor]:
    """Let a CUDA graph hold Adam's step: learning rate and step count move into tensors on the parameters' device.

    Its kernel is then the fused one, which can be told there not to step (see `clipped_step`). Returns Adam's state, made
    now if it has none yet, because it must lie where it is before a graph is captured.
    """
    for group in optimizer.param_groups:
        rate = torch.tensor(float(group["lr"]), device=group["params"][0].device)
        group.update(lr=rate, capturable=True, fused=True)
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.found_inf = torch.ones_like(rate)
    optimizer.step()  # which found_inf forbids: it makes the state and changes nothing
    optimizer.zero_grad()
    return [tensor for state in optimizer.state.values() for tensor in state.values()]


def clipped_step(
    module: nn.Module, optimizer: torch.optim.Adam, max_grad_norm: float, allowed: torch.Tensor | bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip the gradient's norm and step; no step unless allowed [] and if the norm is not finite.

    Returns the norm before [], and whether it stepped [] bool.
    """
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm)
    stepped = norm.isfinite() & allowed
    if optimizer.param_groups[0]["capturable"]:  # decided on the device: nothing is read here
        optimizer.found_inf = (~stepped).float()
        optimizer.step()
    elif stepped:
        optimizer.step()
    return norm, stepped


def write_whole(path: pathlib.Path, content: bytes) -> None:
    """Write to a temporary file, flush it to disk, rename: the file at `path` is the old one or the new one, never a part.

    Raises OSError, with `path`, if that fails, or if the old file is marked read-only, which renaming would not respect.
    """
    temporary = path.with_suffix(".tmp")
    try:
        if path.exists() and not path.stat().st_mode & stat.S_IWUSR:
            raise PermissionError(errno.EACCES, "the file is marked read-only")
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        error.filename = str(path)  # a full disk's error has none
        raise


def save_checkpoint(path: pathlib.Path, checkpoint: dict) -> None:
    """Write a checkpoint whole. Raises OSError if that fails; the one before it is then still there."""
    content = io.BytesIO()  # first, so that what goes wrong in writing is an OSError and not one of torch's
    torch.save({"version": CHECKPOINT_VERSION, **checkpoint}, content)
    write_whole(path, content.getvalue())


def load_checkpoint(path: str | pathlib.Path, algorithm: str | None = None) -> dict:
    """Read a run folder's checkpoint, or a checkpoint file. Raises ValueError, in one line, if it is not a whole one of ours.

    algorithm: refuse another's; and then only a run folder will do, as one is to go on in it.
    """
    path = pathlib.Path(path)
    try:
        if algorithm is not None and not path.is_dir():
            raise ValueError(f"no run folder at {path}")
        path = path / "checkpoint.pt" if path.is_dir() else path
        if (path.parent / "config.json").is_file() and not path.exists():
            raise ValueError(f"no checkpoint at {path}: the run ended before its first, so begin it anew")
        if not path.is_file():
            raise ValueError(f"no checkpoint at {path}")
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    try:
        if zipfile.ZipFile(io.BytesIO(content)).testzip():  # torch.load ignores the checksums that torch.save writes
            raise ValueError("wrong checksum")
        checkpoint = dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
        version = int(checkpoint["version"])
        if version == CHECKPOINT_VERSION:
            trainer, _, _ = checkpoint["algorithm"], dict(checkpoint["args"]), int(checkpoint["counters"][0])
    except Exception as error:  # torch raises a dozen types on a damaged file, and all mean the same to the user
        raise ValueError(f"{path} is not a readable checkpoint of ours ({type(error).__name__})") from error
    if version != CHECKPOINT_VERSION:
        age = "an older" if version < CHECKPOINT_VERSION else "a newer"
        raise ValueError(f"{path} is of {age} program: checkpoint version {version}, this one reads {CHECKPOINT_VERSION}")
    if algorithm not in (None, trainer):
        raise ValueError(f"{path} was trained by {trainer}.py")
    return checkpoint


def is_device(name: str) -> bool:
    """Whether torch device `name` is a CPU or CUDA device that is there."""
    try:
        return torch.device(name).type in ("cpu", "cuda") and torch.zeros(1, device=name).numel() == 1
    except (RuntimeError, AssertionError, ValueError, TypeError):  # by how it is not one
        return False


# --- TensorBoard and Weights & Biases -----------------------------------------------------------------------------------

CLEANRL = {
    "train_return": "charts/episodic_return", "sps": "charts/SPS", "actor_loss": "losses/policy_loss",
    "critic_loss": "losses/value_loss", "approx_kl": "losses/approx_kl", "clip_fraction": "losses/clipfrac",
    "explained_variance": "losses/explained_variance", "entropy": "losses/entropy",
}  # fmt: skip


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def tracker(args: object, run_dir: pathlib.Path, env_steps: int) -> Callable[[dict], None]:
    """A function that logs a row of metrics.csv where the flags `tensorboard` and `wandb` ask for it.

    Names are CleanRL's where it has one, else charts/ and ours; the x axis, its global_step, is env_steps. A run resumed
    at `env_steps` goes on in the same curve.
    """
    loggers = []  # their packages are imported here, because most do without
    if args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(run_dir, purge_step=env_steps + 1)
        loggers.append(lambda values, step: [writer.add_scalar(name, value, step) for name, value in values.items()])
        loggers.append(lambda values, step: writer.flush())
    if args.wandb:
        import wandb

        settings = {"id": run_dir.name, "name": run_dir.name, "dir": run_dir, "resume": "allow"}
        loggers.append(wandb.init(project="analytic-policy-gradients", config=vars(args), **settings).log)

    def track(row):
        values = {CLEANRL.get(name, f"charts/{name}"): value for name, value in row.items()}
        for logger in loggers:
            logger(values, step=row["env_steps"])

    return track


# --- the command line -------------------------------------------------------------------------------------------------


def parse_flags(parse: Callable, fail: Callable) -> object:
    """What `parse`, a call of tyro's, returns. A mistake goes to `fail` as one line, where tyro draws a box with examples."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return parse()
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    lines = [line.strip("│ ") for line in box.getvalue().splitlines() if line[:1] == "│"]
    message = re.split(r"─{3}|Got errors:|Argument helptext|Arguments are|Are you|Perhaps|Similar", " ".join(lines))[0].strip()
    fail(f"{message or 'flags that cannot be understood'} (--help lists all)")


def later(function: Callable) -> Callable:
    """A function of the same flags that returns the call instead of making it: tyro then only parses them."""

    @functools.wraps(function)
    def prepared(*args, **kwargs):
        return functools.partial(function, *args, **kwargs)

    return prepared


def stop_signals() -> list[int]:
    """From now on Ctrl-C and SIGTERM only add their number to the list returned, to stop at the next good moment; a second
    one ends the process at once."""
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return received
