"""All configurations trained in all folds at once, to the last epoch: the one way in which this face trains."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gputune.data.dataset import Dataset
from gputune.engine.backend import choose_backend, choose_device
from gputune.engine.entry import entry
from gputune.engine.job import BegunChunk, Job, Outcome, Progress, make_network, train_chunk
from gputune.engine.memory import GivenUp
from gputune.engine.module import EXAMPLES, build_module, check_module
from gputune.engine.network import Network
from gputune.engine.plan import Plan
from gputune.engine.population import Population, module_arguments
from gputune.engine.rung import RungJob, RungOutcome
from gputune.engine.stop import Stop
from gputune.engine.train import State
from gputune.errors import DivergedError, InputError
from gputune.sklearn.dataset import FoldGroup, Rows, group_folds, make_dataset, shared_x
from gputune.sklearn.words import Recipe
from gputune.tuning.trainer import Trainer
from gputune.types import Params

Place = tuple[int, int]
"""(fold, trial): which member of a search."""


@dataclass(frozen=True, eq=False)
class Member:
    """One trained member: a network of its own as soon as it is asked for.

    classes   positions of its outputs' classes among all classes, None for a regression
    present   (K,) which of them take part, None where all do
    center, scale   a regression's target is ``output * scale + center``
    epochs, seed    how long it has trained, and what its random numbers come from
    state           the engine's buffers of this member where it may train on, None where its training is over
    """

    network: Network
    params: Params
    place: Place
    classes: NDArray[np.int64] | None
    present: NDArray[np.bool_] | None
    center: float
    scale: float
    epochs: int
    seed: int
    state: tuple[Tensor, ...] | None

    def module(self) -> nn.Module:
        """Return a plain module with copies of the member's parameters, in evaluation mode, on the CPU."""
        return self.network.member(self.params, *self.place)


Members = dict[Place, Member | Exception]
"""What became of each (fold, trial): DivergedError, ValueError for a fold that cannot be trained on, TimeoutError."""


@entry
def fit_members(
    recipes: Sequence[Recipe],
    rows: Rows,
    folds: Sequence[NDArray[np.int64]],
    *,
    workers: int | None = 1,
    deadline: float | None = None,
) -> Members:
    """Train every recipe on the training rows of every fold, as one tensor program as far as shapes allow.

    ``folds`` are arrays of training rows. Every member trains for all epochs of its recipe; its numbers depend on its
    recipe and on its rows, not on its company. ``workers`` None lets an estimate decide about processes;
    ``deadline`` (``time.monotonic()``) ends training, and what has not ended by then is a TimeoutError.
    """
    found: Members = {}
    for index in recipes_alike(recipes):
        alike = [recipes[i] for i in index]
        for (fold, trial), member in _fit_alike(alike, rows, folds, workers, deadline).items():
            found[fold, index[trial]] = member
    return found


def recipes_alike(recipes: Sequence[Recipe]) -> list[list[int]]:
    """Return the positions of recipes in groups of one kind, device, seed and length, which train together."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, recipe in enumerate(recipes):
        length = (recipe.start, recipe.epochs, recipe.horizon, recipe.begun is None)
        groups[recipe.device, recipe.kind, recipe.module, recipe.seed, length].append(i)
    return list(groups.values())


def _fit_alike(
    recipes: Sequence[Recipe],
    rows: Rows,
    folds: Sequence[NDArray[np.int64]],
    workers: int | None,
    deadline: float | None,
) -> Members:
    """Train recipes of one kind, device, seed and length."""
    x = shared_x(rows, choose_device(recipes[0].device))
    groups, refused = groups_for(recipes, rows, folds)
    found: Members = {(fold, i): error for fold, error in refused.items() for i in range(len(recipes))}
    for group in groups:
        configs = configs_for(recipes, rows, group.trains[0])
        members = _fit_group(recipes, configs, make_dataset(rows, group, x), group, workers, deadline)
        found |= {(group.places[f], i): member for (f, i), member in members.items()}
    return found


def groups_for(
    recipes: Sequence[Recipe], rows: Rows, folds: Sequence[NDArray[np.int64]]
) -> tuple[list[FoldGroup], dict[int, ValueError]]:
    """Group the folds in which the recipes train together, as ``group_folds`` does."""

    def decays(train: NDArray[np.int64]) -> tuple[float, ...]:
        configs = configs_for(recipes, rows, train)
        return tuple(c["weight_decay"] for c, r in zip(configs, recipes) if r.alpha is not None)

    return group_folds(rows, folds, key=decays)


def configs_for(recipes: Sequence[Recipe], rows: Rows, train: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Return the configurations of recipes that train on these rows."""
    return [recipe.config_for(len(train), rows.weight(train)) for recipe in recipes]


