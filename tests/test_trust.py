"""What a run survives: signals, failing disks, damaged files, numbers that are not finite, mistakes on the command line, and
environments under any action. That it survives being killed: kill.py."""

import errno
import inspect
import io
import itertools
import os
import pathlib
import pickle
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import zipfile

import pytest
import torch
from kill import outcome, same

import apg
import bridge
import envs
import evaluate
import models
import plots
import ppo
from models import load_checkpoint

ROOT = pathlib.Path(apg.__file__).parent
TINY = ["--env", "pointmass", "--num-envs", "8", "--segment", "10", "--hidden", "8", "--num-evals", "3"]
TINY += ["--threads", "1", "--total-env-steps", "2400"]
NAN, INF = float("nan"), float("inf")
TRAINERS = ["apg", "ppo"]


def script(name, *arguments):
    """Run a script as from the command line, in this process. Returns its exit code."""
    old, sys.argv = sys.argv, [f"{name}.py", *map(str, arguments)]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    finally:
        sys.argv = old
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def refused(capsys, name, *arguments, code=2):
    """Its one line, of a script that must refuse."""
    capsys.readouterr()
    assert script(name, *arguments) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"{name}.py: ") and len(error) > len(name) + 15, error
    return error


def at_iteration(monkeypatch, n, act):
    """Let something happen while a trainer is in its n-th iteration."""
    calls, original = [], models.set_learning_rate

    def counted(*arguments):
        calls.append(0)
        if len(calls) == 2 * n - 1:  # once for the actor's optimizer, once for the critic's
            act()
        original(*arguments)

    monkeypatch.setattr(models, "set_learning_rate", counted)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """{trainer: folder of a whole run}, left alone."""
    folders = {name: tmp_path_factory.mktemp("whole") / name for name in TRAINERS}
    for name, folder in folders.items():
        assert script(name, *TINY, "--run-dir", folder) == 0
    return folders


@pytest.fixture(params=TRAINERS)
def trainer(request):
    return request.param


# --- signals and disks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first_and_says_so(trainer, number, whole, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_iteration(patch, 14, lambda: os.kill(os.getpid(), number))
        error = refused(capsys, trainer, *TINY, "--run-dir", tmp_path / "run", code=128 + number)
    assert f"stopped at 1,120 steps; go on with: python {trainer}.py --resume {tmp_path}/run" in error
    assert load_checkpoint(tmp_path / "run")["counters"][0] == 14 * 80
    assert script(trainer, "--resume", tmp_path / "run") == 0
    (rows, state), (expected_rows, expected_state) = outcome(tmp_path / "run"), outcome(whole[trainer])
    assert rows == expected_rows and same(state, expected_state)


