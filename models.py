"""What both algorithms share, so that it cannot differ: actor, critic, observation normaliser, optimizer, checkpoints."""

import math
import os
import pathlib

import torch
from torch import nn

CHECKPOINT_VERSION = 1


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
        gaussian = torch.distributions.Normal(self.mean(observation), self.log_std.exp())
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
    def update(self, observation: torch.Tensor) -> None:
        """Merge the statistics of observations [..., O] (Chan, Golub and LeVeque 1979, parallel variance)."""
        observation = observation.reshape(-1, observation.shape[-1])
        count, mean, var = observation.shape[0], observation.mean(0), observation.var(0, unbiased=False)
        total, delta = self.count + count, mean - self.mean
        self.var.copy_((self.count * self.var + count * var + delta**2 * self.count * count / total) / total)
        self.mean.add_(delta * count / total)
        self.count.copy_(total)


def make_optimizer(module: nn.Module, learning_rate: float) -> torch.optim.Adam:
    """Adam with short memories: the gradient of a moving policy through a simulator is soon out of date."""
    return torch.optim.Adam(module.parameters(), lr=learning_rate, betas=(0.7, 0.95), eps=1e-8)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float, progress: float) -> None:
    """Linear decay to a hundredth of the first value; progress in [0, 1]."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * max(1 - progress, 0.01)


def save_checkpoint(path: pathlib.Path, checkpoint: dict) -> None:
    """Write to a temporary file, flush it to disk, rename: a reader never sees half a checkpoint."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save({"version": CHECKPOINT_VERSION, **checkpoint}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: str | pathlib.Path) -> dict:
    """Read a checkpoint, or the one in a run folder. Raises ValueError, in one line, if there is none or it is not ours."""
    path = pathlib.Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        version = checkpoint["version"]
    except Exception as error:  # torch raises a dozen types on a damaged file, and all mean the same to the user
        raise ValueError(f"{path} is not a readable checkpoint ({type(error).__name__})") from None
    if version != CHECKPOINT_VERSION:
        raise ValueError(f"{path} has checkpoint version {version}, this program reads version {CHECKPOINT_VERSION}")
    return checkpoint
