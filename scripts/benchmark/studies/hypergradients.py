"""Cost of a hypergradient: every mode on one stacked population, compared with plain training.

Members are 64-32-10 tanh networks of one population, trained in batches of 64 in float32 on one
thread.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmark.report import publish, table
from gputune.data.dataset import Dataset
from gputune.data.folds import make_folds
from gputune.data.source import read_source
from gputune.engine.job import Job
from gputune.engine.train import BegunChunk, Trained, train
from gputune.hypergradients.chunk import HypergradientJob, inner_problem
from gputune.hypergradients.modes import differences, forward, reverse
from gputune.population.population import complete, populations
from gputune.tuning.choices import ModelChoice, choose_model
from gputune.tuning.options import make_options
from gputune.tuning.problem import make_problem

FOLDS = 5
BATCH = 64
STEPS_AN_EPOCH = 10
EPOCHS = 5
REPEATS = 7
RATES = {"sgd": (1e-2, 1e-1), "adam": (1e-3, 1e-2)}  # a calm range of learning rates
MEMBERS = (30, 200)
AGREEMENT = 1e-3  # of the largest number: float32 after 50 steps

PLAIN = "plain"
OPTIMISED = "optimised"
FORWARD = "forward, 1 rate"
REVERSE = "reverse, 10 rates"
CHECKPOINTED = "checkpointed, 10 rates"

HOW = f"""\
Stacked 64-32-10 tanh networks, batches of {BATCH}, float32, one thread. Ten rates are 5 segments of the training
times 2 layers. "{PLAIN}" is the differentiable step that the modes are built on, without derivatives;
"{OPTIMISED}" is the training of a search without hypergradients. A time is the median of whole trainings,
divided by their steps; the kinds take turns. All but "{OPTIMISED}" hold the validation loss at the end. Before a
time is shown, forward, reverse and checkpointed mode must give the same slopes, and the two trainings the same
weights.
"""


@dataclass(frozen=True)
class Cost:
    """Median seconds of one step by kind, and the largest disagreement between results that must
    agree.
    """

    optimizer: str
    members: int
    steps: int
    seconds: dict[str, float]
    disagreement: float

    def row(self, kind: str) -> str:
        plain, optimised = (self.seconds[kind] / self.seconds[base] for base in (PLAIN, OPTIMISED))
        numbers = f"{self.seconds[kind] * 1e3:.2f}|{plain:.2f}|{optimised:.2f}"
        return f"{self.optimizer}|{self.members}|{self.steps}|{kind}|{numbers}"


def run(options: Namespace) -> int:
    epochs = options.epochs or EPOCHS
    repeats = options.repeats or REPEATS
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        costs = [measure(o, n, epochs=epochs, repeats=repeats) for o in RATES for n in MEMBERS]
    finally:
        torch.set_num_threads(threads)
    worst = float(np.max([cost.disagreement for cost in costs]))  # unlike max(), NaN where one is
    if not worst <= AGREEMENT:
        print(
            f"NO RATIO: slopes or weights that must be the same differ by {worst:.2g} of the "
            "largest."
        )
        return 1
    head = f"optimizer|members|steps|kind|ms a step|over {PLAIN}|over {OPTIMISED}"
    found = table(head, (cost.row(kind) for cost in costs for kind in cost.seconds))
    return publish(
        options.out, "hypergradients", "What a hypergradient costs", HOW, found, costs=costs
    )


def measure(optimizer: str, members: int, *, epochs: int, repeats: int) -> Cost:
    """Run every kind once and compare the results; then time all kinds in turns."""
    found = kinds(optimizer, members, epochs)
    steps = epochs * STEPS_AN_EPOCH
    worst = disagreement({name: run() for name, run in found.items()})
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(repeats):
        for name, run in found.items():
            begin = time.perf_counter()
            run()
            seconds[name].append((time.perf_counter() - begin) / steps)
    return Cost(
        optimizer, members, steps, {k: float(np.median(v)) for k, v in seconds.items()}, worst
    )


def kinds(optimizer: str, members: int, epochs: int) -> Mapping[str, Callable[[], Any]]:
    """Return every kind of training of one population with ``members`` members in all folds
    together.
    """
    data = dataset(choice := choose_model("mlp", optimizer))
    network = {"width": 32, "depth": 1, "activation": "tanh", "batch_size": BATCH}
    rates = np.geomspace(*RATES[optimizer], members // FOLDS)
    configs = [
        complete({"lr": lr, **network}, optimizer=optimizer, schedule="constant") for lr in rates
    ]
    (chunk,) = populations(configs, choice.kind, rows=BATCH * STEPS_AN_EPOCH)
    one = inner_problem(HypergradientJob(seed=0, epochs=epochs, horizon=epochs), data, chunk)
    # segments x layers
    ten = replace(one, tables={**one.tables, "lr": one.tables["lr"].expand(-1, 5, 2)})

    def plain() -> Tensor:
        weights = one.train()
        with torch.no_grad():
            one.training.validation(weights)
        return weights

    def optimised() -> Trained:
        usual = Job(seed=0, epochs=epochs, horizon=epochs)
        return train(usual.network(data, chunk), data, BegunChunk.of(chunk), usual)

    lr = ("lr",)
    return {
        OPTIMISED: optimised,
        PLAIN: plain,
        FORWARD: lambda: forward(one, lr),
        "reverse, 1 rate": lambda: reverse(one, lr),
        REVERSE: lambda: reverse(ten, lr),
        CHECKPOINTED: lambda: reverse(ten, lr, checkpoint=True),
        "finite differences, 1 rate": lambda: differences(one, lr, width=0.01),
    }


def dataset(choice: ModelChoice) -> Dataset:
    """Return a dataset of 64 columns and 10 classes, with 640 training rows in each fold.

    A noisy linear map determines the classes.
    """
    rng = np.random.default_rng(0)
    rows = BATCH * STEPS_AN_EPOCH * FOLDS // (FOLDS - 1)
    X = rng.standard_normal((rows, 64))
    y = (X @ rng.standard_normal((64, 10)) + 4 * rng.standard_normal((rows, 10))).argmax(1)
    options = make_options(device="cpu", dtype="float32")
    problem = make_problem(read_source(X, y, None), None, choice, options)
    folds = make_folds(FOLDS, problem.target, seed=0)
    return problem.dataset(folds, torch.device("cpu"))


def disagreement(results: Mapping[str, Any]) -> float:
    """Return the largest difference between results that must agree, relative to the largest
    number.

    It is NaN if anything is NaN.
    """
    trained = results[OPTIMISED].state.buffers[0].transpose(0, 1).flatten(0, 1)
    # Slopes in the rate: (P,) for one rate, (P, 5, 2) for ten rates.
    one, ten, again = (
        results[kind].gradients["lr"].squeeze() for kind in (FORWARD, REVERSE, CHECKPOINTED)
    )
    pairs = [(trained, results[PLAIN]), (one, ten.sum((1, 2))), (ten, again)]
    return float(torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max())
