"""Newton steps for the logistic regression of many members at once, by conjugate gradients.

A member is one trial (one value of C and l1_ratio) on one fold. Each member has its own line
search. Source: truncated Newton, Nocedal and Wright (2006), algorithm 7.1.

Members with a lasso term move only their nonzero weights, and these keep their signs. A proximal
gradient step first chooses the nonzero weights, and a Newton step then fits them. This is the
scheme of Chen, Curtis and Robinson (2017), doi:10.1137/16M1062259. Departure: both kinds of step
alternate, because a proximal step is cheap compared with a Newton step.

Conjugate gradients with a diagonal preconditioner minimize the quadratic model of a step. If the
minimizer lies across zero, a projected search fixes the weights that reached zero, and conjugate
gradients continue with the other weights. Source: Moré and Toraldo (1991), doi:10.1137/0801008.
Departure: conjugate gradients stop by their residual.

Shape letters: m members, K outputs, n rows, E columns of the design matrix.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gputune.solver.objective import (
    Point,
    SolverRows,
    curvature_diagonal,
    curvature_times,
    origin,
    point_at,
)

LOOSEST = 0.25  # far from the optimum, conjugate gradients may leave this share of the slopes
DAMPING = 0.03  # per unit of violation, as a share of the curvature; fades at the optimum
SUFFICIENT = 1e-4  # required share of the decrease that the slope predicts
ROUNDING = 1e-14  # a smaller decrease, relative to the objective, is lost in float64's rounding
UNSEEN = 1e-11  # below this slope, relative to the objective, the line search compares slopes
HALVINGS = 40  # most halvings of a step in the line search
SINGLE = (1e-20, 1e20)  # range of curvatures whose products and quotients fit single precision
ROUNDS = 3  # rounds of conjugate gradients; the next Newton step continues from there
SEARCHES = 10  # lengths that the projected search tries, each a quarter of the one before
PROJECTED = 0.1  # required share of the predicted decrease in the projected search
FLOOR = 1e-12  # smallest entry of the preconditioner's diagonal, as a share of the largest
STILL = 1e-13  # a step that lowers the objective by a smaller share changes nothing
PATIENCE = 10  # number of such steps in a row after which a member stops
# A member without penalty counts as converged if no logit changed by more than this.
SETTLED = 1e-3

StepFunction = Callable[[SolverRows, Point, float], Point]


def descend(
    rows: SolverRows,
    step: StepFunction,
    ridge: Tensor,
    lasso: Tensor,
    tolerance: float,
    max_steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Repeat the solver's ``step`` for all members until each member has converged or no longer
    changes.

    Finished members are removed from the computation and cost no time. Returns the weights (m, K,
    E) and three tensors (m,): the count of steps, the residual, and whether the member converged.
    """
    point = origin(rows, ridge, lasso)
    weight = point.weight.clone()
    steps = torch.zeros_like(ridge, dtype=torch.int64)
    residual = torch.zeros_like(ridge)
    converged = torch.zeros_like(ridge, dtype=torch.bool)
    active = torch.arange(len(ridge), device=ridge.device)
    still_steps = torch.zeros_like(steps)
    settled = torch.ones_like(converged)
    for taken in range(max_steps + 1):
        gap = point.violation(rows)
        done = (gap <= tolerance) & settled
        weight[active] = point.weight
        steps[active] = taken
        residual[active] = gap
        converged[active] = done
        running = ~done & (still_steps < PATIENCE)
        if taken == max_steps or not running.any():
            break
        active = active[running]
        still_steps = still_steps[running]
        old = point if running.all() else point[running]
        point = step(rows, old, tolerance)
        fall = old.objective - point.objective
        still_steps = torch.where(fall > STILL * point.objective.abs(), 0, still_steps + 1)
        # If the classes are separable and there is no penalty, the gradient also vanishes, but the
        # weights grow forever. Such a member has converged when its logits no longer change.
        settled = ((point.ridge + point.lasso) > 0).flatten(1).any(1)
        if not settled.all():
            settled |= (point.logits - old.logits).abs().amax((1, 2)) < SETTLED
    return weight, steps, residual, converged


@dataclass(frozen=True)
class Model:
    """A quadratic approximation of the objective, as a function of the step from the weights of m
    members.

    Its value is ``slopes . step + step . (Hessian + diag(hold)) step / 2``.
    """

    weight: Tensor  # (m, K, E)
    slopes: Tensor  # (m, K, E) zero for weights that are not free
    free: Tensor  # (m, K, E) bool
    signed: Tensor  # (m, 1, E) bool: the weight may not change its sign
    chance: Tensor  # (m, K, n) class chances at which the Hessian is computed
    hold: Tensor  # (m, K, E) ridge and damping, added to the Hessian's diagonal
    diagonal: Tensor  # (m, K, E) diagonal of the Hessian plus hold
    forcing: Tensor  # (m,) share of the slopes that conjugate gradients may leave, in (0, 1)

    def __getitem__(self, members: Tensor) -> "Model":
        return Model(**{name: part[members] for name, part in vars(self).items()})

    def single(self) -> "Model":
        """Return the quadratic model with its numbers in single precision."""
        parts = vars(self).items()
        numbers = {name: part.float() for name, part in parts if part.dtype != torch.bool}
        return replace(self, **numbers)

    def times(self, rows: SolverRows, step: Tensor) -> Tensor:
        """Multiply a step (m, K, E) by the quadratic model's matrix (Hessian plus hold)."""
        return curvature_times(rows, self.chance, step).addcmul_(self.hold, step).mul_(self.free)


