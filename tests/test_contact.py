"""navigation and pusht: gradients, the same equations in plain torch, mechanics of contact, coverage, layouts."""

import math

import pytest
import torch

import envs

F64 = torch.float64
U, RADIUS = envs.UNIT, envs.PUSHER_RADIUS
INERTIA = envs.BLOCK_MASS * envs.BLOCK_GYRATION2


@pytest.fixture
def pusht_with(monkeypatch):
    """The pusht task with some of its constants changed."""

    def build(**constants):
        for name, value in constants.items():
            monkeypatch.setattr(envs, name, value)
        return envs.pusht.__wrapped__(F64)

    return build


def block_at(pusher, pusher_velocity=(0, 0), centre=(0.5, 0.5), angle=0.0, velocity=(0, 0), spin=0.0):
    """A pusht state [1, 10]; `pusher` is in the block's frame, in units, from the middle of the bar's outer edge."""
    x, y = pusher[0] * U, pusher[1] * U - envs.BLOCK_CENTRE
    c, s = math.cos(angle), math.sin(angle)
    place = [centre[0] + c * x - s * y, centre[1] + s * x + c * y]
    return torch.tensor([[*place, *pusher_velocity, *centre, angle, *velocity, spin]], dtype=F64)


# Pusher places with its edge 0.05 units (a tenth of its radius) inside the block, or as said.
PLACES = {
    "bar, outer side": (0.7, -0.45),
    "bar, end": (-2.45, 0.4),
    "stem, side": (0.95, 3.0),
    "stem, end": (0.2, 4.45),
    "convex corner of the bar": (2 + 0.45 * math.sin(0.6), -0.45 * math.cos(0.6)),
    "convex corner of the stem": (-0.5 - 0.45 * math.sin(0.9), 4 + 0.45 * math.cos(0.9)),
    "inner corner": (0.95, 1.45),
    "first touch": (0.7, -0.5),
    "far away": (4.0, -3.0),
}


def perturbed(state, seed=0):
    """State and a random action [1, 2]; velocities made generic, so that the contact slides."""
    generator = torch.Generator().manual_seed(seed)
    state = state.clone()
    state[:, [2, 3, 7, 8]] += 0.2 * torch.randn(1, 4, generator=generator, dtype=F64)
    state[:, 9] += torch.randn(1, generator=generator, dtype=F64)
    return state, 0.8 * (2 * torch.rand(1, 2, generator=generator, dtype=F64) - 1)


# ------------------------------------------------------------------------------------------- the same equations in torch


def torch_navigation(s, a):
    a = a.clamp(-1, 1)
    velocity = s[:, 2:4] + 0.05 * (2.0 * a - 2.0 * s[:, 2:4])
    position = s[:, :2] + 0.05 * velocity
    obstacles = s[:, 7:].reshape(-1, 6, 3)
    offset = obstacles[..., :2] - position[:, None]
    clearance = offset.norm(dim=2) - obstacles[..., 2] - 0.05
    smallest = torch.minimum(s[:, 6], clearance.amin(1))
    to_goal = s[:, 4:6] - position
    reward = 0.02 - (to_goal.square().sum(1) + 0.02**2).sqrt()
    reward = reward - 2.0 * torch.nn.functional.softplus(-clearance / 0.03).sum(1) - 0.01 * a.square().sum(1)
    next_state = torch.cat([position, velocity, s[:, 4:6], smallest[:, None], s[:, 7:]], 1)
    seen = torch.cat([offset, obstacles[..., 2:], clearance[..., None]], 2).flatten(1)
    squashed = lambda z, scale: z / (z**2 + scale**2).sqrt()
    left = (to_goal[:, None, 0] * offset[..., 1] - to_goal[:, None, 1] * offset[..., 0]) / (to_goal.square().sum(1) + 0.01).sqrt()[:, None]
    seen = [seen, squashed(to_goal, 0.05), squashed(clearance, 0.05), squashed(left, 0.1)]
    return next_state, torch.cat([to_goal, velocity, *seen], 1), reward


