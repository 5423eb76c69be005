"""The measured gradients are apg's own, environment by environment; figures are drawn from data, the same each time."""

import csv
import sys

import pytest
import torch

import apg
import envs
import evaluate
import plots
from models import Actor, Critic, Normalizer


@pytest.mark.parametrize("bootstrap", ["none", "critic", "mc"])
def test_gradients_of_environments_add_up_to_apgs(bootstrap):
    torch.manual_seed(0)
    env = envs.make("pointmass", 8, seed=1)
    actor, critic, normalizer = Actor(3, 1, 16), Critic(3, 16), Normalizer(3)
    each = evaluate.gradient(env, actor, critic, normalizer, 0.9, 20, bootstrap, costate_clip=0.0)
    steps = 100 if bootstrap == "mc" else 20
    assert each.shape == (8, sum(p.numel() for p in actor.parameters())) and each.norm(dim=1).min() > 0

    class Recorded:  # the same actions, from the actor itself
        def sample(self, observation):
            return actor.sample(observation)

    torch.manual_seed(1)
    env.reset(1)
    if bootstrap != "mc":
        env.elapsed = torch.randint(100, (8,), generator=env.generator)
        with torch.no_grad():
            observation = env.observe(env.state)
            for _ in range(100):
                observation, *_ = env.step(actor.sample(normalizer(observation))[0])
    env.detach()
    value = (lambda o: critic(normalizer(o))) if bootstrap == "critic" else None
    objective, _, _ = apg.rollout(env, Recorded(), normalizer, torch.ones(8), steps, 0.9, 0.0, value)
    objective.backward()
    named = dict(actor.named_parameters())
    ours = torch.cat([p.grad.flatten() for name, p in named.items() if name != "log_std"] + [named["log_std"].grad])
    torch.testing.assert_close(each.sum(0) * steps, ours, rtol=1e-3, atol=1e-4 * ours.abs().max().item())


def test_no_figures_of_a_critic_that_nothing_fitted(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "gradient", lambda *arguments: torch.ones(2, 3))
    for bootstrap in ("none", "critic"):
        flags = ["--env", "pointmass", "--bootstrap", bootstrap, "--total-env-steps", "1", "--run-dir", str(tmp_path / bootstrap)]
        monkeypatch.setattr(sys, "argv", ["apg.py", *flags])
        apg.main()
    evaluate.gradients([str(tmp_path / "none"), str(tmp_path / "critic")], 2, out=str(tmp_path / "gradients.csv"))
    rows = [(row["policy"], row["bootstrap"]) for row in plots.read(tmp_path / "gradients.csv") if row["segment"] == 1]
    all_three = ["none", "none", "critic", "critic", "mc", "mc"]
    assert [bootstrap for policy, bootstrap in rows if policy == "fresh"] == 2 * all_three
    assert [bootstrap for policy, bootstrap in rows if policy == "trained"] == ["none", "none", "mc", "mc", *all_three]


def test_figures_are_drawn_from_the_data(tmp_path, monkeypatch, capsys):
    columns = ["env", "policy", "bootstrap", "costate_clip", "segment", "of_mean", "low", "median", "high", "largest", "nonfinite"]
    rows = [
        dict(zip(columns, (task, policy, bootstrap, clip, k, 1, 0.5 * k, k, 2.0 * k, 3 * k, 0)))
        for task in ("pointmass", "pusht") for policy in ("fresh", "trained")
        for bootstrap in ("none", "critic", "mc") for clip in (0.0, 3.0) for k in (1, 8, 64)
    ]  # fmt: skip
    with open(tmp_path / "gradients.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    assert plots.read(tmp_path / "gradients.csv") == rows
    pictures = []
    for _ in range(2):
        plots.figures(str(tmp_path))
        pictures.append({p.name: p.read_bytes() for p in (tmp_path / "figures").iterdir()})
    assert set(pictures[0]) == {"gradient_health.png", "gradient_health.pdf"} and pictures[0] == pictures[1]
    monkeypatch.setattr(sys, "argv", ["plots.py", "figures", "--results", str(tmp_path / "nowhere")])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        plots.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "nowhere" in error and error.count("\n") == 1
