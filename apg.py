"""Analytic Policy Gradients: train a policy by backpropagating the return through a differentiable simulator.

    python apg.py --env franka --segment 32 --bootstrap critic

Combines short-horizon backpropagation with a critic (SHAC, Xu et al. 2022), reuse of the action gradients inside a trust
region (as in Reparameterization PPO, 2025) and an averaged policy. `--bootstrap mc --gamma 0.99 --update-epochs 1
--num-minibatches 1` backpropagates through whole episodes, similar to Brax's original APG.

Equation numbers are the README's. `diff ppo.py apg.py` shows how the algorithms differ.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch.nn.utils import clip_grad_norm_

import envs
import models
from models import Actor, Critic, Normalizer


@dataclass
class Args:  # with the defaults for the arm; other tasks have their own, in TUNED
    env: str = "franka"
    """task: pointmass, navigation, pusht or franka"""
    segment: int = 32
    """K, control steps of a segment: 1 to T, the episode length"""
    bootstrap: Literal["none", "mc", "critic"] = "critic"
    """return beyond a segment: none ignores it, mc makes the segment an episode, critic adds V of the last observation"""
    costate_clip: float = 0.0
    """bound on the norm of each environment's costate dJ / dx between the steps of a segment; 0: none"""
    total_env_steps: int = 1_200_000
    """control steps x environments to train for"""
    num_envs: int = 64
    """N, environments stepped together"""
    learning_rate: float = 4e-3
    """Adam's learning rate for the actor; decays linearly to zero, like the critic's"""
    critic_learning_rate: float = 6e-3
    """Adam's learning rate for the critic"""
    gamma: float = 0.95
    """discount"""
    gae_lambda: float = 0.95
    """lambda of the critic's targets, eq. (8)"""
    update_epochs: int = 2
    """passes over the samples of a segment"""
    num_minibatches: int = 2
    """minibatches per pass"""
    clip_coef: float = 0.3
    """c, trust-region radius: a sample is masked once u has moved by more than this in a direction that increases J"""
    ent_coef: float = 0.0
    """weight of an entropy bonus, which keeps sigma from shrinking early"""
    max_grad_norm: float = 1.0
    """the joint gradient norm of actor and critic is clipped to this"""
    average_eta: float = 8.0
    """eta of the averaged policy, which reaches back over 1 / (eta + 1) of the training; 0: the last weights"""
    log_std: float = -1.0
    """initial log of the action noise sigma"""
    seed: int = 1
    """seed of weights, initial states and action noise; evaluation has its own, fixed seed"""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    num_evals: int = 40
    """evaluations after the initial one, spread evenly over the training; each overwrites checkpoint.pt"""
    track: Literal["tensorboard", "wandb"] | None = None
    """also log evaluations there; `pip install tensorboard`, and wandb for Weights & Biases"""
    run_dir: str | None = None
    """where to write config.json, metrics.csv and checkpoint.pt; default runs/{env}__{algorithm}__{seed}__{time}"""
    resume: str | None = None
    """run folder to resume; all other flags are read from it and must not be given"""


TUNED = {
    "pointmass": dict(total_env_steps=10_000, num_envs=4, segment=8, bootstrap="none", update_epochs=4),
    "navigation": dict(total_env_steps=300_000, segment=8, bootstrap="none", update_epochs=4, num_minibatches=1,
                       clip_coef=0.5),
    "pusht": dict(total_env_steps=1_000_000, num_envs=256, segment=16, update_epochs=8, num_minibatches=4, gamma=0.98,
                  gae_lambda=0.9, clip_coef=0.2, costate_clip=10.0),
}  # fmt: skip

# --- 1. roll out a segment ----------------------------------------------------------------------------------------------


class Segment(NamedTuple):
    """K steps of N environments."""

    observations: torch.Tensor  # [K, N, O]
    eps: torch.Tensor  # [K, N, A], standard normal, eq. (2)
    us: torch.Tensor  # [K, N, A], actions before squashing
    rewards: torch.Tensor  # [K, N]
    truncations: torch.Tensor  # [K, N] bool, where an episode ends
    final_observations: torch.Tensor  # [K, N, O], what each step led to, before any reset