def turn(angle, v):
    c, s = angle.cos(), angle.sin()
    return torch.stack([c * v[:, 0] - s * v[:, 1], s * v[:, 0] + c * v[:, 1]], 1)


def cross(a, b):
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]


def nearest_points(p, x, angle):
    """World positions of the points of bar and stem nearest to p, which lies outside both."""
    inside = turn(-angle, p - x) + torch.tensor([0.0, envs.BLOCK_CENTRE], dtype=F64)
    for low, high in (((-2, 0), (2, 1)), ((-0.5, 1), (0.5, 4))):
        low, high = torch.tensor(low, dtype=F64) * U, torch.tensor(high, dtype=F64) * U
        local = torch.minimum(torch.maximum(inside, low), high) - torch.tensor([0.0, envs.BLOCK_CENTRE], dtype=F64)
        yield x + turn(angle, local)


def torch_pusht(s, a, damping=envs.TABLE_DAMPING, rim=True):
    """One control step with world-frame geometry. Also returns the impulse on the block and its moment about the centre."""
    h = 0.01
    p, pv, x, angle, v, w = s[:, :2], s[:, 2:4], s[:, 4:6], s[:, 6], s[:, 7:9], s[:, 9]
    target = (p + envs.PUSHER_REACH * a.clamp(-1, 1)).clamp(0, 1)
    impulse, moment = 0.0, 0.0
    for _ in range(10):
        pv = pv + h * (100 * (target - p) - 20 * pv)
        p = p + h * pv
        force, torque = torch.zeros_like(p), torch.zeros_like(w)
        for q in nearest_points(p, x, angle):
            distance = (p - q).norm(dim=1, keepdim=True)
            away = (p - q) / distance
            r = q - x
            tangent = torch.stack([-away[:, 1], away[:, 0]], 1)
            point_velocity = v + torch.stack([-w * r[:, 1], w * r[:, 0]], 1)
            slip = (tangent * (pv - point_velocity)).sum(1, keepdim=True)
            softness = envs.CONTACT_SOFTNESS
            normal = envs.CONTACT_STIFFNESS * softness * torch.nn.functional.softplus((RADIUS - distance) / softness)
            f = -normal * away + envs.PUSHER_FRICTION * normal * slip / (slip**2 + envs.SLIP_SPEED**2).sqrt() * tangent
            force, torque = force + f, torque + cross(r, f)
        if rim:  # sigmoids: each moves the block inside at RIM_SPEED once the edge is far overstepped
            pull = lambda z: torch.sigmoid(2 * z / envs.RIM_SOFTNESS)
            strength = envs.RIM_SPEED * damping * envs.BLOCK_MASS
            force = force + strength * (pull(envs.RIM - x) - pull(x - 1 + envs.RIM))
        impulse, moment = impulse + h * force, moment + h * torque
        v = (v + h * force / envs.BLOCK_MASS) / (1 + h * damping)
        w = (w + h * torque / INERTIA) / (1 + h * damping)
        x, angle = x + h * v, angle + h * w
    next_state = torch.cat([p, pv, x, angle[:, None], v, w[:, None]], 1)
    goal = torch.tensor(envs.GOAL, dtype=F64)
    error = angle - math.pi / 4
    gap = torch.stack([(p - q).norm(dim=1) for q in nearest_points(p, x, angle)]).amin(0) - RADIUS
    seen = [p - 0.5, pv, x - goal, error.cos()[:, None], error.sin()[:, None], v, w[:, None]]
    seen += [turn(-angle, p - x), turn(-angle, goal - x), gap[:, None]]
    squashed = lambda z, scale: z / (z**2 + scale**2).sqrt()
    seen += [squashed(turn(-angle, goal - x), 0.03), squashed(error.sin(), 0.2)[:, None], squashed(gap, 0.03)[:, None]]
    observation = torch.cat(seen, 1)
    squared = (x - goal).square().sum(1) + 2 * envs.LEVER**2 * (1 - error.cos())
    huber = lambda squared: (squared + 0.02**2).sqrt() - 0.02
    reward = -huber(squared) - 0.1 * huber(gap**2) - 0.002 * a.clamp(-1, 1).square().sum(1)
    return (next_state, observation, reward), impulse, moment


