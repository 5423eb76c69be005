"""APG's update against plain backpropagation of the whole graph; its parts against numbers worked out by hand; learning."""

import functools
import math
import types

import pytest
import torch
from helpers import rows, program

import apg
import envs
import models
import ppo

GAMMA = 0.97


@pytest.fixture
def float64(monkeypatch):
    monkeypatch.setattr(envs, "make", functools.partial(envs.make, dtype=torch.float64))
    monkeypatch.setattr(models, "HIDDEN", 16)  # for speed
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def setup(task, bootstrap):
    """Three environments whose episodes end after 1, 4 and 20 steps, weights that move things, a normalizer that shifts."""
    env = envs.make(task, 3)
    actor, critic = models.Actor(env.observation_size, env.action_size), models.Critic(env.observation_size)
    normalizer = models.Normalizer(env.observation_size)
    torch.manual_seed(0)
    for parameter in [*actor.parameters(), *critic.parameters()]:
        parameter.data = 0.3 * torch.randn_like(parameter)
    normalizer.mean += 0.1
    env.reset(seed=3)
    if bootstrap != "mc":
        env.elapsed = env.episode_length - torch.tensor([1, 4, 20])
    torch.manual_seed(1)
    return env, actor, critic, normalizer


def run(task, steps, bootstrap, noise=None, cut=False):
    """J of eq. (3) by one plain loop, the actions u and the actor. noise: sigma eps [steps, 3, A], drawn as APG draws it
    unless given; `cut`: each step is its own graph."""
    env, actor, critic, normalizer = setup(task, bootstrap)
    if noise is None:
        noise = actor.log_std.exp() * torch.randn(steps, 3, env.action_size)
    total, us = 0.0, []
    for k in range(steps):
        if cut:
            env.detach()
        us.append(actor.mean(normalizer(env.observe(env.state))) + noise[k])
        _, reward, _, ended, info = env.step(torch.tanh(us[-1]))
        total = total + GAMMA**k * reward.sum()
        if bootstrap == "critic":
            total = total + GAMMA ** (k + 1) * critic(normalizer(info["final_obs"]))[ended | (k == steps - 1)].sum()
    return total, us, actor


def plain(*args, **kwargs):
    """J, g [steps, 3, A] of eq. (4) and the policy's gradient, flat, by one backward pass through the whole graph."""
    total, us, actor = run(*args, **kwargs)
    for u in us:
        u.retain_grad()
    total.backward()
    return total.detach(), torch.stack([u.grad for u in us]), flat(actor)


def flat(actor):
    return torch.cat([p.grad.flatten() for p in actor.parameters()])


def segment_of(task, steps, bootstrap, costate_clip=0.0):
    """J and g as `apg.main` takes them."""
    env, actor, critic, normalizer = setup(task, bootstrap)
    tail = critic if bootstrap == "critic" else None
    _, noise, objective = apg.rollout(env, actor, tail, normalizer, steps, GAMMA, costate_clip)
    (g,) = torch.autograd.grad(objective, noise)
    assert all(p.grad is None for network in (actor, critic) for p in network.parameters())
    return objective.detach(), g


