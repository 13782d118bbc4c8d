"""The commands that search nothing: ``gputune report``, the page of a study, and ``gputune check`` of a device."""

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from gputune.check.check import check as check_device
from gputune.check.check import checks_of, timed_of
from gputune.cli.arguments import model_folder, study_file
from gputune.cli.study import open_study
from gputune.engine.backend import choose_device
from gputune.errors import CheckFailedError
from gputune.report.facts import is_its_model
from gputune.report.page import check_place, write_page
from gputune.study.model_files import DESCRIPTION, file_errors, read_description
from gputune.study.record import has_form
from gputune.study.rows import FoldReport
from gputune.study.study import Study
from gputune.text import count
from gputune.tuning.refit import Access
from gputune.tuning.validation import check_fold_report, fold_report
from gputune.types import Json

_LIVE_SECONDS = 5
"""Between two pages of a running search."""


def report(arguments: Namespace) -> str:
    """Write the page to ``--out``, which may be overwritten, and return where it is."""
    file, out = study_file(arguments.study), arguments.out
    check_place(f"--out {out!r}", Path(out), file)
    study = open_study(arguments)
    parts = {"confusion": bool(arguments.confusion), "importance": bool(arguments.importance)}
    if arguments.live and any(parts.values()):  # before a page is written
        check_fold_report(study, confusion=parts["confusion"])

    def folds() -> FoldReport | None:
        access = Access(study, trust_code=bool(arguments.trust_code), called="report")
        return fold_report(access, **parts) if any(parts.values()) else None

    def write(**more: Any) -> None:
        write_page(study, out, model=_model(study, model_folder(file)), **more)

    if not arguments.live:
        write(folds=folds())
        return f"Report   {out}"
    try:
        while any(trial.state in ("waiting", "stopped") for trial in study.trials):
            write(reload_seconds=_LIVE_SECONDS)
            time.sleep(_LIVE_SECONDS)
            study = open_study(arguments)
    finally:  # the last one stays as it is
        write()
    if any(parts.values()):
        write(folds=folds())
    return f"Report   {out}"


def _model(study: Study, folder: Path) -> Json | None:
    """Return the info of the model beside a study where it is that of its best trial, or None."""
    if not (folder / DESCRIPTION).is_file():
        return None
    with file_errors(folder / DESCRIPTION):
        info: Json = read_description(folder / DESCRIPTION)["info"]
        if not has_form(info, {"held_out_score?": (float, None), "held_out_rows?": int}):
            raise ValueError("its info is of another type")
    return info if is_its_model(study, info) else None


def check(arguments: Namespace) -> str:
    """Return the table, or JSON. Raises CheckFailedError, with the same, where a law does not hold."""
    device = choose_device(arguments.device)
    total = len(timed_of(device)) + len(checks_of(device))
    with tqdm(total=total, unit="check", disable=None, leave=False, dynamic_ncols=True) as bar:

        def tell(words: str) -> None:
            bar.set_postfix_str(words)
            bar.update()

        report = check_device(device, tell)
    text = report.json() if arguments.json else str(report)
    if not report.ok:
        failed = sum(not row.ok for row in report.rows)
        raise CheckFailedError(
            f"{count(failed, 'law')} of {len(report.rows)} failed on {report.device}: what trains that way there is "
            "not to be trusted. Please report the table, with the versions in its first line.",
            report=text,
        )
    return text
