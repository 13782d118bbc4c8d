"""Solve the logistic regression to convergence, and score it, for every (C, l1_ratio, fold) at
once.

A member is one trial (a value of C and l1_ratio) on one fold. The results are in float64.
Shape letters: P members, C configurations (also the inverse penalty ``C``), F folds, K outputs, D
inputs, n rows.
"""

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from gputune.data.dataset import Dataset
from gputune.engine.job import Outcome
from gputune.ground.device import SMALL_PRODUCT, on_one_thread
from gputune.ground.errors import warn
from gputune.ground.types import Config, first_metric
from gputune.models import LogisticRegression
from gputune.scoring.scoring import Scoring
from gputune.scoring.validation import BestOutputs
from gputune.solver.newton import StepFunction, descend, newton_step, proximal_newton_step
from gputune.solver.objective import SolverRows, rows_of

# Numbers in one (members, outputs, rows) tensor of a chunk. On a CPU it should fit into the cache,
# on a GPU into memory.
CPU_NUMBERS = 2**18
GPU_NUMBERS = 2**27
# Numbers in all inputs that are solved at the same time, summed over folds.
HELD = 2**25
# An input whose spread, relative to its mean, is below this is constant up to rounding.
CONSTANT = 1e-13
# If an input exceeds this value, each input gets its own unit; otherwise squares and their sums
# could overflow.
HUGE = 1e10


@dataclass(frozen=True)
class Solution:
    """The solutions of P = F * C members: C trials on F folds. Member p = f * C + c is trial c on
    fold f.

    ``residual`` is the largest violation of the optimality conditions. It does not depend on the
    units of C, of the inputs or of the weights. It is computed in three steps:

    1. Take the smallest subgradient of the mean loss plus penalty / (C * sum of weights), in each
    coefficient.
    2. Divide it by the root mean square of the coefficient's input (1 for an intercept).
    3. Divide it by the mean over rows of the largest misfit of a row's class chances.

    At a residual of 1e-10 the terms of the gradient's sum cancel to ten digits.
    """

    # (P, K, D); K = 1 for two classes (sigmoid, class 1 positive), else the number of classes
    coef: Tensor
    intercept: Tensor  # (P, K); with more than two classes the finite intercepts sum to zero
    steps: Tensor  # (P,) int64 Newton steps taken
    residual: Tensor  # (P,)
    converged: Tensor  # (P,) bool


class _Inputs:
    """The preprocessed inputs of each fold, computed when they are read.

    Indexing copies only the requested rows, because the rows of all folds at once need much memory.
    """

    def __init__(self, data: Dataset) -> None:
        self.data = data
        self.shape = (data.n_folds, data.n_rows, data.n_features)

    def __getitem__(self, place: tuple[int, Tensor]) -> Tensor:
        """Return rows of a fold, selected by their positions or by a bool mask (n,)."""
        fold, rows = place
        return self.data.rows(fold, rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows)[0]


@dataclass(frozen=True, eq=False)
class LogisticProblem:
    """The minimization problem of every fold and every trial (a value of C and l1_ratio).

    The objective is ``C * sum_i w_i loss_i + (1 - l1_ratio) / 2 ||W||^2 + l1_ratio ||W||_1``, as in
    sklearn.linear_model.LogisticRegression.

    A class is absent from a fold if it has no row with a weight above zero there. It gets
    coefficients of 0 and an intercept of -inf, and the other classes are solved without it. If only
    one of two classes is present, the sigmoid's intercept is inf or -inf. A fold with inputs that
    are not finite gets NaN.
    """

    x: Tensor | _Inputs  # (F, n, D) float64, preprocessed
    y: Tensor  # (n,) class codes
    weights: Tensor  # (F, n) >= 0; 0 if the row is not a training row of the fold
    C: Tensor  # (C,) > 0, inf for no penalty
    l1_ratio: Tensor  # (C,) in [0, 1]
    n_classes: int
    fit_intercept: bool = True
    tolerance: float = 1e-10
    max_steps: int = 100


def solve(problem: LogisticProblem) -> Solution:
    """Solve a problem for every fold and trial, and return the coefficients.

    ``converged`` is false for a member that has not reached the tolerance after ``max_steps``, or
    that float64 cannot bring any closer. Such a member has the finite coefficients that it reached.
    """
    threads = torch.get_num_threads()
    with on_one_thread(if_small=_is_small(problem)):
        return _solve_folds(problem, threads)


def _is_small(problem: LogisticProblem) -> bool:
    """Return True if all matrix products of a fold are small.

    The largest products are those of the rows with themselves, and of the rows with the outputs of
    all trials.
    """
    rows, columns = problem.x.shape[-2:]
    outputs = len(problem.C) * problem.n_classes
    return rows * columns * max(columns, outputs) <= SMALL_PRODUCT


