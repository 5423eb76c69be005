"""Figures of the CSV files in results/, and pictures of a policy at work.

    python plots.py figures                          # results/figures/*.png from results/*.csv
    python plots.py rollout RUN_DIR_OR_CHECKPOINT    # a film strip (PNG) and an animation (GIF)

Lines are interquartile means (IQM) over seeds, bands their 95% bootstrap intervals.
"""

import itertools
import pathlib
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image

import envs
import evaluate
import models
from evaluate import interval, iqm, spent

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers and line styles differ too.
ORANGE, BLUE, GREEN, GREY = "#D55E00", "#0072B2", "#009E73", "0.4"
SOLID, DASHED = {"color": ORANGE, "ls": "-", "marker": "o"}, {"color": BLUE, "ls": "--", "marker": "s"}
ALGORITHMS = {"apg": SOLID | {"label": "APG"}, "ppo": DASHED | {"label": "PPO"}}
BOOTSTRAPS = {"none": DASHED | {"label": "none"}, "critic": SOLID | {"label": "critic"}}
BOOTSTRAPS["mc"] = {"color": GREEN, "ls": "", "marker": "^", "label": "mc"}
TASKS = {"pointmass": "Point mass", "navigation": "Navigation", "pusht": "Push-T", "franka": "Franka arm"}
COSTS = {"env_steps": "environment steps", "gradient_steps": "gradient steps", "wall_seconds": "training time (s)"}
plt.switch_backend("Agg")
plt.rcParams.update({
    "font.size": 8, "xtick.labelsize": 7, "ytick.labelsize": 7, "lines.linewidth": 1.3, "lines.markersize": 3.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "patch.linewidth": 0,
    "legend.frameon": False, "legend.columnspacing": 1.2, "figure.dpi": 150, "savefig.bbox": "tight",
})  # fmt: skip

# --- figures ------------------------------------------------------------------------------------------------------------


def panels(tasks: list[str], lines: int, height: float, title: str, **shared: object) -> tuple[plt.Figure, np.ndarray]:
    """A figure with a column of panels for each task; 7 inches wide with four columns."""
    size = (max(1.65 * len(tasks) + 0.2, 5), height)
    figure, axes = plt.subplots(lines, len(tasks), figsize=size, squeeze=False, layout="constrained", **shared)
    figure.suptitle(title, fontsize=9, weight="bold")
    for axis, task in zip(axes[0], tasks):
        axis.set_title(TASKS.get(task, task), fontsize=8)
    return figure, axes


