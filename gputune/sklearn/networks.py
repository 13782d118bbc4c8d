"""Estimators that are networks: how all configurations train in all folds at once, and how one of them predicts."""

import re
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from gputune.data.arrays import ArrayLayout, Arrays
from gputune.data.dataset import Dataset
from gputune.engine.backend import choose_backend
from gputune.engine.choice import Work, device_for
from gputune.engine.job import Failure
from gputune.engine.stop import Stop, entry
from gputune.engine.train import BegunChunk, State
from gputune.errors import InputError
from gputune.modules.construction import name_of
from gputune.modules.inspection import returns_one_logit, traits_of
from gputune.population.population import Population, call_module, first_output, two_logits
from gputune.scoring.objective import Objective
from gputune.sklearn.base import FLOATS, FusedEstimator
from gputune.sklearn.dataset import FoldGroup, Rows, as_dense, as_tensor, make_dataset
from gputune.sklearn.member import Member, MemberJob, Members, Place, TrainingLoss, Weights, members_of
from gputune.sklearn.recipe import Recipe, Training
from gputune.tuning.trainer import Trainer
from gputune.types import Config


@dataclass(frozen=True, eq=False)
class Batch:
    """Recipes, of the ``trials``, that have all but their configurations in common, on folds of the same classes."""

    trials: list[int]
    recipes: list[Recipe]
    configs: list[Config]
    folds: FoldGroup
    data: Dataset
    objective: Objective | None

    def places(self, chunk: Population) -> list[Place]:
        """Return the (fold, trial) of each member of a chunk."""
        return [(fold, self.trials[i]) for fold in self.folds.numbers for i in chunk.index]

    def trainer(self, training: Training) -> Trainer:
        """Return what trains them, eagerly."""
        recipe = self.recipes[0]
        return Trainer(
            data=self.data,
            kind=recipe.kind,
            module_class=recipe.module,
            objective=self.objective,
            seed=recipe.seed,
            horizon=recipe.horizon,
            scoring=None if recipe.patience is None else TrainingLoss(),
            workers=training.workers,
            stop=Stop(training.deadline),
        )


def batches(recipes: Mapping[int, Recipe], folds: FoldGroup) -> Iterator[Batch]:
    """Yield what trains together of recipes, by trial."""
    rows, families = folds.rows, defaultdict[Hashable, list[int]](list)
    for trial, recipe in recipes.items():
        families[recipe.family].append(trial)
    for trials in families.values():
        alike = [recipes[trial] for trial in trials]
        first = alike[0]
        by_fold = [[r.config_for(len(train), rows.weight(train)) for r in alike] for train in folds.trains]
        x = rows.inputs(_device(first, by_fold[0], folds))
        # A weight decay that comes from alpha is that of a fold's own rows.
        decays = [tuple(config.get("weight_decay") for config in configs) for configs in by_fold]
        for group in folds.split(decays):
            configs = by_fold[folds.numbers.index(group.numbers[0])]
            # A loss of the user's own takes numbers as they are.
            standardise = first.step is None and (first.loss is None or isinstance(first.loss, str))
            watched = first.patience is not None
            data = make_dataset(group, x, standardise=standardise, numbers=first.numbers, watched=watched)
            objective = _objective(first, configs[0], data)
            if objective is not None and objective.one_logit:
                data = data.with_one_logit()
            yield Batch(trials, alike, configs, group, data, objective)


def _device(first: Recipe, configs: Sequence[Config], folds: FoldGroup) -> torch.device:
    """Return the device on which recipes that train together do so, of which one is the first."""
    rows, x = folds.rows, folds.rows.X.parts[0]
    work = Work(
        kind=first.kind,
        configs=configs,
        rows=[len(train) for train in folds.trains],
        n_features=x[0].numel(),
        n_outputs=1 if rows.classes is None else len(rows.classes),
        # A training that stops at rungs stays where it was begun, however little is left of it: on the CPU.
        epochs=first.epochs if first.state is None else 0,
        dtype=x.dtype,
    )
    return device_for(first.device, work).device


def _objective(recipe: Recipe, config: Config, data: Dataset) -> Objective | None:
    """Return what recipes are trained on: of a module that returns one logit of two classes the binary cross-entropy.

    None for a built-in model.
    """
    builder = recipe.module
    if builder is None:
        return None
    with suppress(InputError):  # which the check of the module raises again, for each configuration its own
        if recipe.loss is None and recipe.step is None and returns_one_logit(builder, config, data):
            recipe = replace(recipe, loss="bce")
    return recipe.objective(data.task)


