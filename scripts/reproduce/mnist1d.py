"""Tune four built-in models on MNIST-1D, and compare their test accuracies with the published ones.

    python scripts/reproduce/mnist1d.py
    python scripts/reproduce/mnist1d.py --models cnn --seeds 0 1 2
    python scripts/reproduce/mnist1d.py --learn-rate

MNIST-1D (Greydanus 2020, arXiv:2011.14439) has 4,000 training rows and 1,000 test rows of 40
values each, and ten classes. The package ``mnist1d`` generates the published rows, without a
download: ``pip install mnist1d``.

For each model and seed, the script searches with cross-validation on the training rows, trains the
best configuration on all training rows, and only then predicts the test rows. The seed determines
the configurations, the folds and the initial weights. The rows stay the same.

With ``--learn-rate``, the script repeats the package's notebook "Metalearning a learning rate". The
notebook trains a small network with SGD, and improves its learning rate with the derivative of the
mean training loss. The script runs the notebook's loop in plain PyTorch, and the same algorithm
with ``gputune.hypergradient``.
"""

import math
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import loguniform
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import gputune

sys.path.append(str(Path(__file__).parents[1]))
from benchmark.report import (
    HERE,
    Clock,
    describe_machine,
    positive,
    publish,
    run_script,
    script_parser,
    table,
)

DESCRIPTION = """\
Test accuracy of gputune's built-in models on MNIST-1D (Greydanus 2020, arXiv:2011.14439), tuned with cross-validation
on the 4,000 training rows, and then trained on all of them. The 1,000 test rows are used only once per model and seed.
The published accuracies are those of the README of the package mnist1d. "Standard error" is the standard error of an
accuracy on 1,000 rows at the published value. "CV" is the cross-validated accuracy of the best configuration, which is
optimistic. Seconds and CPU seconds are means per seed, for the search, the final training and the prediction.
"""
PUBLISHED = {"logistic": 0.32, "mlp": 0.68, "cnn": 0.94, "gru": 0.91}
"""Test accuracies of the package's README. People reach 0.96."""

_TRAINED = {
    "lr": loguniform(1e-3, 3e-2),
    "weight_decay": loguniform(1e-3, 1e-1),
    "batch_size": [64],
    "schedule": ["cosine"],
}
SPACES: dict[str, dict[str, Any]] = {
    "logistic": {"C": loguniform(1e-3, 1e2)},
    "mlp": {
        **_TRAINED,
        "width": [128, 256],
        "depth": [2, 3],
        "dropout": [0.0, 0.2, 0.4],
        "activation": ["relu", "gelu"],
    },
    "cnn": {**_TRAINED, "module__channels": [16, 32], "module__depth": [3]},
    "gru": {**_TRAINED, "module__hidden": [32, 64]},
}
"""The search space of each model."""


@dataclass(frozen=True)
class Budget:
    """The number of trials and epochs of the search of one model."""

    n_trials: int
    max_epochs: int


BUDGETS = {
    "logistic": Budget(8, 1),
    "mlp": Budget(16, 40),
    "cnn": Budget(8, 20),
    "gru": Budget(8, 30),
}
FOLDS = 3


@dataclass(frozen=True)
class Rows:
    """Training rows (4000, 40) and test rows (1000, 40) in float32, with their classes as int64."""

    X: np.ndarray
    y: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray


def load(n_samples: int | None = None) -> Rows:
    """Return the rows of MNIST-1D: the published ones, or fewer rows of the same kind.

    A fifth of the rows are test rows. Raises InputError if the package ``mnist1d`` is not
    installed.
    """
    try:
        folder = distribution("mnist1d").locate_file("")
    except PackageNotFoundError as error:
        raise gputune.InputError(
            None, "the package mnist1d is not installed. Run: pip install mnist1d"
        ) from error
    # This file has the name of the package, so Python would find this file first.
    sys.path.insert(0, str(folder))
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    finally:
        sys.path.remove(str(folder))
    arguments = get_dataset_args()
    if n_samples is not None:
        arguments.num_samples = n_samples
    made = make_dataset(arguments)
    X, X_test = (made[name].astype(np.float32) for name in ("x", "x_test"))
    return Rows(X, made["y"], X_test, made["y_test"])


def shaped(X: np.ndarray, model: str) -> np.ndarray:
    """Return the rows in the shape that a model takes.

    The CNN takes (rows, channels, length), and the GRU takes (rows, steps, values per step).
    """
    if model == "cnn":
        return X[:, None, :]
    return X[:, :, None] if model == "gru" else X


@dataclass(frozen=True)
class Result:
    """The result of one model with one seed."""

    model: str
    seed: int
    accuracy: float
    cv_accuracy: float
    params: dict[str, Any]
    seconds: float
    cpu: float


