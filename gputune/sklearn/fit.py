"""All configurations trained in all folds at once, to the last epoch: the one way in which this face trains."""

import re
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from gputune.data.dataset import Dataset
from gputune.engine.backend import choose_backend
from gputune.engine.choice import Work, device_for
from gputune.engine.job import BegunChunk
from gputune.engine.memory import Failure
from gputune.engine.stop import Stop, entry
from gputune.engine.train import State
from gputune.errors import InputError
from gputune.modules.construction import name_of
from gputune.modules.inspection import returns_one_logit, traits_of
from gputune.population.population import Population
from gputune.scoring.objective import Objective
from gputune.sklearn.dataset import FoldGroup, Rows, make_dataset
from gputune.sklearn.member import MemberJob, Members, TrainingLoss, Weights, members_of
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
        x = rows.inputs(_device(alike, folds))

        def decays(train: NDArray[np.int64], alike: Sequence[Recipe] = alike) -> tuple[float, ...]:
            """Return the weight decays of the recipes with an alpha, which are those of a fold's own rows."""
            configs = _configs(alike, rows, train)
            return tuple(c["weight_decay"] for c, recipe in zip(configs, alike) if recipe.alpha is not None)

        for group in folds.split(decays):
            configs = _configs(alike, rows, group.trains[0])
            # A loss of the user's own takes numbers as they are.
            standardise = first.step is None and (first.loss is None or isinstance(first.loss, str))
            watched = first.patience is not None
            data = make_dataset(group, x, standardise=standardise, numbers=first.numbers, watched=watched)
            objective = _objective(first, configs[0], data)
            if objective is not None and objective.one_logit:
                data = data.with_one_logit()
            yield Batch(trials, alike, configs, group, data, objective)


def _configs(recipes: Sequence[Recipe], rows: Rows, train: NDArray[np.int64]) -> list[Config]:
    return [recipe.config_for(len(train), rows.weight(train)) for recipe in recipes]


def _device(recipes: Sequence[Recipe], folds: FoldGroup) -> torch.device:
    """Return the device on which recipes that train together do so."""
    rows, first = folds.rows, recipes[0]
    x = rows.X.parts[0]
    work = Work(
        kind=first.kind,
        configs=_configs(recipes, rows, folds.trains[0]),
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
        for (f, c), member in _fit_batch(batch, training).items():
            members[batch.folds.numbers[f], batch.trials[c]] = member
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
    """Train a batch; return its members by their positions in it."""
    recipe, data, trainer = batch.recipes[0], batch.data, batch.trainer(training)
    trainer = replace(trainer, backend=choose_backend("auto", data.device, data.dtype, trainer.kind)[0])
    members: Members = {}
    populations, parameters = [], 0
    for population in trainer.groups(batch.configs):
        try:
            parameters = max(parameters, _check_module(trainer, population))
            populations.append(population)
        except InputError as error:
            refusal = in_skorchs_words(error)
            members |= {(f, i): refusal for f in range(data.n_folds) for i in population.index}
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
    members |= {(f, i): late for chunk in chunks for f in range(data.n_folds) for i in chunk.index}
    for outcome in trainer.train(job, plan):
        if isinstance(outcome, Failure):
            raise outcome.error()
        assert isinstance(outcome, Weights)
        whole = next(chunk for chunk in chunks if outcome.index[0] in chunk.index)
        at = whole.index.index(outcome.index[0])
        chunk = whole.part(at, at + len(outcome.index))  # memory may have held a part of it only
        members |= members_of(job, data, chunk, outcome, batch.folds.classes)
    return members


def _resumed_chunk(chunk: Population, batch: Batch) -> BegunChunk:
    """Return the chunk with the states of its members, from which they train on."""
    states = [state for i in chunk.index if (state := batch.recipes[i].state) is not None]
    members = [[state.buffers[fold] for fold in batch.folds.numbers] for state in states]
    per_trial = [[torch.stack(buffers) for buffers in zip(*folds)] for folds in members]
    buffers = tuple(torch.stack(buffers) for buffers in zip(*per_trial))
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
