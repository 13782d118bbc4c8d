"""Training of all configurations and folds of network estimators together, and their predictions.

A recipe describes the training of one configuration. A member is one trial (candidate) on one fold.
A chunk is a set of members with tensors of one shape, which train together.
"""

import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from torch.nn import functional

from gputune.data.arrays import ArrayLayout, Arrays
from gputune.data.dataset import Dataset
from gputune.engine.backends.selection import choose_backend
from gputune.engine.choice import Workload, device_for
from gputune.engine.job import Failure, Job
from gputune.engine.plan import Plan
from gputune.engine.stop import Stop, entry
from gputune.engine.train import BegunChunk
from gputune.ground.device import is_small_pass, on_one_thread
from gputune.ground.errors import InputError, Interface, Reference, Verbatim, option
from gputune.ground.seeding import prediction_draws
from gputune.ground.text import nearest
from gputune.ground.types import Config
from gputune.hypergradients.chunk import HypergradientJob
from gputune.methods.descent import SlopeMode
from gputune.modules.construction import Builder, name_of, parameters_of, what_to_pass
from gputune.modules.inspection import returns_one_logit, traits_of
from gputune.modules.module_trial import ModuleTrial, are_probabilities
from gputune.modules.own_training import may_train_itself, step_of_class
from gputune.population.outputs import call_module, first_output
from gputune.population.population import Population
from gputune.population.state import State
from gputune.scoring.objective import Objective
from gputune.sklearn.base import FLOATS, FusedEstimator
from gputune.sklearn.dataset import CheckedRows, FoldGroup, as_dense, as_tensor, make_dataset
from gputune.sklearn.recipe import (
    FitOptions,
    FoldTrial,
    MemberJob,
    MemberSlope,
    Recipe,
    TrainedMember,
    TrainingLoss,
    likelihood_loss,
)
from gputune.study.code import is_builder
from gputune.tuning.trainer import Trainer

Members = dict[FoldTrial, TrainedMember | Exception]
"""The result of each (fold, trial): a trained member or an error.

The errors are DivergedError, InputError for a module that cannot be trained, and TimeoutError.
"""


@dataclass(frozen=True, eq=False)
class RecipeBatch:
    """A batch of training runs (recipes) that can train together, with their folds and data.

    The recipes differ only in their configurations, and the folds have the same classes.
    """

    trials: list[int]
    recipes: list[Recipe]
    configs: list[Config]
    folds: FoldGroup
    data: Dataset
    objective: Objective | None

    def places(self, chunk: Population) -> list[FoldTrial]:
        """Return the (fold, trial) pair of each member of a chunk, in the order of the members."""
        return [(fold, self.trials[i]) for fold in self.folds.numbers for i in chunk.index]

    def trainer(self, training: FitOptions) -> Trainer:
        """Return the trainer for the batch, with the eager backend."""
        recipe = self.recipes[0]
        return Trainer(
            data=self.data,
            kind=recipe.kind,
            module_class=recipe.module,
            objective=self.objective,
            seed=recipe.seed,
            horizon=recipe.horizon or recipe.epochs,
            scoring=None if recipe.patience is None else TrainingLoss(),
            workers=training.workers,
            stop=Stop(training.deadline),
        )


def batches(recipes: Mapping[int, Recipe], folds: FoldGroup) -> Iterator[RecipeBatch]:
    """Group recipes (descriptions of training runs) that can train together.

    Yields the groups with their folds and data.
    """
    rows = folds.rows
    families = defaultdict[Hashable, list[int]](list)
    for trial, recipe in recipes.items():
        families[recipe.family].append(trial)
    for trials in families.values():
        family = [recipes[trial] for trial in trials]
        first = family[0]
        configs_by_fold = []
        decays = []
        for train in folds.trains:
            weight = rows.weight(train)
            configs = [recipe.config_for(len(train), weight) for recipe in family]
            configs_by_fold.append(configs)
            # A weight decay that comes from alpha depends on the rows of the fold.
            decays.append(tuple(config.get("weight_decay") for config in configs))
        work = Workload(
            kind=first.kind,
            configs=configs_by_fold[0],
            rows=list(map(len, folds.trains)),
            n_features=rows.X.parts[0][0].numel(),
            n_outputs=1 if rows.classes is None else len(rows.classes),
            # A training that stops at rungs stays on the device where it began, the CPU, however
            # few epochs are left.
            epochs=first.epochs if first.horizon is None else 0,
            dtype=rows.X.parts[0].dtype,
        )
        x = rows.inputs(device_for(first.device, work).device)
        # A custom loss receives unscaled numbers.
        has_custom_loss = first.step is not None or not isinstance(first.loss, str | None)
        for group in folds.split(decays):
            configs = configs_by_fold[folds.numbers.index(group.numbers[0])]
            data = make_dataset(
                group,
                x,
                standardise=not has_custom_loss,
                numbers=first.numbers,
                watched=first.patience is not None,
            )
            objective = _objective(first, configs[0], data)
            if objective is not None and objective.one_logit:
                data = data.with_one_logit()
            yield RecipeBatch(trials, family, configs, group, data, objective)


