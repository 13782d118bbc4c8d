"""The precision of a module: of its tensors, and bfloat16 while it trains, where what torch.autocast rounds is rounded.

Through vmap autocast reaches some operations and others not (in torch 2.13), so that stacked members have a mode
of their own. Parameters, buffers and updates stay in single precision, and so does the loss of a module's outputs.
Source: https://docs.pytorch.org/docs/stable/amp.html#autocast-op-reference
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from gputune.types import Precision


def converted(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give the floats of a module a dtype, in place; complex numbers keep their imaginary parts, unlike by ``to``."""

    def convert(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(dtype.to_complex())
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    module._apply(convert)  # type: ignore[no-untyped-call]
    return module


_PRODUCTS: set[Callable[..., Any]] = {
    F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    F.scaled_dot_product_attention, torch.matmul, torch.mm, torch.bmm, torch.mv, torch.addmm, torch.baddbmm,
    torch.addmv, torch.einsum, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__, Tensor.__rmatmul__,
}  # fmt: skip
_WIDE: set[Callable[..., Any]] = {
    F.layer_norm, F.group_norm, F.softmax, F.log_softmax, F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss,
    F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy_with_logits, F.kl_div, F.normalize, F.cosine_similarity,
    torch.softmax, torch.log_softmax, Tensor.softmax, Tensor.log_softmax, torch.exp, Tensor.exp, torch.log, Tensor.log,
    torch.logsumexp, Tensor.logsumexp, torch.sum, Tensor.sum, torch.pow, Tensor.pow, torch.rsqrt, Tensor.rsqrt,
}  # fmt: skip


class Rounded(TorchFunctionMode):
    """Does as torch.autocast does: products take bfloat16, what sums or grows takes single precision."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            args, kwargs = _cast((args, kwargs), torch.float32, torch.bfloat16)
        elif func in _WIDE:
            args, kwargs = _cast((args, kwargs), torch.bfloat16, torch.float32)
        elif func is F.batch_norm and args[0].dtype == torch.bfloat16:  # statistics are of single precision
            return func(args[0].float(), *args[1:], **kwargs).bfloat16()
        return func(*args, **kwargs)


def _cast(values: object, before: torch.dtype, after: torch.dtype) -> Any:
    """Return nested arguments with the tensors of one type in another."""
    return tree_map(lambda v: v.to(after) if isinstance(v, Tensor) and v.dtype == before else v, values)


def rounded(precision: Precision) -> AbstractContextManager[Any]:
    """Compute in a precision inside, of members that are stacked."""
    return Rounded() if precision == "bf16" else nullcontext()


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Compute in a precision inside, of a plain module: torch.autocast itself."""
    return nullcontext() if precision == "full" else torch.autocast(device.type, torch.bfloat16)
