"""Newton's method with conjugate gradients for all members of a fold at once, each on its own free weights.

Source: truncated Newton, Nocedal and Wright (2006), algorithm 7.1, with a diagonal preconditioner.
"""

from dataclasses import replace

import torch
from torch import Tensor

from gputune.engine.logistic import (
    Point,
    Rows,
    change_of_logits,
    curvature,
    curvature_diagonal,
    evaluate,
    penalty,
    smooth_slope,
    steepest,
    violation,
)

SUFFICIENT = 1e-4  # Armijo's share of the predicted decrease
ROUNDING = 1e-14  # decreases below this share of the objective cannot be seen in float64
HALVINGS = 40


def newton_step(rows: Rows, point: Point) -> Point:
    """One Newton step of each member on its nonzero and unpenalised weights, kept within their signs."""
    gradient = smooth_slope(rows, point)
    slopes = steepest(rows, point, gradient)
    ridge0=point.ridge
    vio=violation(rows, point, gradient)
    forcing = vio.sqrt().clamp(1e-8, FORCING)
    diagonal = curvature_diagonal(rows, point.chance)+ point.ridge * rows.penalised
    damp=KAPPA*vio.clamp_max(1)[:,None,None]*diagonal*(point.lasso>0)
    point=replace(point,ridge=point.ridge+damp/rows.penalised.clamp_min(1e-300)) if KAPPA else point
    signed = point.lasso * rows.penalised > 0
    free = (point.weight != 0) | ~signed
    step = _within_signs(rows, point, slopes * free, free, signed, forcing)
    if KAPPA: point=replace(point,ridge=ridge0)
    return line_search(rows, point, step, _dot(slopes, step))

FORCING = 0.25
KAPPA = 0.0
ROUNDS = 10
LENGTHS = [.25**i for i in range(10)]
ARM = 0.1
COUNT = [0, 0, 0]

def _within_signs(rows, point, slopes, free, signed, forcing):
    """Minimise the quadratic model over the weights whose signs do not change."""
    diagonal = curvature_diagonal(rows, point.chance) + point.ridge * rows.penalised
    total = torch.zeros_like(slopes)
    left = torch.arange(len(slopes), device=slopes.device)
    start_size = None
    for _ in range(ROUNDS):
        COUNT[1] += len(left)
        step, bent = conjugate_gradients(rows, point, slopes, free, forcing, diagonal)
        crosses = signed & ((point.weight + step) * point.weight < 0)
        inside = ~crosses.flatten(1).any(1)
        total[left] += step * inside[:, None, None]
        if inside.all():
            break
        go = ~inside
        left, point, slopes, free, forcing, diagonal = left[go], point[go], slopes[go], free[go], forcing[go], diagonal[go]
        step, bent, crosses = step[go], bent[go], crosses[go]
        signed = signed[go] if len(signed) > 1 else signed
        # to the first boundary
        reach = torch.where(crosses, -point.weight / step, 1.0).flatten(1).amin(1)[:, None, None]
        first = torch.where(crosses & (-point.weight / step <= reach), -point.weight, reach * step)
        first_bent = reach * bent
        best = _dot(slopes, first) + _dot(first, first_bent) / 2
        chosen, chosen_bent = first, first_bent
        accepted = torch.zeros_like(best, dtype=torch.bool)
        for length in LENGTHS:
            target = point.weight + length * step
            clipped = torch.where(signed & (target * point.weight < 0), -point.weight, length * step)
            clipped_bent = (curvature(rows, point.chance, clipped) + point.ridge * rows.penalised * clipped) * free
            COUNT[0] += len(left)
            value = _dot(slopes, clipped) + _dot(clipped, clipped_bent) / 2
            good = (value < ARM * _dot(slopes, clipped)) & (value < best) & ~accepted
            accepted |= good
            better = good[:, None, None]
            chosen, chosen_bent = torch.where(better, clipped, chosen), torch.where(better, clipped_bent, chosen_bent)
            if accepted.all(): break
        total[left] += chosen
        weight = point.weight + chosen
        free = free & ((weight != 0) | ~signed)
        slopes = (slopes + chosen_bent) * free
        point = replace(point, weight=weight)
    return total


def conjugate_gradients(rows: Rows, point: Point, slopes: Tensor, free: Tensor, forcing: Tensor, diagonal):
    """Solve Hessian x step = -slopes on the free weights until the residual shrinks by ``forcing`` (m,)."""
    chance, ridge = point.chance, point.ridge * rows.penalised
    floor = diagonal.amax((1, 2), keepdim=True) * 1e-12 + torch.finfo(slopes.dtype).tiny
    inverse = free / diagonal.clamp_min(floor)
    step = torch.zeros_like(slopes)
    rest = -slopes
    scaled = inverse * rest
    direction = scaled
    size = _dot(rest, scaled)
    goal = forcing**2 * size
    for _ in range(2 * slopes[0].numel() + 10):
        running = size > goal
        if not running.any():
            break
        COUNT[0] += int(running.sum()); COUNT[2] += len(running)
        bent = (curvature(rows, chance, direction) + ridge * direction) * free
        bend = _dot(direction, bent)
        running &= bend > 0
        stride = torch.where(running, size / bend.where(running, torch.ones_like(bend)), 0)[:, None, None]
        step = step + stride * direction
        rest = rest - stride * bent
        scaled = inverse * rest
        next_size = torch.where(running, _dot(rest, scaled), 0)
        ratio = torch.where(running, next_size / size.where(running, torch.ones_like(size)), 0)
        direction = scaled + ratio[:, None, None] * direction
        size = next_size
    return step, -slopes - rest


def line_search(rows: Rows, point: Point, step: Tensor, decline: Tensor) -> Point:
    """Halve each member's step until the objective falls enough; a member for which none does stays.

    ``decline`` (m,) is the slope of the objective along the step, negative where it descends.
    """
    before = point.loss + penalty(rows, point, point.weight)
    turn = change_of_logits(rows, step)
    new = replace(point, weight=point.weight.clone(), logits=point.logits.clone(), chance=point.chance.clone(), loss=point.loss.clone())
    pending = (decline < 0).nonzero()[:, 0]
    length = 1.0
    for _ in range(HALVINGS):
        if not len(pending):
            break
        here = point[pending]
        weight = here.weight + length * step[pending]
        logits = here.logits + length * turn[pending]
        chance, loss = evaluate(rows, logits)
        bound = before[pending] + SUFFICIENT * length * decline[pending] + ROUNDING * before[pending]
        good = loss + penalty(rows, here, weight) <= bound
        index = pending[good]
        new.weight[index], new.logits[index] = weight[good], logits[good]
        new.chance[index], new.loss[index] = chance[good], loss[good]
        pending = pending[~good]
        length /= 2
    return new


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2))