def tune(model: str, rows: Rows, seed: int, budget: Budget) -> Result:
    """Search, train the best configuration on all training rows, and predict the test rows."""
    clock = Clock()
    study = gputune.tune(
        model,
        shaped(rows.X, model),
        rows.y,
        space=SPACES[model],
        n_trials=budget.n_trials,
        max_epochs=budget.max_epochs,
        cv=FOLDS,
        include_default=False,
        random_state=seed,
        verbose=1,
    )
    predicted = study.best_model().predict(shaped(rows.X_test, model))
    seconds, cpu = clock()
    return Result(
        model,
        seed,
        float(np.mean(predicted == rows.y_test)),
        float(study.best_score),
        study.best_params,
        seconds,
        cpu,
    )


def summary(results: Sequence[Result], n_test: int) -> list[dict[str, Any]]:
    """Return the means over the seeds for each model, next to the published accuracy."""
    lines = []
    for model in dict.fromkeys(result.model for result in results):
        runs = [result for result in results if result.model == model]
        published = PUBLISHED[model]
        standard_error = math.sqrt(published * (1 - published) / n_test)
        mean = float(np.mean([run.accuracy for run in runs]))
        lines.append(
            {
                "model": model,
                "published": published,
                "standard_error": standard_error,
                "mean": mean,
                "reached": mean >= published - standard_error,
                "accuracies": [run.accuracy for run in runs],
                "cv_accuracy": float(np.mean([run.cv_accuracy for run in runs])),
                "seconds": float(np.mean([run.seconds for run in runs])),
                "cpu": float(np.mean([run.cpu for run in runs])),
            }
        )
    return lines


def compare(options: Namespace) -> int:
    """Tune the models with each seed, and write the result file."""
    rows = load()
    machine = describe_machine()
    results = []
    for seed in options.seeds:
        for model in options.models:
            print(f"seed {seed}, model {model}", file=sys.stderr)
            result = tune(model, rows, seed, BUDGETS[model])
            print(f"test accuracy: {result.accuracy:.3f}", file=sys.stderr)
            results.append(result)
    lines = summary(results, len(rows.y_test))
    head = "|".join(
        [
            "model|published|standard error|mean|reached",
            *(f"seed {seed}" for seed in options.seeds),
            "CV|seconds|CPU seconds",
        ]
    )
    cells = [
        "|".join(
            [
                f"{line['model']}|{line['published']:.1%}|{line['standard_error']:.1%}",
                f"{line['mean']:.1%}|{'yes' if line['reached'] else 'no'}",
                *(f"{accuracy:.1%}" for accuracy in line["accuracies"]),
                f"{line['cv_accuracy']:.1%}|{line['seconds']:,.0f}|{line['cpu']:,.0f}",
            ]
        )
        for line in lines
    ]
    total = (
        f"All models of one seed together: {sum(line['seconds'] for line in lines):,.0f} seconds, "
        f"{sum(line['cpu'] for line in lines):,.0f} CPU seconds. People: 96%."
    )
    return publish(
        options.out,
        "mnist1d",
        "MNIST-1D",
        DESCRIPTION,
        table(head, cells),
        total,
        machine=machine,
        summary=lines,
        results=results,
    )


LEARN_RATE = """\
The package's notebook "Metalearning a learning rate": a network with 50 hidden units takes 200 steps of SGD on
minibatches of 50 rows, and the learning rate moves against the derivative of the mean training loss, 50 times. "Plain
loop" is the notebook's loop in PyTorch, which differentiates through all steps. "gputune" computes each derivative with
gputune.hypergradient, in float64. "Published" is the last learning rate that the notebook prints, after step 48.
"""
STARTS = {1.5: 0.6243, 0.15: 0.6203}
"""The notebook's two initial learning rates, and the last learning rate that it prints for each."""

HIDDEN = 50
BATCH = 50
STEPS = 200
OUTER_STEPS = 50
OUTER_RATE = 0.3
PRINTED = 48
"""The last step, counted from 0, whose learning rate the notebook prints."""

TOTAL_RATE = 1e-9
"""Learning rate of the sum of the losses, see ``WithTotal``. The losses of 200 steps then scale the
gradients of the network by less than 1e-6."""


