"""``gputune predict``: the predictions of a saved model for the rows of a file, as CSV.

``gputune export``: a saved model as one file that runs without gputune.

``gputune report``: the page of a study, with the held-out score of the model that lies beside it.
"""

import csv
import io
import warnings
from pathlib import Path
from typing import Any

from gputune.cli.arguments import model_folder, study_file
from gputune.errors import InputError
from gputune.report.facts import is_its_model
from gputune.report.page import check_place, write_page
from gputune.scratch import write_text
from gputune.study.export import description
from gputune.study.model import load_model
from gputune.study.model_files import DESCRIPTION, blaming, read_description
from gputune.study.record import has_form
from gputune.study.study import Study
from gputune.text import count, is_formula


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


def export(folder: str, out: str, *, trust_code: bool = False) -> str:
    """Write the file and return one line on what it takes and gives."""
    model = load_model(folder, trust_code=trust_code)
    model.export(out)
    known = description(model)
    noun = "column" if known["inputs"] == "columns" else "encoded feature"
    return (
        f"{out}: takes X, float64, a row of {count(len(known['names']), noun)} for each prediction; gives "
        f"{' and '.join(known['outputs'])}; its metadata names them"
    )


def report(place: str, out: str) -> str:
    """Write the page to ``out``, which may be overwritten, and return where it is."""
    file = study_file(place)
    check_place(f"--out {out!r}", Path(out), file)
    study = Study.open(file)
    write_page(study, out, model=_model(study, model_folder(file)))
    return f"Report   {out}"


def _model(study: Study, folder: Path) -> dict[str, Any] | None:
    """Return the info of the model beside a study where it is that of its best trial, or None."""
    if not (folder / DESCRIPTION).is_file():
        return None
    with blaming(folder / DESCRIPTION):
        info: dict[str, Any] = read_description(folder / DESCRIPTION)["info"]
        if not has_form(info, {"held_out_score?": (float, None), "held_out_rows?": int}):
            raise ValueError("its info is of another type")
    return info if is_its_model(study, info) else None