def round_ticks(axis: Axis) -> None:
    """1k for 1,000 and 1M for 1,000,000 along an x or y axis; a log axis over few decades has 3, 30, ... too."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 3) if high < 100 * low else (1,)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(lambda x, _: evaluate.short(x))


def line_and_band(axis: plt.Axes, x: np.ndarray, values: np.ndarray, style: dict) -> None:
    """IQM over seeds, and its interval as a band. values: [seeds, x]."""
    axis.fill_between(x, *interval(values), color=style["color"], alpha=0.15)
    axis.plot(x, iqm(values), **style)


def learning_curves(data: dict) -> plt.Figure:
    """Success against environment steps, gradient steps and seconds of training, for each task."""
    groups = evaluate.runs_by(data["suite"], "env", "algorithm")
    tasks = list(dict.fromkeys(task for task, _ in groups))
    title = "Success over training. Bold: PPO's cost / APG's, until success stays at 0.9 (dotted)"
    figure, axes = panels(tasks, len(COSTS), 5.5, title, sharey=True)
    for (row, (cost, label)), (column, task) in itertools.product(enumerate(COSTS.items()), enumerate(tasks)):
        axis = axes[row, column]
        for name, style in ALGORITHMS.items():
            runs = groups[task, name]
            start = min(run[cost][run[cost] > 0].min() for run in runs)  # a log axis has no zero
            x = np.geomspace(start, max(run[cost][-1] for run in runs), 200)
            values = np.array([np.interp(x, run[cost], run["eval_success"]) for run in runs])  # [seeds, 200]
            line_and_band(axis, x, values, style | {"markevery": [-1]})  # the marker is where the budget ends
        ratio = evaluate.costs(groups[task, "ppo"], groups[task, "apg"])[row].split(" ")[0]
        axis.text(0.98, 0.08, f"{ratio} x", transform=axis.transAxes, weight="bold", ha="right")
        axis.axhline(evaluate.LEVEL, color=GREY, lw=0.8, ls=":")
        axis.set(xscale="log", xlabel=label, ylim=(-0.03, 1.03))
        round_ticks(axis.xaxis)
    for axis in axes[:, 0]:
        axis.set_ylabel("success rate")
    return figure


def front(data: dict) -> plt.Figure:
    """Environment steps against gradient steps to 0.9 for good, for several E x M, and the line of the best trade-offs.

    Where a run missed 0.9, it counts with its full budget and the marker is open.
    """
    groups = evaluate.runs_by(data["front"], "env", "algorithm", "update_epochs", "num_minibatches")
    tasks = list(dict.fromkeys(task for task, *_ in groups))
    reached = lambda runs: all(run["eval_success"][-1] >= evaluate.LEVEL for run in runs)
    costs_of = lambda runs: [iqm([spent(run, evaluate.LEVEL, cost) for run in runs]) for cost in list(COSTS)[:2]]
    title = "Cost of a success of 0.9: lower left is better (epochs x minibatches; open: not all runs reach it)"
    figure, axes = panels(tasks, 1, 2.5, title)
    for (task, name, epochs, minibatches), runs in groups.items():
        axis, style = axes[0, tasks.index(task)], ALGORITHMS[name]
        spot = costs_of(runs)
        axis.plot(*spot, **style | {"ls": "", "mfc": style["color"] if reached(runs) else "white"})
        offset = (3, 2 if epochs in (1, 4) else -6)  # points with equal E M may coincide; their labels should not
        axis.annotate(f"{epochs:.0f}x{minibatches:.0f}", spot, offset, textcoords="offset points", fontsize=5)
    for axis, task in zip(axes[0], tasks):
        for name, style in ALGORITHMS.items():
            spots = sorted(costs_of(runs) for key, runs in groups.items() if key[:2] == (task, name) and reached(runs))
            best = [spot for i, spot in enumerate(spots) if all(spot[1] < other[1] for other in spots[:i])]
            axis.plot(*zip(*best), **style | {"marker": ""})
        axis.set(xscale="log", yscale="log", xlabel=COSTS["env_steps"])
        round_ticks(axis.xaxis)
        round_ticks(axis.yaxis)
    axes[0, 0].set_ylabel(COSTS["gradient_steps"])
    return figure


def ablation(data: dict) -> plt.Figure:
    """Final success against segment length, for each bootstrap."""
    groups = evaluate.runs_by(data["ablation"], "env", "bootstrap", "segment")
    tasks = list(dict.fromkeys(task for task, *_ in groups))
    title = "Push-T needs a critic; navigation does better without one, in short segments"
    figure, axes = panels(tasks, 1, 2.4, title, sharey=True)
    for axis, task in zip(axes[0], tasks):
        for name, style in BOOTSTRAPS.items():
            lengths = sorted(segment for where, label, segment in groups if (where, label) == (task, name))
            if lengths:
                finals = [[run["eval_success"][-1] for run in groups[task, name, segment]] for segment in lengths]
                line_and_band(axis, lengths, np.transpose(finals), style)
        lengths = sorted({segment for where, _, segment in groups if where == task})
        axis.set(xscale="log", xlabel="segment length K", ylim=(-0.03, 1.03))
        axis.set_xticks(lengths, [*(f"{x:g}" for x in lengths[:-1]), "T"])
        axis.minorticks_off()
    axes[0, 0].set_ylabel("final success rate")
    return figure


def reuse(data: dict) -> plt.Figure:
    """Final success against the number of uses of each gradient, with and without the trust region."""
    groups = evaluate.runs_by(data["reuse"], "env", "update_epochs", "num_minibatches", "clip_coef")
    tasks = list(dict.fromkeys(task for task, *_ in groups))
    title = "Gradients can be reused, inside a trust region (equal numbers of gradient steps)"
    figure, axes = panels(tasks, 1, 2.4, title, sharey=True)
    for axis, task in zip(axes[0], tasks):
        uses = sorted({(epochs, minibatches) for where, epochs, minibatches, _ in groups if where == task})
        for inside, style in ((True, SOLID | {"label": "with trust region"}), (False, DASHED | {"label": "without"})):
            keys = [key for key in sorted(groups) if key[0] == task and np.isfinite(key[3]) == inside]
            values = np.transpose([[run["eval_success"][-1] for run in groups[key]] for key in keys])
            line_and_band(axis, range(len(keys)), values, style)
        axis.set_xticks(range(len(uses)), [f"{epochs:.0f} x {minibatches:.0f}" for epochs, minibatches in uses])
        axis.set(xlabel="epochs x minibatches", ylim=(-0.03, 1.03))
    axes[0, 0].set_ylabel("final success rate")
    return figure


def gradient_health(data: dict, task: str = "pusht") -> plt.Figure:
    """Norm of the actions' gradients, eq. (4), and signal-to-noise ratio of the policy's, with and without costate clip."""
    rows = [row for row in data["gradients"] if (row["env"], row["bootstrap"]) == (task, "critic")]
    title = "Push-T: gradients explode over long segments, unless the costate is clipped"
    figure, axes = panels(["norm of g, eq. (4)", "signal-to-noise ratio, eq. (5)"], 1, 2.4, title)
    for clipped, style in ((True, SOLID | {"label": "costate clip 10"}), (False, DASHED | {"label": "no clip"})):
        chosen = [row for row in rows if (row["costate_clip"] > 0) == clipped]
        columns = "segment", "low", "median", "high", "signal_to_noise"
        segments, low, middle, high, ratio = (np.array([row[name] for row in chosen]) for name in columns)
        axes[0, 0].fill_between(segments, low, high, color=style["color"], alpha=0.15)  # 5% to 95% of the environments
        axes[0, 0].plot(segments, middle, **style)
        axes[0, 1].plot(segments, ratio, **style)
    for axis in axes[0]:
        axis.set(xscale="log", yscale="log", xlabel="segment length K")
        axis.set_xticks([1, 4, 16, 64, 128], ["1", "4", "16", "64", "T"])
        axis.minorticks_off()
    return figure


def slope(data: dict) -> plt.Figure:
    """Over training: the critic's values against the returns they stand for, and its slope against theirs."""
    groups = evaluate.runs_by(data["slope"], "env")
    title = "The critic predicts returns well, but its slope is poor"
    figure, axes = panels([task for (task,) in groups], 1, 2.4, title, sharey=True)
    lines = {"correlation": DASHED | {"label": "correlation of values"}, "cosine": SOLID | {"label": "cosine of slopes"}}
    for axis, runs in zip(axes[0], groups.values()):
        for name, style in lines.items():
            line_and_band(axis, runs[0]["env_steps"], np.array([run[name] for run in runs]), style | {"marker": ""})
        axis.set(xlabel=COSTS["env_steps"], ylim=(-0.4, 1.03))
        axis.xaxis.set_major_formatter(lambda x, _: evaluate.short(x))
    return figure


