"""The benchmark prints every measure of a task."""

import sys

import tyro

from benchmarks import throughput


def test_every_measure_of_a_task(monkeypatch, capsys):
    flags = ["--tasks", "pointmass", "--num-envs", "8", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["throughput.py", *flags])
    tyro.cli(throughput.main)
    lines = [line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    names = ["physics", "physics and adjoint", "APG", "PPO", "wp.Tape / bridge, N = 64", "wp.Tape / bridge, N = 4096"]
    assert [name.split(maxsplit=1) for name, *_ in lines] == [["pointmass", name] for name in names]
    assert all(text[-1] in "kM" or float(text) > 1 for _, text in lines)
