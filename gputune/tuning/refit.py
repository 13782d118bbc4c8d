"""Refit: the best configuration of a study trains again on all rows and becomes the tuned model.

A member is one trial on one fold. A draw is a random number that a module uses, for example in
dropout. The solved logistic regression is solved to convergence and takes no training steps.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from gputune.data.dataset import Dataset, Rows
from gputune.data.encode import Statistics
from gputune.data.folds import all_rows
from gputune.data.source import Source, fingerprint, read_again, rows_difference
from gputune.data.table import Table
from gputune.data.target import TaskWord
from gputune.data.target_transform import is_known
from gputune.engine.backend import matrix_products
from gputune.engine.backends.selection import choose_backend
from gputune.engine.job import ProgressCallback
from gputune.ground.errors import DivergedError, InputError, per_interface
from gputune.ground.types import Config
from gputune.modules.construction import Builder
from gputune.modules.inspection import known_traits
from gputune.modules.pretrained import pretrained_of
from gputune.population.kinds import is_module
from gputune.population.outputs import in_mode
from gputune.population.population import Shape, arguments_text, by_numbers, module_arguments
from gputune.scoring.objective import Objective
from gputune.scoring.validation import EvaluationDraws, drawing_rows
from gputune.solver.solve import solve_all, solved_module
from gputune.spaces.distributions import space_from_json
from gputune.study.database import option_errors
from gputune.study.model import TunedModel
from gputune.study.model_files import sample_of_rows
from gputune.study.record import RECORD_FIELDS, lost_option
from gputune.study.study import Study, Trial
from gputune.tuning.choices import ModelChoice, recorded_model
from gputune.tuning.options import Options, RowOptions
from gputune.tuning.problem import Problem, make_problem
from gputune.tuning.record import SearchCall, machine_options_here, read_rows, recorded_options
from gputune.tuning.trainer import Trainer, unseen
from gputune.version import __version__


@dataclass(frozen=True)
class Access:
    """The rows and permissions that the user passes to a method which trains a study's trials
    again.

    The rows are X and y, or the study's own rows if X is None. With ``check=True``, rows that
    differ from the rows of the search raise InputError.
    """

    study: Study
    X: object = None
    y: object = None
    check: bool = True
    trust_code: bool = False
    called: str = "best_model"
    module: Builder | None = None

    def __str__(self) -> str:
        return f"{self.called}({'' if self.X is None else 'X, y'})"


@dataclass(frozen=True, eq=False)
class ReopenedSearch:
    """The search of a study, prepared to train its trials again.

    ``rows`` is the fingerprint (digest and size) of the rows that are available now.
    """

    study: Study
    problem: Problem
    rows: Config

    @property
    def options(self) -> Options:
        return self.problem.options

    @property
    def choice(self) -> ModelChoice:
        return self.problem.choice

    @property
    def objective(self) -> Objective | None:
        """The training objective of a module, with the loss by which the score ``neg_loss`` ranks
        trials."""
        objective = self.problem.objective
        space = self.study.record.arguments.space
        if objective is None:
            return None
        # A space with a custom object is not stored in a file. Its trials show the values.
        if space is not None:
            return objective.of_space(space_from_json(space))
        trained = []
        for trial in self.study.trials:
            trained.append({name: [value] for name, value in trial.params.items()})
        return objective.of_space(trained)

    def config(self, trial: Trial) -> Config:
        """Return the hyperparameters of a trial, with default values for missing keys and the
        scaling of numeric columns.

        With population based training, these are the hyperparameters at its best epoch.
        """
        return self._complete(trial.params)

    def schedule(self, trial: Trial) -> dict[int, Config]:
        """Return the complete configuration of a trial from each epoch on."""
        return {epoch: self._complete(params) for epoch, params in trial.schedule.items()}

    def _complete(self, params: Config) -> Config:
        return self.choice.complete(
            {"numbers": self.problem.numbers, **params}, self.options.training.schedule
        )

    def evaluation_draws(self, data: Dataset, trial: Trial) -> EvaluationDraws | None:
        """Return the settings for random numbers that a trial's modules use in predictions.

        Returns None if the modules use no random numbers there. The modules must have been trained
        in this process.
        """
        config = self.config(trial)
        data = data.of(config)
        traits = known_traits(self.choice.module_class, data).get(arguments_text(config))
        if traits is None or not traits.evaluation_draws:
            return None
        rows = data.n_rows
        if traits.alone:
            rows = drawing_rows(max(data.row_numbers, data.n_features, traits.widest))
        return EvaluationDraws(
            self.options.search.random_state, trial.best_epoch, rows, traits.host_draws
        )

    def note_on_draws(self, data: Dataset, trials: Sequence[Trial]) -> Config:
        """Return {"draws": True} for the ``info`` of a model that uses random numbers in
        predictions.

        For other models, return an empty dict.
        """
        draws = [self.evaluation_draws(data, trial) for trial in trials]
        return {"draws": True} if any(draws) else {}

    def train(
        self,
        data: Dataset,
        trials: Sequence[Trial],
        *,
        seed: int | None = None,
        progress: ProgressCallback = unseen,
    ) -> list[list[nn.Module]]:
        """Train each trial to its best epoch on the folds of the data, and return the trained
        modules.

        The result has one list per trial, with one module per fold. With ``n_ens``, this module is
        the ``Ensemble`` of the trial's networks on the fold. Raises DivergedError.
        """
        configs = list(map(self.config, trials))
        if self.choice.solved:
            members: list[list[nn.Module]] = [[] for _ in configs]
            for places in by_numbers(configs):
                group = [configs[place] for place in places]
                solution = solve_all(data.of(group[0]), group)
                for c, place in enumerate(places):
                    # Members are fold-major: member p = f * C + c is trial c on fold f.
                    numbers = range(c, data.n_folds * len(group), len(group))
                    members[place] = [solved_module(solution, number) for number in numbers]
        else:
            trainer = self._trainer(
                data, self.options.search.random_state if seed is None else seed
            ).with_features(configs)
            epochs = [trial.best_epoch for trial in trials]
            method = self.options.search.method
            with matrix_products(tf32=self.options.machine.tf32):
                module = method.retrain(trainer, configs[0], epochs[0])
                if module is not None:
                    members = [[module]]
                else:
                    if self.options.machine.backend == "auto":
                        trainer.take_code(configs, epochs)
                    schedules = [self.schedule(trial) for trial in trials]
                    members = trainer.train_members(schedules, epochs, progress)
        for trial, modules in zip(trials, members):
            if not all(_is_finite(module, solved=self.choice.solved) for module in modules):
                raise DivergedError(
                    f"Trial {trial.number} diverged when it was trained on all rows. Start a new "
                    "search with the next best configuration, or with a smaller lr."
                )
        return members

    def _trainer(self, data: Dataset, seed: int) -> Trainer:
        """Return a trainer for the data, with the options and the model of the search."""
        machine = self.options.machine
        backend = "eager"
        if not self.options.search.differentiates:
            word = machine.backend
            backend = choose_backend(word, data.device, data.dtype, self.choice.kind).name
        return self.problem.trainer(data, seed=seed, backend=backend)

    def dataset(self, folds: Sequence[Rows] | None, trials: Sequence[Trial]) -> Dataset:
        """Return the data of some folds, prepared as the first trial needs it, on the chosen
        device.

        ``folds=None`` means one fold with all rows.
        """
        folds = [all_rows(len(self.problem.source.X))] if folds is None else folds
        configs = list(map(self.config, trials))
        device = self.problem.device_choice(folds, configs).device
        return replace(self.problem, numbers=configs[0]["numbers"]).dataset(folds, device)

    def model(
        self,
        module: nn.Module,
        data: Dataset,
        spec: Config,
        info: Config,
        statistics: Statistics | None = None,
        rows: np.ndarray | None = None,
    ) -> TunedModel:
        """Combine a trained module with everything that predictions need, and return the tuned
        model.

        ``statistics=None`` takes the scaling statistics of the data. ``rows`` are the positions of
        the training rows; None means all rows.
        """
        target = self.problem.target
        record = self.study.record
        loss = self.objective
        # If the target was a Series, its name is the name of its column. DataFrames to predict may
        # still have this column.
        names = record.group_column, getattr(self.problem.source.y, "name", None)
        unread = [*self.options.rows.drop, *(name for name in names if isinstance(name, str))]
        info = {
            **info,
            "scoring": record.scoring,
            "positive": record.ranked_class,
            "loss": record.objective,
        }
        if loss is not None and loss.is_named and loss.fixed:
            info["loss_arguments"] = loss.fixed
        info |= {
            "trials": len(self.study.trials),
            "rows": self.rows["rows"],
            "fingerprint": self.rows,
            "versions": {"gputune": __version__, "torch": torch.__version__},
        }
        if unread:
            info["drop"] = unread
        X = self.problem.source.X
        y = target.values
        if rows is not None:
            X = X[torch.as_tensor(rows)] if isinstance(X, Tensor) else X.select(rows)
            y = y[rows]
        info["row_sample"] = sample_of_rows(self.problem.layout, X, y)
        return TunedModel(
            module=module,
            layout=self.problem.layout,
            task=target.task,
            classes=target.classes,
            target=target.name,
            statistics=data.statistics[0] if statistics is None else statistics,
            center=_unit(data.center),
            scale=_unit(data.scale),
            dtype=data.dtype,
            transform=data.transforms[0] if data.transforms else None,
            spec={**self.choice.spec, **spec},
            info=info,
        )

    def arguments(self, trial: Trial, data: Dataset) -> Config:
        """Return the constructor arguments of a trial's module, such as its width."""
        config = self.config(trial)
        size: Config = {"n_features": data.of(config).n_features, "n_outputs": data.n_outputs}
        if self.choice.searched == "mlp":
            keys = ("width", "depth", "activation", "dropout")
            return size | {key: config[key] for key in keys}
        pretrained = pretrained_of(self.choice.module_class)
        if pretrained is not None:
            shape = Shape.of(data)
            size |= pretrained.sizes(shape.inputs, shape.names)
        return size | module_arguments(config)

    def seeds(self, seeds: Sequence[int]) -> Config:
        """Return the seeds that a saved model stores to build its modules again.

        The result is an empty dict for built-in models.
        """
        return {"seeds": list(seeds)} if is_module(self.choice.kind) else {}

    def score(self, score: float, std_error: float) -> Config:
        """Return a score and its standard error for the ``info`` of a model.

        The result is an empty dict if the rows differ from the rows of the search.
        """
        if self.rows != self.study.record.fingerprint:
            return {}
        return {"score": score, "std_error": std_error}


