"""Trajectory optimization without learning: move four arms to target poses by gradient descent on their actions.

    python benchmarks/plan.py

Needs only envs.py and bridge.py.
"""

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # not needed in a script next to envs.py
import envs

arm = envs.make("franka", num_envs=4)  # random starts and targets
plan = torch.zeros(150, 4, 7, requires_grad=True)  # 3 s of actions, before squashing
optimizer = torch.optim.Adam([plan], lr=0.06)
for _ in range(120):
    state, total_reward = arm.state, 0.0
    for action in plan.tanh():
        state, observation, reward = arm.dynamics(state, action)
        total_reward = total_reward + reward.sum()
    optimizer.zero_grad()
    (-total_reward).backward()
    optimizer.step()
errors = arm.task.errors(observation.detach(), state)  # flange position (m) and angle (rad)
print(errors)
