"""Proximal Policy Optimization (Schulman et al. 2017): train a policy by raising the probability of good actions.

    python ppo.py --env franka

Unlike CleanRL's ppo_continuous_action.py: tanh-squashed actions, a floor under sigma, an averaged policy, V of an episode's
true final observation, raw rewards, no value clipping, a learning rate for the critic, SiLU, and Adam's beta2 = 0.99.

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
    total_env_steps: int = 3_000_000
    """control steps x environments to train for"""
    num_envs: int = 512
    """N, environments stepped together"""
    learning_rate: float = 4e-3
    """Adam's learning rate for the actor; decays linearly to zero, like the critic's"""
    critic_learning_rate: float = 6e-3
    """Adam's learning rate for the critic"""
    gamma: float = 0.95
    """discount"""
    gae_lambda: float = 0.9
    """lambda of the critic's targets, eq. (8)"""
    update_epochs: int = 4
    """passes over the samples of a segment"""
    num_minibatches: int = 8
    """minibatches per pass"""
    clip_coef: float = 0.2
    """c, the trust region: how far the probability ratio may move from 1 before a sample gains nothing more"""
    ent_coef: float = 0.03
    """weight of an entropy bonus, which keeps sigma from shrinking early"""
    max_grad_norm: float = 1.0
    """the joint gradient norm of actor and critic is clipped to this"""
    average_eta: float = 8.0
    """eta of the averaged policy, which reaches back over 1 / (eta + 1) of the training; 0: the last weights"""
    log_std: float = 0.0
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
    "pointmass": dict(total_env_steps=40_000, num_envs=16, segment=16, num_minibatches=4, learning_rate=2e-3,
                      gae_lambda=0.95, ent_coef=0.0, log_std=-0.5),
    "navigation": dict(log_std=-0.5),
    "pusht": dict(total_env_steps=2_000_000, num_envs=256, gamma=0.98, log_std=-0.5),
}  # fmt: skip

# --- 1. roll out a segment ----------------------------------------------------------------------------------------------


class Segment(NamedTuple):
    """K steps of N environments."""

    observations: torch.Tensor  # [K, N, O]
    us: torch.Tensor  # [K, N, A], actions before squashing
    rewards: torch.Tensor  # [K, N]
    truncations: torch.Tensor  # [K, N] bool, where an episode ends
    final_observations: torch.Tensor  # [K, N, O], what each step led to, before any reset


@torch.no_grad()
def rollout(env: envs.Env, actor: Actor, normalizer: Normalizer, steps: int) -> Segment:
    """Run the policy for one segment."""
    eps = torch.randn(steps, env.num_envs, env.action_size, dtype=env.dtype, device=env.device)
    noise = actor.log_std.exp() * eps  # (K, N, A)
    observation, record = env.observe(env.state), []
    for k in range(steps):
        u = actor.mean(normalizer(observation)) + noise[k]  # eq. (2)
        next_observation, reward, _, truncated, info = env.step(torch.tanh(u))
        record.append(Segment(observation, u, reward, truncated, info["final_obs"]))
        observation = next_observation
    return Segment(*map(torch.stack, zip(*record)))  # each (K, N, ...)


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


def surrogate(advantage: torch.Tensor, log_ratio: torch.Tensor, clip_coef: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The objective of a minibatch of M samples: actions with an advantage become likelier, inside a trust region.

    advantage [M]; log_ratio [M], log of the probability of u under the policy over that under the rollout policy.
    Returns the objective, and which samples are masked [M]: the gradient of a clipped ratio is zero.
    """
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    masked = clipped * advantage < ratio * advantage
    return torch.min(ratio * advantage, clipped * advantage).mean(), masked  # eq. (7)


# --- training -----------------------------------------------------------------------------------------------------------


def main() -> None:
    args = models.parse(Args, TUNED)
    run = models.Run("ppo", args)
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
        segment = rollout(env, actor, normalizer, args.segment)

        # 2. Estimate the advantage of each action, and the critic's targets.
        with torch.no_grad():
            inputs, next_values = normalizer(segment.observations), critic(normalizer(segment.final_observations))
            old_log_probs = actor.distribution(inputs).log_prob(segment.us).sum(-1)
            if args.bootstrap != "critic":  # the return beyond an end counts as zero
                next_values[-1] = 0.0
                next_values.masked_fill_(segment.truncations, 0.0)
            targets = lambda_returns(segment, next_values, args.gamma, args.gae_lambda)
            advantages = targets - critic(inputs)  # (K, N), GAE

        # 3. Learn, in epochs and minibatches. Skip what is not finite.
        samples = [x.flatten(0, 1) for x in (inputs, segment.us, old_log_probs, targets, advantages)]  # (K N, ...)
        finite, metrics = all(x.isfinite().all() for x in samples), []
        for _ in range(args.update_epochs if finite else 0):
            for index in torch.randperm(args.segment * args.num_envs, device=env.device).tensor_split(args.num_minibatches):
                o, u, old_log_prob, target, advantage = [x[index] for x in samples]  # (M, ...)
                distribution = actor.distribution(o)
                log_ratio = distribution.log_prob(u).sum(-1) - old_log_prob
                objective, masked = surrogate(advantage, log_ratio, args.clip_coef)
                entropy = distribution.entropy().sum(-1).mean()
                loss = -objective - args.ent_coef * entropy
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
                    "approx_kl": (log_ratio.exp() - 1 - log_ratio).mean(),
                    "clip_fraction": masked.float().mean(), "entropy": entropy,
                    "critic_loss": critic_loss, "explained_variance": 1 - critic_loss / targets.var(),
                })
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
