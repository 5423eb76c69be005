"""navigation and pusht: the same equations in plain torch, mechanics of contact, starts, coverage."""

import math

import pytest
import torch
from test_envs import F64, assert_same_step, make, uniform

import envs

U, RADIUS = envs.UNIT, envs.PUSHER_RADIUS
# The middle of the bar's outer edge is at the workspace's centre, at 45 degrees; the centre of mass 1.5 units further in.
GOAL = torch.tensor([0.5 - 1.5 * U * math.sqrt(0.5), 0.5 + 1.5 * U * math.sqrt(0.5), math.pi / 4], dtype=F64)


def squashed(z, scale):
    return z / (z**2 + scale**2).sqrt()


def navigation_torch(s, a):
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
    left = to_goal[:, None, 0] * offset[..., 1] - to_goal[:, None, 1] * offset[..., 0]
    left = left / (to_goal.square().sum(1, keepdim=True) + 0.01).sqrt()
    seen = torch.cat([offset, obstacles[..., 2:], clearance[..., None]], 2).flatten(1)
    fine = [squashed(to_goal, 0.05), squashed(clearance, 0.05), squashed(left, 0.1)]
    return next_state, torch.cat([to_goal, velocity, seen, *fine], 1), reward


def test_navigation_is_its_equations():
    env = make("navigation", 64, seed=3)
    state = env.state.clone()
    state[:, :4] = uniform(64, 4)  # many inside an obstacle
    state[:, 6] = uniform(64, seed=1, reach=0.3)
    assert (env.observe(state)[:, 7:28:4] < 0).any()
    assert_same_step(env.dynamics, state, uniform(64, 2, seed=2, reach=1.2), navigation_torch, rtol=1e-7)


def test_navigations_straight_ways_are_blocked_and_its_gaps_are_wide_enough():
    state = make("navigation", 2048, seed=9).state
    position, goal = state[:, :2], state[:, 4:6]
    centre, radius = state[:, 7:].unflatten(1, (6, 3)).split([2, 1], 2)
    along = torch.linspace(0, 1, 301, dtype=F64)[None, :, None]
    way = position[:, None] + along * (goal - position)[:, None]  # [N, 301, 2]
    clearance = (way[:, :, None] - centre[:, None]).norm(dim=3) - radius.mT - 0.05
    assert 0.88 < (clearance.amin((1, 2)) < 0).double().mean() < 0.96  # share of episodes whose straight way is blocked
    assert clearance[:, [0, -1]].min() > 0.19  # start and goal are clear
    gap = torch.cdist(centre, centre) - radius - radius.mT + 10 * torch.eye(6)
    assert gap.min() > 0.2 - 1e-9  # twice the disc fits through every gap
    assert (state[:, 2:4] == 0).all() and position.std() > 0.3 and centre[:, 0].std() > 0.2


def block_at(pusher, angle=0.0):
    """A pusht state [1, 7] at rest; `pusher` in the block's frame, in units, from the middle of the bar's outer edge."""
    x, y = pusher[0] * U, pusher[1] * U - envs.BLOCK_CENTRE
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[0.5 + c * x - s * y, 0.5 + s * x + c * y, 0, 0, 0.5, 0.5, angle]], dtype=F64)


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


def turn(angle, v):
    c, s = angle.cos(), angle.sin()
    return torch.stack([c * v[:, 0] - s * v[:, 1], s * v[:, 0] + c * v[:, 1]], 1)


def cross(a, b):
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]


def nearest_points(p, x, angle):
    """World positions of the points of bar and stem nearest to p, which lies outside both."""
    inside = turn(-angle, p - x) / U + torch.tensor([0.0, 1.5], dtype=F64)
    for low, high in (((-2, 0), (2, 1)), ((-0.5, 1), (0.5, 4))):
        low, high = torch.tensor(low, dtype=F64), torch.tensor(high, dtype=F64)
        local = torch.minimum(torch.maximum(inside, low), high) - torch.tensor([0.0, 1.5], dtype=F64)
        yield x + turn(angle, local * U)


