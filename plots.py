"""Figures from the CSV files that evaluate.py writes: python plots.py figures

What is over seeds is drawn as their interquartile mean (IQM), with its 95% bootstrap interval as a band or a cross.
"""

import csv
import pathlib
import sys

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

# Okabe and Ito's colours, told apart by colour-blind readers; each also has a marker, and an algorithm a line style too.
ALGORITHMS = {
    "apg": dict(label="APG", color="#D55E00", ls="-", marker="o"),
    "ppo": dict(label="PPO", color="#0072B2", ls="--", marker="s"),
    "ppo-best": dict(label="PPO, own learning rate", color="#56B4E9", ls=":", marker="^"),
}
BOOTSTRAPS = {
    "none": dict(label="none", color="#0072B2", marker="o"),
    "critic": dict(label="critic", color="#D55E00", marker="s"),
    "mc": dict(label="mc", color="#009E73", marker="^"),
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


def read(path):
    """Rows of a CSV file as dicts, numbers as floats."""
    with open(path, newline="") as file:
        rows = [{name: number(text) for name, text in row.items()} for row in csv.DictReader(file)]
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def number(text):
    try:
        return float(text)
    except ValueError:
        return text


def runs_by(rows, *names):
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


def iqm(values):
    """Interquartile mean over the first axis, the seeds: without the quarter at each end, rounded down."""
    cut = len(values) // 4
    return np.sort(values, axis=0)[cut : len(values) - cut].mean(axis=0)


def interval(values, resamples=2000):
    """[2, ...]: the ends of a 95% interval of the IQM, percentiles over resamples of the seeds. values [S, ...]"""
    picks = np.random.default_rng(0).integers(len(values), size=(len(values), resamples))
    return np.percentile(iqm(np.asarray(values)[picks]), (2.5, 97.5), axis=0)


def reaches(runs, level):
    """Whether more than half of the runs ever reach a success of `level`."""
    return np.mean([run["eval_success"].max() >= level for run in runs]) > 0.5


def cost_to(run, level, cost):
    """What a run spent until its success first was `level`, linear between evaluations; all of it if it never was."""
    success, spent = run["eval_success"], run[cost]
    if success.max() < level:
        return spent[-1]
    first = (success >= level).argmax()
    return np.interp(level, success[max(first - 1, 0) : first + 1], spent[max(first - 1, 0) : first + 1])


def final_success(run):
    return run["eval_success"][-1]


def mean_success(run):
    """Area under success against environment steps, divided by their number."""
    return np.trapezoid(run["eval_success"], run["env_steps"]) / run["env_steps"][-1]


# --- figures ----------------------------------------------------------------------------------------------------------


def save(figure, path):
    for suffix, metadata in ((".png", {"Software": None}), (".pdf", {"CreationDate": None})):  # same data, same bytes
        figure.savefig(path.with_suffix(suffix), metadata=metadata)
    plt.close(figure)
    print(f"wrote {path.with_suffix('.png')} and .pdf")


def panels(rows, lines, height, **shared):
    """A figure with a column of panels for each task, in the order of `rows`; 7 inches wide with four tasks."""
    tasks = list(dict.fromkeys(row["env"] for row in rows))
    size = (max(1.65 * len(tasks) + 0.2, 3.5), height)
    figure, axes = plt.subplots(lines, len(tasks), figsize=size, squeeze=False, layout="constrained", **shared)
    for axis, task in zip(axes[0], tasks):
        axis.set_title(task)
    for axis in axes.flat:
        axis.tick_params(labelsize=7)
    return figure, axes, tasks


def in_words(axis):
    """1k for 1,000 and 1M for 1,000,000 along an x or y axis; a log axis over few decades has 3, 30, ... too."""
    if axis.get_scale() == "log":
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 3) if high < 100 * low else (1,)))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(EngFormatter(sep=""))


def line_and_band(axis, x, middle, ends, **style):
    axis.fill_between(x, *ends, color=style["color"], alpha=0.15, lw=0)
    axis.plot(x, middle, **style)


def legend(figure, groups, looks, others, columns, **style):
    """Below the panels: those of `looks` that `groups`, keyed (task, name, ...), has; and `others`."""
    there = {key[1] for key in groups}
    handles = [Line2D([], [], **{**look, **style}) for name, look in looks.items() if name in there]
    figure.legend(handles=handles + others, loc="outside lower center", ncol=columns, columnspacing=1.2, frameon=False)


def learning_curves(rows, path):
    """Success against environment steps, gradient steps and seconds of training."""
    groups = runs_by(rows, "env", "algorithm")
    figure, axes, tasks = panels(rows, 3, 5.2, sharey=True)
    threshold = dict(color=GREY, lw=0.8, ls=(0, (1, 2)), label="success 0.9")
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


def cost_to_levels(rows, path):
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
                words = dict(fontsize=6, color=style["color"], ha="right", transform=axis.transAxes)
                axis.text(0.98, 0.02 + 0.07 * list(ALGORITHMS).index(algorithm), f"{style['label']}: < {LEVELS[0]}", **words)
        axis.set(xscale="log", yscale="log", xlabel=COSTS["env_steps"])
        in_words(axis.xaxis)
    in_words(axes[0, 0].yaxis)
    axes[0, 0].set_ylabel(COSTS["gradient_steps"])
    dots = [Line2D([], [], color=GREY, ls="", marker="o", mew=0, ms=sizes[level], label=f"{level}") for level in LEVELS]
    dots[0].set_label(f"success {LEVELS[0]}")
    legend(figure, groups, ALGORITHMS, dots, 8, lw=1, ms=4)
    save(figure, path)


def ablation(rows, path):
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
    style = dict(ls="", marker="o", ms=3.5, mfc="white", label="0.5 reached by half of the runs at most")
    legend(figure, groups, BOOTSTRAPS, [Line2D([], [], color=GREY, **style)], 4, lw=1.3, ms=3.5)
    save(figure, path)


def learning_rates(rows, path, shared):
    """Final and mean success against learning rate: IQM, and every seed as a dot. shared: {task: APG's rate in the suite}"""
    groups = runs_by(rows, "env", "algorithm", "learning_rate")
    figure, axes, tasks = panels(rows, 2, 3.6, sharex="col", sharey=True)
    choice = dict(color=GREY, lw=0.8, ls=(0, (1, 2)), label="shared choice")
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


def gradient_health(rows, path):
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


def figures(results: str = "results"):
    """Draw the figures whose CSV files are in `results` into `results`/figures.

    Args:
        results: folder with the CSV files that evaluate.py writes
    """
    results = pathlib.Path(results)
    makers = {"suite": "suite", "ablation": "ablation", "sweep": "sweep", "gradients": "gradients RUN_DIR ..."}
    data = {name: read(results / f"{name}.csv") for name in makers if (results / f"{name}.csv").is_file()}
    if not data:
        raise FileNotFoundError(f"nothing to draw in {results}: make {', '.join(makers)}.csv with evaluate.py")
    folder = results / "figures"
    folder.mkdir(exist_ok=True)
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
    for name, maker in makers.items():
        if name not in data:
            print(f"left out: what is drawn from {results / name}.csv; python evaluate.py {maker} makes it")


def main():
    try:
        tyro.extras.subcommand_cli_from_dict({"figures": figures}, description=__doc__)
    except (OSError, ValueError, KeyError) as error:
        print("plots.py:", f"a CSV file has no column {error}" if isinstance(error, KeyError) else error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
