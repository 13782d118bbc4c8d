"""The score of a tuned model on rows that were kept apart, as the study scored its folds."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from gputune.data.source import Source
from gputune.engine.scoring import Scoring, fitted, make_scoring
from gputune.study.model import TunedModel


@dataclass(frozen=True)
class HeldOut:
    """A held-out score in scikit-learn's sign, on so many rows.

    ``score`` is NaN where there is none, and ``why`` says why. ``unseen`` rows have a class that no row of the
    search has: they count as rows that the model gets wrong.
    """

    score: float
    rows: int
    unseen: int = 0
    why: str = ""


def held_out_score(model: TunedModel, scoring: str, test: Source, *, positive: Any = None) -> HeldOut:
    """Score the model on the held-out rows by the scorer of this name; never raises for an undefined score.

    ``positive`` is the class that the score is of, None where it is of none.
    """
    rows = len(test.X)
    classes, y = _labels(model, test)
    unseen = 0 if classes is None or model.classes is None else int((y >= len(model.classes)).sum())
    try:
        how = make_scoring(scoring, model.task, classes, positive)
        score = _score(model, how, test, classes, y)
    except ValueError as error:  # what scikit-learn raises where a metric is undefined
        return HeldOut(math.nan, rows, unseen, str(error))
    why = "" if math.isfinite(score) else "it is undefined on these rows"
    return HeldOut(score if math.isfinite(score) else math.nan, rows, unseen, why)


def _score(model: TunedModel, how: Scoring, test: Source, classes: np.ndarray | None, y: np.ndarray) -> float:
    if classes is None:
        outputs = torch.from_numpy(model.predict(test.X))[:, None]
    else:
        # A class that the model has never seen has no probability. The rest are the model's own logits, since those
        # of rounded probabilities would tie, and break ties, otherwise.
        known = model._outputs(test.X)
        outputs = functional.pad(known, (0, len(classes) - known.shape[1]), value=-torch.inf)
    if how.score is not None:
        return float(how.score(outputs[None], torch.from_numpy(y)))
    assert how.scorer is not None  # a Scoring has one of the two
    outputs, codes = how.positive_last(outputs, torch.from_numpy(y))
    X = np.zeros((len(y), 1))  # of which a scorer that has a name reads nothing
    return float(how.scorer(fitted(outputs, how.classes, X, X), X, codes.numpy()))


def _labels(model: TunedModel, test: Source) -> tuple[np.ndarray | None, np.ndarray]:
    """Return the classes, those of the held-out rows alone last, and the rows' codes; or None and numbers."""
    if model.classes is None:
        return None, np.asarray(test.y, dtype=np.float64)
    labels = np.asarray(test.y)
    if model.classes.dtype.kind == "U":
        labels = labels.astype(str)
    classes = [*model.classes.tolist(), *np.setdiff1d(labels, model.classes).tolist()]
    position = {label: code for code, label in enumerate(classes)}
    return np.array(classes), np.array([position[label] for label in labels.tolist()], dtype=np.int64)
