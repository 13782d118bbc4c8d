"""Rules for layers of stacked members that need fewer operations than torch's vmap rules.

A member is one trial on one fold. Stacked members share one forward pass under vmap. In shapes, P
counts members, B rows of a minibatch, C channels, I inputs and O outputs.

The results and derivatives are the same. torch multiplies each bias of a linear layer by one and
transposes each gradient of a weight. It also scales and shifts the result of a batch norm or a
convolution in separate passes. Here images lie as (B, P*C, ...) from one layer to the next, so that
no copy is made between them.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_current_functorch_interpreter
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gputune.modules.trace import Args, Function, Kwargs

OptionalTensor: TypeAlias = Tensor | None
WithAxis: TypeAlias = tuple[Tensor, int]
"""The result of an operation for all members, and the index of its member axis."""
# Outputs of a layer up to which one product for all members is faster than one for each of them:
# 2 to 3 times with 2 outputs of 512 members, and as fast with 16.
_FEW_OUTPUTS = 8
_norm_backward = torch.ops.aten.native_layer_norm_backward.default


class Mapped(TorchFunctionMode):
    """Inside the context, replaces torch's vmap rules for layers by faster rules, only in this
    thread."""

    def __torch_function__(
        self, func: Function, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func is functional.embedding:
            return _embedding(*args, **kwargs)
        if func in _RULES:
            rule, place = _RULES[func]
            tensor = args[place] if len(args) > place else kwargs[("input", "weight")[place]]
            if _is_mapped(tensor):
                result = _call_rule(rule, args, kwargs)
                if result is not None:
                    return result
        return func(*args, **kwargs)


def _is_mapped(tensor: Tensor) -> bool:
    """Return whether a tensor has a vmap axis for members, and vmap is torch's innermost
    transform."""
    if not torch._C._functorch.is_batchedtensor(tensor):
        return False
    return retrieve_current_functorch_interpreter().key() == TransformType.Vmap


MemberRule = Callable[..., WithAxis | None]
"""A rule that computes a torch function for all members. The first axis of each tensor argument is
the members.

The rule returns None for unsupported arguments.
"""


def _call_rule(
    rule: MemberRule, args: Sequence[object], kwargs: Mapping[str, object]
) -> Tensor | None:
    """Apply a rule for all members as vmap would for an ``autograd.Function``, at a tenth of the
    cost."""
    interpreter = retrieve_current_functorch_interpreter()
    assert isinstance(interpreter, VmapInterpreter)
    level = interpreter.level()
    members = interpreter.batch_size()

    def first(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        tensor, axis = torch._C._functorch._unwrap_batched(value, level)
        # Tensors without an axis of members are expanded: stride 0, no copy.
        return tensor.expand(members, *tensor.shape) if axis is None else tensor.movedim(axis, 0)

    with interpreter.lower():
        result = rule(*map(first, args), **{name: first(value) for name, value in kwargs.items()})
    return None if result is None else torch._C._functorch._add_batch_dim(*result, level)


def _embedding(
    ids: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """Look up rows of an embedding, also under vmap, so that its padding row gets no gradient."""
    if padding_idx is None or not _is_mapped(weight):
        return functional.embedding(ids, weight, padding_idx, *args, **kwargs)
    # torch's vmap rule gives the padding row a gradient, but it must have none.
    rows = functional.embedding(ids, weight, None, *args, **kwargs)
    return torch.where((ids == padding_idx % weight.shape[0])[..., None], rows.detach(), rows)


def _linear(input: Tensor, weight: Tensor, bias: OptionalTensor = None) -> WithAxis:
    """Compute one linear layer for all members at once: inputs (P, ..., I) -> outputs (P, ...,
    O)."""
    is_common = len(input) > 1 and input.stride(0) == 0 and not input.requires_grad
    if is_common and weight.shape[1] <= _FEW_OUTPUTS:
        # (N, I), because all members read the same rows
        rows = input[0].flatten(0, -2) if input.dim() > 2 else input[0, None]
        result: Tensor = _LinearOfCommonRows.apply(rows, weight, bias)  # type: ignore[no-untyped-call]
    else:
        rows = input.flatten(1, -2) if input.dim() > 2 else input[:, None]
        result = _Linear.apply(rows, weight, bias)  # type: ignore[no-untyped-call]
    return result.view(*input.shape[:-1], -1), 0


class _Linear(torch.autograd.Function):
    """One linear layer for all members, as a single autograd function.

    Shapes: rows (P, N, I), weights (P, O, I), biases (P, O) or None; the result is (P, N, O).

    The gradients have the same memory layout as the weights.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: OptionalTensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        # (P, N, I) @ (P, I, O) -> (P, N, O)
        return x.bmm(weight.mT) if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        # (P, N, O) @ (P, O, I) -> (P, N, I), and for the weights (P, O, N) @ (P, N, I) -> (P, O, I)
        x_gradient = gradient.bmm(weight) if needs_x else None
        weight_gradient = gradient.mT.bmm(x) if needs_weight else None
        return x_gradient, weight_gradient, gradient.sum(1) if needs_bias else None


