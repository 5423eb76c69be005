"""What holds for every task, and the rules of an episode, on one task each.

That a task's step is its equations: pointmass here, navigation and pusht in test_contact.py, franka in test_arm.py.
"""

import math

import pytest
import torch
import warp as wp

import envs

F64 = torch.float64
every_task = pytest.mark.parametrize("name", list(envs.TASKS))


def make(name, num_envs=4, seed=1, dtype=F64):
    return envs.make(name, num_envs, seed=seed, dtype=dtype)


def uniform(*shape, seed=0, reach=1.0):
    """Random numbers in [-reach, reach)."""
    return reach * (2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64) - 1)


def moving_state(env):
    """A state in motion, soon after the start; of navigation and pusht every second environment is in contact."""
    with torch.no_grad():
        for n in range(3):
            env.step(uniform(env.num_envs, env.action_size, seed=n).to(env.dtype))
    state = env.state.clone()
    if env.name == "navigation":
        state[::2, :2] = state[::2, 7:9] + 0.15  # beside the first obstacle
    if env.name == "pusht":
        angle = state[::2, 6:7]
        state[::2, :2] = state[::2, 4:6] + 0.95 * envs.UNIT * torch.cat([angle.cos(), angle.sin()], 1)  # the inner corner
    return state


def goal_state(env, distance=0.0):
    """At rest, `distance` (m, rad) from the goal."""
    if env.name == "pointmass":
        x = torch.linspace(-0.5, 0.5, env.num_envs, dtype=env.dtype)
        return torch.stack([x, torch.zeros_like(x), x + distance], 1)
    if env.name == "franka":
        q = env.state[:, :7]
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
        outward = torch.tensor([math.sin(envs.GOAL_ANGLE), -math.cos(envs.GOAL_ANGLE)], dtype=env.dtype)
        state[:, :2] = 0.5 + 0.9 * envs.PUSHER_RADIUS * outward
    return state


def assert_same_step(step, state, action, reference, rtol=1e-9):
    """`step` does as `reference`: in values, and in the gradients of a random projection of each output by itself."""
    inputs = [state.detach().requires_grad_(), action.detach().requires_grad_()]
    got, want = step(*inputs), reference(*inputs)
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-11)
    for n, pair in enumerate(zip(got, want)):
        weight = uniform(*pair[0].shape, seed=n)
        gradients = [torch.autograd.grad((out * weight).sum(), inputs, retain_graph=True) for out in pair]
        torch.testing.assert_close(*gradients, rtol=rtol, atol=1e-10)


def pointmass_torch(state, action):
    x, v, target = state.T
    a = action[:, 0].clamp(-1, 1)
    v = v + 0.05 * (2.0 * a - 0.5 * v) / 1.0  # 1 kg, 2 N, 0.5 N s/m, 50 ms
    x = x + 0.05 * v
    reward = 0.02 - ((target - x) ** 2 + 0.02**2).sqrt() - 0.01 * a**2
    return torch.stack([x, v, target], 1), torch.stack([x, v, target - x], 1), reward


def test_pointmass_is_its_equations():
    state, action = uniform(64, 3, reach=3), uniform(64, 1, seed=1, reach=1.5)
    assert_same_step(make("pointmass").dynamics, state, action, pointmass_torch)


@every_task
def test_gradcheck_of_one_step(name):
    env = make(name, num_envs=2)
    state, action = moving_state(env).requires_grad_(), uniform(2, env.action_size, reach=0.9).requires_grad_()
    assert torch.autograd.gradcheck(env.dynamics, (state, action), eps=1e-7, atol=1e-5, rtol=1e-5)
    assert torch.autograd.gradcheck(env.observe, (state,), eps=1e-7, atol=1e-5, rtol=1e-5)


