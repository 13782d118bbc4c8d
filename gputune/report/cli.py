"""The command line: runs one command and ends with 0 done, 1 failed, 2 bad input or usage, 130 Ctrl-C, 143 SIGTERM.

Everything heavy is imported inside the commands, so that ``gputune --help`` waits for nothing.
"""

import argparse
import os
import shlex
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gputune.errors import ClusterError, DivergedError, InputError, SearchFailedError, SearchInterrupted
from gputune.report.arguments import make_parser

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; what it has to say goes to standard output, the rest to standard error."""
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding lacks must not end a search in an error.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    typed = sys.argv[1:] if argv is None else list(argv)
    try:
        arguments = make_parser().parse_args(typed, argparse.Namespace(typed=typed))
    except SystemExit as ending:
        return int(ending.code or 0)
    with _warnings_in_words():
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    try:
        return _write(_COMMANDS[arguments.command](arguments))
    except SearchInterrupted as stop:
        _write(stop.report)
        _say(str(stop))
        return 128 + stop.signal  # as a shell reports a process that a signal has ended
    except KeyboardInterrupt as stop:
        _say(str(stop) or "interrupted.")
        return INTERRUPTED
    except (InputError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        _say(f"error: {_in_words(error)}")
        return BAD_INPUT
    except (SearchFailedError, ClusterError, DivergedError, OSError) as error:
        _say(f"error: {_in_words(error)}")
        return FAILED
    except Exception:  # a bug: whoever reports it needs the traceback
        traceback.print_exc()
        return FAILED


def _tune(arguments: argparse.Namespace) -> str:
    from gputune.report.tuning import tune

    return tune(arguments)


def _resume(arguments: argparse.Namespace) -> str:
    from gputune.report.tuning import resume

    return resume(arguments)


def _trials(arguments: argparse.Namespace) -> str:
    from gputune.report import trials

    study = _open(arguments.study)
    if arguments.format == "json":
        return trials.trials_json(study)
    if arguments.format == "csv":
        return trials.trials_csv(study)
    return trials.trials_table(study, width=shutil.get_terminal_size().columns)


def _best(arguments: argparse.Namespace) -> str:
    from gputune.report import trials

    study = _open(arguments.study)
    return trials.best_json(study) if arguments.format == "json" else trials.best_text(study)


def _predict(arguments: argparse.Namespace) -> str:
    from gputune.report.predicting import predictions_csv, write_new

    text = predictions_csv(arguments.model, arguments.file, proba=arguments.proba, raw=arguments.raw)
    if arguments.out is None:
        return text
    write_new(text, arguments.out, source=arguments.file)
    return ""


def _repair(arguments: argparse.Namespace) -> str:
    from gputune.report.places import study_file
    from gputune.study.repair import repair

    saved = repair(study_file(arguments.study), arguments.out)
    go_on = f"\n\nGo on: {shlex.join(['gputune', 'resume', arguments.out])}" if saved.is_whole_search else ""
    return f"{saved}{go_on}"


def _report(arguments: argparse.Namespace) -> str:
    from gputune.report.reporting import report

    return report(arguments.study, arguments.out)


def _status(arguments: argparse.Namespace) -> str:
    from gputune.report.status import status

    return status(arguments.study)


def _export(arguments: argparse.Namespace) -> str:
    from gputune.report.exporting import export

    return export(arguments.model, arguments.out)


_COMMANDS: dict[str, Callable[[argparse.Namespace], str]] = {
    "tune": _tune,
    "resume": _resume,
    "trials": _trials,
    "best": _best,
    "predict": _predict,
    "repair": _repair,
    "report": _report,
    "status": _status,
    "export": _export,
}
"""Each returns what goes to standard output."""


def _open(place: str) -> Any:
    """Return the study of a file, or of the folder that ``gputune tune`` made."""
    from gputune.report.places import study_file
    from gputune.study.study import Study

    return Study.open(study_file(place))


def _write(text: str) -> int:
    """Print the outcome. Whoever stops reading, as ``head`` does, ends the command quietly."""
    from gputune.report.text import clean

    if sys.stdout.isatty():
        text = clean(text, keep="\n")
    try:
        print(text, end="\n" if text else "", flush=True)
    except BrokenPipeError:
        # Python would flush once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return DONE


def _say(text: str) -> None:
    from gputune.report.text import clean

    print(f"gputune: {clean(text)}", file=sys.stderr)


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.strerror}: {error.filename!r}"
    return str(error)


@contextmanager
def _warnings_in_words() -> Iterator[None]:
    """Show a warning that is meant for the user as one line, once, instead of as a line of our code."""
    said = set()
    shown_otherwise = warnings.showwarning

    def show(message: Any, category: Any, *place: Any, **more: Any) -> None:
        if not issubclass(category, UserWarning):
            shown_otherwise(message, category, *place, **more)
        elif str(message) not in said:
            said.add(str(message))
            _say(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield
