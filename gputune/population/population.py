"""Group trials by tensor shape. A group is a population, and its trials train stacked in the same
tensors.

Each trial of a population trains on all folds. One trial on one fold is a member. Padding depends
only on the trial itself, so the results of a trial do not depend on other trials, except for
rounding: other trials decide which trials share a group.

Shape letters: P members, C configurations (trials), F folds, B rows of a minibatch, m rows of
another set, K outputs, V copies of the data.

``Network`` is the protocol of a model in the engine. ``Ensemble`` joins several modules of one
study into one.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from gputune.data.dataset import Dataset
from gputune.ground.device import CPU
from gputune.ground.errors import InputError
from gputune.ground.seeding import replica_seed
from gputune.ground.types import (
    DECAY_FACTOR,
    DEFAULTS,
    LR_FACTOR,
    ONLINE,
    Config,
    EvaluationKey,
    Params,
    Precision,
    StepKey,
    Task,
    fixed_depth,
)
from gputune.optimizers.blocks import Blocks
from gputune.optimizers.classes import class_of, keys_with, optimizer_arguments, optimizer_defaults
from gputune.population.batches import Batch, Batches, StepDraws
from gputune.population.kinds import (
    ModelKind,
    adapter_arguments,
    hidden_activations,
    hidden_widths,
    highest_dropout,
    is_module,
    padded_width,
)
from gputune.population.outputs import first_output, mean_outputs, only_present
from gputune.population.traits import Traits

_OWN_GROUP = 4  # trials of one batch size that make a separate group, with shared rows


def complete(config: Config, *, optimizer: str, schedule: str) -> Config:
    """Return a configuration with every key that training reads. Missing keys get their defaults.

    Raises InputError for a key that the optimizer does not support. Only optimizers that adapt
    their learning rate, and classes of torch.optim, lack support for some keys.
    """
    word = config.get("optimizer", optimizer)
    full = {**_defaults(word), "schedule": schedule, **config}
    if (depth := fixed_depth(full)) is not None:
        full["depth"] = depth
    if word in ONLINE or class_of(full):
        unsupported = beyond_adam(full)
        if unsupported:
            kind = (
                "adapts its learning rate" if word in ONLINE else "is a class of torch.optim here"
            )
            raise InputError(
                f"optimizer={word!r}",
                f"{kind} and does not support {unsupported[0]!r}",
                remedy="Leave this key out, or choose another optimizer.",
            )
    return full


@lru_cache  # 100,000 trials have the same defaults
def _defaults(word: str) -> Config:
    """Return the default configuration of an optimizer, with a value for every key that training
    reads."""
    return {**DEFAULTS, **optimizer_defaults(word), "optimizer": word}


def beyond_adam(config: Config) -> list[str]:
    """Return the keys of a complete configuration that change the steps of Adam and similar
    optimizers.

    Such keys are a beta2 or a weight_decay_schedule that is not the default, and factors on the
    rates of some parameters.
    """
    changed = [key for key in ("beta2", "weight_decay_schedule") if config[key] != DEFAULTS[key]]
    return changed + sorted(keys_with(config, LR_FACTOR, DECAY_FACTOR))


@dataclass(frozen=True)
class Population:
    """Trials of one tensor shape, which can train stacked.

    ``index`` has the trials' positions in the search. ``configs`` has their complete
    configurations.
    """

    kind: ModelKind
    index: tuple[int, ...]
    configs: tuple[Config, ...]

    @property
    def arguments(self) -> str:
        """Text of the values that all trials share: the ``module__*`` arguments and ``numbers``
        (the preparation of numeric columns)."""
        return arguments_text(self.configs[0])

    def select(self, places: Sequence[int]) -> "Population":
        """Return the trials at the positions ``places`` of the population as a separate
        population."""
        index = tuple(self.index[c] for c in places)
        return Population(self.kind, index, tuple(self.configs[c] for c in places))

    def part(self, start: int, stop: int) -> "Population":
        """Return the trials ``start`` to ``stop - 1`` of the population as a separate
        population."""
        return self.select(range(len(self.index))[start:stop])


def populations(
    configs: Sequence[Config],
    kind: ModelKind,
    *,
    rows: int,
    own_steps: Callable[[Config], Hashable] | None = None,
    own_loss: bool = False,
) -> list[Population]:
    """Group complete configurations by the shape of their tensors.

    Batch sizes up to the same power of two share a group. Four or more trials with the same batch
    size form a separate group.

    Args:
        configs: The complete configurations.
        kind: The kind of model. The groups of a user's module are never padded: each has one batch
            size and one set of ``module__*`` values.
        rows: Length of the longest training fold.
        own_steps: A function of a configuration that returns a grouping key, or False. Members of
            trials with a key take their steps separately. Trials with equal keys share a group for
            any batch sizes.
        own_loss: Whether the loss is the user's own. A group then has one set of ``loss__*``
            values.
    """
    shapes: dict[tuple[Hashable, ...], list[int]] = defaultdict(list)
    for i, config in enumerate(configs):
        steps = own_steps is not None and own_steps(config)
        loss = arguments_of(config, "loss__") if own_loss else {}
        shapes[steps, shape_of_tensors(config, kind), repr(sorted(loss.items()))].append(i)
    groups: list[list[int]] = []
    for (steps, *_), trials in shapes.items():
        if steps:
            groups.append(trials)
            continue
        by_size: dict[int, list[int]] = defaultdict(list)
        for i in trials:
            by_size[min(configs[i]["batch_size"], rows)].append(i)
        buckets: dict[object, list[int]] = defaultdict(list)
        for size, group in by_size.items():
            is_separate = is_module(kind) or len(group) >= _OWN_GROUP
            bucket = (size, "own") if is_separate else (size - 1).bit_length()
            buckets[bucket].extend(group)
        groups += buckets.values()
    population = Population(kind, tuple(range(len(configs))), tuple(configs))
    return list(map(population.select, groups))


def by_numbers(configs: Sequence[Config]) -> list[list[int]]:
    """Group configurations by the preparation of numeric columns (``numbers``). Return the
    positions in each group.

    Configurations of one group read the same data (``Dataset.of``).
    """
    places: dict[object, list[int]] = defaultdict(list)
    for place, config in enumerate(configs):
        places[config.get("numbers")].append(place)
    return list(places.values())


def is_plain(config: Config) -> bool:
    """Return whether the steps of a configuration are the optimizer's plain steps.

    Plain steps have no gradient clipping, no averaging of weights, the default betas, and the same
    rates for all parameters.
    """
    return config["clip_norm"] == math.inf and not config["ema"] and not beyond_adam(config)


def arguments_of(config: Config, prefix: str) -> Config:
    """Return the values of all keys that begin with a prefix, under the keys without the prefix."""
    return {
        key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)
    }


def module_arguments(config: Config) -> Config:
    """Return the ``module__*`` values of a configuration, under the argument names of the user's
    class. For a LoRA they include its ``adapter_arguments``."""
    return arguments_of(config, "module__") | adapter_arguments(config)


def arguments_text(config: Config) -> str:
    """Return the ``module__*`` values and ``numbers`` of a configuration as text."""
    numbers = config.get("numbers")
    return repr(sorted(module_arguments(config).items())) + (f", {numbers}" if numbers else "")


def shape_of(population: Population) -> tuple[object, ...]:
    """Return a lookup key for the memory that a population's trials need.

    On one dataset, trials of populations with equal keys take the same memory.
    """
    rows = max(config["batch_size"] for config in population.configs)
    return (*shape_of_tensors(population.configs[0], population.kind), (rows - 1).bit_length())


def shape_of_tensors(config: Config, kind: ModelKind) -> tuple[object, ...]:
    """Return a lookup key for tensor shapes. Trials with equal keys can train stacked."""
    rule = config["hypergrad_rule"] if config["optimizer"] in ONLINE else None
    # The buffers of a trial depend only on the trial, so that its state can continue in any chunk.
    # A hypergradient search may have a list of momenta, one for each segment.
    momentum = config["momentum"]
    if isinstance(momentum, int | float):  # NumPy takes ten times as long
        has_momentum = momentum > 0
    else:
        has_momentum = bool(np.any(np.asarray(momentum) > 0))
    buffers = (has_momentum, config["clip_norm"] < math.inf, config["ema"] > 0)
    options = sorted((key, bool(value)) for key, value in optimizer_arguments(config).items())
    optimizer = (config["optimizer"], rule, *buffers, *options, config.get("numbers"))
    if kind == "linear":
        return (optimizer,)
    if is_module(kind):
        return (optimizer, repr(sorted(module_arguments(config).items())))
    width = padded_width(max(hidden_widths(config), default=1))
    return optimizer, width, hidden_activations(config), highest_dropout(config) > 0


InputKind = tuple[tuple[int, ...], torch.dtype]
"""The shape of one row of an input, and the input's dtype."""


