"""Statistics by hand; figures show them, are the same for the same data, and are left out where there is none."""

import csv
import json
import sys

import numpy as np
import pytest

import plots

COLUMNS = ["env", "algorithm", "seed", "segment", "bootstrap", "learning_rate"]
COLUMNS += ["env_steps", "gradient_steps", "wall_seconds", "eval_success"]
COLUMNS += ["approx_kl"]  # empty for apg
APG = {"env": "franka", "algorithm": "apg", "seed": 1, "segment": 32, "bootstrap": "critic"}
APG |= {"learning_rate": 0.002, "approx_kl": ""}
PPO = {**APG, "algorithm": "ppo", "approx_kl": 0.01}


def run(success, steps=1000, gradients=0.01, seconds=0.001, **facts):
    """Rows of a run: `steps` environment steps an evaluation, `gradients` and `seconds` a step."""
    costs = [
        {"env_steps": i * steps, "gradient_steps": i * steps * gradients, "wall_seconds": i * steps * seconds} for i in range(9)
    ]
    return [{**APG, **facts, **cost, "eval_success": float(s)} for cost, s in zip(costs, success)]


def write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def drawn(monkeypatch):
    """{name: figure} of what is drawn, instead of files."""
    figures = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.update({path.name: figure}))
    yield figures
    plots.plt.close("all")


def line(axis, color):
    """Points of the only line with this colour that joins points."""
    (only,) = [l for l in axis.lines if l.get_color() == color and len(l.get_xdata()) > 1]
    return only.get_xydata()


def markers(axis, algorithm):
    """Points that are drawn with the marker of an algorithm."""
    look = plots.ALGORITHMS[algorithm]
    return [l.get_xydata()[0] for l in axis.lines if l.get_color() == look["color"] and l.get_marker() == look["marker"]]


def test_iqm_and_its_interval_by_hand():
    assert plots.iqm([100.0, 3.0, 1.0, 2.0]) == 2.5  # the lowest and the highest dropped
    assert plots.iqm([1.0, 2.0, 6.0]) == 3.0  # int(3 / 4) = 0 dropped
    assert plots.iqm(np.arange(10.0)) == 4.5 and plots.iqm([0.0] * 2 + [1.0] * 6 + [50.0] * 2) == 1.0
    np.testing.assert_array_equal(plots.iqm(np.array([[9.0, 0], [1, 1], [3, 1], [0, 8]])), [2, 1])  # column by column
    np.testing.assert_array_equal(plots.interval(np.full((5, 3), 7.0)), np.full((2, 3), 7.0))
    np.testing.assert_array_equal(plots.interval([4.0]), [4.0, 4.0])
    # Of {0, 1} a resample's mean is 0, 0.5 or 1 with probability 1/4, 1/2, 1/4.
    np.testing.assert_array_equal(plots.interval([0.0, 1.0]), [0.0, 1.0])
    values = np.random.default_rng(1).normal(size=(100, 2))
    low, high = plots.interval(values)
    np.testing.assert_array_equal(low, plots.interval(values)[0])  # the same each time
    np.testing.assert_array_equal(low[1], plots.interval(values[:, 1])[0])  # and each column by itself
    # Standard error of the mean of 100 normals is 0.1, of the IQM about 0.11: the interval is about 4 of these wide.
    assert (
        (low < plots.iqm(values)).all() and (plots.iqm(values) < high).all() and ((0.3 < high - low) & (high - low < 0.6)).all()
    )


def test_cost_to_a_level_by_hand():
    rows = run([0, 0.2, 0.6, 0.4, 0.8]) + run([0.1] * 5, seed=2) + run([0.5, 0.9, 1, 1, 1], seed=3)
    runs = plots.runs_by(rows, "env")[("franka",)]
    first, never, at_once = runs
    assert plots.cost_to(first, 0.2, "env_steps") == 1000
    assert plots.cost_to(first, 0.5, "env_steps") == pytest.approx(1750)  # the first time, though it falls below again
    assert plots.cost_to(first, 0.7, "gradient_steps") == pytest.approx(37.5)
    assert plots.cost_to(never, 0.5, "env_steps") == 4000 and plots.cost_to(never, 0.5, "wall_seconds") == 4.0
    assert plots.cost_to(at_once, 0.5, "env_steps") == 0
    assert plots.reaches(runs, 0.5) and not plots.reaches(runs, 0.95) and not plots.reaches(runs[:2], 0.5)  # half is not most
    assert plots.mean_success(first) == pytest.approx((0.1 + 0.4 + 0.5 + 0.6) / 4)
    with pytest.raises(ValueError, match="two of the same seed"):
        plots.runs_by(rows + run([0, 1]), "env")


