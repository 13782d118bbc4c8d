"""From a study to its tuned model: the best configuration trained again on all rows of the study."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gputune.data.dataset import Dataset
from gputune.data.folds import all_rows
from gputune.data.source import Source, fingerprint, read_again, read_source, rows_difference
from gputune.engine.backend import choose_backend, choose_device, matrix_products
from gputune.engine.entry import entry
from gputune.errors import DivergedError, InputError
from gputune.population.population import complete, module_arguments
from gputune.search.descent import Hypergradient
from gputune.solver.solve import solve_all, solved_module
from gputune.study.database import blaming_options
from gputune.study.model import TunedModel
from gputune.study.record import PARTS, SearchRecord, lost_option
from gputune.study.study import Study, Trial
from gputune.tuning.options import Options
from gputune.tuning.problem import DTYPES, ModelChoice, Problem, make_problem, recorded_model
from gputune.tuning.record import recorded_options
from gputune.tuning.trainer import Trainer
from gputune.types import Backend, Config
from gputune.version import __version__


@entry
def refit(
    study: Study, X: object = None, y: object = None, *, check: bool = True, trust_code: bool = False
) -> TunedModel:
    """Train the best trial of a study on all its rows, for as many epochs as its best score took.

    Without X and y the rows are those of the search, kept in memory or read again from the file it read.
    Raises InputError where there are none or, with ``check``, others; DivergedError where it diverges.
    """
    trial = study.best_trial
    from_file = study.file if X is None and study.data is None else None
    with nullcontext() if from_file is None else blaming_options(from_file):
        choice, source, options = _recalled(study, X, y, trust_code)
    # How many classes there are is for the rows to say: others may have two where the study's have three.
    task = "classification" if study.record.classes is not None else study.record.task
    problem = make_problem(source, task, choice, options)
    # Rows that the process has kept are the study's own.
    is_kept = study.data is not None and X is None
    rows = dict(study.record.fingerprint) if is_kept else fingerprint(source.X, problem.target)
    if check and rows != study.record.fingerprint:
        raise InputError(_other_rows(study, problem, rows, are_given=X is not None))
    data, (statistics,) = problem.dataset([all_rows(len(source.X))], options, choice)
    config = complete(trial.params, optimizer=choice.optimizer, schedule=options.schedule)
    if choice.solved:
        module: nn.Module = solved_module(solve_all(data, [config]), 0)
    else:
        module = _train(problem, data, config, choice, options, epochs=trial.best_epoch)
    if not all(bool(w.isfinite().all()) for w in module.parameters()):
        raise DivergedError(
            f"trial {trial.number} diverged when it was trained on all rows; give the next best configuration, or a "
            "smaller lr, a search of its own."
        )
    target = problem.target
    return TunedModel(
        module=module,
        layout=problem.layout,
        statistics=statistics,
        task=target.task,
        classes=target.classes,
        center=_plain(data.center[0]),
        scale=_plain(data.scale[0]),
        dtype=data.dtype,
        target=target.name,
        spec={**choice.spec, "kwargs": _arguments(choice, config, data)},
        info=_info(study, trial, rows),
    )


def _plain(value: Tensor) -> float | np.ndarray:
    return float(value) if value.dim() == 0 else value.cpu().numpy()


def _recalled(study: Study, X: object, y: object, trust_code: bool) -> tuple[ModelChoice, Source, Options]:
    """Return the model, the rows and the options of the search, from memory or from the study's file."""
    record = study.record
    if study.data is not None:
        choice, source, options = study.data
        if X is None:
            return choice, source, options
        if options.sample_weight is not None:
            raise InputError(
                "best_model(X, y) cannot weight other rows: the study used sample_weight; leave X and y out."
            )
        return choice, read_source(X, y, module=choice.kind == "module"), options
    if record.face == "sklearn":
        raise InputError(
            f"best_model() cannot refit a study of {record.method}, which searched scikit-learn's estimators; its "
            "best_estimator_ is the model."
        )
    if lost := [name for name in record.lost if PARTS[name].training or name == "method"]:
        raise lost_option(study.file, lost[0])
    if record.sample_weight is not None:
        raise _lost_weights("sample_weight again, which this study used")
    options = recorded_options(record, **_machine(record), class_weight=_class_weight(record))
    choice = recorded_model(dict(record.spec), record.optimizer, trust_code=trust_code)
    return choice, _reread(study, X, y, module=choice.kind == "module"), options


