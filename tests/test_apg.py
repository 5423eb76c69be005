"""APG's update against plain backpropagation of the whole graph; its parts against numbers worked out by hand; learning."""

import functools
import math
import types

import pytest
import torch
from kill import rows, train

import apg
import envs
import models
import ppo

GAMMA = 0.97


@pytest.fixture
def float64(monkeypatch):
    monkeypatch.setattr(envs, "make", functools.partial(envs.make, dtype=torch.float64))
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def prepare(env, actor, critic, normalizer):
    """The same at each call: weights that move things, ends of episodes after steps 1, 4 and 20."""
    torch.manual_seed(0)
    for parameter in [*actor.parameters(), *critic.parameters()]:
        parameter.data = 0.3 * torch.randn_like(parameter)
    normalizer.mean += 0.1
    env.reset(seed=3)
    env.elapsed = env.episode_length - torch.tensor([1, 4, 20])
    torch.manual_seed(1)


def plain(task, segment, bootstrap, cut=False):
    """g [steps, 3, A] and the policy's gradient, flat, by one loop and one backward. `cut`: each step by itself."""
    env = envs.make(task, 3)
    actor, critic = models.Actor(env.observation_size, env.action_size, 16), models.Critic(env.observation_size, 16)
    normalizer = models.Normalizer(env.observation_size)
    prepare(env, actor, critic, normalizer)
    steps = env.episode_length if bootstrap == "mc" else segment
    lengths = [min(segment, steps - k) for k in range(0, steps, segment)]
    eps = torch.cat([torch.randn(length, 3, env.action_size) for length in lengths])  # drawn as APG draws them
    total, discount, us = 0.0, torch.ones(3), []
    for k in range(steps):
        if cut:
            env.detach()
        u = actor.mean(normalizer(env.observe(env.state))) + actor.log_std.exp() * eps[k]
        u.retain_grad()
        us.append(u)
        _, reward, _, ended, info = env.step(torch.tanh(u))
        total = total + (discount * reward).sum()
        discount = GAMMA * discount
        if bootstrap == "critic":
            tail = discount * critic(normalizer(info["final_obs"]))
            total = total + tail[ended | (k == steps - 1)].sum()
        discount = torch.where(ended, 1.0, discount)
    total.backward()
    return torch.stack([u.grad for u in us]), torch.cat([p.grad.flatten() for p in actor.parameters()])


def iterate(monkeypatch, task, segment, bootstrap, costate_clip=0.0, iterations=1):
    """`apg.main` for a few iterations of one epoch in one minibatch, without files and evaluations.

    Returns g and gradient as `plain` does, of the last iteration; the states that segments start from; and the gradients
    that the pass through the simulator left on the weights.
    """
    seen = types.SimpleNamespace(starts=[], left=[])

    class Run:
        def __init__(self, algorithm, args):
            pass

        def iterations(self, parts, env):
            self.actor, self.critic = parts["actor"], parts["critic"]
            prepare(env, self.actor, self.critic, parts["normalizer"])
            seen.run = self
            yield from [0.0] * iterations

        def count(self, rewards, *others, **figures):
            flat = torch.cat([p.grad.flatten() for p in self.actor.parameters()])
            seen.gradient = -rewards.numel() * flat  # the loss is minus a mean over samples

    def judge(segments, action_gradients=apg.action_gradients):
        for network in (seen.run.actor, seen.run.critic):
            network.zero_grad()
        seen.g = action_gradients(segments)
        seen.starts += [start for start, *_ in segments]
        seen.left += [p.grad for network in (seen.run.actor, seen.run.critic) for p in network.parameters()]
        return seen.g

    args = apg.Args(
        env=task, segment=segment, bootstrap=bootstrap, costate_clip=costate_clip, num_envs=3, learning_rate=1e-3,
        gamma=GAMMA, update_epochs=1, num_minibatches=1, max_grad_norm=math.inf, hidden=16,
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(models, "parse", lambda *_: args)
        patch.setattr(models, "Run", Run)
        patch.setattr(apg, "action_gradients", judge)
        apg.main()
    return seen


def check(seen, expected):
    for a, b in zip((seen.g, seen.gradient), expected, strict=True):
        assert b.abs().max() > 1e-3  # a comparison of zeros would prove nothing
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10 * b.abs().max().item())


@pytest.mark.parametrize("bootstrap", ["none", "critic", "mc"])
@pytest.mark.parametrize("segment", [1, 7, 32, "T"])
@pytest.mark.parametrize("task", list(envs.TASKS))
def test_the_update_is_plain_backpropagation(task, segment, bootstrap, float64, monkeypatch):
    """Eq. (3) to (5). In `mc` through the whole episode, whatever the segment."""
    segment = envs.EPISODE_LENGTH[task] if segment == "T" else segment
    check(iterate(monkeypatch, task, segment, bootstrap), plain(task, segment, bootstrap))


def no_costate(action_gradients):
    return lambda segments: torch.cat([action_gradients([segment]) for segment in segments])


def no_gradient_of_v(rollout):
    return lambda *args: rollout(*args[:-1], lambda observation: args[-1](observation.detach()))


def discount_off_by_one(rollout):
    return lambda *args: rollout(*args[:5], args[5] + 1, *args[6:])


def eps_used_again(rollout):
    def broken(*args):
        *others, record = rollout(*args)
        record[1] = record[1][:1].expand_as(record[1])
        return *others, record

    return broken


