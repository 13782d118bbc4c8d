"""The inner training as a map from hyperparameters to weights: one differentiable step of all
members.

The parameters of a member are one row of a (P, N) tensor, whatever their own shapes, so that an
update is one pass of the pure rule. A hyperparameter is a table (P, S, L): member, segment of the
training, layer. Segment s covers the steps from floor(s*T/S) on; with L = 1 all layers share it. No
operation mixes members, so the gradient of a sum over members holds each member's own.

Hyperparameters move in the logarithm, or in the logit for what lies between 0 and 1: a step of one
size then means the same change at a rate of 1e-5 as at 1, and never leaves the legal range.

What a hypergradient is returned as, and when it is noise: training at too large a rate is chaotic,
and its slope says nothing. There a change of the weights grows at every step, the hypergradient
with it (to 1e30 and beyond), while the validation loss may still look harmless. Forward mode sees
the growth in the tangent ratio, the largest
|d weights / d log hyperparameter| / |weights| of any step; reverse mode in its transpose, how much larger a relative
change of the weights weighs in the validation loss before some step than after the last. Metz et al. (2021,
arXiv:2111.05803) describe the effect.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from gputune.optimizers.rules import MOMENTS, RULES, Rates
from gputune.types import Params

HYPERPARAMETERS = ("lr", "momentum", "weight_decay", "beta1", "beta2")
BETWEEN_0_AND_1 = ("momentum", "beta1", "beta2")

Tables = Mapping[str, Tensor]
"""Each of HYPERPARAMETERS -> (P, S, L), S and L of its own."""

Rows = Mapping[str, Sequence[Tensor]]
"""The same, cut into what the steps of each segment read: (P, 1), or (P, N) where layers differ."""

Watch = Callable[[int, Tensor], None]
"""Called after each step with the number of steps done and the weights (P, N)."""

State = tuple[Tensor, ...]
"""Parameters, then the moments of the optimizer, each (P, N)."""


@dataclass(frozen=True)
class Clock:
    """Where each member stands before a step.

    ``done`` (P,) of its steps; ``active`` (P,), None where all step; ``factor`` (P,) of a schedule
    on lr, None for 1.
    """

    done: np.ndarray
    active: np.ndarray | None = None
    factor: np.ndarray | None = None


class Training(Protocol):
    """What is trained: P members for at most ``steps`` steps, on minibatches that never change."""

    steps: int
    totals: np.ndarray
    """(P,) steps of each member, all of which fall within ``steps``."""
    layer: Tensor
    """(N,) layer of each entry of a member's parameters."""
    kept: int
    """How many of the last entries are no parameters, but what a step keeps: running statistics."""

    def start(self) -> Tensor:
        """Return the starting parameters (P, N)."""

    def clock(self, step: int) -> Clock:
        """Return where the members stand before this step."""

    def losses(self, weights: Tensor, step: int) -> Tensor:
        """Return each member's loss (P,) on its minibatch of this step, twice differentiable in
        ``weights``."""

    def statistics(self, weights: Tensor, step: int) -> Tensor:
        """Return what is kept after this step from these weights, (P, kept), differentiable in
        them."""

    def validation(self, weights: Tensor) -> Tensor:
        """Return each member's validation loss (P,)."""


AnyTraining = TypeVar("AnyTraining", bound=Training, covariant=True)


