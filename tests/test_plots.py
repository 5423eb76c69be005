"""Figures show their numbers; pictures of a policy show what it did, the same each time; mistakes are told in one line."""

import numpy as np
import pytest
import torch
from helpers import program
from PIL import Image

import envs
import evaluate
import models
import plots

FACTS = {"env": "franka", "algorithm": "apg", "seed": 1, "segment": 32, "bootstrap": "critic", "learning_rate": 0.002}
APG, PPO = plots.ALGORITHMS["apg"]["color"], plots.ALGORITHMS["ppo"]["color"]
CRITIC, MC = plots.BOOTSTRAPS["critic"]["color"], plots.BOOTSTRAPS["mc"]["color"]


def run(success, steps=1000, **facts):
    """Rows of a run: `steps` environment steps from one evaluation to the next, a gradient step every 100 of them."""
    spent = [{"env_steps": i * steps, "gradient_steps": i * steps / 100, "wall_seconds": i} for i in range(len(success))]
    results = [{"eval_success": s, "eval_return": -i} for i, s in enumerate(success)]
    return [FACTS | facts | costs | result for costs, result in zip(spent, results)]


def axes_of(folder, monkeypatch):
    """{name: axes} of the figures that are drawn from the folder's files."""
    drawn = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.update({path.stem: figure.axes}))
    plots.figures(str(folder))
    return drawn


def line(axis, color):
    (points,) = [line.get_xydata() for line in axis.lines if line.get_color() == color]
    return points


def test_the_suites_figures_show_its_numbers(tmp_path, monkeypatch):
    rows = [row for seed, top in ((1, 0.1), (2, 0.4), (3, 0.7)) for row in run([0, top / 2, top], seed=seed)]
    evaluate.write_csv(tmp_path / "suite.csv", rows + run([0, 0.9], 5000, algorithm="ppo"))
    drawn = axes_of(tmp_path, monkeypatch)
    assert set(drawn) == {"learning_curves"}
    for axis, evaluation in zip(drawn["learning_curves"], (1000, 10, 1)):
        x, success = line(axis, APG).T
        assert x[0] == pytest.approx(evaluation) and x[-1] == pytest.approx(2 * evaluation)  # a log axis has no zero
        np.testing.assert_allclose(success, 0.2 * x / evaluation)
        assert axis.collections[0].get_datalim(axis.transData).y1 == pytest.approx(0.7)  # the band
    words = [axis.texts[0].get_text() for axis in drawn["learning_curves"]]
    assert words == ["<2.5 x", "<2.5 x", "<0.5 x"]


def test_comparisons_show_their_numbers(tmp_path, monkeypatch):
    rows = [row for k, top in ((8, 0.2), (16, 0.9), (200, 1.0)) for row in run([0, top / 2, top], segment=k)]
    evaluate.write_csv(tmp_path / "ablation.csv", rows + run([0, 0.4, 0.8], segment=200, bootstrap="mc"))
    use = {"update_epochs": 2, "num_minibatches": 4}
    rows = run([0, 0.8, 1], clip_coef=0.8, **use) + run([0, 0.2, 0], clip_coef=float("inf"), **use)
    evaluate.write_csv(tmp_path / "reuse.csv", rows)
    rows = run([0, 0.5, 1], 1000, update_epochs=1, num_minibatches=2)
    rows += run([0, 0.5, 1], 2000, update_epochs=1, num_minibatches=4)
    missed = run([0, 0.5, 0.8], 5000, algorithm="ppo", update_epochs=4, num_minibatches=8)
    evaluate.write_csv(tmp_path / "front.csv", rows + missed)
    drawn = axes_of(tmp_path, monkeypatch)
    (axis,) = drawn["ablation"]
    np.testing.assert_allclose(line(axis, CRITIC), [[8, 0.2], [16, 0.9], [200, 1.0]])
    np.testing.assert_allclose(line(axis, MC), [[200, 0.8]])
    (axis,) = drawn["reuse"]
    assert [line(axis, color).tolist() for color in (plots.ORANGE, plots.BLUE)] == [[[0, 1]], [[0, 0]]]
    (axis,) = drawn["front"]
    spots = [(line.get_color(), *line.get_xydata().tolist()) for line in axis.lines]
    assert spots[:3] == [(APG, [2000, 20]), (APG, [4000, 40]), (PPO, [10000, 100])]
    assert spots[3:] == [(APG, [2000, 20])]  # four minibatches cost more of both; PPO's run missed
    assert [text.get_text() for text in axis.texts] == ["1x2", "1x4", "4x8"]


