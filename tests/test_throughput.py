"""The benchmark prints every measure of a task."""

from benchmarks import throughput


def test_every_measure_of_a_task(capsys):
    throughput.main(tasks=("pointmass",), num_envs=8, repeats=1)
    lines = [line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    names = ["physics", "physics and adjoint", "wp.Tape / bridge, N = 64", "wp.Tape / bridge, N = 4096"]
    assert [name.split(maxsplit=1) for name, *_ in lines] == [["pointmass", name] for name in names]
    assert all(text[-1] in "kM" or float(text) > 1 for _, text in lines)
