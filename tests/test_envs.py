"""The tasks: gradients against finite differences and against the same physics in plain torch, then the episode's rules."""

import itertools

import pytest
import torch
from test_arm import TorchArm

import bridge
import envs

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch.func.jvp's own
every_task = pytest.mark.parametrize("name", list(envs.TASKS))
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def make(name, num_envs=4, seed=1, dtype=torch.float64):
    return envs.make(name, num_envs, seed=seed, dtype=dtype)


def random_action(env, seed=0, scale=0.9):
    generator = torch.Generator().manual_seed(seed)
    return scale * (2 * torch.rand(env.num_envs, env.action_size, generator=generator, dtype=torch.float64).to(env.dtype) - 1)


def random_state(env):
    """A state in motion: a few random steps after the start."""
    with torch.no_grad():
        for n in range(5):
            env.step(random_action(env, seed=n))
    return env.state.clone().requires_grad_()


def goal_state(env, distance=0.0):
    """At rest, `distance` (m, rad) from the goal."""
    if env.name == "pointmass":
        x = torch.linspace(-0.5, 0.5, env.num_envs, dtype=env.dtype)
        return torch.stack([x, torch.zeros_like(x), x + distance], 1)
    if env.name == "franka":
        q = env.state[:, :7].detach()
        position, rotation = envs.franka_flange_pose(q + distance)
        return torch.cat([q, torch.zeros_like(q), q, position, rotation.flatten(1)], 1)
    state = env.state.clone()
    if env.name == "navigation":
        state[:, :4] = 0
        state[:, 4:6] = distance
        state[:, 7::3] += 5  # the obstacles out of the way
    if env.name == "pusht":  # the pusher touches the middle of the bar's outer edge, which faces down and right at the goal
        state[:] = 0
        state[:, 4:7] = torch.tensor([*envs.GOAL, envs.GOAL_ANGLE], dtype=env.dtype) + distance
        outward = torch.tensor([envs.GOAL_ANGLE], dtype=env.dtype).sin(), -torch.tensor([envs.GOAL_ANGLE], dtype=env.dtype).cos()
        state[:, :2] = state[:, 4:6] + (envs.BLOCK_CENTRE + 0.9 * envs.PUSHER_RADIUS) * torch.cat(outward)
    return state


# ------------------------------------------------------------------------------------------------------------- gradients


@every_task
def test_gradcheck_of_one_step(name):
    env = make(name, num_envs=2)
    state, action = random_state(env), random_action(env).requires_grad_()
    assert torch.autograd.gradcheck(env.dynamics, (state, action))
    assert torch.autograd.gradcheck(env.observe, (state,))


@every_task
def test_gradcheck_of_an_eight_step_rollout(name):
    env = make(name, num_envs=2)
    actions = torch.stack([random_action(env, seed=n) for n in range(8)]).requires_grad_()

    def rollout(state, actions):
        total = 0
        for action in actions:
            state, observation, reward = env.dynamics(state, action)
            total = total + reward
        return state, observation, total

    assert torch.autograd.gradcheck(rollout, (random_state(env), actions))


@every_task
@every_dtype
def test_reward_tells_the_action_where_to_go(name, dtype):
    env = make(name, num_envs=64, dtype=dtype)
    action = torch.zeros(64, env.action_size, dtype=dtype, requires_grad=True)  # no effort, so what is left is physics
    for state in (random_state(env).detach(), goal_state(env, 1e-3)):
        (g,) = torch.autograd.grad(env.dynamics(state, action)[2].sum(), action)
        assert g.isfinite().all() and (g.norm(dim=1) > 1e-7).all()
        assert (g.abs().mean(0) > 1e-7).all()  # no action is without effect
    g = torch.autograd.grad(env.dynamics(goal_state(env), action)[2].sum(), action)[0]
    assert g.isfinite().all()  # at the goal itself, where a norm would have no derivative


def assert_same_step(env, state, action, reference, rtol=1e-9):
    """Compare env.dynamics with `reference` in values, and in the gradient of a random projection of all of them."""
    inputs = [state.detach().requires_grad_(), action.detach().requires_grad_()]
    got, want = env.dynamics(*inputs), reference(*inputs)
    weights = [torch.randn(w.shape, dtype=w.dtype, generator=torch.Generator().manual_seed(n)) for n, w in enumerate(want)]
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-11)
    for g, w, weight in zip(got, want, weights):  # each output by itself
        gradients = [torch.autograd.grad((out * weight).sum(), inputs, retain_graph=True) for out in (g, w)]
        torch.testing.assert_close(*gradients, rtol=rtol, atol=1e-10)


