"""What a model is worth on rows with their answers: scores with intervals, a confusion matrix, each class."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import get_scorer, get_scorer_names

from gputune.cli.held_out import HeldOut, held_out_score, labels_of, saved_loss
from gputune.data.source import Source
from gputune.errors import InputError
from gputune.scoring.losses import LOSSES
from gputune.scoring.scoring import has_positive_class, make_scoring
from gputune.study.answers import refuse_unknown
from gputune.study.model import TunedModel
from gputune.text import clean, count, measure_of, paragraph, table
from gputune.types import Json, Task

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
    """Scores of so many rows by name, with the class that each is of (None: of none); of classes a confusion matrix.

    ``confusion`` has the true classes in its lines and the predicted ones in its columns; both are empty of numbers.
    """

    rows: int
    scores: dict[str, tuple[HeldOut, object]]
    classes: list[object]
    confusion: list[list[int]]

    def to_json(self) -> Json:
        """Return plain values; scores in scikit-learn's sign, null where they are undefined."""
        scores = {
            name: {
                **(
                    {"score": None, "why": one.why}
                    if one.why
                    else {"score": one.score, "interval": one.interval}
                ),
                "positive": positive,
            }
            for name, (one, positive) in self.scores.items()
        }
        shared = {"rows": self.rows, "scores": scores}
        return shared | ({"classes": self.classes, "confusion": self.confusion} if self.classes else {})

    def text(self, width: int) -> str:
        """Return tables for a terminal."""
        rows = [_score(name, *score) for name, score in self.scores.items()]
        parts = [table(["score", "", "95 % of bootstrap samples"], rows, left=["score"])]
        undefined = [f"No {name}: {clean(one.why)}." for name, (one, _) in self.scores.items() if one.why]
        undefined += self._of_rows()
        parts += [paragraph(sentence, width) for sentence in undefined]
        if self.classes:
            parts += (
                [self._of_classes(), self._matrix()] if len(self.classes) <= _SHOWN else [self._of_classes()]
            )
        return "\n\n".join([f"{count(self.rows, 'row')}", *parts])

    def _of_rows(self) -> list[str]:
        """Return what the scores make of rows of an unknown class, and of a class that no row is predicted as."""
        said = []
        positive = self.scores["precision"][1] if "precision" in self.scores else None
        if positive in self.classes and not np.sum(self.confusion, 0)[self.classes.index(positive)]:
            said.append(f"No row is predicted as class {clean(positive)!r}: its precision is shown as 0.")
        if unseen := max((one.unseen for one, _ in self.scores.values()), default=0):
            verb = "counts" if unseen == 1 else "count"
            said.append(
                f"{count(unseen, 'row')} of a class that the model does not know {verb} as wrong, in scores of a class "
                "as not of it; balanced accuracy and scores of probabilities leave such rows out."
            )
        return said

    def _of_classes(self) -> str:
        matrix = np.array(self.confusion)
        right, true, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)

        def share(part: int, whole: int) -> str:
            return f"{part / whole:.4f}" if whole else "-"

        rows = [
            [clean(label), str(true[i]), share(right[i], predicted[i]), share(right[i], true[i])]
            for i, label in enumerate(self.classes)
        ]
        return table(["class", "rows", "precision", "recall"], rows, left=["class"])

    def _matrix(self) -> str:
        names = [clean(label) for label in self.classes]
        rows = [[name, *map(str, line)] for name, line in zip(names, self.confusion)]
        return table(["true \\ predicted", *names], rows, left=["true \\ predicted"])


def _score(name: str, one: HeldOut, positive: object) -> list[str]:
    measure = measure_of(name, one.score, positive)
    if one.interval is None:
        return [measure.title, measure.text(one.score), "-"]
    low, high = sorted(map(measure.text, one.interval), key=float)
    return [measure.title, measure.text(one.score), f"{low} to {high}"]


def evaluation(
    model: TunedModel, test: Source, scoring: Sequence[str] | None, positive: object
) -> Evaluation:
    """Return the scores of a model on rows with their target: those asked for, or else the usual ones of its task.

    Raises InputError for a score that there is not, or that is none of the task, for missing columns, and where the
    model knows no class of the rows.
    """
    loss = saved_loss(model)
    if model.task == "custom" or (loss is None and "neg_loss" in (scoring or ())):
        raise InputError(_without_score(model))
    outputs = model._outputs(test.X)
    classes, y = labels_of(model, test)
    if model.classes is not None and classes is not None:
        refuse_unknown(classes, y, len(model.classes), f"column {test.target!r}")
    own, known = str(model.info.get("scoring") or ""), get_scorer_names()
    usual = [
        *([own] if own in known or (own == "neg_loss" and loss is not None) else []),
        *_SCORES[model.task],
        *(_OF_CLASS if positive is not None else ()),
    ]
    scores: dict[str, tuple[HeldOut, object]] = {}
    for name in scoring or dict.fromkeys(usual):
        of_class = model.task == "binary" and name in known and has_positive_class(get_scorer(name))
        one = positive if of_class else None
        how = make_scoring(name, model.task, model.classes, one, loss, n_labels=y.shape[-1])
        shown = None if how.positive is None or classes is None else classes[how.positive]
        scores[name] = held_out_score(model, name, test, positive=one, outputs=outputs), shown
    if classes is None or model.task == "multilabel":
        return Evaluation(len(test.X), scores, [], [])
    code = {label: code for code, label in enumerate(classes)}
    predicted = [code[label] for label in model._predicted(outputs).tolist()]
    K = len(classes)
    matrix = np.bincount(y * K + predicted, minlength=K * K).reshape(K, K)
    return Evaluation(len(test.X), scores, classes, matrix.tolist())


def _without_score(model: TunedModel) -> str:
    """Return why a model has no score of a name, or none by its loss."""
    if model.task == "custom":
        return (
            "no score that has a name is of a custom target; gputune predict writes what the model returns."
        )
    built_in = f"is a built-in {model.spec['kind']}"
    was = (
        built_in if model.spec["kind"] != "module" else f"was trained on {model.info.get('loss', 'another')}"
    )
    return (
        f"scoring='neg_loss' is of a module and of a loss that has a name, {', '.join(LOSSES)}, and this model {was}; "
        f"choose another, for example {_SCORES[model.task][-1]}."
    )
