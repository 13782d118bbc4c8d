"""LogisticRegression: scikit-learn's linear classifier, solved for every C and fold at once.

A member is one trial (candidate) on one fold. A problem holds several members that Newton's method
solves together. A penalty describes the objective of one trial.
"""

import inspect
import itertools
import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_expit, log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression as Theirs
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.class_weight import compute_class_weight

from gputune.engine.choice import device_for_solver
from gputune.ground.annotations import FloatArray, IntArray
from gputune.ground.errors import InputError, warn
from gputune.hypergradients.implicit import implicit_gradients
from gputune.sklearn.base import FusedEstimator, constructor
from gputune.sklearn.dataset import CheckedRows, FoldGroup, as_tensor
from gputune.sklearn.recipe import DrawSeed, FitOptions, FoldTrial, MemberSlope
from gputune.solver.solve import LogisticProblem, Solution, solve

_TOLERANCE = 1e-10


@dataclass(frozen=True)
class Penalty:
    """The settings of one logistic regression: penalty, class weights, solver tolerance and
    device."""

    C: float
    l1_ratio: float
    class_weight: Mapping[object, float] | str | None
    fit_intercept: bool
    tol: float
    max_iter: int
    device: str


@dataclass(frozen=True, eq=False)
class SolvedMember:
    """The solution of one logistic regression (one trial on one fold) that was solved together with
    others.

    Attributes:
        solution: the solution of all members that were solved together.
        position: the position of this member.
        classes: positions of its classes.
    """

    solution: Solution
    position: int
    classes: IntArray


def solve_groups(
    penalties: Mapping[int, Penalty], folds: FoldGroup
) -> list[tuple[list[int], FoldGroup]]:
    """Split trials and folds into groups that the solver can solve together.

    The trials of a group differ only in C and l1_ratio. Its folds have the same classes.
    """
    by_key: dict[Hashable, list[int]] = defaultdict(list)
    for trial, p in penalties.items():
        # A missing device is an error of the whole search, not of one fit.
        device = device_for_solver(p.device).device
        by_key[device, repr(p.class_weight), p.fit_intercept, p.tol, p.max_iter].append(trial)
    return list(itertools.product(by_key.values(), folds.split()))


def solve_members(
    penalties: Mapping[int, Penalty], folds: FoldGroup, training: FitOptions
) -> dict[FoldTrial, SolvedMember | Exception]:
    """Solve the logistic regression of each trial on the training rows of each fold.

    The result for a trial and fold is a ValueError if the class weights do not fit the classes.
    """
    del training  # a batched solve takes seconds, so deadlines and workers are ignored
    members: dict[FoldTrial, SolvedMember | Exception] = {}
    for trials, group in solve_groups(penalties, folds):
        places = list(itertools.product(group.numbers, trials))
        try:
            problem = make_problem([penalties[trial] for trial in trials], group)
        except ValueError as error:
            members |= dict.fromkeys(places, error)
            continue
        assert group.classes is not None
        solution = solve(problem)
        for position, place in enumerate(places):
            members[place] = SolvedMember(solution, position, group.classes)
    return members


def solver_slopes(
    penalties: Mapping[int, Penalty], folds: FoldGroup, *_: object
) -> dict[FoldTrial, MemberSlope]:
    """Return the derivative of the validation loss at the solution of each trial in each fold.

    The derivative is with respect to C.
    """
    member_slopes: dict[FoldTrial, MemberSlope] = {}
    for trials, group in solve_groups(penalties, folds):
        problem = make_problem([penalties[trial] for trial in trials], group)
        valids = [as_tensor(valid).to(problem.y.device) for valid in group.valids]
        implicit = implicit_gradients(problem, solve(problem), valids)
        slopes = implicit.gradient / problem.C.repeat(len(valids))  # members are fold-major
        places = itertools.product(group.numbers, trials)
        for place, loss, slope in zip(places, implicit.value.tolist(), slopes.tolist()):
            member_slopes[place] = (loss, slope, 0.0)
    return member_slopes