def pointmass_torch(state, action):
    x, v, target = state.T
    a = action[:, 0].clamp(-1, 1)
    v = v + 0.05 * (2.0 * a - 0.5 * v) / 1.0  # 1 kg, 2 N, 0.5 N s/m, 50 ms
    x = x + 0.05 * v
    reward = 0.02 - ((target - x) ** 2 + 0.02**2).sqrt() - 0.01 * a**2
    return torch.stack([x, v, target], 1), torch.stack([x, v, target - x], 1), reward


def test_pointmass_is_its_equations():
    env = make("pointmass", num_envs=64)
    state = random_state(env).detach() * 3
    action = random_action(env, scale=1.5)
    assert (action.abs() > 1).any()
    assert_same_step(env, state, action, pointmass_torch, rtol=1e-12)


def franka_torch(state, action):
    """design: an impedance law that tracks a moving joint target, linearly implicit, gravity compensated; see TorchArm."""
    arm, h = TorchArm(), 0.005
    tensor = lambda values: torch.tensor(values, dtype=torch.float64)
    k, d = tensor([600.0] * 4 + [250, 150, 50]), tensor([50.0] * 4 + [10, 8, 4])
    armature, speed = tensor([0.195] * 4 + [0.074] * 3), tensor([2.62] * 4 + [5.26, 4.18, 5.26])
    share = tensor([0.35, 0.2, 0.35, 0.3, 0.35, 0.4, 0.5])
    lower = tensor([-2.7437, -1.7837, -2.9007, -3.0421, -2.8065, 0.5445, -3.0159])
    upper = tensor([2.7437, 1.7837, 2.9007, -0.1518, 2.8065, 4.5169, 3.0159])
    q, v, old, p_target, R_target = state.split([7, 7, 7, 3, 9], 1)
    R_target = R_target.unflatten(1, (3, 3))
    a = action.clamp(-1, 1)
    new = torch.minimum(torch.maximum(old + a * share * speed * 0.02, lower + 0.05), upper - 0.05)
    for n in range(1, 5):
        target = old + n / 4 * (new - old)
        A = arm.mass_matrix(q) + torch.diag(armature + h * d + h * h * k)
        force = k * (target - q - h * v) - d * v - arm.coriolis_torque(q, v)
        v = v + h * torch.linalg.solve(A, force)
        q = q + h * v
    p, R = arm.flange_pose(q)
    keypoints = [(p + s * 0.2 * R[:, :, c]) - (p_target + s * 0.2 * R_target[:, :, c]) for s in (-1, 1) for c in range(3)]
    distance2 = sum((e**2).sum(1) for e in keypoints) / 6
    reward = 0.02 - (distance2 + 0.02**2).sqrt() - 0.01 * (a**2).sum(1)
    squashed = lambda z, scale: z / (z**2 + scale**2).sqrt()
    dp, dR = p_target - p, (R_target - R).flatten(1)
    errors = torch.cat([new - q, dp, dR, squashed(dp, 0.05), squashed(dR, 0.15)], 1)
    return torch.cat([q, v, new, p_target, R_target.flatten(1)], 1), torch.cat([q, v, errors], 1), reward


def test_franka_is_its_equations():
    env = make("franka", num_envs=16)
    state, action = random_state(env).detach(), random_action(env, scale=1.5)
    generator = torch.Generator().manual_seed(0)
    state[:, 7:14] = torch.randn(16, 7, generator=generator, dtype=torch.float64)  # fast, so that Coriolis forces count
    state[:4, 14:21] = torch.tensor([j.upper - 0.051 for j in envs.FR3], dtype=torch.float64)  # and targets at their limits
    state[4:8, 14:21] = torch.tensor([j.lower + 0.051 for j in envs.FR3], dtype=torch.float64)
    assert_same_step(env, state, action, franka_torch)


@every_task
def test_actions_beyond_one_are_clipped(name):
    env = make(name)
    state, action = random_state(env), (3 * random_action(env, scale=1)).requires_grad_()
    over = action.abs() > 1
    assert over.any() and not over.all()
    got, want = env.dynamics(state, action), env.dynamics(state, action.clamp(-1, 1))
    assert all(torch.equal(g, w) for g, w in zip(got, want))
    (g,) = torch.autograd.grad(got[2].sum(), action)
    assert not g[over].any() and g[~over].all()


