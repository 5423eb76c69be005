"""Score trained policies, measure the gradients that they are trained with, and compare the algorithms over seeds.

    python evaluate.py policy RUN_DIR_OR_CHECKPOINT
    python evaluate.py export RUN_DIR --out FILE.pt  # a small checkpoint: weights and normaliser
    python evaluate.py gradients RUN_DIR_OR_CHECKPOINT ...
    python evaluate.py suite | ablation | sweep      # many runs, into runs/ and results/; the same command goes on
    python evaluate.py summary                       # statistics of results/suite.csv
"""

import csv
import dataclasses
import io
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import textwrap
import time
from typing import NoReturn

import numpy as np
import torch
import tyro
import warp

import apg
import envs
import models
import ppo
from models import Actor, Critic, Normalizer

TASKS, ALGORITHMS, BOOTSTRAPS = tuple(apg.TUNED), ("apg", "ppo"), ("none", "mc", "critic")
# Flags by task with which PPO is at 0.9 in fewer environment steps than with its defaults, with which it ends higher: the
# suite's third label, ppo-best, so that APG's ratio is also known against the most sample-efficient PPO found.
PPO_BEST = {
    "navigation": ["--num-envs", "256", "--total-env-steps", "4000000"],
    "pusht": ["--num-envs", "128", "--total-env-steps", "3000000"],
}
# Budget by task of each of the ablation's runs, which need not go on to the end to be told apart.
ABLATION_STEPS = {"pointmass": 50_000, "navigation": 300_000, "pusht": 1_000_000, "franka": 750_000}
# Budget by algorithm and task of each of the sweep's runs, for the same reason; the rate still decays to 0 in each.
SWEEP_STEPS = {
    "apg": {"pointmass": 50_000, "navigation": 500_000, "pusht": 750_000, "franka": 750_000},
    "ppo": {"pointmass": 150_000, "navigation": 3_000_000, "pusht": 2_000_000, "franka": 2_000_000},
}
# Of mc alone the discount counts from the episode's start: with the gamma of the others, late steps would hardly count.
ABLATION_MC = ("--gamma", "0.99")
FACTS = ["env", "algorithm", "seed", "segment", "bootstrap", "learning_rate", "total_env_steps"]
COSTS = ("env_steps", "gradient_steps", "wall_seconds")


def fail(message: object, code: int = 2) -> NoReturn:
    """A user's mistake (exit code 2), or runs that failed (1): told in one line."""
    print(f"evaluate.py: {textwrap.shorten(str(message), 400, placeholder=' ...')}", file=sys.stderr)
    sys.exit(code)


