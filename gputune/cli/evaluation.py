"""The scores of a saved model on rows that have their target: as the study scored its folds, and further ones."""

import math
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.metrics import get_scorer, get_scorer_names
from torch import Tensor
from torch.nn import functional

from gputune.data.source import Source
from gputune.errors import InputError
from gputune.scoring.estimators import fitted
from gputune.scoring.losses import LOSS_OF_TASK, LOSSES
from gputune.scoring.metrics import has_positive_class, make_scoring
from gputune.scoring.objective import Objective
from gputune.scoring.scoring import Scoring
from gputune.study.labels import class_codes, refuse_unknown
from gputune.study.model import TunedModel
from gputune.text import Measure, clean, count, measure_of, paragraph, table
from gputune.types import Json, Task

_SAMPLES, _SAMPLE_ROWS = 400, 20_000
"""Bootstrap samples, and the rows that one of them has at most: what takes a second or two."""


@dataclass(frozen=True)
class HeldOut:
    """A held-out score in scikit-learn's sign."""

    score: float  # NaN where there is none
    rows: int
    unseen: int = 0  # of a class that the search has not: wrong; balanced accuracy and probabilities leave them out
    why: str = ""  # why there is no score
    interval: tuple[float, float] | None = None  # of 95 % of bootstrap samples; None where few have a score
    positive: object = None  # the class that the score is of; None: of none

    def bounds(self, measure: Measure) -> str:
        """Return the interval in words, "" where there is none."""
        return " to ".join(sorted(map(measure.text, self.interval or ()), key=float))


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
    model: TunedModel, scoring: str, test: Source, *, positive: object = None, outputs: Tensor | None = None
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
    shown = None
    try:
        how = make_scoring(scoring, model.task, model.classes, positive, loss, n_labels=y.shape[-1])
        shown = None if how.positive is None or classes is None else classes[how.positive]
        outputs = model._outputs(test.X) if outputs is None else outputs
        outputs, target = _outputs_to_score(model, loss, outputs, torch.from_numpy(y))
        if classes is not None and unseen:
            how, outputs, target = _with_unseen(how, outputs, target, len(classes))
        with warnings.catch_warnings(action="ignore"):  # of classes that no row is predicted as
            score = _score(how, outputs, target)
    except ValueError as error:  # what scikit-learn raises where a metric is undefined
        return HeldOut(math.nan, rows, unseen, str(error).rstrip("."), positive=shown)
    if not math.isfinite(score):
        return HeldOut(math.nan, rows, unseen, "it is undefined on these rows", positive=shown)
    return HeldOut(score, rows, unseen, interval=_interval(how, outputs, target, score), positive=shown)


def labels_of(model: TunedModel, test: Source) -> tuple[list[object] | None, np.ndarray]:
    """Return the classes, those of the held-out rows alone last, and the rows' codes; or None and numbers."""
    return (None, np.asarray(test.y, dtype=float)) if model.classes is None else class_codes(model.classes, test.y)


