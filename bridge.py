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

On a GPU, `bridge.cuda_graph` captures a function of such calls and of torch's, backward passes and optimizer steps
included, as one CUDA graph.

Warp runs a CPU launch on one core. After `bridge.set_num_threads(n)`, long launches of functions made with `by_rows=True`
are split over n threads: same bits, less time.
"""

import concurrent.futures
import functools
import itertools
import time
from collections.abc import Callable, Sequence

import torch
import warp as wp
from torch.autograd.function import once_differentiable

# A launch is split when the quickest of its first TRIALS took longer than this: waking a thread costs some 50 us.
TRIALS, WORTH_SPLITTING = 3, 3e-4  # s
_threads, _pool = 1, None


def set_num_threads(threads: int) -> None:
    """CPU threads that share a long launch. One, the default, launches from the calling thread only."""
    global _threads, _pool
    _threads, _pool = threads, concurrent.futures.ThreadPoolExecutor(threads - 1) if threads > 1 else None


class WarpFunction:
    """A differentiable torch function made of one Warp kernel whose arguments are inputs, then outputs.

    kernel       a wp.kernel with concrete types (of a generic kernel pass the result of wp.overload)
    num_outputs  how many arguments, at the end, are outputs; with one, a call returns a tensor, else a tuple
    shapes       {argument: array shape} for arrays whose shape is not the launch grid's; `...` stands for the grid,
                 e.g. {"trajectory": (..., 5), "loss": (1,)}. The grid is read off the first input that has it.
    by_rows      promises that a thread of the grid's row i touches nothing but row i of any array, and asks for no array's
                 shape: then the rows, and the gradients' rows, can be shared out between CPU threads

    A tensor's shape is its array's, then the element's: wp.array(dtype=wp.vec3) over a grid of N is [N, 3].
    Raises TypeError or ValueError, in one line, on a wrong number, dtype, shape or device of arguments.
    """

    def __init__(self, kernel: wp.Kernel, num_outputs: int = 1, shapes: dict | None = None, by_rows: bool = False):
        self.kernel, self.args, self.num_outputs, self.by_rows = kernel, kernel.adj.args, num_outputs, by_rows
        self.num_inputs, self.plans = len(self.args) - num_outputs, {}
        self.layouts = {arg.label: (...,) for arg in self.args} | (shapes or {})
        if by_rows and any(layout[0] is not ... for layout in self.layouts.values()):
            raise ValueError(f"{kernel.key}: by_rows needs arrays that all begin with the launch grid")
        wp.init()
        for block_dim in (1, None):  # CPU, CUDA: fix the cache key now; building kernels that share functions changes it
            kernel.module.get_module_hash(block_dim)

    def __call__(self, *inputs: torch.Tensor | float) -> torch.Tensor | tuple[torch.Tensor, ...]:
        outputs = _Call.apply(self, *inputs)
        return outputs[0] if self.num_outputs == 1 else outputs

    def plan(self, inputs: tuple) -> "_Plan":
        """The recorded launches for these inputs; made, after a check of every argument, when first needed."""
        key = _threads, *[(x.shape, x.dtype, x.device) if isinstance(x, torch.Tensor) else type(x) for x in inputs]
        if key not in self.plans:
            self.plans[key] = _Plan(self, inputs)
        return self.plans[key]


class _Plan:
    """The forward and adjoint launches for one combination of shapes and device, with their array descriptors."""

    def __init__(self, function, inputs):
        key, args, layouts, n = function.kernel.key, function.args, function.layouts, function.num_inputs
        if len(inputs) != n:
            raise TypeError(f"{key} takes {n} inputs ({', '.join(a.label for a in args[:n])}), got {len(inputs)}")
        self.is_array = [hasattr(arg.type, "ndim") for arg in args]
        for arg, x, is_array in zip(args, inputs, self.is_array):
            if not isinstance(x, torch.Tensor if is_array else (int, float)):
                raise TypeError(f"{key}: '{arg.label}' takes a {'tensor' if is_array else 'number'}, got {type(x).__name__}")
        spanning = [i for i in range(n) if self.is_array[i] and ... in layouts[args[i].label]]
        if not spanning:
            raise ValueError(f"{key}: no input has the launch grid's shape")
        arg, first = args[spanning[0]], inputs[spanning[0]]
        rank, self.device = arg.type.ndim + 1 - len(layouts[arg.label]), first.device
        grid = tuple(first.shape[:rank])
        if len(grid) < rank or 0 in grid or self.device.type not in ("cpu", "cuda"):
            got = f"{list(first.shape)} on {self.device}"
            raise ValueError(f"{key}: '{arg.label}' must have {rank} nonempty dimensions at least, on cpu or cuda; got {got}")
        self.tensors = [None] * len(args)  # (shape, dtype) of each array as a tensor
        for i, arg in enumerate(args):
            if not self.is_array[i]:
                continue
            shape = tuple(size for part in layouts[arg.label] for size in (grid if part is ... else (part,)))
            shape += tuple(getattr(arg.type.dtype, "_shape_", ()))
            dtype = wp.dtype_to_torch(getattr(arg.type.dtype, "_wp_scalar_type_", arg.type.dtype))
            if i < n and (inputs[i].dtype, inputs[i].device) != (dtype, self.device):
                got = f"{inputs[i].dtype} on {inputs[i].device}"
                raise TypeError(f"{key}: '{arg.label}' must be {dtype} on {self.device}, got {got}")
            if i < n and inputs[i].shape != shape:
                raise ValueError(f"{key}: '{arg.label}' must have shape {list(shape)}, got {list(inputs[i].shape)}")
            self.tensors[i] = shape, dtype
        self.function, self.grid = function, grid
        self.numbers = [None if is_array else x for is_array, x in zip(self.is_array, inputs)]
        self.parts = [[self.record(0, grid[0])]] * 2  # of the forward launch and of the adjoint: one, or one a thread
        splittable = function.by_rows and _threads > 1 and self.device.type == "cpu"
        self.trials, self.quickest = [TRIALS if splittable else 0] * 2, [float("inf")] * 2

    def record(self, start, stop):
        """The forward and adjoint launch of the grid's rows start to stop, and what to rewrite before launching either."""
        function, rows = self.function, slice(start, stop) if self.function.by_rows else slice(None)
        data, grad, offset = [*self.numbers, *[None] * function.num_outputs], [0] * len(function.args), [0] * len(function.args)
        for i in [i for i, is_array in enumerate(self.is_array) if is_array]:
            shape, dtype = self.tensors[i]
            example = torch.empty(shape, dtype=dtype, device=self.device)[rows]  # its pointer is replaced at each launch
            offset[i] = example.storage_offset() * example.element_size()
            for descriptors in (data, grad):
                descriptors[i] = wp.from_torch(example, function.args[i].type.dtype, requires_grad=False, return_ctype=True)
        device = wp.device_from_torch(self.device)
        record = {"dim": (stop - start, *self.grid[1:]), "inputs": data, "device": device, "record_cmd": True}
        launches = wp.launch(function.kernel, **record), wp.launch(function.kernel, adj_inputs=grad, adjoint=True, **record)
        for i in [i for i, is_array in enumerate(self.is_array) if is_array]:
            for launch in launches:
                launch.set_param_at_index_from_ctype(i, data[i])
            launches[1].set_param_at_index_from_ctype(i, grad[i], adjoint=True)
        return launches, data, grad, offset

    def launch(self, adjoint, values, gradients=()):
        """Launch the kernel or its adjoint on these inputs and outputs; gradients of the same order, None where not asked."""
        ready = []
        for launches, data, grad, offset in self.parts[adjoint]:
            for i, value in enumerate(values):
                if self.is_array[i]:
                    data[i].data = value.data_ptr() + offset[i]
                else:
                    launches[adjoint].set_param_at_index(i, value)
            for i, gradient in enumerate(gradients):
                if self.is_array[i]:  # the adjoint kernel skips a null gradient
                    grad[i].data = 0 if gradient is None else gradient.data_ptr() + offset[i]
            ready.append(launches[adjoint].launch)
        began = time.perf_counter()
        others = [_pool.submit(launch) for launch in ready[1:]]
        ready[0](None if self.device.type == "cpu" else _warp_stream(torch.cuda.current_stream(self.device)))
        for other in others:
            other.result()
        if self.trials[adjoint]:
            self.trials[adjoint] -= 1
            self.quickest[adjoint] = min(self.quickest[adjoint], time.perf_counter() - began)
            if not self.trials[adjoint] and self.quickest[adjoint] > WORTH_SPLITTING:
                cuts = [self.grid[0] * k // _threads for k in range(_threads + 1)]
                self.parts[adjoint] = [self.record(start, stop) for start, stop in itertools.pairwise(cuts) if start < stop]


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.plan = plan = function.plan(inputs)
        outputs = [torch.zeros(s, dtype=d, device=plan.device) for s, d in plan.tensors[len(inputs) :]]
        plan.launch(False, [x.contiguous() if isinstance(x, torch.Tensor) else x for x in inputs] + outputs)
        ctx.numbers = [None if isinstance(x, torch.Tensor) else x for x in inputs]
        ctx.set_materialize_grads(False)
        # Saved through torch: an in-place edit of any of them before backward then raises instead of going unnoticed.
        ctx.save_for_backward(*[x for x in inputs if isinstance(x, torch.Tensor)], *outputs)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *output_gradients):
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved).contiguous() if number is None else number for number in ctx.numbers]
        outputs = list(saved)
        gradients = [torch.zeros_like(x) if need else None for x, need in zip(inputs, ctx.needs_input_grad[1:])]
        # A copy, because the adjoint of reading an output back adds to it, and because it may be expanded (stride 0).
        for x, g in zip(outputs, output_gradients):
            gradients.append(torch.zeros_like(x) if g is None else g.clone(memory_format=torch.contiguous_format))
        ctx.plan.launch(True, inputs + outputs, gradients)
        return None, *gradients[: len(inputs)]


