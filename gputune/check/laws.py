"""Measure whether networks that train together get the right result, for ``gputune check`` and the
tests.

Each measurement returns the largest difference from the right result. A member is one trial
(configuration) on one fold. A population is the members that train together. In shapes, F counts
folds, C configurations, B rows of a minibatch, D features and K outputs.

The right result comes from a plain loop that trains one network, from scikit-learn, or from the
same device by another method. Some measurements provoke a failure: trials diverge, memory runs out,
or a step cannot be recorded and replayed.
"""

import dataclasses
import math
import warnings
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
import torch
from sklearn.metrics import get_scorer
from torch import Tensor, nn
from torch.nn import functional

from gputune.data.columns import fit_layout
from gputune.data.dataset import Dataset, make_dataset
from gputune.data.encode import fit_statistics
from gputune.data.table import as_table
from gputune.data.target import Target
from gputune.data.weights import Weights
from gputune.engine.dropout import dropout_draw
from gputune.engine.job import Job, Outcome, run_in_parts, train_chunk
from gputune.engine.kernel import KernelChunk
from gputune.engine.train import Trained
from gputune.ground.device import CPU
from gputune.ground.types import Config, StepKey, Task
from gputune.models import MLP
from gputune.modules.recorder import RECORDERS, Replays
from gputune.native.library import NotBuiltError
from gputune.optimizers.classes import make_optimizer
from gputune.optimizers.rules import schedule_factor
from gputune.population.batches import row_order
from gputune.population.kinds import ModelKind, padded_width
from gputune.population.population import Population, complete, populations
from gputune.scoring.estimators import fitted
from gputune.scoring.metrics import make_scoring
from gputune.scoring.scores import OF_TASK
from gputune.scoring.scoring import Scoring

# Three folds with 40 or 41 training rows, so that the folds can differ in their number of steps.
_ROWS = 61
_FEATURES = 5
_CLASSES = 3
_FOLDS = 3
_LIMIT = 64 << 20  # bytes that a GPU may use in addition to those in use
_DIVERGING = 1e300  # a learning rate at which training diverges