def _is_finite(module: nn.Module, *, solved: bool) -> bool:
    """Return whether the parameters of a trained module are finite.

    The solver gives the intercept -inf to a class without training rows.
    """
    for name, parameter in module.named_parameters():
        is_intercept = solved and name.endswith("bias")
        wrong = parameter.isnan() if is_intercept else ~parameter.isfinite()
        if wrong.any():
            return False
    return True


def _unit(value: Tensor) -> float | np.ndarray:
    """Return the center or the scale of the target in the first fold, as a float or an array."""
    first = value[0].cpu()
    return float(first) if first.dim() == 0 else first.numpy()


def search_of(access: Access) -> ReopenedSearch:
    """Prepare a study's search to train its trials again on the rows of ``access``.

    Raises InputError if there are no rows, or if ``access`` does not allow different rows.
    """
    study = access.study
    is_own = access.X is None
    from_file = study.file if is_own and study.data is None else None
    with nullcontext() if from_file is None else option_errors(from_file):
        call = read_search(access)
    # The rows decide the number of classes: other rows may have two classes instead of three.
    has_classes = study.record.classes is not None
    task = cast(TaskWord, "classification" if has_classes else study.record.task)
    problem = make_problem(call.source, task, call.choice, call.options)
    # Rows that are still in memory are the study's own, so they need no new fingerprint.
    if is_own and study.data is not None:
        rows = dict(study.record.fingerprint)
    else:
        rows = fingerprint(call.source.X, problem.target)
    search = ReopenedSearch(study, problem, rows)
    if access.check and rows != study.record.fingerprint:
        raise _other_rows(search, access)
    return search


