"""Score trained policies, measure the gradients that they are trained with, and compare the algorithms over seeds.

    python evaluate.py policy RUN_DIR_OR_CHECKPOINT
    python evaluate.py export RUN_DIR --out FILE.pt  # a small checkpoint: weights and normaliser
    python evaluate.py gradients RUN_DIR_OR_CHECKPOINT ...
    python evaluate.py suite | ablation | reuse | leak  # many runs, into runs/ and results/; the same command goes on
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
from typing import Literal

import numpy as np
import torch
import tyro
from tyro.conf import Positional

import apg
import envs
import models
from models import Actor, Critic, Normalizer

# Where many variants are compared, runs are shorter: they are told apart by then.
SHORTER = {
    "pusht": {"total_env_steps": 750_000, "num_evals": 20},
    "franka": {"total_env_steps": 400_000, "num_evals": 20},
}
RESULTS = pathlib.Path("results")
TEXTS = ["env", "algorithm", "bootstrap", "policy", "file", "simulator", "changed", "measure"]  # columns without numbers
FACTS = ["env", "algorithm", "seed", "segment", "bootstrap", "learning_rate", "total_env_steps"]
FACTS += ["update_epochs", "num_minibatches", "clip_coef"]
# The settings that tell an ablation's runs apart, beside the task.
ABLATIONS = {
    "ablation": ("bootstrap", "segment"),
    "reuse": ("update_epochs", "num_minibatches", "clip_coef"),
    "leak": ("segment", "algorithm"),
}
COSTS = ["env_steps", "gradient_steps", "wall_seconds"]

# --- one policy ---------------------------------------------------------------------------------------------------------


def load(path: str, num_envs: int, seed: int = envs.EVALUATION_SEED) -> tuple[dict, envs.Env, Actor, Critic, Normalizer]:
    """A checkpoint with its environments, actor, critic and normaliser."""
    checkpoint = models.load_checkpoint(path)
    env, hidden = envs.make(checkpoint["args"]["env"], num_envs, seed=seed), checkpoint["args"]["hidden"]
    actor, critic = Actor(env.observation_size, env.action_size, hidden), Critic(env.observation_size, hidden)
    networks = {"actor": actor, "critic": critic, "normalizer": Normalizer(env.observation_size)}
    for name, network in networks.items():
        network.load_state_dict(checkpoint[name])
    return checkpoint, env, *networks.values()


def policy(path: Positional[str], num_envs: int = 256, seed: int = envs.EVALUATION_SEED) -> None:
    """Print the return, success and errors of a checkpoint's deterministic policy over one episode an environment.

    Args:
        path: a run folder or a checkpoint file
        num_envs: episodes to average over
        seed: of the episodes' starts; the default is the one that training curves are scored on
    """
    checkpoint, env, actor, _, normalizer = load(path, num_envs, seed)
    result = envs.score(env, lambda observation: actor(normalizer(observation)), seed, measures=True)
    env_steps = checkpoint["run"]["counters"]["env_steps"]
    print(f"{env.name} ({checkpoint['algorithm']}, {env_steps:,} environment steps), {num_envs} episodes")
    for name, value in result.items():
        limit = env.task.tolerances.get(name)
        print(envs.in_words(name, value) + (f" (success: below {limit:g})" if limit is not None else ""))


def export(run_dir: Positional[str], out: pathlib.Path) -> None:
    """Write a small checkpoint of what a run's policy needs, and its score over 256 episodes into scores.csv beside it.

    Args:
        run_dir: the run's folder
        out: file to write, {task}_{algorithm}.pt
    """
    checkpoint, env, actor, _, normalizer = load(run_dir, 256)
    result = envs.score(env, lambda observation: actor(normalizer(observation)))
    args, counters = checkpoint["args"], checkpoint["run"]["counters"]
    small = {name: checkpoint[name] for name in ("algorithm", "actor", "critic", "normalizer")}
    small |= {"args": args | {"run_dir": None, "resume": None}, "run": {"counters": counters}}  # no places on this machine
    out.parent.mkdir(parents=True, exist_ok=True)
    models.save_checkpoint(out, small)
    row = {"file": out.name, "env": env.name, "algorithm": small["algorithm"], "seed": args["seed"]}
    row |= {"env_steps": counters["env_steps"], "success": result["success"], "return": result["return"]}
    record(out.with_name("scores.csv"), row, ("file",))
    print(f"wrote {out}: success {result['success']:.3f}, return {result['return']:.2f}")


# --- gradients ----------------------------------------------------------------------------------------------------------


def gradients(paths: Positional[list[str]], num_envs: int = 64, clip: float = 10.0) -> None:
    """Write gradients.csv: size of the actions' gradients (eq. 4) against segment length, for each bootstrap.

    For each checkpoint's policy and a fresh one on the same task; with a critic only where the checkpoint's was trained.

    Args:
        paths: run folders or checkpoint files
        num_envs: environments to take gradients in
        clip: costate clip; each gradient is taken with and without
    """
    rows = []
    for path, name in itertools.product(paths, ("fresh", "trained")):
        torch.manual_seed(0)
        checkpoint, env, *networks, normalizer = load(path, num_envs)
        if name == "fresh":
            hidden = checkpoint["args"]["hidden"]
            networks = Actor(env.observation_size, env.action_size, hidden), Critic(env.observation_size, hidden)
        args = checkpoint["args"]
        bootstraps = ("none", "mc", "critic") if args["bootstrap"] == "critic" else ("none", "mc")
        for segment in (1, 2, 4, 8, 16, 32, 64, env.episode_length):
            for bootstrap, costate_clip in itertools.product(bootstraps, (0.0, clip)):
                g = gradient_sizes(env, *networks, normalizer, args["gamma"], segment, bootstrap, costate_clip)
                row = {"env": env.name, "policy": name, "bootstrap": bootstrap, "costate_clip": costate_clip}
                quantiles = g.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
                rows.append(row | {"segment": segment} | dict(zip(("low", "median", "high"), quantiles)))
            print(f"{env.name:10} {name:8} K={segment}", flush=True)
    write_csv(RESULTS / "gradients.csv", rows)


def gradient_sizes(
    env: envs.Env, actor: Actor, critic: Critic, normalizer: Normalizer,
    gamma: float, segment: int, bootstrap: str, costate_clip: float,
) -> torch.Tensor:  # fmt: skip
    """Root mean square, over the control steps of each environment, of the norm of g (eq. 4): [N]."""
    torch.manual_seed(1)
    env.reset(1)
    steps, segments = env.episode_length, []
    if bootstrap != "mc":  # from all phases of an episode
        env.elapsed = torch.randint(env.episode_length, (env.num_envs,), generator=env.generator)
        with torch.no_grad():
            apg.rollout(env, actor, normalizer, steps, gamma)
        steps = segment
    value = (lambda observation: critic(normalizer(observation))) if bootstrap == "critic" else None
    for cut in range(0, steps, segment):
        env.detach()
        start = env.state.requires_grad_(bootstrap == "mc")
        settings = min(segment, steps - cut), gamma, cut, costate_clip, value
        noise, objective, _ = apg.rollout(env, actor, normalizer, *settings)
        segments.append((start, noise, objective, env.state))
    return apg.action_gradients(segments).square().sum(-1).mean(0).sqrt()


# --- many runs ----------------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """Many runs, each into a folder of its own with a log beside it. The same command again goes on where it stopped."""

    tasks: tuple[Literal["pointmass", "navigation", "pusht", "franka"], ...] = tuple(apg.TUNED)
    """to train"""
    seeds: int = 10
    """how many: 1 to this"""
    jobs: int = 2
    """runs at a time; with more than one, each has one thread"""


def suite(comparison: Comparison = Comparison()) -> None:
    """Train both algorithms on every task, into runs/suite; write suite.csv, a row an evaluation."""
    variants = [(env, label, {}) for env in comparison.tasks for label in ("apg", "ppo")]
    train("suite", variants, comparison)


def ablation(comparison: Comparison = Comparison(("navigation", "pusht", "franka"), seeds=4)) -> None:
    """Train APG with segments of many lengths and all bootstraps, into runs/ablation; write ablation.csv likewise.

    Minibatches are of one size, so that all lengths make as many gradient steps of as many environment steps.
    """
    variants = []
    for env in comparison.tasks:
        tuned, length = apg.Args(env=env, **apg.TUNED[env]), envs.EPISODE_LENGTH[env]
        cases = itertools.product((8, 16, 32, 64, length), ("none", "critic"))
        for segment, bootstrap in [*cases, (length, "mc")]:  # the gradient of `mc` is the same at any K
            flags = {"segment": segment, "bootstrap": bootstrap} | SHORTER.get(env, {})
            flags["num_minibatches"] = tuned.num_minibatches * segment // tuned.segment
            if bootstrap == "mc":
                flags["gamma"] = 0.99  # from the episode's start: it must leave something of the end
            variants.append((env, "apg", flags))
    train("ablation", variants, comparison)


def reuse(comparison: Comparison = Comparison(("pusht", "franka"), seeds=4)) -> None:
    """Train APG with each gradient used ever more often, with and without the trust region; write reuse.csv likewise."""
    variants = []
    for env, use, clip in itertools.product(comparison.tasks, ((1, 1), (1, 4), (2, 4), (4, 4), (8, 4)), (True, False)):
        flags = {"update_epochs": use[0], "num_minibatches": use[1]} | ({} if clip else {"clip_coef": math.inf})
        variants.append((env, "apg", flags | SHORTER.get(env, {})))
    train("reuse", variants, comparison)


def leak(comparison: Comparison = Comparison(("navigation", "franka"), seeds=4)) -> None:
    """Train APG with the critic's weights in the policy's loss (`leaking`) and without; write leak.csv likewise."""
    variants = []
    for env, segment, label in itertools.product(comparison.tasks, (8, 32), ("apg", "apg-leak")):
        variants.append((env, label, {"segment": segment, "bootstrap": "critic"} | SHORTER.get(env, {})))
    train("leak", variants, comparison)


def leaking() -> None:
    """apg.py with one thing changed: V of eq. (3) is maximised in the critic's weights, too, as part of the objective.

    That is what a policy loss -J does whose V shares the optimizer. It raises V, whatever happens.
    """
    rollout, surrogate, tails = apg.rollout, apg.surrogate, []

    def noting_rollout(env, actor, normalizer, steps, gamma, before, costate_clip, value):
        def noted(observation):
            v = value(observation)
            v.register_hook(lambda discount: tails.append((value, observation.detach(), discount / steps / env.num_envs)))
            return v

        return rollout(env, actor, normalizer, steps, gamma, before, costate_clip, noted)

    def leaking_surrogate(*arguments):
        value, observation, discount = tails[-1]  # of this segment; here V's weights ask for their gradient
        return surrogate(*arguments) + (discount * value(observation)).sum()

    apg.rollout, apg.surrogate = noting_rollout, leaking_surrogate
    apg.main()


def train(command: str, variants: list[tuple[str, str, dict]], comparison: Comparison) -> None:
    """Train every variant with every seed, unless its folder has it; then write {command}.csv.

    variants: (env, label, flags) each; label apg, ppo or apg-leak; flags {name: value} beside env and seed. Exits
    with 1 if a run failed, and with 130 after Ctrl-C or SIGTERM, when each run has saved itself.
    """
    runs = {}
    for seed in range(1, comparison.seeds + 1):  # outermost, so that what is there early covers every variant
        for env, label, flags in variants:
            name = "__".join([env, label, *(f"{key}-{value}" for key, value in flags.items()), str(seed)])
            runs[pathlib.Path("runs", command, name)] = label, {"env": env, "seed": seed, **flags}
    waiting, running, failed = [folder for folder in runs if not finished(folder)], {}, False
    print(f"{command}: {len(runs)} runs into runs/{command}, of which {len(runs) - len(waiting)} are finished", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)  # KeyboardInterrupt, in the background too
    try:
        while running or waiting:
            while waiting and len(running) < max(comparison.jobs, 1):
                folder = waiting.pop(0)
                running[folder] = start(folder, *runs[folder], comparison.jobs)
            for folder in [folder for folder, process in running.items() if process.poll() is not None]:
                del running[folder]
                rows = finished(folder)
                failed = failed or not rows
                words = f"success {rows[-1]['eval_success']:.3f}" if rows else f"FAILED, see {folder}.log"
                print(f"{len(runs) - len(waiting) - len(running)} of {len(runs)}: {folder.name}: {words}", flush=True)
            time.sleep(0.05)
    except KeyboardInterrupt:
        for process in running.values():
            process.send_signal(signal.SIGINT)
        for process in running.values():
            process.wait()
        print("stopped; the same command goes on")
        sys.exit(130)
    rows = [row | {"algorithm": label} for folder, (label, _) in runs.items() for row in finished(folder)]
    if rows:
        write_csv(RESULTS / f"{command}.csv", rows)
    sys.exit(failed)


def start(folder: pathlib.Path, label: str, flags: dict, jobs: int) -> subprocess.Popen:
    """Begin a run, or go on with it where it has a checkpoint, as a process that writes to {folder}.log."""
    program = ["evaluate.py", "leaking"] if label == "apg-leak" else [f"{label}.py"]
    command = [sys.executable, str(pathlib.Path(__file__).with_name(program[0])), *program[1:]]
    if (folder / "checkpoint.pt").exists():
        command += ["--resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)  # a run that was killed before its first checkpoint
        flags = flags | {"run_dir": folder} | ({"threads": 1} if jobs > 1 else {})
        command += [f"--{name}={value}" for name, value in flags.items()]
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
    return [{name: config[name] for name in FACTS} | row for row in rows] if done else []


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
    lines = [",".join(row) + "\n" for row in (rows[0], *texts)]
    path.parent.mkdir(parents=True, exist_ok=True)
    models.write_whole(path, "".join(lines).encode())
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
    """What a run spent, of the column `cost`, to the first success of `level`, linear between evaluations; inf if never."""
    there = np.flatnonzero(run["eval_success"] >= level)
    if len(there) == 0:
        return float("inf")
    around = slice(max(there[0] - 1, 0), there[0] + 1)
    return float(np.interp(level, run["eval_success"][around], run[cost][around]))


def spent(run: dict, level: float, cost: str) -> float:
    """What a run spent until its success first was `level`; all that it spent if it never was."""
    return min(cost_to(run, level, cost), run[cost][-1])


def summary(threshold: float = 0.9) -> None:
    """Print tables in Markdown: of suite.csv PPO beside APG, then what each costs; of each ablation's file what it says.

    Each figure is an IQM over seeds with its 95% interval. A run's cost is what it spent to its first success of
    `threshold`, or in all if it never got there: ">" marks what is then at least the value, "<" a ratio that is at most it,
    because such runs are APG's, and "><" a ratio with such runs on both sides.
    """
    groups = runs_by(read_csv(RESULTS / "suite.csv"), "env", "algorithm")
    final = lambda runs: cell([run["eval_success"][-1] for run in runs])
    missed = lambda runs, sign: sign if any(run["eval_success"].max() < threshold for run in runs) else ""
    costs = lambda runs, cost: [spent(run, threshold, cost) for run in runs]
    paid = lambda runs: [missed(runs, ">") + cell(costs(runs, cost)) for cost in COSTS]
    titles = [f"{name} to {threshold}" for name in ("environment steps", "gradient steps", "seconds")]

    rows = []
    for env in dict.fromkeys(env for env, _ in groups):
        ours, theirs = (groups.get((env, label), []) for label in ("apg", "ppo"))
        if ours and theirs:
            sign = missed(theirs, ">") + missed(ours, "<")
            ratios = [sign + cell(costs(theirs, cost), costs(ours, cost)) for cost in COSTS]
            rows.append([f"`{env}`", final(ours), final(theirs), *ratios])
    print_table(["task", "final success, APG", "PPO", *(f"{title}, PPO / APG" for title in titles)], rows)
    rows = [[*key, final(runs), *paid(runs)] for key, runs in groups.items()]
    print_table(["task", "by", "final success", *titles], rows)
    for name, columns in ABLATIONS.items():
        if (RESULTS / f"{name}.csv").exists():
            groups = runs_by(read_csv(RESULTS / f"{name}.csv"), "env", *columns)
            rows = [[*map(short, key), final(runs), *paid(runs)] for key, runs in groups.items()]
            print_table(["task", *columns, "final success", *titles], rows)


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
    if sys.argv[1:2] == ["leaking"]:  # with the flags of apg.py
        sys.argv.pop(1)
        return leaking()
    functions = policy, export, gradients, suite, ablation, reuse, leak, summary
    commands = {command.__name__: command for command in functions}
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))


if __name__ == "__main__":
    models.command(main)
