"""Differentiable training steps of many networks at once, as functions of the hyperparameters.

A member is one network: one trial on one fold. In shapes, P counts members, N the parameters of a
member, S segments of the training and L layers. T is the number of steps.

The parameters of a member form one row of a (P, N) tensor, so an update is one pass of the pure
update rule. The values of a hyperparameter form a table (P, S, L). Segment s covers the steps from
floor(s*T/S) on. With L = 1 all layers share the value. No operation mixes members. Therefore the
gradient of a sum over members contains the gradient of each member.

A hypergradient search changes the logarithm of a hyperparameter, or its logit if it lies between 0
and 1. The same step size then means the same relative change at a rate of 1e-5 as at 1, and a value
never leaves its legal range.

This module also defines the results of a hypergradient and the test for noise. Training with too
large a rate is chaotic: a change of the weights grows at every step. The hypergradient grows with
it (to 1e30 and beyond), while the validation loss may still look harmless. Such a hypergradient is
noise. Forward mode measures the growth by the tangent ratio, the largest |d weights / d log
hyperparameter| / |weights| of any step. Reverse mode measures the transpose of this ratio: the
largest effect on the validation loss of a relative change of the weights before some step, divided
by the same effect after the last step. Metz et al. (2021, arXiv:2111.05803) describe chaotic
training.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from gputune.ground.types import HYPERPARAMETERS as HYPERPARAMETERS
from gputune.ground.types import Params
from gputune.optimizers.rules import MOMENTS, RULES, Rates

BETWEEN_0_AND_1 = ("momentum", "beta1", "beta2")

Tables = Mapping[str, Tensor]
"""Maps each hyperparameter to its values, (P members, S segments, L layers). S and L may differ
between hyperparameters."""

SegmentRows = Mapping[str, Sequence[Tensor]]
"""The hyperparameter tables, cut into one row per segment of the training.

A row is (P, 1) with one value for each of P members (networks). If the value differs between
layers, a row is (P, N) with one value for each of a member's N parameters.
"""

Watch = Callable[[int, Tensor], None]
"""A function to call after each step with the number of finished steps and the weights (P, N), N
parameters for each of P members."""

InnerState = tuple[Tensor, ...]
"""The state of a training run: the parameters, then the moments of the optimizer.

Each tensor is (P, N), with N parameters for each of P members (networks).
"""


@dataclass(frozen=True)
class StepPosition:
    """The progress of each of P members (networks) in its training, before a step.

    ``done`` (P,) is the number of finished steps. ``active`` (P,) tells if a member takes this
    step. None means that all members take it. ``factor`` (P,) is the schedule's factor on lr. None
    means 1.
    """

    done: np.ndarray
    active: np.ndarray | None = None
    factor: np.ndarray | None = None


class InnerTraining(Protocol):
    """Interface of a training run of P members (networks) for at most ``steps`` steps, on fixed
    minibatches."""

    steps: int
    totals: np.ndarray
    """The number of steps of each member, (P,), at most ``steps``."""
    layer: Tensor
    """The layer index (N,) of each entry of a member's parameters."""
    kept: int
    """The number of entries at the end of a row that are running statistics, not parameters."""

    def start(self) -> Tensor:
        """Return the starting values (P, N) of the N parameters of each of P members."""

    def clock(self, step: int) -> StepPosition:
        """Return each member's number of finished steps, and whether the member takes this step."""

    def losses(self, weights: Tensor, step: int) -> Tensor:
        """Return the loss of each of the P members on its minibatch of this step, (P,).

        The losses are twice differentiable in ``weights``.
        """

    def statistics(self, weights: Tensor, step: int) -> Tensor:
        """Return the members' running statistics after this step, for example of BatchNorm.

        The result is (P, ``kept``): each of P members has ``kept`` values. Autograd can
        differentiate the statistics in ``weights``, the weights before the step.
        """

    def validation(self, weights: Tensor) -> Tensor:
        """Return the loss of each of the P members on the validation rows of its fold, (P,)."""


AnyTraining = TypeVar("AnyTraining", bound=InnerTraining, covariant=True)


