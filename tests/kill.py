"""Runs that are killed again and again and resumed, against the same runs left alone: both must end in the same bits.

    python tests/kill.py --kills 20

Each run writes a checkpoint at every iteration, so that many kills hit a write.
"""

import csv
import importlib
import multiprocessing
import os
import pathlib
import random
import signal
import sys
import tempfile
import time

import torch
import tyro

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import envs
import models

FLAGS = ["--env", "pointmass", "--num-envs", "8", "--segment", "10", "--hidden", "8", "--threads", "1"]
FLAGS += ["--update-epochs", "1", "--num-minibatches", "2", "--num-evals", "3"]


def rows(folder: pathlib.Path) -> list[dict]:
    """A run's metrics.csv without the columns that measure time."""
    lines = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    return [{name: text for name, text in row.items() if name not in ("wall_seconds", "sps")} for row in lines]


def outcome(folder: pathlib.Path) -> dict:
    """All that a run ends with, but for what measures time and names the folder."""
    checkpoint = models.load_checkpoint(folder)
    checkpoint["args"] |= {"run_dir": None, "resume": None}
    checkpoint["run"]["counters"]["wall_seconds"] = checkpoint["run"]["rows"] = None
    return {"metrics": rows(folder), **checkpoint}


def same(a: object, b: object) -> bool:
    """Equal to the last bit, containers and all; nan equals nan."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a and b != b


def train(algorithm: str, *flags: object) -> int:
    """Run a trainer as from the command line, but in this process. Returns its exit code."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [f"{algorithm}.py", *map(str, flags)]
    try:
        models.command(importlib.import_module(algorithm).main)
    except SystemExit as stop:
        if isinstance(stop.code, str):  # Python prints it and ends with 1
            print(stop.code, file=sys.stderr)
        return 1 if isinstance(stop.code, str) else stop.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def train_silently(*arguments: object) -> None:
    with open(os.devnull, "w") as sys.stdout:
        sys.exit(train(*arguments))


def modified(checkpoint: pathlib.Path) -> int:
    """When it was last written, in ns; 0 before that."""
    return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0


def kill_again_and_again(algorithm: str, kills: int, folder: pathlib.Path) -> str:
    """Returns what happened, in words. Raises AssertionError if a run is not as it was without the kills."""
    start = multiprocessing.get_context("fork").Process  # forked: what is loaded need not be loaded again
    iterations = 13 + 13 * kills
    flags = [*FLAGS, "--total-env-steps", 80 * iterations, "--num-evals", iterations]
    dice, killed, in_a_write = random.Random(kills), folder / "killed", 0
    whole = start(target=train_silently, args=(algorithm, *flags, "--run-dir", folder / "whole"))
    whole.start()
    whole.join()
    more = [*flags, "--run-dir", killed]
    for k in range(kills + 1):
        run = start(target=train_silently, args=(algorithm, *more))
        run.start()
        for _ in range(dice.randint(1, 10) if k < kills else 0):  # checkpoints
            before = modified(killed / "checkpoint.pt")
            while modified(killed / "checkpoint.pt") == before and run.is_alive():
                time.sleep(0.0002)
        if k < kills:
            time.sleep(dice.uniform(0, 0.02))
            run.kill()
        run.join()
        assert run.exitcode == (-9 if k < kills else 0)
        in_a_write += any(killed.glob("*.tmp"))
        more = ["--resume", killed]
    assert same(outcome(killed), outcome(folder / "whole")), f"{algorithm}: not the same"
    return f"{algorithm}: {kills} kills survived, {in_a_write} of them in a write; the same end, to the bit"


def main(kills: int = 20) -> None:
    """Args:
    kills: of each trainer's run
    """
    torch.set_num_threads(1)
    envs.make("pointmass", 8)  # loads the kernels, and the next line what torch loads late, for all the runs
    torch.optim.Adam([torch.zeros(1)])
    for algorithm in ("apg", "ppo"):
        with tempfile.TemporaryDirectory() as folder:
            print(kill_again_and_again(algorithm, kills, pathlib.Path(folder)), flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
