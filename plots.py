"""Pictures: of the CSV files that evaluate.py writes, of a policy at work, of a run while it trains.

    python plots.py figures                          # results/figures from results/*.csv
    python plots.py rollout RUN_DIR_OR_CHECKPOINT    # a film strip (PNG) and an animation (GIF)
    python plots.py watch RUN_DIR                    # RUN_DIR/watch.png, drawn anew at each evaluation

What is over seeds is drawn as their interquartile mean (IQM), with its 95% bootstrap interval as a band or a cross.
"""

import contextlib
import csv
import functools
import io
import json
import os
import pathlib
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from typing import NoReturn

import matplotlib
import numpy as np
import tyro
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axis import Axis
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

# Okabe and Ito's colours, told apart by colour-blind readers; each also has a marker, and an algorithm a line style too.
ALGORITHMS = {
    "apg": {"label": "APG", "color": "#D55E00", "ls": "-", "marker": "o"},
    "ppo": {"label": "PPO", "color": "#0072B2", "ls": "--", "marker": "s"},
    "ppo-best": {"label": "PPO, for fewer steps", "color": "#56B4E9", "ls": ":", "marker": "^"},
}
BOOTSTRAPS = {
    "none": {"label": "none", "color": "#0072B2", "marker": "o"},
    "critic": {"label": "critic", "color": "#D55E00", "marker": "s"},
    "mc": {"label": "mc", "color": "#009E73", "marker": "^"},
}
LEVELS = (0.25, 0.5, 0.75, 0.9, 0.95)  # of success, to reach
COSTS = {"env_steps": "environment steps", "gradient_steps": "gradient steps", "wall_seconds": "training time (s)"}
GREY = "0.4"
plt.rcParams.update(
    {
        "font.size": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "figure.dpi": 150,
        "savefig.bbox": "tight",
        "pdf.fonttype": 42,
    }
)


# --- data and statistics ----------------------------------------------------------------------------------------------


def read(path: pathlib.Path) -> list[dict]:
    """Rows of a CSV file as dicts, numbers as floats; one at least."""
    rows = rows_of(path)
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def rows_of(path: pathlib.Path) -> list[dict]:
    try:
        with open(path, newline="") as file:
            return [{name: number(text) for name, text in row.items()} for row in csv.DictReader(file)]
    except (csv.Error, UnicodeDecodeError, AttributeError):  # the last: a row longer or shorter than the first
        raise ValueError(f"{path} is not a whole CSV file") from None


def number(text: str) -> float | str:
    try:
        return float(text.strip())
    except ValueError:
        return text


def runs_by(rows: list[dict], *names: str) -> dict:
    """{values of the columns `names`: runs}; a run is one seed's success and costs as arrays, [evaluations] each."""
    seeds = {}
    for row in rows:
        seeds.setdefault(tuple(row[name] for name in names), {}).setdefault(row["seed"], []).append(row)
    columns = ("eval_success", *COSTS)
    groups = {}
    for key, runs in seeds.items():
        groups[key] = [{column: np.array([row[column] for row in run], float) for column in columns} for run in runs.values()]
        if any(len(run["env_steps"]) < 2 or np.diff(run["env_steps"]).min() <= 0 for run in groups[key]):
            raise ValueError(f"{names} = {key}: a run of one row only, or two of the same seed")
    return groups


def iqm(values: np.ndarray) -> np.ndarray:
    """Interquartile mean over the first axis, the seeds: without the quarter at each end, rounded down."""
    cut = len(values) // 4
    return np.sort(values, axis=0)[cut : len(values) - cut].mean(axis=0)


def interval(values: np.ndarray, resamples: int = 2000) -> np.ndarray:
    """[2, ...]: the ends of a 95% interval of the IQM, percentiles over resamples of the seeds. values [S, ...]"""
    picks = np.random.default_rng(0).integers(len(values), size=(len(values), resamples))
    return np.percentile(iqm(np.asarray(values)[picks]), (2.5, 97.5), axis=0)


def reaches(runs: list[dict], level: float) -> bool:
    """Whether more than half of the runs ever reach a success of `level`."""
    return np.mean([run["eval_success"].max() >= level for run in runs]) > 0.5


def cost_to(run: dict, level: float, cost: str) -> float:
    """What a run spent until its success first was `level`, linear between evaluations; all of it if it never was."""
    success, spent = run["eval_success"], run[cost]
    if success.max() < level:
        return spent[-1]
    first = (success >= level).argmax()
    return np.interp(level, success[max(first - 1, 0) : first + 1], spent[max(first - 1, 0) : first + 1])


def final_success(run: dict) -> float:
    return run["eval_success"][-1]


