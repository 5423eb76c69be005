"""What a run can be trusted with: the same seed, stops, damaged files, numbers that are not finite, mistakes."""

import os
import pathlib
import runpy
import shutil
import signal
import sys

import pytest
import torch
from helpers import FLAGS, outcome, rows, same, program

import apg
import envs
import models
import ppo

TINY = [*FLAGS, "--total-env-steps", "2400"]  # 30 iterations of 8 environments and 10 steps, evaluated 4 times
TRAINERS = pytest.mark.parametrize("trainer", ["apg", "ppo"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """{trainer: folder of a whole run}, left alone."""
    folders = {trainer: tmp_path_factory.mktemp("whole") / trainer for trainer in ("apg", "ppo")}
    for trainer, folder in folders.items():
        assert program(trainer, *TINY, "--run-dir", folder) == 0
    return folders


def refused(capsys, *arguments):
    """The one line of a trainer that must refuse."""
    capsys.readouterr()
    assert program(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"{arguments[0]}.py: ") and 20 < len(error) < 1000, error
    return error


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the same again ---------------------------------------------------------------------------------------------------


@TRAINERS
def test_a_seed_decides_all(trainer, whole, tmp_path):
    for name, seed in (("again", 1), ("other", 2)):
        assert program(trainer, *TINY, "--seed", seed, "--run-dir", tmp_path / name) == 0
    assert same(outcome(tmp_path / "again"), outcome(whole[trainer]))
    assert all(a != b for a, b in zip(rows(tmp_path / "other"), rows(whole[trainer])))


@TRAINERS
@pytest.mark.parametrize("bootstrap", ["critic", "mc"])
def test_resume_is_exact(trainer, bootstrap, tmp_path, monkeypatch, capsys):
    flags = [*TINY, "--bootstrap", bootstrap, "--num-evals", 5, "--run-dir"]  # with `mc`, iterations are longer than that
    counts = []
    assert program(trainer, *flags, tmp_path / "whole") == 0

    def count(*arguments, original=models.Run.count):
        counts.append(0)
        if len(counts) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        original(*arguments)

    monkeypatch.setattr(models.Run, "count", count)
    assert program(trainer, *flags, tmp_path / "run") == 130
    assert f"resume with: python {trainer}.py --resume '{tmp_path}/run'\n" in capsys.readouterr().err
    assert models.load_checkpoint(tmp_path / "run")["run"]["env_steps"] == (1600 if bootstrap == "mc" else 160)
    assert program(trainer, "--resume", tmp_path / "run") == 0
    assert same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))


def test_a_whole_run_is_not_begun_again(whole):
    before = rows(whole["apg"])
    assert program("apg", "--resume", whole["apg"]) == 0 and rows(whole["apg"]) == before


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    models.write_atomically(path, lambda file: file.write(b"old"))
    with pytest.raises(OSError):
        models.write_atomically(path, lambda file: (file.write(b"new"), os.write(-1, b"")))
    assert path.read_bytes() == b"old"


class Malice:
    def __reduce__(self):
        return os.mkdir, ("owned",)


