"""From a study to its tuned model: the best configuration trained again on all rows of the study."""

from typing import Any

import torch
from torch import nn

from gputune.data.dataset import Dataset
from gputune.data.fingerprint import fingerprint
from gputune.data.folds import all_rows
from gputune.data.source import Source, read_again, read_source
from gputune.engine.backend import choose_backend
from gputune.engine.chunk import Job, train_chunk
from gputune.engine.entry import entry
from gputune.engine.plan import make_plan
from gputune.engine.population import complete, module_arguments, populations
from gputune.engine.precision import matrix_products
from gputune.engine.solved import solve_all, solved_module
from gputune.engine.workers import computing
from gputune.errors import DivergedError, InputError
from gputune.hypergradients.chunk import HypergradientJob, train_scheduled
from gputune.model_choice import ModelChoice, choose_again
from gputune.options import Options, method_again
from gputune.problem import Problem, make_problem
from gputune.search.hypergradient import Hypergradient
from gputune.study.model import TunedModel
from gputune.study.study import Study, Trial
from gputune.types import Backend, Config
from gputune.version import __version__


@entry
def refit(study: Study, X: Any = None, y: Any = None) -> TunedModel:
    """Train the best trial of a study on all its rows, for as many epochs as its best score took.

    Without X and y the rows are those of the search, kept in memory or read again from the file it read.
    Raises InputError where there are none, or where the file has changed; DivergedError where it diverges.
    """
    trial = study.best_trial
    choice, source, options = _recalled(study, X, y)
    problem = make_problem(source, study.meta["task"], choice, options.columns)
    data, (statistics,) = problem.dataset([all_rows(len(source.X))], options, choice)
    config = complete(trial.params, optimizer=choice.optimizer, schedule=options.schedule)
    if choice.solved:
        module: nn.Module = solved_module(solve_all(data, [config]), 0)
    else:
        module = _train(data, config, choice, options, epochs=trial.best_epoch)
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
        center=float(data.center[0]),
        scale=float(data.scale[0]),
        dtype=data.dtype,
        target=target.name,
        spec={**choice.spec, "kwargs": _arguments(choice, config, data)},
        info=_info(study, trial, problem),
    )


def _recalled(study: Study, X: Any, y: Any) -> tuple[ModelChoice, Source, Options]:
    """Return the model, the rows and the options of the search, from memory or from the study's file."""
    meta = study.meta
    if study.data is not None:
        choice, source, options = study.data
        return (
            (choice, source, options) if X is None else (choice, read_source(X, y), _without_weights(options))
        )
    if meta.get("face") == "sklearn":
        raise InputError(
            f"best_model() cannot refit a study of {meta['method']}, which searched scikit-learn's estimators; its "
            "best_estimator_ is the model."
        )
    if meta["sample_weight"] is not None:
        raise InputError(
            "best_model() cannot read sample_weight again, which this study used; call it on the study that tune() "
            "returned, in the same process."
        )
    options = Options(
        class_weight=_class_weight(meta),
        columns=meta["columns"],
        numbers=meta["numbers"],
        schedule=meta["schedule"],
        max_epochs=meta["max_epochs"],
        method=method_again(meta["method"]),
        dtype=meta["dtype"],
        random_state=meta["seed"],
    )
    return choose_again(meta["spec"], meta["optimizer"]), _reread(study, X, y), options


def _class_weight(meta: dict[str, Any]) -> Any:
    """Return the class weights of a study file: its meta has them as text, its arguments as they were given."""
    if meta["class_weight"] in (None, "'balanced'"):
        return None if meta["class_weight"] is None else "balanced"
    kept = meta.get("arguments", {}).get("kept", {})
    if "class_weight" in kept:
        return kept["class_weight"]
    raise InputError(
        f"best_model() cannot read class_weight={meta['class_weight']} again; call it on the study that tune() "
        "returned, in the same process."
    )


def _without_weights(options: Options) -> Options:
    if options.sample_weight is not None:
        raise InputError(
            "best_model(X, y) cannot weight other rows: the study used sample_weight; leave X and y out."
        )
    return options


def _reread(study: Study, X: Any, y: Any) -> Source:
    if X is not None:
        return read_source(X, y)
    origin = study.meta["source"]
    if origin is None:
        raise InputError(
            "best_model() needs X and y: the study was searched on data in memory, which its file does not hold."
        )
    try:
        source = read_again(origin)
    except FileNotFoundError as error:
        raise InputError(
            f"best_model() cannot read {origin['path']!r} again: it is gone. Pass X and y."
        ) from error
    problem = make_problem(
        source, study.meta["task"], choose_again(study.meta["spec"], study.meta["optimizer"])
    )
    if fingerprint(source.X, problem.target) != study.meta["fingerprint"]:
        raise InputError(
            f"the rows of {origin['path']!r} have changed since the study was searched on them; restore the file, "
            "or pass X and y to train on other rows."
        )
    return source


def _train(data: Dataset, config: Config, choice: ModelChoice, options: Options, *, epochs: int) -> nn.Module:
    (chunk,) = populations([config], choice.kind, rows=data.n_rows)
    common = (options.random_state, epochs, options.max_epochs, None, choice.module_class)
    if isinstance(options.method, Hypergradient):
        names, segments, layers = (
            options.method.hyperparameters,
            options.method.segments,
            options.method.per_layer,
        )
        descent = HypergradientJob(*common, wanted=tuple(names), segments=segments, per_layer=layers)
        with matrix_products(tf32=options.tf32):
            return train_scheduled(descent, data, chunk)
    backend: Backend = "eager"
    if choice.kind != "module":
        backend, _ = choose_backend(options.backend, data.device, data.dtype)
    job = Job(*common, backend=backend)
    plan = make_plan([chunk], data, epochs=epochs, memory=None, workers=1, backend=backend)
    with computing(plan.threads), matrix_products(tf32=options.tf32):
        return train_chunk(job, data, chunk).member(0, 0)


def _arguments(choice: ModelChoice, config: Config, data: Dataset) -> dict[str, Any]:
    size = {"n_features": data.n_features, "n_outputs": data.n_outputs}
    if choice.searched == "mlp":
        return size | {k: config[k] for k in ("width", "depth", "activation", "dropout")}
    return size | module_arguments(config)


def _info(study: Study, trial: Trial, problem: Problem) -> dict[str, Any]:
    return {
        "params": trial.params,
        "epochs": trial.best_epoch,
        "scoring": study.meta["scoring"],
        "positive": study.meta.get("positive"),
        "score": trial.score,
        "std_error": trial.std_error,
        "trials": len(study.trials),
        "rows": len(problem.source.X),
        "versions": {"gputune": __version__, "torch": torch.__version__},
    }