def mean_success(run: dict) -> float:
    """Area under success against environment steps, divided by their number."""
    return np.trapezoid(run["eval_success"], run["env_steps"]) / run["env_steps"][-1]


# --- figures ----------------------------------------------------------------------------------------------------------


def save(figure: plt.Figure, path: pathlib.Path) -> None:
    path.parent.mkdir(exist_ok=True)
    for suffix, metadata in ((".png", {"Software": None}), (".pdf", {"CreationDate": None})):  # same data, same bytes
        figure.savefig(path.with_suffix(suffix), metadata=metadata)
    plt.close(figure)
    print(f"wrote {path.with_suffix('.png')} and .pdf")


def panels(rows: list[dict], lines: int, height: float, **shared: object) -> tuple[plt.Figure, np.ndarray, list[str]]:
    """A figure with a column of panels for each task, in the order of `rows`; 7 inches wide with four tasks."""
    tasks = list(dict.fromkeys(row["env"] for row in rows))
    size = (max(1.65 * len(tasks) + 0.2, 3.5), height)
    figure, axes = plt.subplots(lines, len(tasks), figsize=size, squeeze=False, layout="constrained", **shared)
    for axis, task in zip(axes[0], tasks):
        axis.set_title(task)
    for axis in axes.flat:
        axis.tick_params(labelsize=7)
    return figure, axes, tasks


def in_words(axis: Axis) -> None:
    """1k for 1,000 and 1M for 1,000,000 along an x or y axis; a log axis over few decades has 3, 30, ... too."""
    if axis.get_scale() == "log":
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 3) if high < 100 * low else (1,)))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(EngFormatter(sep=""))


def line_and_band(axis: plt.Axes, x: np.ndarray, middle: np.ndarray, ends: np.ndarray, **style: object) -> None:
    axis.fill_between(x, *ends, color=style["color"], alpha=0.15, lw=0)
    axis.plot(x, middle, **style)


def legend(figure: plt.Figure, groups: dict, looks: dict, others: list, columns: int, **style: object) -> None:
    """Below the panels: those of `looks` that `groups`, keyed (task, name, ...), has; and `others`."""
    there = {key[1] for key in groups}
    handles = [Line2D([], [], **{**look, **style}) for name, look in looks.items() if name in there]
    figure.legend(handles=handles + others, loc="outside lower center", ncol=columns, columnspacing=1.2, frameon=False)


def learning_curves(rows: list[dict], path: pathlib.Path) -> None:
    """Success against environment steps, gradient steps and seconds of training."""
    groups = runs_by(rows, "env", "algorithm")
    figure, axes, tasks = panels(rows, 3, 5.2, sharey=True)
    threshold = {"color": GREY, "lw": 0.8, "ls": (0, (1, 2)), "label": "success 0.9"}
    for line, (cost, words) in zip(axes, COSTS.items()):
        ends = {key: max(run[cost][-1] for run in runs) for key, runs in groups.items()}
        spans = [[end for (there, _), end in ends.items() if there == task] for task in tasks]
        log = any(max(span) > 10 * min(span) for span in spans)
        for axis, task in zip(line, tasks):
            axis.axhline(0.9, **threshold)
            for algorithm, style in ALGORITHMS.items():
                runs = groups.get((task, algorithm), [])
                if runs:  # on a log axis, which has no zero, from the first positive cost
                    start = min(run[cost][run[cost] > 0].min() for run in runs) if log else 0
                    end = ends[task, algorithm]
                    x = np.geomspace(start, end, 200) if log else np.linspace(start, end, 200)
                    success = np.array([np.interp(x, run[cost], run["eval_success"]) for run in runs])  # [S, 200]
                    line_and_band(axis, x, iqm(success), interval(success), lw=1.3, **{**style, "marker": ""})
            axis.set(xscale="log" if log else "linear", ylim=(-0.03, 1.03), xlabel=words)
            in_words(axis.xaxis)
        line[0].set_ylabel("success rate")
    legend(figure, groups, ALGORITHMS, [Line2D([], [], **threshold)], 4, lw=1.3, marker="")
    save(figure, path)


