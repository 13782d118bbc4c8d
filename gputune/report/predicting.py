"""``gputune predict``: the predictions of a saved model for the rows of a file, as CSV."""

import csv
import io
import warnings
from pathlib import Path
from typing import Any

from gputune.errors import InputError
from gputune.report.text import is_formula
from gputune.study.folder import write_text
from gputune.study.model_files import load_model


def predictions_csv(
    folder: str, file: str, *, proba: bool, raw: bool = False, trust_code: bool = False
) -> str:
    """Return one column named as the target, or with ``proba`` one for each class, named as the class.

    Unless ``raw``, text that a spreadsheet takes for a formula has a ' before it, with one warning.
    """
    model = load_model(folder, trust_code=trust_code)
    if proba and model.classes is None:
        raise InputError(
            f"--proba needs a model of classes, and {folder!r} is a regression; leave --proba out."
        )
    header: list[Any] = [model.target]
    if proba and model.classes is not None:
        header, rows = model.classes.tolist(), model.predict_proba(file).tolist()
    else:
        rows = [[value] for value in model.predict(file).tolist()]
    formulas = {cell for row in [header, *rows] for cell in row if is_formula(cell)}
    if formulas and not raw:
        warnings.warn(
            f"a spreadsheet takes {min(formulas)!r} for a formula, so that there is a ' before it; --raw leaves it "
            "out.",
            stacklevel=2,
        )
        rows = [[f"'{cell}" if cell in formulas else cell for cell in row] for row in rows]
        header = [f"'{cell}" if cell in formulas else cell for cell in header]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().rstrip("\n")


def write_new(text: str, out: str, *, source: str) -> None:
    """Write text to the file ``out``, which may be overwritten, but not where it is what was read."""
    path = Path(out)
    if path.is_dir():
        raise InputError(f"--out {out!r} is a folder; give the name of a file.")
    if path.exists() and Path(source).exists() and path.samefile(source):
        raise InputError(f"--out {out!r} is the file that is read; give another name.")
    write_text(path, text + "\n")