def load(
    path: str, num_envs: int, device: str = "cpu", seed: int = envs.EVALUATION_SEED
) -> tuple[dict, envs.Env, Actor, Critic, Normalizer]:
    """A checkpoint with its environments, actor, critic and normaliser."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed must be 0 to {2**63 - 1}, got {seed}")
    checkpoint = models.load_checkpoint(path)
    try:
        env = envs.make(checkpoint["args"]["env"], num_envs, device, seed)
        actor = Actor(env.observation_size, env.action_size, checkpoint["args"]["hidden"]).to(device)
        critic = Critic(env.observation_size, checkpoint["args"]["hidden"]).to(device)
        normalizer = Normalizer(env.observation_size).to(device)
        for name, module in {"actor": actor, "critic": critic, "normalizer": normalizer}.items():
            module.load_state_dict(checkpoint[name])
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{path} does not fit its task: {error}") from None
    return checkpoint, env, actor, critic, normalizer


def policy(
    path: tyro.conf.Positional[str], num_envs: int = 256, seed: int = envs.EVALUATION_SEED, device: str = "cpu"
) -> None:
    """Print the return, success and errors of a checkpoint's deterministic policy over one episode an environment.

    Args:
        path: a run folder or a checkpoint file
        num_envs: episodes to average over
        seed: of the episodes' starts; the default is the one that training curves are scored on
        device: cpu, cuda, cuda:1, ...
    """
    check({}, {"num-envs": num_envs}, [])
    if not models.is_device(device):
        raise ValueError(f"--device {device} is not there, or neither cpu nor cuda")
    checkpoint, env, actor, _, normalizer = load(path, num_envs, device, seed)
    result = envs.score(env, lambda observation: actor(normalizer(observation)), seed, measures=True)
    print(f"{env.name} ({checkpoint['algorithm']}, {checkpoint['counters'][0]:,} environment steps), {num_envs} episodes")
    for name, value in result.items():
        limit = env.task.tolerances.get(name)
        print(envs.in_words(name, value) + ("" if limit is None else f" (success: below {limit:g})"))


def export(run_dir: tyro.conf.Positional[str], out: str) -> None:
    """Write what a run's policy needs, weights and normaliser without the optimizers' state, as a small checkpoint.

    Its success and return over 256 episodes go, as a row of its own, into scores.csv beside it.

    Args:
        run_dir: the run's folder
        out: file to write, {task}_{algorithm}.pt
    """
    out = pathlib.Path(out)
    if out.suffix != ".pt":
        raise ValueError(f"--out {out} must end in .pt")
    check({}, {}, [out.parent])
    checkpoint, env, actor, _, normalizer = load(run_dir, 256)
    result = envs.score(env, lambda observation: actor(normalizer(observation)))
    keep = ("algorithm", "args", "counters", "actor", "critic", "normalizer")
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint["args"] |= {"run_dir": None, "resume": None}  # places on the machine that trained it
    models.save_checkpoint(out, {name: checkpoint[name] for name in keep})
    scores, rows = out.with_name("scores.csv"), []
    if scores.is_file():
        rows = [row for row in csv.DictReader(scores.read_text().splitlines()) if row["file"] != out.name]
    row = {"file": out.name, "env": env.name, "algorithm": checkpoint["algorithm"], "seed": checkpoint["args"]["seed"]}
    row |= {"env_steps": checkpoint["counters"][0], "success": result["success"], "return": f"{result['return']:.3f}"}
    write_csv(scores, list(row), [*rows, row])
    print(f"wrote {out}, {out.stat().st_size / 1000:.0f} kB: success {result['success']:.3f}, return {result['return']:.2f}")


class OwnWeights:
    """An actor with weights of its own for each environment: one backward then gives every environment's gradient."""

    def __init__(self, actor: Actor, num_envs: int):
        own = lambda parameter: parameter.detach().expand(num_envs, *parameter.shape).clone().requires_grad_()
        self.mean = actor.mean
        self.weights = {name: own(parameter) for name, parameter in actor.mean.named_parameters()}
        self.log_std = own(actor.log_std)

    def sample(self, observation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean_of = lambda weights, row: torch.func.functional_call(self.mean, weights, (row,))
        u = torch.vmap(mean_of)(self.weights, observation)
        u = u + self.log_std.exp() * torch.randn_like(u)
        return torch.tanh(u), u

    def gradients(self) -> torch.Tensor:
        """[N, P], one row an environment."""
        return torch.cat([p.grad.flatten(1) for p in (*self.weights.values(), self.log_std)], 1)


def gradients(
    paths: tyro.conf.Positional[list[str]], num_envs: int = 64, clip: float = 3.0, out: str = "results/gradients.csv"
) -> None:
    """Policy gradient per environment against segment length, for each bootstrap, with and without costate clip.

    For each checkpoint's policy, and for a fresh one on the same task, the gradient of eq. (3) is taken for every
    environment by itself, with respect to the policy's weights, and divided by the number of control steps. A policy that
    was trained without a critic gets no rows with one.

    Args:
        paths: run folders or checkpoint files
        num_envs: environments to take the gradient of
        clip: costate clip where it is on
        out: CSV file to write
    """
    check({}, {"num-envs": num_envs}, [pathlib.Path(out).parent])
    if not 0 < clip < float("inf"):
        raise ValueError(f"--clip must be above 0 and finite, got {clip}")
    if not paths or pathlib.Path(out).is_dir():
        raise ValueError(f"--out {out} is a folder" if paths else "give run folders or checkpoint files")
    for path in paths:  # all, before the long work on the first
        models.load_checkpoint(path)
    rows = []
    for path in paths:
        for trained in (False, True):
            torch.manual_seed(0)
            checkpoint, env, actor, critic, normalizer = load(path, num_envs)
            gamma = checkpoint["args"]["gamma"]
            if not trained:
                actor, critic = Actor(env.observation_size, env.action_size), Critic(env.observation_size)
            fitted = not trained or checkpoint["args"]["bootstrap"] == "critic"  # a critic that nothing fitted says nothing
            lengths = [k for k in (1, 2, 4, 8, 16, 32, 64) if k < env.episode_length] + [env.episode_length]
            for segment in lengths:
                for bootstrap in ("none", "critic", "mc") if fitted else ("none", "mc"):
                    for costate_clip in (0.0, clip):
                        g = gradient(env, actor, critic, normalizer, gamma, segment, bootstrap, costate_clip)
                        norms = g.norm(dim=1)
                        low, middle, high = (norms.nanquantile(q).item() for q in (0.05, 0.5, 0.95))
                        rows.append(
                            {
                                "env": env.name,
                                "policy": "trained" if trained else "fresh",
                                "bootstrap": bootstrap,
                                "costate_clip": costate_clip,
                                "segment": segment,
                                "of_mean": g.mean(0).norm().item(),
                                "low": low,
                                "median": middle,
                                "high": high,
                                "largest": norms.max().item(),
                                "nonfinite": (~norms.isfinite()).sum().item(),
                            }
                        )
                print(f"{env.name:10} {rows[-1]['policy']:8} K={segment}", flush=True)
    write_csv(pathlib.Path(out), list(rows[0]), rows)


def gradient(
    env: envs.Env, actor: Actor, critic: Critic, normalizer: Normalizer,
    gamma: float, segment: int, bootstrap: str, costate_clip: float,
) -> torch.Tensor:  # fmt: skip
    """One policy gradient [N, P], as apg.py takes it but for each environment by itself, per control step."""
    torch.manual_seed(1)
    env.reset(1)
    steps = env.episode_length if bootstrap == "mc" else segment
    if bootstrap != "mc":  # from all phases of an episode
        env.elapsed = torch.randint(env.episode_length, (env.num_envs,), generator=env.generator)
        with torch.no_grad():
            observation = env.observe(env.state)
            for _ in range(env.episode_length):
                observation, *_ = env.step(actor.sample(normalizer(observation))[0])
    own = OwnWeights(actor, env.num_envs)
    value = (lambda observation: critic(normalizer(observation))) if bootstrap == "critic" else None
    hand_over = bootstrap == "mc"
    segments, _ = apg.rollout_in_segments(env, own, normalizer, steps, segment, gamma, hand_over, costate_clip, value)
    apg.backward(segments, 1.0)
    return own.gradients() / steps


# --- many runs --------------------------------------------------------------------------------------------------------


def check(lists: dict, counts: dict, folders: list) -> None:
    """Refuse a user's mistakes before anything is created.

    lists: {flag: (values, choices)}; counts: {flag: number, or None where it is not given}; folders: those to write to.
    """
    for flag, (values, choices) in lists.items():
        if not values:
            raise ValueError(f"--{flag} needs at least one value")
        for value in values:
            if value not in choices:
                raise ValueError(f"unknown --{flag} {value}: choose from {', '.join(choices)}")
    for flag, value in counts.items():
        most = {"seeds": 10_000, "processes": 1024, "total-env-steps": 10**12, "num-envs": 10**6}[flag]
        if value is not None and not 1 <= value <= most:
            raise ValueError(f"--{flag} must be at least 1 and at most {most:,}, got {value}")
    for path in folders:
        try:
            place = next(place for place in [pathlib.Path(path), *pathlib.Path(path).absolute().parents] if place.exists())
            if not place.is_dir():
                raise ValueError(f"{place} is not a folder")
            if not os.access(place, os.W_OK):
                raise ValueError(f"{place} is not writable")
        except OSError as error:  # a name too long, or a folder closed to us
            raise ValueError(f"{path}: {error.strerror}") from None


def make_job(
    folder: str, label: str, cell: tuple, env: str, seed: int, *flags: str, total_env_steps: int | None = None
) -> dict:
    """One run: its folder, its flags, and every setting that they amount to.

    label: apg, ppo or ppo-best; cell: what its folder's name says beside task, label and seed; flags: beside env and seed.
    """
    algorithm = "apg" if label == "apg" else "ppo"
    flags = ["--env", env, "--seed", str(seed), "--threads", "1", *flags]  # the processes share the cores
    if total_env_steps is not None:
        flags += ["--total-env-steps", str(total_env_steps)]
    trainer = {"apg": apg, "ppo": ppo}[algorithm]
    settings = dataclasses.asdict(trainer.checked(tyro.cli(trainer.Args, args=flags)))
    del settings["run_dir"], settings["resume"]
    settings["algorithm"] = algorithm
    name = "__".join([env, label, *cell, str(seed)])
    job = {"env": env, "label": label, "name": name, "folder": pathlib.Path(folder) / name}
    return job | {"flags": flags, "settings": settings}


def metrics(job: dict) -> list[dict]:
    """The rows of a run's metrics.csv. ValueError, in one line, if it is not as the trainer wrote it."""
    path, rows = job["folder"] / "metrics.csv", []
    columns = {"apg": apg, "ppo": ppo}[job["settings"]["algorithm"]].METRICS
    try:
        reader = csv.DictReader(io.StringIO(path.read_text()), strict=True)
        for row in reader:
            steps, *_ = [float(text) for text in row.values()]
            if list(row) != columns or steps % 1 or rows and steps <= float(rows[-1]["env_steps"]):
                raise ValueError
            rows.append(row)
    except (csv.Error, TypeError, ValueError):  # another column, a short or long row, no number, no text
        raise ValueError(f"{path}, about line {len(rows) + 2}: not a row that a run writes") from None
    return rows


def status(job: dict) -> str:
    """Of a run's folder: new, stale (killed before its first checkpoint), begun or finished. ValueError if not its own."""
    folder = job["folder"]
    if not folder.exists():
        return "new"
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    try:
        config = dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError):
        config = {}
    checkpoint = models.load_checkpoint(folder) if (folder / "checkpoint.pt").exists() else None
    sources = {"config.json": config}
    if checkpoint is not None:
        if not set(FACTS) <= set(config):
            raise ValueError(f"{folder} has a checkpoint but no readable config.json")
        sources["checkpoint.pt"] = {**checkpoint["args"], "algorithm": checkpoint["algorithm"]}
    for source, values in sources.items():
        for name, value in job["settings"].items():
            if name in values and values[name] != value:  # a run from before a flag existed had its default
                has = f"{name} {values[name]}, not {value} ({source})"
                raise ValueError(f"{folder} has {has}: give another --folder, or remove it")
    if checkpoint is None:
        for path in folder.iterdir():
            if path.name not in ("config.json", "metrics.csv") and path.suffix != ".tmp":
                raise ValueError(f"{folder} is in the way: no checkpoint, but {path.name}, which no run makes")
        return "stale"
    # By the checkpoint, as the trainers do: a run can be killed between its last line of metrics and its last checkpoint.
    if checkpoint["counters"][0] < config["total_env_steps"]:
        return "begun"
    rows = metrics(job)
    if not rows or int(rows[-1]["env_steps"]) < config["total_env_steps"]:
        raise ValueError(f"{folder} is finished, but its metrics.csv lacks the end: remove the folder to run it anew")
    return "finished"


