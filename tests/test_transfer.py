"""Other simulators are asked what the task asks: same arm, same geometry, same commands. Skipped where they are missing."""

import numpy as np
import pytest
import torch

import envs
from benchmarks import transfer


def test_mujocos_arm_is_ours_and_a_delayed_command_moves_it_later():
    mujoco = pytest.importorskip("mujoco")
    torch.manual_seed(0)
    arm = mujoco.MjModel.from_xml_string(transfer.arm_xml())
    env = envs.make("franka", 4, dtype=torch.float64)
    q, qd, tau = env.state[:, :7], torch.randn(4, 7).double(), 10 * torch.rand(4, 7).double() - 5
    for i, qdd in enumerate(envs.franka_forward_dynamics(q, qd, tau)):
        data = mujoco.MjData(arm)
        data.qpos[:], data.qvel[:], data.ctrl[:] = q[i], qd[i], tau[i]
        mujoco.mj_forward(arm, data)
        assert np.allclose(data.qacc, qdd, rtol=1e-8, atol=1e-8)
    own, actions = env.dynamics, 2 * torch.rand(5, 4, 7).double() - 1
    for delay in (0, 20):  # ms; 20 is one control step
        env.dynamics, ours, theirs = own, [env.state], [env.state]
        mujocos = transfer.in_mujoco(env, transfer.arm_xml(), delay)
        for action in actions:
            ours.append(own(ours[-1], action)[0])
            theirs.append(mujocos(theirs[-1], action)[0])
        assert torch.equal(ours[-1][:, 14:], theirs[-1][:, 14:])  # targets, as commanded
        moved = (ours[5 - delay // 20] - env.state)[:, :7]
        assert ((theirs[-1] - env.state)[:, :7] - moved).norm() < 0.1 * moved.norm()


def test_gym_pushts_state_action_and_coverage_are_ours():
    pytest.importorskip("gym_pusht")
    game, env = transfer.make_games(1, seed=0)[0], envs.make("pusht", 1, dtype=torch.float64)
    game.reset(options={"reset_to_state": [306, 170, 256, 200, 0.0]})  # above one end of the bar, which lies above the stem
    read = lambda: torch.tensor([transfer.state_of(game)], dtype=torch.float64)
    start, action = read(), torch.tensor([[0.0, 0.4]]).double()
    ours = start
    for _ in range(10):
        *_, info = game.step(transfer.pusher_target(read(), action)[0])
        ours = env.dynamics(ours, action)[0]
        assert abs(info["coverage"] - env.task.measures["coverage"](env.observe(read())).item()) < 1e-6
        assert torch.allclose(read()[:, :4], ours[:, :4], atol=1e-6)  # the pusher
    moved, expected = (read() - start)[0, 4:7], (ours - start)[0, 4:7]  # both along y, and turned counter-clockwise
    assert (moved - expected).abs().max() < 0.03 and expected[1] > 0.05 and expected[2] > 0.3
