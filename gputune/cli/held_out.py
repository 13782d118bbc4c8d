"""The score of a tuned model on rows that were kept apart, as the study scored its folds."""

import math
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.metrics import get_scorer
from torch import Tensor
from torch.nn import functional

from gputune.data.source import Source
from gputune.scoring.estimators import fitted
from gputune.scoring.losses import LOSS_OF_TASK, LOSSES
from gputune.scoring.objective import Objective
from gputune.scoring.scoring import Scoring, make_scoring
from gputune.study.answers import class_codes
from gputune.study.model import TunedModel

_SAMPLES, _SAMPLE_ROWS = 400, 20_000
"""Bootstrap samples, and the rows that one of them has at most: what takes a second or two."""


@dataclass(frozen=True)
class HeldOut:
    """A held-out score in scikit-learn's sign, on so many rows.

    ``score`` is NaN where there is none, and ``why`` says why. ``unseen`` rows have a class that no row of the
    search has: they count as wrong, in scores of a class as not of it, and balanced accuracy and scores of
    probabilities leave them out. ``interval`` holds 95 % of the scores of bootstrap samples
    of the rows; None where few of them have one.
    """

    score: float
    rows: int
    unseen: int = 0
    why: str = ""
    interval: tuple[float, float] | None = None


def saved_loss(model: TunedModel) -> Objective | None:
    """Return the loss of a module where it has a name, with the numbers by which trials were ranked.

    None for a built-in model, and for a loss of the user's own, which is in no file.
    """
    loss = model.info.get("loss")  # of an augmented training it goes on with a comma
    if loss is None or model.spec["kind"] != "module":
        return None
    name = loss.partition(",")[0] or LOSS_OF_TASK.get(model.task, "")
    arguments = model.info.get("loss_arguments", {})
    return Objective(name, binary=model.task == "binary", fixed=arguments) if name in LOSSES else None


def held_out_score(
    model: TunedModel,
    scoring: str,
    test: Source,
    *,
    positive: object = None,
    outputs: Tensor | None = None,
) -> HeldOut:
    """Score the model on the held-out rows by the scorer of this name; never raises for an undefined score.

    ``positive`` is the class that the score is of, None where it is of none; ``outputs`` are what the model returns of
    the rows, where that is known.
    """
    rows, loss = len(test.X), saved_loss(model) if scoring == "neg_loss" else None
    if scoring == "neg_loss" and loss is None:
        return HeldOut(math.nan, rows, why="a saved model holds no loss but one that has a name")
    classes, y = labels_of(model, test)
    unseen = 0 if classes is None or model.classes is None else int((y >= len(model.classes)).sum())
    try:
        how = make_scoring(scoring, model.task, model.classes, positive, loss, n_labels=y.shape[-1])
        outputs, target = model._outputs(test.X) if outputs is None else outputs, torch.from_numpy(y)
        if loss is not None:
            outputs, target = _as_in_training(model, loss, outputs, target)
        else:
            outputs = _as_scored(model, outputs)
        if classes is not None and unseen:
            how, outputs, target = _with_unseen(how, outputs, target, len(classes))
        with warnings.catch_warnings(action="ignore"):  # of classes that no row is predicted as
            score = _score(how, outputs, target)
    except ValueError as error:  # what scikit-learn raises where a metric is undefined
        return HeldOut(math.nan, rows, unseen, str(error).rstrip("."))
    if not math.isfinite(score):
        return HeldOut(math.nan, rows, unseen, "it is undefined on these rows")
    return HeldOut(score, rows, unseen, interval=_interval(how, outputs, target, score))


def _as_scored(model: TunedModel, outputs: Tensor) -> Tensor:
    """Return outputs of the model as scores take them."""
    if model.task == "multilabel" or model.classes is not None:
        # The model's own logits, since those of rounded probabilities would tie, and break ties, otherwise.
        return outputs
    predicted = torch.from_numpy(model._predicted(outputs))
    return predicted if predicted.dim() > 1 else predicted[:, None]


def _as_in_training(model: TunedModel, loss: Objective, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a loss was of: standardised numbers, or of two classes one logit where it is of one."""
    if model.task == "regression":
        there = y.numpy() if model.transform is None else model.transform.forward(y.numpy())
        return outputs, torch.from_numpy((there - model.center) / model.scale)
    return outputs.diff(dim=1) if loss.one_logit else outputs, y


def _with_unseen(how: Scoring, outputs: Tensor, y: Tensor, classes: int) -> tuple[Scoring, Tensor, Tensor]:
    """Return what is scored where rows have a code that the outputs (n, K) lack, of so many classes in all."""
    unseen = y >= outputs.shape[1]
    if how.positive is not None:
        return how, outputs, y.where(~unseen, 1 - how.positive)
    # A class without a probability would be worth what a mean over classes, or a limit of the logarithm, makes of it.
    if how.is_loss or how.name == "balanced_accuracy" or get_scorer(how.name)._response_method != "predict":
        return how, outputs[~unseen], y[~unseen]
    padded = functional.pad(outputs, (0, classes - outputs.shape[1]), value=-torch.inf)
    return replace(how, classes=np.arange(classes)), padded, y


def _score(how: Scoring, outputs: Tensor, y: Tensor) -> float:
    if how.of_outputs is not None:
        return float(how.of_outputs(outputs, y))
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


def labels_of(model: TunedModel, test: Source) -> tuple[list[object] | None, np.ndarray]:
    """Return the classes, those of the held-out rows alone last, and the rows' codes; or None and numbers."""
    if model.classes is None:
        return None, np.asarray(test.y, dtype=np.float64)
    return class_codes(model.classes, test.y)