def cost_to_levels(rows: list[dict], path: pathlib.Path) -> None:
    """Environment steps and gradient steps until levels of success were first reached. Runs that never reach a level
    count with all that they spent; a level that at most half of the runs reach is left out."""
    groups = runs_by(rows, "env", "algorithm")
    figure, axes, tasks = panels(rows, 1, 2.6, sharey=True)
    sizes = dict(zip(LEVELS, (2.5, 3.5, 4.5, 5.5, 6.5)))
    for axis, task in zip(axes[0], tasks):
        for algorithm, style in ALGORITHMS.items():
            runs = groups.get((task, algorithm), [])
            levels = [level for level in LEVELS if runs and reaches(runs, level)]
            if levels:
                x, y = [np.array([[cost_to(run, level, cost) for level in levels] for run in runs]) for cost in list(COSTS)[:2]]
                axis.plot(iqm(x), iqm(y), lw=1, **{**style, "marker": ""})
                axis.hlines(iqm(y), *interval(x), color=style["color"], lw=0.6, alpha=0.6)
                axis.vlines(iqm(x), *interval(y), color=style["color"], lw=0.6, alpha=0.6)
                for level, *point in zip(levels, iqm(x), iqm(y)):
                    axis.plot(*point, color=style["color"], marker=style["marker"], ms=sizes[level], mew=0)
            elif runs:
                words = {"fontsize": 6, "color": style["color"], "ha": "right", "transform": axis.transAxes}
                axis.text(0.98, 0.02 + 0.07 * list(ALGORITHMS).index(algorithm), f"{style['label']}: < {LEVELS[0]}", **words)
        axis.set(xscale="log", yscale="log", xlabel=COSTS["env_steps"])
        in_words(axis.xaxis)
    in_words(axes[0, 0].yaxis)
    axes[0, 0].set_ylabel(COSTS["gradient_steps"])
    dots = [Line2D([], [], color=GREY, ls="", marker="o", mew=0, ms=sizes[level], label=f"{level}") for level in LEVELS]
    dots[0].set_label(f"success {LEVELS[0]}")
    legend(figure, groups, ALGORITHMS, dots, 8, lw=1, ms=4)
    save(figure, path)


def ablation(rows: list[dict], path: pathlib.Path) -> None:
    """Final success, and environment steps to a success of 0.5, against segment length for each bootstrap. Runs that
    never reach 0.5 count with all that they spent; the marker is open where these are half of the runs or more."""
    groups = runs_by(rows, "env", "bootstrap", "segment")
    figure, axes, tasks = panels(rows, 2, 3.6, sharex="col", sharey="row")
    for (upper, lower), task in zip(axes.T, tasks):
        for bootstrap, style in BOOTSTRAPS.items():
            lengths = sorted(k for *key, k in groups if key == [task, bootstrap])
            for axis, of_run in ((upper, final_success), (lower, lambda run: cost_to(run, 0.5, "env_steps"))):
                values = [[of_run(run) for run in groups[task, bootstrap, k]] for k in lengths]
                if values:
                    ends = np.transpose([interval(seeds) for seeds in values])
                    line_and_band(axis, lengths, [iqm(seeds) for seeds in values], ends, ms=3.5, lw=1.3, **style)
                if len(values) == 1:  # mc's, which is the same for any length
                    axis.axhline(iqm(values[0]), color=style["color"], lw=1)
                    axis.axhspan(*ends[:, 0], color=style["color"], alpha=0.15, lw=0)
            for k, steps in zip(lengths, values):
                if not reaches(groups[task, bootstrap, k], 0.5):
                    lower.plot(k, iqm(steps), ms=3.5, mfc="white", **style)
        lengths = sorted({k for there, _, k in groups if there == task})
        lower.set_xscale("log", base=2)
        lower.set_xticks(lengths, [f"{k:.0f}" for k in lengths[:-1]] + ["T"])
        lower.minorticks_off()
        lower.set_xlabel(f"segment length K\n(T = {lengths[-1]:.0f})")
        upper.set_ylim(-0.03, 1.03)
    axes[0, 0].set_ylabel("final success rate")
    axes[1, 0].set(yscale="log", ylabel="environment steps\nto success 0.5")
    in_words(axes[1, 0].yaxis)
    style = {"ls": "", "marker": "o", "ms": 3.5, "mfc": "white", "label": "0.5 reached by half of the runs at most"}
    legend(figure, groups, BOOTSTRAPS, [Line2D([], [], color=GREY, **style)], 4, lw=1.3, ms=3.5)
    save(figure, path)


