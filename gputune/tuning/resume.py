"""The arguments of a search as its study file holds them, and the search made again from there."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gputune.data.dataset import Rows, pack_folds, unpack_folds
from gputune.data.source import Source, fingerprint, read_apart, rows_difference, table_size
from gputune.errors import InputError, UntrustedCodeError
from gputune.executors.ray_connection import Ray
from gputune.search.optuna_sampler import OptunaSampler
from gputune.search.space import Space, space_again, space_values
from gputune.study.record import SearchRecord
from gputune.study.rows import to_json
from gputune.study.trusted import is_remembered
from gputune.tuning.options import Options, method_again
from gputune.tuning.problem import ModelChoice, choose_again, make_problem

_KEPT = (
    *("n_trials", "include_default", "scoring", "class_weight"),
    *("max_epochs", "checkpoint_seconds", "device", "backend", "dtype", "tf32", "memory", "workers"),
)
"""Arguments that a file holds as they were given, beside what the record has under names of its own."""


@dataclass(frozen=True)
class Again:
    """A search as it was begun; ``test`` are the rows that it held out, if it did."""

    choice: ModelChoice
    source: Source
    test: Source | None
    options: Options


def stored_arguments(options: Options, source: Source, space: Space, folds: list[Rows]) -> dict[str, Any]:
    """Return what makes the search again: ``kept``, ``space``, ``folds``.

    ``lacking`` names what a file cannot hold and the search needs, ``callbacks`` those that will not be called again.
    """
    values = space_values(space)
    lacking = [
        word
        for word, lost in {
            "X and y, which were in memory": source.origin is None,
            "groups, which were in memory": source.groups is not None
            and not (source.origin or {}).get("groups"),
            "scoring, a function": callable(options.scoring),
            "class_weight": not _is_storable(options.class_weight),
            "sample_weight": options.sample_weight is not None,
            "space, with an object of your own": values is None,
            "method, with a sampler of Optuna's": isinstance(options.method, OptunaSampler),
        }.items()
        if lost
    ]
    kept = {name: getattr(options, name) for name in _KEPT if _is_storable(getattr(options, name))}
    if isinstance(options.workers, Ray):
        kept["workers"] = asdict(options.workers)
    callbacks = [type(callback).__name__ for callback in options.callbacks]
    return {
        "kept": kept, "space": values, "folds": pack_folds(folds), "lacking": lacking, "callbacks": callbacks,
    }  # fmt: skip


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
    given = {**arguments["kept"], **changed, "task": record.task}
    if isinstance(given.get("workers"), dict):
        given["workers"] = _cluster(Ray(**given["workers"]), trust_code)
    options = Options(
        **given,
        space=space_again(arguments["space"]),
        method=method_again(record.method),
        cv=unpack_folds(arguments["folds"]),
        columns=record.columns,
        numbers=record.numbers,
        schedule=record.schedule,
        positive=record.positive,
        epoch=record.epoch,
        study=study,
        random_state=record.seed,
    )
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


def _is_storable(value: Any) -> bool:
    try:
        to_json(value)
    except InputError:
        return False
    return True