def save(figure: plt.Figure, path: pathlib.Path) -> None:
    """Write a PNG. Below the panels is a legend, each of their labels in it once."""
    handles = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels())}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncol=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
    print(f"wrote {path}")


def figures(results: str = "results") -> None:
    """Draw the figures whose CSV files are in the folder `results` into `results`/figures."""
    sources = {learning_curves: "suite", front: "front", ablation: "ablation", reuse: "reuse"}
    sources |= {gradient_health: "gradients", slope: "slope"}
    paths = {name: pathlib.Path(results, f"{name}.csv") for name in sources.values()}
    data = {name: evaluate.read_csv(path) for name, path in paths.items() if path.is_file()}
    if not data:
        raise envs.UserError(f"nothing to draw in {results}: none of {', '.join(paths)}.csv")
    for draw, name in sources.items():
        if name in data:
            save(draw(data), pathlib.Path(results, "figures", f"{draw.__name__}.png"))


# --- a policy at work ---------------------------------------------------------------------------------------------------

# One colour means one thing in all four tasks; what is past is drawn in the same colour, paler.
AGENT, GOAL, BLOCK, OBSTACLE = ORANGE, GREEN, BLUE, "0.82"
EPISODES = 4  # side by side


def draw_pointmass(axis: plt.Axes, states: np.ndarray, t: int, dt: float) -> None:
    """Position against time; the mass on its line, which moves with the time."""
    times, x, target = np.arange(len(states)) * dt, states[:, 0], states[-1, 2]
    axis.axhline(target, color=GOAL, lw=2.5, alpha=0.5)
    axis.plot(times[: t + 1], x[: t + 1], color=AGENT, lw=1.2)
    axis.plot(times[:t:10], x[:t:10], "o", color=AGENT, ms=5, mew=0, alpha=0.3)
    axis.plot(t * dt, x[t], "o", color=AGENT, ms=7, mew=0)
    axis.set(xlim=(-0.04 * times[-1], 1.04 * times[-1]), ylim=(-1.6, 1.2), xlabel="time (s)", ylabel="position (m)")
    axis.set(xticks=range(int(times[-1]) + 1), yticks=(-1, 0, 1))
    axis.label_outer(remove_inner_ticks=True)


