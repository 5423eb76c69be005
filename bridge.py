"""Make a Warp kernel a differentiable torch function: torch tensors in, torch tensors out, `backward()` through it.

    import torch, warp as wp
    from bridge import WarpFunction
    @wp.kernel
    def spring(x: wp.array(dtype=wp.vec2), k: wp.array(dtype=float), dt: float, x_next: wp.array(dtype=wp.vec2)):
        i = wp.tid()
        x_next[i] = wp.vec2(x[i][0] + dt * x[i][1], x[i][1] - dt * k[i] * x[i][0])

    step = WarpFunction(spring)                              # the last argument is the output
    x, k = torch.randn(8, 2), torch.ones(8, requires_grad=True)
    for _ in range(100):
        x = step(x, k, 0.01)                                 # arrays as tensors, scalars as numbers
    x.square().sum().backward()                              # k.grad: through 100 steps

`forward` launches the kernel, `backward` the adjoint that Warp generates. Launches are recorded once per combination of
shapes; later calls rewrite their pointers: 3 to 5 times faster than wp.Tape at N = 64 (benchmarks/throughput.py).

Kernel requirements; if they are violated, Warp's adjoint is silently wrong (Warp user guide, Differentiability):
  - Each output element is written once, or only accumulated with `+=`, `-=` or `wp.atomic_add`, starting at zero. It may
    be read back, so a loop can keep its state in an output. Inputs are only read; writes to them are refused.
  - A loop that carries a local variable is unrolled: constant bounds, at most `max_unroll` (16) iterations, no `break`.
  - A component of a local vector or matrix is assigned once: `v[0] += 1.0` is fine, `v[0] = v[0] + 1.0` is not unless
    `wp.config.enable_vector_component_overwrites` is set.

Threads may share a WarpFunction. Second derivatives are refused: Warp generates none. This file uses non-public attributes
of Warp 1.19 (of `kernel.adj` and `kernel.module`).
"""

import ast
import functools
import threading

import torch
import warp as wp

BLOCK_DIM = 64  # CUDA threads per block: with Warp's 256, a few thousand environments leave most multiprocessors idle
_warp_stream = functools.cache(wp.stream_from_torch)


