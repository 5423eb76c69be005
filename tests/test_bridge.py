"""The bridge with kernels that are not ours: gradients against plain torch in float64, then every misuse."""

import copy
import importlib.util
import multiprocessing
import textwrap
import threading
from typing import Any

import pytest
import torch
import warp as wp

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
@pytest.mark.parametrize("n", [1, 4])
def test_vectors_matrices_and_integers(n, device):
    x, m = torch.randn(n, 3, device=device, requires_grad=True), torch.randn(n, 3, 3, device=device, requires_grad=True)
    index = torch.tensor([2, 0, 0, 3], dtype=torch.int32, device=device)[:n] % n  # of four, x[0] is read twice, x[1] never
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


@pytest.mark.parametrize("edited", ["an input", "an output"])
@both_kinds
def test_an_edit_in_place_before_backward_raises(edited, function):
    x = tensors(1)[0] * 1
    y = function(x)
    (x if edited == "an input" else y).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("reduced", [lambda y: y.square().sum(), lambda y: y.sum()], ids=["square", "sum"])
def test_second_derivative_is_refused(reduced):
    """After `sum` the incoming gradient is a constant, but the outgoing one still depends on the input."""
    (x,) = tensors(1)
    y = swing(x, x * x, x, 0.1)[0]
    (g,) = torch.autograd.grad(reduced(y), x, create_graph=True)
    torch.testing.assert_close(g, torch.autograd.grad(reduced(y), x, retain_graph=True)[0])
    with pytest.raises(RuntimeError, match="pendulum cannot be differentiated twice"):
        (y.sum() + g.square().sum()).backward()


# ---------------------------------------------------------------------------------------------------------------- views


@wp.func
def row_sum_of(row: floats):
    return row[0] + 2.0 * row[1] + row[2] * row[2]


@wp.kernel
def view_for_a_function(x: floats2d, y: floats):
    i = wp.tid()
    y[i] = row_sum_of(x[i])


@wp.kernel
def view_read_back(x: floats2d, y: floats2d):
    i = wp.tid()
    row, out = x[i], y[i]
    out[0] = row[0]
    for k in range(2):
        out[k + 1] = out[k] * row[k + 1]


@every_device
def test_views_of_rows(device):
    x, row = torch.randn(5, 3, device=device, requires_grad=True), (..., 3)
    total = WarpFunction(view_for_a_function, shapes={"x": row})
    product = WarpFunction(view_read_back, shapes={"x": row, "y": row})
    for _ in range(2):  # recorded, then replayed
        check(total, lambda x: x[:, 0] + 2 * x[:, 1] + x[:, 2] ** 2, x)
        check(product, lambda x: x.cumprod(1), x)


# --------------------------------------------------------------------------------------------------- threads and copies


def test_threads_may_share_a_function():
    """Each thread must get its own values and gradients, at the same shape."""
    (x,) = tensors(1, 500)
    scales = [1.0, 2.0, 3.0, 4.0]
    results = {scale: [] for scale in scales}

    def work(scale):
        mine = (scale * x).detach().requires_grad_()
        for _ in range(100):
            y = swing(mine, mine, mine, 0.1)[1]
            results[scale].append((y.detach(), torch.autograd.grad(y.sum(), mine)[0]))

    threads = [threading.Thread(target=work, args=(scale,)) for scale in scales]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for scale in scales:
        work(scale)
        *found, expected = results[scale]
        assert len(found) >= 100 and all(torch.equal(a, b) for pair in found for a, b in zip(pair, expected))


def test_a_function_survives_deepcopy_and_fork():
    (x,) = tensors(1)
    module = torch.nn.Module()
    module.function = swing
    assert torch.equal(copy.deepcopy(module).function(x, x, x, 0.1)[0], swing(x, x, x, 0.1)[0])
    child = multiprocessing.get_context("fork").Process(target=lambda: swing(x, x, x, 0.1))
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 0


def test_a_function_defined_anew_is_used_for_every_shape(tmp_path):
    """As in a notebook: the second cell redefines what the kernel calls."""
    path = tmp_path / "notebook.py"
    path.write_text(textwrap.dedent("""
        import warp as wp

        @wp.func
        def inner(x: float):
            return 2.0 * x

        @wp.kernel
        def outer(x: wp.array(dtype=float), y: wp.array(dtype=float)):
            i = wp.tid()
            y[i] = inner(x[i])
    """))
    spec = importlib.util.spec_from_file_location("notebook", path)
    notebook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(notebook)
    function = WarpFunction(notebook.outer)
    assert function(torch.ones(3)).tolist() == [2, 2, 2]
    second = tmp_path / "second_cell.py"
    second.write_text("@wp.func\ndef inner(x: float):\n    return 5.0 * x\n")
    exec(compile(second.read_text(), second, "exec"), notebook.__dict__)
    assert function(torch.ones(4)).tolist() == [5, 5, 5, 5] and function(torch.ones(3)).tolist() == [5, 5, 5]


