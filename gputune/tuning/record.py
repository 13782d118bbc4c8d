"""The record of a search made from its options, and its options made from the record, for a resume and a refit."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import sklearn
import torch

from gputune.data.dataset import Dataset, Rows, pack_folds
from gputune.data.source import Source, digest_of, fingerprint
from gputune.engine.scoring import Scoring
from gputune.errors import InputError
from gputune.executors.ray_connection import Ray
from gputune.search.distributions import described
from gputune.search.optuna_sampler import OptunaSampler
from gputune.search.space import Space, space_text, space_to_json
from gputune.study.record import PARTS, SearchRecord
from gputune.study.rows import to_json
from gputune.tuning.method import method_again, method_meta
from gputune.tuning.options import KEPT, RULES, Options
from gputune.tuning.problem import ModelChoice, Problem
from gputune.version import __version__


def search_record(
    choice: ModelChoice,
    problem: Problem,
    options: Options,
    scoring: Scoring,
    data: Dataset,
    space: Space,
    folds: list[Rows],
    notes: Sequence[str],
) -> SearchRecord:
    """Return what a study holds beside its trials; ``notes`` are those on the trials."""
    classes = None if problem.target.classes is None else problem.target.classes.tolist()
    return SearchRecord(
        model=choice.name,
        spec=choice.spec,
        optimizer=choice.optimizer,
        schedule=options.schedule,
        space=space_text(space),
        distributions=_distributions(space),
        method=method_meta(options.method),
        task=problem.target.task,
        target=problem.target.name,
        classes=classes,
        source=problem.source.origin,
        fingerprint=fingerprint(problem.source.X, problem.target),
        features=len(problem.layout.feature_names),
        notes=[*problem.layout.notes, *notes],
        columns=problem.columns,
        numbers=options.numbers,
        class_weight=None if options.class_weight is None else repr(options.class_weight),
        sample_weight=None if options.sample_weight is None else digest_of(np.asarray(options.sample_weight)),
        cv=repr(options.cv) if isinstance(options.cv, int | np.integer) else type(options.cv).__name__,
        folds=data.n_folds,
        splits=digest_of(*(rows.cpu().numpy() for fold in data.folds for rows in (fold.train, fold.valid))),
        scoring=scoring.name,
        positive=None if classes is None or scoring.positive is None else classes[scoring.positive],
        epoch=options.epoch,
        max_epochs=1 if choice.solved else options.max_epochs,
        seed=options.random_state,
        dtype=str(data.dtype).removeprefix("torch."),
        device=str(data.device),
        versions=versions(),
        arguments=_arguments(options, problem.source, space, folds),
    )


def _arguments(options: Options, source: Source, space: Space, folds: list[Rows]) -> dict[str, Any]:
    """Return what makes the search again: ``kept``, ``space``, ``folds``.

    ``lacking`` names what a file cannot hold and the search needs, ``callbacks`` those that will not be called again.
    """
    values = space_to_json(space)
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
    kept = {name: getattr(options, name) for name in KEPT if _is_storable(getattr(options, name))}
    if isinstance(options.workers, Ray):
        kept["workers"] = asdict(options.workers)
    callbacks = [type(callback).__name__ for callback in options.callbacks]
    return {
        "kept": kept, "space": values, "folds": pack_folds(folds), "lacking": lacking, "callbacks": callbacks,
    }  # fmt: skip


def recorded_options(record: SearchRecord, **changed: Any) -> Options:
    """Return the options of a search as far as its record tells them, some of them ``changed``."""
    known = {part.argument: getattr(record, name) for name, part in PARTS.items() if part.argument in RULES}
    kept = record.arguments.get("kept", {})
    known |= {name: kept[name] for name in KEPT if name in kept}
    return Options(**{**known, "method": method_again(record.method), **changed})


def versions() -> dict[str, str]:
    """Return the versions that a study was searched with."""
    return {
        "gputune": __version__,
        "torch": torch.__version__,
        "sklearn": sklearn.__version__,
        "numpy": np.__version__,
    }


def _distributions(space: Space) -> dict[str, Any]:
    """What an export to Optuna knows of each key: the law it is drawn from, where one law is all and Optuna has it."""
    found = {key: described(choices) for part in space for key, choices in part.items()}
    many = {key for key in found if sum(key in part for part in space) > 1}
    return {key: law for key, law in found.items() if law is not None and key not in many}


def _is_storable(value: Any) -> bool:
    try:
        to_json(value)
    except InputError:
        return False
    return True
