"""The bridge with kernels that are not ours: gradients against plain torch in float64, then every way to hold it wrong."""

import gc
import runpy
import textwrap
import weakref
from typing import Any

import pytest
import torch
import warp as wp

import bridge
from bridge import WarpFunction

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
all_outputs_or_one = pytest.mark.parametrize("use", [None, 0, 1])
floats, floats2d = wp.array(dtype=float), wp.array2d(dtype=float)
vec3s, mat33s = wp.array(dtype=wp.vec3), wp.array(dtype=wp.mat33)


@wp.kernel(module="unique")
def pendulum(
    angle: wp.array(dtype=Any), speed: wp.array(dtype=Any), damping: wp.array(dtype=Any), dt: Any,
    angle_next: wp.array(dtype=Any), speed_next: wp.array(dtype=Any),
):  # fmt: skip
    i = wp.tid()
    w = speed[i] - dt * (wp.sin(angle[i]) + damping[i] * speed[i])
    angle_next[i] = angle[i] + dt * w
    speed_next[i] = w


def pendulum_of(real):
    reals = wp.array(dtype=real)
    return WarpFunction(wp.overload(pendulum, [reals, reals, reals, real, reals, reals]), num_outputs=2)


def pendulum_torch(angle, speed, damping, dt):
    w = speed - dt * (torch.sin(angle) + damping * speed)
    return angle + dt * w, w


@wp.kernel
def weighted(x: vec3s, m: mat33s, index: wp.array(dtype=int), y: vec3s):
    i = wp.tid()
    y[i] = m[i] * x[index[i]]


@wp.kernel
def loss_of(x: floats2d, gain: floats, y: floats2d, loss: floats):
    i, j = wp.tid()
    e = gain[j] * x[i, j]
    y[i, j] = e
    wp.atomic_add(loss, 0, e * e)


@wp.kernel
def logistic(x: floats, rate: float, steps: int, y: floats, path: floats2d):
    i = wp.tid()
    path[i, 0] = x[i]
    for n in range(steps):
        path[i, n + 1] = rate * path[i, n] * (1.0 - path[i, n])
    y[i] = path[i, steps]


def logistic_torch(x, rate, steps):
    path = [x]
    for _ in range(steps):
        path.append(rate * path[-1] * (1 - path[-1]))
    return path[-1], torch.stack(path, 1)


@wp.kernel
def ways_to_write(x: floats, assigned: floats, added: floats, added_atomically: floats, kept: floats, read_back: floats):
    i = wp.tid()
    for n in range(i, i + 1):  # a loop that is not unrolled: the adjoint runs its body anew, but not its assignments
        assigned[n] = x[i] * x[i]
    added[i] += x[i] * x[i] + x[i]
    added[i] -= x[i]
    wp.atomic_add(added_atomically, i, x[i] * x[i])
    kept[i] = x[i] * x[i]
    read_back[i] = kept[i] * x[i]


swing, swing64 = pendulum_of(wp.float32), pendulum_of(wp.float64)
weigh, weigh_torch = WarpFunction(weighted), lambda x, m, index: torch.einsum("nij,nj->ni", m, x[index.long()])
reduce = WarpFunction(loss_of, num_outputs=2, shapes={"gain": (3,), "loss": (1,)})
iterate = WarpFunction(logistic, num_outputs=2, shapes={"path": (..., 6)})


def tensors(count=3, n=8, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(n, generator=generator, dtype=dtype).to(device).requires_grad_() for _ in range(count)]


def close(got, want):
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-12 if x.dtype == torch.float64 else 1e-5, atol=1e-6)


def check(function, reference, *inputs, use=None):
    """Values, and the gradients of all outputs or of one, in the inputs that ask: against the reference's, in float64."""
    asking = [i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor) and x.requires_grad]
    exact = [x.detach().double().requires_grad_() if i in asking else x for i, x in enumerate(inputs)]
    got, want = (y if isinstance(y, tuple) else (y,) for y in (function(*inputs), reference(*exact)))
    close(got, want)
    used = slice(None) if use is None else slice(use, use + 1)
    cotangents = [torch.randn_like(y) for y in got[used]]
    got = torch.autograd.grad(got[used], [inputs[i] for i in asking], cotangents)
    want = torch.autograd.grad(want[used], [exact[i] for i in asking], [g.double() for g in cotangents])
    close(got, want)


# ------------------------------------------------------------------------------------------------- values and gradients


@every_device
@all_outputs_or_one
def test_scalars(use, device):
    check(swing, pendulum_torch, *tensors(device=device), 0.1, use=use)


def test_gradcheck():
    assert torch.autograd.gradcheck(lambda *x: swing64(*x, 0.1), tensors(n=3, dtype=torch.float64))


@every_device
def test_vectors_matrices_and_integers(device):
    x, m = torch.randn(4, 3, device=device, requires_grad=True), torch.randn(4, 3, 3, device=device, requires_grad=True)
    index = torch.tensor([2, 0, 0, 3], dtype=torch.int32, device=device)  # x[0] is read twice, x[1] never
    check(weigh, weigh_torch, x, m, index)


