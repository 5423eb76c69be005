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
    x.square().sum().backward()                              # k.grad is d(loss)/dk through 100 steps

Warp generates, beside each kernel, its adjoint: `forward` launches the kernel, `backward` the adjoint, with no wp.Tape
and no wp.array. Both launches are recorded once per shapes, dtypes and device; a call only rewrites their pointers.

What a kernel must keep to: (1) it never writes to an input; (2) it writes each output element once, or only accumulates
with `+=` or `wp.atomic_add` (outputs arrive zeroed), and does not read it back (checked); (3) a buffer that it does read
back is scratch, one of the last `num_scratch` arguments: allocated here, not returned; (4) loops that carry a local
variable are unrolled: otherwise Warp's adjoint is silently wrong (Warp user guide, Differentiability).
A WarpFunction is not re-entrant: one thread at a time. Second derivatives are refused: Warp generates none.
"""

import ast
import functools

import torch
import warp as wp
from torch.autograd.function import once_differentiable


class WarpFunction:
    """A differentiable torch function made of one Warp kernel whose arguments are inputs, then outputs, then scratch.

    kernel       a wp.kernel with concrete types (of a generic kernel pass the result of wp.overload)
    num_outputs  how many arguments, before the scratch ones, are outputs; with one, a call returns a tensor, else a tuple
    num_scratch  how many arguments at the end are scratch
    shapes       {argument: array shape} for arrays whose shape is not the launch grid's; `...` stands for the grid,
                 e.g. {"trajectory": (..., 5), "loss": (1,)}. The grid is read off the first input that has it.

    A tensor's shape is its array's shape followed by the element's: wp.array(dtype=wp.vec3) over a grid of N is [N, 3].
    Raises TypeError or ValueError, in one line, on a wrong number, dtype, shape or device of arguments.
    """

    def __init__(self, kernel, num_outputs=1, num_scratch=0, shapes=None):
        self.kernel, self.args, self.num_outputs = kernel, kernel.adj.args, num_outputs
        self.num_inputs = len(self.args) - num_outputs - num_scratch
        self.layouts = {arg.label: (...,) for arg in self.args} | (shapes or {})
        self.plans = {}
        for arg in self.args[self.num_inputs : self.num_inputs + num_outputs]:
            if _reads_back(kernel, arg.label):
                raise ValueError(f"{kernel.key}: output '{arg.label}' is read back by the kernel; make it scratch")

    def __call__(self, *inputs):
        outputs = _Call.apply(self, *inputs)
        return outputs[0] if self.num_outputs == 1 else outputs

    def plan(self, inputs):
        """The recorded launches for these inputs; made, after a check of every argument, when first needed."""
        key = tuple([(x.shape, x.dtype, x.device) if isinstance(x, torch.Tensor) else None for x in inputs])
        if key not in self.plans:
            self.plans[key] = _Plan(self, inputs)
        return self.plans[key]


class _Plan:
    """The forward and adjoint launches for one combination of shapes and device, with their array descriptors."""

    def __init__(self, function, inputs):
        wp.init()
        key, args, layouts, n = function.kernel.key, function.args, function.layouts, function.num_inputs
        if len(inputs) != n:
            raise TypeError(f"{key} takes {n} inputs ({', '.join(a.label for a in args[:n])}), got {len(inputs)}")
        self.is_array = [hasattr(arg.type, "ndim") for arg in args]
        for arg, x, is_array in zip(args, inputs, self.is_array):
            if is_array != isinstance(x, torch.Tensor):
                raise TypeError(f"{key}: '{arg.label}' takes a {'tensor' if is_array else 'number'}, got {type(x).__name__}")
        spanning = [i for i in range(n) if self.is_array[i] and ... in layouts[args[i].label]]
        if not spanning:
            raise ValueError(f"{key}: one input at least must have the launch grid's shape")
        arg, first = args[spanning[0]], inputs[spanning[0]]
        rank = arg.type.ndim + 1 - len(layouts[arg.label])
        grid, self.device = tuple(first.shape[:rank]), first.device
        if len(grid) < rank or self.device.type not in ("cpu", "cuda"):
            got = f"{first.dim()} on {self.device}"
            raise ValueError(f"{key}: '{arg.label}' must have at least {rank} dimensions, on cpu or cuda; got {got}")
        self.tensors = [None] * len(args)  # (shape, dtype) of each array as a tensor
        self.data, self.grad = [*inputs] + [None] * (len(args) - n), [0] * len(args)
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
                self.data[i].data = 0 if value is None else value.data_ptr()
            else:
                launch.set_param_at_index(i, value)
        for i, gradient in enumerate(gradients):
            if self.is_array[i]:  # the adjoint kernel skips a null gradient
                self.grad[i].data = 0 if gradient is None else gradient.data_ptr()
        # On CUDA the kernel must run on torch's current stream, also while torch captures a graph.
        on_cpu = self.device.type == "cpu"
        launch.launch(None if on_cpu else _warp_stream(torch.cuda.current_stream(self.device)))


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.plan, ctx.num_outputs = plan, m = function.plan(inputs), function.num_outputs
        made = [torch.zeros(s, dtype=d, device=plan.device) for s, d in plan.tensors[len(inputs) :]]
        plan.launch(plan.forward, [x.contiguous() if isinstance(x, torch.Tensor) else x for x in inputs] + made)
        ctx.numbers = [None if isinstance(x, torch.Tensor) else x for x in inputs]
        ctx.set_materialize_grads(False)
        # Saved through torch, so that an in-place edit of an input before backward raises. Outputs are not needed again.
        ctx.save_for_backward(*[x for x in inputs if isinstance(x, torch.Tensor)], *made[m:])
        return tuple(made[:m])

    @staticmethod
    @once_differentiable
    def backward(ctx, *output_gradients):
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved).contiguous() if number is None else number for number in ctx.numbers]
        scratch = list(saved)
        gradients = [torch.zeros_like(x) if need else None for x, need in zip(inputs, ctx.needs_input_grad[1:])]
        # Gradients of sums and means arrive expanded (stride 0): the kernel needs them contiguous.
        gradients += [None if g is None else g.contiguous() for g in output_gradients]
        gradients += [torch.zeros_like(x) for x in scratch]
        ctx.plan.launch(ctx.plan.adjoint, inputs + [None] * ctx.num_outputs + scratch, gradients)
        return None, *gradients[: len(inputs)]


@functools.cache
def _warp_stream(stream):
    return wp.stream_from_torch(stream)


def _reads_back(kernel, name):
    """Whether `name` occurs in the kernel other than as the target of a store or of a wp.atomic_*."""
    writes = (ast.Assign, ast.AugAssign, ast.Expr)  # statements; an Expr is a wp.atomic_* whose value is not used
    written = set()
    for x in [x for x in ast.walk(kernel.adj.tree) if isinstance(x, writes)]:
        if isinstance(x, ast.Expr):
            targets = x.value.args[:1] if "atomic_" in ast.unparse(x.value) else []
        else:
            targets = x.targets if isinstance(x, ast.Assign) else [x.target] * isinstance(x.op, (ast.Add, ast.Sub))
        written |= {next(y for y in ast.walk(target) if isinstance(y, ast.Name)) for target in targets}
    return any(isinstance(x, ast.Name) and x.id == name and x not in written for x in ast.walk(kernel.adj.tree))
