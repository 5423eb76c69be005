"""Analytic Policy Gradients: train a policy by backpropagating the return through a differentiable simulator.

    python apg.py --env franka --segment 32 --bootstrap critic

One file, read from top to bottom; equation numbers are the README's. `diff ppo.py apg.py` shows the algorithms' difference.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.utils import clip_grad_norm_

import envs
import models
from models import Actor, Critic, Normalizer


@dataclass
class Args:
    """Analytic Policy Gradients. Other tasks than the arm have defaults of their own, in TUNED."""

    env: str = "franka"
    """task: pointmass, navigation, pusht or franka"""
    segment: int = 32
    """K, control steps of a segment: 1 to T, the episode's length"""
    bootstrap: Literal["none", "mc", "critic"] = "critic"
    """what stands for the return past a segment: nothing, the rest of the episode, or V of its last observation"""
    costate_clip: float = 0.0
    """bound on the norm of the costate, each environment's dJ / dx, as a step hands it back; 0: none"""
    total_env_steps: int = 1_500_000
    """control steps x environments to train for"""
    num_envs: int = 64
    """N, environments stepped together"""
    learning_rate: float = 2e-3
    """Adam's for the actor; decays linearly, to a hundredth"""
    critic_learning_rate: float = 6e-3
    """Adam's for the critic; decays likewise"""
    gamma: float = 0.95
    """discount"""
    gae_lambda: float = 0.95
    """lambda of the critic's targets"""
    update_epochs: int = 2
    """passes over the samples of a segment"""
    num_minibatches: int = 4
    """minibatches a pass"""
    clip_coef: float = 0.3
    """the trust region: a sample whose action u has moved farther than this, and not back, counts no more"""
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
    "pointmass": {"total_env_steps": 10_000, "num_envs": 4, "segment": 16, "update_epochs": 4},
    "navigation": {"total_env_steps": 300_000, "num_envs": 32, "segment": 8, "bootstrap": "none", "clip_coef": 1.0},
    "pusht": {"total_env_steps": 1_500_000, "num_envs": 256, "segment": 16, "update_epochs": 8, "learning_rate": 4e-3,
              "gamma": 0.98, "gae_lambda": 0.9, "clip_coef": 0.2, "costate_clip": 10.0},
    "franka": {},
}  # fmt: skip
FIGURES = "actor_loss", "critic_loss", "gradient_norm", "approx_kl", "clip_fraction", "explained_variance", "entropy"

# --- 1. roll out a segment ----------------------------------------------------------------------------------------------


def clip_costate(state: torch.Tensor, limit: float) -> None:
    """Bound each environment's costate norm when the backward pass comes through `state` [N, S]."""

    def bounded(costate):
        if costate is not None:  # None where nothing depends on the state
            norm = costate.norm(dim=1, keepdim=True)
            norm = norm.where(norm.isfinite(), torch.nan)  # a division by infinity would make it zero, and unseen
            return costate * (limit / norm.clamp(min=limit))

    state.register_hook(bounded)


