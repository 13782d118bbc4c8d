"""The logistic regression solved to convergence for every (C, l1_ratio, fold) at once, in float64;
and scored once."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from gputune.data.dataset import Dataset
from gputune.engine.job import Outcome
from gputune.errors import InputError, warn
from gputune.models import LogisticRegression
from gputune.scoring.scoring import BestOutputs, Scoring
from gputune.solver.newton import Step, descend, newton_step, proximal_newton_step
from gputune.solver.objective import Rows, rows_of
from gputune.types import Config, first_metric

# in one (members, outputs, rows) tensor of a chunk: cache, memory
CPU_NUMBERS = 2**18
GPU_NUMBERS = 2**27
# numbers of all inputs that are solved at the same time, of each fold and kind of step
HELD = 2**25
CONSTANT = 1e-13  # spread of an input, as a share of its mean, that is rounding alone
# input beyond which each is measured in a unit of its own, or squares and their sums overflow
HUGE = 1e10

Jobs = list[Callable[[], None]]


@dataclass(frozen=True)
class Solution:
    """The P = F * C solved members, fold-major (p = f * C + c).

    ``residual`` is the largest violation of the optimality conditions, free of the units of C, of
    the inputs and of the weights: the smallest subgradient of the mean loss plus penalty / (C * sum
    of weights) in each coefficient over its input's root mean square (1 for an intercept), over the
    mean largest misfit of a row's class chances. At 1e-10 the terms of the gradient's sum cancel to
    ten digits.
    """

    # (P, K, D); K = 1 for two classes (sigmoid, class 1 positive), else the number of classes
    coef: Tensor
    intercept: Tensor  # (P, K); over more than two classes the finite ones sum to zero
    steps: Tensor  # (P,) int64 Newton steps taken
    residual: Tensor  # (P,)
    converged: Tensor  # (P,) bool


class _Inputs:
    """The rows of data as each fold reads them: a copy of those that are asked for, all folds at
    once take much."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __getitem__(self, place: tuple[int, Tensor]) -> Tensor:
        """Return rows of a fold, by their positions or as bool (n,)."""
        fold, rows = place
        return self.data.rows(fold, rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows)[0]


@dataclass(frozen=True, eq=False)
class Problem:
    """``C * sum_i w_i loss_i + (1 - l1_ratio) / 2 ||W||^2 + l1_ratio ||W||_1``, to be minimised for
    every fold and C.

    A class that has no row with a weight above zero in a fold is absent: it gets coefficients 0 and
    intercept -inf, the others are solved without it; where only one of two classes is present, the
    sigmoid's intercept is inf or -inf. A fold with inputs that are not finite gets NaN. Objective:
    sklearn.linear_model.LogisticRegression's.
    """

    x: Tensor | _Inputs  # (F, n, D) float64, preprocessed
    y: Tensor  # (n,) class codes
    weights: Tensor  # (F, n) >= 0, 0 for a row that is no training row of the fold
    C: Tensor  # (C,) > 0, inf for no penalty
    l1_ratio: Tensor  # (C,) in [0, 1]
    n_classes: int
    fit_intercept: bool = True
    tolerance: float = 1e-10
    max_steps: int = 100

    def __post_init__(self) -> None:
        if self.C.shape != self.l1_ratio.shape or self.C.ndim != 1 or not bool((self.C > 0).all()):
            raise InputError(
                "solve needs C > 0, one for each l1_ratio (inf = no penalty), got "
                f"C={self.C.tolist()}."
            )
        if not bool(((self.l1_ratio >= 0) & (self.l1_ratio <= 1)).all()):
            raise InputError(
                f"solve needs l1_ratio from 0 (l2) to 1 (l1), got {self.l1_ratio.tolist()}."
            )


def solve(problem: Problem) -> Solution:
    """Solve a problem for every fold and C.

    A member that has not reached the tolerance after ``max_steps``, or that float64 lets come no
    nearer, has
    ``converged`` false and the finite coefficients that it reached.
    """
    parts: list[Solution] = []
    jobs: Jobs = []
    held = 0
    for f in range(len(problem.weights)):
        solution, groups = _fold(problem, f)
        parts.append(solution)
        for more, numbers in groups:
            jobs += more
            more.clear()  # jobs that wait hold several copies of their rows, and nothing else does
            held += numbers
            if held + numbers > HELD:
                _run(jobs, problem.y.device)
                jobs = []
                held = 0
    _run(jobs, problem.y.device)
    return Solution(
        *(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Solution))
    )


