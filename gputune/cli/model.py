"""The commands ``gputune predict``, ``evaluate`` and ``export`` on a saved model."""

import csv
import io
import itertools
import json
import shutil
import warnings
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from sklearn.metrics import get_scorer, get_scorer_names

from gputune.cli.held_out import HeldOut, held_out_score, labels_of, rows_with_target, saved_loss
from gputune.data.array_files import ARRAY_SUFFIXES
from gputune.data.files import read_columns
from gputune.data.source import Source
from gputune.data.target import dropped_words
from gputune.ground.errors import InputError, warn
from gputune.ground.files import write_text
from gputune.ground.text import clean, count, is_formula, measure_of, paragraph, table
from gputune.ground.types import Json, Task
from gputune.report.facts import check_place
from gputune.scoring.losses import LOSSES
from gputune.scoring.metrics import has_positive_class, make_scoring
from gputune.scoring.scores import PINBALL
from gputune.study.code import class_from_flag
from gputune.study.export import description
from gputune.study.model import TunedModel, half_width, load_model, refuse_unknown
from gputune.study.model_files import share_of_rows

_SCORES: dict[Task, tuple[str, ...]] = {  # in addition to the metric of the search
    "binary": ("accuracy", "balanced_accuracy", "roc_auc", "neg_log_loss"),
    "multiclass": ("accuracy", "balanced_accuracy", "roc_auc_ovr", "neg_log_loss"),
    "regression": ("r2", "neg_mean_absolute_error", "neg_root_mean_squared_error"),
    "multilabel": ("accuracy",),
}


@dataclass(frozen=True)
class Evaluation:
    """The scores of a model by name, and the confusion matrix for classes."""

    rows: int
    scores: dict[str, HeldOut]
    classes: list[object]  # [] for numbers
    confusion: list[list[int]]  # rows are true classes, columns are predicted classes
    dropped: str = ""  # remark on rows left out because their target is missing
    trained_share: float | None = None
    """The approximate share of the scored rows on which the model was trained.

    The share is None for a model of an old version of gputune, because such a model has no sample
    of its training rows.
    """

    def to_json(self) -> Json:
        """Return the scores as JSON values, greater is better. An undefined score is null."""
        report: dict[str, object] = {
            "rows": self.rows,
            "trained_share": self.trained_share,
            "scores": {name: _score_json(score) for name, score in self.scores.items()},
        }
        if self.classes:
            report |= {"classes": self.classes, "confusion": self.confusion}
        notes = [self.dropped] if self.dropped else []
        notes += _remarks_on_trained_rows(self.trained_share)
        if notes:
            report["notes"] = notes
        return report

    def text(self, width: int) -> str:
        """Return the scores as text for a terminal of this width."""
        rows = []
        remarks = [f"{clean(self.dropped)}."] if self.dropped else []
        remarks += _remarks_on_trained_rows(self.trained_share)
        for name, score in self.scores.items():
            measure = measure_of(name, score.score, score.positive)
            rows.append([measure.title, measure.text(score.score), score.bounds(measure) or "-"])
            if score.reason:
                remarks.append(f"No {name}: {clean(score.reason)}.")
        positive = self.scores["precision"].positive if "precision" in self.scores else None
        if positive in self.classes and not np.sum(self.confusion, 0)[self.classes.index(positive)]:
            remarks.append(
                f"No row is predicted as class {clean(positive)!r}: its precision is shown as 0."
            )
        unseen = max((score.unseen for score in self.scores.values()), default=0)
        if unseen:
            verb = "counts" if unseen == 1 else "count"
            remarks.append(
                f"{count(unseen, 'row')} of a class that the model does not have {verb} as wrong. "
                "Scores of a positive class, such as precision, count these rows as not positive. "
                "Balanced accuracy and scores of probabilities ignore these rows."
            )
        remarks.append(self._intervals_remark())
        parts = [
            count(self.rows, "row"),
            table(["score", "", "95% interval"], rows, left=["score"]),
            *(paragraph(remark, width) for remark in remarks if remark),
        ]
        if self.classes:
            parts += self._class_tables()
        return "\n\n".join(parts)

    def _intervals_remark(self) -> str:
        """Return sentences on the method of the intervals and on scores without an interval."""
        sentences = []
        methods = set()
        constant = []
        for name, score in self.scores.items():
            if score.interval is not None:
                methods.add(score.interval_method)
            elif score.interval_method:
                constant.append(name)
        if methods == {"wilson"}:
            sentences.append("The interval is Wilson's for a share of rows.")
        elif methods == {"bootstrap"}:
            sentences.append("The intervals hold 95% of bootstrap samples.")
        elif methods:
            sentences.append(
                "The interval of the accuracy is Wilson's; the other intervals hold 95% of "
                "bootstrap samples."
            )
        if constant:
            verb = "has" if len(constant) == 1 else "have"
            sentences.append(
                f"{', '.join(constant)} {verb} no interval: all bootstrap samples have the same "
                "score."
            )
        return " ".join(sentences)

    def _class_tables(self) -> list[str]:
        """Return tables of precision and recall, and of the confusion matrix of few classes."""
        names = list(map(clean, self.classes))
        matrix = np.array(self.confusion)
        shares = []
        for name, right, rows, guesses in zip(
            names, matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        ):
            shares.append([name, str(rows), _share_text(right, guesses), _share_text(right, rows)])
        tables = [table(["class", "rows", "precision", "recall"], shares, left=["class"])]
        if len(names) <= 12:  # more do not fit on a terminal
            corner = "true \\ predicted"
            lines = [[name, *map(str, row)] for name, row in zip(names, self.confusion)]
            tables.append(table([corner, *names], lines, left=[corner]))
        return tables


