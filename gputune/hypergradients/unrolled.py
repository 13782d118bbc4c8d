"""Hypergradients through training, in reverse mode (whole, truncated, checkpointed) and in forward mode.

Reverse mode keeps every step's graph and goes back through it once, whatever the number of hyperparameters
(Maclaurin et al. 2015; Franceschi et al. 2017, Reverse-HG). Forward mode carries Z = d state / d hyperparameter
along, Z <- A Z + B, one Hessian-vector product a step and hyperparameter, and needs no more memory for more steps
(Franceschi et al. 2017, Forward-HG). Both differentiate the rules of engine/optim.py, and agree to rounding.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gputune.hypergradients.dual import Dual
from gputune.hypergradients.inner import (
    Clock,
    Rows,
    State,
    Tables,
    Training,
    active_rows,
    first_state,
    plain_step,
    rates_at,
    rows_of,
    segment_at,
    slope,
    update,
)

Watch = Callable[[int, Tensor], None]
"""Called after each step with the number of steps done and the weights (P, N)."""


@dataclass(frozen=True)
class Hypergradients:
    """What one training gave, per member: the validation loss ``value`` (P,) after it, and its derivatives.

    ``gradients`` has a (P, S, L) table for each hyperparameter that was asked for. ``ratio`` (P,) tells noise from
    slope (guard.py). ``weights`` (P, N) are the parameters after the last step.
    """

    value: Tensor
    gradients: dict[str, Tensor]
    ratio: Tensor
    weights: Tensor


def train_plainly(
    training: Training,
    optimizer: str,
    tables: Tables,
    watch: Watch | None = None,
    *,
    steps: int | None = None,
) -> Tensor:
    """Return the weights (P, N) after all steps, or after the first ``steps``, no derivatives taken."""
    begin, rows = first_state(training, optimizer), rows_of(tables, training.layer)
    return _advance(training, optimizer, rows, begin, 0, steps or training.steps, watch).weights


def reverse(
    training: Training,
    optimizer: str,
    tables: Tables,
    wanted: tuple[str, ...],
    *,
    truncate: int | None = None,
    checkpoint: bool = False,
    watch: Watch | None = None,
) -> Hypergradients:
    """Return the hypergradients of ``wanted`` by going back through training.

    ``truncate=K`` goes back through the last K steps only, as if the weights before them did not depend on the
    hyperparameters. ``checkpoint`` keeps the state of every sqrt(T)-th step and trains the steps between again on
    the way back: the memory of 2 sqrt(T) steps for one more training.
    """
    steps = training.steps
    begin = 0 if truncate is None else max(0, steps - truncate)
    length = math.isqrt(steps - begin - 1) + 1 if checkpoint else steps - begin
    edges = [*range(begin, steps, length), steps]
    leaves = {name: tables[name].detach().requires_grad_() for name in wanted}
    with torch.enable_grad():
        spread = rows_of(leaves, training.layer)
    # Differentiated by the rows, which many steps share, and only then by the tables.
    cut = {name: [row.detach().requires_grad_() for row in own] for name, own in spread.items()}
    rows = {**rows_of(tables, training.layer), **cut}
    searched = [row for own in cut.values() for row in own]
    state, starts = first_state(training, optimizer), []
    for here, there in zip([0, *edges[:-2]], edges[:-1]):  # up to where the last block begins
        state = _advance(training, optimizer, rows, state, here, there, watch)
        starts.append(state)
    amplification = _Amplification()
    total: list[Tensor] = []
    adjoint: list[Tensor] = []
    for here, there, start in reversed(list(zip(edges[:-1], edges[1:], starts))):
        start = start.leaves()
        last = there == steps
        end = _record(training, optimizer, rows, start, here, there, amplification, watch if last else None)
        inputs = [*searched, start.weights, *start.moments]
        if last:
            weights = end.weights.detach()
            with torch.enable_grad():
                value = training.validation(end.weights)
                found = torch.autograd.grad(value.sum(), inputs, materialize_grads=True)
            total = list(found[: len(searched)])
        else:
            outputs = [end.weights, *end.moments]
            found = torch.autograd.grad(outputs, inputs, grad_outputs=adjoint, materialize_grads=True)
            total = [a + b for a, b in zip(total, found)]
        adjoint = list(found[len(searched) :])
    ends = [row for own in spread.values() for row in own]
    gradients = dict(zip(wanted, torch.autograd.grad(ends, list(leaves.values()), total)))
    return Hypergradients(value.detach(), gradients, amplification.ratio(weights), weights)


def _advance(
    training: Training,
    optimizer: str,
    rows: Rows,
    state: State,
    here: int,
    there: int,
    watch: Watch | None,
) -> State:
    """Train the steps here..there-1 without a graph."""
    for step in range(here, there):
        state = plain_step(training, optimizer, rows, state, step)
        if watch is not None:
            watch(step + 1, state.weights)
    return state


def _record(
    training: Training,
    optimizer: str,
    rows: Rows,
    state: State,
    here: int,
    there: int,
    amplification: "_Amplification",
    watch: Watch | None,
) -> State:
    """Train the steps here..there-1 with their graph."""
    for step in range(here, there):
        gradient = slope(training, state.weights, step, graph=True)
        amplification.watch(state.weights)
        clock = training.clock(step)
        with torch.enable_grad():
            rates = rates_at(rows, clock, training.totals)
            state = update(optimizer, state, gradient, rates, active_rows(clock, gradient))
        if watch is not None:
            watch(step + 1, state.weights.detach())
    if there == training.steps:
        amplification.watch(state.weights, last=True)
    return state


class _Amplification:
    """By how much a small relative change of the weights grows on its way to the validation loss, per member.

    At step t it is |dL/dw_t| |w_t| over the same after the last step: the transpose of what forward mode sees, read
    off the adjoints on the way back, at no other cost.
    """

    def __init__(self) -> None:
        self.largest: Tensor | float = 0.0
        self.final: Tensor | float = 0.0

    def watch(self, weights: Tensor, *, last: bool = False) -> None:
        """Look at the adjoint of these weights when it is computed."""
        size = weights.detach().norm(dim=1)

        def look(adjoint: Tensor) -> None:
            weight = adjoint.detach().norm(dim=1) * size
            if last:
                self.final = weight
            else:
                self.largest = torch.maximum(torch.as_tensor(self.largest, dtype=size.dtype), weight)

        weights.register_hook(look)  # type: ignore[no-untyped-call]

    def ratio(self, like: Tensor) -> Tensor:
        """Return the largest ratio (P,), at least 1; 0 where the loss does not depend on the weights at all."""
        largest, final = (
            torch.as_tensor(weight, dtype=like.dtype, device=like.device).expand(len(like))
            for weight in (self.largest, self.final)
        )
        ratio = torch.maximum(largest, final) / final
        return torch.where((final == 0) & (largest == 0), torch.zeros_like(ratio), ratio)


def forward(
    training: Training,
    optimizer: str,
    tables: Tables,
    wanted: tuple[str, ...],
    *,
    watch: Watch | None = None,
) -> Hypergradients:
    """Return the hypergradients of ``wanted`` by carrying a tangent of the state along for each of their entries."""
    state = first_state(training, optimizer)
    # Those of the first segments first: at every step, the ones that have begun are a prefix.
    columns = sorted(
        ((name, s, layer) for name in wanted for s, layer in np.ndindex(tables[name].shape[1:])),
        key=lambda column: column[1] / tables[column[0]].shape[1],
    )
    tangents, rows = _Tangents(optimizer, tables, columns, state), rows_of(tables, training.layer)
    for step in range(training.steps):
        state = tangents.step(training, rows, state, step)
        if watch is not None:
            watch(step + 1, state.weights)
    weights = state.weights.detach().requires_grad_()
    with torch.enable_grad():
        value = training.validation(weights)
        (slopes,) = torch.autograd.grad(value.sum(), weights, materialize_grads=True)
    gradients = {name: torch.zeros_like(tables[name]) for name in wanted}
    for (name, s, layer), tangent in zip(columns, tangents.weights):
        gradients[name][:, s, layer] = (slopes * tangent).sum(1)
    return Hypergradients(value.detach(), gradients, tangents.ratio, state.weights)


class _Tangents:
    """The tangents (d, P, N) of the parameters and moments, one for each hyperparameter that has begun."""

    def __init__(
        self, optimizer: str, tables: Tables, columns: list[tuple[str, int, int]], state: State
    ) -> None:
        self.optimizer, self.tables, self.columns = optimizer, tables, columns
        none = state.weights.new_zeros(0, *state.weights.shape)
        self.weights, self.moments = none, [none for _ in state.moments]
        self.sizes = torch.stack([tables[name][:, s, layer] for name, s, layer in columns])  # (d, P)
        self.ratio = state.weights.new_zeros(len(state.weights))

    def step(self, training: Training, rows: Rows, state: State, step: int) -> State:
        """Take one step of the training and of its tangents."""
        weights = state.weights.detach().requires_grad_()
        gradient = slope(training, weights, step, graph=True)
        clock = training.clock(step)
        self._begin(training, clock)
        products = [_product(gradient, weights, tangent) for tangent in self.weights]
        gradient = gradient.detach()  # lets go of the graph, whose memory the update needs
        new = self._through_the_rule(training, rows, state, Dual(gradient, _stack(products)), clock)
        grown = self.weights.norm(dim=2) * self.sizes[: len(products)]  # per log hyperparameter
        relative = torch.where(
            grown == 0, grown, grown / new.weights.norm(dim=1)
        )  # no growth, though of nothing
        self.ratio = torch.maximum(self.ratio, relative.amax(0))
        return new

    def _begin(self, training: Training, clock: Clock) -> None:
        """Take in the hyperparameters whose segment has begun in some member; before that their tangent is zero."""
        reached = {
            name: int(segment_at(clock.done, training.totals, table.shape[1]).max())
            for name, table in self.tables.items()
        }
        more = sum(s <= reached[name] for name, s, _ in self.columns) - len(self.weights)
        if more:
            zeros = self.weights.new_zeros(more, *self.weights.shape[1:])
            self.weights, *self.moments = (torch.cat([t, zeros]) for t in (self.weights, *self.moments))

    @torch.no_grad()
    def _through_the_rule(
        self, training: Training, rows: Rows, state: State, gradient: Any, clock: Clock
    ) -> State:
        """Push the state through the update rule with all its tangents."""
        rates: Any = rates_at(rows, clock, training.totals)
        searched = dict.fromkeys(name for name, _, _ in self.columns)
        seeded = {name: Dual(getattr(rates, name), self._seed(name, training, clock)) for name in searched}
        before: list[Any] = [Dual(state.weights, self.weights), *map(Dual, state.moments, self.moments)]
        old = State(before[0], tuple(before[1:]))
        rates, active = replace(rates, **seeded), active_rows(clock, state.weights)
        new = update(self.optimizer, old, gradient, rates, active)
        after: list[Any] = [new.weights, *new.moments]
        self.weights, *self.moments = (end.tangents for end in after)
        return State(after[0].value, tuple(end.value for end in after[1:]))

    def _seed(self, name: str, training: Training, clock: Clock) -> Tensor:
        """Return d value / d column for the value that each entry reads: (d, P, N), or (d, P, 1) for all layers."""
        columns = self.columns[: len(self.weights)]
        _, segments, layers = self.tables[name].shape
        segment = segment_at(clock.done, training.totals, segments)
        now = np.stack([(segment == s) & (own == name) for own, s, _ in columns])
        if name == "lr" and clock.factor is not None:
            now = now * clock.factor
        seed = torch.as_tensor(now).to(self.weights)[..., None]
        if layers == 1:
            return seed
        place = torch.tensor([layer for _, _, layer in columns], device=seed.device)
        return seed * (place[:, None] == training.layer)[:, None]


def _stack(products: list[Tensor]) -> Tensor:
    """Return (d, P, N) products, without a copy of the one there may be."""
    return torch.stack(products) if len(products) > 1 else products[0][None]


def _product(gradient: Tensor, weights: Tensor, tangent: Tensor) -> Tensor:
    """Return the Hessian of the loss times a tangent (P, N); zero for a loss that is linear in the weights."""
    if not gradient.requires_grad:
        return torch.zeros_like(tangent)
    (product,) = torch.autograd.grad(gradient, weights, tangent, retain_graph=True, materialize_grads=True)
    return product