def _run(jobs: Jobs, device: torch.device) -> None:
    """Do all jobs, on a CPU as many at once as torch has threads: the products of a chunk are too
    small to share."""
    threads = min(torch.get_num_threads(), len(jobs)) if device.type == "cpu" else 1
    if threads <= 1:
        for job in jobs:
            job()
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(lambda job: job(), jobs))  # the list raises what a job has raised


def _fold(problem: Problem, fold: int) -> tuple[Solution, Iterator[tuple[Jobs, int]]]:
    """Return the solution of a fold in which nothing is learned yet, and what learns it."""
    weights = problem.weights[fold]
    keep = weights > 0
    x = problem.x[fold, keep]
    classes = torch.bincount(problem.y[keep], minlength=problem.n_classes) > 0
    members = len(problem.C)
    # Zero coefficients, and intercepts that rule out the classes that do not occur.
    intercept = x.new_zeros(len(classes)).masked_fill(~classes, -torch.inf)
    if len(classes) == 2:
        intercept = intercept[1:] - intercept[:1]
    solution = Solution(
        coef=x.new_zeros(members, len(intercept), x.shape[1]),
        intercept=intercept.expand(members, -1).clone(),
        steps=torch.zeros(members, dtype=torch.int64, device=x.device),
        residual=x.new_zeros(members),
        converged=torch.ones(members, dtype=torch.bool, device=x.device),
    )
    if not x.isfinite().all():
        solution.coef.fill_(torch.nan)
        solution.converged.fill_(False)
    elif int(classes.sum()) > 1:
        return solution, _groups(solution, problem, x, keep, weights[keep], classes)
    return solution, iter(())


def _groups(
    solution: Solution, problem: Problem, x: Tensor, keep: Tensor, weights: Tensor, classes: Tensor
) -> Iterator[tuple[Jobs, int]]:
    """Yield what solves all C of one fold on its own rows x, chunk by chunk, and writes its part of
    ``solution``.

    Jobs on the same rows come together, with how many numbers these are.
    ``keep`` (n,) are these rows among all, ``classes`` (K,) says which occur, two at least. x is
    changed.
    """
    C = problem.C
    codes = (classes.cumsum(0) - 1)[problem.y[keep]]
    kept = torch.arange(1, device=x.device) if len(classes) == 2 else classes.nonzero()[:, 0]
    total = weights.sum()
    share = weights / total
    huge = bool(x.abs().amax() > HUGE)
    scale = torch.ones_like(x[0])
    if huge:  # the power of two at or below each input's largest value
        scale = (x.abs().amax(0).frexp().exponent - 1).to(x.dtype).exp2()
        x = x / scale
    center = torch.zeros_like(x[0])
    if problem.fit_intercept:
        center = share @ x
        x -= center
        # a constant input becomes zeros, not rounding errors
        x *= (share @ x**2).sqrt() > CONSTANT * center.abs()
    most = torch.finfo(x.dtype).max  # infinity times the intercept's 0 would be NaN
    lasso, ridge = (
        (part / (C * total)).clamp_max(most) for part in (problem.l1_ratio, 1 - problem.l1_ratio)
    )

    def solve_chunk(rows: Rows, step: Step, members: Tensor) -> None:
        weight, solution.steps[members], solution.residual[members], solution.converged[members] = (
            descend(
                rows, step, ridge[members], lasso[members], problem.tolerance, problem.max_steps
            )
        )
        weight = weight if rows.basis is None else weight @ rows.basis
        if rows.basis is not None and len(kept) > 1:
            # Exactly so at the optimum; without a penalty softmax leaves it open.
            weight = weight - weight.mean(1, keepdim=True)
        # of the rows of the classes kept, the centring and the scale undone
        coef = weight[..., : len(center)]
        intercept = weight[..., len(center) :].sum(-1) - coef @ center
        if solution.coef.shape[1] > 1 and problem.fit_intercept:
            # softmax does not see a common shift
            intercept = intercept - intercept.mean(1, keepdim=True)
        solution.coef[members[:, None], kept] = coef / scale
        solution.intercept[members[:, None], kept] = intercept

    def chunks(step: Step, which: Tensor) -> Jobs:
        rotate = step is newton_step and not huge  # a ridge is not the same in all units
        rows = rows_of(x, codes, share, len(kept), intercept=problem.fit_intercept, rotate=rotate)
        rows = rows.scaled(scale) if huge else rows
        members = which.nonzero()[:, 0]
        # alike C take about as many steps, so they go together
        members = members[C[members].argsort(stable=True)]
        size = (CPU_NUMBERS if C.device.type == "cpu" else GPU_NUMBERS) // (
            rows.outputs * len(rows.design)
        )
        return [
            partial(solve_chunk, rows, step, part) for part in torch.split(members, max(1, size))
        ]

    for step, which in ((newton_step, lasso == 0), (proximal_newton_step, lasso > 0)):
        if which.any():
            yield chunks(step, which), x.numel()