@every_task
def test_float32_follows_float64(name):
    double, single = make(name), make(name, dtype=torch.float32)
    single.state = double.state.float()
    with torch.no_grad():
        for n in range(50):
            action = random_action(double, seed=n)
            o64, r64, *_ = double.step(action)
            o32, r32, *_ = single.step(action.float())
    assert o32.dtype == r32.dtype == torch.float32
    assert (o32 - o64).abs().max() < 1e-4 and (r32 - r64).abs().max() < 1e-5


# -------------------------------------------------------------------------------------------------------------- episodes


@every_task
@every_dtype
def test_shapes_and_types(name, dtype):
    env = make(name, num_envs=3, dtype=dtype)
    N, O, A, S = 3, env.observation_size, env.action_size, env.state_size
    reset, info = env.reset()
    assert reset.shape == (N, O) and reset.dtype == dtype and info == {}
    observation, reward, terminated, truncated, info = env.step(torch.zeros(N, A, dtype=dtype))
    assert observation.shape == info["final_obs"].shape == (N, O) and env.state.shape == (N, S) and reward.shape == (N,)
    assert observation.dtype == reward.dtype == env.state.dtype == info["final_obs"].dtype == dtype
    for flag in (terminated, truncated, info["success"]):
        assert flag.shape == (N,) and flag.dtype == torch.bool
    for error in env.task.tolerances:
        assert info[error].shape == (N,) and not info[error].requires_grad
    assert torch.equal(env.observe(env.state), observation)
    assert env.num_envs == N and env.control_dt > 0


@every_task
def test_episodes_end_by_time_and_only_by_time(name):
    env = make(name)
    with torch.no_grad():
        for t in range(1, 2 * env.episode_length + 2):
            _, _, terminated, truncated, _ = env.step(random_action(env, seed=t))
            assert not terminated.any()
            assert truncated.all() if t % env.episode_length == 0 else not truncated.any()


@every_task
def test_reset_in_the_same_step(name):
    env = make(name)
    T = env.episode_length
    old = random_state(env)
    action = random_action(env, seed=9).requires_grad_()
    env.state, env.elapsed = old, torch.tensor([T - 1, 0, T - 1, 5])
    observation, reward, _, truncated, info = env.step(action)
    state_next, observation_next, reward_next = env.dynamics(old, action)
    ended = torch.tensor([True, False, True, False])
    assert torch.equal(truncated, ended) and env.elapsed.tolist() == [0, 1, 0, 6]
    # what the step led to, in every environment
    assert torch.equal(info["final_obs"], observation_next) and torch.equal(reward, reward_next)
    # going on where the episode does, starting anew where it ended
    assert torch.equal(observation[~ended], observation_next[~ended]) and torch.equal(env.state[~ended], state_next[~ended])
    assert torch.equal(observation, env.observe(env.state))
    assert (observation[ended] != observation_next[ended]).any(1).all() and not torch.equal(env.state[0], env.state[2])
    weight = torch.randn(observation.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for x in (old, action):
        gradient = lambda out, x=x: torch.autograd.grad((out * weight[:, : out.shape[1]]).sum(), x, retain_graph=True)[0]
        assert gradient(info["final_obs"]).any(1).all()
        for out in (observation, env.state):
            assert torch.equal(gradient(out).any(1), ~ended)


@every_task
def test_success_is_ten_steps_in_a_row_within_tolerance(name):
    env = make(name)
    stay = torch.zeros(4, env.action_size, dtype=torch.float64)

    def steps(count):
        return [env.step(stay)[4]["success"].tolist() for _ in range(count)]

    with torch.no_grad():
        at_goal, away = goal_state(env), goal_state(env, 0.3)
        env.state = at_goal
        assert steps(12) == [[False] * 4] * 9 + [[True] * 4] * 3
        env.state = torch.cat([away[:1], at_goal[1:]])  # one leaves, for one step
        assert steps(1) == [[False, True, True, True]]
        env.state = at_goal
        assert steps(10) == [[False, True, True, True]] * 9 + [[True] * 4]
        env.elapsed = torch.tensor([env.episode_length - 1, 0, 0, 0])
        assert steps(1) == [[True] * 4]  # the last step still counts for the old episode
        env.state = at_goal
        assert steps(1) == [[False, True, True, True]]  # and not for the new one
        env.reset()
        env.state = at_goal
        assert steps(1) == [[False] * 4]


LIMITS = {  # m, rad
    "pointmass": {"position_error": 0.02},
    "navigation": {"position_error": 0.05, "contact_depth": 0.0},
    "pusht": {"position_error": 0.02, "angle_error": 0.1},
    "franka": {"position_error": 0.02, "angle_error": 0.15},
}


@every_task
def test_each_error_alone_prevents_success(name):
    env = make(name)
    for error in env.task.tolerances:
        limit = LIMITS[name][error]
        for factor, expected in ((0.9, True), (1.1, False)):
            env.reset()
            env.state = goal_state(env)
            if name == "pusht":
                env.state[:, :2] += 0.3  # nowhere near the block
            where = {"pointmass": 2, "navigation": 4, "pusht": 4, "franka": 21}
            if error == "contact_depth":
                env.state[:, 6] = 1 - factor  # the smallest clearance so far: 0.1 m, or 0.1 m deep
            elif error == "position_error":
                env.state[:, where[name]] += factor * limit
            elif name == "pusht":
                env.state[:, 6] += factor * limit
            else:  # turn the target about the world's z axis
                c, s = torch.cos(torch.tensor(factor * limit)).item(), torch.sin(torch.tensor(factor * limit)).item()
                turn = torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float64)
                env.state[:, 24:] = (turn @ env.state[:, 24:].unflatten(1, (3, 3))).flatten(1)
            for _ in range(10):
                info = env.step(torch.zeros(4, env.action_size, dtype=torch.float64))[4]
            expected_error = factor - 1 if error == "contact_depth" else factor * limit
            torch.testing.assert_close(info[error], torch.full((4,), expected_error, dtype=torch.float64), rtol=1e-6, atol=0)
            assert info["success"].tolist() == [expected] * 4


