"""Copy the values of new trials into the memory of old trials, so that recorded steps still fit.

A chunk is a group of trials of one tensor shape that train together. A recorded step is the list of
operations of one training step, which gputune replays. Python values that a step reads are
constants of the recording. Two groups of trials are alike if all of these constants are equal, so
that only values in tensors differ.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
from torch import Tensor

from gputune.population.population import Network

_OF_HOST = frozenset(
    """StackedMLP.configs StackedModule.configs Batches.sizes Batches.steps Batches.host_taken Batches.shapes
    Batches.epoch PiecedBatches.sizes PiecedBatches.steps PiecedBatches.borders PiecedBatches.shapes
    PiecedBatches.epoch MlpDraws.rows ModuleDraws.rows""".split()
)
"""Attributes that only Python code reads, between training steps. If a new chunk reuses an old
chunk, gputune copies their values to it."""

_STAYS = frozenset(
    """StackedModule.template StackedModule.stateless StackedModule.harmless_calls
    Batches.inputs Batches.target Batches.weights PiecedBatches.inputs
    PiecedBatches.target PiecedBatches.weights""".split()
)
"""Attributes that are always equal in chunks with the same arguments, so gputune does not compare
them.

They are the module (built from equal arguments), the known calls of the module, working memory, and
the data rows.
"""


class _Unlike(Exception):
    """Raised if the recorded training steps of one chunk (group of trials) do not fit another
    chunk."""


def take_over(target: Sequence[object], source: Sequence[object]) -> bool:
    """Copy the tensors of new trials (``source``) into the memory of old trials (``target``).

    Both have the objects that the recorded steps read, first the network. Returns False, and
    changes nothing, if the recorded steps of the old trials do not fit the new trials.
    """
    old = cast(Network, target[0])
    new = cast(Network, source[0])
    if old.constants != new.constants:
        return False
    try:
        pairs = list(_pairs(list(target), list(source)))
    except _Unlike:
        return False
    for place, value in pairs:
        if isinstance(place, Tensor):
            place.copy_(value)
        else:
            owner, name = place
            setattr(owner, name, value)
    return True


def _pairs(target: Any, source: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the pairs (target, value) that ``take_over`` copies from one object to another.

    Usually, both are tensors of equal layout. For an attribute that only Python code reads, the
    target is (owner, attribute name). Raises _Unlike if the objects differ.
    """
    if target is source:
        return
    if type(target) is not type(source):
        raise _Unlike
    if isinstance(target, Tensor):
        # A recorded step holds addresses and strides, so the layouts must be equal.
        if (target.shape, target.dtype, target.stride()) != (
            source.shape,
            source.dtype,
            source.stride(),
        ):
            raise _Unlike
        yield target, source
    elif isinstance(target, dict):
        if list(target) != list(source):
            raise _Unlike
        yield from _pairs([*target.values()], [*source.values()])
    elif isinstance(target, list | tuple):
        if len(target) != len(source):
            raise _Unlike
        for parts in zip(target, source):
            yield from _pairs(*parts)
    elif type(target).__module__.startswith("gputune."):
        for name, value in vars(target).items():
            place = f"{type(target).__name__}.{name}"
            if place in _OF_HOST:
                yield (target, name), getattr(source, name)
            elif place not in _STAYS:
                yield from _pairs(value, getattr(source, name))
    elif not (
        np.array_equal(target, source) if isinstance(target, np.ndarray) else target == source
    ):
        raise _Unlike
