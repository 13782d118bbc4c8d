"""Prepare the data, the training loss and the scoring of a problem for its first trials."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gputune.data.dataset import Dataset, Rows
from gputune.engine.choice import DeviceChoice
from gputune.ground.errors import InputError, option
from gputune.ground.text import count
from gputune.ground.types import KEPT_BYTES, Config
from gputune.models import RealMLP
from gputune.optimizers.classes import check_optimizer
from gputune.scoring.metrics import check_folds
from gputune.scoring.objective import make_objective
from gputune.scoring.scoring import Scoring
from gputune.spaces.distributions import CheckedSpace
from gputune.spaces.random import draw
from gputune.study.store import Candidate, Store
from gputune.tuning.choices import ModelChoice
from gputune.tuning.options import Options
from gputune.tuning.problem import Problem
from gputune.tuning.progress import Progress


def check_networks(choice: ModelChoice, options: Options) -> None:
    """Raise InputError if the trials of a search cannot train several networks (``n_ens``)."""
    n_ens = options.training.n_ens
    if n_ens == 1:
        return
    remedy = f"Leave {option('n_ens')} out."
    if choice.solved:
        rule = (
            f"has no effect for {option('model', choice.name)}, because every solved logistic "
            "regression is the same"
        )
    elif choice.searched != "mlp" and choice.module_class is not RealMLP:
        rule = (
            "supports only the models mlp and realmlp, because the mean prediction of other "
            f"modules may have no meaning, but the model is {choice.name}"
        )
        remedy = f"{remedy} Several trials can be averaged with study.ensemble()."
    elif options.rows.task == "custom":
        rule = f"needs predictions with a mean, but {option('task', 'custom')} may have any outputs"
    elif options.search.differentiates:
        rule = (
            "is the number of networks whose predictions are averaged, but "
            f"{option('method', 'hypergradient')} differentiates the loss of each network"
        )
    else:
        return
    raise InputError(option("n_ens", n_ens), rule, remedy=remedy)


def check_rows_of_networks(n_ens: int, folds: Sequence[Rows]) -> None:
    """Raise InputError if a fold has fewer training rows than a trial has networks."""
    fewest = min(len(train) for train, _ in folds)
    if fewest < n_ens:
        raise InputError(
            option("n_ens", n_ens),
            "must be at most the number of training rows of a fold, so that each network can train "
            f"in its own order of the rows, but a fold has only {count(fewest, 'training row')}",
            remedy=f"Pass {option('n_ens', fewest)} or less.",
        )


@dataclass(frozen=True, eq=False)
class Setup:
    """A search that is ready to train: model, space, rows, trials and scoring."""

    problem: Problem
    space: CheckedSpace
    folds: Sequence[Rows]
    trials: Sequence[Candidate]
    configs: Sequence[Config]
    data: Dataset
    scoring: Scoring
    first: Config
    """The hyperparameters of the first trial.

    If an Optuna sampler proposes the trials later, they are a random sample.
    """


def set_up(
    problem: Problem,
    space: CheckedSpace,
    folds: Sequence[Rows],
    trials: Sequence[Candidate],
    configs: Sequence[Config],
    progress: Progress,
    store: Store | None = None,
) -> Setup:
    """Prepare the data, the training loss and the scoring for the first trials of a problem.

    ``configs`` are the complete configurations of ``trials``. ``store`` is the study file of a
    search that continues. Raises InputError.
    """
    encoded = _dataset(problem, folds, configs, progress)
    first = trials[0].params if trials else draw(space, 1, problem.options.search.random_state)[0]
    trained_problem, data = _with_objective(problem, space, encoded, first)
    scoring = _scoring(trained_problem, data, store)
    check_folds(scoring, data)
    _check_configs(trained_problem, trials, configs)
    return Setup(trained_problem, space, folds, trials, configs, data, scoring, first)


def _dataset(
    problem: Problem, folds: Sequence[Rows], configs: Sequence[Config], progress: Progress
) -> Dataset:
    """Return the data of all folds on the chosen device.

    A note tells the user if the device is unexpected.
    """
    options = problem.options
    # Data for a cluster stays in main memory.
    place = DeviceChoice(torch.device("cpu"))
    if options.machine.cluster is None:
        # A sampler draws more configurations of this kind later.
        repeats = max(1.0, options.search.n_trials / max(1, len(configs)))
        place = problem.device_choice(folds, configs, repeats=repeats)
    if place.why:
        gpu = option("device", "cuda")
        progress.say(f"note: trials train on the CPU ({gpu} takes the GPU): {place.why}")
    return problem.with_scorer_rows(problem.dataset(folds, place.device))


def _with_objective(
    problem: Problem, space: CheckedSpace, data: Dataset, first: Config
) -> tuple[Problem, Dataset]:
    """Return the problem and the data with the final training loss.

    The default loss depends on the module's outputs, so gputune runs the module on the data once.
    """
    loss = problem.default_loss(data, first)
    if loss:
        objective = make_objective(loss, None, problem.options.training.augment, data.task)
        options = problem.options.changed(loss=loss)
        problem = replace(problem, options=options, objective=objective)
        data = data.with_one_logit()
    if problem.objective is not None:
        problem = replace(problem, objective=problem.objective.of_space(space))
    return problem, data


def _scoring(problem: Problem, data: Dataset, store: Store | None) -> Scoring:
    """Return the scoring of the search, with a limit on the bytes of stored predictions."""
    options = problem.options
    # A hypergradient search has no best epoch, and outputs for a custom target have no mean.
    has_best = (
        options.training.epoch == "best"
        and not options.search.differentiates
        and data.task != "custom"
    )
    kept_bytes = KEPT_BYTES if options.machine.keep_predictions and has_best else 0
    is_resumed = store is not None and "scoring" in store.meta
    scoring = problem.scoring(_earlier_scoring(problem, store), is_resumed=is_resumed)
    return replace(scoring, kept_bytes=kept_bytes)


def _check_configs(
    problem: Problem, trials: Sequence[Candidate], configs: Sequence[Config]
) -> None:
    """Raise InputError if a configuration does not fit the training loss or the optimizer."""
    is_stacked = problem.options.machine.backend == "stacked"
    for trial, config in zip(trials, configs):
        if problem.objective is not None:
            problem.objective.check(trial.params)
        check_optimizer(config, problem.choice.searched, stacked=is_stacked)


def _earlier_scoring(problem: Problem, store: Store | None) -> str | None:
    """Return "r2" if the search is a regression and continues a study that R2 ranks, else None.

    Earlier versions ranked every regression by R2 by default. A study of another task is refused
    later as a different search.
    """
    if store is None or problem.target.task != "regression":
        return None
    return "r2" if store.meta.get("scoring") == "r2" else None