def updated(task, steps, bootstrap, monkeypatch):
    """The policy's gradient, flat, that one iteration of `apg.main` takes in one epoch and one minibatch."""
    env, *networks = setup(task, bootstrap)
    found = []

    class Run:
        env_steps, interrupted = 0, 0
        __init__ = start = finish = lambda *args, **kwargs: None
        evaluation_is_due = lambda run: False

        def count(self, *args):
            found.append(-steps * 3 * flat(networks[0]))  # the loss is minus a mean over samples
            self.interrupted = 1

    args = apg.Args(
        env=task, segment=steps, bootstrap=bootstrap, num_envs=3, gamma=GAMMA, update_epochs=1, num_minibatches=1,
        max_grad_norm=math.inf,
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(models, "parse", lambda *_: args)
        patch.setattr(models, "Run", Run)
        patch.setattr(envs, "make", lambda *_: env)
        patch.setattr(torch, "randint", lambda *_, **__: env.elapsed)
        for name, network in zip(("Actor", "Critic", "Normalizer"), networks):
            patch.setattr(apg, name, lambda *_, network=network: network)
        torch.manual_seed(1)
        apg.main()
    return found[0]


def check(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert b.abs().max() > 1e-3  # a comparison of zeros would prove nothing
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10 * b.abs().max().item())


CASES = [(task, k, b) for task in envs.TASKS for b in ("none", "critic") for k in (1, 7, 32, "T")]
CASES += [(task, "T", "mc") for task in envs.TASKS]


@pytest.mark.parametrize(("task", "steps", "bootstrap"), CASES)
def test_the_update_is_plain_backpropagation(task, steps, bootstrap, float64, monkeypatch):
    """Eq. (3) to (5), against the whole graph in one loop."""
    steps = envs.TASKS[task](torch.float64).episode_length if steps == "T" else steps
    gradient = updated(task, steps, bootstrap, monkeypatch)
    check([*segment_of(task, steps, bootstrap), gradient], plain(task, steps, bootstrap))


@pytest.mark.parametrize(("task", "steps", "bootstrap"), CASES)
def test_g_is_the_finite_difference_of_j(task, steps, bootstrap, float64):
    """Along a random direction, by a fourth-order central difference."""
    steps = envs.TASKS[task](torch.float64).episode_length if steps == "T" else steps
    _, g = segment_of(task, steps, bootstrap)
    _, actor, *_ = setup(task, bootstrap)
    noise = (actor.log_std.exp() * torch.randn_like(g)).detach()  # the same as segment_of's
    direction = torch.randn_like(g) / g.shape[0] ** 0.5
    step = 1e-4 if task == "pusht" else 1e-3  # contact is smooth over a millimetre only
    j = lambda h: run(task, steps, bootstrap, noise + h * step * direction)[0].detach()
    difference = (8 * (j(1) - j(-1)) - (j(2) - j(-2))) / (12 * step)
    torch.testing.assert_close((g * direction).sum(), difference, rtol=1e-6 if task == "pusht" else 1e-9, atol=1e-9)


def no_gradient_of_v(rollout):
    return lambda env, actor, critic, *rest: rollout(env, actor, lambda observation: critic(observation.detach()), *rest)


def v_at_the_segments_end_only(rollout):
    def broken(env, actor, critic, normalizer, steps, gamma, costate_clip):
        data, noise, objective = rollout(env, actor, None, normalizer, steps, gamma, costate_clip)
        return data, noise, objective + gamma**steps * critic(normalizer(env.observe(env.state))).sum()

    return broken


def discounts_begin_anew(rollout):
    def broken(env, *args):
        env.elapsed -= 1  # every episode ends a step later
        return rollout(env, *args)

    return broken


@pytest.mark.parametrize("broken", [no_gradient_of_v, v_at_the_segments_end_only, discounts_begin_anew])
def test_that_check_can_fail(broken, float64, monkeypatch):
    monkeypatch.setattr(apg, "rollout", broken(apg.rollout))
    with pytest.raises(AssertionError, match="not close"):
        check(segment_of("pointmass", 7, "critic"), plain("pointmass", 7, "critic")[:2])


def test_no_gradient_passes_an_episodes_end():
    env, actor, _, normalizer = setup("pointmass", "none")
    _, noise, _ = apg.rollout(env, actor, None, normalizer, 7, GAMMA, 0.0)  # episodes end after steps 1 and 4
    (gradient,) = torch.autograd.grad(env.state.sum(), noise)
    assert (gradient[..., 0] != 0).T.tolist() == [[k >= end for k in range(7)] for end in (1, 4, 0)]


def test_costate_clip_bounds_each_environments_norm():
    state = torch.zeros(4, 2, requires_grad=True) * 1
    state.retain_grad()
    apg.clip_costate(state, 0.5)
    (state * torch.tensor([[3.0, 4.0], [0.1, 0.0], [1e30, 1.0], [0.0, 0.0]])).sum().backward()
    torch.testing.assert_close(state.grad[[0, 1, 3]], torch.tensor([[0.3, 0.4], [0.1, 0.0], [0.0, 0.0]]))
    assert state.grad[2].isnan().any()  # its square is too large: seen, not made zero


def test_costate_clip_acts_at_every_step(float64):
    """With a bound of next to nothing, an action's gradient is that of its own step's reward alone."""
    check(segment_of("pointmass", 7, "none", costate_clip=1e-15), plain("pointmass", 7, "none", cut=True)[:2])


@pytest.mark.parametrize("eta", [0.0, 1.0, 8.0])
def test_the_averaged_policy_by_its_formula(eta):
    """mean_n = mean_{n-1} + (eta + 1) / (n + eta) (theta_n - mean_{n-1}); with eta = 0 the last weights."""
    actor = models.Actor(2, 1)
    policy, mean = models.averaged(actor, eta), 0.0
    for n in range(1, 6):
        for parameter in actor.parameters():
            parameter.data = torch.randn_like(parameter)
        policy.update_parameters(actor)
        mean = mean + ((eta + 1) / (n + eta) if eta else 1) * (actor.mean[0].weight.detach() - mean)
        torch.testing.assert_close(policy.module.mean[0].weight, mean)
    observation = torch.randn(3, 2)
    torch.testing.assert_close(policy(observation), torch.tanh(policy.module.mean(observation)))


@pytest.mark.parametrize("trainer", [apg, ppo], ids=["apg", "ppo"])
def test_lambda_returns_by_hand(trainer):
    """gamma 0.5, lambda 0.5. In the first environment the segment ends; in the second an episode, after step 1."""
    reward = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    next_value = torch.tensor([[4.0, 4.0], [8.0, 8.0], [16.0, 16.0]])
    truncations = torch.tensor([[False, False], [False, True], [False, False]])
    # G2 = 3 + .5*16 = 11; G1 = 2 + .5*(.5*8 + .5*11) = 6.75; G0 = 1 + .5*(.5*4 + .5*6.75) = 3.6875
    # with the end: G1 = 2 + .5*8 = 6; G0 = 1 + .5*(.5*4 + .5*6) = 3.5
    expected = torch.tensor([[3.6875, 3.5], [6.75, 6.0], [11.0, 11.0]])
    segment = types.SimpleNamespace(rewards=reward, truncations=truncations)
    assert torch.equal(trainer.lambda_returns(segment, next_value, 0.5, 0.5), expected)


def test_surrogate_by_hand():
    """Eq. (6): within the trust region each gradient counts, outside it only if the action has moved against it."""
    moved = torch.tensor([[0.0, 0.0], [0.3, -0.3], [-0.3, 0.3], [0.6, -0.6], [-0.6, 0.6]], requires_grad=True)
    g = torch.tensor([[1.0, -2.0]]).expand(5, 2)
    objective, masked = apg.surrogate(moved, g, clip_coef=0.5)  # the norms of moved are up to 0.85
    assert masked.tolist() == [False, False, False, True, False]
    torch.testing.assert_close(objective, torch.tensor((0 + 0.9 - 0.9 - 1.8) / 5))
    objective.backward()
    torch.testing.assert_close(moved.grad, torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])[:, None] * g / 5)


def test_normalizer_merges_batches():
    batches, normalizer = (3 * torch.randn(50, 4) + 1, torch.randn(7, 10, 4)), models.Normalizer(4)
    for batch in batches:
        normalizer.update(batch)
    merged = torch.cat([batch.reshape(-1, 4) for batch in batches])
    torch.testing.assert_close(normalizer.mean, merged.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normalizer.var, merged.var(0, unbiased=False), rtol=1e-4, atol=1e-4)


def test_pointmass_is_learnt(tmp_path):
    flags = ["--env", "pointmass", "--total-env-steps", 5000, "--num-evals", 1]
    assert program("apg", *flags, "--run-dir", tmp_path / "run") == 0
    first, last = (float(row["eval_success"]) for row in rows(tmp_path / "run"))
    assert first < 0.2 and last >= 0.9
