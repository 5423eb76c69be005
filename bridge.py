"""Any Warp kernel as a differentiable torch function: torch tensors in, torch tensors out, `backward()` through it.

    import torch, warp as wp
    from bridge import WarpFunction

    @wp.kernel
    def spring(x: wp.array(dtype=wp.vec2), k: wp.array(dtype=float), dt: float, x_next: wp.array(dtype=wp.vec2)):
        i = wp.tid()
        x_next[i] = wp.vec2(x[i][0] + dt * x[i][1], x[i][1] - dt * k[i] * x[i][0])

    step = WarpFunction(spring)                              # the last argument is the output
    x = torch.randn(8, 2)
    k = torch.ones(8, requires_grad=True)
    for _ in range(100):
        x = step(x, k, 0.01)                                 # arrays as tensors, scalars as numbers
    x.square().sum().backward()                              # k.grad: through 100 steps

Warp generates, beside each kernel, its adjoint: `forward` launches the kernel, `backward` the adjoint, with no wp.Tape
and no wp.array. Both launches are recorded once per shapes, dtypes and device; a call only rewrites their pointers.

What a kernel must keep to (Warp user guide, Differentiability): it never writes to an input; it writes each output element
once, or only accumulates with `+=` or `wp.atomic_add` (outputs arrive zeroed); it may read back what it wrote, so a loop's
state can live in an output array; loops that carry a local variable must be unrolled, or the adjoint is silently wrong.
A WarpFunction is not re-entrant: one thread at a time. Second derivatives are refused: Warp generates none.
"""

import ast
import concurrent.futures
import functools
import itertools

import torch
import warp as wp
from torch.autograd.function import once_differentiable

_threads, _pool = 1, None
_warp_stream = functools.cache(wp.stream_from_torch)


def set_num_threads(threads: int) -> None:
    """At most so many CPU threads share a launch of a function with `rows_per_thread`, to the same bits; default 1."""
    global _threads, _pool
    _threads, _pool = threads, concurrent.futures.ThreadPoolExecutor(threads - 1) if threads > 1 else None


class WarpFunction:
    """A differentiable torch function made of one Warp kernel whose arguments are inputs, then outputs.

    kernel       a wp.kernel with concrete types (of a generic kernel pass the result of wp.overload)
    num_outputs  how many arguments, at the end, are outputs; with one, a call returns a tensor, else a tuple
    shapes       {argument: array shape} for arrays whose shape is not the launch grid's; `...` stands for the grid,
                 e.g. {"trajectory": (..., 5), "loss": (1,)}. The grid is read off the first input that has it.
    rows_per_thread  promises that the kernel uses the grid's first index i for nothing but row i of its arrays: on a CPU,
                 n // rows_per_thread threads share n rows, twice as many the adjoint; worth it from 0.2 ms a thread

    A tensor's shape is its array's, then the element's: wp.array(dtype=wp.vec3) over a grid of N is [N, 3].
    Raises TypeError or ValueError, in one line, on a wrong number, dtype, shape or device of arguments.
    """

    def __init__(
        self, kernel: wp.Kernel, num_outputs: int = 1, shapes: dict | None = None, rows_per_thread: int | None = None
    ):
        self.kernel, self.args, self.rows_per_thread, self.plans = kernel, kernel.adj.args, rows_per_thread, {}
        self.num_inputs = len(self.args) - num_outputs
        shapes = {arg.label: (...,) for arg in self.args} | (shapes or {})
        self.layouts = {i: shapes[arg.label] for i, arg in enumerate(self.args) if hasattr(arg.type, "ndim")}  # of arrays
        if rows_per_thread is not None and any(layout[0] is not ... for layout in self.layouts.values()):
            raise ValueError(f"{kernel.key}: rows_per_thread needs arrays that all begin with the launch grid")
        # Backward needs the inputs, and the outputs that the kernel may read back: all but those it only assigns to.
        nodes = list(ast.walk(kernel.adj.tree))
        targets = [target for node in nodes if isinstance(node, ast.Assign) for target in node.targets]
        assigned = [target.value for target in targets if isinstance(target, ast.Subscript)]
        read = {node.id for node in nodes if isinstance(node, ast.Name) and node not in assigned}
        self.saved = [i for i in self.layouts if i < self.num_inputs or self.args[i].label in read]
        wp.init()
        for block_dim in (1, None):  # CPU, CUDA: fix the cache key now; building kernels that share functions changes it
            kernel.module.get_module_hash(block_dim)

    def __call__(self, *inputs: torch.Tensor | float) -> torch.Tensor | tuple[torch.Tensor, ...]:
        key = _threads, *[(x.shape, x.dtype, x.device) if isinstance(x, torch.Tensor) else type(x) for x in inputs]
        if key not in self.plans:
            self.plans[key] = _Plan(self, inputs)
        outputs = _Call.apply(self.plans[key], *inputs)
        return outputs[0] if len(outputs) == 1 else outputs