@dataclass(frozen=True, eq=False)
class InnerProblem(Generic[AnyTraining]):
    """A training, the update rule that it follows, and its hyperparameters."""

    training: AnyTraining
    optimizer: str
    tables: Tables

    @cached_property
    def rows(self) -> Rows:
        """The hyperparameters as the steps read them: cut once, since a row may be as large as the
        parameters."""
        return rows_of(self.tables, self.training.layer)

    def start(self) -> State:
        weights = self.training.start()
        return weights, *(torch.zeros_like(weights) for _ in MOMENTS[self.optimizer])

    def step(
        self, state: State, step: int, *, rows: Rows | None = None, graph: bool = False
    ) -> State:
        """Return the state after one step, with ``graph`` in one to differentiate through.

        ``rows`` are read in the place of those of the tables.
        """
        weights = state[0] if graph else state[0].detach().requires_grad_()
        gradient = slope(self.training, weights, step, graph=graph)
        clock = self.training.clock(step)
        with torch.set_grad_enabled(graph):
            rates = rates_at(self.rows if rows is None else rows, clock, self.training.totals)
            new = update(self.optimizer, state, gradient, rates, clock)
            return (
                with_statistics(new, self.training.statistics(weights, step))
                if self.training.kept
                else new
            )

    def advance(self, state: State, steps: range, watch: Watch | None = None) -> State:
        for step in steps:
            state = self.step(state, step)
            if watch is not None:
                watch(step + 1, state[0])
        return state

    def train(self, watch: Watch | None = None, *, steps: int | None = None) -> Tensor:
        """Return the weights (P, N) after all steps, or after the first ``steps``, no derivatives
        taken."""
        return self.advance(self.start(), range(steps or self.training.steps), watch)[0]

    def columns(self, names: Sequence[str]) -> list[tuple[str, int, int]]:
        """Return each entry of the tables of these hyperparameters: name, segment, layer."""
        return [
            (name, s, layer)
            for name in names
            for s, layer in np.ndindex(self.tables[name].shape[1:])
        ]


def slope(training: Training, weights: Tensor, step: int, *, graph: bool) -> Tensor:
    """Return the gradient (P, N) of every member's minibatch loss; ``weights`` must require
    gradients."""
    with torch.enable_grad():
        loss = training.losses(weights, step).sum()
        (gradient,) = torch.autograd.grad(loss, weights, create_graph=graph, materialize_grads=True)
    return gradient


def hessian_times(gradient: Tensor, weights: Tensor, vector: Tensor) -> Tensor:
    """Return the Hessian of the loss times a vector (P, N); zero for a loss that is linear in the
    weights."""
    if not gradient.requires_grad:
        return torch.zeros_like(vector)
    (product,) = torch.autograd.grad(
        gradient, weights, vector, retain_graph=True, materialize_grads=True
    )
    return product


def update(optimizer: str, state: State, gradient: Tensor, rates: Rates, clock: Clock) -> State:
    """Return the state after one step of the rule; members that are not active stay as they are."""
    names = MOMENTS[optimizer]
    before = {name: {"w": tensor} for name, tensor in zip(names, state[1:])}
    weights, moments = RULES[optimizer]({"w": state[0]}, {"w": gradient}, before, rates)
    new = weights["w"], *(moments[name]["w"] for name in names)
    if clock.active is None:
        return new
    active = torch.as_tensor(clock.active, device=gradient.device)[:, None]
    return tuple(torch.where(active, a, b) for a, b in zip(new, state))


def with_statistics(state: State, statistics: Tensor) -> State:
    """Return the state with what a step keeps in the place of what its rule made of the last
    entries."""
    return torch.cat([state[0][..., : -statistics.shape[-1]], statistics], -1), *state[1:]


def leaves_of(state: State) -> State:
    """Return the same numbers without their past, to differentiate by."""
    return tuple(tensor.detach().requires_grad_() for tensor in state)


def rows_of(tables: Tables, layer: Tensor) -> Rows:
    return {
        name: tuple(
            row if row.shape[1] == 1 else row.index_select(1, layer) for row in table.unbind(1)
        )
        for name, table in tables.items()
    }


