"""A trained policy: its score, its export, and the gradient of each environment."""

import sys

import pytest
import torch

import apg
import envs
import evaluate
import models


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    flags = ["--env", "pointmass", "--hidden", "16", "--total-env-steps", "2000", "--num-evals", "1", "--threads", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["apg.py", *flags, "--run-dir", str(folder)])
        apg.main()
    return folder


def test_export_scores_as_in_training(run_dir, tmp_path, capsys):
    """No optimizer, no place on the machine; scores.csv has each file once."""
    out, last = tmp_path / "new" / "small.pt", evaluate.read_csv(run_dir / "metrics.csv")[-1]
    for path in (out, out, out.with_name("other.pt")):
        evaluate.export(str(run_dir), path)
    success = last["eval_success"]
    small, scores = models.load_checkpoint(out), evaluate.read_csv(out.with_name("scores.csv"))
    assert set(small) == {"version", "algorithm", "args", "run", "actor", "critic", "normalizer"}
    assert small["args"]["run_dir"] is None and str(run_dir).encode() not in out.read_bytes()
    assert [(row["file"], row["success"]) for row in scores] == [(name, success) for name in ("small.pt", "other.pt")]
    for path in (run_dir, out):
        capsys.readouterr()
        evaluate.policy(str(path))
        printed = capsys.readouterr().out
        assert f"apg, {last['env_steps']:,.0f} environment steps" in printed
        assert f"return {last['eval_return']:.4f}" in printed and f"success {success:.4f}" in printed


def test_size_of_one_environments_gradient(run_dir):
    """By the graph from each of its actions to that environment's return; its episode ends inside the segment."""
    _, env, actor, critic, normalizer = evaluate.load(str(run_dir), 8)
    sizes = evaluate.gradient_sizes(env, actor, critic, normalizer, 0.9, 20, "critic", costate_clip=0.0)

    torch.manual_seed(1)
    env.reset(1)
    env.elapsed = torch.randint(env.episode_length, (8,), generator=env.generator)
    with torch.no_grad():
        apg.rollout(env, actor, normalizer, env.episode_length, 0.9)
    i, ended = env.elapsed.argmax(), False
    eps, us, objective, discount, observation = torch.randn(20, 8, 1), [], 0.0, 1.0, env.observe(env.state)
    for k in range(20):
        us.append(actor.mean(normalizer(observation)) + actor.log_std.exp() * eps[k])
        observation, reward, _, truncated, info = env.step(torch.tanh(us[-1]))
        objective, discount, ended = objective + discount * reward[i], 0.9 * discount, ended or truncated[i]
        if truncated[i] or k == 19:
            objective = objective + discount * critic(normalizer(info["final_obs"][i]))
        discount = 1.0 if truncated[i] else discount
    assert ended
    g = torch.stack(torch.autograd.grad(objective, us))[:, i]
    torch.testing.assert_close(sizes[i], g.square().mean().sqrt(), rtol=1e-4, atol=0)


def test_gradients_are_written_for_all_cases(run_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "gradient_sizes", lambda *settings: torch.tensor([5.0, 5.0]))
    evaluate.gradients([str(run_dir)], num_envs=2)
    rows = evaluate.read_csv("results/gradients.csv")
    assert len(rows) == 2 * 8 * 3 * 2  # policies, lengths, bootstraps, with and without clip
    assert {(row["low"], row["median"], row["high"]) for row in rows} == {(5, 5, 5)}


def test_the_leak_is_the_objectives_gradient_in_the_critics_weights(monkeypatch):
    """As one backward pass from J, with V's weights not held, gives it. The policy's part is as before."""
    for name in ("rollout", "surrogate"):
        monkeypatch.setattr(apg, name, getattr(apg, name))  # put back afterwards what `leaking` changes
    env = envs.make("pointmass", 4)
    actor, critic, normalizer = models.Actor(3, 1, 16), models.Critic(3, 16), models.Normalizer(3)

    def objective():
        torch.manual_seed(0)
        env.reset(1)
        env.elapsed = torch.tensor([0, 96, 3, 98])  # two episodes end inside the segment
        return apg.rollout(env, actor, normalizer, 7, 0.9, 0, 0.0, lambda observation: critic(normalizer(observation)))[1]

    def main():
        critic.requires_grad_(False)
        objective().backward()
        critic.requires_grad_(True)
        policy, zeros = actor.distribution(torch.zeros(5, 3)), torch.zeros(5, 1)
        apg.surrogate(policy, zeros, zeros, zeros, 0.8).backward()

    expected = torch.autograd.grad(objective() / (7 * 4), list(critic.parameters()))
    monkeypatch.setattr(apg, "main", main)
    evaluate.leaking()
    for weight, gradient in zip(critic.parameters(), expected):
        torch.testing.assert_close(weight.grad, gradient)
        assert gradient.abs().max() > 1e-4
