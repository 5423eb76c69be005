"""A trained policy: its score and its export."""

import pytest
from helpers import program

import evaluate
import models


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    flags = ["--env", "pointmass", "--total-env-steps", "2000", "--num-evals", "1"]
    assert program("apg", *flags, "--run-dir", folder) == 0
    return folder


def test_export_scores_as_in_training(run_dir, tmp_path, capsys):
    """No optimizer and no paths of this machine; scores.csv has each file once."""
    out, last = tmp_path / "new" / "small.pt", evaluate.read_csv(run_dir / "metrics.csv")[-1]
    for path in (out, out, out.with_name("other.pt")):
        evaluate.export(str(run_dir), path)
    success = last["eval_success"]
    small, scores = models.load_checkpoint(out), evaluate.read_csv(out.with_name("scores.csv"))
    assert set(small) == {"version", "algorithm", "args", "run", "policy", "critic", "normalizer"}
    assert small["args"]["run_dir"] is None and str(run_dir).encode() not in out.read_bytes()
    assert [(row["file"], row["success"]) for row in scores] == [(name, success) for name in ("small.pt", "other.pt")]
    for path in (run_dir, out):
        capsys.readouterr()
        evaluate.policy(str(path))
        printed = capsys.readouterr().out
        assert f"apg, {last['env_steps']:,.0f} env steps" in printed
        assert f"return {last['eval_return']:.4f}" in printed and f"success {success:.4f}" in printed
