"""Proximal Policy Optimization (Schulman et al. 2017): train a policy by raising the probability of what turned out well.

    python ppo.py --env franka

One file, read from top to bottom; equation numbers are the README's. `diff ppo.py apg.py` shows the algorithms' difference.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.utils import clip_grad_norm_

import envs
import models
from models import Actor, Critic, Normalizer


@dataclass
class Args:
    """Proximal Policy Optimization. Other tasks than the arm have defaults of their own, in TUNED."""

    env: str = "franka"
    """task: pointmass, navigation, pusht or franka"""
    segment: int = 32
    """K, control steps of a segment: 1 to T, the episode's length"""
    bootstrap: Literal["none", "mc", "critic"] = "critic"
    """what stands for the return past a segment: nothing, the rest of the episode, or V of its last observation"""
    total_env_steps: int = 8_000_000
    """control steps x environments to train for"""
    num_envs: int = 512
    """N, environments stepped together"""
    learning_rate: float = 4e-3
    """Adam's for the actor; decays linearly, to a hundredth"""
    critic_learning_rate: float = 6e-3
    """Adam's for the critic; decays likewise"""
    gamma: float = 0.95
    """discount"""
    gae_lambda: float = 0.95
    """lambda of the critic's targets"""
    update_epochs: int = 4
    """passes over the samples of a segment"""
    num_minibatches: int = 8
    """minibatches a pass"""
    clip_coef: float = 0.2
    """the trust region: how far a sample's probability ratio may move from 1 before more of it gains nothing"""
    max_grad_norm: float = 1.0
    """gradient norms of actor and critic are clipped to this"""
    hidden: int = 128
    """units in each of the two hidden layers of actor and critic"""
    seed: int = 1
    """of weights, starts and action noise; evaluation has its own, fixed one"""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    threads: int = 1
    """CPU threads of torch; more than one pays off on idle cores only, and changes the rounding"""
    num_evals: int = 40
    """evaluations after the one at the start, spread evenly over the training; each writes a checkpoint"""
    tensorboard: bool = False
    """log for TensorBoard too, into the run folder, under CleanRL's names; needs `pip install tensorboard`"""
    wandb: bool = False
    """log to Weights & Biases too, under CleanRL's names; needs `pip install wandb tensorboard`"""
    run_dir: str | None = None
    """where to write config.json, metrics.csv and checkpoint.pt; default runs/{env}__{algorithm}__{seed}__{time}"""
    resume: str | None = None
    """a run folder to go on from, with its own settings: leave out the other flags"""


TUNED = {
    "pointmass": {"total_env_steps": 100_000, "num_envs": 16, "segment": 16, "num_minibatches": 4, "learning_rate": 2e-3},
    "navigation": {"total_env_steps": 6_000_000, "learning_rate": 2e-3, "critic_learning_rate": 2e-3},
    "pusht": {"total_env_steps": 4_000_000, "num_envs": 256, "learning_rate": 3e-3, "gamma": 0.98, "gae_lambda": 0.9},
    "franka": {},
}
FIGURES = "actor_loss", "critic_loss", "gradient_norm", "approx_kl", "clip_fraction", "explained_variance", "entropy"

# --- 1. roll out a segment ----------------------------------------------------------------------------------------------


@torch.no_grad()
def rollout(env: envs.Env, actor: Actor, normalizer: Normalizer, steps: int) -> list[torch.Tensor]:
    """Run the policy for one segment; nothing is recorded for backpropagation.

    Returns a record, each [K, N, ...]: observation, u, reward, truncated, final observation.
    """
    eps = torch.randn(steps, env.num_envs, env.action_size, dtype=env.dtype, device=env.device)
    noise = actor.log_std.exp() * eps  # (K, N, A)
    observation, record = env.observe(env.state), []
    for kick in noise.unbind():
        u = actor.mean(normalizer(observation)) + kick  # eq. (2)
        next_observation, reward, _, truncated, info = env.step(torch.tanh(u))
        record.append((observation, u, reward, truncated, info["final_obs"]))
        observation = next_observation
    return [torch.stack(column) for column in zip(*record)]


# --- 2. judge it --------------------------------------------------------------------------------------------------------


def lambda_returns(
    reward: torch.Tensor, truncated: torch.Tensor, next_value: torch.Tensor, gamma: float, gae_lambda: float
) -> torch.Tensor:
    """G = r + gamma ((1 - lambda) V' + lambda G'), but r + gamma V' where episode or segment end (eq. 8). [K, N]"""
    returns, following = torch.empty_like(reward), next_value[-1]
    for k in reversed(range(len(reward))):
        mixed = (1 - gae_lambda) * next_value[k] + gae_lambda * following
        following = reward[k] + gamma * torch.where(truncated[k], next_value[k], mixed)  # eq. (8)
        returns[k] = following
    return returns


