"""Speed: physics, its adjoint and updates of APG and PPO in env steps per second; peak memory; the bridge and wp.Tape.

    python benchmarks/throughput.py                                # a table, and results/throughput.json
    python benchmarks/throughput.py --against ../another-checkout  # both in turn, in the same run
    python benchmarks/throughput.py --time-to 0.9 --seeds 5        # training seconds until APG keeps that success

Each measurement is a process of its own: the trainers as a user starts them, read off their metrics.csv; `env.dynamics` in
a loop for the physics. Compare only ratios within a run: absolute speeds vary between machines and over time.
"""

import itertools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile

import numpy as np
import tyro

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import envs
import evaluate
import models

PHYSICS = """
import sys, time, torch, envs
name, num_envs, threads, backward = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(threads)
env = envs.make(name, num_envs)
action = torch.rand(num_envs, env.action_size) * 2 - 1
state = env.state.requires_grad_(bool(backward))

def step():
    next_state, observation, reward = env.dynamics(state, action)
    if backward:
        torch.autograd.backward((next_state, reward), (torch.ones_like(next_state), torch.ones_like(reward)))

for _ in range(20):
    step()
start, steps = time.perf_counter(), 0
while time.perf_counter() < start + 1:
    step()
    steps += 1
print(steps * num_envs / (time.perf_counter() - start))
"""

# A step of the point mass, forward and backward: the bridge, and the usual torch.autograd.Function around wp.Tape.
BRIDGE = """
import sys, time, torch, envs, warp as wp
num_envs = int(sys.argv[1])
torch.set_num_threads(1)
env = envs.make("pointmass", num_envs)
action = torch.zeros(num_envs, env.action_size, requires_grad=True)
step = env.task.step
kernel, dtypes = step.kernel, [arg.type.dtype for arg in step.kernel.adj.args]

class Taped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, state, action):
        ctx.inputs = [wp.from_torch(x.detach(), dtype, requires_grad=True) for x, dtype in zip((state, action), dtypes)]
        ctx.outputs = [wp.zeros(num_envs, dtype, requires_grad=True) for dtype in dtypes[2:]]
        ctx.tape = wp.Tape()
        with ctx.tape:
            wp.launch(kernel, num_envs, ctx.inputs, ctx.outputs)
        return tuple(map(wp.to_torch, ctx.outputs))

    @staticmethod
    def backward(ctx, *gradients):
        for x, gradient in zip(ctx.outputs, gradients):
            x.grad = wp.from_torch(gradient.contiguous(), x.dtype)
        ctx.tape.backward()
        return tuple(wp.to_torch(x.grad) for x in ctx.inputs)

def seconds(function):
    times = []
    for _ in range(600):
        start = time.perf_counter()
        torch.autograd.grad(function(env.state, action)[0].sum(), action)
        times.append(time.perf_counter() - start)
    return sorted(times)[300]

assert torch.equal(*(torch.autograd.grad(f(env.state, action)[0].sum(), action)[0] for f in (step, Taped.apply)))
ratios = sorted(seconds(Taped.apply) / seconds(step) for _ in range(5))
print(ratios[2])
"""


def physics(checkout: pathlib.Path, task: str, num_envs: int, threads: int, backward: bool) -> tuple[float, float]:
    """Env steps per second of `env.dynamics`, with its adjoint if `backward`; and peak memory in MB."""
    arguments = [task, *map(str, (num_envs, threads, int(backward)))]
    text, memory = finished([sys.executable, "-c", PHYSICS, *arguments], checkout)
    return float(text.split()[-1]), memory


def bridge(checkout: pathlib.Path, num_envs: int) -> tuple[float, float]:
    """Time of a step with wp.Tape over that with the bridge; and peak memory in MB."""
    text, memory = finished([sys.executable, "-c", BRIDGE, str(num_envs)], checkout)
    return float(text.split()[-1]), memory


def training(checkout: pathlib.Path, algorithm: str, task: str, flags: dict) -> tuple[list[dict], float]:
    """The rows of a training's metrics.csv, and peak memory in MB."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = pathlib.Path(folder, "run")
        flags = [f"--{name}={value}" for name, value in (flags | {"env": task, "run-dir": run_dir}).items()]
        _, memory = finished([sys.executable, f"{algorithm}.py", *flags], checkout)
        return evaluate.read_csv(run_dir / "metrics.csv"), memory


def finished(command: list[str], checkout: pathlib.Path) -> tuple[str, float]:
    """Run a command in a checkout. Returns its output, and its peak memory in MB (on Linux)."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=checkout, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        text = output.read()
    if status:
        raise envs.UserError(f"{' '.join(command)[:80]} failed in {checkout}: {text.strip().splitlines()[-1:]}")
    return text, usage.ru_maxrss / 1024