# -------------------------------------------------------------------------------------------------- kernels to refuse


@wp.kernel
def row_sum(x: floats2d, y: floats):
    i = wp.tid()
    for j in range(4):
        y[i] += x[i, j]


@wp.kernel
def shared_first(gain: floats, x: floats, y: floats):
    i = wp.tid()
    y[i] = gain[0] * x[i]


@wp.kernel
def writes_input(x: floats, y: floats):
    i = wp.tid()
    y[i] = x[i]
    x[i] = 0.0


@wp.kernel
def adds_to_input(x: floats, count: floats, y: floats):
    i = wp.tid()
    wp.atomic_add(count, 0, 1.0)
    y[i] = x[i]


@wp.kernel
def writes_component(x: vec3s, y: floats):
    i = wp.tid()
    y[i] = x[i][0]
    x[i][1] = 0.0


@wp.func
def clear(row: floats):
    row[0] = 0.0


@wp.kernel
def writes_through_a_view(x: floats2d, y: floats):
    i = wp.tid()
    y[i] = x[i, 0]
    row = x[i]
    row[0] = 0.0


@wp.kernel
def writes_in_a_function(x: floats2d, y: floats):
    i = wp.tid()
    y[i] = x[i, 0]
    clear(x[i])


@wp.struct
class Pair:
    first: float
    second: float


@wp.kernel
def indexed(x: wp.indexedarray(dtype=float), y: floats):
    i = wp.tid()
    y[i] = x[i]


@wp.kernel
def of_structs(x: wp.array(dtype=Pair), y: floats):
    i = wp.tid()
    y[i] = x[i].first


@wp.kernel
def number_last(x: floats, y: float):
    i = wp.tid()


UNFIT = {
    "rank": (row_sum, {}, r"'x' is a 2D array; its shape \(Ellipsis,\).* as many sizes, with ... for the 1D"),
    "rank given": (row_sum, {"x": (..., 4, 4)}, "'x' is a 2D array; its shape"),
    "unknown name": (loss_of, {"gain": (3,), "lose": (1,)}, "no argument 'lose'; it has x, gain, y, loss"),
    "no tuple": (loss_of, {"gain": (3,), "loss": 1}, "'loss' is a 1D array; its shape 1 .* must be a tuple"),
    "writes an input": (writes_input, {}, "writes to its input 'x'"),
    "adds to an input": (adds_to_input, {"count": (1,)}, "writes to its input 'count'"),
    "writes a component": (writes_component, {}, "writes to its input 'x'"),
    "indexedarray": (indexed, {}, "'x' must be a wp.array of numbers, vectors or matrices or a number"),
    "structs": (of_structs, {}, "'x' must be a wp.array of numbers, vectors or matrices or a number"),
    "a number as output": (number_last, {}, "'y' must be a wp.array of numbers, vectors or matrices$"),
    "generic": (pendulum, {}, "pendulum is generic: pass wp.overload"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_kernels_that_would_be_wrong_get_one_clear_line(case):
    kernel, shapes, message = UNFIT[case]
    with pytest.raises((TypeError, ValueError), match=message) as error:
        WarpFunction(kernel, num_outputs=2 if kernel is loss_of else 1, shapes=shapes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kernel", [writes_through_a_view, writes_in_a_function], ids=lambda kernel: kernel.key)
def test_indirect_writes_to_an_input_are_refused_when_called(kernel):
    function = WarpFunction(kernel, shapes={"x": (..., 2)})
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{kernel.key} writes to one of its inputs"):
            function(torch.ones(3, 2))


def test_the_error_names_what_the_grid_was_read_off():
    with pytest.raises(ValueError, match=r"'x' must be .*\[1\].*got .*\[5\].*the grid is \[1\], read off 'gain'"):
        WarpFunction(shared_first)(torch.ones(1), torch.ones(5))
    x = torch.rand(5, requires_grad=True)
    check(WarpFunction(shared_first, shapes={"gain": (1,)}), lambda gain, x: gain * x, torch.rand(1, requires_grad=True), x)


# ------------------------------------------------------------------------------------------------------ wrong arguments

A, X, M, INDEX = torch.zeros(8), torch.zeros(4, 3), torch.zeros(4, 3, 3), torch.zeros(4, dtype=torch.int32)
WRONG = {
    "too few": (swing, (A, A, 0.1), "takes 4 inputs"),
    "too many": (swing, (A, A, A, 0.1, 0.1), "takes 4 inputs"),
    "dtype": (swing, (A, A.double(), A, 0.1), r"'speed' must be torch.float32 \[8\] .* got torch.float64 \[8\].*'angle'"),
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
