"""Speed in env steps per second of the physics and of its adjoint, and the bridge beside wp.Tape.

    python benchmarks/throughput.py

Compare only ratios within a run: absolute speeds vary between machines and over time. The trainers print their own speed.
"""

import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import torch
import tyro
import warp as wp

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import envs
import evaluate
import models


def seconds(function: Callable, calls: int = 300) -> float:
    """Median time of a call."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def physics(task: str, num_envs: int, backward: bool) -> float:
    """Env steps per second of `Env.dynamics`, with or without its adjoint."""
    env = envs.make(task, num_envs)
    state, action = env.state.requires_grad_(backward), 2 * torch.rand(num_envs, env.action_size) - 1

    def step():
        next_state, _, reward = env.dynamics(state, action)
        if backward:
            torch.autograd.backward((next_state, reward), (torch.ones_like(next_state), torch.ones_like(reward)))

    return num_envs / seconds(step)


class Taped(torch.autograd.Function):
    """A step of the point mass by the usual wrapper of wp.Tape."""

    @staticmethod
    def forward(ctx, kernel, *inputs):
        dtypes = [arg.type.dtype for arg in kernel.adj.args]
        ctx.inputs = [wp.from_torch(x.detach(), dtype, requires_grad=True) for x, dtype in zip(inputs, dtypes)]
        ctx.outputs = [wp.zeros(len(inputs[0]), dtype, requires_grad=True) for dtype in dtypes[2:]]
        ctx.tape = wp.Tape()
        with ctx.tape:
            wp.launch(kernel, len(inputs[0]), ctx.inputs, ctx.outputs)
        return tuple(map(wp.to_torch, ctx.outputs))

    @staticmethod
    def backward(ctx, *gradients):
        for x, gradient in zip(ctx.outputs, gradients):
            x.grad = wp.from_torch(gradient.contiguous(), x.dtype)
        ctx.tape.backward()
        return None, *(wp.to_torch(x.grad) for x in ctx.inputs)


def tape_over_bridge(num_envs: int) -> float:
    """Time of a step of the point mass, forward and backward, by wp.Tape over that by the bridge."""
    env = envs.make("pointmass", num_envs)
    action = torch.zeros(num_envs, env.action_size, requires_grad=True)
    bridge = lambda: torch.autograd.grad(env.dynamics(env.state, action)[0].sum(), action)[0]
    tape = lambda: torch.autograd.grad(Taped.apply(env.task.step.kernel, env.state, action)[0].sum(), action)[0]
    assert torch.equal(bridge(), tape())
    return seconds(tape) / seconds(bridge)


def main(tasks: tuple[str, ...] = tuple(envs.TASKS), num_envs: int = 1024, repeats: int = 3) -> None:
    """Print a table: the median of repeats of each measure.

    Args:
        tasks: tasks to measure
        num_envs: N, environments stepped together
        repeats: of each measurement
    """
    torch.set_num_threads(1)
    measures = {}
    for task in tasks:
        measures[task, "physics"] = physics, task, num_envs, False
        measures[task, "physics and adjoint"] = physics, task, num_envs, True
    for n in (64, 4096):
        measures["pointmass", f"wp.Tape / bridge, N = {n}"] = tape_over_bridge, n
    for (task, measure), (function, *arguments) in measures.items():
        median = statistics.median(function(*arguments) for _ in range(repeats))
        print(f"{task:12}{measure:28}{evaluate.short(median)}", flush=True)


if __name__ == "__main__":
    models.command(lambda: tyro.cli(main, description=__doc__))