def test_gradients_figures_show_their_numbers(tmp_path, monkeypatch):
    columns = "env,bootstrap,costate_clip,segment,low,median,high,signal_to_noise\n"
    cases = [(clip, k) for clip in (0, 3) for k in (1, 128)]
    rows = [f"pusht,critic,{clip},{k},{k},{2 * k - clip / 3},{3 * k},{k + clip}\n" for clip, k in cases]
    (tmp_path / "gradients.csv").write_text(columns + "".join(rows))
    rows = [f"franka,{seed},{steps},{seed * steps},0.5\n" for seed in (1, 3) for steps in (0, 0.1)]
    (tmp_path / "slope.csv").write_text("env,seed,env_steps,cosine,correlation\n" + "".join(rows))
    drawn = axes_of(tmp_path, monkeypatch)
    norms, ratios = drawn["gradient_health"]
    points = {axis: [line(axis, color).tolist() for color in (plots.BLUE, plots.ORANGE)] for axis in (norms, ratios)}
    assert points[norms] == [[[1, 2], [128, 256]], [[1, 1], [128, 255]]]
    assert points[ratios] == [[[1, 1], [128, 128]], [[1, 4], [128, 131]]]
    (axis,) = drawn["slope"]
    np.testing.assert_allclose(line(axis, plots.ORANGE), [[0, 0], [0.1, 0.2]])


def test_missing_data_is_one_line_and_exit_2(tmp_path, capsys):
    assert program("plots", "figures", "--results", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("plots.py: ") and error.count("\n") == 1 and str(tmp_path) in error


@pytest.mark.parametrize("task, frames", [("pointmass", 5), ("navigation", 4), ("pusht", 5), ("franka", 3)])
def test_a_rollout_is_drawn_and_twice_the_same(task, frames, tmp_path, monkeypatch):
    original = envs.TASKS[task]
    monkeypatch.setitem(envs.TASKS, task, lambda dtype: original(dtype)._replace(episode_length=4))
    size, actions = envs.make(task, 1).observation_size, envs.make(task, 1).action_size
    policy = models.averaged(models.Actor(size, actions), 0.0)
    networks = {"policy": policy, "critic": models.Critic(size), "normalizer": models.Normalizer(size)}
    states = {name: network.state_dict() for name, network in networks.items()}
    states |= {"version": models.CHECKPOINT_VERSION, "algorithm": "apg", "args": {"env": task}}
    torch.save(states, tmp_path / "checkpoint.pt")
    plots.rollout(str(tmp_path))  # a run folder, pictures into it
    plots.rollout(str(tmp_path / "checkpoint.pt"), str(tmp_path / "new" / "again"))
    for picture in (tmp_path / f"rollout_{task}.png", tmp_path / f"rollout_{task}.gif"):
        assert picture.read_bytes() == (tmp_path / "new" / "again" / picture.name).read_bytes()
    with Image.open(picture) as film:  # frames in which nothing moves by a pixel are merged
        assert film.n_frames == frames and film.size == (400, 400) and min(film.convert("RGB").getpixel((0, 0))) > 250


def test_a_rollout_succeeds_where_the_score_says_so():
    env = envs.make("pointmass", 64, seed=5)
    policy = lambda observation: 3 * observation[:, 2:] - 0.6 * observation[:, 1:2]  # wobbly: some settle too late
    states, settled = plots.play(env, policy)
    assert 0 < (settled <= 100 - 9).mean() == envs.score(env, policy, seed=5)["success"] < 1
    for error, step in zip(np.abs(states[:, :, 0] - states[:, :, 2]), settled):
        assert (error[step:] < 0.02).all() and (step == 1 or error[step - 1] >= 0.02)


def test_the_arm_is_drawn_where_it_is():
    q = torch.tensor(envs.READY) + torch.linspace(-1, 1, 7)
    places, turns = plots.arm_frames(q.numpy())
    position, rotation = envs.franka_flange_pose(q[None])
    np.testing.assert_allclose(np.c_[turns[-1], places[-1]], np.c_[rotation[0], position[0]], atol=1e-5)