def assert_same(ours, theirs, inputs, tolerance):
    """Outputs agree, and so do the gradients of a random sum of all of them."""
    generator = torch.Generator().manual_seed(7)
    gradients = []
    weights = [torch.randn(y.shape, generator=generator, dtype=F64) for y in ours]
    for outputs in (ours, theirs):
        total = sum((w * y).sum() for w, y in zip(weights, outputs))
        gradients.append(torch.autograd.grad(total, inputs))
    for mine, other in list(zip(ours, theirs)) + list(zip(*gradients)):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


def test_navigation_agrees_with_plain_torch():
    env = envs.make("navigation", 64, seed=3, dtype=F64)
    state = env.state.clone()
    generator = torch.Generator().manual_seed(0)
    state[:, :4] = 0.6 * torch.randn(64, 4, generator=generator, dtype=F64)  # many inside an obstacle
    state[:, 6] = 0.3 * torch.randn(64, generator=generator, dtype=F64)
    state.requires_grad_()
    action = (2.2 * torch.rand(64, 2, generator=generator, dtype=F64) - 1.1).requires_grad_()
    assert_same(env.dynamics(state, action), torch_navigation(state, action), (state, action), 1e-9)
    assert (env.observe(state)[:, 7:28:4] < 0).any() and (action.abs() > 1).any()


@pytest.mark.parametrize("place", PLACES)
def test_pusht_agrees_with_plain_torch(place):
    task = envs.pusht(F64)
    state, action = perturbed(block_at(PLACES[place], angle=0.7, centre=(0.4, 0.83)))
    state, action = state.requires_grad_(), action.requires_grad_()
    expected = torch_pusht(state, action)[0]
    assert_same(task.step(state, action), expected, (state, action), 1e-7)
    impulse = torch_pusht(state, action, rim=False)[1]
    assert (impulse.norm() > 0.1) == (place != "far away")  # N s; the place is what it says


# --------------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("place", PLACES)
def test_gradient_of_a_pusht_step(place):
    state, action = perturbed(block_at(PLACES[place], angle=-0.4), seed=1)
    state, action = state.requires_grad_(), action.requires_grad_()
    assert torch.autograd.gradcheck(envs.pusht(F64).step, (state, action), eps=1e-7, atol=1e-5, rtol=1e-5)


def test_gradient_of_a_navigation_step():
    env = envs.make("navigation", 4, seed=2, dtype=F64)
    state = env.state.clone()
    state[0, :2] = state[0, 7:9] + 0.15  # beside the first obstacle
    state[1, :2] = state[1, 10:12] + 0.02  # inside the second
    action = torch.tensor([[0.3, -0.8]], dtype=F64).repeat(4, 1).requires_grad_()
    assert torch.autograd.gradcheck(env.dynamics, (state.requires_grad_(), action), eps=1e-7, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["navigation", "pusht"])
def test_every_random_state_has_a_finite_nonzero_action_gradient(name):
    env = envs.make(name, 512, seed=4)
    for _ in range(3):
        action = (2 * torch.rand(512, 2) - 1).requires_grad_()
        _, _, reward = env.dynamics(env.state, action)
        (gradient,) = torch.autograd.grad(reward.sum(), action)
        assert torch.isfinite(gradient).all() and (gradient.norm(dim=1) > 0).all()
        env.step(action.detach())


