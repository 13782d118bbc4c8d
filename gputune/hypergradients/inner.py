"""The inner training as a map from hyperparameters to weights: one differentiable step of all members.

The parameters of a member are one row of a (P, N) tensor, whatever their own shapes, so that an update is one pass
of the pure rule. A hyperparameter is a table (P, S, L): member, segment of the training, layer. Segment s covers the
steps from floor(s*T/S) on; with L = 1 all layers share it. No operation mixes members, so the gradient of a sum over
members holds each member's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from gputune.engine.rules import RULES, Rates

HYPERPARAMETERS = ("lr", "momentum", "weight_decay", "beta1", "beta2")

Tables = Mapping[str, Tensor]
"""Each of HYPERPARAMETERS -> (P, S, L), S and L of its own."""

Rows = Mapping[str, Sequence[Tensor]]
"""The same, cut into what the steps of each segment read: (P, 1), or (P, N) where layers differ."""


@dataclass(frozen=True)
class Clock:
    """Where each member stands before a step.

    ``done`` (P,) of its steps; ``active`` (P,), None where all step; ``factor`` (P,) of a schedule on lr, None for 1.
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

    def start(self) -> Tensor:
        """Return the starting parameters (P, N)."""

    def clock(self, step: int) -> Clock:
        """Return where the members stand before this step."""

    def losses(self, weights: Tensor, step: int) -> Tensor:
        """Return each member's loss (P,) on its minibatch of this step, twice differentiable in ``weights``."""

    def validation(self, weights: Tensor) -> Tensor:
        """Return each member's validation loss (P,)."""


class State(NamedTuple):
    """Parameters and the optimizer's moments, each (P, N)."""

    weights: Tensor
    moments: tuple[Tensor, ...]

    def leaves(self) -> "State":
        """Return the same numbers without their past, to differentiate by."""
        first, *rest = (tensor.detach().requires_grad_() for tensor in (self.weights, *self.moments))
        return State(first, tuple(rest))


def first_state(training: Training, optimizer: str) -> State:
    """Return the state before the first step."""
    weights = training.start()
    return State(weights, tuple(torch.zeros_like(weights) for _ in _moments(optimizer)))


def slope(training: Training, weights: Tensor, step: int, *, graph: bool) -> Tensor:
    """Return the gradient (P, N) of every member's minibatch loss; ``weights`` must require gradients."""
    with torch.enable_grad():
        loss = training.losses(weights, step).sum()
        (gradient,) = torch.autograd.grad(loss, weights, create_graph=graph, materialize_grads=True)
    return gradient


def update(optimizer: str, state: State, gradient: Tensor, rates: Rates, active: Tensor | None) -> State:
    """Return the state after one step of the rule; members that are not ``active`` (P, 1) stay as they are."""
    names = _moments(optimizer)
    before = {name: {"w": tensor} for name, tensor in zip(names, state.moments)}
    weights, moments = RULES[optimizer]({"w": state.weights}, {"w": gradient}, before, rates)
    new = State(weights["w"], tuple(moments[name]["w"] for name in names))
    if active is None:
        return new
    first, *rest = (torch.where(active, a, b) for a, b in zip((new[0], *new[1]), (state[0], *state[1])))
    return State(first, tuple(rest))


def plain_step(training: Training, optimizer: str, rows: Rows, state: State, step: int) -> State:
    """Return the state after one step, without a past to differentiate through."""
    gradient = slope(training, state.weights.detach().requires_grad_(), step, graph=False)
    with torch.no_grad():
        clock = training.clock(step)
        rates = rates_at(rows, clock, training.totals)
        return update(optimizer, state, gradient, rates, active_rows(clock, gradient))


def rows_of(tables: Tables, layer: Tensor) -> Rows:
    """Return the rows of tables: once for all steps, since a row may be as large as the parameters."""
    return {
        name: tuple(row if row.shape[1] == 1 else row.index_select(1, layer) for row in table.unbind(1))
        for name, table in tables.items()
    }


def rates_at(rows: Rows, clock: Clock, totals: np.ndarray) -> Rates:
    """Return the hyperparameters of one step: (P, 1) where the layers share a value, otherwise (P, N)."""
    value = {name: _row(own, segment_at(clock.done, totals, len(own))) for name, own in rows.items()}
    lr = value["lr"]
    if clock.factor is not None:
        lr = lr * torch.as_tensor(clock.factor, dtype=lr.dtype, device=lr.device)[:, None]
    return Rates(
        lr=lr,
        weight_decay=value["weight_decay"],
        momentum=value["momentum"],
        beta1=value["beta1"],
        beta2=value["beta2"],
        count=torch.as_tensor(clock.done + 1.0, device=lr.device),
    )


def segment_at(done: np.ndarray, totals: np.ndarray, segments: int) -> np.ndarray:
    """Return the segment (P,) of the step after ``done``: the last s with floor(s*T/S) <= done."""
    segment: np.ndarray = np.minimum(((done + 1) * segments - 1) // totals, segments - 1)
    return segment.astype(np.int64)


def active_rows(clock: Clock, like: Tensor) -> Tensor | None:
    """Return ``clock.active`` as a column (P, 1) on the device of ``like``."""
    return None if clock.active is None else torch.as_tensor(clock.active, device=like.device)[:, None]


def _row(rows: Sequence[Tensor], segment: np.ndarray) -> Tensor:
    """Return the row of each member's segment (P,)."""
    first, *others = np.unique(segment)
    row: Tensor = rows[first]
    for s in others:
        row = torch.where(torch.as_tensor(segment == s, device=row.device)[:, None], rows[s], row)
    return row


def _moments(optimizer: str) -> tuple[str, ...]:
    return ("m", "v") if optimizer in ("adam", "adamw") else ("buffer",)