def draw_navigation(axis: plt.Axes, states: np.ndarray, t: int, dt: float) -> None:
    """Path of the disc among the obstacles to the goal."""
    for x, y, radius in states[0, 7:].reshape(-1, 3):
        axis.add_patch(plt.Circle((x, y), radius, color=OBSTACLE))
    axis.add_patch(plt.Circle(states[0, 4:6], 1.6 * envs.AGENT_RADIUS, fc="none", ec=GOAL, lw=1.5))
    axis.add_patch(plt.Circle(states[0, 4:6], envs.AGENT_RADIUS / 3, color=GOAL))
    axis.plot(*states[: t + 1, :2].T, color=AGENT, lw=1)
    for past in range(0, t, 8):
        axis.add_patch(plt.Circle(states[past, :2], envs.AGENT_RADIUS, color=AGENT, alpha=0.25))
    axis.add_patch(plt.Circle(states[t, :2], envs.AGENT_RADIUS, color=AGENT, zorder=3))
    axis.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal")


def draw_pusht(axis: plt.Axes, states: np.ndarray, t: int, dt: float) -> None:
    """Block, goal and pusher, with where they have just been; y points down, as in the benchmark's own pictures."""

    def block(place, angle, **look):
        corners = place + np.array(envs.BLOCK_OUTLINE) @ about_z(angle)[:2, :2].T
        axis.add_patch(plt.Polygon(corners, **look))

    block(envs.GOAL, envs.GOAL_ANGLE, fc=GOAL, alpha=0.3)
    for age in (24, 18, 12, 6):
        if age <= t:
            block(states[t - age, 4:6], states[t - age, 6], color=BLOCK, alpha=0.22 - 0.007 * age)
            axis.add_patch(plt.Circle(states[t - age, :2], envs.PUSHER_RADIUS, color=AGENT, alpha=0.35 - 0.01 * age))
    block(states[t, 4:6], states[t, 6], fc=BLOCK, alpha=0.85)
    axis.plot(*states[max(t - 24, 0) : t + 1, :2].T, color=AGENT, lw=0.8, alpha=0.6)
    axis.add_patch(plt.Circle(states[t, :2], envs.PUSHER_RADIUS, color=AGENT, zorder=3))
    block(envs.GOAL, envs.GOAL_ANGLE, fc="none", ec=GOAL, lw=0.8, zorder=4)
    axis.set(xlim=(0, 1), ylim=(1, 0), aspect="equal")


