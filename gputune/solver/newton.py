"""One Newton step of many members at once, by conjugate gradients, with a line search of each member's own.

Source: truncated Newton, Nocedal and Wright (2006), algorithm 7.1; members with a lasso term move their nonzero
weights only and keep their signs, as in Chen, Curtis and Robinson (2017), doi:10.1137/16M1062259.

Steps for the lasso term: a proximal gradient step chooses each member's nonzero weights, Newton fits them.

Source: the reduced-space scheme of Chen, Curtis and Robinson (2017), doi:10.1137/16M1062259. Departure: both
kinds of step alternate, since a proximal step costs little beside a Newton step.
"""

from dataclasses import replace

import torch
from torch import Tensor

from gputune.solver.objective import (
    Point,
    Rows,
    change_of_logits,
    curvature_diagonal,
    objective,
    point_at,
    steepest,
    violation,
)
from gputune.solver.quadratic import Model, dot, minimise

LOOSEST = 0.25  # share of the slopes that conjugate gradients may leave far from the optimum
DAMPING = 0.03  # per unit of violation, as a share of the curvature; fades at the optimum
SUFFICIENT = 1e-4  # of the decrease that the slope promises
ROUNDING = 1e-14  # share of the objective below which float64 sees no decrease
UNSEEN = 1e-11
HALVINGS = 40
SINGLE = (1e-20, 1e20)  # curvatures whose products and quotients single precision holds
COARSE = 1e-3  # violation above which single precision finds a direction that is good enough


def newton_step(rows: Rows, point: Point, tolerance: float) -> Point:
    """Move each member to the minimiser of its quadratic model, or as far towards it as the objective falls."""
    closeness = violation(rows, point)
    # The residual shrinks like its power 1.5, but not far beyond what was asked for.
    forcing = closeness.sqrt().maximum(0.1 * tolerance / closeness).clamp_max(LOOSEST)
    signed = point.lasso > 0
    free = (point.weight != 0) | ~signed
    slopes = steepest(point) * free
    diagonal = curvature_diagonal(rows, point.chance)
    # Without a ridge the curvature on the nonzero weights may vanish in a direction: hold steps back there.
    damping = DAMPING * closeness.clamp_max(1)[:, None, None] * signed
    hold = point.ridge + damping * diagonal
    model = Model(point.weight, slopes, free, signed, point.chance, hold, diagonal + hold, forcing)
    # Along the principal axes conjugate gradients reach their goal in single precision to the end.
    coarse = (closeness > COARSE) | (not signed.any() and rows.basis is not None)
    largest = model.diagonal.amax((1, 2))
    coarse &= (largest > SINGLE[0]) & (largest < SINGLE[1])
    new = _moved(rows, point, model, coarse)
    stuck = coarse & (objective(new) >= objective(point)) & (closeness > tolerance) & signed.flatten(1).any(1)
    if stuck.any():
        left = stuck.nonzero()[:, 0]
        new = _replaced(new, left, _moved(rows, point[left], model[left], torch.zeros_like(stuck)[left]))
    return new


def _moved(rows: Rows, point: Point, model: Model, coarse: Tensor) -> Point:
    """Go to the minimiser of the model, found in single precision for the members ``coarse`` (m,)."""
    if coarse.all():
        step = _coarse_step(rows, model)
    elif not coarse.any():
        step = minimise(rows, model)
    else:
        step = torch.zeros_like(model.slopes)
        step[coarse], step[~coarse] = _coarse_step(rows, model[coarse]), minimise(rows, model[~coarse])
    return line_search(rows, point, step, dot(model.slopes, step))


def _coarse_step(rows: Rows, model: Model) -> Tensor:
    """Minimise the model in single precision, which finds the direction to the few digits that are asked for.

    The slopes and the line search stay in double precision, so the end does. It is in units of each member's largest
    slope, so that none is too small for single precision. A weight that comes to zero does so exactly.
    """
    unit = model.slopes.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(model.slopes.dtype).tiny)
    scaled = replace(model, weight=model.weight / unit, slopes=model.slopes / unit).single()
    step = minimise(rows.single(), scaled)
    exact = step.to(unit.dtype) * unit
    ends = model.signed & ((step == -scaled.weight) | ((model.weight + exact) * model.weight < 0))
    return torch.where(ends, -model.weight, exact)


def line_search(rows: Rows, point: Point, step: Tensor, slope: Tensor) -> Point:
    """Halve each member's step until its objective falls enough; a member for which none does stays.

    ``slope`` (m,) is the objective's slope along the step. The logits are linear in the length, so trying one
    costs no product.
    """
    before, turn = objective(point), change_of_logits(rows, step)
    new, left, length = point, torch.arange(len(step), device=step.device), 1.0
    for _ in range(HALVINGS):
        here = point[left] if len(left) < len(step) else point
        trial = point_at(
            rows,
            here.weight + length * step[left],
            here.logits + length * turn[left],
            here.ridge,
            here.lasso,
        )
        enough = before[left] + SUFFICIENT * length * slope[left] + ROUNDING * before[left].abs()
        good = objective(trial) <= enough
        good |= _unseen(before[left], slope[left]) & (violation(rows, trial) < violation(rows, here))
        if len(left) == len(step) and good.all():
            return trial
        new = _replaced(new, left[good], trial[good])
        left = left[~good]
        if not len(left):
            break
        length /= 2
    return new


def _unseen(objective: Tensor, slope: Tensor) -> Tensor:
    """Whether the decrease that a slope promises is lost in the rounding of the objective, so that slopes must judge.

    Source: the approximate conditions of Hager and Zhang (2005), doi:10.1137/030601880.
    """
    return slope.abs() < UNSEEN * objective.abs()


def _replaced(point: Point, members: Tensor, by: Point) -> Point:
    """The point with some members' state taken from another."""
    state = ("weight", "logits", "chance", "loss", "slope", "error")
    return replace(
        point, **{name: getattr(point, name).index_copy(0, members, getattr(by, name)) for name in state}
    )


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
