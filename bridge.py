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

How it works. Warp generates, beside each kernel, its adjoint kernel. `forward` launches the kernel and saves its inputs;
`backward` launches the adjoint with the gradients that torch hands in. No wp.Tape and no wp.array is made per call: both
launches are recorded once per combination of shapes, dtypes and device, and each call only rewrites their pointers.

What a kernel must keep to: (1) it never writes to an input; (2) each output element is written once, or only accumulated
with `+=` or `wp.atomic_add` (outputs arrive zeroed); (3) a buffer that it writes and then reads back is `scratch`: give it
as one of the last `num_scratch` arguments; it is allocated here and not returned; (4) loops that carry a local variable
must be unrolled, because Warp's adjoint is silently wrong otherwise (Warp user guide, Differentiability). Rule 3 is checked.
A WarpFunction is not re-entrant: one thread at a time. Second derivatives are refused: Warp generates none.
"""

import ast
import inspect
import textwrap

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
        self.kernel, self.num_outputs, self.shapes, self.plans = kernel, num_outputs, shapes or {}, {}
        self.args = kernel.adj.args
        self.num_inputs = len(self.args) - num_outputs - num_scratch
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
        key, args, n = function.kernel.key, function.args, function.num_inputs
        if len(inputs) != n:
            raise TypeError(f"{key} takes {n} inputs ({', '.join(a.label for a in args[:n])}), got {len(inputs)}")
        self.is_array = [isinstance(arg.type, wp.array) for arg in args]
        self.device = next(x.device for x, is_array in zip(inputs, self.is_array) if is_array and hasattr(x, "device"))
        layout = lambda arg: function.shapes.get(arg.label, (...,))
        grid = None
        for x, arg, is_array in zip(inputs, args, self.is_array):
            if is_array != isinstance(x, torch.Tensor):
                raise TypeError(f"{key}: '{arg.label}' takes a {'tensor' if is_array else 'number'}, got {type(x).__name__}")
            if is_array and ... in layout(arg) and grid is None:
                grid = tuple(x.shape[: arg.type.ndim + 1 - len(layout(arg))])
        self.tensor_shapes, self.dtypes, self.data, self.grad = [], [], [], []
        for i, arg in enumerate(args):
            if not self.is_array[i]:
                for values, value in zip((self.tensor_shapes, self.dtypes, self.data, self.grad), (None, None, inputs[i], 0)):
                    values.append(value)
                continue
            element = arg.type.dtype
            shape = tuple(n for part in layout(arg) for n in (grid if part is ... else (part,)))
            shape += tuple(getattr(element, "_shape_", ()))
            dtype = wp.dtype_to_torch(getattr(element, "_wp_scalar_type_", element))
            if i < n and (inputs[i].dtype, inputs[i].device) != (dtype, self.device):
                got = f"{inputs[i].dtype} on {inputs[i].device}"
                raise TypeError(f"{key}: '{arg.label}' must be {dtype} on {self.device}, got {got}")
            if i < n and tuple(inputs[i].shape) != shape:
                raise ValueError(f"{key}: '{arg.label}' must have shape {list(shape)}, got {list(inputs[i].shape)}")
            self.tensor_shapes.append(shape)
            self.dtypes.append(dtype)
            # Array descriptors of the right shape; their pointers are rewritten at each launch.
            example = torch.empty(shape, dtype=dtype, device=self.device)
            for descriptors in (self.data, self.grad):
                descriptors.append(wp.from_torch(example, element, requires_grad=False, return_ctype=True))
        record = dict(dim=grid, inputs=self.data, device=wp.device_from_torch(self.device), record_cmd=True)
        self.forward = wp.launch(function.kernel, **record)
        self.adjoint = wp.launch(function.kernel, adj_inputs=self.grad, adjoint=True, **record)
        for i in range(len(args)):
            if self.is_array[i]:
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
            if self.is_array[i]:  # a null adjoint is skipped by the kernel
                self.grad[i].data = 0 if gradient is None else gradient.data_ptr()
        # On CUDA the kernel must run on torch's current stream, also while torch captures a graph.
        launch.launch(None if self.device.type == "cpu" else wp.stream_from_torch(torch.cuda.current_stream(self.device)))


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, *inputs):
        plan, n, m = function.plan(inputs), function.num_inputs, function.num_outputs
        arrays = [x.contiguous() if isinstance(x, torch.Tensor) else x for x in inputs]
        made = [torch.zeros(s, dtype=d, device=plan.device) for s, d in zip(plan.tensor_shapes[n:], plan.dtypes[n:])]
        plan.launch(plan.forward, arrays + made)
        ctx.plan, ctx.num_outputs = plan, m
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
        needed = ctx.needs_input_grad[1:]
        input_gradients = [torch.zeros_like(x) if need else None for x, need in zip(inputs, needed)]
        # Gradients of sums and means arrive expanded (stride 0): the kernel needs them contiguous.
        output_gradients = [None if g is None else g.contiguous() for g in output_gradients]
        scratch_gradients = [torch.zeros_like(s) for s in scratch]
        values = inputs + [None] * ctx.num_outputs + scratch
        ctx.plan.launch(ctx.plan.adjoint, values, input_gradients + output_gradients + scratch_gradients)
        return None, *input_gradients


def _reads_back(kernel, name):
    """Whether `name` occurs in the kernel other than as the target of a store or of a wp.atomic_*."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kernel.func)))
    writes = set()
    for node in ast.walk(tree):
        target = node.args[0] if isinstance(node, ast.Call) and "atomic_" in ast.unparse(node.func) else node
        if target is not node or (isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)):
            while isinstance(target, (ast.Subscript, ast.Attribute)):
                target = target.value
            writes.add(target)
    return any(isinstance(n, ast.Name) and n.id == name and n not in writes for n in ast.walk(tree))
