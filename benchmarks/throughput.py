"""Throughput, shares of time, memory and compile time of every task and both trainers.

    python benchmarks/throughput.py                       # a table, and results/throughput_{hardware}.json
    python benchmarks/throughput.py memory                # peak memory against N, K and T, results/memory_{hardware}.csv

What is timed is the real thing: `env.dynamics`, and the trainers' own main(), from which only evaluation is taken out.
Each line is measured in a process of its own, so that its peak memory is its own too.
"""

import collections
import concurrent.futures
import contextlib
import csv
import dataclasses
import functools
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from unittest import mock

import torch
import tyro
import warp

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import apg
import bridge
import envs
import models
import ppo

WARM_UP = 3  # iterations before the clock counts


@dataclasses.dataclass
class Args:
    """Measure speed, or with `memory` peak memory."""

    command: tyro.conf.Positional[str] = "speed"
    """speed or memory; `first` is what speed runs for compile times: a single update in a new process"""
    tasks: tuple[str, ...] = tuple(envs.TASKS)
    """which tasks"""
    num_envs: tuple[int, ...] = ()
    """N, environments stepped together; default 64 256 1024 4096, on a GPU also 8192 32768"""
    segment: int = 32
    """K, control steps between updates"""
    more_segments: tuple[int, ...] = (8, 16, 64)
    """other K, each measured at N = 256 with the last of `hidden`"""
    hidden: tuple[int, ...] = (64, 128)
    """units in each of the networks' two hidden layers"""
    repeats: int = 10
    """timed iterations, of which medians are reported"""
    threads: int = os.cpu_count() or 1
    """CPU threads that share a long physics launch"""
    torch_threads: int = 1
    """CPU threads of torch"""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    out: pathlib.Path | None = None
    """where the figures go; default results/throughput_{hardware}.json or results/memory_{hardware}.csv"""