def update(
    checkout: pathlib.Path, algorithm: str, task: str, num_envs: int, threads: int, hidden: int
) -> tuple[float, float]:
    """Env steps per second of a trainer, without its first third; and peak memory in MB."""
    flags = {"num-envs": num_envs, "threads": threads, "hidden": hidden, "segment": 32, "bootstrap": "critic"}
    rows, memory = training(checkout, algorithm, task, flags | {"total-env-steps": 12 * num_envs * 32, "num-evals": 3})
    spent = lambda name: rows[-1][name] - rows[1][name]
    return spent("env_steps") / spent("wall_seconds"), memory


def speeds(checkouts: dict, tasks: tuple, num_envs: int, threads: int, hidden: int, repeats: int) -> list[dict]:
    """A row for each task and measure: the median over repeats, for each checkout in turn."""
    measures = {
        "physics": lambda *where: physics(*where, num_envs, threads, backward=False),
        "physics and adjoint": lambda *where: physics(*where, num_envs, threads, backward=True),
        "APG": lambda checkout, task: update(checkout, "apg", task, num_envs, threads, hidden),
        "PPO": lambda checkout, task: update(checkout, "ppo", task, num_envs, threads, hidden),
    }
    bridges = {f"wp.Tape / bridge, N = {n}": lambda checkout, task, n=n: bridge(checkout, n) for n in (64, 4096)}
    cases = [*itertools.product(tasks, measures.items()), *itertools.product(("pointmass",), bridges.items())]
    rows = []
    for task, (measure, take) in cases:
        found = {name: [] for name in checkouts}
        for _ in range(repeats):
            for name, checkout in checkouts.items():
                found[name].append(take(checkout, task))
        row = {"task": task, "measure": measure}
        for name, pairs in found.items():
            row[name] = statistics.median(speed for speed, _ in pairs)
            row[f"{name}, MB"] = max(memory for _, memory in pairs)
        rows.append(row)
        print("  ".join(evaluate.short(x) if isinstance(x, float) else f"{x:26}" for x in row.values()), flush=True)
    return rows


def times(checkouts: dict, tasks: tuple, level: float, seeds: int) -> list[dict]:
    """A row for each task and checkout: training seconds until APG keeps that success, IQM and 95% interval."""
    rows = []
    for task in tasks:
        found = {name: [] for name in checkouts}
        for seed, (name, checkout) in itertools.product(range(1, seeds + 1), checkouts.items()):
            run, _ = training(checkout, "apg", task, {"seed": seed})
            curve = {column: np.array([row[column] for row in run]) for column in ("eval_success", "wall_seconds")}
            found[name].append(evaluate.cost_to(curve, level, "wall_seconds"))
        for name, seconds in found.items():
            low, high = evaluate.interval(seconds)
            rows.append({"task": task, "checkout": name, "seconds": seconds, "iqm": float(evaluate.iqm(seconds))})
            print(f"{task:12}{name:12}{rows[-1]['iqm']:8.1f} s [{low:.1f}, {high:.1f}]  {seconds}", flush=True)
    return rows


def main(
    tasks: tuple[str, ...] = ("pointmass", "navigation", "pusht", "franka"), num_envs: int = 1024, hidden: int = 64,
    threads: int = 1, repeats: int = 3, time_to: float | None = None, seeds: int = 3,
    against: pathlib.Path | None = None, out: pathlib.Path = ROOT / "results" / "throughput.json",
) -> None:  # fmt: skip
    """Measure speed, as the median of repeats; or, with --time-to, the training seconds to a success.

    Args:
        tasks: tasks to measure
        num_envs: N, environments stepped together
        hidden: units in each of the two hidden layers
        threads: CPU threads of torch
        repeats: of each measurement
        time_to: measure instead, with each task's own flags, the training seconds until APG keeps this success
        seeds: number of seeds for --time-to: 1 to this
        against: another checkout of this project, to be measured in turn with this one
        out: file to write
    """
    checkouts = {"this": ROOT} | ({"against": against.resolve()} if against else {})
    settings = {"num_envs": num_envs, "hidden": hidden, "threads": threads, "time_to": time_to}
    if time_to is None:
        rows = speeds(checkouts, tasks, num_envs, threads, hidden, repeats)
    else:
        rows = times(checkouts, tasks, time_to, seeds)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    out.write_text(json.dumps({"machine": machine, "settings": settings, "rows": rows}, indent=1))
    print(f"wrote {out}")


if __name__ == "__main__":
    models.command(lambda: tyro.cli(main, description=__doc__))
