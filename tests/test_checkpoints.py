"""The trained policies in results/checkpoints score what is stated beside them."""

import csv
import pathlib

import pytest

import envs
import evaluate

FOLDER = pathlib.Path(__file__).parent.parent / "results" / "checkpoints"
SCORES = list(csv.DictReader((FOLDER / "scores.csv").read_text().splitlines()))


def test_there_is_one_for_each_task_and_algorithm():
    names = {f"{task}_{algorithm}.pt" for task in envs.TASKS for algorithm in ("apg", "ppo")}
    assert {row["file"] for row in SCORES} == {path.name for path in FOLDER.glob("*.pt")} == names


@pytest.mark.parametrize("stated", SCORES, ids=[row["file"] for row in SCORES])
def test_each_scores_what_is_stated(stated):
    path = FOLDER / stated["file"]
    assert path.stat().st_size < 250_000
    checkpoint, env, actor, _, normalizer = evaluate.load(path, 256)
    assert (env.name, checkpoint["algorithm"]) == (stated["env"], stated["algorithm"])
    assert checkpoint["run"]["env_steps"] == int(stated["env_steps"])
    result = envs.score(env, lambda observation: actor(normalizer(observation)))
    # Processors round differently, and contact amplifies it: a few of the 256 episodes may end differently.
    assert result["success"] == pytest.approx(float(stated["success"]), abs=0.03)
    assert result["return"] == pytest.approx(float(stated["return"]), rel=0.03)