def _objective(recipe: Recipe, config: Config, data: Dataset) -> Objective | None:
    """Return the training objective (loss and training step) of a recipe.

    If a module without a chosen loss returns one logit for two classes, the loss is the binary
    cross-entropy. If a module without a chosen loss, or with ``nn.NLLLoss``, returns probabilities,
    the loss takes their logarithms, as in skorch.
    """
    builder = recipe.module
    if builder is not None and recipe.step is None:
        has_classes = data.task in ("binary", "multiclass")
        may_take_logarithms = has_classes and (recipe.loss is None or _is_plain_nll(recipe.loss))
        # The later check of the module raises this error again, separately for each configuration.
        with suppress(InputError):
            if recipe.loss is None and returns_one_logit(builder, config, data):
                recipe = replace(recipe, loss="bce")
            elif may_take_logarithms and _returns_probabilities(builder, config, data):
                recipe = replace(recipe, loss=likelihood_loss)
    return recipe.objective(data.task)


def _returns_probabilities(builder: Builder, config: Config, data: Dataset) -> bool:
    """Return whether a module returns the probability of each class, (n, K), as a softmax does.

    Raises InputError for a module that cannot be built or that fails.
    """
    trial = ModuleTrial(builder, config, data.of(config))
    return are_probabilities(trial.forward(trial.inputs, training=False))


def _is_plain_nll(loss: object) -> bool:
    """Return whether a loss is the negative log-likelihood of torch.nn, without settings."""
    if loss is nn.NLLLoss or loss is functional.nll_loss:
        return True
    if not isinstance(loss, nn.NLLLoss) or type(loss) is not nn.NLLLoss:
        return False
    return loss.weight is None and loss.ignore_index < 0 and loss.reduction == "mean"


@entry
def fit_members(recipes: Mapping[int, Recipe], folds: FoldGroup, training: FitOptions) -> Members:
    """Train every configuration on the training rows of every fold, as many together as shapes
    allow.

    The result of a member depends only on its recipe and its rows, not on the members that train
    with it.
    """
    members: Members = {}
    fitting = {}
    for trial, recipe in recipes.items():
        try:
            recipe.objective(folds.rows.task)
        except InputError as error:  # the loss does not fit the target
            error = with_estimator_names(error)
            members |= {(fold, trial): error for fold in folds.numbers}
            continue
        if training.horizon is not None:
            seed, states = training.states.get(trial, (recipe.seed, {}))
            horizon = training.horizon
            recipe = replace(recipe, horizon=horizon, seed=seed, states=states, patience=None)
        fitting[trial] = recipe if training.patient else replace(recipe, patience=None)
    for batch in batches(fitting, folds):
        members |= _fit_batch(batch, training)
    return members


class EstimatorNames(Interface):
    """Names of arguments in messages for users of the scikit-learn estimators, such as
    ``criterion`` for ``loss``."""

    name = "sklearn"

    def argument(self, reference: Reference) -> str:
        """Return an argument as users of an estimator write it, such as ``criterion=...``."""
        if reference.name == "space" and reference.keys:
            return reference.keys[0].strip("'\"")
        name = reference.name
        if name.startswith("loss"):  # also loss__delta
            name = name.replace("loss", "criterion", 1)
        elif name == "model":
            name = "module"
        return str(replace(reference, name=name))


def with_estimator_names(error: InputError) -> InputError:
    """Return a copy of an error with the parameter names of the scikit-learn estimators in its
    message."""
    return error.shown_by(EstimatorNames())


MODULE_ARGUMENTS = "Arguments of the module are written module__*."


def module_builder(module: object) -> Builder:
    """Return the user's module class or function. Raises InputError for anything else."""
    if isinstance(module, nn.Module):
        raise InputError("module", what_to_pass(module), remedy=MODULE_ARGUMENTS)
    if not is_builder(module):
        raise InputError(
            "module",
            "must be a torch.nn.Module class, or a function or functools.partial that returns one",
            got=module,
        )
    return module


def hint_for_parameter(name: str, parameters: Iterable[str], module: object) -> str:
    """Return advice for an unknown parameter of an estimator of the user's module.

    Args:
        name: the unknown parameter.
        parameters: the parameters of the estimator.
        module: the user's module class or function.
    """
    parameters = list(parameters)
    arguments = parameters_of(module) if is_builder(module) else {}
    if name in arguments:
        return f"Write the argument of the module as module__{name}."
    near = nearest(name, [*parameters, *arguments])
    prefix = "" if near in parameters else "module__"
    return MODULE_ARGUMENTS if near is None else f"Did you mean '{prefix}{near}'?"