def about_z(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def arm_frames(q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Origins [9, 3] and rotations [9, 3, 3] of the frames of the base, joints 1 to 7 and the flange, at angles q [7]."""
    places, turns = [np.zeros(3)], [np.eye(3)]
    for joint, angle in zip(envs.FR3, q):
        places.append(places[-1] + turns[-1] @ joint.offset)
        turns.append(turns[-1] @ np.roll(about_z(joint.roll), 1, axis=(0, 1)) @ about_z(angle))  # roll is about x
    return np.array([*places, places[-1] + envs.FLANGE * turns[-1][:, 2]]), np.array([*turns, turns[-1]])


def draw_franka(axis: plt.Axes, states: np.ndarray, t: int, dt: float) -> None:
    """The arm with its shadow on the table; the flange's path and frame, and the target's frame, thick."""
    azimuth, height = np.radians(-55), np.radians(18)  # from where it is seen, without perspective
    right = np.array([-np.sin(azimuth), np.cos(azimuth), 0])
    up = np.array([-np.cos(azimuth) * np.sin(height), -np.sin(azimuth) * np.sin(height), np.cos(height)])
    towards = np.cross(right, up)  # the viewer
    flat = lambda points: np.stack([points @ right, points @ up], -1)  # [..., 3] -> [..., 2]

    def capsule(start, end, radius, **look):
        (start, end), around = flat(np.stack([start, end])), np.linspace(-np.pi / 2, np.pi / 2, 13)
        around = around + np.arctan2(*(end - start)[::-1])
        half = radius * np.stack([np.cos(around), np.sin(around)], 1)
        axis.add_patch(plt.Polygon(np.concatenate([end + half, start - half]), **look))

    places, turns = arm_frames(states[t, :7])
    # Links run along the axes of their joints: before the wrist there is a corner that is no frame's origin.
    corner = places[4] + turns[4, :, 0] * envs.FR3[4].offset[0]
    bones = [*places[:5], corner, *places[5:]]
    parts = [(start, end, 0.042, "0.72") for start, end in zip(bones, bones[1:])]
    # A joint is drawn as a short cylinder, which may be anywhere on its axis: where joints meet, a bit further down.
    for place, z, shift in zip(places[1:], turns[1:, :, 2], (-0.16, 0, -0.15, 0, -0.2, 0, 0.03)):
        parts.append((place + (shift - 0.015) * z, place + (shift + 0.015) * z, 0.058, "0.35"))
    ring = np.linspace(0, 2 * np.pi, 73)
    axis.add_patch(plt.Polygon(flat(0.8 * np.stack([np.cos(ring), np.sin(ring), 0 * ring], 1)), color="0.93"))
    for start, end, radius, _ in parts:
        capsule(start * [1, 1, 0], end * [1, 1, 0], radius, color=OBSTACLE)
    for start, end, radius, color in sorted(parts, key=lambda part: (part[0] + part[1]) @ towards + part[2]):
        capsule(start, end, radius, fc=color, ec="white", lw=0.5, zorder=2)
    flange = envs.franka_flange_pose(torch.from_numpy(states[: t + 1, :7]))[0].numpy()
    axis.plot(*flat(flange).T, color=AGENT, lw=1, zorder=3)
    target = states[0, 21:24], states[0, 24:33].reshape(3, 3)
    goal_look, flange_look = {"color": GOAL, "lw": 4, "alpha": 0.5}, {"color": AGENT, "lw": 1.5}
    for (place, turn), look in ((target, goal_look), ((places[-1], turns[-1]), flange_look)):
        for direction, length in zip(turn.T, (0.12, 0.17, 0.22)):  # axes x, y and z
            ends = flat(np.stack([place, place + length * direction]))
            axis.plot(*ends.T, solid_capstyle="round", zorder=4, **look)
    axis.set(xlim=(-0.95, 0.95), ylim=(-0.45, 1.45), aspect="equal")


def play(env: envs.Env, policy: Callable) -> tuple[np.ndarray, np.ndarray]:
    """One episode in each environment, from where they are. policy: observation [N, O] -> action [N, A].

    Returns states [N, T + 1, S], and after which control step [N] each is within its tolerances for good; T + 1 if never.
    """
    state, observation = env.state, env.observe(env.state)
    states, within = [state], []
    with torch.no_grad():
        for _ in range(env.episode_length):
            state, observation, _ = env.dynamics(state, policy(observation))
            errors = env.task.errors(observation, state)
            within.append(torch.stack([errors[name] < limit for name, limit in env.task.tolerances.items()]).all(0))
            states.append(state)
    last_steps_within = torch.stack(within).flip(0).cumprod(0).sum(0)
    return torch.stack(states, 1).numpy(), env.episode_length + 1 - last_steps_within.numpy()


def rollout(path: tyro.conf.Positional[str], out: str | None = None, seed: int = 1) -> None:
    """Draw a trained policy at work: rollout_{task}.png, a film strip, and rollout_{task}.gif, an animation.

    Args:
        path: a run folder or a checkpoint file
        out: folder to write to; default the checkpoint's own
        seed: seed of the initial states
    """
    folder = pathlib.Path(out or (path if pathlib.Path(path).is_dir() else pathlib.Path(path).parent))
    _, env, actor, _, normalizer = evaluate.load(path, EPISODES, seed=seed)
    scenes = {"pointmass": draw_pointmass, "navigation": draw_navigation, "pusht": draw_pusht, "franka": draw_franka}
    if env.name not in scenes:
        raise envs.UserError(f"no picture of {env.name}: give plots.py a function that draws it")
    draw, dt = scenes[env.name], env.control_dt
    states, settled = play(env, lambda observation: actor(normalizer(observation)))
    success = settled <= env.episode_length - envs.SETTLE_STEPS + 1  # envs.score's: within at each of the last steps
    words = [f"reached in {step * dt:.1f} s" if good else "failed" for step, good in zip(settled, success)]
    ends = settled.clip(max=env.episode_length)  # [N]
    end = min(ends.max() + envs.SETTLE_STEPS, env.episode_length)
    states = states[:, : end + 1]

    def picture(axis, i, step):
        """Episode i at a control step, drawn afresh; in the corner the time, or in the end how it went."""
        axis.clear()
        axis.set(facecolor="0.97", xticks=(), yticks=())
        axis.spines[:].set_visible(False)
        draw(axis, states[i], step, dt)
        text = words[i] if step >= ends[i] else f"{step * dt:.1f} s"
        axis.text(0.03, 0.03, text, transform=axis.transAxes, fontsize=7, color=GREY)

    if env.name in ("pointmass", "navigation"):  # paths: an episode in one picture
        shape, moments = (1, EPISODES), [(i, end) for i in range(EPISODES)]
    else:  # moments of two episodes, the last one when the goal is reached
        shape, moments = (2, 5), [(i, round(ends[i] * k / 4)) for i in (0, EPISODES - 1) for k in range(5)]
    figure, axes = plt.subplots(*shape, figsize=(7, 0.1 + 7 * shape[0] / shape[1]), layout="constrained")
    for axis, (i, step) in zip(axes.flat, moments):
        picture(axis, i, step)
    save(figure, folder / f"rollout_{env.name}.png")

    figure, axes = plt.subplots(2, 2, figsize=(4, 4), dpi=100, layout="constrained", sharex=True, sharey=True)
    frames = []
    for step in range(0, end + 1, max(1, round(0.05 / dt))):  # 0.05 s apart; pusht, whose steps are longer, is sped up
        for i, axis in enumerate(axes.flat):
            picture(axis, i, step)
        figure.canvas.draw()
        figure.set_layout_engine("none")  # the first frame's stays
        frames.append(Image.fromarray(np.array(figure.canvas.buffer_rgba())[..., :3]))
    plt.close(figure)
    palette = frames[-1].quantize(64)
    images = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [50] * (len(images) - 1) + [2000]  # ms; the last one stays
    path = folder / f"rollout_{env.name}.gif"
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)
    print(f"wrote {path}")


def main() -> None:
    torch.set_num_threads(1)
    tyro.extras.subcommand_cli_from_dict({"figures": figures, "rollout": rollout}, description=__doc__)


if __name__ == "__main__":
    models.command(main)