_warp_stream = functools.cache(wp.stream_from_torch)  # of torch's current one, also while torch captures a graph


def cuda_graph(function: Callable, changed: Sequence[torch.Tensor], generators: Sequence[torch.Generator] = ()) -> Callable:
    """`function()`, Warp launches, backward passes and optimizer steps included, as one CUDA graph. Returns its replay.

    function    takes nothing and returns tensors, the same ones at every replay: read them before the next. What it works
                on lies at fixed addresses, and what it keeps for the next time it copies back there (`copy_`). Numbers and
                branches of Python are as they were at capture. It reads no value on the host: no .item(), no `if` on a
                tensor, no indexing by a boolean one, no tensor made of Python numbers.
    changed     the tensors that it changes and that outlive it: weights, optimizer state, simulator state. It is run to
                warm up, which compiles kernels and makes what is made on first use; then these are put back in place.
    generators  those that it draws from, but for torch's own; each replay goes on where the last draw ended
    """
    device = changed[0].device
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    warp_stream = _warp_stream(stream)
    saved, draws = [x.clone() for x in changed], [generator.get_state() for generator in generators]
    own_draws = torch.cuda.get_rng_state(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    # Warp's stream is set outside the capture: to set it waits for the one before, which a capture cannot.
    with wp.ScopedStream(warp_stream), torch.cuda.stream(stream):
        for _ in range(3):
            function()
        with torch.no_grad():
            for x, value in zip(changed, saved):
                x.copy_(value)
        torch.cuda.set_rng_state(own_draws, device)
        for generator, state in zip(generators, draws):
            generator.set_state(state)
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, stream=stream):
            wp.capture_begin(stream=warp_stream, force_module_load=False, external=True)  # Warp notes the kernels
            try:
                outputs = function()
            finally:
                kernels = wp.capture_end(stream=warp_stream)
    torch.cuda.current_stream(device).wait_stream(stream)

    def replay():
        graph.replay()
        return outputs

    replay.needs = function, kernels  # the tensors that it works on, and the kernels that Warp would else unload
    return replay
