"""Short-Horizon Actor-Critic (SHAC; Xu et al. 2022, arXiv:2204.07137), a baseline for APG: the networks and tasks are ours.

    python benchmarks/shac.py --env franka

Differs from apg.py: plain backpropagation through policy and simulator, for one actor step per segment; a target critic;
the discount begins anew after an episode's end; Adam's betas are 0.7 and 0.95; by default the last weights are scored.
Difference from the paper: sigma has the floor that it has in apg.py.
"""

import copy
import math
import pathlib
import sys
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch.nn.utils import clip_grad_norm_

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import envs
import models
from apg import lambda_returns
from models import Actor, Critic, Normalizer


@dataclass
class Args:
    env: str = "franka"  # task: pointmass, navigation, pusht or franka
    segment: int = 32  # h, control steps of a segment
    bootstrap: Literal["critic"] = "critic"  # V of the target critic stands for the return beyond a segment
    total_env_steps: int = 1_000_000  # control steps x environments to train for
    num_envs: int = 32  # N, environments stepped together
    learning_rate: float = 8e-3  # Adam's learning rate for the actor; decays linearly to zero, like the critic's
    critic_learning_rate: float = 2e-3  # Adam's learning rate for the critic
    gamma: float = 0.95  # discount
    gae_lambda: float = 0.95  # lambda of the critic's targets
    target_alpha: float = 0.2  # alpha: after a segment, target = alpha target + (1 - alpha) critic
    update_epochs: int = 4  # the critic's passes over the samples of a segment; 16 in the paper
    num_minibatches: int = 4  # minibatches per pass
    max_grad_norm: float = 1.0  # gradient norms of actor and critic, each by itself, are clipped to this
    average_eta: float = 0.0  # eta of an averaged policy, as in apg.py; 0: the last weights, as in the paper
    log_std: float = -1.0  # initial log of the action noise sigma
    seed: int = 1  # seed of weights, initial states and action noise; evaluation has its own, fixed seed
    device: str = "cpu"  # cpu, cuda, cuda:1, ...
    num_evals: int = 40  # evaluations after the initial one, spread evenly over the training; each writes a checkpoint
    track: Literal["tensorboard", "wandb"] | None = None  # also log there
    run_dir: str | None = None  # where to write; default runs/{env}__{algorithm}__{seed}__{time}
    resume: str | None = None  # run folder to resume; all other flags are read from it and must not be given


TUNED = {  # each with as many tries as APG had: results/tries.csv
    "pointmass": {"total_env_steps": 10_000, "num_envs": 4, "segment": 16, "learning_rate": 16e-3},
    "navigation": {"total_env_steps": 600_000, "segment": 4, "learning_rate": 2e-3},
    "pusht": {"num_envs": 128, "segment": 2, "gamma": 0.98},
}


class Segment(NamedTuple):
    """h steps of N environments."""

    observations: torch.Tensor  # [h, N, O]
    rewards: torch.Tensor  # [h, N]
    truncations: torch.Tensor  # [h, N] bool, where an episode ends
    final_observations: torch.Tensor  # [h, N, O], what each step led to, before any reset


def rollout(
    env: envs.Env, actor: Actor, target_critic: Critic, normalizer: Normalizer, steps: int, gamma: float
) -> tuple[Segment, torch.Tensor]:
    """Run the policy for one segment. Returns it, and the policy loss [] with its graph back to the weights."""
    env.detach()
    observation, record = env.observe(env.state), []
    for _ in range(steps):
        u = actor.distribution(normalizer(observation)).rsample()
        next_observation, reward, _, truncated, info = env.step(torch.tanh(u))
        record.append(Segment(observation, reward, truncated, info["final_obs"]))
        observation = next_observation
    segment = Segment(*map(torch.stack, zip(*record)))  # each (h, N, ...)

    discount = torch.ones_like(segment.rewards)  # gamma to the power of the steps since segment or episode began
    for k in range(1, steps):
        discount[k] = torch.where(segment.truncations[k - 1], 1.0, gamma * discount[k - 1])
    ends = segment.truncations.clone()
    ends[-1] = True
    values = target_critic(normalizer(segment.final_observations[ends]))
    loss = -((discount * segment.rewards).sum() + (gamma * discount[ends] * values).sum()) / discount.numel()
    return Segment(*(x.detach() for x in segment)), loss


def main() -> None:
    args = models.parse(Args, TUNED)
    run = models.Run("shac", args)
    env = envs.make(args.env, args.num_envs, args.device, args.seed)
    actor = Actor(env.observation_size, env.action_size, args.log_std).to(args.device)
    critic = Critic(env.observation_size).to(args.device)
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    normalizer = Normalizer(env.observation_size).to(args.device)
    optimizer = models.make_optimizer(actor, critic)
    for group in optimizer.param_groups:
        group["betas"] = (0.7, 0.95)
    policy = models.averaged(actor, args.average_eta)
    env.elapsed = torch.randint(env.episode_length, (env.num_envs,), generator=env.generator, device=env.device)

    run.start(env, policy, normalizer, actor=actor, critic=critic, target_critic=target_critic, optimizer=optimizer)
    while run.env_steps < args.total_env_steps and not run.interrupted:
        decay = 1 - run.env_steps / args.total_env_steps  # linear, to zero
        optimizer.param_groups[0]["lr"] = decay * args.learning_rate
        optimizer.param_groups[1]["lr"] = decay * args.critic_learning_rate

        # 1. Roll out a segment, and backpropagate the policy loss through all of it.
        segment, loss = rollout(env, actor, target_critic, normalizer, args.segment, args.gamma)
        optimizer.zero_grad()
        loss.backward()  # to the actor only
        norm = clip_grad_norm_(actor.parameters(), args.max_grad_norm)
        with torch.no_grad():
            inputs, next_values = normalizer(segment.observations), target_critic(normalizer(segment.final_observations))
            targets = lambda_returns(segment, next_values, args.gamma, args.gae_lambda)

        # 2. Learn: the actor in one step, the critic in many; the target critic follows. Skip a segment that is not finite.
        finite, metrics, losses = all(x.isfinite().all() for x in (norm, inputs, targets)), [], []
        if finite:
            optimizer.step()  # moves the network that has a gradient: here the actor, below the critic
            actor.log_std.data.clamp_(min=math.log(models.MIN_STD))
            policy.update_parameters(actor)
            inputs, targets = inputs.flatten(0, 1), targets.flatten()  # (h N, ...)
            for _ in range(args.update_epochs):
                for index in torch.randperm(len(targets), device=env.device).tensor_split(args.num_minibatches):
                    critic_loss = (critic(inputs[index]) - targets[index]).square().mean()
                    optimizer.zero_grad()
                    critic_loss.backward()
                    clip_grad_norm_(critic.parameters(), args.max_grad_norm)
                    optimizer.step()
                    losses.append(critic_loss.detach())
            for slow, fast in zip(target_critic.parameters(), critic.parameters()):
                slow.data.lerp_(fast.data, 1 - args.target_alpha)
            normalizer.update(segment.observations)
            metrics.append({"actor_loss": loss, "gradient_norm": norm, "critic_loss": torch.stack(losses).mean()})

        run.count(args.segment * args.num_envs, 1, metrics)
        if run.evaluation_is_due():
            run.evaluate()
            run.save()
    run.finish()


if __name__ == "__main__":
    models.command(main)
