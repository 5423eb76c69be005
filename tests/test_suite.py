"""Many runs survive kills and go on; the statistics over them are what they are by hand."""

import csv
import fcntl
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import apg
import evaluate
import ppo
from models import load_checkpoint

SUITE = ["suite", "--tasks", "pointmass", "--seeds", "2", "--total-env-steps", "30000", "--processes", "1"]


def run(*arguments):
    """evaluate.py in this process. Returns its exit code."""
    old, sys.argv = sys.argv, ["evaluate.py", *map(str, arguments)]
    try:
        evaluate.main()
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = old
    return 0


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def files(*folders):
    paths = [path for folder in folders for path in [folder, *folder.rglob("*")]]
    return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in paths}


def lock_is_free(folder):
    """No evaluate.py and none of its runs is alive: each holds the lock."""
    with open(folder / "lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def started(condition):
    """The suite in a process group of its own, up to when `condition` holds."""
    command = [sys.executable, pathlib.Path(evaluate.__file__), *SUITE]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    return process


def env_steps(run_dir):
    return load_checkpoint(run_dir)["counters"][0] if (run_dir / "checkpoint.pt").exists() else -1


def test_suite_survives_kills(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs" / "suite"
    apg_1, ppo_1, apg_2, ppo_2 = (runs / f"pointmass__{name}" for name in ("apg__1", "ppo__1", "apg__2", "ppo__2"))

    process = started(lambda: (apg_1 / "config.json").exists())  # before its first checkpoint, or soon after
    assert not lock_is_free(runs)
    process.terminate()
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted; the same command goes on" in error.splitlines()[-1]
    assert lock_is_free(runs) and env_steps(apg_1) < 30_000

    process = started(lambda: env_steps(ppo_1) > 0)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    known = env_steps(ppo_1)
    assert 0 < known < 30_000 <= env_steps(apg_1)
    assert not apg_2.exists()
    finished, begun = files(apg_1), [row for row in read(ppo_1 / "metrics.csv") if int(row["env_steps"]) <= known]
    assert len(begun) == 2 and len(read("results/suite.csv")) == len(read(apg_1 / "metrics.csv"))

    apg_2.mkdir()  # as one killed before its first checkpoint leaves it
    (apg_2 / "config.json").write_text(json.dumps({**json.loads((apg_1 / "config.json").read_text()), "seed": 2}))
    (apg_2 / "metrics.csv").write_text(",".join(apg.METRICS) + "\n")
    (apg_2 / "checkpoint.tmp").write_bytes(b"half a")
    assert run(*SUITE) == 0
    assert "1 finished before" in capsys.readouterr().out
    assert files(apg_1) == finished
    assert read(ppo_1 / "metrics.csv")[:2] == begun and (runs / "pointmass__ppo__1.log").read_text().count("into") == 2
    assert not (apg_2 / "checkpoint.tmp").exists()

    rows, expected = read("results/suite.csv"), []
    for folder, label, seed in ((apg_1, "apg", "1"), (ppo_1, "ppo", "1"), (apg_2, "apg", "2"), (ppo_2, "ppo", "2")):
        curve = {int(row["env_steps"]): row for row in reversed(read(folder / "metrics.csv"))}  # first of any repeated
        steps = sorted(curve)
        assert steps[0] == 0 and steps[-1] >= 30_000 > steps[-2]
        expected += [(label, seed, curve[step]) for step in steps]
    assert [(row["algorithm"], row["seed"]) for row in rows] == [(label, seed) for label, seed, _ in expected]
    facts = ["env", "algorithm", "seed", "segment", "bootstrap", "learning_rate", "total_env_steps"]
    for row, (label, _, metrics) in zip(rows, expected):
        assert list(row) == facts + ppo.METRICS
        assert (row["env"], row["bootstrap"], row["total_env_steps"]) == ("pointmass", "critic", "30000")
        assert int(row["segment"]) == {"apg": apg, "ppo": ppo}[label].TUNED["pointmass"]["segment"]
        numbers = [[float(text or "nan") for text in (row[name], metrics.get(name, ""))] for name in ppo.METRICS]
        assert all(a == pytest.approx(b, rel=1e-5, nan_ok=True) for a, b in numbers)
        assert (row["approx_kl"] == "") == (label == "apg")
    record = json.loads(pathlib.Path("results/suite.json").read_text())
    assert record["settings"]["seeds"] == 2 and record["cores"] >= 1 and set(record["versions"]) == {"python", "torch", "warp"}
    summary = read("results/summary.csv")
    assert [(row["algorithm"], row["seeds"]) for row in summary] == [("apg", "2"), ("ppo", "2")]

    before, table = files(apg_1, ppo_1, apg_2, ppo_2), pathlib.Path("results/suite.csv").read_bytes()
    monkeypatch.setattr(subprocess, "Popen", None)  # nothing is left to start
    assert run(*SUITE) == 0 and pathlib.Path("results/suite.csv").read_bytes() == table

    capsys.readouterr()
    with open(runs / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(*SUITE) == 2
    assert (
        capsys.readouterr().err == "evaluate.py: another evaluate.py, or a run that it left behind, is at work in runs/suite\n"
    )
    assert run(*SUITE, "--total-env-steps", 40_000) == 2
    error = capsys.readouterr().err
    assert "total_env_steps 30000, not 40000" in error and error.count("\n") == 1
    (runs / "pointmass__apg__3").mkdir()
    (runs / "pointmass__apg__3" / "notes.txt").write_text("mine")
    assert run(*SUITE, "--seeds", 3) == 2
    error = capsys.readouterr().err
    assert "notes.txt" in error and error.count("\n") == 1
    assert (runs / "pointmass__apg__3" / "notes.txt").read_text() == "mine"
    assert files(apg_1, ppo_1, apg_2, ppo_2) == before


def test_a_failed_run_and_ppos_own_values(tmp_path, monkeypatch, capsys):
    """The failed one is reported and left out; the others count, ppo-best under its own label."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "PPO_BEST", {"pointmass": ["--learning-rate", "0.0033", "--total-env-steps", "77"]})
    popen = subprocess.Popen

    def broken(command, **options):
        if "runs/suite/pointmass__ppo__1" in command:
            command = [sys.executable, "-c", "print('so far, so good'); raise RuntimeError('on purpose')"]
        return popen(command, **options)

    monkeypatch.setattr(subprocess, "Popen", broken)
    arguments = ["suite", "--tasks", "pointmass", "--algorithms", "ppo", "--seeds", 1, "--total-env-steps", 2000]
    assert run(*arguments) == 1
    printed = capsys.readouterr()
    failures = [line for line in printed.out.splitlines() if "FAILED" in line]
    assert len(failures) == 1 and "pointmass__ppo__1 (exit 1): RuntimeError: on purpose" in failures[0]
    assert "1 runs failed" in printed.err
    rows = read("results/suite.csv")
    assert {(r["algorithm"], r["learning_rate"], r["total_env_steps"]) for r in rows} == {("ppo-best", "0.0033", "2000")}
    assert [row["algorithm"] for row in read("results/summary.csv")] == ["ppo-best"]  # with no APG to compare with


def test_ablation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(evaluate.ABLATION_STEPS, "pointmass", 2000)
    # 0 is T, and T is 100 here: the same run, so only once; and mc only at the last length
    arguments = ["ablation", "--tasks", "pointmass", "--segments", 20, 0, 100, "--bootstraps", "none", "mc", "--seeds", 1]
    assert run(*arguments) == 0
    rows = read("results/ablation.csv")
    assert {(r["algorithm"], r["segment"], r["bootstrap"], r["total_env_steps"]) for r in rows} == {
        ("apg", "20", "none", "2000"), ("apg", "100", "none", "2000"), ("apg", "100", "mc", "2000")
    }  # fmt: skip
    rows = [row for row in rows if row["bootstrap"] == "mc"]
    steps = [int(row["env_steps"]) for row in rows]
    assert steps[0] == 0 and steps[-1] >= 2000 > steps[-2]
    assert not any(step % (100 * apg.TUNED["pointmass"]["num_envs"]) for step in steps)  # whole episodes
    assert f"mc              -{float(rows[-1]['eval_success']):9.3f}" in capsys.readouterr().out
    folders = {path.name for path in (tmp_path / "runs" / "ablation").iterdir() if path.is_dir()}
    assert folders == {f"pointmass__apg__{cell}__1" for cell in ("K20__none", "K100__none", "K100__mc")}
    config = json.loads((tmp_path / "runs/ablation/pointmass__apg__K100__mc__1/config.json").read_text())
    assert (config["segment"], config["bootstrap"], config["gamma"]) == (100, "mc", 0.99)


def test_sweep(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(evaluate.SWEEP_STEPS["apg"], "pointmass", 2000)
    arguments = ["sweep", "--tasks", "pointmass", "--algorithms", "apg", "--learning-rates", 0.0031, "--seeds", 1]
    assert run(*arguments, "--results", "elsewhere") == 0
    rows = read("elsewhere/sweep.csv")
    assert {(r["algorithm"], r["learning_rate"], r["segment"]) for r in rows} == {("apg", "0.0031", "32")}
    steps = [int(row["env_steps"]) for row in rows]
    assert steps[0] == 0 and steps[-1] >= 2000 > steps[-2] and not pathlib.Path("results").exists()
    assert f"apg     {float(rows[-1]['eval_success']):9.3f}" in capsys.readouterr().out


# --- statistics -------------------------------------------------------------------------------------------------------


def test_iqm_by_hand():
    assert evaluate.iqm([100.0, 1.0, 3.0, 2.0]) == 2.5  # one dropped on each side
    assert evaluate.iqm([7.0, 1.0, 4.0]) == 4.0  # int(3 / 4) = 0: the plain mean
    assert evaluate.iqm([9.0, -50.0, 1.0, 2.0, 3.0, 4.0, 5.0, 90.0]) == 3.5  # 2, 3, 4, 5
    assert evaluate.iqm([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 8.0]]).tolist() == [2.5, 0.0]
    assert np.isnan(evaluate.iqm([1.0, 2.0, 3.0, np.nan]))


def test_interval_against_a_plain_bootstrap():
    generator = random.Random(5)
    values = [generator.gauss(10, 3) for _ in range(11)]
    draws = []
    for _ in range(10_000):
        draw = sorted(generator.choice(values) for _ in values)
        draws.append(sum(draw[2:-2]) / 7)
    draws.sort()
    low, high = evaluate.interval(values)
    width = draws[9750] - draws[250]
    assert width > 1 and abs(low - draws[250]) < 0.04 * width and abs(high - draws[9750]) < 0.04 * width
    assert evaluate.interval(values).tolist() == [low, high]
    assert evaluate.interval([0.75] * 10).tolist() == [0.75, 0.75]
    assert evaluate.interval([1500, 2000]).tolist() == [1500, 2000]  # a quarter of the draws have one of the two twice


def test_ratio_interval():
    values = [3.0, 5.0, 6.0, 9.0, 11.0]
    np.testing.assert_allclose(evaluate.ratio_interval(values, [2.0] * 4), evaluate.interval(values) / 2)
    np.testing.assert_allclose(evaluate.ratio_interval([6.0] * 4, values), 6 / evaluate.interval(values)[::-1], rtol=0.1)
    low, high = evaluate.ratio_interval(values, values)
    assert low < 0.8 and high > 1.25  # resampled together, the ratio would always be 1


def curve(steps, success, budget=None, gradient_steps=10, seconds=50):
    """steps of the evaluations, success at them; env steps a gradient step, and a second."""
    rows = []
    for x, y in zip(steps, success):
        row = {"env_steps": x, "gradient_steps": x / gradient_steps, "wall_seconds": x / seconds, "eval_success": y, "eval_return": -x}
        rows.append({"total_env_steps": budget or steps[-1], **row})
    return rows


def write_suite(path, runs):
    rows = [dict(env=env, algorithm=label, seed=seed, **row) for (env, label, seed), rows in runs.items() for row in rows]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_summary_by_hand(tmp_path, capsys):
    runs = {}
    # Four APG runs, alike but slower by 1, 2, 3, 10: success 0.9 is four fifths of the way from the second evaluation to
    # the third, so at 180, 360, 540 and 1800 steps. The fall after it changes what is final, not what was reached.
    for seed, slower in enumerate((1, 2, 3, 10), 1):
        runs["franka", "apg", seed] = curve([0, 100 * slower, 200 * slower, 300 * slower], [0, 0.5, 1.0, 0.8])
    runs["franka", "ppo", 1] = curve([0, 1000, 2200], [0, 0.8, 0.8 + 0.1 * 1.2 / 0.5], 2000, 2, 100)  # 0.9 at 1500
    runs["franka", "ppo", 2] = curve([0, 1000, 2200], [0, 0.1, 0.22], 2000, 2, 100)  # never: all of its 2200
    runs["franka", "ppo-best", 1] = curve([0, 900], [0, 1.0], 900)  # 0.9 at 810
    for seed in (1, 2):
        runs["pusht", "apg", seed] = curve([0, 100], [0, 0.5 * seed])  # 100 (never), 90
        runs["pusht", "ppo", seed] = curve([0, 1000], [0, 0.9])
        runs["navigation", "apg", seed] = curve([0, 100], [0, 0.2])
        runs["navigation", "ppo", seed] = curve([0, 1000], [0, 0.4 * seed])
    runs["pointmass", "ppo", 1] = curve([0, 400], [0.95, 1.0])  # there from the start, and no APG
    write_suite(tmp_path / "suite.csv", runs)
    assert run("summary", "--results", tmp_path) == 0
    printed = capsys.readouterr().out
    rows = {(row["env"], row["algorithm"]): row for row in read(tmp_path / "summary.csv")}
    assert list(rows) == list(dict.fromkeys(key[:2] for key in runs))

    def assert_row(env, label, **expected):
        for name, value in expected.items():
            text = rows[env, label][name]
            assert text == value if isinstance(value, str) else float(text) == pytest.approx(value, rel=1e-5), (label, name)

    reach = {"env_steps": 450, "gradient_steps": 45, "wall_seconds": 9}  # the means of 360 and 540
    assert_row("franka", "apg", seeds="4", reached="4", bound="", final_success=0.8, final_success_low=0.8, **reach)
    assert_row("franka", "apg", final_return=-750, env_steps_low=180, env_steps_high=1800)
    # Of 300 steps each: (0.25 + 0.75 + 0.9) / 3 whatever the speed. Within the first 300 of all of them: the same, then
    # (0.25 * 200 + 0.625 * 100) / 300, 0.25 and 0.15 / 2, of which the middle two count.
    assert_row("franka", "apg", area=1.9 / 3, area_shared_budget=(0.375 + 0.25) / 2)

    spent = {"env_steps": 1850, "gradient_steps": 925, "wall_seconds": 18.5}  # the means of 1500 and 2200
    assert_row("franka", "ppo", seeds="2", reached="1", bound=">", env_steps_low=1500, env_steps_high=2200, **spent)
    # To 2000 steps, where success is 1 and 0.2, and not to the last evaluation at 2200.
    assert_row("franka", "ppo", area=((0.4 + 0.9) / 2 + (0.05 + 0.15) / 2) / 2, area_shared_budget=(0.12 + 0.015) / 2)
    ratios = {"env_steps_ratio": 1850 / 450, "gradient_steps_ratio": 925 / 45, "wall_seconds_ratio": 18.5 / 9}
    assert_row("franka", "ppo", ratio_bound=">", **ratios)
    assert float(rows["franka", "ppo"]["env_steps_ratio_low"]) < 3 and float(rows["franka", "ppo"]["env_steps_ratio_high"]) > 5
    assert_row("franka", "ppo-best", bound="", ratio_bound="", env_steps=810, env_steps_high=810, env_steps_ratio=1.8)
    assert_row("franka", "apg", ratio_bound="", env_steps_ratio="")
    for text in ("1/2", ">1,850 [1,500, 2,200]", ">4.11 [", "1.8 [0.45, 4.5]", "4/4", "450 [180, 1,800]"):
        assert text in printed.split("pusht")[0]

    assert_row("pusht", "apg", reached="1", bound=">", env_steps=95)
    assert_row("pusht", "ppo", reached="2", bound="", ratio_bound="<", env_steps=1000, env_steps_ratio=1000 / 95)
    assert_row("navigation", "ppo", reached="0", bound=">", ratio_bound="~", env_steps_ratio=10)
    assert "<10.5 [" in printed and "~10 [10, 10]" in printed and ">1,000 [1,000, 1,000]" in printed
    assert_row("pointmass", "ppo", reached="1", env_steps=0, area=0.975, env_steps_ratio="")

    assert run("summary", "--results", tmp_path, "--threshold", 0.2) == 0
    rows = {(row["env"], row["algorithm"]): row for row in read(tmp_path / "summary.csv")}
    assert_row("franka", "ppo", reached="2", bound="", env_steps=(250 + 2000) / 2, threshold="0.2")


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["suite", "--tasks", "cartpole"], "cartpole"),
        (["suite", "--tasks"], "--tasks"),
        (["suite", "--algorithms", "apg", "sac"], "sac"),
        (["suite", "--seeds", 0], "--seeds"),
        (["suite", "--processes", 0], "--processes"),
        (["suite", "--total-env-steps", 0], "--total-env-steps"),
        (["suite", "--folder", evaluate.__file__], "not a folder"),
        (["suite", "--results", evaluate.__file__], "not a folder"),
        (["ablation", "--tasks", "pointmass", "pong"], "pong"),
        (["ablation", "--bootstraps", "magic"], "magic"),
        (["ablation", "--segments", -1], "--segments"),
        (["ablation", "--segments", 129], "--segments"),
        (["ablation", "--seeds", -3], "--seeds"),
        (["sweep", "--learning-rates", 0.001, 0], "--learning-rates"),
        (["sweep", "--learning-rates", "nan"], "--learning-rates"),
        (["sweep", "--algorithms", "ppo-best"], "ppo-best"),
        (["sweep", "--processes", -1], "--processes"),
        (["summary"], "suite.csv"),
        (["summary", "--threshold", 0], "--threshold"),
        (["summary", "--threshold", "nan"], "--threshold"),
    ],
)
def test_bad_flags(arguments, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1 and error.startswith("evaluate.py: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["empty", "no column", "not a number", "short row", "twice", "binary"])
def test_damaged_suite_csv(damage, tmp_path, capsys):
    path = tmp_path / "suite.csv"
    write_suite(path, {("franka", "apg", 1): curve([0, 100, 200], [0, 0.5, 1.0])})
    assert run("summary", "--results", tmp_path) == 0
    (tmp_path / "summary.csv").unlink()
    lines = path.read_text().splitlines()
    lines = {
        "empty": [],
        "no column": [line.replace("eval_success", "success") for line in lines],
        "not a number": [line.replace("0.5", "half") for line in lines],
        "short row": [*lines, "franka,apg,1,300"],
        "twice": [*lines, *lines[1:]],
        "binary": ["\0\1\2"],
    }[damage]
    path.write_text("\n".join(lines))
    capsys.readouterr()
    assert run("summary", "--results", tmp_path) == 2
    error = capsys.readouterr().err
    assert "suite.csv" in error and error.count("\n") == 1 and error.startswith("evaluate.py: ")
    assert not (tmp_path / "summary.csv").exists()
