"""The commands ``gputune predict``, ``evaluate`` and ``export`` on a saved model."""

import csv
import io
import json
import shutil
import warnings
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from sklearn.metrics import get_scorer, get_scorer_names

from gputune.cli.answers import rows_with_target
from gputune.cli.held_out import HeldOut, held_out_score, labels_of, saved_loss
from gputune.data.array_files import ARRAY_SUFFIXES
from gputune.data.files import read_columns
from gputune.data.missing_target import dropped_words
from gputune.data.source import Source
from gputune.errors import InputError, warn
from gputune.report.facts import check_place
from gputune.scoring.losses import LOSSES
from gputune.scoring.metrics import has_positive_class, make_scoring
from gputune.scoring.scores import PINBALL
from gputune.scratch import write_text
from gputune.study.export import description
from gputune.study.labels import refuse_unknown
from gputune.study.model import TunedModel, load_model
from gputune.study.module_source import class_from_file
from gputune.study.trained_rows import share_of_rows
from gputune.text import clean, count, is_formula, measure_of, paragraph, table
from gputune.types import Json, Task

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
    """The approximate share of the rows that the model was trained on.

    None if it is not known, for models of old versions.
    """

    def to_json(self) -> Json:
        """Return the scores as plain values.

        Scores have scikit-learn's sign, and null if undefined.
        """
        scores = {}
        for name, one in self.scores.items():
            score = {"score": None, "why": one.why} if one.why else _score_json(one)
            scores[name] = {**score, "positive": one.positive}
        matrix = {"classes": self.classes, "confusion": self.confusion} if self.classes else {}
        notes = [self.dropped] if self.dropped else []
        notes += _remarks_on_trained_rows(self.trained_share)
        remarks = {"notes": notes} if notes else {}
        return (
            {"rows": self.rows, "trained_share": self.trained_share, "scores": scores}
            | matrix
            | remarks
        )

    def text(self, width: int) -> str:
        """Return the scores as text for a terminal of this width."""
        rows = []
        remarks = [f"{clean(self.dropped)}."] if self.dropped else []
        remarks += _remarks_on_trained_rows(self.trained_share)
        for name, one in self.scores.items():
            measure = measure_of(name, one.score, one.positive)
            rows.append([measure.title, measure.text(one.score), one.bounds(measure) or "-"])
            remarks += [f"No {name}: {clean(one.why)}."] if one.why else []
        positive = self.scores["precision"].positive if "precision" in self.scores else None
        if positive in self.classes and not np.sum(self.confusion, 0)[self.classes.index(positive)]:
            remarks.append(
                f"No row is predicted as class {clean(positive)!r}: its precision is shown as 0."
            )
        if unseen := max((one.unseen for one in self.scores.values()), default=0):
            verb = "counts" if unseen == 1 else "count"
            remark = (
                f"{count(unseen, 'row')} of a class that the model does not know {verb} as wrong, "
                "in scores of a"
            )
            remarks.append(
                f"{remark} class as not of it; balanced accuracy and scores of probabilities "
                "leave such rows out."
            )
        scores = table(["score", "", "95% interval"], rows, left=["score"])
        remarks.append(self._intervals_remark())
        parts = [
            count(self.rows, "row"),
            scores,
            *(paragraph(one, width) for one in remarks if one),
        ]
        return "\n\n".join([*parts, *(self._class_tables() if self.classes else [])])

    def _intervals_remark(self) -> str:
        """Return sentences on the method of the intervals, and on scores without one."""
        sentences = []
        methods = {one.interval_method for one in self.scores.values() if one.interval is not None}
        if methods == {"wilson"}:
            sentences.append("The interval is Wilson's for a share of rows.")
        elif methods == {"bootstrap"}:
            sentences.append("The intervals hold 95% of bootstrap samples.")
        elif methods:
            sentences.append(
                "The interval of the accuracy is Wilson's; the others hold 95% of bootstrap "
                "samples."
            )
        same = [
            name
            for name, one in self.scores.items()
            if one.interval is None and one.interval_method
        ]
        if same:
            verb = "has" if len(same) == 1 else "have"
            sentences.append(
                f"{', '.join(same)} {verb} no interval: all bootstrap samples have the same score."
            )
        return " ".join(sentences)

    def _class_tables(self) -> list[str]:
        """Return tables of precision and recall, and of the confusion matrix of few classes."""
        names = [clean(label) for label in self.classes]
        matrix = np.array(self.confusion)
        shares = []
        for name, right, rows, guesses in zip(
            names, matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        ):
            precision, recall = (
                f"{right / whole:.4f}" if whole else "-" for whole in (guesses, rows)
            )
            shares.append([name, str(rows), precision, recall])
        tables = [table(["class", "rows", "precision", "recall"], shares, left=["class"])]
        if len(names) <= 12:  # as many as fit on a terminal
            corner = "true \\ predicted"
            lines = zip(names, self.confusion)
            tables.append(
                table(
                    [corner, *names],
                    [[name, *map(str, line)] for name, line in lines],
                    left=[corner],
                )
            )
        return tables


