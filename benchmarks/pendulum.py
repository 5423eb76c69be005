"""How to add a task: swing up a pendulum with a motor half as strong as gravity. Copy this file and change it.

    python benchmarks/pendulum.py --env pendulum
"""

import functools
import pathlib
import sys

import torch
import warp as wp

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # not needed in a script next to apg.py
import apg
import envs
import models
from bridge import WarpFunction

@functools.cache
def pendulum(dtype):
    real = wp.dtype_from_torch(dtype)
    vec1, vec2, vec3 = (wp.types.vector(size, real) for size in (1, 2, 3))
    dt, gravity, motor, one = real(0.05), real(10.0), real(5.0), real(1.0)  # s; torques over inertia, 1/s^2
    clamp = envs.clamp  # wp.clamp would turn NaN into -1 and hide it

    @wp.func
    def observe(s: vec2):
        return vec3(wp.sin(s[0]), wp.cos(s[0]), s[1])

    @wp.kernel(module="unique")
    def pendulum_step(
        state: wp.array(dtype=vec2), action: wp.array(dtype=vec1),
        next_state: wp.array(dtype=vec2), observation: wp.array(dtype=vec3), reward: wp.array(dtype=real),
    ):  # fmt: skip
        i = wp.tid()
        s = state[i]
        a = clamp(action[i][0], -one, one)
        velocity = s[1] + dt * (gravity * wp.sin(s[0]) + motor * a)  # semi-implicit Euler
        s_next = vec2(s[0] + dt * velocity, velocity)
        next_state[i] = s_next
        observation[i] = observe(s_next)
        reward[i] = wp.cos(s_next[0]) - one - real(0.01) * velocity * velocity

    return envs.Task(
        observation_size=3, action_size=1, state_size=2, episode_length=128, control_dt=0.05,
        step=WarpFunction(pendulum_step, num_outputs=3),
        observe=envs.observation_function(observe, vec2, vec3),
        start_noise=2, start=lambda noise: (2 * noise - 1) * noise.new_tensor([3.14, 1.0]),
        errors=lambda observation, state: {"angle_error": torch.atan2(observation[:, 0], observation[:, 1]).abs()},
        tolerances={"angle_error": 0.1},
    )

envs.TASKS["pendulum"] = pendulum
apg.TUNED["pendulum"] = dict(total_env_steps=300_000, num_envs=32, learning_rate=1e-3, gamma=0.98)

if __name__ == "__main__":
    models.command(apg.main)
