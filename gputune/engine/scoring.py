"""A scoring argument, checked once: a score on the device, or any scikit-learn scorer on its predictions.

The scores of a chunk: all members on the validation rows of their folds, and one wait for the device.
"""

import copy
import difflib
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.metrics import get_scorer, get_scorer_names
from sklearn.naive_bayes import GaussianNB
from torch import Tensor, nn

from gputune.data.dataset import Dataset
from gputune.data.kinds import text_of
from gputune.engine import scores
from gputune.engine.network import Network, call_module
from gputune.errors import InputError
from gputune.types import Params, Task

Scorer = Callable[[Any, Any, Any], float]

Member = Callable[[int], nn.Module]
"""Returns the model of one trial, by its place among the outputs: a plain module on the CPU, in evaluation mode."""


@dataclass(frozen=True)
class Scoring:
    """How the models of one fold are scored: ``name``, and a device score or a scikit-learn scorer.

    ``classes`` are the labels that a scorer sees, None for regression. One of scikit-learn's names sees class
    codes 0, 1, ..., so that scores of a positive class work on text labels. ``positive`` is the code of that class;
    None where the score is not of one class, and where a callable chooses it.
    """

    name: str
    score: scores.Score | None
    scorer: Scorer | None
    classes: np.ndarray | None
    positive: int | None = None

    def __call__(self, data: Dataset, fold: int, outputs: Tensor, member: Member | None = None) -> Tensor:
        """Return the scores (C,), float64, of outputs (C, m, K) on fold's validation rows; NaN where diverged.

        They are scored in double precision, in which a tuned model predicts. A scorer of the user's own may ask for
        predictions of other rows, which a ``member`` then makes.
        """
        absent = None if data.present is None else ~data.present[fold]
        # A class that takes no part may have the logit -inf; that is no divergence.
        known = outputs if absent is None else outputs.masked_fill(absent, 0)
        finite = known.isfinite().flatten(1).all(-1)
        target = data.target[data.folds[fold].valid]
        outputs = _as_answers(data, fold, outputs)
        ranks = self.score is None or self.score in scores.RANKING
        if ranks and (first := data.first_equal[fold]) is not None:
            outputs = outputs[:, first]
        if self.score is not None:
            result = self.score(outputs, target)
        else:
            result = self._through_sklearn(data, fold, *self.positive_last(outputs, target), finite, member)
        return torch.where(finite & result.isfinite(), result, torch.nan)

    def positive_last(self, outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs (..., 2) and class codes (m,) in which a scorer finds the positive class: as code 1."""
        return (outputs.flip(-1), 1 - target) if self.positive == 0 else (outputs, target)

    def _through_sklearn(
        self,
        data: Dataset,
        fold: int,
        outputs: Tensor,
        target: Tensor,
        finite: Tensor,
        member: Member | None,
    ) -> Tensor:
        assert self.scorer is not None
        y = target.cpu().numpy()
        y = y if self.classes is None else self.classes[y]
        # The scorers that have names read nothing of the rows.
        rows = np.zeros((len(y), 1)) if data.scorer_rows is None else data.scorer_rows.rows(data.folds[fold])
        result = np.full(len(outputs), np.nan)
        try:
            for trial in np.flatnonzero(finite.cpu().numpy()).tolist():
                others = None if member is None else partial(_predict, data, fold, member, trial)
                X = (
                    rows if isinstance(rows, np.ndarray | tuple | dict) else copy.deepcopy(rows)
                )  # a frame can be written to
                estimator = fitted(outputs[trial].cpu(), self.classes, X, rows, others)
                result[trial] = float(self.scorer(estimator, X, y))
                estimator.close()
        except Exception as error:
            own = ":" in self.name  # no name of scikit-learn's
            remedy = (
                "It is called as scorer(estimator, X, y), with X as you gave it."
                if own
                else "Choose a scoring that fits the task, for example accuracy or r2."
            )
            raise InputError(
                f"scoring={self.name!r} raised {type(error).__name__} on fold {fold}: {error}. {remedy}"
            ) from error
        return torch.from_numpy(result).to(outputs.device)


def _as_answers(data: Dataset, fold: int, outputs: Tensor) -> Tensor:
    """Return outputs (C, m, K), float64: in the target's own units, or without the classes that take no part."""
    outputs = outputs.double()
    if data.task == "regression":
        return outputs * data.scale[fold] + data.center[fold]
    return outputs if data.present is None else outputs.masked_fill(~data.present[fold], -torch.inf)


def _predict(data: Dataset, fold: int, member: Member, trial: int, X: Any) -> Tensor:
    """Return what a member answers for rows X of the user's own, (m, K), on the CPU."""
    if data.scorer_rows is None:
        raise InputError("a scorer that has a name asks for no other rows than those it scores.")
    inputs = data.scorer_rows.encoded(X, fold, data.dtype)
    with torch.no_grad():
        outputs = call_module(member(trial), inputs, data.names).view(1, len(inputs[0]), -1)
    return _as_answers(data, fold, outputs.to(data.device))[0].cpu()


def make_scoring(
    scoring: str | Scorer | None, task: Task, classes: np.ndarray | None, positive: Any = None
) -> Scoring:
    """Return the checked Scoring of a name, a callable ``scorer(estimator, X, y)``, or None (accuracy or R2).

    ``positive`` is the class that f1 and its like are of. Raises InputError where they need it and it is missing, where
    another score is given it, and where it is no class.
    """
    if scoring is None:
        scoring = "r2" if task == "regression" else "accuracy"
    if not isinstance(scoring, str):
        if not callable(scoring):
            raise InputError(
                f"scoring is a scikit-learn scorer name or a callable(estimator, X, y), got {scoring!r}."
            )
        name = _qualified_name(scoring)
        return Scoring(name, None, scoring, classes, _positive_code(positive, name, None, task, classes))
    table = dict(scores.REGRESSION if task == "regression" else scores.CLASSIFICATION)
    if task == "binary":
        table["roc_auc"] = scores.roc_auc
        del table["roc_auc_ovr"]  # scikit-learn's own answer for two classes
    if scoring in table:
        _positive_code(positive, scoring, None, task, classes)
        return Scoring(scoring, table[scoring], None, classes)
    _check_fits_task(scoring, task)
    codes, scorer = None if classes is None else np.arange(len(classes)), get_scorer(scoring)
    return Scoring(scoring, None, scorer, codes, _positive_code(positive, scoring, scorer, task, classes))


def loss_scoring(task: Task, classes: np.ndarray | None, positive: Any = None) -> Scoring:
    """Return minus the validation loss as a score, under scikit-learn's name for it; InputError for a ``positive``.

    Unlike scikit-learn's log loss, which holds chances to [eps, 1 - eps], it has no upper limit.
    """
    if task == "regression":
        return make_scoring("neg_mean_squared_error", task, classes, positive)
    _positive_code(positive, "neg_log_loss", None, task, classes)
    return Scoring("neg_log_loss", scores.neg_cross_entropy, None, classes)


def check_folds(scoring: Scoring, data: Dataset) -> None:
    """Raise InputError where the score is undefined on a fold, before anything trains."""
    for f, fold in enumerate(data.folds):
        rows = data.target[fold.valid]
        if scoring.name.startswith("roc_auc") and len(set(rows.tolist())) < data.n_outputs:
            raise InputError(
                f"scoring={scoring.name!r} needs every class among the validation rows, and fold {f} lacks one; "
                "choose fewer or stratified folds, or another scoring."
            )
        if scoring.name == "r2" and len(rows) < 2:
            raise InputError(
                f"scoring='r2' needs two validation rows a fold, and fold {f} has {len(rows)}; choose fewer folds or "
                "scoring='neg_root_mean_squared_error'."
            )


def _check_fits_task(scoring: str, task: Task) -> None:
    if scoring not in get_scorer_names():
        near = difflib.get_close_matches(scoring, get_scorer_names(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(
            f"scoring must be one of scikit-learn's scorer names or a callable, got {scoring!r}.{hint}"
        )
    other = scores.CLASSIFICATION if task == "regression" else scores.REGRESSION
    if scoring in other or (task == "regression" and scoring == "roc_auc"):
        fitting = ", ".join(scores.REGRESSION if task == "regression" else scores.CLASSIFICATION)
        raise InputError(f"scoring={scoring!r} does not fit a {task} task; choose for example {fitting}.")
    if task == "multiclass" and scoring == "roc_auc":
        raise InputError("scoring='roc_auc' needs two classes and the target has more; choose 'roc_auc_ovr'.")


def _positive_code(
    positive: Any, scoring: str, scorer: Scorer | None, task: Task, classes: np.ndarray | None
) -> int | None:
    """Return the code of the class that a score is of, None where it is of none."""
    labels = [] if classes is None else classes.tolist()
    of_a_class = scorer is not None and task == "binary" and _has_positive_class(scorer)
    if positive is None:
        if of_a_class and set(labels) not in ({0, 1}, {-1, 1}):  # {False, True} is {0, 1}
            raise InputError(
                f"scoring={scoring!r} is of one class, the positive one: say which of the two it is, "
                f"positive={labels[0]!r} or positive={labels[1]!r}."
            )
        return 1 if of_a_class else None
    if task != "binary":
        raise InputError(
            f"positive={positive!r} needs a target of two classes, got a {task} task; leave it out."
        )
    if not of_a_class:
        raise InputError(
            f"positive={positive!r} is for scores of one class, such as f1 or average_precision, and "
            f"scoring={scoring!r} knows no positive class; leave it out."
        )
    codes = [code for code, label in enumerate(labels) if _is_meant(label, positive)]
    if not codes:
        raise InputError(
            f"positive must be one of the classes {labels[0]!r} and {labels[1]!r}, got {positive!r}."
        )
    return codes[0]


def _is_meant(label: Any, positive: Any) -> bool:
    """Whether a class is the one that was asked for, which the command line can do in text alone."""
    if isinstance(positive, str) and not isinstance(label, str):
        return positive.lower() in (str(label).lower(), text_of(label))
    return np.ndim(positive) == 0 and bool(label == positive)


def _has_positive_class(scorer: Scorer) -> bool:
    """Whether a scorer of two classes gives another score where they change places, tried on a few rows."""
    x, y = np.array([[0.0], [1.0], [3.0], [5.0], [8.0], [11.0], [15.0]]), np.array([0, 0, 1, 0, 0, 1, 1])
    with warnings.catch_warnings(action="ignore"):
        try:
            one, other = (scorer(GaussianNB().fit(x, labels), x, labels) for labels in (y, 1 - y))
        except ValueError:  # it is for another kind of target, which it says better of the user's rows
            return False
    return not math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-6)


def _qualified_name(scorer: Scorer) -> str:
    return f"{getattr(scorer, '__module__', '')}:{getattr(scorer, '__qualname__', type(scorer).__qualname__)}"


def fitted(
    output: Tensor,
    classes: np.ndarray | None,
    X: Any,
    rows: Any,
    others: Callable[[Any], Tensor] | None = None,
) -> "_Fitted":
    """Return what a scorer takes for a fitted estimator, whose outputs (m, K) for ``X`` are given.

    That holds as long as X is equal to ``rows``; ``others`` gives the outputs for anything else.
    """
    return (_Regressor if classes is None else _Classifier)(output, classes, X, rows, others)


class _Fitted(BaseEstimator):  # type: ignore[misc]
    """A fitted estimator, as far as a scorer asks for one: outputs that are already there, and those of other rows."""

    def __init__(
        self,
        output: Tensor,
        classes: np.ndarray | None,
        X: Any,
        rows: Any,
        others: Callable[[Any], Tensor] | None,
    ) -> None:
        self.output, self.classes = output, classes
        self.X, self.rows, self.others = X, rows, others

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def fit(self, X: Any, y: Any = None) -> "_Fitted":
        raise InputError("the estimator that a scorer is given is fitted, and cannot be fitted again.")

    def close(self) -> None:
        """Answer no more: the member trains on, and its outputs are overwritten."""
        self.X, self.others = object(), None

    def outputs(self, X: Any) -> Tensor:
        """Return the outputs (m, K) for any rows X."""
        if X is self.X and (X is self.rows or X.equals(self.rows)):
            return self.output
        if self.others is None:
            raise InputError("the estimator that a scorer is given answers only while the scorer runs.")
        return self.others(X)


class _Classifier(ClassifierMixin, _Fitted):  # type: ignore[misc]
    @property
    def classes_(self) -> np.ndarray:
        assert self.classes is not None
        return self.classes

    def predict_proba(self, X: Any) -> np.ndarray:
        probabilities: np.ndarray = self.outputs(X).softmax(-1).numpy()
        return probabilities

    def predict(self, X: Any) -> np.ndarray:
        labels: np.ndarray = self.classes_[self.outputs(X).argmax(-1).numpy()]
        return labels


class _Regressor(RegressorMixin, _Fitted):  # type: ignore[misc]
    def predict(self, X: Any) -> np.ndarray:
        values: np.ndarray = self.outputs(X).squeeze(-1).numpy()
        return values


_BLOCK_BYTES = 4 << 20  # of one layer's validation outputs: what stays in a core's cache
_KEPT_NUMBERS = 1 << 27  # of all validation rows, from which they are gathered anew at every epoch


class Validation:
    """Scores members on the validation rows of their folds, which are kept as they are gathered where they are few."""

    def __init__(self, data: Dataset, scoring: Scoring | None) -> None:
        self.data, self.scoring = data, scoring
        self.kept: dict[tuple[int, int], tuple[tuple[Tensor, ...], ...]] = {}

    def scores(self, network: Network, params: Params, trials: int) -> np.ndarray:
        """Return the scores (C, F) of all members of a network of so many trials."""
        assert self.scoring is not None
        columns = []
        block = _block_rows(self.data, network, trials)
        for fold in range(self.data.n_folds):
            blocks = [network.outputs(params, fold, part) for part in self._parts(fold, block)]
            outputs = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)
            columns.append(self.scoring(self.data, fold, outputs, partial(network.member, params, fold)))
        return torch.stack(columns, 1).cpu().numpy()  # the only device sync of an epoch

    def _parts(self, fold: int, rows: int) -> Iterable[tuple[Tensor, ...]]:
        """Return the validation rows of a fold, so many at a time."""
        parts = (self.data.rows(fold, part) for part in torch.split(self.data.folds[fold].valid, rows))
        if self.data.n_rows * self.data.row_numbers > _KEPT_NUMBERS:
            return parts
        if (fold, rows) not in self.kept:
            self.kept[fold, rows] = tuple(parts)
        return self.kept[fold, rows]


def _block_rows(data: Dataset, network: Network, trials: int) -> int:
    """Rows to evaluate at a time, so that one layer's outputs of all trials stay within the block."""
    if not network.alone:
        return data.n_rows
    widest = max(data.row_numbers, network.widest)
    return max(64, _BLOCK_BYTES // (trials * widest * data.dtype.itemsize))
