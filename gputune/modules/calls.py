"""A module called with other tensors in the place of its own, and left as it was; in bfloat16; its numbers as tensors.

Where it trains in bfloat16, what torch.autocast rounds is rounded. Through vmap autocast reaches some operations and
others not (in torch 2.13), so that stacked members have a mode of their own. Parameters, buffers and updates stay in
single precision, and so does the loss of a module's outputs.
Source: https://docs.pytorch.org/docs/stable/amp.html#autocast-op-reference
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only


class Stateless:
    """A module as it is now; ``substitute`` lends it other tensors, and puts back all that was set meanwhile.

    That is the attributes of every submodule: parameters, buffers, hooks, the mode, and what a forward keeps in
    ``self`` or in a dict, list or set there. Tensors that are written into in place stay so.
    """

    # Not torch.func.functional_call, which leaves the second value in a submodule that has two names.

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._attributes = [(vars(part), dict(vars(part))) for part in module.modules()]
        held = (value for _, attributes in self._attributes for value in attributes.values())
        self._containers = [(v, v.copy()) for v in held if isinstance(v, dict | list | set)]
        names = {id(t): name for name, t in chain(module.named_parameters(), module.named_buffers())}
        self._places: list[tuple[Any, str, Tensor, str]] = [
            (tensors, key, tensor, names[id(tensor)])
            for part in module.modules()
            for tensors in (part._parameters, part._buffers)
            for key, tensor in tensors.items()
            if tensor is not None
        ]

    @contextmanager
    def substitute(self, tensors: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """Put ``tensors`` in the place of parameters and buffers of the same names inside, under all their names."""
        try:
            for held, key, _, name in self._places:
                if name in tensors:
                    held[key] = tensors[name]
            yield self.module
        finally:
            for attributes, before in self._attributes:
                for name in attributes.keys() - before.keys():
                    del attributes[name]
                attributes.update(before)
            for value, members in self._containers:
                if value or members:
                    value.clear()
                    (value.extend if isinstance(value, list) else value.update)(members)
            for held, key, tensor, _ in self._places:  # a scripted module holds them in no dict
                held[key] = tensor

    def held(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the tensors that stand under some names now: what a forward has written, inside ``substitute``."""
        wanted = set(names)
        return {name: held[key] for held, key, _, name in self._places if name in wanted}


def not_trained(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers and the frozen parameters of a module."""
    frozen = {name: w for name, w in module.named_parameters() if not w.requires_grad}
    return frozen | dict(module.named_buffers())


def state_of(module: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the buffers, frozen parameters and Python numbers of some names, the numbers as tensors."""
    found = {}
    for name in names:
        value = attrgetter(name)(module)
        if not isinstance(value, Tensor):
            value = torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
        found[name] = value.detach()
    return found


def put_numbers(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give the Python numbers among some names their values; tensors are left as they are."""
    for name, value in values.items():
        if not isinstance(before := attrgetter(name)(module), Tensor):
            path, _, key = name.rpartition(".")
            setattr(module.get_submodule(path), key, type(before)(value.item()))


def convert(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give the floats of a module a dtype, in place; complex numbers keep their imaginary parts, unlike by ``to``."""

    def cast(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(dtype.to_complex())
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    module._apply(cast)  # type: ignore[no-untyped-call]
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
        if func is F.batch_norm and args[0].dtype == torch.bfloat16:  # statistics are of single precision
            return func(args[0].float(), *args[1:], **kwargs).bfloat16()
        if func in _PRODUCTS or func in _WIDE:
            pair = torch.float32, torch.bfloat16
            before, after = pair if func in _PRODUCTS else pair[::-1]

            def cast(x: Tensor) -> Tensor:
                return x.to(after) if x.dtype == before else x

            args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
        return func(*args, **kwargs)