def _fit_batch(batch: RecipeBatch, training: FitOptions) -> Members:
    """Train the configurations of one batch on its folds.

    Returns a trained member or an error for each (fold, trial).
    """
    recipe = batch.recipes[0]
    data = batch.data
    trainer = batch.trainer(training)
    backend = choose_backend("auto", data.device, data.dtype, trainer.kind).name
    trainer = replace(trainer, backend=backend)
    members: Members = {}
    populations = []
    parameters = 0
    for population in trainer.groups(batch.configs):
        try:
            parameters = max(parameters, _check_module(batch, population.configs[0]))
            populations.append(population)
        except InputError as error:
            members |= dict.fromkeys(batch.places(population), with_estimator_names(error))
    if not populations:
        return members
    plan = trainer.plan(populations, epochs=recipe.epochs - recipe.begin, parameters=parameters)
    chunks = plan.chunks
    if recipe.begin:
        chunks = tuple(_resumed_chunk(chunk, batch) for chunk in chunks)
    plan = replace(plan, chunks=chunks)
    patiences = {i: r.patience for i, r in enumerate(batch.recipes) if r.patience is not None}
    job = trainer.job(
        MemberJob, epochs=recipe.epochs, keeps_state=recipe.horizon is not None, patiences=patiences
    )
    # Members have this error until their training replaces it below.
    late = TimeoutError("this fit had not finished at the timeout. Pass a longer timeout.")
    for chunk in chunks:
        members |= dict.fromkeys(batch.places(chunk), late)
    for outcome in _outcomes(trainer, job, plan):
        chunk = next(chunk for chunk in chunks if outcome.index[0] in chunk.index)
        first = chunk.index.index(outcome.index[0])
        chunk = chunk.part(first, first + len(outcome.index))  # memory may have held only a part
        members |= zip(batch.places(chunk), job.members(data, chunk, outcome, batch.folds.classes))
    return members


def _outcomes(trainer: Trainer, job: Job, plan: Plan) -> Iterator[Any]:
    """Train the chunks of a plan, with at most torch's number of threads, and yield their results.

    Raises the error of a trial that cannot be trained.
    """
    plan = replace(plan, threads=min(plan.threads, torch.get_num_threads()))
    for outcome in trainer.train(job, plan):
        if isinstance(outcome, Failure):
            raise outcome.error()
        yield outcome


def _check_module(batch: RecipeBatch, config: Config) -> int:
    """Check the user's module, and return its number of parameters (0 for a built-in model).

    Raises InputError if the module cannot be trained.
    """
    builder = batch.recipes[0].module
    data = batch.data
    if builder is None:
        return 0
    _check_loss(batch.recipes[0], config, data)
    traits = traits_of(builder, config, data, objective=batch.objective)
    takes_probabilities = batch.objective is not None and batch.objective.loss is likelihood_loss
    if traits.probabilities and not takes_probabilities and data.task in ("binary", "multiclass"):
        raise _needs_logits(builder)
    return traits.parameters


def _check_loss(recipe: Recipe, config: Config, data: Dataset) -> None:
    """Raise InputError if a function returns a module that defines its own training step.

    The estimator would ignore the step, because it reads the step from a class.
    """
    builder = recipe.module
    is_default = recipe.step is None and recipe.loss is None
    if builder is None or not is_default or not may_train_itself(builder):
        return
    kind = type(ModuleTrial(builder, config, data.of(config)).module)
    if step_of_class(kind) is not None:
        raise InputError(
            "model",
            f"returns a {kind.__name__}, whose training_step an estimator uses only if it receives "
            "the class",
            got=Verbatim(name_of(builder)),
            remedy=f"Pass {kind.__name__} or functools.partial({kind.__name__}, ...), or pass "
            f"{option('loss')} for another loss.",
        )


def _needs_logits(builder: Builder) -> InputError:
    """Return the error for a module that returns probabilities instead of logits."""
    return InputError(
        "model",
        f"must return logits, but {name_of(builder)} returns probabilities",
        remedy="Leave out the softmax at its end.",
    )