def learning_rates(rows: list[dict], path: pathlib.Path, shared: dict) -> None:
    """Final and mean success against learning rate: IQM, and every seed as a dot. shared: {task: APG's rate in the suite}"""
    groups = runs_by(rows, "env", "algorithm", "learning_rate")
    figure, axes, tasks = panels(rows, 2, 3.6, sharex="col", sharey=True)
    choice = {"color": GREY, "lw": 0.8, "ls": (0, (1, 2)), "label": "shared choice"}
    for (upper, lower), task in zip(axes.T, tasks):
        for axis, of_run in ((upper, final_success), (lower, mean_success)):
            if task in shared:
                axis.axvline(shared[task], **choice)
            for algorithm, style in ALGORITHMS.items():
                rates = sorted(rate for *key, rate in groups if key == [task, algorithm])
                values = [[of_run(run) for run in groups[task, algorithm, rate]] for rate in rates]
                for rate, seeds in zip(rates, values):
                    axis.plot([rate] * len(seeds), seeds, ".", color=style["color"], ms=5, mew=0, alpha=0.5)
                axis.plot(rates, [iqm(seeds) for seeds in values], ms=3.5, lw=1.3, **style)
        rates = sorted({rate for there, _, rate in groups if there == task})
        lower.set(xscale="log", ylim=(-0.03, 1.03), xlabel="learning rate / $10^{-3}$")
        lower.set_xticks(rates, [f"{1000 * rate:g}" for rate in rates])
        lower.minorticks_off()
    axes[0, 0].set_ylabel("final success rate")
    axes[1, 0].set_ylabel("mean success rate\nover training")
    legend(figure, groups, ALGORITHMS, [Line2D([], [], **choice)] if shared else [], 3, lw=1.3, ms=3.5)
    save(figure, path)


