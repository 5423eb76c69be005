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
from collections.abc import Callable
from typing import NamedTuple

import torch
import warp as wp

from bridge import WarpFunction

wp.config.log_level = wp.LOG_WARNING  # Warp reports every module load otherwise; `compiling` below tells the user instead

SETTLE_STEPS = 10  # an episode is a success when the errors are within tolerance at each of its last 10 steps
EVALUATION_SEED = 90_001  # every policy, of every run and algorithm, is scored on the same starts


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
    errors: Callable  # observation [N, O] -> {name: [N]}, physical units
    tolerances: dict  # {name: largest error that counts as success}


class Env:
    """N environments of one task, stepped together. Make it with `envs.make`.

    num_envs N, observation_size O, action_size A, state_size S, episode_length T (control steps), control_dt (s).
    state     [N, S], assignable. Differentiable: steps are recorded when `state` or the action requires grad.
    elapsed   [N] int64, control steps since each environment's reset; assignable, to spread the episodes' phases.
    Every episode ends by time only, so `terminated` is always False and bootstrapping at the end is right.
    """

    def __init__(self, name, num_envs, device, seed, dtype):
        self.name, self.num_envs, self.device, self.dtype = name, num_envs, torch.device(device), dtype
        self.task = TASKS[name](dtype)
        self.observation_size, self.action_size = self.task.observation_size, self.task.action_size
        self.state_size, self.episode_length = self.task.state_size, self.task.episode_length
        self.control_dt = self.task.control_dt
        self.generator = torch.Generator(self.device)
        self.elapsed = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self.settled = torch.zeros(num_envs, dtype=torch.int64, device=self.device)  # steps within tolerance, in a row
        self.reset(seed)
        with torch.no_grad():  # compiles and loads the step kernel and its adjoint now, not in the first step
            self.dynamics(self.state, torch.zeros(num_envs, self.action_size, dtype=dtype, device=self.device))

    def reset(self, seed: int | None = None):
        """Start every environment anew. Returns observation [N, O] and an empty info."""
        if seed is not None:
            self.generator.manual_seed(seed)
        self.state = self._start()
        self.elapsed = torch.zeros_like(self.elapsed)
        self.settled = torch.zeros_like(self.settled)
        return self.observe(self.state), {}

    def step(self, action: torch.Tensor):
        """One control step. action [N, A], clipped to [-1, 1].

        Returns observation [N, O], reward [N], terminated [N] bool, truncated [N] bool, info. Finished environments
        start anew in the same step (Gymnasium's SAME_STEP autoreset): the observation is then the new episode's first
        and carries no gradient, while info["final_obs"] [N, O] is what the step led to, differentiable, in every
        environment. info also has the task's errors [N] in physical units and `success` [N] bool: within tolerance at
        each of the last 10 steps.
        """
        self.state, observation, reward = self.dynamics(self.state, action)
        with torch.no_grad():
            info = self.task.errors(observation)
            within = torch.stack([info[k] < limit for k, limit in self.task.tolerances.items()]).all(0)
            self.settled = torch.where(within, self.settled + 1, 0)
            info["success"] = self.settled >= SETTLE_STEPS
            info["final_obs"] = observation
            self.elapsed = self.elapsed + 1
            truncated = self.elapsed >= self.episode_length
        if truncated.any():
            fresh, ended = self._start(), truncated[:, None]
            self.state = torch.where(ended, fresh, self.state)
            observation = torch.where(ended, self.observe(fresh), observation)
            self.elapsed = torch.where(truncated, 0, self.elapsed)
            self.settled = torch.where(truncated, 0, self.settled)
        return observation, reward, torch.zeros_like(truncated), truncated, info

    def dynamics(self, state: torch.Tensor, action: torch.Tensor):
        """x' = f(x, a), o = h(x'), r = r(x, a, x'): pure and differentiable in state [N, S] and action [N, A]."""
        return self.task.step(state, action)

    def observe(self, state: torch.Tensor) -> torch.Tensor:
        """o = h(x): observation [N, O] of state [N, S], differentiable."""
        return self.task.observe(state)

    def detach(self):
        """Cut the graph: the gradient of later steps does not reach earlier ones."""
        self.state = self.state.detach()

    def _start(self):
        shape = (self.num_envs, self.task.start_noise)
        noise = torch.rand(shape, generator=self.generator, device=self.device, dtype=self.dtype)
        with torch.no_grad():
            return self.task.start(noise)


