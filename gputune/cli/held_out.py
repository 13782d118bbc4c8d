"""The score of a tuned model on rows that were kept apart, as the study scored its folds."""

import math
import warnings
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from gputune.data.source import Source
from gputune.scoring.estimators import fitted
from gputune.scoring.scoring import Scoring, make_scoring
from gputune.study.model import TunedModel

_SAMPLES, _SAMPLE_ROWS = 400, 20_000
"""Bootstrap samples, and the rows that one of them has at most: what takes a second or two."""


@dataclass(frozen=True)
class HeldOut:
    """A held-out score in scikit-learn's sign, on so many rows.

    ``score`` is NaN where there is none, and ``why`` says why. ``unseen`` rows have a class that no row of the
    search has: they count as rows that the model gets wrong. ``interval`` holds 95 % of the scores of bootstrap samples
    of the rows; None where few of them have one.
    """

    score: float
    rows: int
    unseen: int = 0
    why: str = ""
    interval: tuple[float, float] | None = None


def held_out_score(model: TunedModel, scoring: str, test: Source, *, positive: object = None) -> HeldOut:
    """Score the model on the held-out rows by the scorer of this name; never raises for an undefined score.

    ``positive`` is the class that the score is of, None where it is of none.
    """
    rows = len(test.X)
    classes, y = labels_of(model, test)
    unseen = 0 if classes is None or model.classes is None else int((y >= len(model.classes)).sum())
    try:
        how = make_scoring(scoring, model.task, classes, positive, n_labels=y.shape[-1])
        outputs, target = _outputs(model, test, classes), torch.from_numpy(y)
        score = _score(how, outputs, target)
    except ValueError as error:  # what scikit-learn raises where a metric is undefined
        return HeldOut(math.nan, rows, unseen, str(error))
    if not math.isfinite(score):
        return HeldOut(math.nan, rows, unseen, "it is undefined on these rows")
    return HeldOut(score, rows, unseen, interval=_interval(how, outputs, target, score))


def _outputs(model: TunedModel, test: Source, classes: np.ndarray | None) -> Tensor:
    """Return what the model predicts of the held-out rows, as scores take it."""
    if model.task == "multilabel":
        return model._outputs(test.X)
    if classes is None:
        predicted = torch.from_numpy(model.predict(test.X))
        return predicted if predicted.dim() > 1 else predicted[:, None]
    # A class that the model has never seen has no probability. The rest are the model's own logits, since those of
    # rounded probabilities would tie, and break ties, otherwise.
    known = model._outputs(test.X)
    return functional.pad(known, (0, len(classes) - known.shape[1]), value=-torch.inf)


def _score(how: Scoring, outputs: Tensor, y: Tensor) -> float:
    if how.score is not None:
        return float(how.score(outputs[None], y))
    assert how.scorer is not None  # a Scoring has one of the two
    if how.positive is not None and not (y == how.positive).any():
        raise ValueError("none of these rows is of the positive class")  # scikit-learn says 0
    outputs, codes = how.positive_last(outputs, y)
    X = np.zeros((len(y), 1))  # of which a scorer that has a name reads nothing
    return float(how.scorer(fitted(outputs, how.classes, X, X), X, codes.numpy()))


def _interval(how: Scoring, outputs: Tensor, y: Tensor, score: float) -> tuple[float, float] | None:
    """Return the bounds of 95 % of the scores of bootstrap samples; of many rows by smaller samples, scaled."""
    rng, rows = np.random.default_rng(0), len(y)
    size, scores = min(rows, _SAMPLE_ROWS), []
    with warnings.catch_warnings(action="ignore"):  # of samples that lack a class
        for _ in range(_SAMPLES):
            sample = torch.from_numpy(rng.integers(0, rows, size))
            with suppress(ValueError):
                scores.append(_score(how, outputs[sample], y[sample]))
    finite = [one for one in scores if math.isfinite(one)]
    if len(finite) < _SAMPLES / 2:
        return None
    low, high = np.quantile(finite, (0.025, 0.975)) - score
    narrower = math.sqrt(size / rows)
    return score + narrower * float(low), score + narrower * float(high)


def labels_of(model: TunedModel, test: Source) -> tuple[np.ndarray | None, np.ndarray]:
    """Return the classes, those of the held-out rows alone last, and the rows' codes; or None and numbers."""
    if model.classes is None:
        return None, np.asarray(test.y, dtype=np.float64)
    labels = np.asarray(test.y)
    if model.classes.dtype.kind == "U":
        labels = labels.astype(str)
    classes = [*model.classes.tolist(), *np.setdiff1d(labels, model.classes).tolist()]
    position = {label: code for code, label in enumerate(classes)}
    return np.array(classes), np.array([position[label] for label in labels.tolist()], dtype=np.int64)
