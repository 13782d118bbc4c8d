"""Hypergradients through training, in reverse mode (whole, truncated, checkpointed) and in forward mode.

Reverse mode keeps every step's graph and goes back through it once, whatever the number of hyperparameters
(Maclaurin et al. 2015; Franceschi et al. 2017, Reverse-HG). Forward mode carries Z = d state / d hyperparameter
along, Z <- A Z + B, one Hessian-vector product a step and hyperparameter, and needs no more memory for more steps
(Franceschi et al. 2017, Forward-HG). Both differentiate the rules of engine/optim.py, and agree to rounding.
"""

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual

from gputune.hypergradients.inner import (
    State,
    Tables,
    Training,
    active_rows,
    first_state,
    plain_step,
    rates_at,
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
    begin = first_state(training, optimizer)
    return _advance(training, optimizer, tables, begin, 0, steps or training.steps, watch).weights


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
    leaves = {name: table.detach().requires_grad_(name in wanted) for name, table in tables.items()}
    state, starts = first_state(training, optimizer), []
    for here, there in zip([0, *edges[:-2]], edges[:-1]):  # up to where the last block begins
        state = _advance(training, optimizer, tables, state, here, there, watch)
        starts.append(state)
    amplification = _Amplification()
    total: list[Tensor] = []
    adjoint: list[Tensor] = []
    for here, there, start in reversed(list(zip(edges[:-1], edges[1:], starts))):
        start = start.leaves()
        last = there == steps
        end = _record(training, optimizer, leaves, start, here, there, amplification, watch if last else None)
        inputs = [*(leaves[name] for name in wanted), start.weights, *start.moments]
        if last:
            weights = end.weights.detach()
            with torch.enable_grad():
                value = training.validation(end.weights)
                found = torch.autograd.grad(value.sum(), inputs, materialize_grads=True)
            total = list(found[: len(wanted)])
        else:
            outputs = [end.weights, *end.moments]
            found = torch.autograd.grad(outputs, inputs, grad_outputs=adjoint, materialize_grads=True)
            total = [a + b for a, b in zip(total, found)]
        adjoint = list(found[len(wanted) :])
    gradients = dict(zip(wanted, total))
    return Hypergradients(value.detach(), gradients, amplification.ratio(weights), weights)


def _advance(
    training: Training,
    optimizer: str,
    tables: Tables,
    state: State,
    here: int,
    there: int,
    watch: Watch | None,
) -> State:
    """Train the steps here..there-1 without a graph."""
    for step in range(here, there):
        state = plain_step(training, optimizer, tables, state, step)
        if watch is not None:
            watch(step + 1, state.weights)
    return state


def _record(
    training: Training,
    optimizer: str,
    tables: Tables,
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
            rates = rates_at(tables, clock, training.totals, training.layer)
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
    _load_dual_numbers()
    state = first_state(training, optimizer)
    # Those of the first segments first: at every step, the ones that have begun are a prefix.
    columns = sorted(
        ((name, s, layer) for name in wanted for s, layer in np.ndindex(tables[name].shape[1:])),
        key=lambda column: column[1] / tables[column[0]].shape[1],
    )
    tangents = _Tangents(optimizer, tables, columns, state)
    for step in range(training.steps):
        state = tangents.step(training, state, step)
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
    """The tangents (d, P, N) of the parameters and moments, one for each of d hyperparameters."""

    def __init__(
        self, optimizer: str, tables: Tables, columns: list[tuple[str, int, int]], state: State
    ) -> None:
        self.optimizer, self.tables, self.columns = optimizer, tables, columns
        shape = (len(columns), *state.weights.shape)
        self.weights = state.weights.new_zeros(shape)
        self.moments = [state.weights.new_zeros(shape) for _ in state.moments]
        self.sizes = torch.stack([tables[name][:, s, layer] for name, s, layer in columns])  # (d, P)
        self.ratio = state.weights.new_zeros(len(state.weights))
        self.begun = 0
        self.constant: dict[str, Tensor] = {}
        self.seeded: dict[str, tuple[Tensor, Tensor]] = {}

    def step(self, training: Training, state: State, step: int) -> State:
        """Take one step of the training and of its tangents."""
        weights = state.weights.detach().requires_grad_()
        gradient = slope(training, weights, step, graph=True)
        self._begin(training, step)
        products = [_product(gradient, weights, tangent) for tangent in self.weights[: self.begun]]
        new = self._through_the_rule(training, state, gradient.detach(), torch.cat(products), step)
        grown = self.weights[: self.begun].norm(dim=2) * self.sizes[: self.begun]  # per log hyperparameter
        relative = torch.where(
            grown == 0, grown, grown / new.weights.norm(dim=1)
        )  # no growth, though of nothing
        self.ratio = torch.maximum(self.ratio, relative.amax(0))
        return new

    def _begin(self, training: Training, step: int) -> None:
        """Take in the hyperparameters whose segment has begun in some member; before that their tangent is zero."""
        clock = training.clock(step)
        reached = {
            name: int(segment_at(clock.done, training.totals, table.shape[1]).max())
            for name, table in self.tables.items()
        }
        begun = sum(s <= reached[name] for name, s, _ in self.columns)
        if begun == self.begun:
            return
        self.begun = begun
        members = len(self.ratio)
        self.constant = {name: _copies(table, begun) for name, table in self.tables.items()}
        seeds = {name: torch.zeros_like(self.constant[name]) for name, _, _ in self.columns}
        for j, (name, s, layer) in enumerate(self.columns[:begun]):
            seeds[name][j * members : (j + 1) * members, s, layer] = 1.0
        self.seeded = {name: (self.constant[name], seed) for name, seed in seeds.items()}

    @torch.no_grad()
    def _through_the_rule(
        self, training: Training, state: State, gradient: Tensor, products: Tensor, step: int
    ) -> State:
        """Push all columns through the update rule at once, as d*P members that are dual numbers."""
        members, d = len(gradient), self.begun
        clock = training.clock(step)
        clock, totals = clock.repeated(d), np.tile(training.totals, d)

        def dual(primal: Tensor, tangents: Tensor) -> Tensor:
            return _dual(_copies(primal, d), tangents[:d].flatten(0, 1))

        with dual_level():
            tables = self.constant | {name: _dual(*pair) for name, pair in self.seeded.items()}
            many = State(
                dual(state.weights, self.weights),
                tuple(dual(primal, tangent) for primal, tangent in zip(state.moments, self.moments)),
            )
            slopes = _dual(_copies(gradient, d), products)
            rates = rates_at(tables, clock, totals, training.layer)
            new = update(self.optimizer, many, slopes, rates, active_rows(clock, gradient))
            primals, tangents = zip(*(unpack_dual(tensor) for tensor in (new.weights, *new.moments)))  # type: ignore[no-untyped-call]
        for all_columns, tangent in zip([self.weights, *self.moments], tangents):
            all_columns[:d] = tangent.view(d, members, -1)
        first, *rest = (primal[:members] for primal in primals)
        return State(first, tuple(rest))


def _product(gradient: Tensor, weights: Tensor, tangent: Tensor) -> Tensor:
    """Return the Hessian of the loss times a tangent (P, N); zero for a loss that is linear in the weights."""
    if not gradient.requires_grad:
        return torch.zeros_like(tangent)
    (product,) = torch.autograd.grad(gradient, weights, tangent, retain_graph=True, materialize_grads=True)
    return product


@functools.cache
def _load_dual_numbers() -> None:
    """Let torch load what its first dual number makes it load, with a warning that is meant for torch alone."""
    with warnings.catch_warnings(), dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        _dual(torch.zeros(1), torch.zeros(1))


def _copies(tensor: Tensor, number: int) -> Tensor:
    return tensor if number == 1 else tensor.repeat(number, *[1] * (tensor.dim() - 1))


def _dual(primal: Tensor, tangent: Tensor) -> Tensor:
    made: Tensor = make_dual(primal, tangent)  # type: ignore[no-untyped-call]
    return made
