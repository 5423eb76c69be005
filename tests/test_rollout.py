"""Pictures of a policy at work are drawn for every task, the same each time; `watch` follows a run and ends with it."""

import json
import pathlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import apg
import envs
import plots
from models import Actor, Critic, Normalizer, save_checkpoint


def checkpoint(path, task, hidden=8, sizes=None):
    """An untrained policy for `task`; `sizes` for a checkpoint that does not fit it."""
    torch.manual_seed(0)
    observations, actions = sizes or (envs.make(task, 1).observation_size, envs.make(task, 1).action_size)
    modules = {
        "actor": Actor(observations, actions, hidden), "critic": Critic(observations, hidden), "normalizer": Normalizer(observations)
    }
    states = {name: module.state_dict() for name, module in modules.items()}
    save_checkpoint(path, dict(algorithm="apg", counters=(0,), args={"env": task, "hidden": hidden}, **states))
    return path


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["plots.py", *map(str, arguments)])
    plots.main()


@pytest.mark.parametrize("task", list(envs.TASKS))
def test_every_task_is_drawn_and_twice_the_same(task, tmp_path, monkeypatch):
    monkeypatch.setitem(envs.EPISODE_LENGTH, task, 12)  # all of it drawn, since nothing is reached so soon
    checkpoint(tmp_path / "checkpoint.pt", task)
    call(monkeypatch, "rollout", tmp_path)  # a run folder, pictures into it
    call(monkeypatch, "rollout", tmp_path / "checkpoint.pt", "--out", tmp_path / "new" / "again")
    strip, film = tmp_path / f"rollout_{task}.png", tmp_path / f"rollout_{task}.gif"
    for path in (strip, film):
        assert path.read_bytes() == (tmp_path / "new" / "again" / path.name).read_bytes()
    with Image.open(film) as image:
        assert image.n_frames == (7 if task == "franka" else 13) and image.size == (400, 400)
        pixels = []
        for k in (0, image.n_frames - 1):
            image.seek(k)
            pixels.append(np.asarray(image.convert("RGB")).astype(int))
    assert (pixels[0] != pixels[1]).any() and (pixels[0][0, 0] == 255).all()  # something moves, on white
    pixels.append(np.asarray(Image.open(strip).convert("RGB")).astype(int))
    assert pixels[2].shape[1] > 1000
    for picture in pixels:  # no half is blank
        for half in np.array_split(picture, 2, axis=1):
            assert len(np.unique(half.reshape(-1, 3), axis=0)) > 20


def test_an_episode_is_settled_when_it_stays_within_tolerance():
    within = np.array([[0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 1, 0], [1, 0, 0, 1]], bool)  # after steps 1, 2, 3, 4
    assert plots.settled_at(within).tolist() == [3, 1, 5, 4]


def test_pictures_of_the_readme_are_there_and_light():
    folder = pathlib.Path(plots.__file__).parent / "results" / "figures"
    for task in envs.TASKS:
        assert 20_000 < (folder / f"rollout_{task}.gif").stat().st_size < 800_000
        assert 20_000 < (folder / f"rollout_{task}.png").stat().st_size < 200_000


def test_arm_is_drawn_where_it_is():
    low, high = (
        torch.tensor([getattr(joint, bound) for joint in envs.FR3], dtype=torch.float64) for bound in ("lower", "upper")
    )
    q = low + (high - low) * torch.rand(16, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    position, rotation = envs.franka_flange_pose(q)
    places, turns = plots.fr3_frames(q.numpy())
    assert places.shape == (16, 8, 3) and turns.shape == (16, 8, 3, 3)
    np.testing.assert_allclose(places[:, -1], position, atol=1e-12)
    np.testing.assert_allclose(turns[:, -1], rotation, atol=1e-12)


@pytest.mark.parametrize("mistake", ["missing", "garbage", "wrong size", "unknown task", "no drawing", "out is a file"])
def test_mistakes_are_one_line_and_exit_2(mistake, tmp_path, monkeypatch, capsys):
    path, more = tmp_path / "checkpoint.pt", ()
    if mistake == "garbage":
        path.write_bytes(b"no checkpoint")
    elif mistake == "unknown task":
        checkpoint(path, "juggling", sizes=(3, 1))
    elif mistake != "missing":
        checkpoint(path, "pointmass", sizes=(4, 1) if mistake == "wrong size" else None)
    if mistake == "no drawing":
        monkeypatch.setattr(plots, "SCENES", {})
    if mistake == "out is a file":
        monkeypatch.setitem(envs.EPISODE_LENGTH, "pointmass", 2)
        more = ("--out", path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "rollout", path, *more)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("plots.py: ") and error.count("\n") == 1, error


def test_watch_follows_a_run_to_its_end(tmp_path, monkeypatch, capsys):
    row = lambda steps: ",".join(str(steps if name == "env_steps" else 0.5) for name in apg.METRICS) + "\n"
    write = lambda *lines: (tmp_path / "metrics.csv").write_text(",".join(apg.METRICS) + "\n" + "".join(lines))
    (tmp_path / "config.json").write_text(json.dumps({"total_env_steps": 1000}))
    write()
    contents, pictures = [[row(0)], [row(0)], [row(0), row(500)], [row(0), row(500), row(1024)]], []

    def sleep(seconds):  # what the run does meanwhile
        if (tmp_path / "watch.png").exists():
            pictures.append((tmp_path / "watch.png").read_bytes())
        write(*contents.pop(0))

    monkeypatch.setattr(plots.time, "sleep", sleep)
    call(monkeypatch, "watch", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{steps} of 1,000 steps: success 0.500" for steps in ("0", "500", "1,024")]
    assert contents == [] and pictures[0] == pictures[1] != pictures[2]
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "metrics.csv", "watch.png"}

    write(row(0))
    monkeypatch.setattr(plots.time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "watch", tmp_path)
    assert stop.value.code == 130
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "watch", tmp_path / "nowhere")
    assert stop.value.code == 2