def _fit_group(
    recipes: Sequence[Recipe],
    configs: Sequence[dict[str, Any]],
    data: Dataset,
    group: FoldGroup,
    workers: int | None,
    deadline: float | None,
) -> Members:
    """Train the configurations of recipes that have all else in common in the folds of one dataset."""
    recipe = recipes[0]
    found: Members = {}
    chunks, parameters = [], 0
    backend, _ = choose_backend("auto", data.device, data.dtype)
    trainer = replace(trainer_of(recipe, data, workers, deadline), backend=backend)
    for population in trainer.groups(configs):
        try:
            parameters = max(parameters, _check_module(recipe, population, data))
            chunks.append(population)
        except InputError as error:
            refusal = InputError(str(error).replace("model:", "module:", 1))  # as this face calls it
            found |= {(f, i): refusal for f in range(data.n_folds) for i in population.index}
    if chunks:
        plan = trainer.plan(chunks, epochs=recipe.epochs - recipe.start, parameters=parameters)
        if recipe.start:
            plan = replace(plan, chunks=tuple(_begun_chunk(chunk, recipes, group) for chunk in plan.chunks))
        plan = replace(plan, threads=min(plan.threads, torch.get_num_threads()))
        kind: type[MemberJob | RungJob] = MemberJob if recipe.begun is None else RungJob
        job = trainer.job(kind, epochs=recipe.epochs)
        found |= _run(trainer, job, plan, group)
    return found


def trainer_of(recipe: Recipe, data: Dataset, workers: int | None, deadline: float | None) -> Trainer:
    """Return what trains recipes that have all but their configurations in common, eagerly."""
    return Trainer(
        data=data,
        kind=recipe.kind,
        module_class=recipe.module,
        seed=recipe.seed,
        horizon=recipe.horizon,
        workers=workers,
        stop=Stop(deadline),
    )


def _begun_chunk(chunk: Population, recipes: Sequence[Recipe], group: FoldGroup) -> BegunChunk:
    """Return the chunk with the states of its members, from which they train on."""
    members = [
        [begun.states[place] for place in group.places]
        for begun in (recipes[i].begun for i in chunk.index)
        if begun is not None
    ]
    per_trial = [[torch.stack(buffers) for buffers in zip(*folds)] for folds in members]
    state = State(recipes[0].start, tuple(torch.stack(buffers) for buffers in zip(*per_trial)))
    return BegunChunk(chunk.kind, chunk.index, chunk.configs, state)


def _check_module(recipe: Recipe, population: Population, data: Dataset) -> int:
    """Return the size of a user's module, which is tried first; 0 for a built-in model."""
    if recipe.module is None:
        return 0
    rows = data.example(EXAMPLES)
    number = check_module(recipe.module, population.configs[0], rows, n_outputs=data.n_outputs)
    if data.task != "regression":
        module = build_module(
            recipe.module,
            module_arguments(population.configs[0]),
            n_features=data.n_features,
            n_outputs=data.n_outputs,
            seed=recipe.seed,
        )
        _refuse_probabilities(module, rows)
    return number