@every_task
def test_seeds(name):
    before = torch.get_rng_state()
    first, second, other = make(name), make(name), make(name, seed=2)

    def run(env):
        observations = [env.reset()[0]] + [env.step(random_action(env, seed=t))[0] for t in range(env.episode_length + 2)]
        return torch.stack(observations)

    with torch.no_grad():
        a, b, c = run(first), run(second), run(other)
        assert torch.equal(a, b)  # through a reset by time too
        assert (a != c).any(2).all()
        assert not torch.equal(run(first), a)  # without a seed the generator goes on
        start = first.reset(seed=7)[0]
        assert torch.equal(start, first.reset(seed=7)[0]) and not torch.equal(start, first.reset(seed=8)[0])
        torch.manual_seed(123)
        assert torch.equal(start, first.reset(seed=7)[0])
    assert len(start.unique(dim=0)) == 4  # environments differ
    torch.set_rng_state(before)
    make(name), run(second)
    assert torch.equal(torch.get_rng_state(), before)


@every_task
def test_what_is_recorded(name):
    env = make(name)
    actions = [random_action(env, seed=n).requires_grad_() for n in range(3)]
    with torch.no_grad():
        observation, reward, *_, info = env.step(actions[0])
    assert not any(x.requires_grad for x in (observation, reward, env.state, info["final_obs"]))
    assert not env.step(actions[0].detach())[1].requires_grad  # nor when nothing asks for it
    env.step(actions[0])
    reward = env.step(actions[1])[1]
    assert all(g.any(1).all() for g in torch.autograd.grad(reward.sum(), actions[:2]))
    env.detach()
    assert not env.state.requires_grad
    reward = env.step(actions[2])[1]
    before, after = torch.autograd.grad(reward.sum(), actions[1:], allow_unused=True)
    assert before is None and after.any(1).all()
    env.state = random_state(env)  # assignable, and then differentiable in it
    leaf = env.state
    assert torch.autograd.grad(env.step(actions[2])[1].sum(), leaf)[0].any(1).all()


@pytest.mark.parametrize("arguments, message", [(("pendulum", 4), "'pendulum'.*pointmass.*franka"), (("pointmass", 0), "num_envs.*0"), (("franka", -3), "num_envs.*-3")])
def test_bad_arguments_get_one_clear_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        envs.make(*arguments)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------- franka


