"""Score trained policies, and compare the algorithms over tasks, seeds and settings.

    python evaluate.py policy RUN_DIR_OR_CHECKPOINT
    python evaluate.py export RUN_DIR --out FILE.pt  # a small checkpoint: weights and normalizer
    python evaluate.py suite | front | ablation | lengths | reuse | average  # many runs; rerun the command to resume it
    python evaluate.py collect RUN_DIR ...           # runs of other programs, into results/relatives.csv
    python evaluate.py summary                       # tables of all results
"""

import csv
import itertools
import json
import math
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from tyro.conf import Positional

import apg
import envs
import models
import ppo
from models import Actor, Critic, Normalizer

RESULTS = pathlib.Path("results")
TEXTS = ["env", "algorithm", "bootstrap", "file", "simulator", "changed", "measure"]  # columns without numbers
SETTINGS = ["segment", "bootstrap", "num_envs", "update_epochs", "num_minibatches", "clip_coef", "learning_rate"]
SETTINGS += ["average_eta", "total_env_steps"]
FACTS = ["env", "algorithm", "seed", *SETTINGS]  # of a run, in each of its rows
COSTS = ["env_steps", "gradient_steps", "wall_seconds"]
LEVEL = 0.9  # the success that a run has to reach, and keep
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # each stops a comparison; its runs save themselves
TABLES = {  # of `summary`: comparisons other than the suite, and the columns that distinguish their runs
    "front": ("algorithm", "update_epochs", "num_minibatches"),
    "ablation": ("bootstrap", "segment"),
    "lengths": ("segment",),
    "reuse": ("update_epochs", "num_minibatches", "clip_coef"),
    "average": ("algorithm",),
    "relatives": ("algorithm", "average_eta"),
}
SHORTER = {"pusht": {"total_env_steps": 700_000}, "franka": {"total_env_steps": 500_000}}  # of ablations

# --- one policy ---------------------------------------------------------------------------------------------------------


def load(path: str, num_envs: int, seed: int = envs.EVALUATION_SEED) -> tuple[dict, envs.Env, Actor, Critic, Normalizer]:
    """A checkpoint with its environments, policy (an Actor, the average), critic and normalizer."""
    checkpoint = models.load_checkpoint(path)
    env = envs.make(checkpoint["args"]["env"], num_envs, seed=seed)
    average = models.averaged(Actor(env.observation_size, env.action_size), eta=0)
    critic, normalizer = Critic(env.observation_size), Normalizer(env.observation_size)
    networks = {"policy": average, "critic": critic, "normalizer": normalizer}
    for name, network in networks.items():
        network.load_state_dict(checkpoint[name])
    return checkpoint, env, average.module, critic, normalizer


def policy(path: Positional[str], num_envs: int = 256, seed: int = envs.EVALUATION_SEED) -> None:
    """Print return, success and errors of a checkpoint's deterministic policy, averaged over one episode per environment.

    Args:
        path: a run folder or a checkpoint file
        num_envs: number of episodes
        seed: seed of the initial states; the default is that of the training curves
    """
    checkpoint, env, actor, _, normalizer = load(path, num_envs, seed)
    result = envs.score(env, lambda observation: actor(normalizer(observation)), seed)
    print(f"{env.name} ({checkpoint['algorithm']}, {checkpoint['run']['env_steps']:,} env steps), {num_envs} episodes")
    for name, value in result.items():
        limit = env.task.tolerances.get(name)
        print(f"{name.replace('_', ' ')} {value:.4f}" + (f" (success: below {limit:g})" if limit is not None else ""))