def newton_step(rows: SolverRows, point: Point, tolerance: float) -> Point:
    """Take a Newton step: move each member towards the minimizer of its quadratic model.

    A line search shortens the step until the objective falls. Returns the new point.
    """
    closeness = point.violation(rows)
    # The residual shrinks like its power 1.5, but not much further than the tolerance requires.
    forcing = closeness.sqrt().maximum(0.1 * tolerance / closeness).clamp_max(LOOSEST)
    signed = point.lasso > 0
    free = (point.weight != 0) | ~signed
    slopes = point.steepest * free
    diagonal = curvature_diagonal(rows, point.chance)
    # Without a ridge, the curvature on the nonzero weights may vanish in some direction. Damping
    # limits the step there.
    hold = point.ridge + DAMPING * closeness.clamp_max(1)[:, None, None] * signed * diagonal
    model = Model(point.weight, slopes, free, signed, point.chance, hold, diagonal + hold, forcing)
    # Along the principal axes, conjugate gradients always reach their goal in single precision.
    largest = model.diagonal.amax((1, 2))
    is_single = (largest > SINGLE[0]) & (largest < SINGLE[1])
    if rows.basis is None:
        is_single = torch.zeros_like(is_single)
    step = torch.zeros_like(slopes)
    for members, minimizer in ((is_single, _single_step), (~is_single, minimise)):
        if members.any():
            step[members] = minimizer(rows, model[members])
    return line_search(rows, point, step, dot(slopes, step))


def _single_step(rows: SolverRows, model: Model) -> Tensor:
    """Return the model's minimizer, computed in single precision. A direction needs only few
    digits.

    The slopes and the line search stay in double precision, so the final result is in double
    precision. The unit is each member's largest slope, so that no slope is too small for single
    precision.
    """
    largest = model.slopes.abs().amax((1, 2), keepdim=True)
    unit = largest.clamp_min(torch.finfo(largest.dtype).tiny)
    scaled = replace(model, weight=model.weight / unit, slopes=model.slopes / unit).single()
    return minimise(rows.single(), scaled).to(unit.dtype) * unit


def line_search(rows: SolverRows, point: Point, step: Tensor, slope: Tensor) -> Point:
    """Halve each member's step until the member's objective falls enough, and return the new point.

    A member's weights do not change if no step length is good enough. ``slope`` (m,) is the
    objective's slope along the step. The logits are linear in the step length, so trying a length
    needs no matrix product for the logits.
    """
    before = point.objective
    turn = rows.change_of_logits(step)
    new = point
    active = torch.arange(len(step), device=step.device)
    length = 1.0
    for _ in range(HALVINGS):
        here = point[active] if len(active) < len(step) else point
        weight = here.weight + length * step[active]
        logits = here.logits + length * turn[active]
        trial = point_at(rows, weight, logits, here.ridge, here.lasso)
        enough = (
            before[active] + SUFFICIENT * length * slope[active] + ROUNDING * before[active].abs()
        )
        good = trial.objective <= enough
        # If the predicted decrease is lost in the rounding of the objective, compare slopes
        # instead. Source: the approximate conditions of Hager and Zhang (2005), doi:10.1137/030601880.
        unseen = slope[active].abs() < UNSEEN * before[active].abs()
        good |= unseen & (trial.violation(rows) < here.violation(rows))
        if len(active) == len(step) and good.all():
            return trial
        new = _replace(new, active[good], trial[good])
        active = active[~good]
        if not len(active):
            break
        length /= 2
    return new


def _replace(point: Point, members: Tensor, by: Point) -> Point:
    """Return a copy of ``point`` in which ``members`` have the state of the point ``by``."""
    state = {}
    for name in ("weight", "logits", "chance", "loss", "slope", "error"):
        state[name] = getattr(point, name).index_copy(0, members, getattr(by, name))
    return replace(point, **state)


