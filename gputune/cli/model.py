"""The commands on a saved model: ``gputune predict``, ``evaluate``, ``export``; its scores on rows with a target."""

import csv
import io
import json
import math
import shutil
import warnings
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import get_scorer, get_scorer_names
from torch import Tensor
from torch.nn import functional

from gputune.data.columns import Layout
from gputune.data.files import line_of, read_columns, read_table
from gputune.data.source import Source, read_source
from gputune.data.target import check_target, refuse_missing
from gputune.errors import InputError, warn
from gputune.report.facts import check_place
from gputune.scoring.estimators import fitted
from gputune.scoring.losses import LOSS_OF_TASK, LOSSES
from gputune.scoring.metrics import has_positive_class, make_scoring
from gputune.scoring.objective import Objective
from gputune.scoring.scoring import Scoring
from gputune.scratch import write_text
from gputune.study.export import description
from gputune.study.labels import class_codes, refuse_unknown
from gputune.study.model import TunedModel, load_model
from gputune.study.module_source import class_from_file
from gputune.text import Measure, clean, count, is_formula, measure_of, paragraph, table
from gputune.types import Json, Task

_SAMPLES, _SAMPLE_ROWS = 400, 20_000  # bootstrap samples, and rows of one at most: what takes a second or two
_SCORES: dict[Task, tuple[str, ...]] = {  # beside the one of the search
    "binary": ("accuracy", "balanced_accuracy", "roc_auc", "neg_log_loss"),
    "multiclass": ("accuracy", "balanced_accuracy", "roc_auc_ovr", "neg_log_loss"),
    "regression": ("r2", "neg_mean_absolute_error", "neg_root_mean_squared_error"),
    "multilabel": ("accuracy",),
}


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


def _saved_loss(model: TunedModel) -> Objective | None:
    """Return the loss of a module where it has a name, with its numbers; None for one of the user's own, in no file."""
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

    ``positive`` is the class that it is of, None for none; ``outputs`` are the model's of the rows, where known.
    """
    rows, loss = len(test.X), _saved_loss(model) if scoring == "neg_loss" else None
    if scoring == "neg_loss" and loss is None:
        return HeldOut(math.nan, rows, why="a saved model holds no loss but one that has a name")
    classes, y = _labels_of(model, test)
    unseen, shown = 0 if model.classes is None else int((y >= len(model.classes)).sum()), None
    try:
        how = make_scoring(scoring, model.task, model.classes, positive, loss, n_labels=y.shape[-1])
        shown = classes[how.positive] if classes and how.positive is not None else None
        outputs = model._outputs(test.X) if outputs is None else outputs
        outputs, target = _outputs_to_score(model, loss, outputs, torch.from_numpy(y))
        if unseen:
            how, outputs, target = _with_unseen(how, outputs, target, len(classes))
        with warnings.catch_warnings(action="ignore"):  # of classes that no row is predicted as
            score = _score(how, outputs, target)
        if not math.isfinite(score):
            raise ValueError("it is undefined on these rows")
    except ValueError as error:  # what scikit-learn raises where a metric is undefined
        return HeldOut(math.nan, rows, unseen, str(error).rstrip("."), positive=shown)
    return HeldOut(score, rows, unseen, interval=_interval(how, outputs, target, score), positive=shown)


def _labels_of(model: TunedModel, test: Source) -> tuple[list[object], np.ndarray]:
    """Return the classes, those of the held-out rows alone last, and the rows' codes; or [] and numbers."""
    return ([], np.asarray(test.y, dtype=float)) if model.classes is None else class_codes(model.classes, test.y)


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
    low, high = score + math.sqrt(size / rows) * (np.quantile(finite, (0.025, 0.975)) - score)
    return float(low), float(high)


