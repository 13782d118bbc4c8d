"""Compute hypergradients through training, in reverse mode, in forward mode or by finite
differences.

A hypergradient is the derivative of the validation loss with respect to a hyperparameter. In
shapes, P counts members (one trial on one fold each), N the parameters of a member, and d the
derivatives. T is the number of steps.

Reverse mode keeps the graph of every step and goes back through it once, for any number of
hyperparameters (Maclaurin et al. 2015; Franceschi et al. 2017, Reverse-HG). Reverse mode can be
truncated or checkpointed. It differentiates the rules of optimizers/rules.py.

Forward mode carries a tangent Z = d state / d hyperparameter through training for each
hyperparameter. Each step computes Z <- A Z + B, with one Hessian-vector product per hyperparameter.
Its memory does not grow with the number of steps (Franceschi et al. 2017, Forward-HG). Its results
agree with reverse mode up to rounding.

Finite differences need two more trainings per hyperparameter, with the same random numbers. With a
small step they check the other modes, and they support operations without a second derivative. With
a wide step they show the trend through chaotic training, for which the exact derivative is noise
(Metz et al. 2021, arXiv:2111.05803).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Union

import numpy as np
import torch
from torch import Tensor

from gputune.hypergradients.inner import (
    AnyProblem,
    Hypergradients,
    InnerState,
    SegmentRows,
    StepPosition,
    Watch,
    from_coordinate,
    hessian_times,
    leaves_of,
    rates_at,
    rows_of,
    segment_at,
    slope,
    speed,
    to_coordinate,
    update,
    with_statistics,
)


def reverse(
    problem: AnyProblem,
    names: Sequence[str],
    *,
    truncate: int | None = None,
    checkpoint: bool = False,
    watch: Watch | None = None,
) -> Hypergradients:
    """Return the derivatives of the validation loss in the hyperparameters ``names``, by
    backpropagation through training.

    ``truncate=K`` differentiates only the last K steps, as if the earlier weights did not depend on
    the hyperparameters. ``checkpoint`` stores the state of every sqrt(T)-th step, and trains the
    steps between two stored states again on the way back. Checkpointing needs the memory of 2
    sqrt(T) steps and the time of one more training.
    """
    training = problem.training
    steps = problem.training.steps
    begin = 0 if truncate is None else max(0, steps - truncate)
    length = math.isqrt(steps - begin - 1) + 1 if checkpoint else steps - begin
    blocks = [range(first, min(first + length, steps)) for first in range(begin, steps, length)]
    state = problem.advance(problem.start(), range(begin), watch)
    starts = [state]
    for block in blocks[:-1]:  # up to the start of the last block
        state = problem.advance(state, block, watch)
        starts.append(state)
    leaves = {name: problem.tables[name].detach().requires_grad_() for name in names}
    with torch.enable_grad():
        spread = rows_of(leaves, training.layer)
    # First differentiate by the rows, which many steps share. Then differentiate once by the
    # tables.
    cut = {name: leaves_of(rows) for name, rows in spread.items()}
    searched = list(chain.from_iterable(cut.values()))
    record = _Record(problem, {**problem.rows, **cut}, state[0])
    total: list[Tensor] = []
    adjoint: InnerState | None = None
    for block, start in reversed(list(zip(blocks, starts))):
        is_last = block.stop == steps
        start = leaves_of(start)
        outputs = end = record.advance(start, block, watch if is_last else None)
        if is_last:
            weights = end[0].detach()
            with torch.enable_grad():
                value = training.validation(end[0])
                outputs = (value.sum(),)
        slopes = torch.autograd.grad(outputs, (*searched, *start), adjoint, materialize_grads=True)
        total = [a + b for a, b in zip(total, slopes)] if total else list(slopes[: len(searched)])
        adjoint = slopes[len(searched) :]
    ends = list(chain.from_iterable(spread.values()))
    gradients = dict(zip(names, torch.autograd.grad(ends, list(leaves.values()), total)))
    return Hypergradients(value.detach(), gradients, record.ratio(), weights)


class _Record:
    """Runs differentiable training steps, and measures the growth of a small relative change of
    each member's weights.

    The growth at step t is |dL/dw_t| |w_t| divided by the same product after the last step. This
    growth is the transpose of the ratio that forward mode computes. The adjoints contain the
    growth, so it costs nothing extra.
    """

    def __init__(self, problem: AnyProblem, rows: SegmentRows, like: Tensor) -> None:
        self.problem = problem
        self.rows = rows
        self.largest = self.final = torch.zeros_like(like[:, 0])

    def advance(self, state: InnerState, steps: range, watch: Watch | None) -> InnerState:
        for step in steps:
            after = self.problem.step(state, step, rows=self.rows, graph=True)
            # The hook comes after the step, because the step itself takes a gradient by these
            # weights.
            self._register_hook(state[0])
            state = after
            if watch is not None:
                watch(step + 1, state[0].detach())
        if steps.stop == self.problem.training.steps:
            self._register_hook(state[0], last=True)
        return state

    def _register_hook(self, weights: Tensor, *, last: bool = False) -> None:
        """Register an autograd hook that measures the gradient with respect to these weights (their
        adjoint)."""
        size = weights.detach().norm(dim=1)

        def hook(adjoint: Tensor) -> None:
            growth = adjoint.detach().norm(dim=1) * size
            self.largest = torch.maximum(self.largest, growth)
            self.final = growth if last else self.final

        weights.register_hook(hook)  # type: ignore[no-untyped-call]

    def ratio(self) -> Tensor:
        """Return the largest growth of a small change in each member's training, (P,), at least 1.

        The result is 0 if the loss does not depend on the weights.
        """
        return (self.largest / self.final).masked_fill((self.final == 0) & (self.largest == 0), 0.0)


Operand = Union["Dual", Tensor, float]


@dataclass(frozen=True, eq=False)
class Dual:
    """A tensor ``value`` (P, N) with its d derivatives ``tangents`` (d, P, N). Optimizer rules use
    the object like a tensor.

    N may be 1 in both tensors. The rules of optimizers/rules.py work entry by entry and use only
    the few operations of this class. The value is computed only once for any d, and a term without
    derivatives costs nothing. PyTorch's own dual numbers have only one derivative each, and they
    also compute with derivatives that are zero.
    """

    value: Tensor
    tangents: Tensor

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Tensor],
        types: object,
        args: tuple[Tensor, "Dual", "Dual"],
        kwargs: object = None,
    ) -> object:
        """Support ``torch.where(condition, a, b)`` for two ``Dual`` objects, and no other function
        of torch."""
        if function is not torch.where:
            return NotImplemented
        condition, a, b = args
        return cls(
            torch.where(condition, a.value, b.value), torch.where(condition, a.tangents, b.tangents)
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def device(self) -> torch.device:
        return self.value.device

    def dim(self) -> int:
        return self.value.dim()

    def to(self, *, device: torch.device, dtype: torch.dtype) -> "Dual":
        return Dual(self.value.to(device, dtype), self.tangents.to(device, dtype))

    def __add__(self, other: Operand) -> "Dual":
        if isinstance(other, Dual):
            return Dual(self.value + other.value, self.tangents + other.tangents)
        return Dual(self.value + other, self.tangents)

    def __sub__(self, other: "Dual") -> "Dual":
        return Dual(self.value - other.value, self.tangents - other.tangents)

    def __rsub__(self, other: Tensor | float) -> "Dual":
        return Dual(other - self.value, -self.tangents)

    def __mul__(self, other: Operand) -> "Dual":
        if isinstance(other, Dual):
            tangents = (self.tangents * other.value).addcmul_(self.value, other.tangents)
            return Dual(self.value * other.value, tangents)
        return Dual(self.value * other, self.tangents * other)

    __rmul__ = __mul__

    def __truediv__(self, other: Operand) -> "Dual":
        if isinstance(other, Dual):
            ratio = self.value / other.value
            tangents = torch.addcmul(self.tangents, ratio, other.tangents, value=-1).div_(
                other.value
            )
            return Dual(ratio, tangents)
        return Dual(self.value / other, self.tangents / other)

    def __pow__(self, power: Tensor) -> "Dual":
        return Dual(self.value**power, self.tangents * (power * self.value ** (power - 1)))

    def clamp_min(self, least: float) -> "Dual":
        """Apply ``Tensor.clamp_min`` to the value. The derivatives are 0 where the value is below
        ``least``."""
        # This is PyTorch's kernel for the derivative of a clamp. A comparison and a torch.where
        # would need two passes.
        tangents: Tensor = torch.ops.aten.threshold_backward(self.tangents, self.value, least)
        return Dual(self.value.clamp_min(least), tangents)

    def sqrt(self) -> "Dual":
        root = self.value.sqrt()
        return Dual(root, torch.addcdiv(root.new_zeros(()), self.tangents, root, value=0.5))


def forward(
    problem: AnyProblem, names: Sequence[str], *, watch: Watch | None = None
) -> Hypergradients:
    """Return the derivatives of the validation loss in the hyperparameters ``names``, by
    forward-mode differentiation."""
    training = problem.training
    tables = problem.tables
    state = problem.start()
    # Sort the columns by the start of their segment. At every step, the columns whose segment has
    # begun are then the first ones of the list.
    columns = sorted(
        problem.columns(names), key=lambda column: column[1] / tables[column[0]].shape[1]
    )
    tangents = _Tangents(problem, columns, state)
    for step in range(training.steps):
        state = tangents.step(state, step)
        if watch is not None:
            watch(step + 1, state[0])
    weights = state[0].detach().requires_grad_()
    with torch.enable_grad():
        value = training.validation(weights)
        (slopes,) = torch.autograd.grad(value.sum(), weights, materialize_grads=True)
    gradients = {name: torch.zeros_like(tables[name]) for name in names}
    # Chain rule: (P, N) * (P, N), summed over N -> (P,)
    for (name, s, layer), tangent in zip(columns, tangents.of_state[0]):
        gradients[name][:, s, layer] = (slopes * tangent).sum(1)
    return Hypergradients(value.detach(), gradients, tangents.ratio, state[0])


class _Tangents:
    """The derivatives of the training state (``of_state``) with respect to hyperparameters, each
    (d, P, N), for forward mode.

    There is one derivative (tangent) for each hyperparameter value whose training segment has
    begun.
    """

    def __init__(
        self,
        problem: AnyProblem,
        columns: list[tuple[str, int, int]],
        state: InnerState,
    ) -> None:
        self.problem = problem
        self.columns = columns
        self.of_state: InnerState = tuple(tensor.new_zeros(0, *tensor.shape) for tensor in state)
        # (d, P)
        self.sizes = torch.stack([problem.tables[name][:, s, layer] for name, s, layer in columns])
        self.ratio = state[0].new_zeros(len(state[0]))

    def step(self, state: InnerState, step: int) -> InnerState:
        """Return the training state after one step, and update its derivatives (tangents) and the
        growth ratio."""
        training = self.problem.training
        tables = self.problem.tables
        weights = state[0].detach().requires_grad_()
        clock = training.clock(step)
        gradient = slope(training, weights, step, graph=True)
        # A column is added when its segment begins in some member. Before that its tangent is zero.
        reached = {}
        for name, table in tables.items():
            segments = segment_at(clock.done, training.totals, table.shape[1])
            reached[name] = int(segments.max())
        n_new = sum(s <= reached[name] for name, s, _ in self.columns) - len(self.of_state[0])
        if n_new:
            self.of_state = tuple(
                torch.cat([t, t.new_zeros(n_new, *t.shape[1:])]) for t in self.of_state
            )
        before = self.of_state[0]
        products = [hessian_times(gradient, weights, tangent) for tangent in before]
        gradient = gradient.detach()  # lets go of the graph, whose memory the update needs
        # A single product is not stacked, which would copy it. (d, P, N)
        stacked = torch.stack(products) if len(products) > 1 else products[0][None]
        new = self._update(state, gradient, stacked, clock)
        if training.kept:
            new = self._keep_statistics(new, weights, before, step)
        grown = self.of_state[0].norm(dim=2) * self.sizes[: len(products)]  # per log hyperparameter
        # If the weights are zero and nothing grew, the ratio is 0 instead of 0 / 0.
        relative = torch.where(grown == 0, grown, grown / new[0].norm(dim=1))
        self.ratio = torch.maximum(self.ratio, relative.amax(0))
        return new

    @torch.no_grad()
    def _update(
        self, state: InnerState, gradient: Tensor, tangents: Tensor, clock: StepPosition
    ) -> InnerState:
        """Apply the optimizer's update rule to the training state and its derivatives (tangents),
        and return the state."""
        dual: Any = Dual  # to the rules it is a tensor
        rates = rates_at(self.problem.rows, clock, self.problem.training.totals)
        searched = dict.fromkeys(name for name, _, _ in self.columns)
        seeded = {name: dual(getattr(rates, name), self._seed(name, clock)) for name in searched}
        old = tuple(map(dual, state, self.of_state))
        slopes = dual(gradient, tangents)
        new: Any = update(self.problem.optimizer, old, slopes, replace(rates, **seeded), clock)
        self.of_state = tuple(end.tangents for end in new)
        return tuple(end.value for end in new)

    @torch.enable_grad()
    def _keep_statistics(
        self, new: InnerState, weights: Tensor, before: Tensor, step: int
    ) -> InnerState:
        """Write BatchNorm's running statistics and their derivatives (tangents) to the end of the
        training state.

        ``weights`` are the weights before the step, and ``before`` are their tangents.
        """
        statistics = self.problem.training.statistics(weights, step)
        # The derivative of a pullback v -> J'v, which is linear in v, is J.
        v = torch.zeros_like(statistics, requires_grad=True)
        (pullback,) = torch.autograd.grad(statistics, weights, v, create_graph=True)
        tangents: list[Tensor] = []
        for tangent in before:
            tangents += torch.autograd.grad(pullback, v, tangent, retain_graph=True)
        self.of_state = with_statistics(self.of_state, torch.stack(tangents))
        return with_statistics(new, statistics.detach())

    def _seed(self, name: str, clock: StepPosition) -> Tensor:
        """Return the derivatives of a hyperparameter's values in this step with respect to each
        separate hyperparameter value.

        The result is (d, P, N), or (d, P, 1) if all layers share the value.
        """
        training = self.problem.training
        like = self.of_state[0]
        columns = self.columns[: len(like)]
        _, segments, layers = self.problem.tables[name].shape
        segment = segment_at(clock.done, training.totals, segments)
        reads = np.stack([(segment == s) & (column == name) for column, s, _ in columns])
        if name == "lr" and clock.factor is not None:
            reads = reads * clock.factor
        seed = torch.as_tensor(reads, device=like.device).to(like)[..., None]
        if layers == 1:
            return seed
        place = torch.tensor([layer for _, _, layer in columns], device=seed.device)
        return seed * (place[:, None] == training.layer)[:, None]


def default_width(dtype: torch.dtype) -> float:
    """Return the width of a finite difference for a dtype: the cube root of its machine epsilon.

    At this width, rounding and curvature cause equal errors.
    """
    return float(torch.finfo(dtype).eps ** (1 / 3))


@torch.no_grad()
def differences(
    problem: AnyProblem,
    names: Sequence[str],
    *,
    width: float,
    watch: Watch | None = None,
) -> Hypergradients:
    """Return the derivatives of the validation loss in the hyperparameters ``names``, by finite
    differences.

    The function trains with each hyperparameter value moved by +-``width`` in its logarithm, or in
    its logit for momentum and betas. Every value must be above 0. ``ratio`` is |weights(+) -
    weights(-)| / (2 width |weights|) after the last step.
    """
    training = problem.training
    tables = problem.tables
    weights = problem.train(watch)
    gradients = {name: torch.zeros_like(tables[name]) for name in names}
    ratio = weights.new_zeros(len(weights))
    for name, s, layer in problem.columns(names):
        table = tables[name]
        shift = torch.zeros_like(table)
        shift[:, s, layer] = width
        ends = []
        for signed_shift in (shift, -shift):
            moved = from_coordinate(name, to_coordinate(name, table) + signed_shift)
            ends.append(replace(problem, tables={**tables, name: moved}).train())
        change = (training.validation(ends[0]) - training.validation(ends[1])) / (2 * width)
        gradients[name][:, s, layer] = change / speed(name, table)[:, s, layer]
        distance = (ends[0] - ends[1]).norm(dim=1)
        ratio = torch.maximum(ratio, distance / (2 * width * weights.norm(dim=1)))
    return Hypergradients(training.validation(weights), gradients, ratio, weights)
