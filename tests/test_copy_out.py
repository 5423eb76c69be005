"""The README: its programs run as they stand, beside only those files of ours that they name; its figures are the data."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from helpers import rows

import evaluate

ROOT = pathlib.Path(__file__).parent.parent
PROGRAMS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
PROGRAMS += [(ROOT / "benchmarks" / name).read_text() for name in ("plan.py", "pendulum.py")]


def run(word, folder, files, *flags, more=""):
    """What the one program with `word` in it prints, `more` lines added, beside copies of files of ours."""
    (program,) = (program for program in PROGRAMS if word in program)
    for name in files:
        shutil.copy(ROOT / f"{name}.py", folder)
    (folder / "program.py").write_text(program + more)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "program.py", *flags]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


CHECK = """
import torch
env = envs.make("pendulum", 4, dtype=torch.float64)
action = torch.tensor([[-0.5], [0.0], [0.5], [0.9]], dtype=torch.float64, requires_grad=True)
print(torch.autograd.gradcheck(env.dynamics, (env.state.requires_grad_(), action)))
"""


def test_bridge_alone_differentiates_a_kernel_that_is_not_ours(tmp_path):
    printed = run("WarpFunction(decay)", tmp_path, ["bridge"], more="print(rate.grad.tolist())\n")
    assert json.loads(printed[-1]) == pytest.approx([-((1 - 0.01 * rate) ** 99) for rate in (0.5, 1.0, 2.0)], rel=1e-5)


def test_arm_alone_plans_motions_to_target_poses(tmp_path):
    more = "print([[errors[name].tolist(), limit] for name, limit in arm.task.tolerances.items()])\n"
    results = json.loads(run("plan.tanh()", tmp_path, ["bridge", "envs"], more=more)[-1])
    assert len(results) == 2 and all(len(errors) == 4 and max(errors) < limit for errors, limit in results), results


def test_a_trained_policy_runs_in_a_program_of_its_own(tmp_path):
    shutil.copytree(ROOT / "results" / "checkpoints", tmp_path / "results" / "checkpoints")
    more = "print([error.max().item() for error in env.task.errors(observation, state).values()])"
    printed = run("evaluate.load", tmp_path, ["bridge", "envs", "models", "ppo", "apg", "evaluate"], more=more)
    position, angle = json.loads(printed[-1])
    assert position < 0.02 and angle < 0.15


def test_pendulum_is_differentiable_and_trains(tmp_path):
    flags = ["--env", "pendulum", "--total-env-steps", "20000", "--num-evals", "1", "--run-dir", "run"]
    printed = run("def pendulum", tmp_path, ["bridge", "envs", "models", "apg"], *flags, more=CHECK)
    first, last = (float(row["eval_return"]) for row in rows(tmp_path / "run"))
    assert printed[-1] == "True" and last > first


FIGURE = re.compile(r"[<>]*\d[\d.]*[kM]? \[[\d.kM, ]+\]")  # a number with its interval


def test_the_readmes_figures_are_those_of_the_committed_runs(monkeypatch, capsys):
    """The first table whole, and every other number with an interval, in README.md and in results/README.md."""
    monkeypatch.chdir(ROOT)
    evaluate.summary()
    printed = capsys.readouterr().out
    data = set(FIGURE.findall(printed))
    table = printed.split("\n\n")[0]
    assert len(table.splitlines()) >= 6 and table in pathlib.Path("README.md").read_text()
    for name in ("README.md", "results/README.md"):
        stated = set(FIGURE.findall(pathlib.Path(name).read_text().split("## What was tried")[0]))
        assert len(stated) > 15 and stated <= data, stated - data
