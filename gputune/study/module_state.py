"""The state of a trained module in a model file: all its tensors, and its numeric attributes.

``state_dict()`` has only a part of this state. It leaves out buffers with ``persistent=False``, and
attributes that are numbers of Python or NumPy. Random values that a constructor stores in plain attributes are
not in the file. Instead, the module is built again from the same random stream.
"""

from collections.abc import Collection, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from gputune.types import Json

AttributeNumbers = dict[str, bool | int | float]
"""Values of numeric attributes, by the path of the submodule and the name of the attribute."""


def saved_tensors(module: nn.Module) -> dict[str, object]:
    """Return the parameters and all buffers of a module by name.

    This includes the buffers that ``state_dict()`` leaves out.
    """
    return dict(module.named_buffers()) | dict(module.state_dict())


def temporary_buffers(module: nn.Module) -> list[str]:
    """Return the names of the buffers of a module that ``state_dict()`` leaves out."""
    persistent = module.state_dict().keys()
    return [name for name, _ in module.named_buffers() if name not in persistent]


def split_complex(tensors: dict[str, Tensor]) -> list[str]:
    """Replace the complex128 tensors in a dict by their real and imaginary parts (..., 2).

    A safetensors file cannot hold complex128. Returns the names of these tensors.
    """
    names = [name for name, tensor in tensors.items() if tensor.dtype == torch.complex128]
    for name in names:
        tensors[name] = torch.view_as_real(tensors[name].resolve_conj()).contiguous()
    return names


def join_complex(body: Json, tensors: dict[str, Tensor]) -> None:
    """Replace the parts of saved complex128 tensors in a dict by the complex tensors.

    Raises:
        ValueError: the description has another type of value there.
    """
    names = body.get("complex", [])
    if not isinstance(names, list):
        raise ValueError("the names of its complex tensors have a wrong type")
    for name in names:
        parts = tensors.get(name) if isinstance(name, str) else None
        if parts is None or parts.dtype != torch.float64 or parts.shape[-1:] != (2,):
            raise ValueError("the names of its complex tensors do not fit its tensors")
        tensors[name] = torch.view_as_complex(parts)


def saved_numbers(module: nn.Module) -> AttributeNumbers:
    """Return the numeric attributes of a module's submodules, for example a count of calls."""
    numbers: AttributeNumbers = {}
    for path, part in _counting_parts(module):
        for name, value in vars(part).items():
            if isinstance(value, np.generic):
                value = value.item()
            if type(value) in (bool, int, float) and name != "training":
                numbers[f"{path}.{name}".lstrip(".")] = value
    return numbers


def read_numbers(body: Json) -> Json:
    """Return the saved numeric attributes of the module. The result is empty for files of old
    versions.

    Raises:
        ValueError: the description has another type of value there.
    """
    numbers = body.get("numbers", {})
    if not isinstance(numbers, dict):
        raise ValueError("the numbers of its module have a wrong type")
    return numbers


def read_temporary(body: Json, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the saved names of temporary buffers, which ``state_dict()`` leaves out.

    The list is empty for files of old versions.

    Raises:
        ValueError: the description has another type of value there.
    """
    names = body.get("temporary", [])
    if not isinstance(names, list) or not all(
        isinstance(name, str) and name in tensors for name in names
    ):
        raise ValueError("the names of its temporary buffers have a wrong type")
    return names


def read_seeds(spec: Json, n_modules: int) -> list[int | None]:
    """Return the seed with which each module was built. The result is None for files of old
    versions.

    Raises:
        ValueError: the description has another type of value there.
    """
    seeds = spec.get("seeds", [None] * n_modules)
    if len(seeds) != n_modules or not {int, type(None)}.issuperset(map(type, seeds)):
        raise ValueError("the seeds of its modules have a wrong type")
    return list(seeds)


def restore(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, object],
    temporary: Collection[str],
) -> None:
    """Copy saved tensors and numeric attributes into a new module.

    A numeric attribute is ignored if the class no longer has it.

    Args:
        module: the module to change, in place.
        tensors: the result of ``saved_tensors``.
        numbers: the result of ``saved_numbers``.
        temporary: the result of ``temporary_buffers``.

    Raises:
        RuntimeError: the tensors do not fit, as in ``load_state_dict``.
    """
    module.load_state_dict(
        {name: tensor for name, tensor in tensors.items() if name not in temporary}
    )
    for name in temporary:
        path, _, key = name.rpartition(".")
        part = module.get_submodule(path) if path in dict(module.named_modules()) else None
        if part is None or (key not in part._buffers and hasattr(part, key)):
            raise RuntimeError(f"Unexpected key(s): {name!r}, which is not a buffer there.")
        part.register_buffer(key, tensors[name], persistent=False)  # a forward may have added it
    for path, part in _counting_parts(module):
        for key, before in list(vars(part).items()):
            value = numbers.get(f"{path}.{key}".lstrip("."))
            if key == "training":
                continue
            if isinstance(before, np.generic):
                if _is_like(value, before.item()) and value != before:
                    setattr(part, key, type(before)(value))
            elif _is_like(value, before) and value != before:
                setattr(part, key, value)


def _counting_parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the submodules that may keep a counter, such as a number of steps, as an attribute.

    PyTorch's own classes are left out, because their attributes are only settings.
    """
    for path, part in module.named_modules():
        if type(part).__module__.partition(".")[0] != "torch":
            yield path, part


def _is_like(value: object, before: object) -> bool:
    """Return True if a saved value may replace an attribute's value, because both have a numeric
    type."""
    kinds = (bool,) if type(before) is bool else (int, float)
    return type(before) in (bool, int, float) and type(value) in kinds