def _share_text(part: int, total: int) -> str:
    """Return the ratio of two counts as text, or "-" if the second count is 0."""
    return f"{part / total:.4f}" if total else "-"


def _score_json(score: HeldOut) -> Json:
    """Return a score and its interval as JSON values, or the reason for an undefined score."""
    if score.reason:
        return {"score": None, "why": score.reason, "positive": score.positive}
    return {
        "score": score.score,
        "interval": score.interval,
        "interval_method": score.interval_method,
        "positive": score.positive,
    }


def evaluation(
    model: TunedModel, test: Source, scoring: Sequence[str] | None, positive: object
) -> Evaluation:
    """Return the scores of a model on rows with their targets.

    Args:
        model: the saved model.
        test: the rows.
        scoring: names of the scorers. None: the usual scorers of the task.
        positive: the positive class, or None.

    Raises:
        InputError: a score does not exist, or does not fit the model.
    """
    loss = saved_loss(model)
    task = model.task
    if task == "custom":
        raise InputError(
            None,
            "No named score fits a custom target",
            remedy="Use gputune predict, which writes the outputs of the model.",
        )
    if loss is None and "neg_loss" in (scoring or ()):
        kind = model.spec["kind"]
        fact = f"is a built-in {kind}"
        if kind == "module":
            fact = f"was trained with {model.info.get('loss', 'another')}"
        raise InputError(
            "scoring='neg_loss'",
            f"needs a module that was trained with a named loss ({', '.join(LOSSES)}), but this "
            f"model {fact}",
            remedy=f"Choose another score, for example {_SCORES[task][-1]}.",
        )
    # All scores share one prediction of the rows.
    outputs = model._outputs(test.X)
    classes, y = labels_of(model, test)
    if model.classes is not None:
        refuse_unknown(classes, y, len(model.classes), f"column {test.target!r}")
    scorer_names = get_scorer_names()
    if not scoring:
        ranking = str(model.info.get("scoring") or "")
        names = [*_SCORES[task]]
        has_loss = ranking == "neg_loss" and loss is not None
        if ranking in scorer_names or ranking == PINBALL or has_loss:
            names.insert(0, ranking)
        if positive is not None:
            names += ["f1", "precision", "recall"]
        scoring = list(dict.fromkeys(names))
    scores = {}
    for name in scoring:
        label = None
        if task == "binary" and name in scorer_names and has_positive_class(get_scorer(name)):
            label = positive
        # Raises InputError for an unknown name.
        make_scoring(name, task, model.classes, label, loss, n_labels=y.shape[-1])
        scores[name] = held_out_score(model, name, test, positive=label, outputs=outputs)
    share = _trained_share(model, test, y)
    if not classes or task == "multilabel":
        return Evaluation(len(test.X), scores, [], [], trained_share=share)
    code = {label: code for code, label in enumerate(classes)}
    K = len(classes)
    predicted = [code[label] for label in model._predict(outputs).tolist()]
    # (K, K) counts: rows are true classes, columns are predicted classes
    matrix = np.bincount(y * K + predicted, minlength=K * K).reshape(K, K).tolist()
    return Evaluation(len(test.X), scores, classes, matrix, trained_share=share)


_FEW = 0.01
_ALMOST_ALL = 0.995
"""Limits for the estimated share of a file's rows that a model was trained on.

Below ``_FEW``, equal rows count as chance. Above ``_ALMOST_ALL``, the file counts as the training
file.
"""


def _remarks_on_trained_rows(share: float | None) -> list[str]:
    """Return a remark if the model was trained on some of the rows."""
    if share is None or share < _FEW:
        return []
    if share > _ALMOST_ALL:
        return [
            "The model was trained on these rows, so the scores do not show how well it predicts "
            "new rows."
        ]
    rows = f"about {share:.0%} of these rows, or on equal rows"
    return [f"The model was trained on {rows}, so the scores are better than those of new rows."]


def _trained_share(model: TunedModel, test: Source, y: np.ndarray) -> float | None:
    """Return the approximate share of the scored rows on which the model was trained, or None.

    ``y`` (n, ...) holds the class codes or the numeric targets.
    """
    sample = model.info.get("row_sample")
    if sample is None:
        return None
    # the prediction of these rows has shown them already
    with warnings.catch_warnings(action="ignore"):
        X = model._inputs(test.X)
        try:
            return share_of_rows(sample, model.layout, X, y)
        except ValueError as error:
            reason = str(error).rstrip(".")
            raise InputError(
                None,
                f"The model's sample of its training rows is damaged: {reason}",
                remedy="Save the model again.",
            ) from error


