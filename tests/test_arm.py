"""The FR3 by itself, against Pinocchio's samples (data/oracle.npz) and against its own parameters (data/fr3.json).

`TorchArm` is a second, independent arm in plain torch, from the Lagrangian: kinetic and potential energy of the links,
differentiated. It shares nothing with envs.py and is itself held against the samples.
"""

import itertools
import json
import pathlib

import numpy as np
import pytest
import torch

import envs

DATA = pathlib.Path(__file__).parent / "data"
PARAMETERS = json.loads((DATA / "fr3.json").read_text())
ORACLE = {name: torch.from_numpy(array) for name, array in np.load(DATA / "oracle.npz").items()}
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch.func.jvp's own
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
with_and_without_armature = pytest.mark.parametrize("suffix", ["", "_arm"], ids=["no armature", "armature"])


def skew(v):
    x, y, z = v.unbind(-1)
    o = torch.zeros_like(x)
    return torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).unflatten(-1, (3, 3))


class TorchArm:
    """Rigid-body dynamics in float64, slow and plain. q, qd: [..., 7]."""

    def __init__(self, parameters=PARAMETERS):
        tensor = lambda values: torch.tensor(values, dtype=torch.float64)
        self.gravity = -parameters["gravity"][2]
        self.joints = []
        for joint, link in zip(parameters["joints"], parameters["links"][1:]):
            xx, xy, xz, yy, yz, zz = link["inertia"]
            inertia = tensor([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
            rpy = [rotation(tensor(angle), axis) for axis, angle in enumerate(joint["rpy"])]
            self.joints.append((tensor(joint["xyz"]), rpy[2] @ rpy[1] @ rpy[0], link["mass"], tensor(link["com"]), inertia))
        self.flange = tensor(parameters["flange"]["xyz"])

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
        return p + R @ self.flange, R

    def mass_matrix(self, q):
        """M = sum over links of m Jv^T Jv + Jw^T I Jw."""
        links, M = self.links(q), 0
        for n, (_, _, mass, com, inertia) in enumerate(links):
            zero = torch.zeros_like(com)
            Jw = torch.stack([R[..., :, 2] if i <= n else zero for i, (R, *_) in enumerate(links)], -1)
            Jv = torch.stack([torch.linalg.cross(R[..., :, 2], com - p) if i <= n else zero for i, (R, p, *_) in enumerate(links)], -1)
            M = M + mass * Jv.mT @ Jv + Jw.mT @ inertia @ Jw
        return M

    def potential_energy(self, q):
        return sum(mass * self.gravity * com[..., 2] for _, _, mass, com, _ in self.links(q))

    def gravity_torque(self, q):
        return torch.func.grad(lambda q: self.potential_energy(q).sum())(q)

    def coriolis_torque(self, q, qd):
        """d/dt (dT/dqd) - dT/dq at qdd = 0, with T = qd^T M qd / 2."""
        momentum = lambda q: (self.mass_matrix(q) @ qd[..., None])[..., 0]
        kinetic_energy = lambda q: 0.5 * (qd * momentum(q)).sum()
        return torch.func.jvp(momentum, (q,), (qd,))[1] - torch.func.grad(kinetic_energy)(q)


def rotation(angle, axis):
    generator = skew(torch.eye(3, dtype=torch.float64)[axis])
    angle = angle[..., None, None]
    return torch.eye(3, dtype=torch.float64) + torch.sin(angle) * generator + (1 - torch.cos(angle)) * (generator @ generator)


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


# ----------------------------------------------------------------------------------------------------- against Pinocchio

# float32: ten times or more what is measured over 1000 poses (data/README.md); without armature cond(M) is 3e4
TOLERANCE = {
    (torch.float32, ""): (5e-5, 3e-4), (torch.float32, "_arm"): (1e-5, 2e-5),
    (torch.float64, ""): (1e-9, 1e-9), (torch.float64, "_arm"): (1e-9, 1e-9),
}  # fmt: skip


@every_dtype
@with_and_without_armature
def test_forward_dynamics(dtype, suffix):
    qdd = envs.franka_forward_dynamics(*sample(dtype, suffix))
    assert qdd.dtype == dtype and qdd.shape == (16, 7)
    want = ORACLE["qdd" + suffix]
    assert relative_error(qdd.detach(), want) < TOLERANCE[dtype, suffix][0]
    # Without armature joint 7's 1e4 rad/s^2 hides the rest: also each joint against its own mean.
    own = ((qdd - want).abs() / want.abs().mean(0)).max().item()
    assert own < (2e-4 if dtype == torch.float32 else 1e-9)


@every_dtype
@with_and_without_armature
def test_derivatives_of_forward_dynamics(dtype, suffix):
    inputs = sample(dtype, suffix)
    qdd = envs.franka_forward_dynamics(*inputs)
    for x, name in zip(inputs, ("dqdd_dq", "dqdd_dqd", "dqdd_dtau")):
        assert relative_error(jacobian_of(qdd, x), ORACLE[name + suffix]) < TOLERANCE[dtype, suffix][1], name
    # (M + A) qdd = tau - nle, hence d qdd_i / d A_j = -(M + A)^-1_ij qdd_j
    want = -ORACLE["dqdd_dtau" + suffix] * ORACLE["qdd" + suffix][:, None, :]
    assert relative_error(jacobian_of(qdd, inputs[3]), want) < TOLERANCE[dtype, suffix][1]


@every_dtype
def test_armature_none_is_menageries_and_may_be_one_row(dtype):
    q, qd, tau, armature = (x.detach() for x in sample(dtype, "_arm"))
    default = envs.franka_forward_dynamics(q, qd, tau)
    assert relative_error(default, ORACLE["qdd_arm"]) < TOLERANCE[dtype, "_arm"][0]
    assert torch.equal(default, envs.franka_forward_dynamics(q, qd, tau, armature))
    shared = armature[0].clone().requires_grad_()
    envs.franka_forward_dynamics(q, qd, tau, shared).sum().backward()
    want = -(ORACLE["dqdd_dtau_arm"] * ORACLE["qdd_arm"][:, None, :]).sum((0, 1))
    assert relative_error(shared.grad[None], want[None]) < TOLERANCE[dtype, "_arm"][1]


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


# ------------------------------------------------------------------------------------------------------------ parameters


def test_the_embedded_table_is_the_official_one():
    assert len(envs.FR3) == len(PARAMETERS["joints"]) == 7
    for joint, official, link in zip(envs.FR3, PARAMETERS["joints"], PARAMETERS["links"][1:]):
        limit = official["limit"]
        assert official["child"] == link["name"] and official["axis"] == [0, 0, 1]
        assert list(joint.offset) == official["xyz"]
        assert official["rpy"] == pytest.approx([joint.roll, 0, 0], abs=1e-15)
        assert joint.mass == link["mass"]
        assert list(joint.com) == link["com"]
        assert list(joint.inertia) == link["inertia"]
        assert (joint.lower, joint.upper) == (limit["lower"], limit["upper"])
        assert (joint.speed, joint.effort) == (limit["velocity"], limit["effort"])
    assert PARAMETERS["flange"]["xyz"] == [0, 0, envs.FLANGE] and PARAMETERS["flange"]["rpy"] == [0, 0, 0]
    assert list(envs.ARMATURE) == PARAMETERS["armature"] == ORACLE["armature"].tolist()
    assert envs.READY == pytest.approx(PARAMETERS["home"], abs=1e-15)
    assert [0, 0, -envs.GRAVITY] == PARAMETERS["gravity"]


# ---------------------------------------------------------------------------------------------------------------- energy


def test_energy_drift_is_first_order_in_the_step():
    """The free arm under gravity, no damping, from rest and in motion: halving the step halves the drift of its energy."""
    arm, duration = TorchArm(), 0.2
    start = torch.tensor(envs.READY, dtype=torch.float64) + torch.tensor([[0.0], [0.2], [-0.3]])
    speed = torch.tensor([[0.0] * 7, [0.0] * 7, [0.5, -0.5, 0.5, 0.5, -1.0, 1.0, 1.0]], dtype=torch.float64)
    armature = torch.diag(torch.tensor(envs.ARMATURE, dtype=torch.float64))
    no_torque = torch.zeros_like(start)

    def energy(q, qd):
        M = arm.mass_matrix(q) + armature
        return 0.5 * torch.einsum("ni,nij,nj->n", qd, M, qd) + arm.potential_energy(q)

    def drift(steps):
        q, qd, h = start, speed, duration / steps
        for _ in range(steps):  # semi-implicit Euler
            qd = qd + h * envs.franka_forward_dynamics(q, qd, no_torque)
            q = q + h * qd
        return energy(q, qd) - energy(start, speed), q

    drifts, ends = zip(*(drift(steps) for steps in (100, 200, 400)))
    moved = arm.potential_energy(start) - arm.potential_energy(ends[-1])
    assert (moved.abs() > 1).all()  # J: it fell, and exchanged far more energy than drifted
    assert (drifts[-1].abs() < 0.01 * moved.abs()).all()
    for coarse, fine in itertools.pairwise(drifts):
        assert (coarse / fine - 2).abs().max() < 0.1


def test_power_equals_the_change_of_energy():
    """At one instant, exactly: dE/dt = tau . qd, with the energy differentiated along the motion."""
    arm = TorchArm()
    q, qd, tau, armature = (x.detach() for x in sample(torch.float64, "_arm"))
    qdd = envs.franka_forward_dynamics(q, qd, tau)

    def energy(q, qd):
        M = arm.mass_matrix(q) + torch.diag_embed(armature)
        return 0.5 * torch.einsum("ni,nij,nj->n", qd, M, qd) + arm.potential_energy(q)

    rate = torch.func.jvp(energy, (q, qd), (qd, qdd))[1]
    torch.testing.assert_close(rate, (tau * qd).sum(1), rtol=1e-9, atol=1e-9)


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