def test_learning_curves_and_costs_show_their_numbers(tmp_path, drawn):
    rows = [row for seed, top in ((1, 0.4), (2, 0.8)) for row in run([0, top / 2, top], seed=seed)]
    rows += [row for seed in (1, 2) for row in run([0, 0, 0.2], 5000, 1.0, **{**PPO, "seed": seed})]
    write(tmp_path / "suite.csv", rows)
    plots.figures(str(tmp_path))
    assert set(drawn) == {"learning_curves", "cost_to_levels"}

    steps, gradients, seconds = drawn["learning_curves"].axes
    assert steps.get_xscale() == seconds.get_xscale() == "linear" and gradients.get_xscale() == "log"  # 20 and 10,000
    x, success = line(steps, plots.ALGORITHMS["apg"]["color"]).T
    assert x[0] == 0 and x[-1] == 2000
    np.testing.assert_allclose(success, 0.6 * x / 2000)
    band = steps.collections[0].get_datalim(steps.transData)
    assert band.y1 == pytest.approx(0.8)  # of two seeds, the interval is both
    x, success = line(gradients, plots.ALGORITHMS["ppo"]["color"]).T
    assert x[0] == pytest.approx(5000) and x[-1] == pytest.approx(10000)  # no zero on a log axis
    np.testing.assert_allclose(success, 0.2 * (x - 5000) / 5000, atol=1e-12)

    (axis,) = drawn["cost_to_levels"].axes
    # 0.25 is reached by both seeds, at 2000 * 0.25 / top; 0.5 and 0.75 by one of two, which is not most.
    np.testing.assert_allclose(markers(axis, "apg"), [[(1250 + 625) / 2, (12.5 + 6.25) / 2]])
    assert markers(axis, "ppo") == [] and [text.get_text() for text in axis.texts] == ["PPO: < 0.25"]


def test_ablation_shows_its_numbers(tmp_path, drawn):
    rows = []
    for bootstrap, tops in (("none", (0.2, 0.6, 1.0)), ("critic", (1.0, 1.0, 1.0))):
        for segment, top in zip((4, 16, 200), tops):
            for seed in (1, 2, 3):
                rows += run([0, top / 2, top], segment=segment, bootstrap=bootstrap, seed=seed)
    rows += [row for seed in (1, 2) for row in run([0, 0.4, 0.8], segment=200, bootstrap="mc", seed=seed)]
    write(tmp_path / "ablation.csv", rows)
    plots.figures(str(tmp_path))
    upper, lower = drawn["ablation"].axes
    color = plots.BOOTSTRAPS["none"]["color"]
    np.testing.assert_allclose(line(upper, color), [[4, 0.2], [16, 0.6], [200, 1.0]])
    np.testing.assert_allclose(line(lower, color), [[4, 2000], [16, 2000 * 0.5 / 0.6], [200, 1000]])
    level = [l.get_ydata() for l in upper.lines if l.get_color() == plots.BOOTSTRAPS["mc"]["color"]]
    assert np.allclose(np.concatenate(level), 0.8) and sorted(map(len, level)) == [1, 2]  # T, and all over
    hollow = [l.get_xydata().tolist() for l in lower.lines if l.get_markerfacecolor() == "white"]
    assert hollow == [[[4, 2000]]]  # never reached: all that was spent
    assert [tick.get_text() for tick in lower.get_xticklabels()] == ["4", "16", "T"]
    (legend,) = drawn["ablation"].legends
    assert [text.get_text() for text in legend.get_texts()][:3] == ["none", "critic", "mc"] and len(legend.get_texts()) == 4