def export(run_dir: Positional[str], out: pathlib.Path) -> None:
    """Write a small checkpoint with what a run's policy needs, and next to it its score over 256 episodes, into scores.csv.

    Args:
        run_dir: the run folder
        out: file to write, {task}_{algorithm}.pt
    """
    checkpoint, env, actor, _, normalizer = load(run_dir, 256)
    result = envs.score(env, lambda observation: actor(normalizer(observation)))
    args, env_steps = checkpoint["args"], checkpoint["run"]["env_steps"]
    small = {name: checkpoint[name] for name in ("version", "algorithm", "policy", "critic", "normalizer")}
    small |= {"args": args | {"run_dir": None, "resume": None}, "run": {"env_steps": env_steps}}  # no paths of this machine
    out.parent.mkdir(parents=True, exist_ok=True)
    models.write_atomically(out, lambda file: torch.save(small, file))
    row = {"file": out.name, "env": env.name, "algorithm": small["algorithm"], "seed": args["seed"]}
    row |= {"env_steps": env_steps, "success": result["success"], "return": result["return"]}
    record(out.with_name("scores.csv"), row, ("file",))
    print(f"wrote {out}: success {result['success']:.3f}, return {result['return']:.2f}")


# --- many runs ----------------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """Many runs, each into its own folder runs/{command}/{run}, with a log next to it. Rerun the command to resume it.
    It does not repeat finished runs: after a change of settings or code, delete their folders first.
    """

    tasks: tuple[str, ...] = tuple(envs.TASKS)  # which tasks to train
    seeds: int = 10  # number of seeds, starting at 1
    jobs: int = 2  # runs at a time, each with one CPU thread


def suite(comparison: Comparison = Comparison()) -> None:
    """Train both algorithms on every task with their tuned settings; write suite.csv, one row per evaluation."""
    train("suite", [(env, label, {}) for env in comparison.tasks for label in ("apg", "ppo")], comparison)


def front(comparison: Comparison = Comparison(seeds=4)) -> None:
    """Train both algorithms with 1 to 8 passes, and with half and twice as many minibatches; write front.csv."""
    variants = []
    for env, (label, trainer) in itertools.product(comparison.tasks, (("apg", apg), ("ppo", ppo))):
        tuned = trainer.Args(**trainer.TUNED.get(env, {}))
        pairs = {(epochs, tuned.num_minibatches) for epochs in (1, 2, 4, 8)}
        pairs |= {(tuned.update_epochs, m) for m in (max(tuned.num_minibatches // 2, 1), 2 * tuned.num_minibatches)}
        variants += [(env, label, {"update_epochs": e, "num_minibatches": m}) for e, m in sorted(pairs)]
    train("front", variants, comparison)


def ablation(comparison: Comparison = Comparison(seeds=4)) -> None:
    """Train APG with segments of many lengths and every bootstrap; write ablation.csv.

    The minibatch size is fixed, so that the number of gradient steps per environment step does not depend on the length,
    unless a segment is smaller than that: it has at least one minibatch.
    """
    variants = []
    for env in comparison.tasks:
        tuned, length = apg.Args(env=env, **apg.TUNED.get(env, {})), envs.TASKS[env](torch.float32).episode_length
        cases = itertools.product((4, 8, 16, 32, 64, length), ("none", "critic"))
        for segment, bootstrap in [*cases, (length, "mc")]:
            flags = {"segment": segment, "bootstrap": bootstrap} | SHORTER.get(env, {})
            flags["num_minibatches"] = max(round(tuned.num_minibatches * segment / tuned.segment), 1)
            if bootstrap == "mc":
                flags["gamma"] = 0.99  # counted from the episode's start, it must leave something of the end
            variants.append((env, "apg", flags))
    train("ablation", variants, comparison)


def lengths(comparison: Comparison = Comparison(("franka",), seeds=4)) -> None:
    """Train APG with segments of many lengths and otherwise the task's own flags; write lengths.csv.

    Unlike in `ablation`, long segments take fewer gradient steps per environment step, with larger minibatches.
    """
    cases = itertools.product(comparison.tasks, (4, 8, 16, 32, 64, 128))
    train("lengths", [(env, "apg", {"segment": segment} | SHORTER.get(env, {})) for env, segment in cases], comparison)


def reuse(comparison: Comparison = Comparison(("pusht", "franka"), seeds=4)) -> None:
    """Train APG with each gradient used once, and ever more often, with and without the trust region; write reuse.csv.

    All use the same number of gradient steps per environment step: with more reuse, a segment has more environments.
    """
    variants, passes = [], ((1, 1), (1, 4), (2, 4), (4, 4), (8, 4))
    for env, (epochs, minibatches), clip in itertools.product(comparison.tasks, passes, (True, False)):
        flags = {"update_epochs": epochs, "num_minibatches": minibatches, "num_envs": 8 * epochs * minibatches}
        if not clip:
            flags["clip_coef"] = math.inf
        variants.append((env, "apg", flags | SHORTER.get(env, {})))
    train("reuse", variants, comparison)


def average(comparison: Comparison = Comparison(seeds=4)) -> None:
    """Train APG and evaluate the last weights, not the averaged policy; write average.csv."""
    train("average", [(env, "apg", {"average_eta": 0.0}) for env in comparison.tasks], comparison)


def train(command: str, variants: list[tuple[str, str, dict]], comparison: Comparison) -> None:
    """Train every variant with every seed, unless its folder has it; then write {command}.csv.

    variants: (env, label, flags) each; label apg or ppo; flags {name: value}, without env and seed.
    Exits with 1 if a run failed, and with 130 after a signal, when each run has saved itself.
    """
    for env in comparison.tasks:
        if env not in envs.TASKS:
            raise envs.UserError(f"unknown task {env}: choose from {', '.join(envs.TASKS)}")
    runs = {}
    for seed in range(1, comparison.seeds + 1):  # outermost, so that early results cover every variant
        for env, label, flags in variants:
            name = "__".join([env, label, *(f"{key}-{value}" for key, value in flags.items()), str(seed)])
            runs[pathlib.Path("runs", command, name)] = label, {"env": env, "seed": seed, **flags}
    waiting, running, failed = [folder for folder in runs if not finished(folder)], {}, False
    print(f"{command}: {len(runs)} runs into runs/{command}, {len(runs) - len(waiting)} of them finished", flush=True)
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)  # KeyboardInterrupt, in the background too
    try:
        while running or waiting:
            while waiting and len(running) < max(comparison.jobs, 1):
                folder = waiting.pop(0)
                running[folder] = start(folder, *runs[folder])
            for folder in [folder for folder, process in running.items() if process.poll() is not None]:
                del running[folder]
                rows = finished(folder)
                failed = failed or not rows
                words = f"success {rows[-1]['eval_success']:.3f}" if rows else f"FAILED, see {folder}.log"
                print(f"{len(runs) - len(waiting) - len(running)} of {len(runs)}: {folder.name}: {words}", flush=True)
            time.sleep(0.05)
    except KeyboardInterrupt:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not cut short what the first one began
        for process in running.values():
            process.send_signal(signal.SIGINT)
        for process in running.values():
            process.wait()
        print("stopped; rerun the command to resume")
        sys.exit(130)
    rows = [row | {"algorithm": label} for folder, (label, _) in runs.items() for row in finished(folder)]
    if rows:
        write_csv(RESULTS / f"{command}.csv", rows)
    if failed:
        sys.exit(1)


def start(folder: pathlib.Path, label: str, flags: dict) -> subprocess.Popen:
    """Begin a run, or resume it if it has a checkpoint, as a process that writes to {folder}.log."""
    command = [sys.executable, str(pathlib.Path(__file__).with_name(f"{label}.py"))]
    if (folder / "checkpoint.pt").exists():
        command += ["--resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)  # a run that was killed before its first checkpoint
        command += [f"--{name}={value}" for name, value in (flags | {"run_dir": folder}).items()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "a") as log:
        # In a process group of its own, so that Ctrl-C reaches it once, through this process, and not twice.
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0)


def finished(folder: pathlib.Path) -> list[dict]:
    """The rows of a finished run's metrics.csv, each with FACTS; none if the run has not come to its end."""
    if not (folder / "metrics.csv").exists():
        return []
    rows, config = read_csv(folder / "metrics.csv"), json.loads((folder / "config.json").read_text())
    done = rows[-1]["env_steps"] >= config["total_env_steps"]
    return [{name: config.get(name, math.nan) for name in FACTS} | row for row in rows] if done else []


