"""The benchmark measures what it says: trainers as a user starts them, the physics alone, the bridge beside wp.Tape."""

import importlib.util
import json
import pathlib

path = pathlib.Path(__file__).parent.parent / "benchmarks/throughput.py"
spec = importlib.util.spec_from_file_location("throughput", path)
throughput = importlib.util.module_from_spec(spec)
spec.loader.exec_module(throughput)


def test_every_measure_of_a_task_for_two_checkouts(tmp_path, monkeypatch):
    out = tmp_path / "throughput.json"
    flags = ["--tasks", "pointmass", "--num-envs", "8", "--repeats", "1", "--threads", "1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["throughput.py", *flags, "--against", str(path.parent.parent)])
    throughput.tyro.cli(throughput.main)
    rows = {row.pop("measure"): row for row in json.loads(out.read_text())["rows"]}
    bridges = ["wp.Tape / bridge, N = 64", "wp.Tape / bridge, N = 4096"]
    assert list(rows) == ["physics", "physics and adjoint", "APG", "PPO", *bridges]
    assert all(row["this"] > 0 and row["against"] > 0 and row["this, MB"] > 50 for row in rows.values())
    assert rows["physics"]["this"] > rows["physics and adjoint"]["this"] > rows["APG"]["this"]
