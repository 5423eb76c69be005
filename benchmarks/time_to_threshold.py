"""Seconds from the command to a success of 0.9, with a cold and with a warm kernel cache, for every task.

    python benchmarks/time_to_threshold.py                     # this checkout
    python benchmarks/time_to_threshold.py OTHER_CHECKOUT      # side by side with another one, on a core each

Both run apg.py with this checkout's tuned values, given as flags, so that a difference is one of speed. Writes
results/time_to_threshold_{hardware}.csv.
"""

import csv
import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import tyro

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from throughput import hardware

import apg


@dataclasses.dataclass
class Args:
    """Measure seconds from command to threshold."""

    other: tyro.conf.Positional[pathlib.Path | None] = None
    """another checkout of this repository, say of an earlier commit"""
    tasks: tuple[str, ...] = tuple(apg.TUNED)
    """which tasks"""
    threshold: float = 0.9
    """success to wait for"""
    out: pathlib.Path | None = None
    """CSV file; default results/time_to_threshold_{hardware}.csv"""


def seconds_to(threshold, checkout, task, cache, folder):
    """Start a training, wait for the line with a success of `threshold`, stop it. nan if it ends before."""
    flags = [part for name, value in apg.TUNED[task].items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, str(checkout / "apg.py"), "--env", task, *flags, "--run-dir", str(folder / task)]
    environment = os.environ | {"WARP_CACHE_PATH": str(cache), "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            words = line.split()
            if "steps" in words and "success" in words and float(words[words.index("success") + 1]) >= threshold:
                return time.perf_counter() - start
        return float("nan")
    finally:
        process.kill()
        process.wait()


def main():
    args = tyro.cli(Args, description=__doc__)
    checkouts = {"this": ROOT} | ({"other": args.other.resolve()} if args.other else {})
    for checkout in checkouts.values():
        if not (checkout / "apg.py").is_file():
            sys.exit(f"time_to_threshold.py: no apg.py in {checkout}")
    name = "-".join(hardware("cpu").lower().replace("(r)", "").replace("(tm)", "").split())
    rows = []
    for task in args.tasks:
        row = {"task": task, "threshold": args.threshold}
        with tempfile.TemporaryDirectory() as folder:
            for cache in ("cold", "warm"):  # the second run finds what the first one compiled

                def measure(which, cache=cache, row=row, folder=pathlib.Path(folder)):
                    place = folder / f"{which}_{cache}"
                    place.mkdir()
                    seconds = seconds_to(args.threshold, checkouts[which], row["task"], folder / f"{which}_kernels", place)
                    row[f"{which}_{cache}_seconds"] = round(seconds, 2)

                threads = [threading.Thread(target=measure, args=(which,)) for which in checkouts]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
        print(*(f"{name} {value}" for name, value in row.items()), sep=", ", flush=True)
        rows.append(row)
    with open(args.out or ROOT / f"results/time_to_threshold_{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
