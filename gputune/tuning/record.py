"""What a study file holds beside its trials: all that resumes the search and refits its best trial."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import sklearn
import torch

from gputune.data.dataset import Dataset, Rows
from gputune.data.source import digest_of, fingerprint
from gputune.engine.scoring import Scoring
from gputune.search.optuna_space import described
from gputune.search.space import Space, space_text
from gputune.study.record import SearchRecord
from gputune.tuning.options import Options, method_meta
from gputune.tuning.problem import ModelChoice, Problem
from gputune.tuning.resume import stored_arguments
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
        arguments=stored_arguments(options, problem.source, space, folds),
    )


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
