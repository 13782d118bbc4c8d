"""The logistic regression solved to convergence for every (C, l1_ratio, fold) at once, in float64."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gputune.errors import InputError
from gputune.solver.newton import newton_step, proximal_newton_step
from gputune.solver.objective import Point, Rows, objective, origin, rows_of, violation

CPU_NUMBERS, GPU_NUMBERS = 2**18, 2**27  # in one (members, outputs, rows) tensor of a chunk: cache, memory
STILL = 1e-13  # a step that lowers the objective by a smaller share changes nothing
PATIENCE = 10  # such steps in a row before a member is given up
CONSTANT = 1e-13  # spread of an input, as a share of its mean, that is rounding alone
HUGE = 1e10  # input beyond which each is measured in a unit of its own, or squares and their sums overflow
SETTLED = 1e-3  # largest last change of a logit with which a member without penalty counts as converged

Step = Callable[[Rows, Point, float], Point]


@dataclass(frozen=True)
class Solution:
    """The P = F * C solved members, fold-major (p = f * C + c).

    ``residual`` is the largest violation of the optimality conditions, free of the units of C, of the inputs and
    of the weights: the smallest subgradient of the mean loss plus penalty / (C * sum of weights) in each
    coefficient over its input's root mean square (1 for an intercept), over the mean largest misfit of a row's
    class chances. At 1e-10 the terms of the gradient's sum cancel to ten digits.
    """

    coef: Tensor  # (P, K, D); K = 1 for two classes (sigmoid, class 1 positive), else the number of classes
    intercept: Tensor  # (P, K); over more than two classes the finite ones sum to zero
    steps: Tensor  # (P,) int64 Newton steps taken
    residual: Tensor  # (P,)
    converged: Tensor  # (P,) bool


def solve(
    x: Tensor,
    y: Tensor,
    weights: Tensor,
    *,
    C: Tensor,
    l1_ratio: Tensor,
    n_classes: int,
    fit_intercept: bool = True,
    tolerance: float = 1e-10,
    max_steps: int = 100,
    present: Tensor | None = None,
) -> Solution:
    """Minimise ``C * sum_i w_i loss_i + (1 - l1_ratio) / 2 ||W||^2 + l1_ratio ||W||_1`` for every fold and C.

    x (F, n, D) float64, one preprocessed copy a fold; y (n,) class codes; weights (F, n) >= 0, 0 for a row that
    is no training row of the fold; C (C,) > 0, inf for no penalty; l1_ratio (C,) in [0, 1]. ``present`` (F, K)
    says which classes have a training row; one whose rows all weigh 0 is absent as well. An absent class gets
    coefficients 0 and intercept -inf, the others are solved without it; where only one of two classes is present,
    the sigmoid's intercept is inf or -inf. A fold with inputs that are not finite gets NaN.

    A member that has not reached ``tolerance`` after ``max_steps``, or that float64 lets come no nearer, has
    ``converged`` false and the finite coefficients that it reached. Raises InputError where an argument breaks
    these rules. Objective: sklearn.linear_model.LogisticRegression's.
    """
    _check(x, y, weights, C, l1_ratio, n_classes)
    occurs = torch.stack([torch.bincount(y[w > 0], minlength=n_classes) > 0 for w in weights])
    if present is not None and bool((occurs & ~present).any()):
        raise InputError("solve needs present=True for every class with a weight above zero in the fold.")
    parts, jobs = [], []
    for f, classes in enumerate(occurs):
        keep = weights[f] > 0
        parts.append(_nothing_learned(classes, len(C), x[f]))
        if not x[f, keep].isfinite().all():
            parts[-1].coef.fill_(torch.nan)
            parts[-1].converged.fill_(False)
        elif int(classes.sum()) > 1:
            fold = x[f, keep], y[keep], weights[f, keep], classes
            jobs += _jobs(parts[-1], *fold, C, l1_ratio, fit_intercept, tolerance, max_steps)
    _run(jobs, x.device)
    return Solution(
        *(torch.cat([getattr(part, name) for part in parts]) for name in Solution.__dataclass_fields__)
    )


def _run(jobs: Sequence[Callable[[], None]], device: torch.device) -> None:
    """Do all jobs: on a CPU as many at a time as torch has threads, each with one of them.

    The products of a chunk are too small to be shared by threads; whole chunks are not.
    """
    threads = min(torch.get_num_threads(), len(jobs)) if device.type == "cpu" else 1
    if threads <= 1:
        for job in jobs:
            job()
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(lambda job: job(), jobs))  # the list raises what a job has raised


def _jobs(
    solution: Solution,
    x: Tensor,
    y: Tensor,
    weights: Tensor,
    classes: Tensor,
    C: Tensor,
    l1_ratio: Tensor,
    fit_intercept: bool,
    tolerance: float,
    max_steps: int,
) -> list[Callable[[], None]]:
    """Return what solves all C of one fold on its own rows, chunk by chunk, and writes its part of ``solution``.

    ``classes`` (K,) says which occur, two at least.
    """
    kept = torch.arange(1, device=x.device) if len(classes) == 2 else classes.nonzero()[:, 0]
    codes = (classes.cumsum(0) - 1)[y]
    total = weights.sum()
    share = weights / total
    huge = bool(x.abs().amax() > HUGE)
    scale = _scale(x) if huge else torch.ones_like(x[0])
    x, center = _centred(x / scale, share) if fit_intercept else (x / scale, torch.zeros_like(x[0]))
    most = torch.finfo(x.dtype).max  # infinity times the intercept's 0 would be NaN
    lasso, ridge = ((part / (C * total)).clamp_max(most) for part in (l1_ratio, 1 - l1_ratio))

    def solve_chunk(rows: Rows, step: Step, members: Tensor) -> None:
        descent = descend(rows, step, ridge[members], lasso[members], tolerance, max_steps)
        weight = descent.weight if rows.basis is None else descent.weight @ rows.basis
        if rows.basis is not None and len(kept) > 1:
            # Exactly so at the optimum; without a penalty softmax leaves it open.
            weight = weight - weight.mean(1, keepdim=True)
        _write(solution, members, kept, weight, center, scale)
        solution.steps[members], solution.residual[members] = descent.steps, descent.residual
        solution.converged[members] = descent.converged

    jobs: list[Callable[[], None]] = []
    for step, which in ((newton_step, lasso == 0), (proximal_newton_step, lasso > 0)):
        if which.any():
            rotate = step is newton_step and not huge  # a ridge is not the same in all units
            rows = rows_of(x, codes, share, len(kept), intercept=fit_intercept, rotate=rotate, scale=scale)
            jobs += [partial(solve_chunk, rows, step, members) for members in _chunks(which, C, rows)]
    return jobs


def _nothing_learned(classes: Tensor, members: int, x: Tensor) -> Solution:
    """Zero coefficients, and intercepts that rule out the classes that do not occur."""
    outputs = 1 if len(classes) == 2 else len(classes)
    intercept = x.new_zeros(len(classes)).masked_fill(~classes, -torch.inf)
    if outputs == 1:
        intercept = intercept[1:] - intercept[:1]
    return Solution(
        coef=x.new_zeros(members, outputs, x.shape[1]),
        intercept=intercept.expand(members, -1).clone(),
        steps=torch.zeros(members, dtype=torch.int64, device=x.device),
        residual=x.new_zeros(members),
        converged=torch.ones(members, dtype=torch.bool, device=x.device),
    )


def _scale(x: Tensor) -> Tensor:
    """Return the power of two, (D,), at or below each input's largest value."""
    exponent = x.abs().amax(0).frexp().exponent - 1
    return exponent.to(x.dtype).exp2()