def solve_chunk(
    data: Dataset, configs: Sequence[Config], index: Sequence[int], scoring: Scoring
) -> Outcome:
    """Solve the trials ``index`` of ``configs``, all of the same ``numbers``, in all folds: curves
    (C, 1, F)."""
    begin = time.monotonic()
    part = [configs[i] for i in index]
    data = data.of(part[0])
    solution = solve_all(data, part)
    best = BestOutputs(scoring.kept_bytes, np.full(len(part), -np.inf))
    curves = score_solution(data, len(part), solution, scoring, best)
    outputs = best.of_trials(index)
    return Outcome(tuple(index), curves, 1, time.monotonic() - begin, outputs=outputs)


def score_solution(
    data: Dataset,
    trials: int,
    solution: Solution,
    scoring: Scoring,
    best: BestOutputs | None = None,
) -> np.ndarray:
    """Return the curves (C, 1, F) of so many trials on the validation rows of each fold; ``best``
    takes outputs."""
    coef, intercept = as_softmax(solution)
    scores = list[Tensor]()
    kept = list[Tensor]()
    for f, fold in enumerate(data.folds):
        members = slice(f * trials, (f + 1) * trials)
        (x,) = data.rows(f, fold.valid)
        outputs = torch.baddbmm(
            intercept[members, None], x.expand(trials, -1, -1), coef[members].mT
        )
        scores.append(scoring.metrics(data, f, outputs, partial(_member, solution, f * trials)))
        kept += [outputs] if scoring.kept_bytes else []
    curves = torch.stack(scores, 1).cpu().numpy()[:, None]
    if best is not None and kept:
        best.take(1, range(trials), first_metric(curves, axes=3)[:, 0].mean(1), kept)
    return curves


def _member(solution: Solution, first: int, trial: int) -> LogisticRegression:
    return solved_module(solution, first + trial)


def solve_all(data: Dataset, configs: Sequence[Config]) -> Solution:
    """Solve C configurations in F folds, members fold-major; warns of those that did not
    converge."""
    solution = solve(problem_of(data, configs))
    unsolved = ~solution.converged.cpu().numpy().reshape(-1, len(configs))  # (F, C)
    if unsolved.any():
        values = sorted({configs[int(c)]["C"] for c in np.flatnonzero(unsolved.any(0))})
        warn(
            f"the logistic regression did not converge in {int(unsolved.sum())} of "
            f"{unsolved.size} fits, for C = {', '.join(f'{v:.3g}' for v in values[:5])}; a "
            "smaller C, or scaled inputs, converge.",
            ConvergenceWarning,
        )
    return solution


def problem_of(data: Dataset, configs: Sequence[Config]) -> Problem:
    """Return what C configurations (``C``, ``l1_ratio``) minimise in F folds of float64 data."""
    weights = torch.zeros(data.n_folds, data.n_rows, dtype=torch.float64, device=data.device)
    for f, fold in enumerate(data.folds):
        weights[f, fold.train] = (
            1.0 if data.weights is None else data.weights[f, fold.train].double()
        )
    C, l1_ratio = weights.new_tensor([[float(c["C"]), float(c["l1_ratio"])] for c in configs]).T
    return Problem(_Inputs(data), data.y, weights, C, l1_ratio, n_classes=data.n_outputs)


def as_softmax(solution: Solution) -> tuple[Tensor, Tensor]:
    """Return coefficients (P, K, D) and intercepts (P, K) of a softmax; two classes get zeros for
    the first."""
    coef = solution.coef
    intercept = solution.intercept
    if coef.shape[1] > 1:
        return coef, intercept
    # A fold with rows of the second class alone has intercept inf: the first class takes no part.
    alone = intercept.isposinf()
    first = torch.zeros_like(intercept).masked_fill(alone, -torch.inf)
    return torch.cat([torch.zeros_like(coef), coef], 1), torch.cat(
        [first, intercept.masked_fill(alone, 0)], 1
    )


def solved_module(solution: Solution, member: int) -> LogisticRegression:
    """Return one member as a plain module, float64, on the CPU."""
    coef, intercept = (part[member].cpu() for part in as_softmax(solution))
    module = LogisticRegression(coef.shape[1], coef.shape[0]).double()
    module.layers[0].load_state_dict({"weight": coef, "bias": intercept})
    return module.eval()
