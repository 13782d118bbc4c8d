"""A search made again from its study file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gputune.data.dataset import unpack_folds
from gputune.data.source import Source, fingerprint, read_apart, rows_difference, table_size
from gputune.errors import InputError, UntrustedCodeError
from gputune.executors.ray_connection import Ray
from gputune.search.space import space_from_json
from gputune.study.record import SearchRecord
from gputune.study.trusted import is_remembered
from gputune.tuning.options import Options
from gputune.tuning.problem import ModelChoice, choose_again, make_problem
from gputune.tuning.record import recorded_options


@dataclass(frozen=True)
class Again:
    """A search as it was begun; ``test`` are the rows that it held out, if it did."""

    choice: ModelChoice
    source: Source
    test: Source | None
    options: Options


def search_again(
    path: Path, record: SearchRecord, changed: dict[str, Any], *, trust_code: bool = False
) -> Again:
    """Return the search of a study file, with some of its options ``changed``.

    Raises InputError, saying what is missing or has changed, and UntrustedCodeError where it names code, or a cluster,
    that this user has not trained with.
    """
    if record.face == "sklearn":
        raise InputError(
            f"study {str(path)!r} is of {record.method}, which searched scikit-learn's estimators: a search of that "
            "face is not resumed."
        )
    if record.lost or {"arguments", "source"} & record.absent:
        raise InputError(
            f"study {str(path)!r} has lost options of its search and cannot go on; search again, into another "
            "folder. `gputune trials` shows what it holds."
        )
    arguments = record.arguments
    if arguments["lacking"]:
        raise InputError(
            f"study {str(path)!r} does not hold: {'; '.join(arguments['lacking'])}. Repeat the call of "
            f"gputune.tune(..., study={str(path)!r}), which goes on where it stopped."
        )
    study = path.absolute()  # wherever a module of the user's goes meanwhile
    choice = choose_again(dict(record.spec), record.optimizer, trust_code=trust_code)
    source, test = _reread(record, choice)
    workers = {**arguments["kept"], **changed}.get("workers", "auto")
    if isinstance(workers, dict):
        workers = _cluster(Ray(**workers), trust_code)
    space, folds = space_from_json(arguments["space"]), unpack_folds(arguments["folds"])
    options = recorded_options(record, **{**changed, "workers": workers}, space=space, cv=folds, study=study)
    return Again(choice, source, test, options)


def _cluster(named: Ray, trust_code: bool) -> Ray:
    """Return the cluster that a file names: one elsewhere gets the rows, and answers in pickles, which are code."""
    if not trust_code and named.is_elsewhere and not is_remembered(named.address):
        raise UntrustedCodeError(
            f"the study names the Ray cluster {named.address!r}, which would get its rows and could run code here, and "
            "which you have not trained on from this machine."
        )
    return named


def _reread(record: SearchRecord, choice: ModelChoice) -> tuple[Source, Source | None]:
    """Return the rows of a search, read again from its file, and those that it held out."""
    assert record.source is not None  # rows in memory are lacking
    origin = record.source
    try:
        source, test = read_apart(origin)
    except FileNotFoundError as error:
        raise InputError(
            f"the search cannot go on: its data {origin['path']!r} is gone; put it back, or repeat the first call with "
            "its new place."
        ) from error
    found = fingerprint(source.X, make_problem(source, record.task, choice).target)
    if found != record.fingerprint:
        sizes = table_size(record.fingerprint, origin), table_size(found, source.origin)
        raise InputError(
            f"the search cannot go on: the rows of {origin['path']!r} have changed since it was begun "
            f"({rows_difference(*sizes)}); restore the file."
        )
    held, now = origin.get("held_out"), (source.origin or {}).get("held_out")
    if held is not None and held != now:
        raise InputError(
            f"the search cannot go on: the rows of {origin['path']!r} that were held out have changed since it was "
            "begun; restore the file."
        )
    return source, test