def rates_at(rows: Rows, clock: Clock, totals: np.ndarray) -> Rates:
    """Return the hyperparameters of one step: (P, 1) where the layers share a value, otherwise (P,
    N)."""
    values = {}
    for name, parts in rows.items():
        segment = segment_at(clock.done, totals, len(parts))
        first, *others = np.unique(segment).tolist()
        row = parts[first]
        for s in others:
            row = torch.where(
                torch.as_tensor(segment == s, device=row.device)[:, None], parts[s], row
            )
        values[name] = row
    lr, momentum, decay, beta1, beta2 = (values[name] for name in HYPERPARAMETERS)
    if clock.factor is not None:
        lr = lr * torch.as_tensor(clock.factor, dtype=lr.dtype, device=lr.device)[:, None]
    count = torch.as_tensor(clock.done + 1.0, device=lr.device)
    return Rates(lr, decay, momentum, count, beta1=beta1, beta2=beta2)


def segment_at(done: np.ndarray, totals: np.ndarray, segments: int) -> np.ndarray:
    """Return the segment (P,) of the step after ``done``: the last s with floor(s*T/S) <= done."""
    segment: np.ndarray = np.minimum(((done + 1) * segments - 1) // totals, segments - 1)
    return segment.astype(np.int64)


def as_table(value: object, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Return a number, a list over segments, or one over segments and layers as a table (S, L),
    spread to a shape."""
    table = np.asarray(value, dtype=float)
    table = table.reshape(len(table) if table.ndim else 1, -1)
    return table if shape is None else np.broadcast_to(table, shape).copy()


def to_coordinate(name: str, value: Tensor) -> Tensor:
    """Return log(value), or log(value / (1 - value)) for momentum and the betas; -inf at 0."""
    return value.logit() if name in BETWEEN_0_AND_1 else value.log()


def from_coordinate(name: str, coordinate: Tensor) -> Tensor:
    """Return the value at a coordinate."""
    return coordinate.sigmoid() if name in BETWEEN_0_AND_1 else coordinate.exp()


def speed(name: str, value: Tensor) -> Tensor:
    """Return d value / d coordinate, by which a derivative is turned into one in the coordinate."""
    return value * (1 - value) if name in BETWEEN_0_AND_1 else value


CHAOTIC = 100.0
"""Ratio above which a hypergradient is taken for noise.

Measured on a 10-32-32-3 tanh network over 300 steps: up to 20, finite differences in double
precision agree to 1e-6; from some hundreds on they differ from 1e-3 to 1, and single from double
precision as much.
"""


@dataclass(frozen=True)
class Hypergradients:
    """What one training gave, per member: the validation loss ``value`` (P,) after it, and its
    derivatives.

    ``gradients`` has a (P, S, L) table for each hyperparameter that was asked for. ``ratio`` (P,)
    tells noise from slope. ``weights`` (P, N) are the parameters after the last step.
    """

    value: Tensor
    gradients: Params
    ratio: Tensor
    weights: Tensor


@dataclass(frozen=True, eq=False)
class HypergradientResult:
    """The validation loss after training, and its derivatives.

    value         the validation loss
    gradient      hyperparameter -> d value / d hyperparameter, in the shape that the hyperparameter
                  was given in
    log_gradient  the same times the hyperparameter: d value / d log hyperparameter
    parameters    name -> parameter after the last step
    ratio         by how much training amplifies a small change: above ``CHAOTIC`` (100) the
                  gradient is noise
    mode          "reverse", "forward", "fd" or "implicit": how the gradient was taken
    reason        why that mode
    """

    value: float
    gradient: Params
    log_gradient: Params
    parameters: Params
    ratio: float
    mode: str
    reason: str

    def __repr__(self) -> str:
        slopes = ", ".join(
            f"{name}: {slope.item():.4g}" if slope.dim() == 0 else f"{name}: {tuple(slope.shape)}"
            for name, slope in self.gradient.items()
        )
        noise = f"ratio {self.ratio:.3g}{', chaotic' if self.chaotic else ''}"
        return (
            f"HypergradientResult(value {self.value:.4g}, gradient {{{slopes}}}, {noise}, "
            f"{self.mode})"
        )

    @property
    def chaotic(self) -> bool:
        """Whether training amplifies changes so much that the gradient is noise."""
        return not self.ratio <= CHAOTIC