@entry
def fit_members(recipes: Mapping[int, Recipe], folds: FoldGroup, training: Training) -> Members:
    """Train every recipe, by trial, on the training rows of every fold, as one tensor program as far as shapes allow.

    A member's numbers depend on its recipe and on its rows, not on those that train with it.
    """
    members: Members = {}
    fitting = {}
    for trial, recipe in recipes.items():
        try:
            recipe.objective(folds.rows.task)
        except InputError as error:  # a loss that does not fit the target
            members |= dict.fromkeys([(fold, trial) for fold in folds.numbers], in_skorchs_words(error))
            continue
        if trial in training.states:
            recipe = recipe.resumed(training.states[trial])
        fitting[trial] = recipe if training.patient else replace(recipe, patience=None)
    for batch in batches(fitting, folds):
        members |= _fit_batch(batch, training)
    return members


_WORDS = {
    "model: ": "module: ",
    "space: ": "",
    "loss__": "criterion__",
    "loss=": "criterion=",
    "loss must": "criterion must",
}


def in_skorchs_words(error: InputError) -> InputError:
    """Return an error of the engine's with the parameters as this face calls them."""
    text = str(error)
    for word, skorchs in _WORDS.items():
        text = text.replace(word, skorchs, 1)
    text = re.sub(r"put '(module__\w+)' into the space \(some values, or one\)", r"pass \1=...", text)
    return InputError(text.replace("values of the space", "values"))


def _fit_batch(batch: Batch, training: Training) -> Members:
    recipe, data, trainer = batch.recipes[0], batch.data, batch.trainer(training)
    trainer = replace(trainer, backend=choose_backend("auto", data.device, data.dtype, trainer.kind)[0])
    members: Members = {}
    populations, parameters = [], 0
    for population in trainer.groups(batch.configs):
        try:
            parameters = max(parameters, _check_module(trainer, population))
            populations.append(population)
        except InputError as error:
            members |= dict.fromkeys(batch.places(population), in_skorchs_words(error))
    if not populations:
        return members
    plan = trainer.plan(populations, epochs=recipe.epochs - recipe.begin, parameters=parameters)
    chunks: Sequence[Population] = plan.chunks
    if recipe.begin:
        chunks = [_resumed_chunk(chunk, batch) for chunk in chunks]
    plan = replace(plan, chunks=tuple(chunks), threads=min(plan.threads, torch.get_num_threads()))
    patiences = {i: r.patience for i, r in enumerate(batch.recipes) if r.patience is not None}
    job = trainer.job(MemberJob, epochs=recipe.epochs, keeps_state=recipe.state is not None, patiences=patiences)
    late = TimeoutError("the time was over before this fit had ended; give it more.")
    for chunk in chunks:
        members |= dict.fromkeys(batch.places(chunk), late)
    for outcome in trainer.train(job, plan):
        if isinstance(outcome, Failure):
            raise outcome.error()
        assert isinstance(outcome, Weights)
        whole = next(chunk for chunk in chunks if outcome.index[0] in chunk.index)
        at = whole.index.index(outcome.index[0])
        chunk = whole.part(at, at + len(outcome.index))  # memory may have held a part of it only
        members |= zip(batch.places(chunk), members_of(job, data, chunk, outcome, batch.folds.classes))
    return members


def _resumed_chunk(chunk: Population, batch: Batch) -> BegunChunk:
    """Return the chunk with the states of its members, from which they train on."""
    states = [state for i in chunk.index if (state := batch.recipes[i].state) is not None]
    members = [state.buffers[fold] for state in states for fold in batch.folds.numbers]
    buffers = tuple(torch.stack(buffers).view(len(states), len(batch.folds.numbers), -1) for buffers in zip(*members))
    return BegunChunk(chunk.kind, chunk.index, chunk.configs, State(batch.recipes[0].begin, buffers))


def _check_module(trainer: Trainer, population: Population) -> int:
    """Return the size of a user's module, which is tried first; 0 for a built-in model."""
    builder, data = trainer.module_class, trainer.data
    if builder is None:
        return 0
    traits = traits_of(builder, population.configs[0], data, objective=trainer.objective)
    if traits.probabilities and data.task in ("binary", "multiclass"):
        raise InputError(
            f"model: {name_of(builder)} returns probabilities, and its outputs are taken for logits; leave out the "
            "softmax at its end."
        )
    return traits.parameters


ROWS = 8192
"""Rows that a module is given at a time when it predicts, fewer where they are large."""

_NUMBERS = 1 << 20  # of those rows


