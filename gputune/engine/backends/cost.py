"""The estimated memory and training time of one trial, for the planner.

The estimates only order chunks, size chunks and count workers. No result depends on them.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from gputune.data.dataset import Dataset
from gputune.ground.types import ONLINE
from gputune.optimizers.classes import class_of
from gputune.optimizers.rules import n_moments
from gputune.population.kinds import hidden_layers, highest_dropout, is_module, padded_width
from gputune.population.population import Population

# Buffers of the size of the parameters: parameters, gradient, two moments, scratch. If trials
# differ: also the expanded rate, decay, activity, corrections.
_BUFFERS = 11
# Assumed for a class of torch.optim. Only a step shows its state: most keep two moments and a
# count.
_CLASS_MOMENTS = 3
_WIDE_LAYERS = 4  # layers of a user's module that are assumed to be as wide as its widest layer

# Speed of one core, measured on a Xeon core.
_STEP_SECONDS = 60e-6  # operator overhead of one layer in one step
_PARAMETER_SECONDS = 2.2e-9  # update of one parameter
_PRODUCT_SECONDS = 8e-12  # one multiply-add pair
_ACTIVATION_SECONDS = 1.5e-9
# The same for compiled training, measured on an EPYC core.
_COMPILED_STEP_SECONDS = 0.4e-6  # overhead of one step of one member
_COMPILED_PARAMETER_SECONDS = 0.6e-9
_COMPILED_PRODUCT_SECONDS = 2e-11
_COMPILED_ACTIVATION_SECONDS = 0.5e-9
# Dropout of one hidden unit. A network with dropout took 5% to 17% longer (widths 32 to 256).
_COMPILED_DROPOUT_SECONDS = 0.45e-9


@dataclass(frozen=True)
class Cost:
    """Estimated memory and training time of one trial, in all folds together.

    A trial takes ``trial_bytes`` while it trains and ``state_bytes`` while it waits. An epoch of a
    group of trials takes ``trial_seconds`` for each trial, plus ``step_seconds`` of overhead.
    """

    trial_bytes: int
    state_bytes: int
    trial_seconds: float
    step_seconds: float


class TrialSizes:
    """The sizes of a trial's training, from which backends estimate its cost.

    ``parameters`` is the number of parameters of a user's module, and ``widest`` the number of
    values that one row has in its widest layer.
    """

    def __init__(
        self, population: Population, data: Dataset, parameters: int = 0, widest: int = 0
    ) -> None:
        config = population.configs[0]
        self.kind = population.kind
        self.data = data
        self.item = data.dtype.itemsize
        self.adapts = config["optimizer"] in ONLINE
        self.averages = bool(config["ema"])
        self.drops = highest_dropout(config) > 0
        self.widest = widest
        longest = max(data.train_lengths)
        # (C,): batch sizes of the trials
        self.batch_sizes = np.array([min(c["batch_size"], longest) for c in population.configs])
        self.steps = -(-longest // self.batch_sizes)  # rounded up: the last one may be short
        self.layers, self.size, self.units = _shape(population, data, parameters)
        if class_of(config):
            moments = _CLASS_MOMENTS
        else:
            moments = n_moments(config["optimizer"], (c["momentum"] for c in population.configs))
        # A parameter that waits has: itself, its moments, the state of its adaptive rate, its
        # average.
        per_parameter = 1 + moments + 3 * self.adapts + self.averages
        self.state_bytes = data.n_folds * self.item * self.size * per_parameter
        valid_rows = [len(fold.valid) for fold in data.folds]
        self.scored = sum(valid_rows) * data.n_outputs
        self.longest_scored = max(valid_rows) * data.n_outputs


def member_seconds(
    steps: np.ndarray,
    batch_sizes: np.ndarray,
    parameters: int | np.ndarray,
    units: int | np.ndarray,
    drops: bool | np.ndarray,
) -> np.ndarray:
    """Estimate the seconds of one epoch of a member of a built-in model in compiled code.

    Args:
        steps: Steps of an epoch.
        batch_sizes: Rows of a minibatch.
        parameters: Number of parameters.
        units: Number of hidden units.
        drops: Whether the member has dropout in any layer.
    """
    unit_seconds = _COMPILED_ACTIVATION_SECONDS + _COMPILED_DROPOUT_SECONDS * drops
    row_seconds = 3 * _COMPILED_PRODUCT_SECONDS * parameters + unit_seconds * units
    update_seconds = _COMPILED_STEP_SECONDS + _COMPILED_PARAMETER_SECONDS * parameters
    return steps * (update_seconds + batch_sizes * row_seconds)


def by_member_cost(sizes: TrialSizes) -> Cost:
    """Estimate the cost of a trial of a built-in model, if every member takes its own steps.

    The working memory of a member belongs to the thread.
    """
    folds = sizes.data.n_folds
    seconds = member_seconds(
        sizes.steps, sizes.batch_sizes, sizes.size, sizes.units, sizes.drops
    ).mean()
    # Outputs of all folds, and the terms of the scores of one fold.
    scored = sizes.scored + 4 * sizes.longest_scored
    trial_bytes = sizes.item * ((3 + sizes.averages) * folds * sizes.size + scored)
    return Cost(trial_bytes, sizes.state_bytes, folds * float(seconds), 0.0)


def stacked_cost(sizes: TrialSizes) -> Cost:
    """Estimate the cost of a trial if all members take each step in the same operations."""
    data = sizes.data
    folds = data.n_folds
    most_steps = int(sizes.steps.max())
    # Stacked members of a user's module read at most the rows of the smallest batch size at once.
    largest = sizes.batch_sizes.min() if is_module(sizes.kind) else sizes.batch_sizes.max()
    rows = int(largest)
    units = max(sizes.units, _WIDE_LAYERS * sizes.widest)
    input_numbers = (rows * data.row_numbers) // len(sizes.batch_sizes)
    activations = rows * (4 * units + 3 * data.n_outputs) + input_numbers
    if sizes.drops:
        activations += 2 * rows * units
    # An optimizer that adapts its rate also keeps the last direction.
    buffers = _BUFFERS + sizes.adapts + sizes.averages
    # The outputs on the validation rows exist twice: in the working precision of the scores, and
    # as their terms.
    numbers = folds * (buffers * sizes.size + activations) + 5 * sizes.longest_scored
    member_seconds = (
        _PARAMETER_SECONDS * sizes.size
        + 3 * _PRODUCT_SECONDS * rows * sizes.size
        + _ACTIVATION_SECONDS * rows * units
    )
    return Cost(
        sizes.item * numbers,
        sizes.state_bytes,
        folds * most_steps * member_seconds,
        most_steps * sizes.layers * _STEP_SECONDS,
    )


def one_by_one_cost(sizes: TrialSizes) -> Cost:
    """Estimate the cost of a trial if each member pays for its own operations."""
    stacked = stacked_cost(sizes)
    trial_seconds = stacked.trial_seconds + sizes.data.n_folds * stacked.step_seconds
    return Cost(stacked.trial_bytes, stacked.state_bytes, trial_seconds, 0.0)


def _shape(population: Population, data: Dataset, parameters: int) -> tuple[int, int, int]:
    """Return the number of layers, parameters and hidden units of one member's network, with
    padding."""
    # The layers are unknown. The square root of the number of parameters is a fair width.
    if is_module(population.kind):
        return 8, parameters, 4 * int(parameters**0.5)
    hidden = hidden_layers(population.configs[0], population.kind)
    width = padded_width(max(hidden, default=1))
    sizes = [data.n_features, *[width] * len(hidden), data.n_outputs]
    size = sum((a + 1) * b for a, b in pairwise(sizes))
    return len(hidden) + 1, size, len(hidden) * width or data.n_outputs
