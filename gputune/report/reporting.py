"""``gputune report``: the page of a study, with the held-out score of the model that lies beside it."""

from pathlib import Path
from typing import Any

from gputune.report.facts import is_its_model
from gputune.report.page import check_place, write_page
from gputune.report.places import model_folder, study_file
from gputune.study.folder import DESCRIPTION, blaming, read_description
from gputune.study.forms import has_form
from gputune.study.study import Study


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
