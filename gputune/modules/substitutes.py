"""Operations in place of those that torch cannot map over members: the same numbers and derivatives."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_fused = functional.scaled_dot_product_attention


class Substitutes(TorchFunctionMode):
    """Puts other operations in the place of a module's, here and in this thread alone.

    ``nn.MultiheadAttention`` takes a fast path in evaluation where it sees no tensor that requires a gradient, and
    through vmap it sees none; that path has no derivative and no batching rule. It takes none within a mode such as
    this. The fused kernel of a CPU has no batching rule either, and would be called member by member.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward and not kwargs.get("need_weights", True):
            return func(*args, **{**kwargs, "need_weights": True})[
                0
            ], None  # the mode does not reach what it calls
        if func is _fused and args[0].device.type == "cpu":
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return ``functional.scaled_dot_product_attention`` of the same arguments."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    if attn_mask is not None or is_causal or enable_gqa:
        result: Tensor = torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
        return result
    # Its softmax looks for rows that a mask leaves empty, at five times the cost, and none is empty here.
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    weights = ((query * scale) @ key.mT).softmax(-1)
    return functional.dropout(weights, dropout_p) @ value if dropout_p else weights @ value
