"""The command ``gputune search``, which tunes the training loop in a Python file."""

import argparse
import math
import shlex
import shutil
import time
from pathlib import Path
from typing import cast

from gputune.api.study import Study
from gputune.cli.arguments import STUDY
from gputune.cli.flags import CommandLine
from gputune.cli.json_output import search_json
from gputune.cli.options import loop_options_of
from gputune.cli.study import SCORE, trial_rows
from gputune.cli.summary import Ending, label_lines
from gputune.executors.worker import LoopObjective
from gputune.ground.errors import InputError, SearchInterrupted
from gputune.ground.text import count, paragraph
from gputune.report.facts import seconds_text, states_text
from gputune.spaces.edges import edge_remarks
from gputune.study.code import function_from_file
from gputune.tuning.interrupt import SIGNALS
from gputune.tuning.loops import search_loop
from gputune.tuning.progress import Profile
from gputune.views.scores import score_view

_BEST = 5  # number of trials in the table


def search(arguments: argparse.Namespace) -> str:
    """Run ``gputune search``, and return the text to print at the end.

    Raises SearchInterrupted with the results so far, and the errors of ``gputune.search``.
    """
    begin = time.perf_counter()
    out = Path(arguments.study or "gputune-search")
    if arguments.study == "" or (out.exists() and not out.is_dir()):
        remedy = "Pass a folder, or omit --out for gputune-search."
        raise InputError("--out", "must be a folder", got=arguments.study, remedy=remedy)
    file, colon, name = arguments.objective.rpartition(":")
    if not colon or not file or not name:
        remedy = "For example train.py:objective."
        raise InputError("objective", "must be FILE.py:NAME", arguments.objective, remedy)
    options = loop_options_of(arguments, out / STUDY)
    objective = cast(LoopObjective, function_from_file(file, name, "objective"))
    profile = Profile()
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)

    def text(study: Study, exit_code: int = 0) -> str:
        ending = Ending(
            arguments.objective,
            study,
            None,
            out / STUDY,
            seconds=time.perf_counter() - begin,
            ended=CommandLine("search").render(profile.ended),
            typed=arguments.typed,
        )
        if arguments.json:
            return search_json(ending, timeout=options.search.timeout, exit_code=exit_code)
        return _summary(ending, direction=arguments.direction)

    try:
        study = search_loop(
            objective,
            options,
            direction=arguments.direction,
            max_epochs=arguments.max_epochs,
            signals=SIGNALS,
            interface=CommandLine("search"),
            profile=profile,
            study_type=Study,
        )
    except SearchInterrupted as stop:
        stop.report = text(stop.study, 128 + stop.signal)
        raise
    finally:
        if is_new and not any(out.iterdir()):
            out.rmdir()
    return text(study)


def _summary(ending: Ending, *, direction: str) -> str:
    """Return the text at the end of a search: the best trials, remarks and paths."""
    study = ending.study
    width = shutil.get_terminal_size().columns
    ranking = [trial for trial in study.ranking() if math.isfinite(trial.score)]
    head = f"{direction} {ending.file}; {count(len(study.trials), 'trial')}"
    parts = [label_lines([("Search", head)], width)]
    if ranking:
        best = ranking[:_BEST]
        measure = score_view(study).measure
        title = f"The best {count(len(best), 'trial')} by {measure.title}:"
        parts.append(paragraph(title, width))
        parts.append(trial_rows(study, best, [["trial", SCORE]], width=width, indent="  "))
    remarks = [("Note", remark) for remark in edge_remarks(study)]
    if remarks:
        parts.append(label_lines(remarks, width))
    facts = [("Ended", ending.ended)] if ending.ended else []
    states = states_text(study)
    facts.append(("Trials", f"{states}; this command took {seconds_text(ending.seconds)}"))
    facts.append(("Study", str(ending.study_file)))
    if any(trial.state in ("waiting", "stopped") for trial in study.trials):
        facts.append(("Resume", shlex.join(["gputune", *ending.typed])))
    else:
        facts.append(("Next", f"gputune report {shlex.quote(str(ending.study_file.parent))}"))
    parts.append("\n".join(f"{name:9}{text}" for name, text in facts))
    return "\n\n".join(parts)