@every_device
def test_arrays_of_other_shapes_than_the_grid(device):
    """A parameter that all threads share, and a loss that they add up."""
    x, gain = torch.randn(5, 3, device=device, requires_grad=True), torch.randn(3, device=device, requires_grad=True)
    check(reduce, lambda x, gain: (gain * x, (gain * x).square().sum()[None]), x, gain)


@every_device
@all_outputs_or_one
def test_a_loop_whose_state_lives_in_an_output(use, device):
    check(iterate, logistic_torch, *tensors(1, device=device), 2.5, 5, use=use)


@pytest.mark.parametrize("use", [None, *range(5)])
def test_every_way_to_write_an_output(use):
    check(WarpFunction(ways_to_write, num_outputs=5), lambda x: (x**2, x**2, x**2, x**2, x**3), *tensors(1), use=use)


@pytest.mark.parametrize("asked", [(True, False, False), (False, True, True)])
def test_gradient_for_every_input_that_asks_and_no_other(asked):
    inputs = [x.detach().requires_grad_(a) for x, a in zip(tensors(), asked)]
    check(swing, pendulum_torch, *inputs, 0.1)
    sum(swing(*inputs, 0.1)).sum().backward()
    assert tuple(x.grad is not None for x in inputs) == asked


@every_device
def test_shapes_and_numbers_may_change_before_backward(device):
    calls = [(*tensors(1, n, device=device), dt) for n, dt in ((1, 0.1), (7, 0.2), (1000, 0.3), (7, 0.4), (1, 0.5))]
    speeds = [swing(x, x, x, dt)[1] for x, dt in calls]
    for (x, dt), speed in zip(calls, speeds):
        want = torch.autograd.functional.vjp(lambda x, dt=dt: pendulum_torch(x, x, x, dt)[1].sum(), x.double())[1]
        close(torch.autograd.grad(speed.sum(), x), [want])


# ------------------------------------------------------------------------------------------------------- autograd's ways

only_assigned, reads_back = lambda x: swing(x, x, x, 0.1)[0], lambda x: iterate(x, 2.5, 5)[1]
both_kinds = pytest.mark.parametrize("function", [only_assigned, reads_back], ids=["only assigned", "read back"])


