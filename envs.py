"""Differentiable control tasks as NVIDIA Warp kernels, behind one small class.

    env = envs.make("franka", num_envs=256, device="cpu", seed=1)
    observation, info = env.reset()                                          # [N, O]
    observation, reward, terminated, truncated, info = env.step(action)      # action [N, A] in [-1, 1]
    reward.mean().backward()                                                 # through the physics

Each task is one section below: its constants, one fused kernel per control step (all substeps inside, one thread per
environment), how an episode starts, and what counts as success. Quantities are SI: m, kg, s, rad, N.
Kernels are made per floating-point type, so that gradients can be checked in float64 with the very same code.
"""

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import warp as wp

from bridge import WarpFunction

wp.config.log_level = wp.LOG_WARNING  # Warp reports every module load otherwise; `compiling` below tells the user instead
wp.config.optimization_level = 3  # on CPU the default is 2; the arm's kernels run 7% faster, to the same bits

SETTLE_STEPS = 10  # an episode is a success when the errors are within tolerance at each of its last 10 steps
EVALUATION_SEED = 90_001  # every policy is scored on the same initial states


class UserError(ValueError):
    """An error that the user can fix, described in one line; the programs print it without a traceback."""


class Task(NamedTuple):
    """What `Env` needs to know of a task."""

    observation_size: int
    action_size: int
    state_size: int
    episode_length: int  # T, control steps
    control_dt: float  # s
    step: Callable  # (state [N, S], action [N, A]) -> next_state [N, S], observation [N, O], reward [N]
    observe: Callable  # state [N, S] -> observation [N, O]
    start_noise: int  # how many uniform numbers an initial state takes
    start: Callable  # uniform numbers in [0, 1) [N, start_noise] -> state [N, S]
    errors: Callable  # (observation [N, O], state [N, S]) -> {name: [N]}, physical units
    tolerances: dict  # {name: error below which counts as success}
    measures: dict = {}  # {name: observation [N, O] -> [N]}, further metrics of an episode's end


@wp.func
def fine(x: Any, scale: Any):
    """Smooth squashing to (-1, 1), about x / scale for small x, so that small errors stay distinguishable."""
    return x / wp.sqrt(x * x + scale * scale)


@wp.func
def clamp(x: Any, low: Any, high: Any):
    """wp.clamp that propagates NaN; wp.clamp itself returns the lower bound, which would hide a failure."""
    return wp.where(wp.isnan(x), x, wp.clamp(x, low, high))


def observation_function(observe: wp.Function, state_type: type, observation_type: type) -> WarpFunction:
    """`observe`, a Warp function of one environment's state, as a torch function: state [N, S] -> observation [N, O]."""

    @wp.kernel(module="unique")
    def observation_kernel(state: wp.array(dtype=state_type), observation: wp.array(dtype=observation_type)):
        i = wp.tid()
        observation[i] = observe(state[i])

    return WarpFunction(observation_kernel)