def _centred(x: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs less their weighted means, and the means; a constant input becomes zeros, not rounding errors."""
    center = share @ x
    x = x - center
    spread = (share @ x**2).sqrt()
    return x * (spread > CONSTANT * center.abs()), center


def _chunks(which: Tensor, C: Tensor, rows: Rows) -> tuple[Tensor, ...]:
    """The chosen members in chunks of a bounded size; alike C take about as many steps, so they go together."""
    members = which.nonzero()[:, 0]
    members = members[C[members].argsort(stable=True)]
    numbers = CPU_NUMBERS if C.device.type == "cpu" else GPU_NUMBERS
    return torch.split(members, max(1, numbers // (rows.outputs * len(rows.design))))


def _write(
    solution: Solution, members: Tensor, kept: Tensor, weight: Tensor, center: Tensor, scale: Tensor
) -> None:
    """Put weights (m, K', D or D + 1) into the rows of the classes kept, the inputs' centring and scale undone."""
    inputs = len(center)
    coef = weight[..., :inputs]
    intercept = (weight[..., inputs:].sum(-1)) - coef @ center
    if solution.coef.shape[1] > 1 and weight.shape[-1] > inputs:
        intercept = intercept - intercept.mean(1, keepdim=True)  # softmax does not see a common shift
    solution.coef[members[:, None], kept] = coef / scale
    solution.intercept[members[:, None], kept] = intercept


@dataclass(frozen=True)
class Descent:
    """Where m members of a fold ended."""

    weight: Tensor  # (m, K, E)
    steps: Tensor  # (m,)
    residual: Tensor  # (m,)
    converged: Tensor  # (m,) bool


def descend(
    rows: Rows, step: Step, ridge: Tensor, lasso: Tensor, tolerance: float, max_steps: int
) -> Descent:
    """Step all members until each has converged or changes no more; who is done leaves and costs nothing."""
    point = origin(rows, ridge, lasso)
    steps, residual = torch.zeros_like(ridge, dtype=torch.int64), torch.zeros_like(ridge)
    end = Descent(point.weight.clone(), steps, residual, torch.zeros_like(ridge, dtype=torch.bool))
    left = torch.arange(len(ridge), device=ridge.device)
    idle, calm = torch.zeros_like(steps), torch.ones_like(end.converged)
    for taken in range(max_steps + 1):
        gap = violation(rows, point)
        converged = (gap <= tolerance) & calm
        end.weight[left], end.steps[left] = point.weight, taken
        end.residual[left], end.converged[left] = gap, converged
        going = ~converged & (idle < PATIENCE)
        if taken == max_steps or not going.any():
            break
        left, idle = left[going], idle[going]
        old = point if going.all() else point[going]
        point = step(rows, old, tolerance)
        fall = objective(old) - objective(point)
        idle = torch.where(fall > STILL * objective(point).abs(), 0, idle + 1)
        calm = _calm(old, point)
    return end


def _calm(old: Point, new: Point) -> Tensor:
    """Members whose last step was small, or that a penalty holds.

    Where classes can be separated and no penalty holds the weights, the gradient vanishes too, but the weights
    grow for ever.
    """
    held = ((new.ridge + new.lasso) > 0).flatten(1).any(1)
    if held.all():
        return held
    return held | ((new.logits - old.logits).abs().amax((1, 2)) < SETTLED)


def _check(x: Tensor, y: Tensor, weights: Tensor, C: Tensor, l1_ratio: Tensor, n_classes: int) -> None:
    """Raise InputError where an argument of ``solve`` breaks its rules."""
    if x.dtype != torch.float64 or weights.dtype != torch.float64:
        raise InputError(
            f"solve needs float64 x and weights, got {x.dtype} and {weights.dtype}; use .double()."
        )
    if x.ndim != 3 or x.shape[:2] != weights.shape or x.shape[1:2] != y.shape:
        raise InputError(
            "solve needs x (folds, rows, inputs), weights (folds, rows) and y (rows,), "
            f"got {tuple(x.shape)}, {tuple(weights.shape)} and {tuple(y.shape)}."
        )
    if n_classes < 2 or int(y.min()) < 0 or int(y.max()) >= n_classes:
        raise InputError(
            f"solve needs class codes y in 0 .. n_classes - 1 and n_classes >= 2, "
            f"got codes {int(y.min())} .. {int(y.max())} and {n_classes=}."
        )
    if not bool((weights >= 0).all() & (weights > 0).any(1).all()):
        raise InputError(
            "solve needs weights >= 0 with one above zero in every fold: is a fold without rows?"
        )
    if C.shape != l1_ratio.shape or C.ndim != 1 or not bool((C > 0).all()):
        raise InputError(f"solve needs C > 0, one for each l1_ratio (inf = no penalty), got C={C.tolist()}.")
    if not bool(((l1_ratio >= 0) & (l1_ratio <= 1)).all()):
        raise InputError(f"solve needs l1_ratio from 0 (l2) to 1 (l1), got {l1_ratio.tolist()}.")
