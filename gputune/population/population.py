"""Trials grouped by tensor shape: a population trains as one tensor program, crossed with all folds.

Padding is a function of the trial alone, never of its neighbours, so that its numbers do not depend on the
company it trains in. Which trials share a group does depend on it, and changes no number beyond rounding.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from gputune.errors import InputError
from gputune.optimizers.classes import class_of, keys_with, optimizer_arguments, optimizer_defaults
from gputune.types import DECAY_FACTOR, DEFAULTS, LR_FACTOR, ONLINE, Config

ModelKind = Literal["mlp", "linear", "module"]

_WIDTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_OWN_GROUP = 4  # trials of one batch size that make a group of their own, with shared rows


def padded_width(width: int) -> int:
    """Return the width of the tensors that hold a hidden layer: the next of a fixed table, then of 512s."""
    return next((w for w in _WIDTHS if w >= width), -(-width // 512) * 512)


def hidden_widths(config: Config) -> tuple[int, ...]:
    """Return the units of each hidden layer of a complete configuration: ``width`` is of all, or has one for each."""
    width = config["width"]
    return width if isinstance(width, tuple) else (width,) * config["depth"]


def complete(config: Config, *, optimizer: str, schedule: str) -> Config:
    """Return a configuration with every key that training reads, defaults where it is silent.

    Raises InputError for what an optimizer that adapts its rate, or a class of torch.optim, does not know.
    """
    word = config.get("optimizer", optimizer)
    full = {**_defaults(word), "schedule": schedule, **config}
    if isinstance(full["width"], tuple):
        full["depth"] = len(full["width"])
    if (word in ONLINE or class_of(full)) and (unknown := beyond_adam(full)):
        kind = "adapts its rate" if word in ONLINE else "is a class of torch.optim here"
        raise InputError(
            f"optimizer={word!r} {kind}, and does not know {unknown[0]!r}: leave it out, or choose another optimizer."
        )
    return full


@lru_cache  # 100,000 trials have the same
def _defaults(word: str) -> Config:
    return {**DEFAULTS, **optimizer_defaults(word), "optimizer": word}


def beyond_adam(config: Config) -> list[str]:
    """Return the keys of a complete configuration that change the steps of Adam and its kin."""
    changed = [key for key in ("beta2", "weight_decay_schedule") if config[key] != DEFAULTS[key]]
    return changed + sorted(keys_with(config, LR_FACTOR, DECAY_FACTOR))


@dataclass(frozen=True)
class Population:
    """Trials of one tensor shape: ``index`` are their positions in the search, ``configs`` their values."""

    kind: ModelKind
    index: tuple[int, ...]
    configs: tuple[Config, ...]

    @property
    def arguments(self) -> str:
        """The ``module__*`` values and ``numbers``, which its trials have in common, as text."""
        return arguments_text(self.configs[0])

    def select(self, places: Sequence[int]) -> "Population":
        """Return the trials at some places as a population of their own."""
        return Population(self.kind, tuple(self.index[c] for c in places), tuple(self.configs[c] for c in places))

    def part(self, start: int, stop: int) -> "Population":
        """Return the trials start..stop-1 as a population of their own."""
        return Population(self.kind, self.index[start:stop], self.configs[start:stop])


def populations(
    configs: Sequence[Config],
    kind: ModelKind,
    *,
    rows: int,
    own_steps: Callable[[Config], Hashable] | None = None,
    own_loss: bool = False,
) -> list[Population]:
    """Group complete configurations by the shape of their tensors; ``rows`` is the longest training fold.

    Batch sizes share a group up to the next power of two, or make one of their own where four trials agree; those
    whose members take their steps each on its own share one group where ``own_steps`` says the same, and not False.
    A user's module is never padded: its groups have one batch size and one set of ``module__*`` values, with a loss
    of the user's own (``own_loss``) one set of ``loss__*`` values too.
    """
    shapes: dict[tuple[Hashable, ...], list[int]] = defaultdict(list)
    for i, config in enumerate(configs):
        of_loss = sorted((k, repr(v)) for k, v in config.items() if own_loss and k.startswith("loss__"))
        own = own_steps is not None and own_steps(config)
        shapes[own, _shape(config, kind), *of_loss].append(i)
    groups = list[list[int]]()
    for (own, *_), members in shapes.items():
        groups += [members] if own else _by_batch_size(members, configs, rows=rows, exact=kind == "module")
    return [Population(kind, tuple(g), tuple(configs[i] for i in g)) for g in groups]


def by_numbers(configs: Sequence[Config]) -> list[list[int]]:
    """Return the places of configurations, those together that read the same data: ``Dataset.of``."""
    places: dict[object, list[int]] = defaultdict(list)
    for place, config in enumerate(configs):
        places[config.get("numbers")].append(place)
    return list(places.values())


def is_plain(config: Config) -> bool:
    """Whether the steps are the optimizer's own: no clipping, no averaging, no other betas or rates of parameters."""
    return config["clip_norm"] == math.inf and not config["ema"] and not beyond_adam(config)


def module_arguments(config: Config) -> Config:
    """Return the ``module__*`` values of a configuration under the names that the user's class knows."""
    return {k.removeprefix("module__"): v for k, v in config.items() if k.startswith("module__")}


def arguments_text(config: Config) -> str:
    """Return the ``module__*`` values of a configuration, and its ``numbers`` where it has such, as text."""
    numbers = config.get("numbers")
    return repr(sorted(module_arguments(config).items())) + (f", {numbers}" if numbers else "")


def shape_of(population: Population) -> tuple[object, ...]:
    """Return what the memory that a trial of a population takes depends on, within one dataset."""
    rows = max(config["batch_size"] for config in population.configs)
    return (*_shape(population.configs[0], population.kind), (rows - 1).bit_length())


def _shape(config: Config, kind: ModelKind) -> tuple[object, ...]:
    rule = config["hypergrad_rule"] if config["optimizer"] in ONLINE else None
    # Which buffers a trial has depends on itself alone, so that its state goes on in whatever company.
    # A descent may have a list of momenta, one for each segment.
    momentum = bool(np.any(np.asarray(config["momentum"]) > 0))
    buffers = (momentum, config["clip_norm"] < math.inf, config["ema"] > 0)
    options = sorted((k, bool(v)) for k, v in optimizer_arguments(config).items())
    optimizer = (config["optimizer"], rule, *buffers, *options, config.get("numbers"))
    if kind != "mlp":
        arguments = module_arguments(config) if kind == "module" else {}
        return (optimizer, *sorted((k, repr(v)) for k, v in arguments.items()))
    width = padded_width(max(hidden_widths(config), default=1))
    return (optimizer, config["depth"], width, config["activation"], config["dropout"] > 0)


def _by_batch_size(members: list[int], configs: Sequence[Config], *, rows: int, exact: bool) -> list[list[int]]:
    by_size: dict[int, list[int]] = defaultdict(list)
    for i in members:
        by_size[min(configs[i]["batch_size"], rows)].append(i)
    buckets: dict[object, list[int]] = defaultdict(list)
    for size, group in by_size.items():
        alone = exact or len(group) >= _OWN_GROUP
        buckets[(size, "own") if alone else (size - 1).bit_length()].extend(group)
    return list(buckets.values())
