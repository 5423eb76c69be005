"""PPO's advantages against the textbook's recursion, its clipped objective by hand, and learning."""

import pytest
import torch
from helpers import FLAGS, rows, program

import models
import ppo


@pytest.mark.parametrize("bootstrap", ["none", "critic", "mc"])
def test_advantages_are_gae(bootstrap, tmp_path, monkeypatch):
    """Of the first iteration of `ppo.main`: A = delta + gamma lambda A' (Schulman et al. 2016, eq. 16)."""
    given, results = [], []

    def noting_rollout(*arguments, rollout=ppo.rollout):
        results.append(rollout(*arguments))
        return results[-1]

    def noting_surrogate(*arguments, surrogate=ppo.surrogate):
        given.append(arguments[0])
        return surrogate(*arguments)

    monkeypatch.setattr(ppo, "rollout", noting_rollout)
    monkeypatch.setattr(ppo, "surrogate", noting_surrogate)
    monkeypatch.setattr(models.Critic, "forward", lambda critic, observation: observation[..., 0])
    monkeypatch.setattr(torch, "randperm", lambda n, device: torch.arange(n))
    flags = [*FLAGS, "--segment", 60, "--bootstrap", bootstrap, "--gamma", 0.9, "--gae-lambda", 0.8, "--total-env-steps", 1]
    assert program("ppo", *flags, "--num-minibatches", 1, "--run-dir", tmp_path / "run") == 0

    observations, _, reward, truncated, final_observations = results[0]
    value, next_value = (models.Normalizer(3)(x)[..., 0] for x in (observations, final_observations))
    end = truncated.clone()
    end[-1] = True
    assert end.sum() > 8 or bootstrap == "mc"  # some ends within the segment
    goes_on = (final_observations[:-1] == observations[1:]).all(-1)  # but where an episode ended and another began
    assert torch.equal(goes_on, ~truncated[:-1])
    gae_lambda = 1.0 if bootstrap == "mc" else 0.8
    next_value = torch.where(end & (bootstrap != "critic"), 0.0, next_value)
    delta, advantage, expected = reward + 0.9 * next_value - value, 0.0, []
    for k in reversed(range(len(reward))):
        advantage = delta[k] + torch.where(end[k], 0.0, 0.9 * gae_lambda * advantage)
        expected.insert(0, advantage)
    torch.testing.assert_close(given[0], torch.stack(expected).flatten(), rtol=1e-4, atol=1e-5)


def test_surrogate_by_hand():
    """Eq. (7): what is clipped has no gradient."""
    log_ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, 1.1]).log().requires_grad_()
    advantage = torch.tensor([3.0, -1.0, 3.0, -1.0, 3.0, -1.0])  # mean 1, standard deviation sqrt(24 / 5)
    unit = 2 / (24 / 5) ** 0.5  # normalized: unit and -unit by turns
    objective, masked = ppo.surrogate(advantage, log_ratio, clip_coef=0.2)
    assert masked.tolist() == [True, False, False, True, False, False]
    torch.testing.assert_close(objective, torch.tensor(unit * (1.2 - 1.5 + 0.5 - 0.8 + 1.1 - 1.1) / 6))
    objective.backward()
    torch.testing.assert_close(log_ratio.grad, torch.tensor([0.0, -1.5, 0.5, 0.0, 1.1, -1.1]) * unit / 6)


def test_an_entropy_bonus_widens_the_noise(tmp_path):
    """Of two Adam steps at the full rate, each goes up where the bonus rules; without it they need not."""
    flags = [*FLAGS, "--total-env-steps", 80, "--log-std", -1, "--ent-coef", 1000, "--run-dir", tmp_path / "run"]
    assert program("ppo", *flags) == 0
    log_std = models.load_checkpoint(tmp_path / "run")["actor"]["log_std"].item()
    assert log_std == pytest.approx(-1 + 2 * 2e-3, abs=1e-4)


def test_pointmass_is_learnt(tmp_path):
    flags = ["--env", "pointmass", "--total-env-steps", 50_000, "--num-evals", 1]
    assert program("ppo", *flags, "--run-dir", tmp_path / "run") == 0
    first, last = (float(row["eval_success"]) for row in rows(tmp_path / "run"))
    assert first < 0.2 and last >= 0.9