def _solve_folds(problem: LogisticProblem, threads: int) -> Solution:
    """Solve a problem for every fold and trial, on a CPU with up to ``threads`` folds at once."""
    folds = range(len(problem.weights))
    solve_fold = partial(_solve_fold, problem)
    threads = min(threads, len(folds), max(1, HELD // math.prod(problem.x.shape[-2:])))
    if threads == 1 or problem.y.device.type != "cpu":
        parts = list(map(solve_fold, folds))
    else:
        # The products of one fold are too small to use several threads.
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            parts = list(pool.map(solve_fold, folds))
    columns = zip(*(vars(part).values() for part in parts))
    return Solution(*map(torch.cat, columns))


def _solve_fold(problem: LogisticProblem, fold: int) -> Solution:
    """Solve the logistic regression of one fold for all members."""
    weights = problem.weights[fold]
    is_training = weights > 0
    x = problem.x[fold, is_training]
    classes = torch.bincount(problem.y[is_training], minlength=problem.n_classes) > 0
    members = len(problem.C)
    # Start with zero coefficients. Intercepts of -inf exclude the classes that do not occur.
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
        codes = (classes.cumsum(0) - 1)[problem.y[is_training]]
        _solve_rows(solution, problem, x, codes, weights[is_training], classes)
    return solution


def _solve_rows(
    solution: Solution,
    problem: LogisticProblem,
    x: Tensor,
    codes: Tensor,
    weights: Tensor,
    classes: Tensor,
) -> None:
    """Solve one fold for all values of C, and write the coefficients to ``solution``.

    ``x`` has the fold's rows and is changed in place. ``classes`` (K,) is True for each class that
    occurs in these rows. At least two classes occur. ``codes`` (n,) has the index of each row's
    class among the occurring classes.
    """
    C = problem.C
    if len(classes) == 2:
        outputs = torch.arange(1, device=x.device)
    else:
        outputs = classes.nonzero()[:, 0]
    total = weights.sum()
    share = weights / total
    huge = bool(x.abs().amax() > HUGE)
    scale = torch.ones_like(x[0])
    if huge:  # Divide by the power of two at or below each input's largest value: this is exact.
        scale = (x.abs().amax(0).frexp().exponent - 1).to(x.dtype).exp2()
        x = x / scale
    center = torch.zeros_like(x[0])
    if problem.fit_intercept:
        center = share @ x
        x -= center
        # A constant input becomes exact zeros instead of rounding errors.
        x *= (share @ x**2).sqrt() > CONSTANT * center.abs()
    largest = torch.finfo(x.dtype).max  # not inf: inf times the intercept's factor 0 would be NaN
    lasso = (problem.l1_ratio / (C * total)).clamp_max(largest)
    ridge = ((1 - problem.l1_ratio) / (C * total)).clamp_max(largest)

    def solve_members(rows: SolverRows, step: StepFunction, members: Tensor) -> None:
        weight, steps, residual, converged = descend(
            rows, step, ridge[members], lasso[members], problem.tolerance, problem.max_steps
        )
        solution.steps[members] = steps
        solution.residual[members] = residual
        solution.converged[members] = converged
        if rows.basis is not None:
            weight = weight @ rows.basis
            if len(outputs) > 1:
                # The weights of the classes sum to zero at the optimum. Without a penalty softmax
                # does not determine their sum.
                weight = weight - weight.mean(1, keepdim=True)
        # Undo the centering and the scale: (m, K, D) and (m, K)
        coef = weight[..., : len(center)]
        intercept = weight[..., len(center) :].sum(-1) - coef @ center
        if solution.coef.shape[1] > 1 and problem.fit_intercept:
            # Softmax does not depend on a common shift of the intercepts.
            intercept = intercept - intercept.mean(1, keepdim=True)
        solution.coef[members[:, None], outputs] = coef / scale
        solution.intercept[members[:, None], outputs] = intercept

    for step, is_member in ((newton_step, lasso == 0), (proximal_newton_step, lasso > 0)):
        if not is_member.any():
            continue
        # With huge inputs the ridge differs between inputs, so it is not invariant under rotation.
        rotate = step is newton_step and not huge
        intercept = problem.fit_intercept
        rows = rows_of(x, codes, share, len(outputs), intercept=intercept, rotate=rotate)
        if huge:
            rows = rows.scaled(scale)
        members = is_member.nonzero()[:, 0]
        # Members with similar C need about the same number of steps, so they share a chunk.
        members = members[C[members].argsort(stable=True)]
        numbers = CPU_NUMBERS if C.device.type == "cpu" else GPU_NUMBERS
        size = max(1, numbers // (rows.outputs * len(rows.design)))
        for part in torch.split(members, size):
            solve_members(rows, step, part)
        del rows  # before the rows of the other kind of step take memory


def solve_chunk(
    data: Dataset, configs: Sequence[Config], index: Sequence[int], scoring: Scoring
) -> Outcome:
    """Solve the logistic regression of the trials ``index`` of ``configs`` in all folds, and score
    it.

    The trials must have the same value of ``numbers`` (the preparation of numeric columns). The
    curves of the outcome are (C trials, 1 epoch, F folds).
    """
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
    """Score the solutions on the validation rows of each fold, and return the trials' curves.

    The curves are (C trials, 1 epoch, F folds). ``trials`` is the count C of trials. ``best``, if
    given, receives the outputs of the trials.
    """
    coef, intercept = as_softmax(solution)
    scores = list[Tensor]()
    best_outputs = list[Tensor]()
    for f, fold in enumerate(data.folds):
        members = slice(f * trials, (f + 1) * trials)
        (x,) = data.rows(f, fold.valid)
        # (C, B, D) @ (C, D, K) + (C, 1, K) -> (C, B, K)
        outputs = torch.baddbmm(
            intercept[members, None], x.expand(trials, -1, -1), coef[members].mT
        )
        scores.append(scoring.metrics(data, f, outputs, partial(_member, solution, f * trials)))
        if scoring.kept_bytes:
            best_outputs.append(outputs)
    curves = torch.stack(scores, 1).cpu().numpy()[:, None]
    if best is not None and best_outputs:
        best.take(1, range(trials), first_metric(curves, axes=3)[:, 0].mean(1), best_outputs)
    return curves


def _member(solution: Solution, first: int, trial: int) -> LogisticRegression:
    """Return the solution of one trial in a fold as a module. ``first`` is the index of the fold's
    first member."""
    return solved_module(solution, first + trial)


def solve_all(data: Dataset, configs: Sequence[Config]) -> Solution:
    """Solve the logistic regression of C configurations in F folds. Member f * C + c is
    configuration c on fold f.

    Warns about members that did not converge.
    """
    solution = solve(problem_of(data, configs))
    unsolved = ~solution.converged.cpu().numpy().reshape(-1, len(configs))  # (F, C)
    if unsolved.any():
        values = sorted({configs[int(c)]["C"] for c in np.flatnonzero(unsolved.any(0))})
        shown = ", ".join(f"{value:.3g}" for value in values[:5])
        warn(
            f"The logistic regression did not converge in {int(unsolved.sum())} of "
            f"{unsolved.size} fits, for C = {shown}. Use a smaller C, or scale the inputs.",
            ConvergenceWarning,
        )
    return solution


def problem_of(data: Dataset, configs: Sequence[Config]) -> LogisticProblem:
    """Return the minimization problem of C configurations (``C``, ``l1_ratio``) in F folds of
    float64 data."""
    weights = torch.zeros(data.n_folds, data.n_rows, dtype=torch.float64, device=data.device)
    for f, fold in enumerate(data.folds):
        if data.weights is None:
            weights[f, fold.train] = 1.0
        else:
            weights[f, fold.train] = data.weights[f, fold.train].double()
    C = weights.new_tensor([float(config["C"]) for config in configs])
    l1_ratio = weights.new_tensor([float(config["l1_ratio"]) for config in configs])
    return LogisticProblem(_Inputs(data), data.y, weights, C, l1_ratio, n_classes=data.n_outputs)


def as_softmax(solution: Solution) -> tuple[Tensor, Tensor]:
    """Return a solution as the coefficients (P, K, D) and intercepts (P, K) of a softmax.

    P counts the members, K the classes and D the inputs. For two classes, the first class gets
    zeros.
    """
    coef = solution.coef
    intercept = solution.intercept
    if coef.shape[1] > 1:
        return coef, intercept
    # A fold that has only rows of the second class has an intercept of inf. Then the first class is
    # excluded by -inf.
    only_second = intercept.isposinf()
    first = torch.zeros_like(intercept).masked_fill(only_second, -torch.inf)
    intercepts = torch.cat([first, intercept.masked_fill(only_second, 0)], 1)
    return torch.cat([torch.zeros_like(coef), coef], 1), intercepts


def solved_module(solution: Solution, member: int) -> LogisticRegression:
    """Return one member's solution as a plain float64 LogisticRegression module on the CPU."""
    coef, intercept = (part[member].cpu() for part in as_softmax(solution))
    module = LogisticRegression(coef.shape[1], coef.shape[0]).double()
    module.layers[0].load_state_dict({"weight": coef, "bias": intercept})
    return module.eval()