def gradient_health(rows: list[dict], path: pathlib.Path) -> None:
    """Per-environment gradient norm against segment length: median, and 5 to 95% over environments, without clip; and
    the median with it."""
    tasks = list(dict.fromkeys(row["env"] for row in rows))
    figure, axes = plt.subplots(2, len(tasks), figsize=(2.1 * len(tasks) + 0.6, 4.0), sharex="col", squeeze=False)
    for line, policy in zip(axes, ("fresh", "trained")):
        for axis, task in zip(line, tasks):
            for bootstrap, style in BOOTSTRAPS.items():
                here = [r for r in rows if (r["env"], r["policy"], r["bootstrap"]) == (task, policy, bootstrap)]
                free, clipped = [r for r in here if r["costate_clip"] == 0], [r for r in here if r["costate_clip"] > 0]
                k = [r["segment"] for r in free]
                axis.fill_between(
                    k, [r["low"] for r in free], [r["high"] for r in free], color=style["color"], alpha=0.15, lw=0
                )
                axis.plot(k, [r["median"] for r in free], ms=3, lw=1.3, **style)
                axis.plot(k, [r["median"] for r in clipped], color=style["color"], lw=1, ls=":", label=f"{bootstrap}, clipped")
            axis.set(xscale="log", yscale="log")
            axis.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
            axis.minorticks_off()
            if policy == "fresh":
                axis.set_title(task)
            else:
                axis.set_xlabel("segment length K")
        line[0].set_ylabel(f"{policy} policy\ngradient norm per step")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: "clipped" in labels[i])
    figure.legend([handles[i] for i in order], [labels[i] for i in order], loc="lower center", ncol=6, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    save(figure, path)


def throughput(figures: dict, path: pathlib.Path) -> None:
    """Seconds of one update against N, and against K at N = 256; beside them, what is proportional to either.

    figures: what benchmarks/throughput.py writes. Networks of the widest size measured.
    """
    lines = figures["env_steps_per_second"]
    widest = max(line["hidden"] for line in lines)
    lines = [{**line, "env": line["task"]} for line in lines if line["hidden"] == widest]
    looks = {
        "physics_and_adjoint": {"label": "physics and adjoint", "color": "#009E73", "marker": "^"},
        "apg_none": {"label": "APG update, none", "color": "#E69F00", "marker": "D"},
        "apg_critic": {"label": "APG update, critic", "color": "#D55E00", "marker": "o"},
        "ppo": {"label": "PPO iteration", "color": "#0072B2", "marker": "s", "ls": "--"},
    }
    figure, axes, tasks = panels(lines, 2, 3.6, sharey="row")
    linear = {"color": GREY, "lw": 0.8, "ls": (0, (1, 2)), "label": "proportional"}
    usual = max((line["segment"] for line in lines), key=[line["segment"] for line in lines].count)
    for line_of_axes, x, fixed in ((axes[0], "num_envs", ("segment", usual)), (axes[1], "segment", ("num_envs", 256))):
        for axis, task in zip(line_of_axes, tasks):
            here = sorted((l for l in lines if l["task"] == task and l[fixed[0]] == fixed[1]), key=lambda l: l[x])
            sizes = np.array([line[x] for line in here])
            for name, look in looks.items():
                axis.plot(sizes, [l["num_envs"] * l["segment"] / l[name] for l in here], ms=3.5, lw=1.3, **look)
            first = here[0]["num_envs"] * here[0]["segment"] / here[0]["apg_critic"] if here else 1
            axis.plot(sizes, first * sizes / sizes[:1], **linear)
            axis.set(xscale="log", yscale="log", xlabel="environments N" if x == "num_envs" else "segment length K")
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.minorticks_off()
        line_of_axes[0].set_ylabel(f"seconds, {'K' if x == 'num_envs' else 'N'} = {fixed[1]}")
    handles = [Line2D([], [], ms=3.5, lw=1.3, **look) for look in looks.values()] + [Line2D([], [], **linear)]
    figure.legend(handles=handles, loc="outside lower center", ncol=5, columnspacing=1.2, frameon=False)
    save(figure, path)


def figures(results: str = "results") -> None:
    """Draw the figures whose CSV files are in `results` into `results`/figures.

    Args:
        results: folder with the CSV files that evaluate.py writes
    """
    results = pathlib.Path(results)
    makers = {"suite": "suite", "ablation": "ablation", "sweep": "sweep", "gradients": "gradients RUN_DIR ..."}
    data = {name: read(results / f"{name}.csv") for name in makers if (results / f"{name}.csv").is_file()}
    speeds = sorted(results.glob("throughput_*.json"))
    if not data and not speeds:
        raise FileNotFoundError(f"nothing to draw in {results}: make {', '.join(makers)}.csv with evaluate.py")
    folder = results / "figures"
    if "suite" in data:
        learning_curves(data["suite"], folder / "learning_curves")
        cost_to_levels(data["suite"], folder / "cost_to_levels")
    if "ablation" in data:
        ablation(data["ablation"], folder / "ablation")
    if "sweep" in data:
        shared = {row["env"]: row["learning_rate"] for row in data.get("suite", []) if row["algorithm"] == "apg"}
        learning_rates(data["sweep"], folder / "learning_rates", shared)
    if "gradients" in data:
        gradient_health(data["gradients"], folder / "gradient_health")
    for speed in speeds:
        throughput(json.loads(speed.read_text()), folder / speed.stem)
    for name, maker in makers.items():
        if name not in data:
            print(f"left out: what is drawn from {results / name}.csv; python evaluate.py {maker} makes it")


# --- a policy at work -------------------------------------------------------------------------------------------------

# One colour means one thing in all four tasks; what is past is drawn in the same colour, paler.
HAND, GOAL, BODY, OBSTACLE = "#D55E00", "#009E73", "#0072B2", "0.82"  # what acts, where to, what is moved, what to avoid
AXES = ("#CC79A7", GOAL, BODY)  # x, y, z of a frame in space
EPISODES = 4  # side by side


def draw_pointmass(axis: plt.Axes, states: np.ndarray, t: int, dt: float) -> None:
    """Position against time; the mass on its line, which moves with the time."""
    time_, x, target = np.arange(len(states)) * dt, states[:, 0], states[-1, 2]
    axis.axhline(target, color=GOAL, lw=2.5, alpha=0.5)
    axis.axvline(t * dt, color=OBSTACLE, lw=1)
    axis.plot(time_[: t + 1], x[: t + 1], color=HAND, lw=1.2)
    past = slice(0, t, 10)
    axis.plot(time_[past], x[past], "o", color=HAND, ms=5, mew=0, alpha=0.3)
    axis.plot(t * dt, x[t], "o", color=HAND, ms=7, mew=0)
    axis.set(xlim=(-0.04 * time_[-1], 1.04 * time_[-1]), ylim=(-1.6, 1.2), xticks=range(int(time_[-1]) + 1), yticks=(-1, 0, 1))
    axis.set(xlabel="time (s)", ylabel="position (m)")
    axis.label_outer(remove_inner_ticks=True)


def draw_navigation(axis: plt.Axes, states: np.ndarray, t: int, dt: float) -> None:
    """Path of the disc among the obstacles to the goal."""
    from envs import AGENT_RADIUS

    disc = lambda place, radius, **look: axis.add_patch(plt.Circle(place, radius, **{"lw": 0, **look}))
    for x, y, radius in states[0, 7:].reshape(-1, 3):
        disc((x, y), radius, color=OBSTACLE)
    disc(states[0, 4:6], 1.6 * AGENT_RADIUS, fc="none", ec=GOAL, lw=1.5)
    disc(states[0, 4:6], AGENT_RADIUS / 3, color=GOAL)
    axis.plot(*states[: t + 1, :2].T, color=HAND, lw=1)
    for past in range(0, t, 8):
        disc(states[past, :2], AGENT_RADIUS, color=HAND, alpha=0.25)
    disc(states[t, :2], AGENT_RADIUS, color=HAND, zorder=3)
    axis.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2))


