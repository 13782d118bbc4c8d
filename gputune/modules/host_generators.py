"""Names and states of random generators other than PyTorch's default generator.

gputune can seed only PyTorch's default generator separately for each step of all members.
"""

import functools
import os
import pickle
import random
import secrets
import sys
import types
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias, TypeGuard, TypeVar

import numpy as np
import torch
from torch import nn

GENERATORS = (
    random.Random,
    np.random.RandomState,
    np.random.Generator,
    np.random.BitGenerator,
    torch.Generator,
)
_SEEDED_CLASSES = (random.Random, np.random.RandomState, np.random.BitGenerator)
"""Classes of random generators that a user's code may instantiate."""
_MODULES = (random, np.random, secrets)

_FUNCTIONS: dict[object, str] = {
    os.urandom: "os.urandom",
    uuid.uuid1: "uuid.uuid1",
    uuid.uuid4: "uuid.uuid4",
    np.random.default_rng: "numpy.random.default_rng",
    np.random.seed: "numpy.random.seed",
    **{getattr(secrets, name): f"secrets.{name}" for name in secrets.__all__},
}

_LIBRARIES = {"torch", "numpy", "scipy", "sklearn", "pandas", "polars", "functorch", "gputune"}
"""Packages with code that gputune does not inspect. gputune does not inspect the standard library
either."""
_MOST_ITEMS = 100  # items of a container that are looked at
Instance = TypeVar("Instance")

Env: TypeAlias = dict[str, object]
"""The known values of local variables, by name."""


def generator_states(module: nn.Module, functions: Iterable[object] = ()) -> dict[str, bytes]:
    """Return the states of all random generators that are not PyTorch's default generator, by name.

    These are the global generators of Python and NumPy, and the generators that a module or a
    function holds. A module holds a generator as an attribute, or in a list or dict there. A
    function holds a generator in its closure or its file.
    """
    states = {
        "Python's random": pickle.dumps(random.getstate()),
        "numpy.random": pickle.dumps(np.random.get_state(legacy=False)),
    }
    for number, generator in enumerate(_held_generators(module, functions)):
        state = _state_of(generator)
        if state is not None:
            states[f"a {_kind_of(generator)} of its own {number}"] = state
    return states


def changed_generator(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> str:
    """Return the name of the first random generator with a changed state, or "" if all states are
    equal."""
    for name, state in after.items():
        if before.get(name, state) != state:
            return name.rstrip("0123456789 ")
    return ""


def _held_generators(module: nn.Module, functions: Iterable[object]) -> Iterator[object]:
    """Yield each random generator that the module or the functions hold, once."""
    seen: set[int] = set()
    holders = []
    forwards: dict[type, object] = {}
    for part in module.modules():
        holders.append(vars(part))
        forwards[type(part)] = getattr(type(part), "forward", None)
    for function in (*forwards.values(), *functions):
        inner = function.func if is_a(function, functools.partial) else function
        if is_a(inner, types.FunctionType) and not is_library(inner):
            holders += [inner.__globals__, closure_of(inner)]
    for holder in holders:
        for value in list(holder.values()):
            for item in (value, *items_of(value)):
                if is_a(item, *GENERATORS) and id(item) not in seen:
                    seen.add(id(item))
                    yield item


def is_a(value: object, *kinds: type[Instance]) -> TypeGuard[Instance]:
    """Return whether a value's type is one of the classes ``kinds``, or a subclass of one.

    The function ``isinstance`` would also ask the value for its ``__class__``, which may run the
    user's code.
    """
    return issubclass(type(value), kinds)


def items_of(value: object) -> list[object]:
    """Return the first items of a plain dict, list, tuple or set. Return an empty list for other
    values."""
    if type(value) is dict:
        return list(value.values())[:_MOST_ITEMS]
    if type(value) is list or type(value) is tuple or type(value) is set:
        return list(value)[:_MOST_ITEMS]
    return []


def _state_of(generator: object) -> bytes | None:
    """Return a random generator's state as bytes, or None if the operating system makes its
    numbers."""
    if isinstance(generator, torch.Generator):
        if generator is torch.default_generator:
            return None
        return generator.get_state().numpy().tobytes()
    if isinstance(generator, np.random.RandomState):
        return pickle.dumps(generator.get_state(legacy=False))
    if isinstance(generator, np.random.Generator):
        generator = generator.bit_generator
    if isinstance(generator, np.random.BitGenerator):
        return pickle.dumps(generator.state)
    if isinstance(generator, random.SystemRandom):
        return None
    assert isinstance(generator, random.Random)
    return pickle.dumps(generator.getstate())


def _kind_of(generator: object) -> str:
    """Return the full name of a random generator's class, such as numpy.random.Generator."""
    name = next(kind.__name__ for kind in GENERATORS if isinstance(generator, kind))
    package = "numpy.random"
    if isinstance(generator, random.Random):
        package = "random"
    elif isinstance(generator, torch.Generator):
        package = "torch"
    return f"{package}.{name}"


def source_name(value: object) -> str:
    """Return the name of a function, class or generator that makes random numbers outside of
    PyTorch's default generator.

    The result is "" for any other value.
    """
    if value is torch.default_generator:
        return ""
    if is_a(value, *GENERATORS):
        return f"a {_kind_of(value)}"
    if is_a(value, type):
        return f"{value.__module__}.{value.__name__}" if issubclass(value, _SEEDED_CLASSES) else ""
    if is_a(value, types.ModuleType):
        return value.__name__ if any(module is value for module in _MODULES) else ""
    for function, name in _FUNCTIONS.items():
        if function is value:
            return name
    if not is_a(value, types.BuiltinFunctionType, types.MethodType):
        return ""
    owner = getattr(value, "__self__", None)
    if not is_a(owner, *GENERATORS) or owner is torch.default_generator:
        return ""
    name = getattr(value, "__name__", "")
    if getattr(random, name, None) == value:
        return f"random.{name}"
    if getattr(np.random, name, None) == value:
        return f"numpy.random.{name}"
    return f"{_kind_of(owner)}.{name}"


def is_library(function: types.FunctionType) -> bool:
    """Return whether a function belongs to Python's standard library or to a package in
    ``_LIBRARIES``."""
    top = str(function.__globals__.get("__name__", "")).partition(".")[0]
    return top in _LIBRARIES or (top in sys.stdlib_module_names and top != "__main__")


def closure_of(function: types.FunctionType) -> Env:
    """Return the values of a function's closure variables. Unset variables are left out."""
    values: Env = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        try:
            values[name] = cell.cell_contents
        except ValueError:  # a variable that is not set yet
            continue
    return values