def _refuse_probabilities(module: nn.Module, rows: Sequence[Tensor]) -> None:
    """Raise InputError where a classifier's module ends in a softmax: the loss has one already."""
    with torch.no_grad():
        outputs = module.to(rows[0]).eval()(*rows)
    if bool((outputs >= 0).all()) and bool(((outputs.sum(1) - 1).abs() < 1e-3).all()):
        raise InputError(
            f"model: {type(module).__name__} returns probabilities, and the cross-entropy wants logits; leave out the "
            "softmax at its end."
        )


def _run(trainer: Trainer, job: "MemberJob | RungJob", plan: Plan, group: FoldGroup) -> Members:
    data = trainer.data
    found: Members = {}
    for outcome in trainer.train(job, plan):
        if isinstance(outcome, GivenUp):
            raise outcome.error()
        assert isinstance(outcome, Weights | RungOutcome)
        whole = next(chunk for chunk in plan.chunks if outcome.index[0] in chunk.index)
        at = whole.index.index(outcome.index[0])
        chunk = whole.part(at, at + len(outcome.index))  # memory may have held a part of it only
        found |= _members(job, data, chunk, outcome, group)
    over = TimeoutError("the time was over before this fit had ended; give it more.")
    wanted = [(f, i) for chunk in plan.chunks for f in range(data.n_folds) for i in chunk.index]
    return {place: found.get(place, over) for place in wanted}


def _members(
    job: "MemberJob | RungJob",
    data: Dataset,
    chunk: Population,
    outcome: "Weights | RungOutcome",
    group: FoldGroup,
) -> Members:
    network = make_network(chunk, data, seed=job.seed, module_class=job.module_class)
    if isinstance(outcome, RungOutcome):
        epochs, flat = outcome.state.epoch, network.blocks.from_rows(outcome.state.buffers[0])
    else:
        epochs, flat = outcome.epochs, torch.from_numpy(outcome.flat)
    if epochs < job.epochs:
        return {}
    params = network.blocks.views(flat)
    members = (data.n_folds, len(chunk.index), -1)
    whole = [w.reshape(members).all(2) for w in network.blocks.by_member(flat.isfinite()).values()]
    finite = torch.stack(whole).all(0).tolist()  # F lists of C
    center, scale = data.center.tolist(), data.scale.tolist()
    present = None if data.present is None else data.present.cpu().numpy()
    found: Members = {}
    for f in range(data.n_folds):
        takes_part = None if present is None or present[f].all() else present[f]
        for c, i in enumerate(chunk.index):
            facts = (group.classes, takes_part, center[f], scale[f], epochs, job.seed, _state(outcome, f, c))
            found[f, i] = (
                Member(network, params, (f, c), *facts) if finite[f][c] else _diverged(chunk.configs[c])
            )
    return found


def _state(outcome: "Weights | RungOutcome", fold: int, trial: int) -> tuple[Tensor, ...] | None:
    """Return the buffers of one member where it may train on."""
    if not isinstance(outcome, RungOutcome):
        return None
    return tuple(buffer[trial, fold] for buffer in outcome.state.buffers)


def _diverged(config: dict[str, Any]) -> DivergedError:
    return DivergedError(
        f"the training diverged with lr={config['lr']:.3g} and optimizer={config['optimizer']!r}: its weights are "
        "no finite numbers any more; use a smaller lr, or scale the inputs (StandardScaler in a pipeline)."
    )


@dataclass(frozen=True)
class MemberJob(Job):
    """A job whose chunks give their members' weights, not their scores."""

    def run(self, data: Dataset, chunk: Population, progress: Progress | None = None) -> "Weights":
        """Train one chunk and return its weights."""
        begin = time.monotonic()
        trained = train_chunk(self, data, chunk, progress)
        flat = trained.flat.cpu().numpy()
        return Weights(chunk.index, trained.curves, trained.epochs, time.monotonic() - begin, flat)


@dataclass(frozen=True)
class Weights(Outcome):
    """What training a chunk gave: ``flat``, the parameters of all its members in the order of its blocks."""

    flat: np.ndarray