@dataclass(frozen=True, eq=False)
class InnerProblem(Generic[AnyTraining]):
    """A differentiable training run: networks with minibatches, an optimizer's update rule, and
    hyperparameters."""

    training: AnyTraining
    optimizer: str
    tables: Tables

    @cached_property
    def rows(self) -> SegmentRows:
        """The hyperparameter values for the training steps, with one tensor for each segment of the
        training.

        The tensors are made only once, because each may be as large as the parameters.
        """
        return rows_of(self.tables, self.training.layer)

    def start(self) -> InnerState:
        """Return the state before the first step: the starting parameters, and optimizer moments of
        zero."""
        weights = self.training.start()
        return weights, *(torch.zeros_like(weights) for _ in MOMENTS[self.optimizer])

    def step(
        self, state: InnerState, step: int, *, rows: SegmentRows | None = None, graph: bool = False
    ) -> InnerState:
        """Return the parameters and moments after one training step.

        With ``graph=True``, autograd can differentiate the result. ``rows`` replaces the
        hyperparameters of this object.
        """
        weights = state[0] if graph else state[0].detach().requires_grad_()
        gradient = slope(self.training, weights, step, graph=graph)
        clock = self.training.clock(step)
        with torch.set_grad_enabled(graph):
            rates = rates_at(self.rows if rows is None else rows, clock, self.training.totals)
            new = update(self.optimizer, state, gradient, rates, clock)
            if self.training.kept:
                new = with_statistics(new, self.training.statistics(weights, step))
            return new

    def advance(self, state: InnerState, steps: range, watch: Watch | None = None) -> InnerState:
        """Return the parameters and moments after several training steps, without derivatives."""
        for step in steps:
            state = self.step(state, step)
            if watch is not None:
                watch(step + 1, state[0])
        return state

    def train(self, watch: Watch | None = None, *, steps: int | None = None) -> Tensor:
        """Return the weights after training, without derivatives: (P members, N parameters).

        ``steps`` is the number of first steps to take; None means all steps.
        """
        return self.advance(self.start(), range(steps or self.training.steps), watch)[0]

    def columns(self, names: Sequence[str]) -> list[tuple[str, int, int]]:
        """Return a list of all separate values of the hyperparameters ``names``, as (name, segment,
        layer)."""
        columns = []
        for name in names:
            columns += [(name, *entry) for entry in np.ndindex(self.tables[name].shape[1:])]
        return columns


AnyProblem: TypeAlias = InnerProblem[InnerTraining]


def slope(training: InnerTraining, weights: Tensor, step: int, *, graph: bool) -> Tensor:
    """Return the gradient of every member's minibatch loss with respect to its N parameters, (P,
    N).

    ``weights`` must require gradients.
    """
    with torch.enable_grad():
        loss = training.losses(weights, step).sum()
        (gradient,) = torch.autograd.grad(loss, weights, create_graph=graph, materialize_grads=True)
    return gradient


def hessian_times(gradient: Tensor, weights: Tensor, vector: Tensor) -> Tensor:
    """Return the product of the Hessian of each member's loss and a vector.

    Vector and result are (P, N), with N parameters for each of P members. The result is zero if the
    loss is linear in the weights.
    """
    if not gradient.requires_grad:
        return torch.zeros_like(vector)
    (product,) = torch.autograd.grad(
        gradient, weights, vector, retain_graph=True, materialize_grads=True
    )
    return product


def update(
    optimizer: str, state: InnerState, gradient: Tensor, rates: Rates, clock: StepPosition
) -> InnerState:
    """Return the parameters and moments of all members after one update by the optimizer.

    The state of members that are not active does not change.
    """
    names = MOMENTS[optimizer]
    before = {name: {"w": tensor} for name, tensor in zip(names, state[1:])}
    weights, moments = RULES[optimizer]({"w": state[0]}, {"w": gradient}, before, rates)
    new = weights["w"], *(moments[name]["w"] for name in names)
    if clock.active is None:
        return new
    active = torch.as_tensor(clock.active, device=gradient.device)[:, None]
    return tuple(torch.where(active, a, b) for a, b in zip(new, state))


def with_statistics(state: InnerState, statistics: Tensor) -> InnerState:
    """Return the training state with the running statistics of BatchNorm in its last entries.

    The optimizer's update treats these entries as parameters, so this function replaces its result.
    """
    return torch.cat([state[0][..., : -statistics.shape[-1]], statistics], -1), *state[1:]


