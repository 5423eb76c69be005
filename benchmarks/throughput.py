"""Speed in env steps per second: the physics, its adjoint, and updates of APG and PPO; and the bridge beside wp.Tape.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --against ../another-checkout  # both in turn, in the same run

Each measurement is a process of its own: the trainers as a user starts them, read off their metrics.csv; `env.dynamics` in
a loop for the physics. Compare only ratios within a run: absolute speeds vary between machines and over time.
"""

import pathlib
import statistics
import subprocess
import sys
import tempfile

import tyro

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import envs
import evaluate
import models

PHYSICS = """
import sys, time, torch, envs
name, num_envs, backward = sys.argv[1], int(sys.argv[2]), bool(int(sys.argv[3]))
torch.set_num_threads(1)
env = envs.make(name, num_envs)
action = torch.rand(num_envs, env.action_size) * 2 - 1
state = env.state.requires_grad_(backward)

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

# Time of a step of the point mass, forward and backward, by the usual torch.autograd.Function around wp.Tape, over its time
# by the bridge.
BRIDGE = """
import sys, time, torch, envs, warp as wp
num_envs = int(sys.argv[2])
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


def finished(command: list[str], checkout: pathlib.Path) -> str:
    """Run a command in a checkout. Returns its output."""
    process = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    if process.returncode:
        raise envs.UserError(f"{command[1][:40]} failed in {checkout}: {process.stderr.strip().splitlines()[-1:]}")
    return process.stdout


def program(checkout: pathlib.Path, source: str, *arguments: object) -> float:
    """The number that a program prints last."""
    return float(finished([sys.executable, "-c", source, *map(str, arguments)], checkout).split()[-1])


def update(checkout: pathlib.Path, algorithm: str, task: str, num_envs: int) -> float:
    """Env steps per second of a trainer, without its first third."""
    flags = {"env": task, "num-envs": num_envs, "segment": 32, "bootstrap": "critic", "num-evals": 3}
    flags["total-env-steps"] = 12 * num_envs * 32
    with tempfile.TemporaryDirectory() as folder:
        flags["run-dir"] = f"{folder}/run"
        finished([sys.executable, f"{algorithm}.py", *(f"--{name}={value}" for name, value in flags.items())], checkout)
        rows = evaluate.read_csv(f"{folder}/run/metrics.csv")
    spent = lambda name: rows[-1][name] - rows[1][name]
    return spent("env_steps") / spent("wall_seconds")


def main(
    tasks: tuple[str, ...] = tuple(envs.TASKS), num_envs: int = 1024, repeats: int = 3, against: pathlib.Path | None = None
) -> None:
    """Print a table: the median of repeats of each measure, for each checkout.

    Args:
        tasks: tasks to measure
        num_envs: N, environments stepped together
        repeats: of each measurement
        against: another checkout of this project, to be measured in turn with this one
    """
    measures = {}
    for task in tasks:
        measures[task, "physics"] = lambda where, task=task: program(where, PHYSICS, task, num_envs, 0)
        measures[task, "physics and adjoint"] = lambda where, task=task: program(where, PHYSICS, task, num_envs, 1)
        measures[task, "APG"] = lambda where, task=task: update(where, "apg", task, num_envs)
        measures[task, "PPO"] = lambda where, task=task: update(where, "ppo", task, num_envs)
    for n in (64, 4096):
        measures["pointmass", f"wp.Tape / bridge, N = {n}"] = lambda where, n=n: program(where, BRIDGE, "pointmass", n)
    checkouts = [ROOT] + ([against.resolve()] if against else [])
    for (task, measure), take in measures.items():
        values = [[take(checkout) for checkout in checkouts] for _ in range(repeats)]
        medians = [evaluate.short(statistics.median(column)) for column in zip(*values)]
        print(f"{task:12}{measure:28}{'  '.join(medians)}", flush=True)


if __name__ == "__main__":
    models.command(lambda: tyro.cli(main, description=__doc__))