def read_search(access: Access) -> SearchCall:
    """Read the model, the rows and the options of a study's search from memory or from its file."""
    study = access.study
    record = access.study.record
    if study.data is not None:
        call: SearchCall = study.data
        if access.X is None:
            return call
        if call.options.training.sample_weight is not None:
            raise InputError(
                None,
                f"{access} cannot weight other rows, because the study used sample_weight",
                remedy="Leave X and y out.",
            )
        return replace(call, source=_source_of(access, call.choice, call.options.rows))
    _check_refittable(access)
    for name in record.lost:
        if RECORD_FIELDS[name].training or name == "method":
            raise lost_option(study.file, name)
    # The record stores class weights as text. Its arguments store the value itself.
    value = record.arguments.kept.get("class_weight")
    class_weight = {None: None, "'balanced'": "balanced"}.get(record.class_weight, value)
    missing = ""
    if record.sample_weight is not None:
        missing = "sample_weight, which this study used,"
    elif not is_known(record.target_transform):
        missing = "target_transform, which is your own object,"
    elif record.class_weight is not None and class_weight is None:
        missing = f"class_weight={record.class_weight}"
    if missing:
        raise InputError(
            None,
            f"{access.called}() cannot read {missing} from the study file",
            remedy="Call this method on the study that tune() returned, in the same process.",
        )
    options = recorded_options(record, **machine_options_here(record), class_weight=class_weight)
    choice = recorded_model(
        dict(record.spec),
        record.optimizer,
        script=record.arguments.script,
        module=access.module,
        trust_code=access.trust_code,
    )
    return SearchCall(choice, _source_of(access, choice, options.rows), options)


