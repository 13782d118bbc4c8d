"""Write values as JSON text, and read them back with their type and every bit.

JSON cannot represent infinity, tuples or arrays. Such a value becomes a JSON object with one key,
the tag of its type. Nothing is pickled. A name from a file reaches only the public layers and
functions of torch.nn.
"""

import hashlib
import importlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np

from gputune.ground.errors import InputError
from gputune.ground.types import Json

MALFORMED = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
"""Errors that may occur when a value is read that is damaged or comes from a stranger."""

FUNCTIONAL = "torch.nn.functional"
_OF_FUNCTIONAL = (FUNCTIONAL, "torch", "torch._C._nn")
"""Modules that define the public functions of torch.nn.functional. Its other contents are internal
to torch."""

_CALLABLE = (type, FunctionType, BuiltinFunctionType)

_JSON = json.JSONDecoder()
_PLAIN = frozenset((int, float, str))
ARRAY_KINDS = "biufUO"
_SMALL = 2**20
_WIDTH = 64
"""Bytes that an array may take per character of its items, in addition to ``_SMALL`` bytes."""


def sha256(content: bytes | str) -> str:
    """Return the SHA-256 of bytes or of a text, in hexadecimal."""
    raw = content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape")
    return hashlib.sha256(raw).hexdigest()


def to_json(value: object, *, name: str = "value") -> str:
    """Return JSON text (ASCII) from which ``from_json`` restores the value.

    Supported are None, bool, int, float (infinite and NaN too), str, list, tuple, dict, NumPy
    arrays of these, and functions or classes of ``torch.nn``. NumPy scalars become Python scalars.

    Args:
        value: the value.
        name: the name of the value in errors.

    Raises:
        InputError: the value has another type, or is nested too deeply.
    """
    try:
        return json.dumps(_encode(value, name), allow_nan=False, separators=(",", ":"))
    except RecursionError:
        rule = f"{name} is nested too deeply (or holds itself) to be stored in a file"
        raise InputError(None, rule) from None


def from_json(text: str) -> Any:
    """Return the Python value that ``to_json`` wrote as JSON text.

    Raises:
        ValueError: ``to_json`` cannot have written this text.
    """
    try:
        value, end = _JSON.raw_decode(text)
        if end < len(text):
            raise ValueError(f"{text[end : end + 20]!r} stands behind a value")
        return _decode(value)
    except (*MALFORMED, ImportError) as error:
        raise ValueError(f"not a stored value: {error!r}") from error


def _encode(value: object, name: str) -> object:
    if isinstance(value, np.generic):
        value = value.item()
    match value:
        case float() if not math.isfinite(value):
            return {"float": repr(float(value))}
        case None | bool() | int() | float() | str():
            return value
        case list():
            return _encode_all(value, name)
        case tuple():
            return {"tuple": _encode_all(value, name)}
        case Mapping() if all(isinstance(key, str) for key in value):
            encoded = dict(zip(map(str, value), _encode_all(value.values(), name)))
            is_like_a_tag = len(encoded) == 1 and encoded.keys() <= DECODERS.keys()
            return {"dict": encoded} if is_like_a_tag else encoded
        case Mapping():
            return {"pairs": [_encode_all(item, name) for item in value.items()]}
        case np.ndarray() if value.dtype.kind in ARRAY_KINDS:
            items = _encode_all(value.ravel().tolist(), name)
            return {"array": {"dtype": value.dtype.str, "shape": list(value.shape), "items": items}}
    return {"torch": _torch_name(value, name)}


def _encode_all(values: Iterable[object], name: str) -> list[object]:
    return [_encode(value, name) for value in values]


def _decode(value: object) -> Any:
    if isinstance(value, dict):
        if len(value) == 1 and value.keys() <= DECODERS.keys():
            ((tag, content),) = value.items()
            return DECODERS[tag](content)
        is_plain = _PLAIN.issuperset(map(type, value.values()))
        return value if is_plain else _decode_values(value)
    if isinstance(value, list) and not _PLAIN.issuperset(map(type, value)):
        return list(map(_decode, value))
    return value


def _decode_values(items: Json) -> Json:
    return {key: _decode(item) for key, item in items.items()}


def _decode_array(content: Json) -> np.ndarray:
    dtype = np.dtype(content["dtype"])
    if dtype.kind not in ARRAY_KINDS:
        raise ValueError(f"arrays of {dtype} are never stored")
    items = list(map(_decode, content["items"]))
    # A text dtype has the width that the file claims, whatever the items are.
    if dtype.itemsize * len(items) > _SMALL + _WIDTH * sum(len(str(item)) for item in items):
        raise ValueError(f"an array of {len(items)} items of {dtype} has no item of that length")
    flat = np.empty(len(items), dtype=dtype)
    flat[:] = items
    return flat.reshape(content["shape"])


def _torch_name(value: object, name: str) -> str:
    """Return the text "module:name" for a function or class of torch.nn.

    Raises:
        InputError: the value is anything else.
    """
    from torch.nn import functional

    texts = [f"{getattr(value, '__module__', None)}:{getattr(value, '__name__', None)}"]
    # Functions in C have other names and give torch._C as their module.
    for key, known in vars(functional).items():
        if known is value:
            texts.append(f"{FUNCTIONAL}:{key}")
    for text in texts:
        with suppress(ValueError, ImportError, AttributeError):
            if _torch_object(text) is value:
                return text
    raise InputError(
        None,
        f"{name} holds {value!r}, which cannot be stored in a file",
        remedy="Use numbers, text, lists, dicts, functions or classes of torch.nn. Or use a name, "
        "and choose the object inside your module.",
    )


def _torch_object(text: str) -> object:
    """Return the public function or class of torch.nn with the name "module:name".

    A user's class may call its arguments. So a file may name only torch's layers and functions.

    Raises:
        ValueError: the name is anything else.
    """
    home, _, short = text.partition(":")
    parts = [*home.split("."), short]
    is_public = all(part.isidentifier() and not part.startswith("_") for part in parts)
    if not (is_public and parts[:2] == ["torch", "nn"]) or "parallel" in parts:
        raise ValueError(f"not a public name in torch.nn: {text!r}")
    value = vars(importlib.import_module(home)).get(short)
    # torch's files import os, typing and others. Their objects must not be reachable through torch.
    own_home = str(getattr(value, "__module__", ""))
    if home == FUNCTIONAL:
        is_known = own_home in _OF_FUNCTIONAL
    else:
        is_known = own_home.startswith("torch.nn.")
    if not (isinstance(value, _CALLABLE) and is_known):
        raise ValueError(f"not a function or class of torch.nn: {text!r}")
    return value


DECODERS: dict[str, Callable[[Any], object]] = {
    "float": float,
    "tuple": lambda items: tuple(map(_decode, items)),
    "dict": _decode_values,
    "pairs": lambda pairs: {_decode(key): _decode(item) for key, item in pairs},
    "array": _decode_array,
    "torch": _torch_object,
}
"""Maps each tag to the function that reads the tag's content.

If a user's dict has a tag as its only key, gputune writes the dict under the tag "dict".
"""
