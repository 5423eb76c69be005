"""APG's gradient against plain backpropagation, its targets against numbers worked out by hand, and its command line."""

import csv
import sys

import pytest
import torch

import apg
import envs
import evaluate
from models import Actor, Critic, Normalizer, load_checkpoint

GAMMA = 0.97
TASKS = list(envs.TASKS)


def setup(task, spread, num_envs=3, hidden=16):
    """A float64 environment, policy and critic, the same at each call. `spread` puts episodes' ends inside a rollout."""
    torch.manual_seed(0)
    env = envs.make(task, num_envs, seed=3, dtype=torch.float64)
    actor = Actor(env.observation_size, env.action_size, hidden).double()
    critic = Critic(env.observation_size, hidden).double()
    normalizer = Normalizer(env.observation_size).double()
    normalizer.mean += 0.1
    for parameter in actor.parameters():  # away from the near-zero start, so that the policy moves things
        parameter.data += 0.1 * torch.randn_like(parameter)
    if spread:
        env.elapsed = env.episode_length - 1 - torch.arange(num_envs) * 5 - 3
    torch.manual_seed(1)
    return env, actor, critic, normalizer


def gradient(actor):
    return torch.cat([p.grad.flatten() for p in actor.parameters()])


def apg_gradient(task, segment, steps, bootstrap="mc", costate_clip=0.0, spread=True):
    """What apg.main does in one iteration, as a flat gradient of the objective summed over environments."""
    env, actor, critic, normalizer = setup(task, spread)
    value = (lambda o: critic(normalizer(o))) if bootstrap == "critic" else None
    hand_over = bootstrap == "mc"
    segments, _ = apg.rollout_in_segments(env, actor, normalizer, steps, segment, GAMMA, hand_over, costate_clip, value)
    apg.backward(segments, 1.0)
    return gradient(actor)


def plain_gradient(task, steps, bootstrap="mc", spread=True):
    """The same by one loop and one backward, written anew: nothing is cut but at the ends of episodes."""
    env, actor, critic, normalizer = setup(task, spread)
    state, elapsed = env.state, env.elapsed.clone()
    discount = [1.0] * env.num_envs
    total = 0.0
    for step in range(steps):
        observation = env.observe(state)
        mean = actor.mean(normalizer(observation))
        action = torch.tanh(mean + actor.log_std.exp() * torch.randn_like(mean))
        next_state, next_observation, reward = env.dynamics(state, action)
        rows = []
        elapsed += 1
        fresh = env._start() if (elapsed >= env.episode_length).any() else None
        for i in range(env.num_envs):
            total = total + discount[i] * reward[i]
            discount[i] *= GAMMA
            ended = bool(elapsed[i] >= env.episode_length)
            if bootstrap == "critic" and (ended or step == steps - 1):
                total = total + discount[i] * critic(normalizer(next_observation[i]))
            if ended:
                discount[i], elapsed[i] = 1.0, 0
            rows.append(fresh[i] if ended else next_state[i])
        state = torch.stack(rows)
    total.backward()
    return gradient(actor)


def assert_same(a, b):
    assert b.abs().max() > 1e-3  # a comparison of zeros would prove nothing
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10 * b.abs().max().item())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("segment", [1, 7, 32, "T"])
def test_mc_is_full_backpropagation_at_any_segment(task, segment):
    steps = envs.EPISODE_LENGTH[task]
    assert_same(apg_gradient(task, steps if segment == "T" else segment, steps), plain_gradient(task, steps))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("costate_clip", [0.0, 0.05])
def test_recomputing_changes_no_bit(task, costate_clip):
    """Not of the gradient, the record, the environment afterwards or the random numbers to come."""
    results = []
    for recompute in (False, True):
        env, actor, _, normalizer = setup(task, spread=True)
        segments, record = apg.rollout_in_segments(
            env, actor, normalizer, 40, 16, GAMMA, True, costate_clip, recompute=recompute
        )
        apg.backward(segments, 1.0)
        following, *_ = env.step(actor.sample(normalizer(env.observe(env.state)))[0])
        results.append([gradient(actor), *record, env.state, env.elapsed, env.settled, env._start(), following])
    assert results[0][0].abs().max() > 1e-3
    assert all(torch.equal(x, y) for x, y in zip(*results))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("bootstrap", ["none", "critic"])
def test_one_segment_is_plain_backpropagation(task, bootstrap):
    steps = envs.EPISODE_LENGTH[task]
    for spread in (False, True):
        plain = plain_gradient(task, steps, bootstrap, spread)
        assert_same(apg_gradient(task, steps, steps, bootstrap, spread=spread), plain)


