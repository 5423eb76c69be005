"""The FR3, against Pinocchio's samples (data/oracle.npz) and its own parameters (data/fr3.json); then the franka task.

`TorchArm` is a second, independent arm in plain torch, from the Lagrangian: kinetic and potential energy of the links,
differentiated. It shares nothing with envs.py and is itself held against the samples.
"""

import itertools
import json
import pathlib

import numpy as np
import pytest
import torch
from test_envs import assert_same_step, make, moving_state, uniform

import envs

DATA = pathlib.Path(__file__).parent / "data"
PARAMETERS = json.loads((DATA / "fr3.json").read_text())
ORACLE = {name: torch.from_numpy(array) for name, array in np.load(DATA / "oracle.npz").items()}
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch.func.jvp's own
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
with_and_without_armature = pytest.mark.parametrize("suffix", ["", "_arm"], ids=["no armature", "armature"])


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def skew(v):
    x, y, z = v.unbind(-1)
    o = torch.zeros_like(x)
    return torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).unflatten(-1, (3, 3))


def rotation(angle, axis):
    eye, angle = torch.eye(3, dtype=torch.float64), angle[..., None, None]
    generator = skew(eye[axis])
    return eye + torch.sin(angle) * generator + (1 - torch.cos(angle)) * (generator @ generator)


