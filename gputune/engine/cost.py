"""What a trial of a population costs: an estimate, to cut chunks, to order them and to count workers.

No result depends on it beyond rounding.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from gputune.data.dataset import Dataset
from gputune.optimizers.classes import class_of
from gputune.optimizers.rules import n_moments
from gputune.population.population import ModelKind, Population, hidden_widths, padded_width
from gputune.types import BY_MEMBER, ONLINE, Backend, Config

# Parameters, gradient, two moments, scratch; and for unlike trials expanded rate, decay, activity, corrections.
_BUFFERS = 11

_CLASS_MOMENTS = 3  # of a class of torch.optim, whose state only a step tells: most keep two, and a count

_WIDE_LAYERS = 4  # of a user's module that are as wide as its widest

# One core's speed, to order chunks and to count workers; no result depends on them. Measured on a Xeon core.
_STEP_SECONDS = 60e-6  # operator overhead of one layer in one step
_PARAMETER_SECONDS = 2.2e-9  # update of one parameter
_PRODUCT_SECONDS = 8e-12  # one multiply-add pair
_ACTIVATION_SECONDS = 1.5e-9

# The same of compiled training, measured on an EPYC core.
_COMPILED_STEP_SECONDS = 0.4e-6  # of one member
_COMPILED_PARAMETER_SECONDS = 0.6e-9
_COMPILED_PRODUCT_SECONDS = 2e-11
_COMPILED_ACTIVATION_SECONDS = 0.5e-9


@dataclass(frozen=True)
class Cost:
    """What one trial of a population costs: bytes while it trains and while it waits, seconds an epoch, of overhead."""

    trial_bytes: int
    state_bytes: int
    trial_seconds: float
    step_seconds: float


def trial_cost(
    population: Population, data: Dataset, parameters: int = 0, backend: Backend = "eager", widest: int = 0
) -> Cost:
    """Estimate what one trial costs, with all its folds, where it trains by ``backend``.

    ``widest`` numbers has a row in a layer of a user's module.
    """
    if backend in BY_MEMBER and population.kind != "module":
        return _compiled_cost(population, data)
    looped = backend == "loop"
    config, folds, item = population.configs[0], data.n_folds, torch.finfo(data.dtype).bits // 8
    longest = max(len(fold.train) for fold in data.folds)
    batch_sizes = [min(c["batch_size"], longest) for c in population.configs]
    steps, rows = -(-longest // min(batch_sizes)), max(batch_sizes)
    layers, size, units = _shape(population, data, parameters)
    units = max(units, _WIDE_LAYERS * widest)
    activations = rows * (4 * units + 3 * data.n_outputs) + (rows * data.row_numbers) // max(1, len(batch_sizes))
    dropout = 2 * rows * units if config["dropout"] else 0
    buffers = _BUFFERS + (config["optimizer"] in ONLINE) + bool(config["ema"])  # one more: the last direction
    # Outputs on the validation rows, in the scores' working precision and once more for their terms.
    scored = 5 * max(len(fold.valid) for fold in data.folds) * data.n_outputs
    member_seconds = _PARAMETER_SECONDS * size + 3 * _PRODUCT_SECONDS * rows * size + _ACTIVATION_SECONDS * rows * units
    return Cost(
        trial_bytes=folds * item * (buffers * size + activations + dropout) + item * scored,
        state_bytes=folds * item * size * _kept_buffers(population),
        trial_seconds=folds * steps * (member_seconds + looped * layers * _STEP_SECONDS),
        step_seconds=0.0 if looped else steps * layers * _STEP_SECONDS,
    )


def _kept_buffers(population: Population) -> int:
    """How many numbers a parameter needs while its training waits: itself, its moments, what adapts its rate."""
    first, momenta = population.configs[0], (config["momentum"] for config in population.configs)
    moments = _CLASS_MOMENTS if class_of(first) else n_moments(first["optimizer"], momenta)
    return 1 + moments + 3 * (first["optimizer"] in ONLINE) + bool(first["ema"])


def _shape(population: Population, data: Dataset, parameters: int) -> tuple[int, int, int]:
    """Layers, parameters and hidden units of one member, padding included."""
    config, d, k = population.configs[0], data.n_features, data.n_outputs
    if population.kind == "linear":
        return 1, (d + 1) * k, k
    if population.kind == "module":  # its inside is unknown: a square root of the size is a fair width
        return 8, parameters, 4 * int(parameters**0.5)
    depth, width = config["depth"], padded_width(max(hidden_widths(config), default=1))
    size = (d + 1) * width + (depth - 1) * (width + 1) * width + (width + 1) * k
    return depth + 1, size, depth * width


def _compiled_cost(population: Population, data: Dataset) -> Cost:
    """Every member takes its own steps, and what it works in belongs to the thread."""
    folds, item = data.n_folds, torch.finfo(data.dtype).bits // 8
    longest = max(len(fold.train) for fold in data.folds)
    _, size, units = _shape(population, data, 0)
    rows = np.array([min(config["batch_size"], longest) for config in population.configs])
    row_seconds = 3 * _COMPILED_PRODUCT_SECONDS * size + _COMPILED_ACTIVATION_SECONDS * units
    step_seconds = _COMPILED_STEP_SECONDS + _COMPILED_PARAMETER_SECONDS * size + rows * row_seconds
    scored = sum(len(fold.valid) for fold in data.folds) * data.n_outputs
    terms = 4 * max(len(fold.valid) for fold in data.folds) * data.n_outputs  # while one fold is scored
    return Cost(
        trial_bytes=item * ((3 + bool(population.configs[0]["ema"])) * folds * size + scored + terms),
        state_bytes=folds * item * size * _kept_buffers(population),
        trial_seconds=folds * float((-(-longest // rows) * step_seconds).mean()),
        step_seconds=0.0,
    )


def operations(config: Config, kind: ModelKind, data: Dataset) -> float:
    """Return the floating-point operations of an epoch of one trial's steps, in all folds: its matrix products alone.

    A product (rows, in) x (in, out) is 2 rows in out; each layer has one forward and two backward, the first layer one
    backward. NaN for a user's module, whose inside is unknown.
    """
    if kind == "module":
        return math.nan
    hidden = hidden_widths(config) if kind == "mlp" else ()
    sizes = [data.n_features, *hidden, data.n_outputs]
    pairs = sum(3 * a * b for a, b in zip(sizes[:-1], sizes[1:])) - sizes[0] * sizes[1]
    return float(2 * pairs * sum(len(fold.train) for fold in data.folds))