def _score_json(one: HeldOut) -> Json:
    """Return a score and its interval as plain values."""
    return {"score": one.score, "interval": one.interval, "interval_method": one.interval_method}


def evaluation(
    model: TunedModel, test: Source, scoring: Sequence[str] | None, positive: object
) -> Evaluation:
    """Return the scores of a model on rows with their targets.

    Args:
        model: the saved model.
        test: the rows.
        scoring: names of the scorers. None: the usual ones.
        positive: the positive class, or None.

    Raises:
        InputError: a score does not exist, or does not fit the model.
    """
    loss = saved_loss(model)
    task = model.task
    if task == "custom":
        raise InputError(
            "no score that has a name is of a custom target; gputune predict writes what the "
            "model returns."
        )
    if loss is None and "neg_loss" in (scoring or ()):
        kind = model.spec["kind"]
        its_loss = model.info.get("loss", "another")
        was = f"was trained on {its_loss}" if kind == "module" else f"is a built-in {kind}"
        what = (
            f"scoring='neg_loss' is of a module and of a loss that has a name, {', '.join(LOSSES)}"
        )
        raise InputError(
            f"{what}, and this model {was}; choose another, for example {_SCORES[task][-1]}."
        )
    # All scores share one prediction of the rows.
    outputs = model._outputs(test.X)
    classes, y = labels_of(model, test)
    if model.classes is not None:
        refuse_unknown(classes, y, len(model.classes), f"column {test.target!r}")
    own = str(model.info.get("scoring") or "")
    known = get_scorer_names()
    scores = {}
    first = (
        [own] if own in known or own == PINBALL or (own == "neg_loss" and loss is not None) else []
    )
    of_positive = ("f1", "precision", "recall") if positive is not None else ()
    for name in scoring or dict.fromkeys((*first, *_SCORES[task], *of_positive)):
        one = (
            positive
            if task == "binary" and name in known and has_positive_class(get_scorer(name))
            else None
        )
        # Raises InputError for an unknown name.
        make_scoring(name, task, model.classes, one, loss, n_labels=y.shape[-1])
        scores[name] = held_out_score(model, name, test, positive=one, outputs=outputs)
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
"""Shares of the rows.

Below the first one, equal rows are taken for chance. Above the second one, all rows are meant.
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
    rows = f"about {share:.0%} of these rows, or on equal ones"
    return [f"The model was trained on {rows}, so the scores are better than those of new rows."]


def _trained_share(model: TunedModel, test: Source, y: np.ndarray) -> float | None:
    """Return the approximate share of the rows that the model was trained on, or None.

    ``y`` (n, ...) holds the codes or numbers of the targets.
    """
    sample = model.info.get("trained_rows")
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
                f"the model's sample of its training rows is damaged: {reason}. Save it again."
            ) from error


def _load_model(arguments: Namespace) -> TunedModel:
    """Return the model of the command, with the class from ``--model`` if it was given."""
    module = None
    if arguments.model is not None:
        path, colon, name = arguments.model.rpartition(":")
        if not colon:
            raise InputError(
                f"--model must be FILE.py:NAME, where the class is now, got {arguments.model!r}."
            )
        module = class_from_file(path, name)
    return load_model(arguments.folder, module, trust_code=arguments.trust_code)


def predict(arguments: Namespace) -> str:
    """Return the predictions as CSV, or write them to ``--out``.

    The columns that ``--keep`` names come first. If a kept column has the name of a predicted
    column, "_given" is added to its name.
    """
    model = _load_model(arguments)
    file = arguments.file
    if arguments.keep and Path(file).suffix.lower() in ARRAY_SUFFIXES:
        raise InputError(
            f"--keep names columns of a table, and {file!r} holds arrays; leave it out."
        )
    kept = read_columns(file, arguments.keep) if arguments.keep else []
    if kept:  # declared as dropped, so that the model does not warn of unused columns
        model = replace(
            model, info={**model.info, "drop": [*model.info.get("drop", ()), *arguments.keep]}
        )
    header, rows = _predictions(model, arguments)
    if kept:
        names = [*arguments.keep]
        for place, name in enumerate(arguments.keep):
            # Repeat until the name is unique.
            while names[place] in map(str, header) or (
                names[place] != name and names[place] in arguments.keep
            ):
                names[place] += "_given"
        header = [*names, *header]
        rows = [[*before, *row] for before, row in zip(zip(*kept), rows, strict=True)]
    lines = [header, *rows]
    formulas = {str(cell) for line in lines for cell in line if is_formula(cell)}
    if formulas and not arguments.raw:
        warn(
            f"a spreadsheet takes {min(formulas)!r} for a formula, so that there is a ' before "
            "it; --raw leaves it out."
        )
        lines = [[f"'{cell}" if cell in formulas else cell for cell in line] for line in lines]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    if arguments.out is None:
        return text.getvalue().rstrip("\n")
    check_place(
        f"--out {arguments.out!r}", Path(arguments.out), Path(file), "the file that is read"
    )
    write_text(Path(arguments.out), text.getvalue())
    return ""


def _predictions(
    model: TunedModel, arguments: Namespace
) -> tuple[list[object], list[list[object]]]:
    """Return the header and the rows of the predictions."""
    file = arguments.file
    target = model.target
    if arguments.proba and arguments.interval is not None:
        raise InputError("--interval and --proba exclude each other: leave one out.")
    if arguments.proba and model.classes is None and model.task != "multilabel":
        what = f"{arguments.folder!r} is a regression"
        raise InputError(f"--proba needs a model of classes, and {what}; leave --proba out.")
    if arguments.interval is not None:
        half = model._half_width(arguments.interval)
        outputs = model._outputs(file)
        columns = [part.tolist() for part in (model._predict(outputs), *model._ends(outputs, half))]
        return [target, f"{target}_lower", f"{target}_upper"], [list(row) for row in zip(*columns)]
    values = (model.predict_proba(file) if arguments.proba else model.predict(file)).tolist()
    rows = [value if isinstance(value, list) else [value] for value in values]
    if arguments.proba and model.classes is not None:
        return model.classes.tolist(), rows
    several = len(rows[0]) > 1 or arguments.proba
    return [f"{target}_{column}" for column in range(len(rows[0]))] if several else [target], rows


def evaluate(arguments: Namespace) -> str:
    """Return the scores of a model on the rows of a file with known targets, as text or JSON."""
    model = _load_model(arguments)
    positive = arguments.positive
    if positive is not None and model.classes is None:
        what = f"{arguments.folder!r} predicts numbers"
        raise InputError(f"--positive needs a model of classes, and {what}; leave it out.")
    positive = model.info.get("positive") if positive is None else positive
    rows = rows_with_target(model, arguments.file, arguments.target, arguments.missing_target)
    found = evaluation(model, rows, arguments.scoring, positive)
    if rows.n_dropped:
        found = replace(found, dropped=dropped_words(rows.n_dropped, rows.target))
    if arguments.format == "json":
        return json.dumps(found.to_json(), indent=1, allow_nan=False)
    return found.text(shutil.get_terminal_size().columns)


def export(arguments: Namespace) -> str:
    """Write the exported model, and return one line about its inputs and outputs."""
    model = _load_model(arguments)
    model.export(arguments.out)
    known = description(model)
    takes = model.layout.in_words()
    if known["inputs"] != "arrays":
        noun = "column" if known["inputs"] == "columns" else "encoded feature"
        takes = f"X, float64, a row of {count(len(known['names']), noun)} for each prediction"
    return (
        f"{arguments.out}: takes {takes}; gives {' and '.join(known['outputs'])}; its metadata "
        "names them"
    )
