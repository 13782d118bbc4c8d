"""The state of a trained module, as a model file holds it: all its tensors, and the numbers that it
counts in.

``state_dict()`` has only a part of that. It leaves out the buffers with ``persistent=False``, and
numbers of Python. What a constructor draws into plain attributes is in no file: the module is built
from the same random stream again.
"""

from collections.abc import Collection, Iterator, Mapping

from torch import Tensor, nn

from gputune.types import Json

Numbers = dict[str, bool | int | float]
"""Values of plain number attributes, by the path of the submodule and the name of the attribute."""


def saved_tensors(module: nn.Module) -> dict[str, object]:
    """Return the parameters and all buffers of a module by name, also buffers that ``state_dict()``
    leaves out."""
    return dict(module.named_buffers()) | dict(module.state_dict())


def temporary_buffers(module: nn.Module) -> list[str]:
    """Return the names of the buffers of a module that ``state_dict()`` leaves out."""
    persistent = module.state_dict().keys()
    return [name for name, _ in module.named_buffers() if name not in persistent]


def saved_numbers(module: nn.Module) -> Numbers:
    """Return the numbers that the submodules of a module hold in plain attributes, such as a count
    of calls."""
    numbers: Numbers = {}
    for path, part in _counting_parts(module):
        for name, value in vars(part).items():
            if type(value) in (bool, int, float) and name != "training":
                numbers[f"{path}.{name}".lstrip(".")] = value
    return numbers


def read_numbers(body: Json) -> Json:
    """Return the numbers that the module counts in; files of old versions have none.

    Raises ValueError for anything else.
    """
    numbers = body.get("numbers", {})
    if not isinstance(numbers, dict):
        raise ValueError("the numbers of its module are of another type")
    return numbers


def read_temporary(body: Json, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the buffers that are in no ``state_dict()``; files of old versions have
    none.

    Raises ValueError for anything else.
    """
    names = body.get("temporary", [])
    if not isinstance(names, list) or not all(
        isinstance(name, str) and name in tensors for name in names
    ):
        raise ValueError("the names of its temporary buffers are of another type")
    return names


def read_seeds(spec: Json, n_modules: int) -> list[int | None]:
    """Return the seed with which each module was built; None for files of old versions, which do
    not have it.

    Raises ValueError for anything else.
    """
    seeds = spec.get("seeds", [None] * n_modules)
    if len(seeds) != n_modules or not {int, type(None)}.issuperset(map(type, seeds)):
        raise ValueError("the seeds of its modules are of another type")
    return list(seeds)


def restore(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, object],
    temporary: Collection[str],
) -> None:
    """Give a new module the tensors and numbers that were saved of another one.

    A number is left alone where the class no longer has it. Raises RuntimeError, as
    ``load_state_dict`` does, for tensors that do not fit.

    Args:
        module: What receives them, in place.
        tensors: What ``saved_tensors`` returned.
        numbers: What ``saved_numbers`` returned.
        temporary: What ``temporary_buffers`` returned.
    """
    module.load_state_dict(
        {name: tensor for name, tensor in tensors.items() if name not in temporary}
    )
    for name in temporary:
        path, _, key = name.rpartition(".")
        part = module.get_submodule(path) if path in dict(module.named_modules()) else None
        if part is None or (key not in part._buffers and hasattr(part, key)):
            raise RuntimeError(f"Unexpected key(s): {name!r}, which is no buffer there.")
        part.register_buffer(key, tensors[name], persistent=False)  # a forward may have added it
    for path, part in _counting_parts(module):
        for key, before in list(vars(part).items()):
            value = numbers.get(f"{path}.{key}".lstrip("."))
            if key != "training" and _is_like(value, before) and value != before:
                setattr(part, key, value)


def _counting_parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the submodules that may count: those of PyTorch's own classes hold only settings."""
    for path, part in module.named_modules():
        if type(part).__module__.partition(".")[0] != "torch":
            yield path, part


def _is_like(value: object, before: object) -> bool:
    """Whether a saved number may take the place of an attribute."""
    kinds = (bool,) if type(before) is bool else (int, float)
    return type(before) in (bool, int, float) and type(value) in kinds