def leaves_of(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Detach tensors from their autograd graph, and return them as new leaves that require
    gradients."""
    return tuple(tensor.detach().requires_grad_() for tensor in tensors)


def rows_of(tables: Tables, layer: Tensor) -> SegmentRows:
    """Cut the tables of hyperparameter values into one tensor per segment of the training.

    A table has P members (networks), S segments and L layers. A tensor of one segment is (P, 1) if
    all layers share a value, otherwise (P, N) with a value for each of a member's N parameters.
    """
    rows = {}
    for name, table in tables.items():
        if table.shape[2] > 1:  # the layers have different values: (P, S, L) -> (P, S, N)
            rows[name] = tuple(row.index_select(1, layer) for row in table.unbind(1))
        else:
            rows[name] = table.unbind(1)
    return rows


def rates_at(rows: SegmentRows, clock: StepPosition, totals: np.ndarray) -> Rates:
    """Return the values of the hyperparameters of all members in one training step.

    A value is (P, 1) for P members if all layers share it. Otherwise a value is (P, N), for each of
    a member's N parameters.
    """
    values = {}
    for name, parts in rows.items():
        segment = segment_at(clock.done, totals, len(parts))
        first, *later = np.unique(segment).tolist()
        row = parts[first]
        for s in later:
            reached = torch.as_tensor(segment == s, device=row.device)[:, None]
            row = torch.where(reached, parts[s], row)
        values[name] = row
    lr = values["lr"]
    count = torch.as_tensor(clock.done + 1.0, device=lr.device)
    if clock.factor is not None:
        values["lr"] = lr * torch.as_tensor(clock.factor, dtype=lr.dtype, device=lr.device)[:, None]
    return Rates(count=count, **values)


def segment_at(done: np.ndarray, totals: np.ndarray, segments: int) -> np.ndarray:
    """Return the index of the training segment that each member's next step belongs to, (P,).

    With T steps in S segments, the index after ``done`` steps is the last s with floor(s*T/S) <=
    done.
    """
    segment: np.ndarray = np.minimum(((done + 1) * segments - 1) // totals, segments - 1)
    return segment.astype(np.int64)


def as_table(value: object, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Return a hyperparameter's value as an array (S segments, L layers), broadcast to ``shape`` if
    it is not None.

    A value is a number, a list over segments, or a list over segments and layers.
    """
    table = np.asarray(value, dtype=float)
    table = table.reshape(len(table) if table.ndim else 1, -1)
    return table if shape is None else np.broadcast_to(table, shape).copy()


def to_coordinate(name: str, value: Tensor) -> Tensor:
    """Return the logarithm of a hyperparameter's value, or the logit for momentum and the betas.
    The result is -inf at 0."""
    return value.logit() if name in BETWEEN_0_AND_1 else value.log()


def from_coordinate(name: str, coordinate: Tensor) -> Tensor:
    """Return the hyperparameter's value for a logarithm or logit. This function is the inverse of
    ``to_coordinate``."""
    return coordinate.sigmoid() if name in BETWEEN_0_AND_1 else coordinate.exp()


def speed(name: str, value: Tensor) -> Tensor:
    """Return the derivative of a hyperparameter's value with respect to its coordinate (logarithm
    or logit).

    This factor turns a derivative in the value into a derivative in the coordinate.
    """
    return value * (1 - value) if name in BETWEEN_0_AND_1 else value


CHAOTIC = 100.0
"""The ratio above which a hypergradient counts as noise.

Measured on a 10-32-32-3 tanh network over 300 steps. Up to a ratio of 20, finite differences in
double precision agree with the hypergradient to 1e-6. From a few hundred on, they differ by 1e-3 to
1, and single precision differs from double precision by as much.
"""


@dataclass(frozen=True)
class Hypergradients:
    """The results of one differentiated training run, for each of P members (networks).

    ``value`` (P,) is the validation loss after training. ``gradients`` has a table of derivatives,
    (P, S segments, L layers), for each requested hyperparameter. ``ratio`` (P,) is the growth of
    small changes. Above ``CHAOTIC``, the derivatives are noise. ``weights`` (P, N) are the N
    parameters of each member after the last step.
    """

    value: Tensor
    gradients: Params
    ratio: Tensor
    weights: Tensor


@dataclass(frozen=True, eq=False)
class HypergradientResult:
    """The result of ``gputune.hypergradient``: the validation loss after training, and its
    derivatives.

    The derivatives are with respect to the hyperparameters of the training.

    Attributes:
        value: The validation loss.
        gradient: Maps each hyperparameter to d value / d hyperparameter, in the shape of the given
            hyperparameter.
        log_gradient: The gradient times the hyperparameter: d value / d log hyperparameter.
        parameters: Maps each parameter's name to its value after the last step.
        ratio: The factor by which training amplifies a small change. Above ``CHAOTIC`` (100) the
            gradient is noise.
        mode: The method of differentiation: "reverse", "forward", "fd" or "implicit".
        reason: The reason for this mode.

    Example:
        >>> import gputune, torch
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(64, 3)
        >>> y = x.sum(1, keepdim=True)
        >>> module = torch.nn.Linear(3, 1)
        >>> batches = [(x[:48], y[:48])] * 20  # 20 steps on all training rows
        >>> result = gputune.hypergradient(
        ...     module, torch.nn.functional.mse_loss, batches, valid=(x[48:], y[48:]),
        ...     hyperparameters={"lr": 0.01}, optimizer="sgd",
        ... )
        >>> list(result.gradient), result.chaotic
        (['lr'], False)
        >>> sorted(result.parameters)
        ['bias', 'weight']
    """

    value: float
    gradient: Params
    log_gradient: Params
    parameters: Params
    ratio: float
    mode: str
    reason: str

    def __repr__(self) -> str:
        slopes = []
        for name, slope in self.gradient.items():
            shown = f"{slope.item():.4g}" if slope.dim() == 0 else tuple(slope.shape)
            slopes.append(f"{name}: {shown}")
        noise = f"ratio {self.ratio:.3g}{', chaotic' if self.chaotic else ''}"
        return (
            f"HypergradientResult(value {self.value:.4g}, gradient {{{', '.join(slopes)}}}, "
            f"{noise}, {self.mode})"
        )

    @property
    def chaotic(self) -> bool:
        """True if training amplifies small changes so strongly that the gradient is noise."""
        return not self.ratio <= CHAOTIC  # not ">": a ratio of NaN is chaotic too