# --- 3. learn from it ---------------------------------------------------------------------------------------------------


def surrogate(advantage: torch.Tensor, log_ratio: torch.Tensor, clip_coef: float) -> torch.Tensor:
    """What a minibatch of M samples maximises []: actions with an advantage become likelier, inside a trust region.

    advantage [M]; log_ratio [M], log of the probability of u under the policy over that under the one that acted.
    """
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    ratio = log_ratio.exp()
    return torch.min(ratio * advantage, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantage).mean()  # eq. (7)


# --- training -----------------------------------------------------------------------------------------------------------


def main() -> None:
    args = models.parse(Args, TUNED)
    run = models.Run("ppo", args)
    env = envs.make(args.env, args.num_envs, args.device, args.seed)
    actor = Actor(env.observation_size, env.action_size, args.hidden).to(args.device)
    critic = Critic(env.observation_size, args.hidden).to(args.device)
    normalizer = Normalizer(env.observation_size).to(args.device)
    rates = args.learning_rate, args.critic_learning_rate
    optimizer = models.make_optimizer(actor, critic, rates)
    parts = {"actor": actor, "critic": critic, "normalizer": normalizer, "optimizer": optimizer}

    # In `mc` an iteration is a whole episode. Otherwise it is one segment, and the environments' episodes are out of step
    # with each other, so that every segment sees all phases of an episode.
    steps = env.episode_length if args.bootstrap == "mc" else args.segment
    if args.bootstrap != "mc":
        env.elapsed = torch.randint(env.episode_length, (env.num_envs,), generator=env.generator, device=env.device)

    for progress in run.iterations(parts, env):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * max(1 - progress, 0.01)

        # 1. Roll out a segment; in `mc`, an episode.
        observations, us, rewards, truncations, final_observations = rollout(env, actor, normalizer, steps)  # [K, N, ...]

        # 2. Judge it: the critic's targets; the advantage of each action.
        with torch.no_grad():
            inputs, next_values = normalizer(observations), critic(normalizer(final_observations))
            old_log_probs = actor.distribution(inputs).log_prob(us).sum(-1)
            if args.bootstrap != "critic":  # nothing stands for the return past an end
                next_values[-1] = 0.0
                next_values.masked_fill_(truncations, 0.0)
            gae_lambda = 1.0 if args.bootstrap == "mc" else args.gae_lambda
            targets = lambda_returns(rewards, truncations, next_values, args.gamma, gae_lambda)  # [K, N]
            advantages = targets - critic(inputs)  # [K, N], GAE
        # Sums of squares are finite if all numbers are, and small enough to be averaged.
        finite = math.isfinite(sum(x.square().sum() for x in (observations, rewards, targets, us)))

        # 3. Learn from it, in epochs and minibatches. A segment with a number that is not finite teaches nothing.
        samples = [x.flatten(0, 1) for x in (inputs, us, old_log_probs, targets, advantages)]  # [K N, ...]
        stepped = []
        for _ in range(args.update_epochs if finite else 0):
            order = torch.randperm(len(us) * env.num_envs, device=env.device)
            for o, u, old_log_prob, target, advantage in zip(*(x[order].chunk(args.num_minibatches) for x in samples)):
                policy = actor.distribution(o)
                log_ratio = policy.log_prob(u).sum(-1) - old_log_prob
                objective = surrogate(advantage, log_ratio, args.clip_coef)
                critic_loss = (critic(o) - target).square().mean()

                optimizer.zero_grad()
                (critic_loss - objective).backward()
                norms = [clip_grad_norm_(group["params"], args.max_grad_norm) for group in optimizer.param_groups]
                stepped.append(math.isfinite(sum(norms) + critic_loss.detach()))
                if stepped[-1]:
                    optimizer.step()
                    actor.log_std.data.clamp_(min=math.log(models.MIN_STD))
        figures = {}
        if finite:
            normalizer.update(observations)
            # All these are of the last minibatch.
            kl = (log_ratio.exp() - 1 - log_ratio).mean()  # Schulman's low-variance estimate
            outside = ((log_ratio.exp() - 1).abs() > args.clip_coef).float().mean()
            explained = 1 - (target - critic(o)).var() / target.var()
            values = -objective, critic_loss, norms[0], kl, outside, explained, policy.entropy().sum(-1).mean()
            figures = dict(zip(FIGURES, torch.stack(values).tolist()))
        run.count(rewards, truncations, stepped or [False], figures)


if __name__ == "__main__":
    models.command(main)
