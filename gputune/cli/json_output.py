"""The JSON documents that a command prints with ``--json``, for agents and other programs."""

import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

from gputune.ground.errors import InputError, Interface, Reference, option
from gputune.ground.types import Json

if TYPE_CHECKING:
    # An error before these slow imports must be printed without them.
    from gputune.cli.summary import Ending
    from gputune.study.study import Study, Trial

TOP = 10
"""The largest number of trials in the document of a search."""


def error_json(error: BaseException, interface: Interface, *, exit_code: int, text: str) -> str:
    """Return the document for an error, with the four fields of ``InputError``.

    An error of another type has only a ``rule``, which is its message.

    Args:
        error: the error.
        interface: the names of arguments in the document.
        exit_code: the exit code of the command.
        text: the message that the command prints to standard error.
    """
    argument: str | None = None
    rule = text
    got: str | None = None
    remedy = str(getattr(error, "remedy", ""))
    if isinstance(error, InputError):
        if error.argument is not None:
            argument = error.argument
            if Reference.parse(argument) is not None:
                argument = option(argument)
            argument = interface.render(argument)
        rule = interface.render(error.rule)
        got = error.got
        remedy = interface.render(error.remedy)
    fields = {
        "type": type(error).__name__,
        "argument": argument,
        "rule": rule,
        "got": got,
        "remedy": remedy,
        "message": text,
    }
    return _document({"status": "error", "exit_code": exit_code, "error": fields})


@contextmanager
def only_one_document() -> Iterator[None]:
    """Send everything that is printed to standard output inside the ``with`` block to standard
    error.

    A user's module or objective may print, also in a worker process. Standard output then has only
    the document of the command.
    """
    try:
        is_process = sys.stdout.fileno() == 1 and sys.stderr.fileno() == 2
    except (OSError, ValueError):  # a stream in memory
        is_process = False
    with redirect_stdout(sys.stderr):
        if not is_process:
            yield
            return
        # Workers and compiled code write to file descriptor 1.
        saved = os.dup(1)
        os.dup2(2, 1)
        try:
            yield
        finally:
            os.dup2(saved, 1)
            os.close(saved)


def usage_json(message: str, remedy: str) -> str:
    """Return the document for a command line that the parser cannot read."""
    # argparse names the argument and the value only in its message.
    parts = re.fullmatch(r"(?:argument (\S+): )?(.*?)(?:, got (.*?))?\.?", message, re.DOTALL)
    assert parts is not None
    end = "" if message.endswith((".", "?")) else "."
    fields = {
        "type": "UsageError",
        "argument": parts[1],
        "rule": parts[2],
        "got": parts[3],
        "remedy": remedy,
        "message": f"{message}{end} {remedy}",
    }
    return _document({"status": "error", "exit_code": 2, "error": fields})


def search_json(ending: "Ending", *, timeout: float | None, exit_code: int = 0) -> str:
    """Return the document for a finished or interrupted search.

    Scores have the sign that the user knows: scikit-learn's sign, or the sign of the value that the
    objective of ``gputune search`` returns. ``direction`` says which scores are better.

    Args:
        ending: the search and its results.
        timeout: the time limit of the search in seconds, or None.
        exit_code: the exit code of the command; not 0 if a signal has ended the search.
    """
    study = ending.study
    record = study.record
    ranking = [trial for trial in study.ranking() if math.isfinite(trial.score)]
    best = None if not ranking else _best(study)
    document = {
        "status": "interrupted" if exit_code else "done",
        "exit_code": exit_code,
        "ended": ending.ended or None,
        "study": str(ending.study_file),
        "model": None if ending.model_folder is None else str(ending.model_folder),
        "scoring": "objective" if record.face == "loop" else record.scoring,
        "direction": "minimize" if _sign(study) < 0 else "maximize",
        "best": best,
        "held_out": _held_out(ending),
        "trials": dict(Counter(trial.state for trial in study.trials)),
        "top": [_trial(study, trial) for trial in ranking[:TOP]],
        "next": _next_steps(study, ranking),
        "budget": _budget(timeout, ending.seconds),
        "notes": list(record.notes),
    }
    return _document(document)


def _document(value: Json) -> str:
    """Return a value as JSON text. Functions and classes become their names."""
    return json.dumps(value, indent=1, default=_name, allow_nan=False)


def _name(value: object) -> str:
    return str(getattr(value, "__name__", value))


def _sign(study: "Study") -> float:
    """Return -1 if the study stores the scores with the opposite sign of the objective, else 1."""
    return -1.0 if study.record.scoring == "neg_objective" else 1.0


def _trial(study: "Study", trial: "Trial") -> dict[str, Any]:
    """Return a trial as JSON, with the user's sign of the scores."""
    from gputune.cli.study import trial_json

    row = trial_json(trial)
    score = trial.score * _sign(study)
    row["score"] = score if math.isfinite(score) else None
    error = trial.std_error
    row["std_error"] = error if math.isfinite(error) else None
    if study.record.face == "loop":
        del row["fold_scores"]
    return row


def _best(study: "Study") -> dict[str, Any]:
    """Return the best trial as JSON, with its comparison to the default configuration."""
    from gputune.views.default_trial import improvement_json

    best = _trial(study, study.best_trial)
    best["default"] = improvement_json(study)
    return best


def _held_out(ending: "Ending") -> Json | None:
    """Return the score of the saved model on the held-out rows, or None without such rows."""
    score = ending.held_out
    if score is None:
        return None
    baseline: Mapping[str, Any] | None = None
    if score.baseline is not None:
        answer, value = score.baseline
        baseline = {"answer": answer, "score": value if math.isfinite(value) else None}
    return {
        "score": score.score if math.isfinite(score.score) else None,
        "rows": score.rows,
        "interval": None if score.interval is None else list(score.interval),
        "baseline": baseline,
        "reason": score.reason or None,
    }


def _next_steps(study: "Study", ranking: "list[Trial]") -> Json:
    """Return advice for the next search: ends of the space, important hyperparameters, epochs."""
    if not ranking:
        return {"edges": [], "importance": None, "more_epochs": False}
    from gputune.spaces.edges import edges
    from gputune.views.parameters import importance

    touched = []
    for edge in edges(study):
        touched.append({**vars(edge), "text": str(edge)})
    try:
        forest = importance(study)
    except InputError:  # fewer than ten trials, or no hyperparameter varied
        shares = None
    else:
        shares = {
            "of": dict(zip(forest.names, forest.drops.tolist())),
            "fit": forest.fit if math.isfinite(forest.fit) else None,
            "trials": forest.trials,
        }
    epochs = study.record.max_epochs
    best = study.best_trial
    is_last = not study.record.is_hypergradient and best.best_epoch == epochs > 1
    return {"edges": touched, "importance": shares, "more_epochs": is_last}


def _budget(timeout: float | None, used: float) -> Json:
    """Return the time limit of the search, the time that it took, and the rest, in seconds.

    JSON has no infinite number, so an infinite limit is None.
    """
    if timeout is not None and math.isinf(timeout):
        timeout = None
    unspent = None if timeout is None else max(0.0, timeout - used)
    return {"seconds": timeout, "used": used, "unspent": unspent}