def draw_pusht(axis: plt.Axes, states: np.ndarray, t: int, dt: float) -> None:
    """Block, goal and pusher, with where they have just been; y points down, as in the benchmark's own pictures."""
    from envs import BOXES, GOAL_ANGLE, PUSHER_RADIUS
    from envs import GOAL as PLACE

    (left, top), (right, edge) = [np.add(BOXES[0][0], np.multiply(sign, BOXES[0][1])) for sign in (-1, 1)]
    (inner, _), (outer, end) = [np.add(BOXES[1][0], np.multiply(sign, BOXES[1][1])) for sign in (-1, 1)]
    x, y = (left, right, right, outer, outer, inner, inner, left), (top, top, edge, edge, end, end, edge, edge)

    def block(place, angle, **look):
        c, s = np.cos(angle), np.sin(angle)
        corners = np.stack([place[0] + np.multiply(c, x) - np.multiply(s, y), place[1] + np.multiply(s, x) + np.multiply(c, y)])
        axis.add_patch(plt.Polygon(corners.T, **{"lw": 0, **look}))

    block(PLACE, GOAL_ANGLE, fc=GOAL, alpha=0.3)
    for age in (24, 18, 12, 6):
        if age <= t:
            block(states[t - age, 4:6], states[t - age, 6], color=BODY, alpha=0.22 - 0.007 * age)
            axis.add_patch(plt.Circle(states[t - age, :2], PUSHER_RADIUS, color=HAND, lw=0, alpha=0.35 - 0.01 * age))
    block(states[t, 4:6], states[t, 6], fc=BODY, alpha=0.85)
    axis.plot(*states[max(t - 24, 0) : t + 1, :2].T, color=HAND, lw=0.8, alpha=0.6)
    axis.add_patch(plt.Circle(states[t, :2], PUSHER_RADIUS, color=HAND, lw=0, zorder=3))
    block(PLACE, GOAL_ANGLE, fc="none", ec=GOAL, lw=0.8, zorder=4)
    axis.set(xlim=(0, 1), ylim=(1, 0))


