"""benchmarks/gradients.py: each measure against its definition, worked out by a second route."""

import types

import torch

import apg
import envs
import models
from benchmarks import gradients


def networks():
    torch.manual_seed(3)
    normalizer = models.Normalizer(3)
    normalizer.update(torch.randn(64, 3))
    return models.Actor(3, 1), models.Critic(3), normalizer


def test_norm_of_one_environments_gradient():
    """From the graph from each of its actions to that environment's return; its episode ends inside the segment."""
    env, (actor, critic, normalizer) = envs.make("pointmass", 8), networks()
    norms, _ = gradients.gradient_health(env, actor, critic, normalizer, 0.9, 20, "critic", 0.0, draws=1)

    torch.manual_seed(1)
    env.reset(1)
    env.elapsed = torch.randint(env.episode_length, (8,), generator=env.generator)
    with torch.no_grad():
        apg.rollout(env, actor, None, normalizer, env.episode_length, 0.9, 0.0)
    i, ended = env.elapsed.argmax(), False
    eps, us, objective, observation = torch.randn(20, 8, 1), [], 0.0, env.observe(env.state)
    for k in range(20):
        us.append(actor.mean(normalizer(observation)) + actor.log_std.exp() * eps[k])
        observation, reward, _, truncated, info = env.step(torch.tanh(us[-1]))
        objective, ended = objective + 0.9**k * reward[i], ended or truncated[i]
        if truncated[i] or k == 19:
            objective = objective + 0.9 ** (k + 1) * critic(normalizer(info["final_obs"][i]))
    assert ended
    g = torch.stack(torch.autograd.grad(objective, us))[:, i]
    torch.testing.assert_close(norms[i], g.square().mean().sqrt(), rtol=1e-4, atol=0)


def test_signal_to_noise_grows_with_the_root_of_the_environments():
    """A mean over four times as many environments has half the spread."""
    ratios = []
    for num_envs in (64, 256):
        env, (actor, critic, normalizer) = envs.make("pointmass", num_envs), networks()
        ratios.append(gradients.gradient_health(env, actor, critic, normalizer, 0.9, 8, "none", 0.0, draws=64)[1])
    assert 1.5 < ratios[1] / ratios[0] < 2.7


def test_a_critic_that_is_the_return_has_its_slope():
    """V of a policy that does nothing, by the rewards themselves; and its negative."""
    env = envs.make("pointmass", 16)
    env.observe = lambda state: state
    zeros = lambda state: torch.zeros(len(state), 1)
    distribution = lambda state: torch.distributions.Normal(zeros(state), 1e-9)
    actor = types.SimpleNamespace(mean=zeros, log_std=torch.tensor([-20.0]), distribution=distribution)

    def value(state):
        total = 0.0
        for k in range(100):
            state, _, reward = env.dynamics(state, zeros(state))
            total = total + 0.9**k * reward
        return total

    for sign in (1, -1):
        critic = lambda state, sign=sign: sign * value(state)
        cosine, correlation = gradients.compare_slopes(env, actor, critic, lambda o: o, 0.9, samples=2)
        assert (sign * cosine).min() > 0.9999 and sign * correlation > 0.9999