class TrainedEstimator(FusedEstimator):
    """An estimator that is trained with minibatches; ``module_`` is its network."""

    _fit_recipes = staticmethod(fit_members)
    _epochs: ClassVar[str]
    """The parameter that says for how many epochs."""

    module_: nn.Module
    n_iter_: int

    def _set_fitted(self, fitted: Member, rows: Rows) -> None:
        self.module_ = fitted.module()
        self.n_iter_ = fitted.epochs
        self._layout = None if rows.is_table else ArrayLayout.of(rows.X)
        self._scaling = fitted.scaling

    def _outputs(self, X: object) -> Tensor:
        """Return the module's outputs (n, K), float64, on the CPU."""
        check_is_fitted(self)
        X = as_dense(X)
        if self._layout is not None:
            arrays = self._layout.raw(X)
        else:
            arrays = Arrays((as_tensor(validate_data(self, X, dtype=FLOATS, order="C", reset=False)),))
        self.module_.eval()  # the user may have trained it on
        weight = next(self.module_.parameters())
        rows = max(1, min(ROWS, _NUMBERS // sum(part[0].numel() for part in arrays.parts)))
        with torch.inference_mode():
            blocks = zip(*(torch.split(part, rows) for part in arrays.parts))
            outputs = torch.cat([self._forward(block, weight, arrays.names) for block in blocks])
        return outputs if outputs.dim() > 1 else outputs[:, None]

    def _forward(self, inputs: Sequence[Tensor], weight: Tensor, names: Sequence[str] | None) -> Tensor:
        """Return the outputs of some rows; floats are given in the precision of the module's weights."""
        scaled = [x if of is None else of(x[None], slice(0, 1))[0] for x, of in zip(inputs, self._scaling)]
        on_device = [x.to(weight.device, weight.dtype if x.is_floating_point() else None) for x in scaled]
        return first_output(call_module(self.module_, on_device, names)).double().cpu()


class TrainedClassifier(ClassifierMixin, TrainedEstimator):  # type: ignore[misc]
    """A classifier whose module returns a logit for each class, or for each label."""

    classes_: np.ndarray | list[np.ndarray]

    def predict(self, X: object) -> np.ndarray:
        """Return the most probable class of each row, (n,); of labels (n, K) those more probable than not."""
        outputs = self._logits(X)  # says first whether the estimator is fitted
        if isinstance(self.classes_, list):
            return (outputs > 0).numpy().astype(np.int64)
        labels: np.ndarray = self.classes_[outputs.argmax(1).numpy()]
        return labels

    def predict_proba(self, X: object) -> NDArray[np.float64]:
        """Return the probability of each class, (n, K) in the order of ``classes_``, or of each label, (n, K)."""
        outputs = self._logits(X)
        return (outputs.sigmoid() if isinstance(self.classes_, list) else outputs.softmax(1)).numpy()

    def predict_log_proba(self, X: object) -> NDArray[np.float64]:
        """Return the logarithms of what ``predict_proba`` returns."""
        outputs = self._logits(X)
        return (logsigmoid(outputs) if isinstance(self.classes_, list) else outputs.log_softmax(1)).numpy()

    def _set_fitted(self, fitted: Member, rows: Rows) -> None:
        super()._set_fitted(fitted, rows)
        self._present = fitted.present
        if rows.classes is None:  # as scikit-learn's forests say it of labels
            self.classes_ = [np.array([0, 1])] * rows.y.shape[1]
        else:
            self.classes_ = rows.classes[fitted.classes]

    def _logits(self, X: object) -> Tensor:
        outputs = self._outputs(X)
        if outputs.shape[1] == 1 and not isinstance(self.classes_, list):
            return two_logits(outputs)
        if self._present is None:
            return outputs
        # Classes whose training rows weighed nothing took no part.
        return outputs.masked_fill(torch.from_numpy(~self._present), -torch.inf)


class TrainedRegressor(RegressorMixin, TrainedEstimator):  # type: ignore[misc]
    """A regressor whose module returns ``(target - target_mean_) / target_scale_``."""

    target_mean_: float | NDArray[np.float64]
    target_scale_: float | NDArray[np.float64]

    def predict(self, X: object) -> NDArray[np.float64]:
        """Return the predicted target of each row, (n,) or (n, K) as y was, in the units of y."""
        values: NDArray[np.float64] = self._outputs(X).numpy() * self.target_scale_ + self.target_mean_
        return values if isinstance(self.target_mean_, np.ndarray) else values[:, 0]

    def _set_fitted(self, fitted: Member, rows: Rows) -> None:
        super()._set_fitted(fitted, rows)
        if rows.y.ndim == 1:
            self.target_mean_, self.target_scale_ = float(fitted.center), float(fitted.scale)
        else:
            zeros = np.zeros(rows.y.shape[1:])
            self.target_mean_, self.target_scale_ = fitted.center + zeros, fitted.scale + zeros
