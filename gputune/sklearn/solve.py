"""All logistic regressions of a search solved to convergence at once: every C, every fold."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor

from gputune.engine.backend import choose_device
from gputune.sklearn.dataset import FoldGroup, Rows, as_tensor, group_folds, shared_x
from gputune.sklearn.fit import Place
from gputune.solver.solve import Solution, solve


@dataclass(frozen=True)
class Penalty:
    """What one logistic regression minimises, and how closely: the arguments of ``engine.exact.solve``."""

    C: float
    l1_ratio: float
    class_weight: Mapping[Any, float] | str | None
    fit_intercept: bool
    tol: float
    max_iter: int
    device: str


@dataclass(frozen=True, eq=False)
class Solved:
    """One solved member: coef (K, D) and intercept (K,), with K = 1 for two classes; ``classes`` as positions."""

    coef: NDArray[np.float64]
    intercept: NDArray[np.float64]
    steps: int
    residual: float
    converged: bool
    classes: NDArray[np.int64]


def solve_members(
    penalties: Sequence[Penalty], rows: Rows, folds: Sequence[NDArray[np.int64]]
) -> dict[Place, Solved | Exception]:
    """Solve every penalty on the training rows of every fold; ValueError for a fold that cannot be fitted."""
    found: dict[Place, Solved | Exception] = {}
    groups, refused = group_folds(rows, folds, key=lambda train: None)
    for index in penalties_alike(penalties):
        alike = [penalties[i] for i in index]
        found |= {(fold, i): error for fold, error in refused.items() for i in index}
        x = shared_x(rows, choose_device(alike[0].device), torch.float64)
        for group in groups:
            for (f, c), solved in _solve_group(alike, rows, group, x).items():
                found[group.places[f], index[c]] = solved
    return found


def penalties_alike(penalties: Sequence[Penalty]) -> list[list[int]]:
    """Return the positions of penalties in groups that differ in C and l1_ratio alone, which are solved together."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, p in enumerate(penalties):
        groups[p.device, repr(p.class_weight), p.fit_intercept, p.tol, p.max_iter].append(i)
    return list(groups.values())


@dataclass(frozen=True, eq=False)
class Problem:
    """Logistic regressions of F folds that have the same K classes, for C penalties.

    x (F, n, D), y (n,) codes, weights (F, n): 0 outside of a fold's training rows; C and l1_ratio (C,).
    """

    x: Tensor
    y: Tensor
    weights: Tensor
    C: Tensor
    l1_ratio: Tensor
    n_classes: int
    common: Penalty

    def solve(self) -> Solution:
        """Solve it."""
        return solve(
            self.x,
            self.y,
            self.weights,
            C=self.C,
            l1_ratio=self.l1_ratio,
            n_classes=self.n_classes,
            fit_intercept=self.common.fit_intercept,
            tolerance=self.common.tol,
            max_steps=self.common.max_iter,
        )


def make_problem(penalties: Sequence[Penalty], rows: Rows, group: FoldGroup, x: Tensor) -> Problem:
    """Return the problem of penalties that are alike; raises ValueError for weights that leave no rows."""
    class_weight = penalties[0].class_weight
    weights = np.stack([_weights(class_weight, rows, group, train) for train in group.trains])
    assert rows.classes is not None and group.classes is not None
    # Rows of other classes weigh nothing.
    codes = np.searchsorted(group.classes, rows.y).clip(max=len(group.classes) - 1)
    return Problem(
        x=x.expand(len(weights), *x.shape),
        y=as_tensor(codes).to(x.device),
        weights=as_tensor(weights).to(x.device),
        C=torch.tensor([p.C for p in penalties], dtype=x.dtype, device=x.device),
        l1_ratio=torch.tensor([p.l1_ratio for p in penalties], dtype=x.dtype, device=x.device),
        n_classes=len(group.classes),
        common=penalties[0],
    )


def _solve_group(
    penalties: Sequence[Penalty], rows: Rows, group: FoldGroup, x: Tensor
) -> dict[Place, Solved | Exception]:
    """Solve penalties that are alike, in folds that have the same classes."""
    places = [(f, c) for f in range(len(group.trains)) for c in range(len(penalties))]
    try:
        problem = make_problem(penalties, rows, group, x)
    except ValueError as error:
        return dict.fromkeys(places, error)
    assert group.classes is not None
    solution = problem.solve()
    coef, intercept = solution.coef.cpu().numpy(), solution.intercept.cpu().numpy()
    facts = zip(solution.steps.tolist(), solution.residual.tolist(), solution.converged.tolist())
    return {
        place: Solved(coef[p], intercept[p], *fact, group.classes)
        for p, (place, fact) in enumerate(zip(places, facts))
    }


def _weights(
    class_weight: Mapping[Any, float] | str | None, rows: Rows, group: FoldGroup, train: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return each row's weight in a fold, (n,), 0 outside of its training rows: sample weight times class weight."""
    assert rows.classes is not None and group.classes is not None
    own = np.ones(len(train)) if rows.weights is None else rows.weights[train]
    codes = np.searchsorted(group.classes, rows.y[train])
    if class_weight == "balanced":
        counts = np.bincount(codes, own, minlength=len(group.classes))
        per_class = counts.sum() / (len(counts) * np.where(counts > 0, counts, 1.0))
    else:
        labels = rows.classes[group.classes]
        per_class = compute_class_weight(class_weight, classes=labels, y=labels[codes])
    weights = np.zeros(len(rows.y))
    weights[train] = own * per_class[codes]
    if not ((weights >= 0).all() and weights.any()):
        raise ValueError(
            f"class_weight={class_weight!r} must leave weights >= 0, and one training row above 0."
        )
    return weights
