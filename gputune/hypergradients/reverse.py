"""Hypergradients through training in reverse mode, whole, truncated or checkpointed; and by finite differences.

Reverse mode keeps every step's graph and goes back through it once, whatever the number of hyperparameters
(Maclaurin et al. 2015; Franceschi et al. 2017, Reverse-HG). It differentiates the rules of optimizers/rules.py.

Finite differences take two more trainings for each hyperparameter, on the same numbers. With a small step they check
the other modes, and serve operations without a second derivative; with a wide one they see the trend through chaotic
training, where the exact derivative is noise (Metz et al. 2021, arXiv:2111.05803).
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gputune.hypergradients.arguments import from_coordinate, speed, to_coordinate
from gputune.hypergradients.inner import (
    Hypergradients,
    InnerProblem,
    Rows,
    State,
    Training,
    Watch,
    columns_of,
    leaves_of,
    rows_of,
)


def reverse(
    problem: InnerProblem[Training],
    names: Sequence[str],
    *,
    truncate: int | None = None,
    checkpoint: bool = False,
    watch: Watch | None = None,
) -> Hypergradients:
    """Return the hypergradients of ``names`` by going back through training.

    ``truncate=K`` goes back through the last K steps only, as if the weights before them did not depend on the
    hyperparameters. ``checkpoint`` keeps the state of every sqrt(T)-th step and trains the steps between again on
    the way back: the memory of 2 sqrt(T) steps for one more training.
    """
    training, tables, steps = problem.training, problem.tables, problem.training.steps
    begin = 0 if truncate is None else max(0, steps - truncate)
    length = math.isqrt(steps - begin - 1) + 1 if checkpoint else steps - begin
    edges = [*range(begin, steps, length), steps]
    state, starts = problem.start(), []
    for here, there in zip([0, *edges[:-2]], edges[:-1]):  # up to where the last block begins
        state = problem.advance(state, range(here, there), watch)
        starts.append(state)
    leaves = {name: tables[name].detach().requires_grad_() for name in names}
    with torch.enable_grad():
        spread = rows_of(leaves, training.layer)
    # Differentiated by the rows, which many steps share, and only then by the tables.
    cut = {name: [row.detach().requires_grad_() for row in parts] for name, parts in spread.items()}
    searched = [row for parts in cut.values() for row in parts]
    record = _Record(problem, {**problem.rows, **cut}, state[0])
    total: list[Tensor] = []
    adjoint: State | None = None
    for here, there, start in reversed(list(zip(edges[:-1], edges[1:], starts))):
        start = leaves_of(start)
        outputs = end = record.advance(start, range(here, there), watch if there == steps else None)
        if there == steps:
            weights = end[0].detach()
            with torch.enable_grad():
                value = training.validation(end[0])
                outputs = (value.sum(),)
        slopes = torch.autograd.grad(outputs, (*searched, *start), adjoint, materialize_grads=True)
        total = [a + b for a, b in zip(total, slopes)] if total else list(slopes[: len(searched)])
        adjoint = slopes[len(searched) :]
    ends = [row for parts in spread.values() for row in parts]
    gradients = dict(zip(names, torch.autograd.grad(ends, list(leaves.values()), total)))
    return Hypergradients(value.detach(), gradients, record.ratio(), weights)


class _Record:
    """Steps with their graph, and by how much a small relative change of the weights grows in them, per member.

    At step t it is |dL/dw_t| |w_t| over the same after the last step: the transpose of what forward mode sees, read
    off the adjoints on the way back, at no other cost.
    """

    def __init__(self, problem: InnerProblem[Training], rows: Rows, like: Tensor) -> None:
        self.problem, self.rows = problem, rows
        self.largest = self.final = torch.zeros_like(like[:, 0])

    def advance(self, state: State, steps: range, watch: Watch | None) -> State:
        """Return the state after some steps, with their graph."""
        for step in steps:
            after = self.problem.step(state, step, rows=self.rows, graph=True)
            self._look_at(state[0])  # only now: the step has taken a gradient by them itself
            state = after
            if watch is not None:
                watch(step + 1, state[0].detach())
        if steps.stop == self.problem.training.steps:
            self._look_at(state[0], last=True)
        return state

    def _look_at(self, weights: Tensor, *, last: bool = False) -> None:
        """Look at the adjoint of these weights when it is computed."""
        size = weights.detach().norm(dim=1)

        def look(adjoint: Tensor) -> None:
            growth = adjoint.detach().norm(dim=1) * size
            if last:
                self.final = growth
            else:
                self.largest = torch.maximum(self.largest, growth)

        weights.register_hook(look)  # type: ignore[no-untyped-call]

    def ratio(self) -> Tensor:
        """Return the largest ratio (P,), at least 1; 0 where the loss does not depend on the weights at all."""
        ratio = torch.maximum(self.largest, self.final) / self.final
        return ratio.masked_fill((self.final == 0) & (self.largest == 0), 0.0)


def default_width(dtype: torch.dtype) -> float:
    """Return the cube root of the dtype's spacing: where rounding and curvature do equal harm."""
    return float(torch.finfo(dtype).eps ** (1 / 3))


@torch.no_grad()
def differences(
    problem: InnerProblem[Training], names: Sequence[str], *, width: float, watch: Watch | None = None
) -> Hypergradients:
    """Return the hypergradients of ``names`` from trainings at +-``width`` in the hyperparameter's coordinate.

    Every value must be above 0. ``ratio`` is |weights(+) - weights(-)| / (2 width |weights|) after the last step.
    """
    training, tables = problem.training, problem.tables
    weights = problem.train(watch)
    gradients = {name: torch.zeros_like(tables[name]) for name in names}
    ratio = weights.new_zeros(len(weights))
    for name, s, layer in columns_of(tables, names):
        table = tables[name]
        shift = torch.zeros_like(table)
        shift[:, s, layer] = width
        place = to_coordinate(name, table)
        moved = [from_coordinate(name, place + sign * shift) for sign in (1, -1)]
        ends = [replace(problem, tables={**tables, name: end}).train() for end in moved]
        up, down = map(training.validation, ends)
        gradients[name][:, s, layer] = (up - down) / (2 * width) / speed(name, table)[:, s, layer]
        apart = (ends[0] - ends[1]).norm(dim=1) / (2 * width * weights.norm(dim=1))
        ratio = torch.maximum(ratio, apart)
    return Hypergradients(training.validation(weights), gradients, ratio, weights)