@pytest.mark.parametrize("task", TASKS)
def test_none_sums_gradients_of_separate_segments(task):
    """A cut stops the gradient: two segments under `none` differ from one of twice the length, and from mc."""
    cut, uncut = (apg_gradient(task, k, 20, "none", spread=False) for k in (10, 20))
    assert (cut - uncut).abs().max() > 1e-3 * uncut.abs().max()


@pytest.mark.parametrize("task", TASKS)
def test_what_happened_before_the_cut_changes_no_gradient_after_it(task):
    after = []
    for history in (0.5, -0.5):
        env, actor, _, normalizer = setup(task, spread=False)
        action = torch.full((env.num_envs, env.action_size), history, dtype=torch.float64, requires_grad=True)
        for _ in range(4):
            env.step(action)
        before_cut = env.state
        env.detach()
        env.state.copy_(setup(task, spread=False)[0].state)  # same state, another past
        torch.manual_seed(1)
        objective, _, _ = apg.rollout(env, actor, normalizer, torch.ones(env.num_envs).double(), 5, GAMMA)
        objective.backward()
        assert before_cut.requires_grad and action.grad is None
        after.append(gradient(actor))
    assert torch.equal(after[0], after[1])


@pytest.mark.parametrize("task", TASKS)
def test_costate_clip(task):
    """Against a costate recursion written out by hand, whatever the segment; and no effect when the bound is loose."""
    steps, limit = 12, 0.05
    env, actor, _, normalizer = setup(task, spread=False)
    states, noises = [env.state], []
    with torch.no_grad():
        for _ in range(steps):
            noises.append(torch.randn(env.num_envs, env.action_size, dtype=torch.float64))
            action = torch.tanh(actor.mean(normalizer(env.observe(states[-1]))) + actor.log_std.exp() * noises[-1])
            states.append(env.dynamics(states[-1], action)[0])
    costate, total, clipped = torch.zeros_like(env.state), [torch.zeros_like(p) for p in actor.parameters()], 0
    for t in reversed(range(steps)):
        state = states[t].clone().requires_grad_()
        action = torch.tanh(actor.mean(normalizer(env.observe(state))) + actor.log_std.exp() * noises[t])
        next_state, _, reward = env.dynamics(state, action)
        hamiltonian = GAMMA**t * reward.sum() + (costate * next_state).sum()
        costate, *grads = torch.autograd.grad(hamiltonian, [state, *actor.parameters()])
        total = [a + b for a, b in zip(total, grads)]
        norm = costate.norm(dim=1, keepdim=True)
        clipped += (norm > limit).sum().item()
        costate = torch.where(norm > limit, costate * limit / norm, costate)
    assert clipped > steps
    reference = torch.cat([g.flatten() for g in total])
    for segment in (1, 5, steps):
        assert_same(apg_gradient(task, segment, steps, costate_clip=limit, spread=False), reference)
    assert_same(apg_gradient(task, 5, steps, costate_clip=1e9), apg_gradient(task, 5, steps))


def test_td_lambda_targets_by_hand():
    """K = 3, gamma 0.5, lambda 0.5. First environment: the segment ends; second: an episode ends after step 1."""
    reward = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    next_value = torch.tensor([[4.0, 4.0], [8.0, 8.0], [16.0, 16.0]])
    truncated = torch.tensor([[False, False], [False, True], [False, False]])
    # G2 = 3 + .5*16 = 11; G1 = 2 + .5*(.5*8 + .5*11) = 6.75; G0 = 1 + .5*(.5*4 + .5*6.75) = 3.6875
    # with the end: G1 = 2 + .5*8 = 6; G0 = 1 + .5*(.5*4 + .5*6) = 3.5
    expected = torch.tensor([[3.6875, 3.5], [6.75, 6.0], [11.0, 11.0]])
    assert torch.equal(apg.td_lambda_targets(reward, truncated, next_value, 0.5, 0.5), expected)


def test_log_density_of_a_sample():
    actor = Actor(4, 2, 16, log_std=-0.7)
    observation = torch.randn(5, 4)
    action, u = actor.sample(observation)
    assert torch.equal(action, torch.tanh(u))
    log_prob, entropy = actor.log_prob(observation, u)
    eps = (u - actor.mean(observation)) / torch.tensor(-0.7).exp()
    torch.testing.assert_close(log_prob, (-(eps**2) / 2 + 0.7 - 0.5 * torch.tensor(2 * torch.pi).log()).sum(1))
    torch.testing.assert_close(entropy, torch.full((5,), 2 * (0.5 * torch.tensor(2 * torch.pi * torch.e).log().item() - 0.7)))


def test_normalizer_merges_batches():
    batches = [torch.randn(50, 4) * 3 + 1, torch.randn(7, 10, 4)]
    normalizer = Normalizer(4)
    for batch in batches:
        normalizer.update(batch)
    everything = torch.cat([b.reshape(-1, 4) for b in batches])
    torch.testing.assert_close(normalizer.mean, everything.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normalizer.var, everything.var(0, unbiased=False), rtol=1e-4, atol=1e-4)