@dataclass(frozen=True)
class Evaluation:
    """The scores of a model by name; of classes a confusion matrix."""

    rows: int
    scores: dict[str, HeldOut]
    classes: list[object]  # [] of numbers
    confusion: list[list[int]]  # lines are true classes, columns predicted ones

    def to_json(self) -> Json:
        """Return plain values; scores in scikit-learn's sign, null where they are undefined."""
        scores = {}
        for name, one in self.scores.items():
            score = {"score": None, "why": one.why} if one.why else {"score": one.score, "interval": one.interval}
            scores[name] = {**score, "positive": one.positive}
        matrix = {"classes": self.classes, "confusion": self.confusion} if self.classes else {}
        return {"rows": self.rows, "scores": scores} | matrix

    def text(self, width: int) -> str:
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
            remark = f"{count(unseen, 'row')} of a class that the model does not know {verb} as wrong, in scores of a"
            remarks.append(
                f"{remark} class as not of it; balanced accuracy and scores of probabilities leave such rows out."
            )
        scores = table(["score", "", "95 % of bootstrap samples"], rows, left=["score"])
        parts = [count(self.rows, "row"), scores, *(paragraph(one, width) for one in remarks)]
        return "\n\n".join([*parts, *(self._class_tables() if self.classes else [])])

    def _class_tables(self) -> list[str]:
        """Return precision and recall of each class, and the matrix where they are few."""
        names, matrix, shares = [clean(label) for label in self.classes], np.array(self.confusion), []
        for name, right, rows, guesses in zip(names, matrix.diagonal(), matrix.sum(1), matrix.sum(0)):
            precision, recall = (f"{right / whole:.4f}" if whole else "-" for whole in (guesses, rows))
            shares.append([name, str(rows), precision, recall])
        tables = [table(["class", "rows", "precision", "recall"], shares, left=["class"])]
        if len(names) <= 12:  # as many as a terminal has room for
            corner, lines = "true \\ predicted", zip(names, self.confusion)
            tables.append(table([corner, *names], [[name, *map(str, line)] for name, line in lines], left=[corner]))
        return tables


def evaluation(model: TunedModel, test: Source, scoring: Sequence[str] | None, positive: object) -> Evaluation:
    """Return the scores of a model on rows with their target: those asked for, or the usual ones. Raises InputError."""
    loss, task = _saved_loss(model), model.task
    if task == "custom":
        raise InputError(
            "no score that has a name is of a custom target; gputune predict writes what the model returns."
        )
    if loss is None and "neg_loss" in (scoring or ()):
        kind, its_loss = model.spec["kind"], model.info.get("loss", "another")
        was = f"was trained on {its_loss}" if kind == "module" else f"is a built-in {kind}"
        what = f"scoring='neg_loss' is of a module and of a loss that has a name, {', '.join(LOSSES)}"
        raise InputError(f"{what}, and this model {was}; choose another, for example {_SCORES[task][-1]}.")
    outputs = model._outputs(test.X)
    classes, y = _labels_of(model, test)
    if model.classes is not None:
        refuse_unknown(classes, y, len(model.classes), f"column {test.target!r}")
    own, known, scores = str(model.info.get("scoring") or ""), get_scorer_names(), {}
    first = [own] if own in known or (own == "neg_loss" and loss is not None) else []
    of_positive = ("f1", "precision", "recall") if positive is not None else ()
    for name in scoring or dict.fromkeys((*first, *_SCORES[task], *of_positive)):
        one = positive if task == "binary" and name in known and has_positive_class(get_scorer(name)) else None
        make_scoring(name, task, model.classes, one, loss, n_labels=y.shape[-1])  # raises for a name that is none
        scores[name] = held_out_score(model, name, test, positive=one, outputs=outputs)
    if not classes or task == "multilabel":
        return Evaluation(len(test.X), scores, [], [])
    code, K = {label: code for code, label in enumerate(classes)}, len(classes)
    predicted = [code[label] for label in model._predict(outputs).tolist()]
    matrix = np.bincount(y * K + predicted, minlength=K * K).reshape(K, K).tolist()
    return Evaluation(len(test.X), scores, classes, matrix)


def _load_model(arguments: Namespace) -> TunedModel:
    module = None
    if arguments.model is not None:
        path, colon, name = arguments.model.rpartition(":")
        if not colon:
            raise InputError(f"--model must be FILE.py:NAME, where the class is now, got {arguments.model!r}.")
        module = class_from_file(path, name)
    return load_model(arguments.folder, module, trust_code=arguments.trust_code)