def make(name: str, num_envs: int, device: str = "cpu", seed: int = 1, dtype: torch.dtype = torch.float32) -> Env:
    """Make N environments of task `name` (see TASKS). Raises ValueError, in one line, on a bad argument."""
    if name not in TASKS:
        raise ValueError(f"unknown env '{name}': choose from {', '.join(TASKS)}")
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, got {num_envs}")
    with compiling(f"the {name} kernels"):
        return Env(name, num_envs, device, seed, dtype)


@contextlib.contextmanager
def compiling(what):
    """Tell the user that a long wait is a compilation (first use on a machine; cached afterwards)."""
    notice = threading.Timer(0.5, print, [f"compiling {what} (first use on this machine, then cached) ..."], {"flush": True})
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
def pointmass(dtype):
    real = wp.dtype_from_torch(dtype)
    vec1, vec3 = wp.types.vector(1, real), wp.types.vector(3, real)
    dt, damping, force = real(POINT_DT), real(POINT_DAMPING / POINT_MASS), real(POINT_FORCE / POINT_MASS)
    width, effort = real(0.02), real(0.01)

    @wp.func
    def observe(s: vec3):
        return vec3(s[0], s[1], s[2] - s[0])

    @wp.kernel(module="unique")
    def pointmass_step(
        state: wp.array(dtype=vec3),
        action: wp.array(dtype=vec1),
        next_state: wp.array(dtype=vec3),
        observation: wp.array(dtype=vec3),
        reward: wp.array(dtype=real),
    ):
        i = wp.tid()
        s = state[i]
        a = wp.clamp(action[i][0], real(-1.0), real(1.0))
        v = s[1] + dt * (force * a - damping * s[1])  # semi-implicit Euler
        x = s[0] + dt * v
        s_next = vec3(x, v, s[2])
        next_state[i] = s_next
        observation[i] = observe(s_next)
        reward[i] = width - wp.sqrt((s[2] - x) * (s[2] - x) + width * width) - effort * a * a

    @wp.kernel(module="unique")
    def pointmass_observe(state: wp.array(dtype=vec3), observation: wp.array(dtype=vec3)):
        i = wp.tid()
        observation[i] = observe(state[i])

    def start(noise):
        x, target = 2 * noise[:, 0] - 1, 2 * noise[:, 1] - 1
        return torch.stack([x, torch.zeros_like(x), target], 1)

    return Task(
        observation_size=3,
        action_size=1,
        state_size=3,
        episode_length=100,
        control_dt=POINT_DT,
        step=WarpFunction(pointmass_step, num_outputs=3),
        observe=WarpFunction(pointmass_observe),
        start_noise=2,
        start=start,
        errors=lambda observation: {"position_error": observation[:, 2].abs()},
        tolerances={"position_error": 0.02},
    )


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


class Arm(NamedTuple):
    """Warp functions of the arm's rigid-body algorithms; see `arm`."""

    mass_matrix_and_bias: wp.Function  # (q, qd, gravity vec3) -> M mat77 without armature, bias force vec7
    cholesky_solve: wp.Function  # (A mat77, lower triangle, b vec7) -> A^-1 b
    flange_pose: wp.Function  # q -> position vec3, rotation mat33