def test_learning_rates_show_their_numbers_and_the_suites_choice(tmp_path, drawn):
    rows = []
    for rate, top in ((0.001, 0.4), (0.002, 1.0)):
        for seed, more in ((1, -0.2), (2, 0.0)):
            rows += run([0, 0, top + more], learning_rate=rate, seed=seed)
    write(tmp_path / "sweep.csv", rows)
    plots.figures(str(tmp_path))
    upper, lower = drawn["learning_rates"].axes
    color = plots.ALGORITHMS["apg"]["color"]
    solid = lambda axis: next(l.get_xydata() for l in axis.lines if l.get_linestyle() == "-" and l.get_color() == color)
    np.testing.assert_allclose(solid(upper), [[0.001, 0.3], [0.002, 0.9]])
    np.testing.assert_allclose(solid(lower), [[0.001, 0.3 / 4], [0.002, 0.9 / 4]])
    marks = lambda axis: [l.get_xdata()[0] for l in axis.lines if l.get_color() == plots.GREY]
    assert marks(upper) == []
    write(tmp_path / "suite.csv", run([0, 1], learning_rate=0.004) + run([0, 1], **{**PPO, "learning_rate": 0.1}))
    plots.figures(str(tmp_path))
    assert marks(drawn["learning_rates"].axes[0]) == [0.004]


def test_same_data_same_bytes_and_what_has_no_data_is_left_out(tmp_path, capsys):
    curve = np.linspace(0, 1, 9) ** 2
    rows = []
    for env in ("pointmass", "pusht"):
        for seed in (1, 2):
            rows += run(curve, env=env, seed=seed) + run(curve / seed, 7000, 1.0, **{**PPO, "env": env, "seed": seed})
    for name in ("suite", "sweep", "ablation"):
        write(tmp_path / f"{name}.csv", [row for row in rows if name != "ablation" or row["algorithm"] == "apg"])
    pictures = []
    for _ in range(2):
        plots.figures(str(tmp_path))
        pictures.append({path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()})
    names = ("learning_curves", "cost_to_levels", "ablation", "learning_rates")
    assert set(pictures[0]) == {name + suffix for name in names for suffix in (".png", ".pdf")}
    assert pictures[0] == pictures[1] and all(len(picture) < 300_000 for picture in pictures[0].values())
    left_out = [text for text in capsys.readouterr().out.splitlines() if text.startswith("left out")]
    assert len(left_out) == 2 and all("gradients.csv" in text and "evaluate.py gradients" in text for text in left_out)


@pytest.mark.parametrize("content", [None, "", "env,algorithm\n", "env,algorithm\nfranka,apg\n"])
def test_missing_data_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, content):
    if content is not None:
        (tmp_path / "suite.csv").write_text(content)
    monkeypatch.setattr(sys, "argv", ["plots.py", "figures", "--results", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        plots.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("plots.py: ") and error.count("\n") == 1
    assert ("seed" if content and "franka" in content else str(tmp_path)) in error


def test_throughput_shows_seconds_an_update(tmp_path, drawn):
    """At widest networks, against N at the usual K, and against K at N = 256."""
    speeds = dict.fromkeys(("physics_and_adjoint", "apg_none", "ppo"), 1e6)
    cells = [(64, 32, 1000.0), (256, 32, 2000.0), (256, 8, 4000.0)]
    lines = [
        {"task": "franka", "num_envs": n, "segment": k, "hidden": units, **speeds, "apg_critic": speed / units}
        for n, k, speed in cells
        for units in (1, 2)
    ]
    (tmp_path / "throughput_x.json").write_text(json.dumps({"env_steps_per_second": lines}))
    plots.figures(str(tmp_path))
    upper, lower = drawn["throughput_x"].axes
    color = "#D55E00"
    np.testing.assert_allclose(line(upper, color), [[64, 64 * 32 / 500], [256, 256 * 32 / 1000]])
    np.testing.assert_allclose(line(lower, color), [[8, 256 * 8 / 2000], [32, 256 * 32 / 1000]])
    np.testing.assert_allclose(line(upper, plots.GREY), [[64, 64 * 32 / 500], [256, 4 * 64 * 32 / 500]])
    (tmp_path / "throughput_x.json").write_text("{}")
    with pytest.raises(KeyError):
        plots.figures(str(tmp_path))
