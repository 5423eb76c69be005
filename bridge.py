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

import functools

import torch
import warp as wp
from torch.autograd.function import once_differentiable


class WarpFunction:
    """A differentiable torch function made of one Warp kernel whose arguments are inputs, then outputs.

    kernel       a wp.kernel with concrete types (of a generic kernel pass the result of wp.overload)
    num_outputs  how many arguments, at the end, are outputs; with one, a call returns a tensor, else a tuple
    shapes       {argument: array shape} for arrays whose shape is not the launch grid's; `...` stands for the grid,
                 e.g. {"trajectory": (..., 5), "loss": (1,)}. The grid is read off the first input that has it.

    A tensor's shape is its array's, then the element's: wp.array(dtype=wp.vec3) over a grid of N is [N, 3].
    Raises TypeError or ValueError, in one line, on a wrong number, dtype, shape or device of arguments.
    """

    def __init__(self, kernel, num_outputs=1, shapes=None):
        self.kernel, self.args, self.num_outputs = kernel, kernel.adj.args, num_outputs
        self.num_inputs, self.plans = len(self.args) - num_outputs, {}
        self.layouts = {arg.label: (...,) for arg in self.args} | (shapes or {})
        wp.init()
        for block_dim in (1, None):  # CPU, CUDA: fix the cache key now; building kernels that share functions changes it
            kernel.module.get_module_hash(block_dim)

    def __call__(self, *inputs):
        outputs = _Call.apply(self, *inputs)
        return outputs[0] if self.num_outputs == 1 else outputs

    def plan(self, inputs):
        """The recorded launches for these inputs; made, after a check of every argument, when first needed."""
        key = tuple([(x.shape, x.dtype, x.device) if isinstance(x, torch.Tensor) else type(x) for x in inputs])
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
        self.tensors, self.grad = [None] * len(args), [0] * len(args)  # tensors: (shape, dtype) of each array as a tensor
        self.data = [*inputs] + [None] * (len(args) - n)
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
            example = torch.empty(shape, dtype=dtype, device=self.device)  # its pointer is replaced at each launch
            for descriptors in (self.data, self.grad):
                descriptors[i] = wp.from_torch(example, arg.type.dtype, requires_grad=False, return_ctype=True)
        record = dict(dim=grid, inputs=self.data, device=wp.device_from_torch(self.device), record_cmd=True)
        self.forward = wp.launch(function.kernel, **record)
        self.adjoint = wp.launch(function.kernel, adj_inputs=self.grad, adjoint=True, **record)
        for i in [i for i, is_array in enumerate(self.is_array) if is_array]:
            self.forward.set_param_at_index_from_ctype(i, self.data[i])
            self.adjoint.set_param_at_index_from_ctype(i, self.data[i])
            self.adjoint.set_param_at_index_from_ctype(i, self.grad[i], adjoint=True)

    def launch(self, launch, values, gradients=()):
        for i, value in enumerate(values):
            if self.is_array[i]:
                self.data[i].data = value.data_ptr()
            else:
                launch.set_param_at_index(i, value)
        for i, gradient in enumerate(gradients):
            if self.is_array[i]:  # the adjoint kernel skips a null gradient
                self.grad[i].data = 0 if gradient is None else gradient.data_ptr()
        launch.launch(None if self.device.type == "cpu" else _warp_stream(torch.cuda.current_stream(self.device)))


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.plan = plan = function.plan(inputs)
        outputs = [torch.zeros(s, dtype=d, device=plan.device) for s, d in plan.tensors[len(inputs) :]]
        plan.launch(plan.forward, [x.contiguous() if isinstance(x, torch.Tensor) else x for x in inputs] + outputs)
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
        ctx.plan.launch(ctx.plan.adjoint, inputs + outputs, gradients)
        return None, *gradients[: len(inputs)]


_warp_stream = functools.cache(wp.stream_from_torch)  # of torch's current one, also while torch captures a graph