@functools.cache
def arm(dtype):
    """The arm's rigid-body algorithms in the given precision, as Warp functions to call from a kernel.

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
    offsets = [vec3(*joint.offset) for joint in FR3]
    rolls = [mat33(1, 0, 0, 0, round(math.cos(j.roll)), -round(math.sin(j.roll)), 0, round(math.sin(j.roll)), round(math.cos(j.roll))) for j in FR3]
    masses = [real(joint.mass) for joint in FR3]
    outboard = [real(sum(joint.mass for joint in FR3[i + 1 :])) for i in range(7)]  # mass carried by the next joint
    moments = [vec3(*(joint.mass * c for c in joint.com)) for joint in FR3]  # first moment of mass, kg m
    inertias = [mat33(*_inertia_at_joint(joint)) for joint in FR3]

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
    def inward(s: vec3, inertia: mat33, f: vec3, n: vec3, d: vec3, mass: real, s_child: vec3, inertia_child: mat33, f_child: vec3, n_child: vec3):
        """Add to a link what its child, at offset d, carries: first moment, inertia, force and moment."""
        middle = s_child + real(0.5) * mass * d
        cross_term = wp.outer(d, middle)
        shifted = inertia_child + real(2.0) * wp.dot(d, middle) * eye - cross_term - wp.transpose(cross_term)
        return s + s_child + mass * d, inertia + shifted, f + f_child, n + n_child + wp.cross(d, f_child)

    # inline: otherwise Warp's adjoint evaluates every inner function three times over, a third of the whole time
    @wp.func(inline=True)
    def mass_matrix_and_bias(q: vec7, qd: vec7, gravity: vec3):
        z, d, s, f, n, inertia = rows7(), rows7(), rows7(), rows7(), rows7(), rows21()
        R, w, dw, dv = eye, vec3(), vec3(), -gravity
        for i in range(7):
            R, w, dw, dv, z_i, d_i, s_i, inertia_i, f_i, n_i = outward(
                R, w, dw, dv, wp.static(offsets[i]), wp.static(rolls[i]),
                wp.static(masses[i]), wp.static(moments[i]), wp.static(inertias[i]), q[i], qd[i],
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
            inertia_i = wp.matrix_from_rows(inertia[wp.static(18 - 3 * k)], inertia[wp.static(19 - 3 * k)], inertia[wp.static(20 - 3 * k)])
            S, I, F, N = inward(s[i], inertia_i, f[i], n[i], D, wp.static(outboard[6 - k]), S, I, F, N)
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
            p = p + R * wp.static(offsets[i])
            R = joint_rotation(R, wp.static(rolls[i]), q[i])
        return p + R * vec3(zero, zero, wp.static(real(FLANGE))), R

    return Arm(mass_matrix_and_bias, cholesky_solve, flange_pose)


def _inertia_at_joint(joint):
    """Inertia about the link frame's origin: the parallel-axis theorem. Nine numbers, row by row."""
    xx, xy, xz, yy, yz, zz = joint.inertia
    (x, y, z), m = joint.com, joint.mass
    xx, yy, zz = xx + m * (y * y + z * z), yy + m * (x * x + z * z), zz + m * (x * x + y * y)
    xy, xz, yz = xy - m * x * y, xz - m * x * z, yz - m * y * z
    return xx, xy, xz, xy, yy, yz, xz, yz, zz


@functools.cache
def arm_functions(dtype):
    """The arm by itself, as torch functions: forward dynamics and flange pose."""
    real = wp.dtype_from_torch(dtype)
    vec3, mat33, vec7 = wp.types.vector(3, real), wp.types.matrix((3, 3), real), wp.types.vector(7, real)
    mass_matrix_and_bias, cholesky_solve, pose = arm(dtype)
    gravity = vec3(0, 0, -GRAVITY)

    @wp.kernel(module="unique")
    def forward_dynamics(
        q: wp.array(dtype=vec7),
        qd: wp.array(dtype=vec7),
        tau: wp.array(dtype=vec7),
        armature: wp.array(dtype=vec7),
        qdd: wp.array(dtype=vec7),
    ):
        i = wp.tid()
        M, bias = mass_matrix_and_bias(q[i], qd[i], gravity)
        qdd[i] = cholesky_solve(M + wp.diag(armature[i]), tau[i] - bias)

    @wp.kernel(module="unique")
    def flange_pose(q: wp.array(dtype=vec7), position: wp.array(dtype=vec3), rotation: wp.array(dtype=mat33)):
        i = wp.tid()
        p, R = pose(q[i])
        position[i] = p
        rotation[i] = R

    return WarpFunction(forward_dynamics), WarpFunction(flange_pose, num_outputs=2)


def franka_forward_dynamics(q: torch.Tensor, qd: torch.Tensor, tau: torch.Tensor, armature=None) -> torch.Tensor:
    """Joint accelerations of the FR3 under gravity: (M(q) + diag(armature)) qdd = tau - nle(q, qd).

    q (rad), qd (rad/s), tau (N m): [N, 7], float32 or float64. armature [7] or [N, 7] (kg m^2): None means Menagerie's,
    zeros switch it off. Returns qdd [N, 7] (rad/s^2), differentiable in all four. No friction, limits or contact.
    """
    armature = torch.tensor(ARMATURE, dtype=q.dtype) if armature is None else torch.as_tensor(armature)
    armature = armature.to(q).expand(q.shape)
    with compiling("the arm's forward dynamics"):
        return arm_functions(q.dtype)[0](q, qd, tau, armature)


