"""A user's module class under the engine's two keywords, of which it is given those that it has."""

import inspect
from collections.abc import Collection
from typing import Any

from torch import nn

from gputune.errors import InputError

_SIZES = ("n_features", "n_outputs")


class UserModule:
    """Builds ``module_class(**arguments)``, with ``n_features`` and ``n_outputs`` where its signature has them.

    Two of one class are equal. Raises InputError for what is no class of modules.
    """

    def __init__(self, module_class: Any) -> None:
        if isinstance(module_class, nn.Module):
            raise InputError(
                f"module must be the class, not an instance, since every fit builds its own: pass "
                f"{type(module_class).__name__}, and its arguments as module__*."
            )
        if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
            raise InputError(f"module must be a torch.nn.Module class, got {module_class!r}.")
        self.module_class = module_class
        # What an error calls it, and where a process that trains it finds it.
        self.__name__, self.__module__ = module_class.__name__, module_class.__module__
        own = inspect.signature(module_class).parameters
        self._takes_any = any(p.kind is p.VAR_KEYWORD for p in own.values())
        named = {name for name, p in own.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
        self._sizes = tuple(name for name in _SIZES if name in named or self._takes_any)
        self._arguments = named - set(_SIZES)
        # The engine passes arguments by name, and reads here which ones there are.
        self.__signature__ = inspect.Signature(
            [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in sorted(named | set(_SIZES))]
            + [p for p in own.values() if p.kind is p.VAR_KEYWORD]
        )

    def __call__(self, *, n_features: int, n_outputs: int, **arguments: Any) -> nn.Module:
        sizes = {"n_features": n_features, "n_outputs": n_outputs}
        module: nn.Module = self.module_class(**{name: sizes[name] for name in self._sizes}, **arguments)
        return module

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UserModule) and other.module_class is self.module_class

    def __hash__(self) -> int:
        return hash(self.module_class)

    def check_arguments(self, names: Collection[str]) -> None:
        """Raise InputError for an argument that the class has not, or that the data gives."""
        for name in names:
            if name in _SIZES:
                raise InputError(f"module__{name} is given by the data; leave it out.")
            if name not in self._arguments and not self._takes_any:
                signature = f"{self.__name__}{inspect.signature(self.module_class)}"
                raise InputError(f"module__{name} is no argument of {signature}; remove it or rename it.")
