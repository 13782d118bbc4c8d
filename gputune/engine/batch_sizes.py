"""Join populations that differ only in the batch size, if their trials can train together.

An epoch is then cut at the borders of the minibatches of all trials (``population/pieces.py``).
Each frozen layer before the first trained layer runs once per row for all batch sizes. The price is
that the optimizer passes over the parameters of all members after every piece, because a mask says
which members take a step. Without large frozen layers, trials that train together took up to twice as
long (an MLP of 72,000 parameters, batch sizes 16, 32 and 64, one core). An estimate decides.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from gputune.data.dataset import Dataset
from gputune.engine.backends.base import TrialWork
from gputune.engine.backends.selection import way_of
from gputune.engine.backends.table import backend_named
from gputune.population.kinds import is_module
from gputune.population.pieces import borders_of
from gputune.population.population import Population, shape_of_tensors
from gputune.population.traits import Traits

# Seconds of one core, measured with an MLP of 72,000 parameters and with a BERT.
_UPDATE_SECONDS = 7e-9  # one parameter of one member in a piece: gradient, sum and masked update
_PRODUCT_SECONDS = 8e-12  # one multiply-add pair of a frozen layer
_MARGIN = 2.0  # the weights of a base include its embeddings, which take no products


def joined_sizes(
    groups: Sequence[Population], data: Dataset, backend: str, known: Mapping[str, Traits]
) -> tuple[list[Population], str]:
    """Return the populations after joining, and a clause for the plan.

    The clause says which batch sizes train together, or why each batch size is a population. It is
    "" if no populations differ only in the batch size.

    Args:
        groups: Populations of one batch size each, or of built-in models.
        data: The dataset.
        backend: The name of the backend that was chosen for the search.
        known: The traits of the module, by ``Population.arguments``.
    """
    alike: dict[Hashable, list[Population]] = defaultdict(list)
    for group in groups:
        key: Hashable = group.index  # each population has other trials
        if is_module(group.kind):
            key = shape_of_tensors(group.configs[0], group.kind)
        alike[key].append(group)
    joined = []
    clauses: dict[str, None] = {}
    for parts in alike.values():
        if len(parts) == 1:
            joined += parts
            continue
        parts.sort(key=_size)
        *first, last = [str(_size(part)) for part in parts]
        sizes = f"{', '.join(first)} and {last}"
        if reason := _why_apart(parts, data, backend, known.get(parts[0].arguments)):
            joined += parts
            clauses[f"the batch sizes {sizes} train separately, because {reason}"] = None
        else:
            joined.append(_join(parts))
            clauses[f"the batch sizes {sizes} train together"] = None
    return joined, "; ".join(clauses)


def _size(group: Population) -> int:
    """Return the batch size of a population of a user's module."""
    size: int = group.configs[0]["batch_size"]
    return size


def _join(parts: Sequence[Population]) -> Population:
    """Return one population with the trials of several populations."""
    index = tuple(number for part in parts for number in part.index)
    configs = tuple(config for part in parts for config in part.configs)
    return Population(parts[0].kind, index, configs)


def _why_apart(
    parts: Sequence[Population], data: Dataset, backend: str, traits: Traits | None
) -> str:
    """Return the reason why populations do not train together, as a clause, or ""."""
    if traits is None or traits.indivisible:
        return "the module was not tried" if traits is None else traits.indivisible
    if data.device.type != "cpu":
        return "batch sizes train together only on a CPU"
    way, _ = way_of(backend, TrialWork(parts[0].kind, parts[0].configs[0], traits, data))
    if not backend_named(way).adds_pieces:
        return f"they train {backend_named(way).in_words}"
    if saved_seconds(parts, data, traits) < _MARGIN * extra_seconds(parts, data, traits):
        return "the shared frozen layers would save less than the additional updates take"
    return ""


def saved_seconds(parts: Sequence[Population], data: Dataset, traits: Traits) -> float:
    """Estimate the seconds of an epoch that shared frozen layers save if populations are joined."""
    if not traits.common_rows:
        return 0.0
    weights = traits.shared * (traits.frozen + traits.parameters)
    row_seconds = weights * _positions(data) * _PRODUCT_SECONDS
    return (len(parts) - 1) * sum(data.train_lengths) * row_seconds


def extra_seconds(parts: Sequence[Population], data: Dataset, traits: Traits) -> float:
    """Estimate the seconds of an epoch that additional passes over the trained parameters take if
    populations are joined."""
    sizes = np.array([_size(part) for part in parts])
    trials = np.array([len(part.index) for part in parts])
    lengths = np.array(data.train_lengths)[:, None]
    of_folds = np.minimum(sizes, lengths)  # (F, S)
    pieces = len(borders_of(lengths, of_folds)) - 1
    steps = -(-lengths // of_folds)
    passes = float(((pieces - steps) * trials).sum())
    return passes * traits.parameters * _UPDATE_SECONDS


def _positions(data: Dataset) -> int:
    """Return the number of positions of a row, such as the tokens of a text: how often a linear
    layer runs for one row."""
    (x, *_), *_ = data.inputs
    return math.prod(x.shape[1:-1]) if x.is_floating_point() else math.prod(x.shape[1:])
