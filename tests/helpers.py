"""What several tests use: short runs in this process, and what they end with."""

import csv
import importlib
import pathlib
import signal
import sys

import torch

import models

FLAGS = ["--env", "pointmass", "--num-envs", "8", "--segment", "10", "--bootstrap", "critic"]
FLAGS += ["--update-epochs", "1", "--num-minibatches", "2", "--num-evals", "3"]


def rows(folder: pathlib.Path) -> list[dict]:
    """A run's metrics.csv without the columns that measure time."""
    lines = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    return [{name: text for name, text in row.items() if name not in ("wall_seconds", "sps")} for row in lines]


def outcome(folder: pathlib.Path) -> dict:
    """All that a run ends with, but for what measures time and names the folder."""
    checkpoint = models.load_checkpoint(folder)
    checkpoint["args"] |= {"run_dir": None, "resume": None}
    checkpoint["run"]["wall_seconds"] = checkpoint["run"]["rows"] = None
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


def program(name: str, *flags: object) -> int:
    """Run one of the programs as from the command line, in this process. Returns its exit code."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [f"{name}.py", *map(str, flags)]
    try:
        models.command(importlib.import_module(name).main)
    except SystemExit as stop:
        return stop.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0
