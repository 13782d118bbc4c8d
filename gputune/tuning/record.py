"""Conversion between the options of a search and the description in its study file.

Resuming a search and retraining a trial use the description.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import sklearn
import torch

from gputune.data.columns import Layout
from gputune.data.dataset import Rows
from gputune.data.folds import TimeSplit, pack_folds, unpack_folds
from gputune.data.source import (
    Source,
    digest_of,
    fingerprint,
    read_source,
    read_with_held_out,
    rows_difference,
    table_size,
)
from gputune.data.target import TaskWord, check_target
from gputune.data.target_transform import is_known, transform_from_json, transform_to_json
from gputune.data.weights import class_weight_text
from gputune.engine.backend import choose_device
from gputune.engine.backends.selection import choose_backend
from gputune.engine.checkpoint import CheckpointFolder
from gputune.executors.cluster import cluster_from_json
from gputune.ground.errors import InputError, UntrustedCodeError, option, per_interface
from gputune.ground.types import Config, Json, Outputs
from gputune.modules.construction import Builder
from gputune.scoring.metrics import has_function
from gputune.spaces.distributions import (
    CheckedSpace,
    describe,
    space_from_json,
    space_text,
    space_to_json,
)
from gputune.study.code import digest_of_code, script_of
from gputune.study.model_files import DTYPES
from gputune.study.record import RECORD_FIELDS, Arguments, SearchRecord
from gputune.study.store import state_folder
from gputune.study.values import sha256, to_json
from gputune.tuning.choices import ModelChoice, recorded_model
from gputune.tuning.context import Context
from gputune.tuning.method import method_from_json
from gputune.tuning.options import RULES, STORED, Options, RowOptions, make_options
from gputune.tuning.problem import Problem
from gputune.version import __version__


def _cv_text(cv: object) -> str:
    """Return the text of the option ``cv`` in a study: "5", "time:5", or the class of a splitter."""
    if isinstance(cv, TimeSplit):
        return str(cv)
    return repr(cv) if isinstance(cv, int | np.integer) else type(cv).__name__


def search_record(
    context: Context,
    space: CheckedSpace,
    folds: Sequence[Rows],
    notes: Sequence[str],
    baseline: Json | None,
) -> SearchRecord:
    """Return the description of a search for its study file: everything except its trials.

    ``notes`` are remarks for the user on the trials.
    """
    problem = context.problem
    cluster = context.trainer.cluster
    data = context.data
    scoring = context.scoring
    choice = problem.choice
    options = problem.options
    rows = options.rows
    training = options.training
    target = problem.target
    objective = problem.objective
    classes = None if target.classes is None else target.classes.tolist()
    metrics: list[Json] = []
    for metric in (scoring, *scoring.others):
        positive = None if classes is None or metric.positive is None else classes[metric.positive]
        metrics.append({"name": metric.label, "scorer": metric.name, "positive": positive})
    code = {}
    if objective is not None:
        functions = {
            "loss": objective.loss,
            "training_step": training.training_step,
            "augment": objective.augment,
        }
        for name, function in functions.items():
            if callable(function):
                code[name] = digest_of_code(function)
    split_rows: list[np.ndarray] = []
    for fold in data.folds[: data.n_splits]:
        split_rows += [fold.train.cpu().numpy(), fold.valid.cpu().numpy()]
    sample_weight = None
    if training.sample_weight is not None:
        sample_weight = digest_of(np.asarray(training.sample_weight))
    positives = (metric["positive"] for metric in metrics if metric["positive"] is not None)
    return SearchRecord(
        model=choice.name,
        spec=choice.spec,
        optimizer=choice.optimizer,
        schedule=training.schedule,
        space=space_text(space),
        distributions=distributions(space),
        method=options.search.method.to_json(),
        task=target.task,
        target=target.name,
        target_transform=transform_to_json(rows.target_transform),
        classes=classes,
        source=problem.source.origin,
        fingerprint=fingerprint(problem.source.X, target),
        features=problem.n_features,
        columns=problem.columns,
        numbers=problem.numbers,
        max_levels=rows.max_levels,
        # In the order of the table, because another order gives the same features.
        category_copies=[name for name in _table_columns(problem) if name in rows.category_copies],
        notes=[*problem.layout.notes, *notes],
        class_weight=class_weight_text(training.class_weight, target),
        sample_weight=sample_weight,
        cv=_cv_text(problem.cv),
        folds=data.n_splits,
        splits=digest_of(*split_rows),
        objective="" if objective is None else objective.name_unless_default(target.task),
        code=code,
        scoring=scoring.name,
        metrics=metrics if scoring.others else [],
        positive=next(positives, None),
        baseline=baseline,
        epoch=training.epoch,
        patience=training.patience_epochs,
        max_epochs=1 if choice.solved else training.epochs,
        n_ens=training.n_ens,
        seed=options.search.random_state,
        dtype=str(data.dtype).removeprefix("torch."),
        device=str(data.device) if cluster is None else cluster.device,
        versions=versions(),
        arguments=_arguments(choice, options, problem.source, space, folds),
    )


_LOST_GROUPS = "groups, which were in memory"
"""The entry of ``Arguments.lacking`` for groups that the study file does not hold."""


_LOST_SCORER = "scoring, a function"
"""The entry of ``Arguments.lacking`` for a custom scorer, which a study file does not hold."""


def lacks_scorer(record: SearchRecord) -> bool:
    """Return whether a custom scorer ranks the trials, and the study file does not hold it."""
    from sklearn.metrics import get_scorer_names

    names = (*get_scorer_names(), "neg_loss")
    return _LOST_SCORER in record.arguments.lacking and record.scoring not in names


def had_groups(record: SearchRecord) -> bool:
    """Return whether the rows of a search had groups."""
    return record.group_column is not None or _LOST_GROUPS in record.arguments.lacking


def _arguments(
    choice: ModelChoice,
    options: Options,
    source: Source,
    space: CheckedSpace,
    folds: Sequence[Rows],
) -> Arguments:
    """Return the arguments of a search that its study file stores.

    The result also names the arguments that the file cannot store.
    """
    described_space = space_to_json(space)
    has_group_column = bool((source.origin or {}).get("groups"))
    transform = transform_to_json(options.rows.target_transform)
    is_missing = {
        "X and y, which were in memory": source.origin is None,
        _LOST_GROUPS: source.groups is not None and not has_group_column,
        _LOST_SCORER: has_function(options.search.scoring),
        "loss, a function": callable(options.training.loss),
        "training_step, a function": options.training.training_step is not None,
        "augment, a function": options.training.augment is not None,
        "class_weight": not _is_storable(options.training.class_weight),
        "sample_weight": options.training.sample_weight is not None,
        "target_transform, an object of your own": not is_known(transform),
        "space, with an object of your own": described_space is None,
        options.search.method.lacks: bool(options.search.method.lacks),
    }
    values = options.values()
    stored = {name: values[name] for name in STORED if _is_storable(values[name])}
    if options.machine.cluster is not None:
        stored["workers"] = options.machine.cluster.to_json()
    return Arguments(
        kept=stored,
        space=described_space,
        folds=pack_folds(folds),
        lacking=[description for description, missing in is_missing.items() if missing],
        callbacks=[type(callback).__name__ for callback in options.machine.callbacks],
        script=None if choice.module_class is None else script_of(choice.module_class),
        groups=source.group_column or None,
    )


def recorded_options(record: SearchRecord, **changed: object) -> Options:
    """Return the options of a search that its study file stores.

    The options in ``changed`` replace stored options. Options that are not stored get their default
    values.
    """
    stored: dict[str, Any] = {}
    for name, part in RECORD_FIELDS.items():
        if part.argument in RULES:
            stored[part.argument] = getattr(record, name)
    transform = record.target_transform
    stored["target_transform"] = None if transform is None else transform_from_json(transform)
    for name, value in record.arguments.kept.items():
        if name in STORED:
            stored[name] = value
    return make_options(**{**stored, "method": method_from_json(record.method), **changed})


def machine_options_here(record: SearchRecord) -> Config:
    """Return the stored options for the device, the backend and TF32, as far as this machine
    supports them.

    Unsupported options become "auto" or False. The number of processes is always one.
    """
    kept = record.arguments.kept
    # The stored device of a search on a cluster is that of its tasks.
    device = "auto" if isinstance(kept.get("workers"), dict) else kept.get("device", "auto")
    backend = kept.get("backend", "auto")
    tf32 = kept.get("tf32", False)
    try:
        place = choose_device(device)
    except InputError:
        device = "auto"
        place = choose_device("auto")
    try:
        if backend != "auto":
            choose_backend(backend, place, DTYPES[record.dtype])
    except InputError:
        backend = "auto"
    return {
        "device": device,
        "backend": backend,
        "tf32": tf32 and place.type == "cuda",
        "workers": 1,
    }


def versions() -> dict[str, str]:
    """Return the version of gputune and of each package that affects results, by name."""
    return {
        "gputune": __version__,
        "torch": torch.__version__,
        "sklearn": sklearn.__version__,
        "numpy": np.__version__,
    }


def distributions(space: CheckedSpace) -> dict[str, Json]:
    """Return the distribution of each hyperparameter in Optuna's notation, for an export to Optuna.

    Hyperparameters with several distributions, and distributions that Optuna lacks, are left out.
    """
    n_uses = Counter(key for part in space for key in part)
    described = {}
    for part in space:
        for key, choices in part.items():
            distribution = describe(choices)
            if distribution is not None and n_uses[key] == 1:
                described[key] = distribution
    return described


def _is_storable(value: object) -> bool:
    """Return True if gputune can store a value as JSON."""
    try:
        to_json(value)
    except InputError:
        return False
    return True


def _table_columns(problem: Problem) -> Sequence[str]:
    """Return the names of the columns of X, or () for rows that are not a table."""
    return problem.layout.inputs if isinstance(problem.layout, Layout) else ()


def checkpoint_folder(study: Path | None, record: SearchRecord) -> CheckpointFolder | None:
    """Return the folder with a study's checkpoints: ``study.db.state`` next to ``study.db``.

    Returns None if the study is not stored in a file.
    """
    if study is None:
        return None
    # The digest covers every option that changes the training.
    values = {name: getattr(record, name) for name, part in RECORD_FIELDS.items() if part.training}
    # Left out when unset, so that checkpoints of older studies keep their digest.
    later: dict[str, Any] = {
        name: getattr(record, name) for name in ("metrics", "code", "category_copies")
    }
    for name in ("max_levels", "n_ens"):
        value = getattr(record, name)
        later[name] = value if value != getattr(SearchRecord, name) else None
    values |= {name: value for name, value in later.items() if value}
    return CheckpointFolder(state_folder(study), sha256(to_json(values, name="checkpoint")))


@dataclass(frozen=True)
class SearchCall:
    """The model, the rows and the options of a search, before gputune checks or trains anything.

    Attributes:
        choice: The model.
        source: The rows.
        options: The options.
        test: The rows that the search held out, or None.
        outputs: The outputs of trials on validation rows, by trial number, if no file stores them.
        final_model: The options of the model that the command line saves at the end. See
            ``Arguments``.
        preset: A sentence on the choices of a preset, or "".
        preset_choices: The preset and its choices, as ``Arguments.preset`` stores them.
        given: The names of the options that the user passed.
    """

    choice: ModelChoice
    source: Source
    options: Options
    test: Source | None = None
    outputs: Mapping[int, Outputs] = field(default_factory=dict)
    final_model: Mapping[str, bool] = field(default_factory=dict)
    preset: str = ""
    preset_choices: Json = field(default_factory=dict)
    given: Collection[str] = ()

    def chosen_by_user(self) -> dict[str, Any]:
        """Return the options that the user chose, by name. "auto" leaves the choice to gputune."""
        chosen = {}
        for name, value in self.options.values().items():
            is_open = isinstance(value, str) and value == "auto"
            if name in self.given and not is_open:
                chosen[name] = value
        return chosen


def recorded_search(
    path: Path,
    record: SearchRecord,
    changed: Mapping[str, object],
    *,
    module: Builder | None = None,
    trust_code: bool = False,
) -> SearchCall:
    """Read the model, the rows and the options of a search from its study file.

    The options in ``changed`` replace stored options, and ``module`` is the class if the user names
    it. Raises InputError if the search cannot be resumed, and UntrustedCodeError for code or a
    cluster that only the file names.
    """
    arguments = record.arguments
    stored = {**arguments.kept, **changed}
    _check_resumable(path, record, stored)
    study = path.absolute()  # a module of the user may change the current folder
    choice = recorded_model(
        dict(record.spec),
        record.optimizer,
        script=record.arguments.script,
        module=module,
        trust_code=trust_code,
    )
    source, test = _reread(record, choice)
    workers = stored.get("workers", "auto")
    if isinstance(workers, dict):
        workers = cluster_from_json(workers)
        # A remote cluster gets the rows, and answers with pickles, which can run code.
        if not trust_code and workers.is_elsewhere and "workers" not in changed:
            raise UntrustedCodeError(
                f"The study names the {workers.title} cluster {workers.address!r}. The cluster would "
                "receive the rows of the study and could run code here."
            )
    space = space_from_json(arguments.space or ())
    folds = unpack_folds(arguments.folds)
    options = recorded_options(
        record, **{**changed, "workers": workers}, space=space, cv=folds, study=study
    )
    return SearchCall(choice, source, options, test, final_model=arguments.final_model)


def _check_resumable(path: Path, record: SearchRecord, stored: Mapping[str, object]) -> None:
    """Raise InputError if a search cannot be resumed from the options in its study file."""
    file = repr(str(path))
    missing = record.arguments.lacking
    if record.face == "sklearn":
        fault = f"belongs to {record.method}, a search of scikit-learn estimators"
        remedy = "Fit that search again."
    elif record.face == "loop":
        fault = "belongs to gputune.search, and no file stores the training loop"
        remedy = (
            "To resume it, repeat the command gputune search, or the call of "
            f"gputune.search(..., study={file})."
        )
    elif record.lost or {"arguments", "source"} & record.absent:
        fault = "has lost options of its search and cannot be resumed"
        remedy = (
            "Search again, into another folder. `gputune trials` shows the results of this study."
        )
    elif missing:
        fault = f"does not hold: {'; '.join(missing)}"
        # Only the command line holds rows out.
        is_of_command = "test_size" in (record.source or {})
        call = "command" if is_of_command else f"call of gputune.tune(..., study={file})"
        remedy = f"Repeat the {call} that began the search to resume it."
    elif stored.get("n_trials") == 0:
        fault = "holds configurations that were trained one by one, not a search"
        remedy = (
            "Repeat the command or call that trained one of these configurations, or add a "
            "search with "
            f"{option('n_trials', 8)} or more."
        )
    else:
        return
    raise InputError(None, f"Study {file} {fault}", remedy=remedy)


def read_rows(
    choice: ModelChoice, rows: RowOptions, X: object, y: object, groups: object = None
) -> Source:
    """Read the rows X, y and groups with the options of a search."""
    return read_source(
        X,
        y,
        groups,
        module=choice.takes_arrays,
        drop=rows.drop,
        kinds=rows.kinds,
        missing_target=rows.missing_target,
    )


def _reread(record: SearchRecord, choice: ModelChoice) -> tuple[Source, Source | None]:
    """Read the rows of a search again from its file.

    Also return the rows that the search held out for a test. Raises InputError if the file is gone
    or its rows have changed.
    """
    assert record.source is not None  # rows in memory are lacking
    origin = record.source
    file = repr(record.source["path"])
    try:
        source, test = read_with_held_out(origin, module=choice.takes_arrays)
    except FileNotFoundError as error:
        call = per_interface("call", "command")
        raise InputError(
            None,
            f"The search cannot be resumed, because its data {file} is gone",
            remedy=f"Put the file back, or repeat the first {call} with its new path.",
        ) from error
    target = check_target(
        source.y, task=cast(TaskWord, record.task), n_rows=len(source.X), name=source.target
    )
    change = ""
    held_out = origin.get("held_out")
    current = fingerprint(source.X, target)
    if current != record.fingerprint:
        sizes = table_size(record.fingerprint, origin), table_size(current, source.origin)
        change = f"have changed since the search began ({rows_difference(*sizes)})"
    elif held_out is not None and held_out != (source.origin or {}).get("held_out"):
        change = "that were held out have changed since the search began"
    if change:
        raise InputError(
            None,
            f"The search cannot be resumed, because the rows of {file} {change}",
            remedy="Restore the file.",
        )
    return source, test