class Net(nn.Module):
    """A small test network, written in the way of a PyTorch user."""

    def __init__(self, n_features: int, n_outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(n_features, 6)
        self.norm = nn.LayerNorm(6)
        self.last = nn.Linear(6, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's K outputs for each row of a minibatch, (B, K) for (B, D)."""
        hidden = torch.tanh(self.norm(self.first(x)))
        outputs: Tensor = self.last(hidden)
        return outputs


@dataclass(frozen=True, eq=False)
class Case:
    """A test case: a dataset, and the configurations that train on it together.

    ``shared`` has the values that all configurations share.
    """

    configs: tuple[Config, ...]
    shared: Config = dataclasses.field(default_factory=dict)
    task: Task = "multiclass"
    weights: bool = False
    absent: bool = False
    module: bool = False
    dtype: torch.dtype = torch.float64
    epochs: int = 6
    horizon: int = 9

    @property
    def kind(self) -> ModelKind:
        """The kind of model."""
        return "module" if self.module else "mlp"

    def complete(self) -> tuple[Config, ...]:
        """Return the configurations of the test case, with default values for missing keys."""
        configs = []
        for config in self.configs:
            values = {"width": 8, "batch_size": 10, **self.shared, **config}
            configs.append(complete(values, optimizer="adamw", schedule="constant"))
        return tuple(configs)

    def data(self, device: torch.device) -> Dataset:
        """Return the test case's random dataset, with folds of unequal length.

        Each fold has its own copy of the inputs.
        """
        rng = np.random.default_rng(7)
        fold_of = np.arange(_ROWS) % _FOLDS
        raw = rng.normal(size=(_ROWS, _FEATURES))
        codes = rng.integers(_CLASSES, size=_ROWS)
        target = Target("multiclass", codes, np.arange(_CLASSES))
        if self.task == "regression":
            target = Target("regression", rng.normal(size=_ROWS), None)
        folds = []
        for f in range(_FOLDS):
            train = np.flatnonzero(fold_of != f)
            if self.absent and f == 0:  # the first fold has no training row of the last class
                train = train[codes[train] < _CLASSES - 1]
            folds.append((train, np.flatnonzero(fold_of == f)))
        layout = fit_layout(as_table(raw))
        statistics = [fit_statistics(raw, layout, train) for train, _ in folds]
        like = torch.empty(0, dtype=self.dtype, device=device)
        weightless = Weights(None, None)
        data = make_dataset(raw, statistics, target, folds, weights=weightless, like=like)
        if not self.weights:
            return data
        # The weights differ between folds: (F, n)
        weights = torch.from_numpy(rng.random((_FOLDS, _ROWS)))
        return dataclasses.replace(data, weights=weights.to(device))

    def scoring(self, name: str) -> Scoring:
        """Return the scoring method with the given name, for classification or regression as in the
        test case."""
        classes = None if self.task == "regression" else np.arange(_CLASSES)
        return make_scoring(name, self.task, classes)

    def chunks(self, data: Dataset) -> list[Population]:
        """Return the configurations of the test case, grouped into the populations that train
        together."""
        return populations(self.complete(), self.kind, rows=max(data.train_lengths))

    def job(self, backend: str, scoring: Scoring | None = None) -> Job:
        """Return the settings of a training run (job) for this test case and a backend."""
        return Job(
            seed=0,
            epochs=self.epochs,
            horizon=self.horizon,
            backend=backend,
            scoring=scoring,
            module_class=Net if self.module else None,
        )

    def trained(
        self, device: torch.device, backend: str, scoring: Scoring | None = None
    ) -> list[tuple[Population, Trained]]:
        """Train all configurations on a device, and return the results of each population (group
        that trains together)."""
        data = self.data(device)
        job = self.job(backend, scoring)
        results = [(chunk, train_chunk(job, data, chunk)) for chunk in self.chunks(data)]
        if backend == "kernel" and KernelChunk.failure:  # another backend has trained
            raise NotBuiltError(KernelChunk.failure)
        return results

    @cached_property
    def plain_networks(self) -> dict[tuple[int, int], nn.Module]:
        """The reference networks, keyed by fold and configuration index. A plain loop trains these
        networks in double precision on the CPU."""
        data = self.data(CPU)
        networks = {}
        for f, (c, config) in product(range(_FOLDS), enumerate(self.complete())):
            networks[f, c] = self._plain_network(data, f, config)
        return networks

    def _plain_network(self, data: Dataset, fold: int, config: Config) -> nn.Module:
        """Train one configuration on one fold in a plain PyTorch loop in double precision, and
        return the network as a reference."""
        network = self.job("eager").network(data, Population(self.kind, (0,), (config,)))
        module = network.member(network.blocks.views(network.start()), fold, 0).double().train()
        optimizer = make_optimizer(config, list(module.parameters()))
        rate = optimizer.param_groups[0]["lr"]
        n_rows = len(data.folds[fold].train)
        size = min(config["batch_size"], n_rows)
        steps = math.ceil(n_rows / size)
        y = data.targets(fold)
        weights = torch.ones(len(y)) if data.weights is None else data.weights[fold]
        for epoch in range(self.epochs):
            order = row_order(data, 0, epoch)[fold, :n_rows]
            done = np.arange(epoch * steps, (epoch + 1) * steps)
            total = np.full(steps, self.horizon * steps)
            factors = schedule_factor(config["schedule"], done, total).tolist()
            for step, batch in enumerate(torch.split(order, size)):
                optimizer.param_groups[0]["lr"] = rate * factors[step]
                outputs = _outputs(module, config, data.x[fold, batch].double(), (epoch, step))
                if data.present is not None:
                    outputs = outputs.masked_fill(~data.present[fold], -math.inf)
                if self.task == "regression":
                    losses = (outputs[:, 0] - y[batch].double()) ** 2
                else:
                    losses = functional.cross_entropy(outputs, y[batch], reduction="none")
                weight = weights[batch].double()
                optimizer.zero_grad()
                torch.autograd.backward((weight * losses).sum() / weight.sum())
                optimizer.step()
        return module.eval()


def _outputs(module: nn.Module, config: Config, x: Tensor, key: StepKey) -> Tensor:
    """Return the outputs (B, K) of a module in training, with the dropout of the built-in MLP."""
    rate = config["dropout"]
    if not isinstance(module, MLP) or not rate:
        outputs: Tensor = module(x)
        return outputs
    *hidden, last = module.layers
    for number, layer in enumerate(hidden):
        x = module.activations[number](layer(x))
        # Training draws for the padded width; a narrower member uses the first columns.
        draw = dropout_draw(0, key, number, len(x), padded_width(config["width"]))
        x = torch.where(draw[:, : config["width"]] >= rate, x / (1 - rate), 0)
    outputs = last(x)
    return outputs


def difference(values: Tensor, expected: Tensor) -> float:
    """Return the relative difference of two tensors, max |values - expected| / max |expected|. The
    result is NaN if a tensor has a NaN."""
    values = values.detach().cpu().double()
    expected = expected.detach().cpu().double()
    largest = expected.abs().max().clamp_min(1e-30)
    return float((values - expected).abs().max() / largest)


def from_plain_loop(case: Case, device: torch.device, backend: str) -> float:
    """Return the largest difference between gputune's networks and the same networks trained in a
    plain loop."""
    worst = []
    for chunk, trained in case.trained(device, backend):
        for (c, place), fold in product(enumerate(chunk.index), range(_FOLDS)):
            values = trained.member(fold, c).state_dict().values()
            expected = case.plain_networks[fold, place].state_dict().values()
            worst += [difference(a, b) for a, b in zip(values, expected, strict=True)]
    return float(np.max(worst))


def on_other_gpus(case: Case, device: torch.device, backend: str) -> float:
    """Return the largest difference between networks trained on the machine's other GPUs and in a
    plain loop."""
    worst = [0.0]
    for index in range(torch.cuda.device_count()):
        if index != (device.index or 0):
            gpu = torch.device("cuda", index)
            worst.append(from_plain_loop(case, gpu, backend))
    return max(worst)


def scores(configs: tuple[Config, ...], device: torch.device, backend: str) -> float:
    """Return the largest difference between gputune's scores and scikit-learn's scores after the
    last epoch.

    scikit-learn's scorers receive the outputs of gputune's trained networks.
    """
    tasks = tuple[Task, ...](("multiclass", "regression"))
    worst = list[float]()
    for task in tasks:
        case = Case(configs, task=task, epochs=2)
        for name in OF_TASK[task]:
            worst += _score_differences(case, name, device, backend)
    return float(np.max(worst))


def _score_differences(
    case: Case, name: str, device: torch.device, backend: str
) -> Iterator[float]:
    """For each trained network, yield the difference between gputune's last score and
    scikit-learn's score."""
    scorer = get_scorer(name)
    data = case.data(CPU)
    classes = None if case.task == "regression" else np.arange(data.n_outputs)
    for chunk, trained in case.trained(device, backend, case.scoring(name)):
        for (f, fold), c in product(enumerate(data.folds), range(len(chunk.index))):
            y = data.target[fold.valid].numpy()
            inputs = np.zeros((len(fold.valid), 1))  # the scorer does not read them
            outputs = trained.member(f, c)(data.x[f, fold.valid])
            in_units = data.in_units(f, outputs.detach())
            estimator = fitted(in_units, classes, inputs, inputs)
            expected = scorer(estimator, inputs, y)
            score = trained.curves[c, -1, f]
            yield abs(score - expected) / max(1, abs(expected))


def members_that_leave(device: torch.device, backend: str) -> float:
    """Return the difference between networks trained with and without other networks that
    diverge."""
    stable = ({"lr": 0.01}, {"lr": 0.003}, {"lr": 0.001})
    shared = {"optimizer": "sgd", "momentum": 0.9}
    ((_, expected),) = Case(stable, shared).trained(device, backend)
    diverging = {"lr": _DIVERGING}
    case = Case((diverging, *stable, diverging), shared)
    scoring = case.scoring("neg_log_loss")
    ((_, trained),) = case.trained(device, backend, scoring)
    if trained.alive != (1, 2, 3):
        raise RuntimeError(f"trials (1, 2, 3) should stay, but {trained.alive} did")
    return difference(trained.flat, expected.flat)


def run_out_of_memory(device: torch.device, backend: str) -> float:
    """Return the difference in scores between a run with too little memory on a GPU and a run with
    enough memory.

    With too little memory, gputune cannot train all trials at once.
    """
    # In double precision, these trials need 80 MB for parameters, gradients and moments.
    rates = np.geomspace(1e-2, 1e-4, 48).tolist()
    case = Case(tuple({"lr": lr} for lr in rates), {"width": 128}, epochs=2)
    data = case.data(device)
    (chunk,) = case.chunks(data)
    scoring = case.scoring("neg_log_loss")
    # This first run also takes the memory that libraries allocate once, at their first call.
    expected = case.job(backend, scoring).run(data, chunk).curves
    job = case.job(backend, scoring)
    torch.cuda.empty_cache()
    # Allow _LIMIT bytes in addition to the memory of its tensors.
    allowed = torch.cuda.memory_reserved(device) + _LIMIT
    _, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(allowed / total, device)
    try:
        outcomes = run_in_parts(job, data, chunk)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    if not job.pool.trials:
        raise RuntimeError("memory did not run out")
    curves = np.full_like(expected, np.nan)
    for outcome in outcomes:
        if not isinstance(outcome, Outcome):
            raise outcome.error()
        curves[list(outcome.index)] = outcome.curves
    return difference(torch.from_numpy(curves), torch.from_numpy(expected))


def recording_fails(device: torch.device, _backend: str) -> float:
    """Return the number of training steps that were lost or repeated after recording a step failed.

    Each step reads a tensor's value into Python, so gputune cannot record the step for replay.
    """
    total = torch.zeros((), device=device)

    def step() -> None:
        total.add_(1)
        total.item()

    recorder = RECORDERS[device.type](device)
    expected = Counter[Hashable]({"step": 100})
    steps = Replays(recorder, expected, lambda: [total], 0.0)
    # The failed recording is reported by a RuntimeWarning.
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        for _ in range(12):
            steps.take("step", step)
    if steps.steps:
        raise RuntimeError("a step that reads the value of a tensor was recorded")
    return abs(float(total) - 12)
