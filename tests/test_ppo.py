"""PPO's advantages against numbers worked out by hand, its rollout, its clipped step, and its command line."""

import csv
import sys

import pytest
import torch

import envs
import ppo
from models import Actor, Normalizer, load_checkpoint

TASKS = list(envs.TASKS)
SMALL = ["--num-envs", 8, "--total-env-steps", 4000, "--num-evals", 2, "--segment", 10, "--hidden", 16]


def run(*arguments):
    old, sys.argv = sys.argv, ["ppo.py", *map(str, arguments)]
    try:
        ppo.main()
    finally:
        sys.argv = old


def metrics(run_dir):
    rows = list(csv.DictReader((run_dir / "metrics.csv").read_text().splitlines()))
    return [{k: v for k, v in row.items() if k not in ("wall_seconds", "sps")} for row in rows]


def test_gae_by_hand():
    """K = 3, gamma 0.5, lambda 0.5. First environment: the segment ends; second: an episode ends after step 1."""
    reward = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    value = torch.tensor([[1.0, 1.0], [4.0, 4.0], [8.0, 8.0]])
    next_value = torch.tensor([[4.0, 4.0], [8.0, 6.0], [16.0, 16.0]])  # 6: V of the final observation
    truncated = torch.tensor([[False, False], [False, True], [False, False]])
    # d2 = 3 + .5*16 - 8 = 3; d1 = 2 + .5*8 - 4 = 2; d0 = 1 + .5*4 - 1 = 2
    # A2 = 3; A1 = 2 + .25*3 = 2.75; A0 = 2 + .25*2.75 = 2.6875; with the end: A1 = 2 + .5*6 - 4 = 1; A0 = 2.25
    expected = torch.tensor([[2.6875, 2.25], [2.75, 1.0], [3.0, 3.0]])
    assert torch.equal(ppo.gae(reward, truncated, value, next_value, 0.5, 0.5), expected)
    # With lambda = 1 and nothing past the end, value + advantage is the Monte Carlo return: 1 + .5*2 + .25*3 = 2.75.
    next_value[-1] = 0.0
    next_value[0], next_value[1] = value[1], value[2]
    returns = value + ppo.gae(reward, torch.zeros_like(truncated), value, next_value, 0.5, 1.0)
    assert torch.equal(returns, torch.tensor([[2.75, 2.75], [3.5, 3.5], [3.0, 3.0]]))


@pytest.mark.parametrize("task", TASKS)
def test_rollout_keeps_the_final_observation_and_no_graph(task):
    torch.manual_seed(0)
    env = envs.make(task, 3, seed=1)
    actor, normalizer = Actor(env.observation_size, env.action_size, 16), Normalizer(env.observation_size)
    env.elapsed[1] = env.episode_length - 2
    observations, next_observations, us, rewards, truncations = ppo.rollout(env, actor, normalizer, 5)
    assert not any(x.requires_grad for x in (observations, next_observations, us, rewards, env.state))
    assert truncations.nonzero().tolist() == [[1, 1]]
    same = (next_observations[:-1] == observations[1:]).all(-1)  # [4, 3]
    assert same.logical_not().nonzero().tolist() == [[1, 1]]  # only the episode's end has another observation after it
    replayed = envs.make(task, 3, seed=1)
    replayed.state, state = env.state * 0, replayed.state
    for k in range(2):  # the final observation is the old episode's
        state, observation, reward = replayed.dynamics(state, torch.tanh(us[k]))
        torch.testing.assert_close(next_observations[k], observation)
        torch.testing.assert_close(rewards[k], reward)


@pytest.mark.parametrize("bootstrap", ["none", "mc", "critic"])
@pytest.mark.parametrize("task", TASKS)
def test_same_seed_same_run_and_exact_resume(task, bootstrap, tmp_path, monkeypatch):
    arguments = ["--env", task, "--bootstrap", bootstrap, *SMALL]
    run(*arguments, "--run-dir", tmp_path / "a")
    run(*arguments, "--run-dir", tmp_path / "b", "--seed", 2)
    scored, calls = envs.score, []

    def interrupted(*args, **options):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return scored(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(envs, "score", interrupted)
        run(*arguments, "--run-dir", tmp_path / "c")
    run("--resume", tmp_path / "c")
    a, b, c = (load_checkpoint(tmp_path / name) for name in "abc")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "c") != metrics(tmp_path / "b")
    assert all(torch.equal(x, y) for x, y in zip(a["actor"].values(), c["actor"].values()))
    assert not torch.equal(a["actor"]["mean.0.weight"], b["actor"]["mean.0.weight"])
    assert list(metrics(tmp_path / "a")[0]) == [m for m in ppo.METRICS if m not in ("wall_seconds", "sps")]


def test_pointmass_is_learnt_with_healthy_diagnostics(tmp_path):
    """Success from nothing, and what CleanRL logs in the ranges where PPO is known to work."""
    run("--env", "pointmass", "--run-dir", tmp_path / "a", "--total-env-steps", 200_000, "--num-evals", 5)
    rows = [{name: float(value) for name, value in row.items()} for row in metrics(tmp_path / "a")]
    assert rows[0]["eval_success"] < 0.2 and rows[-1]["eval_success"] > 0.95
    assert all(0.0005 < row["approx_kl"] < 0.05 and 0.005 < row["clip_fraction"] < 0.4 for row in rows[1:])
    assert rows[-1]["explained_variance"] > 0.9 and rows[-1]["entropy"] < rows[1]["entropy"]


@pytest.mark.parametrize("bootstrap", ["none", "mc"])
def test_other_bootstraps_learn_too(bootstrap, tmp_path):
    run("--env", "pointmass", "--bootstrap", bootstrap, "--run-dir", tmp_path / "a", "--total-env-steps", 300_000)
    rows = metrics(tmp_path / "a")
    assert float(rows[-1]["eval_return"]) > 0.5 * float(rows[0]["eval_return"])  # returns are negative


def test_flags_of_the_update(tmp_path):
    """Each changes the run; a tiny KL bound ends updates after their first pass, so that fewer steps are taken."""
    base = ["--env", "pointmass", *SMALL]
    for name, flags in {
        "plain": [], "value": ["--clip-vloss", "--clip-coef", 0.01], "raw": ["--no-norm-adv"], "bonus": ["--ent-coef", 0.1],
        "kl": ["--target-kl", 1e-9],
    }.items():  # fmt: skip
        run(*base, *flags, "--run-dir", tmp_path / name)
    plain, value, raw, bonus, kl = (metrics(tmp_path / name)[-1] for name in ("plain", "value", "raw", "bonus", "kl"))
    assert int(kl["gradient_steps"]) * 4 == int(plain["gradient_steps"])
    assert float(bonus["entropy"]) > float(plain["entropy"])
    assert len({row["eval_return"] for row in (plain, value, raw, bonus, kl)}) == 5


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--env", "cartpole"], "cartpole"),
        (["--segment", 100_000], "--segment"),
        (["--bootstrap", "magic"], "magic"),
        (["--clip-coef", 0], "--clip-coef"),
        (["--ent-coef", -1], "--ent-coef"),
        (["--target-kl", "nan"], "--target-kl"),
        (["--gae-lambda", 1.5], "--gae-lambda"),
        (["--num-minibatches", 10**9], "--num-minibatches"),
        (["--run-dir", "."], "exists"),
        (["--resume", "nowhere"], "nowhere"),
    ],
)
def test_bad_flags(arguments, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and word in error and error.startswith("ppo.py: ") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