DAMAGES = {
    "truncated": lambda path, checkpoint: path.write_bytes(path.read_bytes()[:-100]),
    "code": lambda path, checkpoint: torch.save({**checkpoint, "log": Malice()}, path),
    "foreign": lambda path, checkpoint: torch.save({"state_dict": {"weight": torch.ones(3)}}, path),
    "older": lambda path, checkpoint: torch.save({**checkpoint, "version": models.CHECKPOINT_VERSION - 1}, path),
    "missing": lambda path, checkpoint: path.unlink(),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_refused(kind, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(whole["ppo"], tmp_path / "run")
    DAMAGES[kind](run / "checkpoint.pt", models.load_checkpoint(run))
    before = content(tmp_path)
    assert "checkpoint" in refused(capsys, "ppo", "--resume", run)
    assert content(tmp_path) == before and not pathlib.Path("owned").exists()


# --- numbers that are not finite --------------------------------------------------------------------------------------


def spoil(monkeypatch, trainer, kind, iterations):
    """Put a NaN into what environment 3 gives, or into a gradient, in these iterations. Returns weights after each."""
    weights, step, clip = [], envs.Env.step, torch.nn.utils.clip_grad_norm_

    def spoilt(values, name):
        hit = kind == name and len(weights) in iterations
        return torch.cat([values[:3], values[3:4] * torch.nan, values[4:]]) if hit else values

    def spoilt_step(env, action):
        observation, reward, terminated, truncated, info = step(env, action)
        info = {"final_obs": spoilt(info["final_obs"], "final observation")}
        return spoilt(observation, "observation"), spoilt(reward, "reward"), terminated, truncated, info

    def spoilt_clip(parameters, limit):
        if len(weights) in iterations and kind == "gradient":
            parameters[0].grad[0] = torch.nan
        return clip(parameters, limit)

    def spied_count(run, *arguments, original=models.Run.count):
        weights.append([p.detach().clone() for name in ("actor", "critic") for p in run.parts[name].parameters()])
        original(run, *arguments)

    monkeypatch.setattr(envs.Env, "step", spoilt_step)
    monkeypatch.setattr(sys.modules[trainer], "clip_grad_norm_", spoilt_clip)
    monkeypatch.setattr(models.Run, "count", spied_count)
    return weights


def all_finite(values):
    if isinstance(values, dict | list):
        return all(map(all_finite, values.values() if isinstance(values, dict) else values))
    return not isinstance(values, torch.Tensor) or bool(values.isfinite().all())


@TRAINERS
@pytest.mark.parametrize("kind", ["reward", "observation", "final observation", "gradient"])
def test_a_number_that_is_not_finite_is_not_learnt_from(kind, trainer, tmp_path, monkeypatch):
    weights = spoil(monkeypatch, trainer, kind, {5})
    assert program(trainer, *TINY, "--run-dir", tmp_path / "run") == 0
    assert [i for i in range(1, 30) if same(weights[i], weights[i - 1])] == [5]
    checkpoint, last = models.load_checkpoint(tmp_path / "run"), rows(tmp_path / "run")[-1]
    assert all_finite([checkpoint[name] for name in ("actor", "policy", "critic", "normalizer", "optimizer", "env")])
    assert (last["skipped_steps"], last["gradient_steps"]) == ("2", "58")  # two minibatches a segment
    assert float(last["eval_return"]) == float(last["eval_return"])


def test_an_overflowing_gradient_of_an_action_is_noticed(tmp_path, monkeypatch):
    """From rewards that are finite, as contact may give them."""

    def rollout(*arguments, original=apg.rollout):
        segment, noise, objective = original(*arguments)
        return segment, noise, objective * torch.inf

    monkeypatch.setattr(apg, "rollout", rollout)
    assert program("apg", *TINY, "--run-dir", tmp_path / "run") == 0
    assert rows(tmp_path / "run")[-1]["skipped_steps"] == "60"


# --- mistakes on the command line -------------------------------------------------------------------------------------

MISTAKES = [
    ("apg", ["--env", "cartpole"], "cartpole"),
    ("ppo", ["--env", "pointmass", "--segment", "101"], "--segment 101 is longer than an episode of pointmass, 100 steps"),
    ("apg", ["--segment", "0"], "--segment must be at least 1"),
    ("ppo", ["--learning-rate", "-1"], "--learning-rate must be at least 0, got -1.0"),
    ("ppo", ["--gamma", "nan"], "--gamma"),
    ("ppo", ["--num-minibatches", "41"], "--num-minibatches 41 is too many for the 80 samples of a segment"),
    ("apg", ["--device", "cuda:99"], "cuda:99"),
    ("ppo", ["--device", "toaster"], "toaster"),
    ("apg", ["--track", "tensorboard"], "pip install tensorboard"),
    ("apg", ["--run-dir", "{apg}"], "{apg}"),
    ("ppo", ["--resume", "nowhere"], "nowhere"),
    ("apg", ["--resume", "{apg}/checkpoint.pt"], "--resume takes a run folder"),
    ("ppo", ["--resume", "{apg}"], "trained by apg.py"),
    ("apg", ["--resume", "{apg}", "--env", "pusht"], "leave out"),
]


@pytest.mark.parametrize(("trainer", "flags", "word"), MISTAKES, ids=[f"{m[0]} {' '.join(m[1])}" for m in MISTAKES])
def test_a_mistake_is_told_in_one_line_and_changes_nothing(trainer, flags, word, whole, tmp_path, monkeypatch, capsys):
    places = {"apg": str(shutil.copytree(whole["apg"], tmp_path / "apg"))}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    before = content(tmp_path)
    error = refused(capsys, trainer, *([] if "--resume" in flags else TINY), *(flag.format(**places) for flag in flags))
    assert word.format(**places) in error
    assert content(tmp_path) == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("module", [apg, ppo], ids=["apg", "ppo"])
def test_help_shows_the_tasks_own_defaults(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module.__file__, "--env", "pusht", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(module.__file__, run_name="__main__")
    words = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert stop.value.code == 0 and f"(default: {module.TUNED['pusht']['total_env_steps']})" in words
