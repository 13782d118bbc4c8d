"""What a study knows a function of the user's own by: its source, and the values that it holds."""

import functools
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_OF_MODULES = frozenset(vars(nn.Module()))
"""The attributes that each module of torch's has."""


def source_text(function: Any) -> str:
    """Return the source of a function or class, else a function's bytecode; "" where there is neither.

    Of a lambda it is its lines, and its bytecode too where these have several, which are then told apart; another
    Python has another bytecode.
    """
    code = getattr(function, "__code__", None)
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        return "" if code is None else _bytecode(code)
    several = code is not None and code.co_name == "<lambda>" and text.count("lambda") > 1
    return text + _bytecode(code) if several else text


def _bytecode(value: Any) -> str:
    """Return a code object, or a constant of one, as text that is the same in every process."""
    if inspect.iscode(value):
        return repr((value.co_code, value.co_names, [*map(_bytecode, value.co_consts)]))
    return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value)


def digest_of_code(value: object) -> str:
    """Return the SHA-256 of what a function or a callable object does, the same in every process.

    That is its source, its defaults and what it has closed over; of an object its class and attributes, of a module its
    parameters and buffers too. Of what is torch's it is the name alone, and so it is of an object that is not called.
    """
    return hashlib.sha256("\0".join(_parts(value, ())).encode()).hexdigest()


def _parts(value: Any, path: tuple[int, ...]) -> Iterator[str]:
    """Return texts that differ where values do; ``path`` are the values that hold this one."""
    if isinstance(value, _PLAIN):
        yield repr(value)
        return
    if id(value) in path:
        return
    held: object = ()
    if isinstance(value, Tensor):
        numbers = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        yield f"{value.dtype}{tuple(value.shape)}{hashlib.sha256(numbers.tobytes()).hexdigest()}"
    elif isinstance(value, np.ndarray | np.generic):
        yield f"{value.dtype}{value.shape}{hashlib.sha256(value.tobytes()).hexdigest()}"
    elif isinstance(value, Mapping):
        held = [part for item in value.items() for part in item]
    elif isinstance(value, list | tuple):
        held = value
    elif isinstance(value, functools.partial):
        held = value.func, value.args, value.keywords
    elif inspect.ismethod(value):
        held = value.__func__, value.__self__
    elif isinstance(value, type) or inspect.isroutine(value):
        yield from map(_source, value.__mro__[:-1] if isinstance(value, type) else [value])
        held = _closure(value)
    else:
        held = type(value), _attributes(value)
    if isinstance(held, list | tuple):
        for part in held:
            yield from _parts(part, (*path, id(value)))


def _source(function: Any) -> str:
    name = f"{function.__module__}:{function.__qualname__}"
    return name if name.startswith(("torch.", "torch:", "builtins:")) else source_text(function) or name


def _closure(function: Any) -> list[object]:
    """Return the defaults of a function and what it has closed over."""
    values = [getattr(function, "__defaults__", None), getattr(function, "__kwdefaults__", None)]
    for cell in getattr(function, "__closure__", None) or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # it is empty
            continue
    return values


def _attributes(value: Any) -> dict[str, object]:
    own = dict(getattr(value, "__dict__", {})) if callable(value) or is_dataclass(value) else {}
    if not isinstance(value, nn.Module):
        return own
    own = {name: held for name, held in own.items() if name not in _OF_MODULES}
    return own | value._parameters | value._buffers | value._modules
