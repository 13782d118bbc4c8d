"""The commands on a saved model: ``gputune predict`` the rows of a file, ``export`` it to run without gputune."""

import csv
import io
import warnings
from argparse import Namespace
from pathlib import Path

from gputune.errors import InputError
from gputune.scratch import write_text
from gputune.study.export import description
from gputune.study.model import load_model
from gputune.text import count, is_formula


def predict(arguments: Namespace) -> str:
    """Return the predictions as CSV, or write them to ``--out``.

    They are one column named as the target, or with ``--proba`` one for each class, named as the class. Unless
    ``--raw``, text that a spreadsheet takes for a formula has a ' before it, with one warning.
    """
    model, file = load_model(arguments.model, trust_code=arguments.trust_code), arguments.file
    header: list[object] = [model.target]
    if not arguments.proba:
        rows = [value if isinstance(value, list) else [value] for value in model.predict(file).tolist()]
        if len(rows[0]) > 1:
            header = [f"{model.target}_{column}" for column in range(len(rows[0]))]
    elif model.task == "multilabel":
        rows = model.predict_proba(file).tolist()
        header = [f"{model.target}_{column}" for column in range(len(rows[0]))]
    elif model.classes is None:
        raise InputError(
            f"--proba needs a model of classes, and {arguments.model!r} is a regression; leave --proba out."
        )
    else:
        header, rows = model.classes.tolist(), model.predict_proba(file).tolist()
    formulas = {cell for row in [header, *rows] for cell in row if is_formula(cell)}
    if formulas and not arguments.raw:
        warnings.warn(
            f"a spreadsheet takes {min(formulas)!r} for a formula, so that there is a ' before it; --raw leaves it "
            "out.",
            stacklevel=2,
        )
        rows = [[f"'{cell}" if cell in formulas else cell for cell in row] for row in rows]
        header = [f"'{cell}" if cell in formulas else cell for cell in header]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    if arguments.out is None:
        return text.getvalue().rstrip("\n")
    _write(text.getvalue(), arguments.out, source=file)
    return ""


def _write(text: str, out: str, *, source: str) -> None:
    """Write text to the file ``out``, which may be overwritten, but not where it is what was read."""
    path = Path(out)
    if path.is_dir():
        raise InputError(f"--out {out!r} is a folder; give the name of a file.")
    if path.exists() and Path(source).exists() and path.samefile(source):
        raise InputError(f"--out {out!r} is the file that is read; give another name.")
    write_text(path, text)


def export(arguments: Namespace) -> str:
    """Write the file and return one line on what it takes and gives."""
    model = load_model(arguments.model, trust_code=arguments.trust_code)
    model.export(arguments.out)
    known = description(model)
    takes = model.layout.in_words()
    if known["inputs"] != "arrays":
        noun = "column" if known["inputs"] == "columns" else "encoded feature"
        takes = f"X, float64, a row of {count(len(known['names']), noun)} for each prediction"
    return f"{arguments.out}: takes {takes}; gives {' and '.join(known['outputs'])}; its metadata names them"