def rollout(
    env: envs.Env, actor: Actor, normalizer: Normalizer, steps: int, gamma: float, before: int = 0,
    costate_clip: float = 0.0, value: Callable | None = None,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:  # fmt: skip
    """Run the policy for one segment, recording the graph from every action's noise to the objective.

    before: steps of the same return before this segment, 0 except in `mc`; value [M, O] -> [M] is B of eq. (3), None for
    B = 0. The weights ask for no gradient. Returns sigma eps [K, N, A], a leaf that asks for its gradient; J of eq. (3),
    summed over environments; and a record, each [K, N, ...]: observation, eps, u, reward, truncated, final observation.
    """
    eps = torch.randn(steps, env.num_envs, env.action_size, dtype=env.dtype, device=env.device)
    noise = (actor.log_std.exp() * eps).detach().requires_grad_()  # (K, N, A)
    actor.requires_grad_(False)
    observation, elapsed, record = env.observe(env.state), [], []
    for kick in noise.unbind():
        elapsed.append(env.elapsed)
        u = actor.mean(normalizer(observation)) + kick  # eq. (2)
        next_observation, reward, _, truncated, info = env.step(torch.tanh(u))
        record.append((observation, u, reward, truncated, info["final_obs"]))
        if costate_clip > 0:
            clip_costate(env.state, costate_clip)
            next_observation = env.observe(env.state)  # again, so that all of the state's gradient passes the hook
        observation = next_observation
    observations, us, rewards, truncations, final_observations = (torch.stack(column) for column in zip(*record))
    since_start = torch.arange(before, before + steps, device=env.device)[:, None]
    discounts = gamma ** torch.minimum(torch.stack(elapsed), since_start)  # from an episode's start, where one is inside
    objective = (discounts * rewards).sum()  # eq. (3), rewards
    if value is not None:
        ends = truncations.clone()
        ends[-1] = True
        objective = objective + (gamma * discounts[ends] * value(final_observations[ends])).sum()  # eq. (3), tail
    actor.requires_grad_(True)
    return noise, objective, [x.detach() for x in (observations, eps, us, rewards, truncations, final_observations)]


# --- 2. judge it --------------------------------------------------------------------------------------------------------


def action_gradients(segments: list) -> torch.Tensor:
    """g = dJ / du of every action (eq. 4) [steps, N, A], differentiating the segments from last to first.

    segments: (start state, noise, objective, end state). Where a start state asks for its gradient, the costate dJ / dx,
    that is handed to the segment before, whose actions led there.
    """
    gradients, costate = [], None
    for start, noise, objective, end in reversed(segments):
        if costate is None:
            objective.backward()
        else:
            torch.autograd.backward([objective, end], [None, costate])
        costate = start.grad
        gradients.insert(0, noise.grad)  # eq. (4)
    return torch.cat(gradients)


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


def surrogate(
    policy: torch.distributions.Normal, eps: torch.Tensor, gradient: torch.Tensor, u: torch.Tensor, clip_coef: float
) -> torch.Tensor:
    """What a minibatch of M samples maximises []: each action moves along its gradient, inside a trust region.

    policy of [M, A]; eps, gradient g and u, where that gradient was taken, [M, A]. A gradient says nothing of places far
    from there, so a sample whose action is more than clip_coef away counts no more, unless other samples have carried it
    against its gradient. Where nothing has moved yet, the derivative is the mean of g . du / dtheta (eq. 5).
    """
    new_u = policy.mean + policy.stddev * eps
    moved = (new_u - u).detach()
    inside = (moved.norm(dim=-1) <= clip_coef) | ((gradient * moved).sum(-1) <= 0)
    return (inside[:, None] * gradient * new_u).sum(-1).mean()  # eq. (6)


# --- training -----------------------------------------------------------------------------------------------------------


def main() -> None:
    args = models.parse(Args, TUNED)
    run = models.Run("apg", args)
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
    value = (lambda observation: critic(normalizer(observation))) if args.bootstrap == "critic" else None

    for progress in run.iterations(parts, env):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * max(1 - progress, 0.01)

        # 1. Roll out a segment; in `mc`, the segments of an episode. States are detached at the start of each.
        segments, records = [], []
        critic.requires_grad_(False)
        for cut in range(0, steps, args.segment):
            env.detach()
            start = env.state.requires_grad_(args.bootstrap == "mc")
            length = min(args.segment, steps - cut)
            noise, objective, record = rollout(env, actor, normalizer, length, args.gamma, cut, args.costate_clip, value)
            segments.append((start, noise, objective, env.state))
            records.append(record)
        critic.requires_grad_(True)
        observations, eps, us, rewards, truncations, final_observations = (torch.cat(x) for x in zip(*records))

        # 2. Judge it: the gradient of the return in each action; the critic's targets.
        g = action_gradients(segments)  # [K, N, A]
        env.detach()
        with torch.no_grad():
            inputs, next_values = normalizer(observations), critic(normalizer(final_observations))
            old_log_probs = actor.distribution(inputs).log_prob(us).sum(-1)
            if args.bootstrap != "critic":  # nothing stands for the return past an end
                next_values[-1] = 0.0
                next_values.masked_fill_(truncations, 0.0)
            gae_lambda = 1.0 if args.bootstrap == "mc" else args.gae_lambda
            targets = lambda_returns(rewards, truncations, next_values, args.gamma, gae_lambda)  # [K, N]
        # Sums of squares are finite if all numbers are, and small enough to be averaged.
        finite = math.isfinite(sum(x.square().sum() for x in (observations, rewards, targets, g)))

        # 3. Learn from it, in epochs and minibatches. A segment with a number that is not finite teaches nothing.
        samples = [x.flatten(0, 1) for x in (inputs, us, old_log_probs, targets, eps, g)]  # [K N, ...]
        stepped = []
        for _ in range(args.update_epochs if finite else 0):
            order = torch.randperm(len(us) * env.num_envs, device=env.device)
            for o, u, old_log_prob, target, e, gradient in zip(*(x[order].chunk(args.num_minibatches) for x in samples)):
                policy = actor.distribution(o)
                objective = surrogate(policy, e, gradient, u, args.clip_coef)
                critic_loss = (critic(o) - target).square().mean() if value else objective.new_zeros(())

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
            log_ratio = policy.log_prob(u).sum(-1) - old_log_prob
            kl = (log_ratio.exp() - 1 - log_ratio).mean()  # Schulman's low-variance estimate
            outside = ((policy.mean + policy.stddev * e - u).norm(dim=-1) > args.clip_coef).float().mean()
            explained = 1 - (target - critic(o)).var() / target.var()
            values = -objective, critic_loss, norms[0], kl, outside, explained, policy.entropy().sum(-1).mean()
            figures = dict(zip(FIGURES, torch.stack(values).tolist()))
        run.count(rewards, truncations, stepped or [False], figures)


if __name__ == "__main__":
    models.command(main)
