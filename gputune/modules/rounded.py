"""Rounds a user's module to bfloat16 in training, as torch.autocast does.

Under vmap, autocast reaches only some operations (in torch 2.13), so stacked members have their own
mode. Parameters, buffers and updates stay in single precision, and so does the loss of a module's
outputs.

Source: https://docs.pytorch.org/docs/stable/amp.html#autocast-op-reference
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from gputune.modules.trace import Args, Function, Kwargs


def _functions(owner: object, names: str) -> set[Callable[..., object]]:
    """Return the functions of a module or class with the names in ``names``, separated by
    blanks."""
    return {getattr(owner, name) for name in names.split()}


# Operations that autocast computes in bfloat16.
_PRODUCTS = (
    _functions(F, "linear bilinear conv1d conv2d conv3d scaled_dot_product_attention")
    | _functions(F, "conv_transpose1d conv_transpose2d conv_transpose3d")
    | _functions(torch, "matmul mm bmm mv addmm baddbmm addmv einsum")
    | _functions(Tensor, "matmul mm bmm __matmul__ __rmatmul__")
)
# Operations that autocast computes in single precision.
_POINTWISE = "softmax log_softmax exp log logsumexp sum pow rsqrt prod trace"
# Most of these operations support no bfloat16 on a CPU.
_FOURIER = (
    "fft ifft fft2 ifft2 fftn ifftn rfft irfft rfft2 irfft2 rfftn irfftn hfft ihfft "
    "hfft2 ihfft2 hfftn ihfftn"
)
_DECOMPOSITIONS = (
    "cholesky cholesky_ex cond eig eigh eigvals eigvalsh householder_product inv inv_ex lstsq "
    "matrix_rank qr solve svd svdvals tensorinv tensorsolve"
)
_OF_MATRICES = "cholesky cholesky_inverse cholesky_solve inverse lu_solve qr quantile svd"
_WIDE = (
    _functions(F, "layer_norm group_norm softmax log_softmax normalize cosine_similarity")
    | _functions(F, "cross_entropy nll_loss mse_loss l1_loss smooth_l1_loss huber_loss kl_div")
    | _functions(F, "binary_cross_entropy_with_logits binary_cross_entropy grid_sample")
    | _functions(torch.fft, _FOURIER)
    | _functions(torch.linalg, _DECOMPOSITIONS)
    | _functions(torch, f"{_OF_MATRICES} cdist view_as_complex")
    | _functions(Tensor, _OF_MATRICES)
    | _functions(torch, _POINTWISE)
    | _functions(Tensor, _POINTWISE)
)


class Rounded(TorchFunctionMode):
    """Inside the context, PyTorch computes the same operations in bfloat16 as under torch.autocast.

    This also works under vmap. PyTorch computes products in bfloat16. It computes sums, norms,
    losses, softmax and functions such as exp in single precision.
    """

    def __torch_function__(
        self, func: Function, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        # The statistics of a batch norm are in single precision.
        if func is F.batch_norm and args[0].dtype == torch.bfloat16:
            return func(args[0].float(), *args[1:], **kwargs).bfloat16()
        cast = _to_bfloat16 if func in _PRODUCTS else _to_float32 if func in _WIDE else None
        if cast is not None:
            args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
        return func(*args, **kwargs)


def _to_bfloat16(x: Tensor) -> Tensor:
    """Convert a tensor in single precision to bfloat16. Other tensors are returned unchanged."""
    return x.bfloat16() if x.dtype == torch.float32 else x


def _to_float32(x: Tensor) -> Tensor:
    """Convert a bfloat16 tensor to single precision. Other tensors are returned unchanged."""
    return x.float() if x.dtype == torch.bfloat16 else x
