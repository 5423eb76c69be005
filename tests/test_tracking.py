"""--track: the rows of metrics.csv. The packages here only note what they get."""

import csv
import pathlib
import sys
import types

import pytest
from helpers import FLAGS, program

import models


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_rows_are_logged(package, tmp_path, monkeypatch):
    logged, begun = {}, {}

    class SummaryWriter:
        def __init__(self, folder):
            pathlib.Path(folder).mkdir(parents=True, exist_ok=True)  # as the true one does, at once
            begun["folder"] = pathlib.Path(folder)

        def add_scalar(self, name, value, step):
            logged.setdefault(step, {})[name] = value

        def flush(self):
            begun["flushed"] = len(logged)  # the true one loses what was not

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **settings: begun.update(settings)))
    run = tmp_path / "run"
    assert program("ppo", *FLAGS, "--total-env-steps", 2400, "--track", package, "--run-dir", run) == 0
    lines = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert begun["folder"] == run and list(logged) == [int(line["env_steps"]) for line in lines] == [0, 800, 1600, 2400]
    for line, values in zip(lines, logged.values()):
        expected = {name: line[name] for name in values}
        assert {name: f"{value:.10g}" for name, value in values.items()} == expected
    assert values.keys() == set(models.METRICS)
    assert begun["flushed"] == len(logged)
    if package == "wandb":
        assert begun["sync_tensorboard"] and begun["id"] == "run" and begun["config"]["env"] == "pointmass"