class WarpFunction:
    """A differentiable torch function made of one Warp kernel, whose arguments are inputs, then outputs.

    kernel       a wp.kernel with concrete types (for a generic kernel, the result of wp.overload)
    num_outputs  how many arguments at the end are outputs; with one, a call returns a tensor, otherwise a tuple
    shapes       {argument: array shape} for arrays whose shape is not the launch grid's; `...` stands for the grid, e.g.
                 {"trajectory": (..., 5), "loss": (1,)}. The grid is read off the first input whose shape includes it.

    A tensor's shape is its array's, then the element's: wp.array(dtype=wp.vec3) over a grid of N is [N, 3].
    Raises TypeError or ValueError, in one line, for kernels that cannot be differentiated and for wrong arguments.
    """

    def __init__(self, kernel: wp.Kernel, num_outputs: int = 1, shapes: dict | None = None):
        if kernel.is_generic:
            raise TypeError(f"{kernel.key} is generic: pass wp.overload({kernel.key}, [...]) with concrete types")
        self.kernel, self.args, self.num_inputs = kernel, kernel.adj.args, len(kernel.adj.args) - num_outputs
        self.plans, self.version, self.lock = {}, None, threading.Lock()
        wp.init()
        for block_dim in (1, BLOCK_DIM):  # CPU, CUDA: hash before kernels that share functions are built
            kernel.module.get_module_hash(block_dim)
        labels, shapes, rank = [arg.label for arg in self.args], shapes or {}, kernel.adj.kernel_dim
        for name in shapes.keys() - set(labels):
            raise ValueError(f"{kernel.key} has no argument '{name}'; it has {', '.join(labels)}")
        for name in written(kernel.adj.tree) & set(labels[: self.num_inputs]):
            raise ValueError(f"{kernel.key} writes to its input '{name}', which would make its gradient wrong")
        self.layouts, self.dtypes = {}, {}  # of the arrays: shape, with `...` for the grid's; torch dtype
        for i, (name, kind) in enumerate((arg.label, arg.type) for arg in self.args):
            is_array = getattr(kind, "_concrete_cls", type(kind)) is wp.array  # and not an indexedarray
            element = kind.dtype if is_array else kind
            try:
                dtype = wp.dtype_to_torch(getattr(element, "_wp_scalar_type_", element))
            except TypeError:
                dtype = None
            if dtype is None or i >= self.num_inputs and not is_array:
                kinds = "a wp.array of numbers, vectors or matrices" + " or a number" * (i < self.num_inputs)
                raise TypeError(f"{kernel.key}: '{name}' must be {kinds}")
            layout = shapes.get(name, (...,))
            if is_array and (not isinstance(layout, tuple) or len(layout) + (rank - 1) * layout.count(...) != kind.ndim):
                need = f"must be a tuple of as many sizes, with ... for the {rank}D launch grid of wp.tid()"
                raise ValueError(f"{kernel.key}: '{name}' is a {kind.ndim}D array; its shape {layout} in `shapes` {need}")
            if is_array:
                self.layouts[i], self.dtypes[i] = layout, dtype

    def __call__(self, *inputs: torch.Tensor | float) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if self.kernel.module.hashers is not self.version:  # what the kernel calls was redefined, as in a notebook
            self.plans, self.version = {}, self.kernel.module.hashers
        key = tuple([(x.shape, x.dtype, x.device) if isinstance(x, torch.Tensor) else type(x) for x in inputs])
        tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
        plan, before = self.plans.get(key), []
        if plan is None:
            plan, before = _Plan(self, inputs), [x.detach().clone() for x in tensors]
        outputs = _Call.apply(plan, [x for x in inputs if not isinstance(x, torch.Tensor)], *tensors)
        for x, old in zip(tensors, before):  # in the first call only: a write that `written` does not see
            if ((x != old) & ~x.isnan()).any():
                raise ValueError(f"{self.kernel.key} writes to one of its inputs, which would make its gradient wrong")
        self.plans[key] = plan
        return outputs[0] if len(outputs) == 1 else outputs

    def __deepcopy__(self, memo: dict) -> "WarpFunction":
        return self  # a function has no state of its own


def written(tree: ast.AST) -> set[str]:
    """Arrays that a kernel's source assigns to or changes by an atomic function; not through a view or in a wp.func."""
    nodes = list(ast.walk(tree))
    places = [ast.unparse(place) for node in nodes if isinstance(node, ast.Assign) for place in node.targets]
    places += [ast.unparse(node.target) for node in nodes if isinstance(node, ast.AugAssign)]
    calls = [node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "attr", "").startswith("atomic_")]
    places += [f"{ast.unparse(node.args[0])}[" for node in calls]
    return {place.split("[")[0] for place in places if "[" in place}