class _LinearOfCommonRows(torch.autograd.Function):
    """One linear layer for all members, which read the same rows, as a single matrix product.

    Shapes: rows (N, I), weights (P, O, I), biases (P, O) or None; the result is (P, N, O). The rows
    get no gradient. A layer with few outputs, such as a head, is much faster like this.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: OptionalTensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        # (P*O, I) @ (I, N) -> (P*O, N)
        outputs = weight.flatten(0, 1) @ x.mT
        if bias is not None:
            outputs += bias.flatten()[:, None]
        return outputs.view(*weight.shape[:2], -1).mT

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, needs_weight, needs_bias = ctx.needs_input_grad
        weight_gradient = None
        if needs_weight:
            # (P*O, N) @ (N, I) -> (P*O, I)
            weight_gradient = (gradient.mT.flatten(0, 1) @ x).view(weight.shape)
        return None, weight_gradient, gradient.sum(1) if needs_bias else None


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: OptionalTensor = None,
    bias: OptionalTensor = None,
    eps: float = 1e-5,
) -> WithAxis:
    """Compute the layer norms of all members: normalize, then apply each member's weight and
    bias."""
    shape = list(normalized_shape)
    outputs: Tensor = _LayerNorm.apply(input, shape, eps)  # type: ignore[no-untyped-call]
    member_shape = len(input), *[1] * (input.dim() - 1 - len(shape)), *shape
    if weight is not None:
        outputs = outputs * weight.view(member_shape)
    return outputs if bias is None else outputs + bias.view(member_shape), 0


class _LayerNorm(torch.autograd.Function):
    """Normalizes to mean 0 and variance 1 over the last axes, in passes that a CPU vectorizes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: list[int], eps: float) -> Tensor:
        axes = tuple(range(-len(shape), 0))
        mean = x.mean(axes, keepdim=True)
        centred = x - mean
        scale = centred.square().mean(axes, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, mean, scale)
        ctx.shape = shape
        return centred.mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, mean, scale = ctx.saved_tensors
        needed = [True, False, False]
        results = _norm_backward(gradient, x, ctx.shape, mean, scale, None, None, needed)
        return results[0], None, None


def _batch_norm(
    input: Tensor,
    running_mean: OptionalTensor,
    running_var: OptionalTensor,
    weight: OptionalTensor = None,
    bias: OptionalTensor = None,
    *args: Any,
    **kwargs: Any,
) -> WithAxis:
    """Compute the batch norms of all members as one batch norm over all their channels."""
    mean, var, factor, shift = (_flat(table) for table in (running_mean, running_var, weight, bias))
    outputs = functional.batch_norm(_by_channels(input), mean, var, factor, shift, *args, **kwargs)
    for before, after in ((running_mean, mean), (running_var, var)):
        # A stride of 0 means that all members share the statistics, and training leaves them
        # unchanged.
        if (
            before is not None
            and after is not None
            and before.stride(0)
            and before.data_ptr() != after.data_ptr()
        ):
            before.copy_(after.view(before.shape))
    return _by_members(outputs, len(input)), 1


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: OptionalTensor = None,
    bias: OptionalTensor = None,
    eps: float = 1e-5,
) -> WithAxis:
    """Compute the group norms of all members as one group norm with all their groups."""
    outputs = functional.group_norm(
        _by_channels(input), num_groups * len(input), _flat(weight), _flat(bias), eps
    )
    return _by_members(outputs, len(input)), 1


