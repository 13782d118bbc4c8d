"""Simpler operations for operations that have neither C code nor a decomposition in PyTorch.

Each function takes the arguments of the torch operation with the same name.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gputune.modules.trace import Function

aten = torch.ops.aten


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


def embedding_renorm(self: Tensor, indices: Tensor, max_norm: float, norm_type: float) -> Tensor:
    is_used = torch.zeros_like(self[:, 0]).index_fill(0, indices.flatten(), 1.0)
    norms = torch.linalg.vector_norm(self, norm_type, 1)
    is_long = (norms > max_norm) & (is_used > 0)
    return self * torch.where(is_long, max_norm / (norms + 1e-7), 1.0)[:, None]


def multi_margin_loss_backward(
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


OWN: dict[str, Function] = {
    function.__name__: function
    for function in (
        _weight_norm_interface_backward,
        _trilinear,
        _cdist_forward,
        _cdist_backward,
        _embedding_bag,
        _embedding_bag_backward,
        embedding_renorm,
        multi_margin_loss_backward,
    )
}
OWN["_embedding_bag_forward_only"] = _embedding_bag
"""Decompositions by the names of the operations in torch, without the "_" of writing operations."""