class _Plan:
    """One combination of shapes and device: the recorded launches of kernel and adjoint, and their array descriptors."""

    def __init__(self, function: WarpFunction, inputs: tuple):
        self.key, self.lock, n = function.kernel.key, function.lock, function.num_inputs
        args, layouts = function.args, function.layouts
        if len(inputs) != n:
            raise TypeError(f"{self.key} takes {n} inputs ({', '.join(a.label for a in args[:n])}), got {len(inputs)}")
        for i, x in enumerate(inputs):
            kind, types = ("tensor", torch.Tensor) if i in layouts else ("number", (int, float))
            if not isinstance(x, types):
                raise TypeError(f"{self.key}: '{args[i].label}' takes a {kind}, got {type(x).__name__}")
        leader = next((i for i in layouts if i < n and ... in layouts[i]), None)
        if leader is None:
            raise ValueError(f"{self.key}: no input has the launch grid's shape")
        words = lambda x: f"{x.dtype} {list(x.shape)} on {x.device}"
        first, start, rank = inputs[leader], layouts[leader].index(...), function.kernel.adj.kernel_dim
        grid, self.device = tuple(first.shape[start : start + rank]), first.device
        if len(grid) < rank or 0 in grid or self.device.type not in ("cpu", "cuda"):
            need = f"'{args[leader].label}' needs {rank} nonempty dimensions on cpu or cuda"
            raise ValueError(f"{self.key}: {need}; got {words(first)}")
        self.data, self.grad, self.numbers, self.outputs = {}, {}, [i for i in range(n) if i not in layouts], []
        for i, layout in layouts.items():
            element = args[i].type.dtype
            shape = [size for part in layout for size in (grid if part is ... else (part,))]
            shape += getattr(element, "_shape_", ())
            example = torch.empty((), dtype=function.dtypes[i], device=self.device).expand(shape)  # takes no memory
            if i >= n:
                self.outputs.append(example)
            elif words(inputs[i]) != words(example):
                wrong = f"'{args[i].label}' must be {words(example)}, got {words(inputs[i])}"
                raise ValueError(f"{self.key}: {wrong}; the grid is {list(grid)}, read off '{args[leader].label}'")
            for descriptors in (self.data, self.grad):
                meta = torch.empty(shape, dtype=example.dtype, device="meta")  # contiguous, and takes none either
                descriptors[i] = wp.from_torch(meta, element, requires_grad=False, return_ctype=True)
        # Warp takes the descriptors as they are, so the recorded launches see what `launch` writes into them.
        values, gradients = ([x[i] if i in x else inputs[i] for i in range(len(args))] for x in (self.data, self.grad))
        how = {"device": wp.device_from_torch(self.device), "block_dim": BLOCK_DIM, "record_cmd": True}
        self.forward = wp.launch(function.kernel, grid, values, **how)
        self.backward = wp.launch(function.kernel, grid, values, adj_inputs=gradients, adjoint=True, **how)

    def launch(self, command: wp.Launch, arrays: list, numbers: list, gradients: tuple | list = ()) -> None:
        """Launch on arrays, numbers and the arrays' gradients; a gradient of None is a null pointer, to be skipped."""
        stream = None if self.device.type == "cpu" else _warp_stream(torch.cuda.current_stream(self.device))
        with self.lock:  # threads share the descriptors
            for data, x in zip(self.data.values(), arrays):
                data.data = x.data_ptr()
            for data, grad, x in zip(self.data.values(), self.grad.values(), gradients):
                grad.data = data.grad = 0 if x is None else x.data_ptr()  # data.grad is where views, as x[i], look
            for i, x in zip(self.numbers, numbers):
                command.set_param_at_index(i, x)
            command.launch(stream)


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, numbers, *inputs):
        outputs = [torch.zeros_like(example) for example in plan.outputs]
        plan.launch(plan.forward, [*[x.contiguous() for x in inputs], *outputs], numbers)
        ctx.plan, ctx.numbers = plan, numbers
        ctx.set_materialize_grads(False)
        # Saved through torch: an in-place edit of any of them before backward then raises instead of going unnoticed.
        ctx.save_for_backward(*inputs, *outputs)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *output_gradients):
        plan, arrays = ctx.plan, [x.contiguous() for x in ctx.saved_tensors]
        with torch.no_grad():
            gradients = [torch.zeros_like(x) if need else None for x, need in zip(arrays, ctx.needs_input_grad[2:])]
            # Copies, because the adjoint changes them: it adds what the kernel read back and clears what it wrote.
            pairs = zip(plan.outputs, output_gradients)
            copies = [torch.zeros_like(y) if g is None else g.contiguous().clone() for y, g in pairs]
            plan.launch(plan.backward, arrays, ctx.numbers, gradients + copies)
        if torch.is_grad_enabled():  # create_graph=True
            gradients = _Refuse.apply(plan.key, len(gradients), *gradients, *ctx.saved_tensors, *output_gradients)
        return None, None, *gradients


class _Refuse(torch.autograd.Function):  # passes gradients on; differentiating them again raises
    @staticmethod
    def forward(ctx, key, count, *tensors):
        ctx.key = key
        return tuple(x if x is None else x.clone() for x in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.key} cannot be differentiated twice: Warp generates no second derivatives")