def _convolution(
    function: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: OptionalTensor = None,
    stride: object = 1,
    padding: object = 0,
    dilation: object = 1,
    groups: int = 1,
) -> WithAxis | None:
    """Compute the convolutions of all members as one grouped convolution over all their
    channels."""
    if input.dim() < weight.dim():  # a single image, without an axis of rows
        return None
    rows = _by_channels(input)
    # 2x to 4x faster in groups of few channels
    if rows.dim() == 4 and rows.device.type == "cpu":
        rows = rows.contiguous(memory_format=torch.channels_last)
        if rows.shape[1] == 1:  # both layouts at once: the strides say which one the outputs get
            rows = rows[:, 0, ..., None].movedim(-1, 1)
    outputs = function(
        rows, weight.flatten(0, 1), None, stride, padding, dilation, groups * len(input)
    )
    if bias is not None:  # separately, because the kernel for the gradient of a bias is slow
        outputs.add_(bias.flatten().view(-1, *[1] * (rows.dim() - 2)))
    return _by_members(outputs, len(input)), 1


def _pool(
    function: Callable[..., Tensor], input: Tensor, *args: Any, **kwargs: Any
) -> WithAxis | None:
    """Compute the poolings of all members as one pooling over all their channels."""
    if input.dim() < 5:  # a single image, without an axis of rows
        return None
    rows = _by_channels(input)
    outputs = function(rows, *args, **kwargs)
    if outputs.requires_grad and rows.is_contiguous(memory_format=torch.channels_last):
        # A gradient in another layout costs 6x as much.
        last = partial(Tensor.contiguous, memory_format=torch.channels_last)
        outputs.register_hook(last)  # type: ignore[no-untyped-call]
    return _by_members(outputs, len(input)), 1


def _adaptive_average(input: Tensor, output_size: Any) -> WithAxis | None:
    """Compute the adaptive average poolings of all members."""
    if output_size in (1, (1, 1), [1, 1]):
        # torch computes this mean too, but then changes its strides in place, which cannot be
        # recorded.
        return input.mean((-2, -1), keepdim=True), 0
    return _pool(functional.adaptive_avg_pool2d, input, output_size)


def _flat(table: OptionalTensor) -> OptionalTensor:
    """Flatten a table with one value per member and channel, (P, C) -> (P*C,)."""
    return None if table is None else table.reshape(-1)


def _by_channels(x: Tensor) -> Tensor:
    """Merge the member axis into the channel axis: (P, B, C, ...) -> (B, P*C, ...)."""
    return x.movedim(0, 1).flatten(1, 2)


def _by_members(rows: Tensor, members: int) -> Tensor:
    """Split the channel axis into members and channels: (B, P*C, ...) -> (B, P, C, ...)."""
    return rows.view(len(rows), members, -1, *rows.shape[2:])


_POOLS = functional.max_pool2d, functional.avg_pool2d
_RULES: dict[Callable[..., object], tuple[MemberRule, int]] = {
    functional.linear: (_linear, 1),
    functional.batch_norm: (_batch_norm, 0),
    functional.layer_norm: (_layer_norm, 0),
    functional.group_norm: (_group_norm, 0),
    **{f: (partial(_convolution, f), 1) for f in (torch.conv1d, torch.conv2d, torch.conv3d)},
    **{f: (partial(_pool, f), 0) for f in _POOLS},
    functional.adaptive_avg_pool2d: (_adaptive_average, 0),
}
"""Rules by torch function, with the index of the argument that must have a member axis. Index 0 is
the input and 1 the weight."""