def clock(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def hardware(device):
    """The processor's name, for a title and, with dashes, for a file."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        return f"{names[0]} {len(names)} cores"
    return f"{platform.processor() or platform.machine()} {os.cpu_count()} cores"


def peak_memory(device):
    """Most memory this process has held so far, in MB: resident on the CPU, torch's own on a GPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


# --- physics ----------------------------------------------------------------------------------------------------------


def time_physics(env, steps, repeats, adjoint):
    """Median seconds of a chain of control steps, and with `adjoint` of its derivative in the first state and actions."""
    action = (2 * torch.rand(env.num_envs, env.action_size, device=env.device) - 1).requires_grad_(adjoint)
    seconds = []
    for _ in range(WARM_UP + repeats):
        start = clock(env.device)
        state = env.state.detach().requires_grad_(adjoint)
        for _ in range(steps):
            state, _, _ = env.dynamics(state, action)
        if adjoint:
            state.backward(torch.ones_like(state))
        seconds.append(clock(env.device) - start)
    return statistics.median(seconds[WARM_UP:])


# --- trainers ---------------------------------------------------------------------------------------------------------


def run(trainer, env, num_envs, steps, iterations, device, *flags, shares=False):
    """Run `iterations` of a trainer's main(), and as many as WARM_UP before, without its evaluations.

    Returns the seconds of each iteration, the sums of those of its parts (a dictionary), and the run's config.json.
    """
    starts, ends, parts, running = [], [], collections.Counter(), []

    def set_learning_rate(*arguments, original=models.set_learning_rate):  # called as an iteration begins, for actor and critic
        starts.append(clock(device))
        if len(starts) == 2 * WARM_UP + 1:
            parts.clear()
        original(*arguments)

    def score(env, *_, **__):
        ends.append(clock(device))
        return dict.fromkeys(["return", "success", *env.task.tolerances], 0.0)

    def timed(part, function):
        """The function; its seconds, without those of timed functions that it calls, are added to the part's."""

        @functools.wraps(function)
        def wrapper(*arguments, **options):
            name = part(arguments) if callable(part) else part
            start = clock(device)
            running.append(0.0)
            try:
                return function(*arguments, **options)
            finally:
                seconds = clock(device) - start
                parts[name] += seconds - running.pop()
                if running:
                    running[-1] += seconds

        return wrapper

    def network(name):
        running_network[0] = name
        return name

    running_network = ["policy"]  # the one called last: Tensor.backward, in the trainers, is its
    places = [] if "--cuda-graph" in flags else [(ppo, "rollout", "rollout")]  # a graph cannot be timed in parts
    if shares:
        places = [
            (bridge._Plan, "launch", lambda arguments: "adjoint" if arguments[1] else "physics"),
            (models.Actor, "sample", lambda _: network("policy")),
            (models.Actor, "log_prob", lambda _: network("policy")),
            (models.Critic, "forward", lambda _: network("critic")),
            (torch.Tensor, "backward", lambda _: running_network[0]),
            (apg, "backward", "policy"),
            (apg, "td_lambda_targets", "critic"),
            (ppo, "gae", "critic"),
            (torch.optim.Adam, "step", "optimizer"),
            (torch.nn.utils, "clip_grad_norm_", "optimizer"),
        ]
    flags = [*flags, "--env", env, "--num-envs", num_envs, "--device", device, "--num-evals", 1]
    flags += ["--total-env-steps", (WARM_UP + iterations) * steps * num_envs]
    with contextlib.ExitStack() as patched, tempfile.TemporaryDirectory() as folder:
        arguments = [trainer.__name__, "--run-dir", f"{folder}/run", *map(str, flags)]
        for owner, name, part in places:
            patched.enter_context(mock.patch.object(owner, name, timed(part, getattr(owner, name))))
        for owner, name, new in (
            (models, "set_learning_rate", set_learning_rate), (envs, "score", score), (sys, "argv", arguments),
        ):  # fmt: skip
            patched.enter_context(mock.patch.object(owner, name, new))
        patched.enter_context(contextlib.redirect_stdout(io.StringIO()))
        trainer.main()
        config = json.loads(pathlib.Path(f"{folder}/run/config.json").read_text())
    starts = [*starts[::2], ends[1]]  # ends[0] is of the evaluation before training, ends[1] of the one after the last
    return [stop - start for start, stop in itertools.pairwise(starts)][WARM_UP:], parts, config


def measure_speed(args, task, num_envs, steps, hidden):
    """One line of the table, as a dictionary: env steps/s, shares, peak memory (MB)."""
    bridge.set_num_threads(args.threads)
    torch.set_num_threads(args.torch_threads)
    env = envs.make(task, num_envs, args.device)
    line = {"task": task, "num_envs": num_envs, "segment": steps, "hidden": hidden}
    for name, adjoint in (("physics", False), ("physics_and_adjoint", True)):
        line[name] = steps * num_envs / time_physics(env, steps, args.repeats, adjoint)
    flags = ["--segment", steps, "--hidden", hidden, "--threads", args.threads, "--torch-threads", args.torch_threads]
    passes = ["--update-epochs", 4, "--num-minibatches", 4]
    trainers = ("apg_none", apg, ["--bootstrap", "none"]), ("apg_critic", apg, ["--bootstrap", "critic"]), ("ppo", ppo, passes)
    for name, trainer, more in trainers:
        seconds, parts, _ = run(trainer, task, num_envs, steps, args.repeats, args.device, *flags, *more)
        line[name] = steps * num_envs / statistics.median(seconds)
        line[f"{name}_fastest"] = steps * num_envs / min(seconds)
        if name == "ppo":
            line["ppo_rollout"] = steps * num_envs * len(seconds) / parts["rollout"]
        else:
            line[f"{name}_memory"] = peak_memory(args.device)
        seconds, parts, _ = run(trainer, task, num_envs, steps, 4, args.device, *flags, *more, shares=True)
        line[f"{name}_shares"] = {part: parts[part] / sum(seconds) for part in PARTS}
        line[f"{name}_shares"]["rest"] = 1 - sum(line[f"{name}_shares"].values())
    for name, trainer, more in trainers if args.device != "cpu" else ():  # last, as graphs keep memory of their own
        seconds, _, _ = run(trainer, task, num_envs, steps, args.repeats, args.device, *flags, *more, "--cuda-graph")
        line[f"{name}_graph"] = steps * num_envs / statistics.median(seconds)
    return line


def measure_memory(args, task, num_envs, segment, bootstrap, recompute):
    """Peak memory (MB) of APG's update, and what the process held just before the first one."""
    flags = ["--segment", segment, "--bootstrap", bootstrap, "--hidden", args.hidden[-1], *["--recompute"] * recompute]
    steps = envs.EPISODE_LENGTH[task] if bootstrap == "mc" else segment
    before = []
    original = models.make_optimizer  # whatever is loaded on first use has been by then
    with mock.patch.object(models, "make_optimizer", lambda *x: before.append(peak_memory(args.device)) or original(*x)):
        run(apg, task, num_envs, steps, 2 - WARM_UP, args.device, *flags)  # two iterations in all
    line = {"task": task, "num_envs": num_envs, "segment": segment, "steps": steps, "bootstrap": bootstrap}
    return line | {"recompute": recompute, "before_mb": round(before[-1]), "peak_mb": round(peak_memory(args.device))}


def measure_bridge(args):
    """Microseconds a step that the bridge costs, forward and backward: 64 environments of the smallest kernel."""
    env = envs.make("pointmass", 64, args.device)
    forward, both = (time_physics(env, args.segment, 20 * args.repeats, adjoint) for adjoint in (False, True))
    return {"forward": forward / args.segment * 1e6, "forward_and_backward": both / args.segment * 1e6}


def measure_first(args, task):
    """Seconds from the start of a new process to the end of its first update, and of its compilation: cold, then warm."""
    line = {"task": task}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            start = time.perf_counter()
            command = [sys.executable, __file__, "first", "--tasks", task, "--device", args.device]
            done = subprocess.run(command, env=os.environ | {"WARP_CACHE_PATH": cache}, capture_output=True, check=True)
            line |= {f"{name}_first_update": time.perf_counter() - start, f"{name}_compile": float(done.stdout.split()[-1])}
    return line


# --- tables -----------------------------------------------------------------------------------------------------------

PARTS = ("physics", "adjoint", "policy", "critic", "optimizer")


def in_new_process(function, *arguments):
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def speed(args, out):
    columns = ["physics", "physics_and_adjoint", "apg_none", "apg_critic", "ppo_rollout", "ppo"]
    columns += ["apg_none_graph", "apg_critic_graph", "ppo_graph"] if args.device != "cpu" else []
    lines, title = [], f"{hardware(args.device)}, torch {torch.__version__}, warp {warp.__version__}"
    print(f"{title}\nenv steps/s, thousands; MB; shares in % of {', '.join((*PARTS, 'rest'))}")
    shares = [f"{name} shares" for name in ("apg_none", "apg_critic", "ppo")]
    print(f"{'task':10} {'N':>5} {'K':>3} {'units':>5}" + "".join(f"{c:>20}" for c in (*columns, "MB", *shares)))
    cells = [(num_envs, args.segment, hidden) for num_envs in args.num_envs for hidden in args.hidden]
    cells += [(256, segment, args.hidden[-1]) for segment in args.more_segments]
    for task, cell in itertools.product(args.tasks, cells):
        line = in_new_process(measure_speed, args, task, *cell)
        texts = [f"{line[c] / 1000:,.1f}" for c in columns] + [f"{line['apg_critic_memory']:,.0f}"]
        for name in ("apg_none", "apg_critic", "ppo"):
            texts.append(" ".join(f"{100 * share:2.0f}" for share in line[f"{name}_shares"].values()))
        print("{:10} {:5} {:3} {:5}".format(task, *cell) + "".join(f"{text:>20}" for text in texts), flush=True)
        lines.append(line)
    per_step = in_new_process(measure_bridge, args)
    print("bridge, us a step: forward {forward:.1f}, forward and backward {forward_and_backward:.1f}".format(**per_step))
    firsts = [measure_first(args, task) for task in args.tasks]
    for line in firsts:
        print("{task}: first update after {cold_first_update:.1f} s, of which compiling {cold_compile:.1f} s; with cached "
              "kernels {warm_first_update:.1f} s and {warm_compile:.1f} s".format(**line))  # fmt: skip
    settings = {"hardware": hardware(args.device), "torch": torch.__version__, "warp": warp.__version__}
    settings |= {"threads": args.threads, "torch_threads": args.torch_threads, "repeats": args.repeats}
    figures = dict(**settings, env_steps_per_second=lines, bridge_us_a_step=per_step, first_update_seconds=firsts)
    out.write_text(json.dumps(figures, indent=1) + "\n")


def memory(args, out):
    with open(out, "w", newline="") as file:
        for task in args.tasks:
            length = envs.EPISODE_LENGTH[task]
            for num_envs in args.num_envs:
                for bootstrap, recompute in (("none", False), ("mc", False), ("mc", True)):
                    for segment in (8, 32, 64, length):
                        line = in_new_process(measure_memory, args, task, num_envs, segment, bootstrap, recompute)
                        if file.tell() == 0:
                            csv.DictWriter(file, line).writeheader()
                        csv.DictWriter(file, line).writerow(line)
                        print(*(f"{name} {value}" for name, value in line.items()), sep=", ", flush=True)


def main():
    args = tyro.cli(Args, description=__doc__)
    if not args.num_envs:
        args.num_envs = (64, 256, 1024, 4096) if args.command == "speed" else (64, 256, 1024)
        args.num_envs += (8192, 32768) if args.device != "cpu" else ()
    name = "-".join(hardware(args.device).lower().replace("(r)", "").replace("(tm)", "").split())
    if args.command == "first":
        _, _, config = run(apg, args.tasks[0], 64, args.segment, 1 - WARM_UP, args.device)
        print(config["compile_seconds"])
    elif args.command == "memory":
        memory(args, args.out or ROOT / f"results/memory_{name}.csv")
    elif args.command == "speed":
        speed(args, args.out or ROOT / f"results/throughput_{name}.json")
    else:
        sys.exit(f"throughput.py: unknown command {args.command}: choose from speed, memory")


if __name__ == "__main__":
    main()
