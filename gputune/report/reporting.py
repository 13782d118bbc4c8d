"""``gputune report``: the page of a study, with the held-out score of the model that lies beside it."""

from pathlib import Path
from typing import Any

from gputune.errors import InputError
from gputune.report.facts import best_trial
from gputune.report.page import write_page
from gputune.report.places import MODEL, study_file
from gputune.study.folder import DESCRIPTION, read_description
from gputune.study.study import Study


def report(place: str, out: str) -> str:
    """Write the page to ``out``, which may be overwritten, and return where it is."""
    file = study_file(place)
    if Path(out).is_dir():
        raise InputError(f"--out {out!r} is a folder; give the name of a file.")
    if file.exists() and Path(out).exists() and file.samefile(out):
        raise InputError(f"--out {out!r} is the study that is read; give another name.")
    if not Path(out).resolve().parent.is_dir():
        raise InputError(f"--out {out!r}: the folder does not exist; make it first.")
    study = Study.open(file)
    write_page(study, out, model=_model(study, file.parent / MODEL))
    return f"Report   {out}"


def _model(study: Study, folder: Path) -> dict[str, Any] | None:
    """Return the info of the model beside a study where it is that of its best trial, or None."""
    best = best_trial(study)
    if best is None or not (folder / DESCRIPTION).is_file():
        return None
    info: dict[str, Any] = read_description(folder / DESCRIPTION)["info"]
    return info if (info.get("params"), info.get("score")) == (best.params, best.score) else None