def test_contact_gradient_is_informative():
    """In contact, the block's motion follows the action: pushing 1 cm further moves the block almost 1 cm further."""
    state = block_at((0.0, -0.45))  # behind the bar, in line with the centre of mass
    action = torch.tensor([[0.0, 0.5]], dtype=F64, requires_grad=True)
    next_state = envs.pusht(F64).step(state, action)[0]
    (pushed,) = torch.autograd.grad(next_state[0, 5], action, retain_graph=True)
    (moved,) = torch.autograd.grad(next_state[0, 1], action)
    assert 0.7 < (pushed / moved)[0, 1] < 1.0
    assert pushed[0, 0].abs() < 0.05 * pushed[0, 1]


def test_costate_stays_bounded_when_the_block_is_pushed_about():
    """Gradient of the return through 32 steps in contact, float32: finite, median and spread as measured."""
    env = envs.make("pusht", 256, seed=3)
    torch.manual_seed(0)
    state = env.state.clone().requires_grad_()
    x, total = state, 0.0
    for _ in range(32):
        heading = (x[:, 4:6] - x[:, :2]).detach()
        x, _, reward = env.dynamics(x, 0.7 * heading / heading.norm(dim=1, keepdim=True) + 0.3 * torch.randn(256, 2))
        total = total + reward
    norm = torch.autograd.grad(total.sum(), state)[0].norm(dim=1)
    assert torch.isfinite(norm).all() and norm.median() < 200 and norm.quantile(0.9) < 1000


# --------------------------------------------------------------------------------------------------------------- mechanics