def pusht_torch(s, a):
    """World-frame geometry; the pusher's law, geometry and goal are gym-pusht's, whose workspace of 512 pixels is 1 m."""
    h, gyration2, softness = 0.01, 10 / 3 * U**2, envs.CONTACT_SOFTNESS
    p, pv, x, angle = s[:, :2], s[:, 2:4], s[:, 4:6], s[:, 6]
    target = (p + 0.1 * a.clamp(-1, 1)).clamp(0, 1)
    for _ in range(10):
        pv = pv + h * (100 * (target - p) - 20 * pv)
        p = p + h * pv
        # The rim: sigmoids, each of which moves the block inside at 0.1 m/s once the edge is far overstepped.
        shift = h * 0.1 * (torch.sigmoid((0.15 - x) / 0.01) - torch.sigmoid((x - 0.85) / 0.01))
        spin = torch.zeros_like(angle)
        for q in nearest_points(p, x, angle):
            distance = (p - q).norm(dim=1)
            away = (p - q) / distance[:, None]
            lever = cross(q - x, away)
            overlap = RADIUS - distance + (away * shift).sum(1) + lever * spin
            soft = (overlap + softness).clamp(min=0) ** 2 / (4 * softness)  # around first touch
            depth = torch.where(overlap > softness, overlap, soft)
            impulse = depth / (1 + lever**2 / gyration2)  # of 1 kg, along the normal: q moves by depth along it
            shift, spin = shift - impulse[:, None] * away, spin - impulse * lever / gyration2
        x, angle = x + shift, angle + spin
    goal, error = GOAL[:2], angle - GOAL[2]
    gap = torch.stack([(p - q).norm(dim=1) for q in nearest_points(p, x, angle)]).amin(0) - RADIUS
    column = lambda z: z[:, None]
    seen = [p - 0.5, pv, x - goal, column(error.cos()), column(error.sin())]
    seen += [turn(-angle, p - x), turn(-angle, goal - x), column(gap)]
    seen += [squashed(turn(-angle, goal - x), 0.03), squashed(column(error.sin()), 0.2), squashed(column(gap), 0.03)]
    squared = (x - goal).square().sum(1) + 2 * (2.4 * U) ** 2 * (1 - error.cos())
    distance, away = (squared + 1e-8).sqrt(), (gap**2 + 0.01**2).sqrt() - 0.01
    reward = -distance - 0.1 * squashed(distance, 0.01) - 0.05 * away - 0.0005 * a.clamp(-1, 1).square().sum(1)
    return torch.cat([p, pv, x, column(angle)], 1), torch.cat(seen, 1), reward


def test_pusht_is_its_equations():
    state = torch.cat([block_at(place, angle) for place in PLACES.values() for angle in (0.7, -2.0)])
    state[:, [1, 5]] += 0.33  # near the rim
    state[:, 2:4] += uniform(len(state), 2, reach=0.3)
    action = uniform(len(state), 2, seed=2, reach=1.2)
    assert_same_step(envs.pusht(F64).step, state, action, pusht_torch, rtol=1e-7)


def test_block_is_moved_clear_of_the_pusher_along_the_contacts_normal(monkeypatch):
    """Read off the states alone, over one physics step: the impulse goes through the pusher's centre."""
    monkeypatch.setattr(envs, "PUSHT_SUBSTEPS", 1)
    monkeypatch.setattr(envs, "PUSHT_DT", 0.01)
    task = envs.pusht.__wrapped__(F64)
    state = torch.cat([block_at(place, angle=0.3) for name, place in PLACES.items() if name != "far away"])
    after, observation, _ = task.step(state, torch.zeros(len(state), 2, dtype=F64))
    moved = after - state
    moment = cross(state[:, :2] - state[:, 4:6], moved[:, 4:6])  # about the pusher's centre it is zero
    torch.testing.assert_close(envs.BLOCK_GYRATION2 * moved[:, 6], moment, rtol=1e-9, atol=1e-12)
    outward = state[:, :2] - state[:, 4:6]
    assert ((moved[:, 4:6] * outward).sum(1) < 0).all() and not moved[:, :4].any()
    assert (observation[:, 12].abs() < 0.001).all()  # m; up to 0.003 before


