"""The logistic regression's objective on one fold's rows, for many members at once: value, slope, curvature.

It is scikit-learn's, divided by C times the sum of the row weights, so that any C up to infinity is one scale:
``mean loss + ridge / 2 ||W||^2 + lasso ||W||_1``, intercepts not penalised. All members read the same rows, so
the products with the rows are one matrix product of width members x outputs, and no operation mixes members.
Axes: m members, K outputs (1 = sigmoid, else softmax), E columns (inputs, then the intercept's), n rows.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The rows of one fold that carry weight, as every member of the fold sees them."""

    design: Tensor  # (n, E), each row times ``root``; the last column is the intercept's where ``intercept``
    root: Tensor  # (n,) square root of the row's share of the weight; the squares sum to 1
    codes: Tensor  # (n,) class of each row, 0 .. classes - 1
    classes: int
    intercept: bool
    penalised: Tensor  # (E,) 1, and 0 for the intercept
    scale: Tensor  # (D,) root mean square of each input and of the intercept's 1: the unit of a slope
    basis: Tensor | None  # (E, D) directions of the columns in the inputs' coordinates; None: the same

    @property
    def outputs(self) -> int:
        return 1 if self.classes == 2 and self.sigmoid else self.classes

    sigmoid: bool = False


@dataclass(frozen=True)
class Point:
    """Where each member stands, and its strengths of penalty."""

    weight: Tensor  # (m, K, E)
    logits: Tensor  # (m, K, n)
    chance: Tensor  # (m, K, n) of each class given the row
    loss: Tensor  # (m,) mean loss, without the penalty
    ridge: Tensor  # (m, 1, 1)
    lasso: Tensor  # (m, 1, 1)

    def __getitem__(self, keep: Tensor) -> "Point":
        return Point(*(getattr(self, name)[keep] for name in self.__dataclass_fields__))


def start(rows: Rows, ridge: Tensor, lasso: Tensor) -> Point:
    """All members at zero; ridge and lasso are (m,)."""
    members = len(ridge)
    weight = rows.design.new_zeros(members, rows.outputs, rows.design.shape[1])
    logits = rows.design.new_zeros(members, rows.outputs, len(rows.design))
    chance, loss = evaluate(rows, logits)
    return Point(weight, logits, chance, loss, ridge[:, None, None], lasso[:, None, None])


def evaluate(rows: Rows, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the chances (m, K, n) and the mean loss (m,) at the logits."""
    share = rows.root**2
    if rows.sigmoid:
        sign = 1 - 2 * rows.codes
        return logits.sigmoid(), torch.nn.functional.softplus(sign * logits, threshold=40)[:, 0] @ share
    log_chance = logits.log_softmax(1)
    picked = log_chance.gather(1, rows.codes.expand(len(logits), 1, -1))[:, 0]
    return log_chance.exp_(), -(picked @ share)


def slope(rows: Rows, chance: Tensor) -> Tensor:
    """Slope of the mean loss in the weights, (m, K, E): sum over rows of share x (chance - onehot) x row."""
    return _back(rows, misfit(rows, chance) * rows.root)


def misfit(rows: Rows, chance: Tensor) -> Tensor:
    """Chance minus truth, (m, K, n)."""
    if rows.sigmoid:
        return chance - rows.codes
    truth = torch.nn.functional.one_hot(rows.codes, rows.classes).T
    return chance - truth


def curvature(rows: Rows, chance: Tensor, direction: Tensor) -> Tensor:
    """Hessian of the mean loss times a direction (m, K, E)."""
    along = _forth(rows, direction)
    if rows.sigmoid:
        return _back(rows, along.mul_(chance).mul_(1 - chance))
    along.mul_(chance)
    return _back(rows, along.sub_(chance * along.sum(1, keepdim=True)))


def curvature_diagonal(rows: Rows, chance: Tensor) -> Tensor:
    """Diagonal of the Hessian of the mean loss, (m, K, E)."""
    return _product(chance * (1 - chance), rows.design**2)


def change_of_logits(rows: Rows, direction: Tensor) -> Tensor:
    """By how much a step along direction changes the logits, (m, K, n)."""
    return _forth(rows, direction) / rows.root


def penalty(rows: Rows, point: Point, weight: Tensor) -> Tensor:
    """The penalty (m,) at weights (m, K, E)."""
    held = weight * rows.penalised
    return (point.ridge / 2 * held**2 + point.lasso * held.abs()).sum((1, 2))


def smooth_slope(rows: Rows, point: Point) -> Tensor:
    """Slope (m, K, E) of all but the lasso term."""
    return slope(rows, point.chance) + point.ridge * rows.penalised * point.weight


def steepest(rows: Rows, point: Point, gradient: Tensor) -> Tensor:
    """The element of least size of the subdifferential, (m, K, E), zero exactly at the optimum."""
    lasso = point.lasso * rows.penalised
    at_zero = gradient.sign() * (gradient.abs() - lasso).clamp_min(0)
    return torch.where(point.weight == 0, at_zero, gradient + lasso * point.weight.sign())


def violation(rows: Rows, point: Point, gradient: Tensor) -> Tensor:
    """How far each member is from optimal, (m,): see ``exact.Solution.residual``."""
    slopes = steepest(rows, point, gradient)
    if rows.basis is not None:
        slopes = slopes @ rows.basis
    error = (misfit(rows, point.chance).abs().amax(1)) @ rows.root**2
    return (slopes.abs() / rows.scale).amax((1, 2)) / error.clamp_min(torch.finfo(slopes.dtype).tiny)


def moved(rows: Rows, point: Point, step: Tensor) -> Point:
    """The point after a step (m, K, E)."""
    logits = point.logits + change_of_logits(rows, step)
    chance, loss = evaluate(rows, logits)
    return replace(point, weight=point.weight + step, logits=logits, chance=chance, loss=loss)


def _forth(rows: Rows, direction: Tensor) -> Tensor:
    return _product(direction, rows.design.T)


def _back(rows: Rows, values: Tensor) -> Tensor:
    return _product(values, rows.design)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """(m, K, a) times the shared (a, b) as one wide product."""
    return (left.flatten(0, 1) @ right).unflatten(0, left.shape[:2])
