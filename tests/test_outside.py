"""benchmarks/outside.py: the adapter hands over what the environments do, and a training writes what ours do."""

import pytest
import torch

import envs
import evaluate
from benchmarks import outside


def test_the_adapter_steps_as_the_environments_do():
    pytest.importorskip("stable_baselines3")
    ours, theirs = (envs.make("pointmass", 3) for _ in range(2))
    ours.elapsed = theirs.elapsed = torch.tensor([98, 0, 97])
    adapter = outside.adapter(theirs)
    assert (adapter.reset() == ours.observe(ours.state).numpy()).all()
    for ended in ([], [0], [2], []):
        action = 2 * torch.rand(3, 1) - 1
        expected, reward, _, truncated, info = ours.step(action)
        observation, rewards, dones, infos = adapter.step(action.numpy())
        assert (observation == expected.numpy()).all() and (rewards == reward.numpy()).all()
        assert dones.nonzero()[0].tolist() == truncated.nonzero().flatten().tolist() == ended
        for i, told in enumerate(infos):
            assert told.get("TimeLimit.truncated", False) == (i in ended) == ("terminal_observation" in told)
            assert i not in ended or (told["terminal_observation"] == info["final_obs"][i].numpy()).all()


@pytest.mark.parametrize("case, steps, taken", [("ppo ours", 512, 32), ("ppo theirs", 2048, 320), ("sac theirs", 160, 64)])
def test_a_training_writes_what_ours_do(case, steps, taken, tmp_path, monkeypatch):
    pytest.importorskip("stable_baselines3")
    monkeypatch.setattr("signal.signal", lambda *handler: None)
    outside.main(*case.split(), "pointmass", steps, run_dir=str(tmp_path / "run"))
    first, *_, last = evaluate.finished(tmp_path / "run")
    assert (first["env_steps"], last["env_steps"], last["gradient_steps"]) == (0, steps, taken)
    assert last["eval_return"] != first["eval_return"] and last["wall_seconds"] > 0