def franka_flange_pose(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flange pose in the world (link 0): position [N, 3] (m) and rotation [N, 3, 3], columns the flange's axes.

    q [N, 7] (rad), float32 or float64. Differentiable.
    """
    return arm_functions(q.dtype)[1](q)


# The task: from near the ready pose, bring the flange to a random reachable pose and stop there. The action moves the
# joint targets of an impedance controller, as on the real robot: action 1 moves them at SPEED_SHARE of the speed limit.
# State: q, qd, joint target q*, target pose (position, rotation row by row).
# Observation: q, qd, q* - q, target position - flange position, target rotation - flange rotation.

FRANKA_DT, FRANKA_SUBSTEPS = 0.02, 4  # s; control step, and physics steps in it
STIFFNESS = (600.0, 600.0, 600.0, 600.0, 250.0, 150.0, 50.0)  # N m/rad
DAMPING = (50.0, 50.0, 50.0, 50.0, 10.0, 8.0, 4.0)  # N m s/rad
# Of each joint's speed limit, at action 1. Joint 2 bears the arm's weight, up to 0.6 of its effort limit: at half its speed
# limit, a target that turns round takes it to 1.7 times that limit. With these shares nothing exceeds 0.95, at any action.
SPEED_SHARE = (0.35, 0.2, 0.35, 0.3, 0.35, 0.4, 0.5)
TARGET_MARGIN = 0.05  # rad; joint targets stay this far inside the limits, the joints themselves then stay within
KEYPOINT = 0.2  # m; how far out along the flange's axes the keypoints lie: what a radian is worth in metres


@functools.cache
def franka(dtype):
    real = wp.dtype_from_torch(dtype)
    vec3, mat33 = wp.types.vector(3, real), wp.types.matrix((3, 3), real)
    vec7, vec33, vec45 = wp.types.vector(7, real), wp.types.vector(33, real), wp.types.vector(45, real)
    mass_matrix_and_bias, cholesky_solve, flange_pose = arm(dtype)
    h = FRANKA_DT / FRANKA_SUBSTEPS
    k, d = vec7(*STIFFNESS), vec7(*DAMPING)
    implicit = vec7(*(m + h * d + h * h * k for m, d, k in zip(ARMATURE, DAMPING, STIFFNESS)))
    reach = vec7(*(share * joint.speed * FRANKA_DT for share, joint in zip(SPEED_SHARE, FR3)))  # rad a control step at action 1
    lower = vec7(*(joint.lower + TARGET_MARGIN for joint in FR3))
    upper = vec7(*(joint.upper - TARGET_MARGIN for joint in FR3))
    h, substeps_inverse, one = real(h), real(1 / FRANKA_SUBSTEPS), real(1.0)
    spread, width, effort = real(KEYPOINT * KEYPOINT / 3), real(0.02), real(0.01)
    fine_position, fine_rotation = real(0.05), real(0.15)
    last = FRANKA_SUBSTEPS

    @wp.func
    def fine(x: real, scale: real):
        return x / wp.sqrt(x * x + scale * scale)

    @wp.func
    def joints(s: vec33, first: int):
        return vec7(s[first], s[first + 1], s[first + 2], s[first + 3], s[first + 4], s[first + 5], s[first + 6])

    @wp.func
    def pack(a: vec7, b: vec7, c: vec7, p: vec3, R: mat33):
        s = vec33()
        for i in range(7):
            s[i] = a[i]
            s[wp.static(7 + i)] = b[i]
            s[wp.static(14 + i)] = c[i]
        for i in range(3):
            s[wp.static(21 + i)] = p[i]
            for j in range(3):
                s[wp.static(24 + 3 * i + j)] = R[i, j]
        return s

    @wp.func
    def observe(q: vec7, qd: vec7, lag: vec7, dp: vec3, dR: mat33):
        o = vec45()
        for i in range(7):
            o[i] = q[i]
            o[wp.static(7 + i)] = qd[i]
            o[wp.static(14 + i)] = lag[i]
        for i in range(3):
            o[wp.static(21 + i)] = dp[i]
            o[wp.static(33 + i)] = fine(dp[i], fine_position)
            for j in range(3):
                o[wp.static(24 + 3 * i + j)] = dR[i, j]
                o[wp.static(36 + 3 * i + j)] = fine(dR[i, j], fine_rotation)
        return o

    @wp.func
    def target_pose(s: vec33):
        R = mat33(s[24], s[25], s[26], s[27], s[28], s[29], s[30], s[31], s[32])
        return vec3(s[21], s[22], s[23]), R

    @wp.kernel(module="unique")
    def franka_step(
        state: wp.array(dtype=vec33),
        action: wp.array(dtype=vec7),
        substeps: int,
        next_state: wp.array(dtype=vec33),
        observation: wp.array(dtype=vec45),
        reward: wp.array(dtype=real),
        angle: wp.array2d(dtype=vec7),
        velocity: wp.array2d(dtype=vec7),
    ):
        i = wp.tid()
        s = state[i]
        old_target = joints(s, 14)
        new_target, cost = vec7(), real(0.0)
        for j in range(7):
            a = wp.clamp(action[i][j], -one, one)
            new_target[j] = wp.clamp(old_target[j] + reach[j] * a, lower[j], upper[j])
            cost += a * a
        angle[i, 0] = joints(s, 0)
        velocity[i, 0] = joints(s, 7)
        # A run-time bound keeps the loop rolled, for the compiler's sake; its state is in arrays, so its adjoint is right.
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
        q_end = angle[i, last]
        p, R = flange_pose(q_end)
        p_target, R_target = target_pose(s)
        next_state[i] = pack(q_end, velocity[i, last], new_target, p_target, R_target)
        dp, dR = p_target - p, R_target - R
        observation[i] = observe(q_end, velocity[i, last], new_target - q_end, dp, dR)
        # Mean squared distance of six keypoints on the flange's axes to where they should be.
        distance2 = wp.dot(dp, dp) + spread * wp.ddot(dR, dR)
        reward[i] = width - wp.sqrt(distance2 + width * width) - effort * cost

    @wp.kernel(module="unique")
    def franka_observe(state: wp.array(dtype=vec33), observation: wp.array(dtype=vec45)):
        i = wp.tid()
        s = state[i]
        q = joints(s, 0)
        p, R = flange_pose(q)
        p_target, R_target = target_pose(s)
        observation[i] = observe(q, joints(s, 7), joints(s, 14) - q, p_target - p, R_target - R)

    step = WarpFunction(
        franka_step,
        num_outputs=5,
        shapes={"angle": (..., FRANKA_SUBSTEPS + 1), "velocity": (..., FRANKA_SUBSTEPS + 1)},
    )
    ready = torch.tensor(READY, dtype=dtype)
    low = torch.tensor([joint.lower for joint in FR3], dtype=dtype)
    high = torch.tensor([joint.upper for joint in FR3], dtype=dtype)

    def start(noise):
        q = ready.to(noise.device) + START_RANGE * (2 * noise[:, :7] - 1)
        middle, half = (low + high) / 2, (high - low) / 2
        q_target = (middle + TARGET_RANGE * half * (2 * noise[:, 7:].cpu() - 1)).to(noise.device)
        position, rotation = franka_flange_pose(q_target)
        return torch.cat([q, torch.zeros_like(q), q, position, rotation.flatten(1)], 1)

    def errors(observation):
        # |R_target - R|_F^2 = 4 (1 - cos angle) = 8 sin^2(angle / 2)
        chord = observation[:, 24:33].norm(dim=1) / math.sqrt(8)
        return {"position_error": observation[:, 21:24].norm(dim=1), "angle_error": 2 * torch.asin(chord.clamp(max=1))}

    return Task(
        observation_size=45,
        action_size=7,
        state_size=33,
        episode_length=200,
        control_dt=FRANKA_DT,
        step=lambda state, action: step(state, action, FRANKA_SUBSTEPS)[:3],
        observe=WarpFunction(franka_observe),
        start_noise=14,
        start=start,
        errors=errors,
        tolerances={"position_error": 0.02, "angle_error": 0.15},
    )


START_RANGE, TARGET_RANGE = 0.3, 0.5
TASKS = {"pointmass": pointmass, "franka": franka}


def score(env: Env, policy: Callable, seed: int = EVALUATION_SEED) -> dict:
    """Run one whole episode in each environment, from the seed's starts. policy: observation [N, O] -> action [N, A].

    Returns means over environments: `return` (undiscounted), `success`, and each of the task's errors over the
    episode's last 10 steps, in physical units.
    """
    with torch.no_grad():
        observation, _ = env.reset(seed)
        total, errors = 0.0, {}
        for t in range(env.episode_length):
            observation, reward, _, _, info = env.step(policy(observation))
            total += reward.mean().item()
            if t >= env.episode_length - SETTLE_STEPS:
                for name in env.task.tolerances:
                    errors[name] = errors.get(name, 0.0) + info[name].mean().item() / SETTLE_STEPS
        return {"return": total, "success": info["success"].double().mean().item(), **errors}