def fr3_frames(q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Origins [M, 8, 3] and rotations [M, 8, 3, 3] of the frames of joints 1 to 7 and the flange, at angles q [M, 7]."""
    from envs import FLANGE, FR3, _roll_matrix

    place, turn, places, turns = np.zeros((len(q), 3)), np.eye(3), [], []
    for joint, angle in zip(FR3, q.T):
        c, s, zero = np.cos(angle), np.sin(angle), np.zeros(len(q))
        spin = np.stack([c, -s, zero, s, c, zero, zero, zero, zero + 1], 1).reshape(-1, 3, 3)
        place = place + turn @ np.array(joint.offset)
        turn = turn @ np.reshape(_roll_matrix(joint.roll), (3, 3)) @ spin
        places, turns = [*places, place], [*turns, turn]
    return np.stack([*places, place + FLANGE * turn[..., 2]], 1), np.stack([*turns, turn], 1)


def draw_franka(axis: plt.Axes, states: np.ndarray, t: int, dt: float) -> None:
    """The arm with its shadow on the table; the flange's path and frame, and the target's frame, pale."""
    from envs import FR3

    azimuth, height = np.radians(-55), np.radians(18)  # from where it is seen, without perspective
    right = np.array([-np.sin(azimuth), np.cos(azimuth), 0])
    up = np.array([-np.cos(azimuth) * np.sin(height), -np.sin(azimuth) * np.sin(height), np.cos(height)])
    flat = lambda points: np.stack([points @ right, points @ up], -1)
    towards = np.cross(right, up)  # the viewer
    places, turns = fr3_frames(states[: t + 1, :7])
    flange, places, turns = places[:, -1], places[-1], turns[-1]

    def capsule(start, end, radius, **look):
        (start, end), around = flat(np.stack([start, end])), np.linspace(-np.pi / 2, np.pi / 2, 13)
        around = around + np.arctan2(*(end - start)[::-1])
        half = radius * np.stack([np.cos(around), np.sin(around)], 1)
        axis.add_patch(plt.Polygon(np.concatenate([end + half, start - half]), **look))

    # Links run along the axes of their joints: before the wrist there is a corner that is no frame's origin.
    corner = places[3] + turns[3, :, 0] * FR3[4].offset[0]
    bones = np.stack([np.zeros(3), *places[:4], corner, *places[4:]])
    parts = [(bones[k], bones[k + 1], 0.042, "0.72") for k in range(len(bones) - 1)]
    # A joint is drawn as a short cylinder, which may be anywhere on its axis: where joints meet, a bit further down.
    for place, z, shift in zip(places, turns[:, :, 2], (-0.16, 0, -0.15, 0, -0.2, 0, 0.03)):
        parts.append((place + (shift - 0.015) * z, place + (shift + 0.015) * z, 0.058, "0.35"))
    ring = np.linspace(0, 2 * np.pi, 73)
    axis.add_patch(plt.Polygon(flat(0.8 * np.stack([np.cos(ring), np.sin(ring), 0 * ring], 1)), color="0.93", lw=0))
    for start, end, radius, _ in parts:
        capsule(start * [1, 1, 0], end * [1, 1, 0], radius, color=OBSTACLE, lw=0)
    for start, end, radius, color in sorted(parts, key=lambda part: (part[0] + part[1]) @ towards + part[2]):
        capsule(start, end, radius, fc=color, ec="white", lw=0.5, zorder=2)
    axis.plot(*flat(flange).T, color=HAND, lw=1, zorder=3)
    target = states[0, 21:24], states[0, 24:33].reshape(3, 3)
    for (place, turn), look in ((target, {"lw": 4, "alpha": 0.4}), ((places[-1], turns[-1]), {"lw": 1.3})):
        for k, color in enumerate(AXES):
            axis.plot(
                *flat(np.stack([place, place + 0.14 * turn[:, k]])).T, color=color, solid_capstyle="round", zorder=4, **look
            )
    axis.set(xlim=(-0.82, 0.82), ylim=(-0.4, 1.24))


SCENES = {  # how to draw a task, control steps from frame to frame of the animation, and milliseconds
    "pointmass": (draw_pointmass, 1, 50),
    "navigation": (draw_navigation, 1, 50),
    "pusht": (draw_pusht, 1, 50),  # twice as fast as it is
    "franka": (draw_franka, 2, 40),
}


def picture(axis: plt.Axes, draw: Callable, states: np.ndarray, step: int, dt: float, words: str = "") -> None:
    """Draw one moment of an episode afresh, with a few words in the corner."""
    axis.clear()
    axis.set(facecolor="0.97", xticks=(), yticks=())
    axis.spines[:].set_visible(False)
    if draw is not draw_pointmass:
        axis.set_aspect("equal")
    draw(axis, states, step, dt)
    axis.text(0.03, 0.03, words, transform=axis.transAxes, fontsize=7, color=GREY)


def animate(path: pathlib.Path, figure: plt.Figure, draw: Callable, steps: Iterable[int], milliseconds: int) -> None:
    """Write a GIF. All frames share a palette of their commonest colours: no flicker, and what is still costs nothing."""
    frames = []
    for step in steps:
        draw(step)
        figure.canvas.draw()
        figure.set_layout_engine("none")  # the first frame's stays
        pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
        frames.append(Image.fromarray(pixels // 4 * 4))  # as coarse as Pillow's search of a palette
    some = np.concatenate([np.asarray(frame).reshape(-1, 3) for frame in frames[:: len(frames) // 4 + 1]])
    colors, counts = np.unique(some, axis=0, return_counts=True)
    colors, palette = colors[np.argsort(-counts, stable=True)[:128]], Image.new("P", (1, 1))
    palette.putpalette(colors.tobytes())
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    for frame in frames:
        frame.putpalette((colors * (255 / 252)).astype(np.uint8).tobytes())  # 252 is white again
    durations = [milliseconds] * (len(frames) - 1) + [2000]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    plt.close(figure)
    print(f"wrote {path}")


def settled_at(within: np.ndarray) -> np.ndarray:
    """[N]: after which control step an episode is within its tolerances for good; T + 1 if never. within [N, T]"""
    return np.where(within, 0, np.arange(1, within.shape[1] + 1)).max(1) + 1


def rollout(path: tyro.conf.Positional[str], out: str | None = None, seed: int = 1) -> None:
    """Draw a trained policy at work: rollout_{task}.png, a film strip, and rollout_{task}.gif, an animation.

    Args:
        path: a run folder or a checkpoint file
        out: folder to write to; default the checkpoint's own
        seed: of the episodes' starts
    """
    import torch

    import evaluate  # here, because the rest of this file needs no simulator
    from envs import SETTLE_STEPS

    torch.set_num_threads(1)
    folder = pathlib.Path(out or (path if pathlib.Path(path).is_dir() else pathlib.Path(path).parent))
    evaluate.check({}, {}, [folder])
    _, env, actor, _, normalizer = evaluate.load(path, EPISODES, seed=seed)
    if env.name not in SCENES:
        raise ValueError(f"no picture of {env.name}: give plots.py a function that draws it, in SCENES")
    draw, stride, milliseconds = SCENES[env.name]
    state, observation, states, within = env.state, env.observe(env.state), [env.state], []
    with torch.no_grad():
        for _ in range(env.episode_length):
            state, observation, _ = env.dynamics(state, actor(normalizer(observation)))
            errors = env.task.errors(observation, state)
            within.append(torch.stack([errors[name] < limit for name, limit in env.task.tolerances.items()]).all(0))
            states.append(state)
    states, within = torch.stack(states, 1).numpy(), torch.stack(within, 1).numpy()  # [N, T + 1, S], [N, T]
    settled, reached = settled_at(within), np.minimum(settled_at(within), env.episode_length)
    words = []
    for i, step in enumerate(settled):
        missed = [name for name, limit in env.task.tolerances.items() if not errors[name][i] < limit] + ["not settled"]
        success = step <= env.episode_length - SETTLE_STEPS + 1  # envs' rule: within at each of the last steps
        words.append(f"reached in {step * env.control_dt:.1f} s" if success else f"failed: {missed[0].replace('_', ' ')}")
    end = min(reached.max() + SETTLE_STEPS, env.episode_length)
    states = states[:, : end + 1]
    folder.mkdir(parents=True, exist_ok=True)

    figure, axes = plt.subplots(2, 2, figsize=(4, 4), dpi=100, layout="constrained", sharex=True, sharey=True)

    def frame(step):
        for axis, run, step_reached, text in zip(axes.flat, states, reached, words):
            picture(axis, draw, run, step, env.control_dt, text if step >= min(step_reached, end) else "")

    animate(folder / f"rollout_{env.name}.gif", figure, frame, range(0, end + 1, stride), milliseconds)

    if draw in (draw_pointmass, draw_navigation):  # paths: an episode in one picture
        figure, axes = plt.subplots(1, EPISODES, figsize=(7, 1.85), layout="constrained", sharex=True, sharey=True)
        for axis, run, text in zip(axes, states, words):
            picture(axis, draw, run, end, env.control_dt, text)
    else:  # moments, the last one when the goal is reached
        figure, axes = plt.subplots(2, 5, figsize=(7, 2.85), layout="constrained")
        for line, episode in zip(axes, (0, EPISODES - 1)):
            for axis, step in zip(line, np.linspace(0, reached[episode], 5).round().astype(int)):
                picture(axis, draw, states[episode], step, env.control_dt, f"{step * env.control_dt:.1f} s")
            axis.texts[0].set_text(words[episode])
    figure.savefig(folder / f"rollout_{env.name}.png", metadata={"Software": None})
    plt.close(figure)
    print(f"wrote {folder / f'rollout_{env.name}.png'}")


# --- a run while it trains --------------------------------------------------------------------------------------------


def watch(run_dir: tyro.conf.Positional[str]) -> None:
    """Draw RUN_DIR/watch.png anew whenever metrics.csv gains a row, until the run is complete.

    Args:
        run_dir: the run's folder
    """
    folder, seen = pathlib.Path(run_dir), 0
    try:
        total = int(json.loads((folder / "config.json").read_text())["total_env_steps"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / 'config.json'} is not a run's") from None
    columns = {"eval_success": "success", "eval_return": "return", "gradient_norm": "gradient norm", "sps": "steps per second"}
    while True:
        rows = rows_of(folder / "metrics.csv")
        if len(rows) != seen:
            seen, row = len(rows), rows[-1]
            figure, axes = plt.subplots(2, 2, figsize=(7, 4), layout="constrained", sharex=True)
            for axis, (column, words) in zip(axes.flat, columns.items()):
                axis.plot([r["env_steps"] for r in rows], [r[column] for r in rows], ".-", color=ALGORITHMS["apg"]["color"])
                axis.set(title=words, xlim=(-0.02 * total, 1.02 * total))
                axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes[0, 0].set_ylim(-0.03, 1.03)
            figure.supxlabel("environment steps", fontsize=8)
            figure.savefig(folder / "watch.tmp.png")
            plt.close(figure)
            os.replace(folder / "watch.tmp.png", folder / "watch.png")  # whole, whenever a viewer reads it
            print(f"{row['env_steps']:,.0f} of {total:,} steps: success {row['eval_success']:.3f}", flush=True)
            if row["env_steps"] >= total:
                return
        time.sleep(1)


def fail(message: object) -> NoReturn:
    """A user's mistake, told in one line."""
    print(f"plots.py: {textwrap.shorten(str(message), 400, placeholder=' ...')}", file=sys.stderr)
    sys.exit(2)


def later(function: Callable) -> Callable:
    """A function of the same flags that returns the call instead of making it: tyro then only parses them."""

    @functools.wraps(function)
    def prepared(*args, **kwargs):
        return functools.partial(function, *args, **kwargs)

    return prepared


def main() -> None:
    box = io.StringIO()  # tyro draws a box around a mistake, with help and examples; what went wrong is its first part
    try:
        with contextlib.redirect_stderr(box):
            commands = {"figures": later(figures), "rollout": later(rollout), "watch": later(watch)}
            command = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        lines = " ".join(line.strip("│ ") for line in box.getvalue().splitlines() if line[:1] == "│")
        fail(re.split("─{3}|Argument helptext|Arguments are", lines)[0].strip() + " (--help lists all)")
    try:
        command()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        fail(f"a file lacks {error}" if isinstance(error, KeyError) else error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