def proximal_newton_step(rows: SolverRows, point: Point, tolerance: float) -> Point:
    """Take a proximal gradient step, then a Newton step on the weights that stay nonzero.

    The first step has the length 1 / (bound of the curvature), and the lasso shrinks its result.
    The objective never rises.
    """
    length = 1 / (rows.bound + point.ridge)
    target = point.weight - length * point.slope
    target = target.sign() * (target.abs() - length * point.lasso).clamp_min(0)
    if rows.outputs > 1:
        # Softmax does not change if all weights of an input shift by the same amount. Without a
        # ridge only the lasso determines this shift, and it is smallest if their median is zero. A
        # Newton step would have no finite length along this direction.
        only_lasso = (point.ridge == 0) & (point.lasso > 0)
        # Sort, because torch.median has no deterministic version on a GPU.
        middle = target.sort(1).values[:, (rows.outputs - 1) // 2, None]
        target = target - only_lasso * middle
    logits = point.logits + rows.change_of_logits(target - point.weight)
    return newton_step(rows, point_at(rows, target, logits, point.ridge, point.lasso), tolerance)


def minimise(rows: SolverRows, model: Model) -> Tensor:
    """Return the step (m, K, E) of each member that minimizes its model.

    The model's value at the step is below zero, unless all slopes are zero.
    """
    total = torch.zeros_like(model.slopes)
    active = torch.arange(len(total), device=total.device)
    for _ in range(ROUNDS):
        step, product = conjugate_gradients(rows, model)
        crossing = model.signed & ((model.weight + step) * model.weight < 0)
        crosses = crossing.flatten(1).any(1)
        total[active[~crosses]] += step[~crosses]
        if not crosses.any():
            break
        active = active[crosses]
        model = model[crosses]
        step = step[crosses]
        product = product[crosses]
        step, product = projected_search(rows, model, step, product)
        total[active] += step
        weight = model.weight + step
        free = model.free & ((weight != 0) | ~model.signed)
        model = replace(model, weight=weight, free=free, slopes=(model.slopes + product) * free)
    return total


def conjugate_gradients(rows: SolverRows, model: Model) -> tuple[Tensor, Tensor]:
    """Return the step that minimizes the model, and the product of the model's matrix and this
    step.

    Both are (m, K, E). The constraints on the signs of the weights are ignored.
    """
    floor = FLOOR * model.diagonal.amax((1, 2), keepdim=True) + torch.finfo(model.slopes.dtype).tiny
    inverse = model.free / model.diagonal.maximum(floor)
    slopes = model.slopes
    steps = torch.zeros_like(slopes)
    rests = -slopes
    active = torch.arange(len(steps), device=steps.device)
    step = steps
    rest = rests
    direction = inverse * rest
    size = dot(rest, direction)
    goal = model.forcing**2 * size
    for _ in range(2 * steps[0].numel() + 10):
        running = size > goal
        n_running = int(running.sum())
        # Drop members that have stopped, so that they cost no time.
        if 2 * n_running <= len(active):
            steps = steps.index_copy(0, active, step)
            rests = rests.index_copy(0, active, rest)
            if not n_running:
                break
            active = active[running]
            model = model[running]
            inverse = inverse[running]
            step = step[running]
            rest = rest[running]
            direction = direction[running]
            size = size[running]
            goal = goal[running]
            running = running[running]
        product = model.times(rows, direction)
        curvature = dot(direction, product)
        running = running & (curvature > 0)
        stride = torch.where(running, size / curvature, 0)[:, None, None]
        step = torch.addcmul(step, stride, direction)
        rest = torch.addcmul(rest, stride, product, value=-1)
        scaled = inverse * rest
        last = size
        size = torch.where(running, dot(rest, scaled), 0)
        direction = torch.addcmul(
            scaled, torch.where(running, size / last, 0)[:, None, None], direction
        )
    return steps.index_copy(0, active, step), -slopes - rests.index_copy(0, active, rest)


def projected_search(
    rows: SolverRows, model: Model, step: Tensor, product: Tensor
) -> tuple[Tensor, Tensor]:
    """Shorten each step until the model falls enough with crossing weights set to zero.

    A weight is crossing if the step would change its sign, but the model forbids this. If no step
    length is good enough, the step ends at the point at which the first weight reaches zero. The
    model's value always falls there. Returns the step, and the product of the model's matrix and
    the step.
    """
    crossing = model.signed & ((model.weight + step) * model.weight < 0)
    lengths = torch.where(crossing, -model.weight / step, 1.0)
    reach = lengths.flatten(1).amin(1)[:, None, None]
    chosen = torch.where(lengths <= reach, lengths * step, reach * step)
    chosen_product = reach * product
    chosen = torch.where(crossing & (lengths <= reach), -model.weight, chosen)
    active = torch.arange(len(step), device=step.device)
    length = 1.0
    for _ in range(SEARCHES):
        target = model.weight + length * step
        trial = torch.where(
            model.signed & (target * model.weight < 0), -model.weight, length * step
        )
        trial_product = model.times(rows, trial)
        promised = dot(model.slopes, trial)
        good = promised + dot(trial, trial_product) / 2 <= PROJECTED * promised.clamp_max(0)
        chosen[active[good]] = trial[good]
        chosen_product[active[good]] = trial_product[good]
        if good.all():
            break
        active = active[~good]
        model = model[~good]
        step = step[~good]
        length /= 4
    return chosen, chosen_product


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of ``a`` and ``b`` (m, K, E) for each member, (m,)."""
    return (a * b).sum((1, 2))
