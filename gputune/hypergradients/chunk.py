"""Train, score and differentiate one group of trials (chunk) of a hypergradient search.

A hypergradient is the derivative of the validation loss with respect to a hyperparameter. The
trials of a chunk have tensors of the same shapes and train together. A member is one trial on one
fold. In shapes, F counts folds, C trials, P = F*C members, N parameters of a member, B rows, K
outputs, S segments of the training and L layers.

The memory that differentiation needs limits the number of trials that gputune differentiates at
once.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from gputune.data.dataset import Dataset
from gputune.engine.backends.cost import Cost
from gputune.engine.job import Job, Outcome, ProgressCallback
from gputune.engine.plan import Plan, Planner
from gputune.ground.errors import InputError, Verbatim, option
from gputune.ground.text import size_words
from gputune.ground.types import Config, Params
from gputune.hypergradients.first_step import (
    ExactMode,
    fastest_that_fits,
    measure,
    twice_differentiable,
)
from gputune.hypergradients.inner import (
    HYPERPARAMETERS,
    InnerProblem,
    StepPosition,
    Tables,
    as_table,
)
from gputune.hypergradients.modes import differences, forward, reverse
from gputune.modules.module import StackedModule
from gputune.optimizers.rules import BETA1, BETA2, schedule_factor
from gputune.population.batches import Batch, Batches, for_members
from gputune.population.population import Network, Population
from gputune.scoring.scoring import Scoring, shape_of_scores

# Width of finite differences, in the logarithm. It is wide enough to see the trend through the
# noise of chaotic training.
WIDE = 0.2
_METHOD = option("method", "hypergradient")
# Time of a differentiated step, compared with plain training: autograd differentiates it twice.
_SLOWER = 10.0


class PopulationTraining:
    """The differentiable training of C trials on F folds for ``epochs`` epochs, with one row of
    parameters per member.

    A member is one trial on one fold, with the index p = f*C + c. Starting weights, minibatches and
    dropout are the same as in plain training, so the trained members are the same too.
    """

    def __init__(
        self, network: Network, data: Dataset, configs: Sequence[Config], *, seed: int, epochs: int
    ) -> None:
        self.network = network
        self.data = data
        self.folds = data.n_folds
        self.trials = len(configs)
        sizes = [config["batch_size"] for config in configs]
        target = data.y if data.y.is_floating_point() else data.y[None]
        self.batches = Batches(
            data, sizes, target, seed=seed, exact=network.exact, least_rows=network.least_rows
        )
        # The longest epoch of any member, in steps. Members with shorter epochs wait for its end.
        self.each = int(self.batches.steps.max())
        self.steps = epochs * self.each
        self.totals = (epochs * self.batches.steps).flatten()
        self.schedules = [config["schedule"] for config in configs]
        self.first = network.blocks.by_member(network.start())
        layers = network.layers()
        self.shapes = {name: tuple(view.shape[2:]) for name, view in self.first.items()}
        self.sizes = [view[0, 0].numel() for view in self.first.values()]
        self.remembered = [name for name in self.first if name not in layers]
        self.kept = sum(self.first[name][0, 0].numel() for name in self.remembered)
        numbers = [layers.get(name, 0) for name in self.first]
        self.layer = torch.tensor(np.repeat(numbers, self.sizes), device=data.device)

    def start(self) -> Tensor:
        """Return the N starting parameters and running statistics of each of P members, (P, N)."""
        return self._rows(self.first.values())

    def _rows(self, tables: Iterable[Tensor]) -> Tensor:
        """Flatten parameters (F folds, C trials, ...) into one row of N values for each member.

        The result is (P, N), with P = F * C members.
        """
        return torch.cat([table.reshape(self.folds * self.trials, -1) for table in tables], 1)

    def clock(self, step: int) -> StepPosition:
        """Return each member's number of finished steps, and whether the member takes this step.

        Members with fewer steps per epoch wait until the epoch ends.
        """
        epoch, within = divmod(step, self.each)
        steps = self.batches.steps
        done = epoch * steps + np.minimum(within, steps - 1)
        active = within < steps
        factor = None
        if set(self.schedules) != {"constant"}:
            columns = zip(self.schedules, done.T, self.totals.reshape(done.shape).T)
            factors = [schedule_factor(schedule, *column) for schedule, *column in columns]
            factor = np.stack(factors, 1).flatten()
        return StepPosition(done.flatten(), None if active.all() else active.flatten(), factor)

    def losses(self, weights: Tensor, step: int) -> Tensor:
        """Return the minibatch losses of all P members in one training step, (P,).

        The loss is 0 for a member that takes no step now.
        """
        params = self._params_of(weights)
        losses = [weights.new_zeros(self.trials)] * self.folds
        for part in self.batches.at(*divmod(step, self.each)):
            outputs = self.network.differentiable(*self._part_inputs(params, part), part.key)
            outputs = outputs.view(-1, self.trials, *outputs.shape[1:])
            outputs = self._mask_absent(outputs, part.folds)
            y = part.y.view(len(outputs), -1, *part.y.shape[1:])  # (F, 1 or C, B, ...)
            share = part.share.squeeze(-1) if isinstance(part.share, Tensor) else part.share
            losses[part.folds] = list((self.network.row_losses(outputs, y) * share).sum(-1))
        return torch.cat(losses)

    def statistics(self, weights: Tensor, step: int) -> Tensor:
        """Return the running statistics of BatchNorm after this training step.

        The result is (P, ``kept``): each of P members has ``kept`` values. The statistics do not
        change for a member that takes no step now.
        """
        assert isinstance(self.network, StackedModule)
        params = self._params_of(weights)
        after = {name: list(params[name]) for name in self.remembered}
        for part in self.batches.at(*divmod(step, self.each)):
            _, statistics = self.network.with_statistics(*self._part_inputs(params, part), part.key)
            for name, folds in after.items():
                shape = (-1, self.trials, *self.shapes[name])
                folds[part.folds] = list(statistics[name].to(weights).view(shape))
        return self._rows(map(torch.stack, after.values()))

    def _part_inputs(self, params: Params, batch: Batch) -> tuple[Params, list[Tensor]]:
        """Return the parameters and the inputs of the P members in one minibatch, each (P, ...)."""
        # Autograd would copy a slice on the way back, so all folds are taken without slicing.
        if batch.folds != slice(0, self.folds):
            params = {name: tensor[batch.folds] for name, tensor in params.items()}
        weights = {name: tensor.flatten(0, 1) for name, tensor in params.items()}
        inputs = list(batch.inputs)
        if len(inputs[0]) != self.folds * self.trials or self.trials == 1:
            inputs = [for_members(x, self.trials) for x in inputs]
        return weights, inputs

    def validation(self, weights: Tensor) -> Tensor:
        """Return the validation loss of each of the P members, (P,).

        The loss is the cross-entropy, or the squared error in the target's original units.
        """
        params = self._params_of(weights)
        losses = []
        for f, fold in enumerate(self.data.folds):
            y = self.data.targets(f)[fold.valid]
            rows = self.network.row_losses(self._valid(params, f)[None], y[None, None])[0]
            losses.append(rows.mean(-1) * self.data.scale[f].to(rows.dtype).square().mean())
        return torch.cat(losses)

    @torch.no_grad()
    def scores(self, weights: Tensor, scoring: Scoring) -> np.ndarray:
        """Return the scores (C trials, F folds) of all members on the validation rows of their
        fold."""
        params = self._params_of(weights)
        columns = []
        for f in range(self.folds):
            outputs = self._valid(params, f, masked=False)
            member = partial(self.member, weights, f)
            columns.append(scoring.metrics(self.data, f, outputs, member))
        return np.asarray(torch.stack(columns, 1).cpu().numpy())

    def _valid(self, params: Params, fold: int, *, masked: bool = True) -> Tensor:
        """Return the K outputs of all C trials on the B validation rows of a fold, (C, B, K)."""
        rows = self.data.rows(fold, self.data.folds[fold].valid)
        weights = {name: tensor[fold] for name, tensor in params.items()}
        inputs = [x.expand(self.trials, *x.shape) for x in rows]
        outputs = self.network.differentiable(weights, inputs, None)
        return self._mask_absent(outputs[None], slice(fold, fold + 1))[0] if masked else outputs

    def _mask_absent(self, outputs: Tensor, folds: slice) -> Tensor:
        """Set the outputs to -inf for the classes that are absent from a fold.

        The outputs are (F folds, C trials, B rows, K classes).
        """
        present = self.data.present
        if present is None:
            return outputs
        return outputs.masked_fill(~present[folds, None, None], -torch.inf)

    def _params_of(self, weights: Tensor) -> Params:
        """Split one row of N values per member, (P, N), into the named parameters.

        A parameter is (F folds, C trials, ...), with F * C = P members.
        """
        parts = zip(self.shapes.items(), torch.split(weights, self.sizes, 1))
        return {name: part.view(self.folds, self.trials, *shape) for (name, shape), part in parts}

    def member(self, weights: Tensor, fold: int, trial: int) -> nn.Module:
        """Return the network of one trial on one fold as a plain module on the CPU, in evaluation
        mode."""
        blocks = self.network.blocks
        flat = weights.new_empty(blocks.size)
        views = blocks.by_member(flat)
        for name, value in self._params_of(weights).items():
            views[name].copy_(value)
        return self.network.member(blocks.views(flat), fold, trial)


@dataclass(frozen=True, kw_only=True)
class HypergradientJob(Job):
    """The settings that all groups of trials (chunks) of a hypergradient search share.

    Each hyperparameter in ``hyperparameters`` has a separate value for each of ``segments``
    segments of the training time, and with ``per_layer`` for each layer. ``budget`` is the memory
    limit in bytes. The mode "exact" is the fastest of reverse and forward mode that fits into the
    limit.
    """

    hyperparameters: tuple[str, ...] = ("lr",)
    segments: int = 1
    per_layer: bool = False
    mode: Literal["exact", "differences"] = "exact"
    budget: int = 2**30

    def run(
        self, data: Dataset, chunk: Population, progress: ProgressCallback | None = None
    ) -> "Slopes":
        """Train one group of trials, score the trials after each epoch, and differentiate their
        validation losses."""
        begin = time.monotonic()
        problem = inner_problem(self, data, chunk)
        training = problem.training
        shape = shape_of_scores(self.scoring, data.n_folds)
        curves = np.full((len(chunk.index), self.epochs, *shape), np.nan)

        def watch(step: int, weights: Tensor) -> None:
            epoch, within = divmod(step, training.each)
            if within:
                return
            if self.scoring is not None:
                curves[:, epoch - 1] = training.scores(weights, self.scoring)
            if progress is not None:
                progress(len(curves), curves[:, epoch - 1 : epoch])
            if self.is_over() and epoch < self.epochs:
                raise _OverError(epoch)

        try:
            if self.mode == "differences":
                result = differences(problem, self.hyperparameters, width=WIDE, watch=watch)
            else:
                mode, _ = self.mode_of(problem)
                if mode == "forward":
                    result = forward(problem, self.hyperparameters, watch=watch)
                else:
                    blocks = mode == "checkpointed"
                    result = reverse(problem, self.hyperparameters, checkpoint=blocks, watch=watch)
        except _OverError as over:
            return Slopes(chunk.index, curves, over.args[0], time.monotonic() - begin)

        def by_trial(values: Tensor) -> np.ndarray:
            # Members are fold-major: (F * C, ...) -> (C, F, ...)
            table = values.detach().double().cpu().view(data.n_folds, -1, *values.shape[1:])
            return np.asarray(table.transpose(0, 1))

        return Slopes(
            chunk.index,
            curves,
            self.epochs,
            time.monotonic() - begin,
            losses=by_trial(result.value),
            slopes={name: by_trial(table) for name, table in result.gradients.items()},
            ratios=by_trial(result.ratio),
        )

    def mode_of(
        self, problem: InnerProblem[PopulationTraining]
    ) -> tuple[ExactMode, dict[ExactMode, int]]:
        """Return the fastest mode of differentiation that fits into the memory limit, and the bytes
        that each mode needs."""
        number = len(problem.columns(self.hyperparameters))
        sizes = measure(problem).of_modes(problem.training.steps, number)
        return fastest_that_fits(sizes, self.budget, hyperparameters=number), sizes

    def tables(self, training: PopulationTraining, configs: Sequence[Config]) -> Tables:
        """Return the hyperparameters of configurations as tensors (P members, S segments, L
        layers).

        The tensors of searched hyperparameters have a value for each segment and layer.
        """
        layers = int(training.layer.max()) + 1 if self.per_layer else 1
        defaults = {"beta1": BETA1, "beta2": BETA2}
        tables = {}
        for name in HYPERPARAMETERS:
            shape = (self.segments, layers) if name in self.hyperparameters else None
            default = defaults.get(name, 0.0)
            rows = np.stack([as_table(config.get(name, default), shape) for config in configs])
            members = torch.as_tensor(np.tile(rows, (training.folds, 1, 1)))
            tables[name] = members.to(training.data.device, training.data.dtype)
        return tables


@dataclass(frozen=True)
class Slopes(Outcome):
    """The results of differentiating a group of trials: scores, validation losses and derivatives.

    ``losses`` (C trials, F folds) are the losses on the validation rows. ``slopes`` maps each
    hyperparameter to its derivatives (C, F, S segments, L layers). ``ratios`` (C, F) tells noise
    from usable derivatives. All three are None if the deadline stopped the chunk.
    """

    losses: np.ndarray | None = None
    slopes: dict[str, np.ndarray] | None = None
    ratios: np.ndarray | None = None


class _OverError(Exception):
    """Raised when the time of the search is over. The argument is the number of finished epochs."""


def inner_problem(
    job: HypergradientJob, data: Dataset, chunk: Population
) -> InnerProblem[PopulationTraining]:
    """Return the differentiable training of a group of trials, with their hyperparameters as
    tensors.

    Raises InputError if the network or its loss cannot be differentiated.
    """
    data = data.of(chunk.configs[0])
    network = job.network(data, chunk)
    buffers = network.differentiate_statistics()
    if buffers:
        raise InputError(
            "model",
            f"must keep no state except the running statistics of BatchNorm for {_METHOD}, but "
            f"its {buffers[0]!r} changes in training",
            remedy="Keep no other state, or choose another method.",
        )
    objective = job.objective
    if objective is not None and (not objective.is_named or objective.augment is not None):
        raise InputError(
            "loss",
            f"must be the name of a loss, without {option('augment')}, for {_METHOD}",
            got=Verbatim(objective.name),
            remedy="Choose another method, or "
            f"{option('loss', 'cross_entropy')}, 'mse', ... without {option('training_step')} and "
            f"{option('augment')}.",
        )
    training = PopulationTraining(network, data, chunk.configs, seed=job.seed, epochs=job.horizon)
    tables = job.tables(training, chunk.configs)
    return InnerProblem(training, chunk.configs[0]["optimizer"], tables)


def train_scheduled(job: HypergradientJob, data: Dataset, chunk: Population) -> nn.Module:
    """Train one trial on one fold, and return the trained module.

    The hyperparameters may have separate values for each layer, and for each segment (part) of the
    training.
    """
    problem = inner_problem(job, data, chunk)
    return problem.training.member(problem.train(steps=job.epochs * problem.training.each), 0, 0)


def plan_chunks(
    groups: Sequence[Population],
    data: Dataset,
    job: HypergradientJob,
    *,
    workers: int | None,
    gpus: int = 1,
) -> Plan:
    """Return the plan of a hypergradient search: the groups of trials (chunks) to train, and their
    memory.

    The job's ``budget`` is the memory of one process. Raises InputError if a single trial with all
    its folds does not fit.
    """

    def cost_of(population: Population, plain: Cost) -> Cost:
        problem = inner_problem(job, data, population.part(0, 1))
        training = problem.training
        steps = training.totals.min()
        if job.segments > steps:
            raise InputError(
                "Hypergradient(segments=...)",
                "must be at most the number of steps",
                got=Verbatim(f"{job.segments} segments for {steps} steps"),
                remedy="Use fewer segments, smaller batches, or more epochs.",
            )
        with twice_differentiable(training):
            mode, sizes = job.mode_of(problem)
        if sizes[mode] > job.budget:
            number = len(problem.columns(job.hyperparameters))
            raise InputError(
                "memory",
                f"does not suffice to differentiate one trial in {data.n_folds} folds: "
                f"{number} hyperparameters over {training.steps} steps need about "
                f"{size_words(min(sizes.values()))}, and each process may use "
                f"{size_words(job.budget)}",
                remedy=f"Use fewer segments, smaller batches, {option('workers', 1)}, or a larger "
                f"{option('memory')}.",
            )
        return replace(plain, trial_bytes=sizes[mode], trial_seconds=_SLOWER * plain.trial_seconds)

    return Planner(data, job.budget, workers, gpus=gpus, cost_of=cost_of).plan(groups, job.epochs)
