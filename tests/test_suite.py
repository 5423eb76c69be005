"""Many runs: stopped, failed, gone on with. Statistics over them against numbers worked out by hand."""

import contextlib
import io
import os
import random
import signal
import threading
import time

import numpy as np
import pytest
from helpers import program

import evaluate
import models

SHORT = {"total_env_steps": 8000, "num_evals": 2}
NAME = "pointmass__apg__total_env_steps-8000__num_evals-2__1"
BROKEN = "pointmass__apg__segment-1000__1"


def train(folder, *flags):
    """evaluate.train, in `folder`, of one seed of APG on pointmass with each of `flags`. Returns exit code and output."""
    handlers = {number: signal.getsignal(number) for number in evaluate.SIGNALS}
    variants, output, code = [("pointmass", "apg", each) for each in flags], io.StringIO(), 0
    with contextlib.chdir(folder), contextlib.redirect_stdout(output):
        try:
            evaluate.train("suite", variants, evaluate.Comparison(seeds=1))
        except SystemExit as stop:
            code = stop.code
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return code, output.getvalue()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that fails, and one that finishes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, *train(folder, {"segment": 1000}, SHORT)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that Ctrl-C stopped, after one that was killed before its first checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    run_dir = folder / "runs" / "suite" / NAME
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text("half of ")

    def interrupt():
        while not (run_dir / "checkpoint.pt").exists():
            time.sleep(0.01)
        time.sleep(0.2)
        for _ in range(2):  # an impatient user
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    threading.Thread(target=interrupt, daemon=True).start()
    return folder, *train(folder, SHORT)


def test_a_failed_run_is_named_and_the_others_go_on(undisturbed):
    folder, exit_code, output = undisturbed
    assert exit_code == 1
    assert f"{BROKEN}: FAILED, see runs/suite/{BROKEN}.log" in output
    assert "--segment" in (folder / f"runs/suite/{BROKEN}.log").read_text()
    assert f"2 of 2: {NAME}: success" in output
    rows = evaluate.read_csv(folder / "results" / "suite.csv")
    assert {row["total_env_steps"] for row in rows} == {8000} and list(rows[0]) == evaluate.FACTS + list(models.METRICS)


def test_stopped_runs_save_themselves(stopped):
    folder, exit_code, output = stopped
    assert exit_code == 130 and "rerun the command to resume" in output
    assert 0 < models.load_checkpoint(folder / "runs" / "suite" / NAME)["run"]["env_steps"] < 8000
    assert not (folder / "results").exists()


def test_a_stopped_suite_ends_as_one_that_was_not(stopped, undisturbed):
    folder, *_ = stopped
    assert train(folder, SHORT)[0] == 0
    lines = [(path / "results" / "suite.csv").read_text().splitlines() for path in (folder, undisturbed[0])]
    of_time = [lines[0][0].split(",").index(name) for name in ("wall_seconds", "sps")]
    results = [[[text for i, text in enumerate(line.split(",")) if i not in of_time] for line in file] for file in lines]
    assert results[0] == results[1] and len(results[0]) == 4


def test_a_finished_run_is_skipped(undisturbed, monkeypatch):
    folder, *_ = undisturbed
    before = (folder / "results" / "suite.csv").read_bytes()
    monkeypatch.setattr(evaluate.subprocess, "Popen", None)
    assert train(folder, SHORT)[0] == 0 and (folder / "results" / "suite.csv").read_bytes() == before


def test_runs_of_other_programs_are_collected(undisturbed, tmp_path, capsys):
    folder, out = undisturbed[0], tmp_path / "relatives.csv"
    runs = folder / "runs" / "suite"
    assert program("evaluate", "collect", runs / BROKEN) == 2 and "no finished run" in capsys.readouterr().err
    assert program("evaluate", "collect", runs / NAME, "--out", out) == 0
    assert out.read_bytes() == (folder / "results" / "suite.csv").read_bytes()


def test_reuse_takes_as_many_gradient_steps_per_environment_step(monkeypatch):
    called = []
    monkeypatch.setattr(evaluate, "train", lambda name, variants, comparison: called.extend(variants))
    assert program("evaluate", "reuse") == 0
    flags = [flags for _, _, flags in called]
    assert {each["num_envs"] / each["update_epochs"] / each["num_minibatches"] for each in flags} == {8}
    assert len(flags) == 20 and sum("clip_coef" in each for each in flags) == 10


