"""--cuda-graph: on a GPU, the real thing against the eager path; on a CPU, a stand-in for torch's graph that holds what is
captured to a graph's rules and replays it at the addresses it was recorded at, with the Python numbers it was recorded with.

What the stand-in cannot show: that CUDA accepts the capture, and streams.
"""

import contextlib
import csv
import dataclasses
import itertools
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import apg
import bridge
import envs
import models
import ppo
from models import load_checkpoint

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
trainers = pytest.mark.parametrize("trainer", [apg, ppo])
NAN = float("nan")

# --- a stand-in for torch.cuda.CUDAGraph, and for what else bridge.cuda_graph needs of a GPU ----------------------------

READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2", "unique_consecutive"}
READS |= {"lift_fresh", "randperm", "bincount"}  # a tensor made of Python numbers is copied from the host


graphs = []  # all that the stand-in has captured


class Graph(TorchDispatchMode):
    """Records torch's operations and Warp's launches with the tensors they touch. They run once to that end, unlike on a
    GPU, so that what they change and did not make themselves is put back at the end of the capture."""

    def __init__(self):
        super().__init__()
        self.calls, self.generators, self.before, self.made, self.inside = [], [], {}, set(), False
        self.addresses = {}
        graphs.append(self)

    def register_generator_state(self, generator):
        self.generators.append(generator)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, schema = kwargs or {}, function._schema
        name, tensors = schema.name.removeprefix("aten::"), [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        masks = [x for x in tree_leaves(args[1]) if name.startswith("index") and isinstance(x, torch.Tensor)] if args[1:] else []
        if name in READS or any(x.dtype == torch.bool for x in masks):
            raise AssertionError(f"{name} inside a graph")
        generator = kwargs.get("generator")
        if generator is not None and generator._cdata not in [g._cdata for g in self.generators]:
            raise AssertionError("a generator that the graph does not know")
        for argument, value in zip(schema.arguments, (*args, *kwargs.values())):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in (x for x in tree_leaves(value) if isinstance(x, torch.Tensor)):
                    if self.storage(x) not in self.made and x.data_ptr() not in self.before:
                        self.before[x.data_ptr()] = x.detach(), x.detach().clone()
        outputs = function(*args, **kwargs)
        self.addresses |= {x.data_ptr(): x for x in tensors}  # kept, so that no other tensor gets the address
        if any(result.alias_info is not None for result in schema.returns):  # a view, or in place
            writes = any(argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments)
            self.calls += [lambda: function(*args, **kwargs)] if writes else []
            return outputs
        places = [x.detach() for x in tree_leaves(outputs) if isinstance(x, torch.Tensor)]
        self.made |= {self.storage(x) for x in places}

        def again():
            for place, value in zip(places, tree_leaves(function(*args, **kwargs))):
                place.copy_(value)

        self.calls.append(again)
        return outputs

    @staticmethod
    def storage(x):
        return x.untyped_storage().data_ptr()

    @contextlib.contextmanager
    def capture(self):
        launch = bridge._Plan.launch
        draws = [(g, g.get_state()) for g in (torch.default_generator, *self.generators)]

        def recorded(*arguments):
            with torch.utils._python_dispatch._disable_current_modes():
                launch(*arguments)
            self.calls.append(lambda: launch(*arguments))

        def read(*_, **__):
            raise AssertionError("values read on the host inside a graph")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bridge._Plan, "launch", recorded)
            for name in ("tolist", "numpy", "cpu"):
                patch.setattr(torch.Tensor, name, read)
            with self:
                yield
        for x, value in self.before.values():
            x.copy_(value)
        for generator, state in draws:
            generator.set_state(state)

    @torch.no_grad()
    def replay(self):
        for call in self.calls:
            call()


