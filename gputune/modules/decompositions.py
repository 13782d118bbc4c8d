"""Simpler operations for the operations of a training step that have no C code.

Most of them are PyTorch's own decompositions, which torch.export uses too. This file has the
decompositions that PyTorch lacks, or that the C code computes faster. Each function takes the
arguments of the torch operation with the same name.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._decomp import decomposition_table

from gputune.modules.kernels.table import is_coded
from gputune.modules.trace import Args, Function, Kwargs, Operator, arguments_of, mapped_leaves

aten = torch.ops.aten


def decomposition(func: Operator, args: Args, kwargs: Kwargs) -> Function | None:
    """Return the function that computes an operation by simpler operations, or None if C code
    computes the operation itself."""
    name = str(func.overloadpacket.__name__)
    if func.namespace == "prims":
        return getattr(func, "impl_aten", None)
    if name in OWN:
        return OWN[name]
    simple = name.removesuffix("_")
    if simple in OWN:
        return partial(_in_place, OWN[simple])
    if is_coded(simple, arguments_of(func, args, kwargs)):
        return None
    if func._can_decompose():
        return func.decompose
    if func.is_view:
        return None
    if name.endswith("_") and hasattr(aten, simple):
        packet = getattr(aten, simple)
        return partial(_in_place, getattr(packet, func._overloadname, packet.default))
    simpler: Function | None = decomposition_table.get(func)
    return simpler


def _in_place(function: Function, target: Tensor, *args: object, **kwargs: object) -> Tensor:
    """Write the result of a function into its first argument."""
    return target.copy_(function(target, *args, **kwargs))


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    parts = [part for part in tensors if part.shape != (0,)] or tensors[:1]
    shape = list(parts[0].shape)
    sizes = [part.shape[dim] for part in parts]
    shape[dim] = sum(sizes)
    dtype = reduce(torch.promote_types, [part.dtype for part in parts])
    result = parts[0].new_empty(shape, dtype=dtype)
    for target, part in zip(torch.split(result, sizes, dim), parts):
        target.copy_(part)
    return result


def _flip(x: Tensor, dims: Sequence[int]) -> Tensor:
    for dim in dims:
        x = x.index_select(dim, torch.arange(x.shape[dim] - 1, -1, -1))
    return x


def _repeat(x: Tensor, repeats: Sequence[int]) -> Tensor:
    x = x.reshape((1,) * (len(repeats) - x.dim()) + x.shape)
    for axis, times in enumerate(repeats):
        x = torch.stack([x] * times, axis).flatten(axis, axis + 1)
    return x


def _roll(x: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Tensor:
    for shift, dim in zip(shifts, dims, strict=True):
        last = shift % max(1, x.shape[dim])
        x = torch.cat([x.narrow(dim, -last, last), x.narrow(dim, 0, x.shape[dim] - last)], dim)
    return x


def _select_backward(grad: Tensor, input_sizes: Sequence[int], dim: int, index: int) -> Tensor:
    result = grad.new_zeros(input_sizes)
    result.select(dim, index).copy_(grad)
    return result


def _slice_backward(
    grad: Tensor, input_sizes: Sequence[int], dim: int, start: int, end: int, step: int
) -> Tensor:
    result = grad.new_zeros(input_sizes)
    aten.slice.Tensor(result, dim, start, end, step).copy_(grad)
    return result


Sorted: TypeAlias = tuple[Tensor, Tensor]
"""Sorted numbers, and the index of each number in front of the sort."""


def _ranked(x: Sorted, rank: int, dim: int, keepdim: bool) -> Sorted:
    """Return the sorted numbers at one rank, which counts from 1, and their indices."""
    values, index = [part.narrow(dim, rank - 1, 1) for part in x]
    return (values, index) if keepdim else (values.squeeze(dim), index.squeeze(dim))


def _kthvalue(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> Sorted:
    return _ranked(x.sort(dim), k, dim, keepdim)


def _median(x: Tensor, dim: int, keepdim: bool = False) -> Sorted:
    size = x.shape[dim]
    ordered = x.sort(dim)
    values, index = _ranked(ordered, (size + 1) // 2, dim, keepdim)
    # NaN is the last of the sorted numbers, and then the median.
    last, last_index = _ranked(ordered, size, dim, keepdim)
    is_nan = last.isnan()
    return torch.where(is_nan, last, values), torch.where(is_nan, last_index, index)


def _topk(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Sorted:
    values, index = x.sort(dim, descending=largest)
    return values.narrow(dim, 0, k), index.narrow(dim, 0, k)


def _with_contiguous(function: Function, *args: Any, **kwargs: Any) -> Any:
    """Call an operation with contiguous copies of its tensors."""
    args, kwargs = mapped_leaves((args, kwargs), Tensor, Tensor.contiguous)
    return function(*args, **kwargs)


def _resized(
    function: Callable[[Tensor], Tensor], image: Sequence[int], x: Tensor, is_gradient: bool
) -> Tensor:
    """Apply a linear map of images or sequences, such as an average pooling or an interpolation.

    The map is a matrix on the rows of an image and another matrix on its columns. ``function``
    applies it to images of the sizes ``image``. The gradient multiplies with the transposes.
    """
    height, width = (1, *image)[-2:]
    with torch._C._DisableTorchDispatch():  # the matrices are constants of the step
        across = function(_unit_images(width, image, -1))[:, 0].to(x.dtype)
        if len(image) == 2:
            # The images of one matrix have ones along the other axis, so each of these matrices
            # is multiplied with a sum of the other matrix. The sums are divided out again.
            down = function(_unit_images(height, image, -2))[:, 0].to(x.dtype)
            row = down.shape[1] // 2
            column = down.shape[2] // 2
            down = down[:, :, column].contiguous()
            across = across[:, row] / down[:, row].sum()
    if is_gradient:
        across = across.T
    result = x @ across
    if len(image) == 2:
        down = down.T if is_gradient else down
        result = (result.mT.contiguous() @ down).mT
    return result.contiguous()


def _unit_images(size: int, image: Sequence[int], axis: int) -> Tensor:
    """Return ``size`` images: image i has ones at position i of an axis, and zeros elsewhere."""
    shape = [size, 1, *[1] * len(image)]
    shape[axis] = size
    ones = torch.eye(size, dtype=torch.float64).view(shape)
    return ones.expand(size, 1, *image).contiguous()


def _of_image(function: Function, x: Tensor, *args: Any) -> Tensor:
    """Compute an average pooling or an interpolation of images."""
    axes = 1 if "1d" in function.__name__ else 2
    return _resized(lambda images: function(images, *args), x.shape[-axes:], x, False)


def _average_gradient(gradient: Tensor, x: Tensor, *args: Any) -> Tensor:
    """The gradient of an average pooling."""
    return _resized(lambda images: aten.avg_pool2d(images, *args), x.shape[-2:], gradient, True)


def _adaptive_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of an average pooling with adaptive windows."""
    size = gradient.shape[-2:]

    def pool(images: Tensor) -> Tensor:
        result: Tensor = aten._adaptive_avg_pool2d(images, size)
        return result

    return _resized(pool, x.shape[-2:], gradient, True)


