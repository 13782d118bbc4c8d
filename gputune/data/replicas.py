"""Repeat the folds of a dataset, so that each trial trains several networks on the same rows.

The networks of a trial on one split are its replicas. They differ in the initial weights and in the
order of the rows, and their outputs are averaged.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial

from torch import Tensor

from gputune.data.dataset import Dataset, Inputs, Preparations


def with_replicas(data: Dataset, replicas: int) -> Dataset:
    """Return the dataset on which each trial trains ``replicas`` networks on each split."""
    if replicas == 1:
        return data
    preparations: Mapping[str, Inputs] = data.preparations
    if isinstance(preparations, Preparations):
        preparations = Preparations(partial(_prepared, preparations, replicas))
    values = {field.name: getattr(data, field.name) for field in fields(Inputs)}
    return replace(
        data,
        **vars(_repeated_inputs(Inputs(**values), replicas)),
        # (F, n, ...) for numbers. Class codes (n,) are the same in all folds.
        y=_repeated(data.y, replicas) if data.task == "regression" else data.y,
        weights=None if data.weights is None else _repeated(data.weights, replicas),
        folds=data.folds * replicas,
        present=None if data.present is None else _repeated(data.present, replicas),
        center=_repeated(data.center, replicas),
        scale=_repeated(data.scale, replicas),
        transforms=data.transforms * replicas,
        preparations=preparations,
        replicas=replicas,
    )


def _repeated(of_folds: Tensor, replicas: int) -> Tensor:
    """Repeat a tensor (F, ...) along its first axis."""
    return of_folds.repeat(replicas, *[1] * (of_folds.dim() - 1))


def _repeated_inputs(inputs: Inputs, replicas: int) -> Inputs:
    """Repeat the folds of prepared inputs. All replicas read the same copies."""
    scaling = []
    for of_input in inputs.scaling:
        if of_input is not None:
            center = _repeated(of_input.center, replicas)
            of_input = replace(of_input, center=center, scale=_repeated(of_input.scale, replicas))
        scaling.append(of_input)
    return replace(
        inputs,
        copies=inputs.copies * replicas,
        scaling=tuple(scaling),
        statistics=inputs.statistics * replicas,
    )


def _prepared(preparations: Preparations, replicas: int, numbers: str) -> Inputs:
    """Return the inputs of one preparation of the numeric columns, with repeated folds."""
    return _repeated_inputs(preparations[numbers], replicas)
