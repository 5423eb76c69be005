"""Pictures of a policy at work: every task is drawn, and the arm where it is."""

import numpy as np
import pytest
import torch
from PIL import Image

import envs
import models
import plots


@pytest.mark.parametrize("task", list(envs.TASKS))
def test_every_task_is_drawn(task, tmp_path, monkeypatch):
    monkeypatch.setitem(envs.EPISODE_LENGTH, task, 4)
    torch.manual_seed(0)
    env = envs.make(task, 1)
    networks = {
        "actor": models.Actor(env.observation_size, env.action_size, 8), "critic": models.Critic(env.observation_size, 8),
        "normalizer": models.Normalizer(env.observation_size),
    }  # fmt: skip
    states = {name: network.state_dict() for name, network in networks.items()}
    models.save_checkpoint(tmp_path / "checkpoint.pt", {"algorithm": "apg", "args": {"env": task, "hidden": 8}, **states})
    plots.rollout(str(tmp_path))
    with Image.open(tmp_path / f"rollout_{task}.gif") as image:
        first = np.asarray(image.convert("RGB"))
        image.seek(image.n_frames - 1)
        assert (first != np.asarray(image.convert("RGB"))).any()  # something moves
    strip = np.asarray(Image.open(tmp_path / f"rollout_{task}.png").convert("RGB"))
    for half in np.array_split(strip, 2, axis=1):
        assert len(np.unique(half.reshape(-1, 3), axis=0)) > 20  # neither is blank


def test_an_episode_is_reached_when_it_stays_within_tolerance():
    """Of three masses one is at its target, one coasts towards it from 0.05 m, one coasts through it."""
    env = envs.make("pointmass", 3)
    env.state = torch.tensor([[0.0, 0.0, 0.0], [-0.05, 0.025 / 0.975, 0.0], [-0.1, 0.5, 0.0]])
    _, reached = plots.play(env, lambda observation: torch.zeros(3, 1))
    left = 0.05 * 0.975 ** np.arange(200)  # damping takes 2.5 % of the speed a step
    assert reached.tolist() == [1, int((left >= 0.02).sum()), env.episode_length + 1]


def test_arm_is_drawn_where_it_is():
    q = torch.rand(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    position, rotation = envs.franka_flange_pose(q[None])
    places, turns = plots.arm_frames(q.numpy())
    np.testing.assert_allclose(places[-1], position[0], atol=1e-12)
    np.testing.assert_allclose(turns[-1], rotation[0], atol=1e-12)
