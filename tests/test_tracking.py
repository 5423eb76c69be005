"""--tensorboard and --wandb: CleanRL's names, the run's rows, one line where the package is missing."""

import csv
import importlib.machinery
import sys
import types

import pytest

import apg
import models
import ppo

FLAGS = ["--env", "pointmass", "--num-envs", "8", "--total-env-steps", "3000", "--num-evals", "3", "--hidden", "8"]
TRAINERS = pytest.mark.parametrize("trainer", [apg, ppo], ids=["apg", "ppo"])


def train(trainer, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", [f"{trainer.ALGORITHM}.py", *map(str, flags)])
    trainer.main()


def stand_in(monkeypatch, name, **contents):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def logged(monkeypatch):
    """{"tensorboard" or "wandb": [(global step, {name: value})]}, filled by packages that only note what they get."""
    logged = {"tensorboard": {}, "wandb": {}, "begun": []}

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            logged["begun"].append((str(folder), purge_step))

        def add_scalar(self, name, value, step):
            logged["tensorboard"].setdefault(step, {})[name] = value

        def flush(self):
            pass

    def init(**settings):
        logged["begun"].append((settings["id"], settings["config"]["env"]))
        return types.SimpleNamespace(log=lambda values, step: logged["wandb"].setdefault(step, {}).update(values))

    stand_in(monkeypatch, "tensorboard")
    stand_in(monkeypatch, "torch.utils.tensorboard", SummaryWriter=SummaryWriter)
    stand_in(monkeypatch, "wandb", init=init)
    return logged


@TRAINERS
def test_rows_are_logged_under_cleanrls_names(trainer, logged, tmp_path, monkeypatch):
    run = tmp_path / "run"
    train(trainer, monkeypatch, *FLAGS, "--tensorboard", "--wandb", "--run-dir", run)
    assert logged["begun"] == [(str(run), 1), ("run", "pointmass")]
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert len(rows) == 4 and list(logged["wandb"]) == [int(row["env_steps"]) for row in rows]
    assert str(logged["tensorboard"]) == str(logged["wandb"])  # nan is not equal to itself
    names = {"charts/episodic_return": "train_return", "charts/SPS": "sps", "losses/policy_loss": "actor_loss"}
    names |= {"losses/value_loss": "critic_loss", "charts/eval_success": "eval_success"}
    if trainer is ppo:
        names |= {f"losses/{name}": name for name in ("approx_kl", "explained_variance", "entropy")}
        names["losses/clipfrac"] = "clip_fraction"
    for values, row in zip(logged["wandb"].values(), rows):
        assert len(values) == len(trainer.METRICS)
        assert {name: str(values[name]) for name in names} == {name: row[ours] for name, ours in names.items()}


def test_a_resumed_run_goes_on_in_its_curve(logged, tmp_path, monkeypatch):
    run = tmp_path / "run"

    def stop(path, checkpoint, save=models.save_checkpoint):
        save(path, checkpoint)
        if checkpoint["counters"][0] > 1000:
            raise SystemExit(3)

    with monkeypatch.context() as patch:
        patch.setattr(models, "save_checkpoint", stop)
        with pytest.raises(SystemExit):
            train(apg, monkeypatch, *FLAGS, "--tensorboard", "--run-dir", run)
    before = list(logged["tensorboard"])
    train(apg, monkeypatch, "--resume", run)
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert logged["begun"][1] == (str(run), before[-1] + 1)  # what was logged is kept
    assert before == [0, 1024] and list(logged["tensorboard"]) == [int(row["env_steps"]) for row in rows]


@TRAINERS
@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_told_before_anything_is_made(trainer, package, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "is_installed", lambda name: name != package)
    with pytest.raises(SystemExit) as stop:
        train(trainer, monkeypatch, *FLAGS, f"--{package}", "--run-dir", tmp_path / "run")
    expected = f"{trainer.ALGORITHM}.py: --{package} needs a package that is not there: pip install {package}\n"
    assert (stop.value.code, capsys.readouterr().err) == (2, expected) and not list(tmp_path.iterdir())


def test_is_installed():
    assert models.is_installed("torch") and not models.is_installed("no_such_package")
