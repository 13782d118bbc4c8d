"""The commands on a saved model: ``gputune predict`` the rows of a file, ``evaluate`` on them, ``export`` it."""

import csv
import io
import json
import shutil
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from gputune.cli.evaluation import evaluation
from gputune.data.encode import Layout
from gputune.data.files import line_of, read_columns, read_table
from gputune.data.source import Source, read_source
from gputune.data.target import check_target, refuse_missing
from gputune.errors import InputError, warn
from gputune.scratch import no_folder, write_text
from gputune.study.export import description
from gputune.study.model import TunedModel, load_model
from gputune.study.module_source import class_from_file
from gputune.text import count, is_formula


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
        predicted = [*map(str, header)]
        for name in reversed(arguments.keep):
            given = name
            while given in predicted or (given != name and given in arguments.keep):
                given += "_given"
            header.insert(0, given)
        rows = [[*before, *row] for before, row in zip(zip(*kept), rows, strict=True)]
    table = [header, *rows]
    formulas = {cell for row in table for cell in row if is_formula(cell)}
    if formulas and not arguments.raw:
        first = min(map(str, formulas))
        warn(f"a spreadsheet takes {first!r} for a formula, so that there is a ' before it; --raw leaves it out.")
        table = [[f"'{cell}" if cell in formulas else cell for cell in row] for row in table]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    if arguments.out is None:
        return text.getvalue().rstrip("\n")
    _write(text.getvalue(), arguments.out, source=file)
    return ""


def _load_model(arguments: Namespace) -> TunedModel:
    """Return the saved model, its class from ``--model`` where that is given."""
    module = None
    if arguments.model is not None:
        path, colon, name = arguments.model.rpartition(":")
        if not colon:
            raise InputError(f"--model must be FILE.py:NAME, where the class is now, got {arguments.model!r}.")
        module = class_from_file(path, name)
    return load_model(arguments.folder, module, trust_code=arguments.trust_code)


def _predictions(model: TunedModel, arguments: Namespace) -> tuple[list[object], list[list[object]]]:
    """Return the names of the columns that are predicted, and their rows."""
    file, target = arguments.file, model.target
    if arguments.proba and arguments.interval is not None:
        raise InputError("--interval and --proba exclude each other: leave one out.")
    if arguments.proba and model.classes is None and model.task != "multilabel":
        raise InputError(
            f"--proba needs a model of classes, and {arguments.folder!r} is a regression; leave --proba out."
        )
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
    model = _load_model(arguments)
    positive = model.info.get("positive") if arguments.positive is None else arguments.positive
    if arguments.positive is not None and model.classes is None:
        raise InputError(
            f"--positive needs a model of classes, and {arguments.folder!r} predicts numbers; leave it out."
        )
    test = _rows_with_target(model, arguments.file)
    found = evaluation(model, test, arguments.scoring, positive)
    if arguments.format == "json":
        return json.dumps(found.to_json(), indent=1, allow_nan=False)
    return found.text(shutil.get_terminal_size().columns)


def _rows_with_target(model: TunedModel, file: str) -> Source:
    """Return the rows of a file with their target. Raises InputError for a target that cannot be scored."""
    if isinstance(model.layout, Layout):
        texts = [column.name for column in model.layout.columns if column.kind == "category"]
        # "007" and "7" are two labels, and one number.
        labels = [model.target] if model.classes is not None and model.classes.dtype.kind == "U" else []
        table = read_table(file, [*texts, *labels])
        if model.target not in table.names:
            raise InputError(
                f"{file!r} has no column {model.target!r}, with which the model is to be compared; gputune predict "
                "needs none."
            )
        source = read_source(table, model.target)
    else:
        source = read_source(file, model.target, module=True)
    refuse_missing(np.asarray(source.y), model.target, "fill it, or leave those rows out", partial(line_of, file))
    if model.classes is None:
        check_target(source.y, task=model.task, n_rows=len(source.X), name=model.target)
    return source


def _write(text: str, out: str, *, source: str) -> None:
    """Write text to the file ``out``, which may be overwritten, but not where it is what was read."""
    path = Path(out)
    if path.is_dir():
        raise InputError(f"--out {out!r} is a folder; give the name of a file.")
    if path.exists() and Path(source).exists() and path.samefile(source):
        raise InputError(f"--out {out!r} is the file that is read; give another name.")
    if not path.resolve().parent.is_dir():
        raise no_folder(f"--out {out!r}", path)
    write_text(path, text)


def export(arguments: Namespace) -> str:
    """Write the file and return one line on what it takes and gives."""
    model = _load_model(arguments)
    model.export(arguments.out)
    known = description(model)
    takes = model.layout.in_words()
    if known["inputs"] != "arrays":
        noun = "column" if known["inputs"] == "columns" else "encoded feature"
        takes = f"X, float64, a row of {count(len(known['names']), noun)} for each prediction"
    return f"{arguments.out}: takes {takes}; gives {' and '.join(known['outputs'])}; its metadata names them"