@every_device
@both_kinds
def test_backward_twice_gives_the_same_and_leaves_the_given_gradient_alone(function, device):
    (x,) = tensors(1, device=device)
    y = function(x)
    g = torch.randn_like(y)
    given = g.clone()
    first, second = (torch.autograd.grad(y, x, g, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.any() and torch.equal(g, given)


def test_inputs_that_are_not_contiguous():
    x, m = torch.randn(3, 4).requires_grad_(), torch.randn(3, 3, 4).requires_grad_()
    check(weigh, weigh_torch, x.T, m.permute(2, 1, 0), torch.arange(8, dtype=torch.int32)[::2] % 4)


@both_kinds
@pytest.mark.parametrize("kind", ["stride 0", "every second"])
def test_gradients_that_are_not_contiguous(kind, function):
    (x,) = tensors(1)
    y = function(x)
    g = torch.ones(()).expand(y.shape) if kind == "stride 0" else torch.randn(16, *y.shape[1:])[::2]
    got, want = (torch.autograd.grad(y, x, h, retain_graph=True)[0] for h in (g, g.contiguous()))
    assert not g.is_contiguous() and torch.equal(got, want)


@pytest.mark.parametrize("edited", ["an input", "an output that the kernel reads back"])
def test_an_edit_in_place_of_what_backward_needs_raises(edited):
    x = tensors(1)[0] * 1
    y, path = iterate(x, 2.5, 5)
    (x if edited == "an input" else path).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_edit_in_place_of_what_backward_does_not_need():
    (x,) = tensors(1)
    once, thrice = only_assigned(x), only_assigned(x).mul_(3)
    close(torch.autograd.grad(thrice.sum(), x), [3 * torch.autograd.grad(once.sum(), x)[0].double()])


def test_second_derivative_is_refused():
    (x,) = tensors(1)
    (g,) = torch.autograd.grad(only_assigned(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        g.sum().backward()


def test_outputs_are_freed_without_the_garbage_collector():
    class Mark:
        """In a graph node's metadata: it dies with the node, as do the inputs and outputs saved there."""

    gc.collect()
    gc.disable()
    try:
        y = reads_back(*tensors(1))
        mark = y.grad_fn.metadata["mark"] = Mark()
        watched = [weakref.ref(y), weakref.ref(mark)]
        del y, mark
        assert [w() for w in watched] == [None, None]
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------------------------ CPU threads


def split(n, rows_per_thread, threads, threads_in_backward=None):
    """Values and gradient of a function that may be split, over n rows, and into how many launches it was."""
    function = WarpFunction(logistic, num_outputs=2, shapes={"path": (..., 6)}, rows_per_thread=rows_per_thread)
    (x,) = tensors(1, n)
    try:
        bridge.set_num_threads(threads)
        y, path = function(x, 2.5, 5)
        bridge.set_num_threads(threads_in_backward or threads)
        (gradient,) = torch.autograd.grad(y.sum() + path.square().sum(), x)
    finally:
        bridge.set_num_threads(1)
    (plan,) = function.plans.values()
    return torch.cat([y[:, None], path, gradient[:, None]], 1), [len(launches) for launches in plan.parts]


@pytest.mark.parametrize(("threads", "threads_in_backward"), [(2, 2), (3, 3), (3, 1)])
def test_any_number_of_threads_gives_the_same_bits(threads, threads_in_backward):
    got, launches = split(11, 2, threads, threads_in_backward)
    assert launches == [threads, threads]
    assert torch.equal(got, split(11, 2, threads=1)[0])


@pytest.mark.parametrize(
    ("n", "rows_per_thread", "launches"),
    [(1, 1, [1, 1]), (3, 2, [1, 3]), (4, 4, [1, 2]), (4, 2, [2, 3]), (99, None, [1, 1])],
)
def test_a_launch_is_split_by_its_rows(n, rows_per_thread, launches):
    assert split(n, rows_per_thread, threads=3)[1] == launches


def test_arrays_that_all_threads_share_are_not_split():
    with pytest.raises(ValueError, match="rows_per_thread"):
        WarpFunction(loss_of, num_outputs=2, shapes={"gain": (3,), "loss": (1,)}, rows_per_thread=1)


# --------------------------------------------------------------------------------------------------------------- refusals

A, X, M, INDEX = torch.zeros(8), torch.zeros(4, 3), torch.zeros(4, 3, 3), torch.zeros(4, dtype=torch.int32)
WRONG = {
    "too few": (swing, (A, A, 0.1), "takes 4 inputs"),
    "too many": (swing, (A, A, A, 0.1, 0.1), "takes 4 inputs"),
    "dtype": (swing, (A, A.double(), A, 0.1), r"'speed' must be torch.float32 \[8\] on cpu; got torch.float64 \[8\]"),
    "integers": (weigh, (X, M, INDEX.long()), "'index' must be torch.int32.*got torch.int64"),
    "length": (swing, (A, A, A[:5], 0.1), r"'damping'.*\[8\].*\[5\]"),
    "element": (weigh, (X[:, :2], M, INDEX), r"'x'.*\[4, 3\].*\[4, 2\]"),
    "no rows": (swing, (A[:0], A[:0], A[:0], 0.1), "'angle' needs 1 nonempty dimensions"),
    "one dimension of two": (reduce, (X[0], X[0]), "'x' needs 2 nonempty dimensions"),
    "fixed shape": (reduce, (X, X[0, :2]), r"'gain'.*\[3\].*\[2\]"),
    "tensor for a number": (swing, (A, A, A, A[0]), "'dt' takes a number, got Tensor"),
    "number for a tensor": (swing, (A, A, 0.5, 0.1), "'damping' takes a tensor, got float"),
    "foreign device, one": (swing, (A, A, A.to("meta"), 0.1), "'damping'.*on cpu.*on meta"),
    "foreign device, all": (swing, (A.to("meta"), A.to("meta"), A.to("meta"), 0.1), "'angle'.*on cpu or cuda.*on meta"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_get_one_clear_line(case):
    function, arguments, message = WRONG[case]
    swing(A, A, A, 0.1)  # a good call before does not hide the bad one
    with pytest.raises((TypeError, ValueError), match=f"{function.kernel.key}.*{message}") as error:
        function(*arguments)
    assert "\n" not in str(error.value)


def test_the_docstring_example_runs_and_is_right(tmp_path):
    code = [line for line in bridge.__doc__.split("Warp generates")[0].splitlines() if line.startswith("    ")]
    path = tmp_path / "docstring_example.py"  # Warp reads a kernel's source from its file
    path.write_text(textwrap.dedent("\n".join(code)))
    torch.manual_seed(0)
    k_grad = runpy.run_path(str(path))["k"].grad
    torch.manual_seed(0)
    x, k = torch.randn(8, 2).double(), torch.ones(8, dtype=torch.float64, requires_grad=True)
    for _ in range(100):
        x = torch.stack([x[:, 0] + 0.01 * x[:, 1], x[:, 1] - 0.01 * k * x[:, 0]], 1)
    x.square().sum().backward()
    torch.testing.assert_close(k_grad.double(), k.grad, rtol=1e-4, atol=1e-5)


@needs_cuda
def test_on_a_side_stream():
    inputs = tensors(n=100_000, device="cuda")
    want = torch.autograd.grad(sum(swing(*inputs, 0.1)).sum(), inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on any other stream would overtake this and read what is not there yet
        late = [(2 * x).detach().div(2).requires_grad_() for x in inputs]
        got = torch.autograd.grad(sum(swing(*late, 0.1)).sum(), late)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(x, y) for x, y in zip(got, want))