def _load_model(arguments: Namespace) -> TunedModel:
    """Return the saved model that the command names, with the class that ``--module`` names."""
    module = class_from_flag(arguments.module)
    return load_model(arguments.folder, module, trust_code=arguments.trust_code)


def predict(arguments: Namespace) -> str:
    """Return the predictions as CSV, or write them to ``--out``.

    The columns that ``--keep`` names come first. If a kept column has the name of a predicted
    column, "_given" is added to its name.
    """
    model = _load_model(arguments)
    file = arguments.file
    if arguments.keep and Path(file).suffix.lower() in ARRAY_SUFFIXES:
        rule = f"names columns of a table, but {file!r} holds arrays"
        raise InputError("--keep", rule, remedy="Leave it out.")
    columns = read_columns(file, arguments.keep) if arguments.keep else []
    if columns:  # declared as dropped, so that the model does not warn of unused columns
        dropped = [*model.info.get("drop", ()), *arguments.keep]
        model = replace(model, info={**model.info, "drop": dropped})
    header, rows = _predictions(model, arguments)
    if columns:
        header = [*_unique_names(arguments.keep, header), *header]
        rows = [[*cells, *row] for cells, row in zip(zip(*columns), rows, strict=True)]
    lines = [header, *rows]
    if not arguments.raw:
        formulas = set(map(str, filter(is_formula, itertools.chain.from_iterable(lines))))
        if formulas:
            warn(
                f"A spreadsheet would read {min(formulas)!r} as a formula, so gputune writes a ' "
                "before the text. Pass --raw to omit the '."
            )
            for line in lines:
                line[:] = [f"'{cell}" if cell in formulas else cell for cell in line]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    if arguments.out is None:
        return text.getvalue().rstrip("\n")
    check_place(
        f"--out {arguments.out!r}", Path(arguments.out), Path(file), "the file that is read"
    )
    write_text(Path(arguments.out), text.getvalue())
    return ""


def _unique_names(names: Sequence[str], header: Sequence[object]) -> list[str]:
    """Return the names of kept columns, with "_given" added if a predicted column has the same
    name."""
    predicted = set(map(str, header))
    unique = []
    for name in names:
        new = name
        while new in predicted or (new != name and new in names):
            new += "_given"
        unique.append(new)
    return unique


def _predictions(
    model: TunedModel, arguments: Namespace
) -> tuple[list[object], list[list[object]]]:
    """Return the header and the rows of a CSV file with the model's predictions."""
    file = arguments.file
    target = model.target
    if arguments.proba and arguments.interval is not None:
        rule = "--interval and --proba exclude each other"
        raise InputError(None, rule, remedy="Leave one out.")
    if arguments.proba and model.classes is None and model.task != "multilabel":
        rule = f"needs a model that predicts classes, but {arguments.folder!r} is a regression"
        raise InputError("--proba", rule, remedy="Leave it out.")
    if arguments.interval is not None:
        half = half_width(model, arguments.interval)
        outputs = model._outputs(file)
        # (rows, 3): prediction, lower and upper bound
        values = np.stack([model._predict(outputs), *model._ends(outputs, half)], 1)
        return [target, f"{target}_lower", f"{target}_upper"], values.tolist()
    values = model.predict_proba(file) if arguments.proba else model.predict(file)
    if values.ndim == 1:
        return [target], values[:, None].tolist()
    rows = values.tolist()
    if arguments.proba and model.classes is not None:
        return model.classes.tolist(), rows
    width = len(rows[0])
    if width == 1 and not arguments.proba:
        return [target], rows
    return [f"{target}_{column}" for column in range(width)], rows


def evaluate(arguments: Namespace) -> str:
    """Return the scores of a model on the rows of a file with known targets, as text or JSON."""
    model = _load_model(arguments)
    positive = arguments.positive
    if positive is not None and model.classes is None:
        rule = f"needs a model that predicts classes, but {arguments.folder!r} predicts numbers"
        raise InputError("--positive", rule, remedy="Leave it out.")
    if positive is None:
        positive = model.info.get("positive")
    rows = rows_with_target(model, arguments.file, arguments.target, arguments.missing_target)
    scores = evaluation(model, rows, arguments.scoring, positive)
    if rows.n_dropped:
        scores = replace(scores, dropped=dropped_words(rows.n_dropped, rows.target))
    if arguments.format == "json":
        return json.dumps(scores.to_json(), indent=1, allow_nan=False)
    return scores.text(shutil.get_terminal_size().columns)


def export(arguments: Namespace) -> str:
    """Write the exported model, and return one line about its inputs and outputs."""
    model = _load_model(arguments)
    model.export(arguments.out)
    exported = description(model)
    inputs = model.layout.in_words()
    if exported["inputs"] != "arrays":
        noun = "column" if exported["inputs"] == "columns" else "encoded feature"
        inputs = f"X, float64, a row of {count(len(exported['names']), noun)} for each prediction"
    return (
        f"{arguments.out}: takes {inputs}; gives {' and '.join(exported['outputs'])}; its metadata "
        "names them"
    )