def start(job: dict, lock: io.IOBase) -> subprocess.Popen:
    """Start a run, or go on with it, as a process that writes to a log beside its folder."""
    state, folder = status(job), job["folder"]
    if state == "stale":
        for path in folder.iterdir():  # only what `status` knows
            path.unlink()
        folder.rmdir()
    flags = ["--resume", str(folder)] if state == "begun" else [*job["flags"], "--run-dir", str(folder)]
    script = pathlib.Path(__file__).with_name(job["settings"]["algorithm"] + ".py")
    with open(f"{folder}.log", "a") as log:
        # The process inherits the lock: should it outlive this one, no second process can write to its folder.
        return subprocess.Popen(
            [sys.executable, str(script), *flags],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},  # so that what went wrong is the log's last line
            pass_fds=[lock.fileno()],
        )


def expected_seconds(job: dict, jobs: list[dict], seconds: dict) -> float:
    """Mean of the finished runs of the same task and algorithm, else of the same algorithm; nan if there are none."""
    alike = [other for other in jobs if other["folder"] in seconds and other["label"] == job["label"]]
    alike = [other for other in alike if other["env"] == job["env"]] or alike
    return sum(seconds[other["folder"]] for other in alike) / len(alike) if alike else float("nan")


def run_jobs(command: str, jobs: list[dict], settings: dict) -> tuple[list[dict], int]:
    """Run what is not finished of `jobs`, some at a time; write {results}/{command}.csv and .json from what is.

    Returns the rows of the CSV file and the number of runs that failed.
    """
    import fcntl  # here, because Windows has none, and the other commands need none

    jobs = list({job["folder"]: job for job in jobs}.values())  # each once, should a flag name something twice
    for job in jobs:
        status(job)  # what is in the way stops everything before anything starts
    folder = pathlib.Path(settings["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another evaluate.py, or a run that it left behind, is at work in {folder}") from None
        old_handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # to KeyboardInterrupt, as Ctrl-C
        running = {}  # process: job, when it started
        try:
            return run_queue(command, jobs, settings, running, lock)
        except KeyboardInterrupt:
            fail("interrupted; the same command goes on where it stopped", 130)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
            signal.signal(signal.SIGTERM, old_handler)


def run_queue(
    command: str, jobs: list[dict], settings: dict, running: dict, lock: io.IOBase
) -> tuple[list[dict], int]:
    """The loop of `run_jobs`, which sees to it that no process of `running` outlives it."""
    seconds = {job["folder"]: float(metrics(job)[-1]["wall_seconds"]) for job in jobs if status(job) == "finished"}
    queue, failed, processes = [job for job in jobs if job["folder"] not in seconds], 0, settings["processes"]
    print(f"{command}: {len(jobs)} runs, {processes} at a time, into {settings['folder']}; {len(seconds)} finished before")

    def progress(event):
        now = time.perf_counter()
        left = [expected_seconds(job, jobs, seconds) for job in queue]
        left += [np.maximum(expected_seconds(job, jobs, seconds) - (now - begun), 0) for job, begun in running.values()]
        left = sum(left) / max(min(processes, len(left)), 1)
        left = "?" if np.isnan(left) else f"{left:.0f} s" if left < 120 else f"{left / 60:.0f} min"
        print(f"{len(seconds) + failed}/{len(jobs)} {event}; time left: {left}", flush=True)

    def write_finished():
        return write_results(command, [job for job in jobs if job["folder"] in seconds], settings)

    while queue or running:
        while queue and len(running) < processes:
            job = queue.pop(0)
            running[start(job, lock)] = job, time.perf_counter()
            progress(f"started {job['name']}")
        time.sleep(0.1)
        for process in [process for process in running if process.poll() is not None]:
            job, begun = running.pop(process)
            if process.returncode == 0:
                # Start and evaluations take time too; but a resumed run's process saw only a part of it.
                trained = float(metrics(job)[-1]["wall_seconds"])
                seconds[job["folder"]] = max(time.perf_counter() - begun, trained)
                write_finished()
                progress(f"finished {job['name']}")
            else:
                failed += 1
                lines = pathlib.Path(f"{job['folder']}.log").read_text(errors="replace").split("\n")
                last = next((line for line in reversed(lines) if line.strip()), "no output")
                progress(f"FAILED {job['name']} (exit {process.returncode}): {last}")
    return write_finished() if seconds else [], failed  # nothing finished: leave an older file alone


def end(failed: int, folder: str) -> None:
    if failed:
        fail(f"{failed} runs failed, see their logs in {folder}; the same command tries again", 1)


def write_results(command: str, jobs: list[dict], settings: dict) -> list[dict]:
    """Write the curves of finished runs, and where they come from. Returns the rows."""
    rows = []
    for job in jobs:
        config = json.loads((job["folder"] / "config.json").read_text())
        facts = {name: config[name] for name in FACTS} | {"algorithm": job["label"]}
        rows += [{**facts, **{name: shortened(text) for name, text in row.items()}} for row in metrics(job)]
    cpu = platform.processor()
    if pathlib.Path("/proc/cpuinfo").exists():
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "warp": warp.__version__}
    machine = {"versions": versions, "cpu": cpu, "cores": os.cpu_count()}
    results = pathlib.Path(settings["results"])
    write_csv(results / f"{command}.csv", FACTS + ppo.METRICS, rows)
    write(results / f"{command}.json", json.dumps(dict(command=command, settings=settings, **machine), indent=1) + "\n")
    return rows