def _outputs_to_score(model: TunedModel, loss: Objective | None, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs and targets as scores take them; a loss takes those that it was trained on."""
    if loss is not None and model.task == "regression":
        there = y.numpy() if model.transform is None else model.transform.forward(y.numpy())
        return outputs, torch.from_numpy((there - model.center) / model.scale)
    if loss is not None:
        return outputs.diff(dim=1) if loss.one_logit else outputs, y
    if model.task == "multilabel" or model.classes is not None:
        # The model's own logits, since those of rounded probabilities would tie, and break ties, otherwise.
        return outputs, y
    predicted = torch.from_numpy(model._predict(outputs))
    return predicted if predicted.dim() > 1 else predicted[:, None], y


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


_SCORES: dict[Task, tuple[str, ...]] = {
    "binary": ("accuracy", "balanced_accuracy", "roc_auc", "neg_log_loss"),
    "multiclass": ("accuracy", "balanced_accuracy", "roc_auc_ovr", "neg_log_loss"),
    "regression": ("r2", "neg_mean_absolute_error", "neg_root_mean_squared_error"),
    "multilabel": ("accuracy",),
    "custom": (),
}
"""Scores beside the one of the search."""

_OF_CLASS = ("f1", "precision", "recall")
"""Scores of the positive class, where it is known."""

_SHOWN = 12
"""Classes of which a terminal shows a matrix."""


@dataclass(frozen=True)
class Evaluation:
    """The scores of a model by name; of classes a confusion matrix."""

    rows: int
    scores: dict[str, HeldOut]
    classes: list[object]  # [] of numbers
    confusion: list[list[int]]  # lines are true classes, columns predicted ones

    def to_json(self) -> Json:
        """Return plain values; scores in scikit-learn's sign, null where they are undefined."""
        scores = {
            name: {
                **({"score": None, "why": one.why} if one.why else {"score": one.score, "interval": one.interval}),
                "positive": one.positive,
            }
            for name, one in self.scores.items()
        }
        matrix = {"classes": self.classes, "confusion": self.confusion} if self.classes else {}
        return {"rows": self.rows, "scores": scores} | matrix

    def text(self, width: int) -> str:
        """Return tables for a terminal."""
        rows, remarks = [], []
        for name, one in self.scores.items():
            measure = measure_of(name, one.score, one.positive)
            rows.append([measure.title, measure.text(one.score), one.bounds(measure) or "-"])
            remarks += [f"No {name}: {clean(one.why)}."] if one.why else []
        positive = self.scores["precision"].positive if "precision" in self.scores else None
        if positive in self.classes and not np.sum(self.confusion, 0)[self.classes.index(positive)]:
            remarks.append(f"No row is predicted as class {clean(positive)!r}: its precision is shown as 0.")
        if unseen := max((one.unseen for one in self.scores.values()), default=0):
            verb = "counts" if unseen == 1 else "count"
            remarks.append(
                f"{count(unseen, 'row')} of a class that the model does not know {verb} as wrong, in scores of a class "
                "as not of it; balanced accuracy and scores of probabilities leave such rows out."
            )
        scores = table(["score", "", "95 % of bootstrap samples"], rows, left=["score"])
        matrix = self._class_tables() if self.classes else []
        return "\n\n".join([count(self.rows, "row"), scores, *(paragraph(one, width) for one in remarks), *matrix])

    def _class_tables(self) -> list[str]:
        """Return precision and recall of each class, and the matrix where they are few."""

        def share(part: int, whole: int) -> str:
            return f"{part / whole:.4f}" if whole else "-"

        names, matrix = [clean(label) for label in self.classes], np.array(self.confusion)
        counts = zip(names, matrix.diagonal(), matrix.sum(1), matrix.sum(0))
        shares = [[name, str(rows), share(right, guesses), share(right, rows)] for name, right, rows, guesses in counts]
        tables = [table(["class", "rows", "precision", "recall"], shares, left=["class"])]
        if len(names) <= _SHOWN:
            corner, lines = "true \\ predicted", zip(names, self.confusion)
            tables.append(table([corner, *names], [[name, *map(str, line)] for name, line in lines], left=[corner]))
        return tables


def evaluation(model: TunedModel, test: Source, scoring: Sequence[str] | None, positive: object) -> Evaluation:
    """Return the scores of a model on rows with their target: those asked for, or else the usual ones of its task.

    Raises InputError for a score that there is not, or that is none of the task, for missing columns, and where the
    model knows no class of the rows.
    """
    loss, task = saved_loss(model), model.task
    if task == "custom":
        raise InputError(
            "no score that has a name is of a custom target; gputune predict writes what the model returns."
        )
    if loss is None and "neg_loss" in (scoring or ()):
        kind, its_loss = model.spec["kind"], model.info.get("loss", "another")
        was = f"was trained on {its_loss}" if kind == "module" else f"is a built-in {kind}"
        raise InputError(
            f"scoring='neg_loss' is of a module and of a loss that has a name, {', '.join(LOSSES)}, and this model "
            f"{was}; choose another, for example {_SCORES[task][-1]}."
        )
    outputs = model._outputs(test.X)
    classes, y = labels_of(model, test)
    if model.classes is not None and classes is not None:
        refuse_unknown(classes, y, len(model.classes), f"column {test.target!r}")
    own, known = str(model.info.get("scoring") or ""), get_scorer_names()
    first = [own] if own in known or (own == "neg_loss" and loss is not None) else []
    scores = {}
    for name in scoring or dict.fromkeys((*first, *_SCORES[task], *(_OF_CLASS if positive is not None else ()))):
        of_class = task == "binary" and name in known and has_positive_class(get_scorer(name))
        one = positive if of_class else None
        make_scoring(name, task, model.classes, one, loss, n_labels=y.shape[-1])  # raises for a name that is none
        scores[name] = held_out_score(model, name, test, positive=one, outputs=outputs)
    if classes is None or task == "multilabel":
        return Evaluation(len(test.X), scores, [], [])
    code = {label: code for code, label in enumerate(classes)}
    predicted = [code[label] for label in model._predict(outputs).tolist()]
    K = len(classes)
    matrix = np.bincount(y * K + predicted, minlength=K * K).reshape(K, K)
    return Evaluation(len(test.X), scores, classes, matrix.tolist())