class Env:
    """N environments of one task, stepped together. Make it with `envs.make`.

    num_envs N, observation_size O, action_size A, state_size S, episode_length T (control steps), control_dt (s).
    state     [N, S], assignable. Differentiable: steps are recorded when `state` or the action requires grad.
    elapsed   [N] int64, control steps since each environment's reset; assignable, to spread the episodes' phases.
    Episodes are only ever truncated, by the time limit or a reward that is NaN or -inf: `terminated` is always False.
    """

    def __init__(self, name: str, num_envs: int, device: str, seed: int, dtype: torch.dtype):
        self.name, self.num_envs, self.device, self.dtype = name, num_envs, torch.device(device), dtype
        self.task = TASKS[name](dtype)
        self.observation_size, self.action_size = self.task.observation_size, self.task.action_size
        self.state_size, self.control_dt = self.task.state_size, self.task.control_dt
        self.episode_length = self.task.episode_length
        self.generator = torch.Generator(self.device)
        self.reset(seed)
        with torch.no_grad():  # compiles and loads the step kernel and its adjoint now, not in the first step
            self.dynamics(self.state, torch.zeros(num_envs, self.action_size, dtype=dtype, device=self.device))

    def reset(self, seed: int | None = None) -> tuple[torch.Tensor, dict]:
        """Start every environment anew. Returns observation [N, O] and an empty info."""
        if seed is not None:
            self.generator.manual_seed(seed)
        self.state, self.fresh, self.steps = self._start(), self._start(), 0
        self.elapsed = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)
        return self.observe(self.state), {}

    def step(self, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, dict]:
        """One control step. action [N, A], clipped to [-1, 1].

        Returns observation [N, O], reward [N], terminated [N] bool, truncated [N] bool, info. Finished environments
        start anew in the same step (Gymnasium's SAME_STEP autoreset): the observation is then the new episode's first
        and carries no gradient, while info["final_obs"] [N, O] is what the step led to, differentiable, in every
        environment.
        """
        self.state, final_observation, reward = self.dynamics(self.state, action)
        self.elapsed, self.steps = self.elapsed + 1, self.steps + 1
        truncated = ~((self.elapsed < self.episode_length) & (reward.detach() > -math.inf))  # also catches NaN
        observation = final_observation
        if self.device.type == "cuda" or truncated.any():  # on a GPU, `any()` would wait for it in every step
            ended = truncated[:, None]
            self.state = torch.where(ended, self.fresh, self.state)
            observation = torch.where(ended, self.observe(self.fresh), final_observation)
            self.elapsed = torch.where(truncated, 0, self.elapsed)
        if self.steps % self.episode_length == 0:  # for the next T steps, in which each environment ends once
            self.fresh = self._start()
        return observation, reward, torch.zeros_like(truncated), truncated, {"final_obs": final_observation}

    def dynamics(self, state: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x' = f(x, a), o' = h(x'), r = r(x, a, x'): pure and differentiable in state [N, S] and action [N, A]."""
        return self.task.step(state, action)  # eq. (1)

    def observe(self, state: torch.Tensor) -> torch.Tensor:
        """o = h(x): observation [N, O] of state [N, S], differentiable."""
        return self.task.observe(state)

    def detach(self) -> None:
        """Cut the graph: the gradient of later steps does not reach earlier ones."""
        self.state = self.state.detach()

    def state_dict(self) -> dict:
        """All that the next steps depend on, for a checkpoint."""
        tensors = {"state": self.state.detach(), "fresh": self.fresh, "elapsed": self.elapsed}
        return {**tensors, "steps": self.steps, "generator": self.generator.get_state()}

    def load_state_dict(self, saved: dict) -> None:
        """Continue where `state_dict` was taken."""
        self.state, self.fresh = (saved[name].to(self.device, self.dtype) for name in ("state", "fresh"))
        self.elapsed, self.steps = saved["elapsed"].to(self.device), saved["steps"]
        self.generator.set_state(saved["generator"])

    def _start(self):
        shape = (self.num_envs, self.task.start_noise)
        noise = torch.rand(shape, generator=self.generator, device=self.device, dtype=self.dtype)
        with torch.no_grad():
            return self.task.start(noise)


def make(name: str, num_envs: int, device: str = "cpu", seed: int = 1, dtype: torch.dtype = torch.float32) -> Env:
    """Make N environments of task `name` (see TASKS). Raises UserError, in one line, on a bad argument."""
    if name not in TASKS:
        raise UserError(f"unknown env '{name}': choose from {', '.join(TASKS)}")
    if num_envs < 1:
        raise UserError(f"num_envs must be at least 1, got {num_envs}")
    wp.init()
    try:
        wp.device_from_torch(torch.zeros(1, device=device).device)
    except (RuntimeError, AssertionError, IndexError, ValueError) as error:  # torch's and Warp's answers differ by build
        raise UserError(f"device '{device}' is not usable: {str(error).splitlines()[0]}") from error
    with compiling(f"the {name} kernels"):
        return Env(name, num_envs, device, seed, dtype)


@contextlib.contextmanager
def compiling(what: str) -> Iterator[None]:
    """Tell the user that a long wait is a compilation (first use on a machine; cached afterwards)."""
    words = f"compiling {what} (first use on this machine, then cached) ..."
    notice = threading.Timer(1.0, print, [words], {"flush": True})
    notice.start()
    try:
        yield
    finally:
        notice.cancel()


# ------------------------------------------------------------------------------------------------------------ pointmass
# A mass on a line, pushed by a force and slowed by viscous damping: reach the target and stop there.
# State (x, v, target), observation (x, v, target - x), action: force over POINT_FORCE.

POINT_MASS, POINT_DAMPING, POINT_FORCE = 1.0, 0.5, 2.0  # kg, N s/m, N
POINT_DT = 0.05  # s; one substep a control step: the dynamics are linear


@functools.cache
def pointmass(dtype: torch.dtype) -> Task:
    real = wp.dtype_from_torch(dtype)
    vec1, vec3 = wp.types.vector(1, real), wp.types.vector(3, real)
    dt, damping, force = real(POINT_DT), real(POINT_DAMPING / POINT_MASS), real(POINT_FORCE / POINT_MASS)
    width, effort = real(0.02), real(0.01)

    @wp.func
    def observe(s: vec3):
        return vec3(s[0], s[1], s[2] - s[0])

    @wp.kernel(module="unique")
    def pointmass_step(
        state: wp.array(dtype=vec3), action: wp.array(dtype=vec1), next_state: wp.array(dtype=vec3),
        observation: wp.array(dtype=vec3), reward: wp.array(dtype=real),
    ):  # fmt: skip
        i = wp.tid()
        s = state[i]
        a = clamp(action[i][0], real(-1.0), real(1.0))
        v = s[1] + dt * (force * a - damping * s[1])  # semi-implicit Euler
        x = s[0] + dt * v
        s_next = vec3(x, v, s[2])
        next_state[i] = s_next
        observation[i] = observe(s_next)
        reward[i] = width - wp.sqrt((s[2] - x) * (s[2] - x) + width * width) - effort * a * a

    def start(noise):
        x, target = 2 * noise[:, 0] - 1, 2 * noise[:, 1] - 1
        return torch.stack([x, torch.zeros_like(x), target], 1)

    return Task(
        observation_size=3, action_size=1, state_size=3, episode_length=100, control_dt=POINT_DT,
        step=WarpFunction(pointmass_step, num_outputs=3),
        observe=observation_function(observe, vec3, vec3),
        start_noise=2, start=start,
        errors=lambda observation, state: {"position_error": observation[:, 2].abs()},
        tolerances={"position_error": 0.02},
    )


# ----------------------------------------------------------------------------------------------------------- navigation
# A disc that accelerates in the plane, among round obstacles that are placed anew in every episode: reach the goal and stop
# there without ever touching one. Obstacles are not solid: the disc can pass through them, but then the episode fails.
# State: position, velocity, goal, smallest clearance so far, then x, y, radius of each obstacle.
# Observation: goal - position, velocity; of each obstacle its centre - position, radius and clearance; then goal - position
# and clearances again, squashed so as to tell small ones apart, and how far each obstacle's centre lies to the left of the
# straight line to the goal, squashed too: it decides on which side to pass.
# Action: acceleration over NAVIGATION_ACCELERATION, along x and y.

NAVIGATION_DT, AGENT_RADIUS = 0.05, 0.05  # s, one substep a control step; m
OBSTACLES = 6  # the layout below is made for six
NAVIGATION_ACCELERATION, NAVIGATION_SPEED = 2.0, 1.0  # m/s^2, m/s; maximum and, under drag, terminal speed per axis
PENALTY, PENALTY_REACH = 2.0, 0.03  # per step and obstacle: PENALTY softplus(-clearance / PENALTY_REACH); m
# Layout, in a frame turned at random: from start (-d, 0) to goal (d, 0), and across the way two columns of three
# obstacles each, SPACING apart. A column is shifted sideways by up to COLUMN_SHIFT, and each obstacle by up to JITTER
# both ways. Every gap stays wider than SPACING - 2 JITTER - 2 largest radius = 0.2 m, twice the disc's diameter, and
# start and goal keep at least 0.75 - (0.3 + JITTER) - largest radius - AGENT_RADIUS = 0.2 m clear.
HALF_WAY, RADII = (0.75, 0.9), (0.1, 0.16)  # m; d and obstacle radius are uniform in these
SPACING, COLUMN_SHIFT, JITTER = 0.6, 0.25, 0.04  # m


@functools.cache
def navigation(dtype: torch.dtype) -> Task:
    real = wp.dtype_from_torch(dtype)
    vec2, vec25, vec42 = (wp.types.vector(size, real) for size in (2, 7 + 3 * OBSTACLES, 6 + 6 * OBSTACLES))
    zero, one = real(0.0), real(1.0)
    dt, thrust, drag = real(NAVIGATION_DT), real(NAVIGATION_ACCELERATION), real(NAVIGATION_ACCELERATION / NAVIGATION_SPEED)
    agent_radius, near, beside = real(AGENT_RADIUS), real(0.05), real(0.1)  # m
    penalty, reach, width, effort = real(PENALTY), real(PENALTY_REACH), real(0.02), real(0.01)
    goal, smallest, obstacle = 4, 6, 7  # places in the state, after position and velocity
    seen, fine_goal, fine_gap, fine_side = 4, 28, 30, 36  # in the observation, after the offset to the goal and velocity

    @wp.func
    def clearance(s: vec25, k: int):
        dx, dy = s[obstacle + 3 * k] - s[0], s[obstacle + 3 * k + 1] - s[1]
        return wp.sqrt(dx * dx + dy * dy + real(1.0e-12)) - s[obstacle + 3 * k + 2] - agent_radius

    @wp.func
    def lateral_offset(s: vec25, k: int):
        gx, gy = s[goal] - s[0], s[wp.static(goal + 1)] - s[1]
        dx, dy = s[obstacle + 3 * k] - s[0], s[obstacle + 3 * k + 1] - s[1]
        return (gx * dy - gy * dx) / wp.sqrt(gx * gx + gy * gy + real(0.01))

    @wp.func
    def observe(s: vec25):
        o = vec42()
        o[0] = s[goal] - s[0]
        o[1] = s[wp.static(goal + 1)] - s[1]
        o[2] = s[2]
        o[3] = s[3]
        for k in range(OBSTACLES):
            o[wp.static(seen + 4 * k)] = s[wp.static(obstacle + 3 * k)] - s[0]
            o[wp.static(seen + 4 * k + 1)] = s[wp.static(obstacle + 3 * k + 1)] - s[1]
            o[wp.static(seen + 4 * k + 2)] = s[wp.static(obstacle + 3 * k + 2)]
            o[wp.static(seen + 4 * k + 3)] = clearance(s, k)
            o[wp.static(fine_gap + k)] = fine(clearance(s, k), near)
            o[wp.static(fine_side + k)] = fine(lateral_offset(s, k), beside)
        o[fine_goal] = fine(s[goal] - s[0], near)
        o[wp.static(fine_goal + 1)] = fine(s[wp.static(goal + 1)] - s[1], near)
        return o

    @wp.kernel(module="unique")
    def navigation_step(
        state: wp.array(dtype=vec25), action: wp.array(dtype=vec2), next_state: wp.array(dtype=vec25),
        observation: wp.array(dtype=vec42), reward: wp.array(dtype=real),
    ):  # fmt: skip
        i = wp.tid()
        s = state[i]
        ax, ay = clamp(action[i][0], -one, one), clamp(action[i][1], -one, one)
        vx = s[2] + dt * (thrust * ax - drag * s[2])  # semi-implicit Euler
        vy = s[3] + dt * (thrust * ay - drag * s[3])
        change = vec25()
        change[0] = dt * vx
        change[1] = dt * vy
        change[2] = vx - s[2]
        change[3] = vy - s[3]
        moved = s + change  # the new state, all but the smallest clearance
        o = observe(moved)
        closest, penalty_sum = s[smallest], zero
        for k in range(OBSTACLES):
            gap = o[wp.static(seen + 4 * k + 3)]
            closest = wp.min(closest, gap)
            penalty_sum += wp.log(one + wp.exp(-gap / reach))  # softplus; no overflow, as gap > -0.21 m
        clearance_change = vec25()
        clearance_change[smallest] = closest - s[smallest]
        next_state[i] = moved + clearance_change
        observation[i] = o
        distance2 = o[0] * o[0] + o[1] * o[1]
        reward[i] = width - wp.sqrt(distance2 + width * width) - penalty * penalty_sum - effort * (ax * ax + ay * ay)

    def start(noise):
        between = lambda u, low, high: low + (high - low) * u
        turn, half_way = 2 * math.pi * noise[:, 0], between(noise[:, 1], *HALF_WAY)
        ahead = torch.stack([turn.cos(), turn.sin()], 1)  # [N, 2], from start to goal
        aside = torch.stack([-ahead[:, 1], ahead[:, 0]], 1)
        centre = between(noise[:, 2:4], -0.1, 0.1)
        shift = between(noise[:, 4:6], -COLUMN_SHIFT, COLUMN_SHIFT).repeat_interleave(3, 1)  # [N, 6]
        columns, rows = (-0.5, -0.5, -0.5, 0.5, 0.5, 0.5), (-1, 0, 1, -1, 0, 1)
        columns, rows = noise.new_tensor(columns), noise.new_tensor(rows)
        along = SPACING * columns + between(noise[:, 6:12], -JITTER, JITTER)
        across = SPACING * rows + shift + between(noise[:, 12:18], -JITTER, JITTER)
        radius = between(noise[:, 18:24], *RADII)
        place = centre[:, None] + along[..., None] * ahead[:, None] + across[..., None] * aside[:, None]  # [N, 6, 2]
        way = half_way[:, None] * ahead
        obstacles = torch.cat([place, radius[..., None]], 2).flatten(1)
        never = torch.full_like(noise[:, :1], 10.0)  # m; no clearance is larger
        return torch.cat([centre - way, torch.zeros_like(way), centre + way, never, obstacles], 1)

    return Task(
        observation_size=6 + 6 * OBSTACLES, action_size=2, state_size=7 + 3 * OBSTACLES,
        episode_length=128, control_dt=NAVIGATION_DT,
        step=WarpFunction(navigation_step, num_outputs=3),
        observe=observation_function(observe, vec25, vec42),
        start_noise=24, start=start,
        errors=lambda observation, state: {
            "position_error": observation[:, :2].norm(dim=1),
            "contact_depth": -state[:, smallest],  # m, the deepest in this episode; negative: nothing was touched
        },
        tolerances={"position_error": 0.05, "contact_depth": 0.0},
    )


# ---------------------------------------------------------------------------------------------------------------- pusht
# Push-T: push a T-shaped block over a table to a goal pose with a round pusher. Geometry, scale, timing, pusher and goal
# are those of gym-pusht (huggingface/gym-pusht, gym_pusht/envs/pusht.py), whose workspace of 512 pixels is our 1 m:
# divide its lengths by 512; angles are the same. Its block position is the middle of the bar's outer edge, ours the centre
# of mass: ours = its + BLOCK_CENTRE * (-sin angle, cos angle). The action is a displacement: the pusher's target is where
# the pusher is + PUSHER_REACH * action, clipped to the workspace; that target times 512 is the benchmark's action.
#
# As in gym-pusht, the block does not push the pusher back; the block's velocity is zeroed every 10 ms (gym-pusht sets
# pymunk's damping to 0), so it moves only while pushed; and contact is rigid and frictionless (gym-pusht sets `friction` on
# bodies, where pymunk ignores it). Each physics step therefore moves the block just clear of the pusher, along the contact
# normal. Only the onset is smoothed, within CONTACT_SOFTNESS on either side of first touch: the contact point moves by a
# fraction (0 to 1) of the pusher's motion, so there is no contact stiffness that could make gradients explode.
# Bar and stem are two boxes that push one after the other: a disc in the inner corner touches both.
# State: pusher position, velocity; block's centre of mass, angle.
# Observation: pusher position - workspace centre, pusher velocity; block position - goal position, cosine and sine of
# (angle - goal angle); then in the block's frame pusher position and goal position; gap between pusher and block; then
# goal position, angle error and gap again, squashed so as to tell small errors apart.

PUSHT_DT, PUSHT_SUBSTEPS = 0.1, 10  # s; control step, and physics steps in it
UNIT = 30 / 512  # m; the T is a bar 4 x 1 and a stem 1 x 3 of these
PUSHER_RADIUS, PUSHER_REACH = 0.5 * UNIT, 0.1  # m; m a control step at action 1, a steady 0.5 m/s
PUSHER_STIFFNESS, PUSHER_DAMPING = 100.0, 20.0  # 1/s^2, 1/s
# The benchmark's centre of mass and inertia, which are not quite those of a uniform T (1.36 units, 2.15 units^2): the mean
# of bar's and stem's centres, and twice the bar's moment about the middle of its outer edge.
BLOCK_CENTRE = 1.5 * UNIT  # m, from the bar's outer edge
BLOCK_GYRATION2 = 10 / 3 * UNIT**2  # m^2, inertia over mass
BOXES = (  # centre and half size, m, about the centre of mass
    ((0.0, 0.5 * UNIT - BLOCK_CENTRE), (2 * UNIT, 0.5 * UNIT)),  # bar
    ((0.0, 2.5 * UNIT - BLOCK_CENTRE), (0.5 * UNIT, 1.5 * UNIT)),  # stem
)
BLOCK_OUTLINE = tuple(  # corners, m, about the centre of mass, counter-clockwise
    (x * UNIT, y * UNIT - BLOCK_CENTRE)
    for x, y in ((-2, 0), (2, 0), (2, 1), (0.5, 1), (0.5, 4), (-0.5, 4), (-0.5, 1), (-2, 1))
)
GOAL_ANGLE = math.pi / 4  # the middle of the bar's outer edge is at the workspace's centre
GOAL = (0.5 - BLOCK_CENTRE * math.sin(GOAL_ANGLE), 0.5 + BLOCK_CENTRE * math.cos(GOAL_ANGLE))  # m, of the centre of mass
CONTACT_SOFTNESS = 0.003  # m; the block is moved from this gap on, and fully from this overlap on
# Instead of walls, a rim keeps the block within reach: within RIM of the workspace's edge, the block's centre of mass
# drifts back inside at RIM_SPEED. Walls would not work: the pusher feels no force and would press the block into them.
RIM, RIM_SPEED, RIM_SOFTNESS = 0.15, 0.1, 0.02  # m, m/s, m
START_GAP = 0.015  # m, at least, between pusher and block at the start
LEVER = 2.4 * UNIT  # m; how far out the T's six convex corners lie (root mean square): what a radian is worth in metres


@functools.cache
def pusht(dtype: torch.dtype) -> Task:
    real = wp.dtype_from_torch(dtype)
    vec2, vec3 = wp.types.vector(2, real), wp.types.vector(3, real)
    vec7, vec17 = wp.types.vector(7, real), wp.types.vector(17, real)
    zero, half, one = real(0.0), real(0.5), real(1.0)
    h, near, slight = real(PUSHT_DT / PUSHT_SUBSTEPS), real(0.03), real(0.2)  # s, m, rad
    pusher_stiffness, pusher_damping = real(PUSHER_STIFFNESS), real(PUSHER_DAMPING)
    radius, reach = real(PUSHER_RADIUS), real(PUSHER_REACH)
    (bar, bar_half), (stem, stem_half) = [(vec2(*centre), vec2(*size)) for centre, size in BOXES]
    gyration2, softness, softness4 = real(BLOCK_GYRATION2), real(CONTACT_SOFTNESS), real(4 * CONTACT_SOFTNESS)
    rim, rim_softness, rim_step = real(RIM), real(RIM_SOFTNESS), real(0.5 * RIM_SPEED * PUSHT_DT / PUSHT_SUBSTEPS)
    goal, goal_cos, goal_sin = vec2(*GOAL), real(math.cos(GOAL_ANGLE)), real(math.sin(GOAL_ANGLE))
    width, lever2, near_goal, approach, effort = real(0.01), real(LEVER**2), real(0.1), real(0.05), real(0.0005)
    block, turn = 4, 6  # places in the state, after the pusher's position and velocity
    block_error, cos_error, sin_error, gap_seen = 4, 6, 7, 12  # in the observation

    @wp.func
    def turn_back(c: real, s: real, v: vec2):
        """World to block frame."""
        return vec2(c * v[0] + s * v[1], c * v[1] - s * v[0])

    @wp.func
    def box_distance(p: vec2, size: vec2):
        """Distance of p to a box centred at 0, and its gradient; both zero inside, where the disc's centre never gets."""
        ox, oy = wp.max(wp.abs(p[0]) - size[0], zero), wp.max(wp.abs(p[1]) - size[1], zero)
        distance = wp.sqrt(ox * ox + oy * oy + real(1.0e-14))
        return distance, vec2(wp.sign(p[0]) * (ox / distance), wp.sign(p[1]) * (oy / distance))

    @wp.func
    def push(p: vec2, moved: vec3, centre: vec2, size: vec2):
        """What the disc at p adds to the block's displacement in this step (x, y, angle), all in the block's frame."""
        distance, n = box_distance(p - centre, size)
        r = p - distance * n  # the box's nearest point
        lever = r[0] * n[1] - r[1] * n[0]
        overlap = radius - distance + n[0] * moved[0] + n[1] * moved[1] + lever * moved[2]
        # A smoothed max(0, overlap): a parabola within +- softness.
        ramp = wp.clamp(overlap + softness, zero, softness + softness)
        depth = ramp * ramp / softness4 + wp.max(overlap - softness, zero)
        share = depth / (one + lever * lever / gyration2)  # so that the nearest point moves by depth
        return -share * vec3(n[0], n[1], lever / gyration2)

    @wp.func
    def carry(x: real):
        return rim_step * (wp.tanh((rim - x) / rim_softness) - wp.tanh((x - one + rim) / rim_softness))

    @wp.func
    def observe(s: vec7):
        c, d = wp.cos(s[turn]), wp.sin(s[turn])
        position = vec2(s[block], s[block + 1])
        pusher = turn_back(c, d, vec2(s[0], s[1]) - position)
        to_goal = turn_back(c, d, goal - position)
        to_bar, _n_bar = box_distance(pusher - bar, bar_half)
        to_stem, _n_stem = box_distance(pusher - stem, stem_half)
        gap = wp.min(to_bar, to_stem) - radius
        return vec17(
            s[0] - half, s[1] - half, s[2], s[3],
            s[block] - goal[0], s[block + 1] - goal[1], c * goal_cos + d * goal_sin, d * goal_cos - c * goal_sin,
            pusher[0], pusher[1], to_goal[0], to_goal[1], gap,
            fine(to_goal[0], near), fine(to_goal[1], near), fine(d * goal_cos - c * goal_sin, slight), fine(gap, near),
        )  # fmt: skip

    @wp.kernel(module="unique")
    def pusht_step(
        state: wp.array(dtype=vec7), action: wp.array(dtype=vec2), substeps: int, next_state: wp.array(dtype=vec7),
        observation: wp.array(dtype=vec17), reward: wp.array(dtype=real), motion: wp.array2d(dtype=vec7),
    ):  # fmt: skip
        i = wp.tid()
        start = state[i]
        ax, ay = clamp(action[i][0], -one, one), clamp(action[i][1], -one, one)
        target = vec2(clamp(start[0] + reach * ax, zero, one), clamp(start[1] + reach * ay, zero, one))
        motion[i, 0] = start
        # A run-time bound keeps the loop rolled; its state is in an array, so its adjoint is right.
        for n in range(substeps):
            s = motion[i, n]
            # The pusher, as in the benchmark: semi-implicit Euler of a critically damped spring to the target.
            p, pv = vec2(s[0], s[1]), vec2(s[2], s[3])
            pv_next = pv + h * (pusher_stiffness * (target - p) - pusher_damping * pv)
            p_next = p + h * pv_next
            # The block: carried by the rim, then moved clear of the pusher by bar and by stem, in its own frame.
            x = vec2(s[block], s[block + 1])
            c, d = wp.cos(s[turn]), wp.sin(s[turn])
            pusher = turn_back(c, d, p_next - x)
            carried = turn_back(c, d, vec2(carry(x[0]), carry(x[1])))
            moved = vec3(carried[0], carried[1], zero)
            moved += push(pusher, moved, bar, bar_half)
            moved += push(pusher, moved, stem, stem_half)
            x_next = x + turn_back(c, -d, vec2(moved[0], moved[1]))
            motion[i, n + 1] = vec7(p_next[0], p_next[1], pv_next[0], pv_next[1], x_next[0], x_next[1], s[turn] + moved[2])
        end = motion[i, substeps]
        o = observe(end)
        next_state[i] = end
        observation[i] = o
        # Mean squared distance of points LEVER away from the centre of mass to where they should be.
        dx, dy = o[block_error], o[wp.static(block_error + 1)]
        distance2 = dx * dx + dy * dy + real(2.0) * lever2 * (one - o[cos_error])
        distance = wp.sqrt(distance2 + real(1.0e-8))
        away = wp.sqrt(o[gap_seen] * o[gap_seen] + width * width) - width
        # The second term is steep near the goal: otherwise the last millimetres are not worth a detour round the block.
        reward[i] = -distance - near_goal * fine(distance, width) - approach * away - effort * (ax * ax + ay * ay)

    step = WarpFunction(pusht_step, num_outputs=4, shapes={"motion": (..., PUSHT_SUBSTEPS + 1)})
    observe_torch = observation_function(observe, vec7, vec17)

    def start(noise):
        block = 0.2 + 0.6 * noise[:, :2]
        angle = math.pi * (2 * noise[:, 2:3] - 1)
        # The pusher is at the first of eight random places that is clear of the block. A place is so nine times in ten.
        places = 0.1 + 0.8 * noise[:, 3:].unflatten(1, (8, 2))  # [N, 8, 2]
        states = torch.cat([torch.zeros_like(noise[:, :4]), block, angle], 1)[:, None].repeat(1, 8, 1)  # [N, 8, 7]
        states[..., :2] = places
        gap = observe_torch(states.flatten(0, 1))[:, gap_seen].unflatten(0, (-1, 8))
        first = (gap > START_GAP).int().argmax(1)  # the first of equal ones
        return states[torch.arange(len(noise), device=noise.device), first]

    def errors(observation, state):
        angle = torch.atan2(observation[:, sin_error], observation[:, cos_error])
        return {"position_error": observation[:, block_error : block_error + 2].norm(dim=1), "angle_error": angle.abs()}

    return Task(
        observation_size=17, action_size=2, state_size=7, episode_length=128, control_dt=PUSHT_DT,
        step=lambda state, action: step(state, action, PUSHT_SUBSTEPS)[:3],
        observe=observe_torch,
        start_noise=19, start=start,
        errors=errors, tolerances={"position_error": 0.02, "angle_error": 0.1},
        measures={"coverage": pusht_coverage},
    )


def pusht_coverage(observation: torch.Tensor) -> torch.Tensor:
    """Push-T's measure of success: area of the block over the goal, divided by the goal's area. Exact; no gradient.

    observation [N, 17]. Returns [N] in [0, 1]. In the goal's frame the goal is two axis-aligned boxes. The block's overlap
    with a box is a line integral along the block's outline: over the x-range of the box, of the outline's height above the
    box's floor, clamped to the box's height.
    """
    seen, c, s = observation.detach().double(), math.cos(GOAL_ANGLE), math.sin(GOAL_ANGLE)
    dx, dy, cos, sin = (seen[:, 4:8, None] / seen.new_tensor([[UNIT], [UNIT], [1], [1]])).unbind(1)  # [N, 1]
    corner_x, corner_y = (seen.new_tensor(BLOCK_OUTLINE) / UNIT).T
    x = corner_x * cos - corner_y * sin + c * dx + s * dy  # [N, 8], in the goal's frame
    y = corner_x * sin + corner_y * cos + c * dy - s * dx
    x_end, y_end = x.roll(-1, 1), y.roll(-1, 1)  # [N, 8]: each edge runs from (x, y) to (x_end, y_end)
    flat = lambda a, b: torch.where((a - b).abs() < 1e-9, 1.0, b - a)  # a divisor
    area = torch.zeros_like(seen[:, 0])
    for centre, size in BOXES:
        (left, floor), (width, height) = [(m - d) / UNIT for m, d in zip(centre, size)], [2 * d / UNIT for d in size]
        from_x, to_x = x.clamp(left, left + width), x_end.clamp(left, left + width)
        slope = (y_end - y) / flat(x, x_end)
        a, b = y + slope * (from_x - x) - floor, y + slope * (to_x - x) - floor  # heights where the edge enters and leaves
        # Mean of clamp(height, 0, ceiling) along the edge, from its integral.
        integral = lambda z, height=height: z.clamp(0, height) ** 2 / 2 + height * (z - height).clamp(min=0)
        mean = torch.where((a - b).abs() < 1e-9, a.clamp(0, height), (integral(b) - integral(a)) / flat(a, b))
        area += ((from_x - to_x) * mean).sum(1)
    return (area / 7).to(observation.dtype)


# --------------------------------------------------------------------------------------------------------------- franka
# The Franka FR3 arm. Parameters: frankarobotics/franka_description 1.0.1 (commit 566ba44a), robots/fr3/{kinematics,
# inertials,joint_limits}.yaml, Copyright 2023 Franka Robotics GmbH, Apache-2.0, values unchanged. ARMATURE (reflected
# rotor inertia) is that of google-deepmind/mujoco_menagerie franka_fr3/fr3.xml, Apache-2.0.


class Joint(NamedTuple):
    """A revolute joint about its frame's z axis, and the link it carries."""

    offset: tuple  # joint frame's origin in the parent link's frame, m
    roll: float  # joint frame's rotation about the parent link's x axis, rad (pitch and yaw are zero in all seven)
    mass: float  # kg
    com: tuple  # centre of mass in the link frame, m
    inertia: tuple  # xx, xy, xz, yy, yz, zz about the centre of mass, in link axes, kg m^2
    lower: float  # rad
    upper: float  # rad
    speed: float  # rad/s
    effort: float  # N m


FR3 = (
    Joint((0, 0, 0.333), 0, 2.9274653454, (4.128e-07, -0.0181251324, -0.038603597),
          (0.023927316485107913, 1.3317903455714081e-05, -0.00011404774918616684,
           0.0224821613275756, -0.0019950320628240115, 0.006350098258530016), -2.7437, 2.7437, 2.62, 87),
    Joint((0, 0, 0), -math.pi / 2, 2.9355370338, (0.0031828864, -0.0743221644, 0.0088146084),
          (0.041938946257609425, 0.00020257331521090626, 0.004077784227179924,
           0.02514514885014724, -0.0042252158006570156, 0.06170214472888839), -1.7837, 1.7837, 2.62, 87),
    Joint((0, -0.316, 0), math.pi / 2, 2.2449013699, (0.0407015686, -0.0048200565, -0.0289730823),
          (0.02410142547240885, 0.002404694559042109, -0.002856269270114313,
           0.01974053266708178, -0.002104212683891874, 0.019044494482244823), -2.9007, 2.9007, 2.62, 87),
    Joint((0.0825, 0, 0), math.pi / 2, 2.6155955791, (-0.0459100965, 0.063049296, -0.0085187868),
          (0.03452998321913202, 0.01322552265982813, 0.01015142998484113,
           0.028881621933049058, -0.0009762833870704552, 0.04125471171146641), -3.0421, -0.1518, 2.62, 87),
    Joint((-0.0825, 0.384, 0), -math.pi / 2, 2.3271207594, (-0.0016039605, 0.0292536262, -0.097296599),
          (0.051610278463662895, -0.005715173387783472, -0.0035673167625872135,
           0.04787729713371481, 0.010673985108535986, 0.016423625579357254), -2.8065, 2.8065, 5.26, 12),
    Joint((0, 0, 0), math.pi / 2, 1.8170376524, (0.0597131221, -0.0410294666, -0.0101692726),
          (0.005412333594383447, 0.006193456360285834, 0.0014219289306117652,
           0.014058329545509979, -0.0013140753741120031, 0.016080817924212554), 0.5445, 4.5169, 4.18, 12),
    Joint((0.088, 0, 0), math.pi / 2, 0.6271432862, (0.0045225817, 0.0086261921, -0.0161633251),
          (0.00021092389150104718, -2.433299114461931e-05, 4.564480393778983e-05,
           0.00017718568002411474, 8.744070223226438e-05, 5.993190599659971e-05), -3.0159, 3.0159, 5.26, 12),
)  # fmt: skip
FLANGE = 0.107  # m, along joint 7's axis
READY = (0.0, -math.pi / 4, 0.0, -3 * math.pi / 4, 0.0, math.pi / 2, math.pi / 4)  # rad, Franka's "ready" pose
ARMATURE = (0.195, 0.195, 0.195, 0.195, 0.074, 0.074, 0.074)  # kg m^2
GRAVITY = 9.81  # m/s^2, along -z of link 0


@functools.cache
def arm(dtype: torch.dtype) -> tuple[wp.Function, wp.Function, wp.Function]:
    """Warp functions: mass_matrix_and_bias(q, qd, gravity) -> M without armature, bias force; cholesky_solve(A, b) ->
    A^-1 b; flange_pose(q) -> position, rotation.

    Featherstone, Rigid Body Dynamics Algorithms (2008): recursive Newton-Euler for the bias force (table 5.1) and the
    composite-rigid-body algorithm for the mass matrix (table 6.2). All vectors have world axes, and moments are taken
    about the joint's own origin: nothing small is ever the difference of large numbers, so float32 keeps 1e-5 even
    without armature, where cond(M) is 3e4. Loops over joints have constant bounds: Warp unrolls them.
    """
    real = wp.dtype_from_torch(dtype)
    vec3, mat33 = wp.types.vector(3, real), wp.types.matrix((3, 3), real)
    vec7, mat77 = wp.types.vector(7, real), wp.types.matrix((7, 7), real)
    rows7, rows21 = wp.types.matrix((7, 3), real), wp.types.matrix((21, 3), real)  # a vec3, and a mat33, per joint
    zero, one = real(0.0), real(1.0)
    eye = mat33(1, 0, 0, 0, 1, 0, 0, 0, 1)
    # The parameters are Warp constants, a row or three a joint, not Python lists: a kernel's cache is keyed by its
    # constants, and what wp.static takes out of a list, inside a function, is not among them.
    offsets = rows7(*(x for joint in FR3 for x in joint.offset))
    rolls = rows21(*(x for joint in FR3 for x in _roll_matrix(joint.roll)))
    masses = vec7(*(joint.mass for joint in FR3))
    outboard = vec7(*(sum(joint.mass for joint in FR3[i + 1 :]) for i in range(7)))  # mass carried by the next joint
    moments = rows7(*(joint.mass * x for joint in FR3 for x in joint.com))  # first moment of mass, kg m
    inertias = rows21(*(x for joint in FR3 for x in _inertia_at_joint(joint)))
    flange = vec3(0, 0, FLANGE)

    @wp.func
    def block(rows: rows21, i: int):
        return wp.matrix_from_rows(rows[3 * i], rows[3 * i + 1], rows[3 * i + 2])

    @wp.func
    def joint_rotation(parent: mat33, roll: mat33, q: real):
        c, s = wp.cos(q), wp.sin(q)
        return parent * roll * mat33(c, -s, zero, s, c, zero, zero, zero, one)

    @wp.func
    def outward(
        parent: mat33, w_parent: vec3, dw_parent: vec3, dv_parent: vec3,
        offset: vec3, roll: mat33, mass: real, moment: vec3, inertia: mat33, q: real, qd: real,
    ):  # fmt: skip
        """One joint outward: motion of the link at zero joint acceleration, and the force that motion takes."""
        R = joint_rotation(parent, roll, q)
        z = vec3(R[0, 2], R[1, 2], R[2, 2])
        d = parent * offset
        w = w_parent + z * qd
        dw = dw_parent + wp.cross(w_parent, z) * qd
        dv = dv_parent + wp.cross(dw_parent, d) + wp.cross(w_parent, wp.cross(w_parent, d))
        s = R * moment
        inertia_world = R * inertia * wp.transpose(R)
        f = mass * dv + wp.cross(dw, s) + wp.cross(w, wp.cross(w, s))
        n = inertia_world * dw + wp.cross(w, inertia_world * w) + wp.cross(s, dv)
        return R, w, dw, dv, z, d, s, inertia_world, f, n

    @wp.func
    def inward(
        s: vec3, inertia: mat33, f: vec3, n: vec3,
        d: vec3, mass: real, s_child: vec3, inertia_child: mat33, f_child: vec3, n_child: vec3,
    ):  # fmt: skip
        """Add to a link what its child, at offset d, carries: first moment, inertia, force and moment."""
        middle = s_child + real(0.5) * mass * d
        cross_term = wp.outer(d, middle)
        shifted = inertia_child + real(2.0) * wp.dot(d, middle) * eye - cross_term - wp.transpose(cross_term)
        return s + s_child + mass * d, inertia + shifted, f + f_child, n + n_child + wp.cross(d, f_child)

    # inline: otherwise Warp's adjoint evaluates every inner function three times over, a quarter of the whole time
    @wp.func(inline=True)
    def mass_matrix_and_bias(q: vec7, qd: vec7, gravity: vec3):
        z, d, s, f, n, inertia = rows7(), rows7(), rows7(), rows7(), rows7(), rows21()
        R, w, dw, dv = eye, vec3(), vec3(), -gravity
        for i in range(7):
            R, w, dw, dv, z_i, d_i, s_i, inertia_i, f_i, n_i = outward(
                R, w, dw, dv, offsets[i], block(rolls, i), masses[i], moments[i], block(inertias, i), q[i], qd[i],
            )  # fmt: skip
            z[i] = z_i
            d[i] = d_i
            s[i] = s_i
            f[i] = f_i
            n[i] = n_i
            inertia[wp.static(3 * i)] = inertia_i[0]
            inertia[wp.static(3 * i + 1)] = inertia_i[1]
            inertia[wp.static(3 * i + 2)] = inertia_i[2]
        M, bias = mat77(), vec7()
        S, I, F, N, D = vec3(), mat33(), vec3(), vec3(), vec3()  # of the composite body outboard of joint i
        for k in range(7):
            i = wp.static(6 - k)
            S, I, F, N = inward(s[i], block(inertia, i), f[i], n[i], D, outboard[i], S, I, F, N)
            D = d[i]
            bias[i] = wp.dot(z[i], N)
            force = wp.cross(z[i], S)  # of unit acceleration of joint i on the composite body
            moment = I * z[i]
            M[i, i] = wp.dot(z[i], moment)
            for j in range(wp.static(6 - k)):  # carried to the joints inboard
                moment = moment + wp.cross(d[wp.static(6 - k - j)], force)
                M[i, wp.static(5 - k - j)] = wp.dot(z[wp.static(5 - k - j)], moment)
        return M, bias

    @wp.func
    def cholesky_solve(A: mat77, b: vec7):
        """Solve A x = b, A = L L^T; only A's lower triangle is read."""
        L, y, x = mat77(), vec7(), vec7()
        for j in range(7):
            pivot = A[j, j]
            for k in range(wp.static(j)):
                pivot -= L[j, k] * L[j, k]
            L[j, j] = wp.sqrt(pivot)
            for i in range(wp.static(j + 1), 7):
                entry = A[i, j]
                for k in range(wp.static(j)):
                    entry -= L[i, k] * L[j, k]
                L[i, j] = entry / L[j, j]
        for i in range(7):
            rest = b[i]
            for k in range(wp.static(i)):
                rest -= L[i, k] * y[k]
            y[i] = rest / L[i, i]
        for j in range(7):
            i = wp.static(6 - j)
            rest = y[i]
            for k in range(wp.static(7 - j), 7):
                rest -= L[k, i] * x[k]
            x[i] = rest / L[i, i]
        return x

    @wp.func
    def flange_pose(q: vec7):
        R, p = eye, vec3()
        for i in range(7):
            p = p + R * offsets[i]
            R = joint_rotation(R, block(rolls, i), q[i])
        return p + R * flange, R

    return mass_matrix_and_bias, cholesky_solve, flange_pose


def _roll_matrix(roll):
    """Rotation about x by a multiple of 90 degrees. Nine numbers, row by row."""
    c, s = round(math.cos(roll)), round(math.sin(roll))
    return 1, 0, 0, 0, c, -s, 0, s, c


def _inertia_at_joint(joint):
    """Inertia about the link frame's origin: the parallel-axis theorem. Nine numbers, row by row."""
    xx, xy, xz, yy, yz, zz = joint.inertia
    (x, y, z), m = joint.com, joint.mass
    xx, yy, zz = xx + m * (y * y + z * z), yy + m * (x * x + z * z), zz + m * (x * x + y * y)
    xy, xz, yz = xy - m * x * y, xz - m * x * z, yz - m * y * z
    return xx, xy, xz, xy, yy, yz, xz, yz, zz


@functools.cache
def arm_functions(dtype: torch.dtype) -> tuple[WarpFunction, WarpFunction]:
    """The arm by itself, as torch functions: forward dynamics and flange pose."""
    real = wp.dtype_from_torch(dtype)
    vec3, mat33, vec7 = wp.types.vector(3, real), wp.types.matrix((3, 3), real), wp.types.vector(7, real)
    mass_matrix_and_bias, cholesky_solve, pose = arm(dtype)
    gravity = vec3(0, 0, -GRAVITY)

    @wp.kernel(module="unique")
    def forward_dynamics(
        q: wp.array(dtype=vec7), qd: wp.array(dtype=vec7), tau: wp.array(dtype=vec7), armature: wp.array(dtype=vec7),
        qdd: wp.array(dtype=vec7),
    ):  # fmt: skip
        i = wp.tid()
        M, bias = mass_matrix_and_bias(q[i], qd[i], gravity)
        qdd[i] = cholesky_solve(M + wp.diag(armature[i]), tau[i] - bias)

    @wp.kernel(module="unique")
    def flange_pose(q: wp.array(dtype=vec7), position: wp.array(dtype=vec3), rotation: wp.array(dtype=mat33)):
        i = wp.tid()
        p, R = pose(q[i])
        position[i] = p
        rotation[i] = R

    dynamics = WarpFunction(forward_dynamics)
    return dynamics, WarpFunction(flange_pose, num_outputs=2)


def franka_forward_dynamics(
    q: torch.Tensor, qd: torch.Tensor, tau: torch.Tensor, armature: torch.Tensor | None = None
) -> torch.Tensor:
    """Joint accelerations of the FR3 under gravity: (M(q) + diag(armature)) qdd = tau - nle(q, qd).

    q (rad), qd (rad/s), tau (N m): [N, 7], float32 or float64. armature [7] or [N, 7] (kg m^2): None means Menagerie's,
    zeros switch it off. Returns qdd [N, 7] (rad/s^2), differentiable in all four. No friction, limits or contact.
    """
    armature = torch.tensor(ARMATURE, dtype=q.dtype) if armature is None else torch.as_tensor(armature)
    armature = armature.to(q).expand(q.shape)
    with compiling("the arm's forward dynamics"):
        return arm_functions(q.dtype)[0](q, qd, tau, armature)


def franka_flange_pose(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flange pose in the world (link 0) of q [N, 7] (rad): position [N, 3] (m), rotation [N, 3, 3]; differentiable."""
    return arm_functions(q.dtype)[1](q)


# The task: from near the ready pose, bring the flange to a random reachable pose and stop there. The action moves the
# joint targets of an impedance controller, as on the real robot: action 1 moves them at SPEED_SHARE of the speed limit.
# State: q, qd, joint target q*, target pose (position, rotation row by row).
# Observation: q, qd, q* - q, target position - flange position, target rotation - flange rotation; then these two again,
# squashed so as to tell small errors apart.

FRANKA_DT, FRANKA_SUBSTEPS = 0.02, 4  # s; control step, and physics steps in it
STIFFNESS = (600.0, 600.0, 600.0, 600.0, 250.0, 150.0, 50.0)  # N m/rad
DAMPING = (50.0, 50.0, 50.0, 50.0, 10.0, 8.0, 4.0)  # N m s/rad
# Fraction of each joint's speed limit at |action| = 1, chosen so that torques, speeds and angles stay within limits under
# bang-bang actions of any frequency (tests/test_arm.py). Gravity alone takes up to 0.6 of joint 2's torque limit.
SPEED_SHARE = (0.35, 0.2, 0.35, 0.3, 0.35, 0.4, 0.5)
START_RANGE = 0.3  # rad; each joint starts this close to the ready pose
TARGET_RANGE = 0.5  # share of each joint's range, about its middle, from which the target pose's angles are drawn
TARGET_MARGIN = 0.05  # rad; joint targets stay this far inside the limits, the joints themselves then stay within
KEYPOINT = 0.2  # m; how far out along the flange's axes the keypoints lie: what a radian is worth in metres


@functools.cache
def franka(dtype: torch.dtype) -> Task:
    real = wp.dtype_from_torch(dtype)
    vec3, mat33 = wp.types.vector(3, real), wp.types.matrix((3, 3), real)
    vec7, vec33, vec45 = wp.types.vector(7, real), wp.types.vector(33, real), wp.types.vector(45, real)
    mass_matrix_and_bias, cholesky_solve, flange_pose = arm(dtype)
    pose_of = arm_functions(dtype)[1]
    h = FRANKA_DT / FRANKA_SUBSTEPS
    k, d = vec7(*STIFFNESS), vec7(*DAMPING)
    implicit = vec7(*(m + h * d + h * h * k for m, d, k in zip(ARMATURE, DAMPING, STIFFNESS)))
    reach = vec7(*(share * joint.speed * FRANKA_DT for share, joint in zip(SPEED_SHARE, FR3)))  # rad a control step
    lower = vec7(*(joint.lower + TARGET_MARGIN for joint in FR3))
    upper = vec7(*(joint.upper - TARGET_MARGIN for joint in FR3))
    h, substeps_inverse, one = real(h), real(1 / FRANKA_SUBSTEPS), real(1.0)
    spread, near, slight = real(KEYPOINT * KEYPOINT / 3), real(0.05), real(0.15)
    width, near_target, effort = real(0.02), real(0.1), real(0.01)
    speed, commanded = 7, 14  # places in the state and, as errors, in the observation, after the joints' angles: q', q*
    position, rotation = 21, 24  # of the target; in the observation, minus the flange's
    fine_position, fine_rotation = 33, 36  # in the observation

    @wp.func
    def joints(s: vec33, first: int):
        return vec7(s[first], s[first + 1], s[first + 2], s[first + 3], s[first + 4], s[first + 5], s[first + 6])

    @wp.func
    def observe(s: vec33):
        o = vec45()
        p, R = flange_pose(joints(s, 0))
        for i in range(7):
            o[i] = s[i]
            o[wp.static(speed + i)] = s[wp.static(speed + i)]
            o[wp.static(commanded + i)] = s[wp.static(commanded + i)] - s[i]
        for i in range(3):
            o[wp.static(position + i)] = s[wp.static(position + i)] - p[i]
            o[wp.static(fine_position + i)] = fine(s[wp.static(position + i)] - p[i], near)
            for j in range(3):
                o[wp.static(rotation + 3 * i + j)] = s[wp.static(rotation + 3 * i + j)] - R[i, j]
                o[wp.static(fine_rotation + 3 * i + j)] = fine(s[wp.static(rotation + 3 * i + j)] - R[i, j], slight)
        return o

    @wp.kernel(module="unique")
    def franka_step(
        state: wp.array(dtype=vec33), action: wp.array(dtype=vec7), substeps: int, next_state: wp.array(dtype=vec33),
        observation: wp.array(dtype=vec45), reward: wp.array(dtype=real), angle: wp.array2d(dtype=vec7),
        velocity: wp.array2d(dtype=vec7),
    ):  # fmt: skip
        i = wp.tid()
        s = state[i]
        old_target = joints(s, commanded)
        new_target, cost = vec7(), real(0.0)
        for j in range(7):
            a = clamp(action[i][j], -one, one)
            new_target[j] = clamp(old_target[j] + reach[j] * a, lower[j], upper[j])
            cost += a * a
        angle[i, 0] = joints(s, 0)
        velocity[i, 0] = joints(s, speed)
        for n in range(substeps):
            q = angle[i, n]
            qd = velocity[i, n]
            M, bias = mass_matrix_and_bias(q, qd, vec3())  # no gravity: the controller compensates it exactly
            ramp = real(n + 1) * substeps_inverse
            target = old_target + ramp * (new_target - old_target)
            force = wp.cw_mul(k, target - q - h * qd) - wp.cw_mul(d, qd) - bias
            qd_next = qd + h * cholesky_solve(M + wp.diag(implicit), force)
            velocity[i, n + 1] = qd_next
            angle[i, n + 1] = q + h * qd_next
        s_next = vec33()
        for j in range(7):
            s_next[j] = angle[i, substeps][j]
            s_next[wp.static(speed + j)] = velocity[i, substeps][j]
            s_next[wp.static(commanded + j)] = new_target[j]
        for j in range(12):
            s_next[wp.static(position + j)] = s[wp.static(position + j)]
        o = observe(s_next)
        next_state[i] = s_next
        observation[i] = o
        # Mean squared distance of six keypoints on the flange's axes to where they should be.
        distance2 = real(0.0)
        for j in range(3):
            distance2 += o[wp.static(position + j)] * o[wp.static(position + j)]
        for j in range(9):
            distance2 += spread * o[wp.static(rotation + j)] * o[wp.static(rotation + j)]
        distance = wp.sqrt(distance2 + width * width) - width
        # The second term is steep in the last centimetres, as in pusht.
        reward[i] = -distance - near_target * fine(distance, near) - effort * cost

    trajectory = (..., FRANKA_SUBSTEPS + 1)
    step = WarpFunction(franka_step, 5, shapes={"angle": trajectory, "velocity": trajectory})

    def start(noise):
        low, high = noise.new_tensor([(joint.lower, joint.upper) for joint in FR3]).T
        q = noise.new_tensor(READY) + START_RANGE * (2 * noise[:, :7] - 1)
        q_target = (low + high) / 2 + TARGET_RANGE * (high - low) / 2 * (2 * noise[:, 7:] - 1)
        position, rotation = pose_of(q_target)
        return torch.cat([q, torch.zeros_like(q), q, position, rotation.flatten(1)], 1)

    def errors(observation, state):
        # |R_target - R|_F^2 = 4 (1 - cos angle) = 8 sin^2(angle / 2)
        chord = observation[:, rotation : rotation + 9].norm(dim=1) / math.sqrt(8)
        distance = observation[:, position : position + 3].norm(dim=1)
        return {"position_error": distance, "angle_error": 2 * torch.asin(chord.clamp(max=1))}

    return Task(
        observation_size=45, action_size=7, state_size=33, episode_length=200, control_dt=FRANKA_DT,
        step=lambda state, action: step(state, action, FRANKA_SUBSTEPS)[:3],
        observe=observation_function(observe, vec33, vec45),
        start_noise=14, start=start,
        errors=errors, tolerances={"position_error": 0.02, "angle_error": 0.15},
    )


TASKS = {"pointmass": pointmass, "navigation": navigation, "pusht": pusht, "franka": franka}


def score(env: Env, policy: Callable, seed: int = EVALUATION_SEED) -> dict:
    """Run one whole episode in each environment. policy: observation [N, O] -> action [N, A]; seed: of the initial states.

    Returns means over environments: `return` (undiscounted), `success`, the task's errors over the last 10 steps, and its
    measures at the end.
    """
    total, settled = 0.0, []
    with torch.no_grad():
        observation, _ = env.reset(seed)
        state = env.state
        for t in range(env.episode_length):
            state, observation, reward = env.dynamics(state, policy(observation))
            total += reward.mean().item()
            if t >= env.episode_length - SETTLE_STEPS:
                errors = env.task.errors(observation, state)
                settled.append(torch.stack([errors[name] for name in env.task.tolerances]))
    settled = torch.stack(settled)  # [10, errors, N]
    limits = settled.new_tensor(list(env.task.tolerances.values()))
    success = (settled < limits[:, None]).all(1).all(0)  # at every one of the last 10 steps
    result = {"return": total, "success": success.double().mean().item()}
    result |= dict(zip(env.task.tolerances, settled.mean((0, 2)).tolist()))
    return result | {name: measure(observation).mean().item() for name, measure in env.task.measures.items()}