def clip_costate(state: torch.Tensor, limit: float) -> None:
    """Bound each environment's costate norm when the backward pass reaches `state` [N, S]."""

    def clipped(costate):
        if costate is not None:  # None for the last state, which J does not use
            norm = costate.norm(dim=1, keepdim=True)
            norm = norm.where(norm.isfinite(), torch.nan)  # limit / inf would be 0 and hide the overflow
            return costate * (limit / norm.clamp(min=limit))

    state.register_hook(clipped)


def rollout(
    env: envs.Env, actor: Actor, critic: Critic | None, normalizer: Normalizer,
    steps: int, gamma: float, costate_clip: float,
) -> tuple[Segment, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Run the policy for one segment, recording the graph from every action's noise to the return J.

    critic: V of eq. (3), or None for no bootstrap. Returns the segment; the noise sigma eps [K, N, A], a leaf of the graph;
    and J of eq. (3), summed over environments.
    """
    env.detach()
    eps = torch.randn(steps, env.num_envs, env.action_size, dtype=env.dtype, device=env.device)
    noise = (actor.log_std.exp() * eps).detach().requires_grad_()  # (K, N, A)
    observation, record = env.observe(env.state), []
    for k in range(steps):
        u = actor.mean(normalizer(observation)) + noise[k]  # eq. (2)
        next_observation, reward, _, truncated, info = env.step(torch.tanh(u))
        record.append(Segment(observation, eps[k], u, reward, truncated, info["final_obs"]))
        if costate_clip > 0:
            clip_costate(env.state, costate_clip)
            next_observation = env.observe(env.state)  # recomputed: its gradient must pass the hook, too
        observation = next_observation
    segment = Segment(*map(torch.stack, zip(*record)))  # each (K, N, ...)

    discount = gamma ** torch.arange(steps, device=env.device)[:, None].expand(steps, env.num_envs)  # (K, N)
    J = (discount * segment.rewards).sum()  # eq. (3), rewards
    if critic is not None:
        ends = segment.truncations.clone()
        ends[-1] = True
        values = critic(normalizer(segment.final_observations[ends]))
        J = J + (gamma * discount[ends] * values).sum()  # eq. (3), V where the segment or an episode ends
    return Segment(*(x.detach() for x in segment)), noise, J


# --- 2. estimate --------------------------------------------------------------------------------------------------------


def lambda_returns(segment: Segment, next_values: torch.Tensor, gamma: float, gae_lambda: float) -> torch.Tensor:
    """G = r + gamma ((1 - lambda) V' + lambda G'), but r + gamma V' where the episode or the segment ends. All [K, N]."""
    returns, next_return = torch.empty_like(next_values), next_values[-1]  # V, where the segment ends
    for k in reversed(range(len(returns))):
        mixed = (1 - gae_lambda) * next_values[k] + gae_lambda * next_return
        next_return = segment.rewards[k] + gamma * torch.where(segment.truncations[k], next_values[k], mixed)  # eq. (8)
        returns[k] = next_return
    return returns


# --- 3. learn -----------------------------------------------------------------------------------------------------------


def surrogate(moved: torch.Tensor, g: torch.Tensor, clip_coef: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The objective of a minibatch of M samples: actions move along their gradients, inside a trust region.

    moved [M, A]: how far u has moved since the rollout; g [M, A]: dJ / du. A gradient is only valid locally, so a sample is
    masked once it has moved by more than clip_coef in a direction that increases J. The distance is not relative to sigma,
    because the physics does not become more linear as sigma shrinks. Returns the objective, and which samples are masked.
    """
    gain = (g * moved).sum(-1)
    masked = (moved.norm(dim=-1) > clip_coef) & (gain > 0)
    return gain.masked_fill(masked, 0.0).mean(), masked  # eq. (6)


# --- training -----------------------------------------------------------------------------------------------------------


def main() -> None:
    args = models.parse(Args, TUNED)
    run = models.Run("apg", args)
    env = envs.make(args.env, args.num_envs, args.device, args.seed)
    actor = Actor(env.observation_size, env.action_size, args.log_std).to(args.device)
    critic = Critic(env.observation_size).to(args.device)
    normalizer = Normalizer(env.observation_size).to(args.device)
    optimizer = models.make_optimizer(actor, critic)
    parameters = [*actor.parameters(), *critic.parameters()]
    policy = models.averaged(actor, args.average_eta)

    if args.bootstrap != "mc":  # first episodes end after random numbers of steps, so that later segments cover all phases
        env.elapsed = torch.randint(env.episode_length, (env.num_envs,), generator=env.generator, device=env.device)

    run.start(env, policy, normalizer, actor=actor, critic=critic, optimizer=optimizer)
    while run.env_steps < args.total_env_steps and not run.interrupted:
        decay = 1 - run.env_steps / args.total_env_steps  # linear, to zero
        optimizer.param_groups[0]["lr"] = decay * args.learning_rate
        optimizer.param_groups[1]["lr"] = decay * args.critic_learning_rate

        # 1. Roll out a segment.
        bootstrap = critic if args.bootstrap == "critic" else None
        segment, noise, J = rollout(env, actor, bootstrap, normalizer, args.segment, args.gamma, args.costate_clip)

        # 2. Estimate the gradient of the return with respect to each action, and the critic's targets.
        (g,) = torch.autograd.grad(J, noise)  # eq. (4), (K, N, A)
        with torch.no_grad():
            inputs, next_values = normalizer(segment.observations), critic(normalizer(segment.final_observations))
            targets = lambda_returns(segment, next_values, args.gamma, args.gae_lambda)

        # 3. Learn, in epochs and minibatches. Skip what is not finite.
        samples = [x.flatten(0, 1) for x in (inputs, segment.eps, segment.us, targets, g)]  # (K N, ...)
        finite, metrics = all(x.isfinite().all() for x in samples), []
        for _ in range(args.update_epochs if finite else 0):
            for index in torch.randperm(args.segment * args.num_envs, device=env.device).tensor_split(args.num_minibatches):
                o, eps, u, target, gradient = [x[index] for x in samples]  # (M, ...)
                distribution = actor.distribution(o)
                moved = distribution.mean + distribution.stddev * eps - u  # (M, A); zero at the rollout weights
                objective, masked = surrogate(moved, gradient, args.clip_coef)
                entropy = distribution.entropy().sum(-1).mean()
                loss = -objective - args.ent_coef * entropy
                if args.bootstrap == "critic":  # otherwise V is not trained, and the targets are not used
                    critic_loss = (critic(o) - target).square().mean()
                    loss = loss + critic_loss

                optimizer.zero_grad()
                loss.backward()
                norm = clip_grad_norm_(parameters, args.max_grad_norm)
                if not norm.isfinite():
                    continue
                optimizer.step()
                actor.log_std.data.clamp_(min=math.log(models.MIN_STD))
                metrics.append({
                    "actor_loss": -objective, "gradient_norm": norm,
                    "approx_kl": (moved / distribution.stddev).square().sum(-1).mean() / 2,
                    "clip_fraction": masked.float().mean(), "entropy": entropy,
                })
                if args.bootstrap == "critic":
                    metrics[-1] |= {"critic_loss": critic_loss, "explained_variance": 1 - critic_loss / targets.var()}
            policy.update_parameters(actor)  # after each pass
        if finite:
            normalizer.update(segment.observations)

        run.count(args.segment * args.num_envs, args.update_epochs * args.num_minibatches, metrics)
        if run.evaluation_is_due():
            run.evaluate()
            run.save()
    run.finish()


if __name__ == "__main__":
    models.command(main)
