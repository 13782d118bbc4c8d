"""The commands that search nothing: ``gputune report``, the page of a study, and ``gputune check`` of a device."""

import time
from argparse import Namespace
from pathlib import Path

from tqdm.auto import tqdm

from gputune.check.check import check as check_device
from gputune.check.check import checks_of, timed_of
from gputune.cli.arguments import model_folder, study_file
from gputune.cli.study import open_study
from gputune.engine.backend import choose_device
from gputune.errors import CheckFailedError
from gputune.report.facts import is_its_model
from gputune.study.curves import FoldReport
from gputune.study.record import has_form
from gputune.study.study import Study
from gputune.text import count
from gputune.types import Json

_LIVE_SECONDS = 5
"""Between two pages of a running search."""


def report(arguments: Namespace) -> str:
    """Write the page to ``--out``, which may be overwritten, and return where it is."""
    from gputune.report.page import check_place, write_page

    file, out = study_file(arguments.study), arguments.out
    check_place(f"--out {out!r}", Path(out), file)
    study = open_study(arguments)
    if arguments.live and (arguments.confusion or arguments.importance):  # before a page is written
        from gputune.tuning.validation import check_fold_report

        check_fold_report(study, confusion=bool(arguments.confusion))
    folds = None if arguments.live else _folds(study, arguments)
    try:
        while arguments.live and any(trial.state in ("waiting", "stopped") for trial in study.trials):
            write_page(study, out, model=_model(study, model_folder(file)), reload_seconds=_LIVE_SECONDS)
            time.sleep(_LIVE_SECONDS)
            study = open_study(arguments)
    finally:  # the last one stays as it is
        write_page(study, out, model=_model(study, model_folder(file)), folds=folds)
    if arguments.live and (folds := _folds(study, arguments)) is not None:
        write_page(study, out, model=_model(study, model_folder(file)), folds=folds)
    return f"Report   {out}"


def _folds(study: Study, arguments: Namespace) -> FoldReport | None:
    """Return what the best trial does on the rows that its folds validate on, where that is asked for."""
    if not (arguments.confusion or arguments.importance):
        return None
    from gputune.tuning.validation import fold_report

    what = {"confusion": bool(arguments.confusion), "importance": bool(arguments.importance)}
    return fold_report(study, **what, trust_code=bool(arguments.trust_code))


def _model(study: Study, folder: Path) -> Json | None:
    """Return the info of the model beside a study where it is that of its best trial, or None."""
    from gputune.study.model_files import DESCRIPTION, file_errors, read_description

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