def shortened(text: str) -> str:
    """A number's text with 6 significant digits; whole numbers stay as they are."""
    return f"{float(text):.6g}" if "." in text or "e" in text else text


def write_csv(path: pathlib.Path, columns: list[str], rows: list[dict]) -> None:
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write(path, file.getvalue())


def write(path: pathlib.Path, text: str) -> None:
    """To a temporary file, then renamed: a crash leaves the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def print_cells(rows: list[dict], line: str, column: str) -> None:
    """By task, final success: IQM over seeds for each value of `line` (down) and `column` (across)."""
    final = {(row["env"], row[line], row[column], row["seed"]): float(row["eval_success"]) for row in rows}  # last row wins
    for env in dict.fromkeys(key[0] for key in final):
        columns = sorted({key[2] for key in final if key[0] == env})
        print(f"\n{env}, final success (IQM) by {column}\n{'':8}" + "".join(f"{value:>9g}" for value in columns))
        for name in dict.fromkeys(key[1] for key in final if key[0] == env):
            cells = [[success for key, success in final.items() if key[:3] == (env, name, value)] for value in columns]
            print(f"{name:8}" + "".join(f"{iqm(cell):9.3f}" if cell else f"{'-':>9}" for cell in cells))


def suite(
    tasks: tuple[str, ...] = TASKS,
    algorithms: tuple[str, ...] = ALGORITHMS,
    seeds: int = 10,
    processes: int = 2,
    folder: str = "runs/suite",
    results: str = "results",
    total_env_steps: int | None = None,
) -> None:
    """Train every task with every algorithm and seed; then summary. The same command again goes on where it stopped.

    Writes {results}/suite.csv, a row for each evaluation of each finished run, and {results}/suite.json.

    Args:
        tasks: pointmass, navigation, pusht, franka
        algorithms: apg, ppo; with ppo also ppo-best, on the tasks where PPO_BEST has values for it
        seeds: how many: 1 to this
        processes: runs at a time, each with one thread
        folder: where the runs go, each into a folder of its own with a log beside it
        results: where suite.csv and suite.json go
        total_env_steps: of each run, instead of the task's own
    """
    settings = {"tasks": tasks, "algorithms": algorithms, "seeds": seeds, "processes": processes}
    settings |= {"folder": folder, "results": results, "total_env_steps": total_env_steps, "ppo_best": PPO_BEST}
    counts = {"seeds": seeds, "processes": processes, "total-env-steps": total_env_steps}
    check({"tasks": (tasks, TASKS), "algorithms": (algorithms, ALGORITHMS)}, counts, [folder, results])
    jobs = []
    for seed in range(1, seeds + 1):  # outermost, so that what is there early covers every task and algorithm
        for env in tasks:
            for algorithm in algorithms:
                jobs.append(make_job(folder, algorithm, (), env, seed, total_env_steps=total_env_steps))
            if "ppo" in algorithms and env in PPO_BEST:
                jobs.append(make_job(folder, "ppo-best", (), env, seed, *PPO_BEST[env], total_env_steps=total_env_steps))
    rows, failed = run_jobs("suite", jobs, settings)
    if rows:
        summary(results)
    end(failed, folder)


def ablation(
    tasks: tuple[str, ...] = ("franka", "navigation", "pusht"),
    segments: tuple[int, ...] = (4, 8, 16, 32, 64, 0),
    bootstraps: tuple[str, ...] = BOOTSTRAPS,
    seeds: int = 4,
    processes: int = 2,
    folder: str = "runs/ablation",
    results: str = "results",
    total_env_steps: int | None = None,
) -> None:
    """Train APG with every segment length and bootstrap. The same command again goes on where it stopped.

    With mc only at the last of the lengths, as its gradient is the whole episode's whatever the segments (eq. 5), and with
    its own discount, ABLATION_MC.

    Writes {results}/ablation.csv, a row for each evaluation of each finished run, and {results}/ablation.json.

    Args:
        tasks: pointmass, navigation, pusht, franka
        segments: K; 0 is T, the whole episode
        bootstraps: none, mc, critic
        seeds: how many: 1 to this
        processes: runs at a time, each with one thread
        folder: where the runs go, each into a folder of its own with a log beside it
        results: where ablation.csv and ablation.json go
        total_env_steps: of each run, instead of the task's own, ABLATION_STEPS
    """
    settings = {"tasks": tasks, "segments": segments, "bootstraps": bootstraps, "seeds": seeds, "processes": processes}
    settings |= {"folder": folder, "results": results, "total_env_steps": total_env_steps}
    counts = {"seeds": seeds, "processes": processes, "total-env-steps": total_env_steps}
    check({"tasks": (tasks, TASKS), "bootstraps": (bootstraps, BOOTSTRAPS)}, counts, [folder, results])
    longest = min(envs.EPISODE_LENGTH[env] for env in tasks)
    if not segments or not all(0 <= segment <= longest for segment in segments):
        raise ValueError(f"--segments must be 0 (whole episodes) to {longest}, got {' '.join(map(str, segments)) or 'none'}")
    jobs = []
    for seed in range(1, seeds + 1):
        for env in tasks:
            for segment in segments:
                k = str(segment or envs.EPISODE_LENGTH[env])
                for bootstrap in bootstraps:
                    if bootstrap == "mc" and segment != segments[-1]:
                        continue
                    flags = ("--segment", k, "--bootstrap", bootstrap, *(ABLATION_MC if bootstrap == "mc" else ()))
                    steps = total_env_steps or ABLATION_STEPS.get(env)
                    jobs.append(make_job(folder, "apg", (f"K{k}", bootstrap), env, seed, *flags, total_env_steps=steps))
    rows, failed = run_jobs("ablation", jobs, settings)
    print_cells(rows, "bootstrap", "segment")
    end(failed, folder)


def sweep(
    tasks: tuple[str, ...] = TASKS,
    algorithms: tuple[str, ...] = ALGORITHMS,
    learning_rates: tuple[float, ...] = (0.0005, 0.001, 0.002, 0.004, 0.008),
    seeds: int = 3,
    processes: int = 2,
    folder: str = "runs/sweep",
    results: str = "results",
    total_env_steps: int | None = None,
) -> None:
    """Train both algorithms with every learning rate. The same command again goes on where it stopped.

    Writes {results}/sweep.csv, a row for each evaluation of each finished run, and {results}/sweep.json.

    Args:
        tasks: pointmass, navigation, pusht, franka
        algorithms: apg, ppo
        learning_rates: to try
        seeds: how many: 1 to this
        processes: runs at a time, each with one thread
        folder: where the runs go, each into a folder of its own with a log beside it
        results: where sweep.csv and sweep.json go
        total_env_steps: of each run, instead of the task's and algorithm's own, SWEEP_STEPS
    """
    settings = {"tasks": tasks, "algorithms": algorithms, "learning_rates": learning_rates, "seeds": seeds}
    settings |= {"processes": processes, "folder": folder, "results": results, "total_env_steps": total_env_steps}
    counts = {"seeds": seeds, "processes": processes, "total-env-steps": total_env_steps}
    check({"tasks": (tasks, TASKS), "algorithms": (algorithms, ALGORITHMS)}, counts, [folder, results])
    low, high = apg.LIMITS["learning_rate"]
    if not learning_rates or not all(low <= rate <= high for rate in learning_rates):
        got = " ".join(map(str, learning_rates)) or "none"
        raise ValueError(f"--learning-rates must be {low:g} to {high:g}, got {got}")
    jobs = []
    for seed in range(1, seeds + 1):
        for env in tasks:
            for algorithm in algorithms:
                for rate in learning_rates:
                    flags, steps = ("--learning-rate", str(rate)), total_env_steps or SWEEP_STEPS[algorithm].get(env)
                    jobs.append(make_job(folder, algorithm, (f"lr{rate}",), env, seed, *flags, total_env_steps=steps))
    rows, failed = run_jobs("sweep", jobs, settings)
    print_cells(rows, "algorithm", "learning_rate")
    end(failed, folder)


# --- their statistics -------------------------------------------------------------------------------------------------


def iqm(values: np.ndarray) -> np.ndarray:
    """Interquartile mean over the last axis, [..., n] -> [...]: int(n / 4) of the lowest and of the highest are dropped.

    Agarwal et al. 2021, Deep Reinforcement Learning at the Edge of the Statistical Precipice, arXiv:2108.13264. A nan
    anywhere makes the result nan: sorting alone would drop it as if it were a high value.
    """
    ordered = np.sort(np.asarray(values, dtype=float), axis=-1)  # nan last
    cut = int(ordered.shape[-1] / 4)
    middle = ordered[..., cut : ordered.shape[-1] - cut].mean(-1)
    return np.where(np.isnan(ordered[..., -1]), np.nan, middle)


def resampled_iqms(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """IQMs [10000] of as many draws, with replacement, of n of the n values."""
    values = np.asarray(values, dtype=float)
    return iqm(values[generator.integers(len(values), size=(10_000, len(values)))])


def interval(values: np.ndarray) -> np.ndarray:
    """95% interval (low, high) of the IQM of values [n]: percentile bootstrap over seeds (arXiv:2108.13264), repeatable."""
    return np.percentile(resampled_iqms(values, np.random.default_rng(0)), [2.5, 97.5])


def ratio_interval(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """95% interval (low, high) of iqm(values) / iqm(others), the seeds of both resampled independently."""
    generator = np.random.default_rng(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = resampled_iqms(values, generator) / resampled_iqms(others, generator)
    return np.percentile(ratios, [2.5, 97.5])


def read_curves(path: pathlib.Path) -> dict:
    """{task: {label: [curve of each seed]}}, a curve being {column: array [evaluations]}."""
    if not path.is_file():
        raise ValueError(f"no {path}: make it with evaluate.py suite")
    columns, runs = ("total_env_steps", *COSTS, "eval_return", "eval_success"), {}
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                run = runs.setdefault((row["env"], row["algorithm"], int(row["seed"])), [])
                run.append([float(row[column]) for column in columns])
        except (csv.Error, KeyError, TypeError, ValueError):
            raise ValueError(f"{path}, line {reader.line_num}: not a row that evaluate.py suite writes") from None
    if not runs:
        raise ValueError(f"{path} holds no runs")
    curves = {}
    for (env, label, seed), rows in runs.items():
        curve = dict(zip(columns, np.array(rows).T))
        if not (np.diff(curve["env_steps"]) > 0).all() or not (curve["total_env_steps"] >= 1).all():
            raise ValueError(f"{path}: env_steps of {env} {label} seed {seed} do not rise: rows twice, or out of order")
        curves.setdefault(env, {}).setdefault(label, []).append(curve)
    return curves


def cost_of_reaching(curve: dict, threshold: float) -> tuple[np.ndarray, bool]:
    """Env steps, gradient steps and wall seconds [3] at which success first comes to `threshold`, and whether it does.

    Linear between the evaluation before and the first one there. If it never does: the whole run's, a lower bound.
    """
    success = curve["eval_success"]
    spent = np.stack([curve[name] for name in COSTS])  # [3, evaluations]
    there = np.flatnonzero(success >= threshold)
    if len(there) == 0:
        return spent[:, -1], False
    if there[0] == 0:
        return spent[:, 0], True
    before, after = there[0] - 1, there[0]
    share = (threshold - success[before]) / (success[after] - success[before])
    return spent[:, before] + share * (spent[:, after] - spent[:, before]), True


def area(curve: dict, budget: float) -> float:
    """Mean of success over the env steps from 0 to `budget`, by trapezoids: 0 to 1."""
    steps, success = curve["env_steps"], curve["eval_success"]
    inside = steps < budget  # the last evaluation lies up to an iteration past the budget
    x = np.append(steps[inside], budget)
    y = np.append(success[inside], np.interp(budget, steps, success))
    return np.trapezoid(y, x) / budget


def summary(results: str = "results", threshold: float = 0.9) -> None:
    """Print the statistics of {results}/suite.csv, IQM over seeds and its 95% interval, and write {results}/summary.csv.

    A run that never reaches the threshold enters with all that it spent: ">" marks what is then at least the value, "<" a
    ratio that is at most it, because such runs are APG's, and "~" a ratio with such runs on both sides.

    Args:
        results: folder with suite.csv
        threshold: success that counts as solved
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"--threshold must be above 0 and at most 1, got {threshold}")
    rows = []
    for env, labels in read_curves(pathlib.Path(results) / "suite.csv").items():
        shared_budget = min(curve["total_env_steps"][0] for curves in labels.values() for curve in curves)
        measures, reached = {}, {}
        for label, curves in labels.items():
            costs, there = zip(*[cost_of_reaching(curve, threshold) for curve in curves])
            measures[label] = {
                "final_success": [curve["eval_success"][-1] for curve in curves],
                "final_return": [curve["eval_return"][-1] for curve in curves],
                **dict(zip(COSTS, np.array(costs).T)),
                "area": [area(curve, curve["total_env_steps"][0]) for curve in curves],
                "area_shared_budget": [area(curve, shared_budget) for curve in curves],
            }
            reached[label] = sum(there)
        lines = {name: [name] for name in ("", "reached", *next(iter(measures.values())))}  # as printed
        lines[""] = [f"{env}, success {threshold:g}"]
        ratios = []
        for label, curves in labels.items():
            missed = reached[label] < len(curves)
            row = {"env": env, "algorithm": label, "threshold": threshold, "total_env_steps": curves[0]["total_env_steps"][0]}
            row |= {"seeds": len(curves), "reached": reached[label], "bound": ">" if missed else ""}
            lines[""].append(label)
            lines["reached"].append(f"{reached[label]}/{len(curves)}")
            for name, values in measures[label].items():
                row[name], (row[f"{name}_low"], row[f"{name}_high"]) = float(iqm(values)), interval(values)
                lines[name].append(cell(row, name, row["bound"] if name in COSTS else ""))
            if label != "apg" and "apg" in labels:
                apg_missed = reached["apg"] < len(labels["apg"])
                row["ratio_bound"] = "~" if missed and apg_missed else ">" if missed else "<" if apg_missed else ""
                for name in COSTS:
                    values, others = measures[label][name], measures["apg"][name]
                    with np.errstate(divide="ignore", invalid="ignore"):
                        row[f"{name}_ratio"] = float(iqm(values) / iqm(others))
                    row[f"{name}_ratio_low"], row[f"{name}_ratio_high"] = ratio_interval(values, others)
                ratios.append(row)
            rows.append(row)
        for row in ratios:  # to the right of all labels
            lines[""].append(f"{row['algorithm']} / apg")
            for name in COSTS:
                lines[name].append(cell(row, f"{name}_ratio", row["ratio_bound"]))
        print()
        for name, *cells in lines.values():
            print(f"{name:26}" + "".join(f"{text:36}" for text in cells).rstrip())
    columns = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()} for row in rows]
    write_csv(pathlib.Path(results) / "summary.csv", columns, rows)


def cell(row: dict, name: str, sign: str) -> str:
    texts = [
        f"{row[key]:,.0f}" if abs(row[key]) >= 1000 else f"{row[key]:.3g}" for key in (name, f"{name}_low", f"{name}_high")
    ]
    return f"{sign}{texts[0]} [{texts[1]}, {texts[2]}]"


def main() -> None:
    torch.set_num_threads(1)
    commands = {command.__name__: command for command in (policy, export, gradients, suite, ablation, sweep, summary)}
    commands = {name: models.later(command) for name, command in commands.items()}
    command = models.parse_flags(lambda: tyro.extras.subcommand_cli_from_dict(commands, description=__doc__), fail)
    try:
        command()
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted", 130)


if __name__ == "__main__":
    main()
