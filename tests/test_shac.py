"""SHAC's policy gradient against finite differences of a loss written anew; one iteration by hand."""

import pytest
import torch
from helpers import FLAGS, program
from test_apg import GAMMA, flat, float64, setup  # noqa: F401
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import models
from benchmarks import shac


@torch.no_grad()
def plain_loss(steps, shift):
    """The policy loss, step by step, with the policy's weights moved by `shift`."""
    env, actor, critic, normalizer = setup("pointmass", "critic")
    vector_to_parameters(parameters_to_vector(actor.parameters()) + shift, actor.parameters())
    total, age = 0.0, torch.zeros(3)  # age: steps since an environment's segment or episode began
    for k in range(steps):
        action = actor.distribution(normalizer(env.observe(env.state))).sample().tanh()
        _, reward, _, ended, info = env.step(action)
        value = critic(normalizer(info["final_obs"]))
        total += GAMMA**age @ reward + (GAMMA ** (age + 1) * value)[ended | (k == steps - 1)].sum()
        age = torch.where(ended, 0, age + 1)
    return -total / (3 * steps)


@pytest.mark.usefixtures("float64")
def test_the_policy_gradient_is_the_finite_difference_of_the_loss():
    env, actor, critic, normalizer = setup("pointmass", "critic")
    segment, loss = shac.rollout(env, actor, critic, normalizer, 7, GAMMA)
    loss.backward()
    shift = flat(actor).sign() * torch.rand_like(flat(actor))  # every weight's part of the slope is positive
    at = lambda h: plain_loss(7, h * 1e-3 * shift)
    assert segment.truncations.nonzero().tolist() == [[0, 0], [3, 1]] and actor.log_std.grad.abs() > 1e-4
    torch.testing.assert_close(loss.detach(), at(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(shift @ flat(actor), (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / 12e-3, rtol=1e-8, atol=0)


def test_one_iteration_moves_the_actor_once_and_the_target_by_its_share(tmp_path):
    assert program("benchmarks.shac", *FLAGS, "--total-env-steps", 80, "--run-dir", tmp_path / "run") == 0
    saved = models.load_checkpoint(tmp_path / "run")
    torch.manual_seed(1)  # draws the weights that the run began with
    log_std, weight = models.Actor(3, 1).log_std, models.Critic(3).value[0].weight
    step = (saved["actor"]["log_std"] - log_std).abs().item()  # Adam's first
    assert saved["run"]["gradient_steps"] == 1 and step == pytest.approx(16e-3, rel=1e-3)
    moved, followed = (saved[name]["value.0.weight"] - weight for name in ("critic", "target_critic"))
    torch.testing.assert_close(followed, 0.8 * moved, rtol=1e-3, atol=1e-7)