class TorchArm:
    """Rigid-body dynamics in float64, slow and plain. q, qd: [..., 7]."""

    def __init__(self):
        self.joints = []
        for joint, link in zip(PARAMETERS["joints"], PARAMETERS["links"][1:]):
            xx, xy, xz, yy, yz, zz = link["inertia"]
            inertia = tensor([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
            rpy = [rotation(tensor(angle), axis) for axis, angle in enumerate(joint["rpy"])]
            self.joints.append((tensor(joint["xyz"]), rpy[2] @ rpy[1] @ rpy[0], link["mass"], tensor(link["com"]), inertia))

    def links(self, q):
        """Of each link: rotation, origin, mass, centre of mass, inertia about it; world axes."""
        R, p, links = torch.eye(3, dtype=q.dtype), torch.zeros(3, dtype=q.dtype), []
        for i, (xyz, rpy, mass, com, inertia) in enumerate(self.joints):
            p = p + R @ xyz
            R = R @ rpy @ rotation(q[..., i], 2)
            links.append((R, p, mass, p + R @ com, R @ inertia @ R.mT))
        return links

    def flange_pose(self, q):
        R, p, *_ = self.links(q)[-1]
        return p + R @ tensor(PARAMETERS["flange"]["xyz"]), R

    def mass_matrix(self, q):
        """M = sum over links of m Jv^T Jv + Jw^T I Jw."""
        links, M = self.links(q), 0
        axes = torch.stack([R[..., :, 2] for R, *_ in links], -1)  # [..., 3, 7]
        origins = torch.stack([p.expand_as(axes[..., 0]) for _, p, *_ in links], -1)
        for n, (_, _, mass, com, inertia) in enumerate(links):
            Jw = axes * (torch.arange(7) <= n)
            Jv = torch.linalg.cross(Jw, com[..., None] - origins, dim=-2)
            M = M + mass * Jv.mT @ Jv + Jw.mT @ inertia @ Jw
        return M

    def potential_energy(self, q):
        return sum(mass * -PARAMETERS["gravity"][2] * com[..., 2] for _, _, mass, com, _ in self.links(q))

    def gravity_torque(self, q):
        return torch.func.grad(lambda q: self.potential_energy(q).sum())(q)

    def coriolis_torque(self, q, qd):
        """d/dt (dT/dqd) - dT/dq at qdd = 0, with T = qd^T M qd / 2."""
        momentum = lambda q: (self.mass_matrix(q) @ qd[..., None])[..., 0]
        kinetic_energy = lambda q: 0.5 * (qd * momentum(q)).sum()
        return torch.func.jvp(momentum, (q,), (qd,))[1] - torch.func.grad(kinetic_energy)(q)


def jacobian_of(output, x):
    """d output[n, i] / d x[n, j] of a batched function: [N, I, J]."""
    columns = output.flatten(1).T
    return torch.stack([torch.autograd.grad(c.sum(), x, retain_graph=True)[0] for c in columns], 1)


def relative_error(got, want):
    """The largest error, each sample relative to its own largest entry."""
    got, want = got.double().flatten(1), want.flatten(1)
    return ((got - want).abs().amax(1) / want.abs().amax(1)).max().item()


def sample(dtype, suffix=""):
    q, qd, tau = (ORACLE[name].to(dtype).requires_grad_() for name in ("q", "qd", "tau"))
    armature = ORACLE["armature"] if suffix else torch.zeros(7)
    return q, qd, tau, armature.to(dtype).expand(q.shape).clone().requires_grad_()


def test_the_reference_arm_agrees_with_pinocchio():
    arm, q, qd = TorchArm(), ORACLE["q"], ORACLE["qd"]
    position, rotation = arm.flange_pose(q)
    assert (position - ORACLE["ee_position"]).abs().max() < 1e-12
    assert (rotation - ORACLE["ee_rotation"]).abs().max() < 1e-12
    assert relative_error(arm.mass_matrix(q), ORACLE["M"]) < 1e-12
    assert relative_error(arm.gravity_torque(q), ORACLE["gravity"]) < 1e-12
    assert relative_error(arm.coriolis_torque(q, qd) + arm.gravity_torque(q), ORACLE["nle"]) < 1e-12


# float32: ten times or more what is measured over 1000 poses (data/README.md); without armature cond(M) is 3e4
TOLERANCE = {
    (torch.float32, ""): (5e-5, 3e-4), (torch.float32, "_arm"): (1e-5, 2e-5),
    (torch.float64, ""): (1e-9, 1e-9), (torch.float64, "_arm"): (1e-9, 1e-9),
}  # fmt: skip


@every_dtype
@with_and_without_armature
def test_forward_dynamics_and_its_derivatives(dtype, suffix):
    inputs, want = sample(dtype, suffix), ORACLE["qdd" + suffix]
    qdd = envs.franka_forward_dynamics(*inputs)
    value, derivative = TOLERANCE[dtype, suffix]
    assert qdd.dtype == dtype and relative_error(qdd.detach(), want) < value
    # Without armature joint 7's 1e4 rad/s^2 hides the rest: also each joint against its own mean.
    assert ((qdd - want).abs() / want.abs().mean(0)).max() < (2e-4 if dtype == torch.float32 else 1e-9)
    for x, name in zip(inputs, ("dqdd_dq", "dqdd_dqd", "dqdd_dtau")):
        assert relative_error(jacobian_of(qdd, x), ORACLE[name + suffix]) < derivative, name
    # (M + A) qdd = tau - nle, hence d qdd_i / d A_j = -(M + A)^-1_ij qdd_j
    by_armature = -ORACLE["dqdd_dtau" + suffix] * want[:, None, :]
    assert relative_error(jacobian_of(qdd, inputs[3]), by_armature) < derivative


def test_armature_none_is_menageries_and_may_be_one_row():
    q, qd, tau, armature = (x.detach() for x in sample(torch.float64, "_arm"))
    want = envs.franka_forward_dynamics(q, qd, tau, armature)
    assert torch.equal(envs.franka_forward_dynamics(q, qd, tau), want)
    assert torch.equal(envs.franka_forward_dynamics(q, qd, tau, armature[0]), want)


@every_dtype
def test_flange_pose_and_its_jacobian(dtype):
    q = sample(dtype)[0]
    position, rotation = envs.franka_flange_pose(q)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    assert (position - ORACLE["ee_position"]).abs().max() < tolerance
    assert (rotation - ORACLE["ee_rotation"]).abs().max() < tolerance
    assert (jacobian_of(position, q) - ORACLE["jacobian"]).abs().max() < tolerance
    # the columns of jacobian_rot are the joints' axes: dR/dq_j = skew(axis_j) R
    want = skew(ORACLE["jacobian_rot"].mT) @ ORACLE["ee_rotation"][:, None]  # (16, 7, 3, 3)
    assert (jacobian_of(rotation, q).mT.unflatten(2, (3, 3)) - want).abs().max() < tolerance


def test_the_embedded_table_is_the_official_one():
    assert PARAMETERS["flange"]["xyz"] == [0, 0, envs.FLANGE] and PARAMETERS["flange"]["rpy"] == [0, 0, 0]
    assert list(envs.ARMATURE) == PARAMETERS["armature"] == ORACLE["armature"].tolist()
    assert envs.READY == pytest.approx(PARAMETERS["home"], abs=1e-15)
    assert [0, 0, -envs.GRAVITY] == PARAMETERS["gravity"]
    for ours, joint, link in zip(envs.FR3, PARAMETERS["joints"], PARAMETERS["links"][1:], strict=True):
        assert joint["child"] == link["name"] and joint["axis"] == [0, 0, 1]
        assert joint["rpy"] == pytest.approx([ours.roll, 0, 0], abs=1e-15)
        assert [list(ours.offset), ours.mass, list(ours.com)] == [joint["xyz"], link["mass"], link["com"]]
        assert list(ours.inertia) == link["inertia"]
        assert [*ours[5:]] == [joint["limit"][name] for name in ("lower", "upper", "velocity", "effort")]


@pytest.mark.parametrize("field", ["mass", "com", "inertia", "offset"])
def test_a_changed_parameter_changes_the_kernels_cache_key(field, monkeypatch):
    """Else an edited robot would silently run with the old one's compiled kernel."""
    keys = []
    for factor in (1.0, 1.01, 1.0):
        scaled = lambda value, k=factor: tuple(k * x for x in value) if isinstance(value, tuple) else k * value
        first = envs.FR3[0]._replace(**{field: scaled(getattr(envs.FR3[0], field))})
        monkeypatch.setattr(envs, "FR3", (first, *envs.FR3[1:]))
        monkeypatch.setattr(envs, "arm", envs.arm.__wrapped__)  # not the cached one
        keys.append([f.kernel.module.get_module_hash(1) for f in envs.arm_functions.__wrapped__(torch.float64)])
        monkeypatch.undo()
    assert keys[0][0] == keys[2][0] != keys[1][0]


# ----------------------------------------------------------------------------------------------------------- the task

STIFFNESS, DAMPING = tensor([600.0] * 4 + [250, 150, 50]), tensor([50.0] * 4 + [10, 8, 4])  # N m/rad, N m s/rad
LOWER, UPPER, SPEED, EFFORT = (
    tensor([joint["limit"][name] for joint in PARAMETERS["joints"]]) for name in ("lower", "upper", "velocity", "effort")
)


def franka_torch(state, action):
    """An impedance law that tracks a moving joint target, linearly implicit, gravity compensated; see TorchArm."""
    arm, h = TorchArm(), 0.005
    implicit = torch.diag(ORACLE["armature"] + h * DAMPING + h * h * STIFFNESS)
    share = tensor([0.35, 0.2, 0.35, 0.3, 0.35, 0.4, 0.5])
    q, v, old, p_target, R_target = state.split([7, 7, 7, 3, 9], 1)
    R_target = R_target.unflatten(1, (3, 3))
    a = action.clamp(-1, 1)
    new = torch.minimum(torch.maximum(old + a * share * SPEED * 0.02, LOWER + 0.05), UPPER - 0.05)
    for n in range(1, 5):
        target = old + n / 4 * (new - old)
        force = STIFFNESS * (target - q - h * v) - DAMPING * v - arm.coriolis_torque(q, v)
        v = v + h * torch.linalg.solve(arm.mass_matrix(q) + implicit, force)
        q = q + h * v
    p, R = arm.flange_pose(q)
    keypoints = [(p + s * 0.2 * R[:, :, c]) - (p_target + s * 0.2 * R_target[:, :, c]) for s in (-1, 1) for c in range(3)]
    distance2 = sum((e**2).sum(1) for e in keypoints) / 6
    distance = (distance2 + 0.02**2).sqrt() - 0.02
    reward = -distance - 0.1 * distance / (distance**2 + 0.05**2).sqrt() - 0.01 * (a**2).sum(1)
    squashed = lambda z, scale: z / (z**2 + scale**2).sqrt()
    dp, dR = p_target - p, (R_target - R).flatten(1)
    errors = torch.cat([new - q, dp, dR, squashed(dp, 0.05), squashed(dR, 0.15)], 1)
    return torch.cat([q, v, new, p_target, R_target.flatten(1)], 1), torch.cat([q, v, errors], 1), reward


def test_franka_is_its_equations():
    env = make("franka", num_envs=16)
    state = moving_state(env)
    state[:, 7:14] = uniform(16, 7, reach=2)  # fast, so that Coriolis forces count
    state[:4, 14:21], state[4:8, 14:21] = UPPER - 0.051, LOWER + 0.051  # and some targets at their limits
    assert_same_step(env.dynamics, state, uniform(16, 7, reach=1.5), franka_torch)


def test_franka_stays_within_its_limits_whatever_the_action():
    """Range, speed and effort after every control step of bang-bang actions."""
    steps, signs = 160, tensor(list(itertools.product([-1.0, 1.0], repeat=7)))
    drives = [torch.cat([signs.expand(130, 128, 7), -signs.expand(30, 128, 7)])]  # to the limits, then back
    for hold in (1, 5, 15, 30):  # control steps for which a random sign is held
        drives.append(uniform(steps // hold + 1, 64, 7, seed=hold).sign().repeat_interleave(hold, 0)[:steps])
    actions = torch.cat(drives, 1)  # [steps, N, 7]
    env, states = make("franka", actions.shape[1]), []
    for action in actions:
        env.step(action)
        states.append(env.state)
    q, v, target = torch.stack(states)[..., :21].split(7, 2)
    torque = STIFFNESS * (target - q) - DAMPING * v + TorchArm().gravity_torque(q)
    shares = torch.stack([(2 * q - LOWER - UPPER) / (UPPER - LOWER), v / SPEED, torque / EFFORT]).abs()
    used = shares.amax((1, 2))  # [3, 7], of range, speed and effort
    assert (used[0] > 0.9).all() and used[1].max() > 0.5 and used[2].max() > 0.5  # they do drive the arm, to its limits
    assert used.max() <= 1