def training_slopes(
    recipes: Mapping[int, Recipe],
    folds: FoldGroup,
    names: Sequence[str],
    mode: SlopeMode,
    training: FitOptions,
) -> dict[FoldTrial, MemberSlope]:
    """Return the derivatives of the validation loss for each recipe that trains with minibatches.

    The result does not contain recipes that the deadline cuts short.
    """
    member_slopes: dict[FoldTrial, MemberSlope] = {}
    for batch in batches(recipes, folds):
        trainer = batch.trainer(training)
        module = batch.recipes[0].module
        if module is not None and batch.objective and batch.objective.loss is likelihood_loss:
            raise with_estimator_names(_needs_logits(module))
        job = trainer.job(
            HypergradientJob,
            epochs=batch.recipes[0].epochs,
            hyperparameters=tuple(names),
            mode=mode,
        )
        try:
            plan, job = trainer.plan_differentiated(batch.configs, job)
        except InputError as error:
            raise with_estimator_names(error) from error
        for outcome in _outcomes(trainer, job, plan):
            if outcome.losses is None or outcome.slopes is None or outcome.ratios is None:
                continue
            for (c, i), (f, fold) in itertools.product(
                enumerate(outcome.index), enumerate(batch.folds.numbers)
            ):
                slopes = {name: table[c, f].item() for name, table in outcome.slopes.items()}
                # decay = alpha / weight, so the slope in alpha is the slope in the decay * decay /
                # alpha.
                alpha = batch.recipes[i].alpha
                if alpha is not None and "weight_decay" in slopes:
                    slopes["weight_decay"] *= batch.configs[i]["weight_decay"] / alpha
                loss = outcome.losses[c, f].item()
                ratio = outcome.ratios[c, f].item()
                member_slopes[fold, batch.trials[i]] = (loss, *slopes.values(), ratio)
    return member_slopes


def _resumed_chunk(chunk: Population, batch: RecipeBatch) -> BegunChunk:
    """Return a chunk with the stored states of its members, from which their training continues."""
    folds = batch.folds.numbers
    state = State.stack([batch.recipes[i].states[fold] for i in chunk.index for fold in folds])
    # (C * F, 1, N) -> (C, F, N)
    shape = (len(chunk.index), len(folds), -1)
    state = replace(state, buffers=tuple(buffer.view(shape) for buffer in state.buffers))
    return BegunChunk(chunk.kind, chunk.index, chunk.configs, state)


ROWS = 8192
NUMBERS = 1 << 20
"""Limits of a batch of rows in predictions: the count of rows, and of tensor elements in these
rows."""


class TrainedEstimator(FusedEstimator):
    """Base class of estimators that train a network with minibatches.

    After ``fit``, ``module_`` is the trained network.
    """

    _fit_recipes = staticmethod(fit_members)
    _slopes = staticmethod(training_slopes)
    _epochs: ClassVar[str]
    """The name of the estimator parameter for the number of epochs."""

    module_: nn.Module
    n_iter_: int

    def _set_fitted(self, fitted: TrainedMember, rows: CheckedRows) -> None:
        self.module_ = fitted.module()
        self.n_iter_ = fitted.epochs
        self._layout = None if rows.is_table else ArrayLayout.of(rows.X)
        self._scaling = fitted.scaling
        self._draws = fitted.draws
        self._has_probabilities = fitted.has_probabilities

    def _outputs(self, X: object) -> Tensor:
        """Return the outputs of the trained module for rows X, (n, K) float64 on the CPU.

        If the module returns probabilities, the result is their logarithms, which are logits.
        """
        check_is_fitted(self)
        X = as_dense(X)
        if self._layout is None:
            table = validate_data(self, X, dtype=FLOATS, order="C", reset=False)
            arrays = Arrays((as_tensor(table),))
        else:
            arrays = self._layout.raw(X)
        self.module_.eval()  # the user may have continued its training
        weight = next(self.module_.parameters())
        rows = max(1, min(ROWS, NUMBERS // sum(part[0].numel() for part in arrays.parts)))
        blocks = []
        draws = getattr(self, "_draws", False)  # missing in pickles of older versions
        is_small = is_small_pass(self.module_, [part[:rows] for part in arrays.parts])
        seeded = prediction_draws(weight.device, draws=draws)
        # not inference_mode: TorchScript fails on its tensors
        with seeded, torch.no_grad(), on_one_thread(if_small=is_small):
            for parts in zip(*(torch.split(part, rows) for part in arrays.parts)):
                inputs = []
                for x, scaling in zip(parts, self._scaling):
                    if scaling is not None:
                        x = scaling(x[None], slice(0, 1))[0]
                    # Floats get the precision of the module's weights. They are copies, because
                    # the module may write into its inputs. Without a scaling these would be the
                    # caller's own rows.
                    dtype = weight.dtype if x.is_floating_point() else x.dtype
                    inputs.append(x.to(weight.device, dtype, copy=True))
                outputs = first_output(call_module(self.module_, inputs, arrays.names))
                blocks.append(outputs.double().cpu())
        outputs = torch.cat(blocks)
        if getattr(self, "_has_probabilities", False):  # missing in pickles of older versions
            outputs = outputs.log()
        return outputs if outputs.dim() > 1 else outputs[:, None]