def collect(run_dirs: Positional[list[pathlib.Path]], out: pathlib.Path = RESULTS / "relatives.csv") -> None:
    """Write the rows of finished runs into one CSV file, as `suite` does; of SHAC or stable-baselines3, for example.

    Args:
        run_dirs: run folders
        out: file to write
    """
    rows = []
    for folder in run_dirs:
        if not finished(folder):
            raise envs.UserError(f"{folder} holds no finished run")
        rows += finished(folder)
    write_csv(out, rows)


# --- statistics ---------------------------------------------------------------------------------------------------------


def iqm(values: np.ndarray) -> np.ndarray:
    """Interquartile mean over seeds, [seeds, ...] -> [...]: the lowest and the highest quarter, rounded down, are dropped.

    Agarwal et al. 2021, Deep Reinforcement Learning at the Edge of the Statistical Precipice, arXiv:2108.13264.
    """
    ordered, cut = np.sort(np.asarray(values, dtype=float), axis=0), len(values) // 4
    return ordered[cut : len(ordered) - cut].mean(axis=0)


def interval(values: np.ndarray, others: np.ndarray | None = None) -> np.ndarray:
    """95% interval (low, high) of the IQM, or of its ratio to that of `others`, by bootstrap over seeds: [2, ...]."""
    generator = np.random.default_rng(0)  # the same at each call
    draw = lambda x: iqm(np.asarray(x, dtype=float)[generator.integers(len(x), size=(len(x), 2000))])  # [2000, ...]
    draws = draw(values) if others is None else draw(values) / draw(others)
    return np.percentile(draws, [2.5, 97.5], axis=0)


