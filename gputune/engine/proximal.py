"""Steps for the lasso term: a proximal gradient step chooses each member's nonzero weights, Newton fits them.

Source: the reduced-space scheme of Chen, Curtis and Robinson (2017), doi:10.1137/16M1062259.
"""

from dataclasses import replace

import torch
from torch import Tensor

from gputune.engine.logistic import Point, Rows, change_of_logits, moved, smooth_slope
from gputune.engine.newton import newton_step


def bound_of_curvature(rows: Rows) -> Tensor:
    """An upper bound of the mean loss's curvature in any direction, a scalar.

    Source: Böhning (1992): softmax's curvature is at most half the rows' second moment, sigmoid's a quarter.
    """
    largest = torch.linalg.eigvalsh(rows.design.T @ rows.design)[-1]
    return largest * (0.25 if rows.sigmoid else 0.5)


def proximal_newton_step(rows: Rows, point: Point, bound: Tensor) -> Point:
    """A proximal gradient step, then a Newton step on the weights that it left nonzero."""
    return newton_step(rows, _centred(rows, proximal_step(rows, point, bound)))


def proximal_step(rows: Rows, point: Point, bound: Tensor) -> Point:
    """The step of length 1 / bound, after which the objective is never higher."""
    length = 1 / (bound + point.ridge)
    target = point.weight - length * smooth_slope(rows, point)
    target = target.sign() * (target.abs() - length * point.lasso * rows.penalised).clamp_min(0)
    return moved(rows, point, target - point.weight)


def _centred(rows: Rows, point: Point) -> Point:
    """Shift each input's weights so that their median over classes is zero, where there is no ridge.

    The softmax does not see the shift and the lasso term is least there; without it the curvature along the
    shift is zero and Newton's step has no end.
    """
    if rows.sigmoid:
        return point
    free = (point.ridge == 0) * rows.penalised
    shift = free * point.weight.median(1, keepdim=True).values
    change = shift * rows.root.new_ones(1, rows.classes, 1)
    return replace(point, weight=point.weight - shift, logits=point.logits - change_of_logits(rows, change))