# --- the command line -------------------------------------------------------------------------------------------------


def run(module, *arguments):
    old, sys.argv = sys.argv, [module.__name__ + ".py", *map(str, arguments)]
    try:
        module.main()
    finally:
        sys.argv = old


SMALL = ["--num-envs", 8, "--total-env-steps", 4000, "--num-evals", 2, "--segment", 10, "--hidden", 16, "--threads", 1]


def metrics(run_dir):
    rows = list(csv.DictReader((run_dir / "metrics.csv").read_text().splitlines()))
    return [{k: v for k, v in row.items() if k not in ("wall_seconds", "sps")} for row in rows]


@pytest.mark.parametrize("bootstrap", ["none", "mc", "critic"])
@pytest.mark.parametrize("task", TASKS)
def test_same_seed_same_run(task, bootstrap, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(apg, "--env", task, "--bootstrap", bootstrap, "--seed", seed, "--run-dir", tmp_path / name, *SMALL)
    a, b, c = (load_checkpoint(tmp_path / name) for name in "abc")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") != metrics(tmp_path / "c")
    assert all(torch.equal(x, y) for x, y in zip(a["actor"].values(), b["actor"].values()))
    assert not torch.equal(a["actor"]["mean.0.weight"], c["actor"]["mean.0.weight"])
    assert list(metrics(tmp_path / "a")[0]) == [m for m in apg.METRICS if m not in ("wall_seconds", "sps")]


@pytest.mark.parametrize("bootstrap", ["none", "mc", "critic"])
@pytest.mark.parametrize("task", TASKS)
def test_resume_is_exact(task, bootstrap, tmp_path, monkeypatch, capsys):
    arguments = ["--env", task, "--bootstrap", bootstrap, *SMALL]
    run(apg, *arguments, "--run-dir", tmp_path / "whole")
    scored, calls = envs.score, []

    def interrupted(*args, **options):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return scored(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(envs, "score", interrupted)
        run(apg, *arguments, "--run-dir", tmp_path / "parts")
    run(apg, "--resume", tmp_path / "parts")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    whole, parts = (load_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(x, y) for x, y in zip(whole["actor"].values(), parts["actor"].values()))
    capsys.readouterr()
    run(apg, "--resume", tmp_path / "parts")
    assert "complete" in capsys.readouterr().out and metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_pointmass_is_learnt_and_scored(tmp_path, capsys):
    run(apg, "--env", "pointmass", "--run-dir", tmp_path / "a", "--total-env-steps", 300_000, "--num-evals", 3)
    rows = metrics(tmp_path / "a")
    assert float(rows[0]["eval_success"]) < 0.2 and float(rows[-1]["eval_success"]) > 0.95
    assert "run folder" in capsys.readouterr().out
    for path in (tmp_path / "a", tmp_path / "a" / "checkpoint.pt"):
        run(evaluate, "policy", path)
        printed = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:3])
        assert float(printed["success"]) == pytest.approx(float(rows[-1]["eval_success"]), abs=1e-4)
        assert float(printed["return"]) == pytest.approx(float(rows[-1]["eval_return"]), abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--env", "cartpole"], "cartpole"),
        (["--segment", 0], "--segment"),
        (["--segment", 100_000], "--segment"),
        (["--num-envs", 0], "--num-envs"),
        (["--bootstrap", "magic"], "magic"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "toaster"], "toaster"),
        (["--device", "meta"], "meta"),
        (["--learning-rate", -1], "--learning-rate"),
        (["--gamma", 1.5], "--gamma"),
        (["--gamma", "nan"], "--gamma"),
        (["--costate-clip", -1], "--costate-clip"),
        (["--run-dir", "."], "exists"),
        (["--resume", "nowhere"], "nowhere"),
    ],
)
def test_bad_flags(arguments, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(apg, *arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and word in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint", "truncated", "foreign"])
def test_bad_checkpoint(content, tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    if content == "truncated":
        run(apg, "--env", "pointmass", "--run-dir", tmp_path / "a", *SMALL)
        path.write_bytes((tmp_path / "a" / "checkpoint.pt").read_bytes()[:-500])
    elif content == "foreign":
        torch.save({"weights": torch.ones(3)}, path)
    elif content is not None:
        path.write_bytes(content)
    capsys.readouterr()
    for module, arguments in ((evaluate, ["policy", path]), (apg, ["--resume", path])):
        with pytest.raises(SystemExit) as stop:
            run(module, *arguments)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and "checkpoint.pt" in error and error.count("\n") == 1