@dataclass(frozen=True)
class Shape:
    """The sizes, dtypes and other properties of the data for which a stacked model is built."""

    n_features: int
    n_outputs: int
    folds: int = 1
    replicas: int = 1  # ``Dataset.replicas``
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    regression: bool = False
    present: Tensor | None = None  # (F, K) bool: classes that take part in a fold; None: all
    input_shape: tuple[int, ...] | None = None  # of a row of the first input; None: (n_features,)
    inputs: tuple[InputKind, ...] = ()  # of all inputs; () for a table
    names: tuple[str, ...] | None = None  # of the inputs, if they are passed as keywords
    # precision of a module's computations in training; parameters and updates have ``dtype``
    precision: Precision = "full"
    # groups of a table's features, (D,): ``Layout.feature_groups``
    feature_groups: tuple[int, ...] | None = None
    # returns the training rows and targets of a fold
    rows: Callable[[int], tuple[tuple[Tensor, ...], Tensor]] | None = None

    @staticmethod
    def of(data: Dataset, precision: Precision = "full") -> "Shape":
        """Return the Shape for members that train on a dataset.

        If an input holds bytes that are scaled for each minibatch, its dtype here is the float
        dtype of the scaled values.
        """
        inputs: list[InputKind] = []
        for x, scaling in zip(data.inputs, data.scaling, strict=True):
            inputs.append((tuple(x.shape[2:]), x.dtype if scaling is None else data.dtype))
        return Shape(
            n_features=data.n_features,
            n_outputs=data.n_outputs,
            folds=data.n_folds,
            replicas=data.replicas,
            dtype=data.dtype,
            device=data.device,
            regression=data.task == "regression",
            present=data.present,
            input_shape=inputs[0][0],
            inputs=tuple(inputs),
            names=data.names,
            feature_groups=data.feature_groups,
            precision=precision,
            rows=data.training_rows,
        )

    def of_one_fold(self, present: Tensor | None = None) -> "Shape":
        """Return the Shape of members on a single fold, without access to its rows."""
        return replace(self, folds=1, replicas=1, present=present, rows=None)

    def seeds(self, seed: int) -> list[int]:
        """Return the seed of the initial weights of each fold, (F,). Replicas have other seeds."""
        n_splits = self.folds // self.replicas
        return [replica_seed(seed, fold // n_splits) for fold in range(self.folds)]


class Draws(Protocol):
    """Protocol of an object that makes the random numbers of a model's training steps in advance.

    The random numbers are on the device.
    """

    def fill(self, epoch: int, step: int) -> None:
        """Write the random numbers of a step into the buffer, unless they are already there."""

    def at(self, step: Tensor, rows: int) -> Tensor | StepDraws:
        """Return the random numbers of one step for ``rows`` rows. ``step`` is a counter on the
        device."""


class Network(Protocol):
    """Protocol of a stacked model: F x C members of one tensor shape (C trials on F folds).

    No method mixes members.
    """

    kind: ModelKind
    shape: Shape
    configs: tuple[Config, ...]
    # all tensors of a member: the trained parameters, then the buffers that training changes
    blocks: Blocks
    # only the trained parameters, ``flat[:trained.size]``, which have gradients and moments
    trained: Blocks
    one_by_one: bool  # whether the members are plain modules that train one after another
    exact: bool  # whether minibatches must come without padded rows
    least_rows: int  # least rows of a minibatch; a shorter last one is left out
    alone: bool  # whether an output in evaluation mode depends only on its own row
    evaluation_draws: bool  # whether an output in evaluation mode depends on random numbers
    widest: int  # most values that one row has in a layer of one member
    # names of buffers (F, C) with each member's dropout rate, written before every step
    scheduled: tuple[str, ...]

    @property
    def constants(self) -> object:
        """Values that all members share and that a recorded step contains as constants."""

    @property
    def traits(self) -> Traits | None:
        """The traits of a user's module, or None for a built-in model."""

    def start(self) -> Tensor:
        """Return the initial parameters and buffers of the members as a flat buffer."""

    def targets(self, y: Tensor) -> Tensor:
        """Return the training target in the form that ``gradient`` reads, (V, n, ...). V is 1 or
        F."""

    def draws(self, batches: Batches, *, ahead: bool) -> Draws | None:
        """Return the random numbers that ``gradient`` reads from the minibatch.

        Returns None if ``gradient`` needs no random numbers or makes them itself. If ``ahead`` is
        True, ``gradient`` must not make the random numbers itself. Raises TraceError if
        ``gradient`` does so anyway.
        """

    def gradient(self, params: Params, batch: Batch, grads: Params) -> None:
        """Write the gradient of every member's minibatch loss into ``grads``.

        This also updates the buffers in ``params`` by one step.
        """

    def outputs(
        self, params: Params, fold: int, inputs: Sequence[Tensor], key: EvaluationKey | None = None
    ) -> Tensor:
        """Return the outputs (C, m, K) of one fold's members on rows (m, ...) of each input.

        The model is in evaluation mode. If its forward pass uses random numbers, ``key`` seeds
        them. Without a key they are not seeded.
        """

    def differentiable(
        self, params: Params, inputs: Sequence[Tensor], key: StepKey | None
    ) -> Tensor:
        """Return twice differentiable outputs (P, B, K) of all members of some folds.

        The rows of each input are (P, B, ...). ``params`` are (P, ...), with P = F*C for some folds
        F. ``key`` is the key of the minibatch. It is None in evaluation mode.
        """

    def row_losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the loss of each row, (F, C, B), from outputs (F, C, B, K), twice differentiable.

        The targets are (F, 1 or C, B, ...).
        """

    def differentiate_statistics(self) -> tuple[str, ...]:
        """Make running statistics (of BatchNorm) differentiable functions of the parameters.

        Returns the names of the other tensors that a step changes. Raises InputError if the members
        cannot be differentiated.
        """

    def layers(self) -> dict[str, int]:
        """Return the index of each parameter's layer, by parameter name."""

    def with_configs(self, configs: Sequence[Config]) -> "Network":
        """Return a stacked model of the same kind for other trials of the same tensor shape."""

    def member(self, params: Params, fold: int, trial: int) -> nn.Module:
        """Return one member as a plain module in evaluation mode, on the CPU."""


class Ensemble(nn.Module):
    """An ensemble of M modules: it returns the weighted mean of their probabilities, as logits.

    For a regression it returns the weighted mean of their predictions. ``weights`` (M,) add up to
    1. Shape: inputs -> (B, K), the same as for each module. With ``columns``, the input is a table
    (B, D). Each module then reads only its own columns, from a first index up to an end index.
    ``present`` (M, K), bool, has the classes in the training rows of each module. The probability
    of another class is 0 in this module. None means all classes.
    """

    weights: Tensor
    present: Tensor | None

    def __init__(
        self,
        members: Sequence[nn.Module],
        weights: Sequence[float],
        task: Task,
        columns: Sequence[Sequence[int]] = (),
        present: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.columns = columns
        self.task = task
        self.members = nn.ModuleList(members)
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float64))
        self.register_buffer("present", present)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        member_outputs = []
        for place, member in enumerate(self.members):
            # Copies, because a member may write into its inputs, which the next member reads.
            args = [x.clone() for x in inputs]
            kwargs = {name: x.clone() for name, x in named.items()}
            if self.columns:
                begin, end = self.columns[place]
                args = [args[0][:, begin:end]]
            output = first_output(member(*args, **kwargs))
            if self.present is not None:
                output = only_present(output, self.present[place])
            member_outputs.append(output)
        # (M, ..., K)
        return mean_outputs(torch.stack(member_outputs), self.weights, self.task)