def make_problem(penalties: Sequence[Penalty], folds: FoldGroup) -> LogisticProblem:
    """Return the solver's problem for several trials that differ only in C and l1_ratio.

    Raises ValueError if all rows have weight 0.
    """
    first = penalties[0]
    (x,) = folds.rows.inputs(device_for_solver(first.device).device, torch.float64)
    weights = np.stack([_weights(first.class_weight, folds, train) for train in folds.trains])
    assert folds.classes is not None
    return LogisticProblem(
        # (F, n, D): a view, without copies of X
        x.expand(len(weights), *x.shape),
        as_tensor(folds.codes).to(x.device),
        as_tensor(weights).to(x.device),
        x.new_tensor([p.C for p in penalties]),
        x.new_tensor([p.l1_ratio for p in penalties]),
        n_classes=len(folds.classes),
        fit_intercept=first.fit_intercept,
        tolerance=first.tol,
        max_steps=first.max_iter,
    )


def _weights(
    class_weight: Mapping[object, float] | str | None, folds: FoldGroup, train: IntArray
) -> FloatArray:
    """Return the weight (n,) of each row for one fold: its sample weight times its class weight.

    Rows outside of the training rows have weight 0.
    """
    rows = folds.rows
    codes = folds.codes[train]
    assert rows.classes is not None and folds.classes is not None
    of_rows = np.ones(len(train)) if rows.weights is None else rows.weights[train]
    labels = rows.classes[folds.classes]
    if class_weight == "balanced":  # scikit-learn's function counts rows, not weights
        counts = np.bincount(codes, of_rows, minlength=len(labels))
        per_class = counts.sum() / (len(counts) * np.where(counts > 0, counts, 1.0))
    else:
        per_class = compute_class_weight(class_weight, classes=labels, y=labels[codes])
    weights = np.zeros(len(rows.y))
    weights[train] = of_rows * per_class[codes]
    if not ((weights >= 0).all() and weights.any()):
        raise ValueError(
            f"class_weight={class_weight!r} must give no row a negative weight, and at least one "
            "training row a weight above 0."
        )
    return weights


_PENALTY = inspect.signature(Theirs).parameters["penalty"].default


