"""Steps for the lasso term: a proximal gradient step chooses each member's nonzero weights, Newton fits them.

Source: the reduced-space scheme of Chen, Curtis and Robinson (2017), doi:10.1137/16M1062259. Departure: both
kinds of step alternate, since a proximal step costs little beside a Newton step.
"""

from gputune.engine.logistic import Point, Rows, change_of_logits, point_at
from gputune.engine.newton import newton_step


def proximal_newton_step(rows: Rows, point: Point, tolerance: float) -> Point:
    """A proximal gradient step, then a Newton step on the weights that it left nonzero."""
    return newton_step(rows, proximal_step(rows, point), tolerance)


def proximal_step(rows: Rows, point: Point) -> Point:
    """The gradient step of length 1 / (curvature's bound), shrunk by the lasso; the objective never rises."""
    length = 1 / (rows.bound + point.ridge)
    target = point.weight - length * point.slope
    target = target.sign() * (target.abs() - length * point.lasso).clamp_min(0)
    if rows.outputs > 1:
        # Softmax does not see a shift of an input's weights, so without a ridge the lasso alone decides it: it
        # is least where their median is zero. Newton's step would have no end along it.
        only_lasso = (point.ridge == 0) & (point.lasso > 0)
        target = target - only_lasso * target.median(1, keepdim=True).values
    logits = point.logits + change_of_logits(rows, target - point.weight)
    return point_at(rows, target, logits, point.ridge, point.lasso)
