"""A long training, watched from outside: memory and speed stay flat, and no file grows without bound.

    python tests/long_run.py --minutes 30

Prints a line every minute and ends with exit code 1 if the last third is not as the second (Linux only).
"""

import csv
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import tyro

ROOT = pathlib.Path(__file__).parent.parent


def sample(process: subprocess.Popen, run_dir: pathlib.Path) -> tuple[float, float, int, int]:
    """CPU seconds, resident MB, env steps at the last evaluation, bytes in the run folder."""
    fields = pathlib.Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    resident = int(fields[21]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    rows = list(csv.DictReader((run_dir / "metrics.csv").read_text().splitlines()))
    return cpu, resident, int(rows[-1]["env_steps"]), sum(path.stat().st_size for path in run_dir.iterdir())


def main(minutes: float = 30, env: str = "pusht", algorithm: str = "apg") -> None:
    """Train for so many minutes and compare the thirds of that time.

    Args:
        minutes: how long
        env: task
        algorithm: apg or ppo
    """
    with tempfile.TemporaryDirectory() as folder:
        run_dir = pathlib.Path(folder) / "run"
        command = [sys.executable, str(ROOT / f"{algorithm}.py"), "--env", env, "--threads", "1", "--run-dir", str(run_dir)]
        command += ["--total-env-steps", str(10**9), "--num-evals", str(10**4)]  # an evaluation every 100,000 steps
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            while not (run_dir / "checkpoint.pt").exists() and process.poll() is None:
                time.sleep(0.1)
            start, samples = time.monotonic(), []
            while time.monotonic() - start < 60 * minutes and process.poll() is None:
                time.sleep(min(60, 60 * minutes / 9))
                samples.append(sample(process, run_dir))
                cpu, resident, steps, size = samples[-1]
                elapsed = time.monotonic() - start
                print(f"{elapsed:6.0f} s  {cpu:6.0f} CPU s  {resident:6.1f} MB  {steps:>11,} steps  {size:>9,} bytes", flush=True)
            process.send_signal(signal.SIGTERM)
            ended = process.wait(60)
        finally:
            process.kill()
    if ended != 128 + signal.SIGTERM:
        sys.exit(f"the training ended by itself, with {ended}")
    third = len(samples) // 3
    speed = lambda part: (part[-1][2] - part[0][2]) / (part[-1][0] - part[0][0])  # env steps a CPU second
    middle, last = samples[third : 2 * third + 1], samples[2 * third :]
    print(f"steps a CPU second: {speed(middle):,.0f}, then {speed(last):,.0f}")
    memory = [max(resident for _, resident, *_ in part) for part in (middle, last)]
    print(f"largest resident memory: {memory[0]:.1f} MB, then {memory[1]:.1f} MB")
    growth = (last[-1][3] - middle[0][3]) / (last[-1][2] - middle[0][2]) * 100_000
    print(f"the run's files: {last[-1][3]:,} bytes; {growth:.0f} more for each evaluation, a row of metrics.csv and its copy")
    if memory[1] > 1.02 * memory[0] or speed(last) < 0.85 * speed(middle) or growth > 2000:
        sys.exit("not flat")


if __name__ == "__main__":
    tyro.cli(main)