@pytest.mark.parametrize("place", [place for place in PLACES if place != "far away"])
def test_momentum_and_torque_balance_without_table_friction(pusht_with, place):
    """Over a control step: change of momentum = impulse by the pusher, of angular momentum = its moment."""
    task = pusht_with(TABLE_DAMPING=0.0)
    state, action = perturbed(block_at(PLACES[place], angle=0.3), seed=2)
    after = task.step(state, action)[0]
    _, impulse, moment = torch_pusht(state, action, damping=0.0)
    assert impulse.norm() > 0.1
    torch.testing.assert_close(envs.BLOCK_MASS * (after - state)[:, 7:9], impulse, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(INERTIA * (after - state)[:, 9], moment, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("place", [place for place in PLACES if place != "far away"])
def test_frictionless_contact_pushes_through_the_pushers_centre(pusht_with, place):
    """Read off the states alone, after one substep: the change of angular momentum about the pusher's centre is zero."""
    task = pusht_with(TABLE_DAMPING=0.0, PUSHER_FRICTION=0.0, PUSHT_SUBSTEPS=1, PUSHT_DT=0.01)
    state, action = perturbed(block_at(PLACES[place], angle=0.3), seed=3)
    after = task.step(state, action)[0]
    impulse = envs.BLOCK_MASS * (after - state)[:, 7:9]
    moment = cross(after[:, :2] - state[:, 4:6], impulse)  # the force acts before the block moves
    assert impulse.norm() > 1e-2
    torch.testing.assert_close(INERTIA * (after - state)[:, 9], moment, rtol=1e-9, atol=1e-12)


def test_friction_opposes_slip_and_stays_in_its_cone(pusht_with):
    task = pusht_with(TABLE_DAMPING=0.0, PUSHT_SUBSTEPS=1, PUSHT_DT=0.01)
    for speed in (-1.0, -0.1, 0.1, 1.0):
        state = block_at((0.3, -0.45), pusher_velocity=(speed, 0.0))
        x, y = (task.step(state, torch.zeros(1, 2, dtype=F64))[0] - state)[0, 7:9]
        ratio = (x / y).item()  # the outer side faces -y: y is the normal impulse
        assert y > 0 and math.copysign(1, ratio) == math.copysign(1, speed) and abs(ratio) < envs.PUSHER_FRICTION
        assert (abs(ratio) > 0.9 * envs.PUSHER_FRICTION) == (abs(speed) > 0.5)


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_block_pushed_off_centre_turns_the_right_way(side):
    state = block_at((1.5 * side, -0.6))
    for _ in range(4):
        state = envs.pusht(F64).step(state, torch.tensor([[0.0, 0.5]], dtype=F64))[0]
    assert state[0, 6] * side > 0.2  # pushed upwards on its right, it turns counter-clockwise
    assert state[0, 5] > 0.51


def test_block_pushed_along_its_axis_does_not_turn():
    state = block_at((0.0, -0.6))
    for _ in range(6):
        state = envs.pusht(F64).step(state, torch.tensor([[0.0, 0.4]], dtype=F64))[0]
    assert state[0, 5] > 0.55 and state[0, 6].abs() < 1e-12 and (state[0, 4] - 0.5).abs() < 1e-12


def test_corner_slides_off_the_pusher():
    """Pushed near its tip, a corner gives way: the block turns, and the pusher slides past it and gets free."""
    task = envs.pusht(F64)
    state = block_at((2.2, -0.6))
    angles = []
    for _ in range(18):
        state, observation, _ = task.step(state, torch.tensor([[0.0, 0.5]], dtype=F64))
        angles.append(state[0, 6].item())
    assert angles[5] > 0.3 and angles[-1] > 0.9
    assert observation[0, 11] > 2 * U and observation[0, 15] > RADIUS  # past the bar's end, and clear of it
    assert angles[-1] - angles[-2] < 0.01  # so the block has come to rest


def test_no_deep_penetration_at_any_action():
    """At most 0.3 of the pusher's radius (measured: 0.22), over 600 000 control steps of bang-bang and pressing actions."""
    torch.manual_seed(0)
    env = envs.make("pusht", 1000, seed=5)
    state, deepest, fastest = env.state, 0.0, 0.0
    for k in range(600):
        press = state[:, 4:6] - state[:, :2]
        press = press / press.abs().amax(1, keepdim=True)
        if k % 4 == 0:
            held = torch.sign(torch.randn(1000, 2))
        action = torch.where((torch.arange(1000) % 2 == 0)[:, None], held, press if k % 64 < 56 else held)
        state, observation, _ = env.dynamics(state, action)
        deepest, fastest = max(deepest, -observation[:, 15].min().item()), max(fastest, state[:, 7:9].norm(dim=1).max().item())
    assert torch.isfinite(state).all()
    assert 0.1 * RADIUS < deepest < 0.3 * RADIUS  # the lower bound: they did touch
    assert fastest < 1.0  # m/s
    assert (state[:, 4:6] - 0.5).abs().max() < 0.75  # the rim holds


def test_rim_brings_the_block_back():
    state = block_at((0, -8), centre=(1.05, 0.5))
    for _ in range(40):
        state = envs.pusht(F64).step(state, torch.zeros(1, 2, dtype=F64))[0]
    assert 0.8 < state[0, 4] < 0.9 and state[0, 6] == 0


def test_pusher_follows_the_benchmarks_law():
    """Semi-implicit Euler at 10 ms of 100 (target - position) - 20 velocity, whatever the block does."""
    for place in ("far away", "bar, outer side"):
        state = block_at(PLACES[place])
        after = envs.pusht(F64).step(state, torch.tensor([[0.5, -1.0]], dtype=F64))[0]
        for axis, goal in ((0, 0.05), (1, -0.1)):
            position, velocity = 0.0, 0.0
            for _ in range(10):
                velocity += 0.01 * (100 * (goal - position) - 20 * velocity)
                position += 0.01 * velocity
            assert after[0, axis] - state[0, axis] == pytest.approx(position, abs=1e-12)
            assert after[0, 2 + axis] == pytest.approx(velocity, abs=1e-12)


def test_block_geometry():
    """The benchmark's centre of mass and moment of inertia, from sums over a fine grid; reset keeps the pusher clear."""
    step = 0.01
    bar = torch.cartesian_prod(torch.arange(-2 + step / 2, 2, step), torch.arange(step / 2, 1, step))
    stem = torch.cartesian_prod(torch.arange(-0.5 + step / 2, 0.5, step), torch.arange(1 + step / 2, 4, step))
    assert (bar.mean(0) + stem.mean(0))[1].item() / 2 * U == pytest.approx(envs.BLOCK_CENTRE, rel=1e-4)
    assert 2 * bar.square().sum(1).mean().item() * U**2 == pytest.approx(envs.BLOCK_GYRATION2, rel=1e-3)
    env = envs.make("pusht", 4096, seed=1)
    gap = env.observe(env.state)[:, 15]
    assert gap.min() > 0 and gap.median() > 0.1
    assert not torch.equal(env.state, envs.make("pusht", 4096, seed=2).state)


# ---------------------------------------------------------------------------------------------------------------- coverage


def goal_pose(ahead=0.0, aside=0.0, angle=0.0):
    """Poses [1, 3] displaced from the goal: in units along the goal's axes (aside: the bar's), and in rad."""
    c, s = math.cos(envs.GOAL_ANGLE), math.sin(envs.GOAL_ANGLE)
    x, y = envs.GOAL[0] + U * (c * aside - s * ahead), envs.GOAL[1] + U * (s * aside + c * ahead)
    return torch.tensor([[x, y, envs.GOAL_ANGLE + angle]], dtype=F64)


@pytest.mark.parametrize(
    "displaced, area",
    [
        ({}, 7.0),
        ({"angle": 2 * math.pi}, 7.0),
        ({"aside": 1.0}, 3.0 + 0.0 + 0.0),  # the bars share 3; the stems, side by side, only an edge
        ({"aside": 0.5}, 3.5 + 1.5),
        ({"ahead": 0.25}, 4 * 0.75 + 0.25 + 3 - 0.25),  # bars 3, bar over stem none: stem under bar 0.25, stems 2.75
        ({"ahead": -1.0}, 1.0 + 2.0),  # the goal's bar under the block's stem, and stems
        ({"aside": 10.0}, 0.0),
    ],
)
def test_coverage_by_hand(displaced, area):
    assert envs.pusht_coverage(goal_pose(**displaced)).item() == pytest.approx(area / 7, abs=1e-9)


def test_goal_is_the_benchmarks():
    """The middle of the bar's outer edge at the workspace's centre, turned by 45 degrees."""
    x, y, angle = goal_pose()[0].tolist()
    middle = (x + envs.BLOCK_CENTRE * math.sin(angle), y - envs.BLOCK_CENTRE * math.cos(angle))
    assert middle == pytest.approx((0.5, 0.5)) and angle == math.pi / 4


def test_coverage_against_monte_carlo():
    generator = torch.Generator().manual_seed(0)
    poses = goal_pose() + torch.randn(40, 3, generator=generator, dtype=F64) * torch.tensor([0.05, 0.05, 1.0])
    inside = lambda q: ((q[:, 0].abs() < 2) & (q[:, 1] > 0) & (q[:, 1] < 1)) | ((q[:, 0].abs() < 0.5) & (q[:, 1] > 0) & (q[:, 1] < 4))
    samples = torch.rand(200_000, 2, generator=generator, dtype=F64) * torch.tensor([4.0, 4.0]) - torch.tensor([2.0, 0.0])
    samples = samples[inside(samples)]
    centre = torch.tensor([0.0, envs.BLOCK_CENTRE], dtype=F64)
    for pose, coverage in zip(poses, envs.pusht_coverage(poses)):
        world = turn(pose[2].expand(len(samples)), samples * U - centre) + pose[:2]
        in_goal = turn(goal_pose()[0, 2].expand(len(samples)).neg(), world - goal_pose()[0, :2]) + centre
        assert inside(in_goal / U).double().mean().item() == pytest.approx(coverage.item(), abs=0.006)


def test_coverage_is_scored_when_asked():
    env = envs.make("pusht", 64, seed=1)
    still = lambda observation: torch.zeros(64, 2)
    assert "coverage" not in envs.score(env, still)
    result = envs.score(env, still, measures=True)
    env.reset(envs.EVALUATION_SEED)
    for _ in range(env.episode_length):
        before = env.state
        env.step(torch.zeros(64, 2))
    last = env.dynamics(before, torch.zeros(64, 2))[0]
    assert result["coverage"] == pytest.approx(envs.pusht_coverage(last[:, 4:7]).mean().item(), abs=1e-6)
    assert result["coverage ever 0.95"] == 0
    goal = torch.cat([torch.full((64, 2), 0.9), torch.zeros(64, 2), goal_pose().float().expand(64, 3), torch.zeros(64, 3)], 1)
    measure, level = env.task.measures["coverage"]
    assert measure(env.observe(goal)).min() > 0.999 and level == 0.95


# -------------------------------------------------------------------------------------------------- navigation's episodes


def straight(observation):
    """Straight for the goal, slowing down in time: a PD controller."""
    action = 4 * observation[:, :2] - observation[:, 2:4]
    return action / action.abs().amax(1, keepdim=True).clamp(min=1)


def test_navigation_layouts_are_blocked_and_feasible():
    env = envs.make("navigation", 2048, seed=9)
    position, goal = env.state[:, :2], env.state[:, 4:6]
    obstacles = env.state[:, 7:].unflatten(1, (6, 3))
    centre, radius = obstacles[..., :2], obstacles[..., 2]
    along = torch.linspace(0, 1, 301)[None, :, None]
    way = position[:, None] + along * (goal - position)[:, None]  # [N, 301, 2]
    clearance = (way[:, :, None] - centre[:, None]).norm(dim=3) - radius[:, None] - envs.AGENT_RADIUS
    assert 0.88 < (clearance.amin((1, 2)) < 0).float().mean() < 0.96  # share of episodes whose straight way is blocked
    assert clearance[:, [0, -1]].min() > 0.19  # start and goal are clear
    gap = (centre[:, :, None] - centre[:, None]).norm(dim=3) - radius[:, :, None] - radius[:, None]
    assert (gap + 10 * torch.eye(6)).min() > 4 * envs.AGENT_RADIUS - 1e-6  # twice the disc fits through every gap
    assert env.state[:, :2].std() > 0.3 and centre[:, 0].std() > 0.2


@pytest.mark.parametrize("policy, success", [(straight, (0.04, 0.12)), ("nothing", (0, 0)), ("random", (0, 0))])
def test_navigation_without_a_plan_fails(policy, success):
    torch.manual_seed(0)
    env = envs.make("navigation", 2048, seed=9)
    with torch.no_grad():
        for _ in range(env.episode_length):
            observation = env.observe(env.state)
            action = torch.zeros(2048, 2) if policy == "nothing" else 2 * torch.rand(2048, 2) - 1
            _, _, _, truncated, info = env.step(policy(observation) if callable(policy) else action)
    assert truncated.all()
    assert success[0] <= info["success"].float().mean() <= success[1]
    if callable(policy):  # it is contact that fails it, not the distance
        assert info["position_error"].max() < 0.05


def test_navigation_remembers_a_contact():
    env = envs.make("navigation", 2, seed=1)
    state = env.state.clone()
    state[0, :2] = state[0, 7:9]  # in the middle of an obstacle
    env.state = state
    env.step(torch.zeros(2, 2))
    env.state = torch.cat([env.state[:, 4:6], torch.zeros(2, 2), env.state[:, 4:]], 1)  # then at rest on the goal
    for _ in range(10):
        info = env.step(torch.zeros(2, 2))[4]
    assert info["success"].tolist() == [False, True]
    assert info["contact_depth"][0] > 0.1 and info["contact_depth"][1] < 0