def minibatches(rows: Rows, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Return the minibatches of the notebook: consecutive rows, and after the last row the first."""
    X = torch.from_numpy(rows.X)
    y = torch.from_numpy(rows.y)
    starts = [step * BATCH % len(y) for step in range(steps)]
    return [(X[start : start + BATCH], y[start : start + BATCH]) for start in starts]


def network() -> nn.Sequential:
    """Return the notebook's network with its initial weights, in float32."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 10))


def plain_loop(
    lr: float, batches: Sequence[tuple[Tensor, Tensor]], outer_steps: int, bar: tqdm
) -> list[float]:
    """Return the learning rate after each outer step of the notebook's loop, written in PyTorch."""
    module = network()
    rate = torch.tensor(lr)
    rates = []
    for _ in range(outer_steps):
        rate.requires_grad_()
        weights = dict(module.named_parameters())
        losses = []
        for x, y in batches:
            loss = cross_entropy(torch.func.functional_call(module, weights, (x,)), y)
            slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            moved = zip(weights.items(), slopes)
            weights = {name: weight - rate * slope for (name, weight), slope in moved}
            losses.append(loss)
        (slope,) = torch.autograd.grad(torch.stack(losses).mean(), rate)
        rate = (rate - OUTER_RATE * slope).detach()
        rates.append(rate.item())
        bar.update()
    return rates


class Total(nn.Module):
    """A layer with one parameter, the sum of the training losses times ``-TOTAL_RATE``."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))


class WithTotal(nn.Module):
    """A network that also sums its training losses, so that its hypergradient is that of their sum.

    ``gputune.hypergradient`` differentiates a loss after the last step. The notebook differentiates
    the mean of the losses of all steps. The training loss is therefore the loss of the network
    times (1 + total). The derivative with respect to the total is the loss of the network, so that
    a step of SGD with the rate r adds -r times this loss to the total.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.total = Total()

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the outputs of the network (None in evaluation mode) and the total."""
        outputs = self.network(x) if self.training else None
        return outputs, self.total.value


def hypergradient_loop(
    lr: float, batches: Sequence[tuple[Tensor, Tensor]], outer_steps: int, bar: tqdm
) -> list[float]:
    """Return the learning rate after each outer step, with ``gputune.hypergradient``."""

    def loss(outputs: tuple[Tensor | None, Tensor], y: Tensor) -> Tensor:
        logits, total = outputs
        if logits is None:
            return -total / (TOTAL_RATE * len(batches))  # the mean training loss
        return cross_entropy(logits, y) * (1 + total)

    module = WithTotal(network()).double()
    doubles = [(x.double(), y) for x, y in batches]
    rates = []
    for _ in range(outer_steps):
        result = gputune.hypergradient(
            module,
            loss,
            doubles,
            doubles[0],  # evaluation mode does not read the rows
            hyperparameters={"lr": [[lr, lr, TOTAL_RATE]]},  # two linear layers, and the total
            optimizer="sgd",
        )
        slope = result.gradient["lr"][0, :2].sum().item()
        lr -= OUTER_RATE * slope
        rates.append(lr)
        bar.update()
    return rates


@dataclass(frozen=True)
class LearnedRate:
    """The learning rates after each outer step from one initial rate, by both loops."""

    start: float
    plain: list[float]
    gputune: list[float]
    cpu_plain: float
    cpu_gputune: float

    @property
    def difference(self) -> float:
        """The relative difference of the last learning rates."""
        return abs(self.gputune[-1] / self.plain[-1] - 1)


def learn_rate(rows: Rows, start: float, *, steps: int, outer_steps: int) -> LearnedRate:
    """Improve the learning rate from one initial rate, with the plain loop and with gputune."""
    batches = minibatches(rows, steps)
    with tqdm(total=2 * outer_steps, unit=" steps", disable=None, leave=False) as bar:
        bar.set_description(f"from {start:g}")
        clock = Clock()
        plain = plain_loop(start, batches, outer_steps, bar)
        _, cpu_plain = clock()
        clock = Clock()
        found = hypergradient_loop(start, batches, outer_steps, bar)
        _, cpu_found = clock()
    return LearnedRate(start, plain, found, cpu_plain, cpu_found)


def compare_rates(options: Namespace) -> int:
    """Learn the rate from both initial rates, and write the result file."""
    rows = load()
    machine = describe_machine()
    learned = [
        learn_rate(rows, start, steps=STEPS, outer_steps=options.outer_steps) for start in STARTS
    ]
    cells = []
    for result in learned:
        same_step = f"{result.gputune[PRINTED]:.4f}" if len(result.gputune) > PRINTED else "-"
        cells.append(
            f"{result.start:g}|{STARTS[result.start]:.4f}|{same_step}|{result.plain[-1]:.4f}"
            f"|{result.gputune[-1]:.4f}|{result.difference:.1e}"
            f"|{result.cpu_plain:,.0f}|{result.cpu_gputune:,.0f}"
        )
    head = (
        "initial rate|published|gputune, the same step|plain loop|gputune|relative difference"
        "|CPU seconds, plain loop|CPU seconds, gputune"
    )
    return publish(
        options.out,
        "learned-rate",
        "MNIST-1D, a learned learning rate",
        LEARN_RATE,
        table(head, cells),
        machine=machine,
        learned=learned,
    )


def run(options: Namespace) -> int:
    """Repeat the notebook, or tune the models."""
    return compare_rates(options) if options.learn_rate else compare(options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the options and run; the exit code is 2 if the package mnist1d is missing."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        choices=list(PUBLISHED),
        default=list(PUBLISHED),
        help=f"[default: {' '.join(PUBLISHED)}]",
    )
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="random seeds [default: 0 1 2]")
    add("--learn-rate", action="store_true", help="repeat the notebook instead")
    add(
        "--outer-steps",
        type=positive,
        default=OUTER_STEPS,
        help=f"steps of the learning rate [default: {OUTER_STEPS}]",
    )
    add("--out", type=Path, default=HERE / "results", help="folder of the result files")
    return run_script(run, parser, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