class LogisticRegression(FusedEstimator, Theirs):  # type: ignore[misc]
    """Logistic regression (softmax for more than two classes), with scikit-learn's parameters.

    It minimizes ``C * (sum of weight * log loss) + (1 - l1_ratio) / 2 ||W||^2 + l1_ratio ||W||_1``,
    the objective of scikit-learn. Intercepts have no penalty. Newton's method solves it in double
    precision for every dtype of X. The solution is unique. So ``solver``, ``random_state``,
    ``warm_start``, ``n_jobs`` and ``verbose`` have no effect, and the L1 penalty and the elastic
    net work with every value of ``solver``.

    scikit-learn's own ``fit`` runs, for one estimator at a time, in three cases: solver="liblinear"
    (which penalizes the intercept too), dual=True, and callbacks on the estimator.

    Sparse X is converted to a dense array, if memory holds it.

    Sources: truncated Newton, Nocedal and Wright (2006), algorithm 7.1. For the L1 penalty: Chen,
    Curtis and Robinson (2017), doi:10.1137/16M1062259.

    Args:
        C: inverse strength of the penalty, above 0 [default: 1]. inf is no penalty.
        l1_ratio: 0 is L2, 1 is L1, and values between are the elastic net.
        penalty: older form of ``l1_ratio``: "l2", "l1", "elasticnet" (uses l1_ratio), or None (no
            penalty, C is ignored). With "auto" and the default, C and l1_ratio decide.
        class_weight: None, "balanced", or a dict from class to weight.
        fit_intercept: False fits no intercept.
        tol: largest violation of the optimality conditions. Values above 1e-10 are lowered to
            1e-10.
        max_iter: number of Newton steps at most. A ConvergenceWarning appears if they were not
            enough.
        device: "auto" (the CPU), "cpu", "cuda" or "cuda:1".

    Attributes:
        coef_: (K, D) in X's precision, with K = 1 for two classes.
        intercept_: (K,) in X's precision.
        n_iter_: (1,) number of Newton steps.
        classes_: the classes.

    Raises:
        InputError: ``penalty`` contradicts ``l1_ratio``, or memory does not hold a dense X. It is
            raised by ``fit``, like scikit-learn's errors.

    Example:
        >>> from gputune.sklearn import LogisticRegression
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> model = LogisticRegression(C=10.0).fit(X, y)
        >>> model.predict(X[:3])
        array([0, 0, 0])
        >>> model.coef_.shape
        (3, 4)
    """

    _fit_recipes = staticmethod(solve_members)
    _slopes = staticmethod(solver_slopes)
    _differentiable: ClassVar = {"C": "C"}
    _parameter_constraints: ClassVar[dict[str, list[object]]] = {
        **Theirs._parameter_constraints,
        "penalty": [StrOptions({"l1", "l2", "elasticnet", "auto", _PENALTY}), None],
        "solver": [*Theirs._parameter_constraints["solver"], None],
        "tol": [Interval(Real, 0, None, closed="neither")],
        "device": [str],
    }
    _refused: ClassVar = {
        "multi_class": "For more than two classes, gputune uses a softmax. Leave this parameter "
        "out, or use "
        "sklearn.multiclass.OneVsRestClassifier(LogisticRegression()).",
        **dict.fromkeys(
            ("optimizer", "lr", "max_epochs"),
            "The objective has one solution. Leave this parameter out.",
        ),
        "weight_decay": "Pass C, the inverse strength of the penalty.",
    }
    __init__ = constructor(Theirs, {"device": "auto"})

    def _left_to_scikit_learn(self, y: object) -> str | None:
        del y
        if self.solver == "liblinear":
            return "solver='liblinear'"
        multi_class = getattr(self, "multi_class", "auto")  # until scikit-learn 1.7
        if multi_class not in ("auto", "deprecated", "multinomial"):
            return f"multi_class={multi_class!r}"
        return "dual=True" if self.dual else None

    def predict_log_proba(self, X: object) -> NDArray[np.floating]:
        """Return the log probabilities (n, K) of the classes, in the order of ``classes_``."""
        if self.solver == "liblinear":
            return np.asarray(super().predict_log_proba(X))
        scores = self.decision_function(X)
        if scores.ndim == 1:  # two classes
            return np.stack([log_expit(-scores), log_expit(scores)], 1)
        return np.asarray(log_softmax(scores, 1))

    def _recipe(self, draw: DrawSeed) -> Penalty:
        del draw  # the solution is unique
        self._validate_params()
        if (reason := self._left_to_scikit_learn(None)) is not None:
            raise InputError(
                None,
                f"{reason} needs scikit-learn's own LogisticRegression, which is fitted one at a "
                "time",
            )
        C, l1_ratio = _penalty(float(self.C), float(self.l1_ratio or 0), self.penalty)
        return Penalty(
            C,
            l1_ratio,
            self.class_weight,
            bool(self.fit_intercept),
            tol=min(float(self.tol), _TOLERANCE),
            max_iter=int(self.max_iter),
            device=self.device,
        )

    def _set_fitted(self, fitted: SolvedMember, rows: CheckedRows) -> None:
        assert rows.classes is not None
        self.classes_ = rows.classes[fitted.classes]
        solution = fitted.solution
        p = fitted.position
        precision = rows.X.parts[0].numpy().dtype
        steps = int(solution.steps[p])
        # Copies, so that the tensors of the whole search can be freed.
        self.coef_ = solution.coef[p].cpu().numpy().astype(precision)
        self.intercept_ = solution.intercept[p].cpu().numpy().astype(precision)
        self.n_iter_ = np.array([steps], dtype=np.int32)
        if not solution.converged[p]:
            warn(
                f"the logistic regression did not converge in {steps} Newton steps (violation "
                f"{solution.residual[p].item():.1e}, tol={min(self.tol, _TOLERANCE):g}). Use a "
                "smaller C, or scale the inputs.",
                ConvergenceWarning,
            )


def _penalty(C: float, l1_ratio: float, penalty: str | None) -> tuple[float, float]:
    """Return C and l1_ratio for a value of scikit-learn's older parameter ``penalty``."""
    if penalty is None:
        if C != 1.0 or l1_ratio != 0.0:
            warn(
                f"Setting penalty=None will ignore the C and l1_ratio parameters, got C={C} and "
                f"l1_ratio={l1_ratio}."
            )
        return math.inf, 0.0
    # The default was "l2" before scikit-learn 1.8. It leaves the choice to l1_ratio.
    ratio = {"l2": 0.0, "l1": 1.0, _PENALTY: l1_ratio}.get(penalty, l1_ratio)
    if l1_ratio not in (0.0, ratio):
        raise InputError(
            None,
            f"penalty={penalty!r} contradicts l1_ratio={l1_ratio}",
            remedy="Pass only l1_ratio: 0 is L2, 1 is L1.",
        )
    return C, ratio