def predict(arguments: Namespace) -> str:
    """Return the predictions as CSV, or write them to ``--out``, behind the columns that ``--keep`` names.

    A kept column that is named as a predicted one has "_given" behind its name.
    """
    model, file = _load_model(arguments), arguments.file
    kept = read_columns(file, arguments.keep) if arguments.keep else []
    if kept:  # the model does not read them, which is no news
        model = replace(model, info={**model.info, "drop": [*model.info.get("drop", ()), *arguments.keep]})
    header, rows = _predictions(model, arguments)
    if kept:
        names = [*arguments.keep]
        for place, name in enumerate(arguments.keep):
            while names[place] in map(str, header) or (names[place] != name and names[place] in arguments.keep):
                names[place] += "_given"
        header = [*names, *header]
        rows = [[*before, *row] for before, row in zip(zip(*kept), rows, strict=True)]
    lines = [header, *rows]
    formulas = {str(cell) for line in lines for cell in line if is_formula(cell)}
    if formulas and not arguments.raw:
        warn(
            f"a spreadsheet takes {min(formulas)!r} for a formula, so that there is a ' before it; --raw leaves it out."
        )
        lines = [[f"'{cell}" if cell in formulas else cell for cell in line] for line in lines]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    if arguments.out is None:
        return text.getvalue().rstrip("\n")
    check_place(f"--out {arguments.out!r}", Path(arguments.out), Path(file), "the file that is read")
    write_text(Path(arguments.out), text.getvalue())
    return ""


def _predictions(model: TunedModel, arguments: Namespace) -> tuple[list[object], list[list[object]]]:
    file, target = arguments.file, model.target
    if arguments.proba and arguments.interval is not None:
        raise InputError("--interval and --proba exclude each other: leave one out.")
    if arguments.proba and model.classes is None and model.task != "multilabel":
        what = f"{arguments.folder!r} is a regression"
        raise InputError(f"--proba needs a model of classes, and {what}; leave --proba out.")
    if arguments.interval is not None:
        half, outputs = model._half_width(arguments.interval), model._outputs(file)
        columns = [part.tolist() for part in (model._predict(outputs), *model._ends(outputs, half))]
        return [target, f"{target}_lower", f"{target}_upper"], [list(row) for row in zip(*columns)]
    values = (model.predict_proba(file) if arguments.proba else model.predict(file)).tolist()
    rows = [value if isinstance(value, list) else [value] for value in values]
    if arguments.proba and model.classes is not None:
        return model.classes.tolist(), rows
    several = len(rows[0]) > 1 or arguments.proba
    return [f"{target}_{column}" for column in range(len(rows[0]))] if several else [target], rows


def evaluate(arguments: Namespace) -> str:
    """Return the scores of a model on the rows of a file that has the right answers, as text or JSON."""
    model, positive = _load_model(arguments), arguments.positive
    if positive is not None and model.classes is None:
        what = f"{arguments.folder!r} predicts numbers"
        raise InputError(f"--positive needs a model of classes, and {what}; leave it out.")
    positive = model.info.get("positive") if positive is None else positive
    found = evaluation(model, _rows_with_target(model, arguments.file), arguments.scoring, positive)
    if arguments.format == "json":
        return json.dumps(found.to_json(), indent=1, allow_nan=False)
    return found.text(shutil.get_terminal_size().columns)


def _rows_with_target(model: TunedModel, file: str) -> Source:
    """Return the rows of a file with their target. Raises InputError for a target that cannot be scored."""
    if isinstance(model.layout, Layout):
        texts = [column.name for column in model.layout.columns if column.kind == "category"]
        # "007" and "7" are two labels, and one number.
        labels = [model.target] if model.classes is not None and model.classes.dtype.kind == "U" else []
        rows = read_table(file, [*texts, *labels])
        if model.target not in rows.names:
            what = f"{file!r} has no column {model.target!r}"
            raise InputError(f"{what}, with which the model is to be compared; gputune predict needs none.")
        source = read_source(rows, model.target)
    else:
        source = read_source(file, model.target, module=True)
    refuse_missing(np.asarray(source.y), model.target, "fill it, or leave those rows out", partial(line_of, file))
    if model.classes is None:
        check_target(source.y, task=model.task, n_rows=len(source.X), name=model.target)
    return source


def export(arguments: Namespace) -> str:
    """Write the file and return one line on what it takes and gives."""
    model = _load_model(arguments)
    model.export(arguments.out)
    known, takes = description(model), model.layout.in_words()
    if known["inputs"] != "arrays":
        noun = "column" if known["inputs"] == "columns" else "encoded feature"
        takes = f"X, float64, a row of {count(len(known['names']), noun)} for each prediction"
    return f"{arguments.out}: takes {takes}; gives {' and '.join(known['outputs'])}; its metadata names them"