@pytest.mark.parametrize(
    ("name", "broken", "bootstrap"),
    [
        ("action_gradients", no_costate, "mc"), ("rollout", no_gradient_of_v, "critic"),
        ("rollout", eps_used_again, "none"), ("rollout", discount_off_by_one, "none"),
    ],
)  # fmt: skip
def test_that_check_can_fail(name, broken, bootstrap, float64, monkeypatch):
    monkeypatch.setattr(apg, name, broken(getattr(apg, name)))
    with pytest.raises(AssertionError, match="not close"):
        check(iterate(monkeypatch, "pointmass", 7, bootstrap), plain("pointmass", 7, bootstrap))


@pytest.mark.parametrize("bootstrap", ["none", "critic", "mc"])
def test_a_cut_lets_a_costate_through_in_mc_only(bootstrap, monkeypatch):
    starts = iterate(monkeypatch, "pointmass", 50, bootstrap, iterations=2).starts
    assert all(start.is_leaf and start.requires_grad == (bootstrap == "mc") for start in starts)


def test_no_gradient_passes_an_episodes_end():
    env = envs.make("pointmass", 3)
    actor, critic, normalizer = models.Actor(3, 1, 16), models.Critic(3, 16), models.Normalizer(3)
    prepare(env, actor, critic, normalizer)
    noise, *_ = apg.rollout(env, actor, normalizer, 7, GAMMA)  # episodes end after steps 1 and 4
    (gradient,) = torch.autograd.grad(env.state.sum(), noise)
    assert (gradient[..., 0] != 0).T.tolist() == [[k >= end for k in range(7)] for end in (1, 4, 0)]


def test_the_pass_through_the_simulator_leaves_no_gradient_on_weights(monkeypatch):
    assert set(iterate(monkeypatch, "pointmass", 7, "critic").left) == {None}


def test_costate_clip_bounds_each_environments_norm():
    state = torch.zeros(4, 2, requires_grad=True) * 1
    state.retain_grad()
    apg.clip_costate(state, 0.5)
    (state * torch.tensor([[3.0, 4.0], [0.1, 0.0], [1e30, 1.0], [0.0, 0.0]])).sum().backward()
    torch.testing.assert_close(state.grad[[0, 1, 3]], torch.tensor([[0.3, 0.4], [0.1, 0.0], [0.0, 0.0]]))
    assert state.grad[2].isnan().any()  # its square is too large: seen, not made zero


def test_costate_clip_is_at_every_step_and_at_cuts(float64, monkeypatch):
    """A bound of next to nothing lets an action be judged by its own step's reward only."""
    check(iterate(monkeypatch, "pointmass", 7, "mc", costate_clip=1e-15), plain("pointmass", 7, "mc", cut=True))


@pytest.mark.parametrize("trainer", [apg, ppo], ids=["apg", "ppo"])
def test_lambda_returns_by_hand(trainer):
    """gamma 0.5, lambda 0.5. In the first environment the segment ends; in the second an episode, after step 1."""
    reward = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    next_value = torch.tensor([[4.0, 4.0], [8.0, 8.0], [16.0, 16.0]])
    truncated = torch.tensor([[False, False], [False, True], [False, False]])
    # G2 = 3 + .5*16 = 11; G1 = 2 + .5*(.5*8 + .5*11) = 6.75; G0 = 1 + .5*(.5*4 + .5*6.75) = 3.6875
    # with the end: G1 = 2 + .5*8 = 6; G0 = 1 + .5*(.5*4 + .5*6) = 3.5
    expected = torch.tensor([[3.6875, 3.5], [6.75, 6.0], [11.0, 11.0]])
    assert torch.equal(trainer.lambda_returns(reward, truncated, next_value, 0.5, 0.5), expected)


def test_surrogate_by_hand():
    """Eq. (6): within the trust region each gradient counts, outside it only where the action went the other way."""
    mean, log_std = torch.zeros(5, 2, requires_grad=True), torch.zeros(2, requires_grad=True)
    policy = torch.distributions.Normal(mean, log_std.exp())
    eps, gradient = torch.full((5, 2), 3.0), torch.tensor([[1.0, -2.0]]).expand(5, 2)
    moved = torch.tensor([[0.0, 0.0], [0.3, -0.3], [-0.3, 0.3], [0.6, -0.6], [-0.6, 0.6]])  # norms up to 0.85
    apg.surrogate(policy, eps, gradient, 3.0 - moved, clip_coef=0.5).backward()
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])[:, None] / 5
    torch.testing.assert_close(mean.grad, weight * gradient)
    torch.testing.assert_close(log_std.grad, (weight * gradient * eps).sum(0))


def test_normalizer_merges_batches():
    batches, normalizer = (3 * torch.randn(50, 4) + 1, torch.randn(7, 10, 4)), models.Normalizer(4)
    for batch in batches:
        normalizer.update(batch)
    merged = torch.cat([batch.reshape(-1, 4) for batch in batches])
    torch.testing.assert_close(normalizer.mean, merged.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normalizer.var, merged.var(0, unbiased=False), rtol=1e-4, atol=1e-4)


def test_pointmass_is_learnt(tmp_path):
    flags = ["--env", "pointmass", "--total-env-steps", 5000, "--num-evals", 1, "--threads", 1]
    assert train("apg", *flags, "--run-dir", tmp_path / "run") == 0
    first, last = (float(row["eval_success"]) for row in rows(tmp_path / "run"))
    assert first < 0.2 and last >= 0.9