@pytest.fixture
def stand_in(monkeypatch):
    """Lets bridge.cuda_graph run, as it is, on a CPU. Returns the events outside torch, in order."""
    events = []
    note = lambda name: lambda *_, **__: events.append(name)

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            events.append("wait")

    @contextlib.contextmanager
    def graph(graph, stream):
        assert isinstance(stream, Stream)
        events.append("capture")
        with graph.capture():
            yield
        events.append("captured")

    @contextlib.contextmanager
    def scoped(stream):
        events.append("Warp's stream")
        yield
        events.append("Warp's stream back")

    graphs.clear()
    for name, value in {
        "Stream": Stream, "current_stream": Stream, "stream": contextlib.nullcontext, "CUDAGraph": Graph, "graph": graph,
        "get_rng_state": lambda device: torch.get_rng_state(), "set_rng_state": lambda state, device: torch.set_rng_state(state),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(bridge, "_warp_stream", lambda stream: stream)
    monkeypatch.setattr(bridge.wp, "ScopedStream", scoped)
    monkeypatch.setattr(bridge.wp, "capture_begin", lambda **options: events.append(f"begin {sorted(options)}"))
    monkeypatch.setattr(bridge.wp, "capture_end", note("end"))
    cuda_graph = bridge.cuda_graph

    def complete(function, changed, generators=()):
        replay, graph = cuda_graph(function, changed, generators), graphs[-1]
        known = {Graph.storage(x) for x in changed}
        missing = [x.shape for x, _ in graph.before.values() if Graph.storage(x) not in known]
        assert not missing, f"changed, and not put back after the warm-up: {missing}"
        return replay

    monkeypatch.setattr(bridge, "cuda_graph", complete)
    return events


@pytest.fixture
def allowed(monkeypatch):
    """Lets a trainer take --cuda-graph on a CPU."""
    for trainer in (apg, ppo):
        checked = trainer.checked

        def lenient(args, checked=checked):
            return dataclasses.replace(checked(dataclasses.replace(args, cuda_graph=False)), cuda_graph=args.cuda_graph)

        monkeypatch.setattr(trainer, "checked", lenient)


@pytest.fixture
def prepared(allowed, request):
    """The stand-in on a CPU; on a GPU nothing, as all is there."""
    if request.getfixturevalue("device") == "cpu":
        request.getfixturevalue("stand_in")


# --- bridge.cuda_graph --------------------------------------------------------------------------------------------------


def counting(runs, device):
    """A function that draws, changes a tensor and returns another; the tensor; its generator."""
    total, generator = torch.zeros(3, device=device), torch.Generator(device).manual_seed(1)

    def function():
        runs.append(0)
        drawn = torch.rand(3, generator=generator, device=device) + torch.rand(3, device=device)
        total.add_(drawn)
        return 2 * total

    return function, total, generator


@pytest.mark.parametrize("device", DEVICES)
def test_a_graph_begins_where_its_function_would_have(device, prepared):
    """Warm-up and capture leave no trace in tensors and generators; replays then do what calls would have done."""
    torch.manual_seed(0)
    function, total, _ = counting([], device)
    want = [(function().clone(), total.clone()) for _ in range(3)]
    torch.manual_seed(0)
    runs = []
    function, total, generator = counting(runs, device)
    address = total.data_ptr()
    replay = bridge.cuda_graph(function, [total], [generator])
    assert len(runs) > 1 and torch.equal(total, torch.zeros(3, device=device))
    got = [(replay().clone(), total.clone()) for _ in range(3)]
    assert all(torch.equal(x, y) for a, b in zip(got, want) for x, y in zip(a, b))
    assert replay() is replay() and total.data_ptr() == address and len(runs) == 4


def test_the_order_of_a_capture(stand_in):
    x = torch.zeros(3)
    bridge.cuda_graph(lambda: x.add_(1), [x])
    order = ["wait", "Warp's stream", "capture", "begin ['external', 'force_module_load', 'stream']", "end", "captured"]
    assert stand_in == [*order, "Warp's stream back", "wait"]


def test_a_capture_that_fails_ends_on_both_sides(stand_in):
    x = torch.zeros(3)

    def function():
        x.add_(1)
        if len(stand_in) > 2:  # inside the capture
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        bridge.cuda_graph(function, [x])
    assert stand_in[-1] == "end"


BREAKERS = {
    "item": lambda x: x.sum().item(),
    "if": lambda x: 1 if x.any() else 0,
    "list": lambda x: x.tolist(),
    "select": lambda x: x[x > 0],
    "assign": lambda x: x.index_put_((x > 0,), x.sum()),
    "constant": lambda x: x + x.new_tensor([1.0, 2.0, 3.0]),
    "permutation": lambda x: x[torch.randperm(3)],
    "unknown generator": lambda x: torch.rand(3, generator=torch.Generator()),
}


@pytest.mark.parametrize("breaker", BREAKERS)
def test_the_stand_in_sees_what_breaks_a_capture(breaker, stand_in):
    x = torch.ones(3)
    with pytest.raises(AssertionError, match="graph"):
        bridge.cuda_graph(lambda: BREAKERS[breaker](x), [x])


def test_the_stand_in_replays_what_was_captured_and_nothing_newer(stand_in):
    """Python numbers and addresses are those of the capture: a function that rebinds its state does not go on."""
    box = [torch.zeros(3), 0]

    def function():
        box[0], box[1] = box[0] + 1, box[1] + 1
        return box[0] + box[1]

    replay = bridge.cuda_graph(function, [box[0]])
    first = replay().clone()
    assert torch.equal(replay(), first)


# --- the trainers -------------------------------------------------------------------------------------------------------

TINY = ["--num-envs", 4, "--hidden", 8, "--threads", 1, "--num-evals", 3]


def run(trainer, *arguments):
    old, sys.argv = sys.argv, [trainer.__name__, *map(str, arguments)]
    try:
        trainer.main()
    finally:
        sys.argv = old


def same_draws(patch):
    """Give the eager path the graph's random numbers: starts drawn at every step, permutations from a generator of their own."""
    step, randperm = envs.Env.step, torch.randperm
    generators = {}

    def drawing_step(env, action):
        result = step(env, action)
        if not env.capturable and not result[3].any():
            env._start()
        return result

    def own_randperm(n, device=None, out=None):
        device = (device if out is None else out.device) or "cpu"
        generator = generators.setdefault(str(device), torch.Generator(device).manual_seed(7))
        return randperm(n, generator=generator, device=device, out=out)

    patch.setattr(envs.Env, "step", drawing_step)
    patch.setattr(torch, "randperm", own_randperm)


def result(folder):
    """Of a run: rows of metrics.csv without times, and the checkpoint."""
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    rows = [{k: float(v) for k, v in row.items() if k not in ("wall_seconds", "sps")} for row in rows]
    return rows, load_checkpoint(folder)


def assert_close(got, want, rtol, atol):
    """Two runs' results: metrics, weights, Adam's state, normaliser, environments."""
    for a, b in zip(got[0], want[0], strict=True):
        assert a == pytest.approx(b, rel=10 * rtol, abs=10 * atol, nan_ok=True)
    names = [name for name in ("actor", "critic", "target_critic", "normalizer") if name in want[1]]
    for name in names:
        for key, value in want[1][name].items():
            torch.testing.assert_close(got[1][name][key], value, rtol=rtol, atol=atol, msg=lambda m, key=key: f"{key}: {m}")
    for name in ("actor_optimizer", "critic_optimizer"):
        for key, value in want[1][name]["state"].items():  # none where APG has no critic to fit
            torch.testing.assert_close(got[1][name]["state"][key], value, rtol=rtol, atol=atol)
    for a, b in zip(got[1]["episodes"], want[1]["episodes"], strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    assert torch.equal(got[1]["env_generator"], want[1]["env_generator"])


def unscored(monkeypatch):
    """Take out the evaluations, which are the longest part of a short run."""
    nothing = lambda env, *_, **__: dict.fromkeys(["return", "success", *env.task.tolerances], 0.0)
    monkeypatch.setattr(envs, "score", nothing)


CASES = [(trainer, env, bootstrap) for trainer in (apg, ppo) for env in ("pointmass", "franka") for bootstrap in ("none", "critic", "mc")]
CASES += [(apg, "navigation", "critic"), (apg, "pusht", "critic"), (ppo, "pusht", "critic")]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("trainer", "env", "bootstrap"), CASES)
def test_graph_against_eager(trainer, env, bootstrap, device, prepared, tmp_path, monkeypatch):
    """Several iterations, with episodes that end inside: the default path, the form fit for a graph run as it is, the graph.

    The second and third to the last bit on a CPU; the first to rounding, as its sums and Adam's kernel are others.
    """
    if env != "pointmass":
        unscored(monkeypatch)
    length, iterations = envs.EPISODE_LENGTH[env], 2 if bootstrap == "mc" else 4
    steps = length if bootstrap == "mc" else length // 5
    flags = [*TINY, "--env", env, "--bootstrap", bootstrap, "--segment", length // 5]
    flags += ["--total-env-steps", iterations * 4 * steps]
    flags += ["--learning-rate", 1e-3, "--update-epochs", 2, "--num-minibatches", 3, "--device", device]
    flags += ["--costate-clip", 0.05] if env == "pusht" and trainer is apg else []
    results = {}
    for name, more in {"eager": [], "safe": ["--cuda-graph"], "graph": ["--cuda-graph"]}.items():
        with monkeypatch.context() as patch:
            same_draws(patch)
            if name == "safe":
                patch.setattr(bridge, "cuda_graph", lambda function, changed, generators=(): function)
            run(trainer, *flags, *more, "--run-dir", tmp_path / name)
        results[name] = result(tmp_path / name)
    assert results["eager"][0][-1]["gradient_steps"] == iterations * (1 if trainer is apg else 2 * 3)
    assert results["eager"][1]["episodes"][4].any()  # episodes ended: whole ones have begun
    tolerance = 0.0 if device == "cpu" else 1e-4
    assert_close(results["graph"], results["safe"], tolerance, tolerance)
    assert_close(results["safe"], results["eager"], 1e-3, 1e-5)
    assert results["graph"][1]["actor_optimizer"]["param_groups"][0]["capturable"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["state", "actor", "critic"])
@trainers
def test_a_number_that_is_not_finite(trainer, kind, device, prepared, tmp_path, monkeypatch):
    """In the third of five iterations, in an environment's state or a gradient: no trace of it in weights, Adam's state or
    normaliser; it is counted; training goes on."""
    unscored(monkeypatch)
    poison = {name: torch.zeros((), device=device) for name in ("actor", "critic")}
    clipped_step, set_learning_rate, make, made, kept = models.clipped_step, models.set_learning_rate, envs.make, [], {}

    def poisoned(module, *arguments):
        next(module.parameters()).grad.add_(poison[type(module).__name__.lower()])
        return clipped_step(module, *arguments)

    def before_iteration(optimizer, *arguments):
        set_learning_rate(optimizer, *arguments)
        state = [x for group in optimizer.state.values() for x in group.values()]
        kept.setdefault(len(optimizer.param_groups[0]["params"]), []).append(  # the actor's has one more
            [x.detach().clone() for x in (*optimizer.param_groups[0]["params"], *state)]
        )
        iteration = len(kept[len(optimizer.param_groups[0]["params"])])
        if kind == "state" and iteration == 3:
            made[0].state[1] = NAN
        elif kind != "state":
            poison[kind].fill_(NAN if iteration == 3 else 0.0)

    monkeypatch.setattr(models, "clipped_step", poisoned)
    monkeypatch.setattr(models, "set_learning_rate", before_iteration)
    monkeypatch.setattr(envs, "make", lambda *arguments: made.append(make(*arguments)) or made[-1])
    flags = [*TINY, "--env", "pointmass", "--segment", 10, "--total-env-steps", 200, "--num-minibatches", 2, "--device", device]
    run(trainer, *flags, "--update-epochs", 1, "--learning-rate", 1e-2, "--cuda-graph", "--run-dir", tmp_path / "run")
    for count, snapshots in kept.items():
        name = "actor" if count == max(kept) else "critic"
        same = [all(map(torch.equal, a, b)) for a, b in itertools.pairwise(snapshots)]
        assert same == [False, False, kind in (name, "state"), False], name
        assert all(x.isfinite().all() for snapshot in snapshots for x in snapshot)
    rows, checkpoint = result(tmp_path / "run")
    updates = {"state": 1, "actor": 1 if trainer is apg else 2, "critic": 2}[kind]
    assert rows[-1]["skipped_steps"] == updates
    assert rows[-1]["gradient_steps"] == (5 if trainer is apg else 10) - {"state": 1, "actor": 1, "critic": 0}[kind] * (
        1 if trainer is apg else 2
    )
    assert checkpoint["normalizer"]["count"] == pytest.approx(160 if kind == "state" else 200)
    assert all(x.isfinite().all() for x in (*checkpoint["normalizer"].values(), *checkpoint["episodes"]))


@pytest.mark.parametrize("device", DEVICES)
@trainers
def test_resume_is_exact(trainer, device, prepared, tmp_path, monkeypatch):
    """Also without a graph, on a GPU, where the noise is drawn from the device's own generator."""
    unscored(monkeypatch)
    for name, more in {"eager": [], "graph": ["--cuda-graph"]}.items():
        flags = [*TINY, "--env", "pointmass", "--segment", 30, "--total-env-steps", 720, "--device", device, *more]
        run(trainer, *flags, "--run-dir", tmp_path / name)
        scored, calls = envs.score, []

        def interrupted(*args, scored=scored, calls=calls, **options):
            calls.append(0)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return scored(*args, **options)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(envs, "score", interrupted)
            run(trainer, *flags, "--run-dir", tmp_path / f"{name} in parts")
        run(trainer, "--resume", tmp_path / f"{name} in parts")
        tolerance = 0.0 if device == "cpu" else 1e-4
        assert_close(result(tmp_path / f"{name} in parts"), result(tmp_path / name), tolerance, tolerance)


@trainers
@pytest.mark.parametrize("more", [[], ["--device", "cpu"]])
def test_a_cpu_has_no_graphs(trainer, more, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(trainer, "--cuda-graph", *more)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--cuda-graph" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_graph_does_not_recompute(capsys):
    with pytest.raises(SystemExit) as stop:
        run(apg, "--cuda-graph", "--bootstrap", "mc", "--recompute")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--recompute" in error and error.count("\n") == 1