def test_a_signal_from_outside(tmp_path):
    """Of a process that really ends: what it leaves is a checkpoint."""
    command = [sys.executable, ROOT / "apg.py", *TINY, "--total-env-steps", str(10**9), "--run-dir", tmp_path / "run"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        assert process.poll() is None
    process.terminate()
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and "apg.py: stopped at " in error and "Traceback" not in error


def fails_on_call(monkeypatch, name, n, number):
    """os.fsync or os.replace raises on its n-th call, as on a disk that is full."""
    calls, original = [], getattr(os, name)

    def failing(*arguments):
        calls.append(0)
        if len(calls) >= n:
            raise OSError(number, os.strerror(number))
        return original(*arguments)

    monkeypatch.setattr(os, name, failing)


@pytest.mark.parametrize(
    ("name", "n", "number"),
    [("fsync", 5, errno.ENOSPC), ("fsync", 6, errno.EIO), ("replace", 5, errno.EROFS), ("replace", 6, errno.EDQUOT)],
)
def test_a_write_that_fails(trainer, name, n, number, whole, tmp_path, monkeypatch, capsys):
    """Calls 1 and 2 write config.json and the head of metrics.csv; from then on metrics.csv and checkpoint.pt by turns."""
    with monkeypatch.context() as patch:
        fails_on_call(patch, name, n, number)
        error = refused(capsys, trainer, *TINY, "--run-dir", tmp_path / "run", code=1)
    assert os.strerror(number) in error and ("metrics.csv" if n % 2 else "checkpoint.pt") in error
    assert load_checkpoint(tmp_path / "run")["counters"][0] == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json", "metrics.csv", "checkpoint.pt"}
    assert script(trainer, "--resume", tmp_path / "run") == 0
    (rows, state), (expected_rows, expected_state) = outcome(tmp_path / "run"), outcome(whole[trainer])
    assert rows == expected_rows and same(state, expected_state)


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """{trainer: folder of a run that was stopped half-way}"""
    folders = {name: tmp_path_factory.mktemp("half") / name for name in TRAINERS}
    for name, folder in folders.items():
        with pytest.MonkeyPatch.context() as patch:
            at_iteration(patch, 14, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert script(name, *TINY, "--run-dir", folder) == 143
    return folders


@pytest.fixture
def half(trainer, halves, tmp_path):
    """A copy of one."""
    return shutil.copytree(halves[trainer], tmp_path / "run")


def test_a_file_too_large_for_the_disk(trainer, whole, half, capsys):
    """A limit of the system's, which binds the superuser too: the checkpoint no longer fits, metrics.csv does."""
    before = (half / "checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        error = refused(capsys, trainer, "--resume", half, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "checkpoint.pt: File too large" in error and (half / "checkpoint.pt").read_bytes() == before
    assert script(trainer, "--resume", half) == 0 and outcome(half)[0] == outcome(whole[trainer])[0]


def test_a_checkpoint_marked_read_only(trainer, half, capsys):
    before = (half / "checkpoint.pt").read_bytes()
    (half / "checkpoint.pt").chmod(0o444)
    assert "checkpoint.pt: the file is marked read-only" in refused(capsys, trainer, "--resume", half, code=1)
    assert (half / "checkpoint.pt").read_bytes() == before and not list(half.glob("*.tmp"))


def test_a_run_folder_that_vanishes(trainer, tmp_path, monkeypatch, capsys):
    at_iteration(monkeypatch, 5, lambda: shutil.rmtree(tmp_path / "run"))
    error = refused(capsys, trainer, *TINY, "--run-dir", tmp_path / "run", code=1)
    assert "cannot write" in error and "No such file" in error and not (tmp_path / "run").exists()


# --- files ------------------------------------------------------------------------------------------------------------


def test_200_flipped_bits(whole, tmp_path):
    content, path, dice = (whole["apg"] / "checkpoint.pt").read_bytes(), tmp_path / "checkpoint.pt", random.Random(0)
    expected, wrong = load_checkpoint(whole["apg"]), 0
    for _ in range(200):
        damaged, position = bytearray(content), dice.randrange(len(content))
        damaged[position] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path)
        except ValueError as error:
            assert "\n" not in str(error) and "checkpoint.pt" in str(error)
            wrong += 1
        else:
            assert same(loaded, expected), position  # as in what fills a tensor up to its alignment
    assert wrong > 100


class Malice:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def damaged(kind, source, tmp_path):
    """A checkpoint's content with something wrong."""
    content, checkpoint, file = source.read_bytes(), load_checkpoint(source), io.BytesIO()
    if isinstance(kind, float):
        return content[: int(kind * len(content))]
    if kind in ("pickle", "zip", "malice in torch's old format"):
        {
            "pickle": lambda: pickle.dump(checkpoint["args"], file),
            "zip": lambda: zipfile.ZipFile(file, "w").writestr("notes.txt", "mine"),
            "malice in torch's old format": lambda: torch.save(Malice(tmp_path / "owned"), file, _use_new_zipfile_serialization=False),
        }[kind]()  # fmt: skip
        return file.getvalue()
    new = {
        "a tensor": torch.ones(3),
        "foreign": {"state_dict": {"weight": torch.ones(3)}},
        "foreign with a version": {"version": 2},
        "older": {**checkpoint, "version": models.CHECKPOINT_VERSION - 1},
        "newer": {"version": models.CHECKPOINT_VERSION + 1},
        "version a tensor": {**checkpoint, "version": torch.ones(3)},
        "version in words": {**checkpoint, "version": "two"},
        "malice": {**checkpoint, "log": Malice(tmp_path / "owned")},
        "module": {**checkpoint, "actor": torch.nn.Linear(2, 2)},
        "no counters": {k: v for k, v in checkpoint.items() if k != "counters"},
        "no args": {**checkpoint, "args": {}},
        "args of another program": {**checkpoint, "args": {"lr": 0.1}},
        "args of other types": {**checkpoint, "args": {**checkpoint["args"], "num_envs": "many"}},
        "args out of range": {**checkpoint, "args": {**checkpoint["args"], "hidden": -3}},
        "another task's": {**checkpoint, "args": {**checkpoint["args"], "env": "pusht"}},
        "another width": {**checkpoint, "args": {**checkpoint["args"], "hidden": 9}},
        "no weights": {k: v for k, v in checkpoint.items() if k != "actor"},
        "weights of another kind": {**checkpoint, "actor": [1, 2]},
    }[kind]
    torch.save(new, file)
    return file.getvalue()


KINDS = [0.0, 0.1, 0.5, 0.9, 0.999, "pickle", "zip", "malice in torch's old format", "a tensor", "foreign"]
KINDS += ["foreign with a version", "older", "newer", "version a tensor", "version in words", "malice", "module", "no counters"]
KINDS += ["no args", "args of another program", "args of other types", "args out of range", "another task's", "another width"]
KINDS += ["no weights", "weights of another kind"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_is_not_ours(kind, trainer, half, tmp_path, capsys):
    (half / "checkpoint.pt").write_bytes(damaged(kind, half / "checkpoint.pt", tmp_path))
    files = {path: path.read_bytes() for path in half.iterdir()}
    error = refused(capsys, trainer, "--resume", half)
    if kind in ("older", "newer"):
        assert f"of a{'n' * (kind == 'older')} {kind} program: checkpoint version" in error
    if kind not in ("args of other types", "args out of range"):  # the policy alone does not depend on those two
        refused(capsys, "evaluate", "policy", half)
    assert {path: path.read_bytes() for path in half.iterdir()} == files and not (tmp_path / "owned").exists()


def test_a_run_that_is_not_to_be_resumed_so(whole, tmp_path, capsys):
    assert "was trained by ppo.py" in refused(capsys, "apg", "--resume", whole["ppo"])
    assert "leave out --env pusht: pointmass" in refused(capsys, "apg", "--env", "pusht", "--resume", whole["apg"])
    assert "--total-env-steps" in refused(capsys, "ppo", "--total-env-steps", 10**6, "--resume", whole["ppo"])
    assert "no run folder" in refused(capsys, "apg", "--resume", whole["apg"] / "checkpoint.pt")
    (tmp_path / "run").mkdir()
    assert "no checkpoint" in refused(capsys, "apg", "--resume", tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("{}")
    assert "begin it anew" in refused(capsys, "apg", "--resume", tmp_path / "run")
    (tmp_path / "run" / "checkpoint.pt").mkdir()
    assert "no checkpoint" in refused(capsys, "apg", "--resume", tmp_path / "run")


SUITE = ["suite", "--tasks", "pointmass", "--algorithms", "apg", "--seeds", "1", "--total-env-steps", "2000", "--processes", "1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder where a suite's one run is done."""
    folder = tmp_path_factory.mktemp("suite")
    job = evaluate.make_job(folder / "runs/suite", "apg", (), "pointmass", 1, total_env_steps=2000)
    assert script("apg", *job["flags"], "--run-dir", job["folder"]) == 0
    return folder


DAMAGE = {
    "config.json": ["", "[]", "{}", "3", '{"seed"', "\udcff", '{"seed": 1}', "x" * 10**6, None],
    "metrics.csv": ["", "\0\0", "\udcff", "a,b\n1,2\n", "{head}", "{head}1,2\n", "{rows}x,y\n", "{rows}{last}", "{rows}\n\"", None],
}  # fmt: skip


@pytest.mark.parametrize(("name", "content"), [(name, content) for name in DAMAGE for content in DAMAGE[name]])
def test_a_suites_files(name, content, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "Popen", None)  # nothing is left to run
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    assert script("evaluate", *SUITE) == 0
    shutil.rmtree("results")
    path = pathlib.Path("runs/suite/pointmass__apg__1") / name
    rows = path.read_text()
    if content is None:
        path.unlink()
    else:
        head, last = rows.split("\n")[0] + "\n", rows.split("\n")[-2] + "\n"
        text = content.replace("{rows}", rows).replace("{head}", head).replace("{last}", last)
        path.write_bytes(text.encode(errors="surrogateescape"))
    assert "pointmass__apg__1" in refused(capsys, "evaluate", *SUITE)
    assert not pathlib.Path("results").exists()


def test_a_suite_with_anothers_checkpoint(finished, whole, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for trainer in TRAINERS:
        shutil.copy(whole[trainer] / "checkpoint.pt", "runs/suite/pointmass__apg__1")
        error = refused(capsys, "evaluate", *SUITE)
        assert "has segment 10, not" in error and "(checkpoint.pt)" in error


# --- numbers that are not finite --------------------------------------------------------------------------------------


def inject(monkeypatch, kind, value, calls):
    """Put `value` into environment 3, or into a gradient, at the given calls of the training environments' step, or of the
    optimizer's. Returns [(weights of actor and critic at each iteration's start)], and what the steps reported."""
    step, clipped_step, set_learning_rate = envs.Env.step, models.clipped_step, models.set_learning_rate
    weights, reports, counts = [], [], {"step": -1, "actor gradient": -1, "critic gradient": -1}

    def snapshot(optimizer, *arguments):
        weights.append([p.detach().clone() for p in optimizer.param_groups[0]["params"]])
        set_learning_rate(optimizer, *arguments)

    def broken_step(env, action):
        if env.num_envs != 8:  # an evaluation's
            return step(env, action)
        counts["step"] += 1
        here = counts["step"] in calls and "gradient" not in kind
        row = torch.zeros(8, 1, dtype=torch.bool)
        row[3] = True
        if here and kind == "state":
            env.state = torch.where(row, value, env.state)
        if here and kind == "action":
            action = torch.where(row, value, action)
        with monkeypatch.context() as patch:
            if here and kind == "reward":
                dynamics = env.dynamics

                def rewarded(*arguments):
                    state, observation, reward = dynamics(*arguments)
                    return state, observation, torch.where(row[:, 0], value, reward)

                patch.setattr(env, "dynamics", rewarded)
            result = step(env, action)
        if here:
            reports.append((result[4]["nonfinite"].tolist(), env.elapsed[3].item(), env.state.isfinite().all().item()))
        return result

    def broken_gradient(module, *arguments):
        name = f"{type(module).__name__.lower()} gradient"
        counts[name] += 1
        if name == kind and counts[name] in calls:
            next(module.parameters()).grad.view(-1)[0] = value
        return clipped_step(module, *arguments)

    monkeypatch.setattr(models, "set_learning_rate", snapshot)
    monkeypatch.setattr(models, "clipped_step", broken_gradient)
    monkeypatch.setattr(envs.Env, "step", broken_step)
    return weights, reports


def all_finite(checkpoint):
    if isinstance(checkpoint, torch.Tensor):
        return bool(checkpoint.isfinite().all())
    if isinstance(checkpoint, (dict, list, tuple)):
        return all(map(all_finite, checkpoint.values() if isinstance(checkpoint, dict) else checkpoint))
    return True


CASES = [("state", NAN), ("state", INF), ("state", 1e30), ("action", NAN), ("reward", NAN), ("reward", INF), ("reward", -INF)]
CASES += [("reward", 1e30), ("actor gradient", NAN), ("actor gradient", INF), ("critic gradient", NAN)]
CASES += [("critic gradient", -INF)]
CASES = [(*case, "pointmass") for case in CASES] + [(kind, NAN, "pusht") for kind in ("state", "action", "reward")]


@pytest.mark.parametrize(("kind", "value", "env"), CASES)
def test_a_number_that_is_not_finite(kind, value, env, trainer, tmp_path, monkeypatch, capsys):
    flags = [*TINY, "--env", env, "--num-evals", 2, "--total-env-steps", 800, "--num-minibatches", 1, "--update-epochs", 1]
    flags += ["--run-dir", tmp_path / "run"]
    with monkeypatch.context() as patch:
        weights, reports = inject(patch, kind, value, {4} if "gradient" in kind else {44})  # in the 5th iteration
        assert script(trainer, *flags) == 0
    actor, critic = weights[::2], weights[1::2]
    same_actor, same_critic = ([same(a, b) for a, b in itertools.pairwise(w)] for w in (actor, critic))
    assert all_finite(weights)
    checkpoint = load_checkpoint(tmp_path / "run")
    states = {k: v for k, v in checkpoint.items() if k in ("actor", "critic", "target_critic", "normalizer", "episodes")}
    states |= {k: v for k, v in checkpoint.items() if "optimizer" in k}
    assert all_finite(states)
    skipped = [int(row["skipped_steps"]) for row in outcome(tmp_path / "run")[0]]
    assert skipped[0] == 0 and skipped[-1] == checkpoint["counters"][2] > 0
    assert f"skipped {skipped[-1]}" in capsys.readouterr().out.splitlines()[-3]
    if value == 1e30:  # finite itself: the squares of what follows from it are not
        return
    if kind == "critic gradient":
        assert same_critic == [i == 4 for i in range(len(same_critic))] and not any(same_actor)
    else:
        assert same_actor == [i == 4 for i in range(len(same_actor))] and skipped[-1] == 1
        assert same_critic == [i == 4 and "gradient" not in kind for i in range(len(same_critic))]
    for nonfinite, elapsed, finite in reports:
        assert nonfinite == [i == 3 for i in range(8)] and elapsed == 0 and finite
    assert len(reports) == ("gradient" not in kind)


@pytest.mark.parametrize("kind", ["state", "reward", "actor gradient", "critic gradient"])
def test_a_run_that_cannot_go_on_stops(kind, trainer, tmp_path, monkeypatch, capsys):
    weights, _ = inject(monkeypatch, kind, NAN, range(50, 10**9) if "gradient" not in kind else range(5, 10**9))
    flags = ["--max-skipped", 7, "--num-minibatches", 1, "--update-epochs", 1, "--checkpoint-seconds", 0]
    error = refused(capsys, trainer, *TINY, *flags, "--run-dir", tmp_path / "run", code=1)
    assert "7 iterations in a row" in error and "try " in error and f"{tmp_path}/run is kept" in error
    assert ("--costate-clip" in error) == (trainer == "apg")
    assert load_checkpoint(tmp_path / "run")["counters"][0] == 12 * 80 and len(weights) == 2 * 12 and all_finite(weights)


def test_statistics_that_would_be_infinite_are_left_as_they_were():
    """One finite observation is enough: its square is not, and every later observation would be normalised to zero."""
    normalizer = models.Normalizer(2)
    assert normalizer.update(torch.randn(50, 2))
    before = {name: x.clone() for name, x in normalizer.state_dict().items()}
    assert not normalizer.update(torch.tensor([[0.0, 1e25], [1.0, 2.0]]))
    assert same(dict(normalizer.state_dict()), before) and normalizer.update(torch.randn(50, 2))


def test_a_costate_too_long_for_its_square_is_not_made_zero():
    state = torch.zeros(3, 2, requires_grad=True) * 1
    state.retain_grad()
    apg.clip_costate(state, 0.5)
    (state * torch.tensor([[1e30, 1.0], [3.0, 4.0], [0.1, 0.0]])).sum().backward()
    assert state.grad[0].isnan().any() and torch.equal(state.grad[1:], torch.tensor([[0.3, 0.4], [0.1, 0.0]]))


# --- mistakes on the command line -------------------------------------------------------------------------------------

HUGE = "9" * 5000
SHARED = [
    ["--env", "cartpole"], ["--env", ""], ["--env", "Franka"], ["--env", "фр3 🦾"], ["--env", "a\nb\nc\nd"], ["--env", "x" * 10**5],
    ["--env"], ["--nosuch"], ["--nosuch", "3"], ["franka"], ["-e", "franka"], ["--env", "franka", "extra"], ["--", "--env"],
    ["--num-envs", "0"], ["--num-envs", "-1"], ["--num-envs", "1e3"], ["--num-envs", "2.5"], ["--num-envs", "many"],
    ["--num-envs", HUGE], ["--num-envs", "10000000"], ["--num-envs", ""], ["--num-envs", "None!"], ["--num-envs", "0x10"],
    ["--segment", "0"], ["--segment", "-3"], ["--segment", "201"], ["--env", "pointmass", "--segment", "101"],
    ["--bootstrap", "magic"], ["--bootstrap", ""], ["--bootstrap", "CRITIC"], ["--total-env-steps", "0"],
    ["--total-env-steps", "-5"], ["--total-env-steps", "1e6"], ["--total-env-steps", "9" * 30], ["--learning-rate", "0"],
    ["--learning-rate", "-1"], ["--learning-rate", "nan"], ["--learning-rate", "inf"], ["--learning-rate", "1e999"],
    ["--learning-rate", "fast"], ["--gamma", "1.01"], ["--gamma", "-0.1"], ["--gamma", "nan"], ["--gamma", "½"],
    ["--max-grad-norm", "0"], ["--max-grad-norm", "-inf"], ["--hidden", "0"], ["--hidden", "100000"], ["--seed", "-1"],
    ["--seed", "9" * 20], ["--seed", "one"], ["--device", "cuda:99"], ["--device", "toaster"], ["--device", "meta"],
    ["--device", ""], ["--device", "cuda:-1"], ["--threads", "0"], ["--threads", "-2"],
    ["--torch-threads", "0"], ["--torch-threads", "100000"], ["--num-evals", "0"], ["--num-evals", "-1"],
    ["--num-minibatches", "0"], ["--num-minibatches", "999999"], ["--update-epochs", "0"], ["--update-epochs", "-1"],
    ["--checkpoint-seconds", "-1"], ["--checkpoint-seconds", "nan"], ["--max-skipped", "0"], ["--max-skipped", "-9"],
    ["--run-dir", "."], ["--run-dir", "{file}"], ["--run-dir", "{file}/run"], ["--run-dir", "x" * 300], ["--run-dir", "a\0b"],
    ["--run-dir", "\udcff"], ["--run-dir", "{runs}"], ["--resume", "nowhere"], ["--resume", "{file}"], ["--resume", "{runs}"],
    ["--resume", ""], ["--resume", "a\0b"], ["--resume", "x" * 300], ["--resume", "/dev/null"],
    ["--resume", "{whole}", "--seed", "7"],
]  # fmt: skip
OWN = {
    "apg": [
        ["--td-lambda", "1.5"], ["--td-lambda", "nan"], ["--target-rate", "-0.1"], ["--costate-clip", "-1"],
        ["--costate-clip", "nan"], ["--costate-clip", "inf"], ["--recompute"], ["--recompute", "--bootstrap", "none"],
        ["--recompute", "yes"], ["--clip-coef", "0.2"],
    ],
    "ppo": [
        ["--gae-lambda", "1.5"], ["--gae-lambda", "-1"], ["--clip-coef", "0"], ["--clip-coef", "nan"], ["--ent-coef", "-1"],
        ["--target-kl", "-1"], ["--target-kl", "nan"], ["--norm-adv", "maybe"], ["--costate-clip", "1"],
        ["--num-minibatches", "8", "--num-envs", "1", "--segment", "8"],
        ["--num-minibatches", "8", "--num-envs", "5", "--segment", "5"],
    ],
    "evaluate": [
        [], ["nosuch"], ["--help-me"], ["suite", "policy"], ["policy"], ["policy", "nowhere"], ["policy", "{file}"],
        ["policy", "{runs}"], ["policy", "{whole}", "{whole}"], ["policy", ""], ["policy", "x" * 300], ["policy", "a\0b"],
        ["policy", "{whole}", "--num-envs", "0"], ["policy", "{whole}", "--num-envs", "-1"],
        ["policy", "{whole}", "--num-envs", "9" * 30], ["policy", "{whole}", "--seed", "-1"],
        ["policy", "{whole}", "--seed", "9" * 30], ["policy", "{whole}", "--device", "toaster"],
        ["policy", "{whole}", "--device", "meta"], ["policy", "{whole}", "--device", "cuda:99"],
        ["policy", "{whole}", "--device", "toaster\nand\nmore"],
        ["export"], ["export", "{whole}"], ["export", "nowhere", "--out", "x.pt"], ["export", "{whole}", "--out", "x"],
        ["export", "{whole}", "--out", ""], ["export", "{whole}", "--out", "{file}/x.pt"], ["export", "{runs}", "--out", "x.pt"],
        ["gradients"], ["gradients", "nowhere"], ["gradients", "{whole}", "nowhere"], ["gradients", "{whole}", "--num-envs", "0"],
        ["gradients", "{whole}", "--clip", "0"], ["gradients", "{whole}", "--clip", "nan"], ["gradients", "{whole}", "--out", "."],
        ["gradients", "{whole}", "--out", "{file}/g.csv"], ["gradients", "{whole}", "--out", ""],
        ["suite", "--tasks", "cartpole"], ["suite", "--tasks"], ["suite", "--tasks", "franka\n\n"],
        ["suite", "--algorithms", "apg", "sac"], ["suite", "--algorithms", "ПРО"], ["suite", "--seeds", "0"],
        ["suite", "--seeds", "-1"], ["suite", "--seeds", "9" * 12], ["suite", "--seeds", HUGE], ["suite", "--seeds", "1.5"],
        ["suite", "--processes", "0"], ["suite", "--processes", "99999"], ["suite", "--total-env-steps", "0"],
        ["suite", "--total-env-steps", "9" * 30], ["suite", "--folder", "{file}"], ["suite", "--folder", "{file}/x"],
        ["suite", "--folder", "x" * 300], ["suite", "--folder", "a\0b"], ["suite", "--results", "{file}"],
        ["suite", "--results", "{file}/x/y"], ["suite", "--seed", "3", "--bogus"], ["ablation", "--segments", "-1"],
        ["ablation", "--segments", "129"], ["ablation", "--segments", "x"], ["ablation", "--segments"],
        ["ablation", "--bootstraps", "magic"], ["ablation", "--seeds", "-3"], ["ablation", "--tasks", "pointmass", "pong"],
        ["sweep", "--learning-rates", "0.001", "0"], ["sweep", "--learning-rates", "nan"], ["sweep", "--learning-rates", "100"],
        ["sweep", "--learning-rates"], ["sweep", "--learning-rates", "a", "b"], ["sweep", "--algorithms", "ppo-best"],
        ["summary"], ["summary", "--threshold", "0"], ["summary", "--threshold", "nan"], ["summary", "--threshold", "2"],
        ["summary", "--results", "{file}"], ["summary", "--results", "nowhere"], ["summary", "--results", "x" * 300],
        ["summary", "--results", "{bad}"],
    ],
    "plots": [
        [], ["figures", "extra"], ["nosuch"], ["figures", "--results"], ["figures", "--results", "nowhere"],
        ["figures", "--results", "{file}"], ["figures", "--results", "x" * 300], ["figures", "--results", "a\0b"],
        ["figures", "--results", ""], ["figures", "--results", "{bad}"], ["figures", "--bogus", "1"], ["--results", "."],
        ["figures", "--results", "päth\nwith\nlines"], ["rollout"], ["rollout", "nowhere"], ["rollout", "{file}"],
        ["rollout", "{whole}", "--seed", "-1"], ["rollout", "{whole}", "--seed", "x"], ["rollout", "{whole}", "--out", "{file}"],
        ["rollout", "{whole}", "--out", "{file}/x"], ["rollout", "{runs}"], ["watch"], ["watch", "nowhere"], ["watch", "{file}"],
        ["watch", "{bad}"],
    ],
}  # fmt: skip
MISTAKES = [(name, flags) for name in TRAINERS for flags in SHARED] + [(name, flags) for name in OWN for flags in OWN[name]]


@pytest.fixture(scope="module")
def given(whole, tmp_path_factory):
    """Paths to name in a mistake: a file, a folder without a checkpoint, whole runs, a folder with damaged tables."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "file").write_text("mine")
    (folder / "bad").mkdir()
    (folder / "bad" / "config.json").write_text("[1, 2]")
    (folder / "bad" / "suite.csv").write_bytes(b"env,seed\nfranka\n\xff\0\n")
    return {"file": folder / "file", "bad": folder / "bad", "runs": whole["apg"].parent}


@pytest.mark.parametrize(("name", "flags"), MISTAKES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(MISTAKES)])
def test_a_mistake_is_told_in_one_line_and_changes_nothing(name, flags, given, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = given | {"whole": whole.get(name, whole["apg"])}
    for word, path in given.items():
        flags = [flag.replace("{" + word + "}", str(path)) for flag in flags]
    kept = {path: path.stat().st_mtime_ns for folder in given.values() for path in [folder, *folder.rglob("*")]}
    monkeypatch.setattr(envs, "make", None)  # what is not refused ends here, without a long training
    monkeypatch.setattr(subprocess, "Popen", None)
    error = refused(capsys, name, *flags)
    assert len(error) < 1000 and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []
    assert kept == {path: path.stat().st_mtime_ns for folder in given.values() for path in [folder, *folder.rglob("*")]}


@pytest.mark.parametrize("flags", [("apg",), ("ppo",), ("evaluate",), ("evaluate", "suite"), ("plots",), ("plots", "figures")])
def test_help_is_no_mistake(flags, capsys):
    assert script(*flags, "--help") == 0
    printed = capsys.readouterr()
    assert "usage:" in printed.out and printed.err == ""


# --- environments under abuse -----------------------------------------------------------------------------------------


def bounds(task):
    """Lowest and highest state [S] that envs.py's comments promise."""
    if task == "pointmass":
        high = [14, 4, 1]
    elif task == "navigation":
        high = [7.4, 7.4, 1, 1, 1.2, 1.2, 10] + [1.2, 1.2, 0.16] * envs.OBSTACLES
        return -torch.tensor(high[:6] + [0.21] + [1.2, 1.2, -0.1] * envs.OBSTACLES) - 1e-5, torch.tensor(high) + 1e-5
    elif task == "pusht":
        low = [0, 0, -0.4, -0.4, -0.25, -0.25, -INF, -0.6, -0.6, -4]
        return torch.tensor(low) - 1e-5, torch.tensor([1, 1, 0.4, 0.4, 1.25, 1.25, INF, 0.6, 0.6, 4]) + 1e-5
    else:
        low, high = ([getattr(joint, name) for joint in envs.FR3] for name in ("lower", "upper"))
        speed, margin = [joint.speed for joint in envs.FR3], envs.TARGET_MARGIN
        pose = [1.2] * 3 + [1.0] * 9
        low = low + [-x for x in speed] + [x + margin for x in low] + [-x for x in pose]
        return torch.tensor(low) - 1e-5, torch.tensor(high + speed + [x - margin for x in high] + pose) + 1e-5
    return -torch.tensor(high) - 1e-5, torch.tensor(high) + 1e-5


@pytest.mark.parametrize("task", list(envs.TASKS))
def test_a_million_steps_of_abuse(task):
    """A quarter each of uniform, saturated, huge and infinite actions; the last two held, as what drives furthest."""
    (low, high), steps, num_envs = bounds(task), 250, 1000
    for kind in ("uniform", "saturated", 1e30, INF):
        env, generator = envs.make(task, num_envs, seed=5), torch.Generator().manual_seed(6)
        for k in range(steps):
            fresh = 2 * torch.rand(num_envs, env.action_size, generator=generator) - 1
            if kind == "uniform":
                action = fresh
            elif kind == "saturated":
                action = fresh.sign()
            elif k % 25 == 0:
                action = kind * fresh.sign()
            with torch.no_grad():
                observation, reward, _, _, info = env.step(action)
            assert ((low <= env.state) & (env.state <= high)).all(), (kind, env.state.amin(0), env.state.amax(0))
            assert observation.isfinite().all() and reward.isfinite().all() and not info["nonfinite"].any()


@pytest.mark.parametrize("task", list(envs.TASKS))
def test_an_action_that_is_nan_restarts_its_environment_only(task):
    """In any of its components; and any component of the state that is not finite is noticed within the same step."""
    for component in range(envs.make(task, 1).action_size):
        torch.manual_seed(0)
        broken, sound = envs.make(task, 5, seed=1), envs.make(task, 5, seed=1)
        others = torch.tensor([0, 1, 3, 4])
        for k in range(20):
            action = torch.rand(5, sound.action_size) * 2 - 1
            expected = sound.step(action)
            action = action.clone()
            action[2, component] = NAN if k == 7 else action[2, component]
            result = broken.step(action)
            assert all(torch.equal(a[others], b[others]) for a, b in zip(result[:4], expected[:4]))
            assert torch.equal(broken.state[others], sound.state[others])
            assert result[4]["nonfinite"].tolist() == [False, False, k == 7, False, False]
            assert result[1].isnan().tolist() == [False, False, k == 7, False, False]
            assert result[0].isfinite().all() and broken.state.isfinite().all()
            assert broken.elapsed.tolist() == [k + 1, k + 1, k + 1 if k < 7 else k - 7, k + 1, k + 1]
    for value in (NAN, INF, -INF):
        size = broken.state_size
        env = envs.make(task, size, seed=1)
        env.state = torch.where(torch.eye(size, dtype=torch.bool), value, env.state)
        assert env.step(torch.zeros(size, env.action_size))[4]["nonfinite"].all() and env.state.isfinite().all()


# --- the code itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [apg, ppo, models, envs, bridge, evaluate, plots], ids=lambda module: module.__name__)
def test_public_functions_have_type_hints(module):
    public = [x for name, x in vars(module).items() if name[0] != "_" and getattr(x, "__module__", "") == module.__name__]
    functions = [inspect.unwrap(x) for x in public if inspect.isfunction(inspect.unwrap(x))]
    for owner in filter(inspect.isclass, public):
        functions += [x for name, x in vars(owner).items() if inspect.isfunction(x) and name[0] != "_"]
    for function in functions:
        signature = inspect.signature(function)
        for name, parameter in signature.parameters.items():
            assert name == "self" or parameter.annotation is not parameter.empty, f"{function.__qualname__}: {name}"
        assert signature.return_annotation is not signature.empty, function.__qualname__


def test_kills():
    """A short one of kill.py, in a process of its own, which forks the runs."""
    command = [sys.executable, ROOT / "tests" / "kill.py", "--kills", "3"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert process.returncode == 0 and process.stdout.count("3 kills survived") == 2, process.stderr