def read_csv(path: str | pathlib.Path) -> list[dict]:
    """Rows of a CSV file, numbers as floats and an empty cell as nan."""
    parsed = lambda name, text: text if name in TEXTS else float(text or "nan")
    with open(path, newline="") as file:
        return [{name: parsed(name, text) for name, text in row.items()} for row in csv.DictReader(file)]


def write_csv(path: pathlib.Path, rows: list[dict]) -> None:
    """Write rows with the same columns, numbers with 9 digits; `path` is the old file or the new one, never a part."""
    texts = [[f"{x:.9g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    lines = [",".join(row) + "\n" for row in (list(rows[0]), *texts)]
    path.parent.mkdir(parents=True, exist_ok=True)
    models.write_atomically(path, lambda file: file.write("".join(lines).encode()))
    print(f"wrote {path}")


def record(path: pathlib.Path, row: dict, key: tuple[str, ...]) -> None:
    """Write a row into a CSV file, new or not, in the place of one that is the same in the columns `key`."""
    old = read_csv(path) if path.exists() else []
    write_csv(path, [*(other for other in old if any(other[name] != row[name] for name in key)), row])


def runs_by(rows: list[dict], *names: str) -> dict[tuple, list[dict]]:
    """{values of the columns `names`: their runs, one a seed}. rows: an evaluation each, as suite.csv has them.

    A run is {column: array [evaluations]}, and a single value for each of FACTS.
    """
    seeds, groups = {}, {}
    for row in rows:
        seeds.setdefault(tuple(row[name] for name in (*names, "seed")), []).append(row)
    for (*key, _seed), run in seeds.items():
        arrays = {name: np.array([row[name] for row in run], float) for name in run[0] if name not in FACTS}
        groups.setdefault(tuple(key), []).append(run[0] | arrays)
    return groups


def cost_to(run: dict, level: float, cost: str) -> float:
    """What a run spent, in the column `cost`, to reach a success of `level` for good; inf if it ends below.

    For good: the first evaluation after which success is never below `level` again.
    """
    below = np.flatnonzero(run["eval_success"] < level)
    first = below[-1] + 1 if len(below) else 0
    return float(run[cost][first]) if first < len(run[cost]) else math.inf


def spent(run: dict, level: float, cost: str) -> float:
    """What a run spent to reach `level` for good; its full budget if it did not."""
    return min(cost_to(run, level, cost), run[cost][-1])


def costs(runs: list[dict], others: list[dict] | None = None, level: float = LEVEL) -> list[str]:
    """The cost of `level`, or its ratio to that of `others`, for each of COSTS: "12 [10, 15]".

    If a run missed the level, only a bound is given, without an interval: a lower bound (>), or an upper bound (<) of a
    ratio where only runs of `others` missed it. If both missed it, the ratio is unknown (-).
    """
    missed = lambda group: any(math.isinf(cost_to(run, level, "env_steps")) for run in group)
    sign = ">" if missed(runs) else ""
    if missed(others or []):
        if sign:
            return ["-"] * len(COSTS)
        sign = "<"
    cells = []
    for cost in COSTS:
        values, divisors = ([spent(run, level, cost) for run in runs] for runs in (runs, others or []))
        middle = iqm(values) / (iqm(divisors) if divisors else 1)
        cells.append(sign + short(middle) if sign else cell(values, divisors or None))
    return cells


def summary(level: float = LEVEL) -> None:
    """Print tables in Markdown: PPO beside APG, from suite.csv; then one for each of the other comparisons.

    Each number is an IQM over seeds with its 95% interval. Costs are those to reach a success of `level` for good. Where a
    run did not, it counts with its full budget, and ">" marks the bound.
    """
    final = lambda runs, column="eval_success": cell([run[column][-1] for run in runs])
    if not RESULTS.is_dir():
        raise envs.UserError(f"there is no folder {RESULTS} here: run `python evaluate.py suite` first")
    titles = [f"{name} to {level:g}" for name in ("environment steps", "gradient steps", "seconds")]
    for name in ("suite", *TABLES):
        if not (RESULTS / f"{name}.csv").exists():
            continue
        data = read_csv(RESULTS / f"{name}.csv")
        if name == "suite":
            groups, rows = runs_by(data, "env", "algorithm"), []
            for env in dict.fromkeys(env for env, _ in groups):
                ours, theirs = (groups.get((env, label), []) for label in ("apg", "ppo"))
                if ours and theirs:
                    rows.append([env, final(ours), final(theirs), *costs(theirs, ours, level)])
            header = ["final success, APG", "final success, PPO", *(f"{title}, PPO / APG" for title in titles)]
            print_table(["task", *header], rows)
        columns = TABLES.get(name, ("algorithm",))
        groups = runs_by(data, "env", *columns)
        rows = []
        for key, runs in groups.items():
            rows.append([*map(short, key), final(runs), final(runs, "eval_return"), *costs(runs, None, level)])
        print_table(["task", *columns, "final success", "final return", *titles], rows)
    if (RESULTS / "transfer.csv").exists():
        columns, groups = ("env", "algorithm", "simulator", "changed", "measure"), {}
        for row in read_csv(RESULTS / "transfer.csv"):
            groups.setdefault(tuple(row[name] for name in columns), []).append(row["mean"])
        print_table([*columns, "IQM over seeds"], [[*key, cell(values)] for key, values in groups.items()])


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print a table in Markdown."""
    for row in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(row)} |")
    print()


def cell(values: list[float], others: list[float] | None = None) -> str:
    """The IQM over seeds, or its ratio to that of `others`, with its 95% interval."""
    middle = iqm(values) if others is None else iqm(values) / iqm(others)
    low, high = map(short, interval(values, others))
    return f"{short(middle)} [{low}, {high}]" if len(values) > 1 else f"{short(middle)} (one seed)"


def short(x: float | str) -> str:
    """A number with up to three digits, e.g. 0.962, 17, 99k or 1.05M; a text as it is."""
    if isinstance(x, str):
        return x
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if 0.9995 * size <= x < math.inf:  # the trust region's size is infinite where there is none
            return f"{x / size:.3g}{letter}"
    return f"{x:.3g}"


def main() -> None:
    torch.set_num_threads(1)
    commands = {f.__name__: f for f in (policy, export, suite, front, ablation, lengths, reuse, average, collect, summary)}
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))


if __name__ == "__main__":
    models.command(main)