@every_task
def test_float32_follows_float64(name):
    double, single = make(name, 64), make(name, 64, dtype=torch.float32)
    state, action, results = moving_state(double), uniform(64, double.action_size, reach=1.2), []
    for env in (double, single):
        inputs = [state.to(env.dtype).requires_grad_(), action.to(env.dtype).requires_grad_()]
        outputs = env.dynamics(*inputs)
        gradients = torch.autograd.grad(sum(out.sum() for out in outputs), inputs)
        results.append([*outputs, env.observe(outputs[0]), *gradients])
    for wide, narrow in zip(*results):
        assert narrow.dtype == torch.float32 and (narrow - wide).abs().max() < 5e-5 * wide.abs().max().clamp(min=1)


@every_task
def test_reward_tells_the_action_where_to_go(name):
    env = make(name, num_envs=256, dtype=torch.float32)
    action = torch.zeros(256, env.action_size, requires_grad=True)  # no effort, so what is left is physics
    for state in (moving_state(env), goal_state(env, 1e-3)):
        (g,) = torch.autograd.grad(env.dynamics(state, action)[2].sum(), action)
        assert g.isfinite().all() and (g.norm(dim=1) > 1e-7).all()
        assert (g.abs().mean(0) > 1e-7).all()  # no action is without effect
    (g,) = torch.autograd.grad(env.dynamics(goal_state(env), action)[2].sum(), action)
    assert g.isfinite().all()  # at the goal itself, where a norm would have no derivative


@every_task
def test_an_action_that_is_not_a_number_ends_its_own_episode_only(name):
    env = make(name, num_envs=9)
    A = env.action_size
    action = uniform(9, A)
    expected = [x[A:] for x in env.dynamics(env.state, action)]
    action[range(A), range(A)] = math.nan  # each component once; the other environments are sound
    before = env.state
    observation, reward, _, truncated, info = env.step(action)
    assert truncated.tolist() == [True] * A + [False] * (9 - A)
    assert reward[:A].isnan().all() and info["final_obs"][:A].isnan().any(1).all()  # what broke stays visible
    assert observation.isfinite().all() and (env.state[:A] != before[:A]).any(1).all()  # and then it starts anew
    assert torch.equal(observation, env.observe(env.state))
    assert all(torch.equal(x[A:], y) for x, y in zip((env.state, observation, reward), expected))
    assert env.elapsed.tolist() == [0] * A + [1] * (9 - A)


# ------------------------------------------------------------------------------------------------------------- episodes


def test_reset_in_the_same_step():
    env = make("navigation")
    old, action = env.state.clone().requires_grad_(), uniform(4, 2).requires_grad_()
    env.state, env.elapsed = old, torch.tensor([env.episode_length - 1, 0, env.episode_length - 1, 5])
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
    for x in (old, action):
        reached = lambda out, x=x: torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0].any(1)
        assert reached(info["final_obs"]).all()
        assert torch.equal(reached(observation), ~ended) and torch.equal(reached(env.state), ~ended)


def play(env, steps, seed=0):
    """Observations and rewards of some random steps."""
    results = [env.step(uniform(env.num_envs, env.action_size, seed=seed + n))[:2] for n in range(steps)]
    return torch.cat([torch.cat([observation, reward[:, None]], 1) for observation, reward in results])


def test_seeds():
    before = torch.get_rng_state()
    first, second, other = make("pusht"), make("pusht"), make("pusht", seed=2)
    steps = first.episode_length + 2  # through a reset by time
    run = play(first, steps)
    assert torch.equal(run, play(second, steps)) and (run != play(other, steps)).any(1).all()
    start = first.reset(seed=7)[0]
    assert len(start.unique(dim=0)) == 4 and not first.elapsed.any()  # environments differ
    assert not torch.equal(start, first.reset()[0])  # without a seed the generator goes on
    torch.manual_seed(123)
    assert torch.equal(start, first.reset(seed=7)[0]) and not torch.equal(start, first.reset(seed=8)[0])
    torch.set_rng_state(before)
    make("pusht")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loaded_state_goes_on_to_the_bit():
    first, second = make("pusht"), make("pusht", seed=2)
    first.elapsed = torch.tensor([first.episode_length - 4, 0, 5, 60])
    play(first, 2)
    saved = first.state_dict()
    expected = play(first, 8, seed=2)  # the first environment ends in it, and starts anew
    assert first.elapsed.tolist() == [6, 10, 15, 70]
    for _ in range(2):  # what was saved is not touched by going on
        second.load_state_dict(saved)
        assert torch.equal(play(second, 8, seed=2), expected)


