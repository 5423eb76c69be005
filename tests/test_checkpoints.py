"""The trained policies in results/checkpoints, and the command that makes such files."""

import csv
import pathlib
import sys

import pytest
import torch

import apg
import envs
import evaluate
import models

FOLDER = pathlib.Path(__file__).parent.parent / "results" / "checkpoints"
SCORES = list(csv.DictReader((FOLDER / "scores.csv").read_text().splitlines()))


def test_there_is_one_for_each_task_and_algorithm():
    names = {f"{task}_{algorithm}.pt" for task in envs.TASKS for algorithm in ("apg", "ppo")}
    assert {row["file"] for row in SCORES} == {path.name for path in FOLDER.glob("*.pt")} == names


@pytest.mark.parametrize("stated", SCORES, ids=[row["file"] for row in SCORES])
def test_each_scores_what_is_stated(stated):
    path = FOLDER / stated["file"]
    assert path.stat().st_size < 200_000
    checkpoint, env, actor, _, normalizer = evaluate.load(path, 256)
    assert (env.name, checkpoint["algorithm"], checkpoint["args"]["run_dir"]) == (stated["env"], stated["algorithm"], None)
    result = envs.score(env, lambda observation: actor(normalizer(observation)))
    # Another processor rounds otherwise, and contact makes much of little: a few episodes of 256 may end otherwise.
    assert result["success"] == pytest.approx(float(stated["success"]), abs=0.03)
    assert result["return"] == pytest.approx(float(stated["return"]), rel=0.03)


def test_export(tmp_path, monkeypatch, capsys):
    """Same policy, no optimizer, no place on the machine; scores.csv has each file once."""
    run, out = tmp_path / "run", tmp_path / "new" / "small.pt"
    train = ["--env", "pointmass", "--num-envs", "8", "--total-env-steps", "2000", "--num-evals", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["apg.py", *train, "--run-dir", str(run)])
    apg.main()
    checkpoint = models.load_checkpoint(run)
    checkpoint["args"]["resume"] = str(run)  # as after a resume
    models.save_checkpoint(run / "checkpoint.pt", checkpoint)
    for _ in range(2):
        evaluate.export(str(run), str(out))
    evaluate.export(str(run), str(out.with_name("other.pt")))
    whole, small = models.load_checkpoint(run), models.load_checkpoint(out)
    assert set(small) == {"version", "algorithm", "args", "counters", "actor", "critic", "normalizer"}
    assert str(tmp_path).encode() not in out.read_bytes()
    for name in ("actor", "critic", "normalizer"):
        assert all(torch.equal(small[name][key], value) for key, value in whole[name].items())
    rows = list(csv.DictReader(out.with_name("scores.csv").read_text().splitlines()))
    assert [row["file"] for row in rows] == ["small.pt", "other.pt"] and rows[0]["env_steps"] == "2048"
    last = (run / "metrics.csv").read_text().splitlines()[-1].split(",")
    assert float(rows[0]["success"]) == float(last[apg.METRICS.index("eval_success")])
    with pytest.raises(ValueError, match="must end in .pt"):
        evaluate.export(str(run), str(tmp_path / "small"))
