"""The benchmark measures what it says: whole iterations of the trainers' own code, and parts that add up."""

import importlib.util
import math
import pathlib

import pytest

import apg
import ppo

path = pathlib.Path(__file__).parent.parent / "benchmarks/throughput.py"
spec = importlib.util.spec_from_file_location("throughput", path)
throughput = importlib.util.module_from_spec(spec)
spec.loader.exec_module(throughput)

PARTS = {apg: {"physics", "adjoint", "policy", "critic", "optimizer"}, ppo: {"physics", "policy", "critic", "optimizer"}}


@pytest.mark.parametrize("trainer", [apg, ppo])
def test_iterations_are_timed_and_split_into_parts(trainer):
    flags = ["--segment", 4, "--hidden", 8, "--threads", 1]
    kept = throughput.models.set_learning_rate, throughput.bridge._Plan.launch, throughput.torch.optim.Adam.step
    seconds, parts, config = throughput.run(trainer, "pointmass", 8, 4, 3, "cpu", *flags, shares=True)
    assert len(seconds) == 3 and min(seconds) > 0
    assert config["num_envs"] == 8 and config["total_env_steps"] == (3 + throughput.WARM_UP) * 4 * 8
    assert set(parts) == PARTS[trainer] and min(parts.values()) > 0
    assert sum(parts.values()) < sum(seconds)
    assert kept == (throughput.models.set_learning_rate, throughput.bridge._Plan.launch, throughput.torch.optim.Adam.step)


def test_only_the_rollout_is_timed_apart_from_the_whole():
    seconds, parts, _ = throughput.run(ppo, "pointmass", 8, 4, 2, "cpu", "--segment", 4, "--hidden", 8)
    assert set(parts) == {"rollout"} and 0 < parts["rollout"] < sum(seconds)


def test_time_to_threshold_ends_at_the_first_line_that_reaches_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(path.parent))
    import time_to_threshold

    monkeypatch.setitem(apg.TUNED, "pointmass", {"total_env_steps": 2000, "num_envs": 8, "segment": 32})
    seconds = {}
    for threshold in (0.0, 1.1):
        place = tmp_path / str(threshold)
        place.mkdir()
        seconds[threshold] = time_to_threshold.seconds_to(threshold, path.parent.parent, "pointmass", tmp_path / "kernels", place)
        assert (place / "pointmass" / "metrics.csv").is_file()
    assert seconds[0.0] > 0 and math.isnan(seconds[1.1])  # never reached
