"""The values that differ between the members of a chunk, and the part of one member.

A chunk holds trials that train together, and a member is one trial on one fold. A table has one
value for each member.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from gputune.data.dataset import Dataset

TablePath = tuple[Any, ...]
"""The path from a chunk (trials that train together) to one of its values, as attribute names and
dict keys."""


def value_at(value: Any, path: TablePath) -> Any:
    """Follow attribute names and dict keys (``path``) from a value, and return the value at the
    end.

    The result is None if the value no longer exists, because all remaining members use the
    optimizer's default.
    """
    for name in path:
        value = value.get(name) if isinstance(value, dict) else getattr(value, name)
        if value is None:
            return None
    return value


def paths_in(values: dict[Any, Any], path: TablePath) -> Iterator[TablePath]:
    """Yield the path of each tensor in nested dicts."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from paths_in(value, (*path, name))
        else:
            yield (*path, name)


def member_part(table: Tensor, fold: int, trial: int) -> Tensor:
    """Return the entry of a table (F folds, C trials) for one member, or of a table (C,) for one
    trial."""
    trials = slice(trial, trial + 1)
    return table[trials] if table.dim() == 1 else table[fold : fold + 1, trials]


def data_of_fold(data: Dataset, fold: int) -> Dataset:
    """Return the part of a dataset for one fold. All of its tensors are copies, except the inputs
    and the target."""
    part = slice(fold, fold + 1)
    scaling = []
    for of_input in data.scaling:
        if of_input is not None:
            center = of_input.center[part].clone()
            of_input = replace(of_input, center=center, scale=of_input.scale[part].clone())
        scaling.append(of_input)
    return replace(
        data,
        folds=data.folds[part],
        copies=data.copies[part],
        weights=None if data.weights is None else data.weights[part].clone(),
        present=None if data.present is None else data.present[part].clone(),
        center=data.center[part].clone(),
        scale=data.scale[part].clone(),
        transforms=data.transforms[part],
        scaling=tuple(scaling),
        replicas=1,
    )
