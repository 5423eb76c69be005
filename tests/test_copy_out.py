"""What the README says can be copied out runs as it stands there, in another folder with nothing else of ours."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SECTION = (ROOT / "README.md").read_text().split("\n## Copy it out\n")[1].split("\n## ")[0]
BRIDGE, TRAJECTORY = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)


def run(code, folder, *files):
    """The last line that `code` prints, as a program of its own beside copies of `files`, read as JSON."""
    for name in files:
        shutil.copy(ROOT / name, folder)
    (folder / "program.py").write_text(code)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "program.py"], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_bridge_alone_differentiates_a_kernel_that_is_not_ours(tmp_path):
    gradient = run(BRIDGE + "import json\nprint(json.dumps(rate.grad.tolist()))\n", tmp_path, "bridge.py")
    assert gradient == pytest.approx([-((1 - 0.01 * rate) ** 99) for rate in (0.5, 1.0, 2.0)], rel=1e-5)


def test_arm_alone_plans_motions_to_target_poses(tmp_path):
    more = "import json\nprint(json.dumps([[errors[name].tolist(), limit] for name, limit in arm.task.tolerances.items()]))\n"
    results = run(TRAJECTORY + more, tmp_path, "bridge.py", "envs.py")
    assert len(results) == 2 and all(len(errors) == 4 and max(errors) < limit for errors, limit in results), results


def test_the_lines_that_matter_are_apgs_own():
    """The README's excerpt of apg.py, piece by piece: a piece ends at a line of three dots."""
    section = (ROOT / "README.md").read_text().split("\n## How it works\n")[1].split("\n## ")[0]
    (excerpt,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    source = textwrap.dedent((ROOT / "apg.py").read_text())
    pieces = [piece.strip("\n") for piece in excerpt.split("\n...\n")]
    assert len(pieces) == 2 and len(excerpt.splitlines()) > 20
    for piece in pieces:
        assert any(textwrap.indent(piece, " " * depth) in source for depth in (0, 4, 8)), piece
