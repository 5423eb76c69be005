"""Figures from recorded data: python plots.py figures"""

import csv
import pathlib
import sys

import matplotlib
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours, told apart by colour-blind readers; each bootstrap also has a marker of its own.
BOOTSTRAPS = {"none": ("#0072B2", "o"), "critic": ("#D55E00", "s"), "mc": ("#009E73", "^")}
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


def read(path):
    """Rows of a CSV file as dicts, numbers as floats."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: make it with evaluate.py")
    with open(path, newline="") as file:
        return [{name: number(text) for name, text in row.items()} for row in csv.DictReader(file)]


def number(text):
    try:
        return float(text)
    except ValueError:
        return text


def save(figure, path):
    for suffix, metadata in ((".png", {"Software": None}), (".pdf", {"CreationDate": None})):  # same data, same bytes
        figure.savefig(path.with_suffix(suffix), metadata=metadata)
    plt.close(figure)
    print(f"wrote {path.with_suffix('.png')} and .pdf")


def gradient_health(rows, path):
    """Per-environment gradient norm against segment length: median, and 5 to 95% over environments, without clip; and
    the median with it."""
    tasks = list(dict.fromkeys(row["env"] for row in rows))
    figure, axes = plt.subplots(2, len(tasks), figsize=(2.1 * len(tasks) + 0.6, 4.0), sharex="col", squeeze=False)
    for line, policy in zip(axes, ("fresh", "trained")):
        for axis, task in zip(line, tasks):
            for bootstrap, (colour, marker) in BOOTSTRAPS.items():
                here = [r for r in rows if (r["env"], r["policy"], r["bootstrap"]) == (task, policy, bootstrap)]
                free, clipped = [r for r in here if r["costate_clip"] == 0], [r for r in here if r["costate_clip"] > 0]
                k = [r["segment"] for r in free]
                axis.fill_between(k, [r["low"] for r in free], [r["high"] for r in free], color=colour, alpha=0.15, lw=0)
                axis.plot(k, [r["median"] for r in free], color=colour, marker=marker, ms=3, lw=1.3, label=bootstrap)
                axis.plot(k, [r["median"] for r in clipped], color=colour, lw=1, ls=":", label=f"{bootstrap}, clipped")
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
    """Draw every figure from the CSV files in `results` into `results`/figures.

    Args:
        results: folder with the CSV files that evaluate.py writes
    """
    results = pathlib.Path(results)
    rows = read(results / "gradients.csv")
    (results / "figures").mkdir(exist_ok=True)
    gradient_health(rows, results / "figures" / "gradient_health")


def main():
    try:
        tyro.extras.subcommand_cli_from_dict({"figures": figures}, description=__doc__)
    except (OSError, ValueError, KeyError) as error:
        print(f"plots.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
