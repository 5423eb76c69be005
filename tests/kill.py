"""Runs that are killed at random moments and resumed until they are done, against the same runs left alone.

    python tests/kill.py --kills 20

Each run writes a checkpoint at every iteration, so that many kills hit a write. The first kill comes before the first
checkpoint: then there is nothing to resume, the trainer says so, and the run begins anew. At the end metrics (but for their
seconds) and all of the state that training goes on from must be equal to the last bit.
"""

import csv
import math
import os
import pathlib
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time

import torch
import tyro

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import envs
from models import load_checkpoint

FLAGS = ["--env", "pointmass", "--num-envs", "8", "--segment", "10", "--hidden", "16", "--update-epochs", "1"]
FLAGS += ["--num-evals", "7", "--threads", "1", "--checkpoint-seconds", "0"]  # at every iteration


def same(a: object, b: object) -> bool:
    """Equal to the last bit, containers and all; nan equals nan."""
    if isinstance(a, torch.Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or isinstance(a, float) and math.isnan(a) and math.isnan(b))


def outcome(run_dir: pathlib.Path) -> tuple[list[dict], dict]:
    """A run's metrics and checkpoint, without what measures time or names the folder."""
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = [{k: v for k, v in row.items() if k not in ("wall_seconds", "sps")} for row in csv.DictReader(file)]
    checkpoint = load_checkpoint(run_dir)
    env_steps, gradient_steps, skipped_steps, _, evals = checkpoint["counters"]
    own = {"counters": (env_steps, gradient_steps, skipped_steps, evals)}
    own["args"] = {name: value for name, value in checkpoint["args"].items() if name not in ("run_dir", "resume")}
    return rows, {**checkpoint, **own, "metrics": len(checkpoint["metrics"])}


class Run:
    """A trainer in a process of its own, forked from this one: it begins at once, all that it needs being loaded."""

    def __init__(self, algorithm, *arguments):
        reading, writing = os.pipe()
        self.code, self.pid = None, os.fork()
        if self.pid == 0:
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            sys.argv = [f"{algorithm}.py", *map(str, arguments)]
            code = 3  # a traceback
            try:
                runpy.run_path(str(ROOT / f"{algorithm}.py"), run_name="__main__")
                code = 0
            except SystemExit as stop:
                code = stop.code or 0
            finally:
                sys.stdout.flush()
                os._exit(code)
        os.close(writing)
        self.output = os.fdopen(reading)

    def over(self):
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def end(self, number=None):
        """What it printed, after it ended, or was killed."""
        if number is not None:
            os.kill(self.pid, number)
        with self.output:
            text = self.output.read()
        while not self.over():
            time.sleep(0.001)
        return text


def modified(folder):
    """When the checkpoint was last written, in ns; None before the first."""
    try:
        return (folder / "checkpoint.pt").stat().st_mtime_ns
    except FileNotFoundError:
        return None


def kill_again_and_again(algorithm: str, kills: int, folder: pathlib.Path) -> str:
    """Raises AssertionError if anything is not as it was without the kills. Returns what happened, in words."""
    dice, killed, in_a_write, points = random.Random(f"{algorithm} {kills}"), folder / "killed", 0, []
    flags = [*FLAGS, "--total-env-steps", str(4000 + 2400 * kills)]

    whole = Run(algorithm, *flags, "--run-dir", folder / "whole")
    text = whole.end()
    assert "run folder" in text and whole.code == 0, text

    run = Run(algorithm, *flags, "--run-dir", killed)
    while not (killed / "config.json").exists() and not run.over():
        time.sleep(0.0001)
    run.end(signal.SIGKILL)
    if not (killed / "checkpoint.pt").exists():
        run = Run(algorithm, "--resume", killed)
        text = run.end()
        assert run.code == 2 and "ended before its first" in text and text.count("\n") == 1, text
        shutil.rmtree(killed)
    for _ in range(kills - 1):
        written = modified(killed)
        run = Run(algorithm, *(["--resume", killed] if killed.exists() else [*flags, "--run-dir", killed]))
        for _ in range(dice.randint(1, 15)):  # checkpoints
            while modified(killed) == written and not run.over():
                time.sleep(0.0002)
            written = modified(killed)
        time.sleep(dice.uniform(0, 0.03))
        assert not run.over(), run.end()
        run.end(signal.SIGKILL)
        in_a_write += any(killed.glob("*.tmp"))
        points.append(load_checkpoint(killed)["counters"][0])
    assert points == sorted(points)
    run = Run(algorithm, "--resume", killed)
    text = run.end()
    assert "run folder" in text and run.code == 0, text
    (rows, state), (expected_rows, expected_state) = outcome(killed), outcome(folder / "whole")
    assert rows == expected_rows and same(state, expected_state)
    assert not list(killed.glob("*.tmp"))
    return f"{algorithm}: {kills} kills survived, {in_a_write} of them in a write, at {len(set(points))} points; the same end, to the bit"


def main(kills: int = 20) -> None:
    """Args:
    kills: of each trainer's run
    """
    torch.set_num_threads(1)
    envs.make("pointmass", 8)  # the kernels
    for algorithm in ("apg", "ppo"):
        with tempfile.TemporaryDirectory() as folder:
            print(kill_again_and_again(algorithm, kills, pathlib.Path(folder)), flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
