"""A module called with other tensors in the place of its own, and left as it was; Python numbers in it as tensors."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


class Stateless:
    """A module as it is now; ``holding`` lends it other tensors, and puts back all that was set meanwhile.

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
    def holding(self, tensors: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """Put ``tensors`` in the place of parameters and buffers of the same names inside, under all their names.

        Names are those of ``named_parameters()`` and ``named_buffers()``.
        """
        try:
            for held, key, _, name in self._places:
                if name in tensors:
                    held[key] = tensors[name]
            yield self.module
        finally:
            self._put_back()

    def held(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the tensors that stand under some names now: what a forward has written there, inside ``holding``."""
        wanted = set(names)
        return {name: held[key] for held, key, _, name in self._places if name in wanted} if wanted else {}

    def _put_back(self) -> None:
        for attributes, before in self._attributes:
            for name in attributes.keys() - before.keys():
                del attributes[name]
            attributes.update(before)
        for value, members in self._containers:
            if value or members:
                value.clear()
                _extend(value, members)
        for held, key, tensor, _ in self._places:  # a scripted module holds them in no dict
            held[key] = tensor


def _extend(container: Any, members: Any) -> None:
    if isinstance(container, list):
        container.extend(members)
    else:
        container.update(members)


def not_trained(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers and the frozen parameters of a module."""
    frozen = {name: w for name, w in module.named_parameters() if not w.requires_grad}
    return frozen | dict(module.named_buffers())


def kept_of(module: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the buffers, frozen parameters and Python numbers of some names, the numbers as tensors."""
    tensors = not_trained(module)
    return {k: tensors[k].detach() if k in tensors else _as_tensor(_number(module, k)) for k in names}


def put_numbers(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give the Python numbers among some names their values; tensors are left as they are."""
    tensors = not_trained(module)
    for name, value in values.items():
        if name not in tensors:
            path, _, key = name.rpartition(".")
            kind = type(_number(module, name))
            setattr(module.get_submodule(path), key, kind(value.item()))


def _as_tensor(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.int64 if isinstance(number, int) else torch.float64)


def _number(module: nn.Module, name: str) -> float:
    path, _, key = name.rpartition(".")
    number: float = getattr(module.get_submodule(path), key)
    return number