def test_iqm_by_hand():
    assert evaluate.iqm([100.0, 1.0, 3.0, 2.0]) == 2.5  # one dropped on each side
    assert evaluate.iqm([7.0, 1.0, 1.0]) == 3.0  # a quarter of three is none: the plain mean
    assert evaluate.iqm([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 8.0]]).tolist() == [2.5, 0.0]


def test_interval_against_a_plain_bootstrap():
    generator = random.Random(5)
    values = [generator.gauss(10, 3) for _ in range(11)]
    draws = sorted(sum(sorted(generator.choices(values, k=11))[2:-2]) / 7 for _ in range(10_000))
    width = draws[9750] - draws[250]
    np.testing.assert_allclose(evaluate.interval(values), [draws[250], draws[9750]], atol=0.06 * width)
    assert (evaluate.interval(np.array([values, values]).T).T == evaluate.interval(values)).all()  # along the first axis


def test_interval_of_a_ratio():
    low, high = evaluate.interval([3.0, 5.0, 6.0, 9.0, 11.0], [3.0, 5.0, 6.0, 9.0, 11.0])
    assert low < 0.8 and high > 1.25  # drawn together, the ratio would always be 1


def test_cost_for_good_by_hand():
    run = {"eval_success": np.array([0.0, 0.95, 0.5, 0.9, 1.0]), "env_steps": np.arange(5) * 100.0}
    assert evaluate.cost_to(run, 0.9, "env_steps") == 300  # 0.9 is touched at 100, and lost again
    assert evaluate.cost_to(run, 0.95, "env_steps") == 400
    assert evaluate.cost_to(run, 0.0, "env_steps") == 0
    lost = {"eval_success": np.array([0.0, 1.0, 0.8]), "env_steps": np.arange(3) * 100.0}
    assert evaluate.cost_to(lost, 0.9, "env_steps") == float("inf") and evaluate.spent(lost, 0.9, "env_steps") == 200


def curve(env, label, seed, steps, success):
    """An evaluation at each of `steps`: a gradient step for 10 of them, a second for 50."""
    facts = {"env": env, "algorithm": label, "seed": seed}
    for x, y in zip(steps, success):
        costs = {"env_steps": x, "gradient_steps": x / 10, "wall_seconds": x / 50}
        yield {**facts, **costs, "eval_success": y, "eval_return": -x}


def test_summary_by_hand(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = []
    for seed, slower in enumerate((1, 2, 3, 10), 1):  # 0.9 for good after 200, 400, 600, 2000 steps
        rows += curve("franka", "apg", seed, [0, 100 * slower, 200 * slower, 300 * slower], [0, 0.5, 0.9, 1.0])
    rows += curve("franka", "ppo", 1, [0, 1000, 2000], [0, 1.0, 0.9])  # 1000
    rows += curve("franka", "ppo", 2, [0, 1000, 2200], [0, 1.0, 0.22])  # lost again: all of its 2200
    for env, rival in (("pusht", 0.9), ("navigation", 0.8)):
        rows += curve(env, "apg", 1, [0, 1000], [0, 0.5])
        rows += curve(env, "ppo", 1, [0, 1000], [0, rival])
    evaluate.write_csv(evaluate.RESULTS / "suite.csv", rows)
    ablated = [{**row, "bootstrap": "none", "segment": 8} for row in rows if row["env"] == "pusht"]
    evaluate.write_csv(evaluate.RESULTS / "ablation.csv", ablated[:2])
    assert program("evaluate", "summary") == 0
    tables = capsys.readouterr().out.strip().split("\n\n")
    compared, each, ablation = ([line.strip("| ").split(" | ") for line in table.splitlines()] for table in tables)
    compared, each = {row[0]: row[1:] for row in compared}, {tuple(row[:2]): row[2:] for row in each}
    success, _, steps, gradient_steps, seconds = each["franka", "apg"]  # IQM 1; the mean of 400 and 600; 50; 10
    assert success.startswith("1 [") and steps.startswith("500 [") and seconds.startswith("10 [")
    success, _, steps, gradient_steps, _ = each["franka", "ppo"]
    assert [success, steps, gradient_steps] == ["0.56 [0.22, 0.9]", ">1.6k", ">160"]  # a bound has no interval
    assert compared["franka"] == [each["franka", "apg"][0], success, *[">3.2"] * 3]
    assert compared["pusht"] == ["0.5 (one seed)", "0.9 (one seed)", *["<1"] * 3]
    assert compared["navigation"][2:] == ["-"] * 3
    assert ablation[2] == ["pusht", "none", "8", "0.5 (one seed)", "-1e+03 (one seed)", ">1k", ">100", ">20"]
