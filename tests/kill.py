"""Runs that are killed again and again and resumed, against the same runs left alone: both must end in the same bits.

    python tests/kill.py --kills 20

Each run writes a checkpoint at every iteration, so that many kills hit a write.
"""

import multiprocessing
import os
import pathlib
import random
import sys
import tempfile
import time

import torch
import tyro

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import envs
from helpers import FLAGS, outcome, same, train


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