TOLERANCES = {  # m and rad
    "pointmass": {"position_error": 0.02},
    "navigation": {"position_error": 0.05, "contact_depth": 0.0},
    "pusht": {"position_error": 0.02, "angle_error": 0.1},
    "franka": {"position_error": 0.02, "angle_error": 0.15},
}


@every_task
def test_errors_are_in_metres_and_radians(name):
    env = make(name)
    assert env.task.tolerances == TOLERANCES[name]
    state = goal_state(env)
    if name == "pointmass":
        state[:, 2] -= 0.05
    else:
        place = 21 if name == "franka" else 4
        state[:, place : place + 2] += torch.tensor([0.03, -0.04], dtype=F64)
    if name == "navigation":
        state[:, 6] = -0.2  # the smallest clearance so far
    elif name == "pusht":
        state[:, 6] -= 0.2 + 2 * math.pi
    elif name == "franka":  # turn the target about the world's z axis
        c, s = math.cos(0.2), math.sin(0.2)
        turn = torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=F64)
        state[:, 24:] = (turn @ state[:, 24:].unflatten(1, (3, 3))).flatten(1)
    errors = env.task.errors(env.observe(state), state)
    assert errors.keys() == TOLERANCES[name].keys()
    for error, size in errors.items():
        expected = torch.full((4,), 0.05 if error == "position_error" else 0.2, dtype=F64)
        torch.testing.assert_close(size, expected, rtol=1e-9, atol=0)


def test_success_is_every_error_within_tolerance_at_each_of_the_last_ten_steps():
    env, errors = make("pointmass", 5), torch.full((10, 2, 5), 0.5)
    errors[0, 0, 1] = errors[9, 0, 2] = errors[4, 1, 3] = 1.0  # one error, once; environments 0 and 4 succeed
    left = iter(errors)
    env.task = env.task._replace(
        errors=lambda observation, state: dict(zip("ab", next(left))), tolerances={"a": 1.0, "b": 1.0}
    )
    result = envs.score(env, lambda observation: observation[:, 2:])
    assert result["success"] == 0.4 and next(left, None) is None
    assert result["a"] == pytest.approx(0.52) and result["b"] == pytest.approx(0.51)


def test_score_plays_one_whole_episode_from_the_seeds_starts():
    env, policy = make("pointmass", 64), lambda observation: observation[:, 2:]
    speed = lambda observation: observation[:, 1]
    env.task = env.task._replace(measures={"speed": speed})
    result = envs.score(env, policy, seed=7)
    observation, total = env.reset(seed=7)[0], 0.0
    for _ in range(env.episode_length):
        observation, reward, *_, info = env.step(policy(observation))
        last, total = info["final_obs"], total + reward.mean().item()
    assert result["return"] == pytest.approx(total) and result["speed"] == pytest.approx(speed(last).mean().item())


@pytest.mark.parametrize("task", ["pointmass", "navigation", "pusht"])  # the arm's kernels take more than a minute
def test_kernels_compile_for_cuda_without_a_gpu(task, tmp_path, monkeypatch):
    kernels, original = [], envs.WarpFunction

    def noted(kernel, *rest, **more):
        kernels.append(kernel)
        return original(kernel, *rest, **more)

    monkeypatch.setattr(envs, "WarpFunction", noted)
    envs.TASKS[task].__wrapped__(torch.float32)
    for kernel in kernels:
        wp.compile_aot_module(kernel.module, arch=80, use_ptx=True, module_dir=tmp_path)
    assert len(kernels) == len(list(tmp_path.glob("*.sm80.ptx"))) == 2