def _lost_weights(what: str) -> InputError:
    return InputError(
        f"best_model() cannot read {what}; call it on the study that tune() returned, in the same process."
    )


def _machine(record: SearchRecord) -> Config:
    """Return what a study's file says of the machine, as far as this one has it; a refit is for one process."""
    kept = record.arguments.kept
    on_cluster = isinstance(kept.get("workers"), dict)
    device, backend = "auto" if on_cluster else kept.get("device", "auto"), kept.get("backend", "auto")
    try:
        place = choose_device(device)
    except InputError:
        device, place = "auto", choose_device("auto")
    if backend != "auto":
        try:
            choose_backend(backend, place, DTYPES[record.dtype])
        except InputError:
            backend = "auto"
    tf32 = kept.get("tf32", False) and place.type == "cuda"
    return {"device": device, "backend": backend, "tf32": tf32, "workers": 1}


def _class_weight(record: SearchRecord) -> Any:
    """Return the class weights of a study: its record has them as text, its arguments as they were given."""
    kept = record.arguments.kept
    if record.class_weight in (None, "'balanced'"):
        return None if record.class_weight is None else "balanced"
    if "class_weight" in kept:
        return kept["class_weight"]
    raise _lost_weights(f"class_weight={record.class_weight} again")


def _reread(study: Study, X: object, y: object, *, module: bool) -> Source:
    if X is not None:
        return read_source(X, y, module=module)
    origin = study.record.source
    if origin is None:
        raise InputError(
            "best_model() needs X and y: the study was searched on data in memory, which its file does not hold."
        )
    try:
        return read_again(origin, module=module)
    except FileNotFoundError as error:
        raise InputError(
            f"best_model() cannot read {origin['path']!r} again: it is gone. Pass X and y."
        ) from error


def _other_rows(study: Study, problem: Problem, rows: Mapping[str, object], *, are_given: bool) -> str:
    """Return in which way the rows are not those of the search, and what to do."""
    origin, then, target = study.record.source, study.record.classes, problem.target
    now = None if target.classes is None else target.classes.tolist()
    difference = rows_difference(study.record.fingerprint, rows)
    if then != now:
        counts = [len(labels or ()) for labels in (then, now)]
        other = "other classes" if counts[0] == counts[1] else f"{counts[0]} classes then, {counts[1]} now"
        difference = f"{difference}; {other}"
    if origin is not None and not are_given:
        return (
            f"the rows of {origin['path']!r} have changed since the study was searched on them ({difference}); restore "
            "the file, or add check=False to train on them as they are: the model then has no score."
        )
    again = "" if origin is None else f", or leave X and y out to read {origin['path']!r} again"
    return (
        f"best_model(X, y): these are not the rows that the study was searched on ({difference}). Pass those{again}; "
        "check=False trains on others, and the model then has no score."
    )


def _train(
    problem: Problem, data: Dataset, config: Config, choice: ModelChoice, options: Options, *, epochs: int
) -> nn.Module:
    descent = options.method if isinstance(options.method, Hypergradient) else None
    backend: Backend = "eager"
    if descent is None:
        backend, _ = choose_backend(options.backend, data.device, data.dtype, choice.kind)
    trainer = Trainer(
        data=data,
        kind=choice.kind,
        module_class=choice.module_class,
        objective=problem.objective,
        seed=options.random_state,
        horizon=options.max_epochs,
        backend=backend,
        precision=options.precision,
    )
    with matrix_products(tf32=options.tf32):
        return trainer.train_module(config, descent, epochs=epochs)


def _arguments(choice: ModelChoice, config: Config, data: Dataset) -> Config:
    size = {"n_features": data.n_features, "n_outputs": data.n_outputs}
    if choice.searched == "mlp":
        return size | {k: config[k] for k in ("width", "depth", "activation", "dropout")}
    return size | module_arguments(config)


def _info(study: Study, trial: Trial, rows: Mapping[str, object]) -> Config:
    """Return what is worth knowing of the model; a score is that of the rows of the search, and of no others."""
    own = rows == study.record.fingerprint
    return {
        "params": trial.params,
        "epochs": trial.best_epoch,
        "scoring": study.record.scoring,
        "positive": study.record.positive,
        **({"score": trial.score, "std_error": trial.std_error} if own else {}),
        "loss": study.record.objective,
        "trials": len(study.trials),
        "rows": rows["rows"],
        "fingerprint": rows,
        "versions": {"gputune": __version__, "torch": torch.__version__},
    }