def _check_refittable(access: Access) -> None:
    """Raise InputError if a study holds scikit-learn estimators or a custom training loop, which
    gputune cannot train again."""
    record = access.study.record
    if record.face == "sklearn":
        kind = f"{record.method}, which searched scikit-learn estimators"
        remedy = "Its best_estimator_ is the model."
    elif record.face == "loop":
        kind = "search(), because its training loop is your own"
        remedy = "Call your objective with study.best_params."
    else:
        return
    raise InputError(None, f"{access.called}() cannot refit a study of {kind}", remedy=remedy)


def _source_of(access: Access, choice: ModelChoice, rows: RowOptions) -> Source:
    """Return the rows that the user passed, or read the study's own rows again.

    Raises InputError if the study's rows are not available.
    """
    if access.X is not None:
        source = read_rows(choice, rows, access.X, access.y)
        # The search did not read the groups as a feature either.
        groups = access.study.record.group_column
        if groups is not None and isinstance(source.X, Table) and groups in source.X.names:
            values = source.X.column(groups)
            source = replace(source, X=source.X.drop(groups), groups=values)
        return source
    origin = access.study.record.source
    if origin is None:
        raise InputError(
            None,
            f"{access} needs X and y, because the search had its data in memory, and the study "
            "file does not hold them",
        )
    try:
        return read_again(origin, module=choice.takes_arrays)
    except FileNotFoundError as error:
        raise InputError(
            None,
            f"{per_interface(str(access), access.called)} cannot read {origin['path']!r} again, "
            "because the file is gone",
            remedy=per_interface("Pass X and y.", "Put the file back."),
        ) from error


def refit_trial(search: ReopenedSearch, trial: Trial) -> TunedModel:
    """Train one trial on all rows, and return the result as a tuned model."""
    (model,) = refit_trials(search, [trial])
    return model


def refit_trials(search: ReopenedSearch, trials: Sequence[Trial]) -> list[TunedModel]:
    """Train several trials on all rows, and return one tuned model for each trial.

    Trials that read the same columns train together.
    """
    groups: dict[object, list[int]] = {}
    for place, trial in enumerate(trials):
        groups.setdefault(search.config(trial)["numbers"], []).append(place)
    models: dict[int, TunedModel] = {}
    for places in groups.values():
        group = [trials[place] for place in places]
        data = search.dataset(None, group)
        for place, (module,) in zip(places, search.train(data, group)):
            models[place] = _tuned_model(search, data, trials[place], module)
    return [models[place] for place in range(len(trials))]


def _tuned_model(
    search: ReopenedSearch, data: Dataset, trial: Trial, module: nn.Module
) -> TunedModel:
    """Return the tuned model of a trial that was trained on all rows."""
    info = {
        "params": trial.params,
        "epochs": trial.best_epoch,
        **search.score(trial.score, trial.std_error),
        **search.note_on_draws(data, [trial]),
    }
    arguments = search.arguments(trial, data)
    n_networks = search.options.training.n_ens
    spec: Config = {"kwargs": arguments}
    if n_networks > 1:
        spec["ensemble"] = [arguments] * n_networks
    seeds = search.seeds([search.options.search.random_state] * n_networks)
    return search.model(in_mode(module, training=False), data, spec | seeds, info)


def _other_rows(search: ReopenedSearch, access: Access) -> InputError:
    """Return the error for rows that differ from the rows of the search.

    The message says how they differ and what to do. Only best_model offers to train on other rows.
    """
    record = search.study.record
    origin = record.source
    difference = rows_difference(record.fingerprint, search.rows)
    if origin is not None and access.X is None:
        fault = f"The rows of {origin['path']!r} have changed since the search ({difference})"
        remedy = "Restore the file."
    else:
        fault = f"{access}: these are not the rows of the search ({difference})"
        remedy = "Pass the rows of the search."
        if origin is not None:
            remedy = (
                "Pass the rows of the search, or leave X and y out to read "
                f"{origin['path']!r} again."
            )
    if access.called == "best_model":
        remedy += " With check=False the model trains on these rows, and has no score."
    return InputError(None, fault, remedy=remedy)
