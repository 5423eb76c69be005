"""The README's example of an own task: its gradient is right, and a short training swings the pendulum up."""

import csv
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
SECTION = (ROOT / "README.md").read_text().split("\n## Your own task\n")[1].split("\n## ")[0]
(PENDULUM,) = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
CHECK = """
import torch, envs, pendulum
env = envs.make("pendulum", 4, dtype=torch.float64)
action = torch.tensor([[-0.5], [0.0], [0.5], [0.9]], dtype=torch.float64, requires_grad=True)
assert torch.autograd.gradcheck(env.dynamics, (env.state.requires_grad_(), action))
pendulum.apg.main()
"""


def test_pendulum_of_the_readme_is_differentiable_and_learnt(tmp_path):
    (tmp_path / "pendulum.py").write_text(PENDULUM)
    # In a process of its own, which leaves this one's list of tasks as it is.
    flags = ["--env", "pendulum", "--total-env-steps", "60000", "--num-evals", "2", "--threads", "1", "--run-dir", "run"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    command = [sys.executable, "-c", CHECK, *flags]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        first, *_, last = csv.DictReader(file)
    assert float(first["eval_success"]) == 0 and float(last["eval_success"]) > 0.5
    assert float(last["eval_return"]) > 0.5 * float(first["eval_return"])  # returns are negative: the cost has halved
