"""The solved logistic regression as a chunk: every (C, l1_ratio, fold) solved at once, scored once."""

import time
import warnings
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from gputune.data.dataset import Dataset
from gputune.engine.job import Outcome
from gputune.engine.scoring import Scoring
from gputune.models import LogisticRegression
from gputune.solver.solve import Solution, solve
from gputune.types import Config


def solve_chunk(data: Dataset, configs: Sequence[Config], index: Sequence[int], scoring: Scoring) -> Outcome:
    """Solve the trials ``index`` of ``configs`` in all folds and score them: curves (C, 1, F)."""
    begin = time.monotonic()
    part = [configs[i] for i in index]
    solution = solve_all(data, part)
    curves = score_solution(data, len(part), solution, scoring)
    return Outcome(tuple(index), curves, 1, time.monotonic() - begin)


def score_solution(data: Dataset, trials: int, solution: Solution, scoring: Scoring) -> np.ndarray:
    """Return the curves (C, 1, F) of so many trials on the validation rows of each fold."""
    coef, intercept = as_softmax(solution)
    scores = []
    for f, fold in enumerate(data.folds):
        own = slice(f * trials, (f + 1) * trials)
        x = data.x[data.copies[f], fold.valid]
        outputs = torch.baddbmm(intercept[own, None], x.expand(trials, -1, -1), coef[own].mT)
        scores.append(scoring(data, f, outputs, partial(_member, solution, f * trials)))
    curves: np.ndarray = torch.stack(scores, 1).cpu().numpy()[:, None]
    return curves


def _member(solution: Solution, first: int, trial: int) -> LogisticRegression:
    return solved_module(solution, first + trial)


def solve_all(data: Dataset, configs: Sequence[Config]) -> Solution:
    """Solve C configurations in F folds, members fold-major; warns of those that did not converge."""
    x = torch.stack([data.x[copy] for copy in data.copies])
    weights = torch.zeros(data.n_folds, data.n_rows, dtype=torch.float64, device=data.device)
    for f, fold in enumerate(data.folds):
        weights[f, fold.train] = 1.0 if data.weights is None else data.weights[f, fold.train].double()
    solution = solve(
        x,
        data.y,
        weights,
        C=_column(configs, "C", data),
        l1_ratio=_column(configs, "l1_ratio", data),
        n_classes=data.n_outputs,
        present=data.present,
    )
    _warn_of_unsolved(solution, configs)
    return solution


def as_softmax(solution: Solution) -> tuple[Tensor, Tensor]:
    """Return coefficients (P, K, D) and intercepts (P, K) of a softmax; two classes get zeros for the first."""
    coef, intercept = solution.coef, solution.intercept
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


def _column(configs: Sequence[Config], key: str, data: Dataset) -> Tensor:
    return torch.tensor([float(c[key]) for c in configs], dtype=torch.float64, device=data.device)


def _warn_of_unsolved(solution: Solution, configs: Sequence[Config]) -> None:
    unsolved = ~solution.converged.cpu().numpy().reshape(-1, len(configs))  # (F, C)
    if unsolved.any():
        values = sorted({configs[int(c)]["C"] for c in np.flatnonzero(unsolved.any(0))})
        warnings.warn(
            f"the logistic regression did not converge in {int(unsolved.sum())} of {unsolved.size} fits, for C = "
            f"{', '.join(f'{v:.3g}' for v in values[:5])}; a smaller C, or scaled inputs, converge.",
            ConvergenceWarning,
            stacklevel=2,
        )
