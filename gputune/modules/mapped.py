"""Layers mapped over members in fewer operations than torch's own rules take: the same numbers and derivatives.

torch multiplies each bias of a linear layer by one and turns each gradient of a weight, and scales and shifts what a
batch norm or a convolution gives in passes of their own. Images lie as (B, P*C, ...) from one layer to the next, so
that nothing copies them between.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_current_functorch_interpreter
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_norm_backward = torch.ops.aten.native_layer_norm_backward.default

Axes = Sequence[int | None]
"""The axis of the members in each argument, None: it has none."""


class Mapped(TorchFunctionMode):
    """Maps the layers of this file by its own rules, here and in this thread alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _LAYERS.get(func, func)(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not _is_mapped(weight):
        return functional.linear(input, weight, bias)
    return _call_rule(_map_linear, input, weight, bias)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not _is_mapped(input):
        return functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _call_rule(_map_batch_norm, input, running_mean, running_var, weight, bias, training, momentum, eps)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    if not _is_mapped(input):
        return functional.layer_norm(input, normalized_shape, weight, bias, eps)
    return _call_rule(_map_layer_norm, input, weight, bias, normalized_shape, eps)


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    if not _is_mapped(input):
        return functional.group_norm(input, num_groups, weight, bias, eps)
    return _call_rule(_map_group_norm, input, weight, bias, num_groups, eps)


def _embedding(ids: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    if padding_idx is None or not _is_mapped(weight):
        return functional.embedding(ids, weight, padding_idx, *args, **kwargs)
    # torch's rule gives the row of the padding a gradient, which it has not.
    rows = functional.embedding(ids, weight, None, *args, **kwargs)
    return torch.where((ids == padding_idx % weight.shape[0])[..., None], rows.detach(), rows)


def _convolution(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def convolve(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        options = stride, padding, dilation, groups
        if not _is_mapped(weight) or input.dim() < weight.dim():  # one image, without an axis of rows
            return function(input, weight, bias, *options)
        return _call_rule(_map_convolution, function, input, weight, bias, *options)

    return convolve


def _pool(function: Callable[..., Tensor]) -> Callable[..., Any]:
    def pool(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        gives_indices = kwargs.get("return_indices") or len(args) > 5
        if not _is_mapped(input) or input.dim() < 4 or gives_indices:
            return function(input, *args, **kwargs)
        return _call_rule(_map_pool, function, input, args, kwargs)

    return pool


_LAYERS: dict[Any, Callable[..., Any]] = {
    functional.linear: _linear,
    functional.batch_norm: _batch_norm,
    functional.layer_norm: _layer_norm,
    functional.group_norm: _group_norm,
    functional.embedding: _embedding,
    torch.conv1d: _convolution(torch.conv1d),
    torch.conv2d: _convolution(torch.conv2d),
    torch.conv3d: _convolution(torch.conv3d),
    **{f: _pool(f) for f in (functional.max_pool2d, functional.avg_pool2d, functional.adaptive_avg_pool2d)},
}


def _is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor has an axis of members here, which no derivative of the user's own hides."""
    if not torch._C._functorch.is_batchedtensor(tensor):
        return False
    return retrieve_current_functorch_interpreter().key() == TransformType.Vmap


def _call_rule(rule: Callable[..., tuple[Tensor, int]], *args: Any) -> Tensor:
    """Call a rule with the number of members, their axes, and the arguments with those.

    As an ``autograd.Function`` with a rule for vmap does, at a tenth of the cost of its call.
    """
    interpreter = retrieve_current_functorch_interpreter()
    assert isinstance(interpreter, VmapInterpreter)
    level = interpreter.level()
    given = [torch._C._functorch._unwrap_batched(x, level) if isinstance(x, Tensor) else (x, None) for x in args]
    with interpreter.lower():
        result, axis = rule(interpreter.batch_size(), [axis for _, axis in given], *(x for x, _ in given))
    return torch._C._functorch._add_batch_dim(result, axis, level)


def _map_linear(members: int, axes: Axes, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
    first = [_first(t, axis, members) for t, axis in zip((x, weight, bias), axes)]
    shape, rows = first[0].shape[:-1], first[0].flatten(1, -2) if first[0].dim() > 2 else first[0][:, None]
    result: Tensor = _Linear.apply(rows, *first[1:])  # type: ignore[no-untyped-call]
    return result.view(*shape, -1), 0


class _Linear(torch.autograd.Function):
    """Rows (P, N, I), weights (P, O, I), biases (P, O) or None -> (P, N, O), with gradients that lie as the weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.bmm(weight.mT) if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            slope.bmm(weight) if wanted[0] else None,
            slope.mT.bmm(x) if wanted[1] else None,
            slope.sum(1) if wanted[2] else None,
        )


def _map_layer_norm(
    members: int, axes: Axes, x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Any, eps: float
) -> tuple[Tensor, int]:
    x = _first(x, axes[0], members)
    outputs: Tensor = _LayerNorm.apply(x, list(shape), eps)  # type: ignore[no-untyped-call]
    between = [1] * (x.dim() - 1 - len(shape))
    if weight is not None:
        outputs = outputs * _first(weight, axes[1], members).view(members, *between, *shape)
    if bias is not None:
        outputs = outputs + _first(bias, axes[2], members).view(members, *between, *shape)
    return outputs, 0


class _LayerNorm(torch.autograd.Function):
    """Numbers with mean 0 and variance 1 over the last axes, in passes that a CPU does in vectors."""

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
    def backward(ctx: Any, slope: Tensor) -> Any:
        x, mean, scale = ctx.saved_tensors
        wanted = [True, False, False]
        found = _norm_backward(slope, x, ctx.shape, mean, scale, None, None, wanted)
        return found[0], None, None


def _map_batch_norm(members: int, axes: Axes, x: Tensor, *given: Any) -> tuple[Tensor, int]:
    rows = _by_channels(x, axes[0], members)
    tables: list[Any] = [
        t if t is None else _first(t, axis, members).reshape(-1) for t, axis in zip(given[:4], axes[1:])
    ]
    outputs = functional.batch_norm(rows, *tables, *given[4:])
    for before, after, axis in zip(given[:2], tables, axes[1:]):  # running statistics
        if axis is not None and before.data_ptr() != after.data_ptr():
            before.copy_(after.view(members, -1).movedim(0, axis))
    return _by_members(outputs, members), 1


def _map_group_norm(
    members: int, axes: Axes, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, int]:
    rows = _by_channels(x, axes[0], members)
    tables: list[Any] = [
        t if t is None else _first(t, axis, members).reshape(-1) for t, axis in zip((weight, bias), axes[1:])
    ]
    outputs = functional.group_norm(rows, groups * members, tables[0], tables[1], eps)
    return _by_members(outputs, members), 1


def _map_convolution(
    members: int, axes: Axes, function: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any
) -> tuple[Tensor, int]:
    rows, weight = _by_channels(x, axes[1], members), _first(weight, axes[2], members).flatten(0, 1)
    if rows.dim() == 4 and rows.device.type == "cpu":  # two to four times as fast in groups of few channels
        rows = rows.contiguous(memory_format=torch.channels_last)
    outputs = function(rows, weight, None, *options[:-1], options[-1] * members)
    if bias is not None:  # apart, since the kernel for its gradient is slow
        outputs.add_(_first(bias, axes[3], members).flatten().view(-1, *[1] * (rows.dim() - 2)))
    return _by_members(outputs, members), 1


def _map_pool(members: int, axes: Axes, function: Any, x: Tensor, args: Any, kwargs: Any) -> tuple[Tensor, int]:
    rows = _by_channels(x, axes[1], members)
    outputs = function(rows, *args, **kwargs)
    if outputs.requires_grad and rows.is_contiguous(memory_format=torch.channels_last):
        outputs.register_hook(_with_channels_last)  # a slope that lies otherwise costs six times as much
    return _by_members(outputs, members), 1


def _first(tensor: Any, axis: int | None, members: int) -> Any:
    """Return a tensor with the members' axis first."""
    if tensor is None:
        return None
    return tensor.expand(members, *tensor.shape) if axis is None else tensor.movedim(axis, 0)


def _by_channels(x: Tensor, axis: int | None, members: int) -> Tensor:
    """Return rows (B, C, ...) of members as (B, P*C, ...)."""
    rows: Tensor = _first(x, axis, members)
    return rows.movedim(0, 1).flatten(1, 2)


def _by_members(rows: Tensor, members: int) -> Tensor:
    """Return rows (B, P*C, ...) as (B, P, C, ...)."""
    return rows.view(len(rows), members, -1, *rows.shape[2:])


def _with_channels_last(slope: Tensor) -> Tensor:
    return slope.contiguous(memory_format=torch.channels_last)