def test_no_penetration_and_no_leap_at_any_action():
    """Bang-bang and pressing actions. Measured: 0.1 mm deep, 0.06 m a control step."""
    env, deepest, farthest, touching = make("pusht", 2048, seed=5, dtype=torch.float32), 0.0, 0.0, 0.0
    for k in range(128):
        before = env.state
        press = (before[:, 4:6] - before[:, :2]).sign()
        if k % 4 == 0:
            held = uniform(2048, 2, seed=k).float().sign()
        env.state, observation, _ = env.dynamics(before, torch.where(torch.arange(2048)[:, None] % 2 == 0, held, press))
        gap, moved = observation[:, 12], (env.state - before)[:, 4:6].norm(dim=1)
        deepest, farthest = max(deepest, -gap.min().item()), max(farthest, moved.max().item())
        touching += (gap < envs.CONTACT_SOFTNESS).double().mean().item() / 128
    assert touching > 0.2 and deepest < 0.01 * RADIUS and farthest < 0.1
    assert (env.state[:, 4:6] - 0.5).abs().max() < 0.75  # the rim holds
    assert 0 <= env.state[:, :2].min() and env.state[:, :2].max() <= 1


def test_the_block_is_gym_pushts():
    """30 of 512 pixels a unit, the pusher's radius 15; the block's centre of mass and moment of inertia."""
    assert 512 * U == 30 and 512 * RADIUS == 15
    assert envs.BLOCK_CENTRE == pytest.approx((0.5 + 2.5) / 2 * U)  # mean of bar's and stem's centres
    assert envs.BLOCK_GYRATION2 == pytest.approx(2 * (4**2 / 12 + 1**2 / 3) * U**2)  # twice the bar's, about its edge


def test_pushts_start_is_clear_of_the_block():
    env = make("pusht", 4096)
    gap = env.observe(env.state)[:, 12]
    assert gap.min() > envs.START_GAP and gap.median() > 0.1
    assert (env.state[:, 2:4] == 0).all()


def test_coverage_by_hand():
    """Moved along the bar by 0, 0.5, 1 and 10 units: sides of block and goal are parallel, and some lie on each other."""
    env, along = make("pusht"), torch.tensor([math.sqrt(0.5), math.sqrt(0.5), 0], dtype=F64)
    env.state[:, 4:7] = GOAL + torch.tensor([[0], [0.5], [1], [10]]) * U * along
    coverage = env.task.measures["coverage"](env.observe(env.state))
    assert (7 * coverage).tolist() == pytest.approx([7.0, 3.5 + 1.5, 3.0, 0.0], abs=1e-9)


def test_coverage_against_monte_carlo():
    def inside(q):
        x, y = q.abs()[:, 0], q[:, 1]
        return ((x < 2) & (y > 0) & (y < 1)) | ((x < 0.5) & (y > 0) & (y < 4))

    env = make("pusht", 40)
    env.state[:, 4:7] = GOAL + uniform(40, 3) * torch.tensor([0.08, 0.08, 4.0])
    samples, centre = uniform(400_000, 2, reach=4.0), torch.tensor([0.0, 1.5], dtype=F64)
    samples = samples[inside(samples)]
    measure = env.task.measures["coverage"]
    for pose, coverage in zip(env.state[:, 4:7], measure(env.observe(env.state))):
        world = pose[:2] + turn(pose[2], samples - centre) * U
        in_goal = turn(-GOAL[2], world - GOAL[:2]) / U + centre
        assert inside(in_goal).double().mean().item() == pytest.approx(coverage.item(), abs=0.01)