def worst_use_of_limits(actions, env):
    """Largest shares of range, speed and effort over all substeps, of N arms driven by actions [steps, N, 7].

    The arm is driven a second time from its own forward dynamics: with the implicit gains as armature, that is the
    control law. So each substep is seen, and the result is held against the environment's.
    """
    arm, h = TorchArm(), 0.005
    column = lambda values: torch.tensor(values, dtype=torch.float64)
    k, d = column(envs.STIFFNESS), column(envs.DAMPING)
    implicit = column(envs.ARMATURE) + h * d + h * h * k
    low, high, speed, effort = (column([getattr(j, f) for j in envs.FR3]) for f in ("lower", "upper", "speed", "effort"))
    used = dict.fromkeys(("range", "speed", "effort"), 0.0)
    state = env.state
    for action in actions:
        q, v, old = state[:, :7], state[:, 7:14], state[:, 14:21]
        state = env.dynamics(state, action)[0]
        for n in range(1, 5):
            target = old + n / 4 * (state[:, 14:21] - old)
            gravity = arm.gravity_torque(q)
            qdd = envs.franka_forward_dynamics(q, v, k * (target - q - h * v) - d * v + gravity, implicit)
            v = v + h * qdd
            q = q + h * v
            torque = k * (target - q) - d * v + gravity
            shares = {"range": (2 * q - low - high) / (high - low), "speed": v / speed, "effort": torque / effort}
            used = {name: max(used[name], share.abs().max().item()) for name, share in shares.items()}
        assert (state[:, :7] - q).abs().max() < 1e-9 and (state[:, 7:14] - v).abs().max() < 1e-7
    return used


def test_franka_stays_within_its_limits_whatever_the_action():
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=7)), dtype=torch.float64)  # all 128 of them
    generator = torch.Generator().manual_seed(0)
    drives = {"to the limits, then back": torch.cat([signs.expand(140, 128, 7), -signs.expand(60, 128, 7)])}
    for hold in (1, 5, 15, 30):  # control steps for which a random sign is held
        bang = 2 * torch.randint(2, (120 // hold, 128, 7), generator=generator).double() - 1
        drives[f"bang-bang, held for {hold}"] = bang.repeat_interleave(hold, 0)
    with torch.no_grad():
        used = {drive: worst_use_of_limits(actions, make("franka", num_envs=128)) for drive, actions in drives.items()}
    for drive, shares in used.items():
        print(drive, {name: round(share, 3) for name, share in shares.items()})
        assert shares["effort"] > 0.2 and shares["speed"] > 0.1  # it does drive the arm
    assert used["to the limits, then back"]["range"] > 0.95  # and to its limits
    assert max(share for shares in used.values() for share in shares.values()) <= 1


# ------------------------------------------------------------------------------------------------------------- CPU threads


@every_task
@pytest.mark.parametrize("num_envs", [1, 2, 3, 257])
def test_same_bits_from_any_number_of_threads(name, num_envs, monkeypatch):
    monkeypatch.setattr(bridge, "WORTH_SPLITTING", 0.0)
    results = []
    try:
        for threads in (1, 2, 3):
            bridge.set_num_threads(threads)
            env = make(name, num_envs, dtype=torch.float32)
            for _ in range(bridge.TRIALS + 1):  # before and after the launches are split
                env.reset(seed=1)
                state, action = env.state.requires_grad_(), random_action(env).requires_grad_()
                final, observation, reward = env.dynamics(*env.dynamics(state, action)[:1], action)
                gradients = torch.autograd.grad([final.sum(), observation.square().sum(), reward.sum()], [state, action])
                results.append([final, observation, reward, env.observe(state), *gradients])
    finally:
        bridge.set_num_threads(1)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0]))


# ----------------------------------------------------------------------------------------------------- policies that fail


def idle(env, observation):
    return torch.zeros(env.num_envs, env.action_size)


def erratic(env, observation):
    return 2 * torch.rand(env.num_envs, env.action_size) - 1


def headlong(env, observation):
    """Full speed in the direction of the goal: of the target, the goal, the block, or down the pose error's gradient."""
    if env.name == "franka":
        q = observation[:, :7].detach().requires_grad_()
        with torch.enable_grad():
            p, R = envs.franka_flange_pose(q)
            p_target, R_target = env.state[:, 21:24], env.state[:, 24:].unflatten(1, (3, 3))
            distance2 = (p_target - p).square().sum(1) + 0.04 / 3 * (R_target - R).square().sum((1, 2))
            return -torch.autograd.grad(distance2.sum(), q)[0].sign()
    if env.name == "pusht":
        return (env.state[:, 4:6] - env.state[:, :2]).sign()
    return (observation[:, 2:3] if env.name == "pointmass" else observation[:, :2]).sign()


# Shares of success at most. A mass on a line may start on its target, and the way to the goal may be free.
MOST = {"pointmass": 0.1, "navigation": 0.15, "pusht": 0.01, "franka": 0.02}


@pytest.mark.parametrize("policy", [idle, erratic, headlong])
@every_task
def test_policies_without_a_plan_fail(name, policy):
    torch.manual_seed(0)
    env = envs.make(name, 512)
    result = envs.score(env, lambda observation: policy(env, observation))
    assert result["success"] <= MOST[name]