class _Plan:
    """The forward and adjoint launches for one combination of shapes and device, with their array descriptors."""

    def __init__(self, function, inputs):
        self.function, self.pool, self.examples = function, _pool, {}  # examples: of each array, as a contiguous tensor
        key, args, layouts, n = function.kernel.key, function.args, function.layouts, function.num_inputs
        if len(inputs) != n:
            raise TypeError(f"{key} takes {n} inputs ({', '.join(a.label for a in args[:n])}), got {len(inputs)}")
        for i, x in enumerate(inputs):
            kind, types = ("tensor", torch.Tensor) if i in layouts else ("number", (int, float))
            if not isinstance(x, types):
                raise TypeError(f"{key}: '{args[i].label}' takes a {kind}, got {type(x).__name__}")
        spanning = [i for i in layouts if i < n and ... in layouts[i]]
        if not spanning:
            raise ValueError(f"{key}: no input has the launch grid's shape")
        first, arg = inputs[spanning[0]], args[spanning[0]]
        rank, self.device = arg.type.ndim + 1 - len(layouts[spanning[0]]), first.device
        grid = tuple(first.shape[:rank])
        words = lambda x: f"{x.dtype} {list(x.shape)} on {x.device}"
        if len(grid) < rank or 0 in grid or self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"{key}: '{arg.label}' needs {rank} nonempty dimensions on cpu or cuda; got {words(first)}")
        for i, layout in layouts.items():
            element = args[i].type.dtype
            shape = [size for part in layout for size in (grid if part is ... else (part,))]
            shape += getattr(element, "_shape_", ())
            dtype = wp.dtype_to_torch(getattr(element, "_wp_scalar_type_", element))
            self.examples[i] = torch.empty(shape, dtype=dtype, device=self.device)
            want = words(self.examples[i])
            if i < n and words(inputs[i]) != want:
                raise ValueError(f"{key}: '{args[i].label}' must be {want}; got {words(inputs[i])}")
        rows = function.rows_per_thread if self.device.type == "cpu" else None
        self.parts = []  # of the kernel's launch, and of its adjoint's, which takes at least twice as long a row
        for adjoint in (False, True):
            threads = max(1, min(_threads, grid[0], (1 + adjoint) * grid[0] // rows)) if rows else 1
            cuts = itertools.pairwise(grid[0] * k // threads for k in range(threads + 1))
            self.parts.append([self.record(inputs, adjoint, start, (stop - start, *grid[1:])) for start, stop in cuts])

    def record(self, inputs, adjoint, start, grid):
        """The kernel's or its adjoint's launch over the grid from row start on, and what to rewrite before launching."""
        kernel, args = self.function.kernel, self.function.args
        data, grad, offset = [*inputs, *[None] * (len(args) - len(inputs))], [0] * len(args), {}
        for i, example in self.examples.items():
            for descriptors in (data, grad):
                descriptors[i] = wp.from_torch(example, args[i].type.dtype, requires_grad=False, return_ctype=True)
            offset[i] = start * data[i].strides[0]  # bytes
        record = {"device": wp.device_from_torch(self.device), "record_cmd": True}
        launch = wp.launch(kernel, grid, data, adj_inputs=grad if adjoint else [], adjoint=adjoint, **record)
        for i in self.examples:
            launch.set_param_at_index_from_ctype(i, data[i])
            if adjoint:
                launch.set_param_at_index_from_ctype(i, grad[i], adjoint=True)
        return launch, data, grad, offset

    def launch(self, adjoint, values, gradients=()):
        """Launch the kernel or its adjoint on inputs, then outputs. None is a null pointer: the adjoint skips it."""
        ready = []
        for launch, data, grad, offset in self.parts[adjoint]:
            for descriptors, tensors in ((data, values), (grad, gradients)):
                for i, x in enumerate(tensors):
                    if i in offset:
                        descriptors[i].data = 0 if x is None else x.data_ptr() + offset[i]
                    elif x is not None:
                        launch.set_param_at_index(i, x)
            ready.append(launch.launch)
        others = [self.pool.submit(launch) for launch in ready[1:]]
        ready[0](None if self.device.type == "cpu" else _warp_stream(torch.cuda.current_stream(self.device)))
        for other in others:
            other.result()


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, *inputs):
        n, saved = len(inputs), plan.function.saved
        outputs = [torch.zeros_like(example) for i, example in plan.examples.items() if i >= n]
        plan.launch(False, [x.contiguous() if isinstance(x, torch.Tensor) else x for x in inputs] + outputs)
        ctx.plan, ctx.numbers = plan, [None if isinstance(x, torch.Tensor) else x for x in inputs]
        ctx.set_materialize_grads(False)
        # Saved through torch: an in-place edit of any of them before backward then raises instead of going unnoticed.
        ctx.save_for_backward(*[inputs[i] if i < n else outputs[i - n] for i in saved])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *output_gradients):
        n, saved = len(ctx.numbers), ctx.plan.function.saved
        values = ctx.numbers + [None] * len(output_gradients)
        for i, x in zip(saved, ctx.saved_tensors):
            values[i] = x.contiguous()
        gradients = [torch.zeros_like(x) if need else None for x, need in zip(values, ctx.needs_input_grad[1:])]
        for i, g in enumerate(output_gradients, n):
            if i in saved:  # where the kernel reads it back, the adjoint adds to its gradient: work on a copy
                g = torch.zeros_like(values[i]) if g is None else g.clone(memory_format=torch.contiguous_format)
            gradients.append(None if g is None else g.contiguous())
        ctx.plan.launch(True, values, gradients)
        return None, *gradients[:n]