def _interpolation_gradient(
    function: Function,
    gradient: Tensor,
    output_size: Sequence[int],
    input_size: Sequence[int],
    *args: Any,
) -> Tensor:
    """The gradient of an interpolation."""

    def interpolate(images: Tensor) -> Tensor:
        result: Tensor = function(images, output_size, *args)
        return result

    return _resized(interpolate, input_size[2:], gradient, True)


def _weight_norm_interface_backward(
    grad_w: Tensor, saved_v: Tensor, saved_g: Tensor, saved_norms: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    axes = [axis for axis in range(saved_v.dim()) if axis != dim % saved_v.dim()]
    along = (grad_w * saved_v).sum(axes, keepdim=True)
    norms = saved_norms.view_as(along)
    direction = grad_w - saved_v * (along / (norms * norms))
    return direction * (saved_g.view_as(along) / norms), (along / norms).view_as(saved_g)


def _trilinear(
    i1: Tensor,
    i2: Tensor,
    i3: Tensor,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    unroll_dim: int = 1,
) -> Tensor:
    """Products of two tensors at a time, as an einsum."""
    del unroll_dim  # how torch computes it
    dims = i1.dim() + len(expand1)
    letters = "abcdefghijklmnopqrstuvwxyz"[:dims]
    terms = []
    for expand in (expand1, expand2, expand3):
        expanded = {axis % dims for axis in expand}
        terms.append("".join(x for axis, x in enumerate(letters) if axis not in expanded))
    summed = {axis % dims for axis in sumdim}
    result = "".join(x for axis, x in enumerate(letters) if axis not in summed)
    # the first two may have axes that only the third one sums over
    used = set(terms[2]) | set(result)
    between = "".join(x for x in letters if x in set(terms[0]) | set(terms[1]) and x in used)
    first = torch.einsum(f"{terms[0]},{terms[1]}->{between}", i1, i2)
    return torch.einsum(f"{between},{terms[2]}->{result}", first, i3)


def _cdist_forward(x1: Tensor, x2: Tensor, p: float, compute_mode: int | None = None) -> Tensor:
    del compute_mode  # torch multiplies matrices only in operations in front of this one
    apart = x1[..., :, None, :] - x2[..., None, :, :]
    distances: Tensor = torch.linalg.vector_norm(apart, p, -1)
    return distances


def _cdist_backward(grad: Tensor, x1: Tensor, x2: Tensor, p: float, cdist: Tensor) -> Tensor:
    apart = x1[..., :, None, :] - x2[..., None, :, :]
    length = cdist[..., None]
    if p == 2:
        slope = apart / length
    elif p == 1:
        return (grad[..., None] * apart.sign()).sum(-2)
    elif p == math.inf:
        return (grad[..., None] * apart.sign() * (apart.abs() == length)).sum(-2)
    else:
        slope = apart.sign() * (apart.abs() / length).pow(p - 1)
    slope = torch.where(length == 0, 0, slope)
    return (grad[..., None] * slope).sum(-2)


def _bags_of(indices: Tensor, offsets: Tensor, include_last_offset: bool) -> tuple[Tensor, int]:
    """Return the bag of each index, and the number of bags."""
    if include_last_offset:
        offsets = offsets[:-1]
    places = torch.arange(indices.numel(), dtype=offsets.dtype)
    return (places[:, None] >= offsets).sum(1) - 1, offsets.numel()


def _embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if mode == 2 or padding_idx >= 0 or scale_grad_by_freq or sparse:
        raise NotImplementedError
    bags, n_bags = _bags_of(indices, offsets, include_last_offset)
    rows = weight.index_select(0, indices)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[:, None]
    sums = weight.new_zeros(n_bags, weight.shape[1]).index_add(0, bags, rows)
    sizes = torch.zeros_like(offsets[:n_bags]).index_add(0, bags, torch.ones_like(bags))
    if mode == 1:
        sums = sums / sizes.clamp_min(1)[:, None].to(weight.dtype)
    return sums, bags, sizes, torch.zeros_like(sizes)


def _embedding_bag_backward(
    grad: Tensor,
    indices: Tensor,
    offsets: Tensor,
    offset2bag: Tensor,
    bag_size: Tensor,
    maximum_indices: Tensor,
    num_weights: int,
    scale_grad_by_freq: bool,
    mode: int,
    sparse: bool,
    per_sample_weights: Tensor | None,
    padding_idx: int = -1,
) -> Tensor:
    if mode == 2 or padding_idx >= 0 or scale_grad_by_freq or sparse:
        raise NotImplementedError
    bags, _ = _bags_of(indices, offsets, False)
    rows = grad.index_select(0, bags)
    if mode == 1:
        rows = rows / (bags[:, None] == bags).sum(1, keepdim=True).to(grad.dtype)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[:, None]
    return grad.new_zeros(num_weights, grad.shape[1]).index_add(0, indices, rows)


def _embedding_renorm(self: Tensor, indices: Tensor, max_norm: float, norm_type: float) -> Tensor:
    is_used = torch.zeros_like(self[:, 0]).index_fill(0, indices.flatten(), 1.0)
    norms = torch.linalg.vector_norm(self, norm_type, 1)
    is_long = (norms > max_norm) & (is_used > 0)
    return self * torch.where(is_long, max_norm / (norms + 1e-7), 1.0)[:, None]


def _multi_margin_loss_backward(
    grad_output: Tensor,
    self: Tensor,
    target: Tensor,
    p: float,
    margin: float,
    weight: Tensor | None = None,
    reduction: int = 1,
) -> Tensor:
    if self.dim() != 2:
        raise NotImplementedError
    rows, classes = self.shape
    chosen = self.gather(1, target[:, None])
    excess = margin - chosen + self
    slope = (excess > 0).to(self.dtype) * (1 if p == 1 else 2 * excess) / classes
    if weight is not None:
        slope = slope * weight.index_select(0, target)[:, None]
    is_other = torch.arange(classes) != target[:, None]
    slope = torch.where(is_other, slope, 0.0)
    slope = torch.where(is_other, slope, -slope.sum(1, keepdim=True))
    if reduction == 0:
        return slope * grad_output[:, None]
    return slope * (grad_output / rows if reduction == 1 else grad_output)


_INTERPOLATIONS = (
    "upsample_nearest1d",
    "upsample_nearest2d",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
)

OWN: dict[str, Function] = {
    "cat": _cat,
    "flip": _flip,
    "native_layer_norm_backward": partial(_with_contiguous, aten.native_layer_norm_backward),
    "repeat": _repeat,
    "roll": _roll,
    "select_backward": _select_backward,
    "slice_backward": _slice_backward,
    "kthvalue": _kthvalue,
    "median": _median,
    "topk": _topk,
    "avg_pool2d_backward": _average_gradient,
    "_adaptive_avg_pool2d_backward": _adaptive_gradient,
    "_weight_norm_interface_backward": _weight_norm_interface_backward,
    "_trilinear": _trilinear,
    "_cdist_forward": _cdist_forward,
    "_cdist_backward": _cdist_backward,
    "_embedding_bag": _embedding_bag,
    "_embedding_bag_forward_only": _embedding_bag,
    "_embedding_bag_backward": _embedding_bag_backward,
    "embedding_renorm": _embedding_renorm,
    "multi_margin_loss_backward": _multi_margin_loss_backward,
}
"""Decompositions by the names of the operations in torch, without the "_" of writing operations."""
for _name in ("avg_pool2d", "_adaptive_avg_pool2d", *_INTERPOLATIONS):
    OWN[_name] = partial(_of_image, getattr(aten, _name))
for _name in _INTERPOLATIONS:
    OWN[f"{_name}_backward"] = partial(_interpolation_gradient, getattr(aten, _name))
