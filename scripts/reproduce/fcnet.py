"""Train a random sample of a published grid of networks, and compare the scores with the published ones.

    python scripts/reproduce/fcnet.py ROWS TABLE
    python scripts/reproduce/fcnet.py ROWS TABLE --configurations 200 --seed 0
    python scripts/reproduce/fcnet.py ROWS TABLE --all

The grid is FCNet's "protein structure" (Klein and Hutter 2019, arXiv:1905.04970): 62,208 networks
with two hidden layers, each trained for 100 epochs with four seeds.

ROWS is the text file of the data, one row per line, 9 inputs and then the target (UCI Machine
Learning Repository, "Physicochemical Properties of Protein Tertiary Structure"). A name that ends
in .gz is decompressed. TABLE is an .npz file with these arrays:

- index: (configurations, 9), the position of each value in the lists of ``space``;
- metric: (configurations, seeds), the validation error after the last epoch;
- mean_train_time_s: (configurations,), the recorded seconds of one training;
- space: JSON text in bytes, {"space": {name: values}} in the order of the columns of ``index``.

All configurations train on the same seeded split: 60% of the rows train, and 20% validate. The
remaining 20% are not used.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

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
A random sample of FCNet's grid "protein structure" (Klein and Hutter 2019, arXiv:1905.04970), trained again with
gputune. The validation error is the mean squared error after the last epoch, in units of the variance of the training
targets. The published error is the mean over four seeds. Each configuration has the published batch size, learning
rate, schedule, and for each of the two hidden layers the number of units, activation and dropout rate. The optimizer is
Adam. The split of the rows and the initial weights differ from the published ones, which are not known.
"""
NAMES = ("width", "activation", "dropout", "batch_size", "lr", "schedule")
EPOCHS = 100
BEST = 10
"""Number of the best configurations whose published ranks are reported."""


@dataclass(frozen=True)
class Grid:
    """The published grid: its configurations, errors (N, seeds) and recorded seconds (N,)."""

    configs: list[dict[str, Any]]
    errors: np.ndarray
    seconds: np.ndarray

    def sample(self, size: int | None, seed: int) -> "Grid":
        """Return a random sample of configurations, or the whole grid if ``size`` is None."""
        if size is None:
            return self
        places = np.random.default_rng(seed).choice(len(self.configs), size, replace=False)
        configs = [self.configs[place] for place in places]
        return Grid(configs, self.errors[places], self.seconds[places])


def read_grid(path: Path) -> Grid:
    """Return the published grid of an .npz file, with configurations in gputune's names.

    Raises InputError if the file lacks an array or a hyperparameter.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            space = json.loads(file["space"].tobytes())["space"]
            index = file["index"]
            errors = file["metric"]
            seconds = file["mean_train_time_s"]
        rows = [[values[i] for values, i in zip(space.values(), row)] for row in index]
        configs = [_config(dict(zip(space, row))) for row in rows]
    except (OSError, ValueError, KeyError) as error:
        raise gputune.InputError(
            None,
            f"{path} must be FCNet's table with the arrays index, metric, mean_train_time_s and "
            f"space: {error}. See the beginning of scripts/reproduce/fcnet.py.",
        ) from error
    return Grid(configs, errors, seconds)


def _config(published: dict[str, Any]) -> dict[str, Any]:
    """Return a published configuration in gputune's names."""
    return {
        "width": (published["n_units_1"], published["n_units_2"]),
        "activation": (published["activation_fn_1"], published["activation_fn_2"]),
        "dropout": (published["dropout_1"], published["dropout_2"]),
        "batch_size": published["batch_size"],
        "lr": published["init_lr"],
        "schedule": {"const": "constant"}.get(published["lr_schedule"], published["lr_schedule"]),
    }


def read_rows(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs (N, 9) and the target (N,) of a text file.

    Raises InputError if the file is not a table of numbers.
    """
    try:
        rows = np.loadtxt(path)
        if rows.ndim != 2 or rows.shape[1] < 2:
            raise ValueError(f"it has the shape {rows.shape}")
    except (OSError, ValueError) as error:
        raise gputune.InputError(
            None,
            f"{path} must be a text file of numbers, one row per line, with the target last: "
            f"{error}.",
        ) from error
    return rows[:, :-1], rows[:, -1]


def split(n_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the training rows (60%) and the validation rows (20%) of a random split."""
    order = np.random.default_rng(seed).permutation(n_rows)
    n_train = round(0.6 * n_rows)
    n_valid = round(0.2 * n_rows)
    return order[:n_train], order[n_train : n_train + n_valid]


def train(
    grid: Grid, X: np.ndarray, y: np.ndarray, *, epochs: int, seed: int, study: Path | None
) -> np.ndarray:
    """Train the configurations of a grid, and return their validation errors, (N,).

    The error is the mean squared error after the last epoch, relative to the variance of the
    training targets. A configuration that diverged has the error infinity. A call with the same
    study file continues a search that was stopped.
    """
    training, validation = split(len(y), seed)
    result = gputune.tune(
        "mlp",
        X,
        y,
        space={"lr": [0.001], "weight_decay": [0.0]},
        optimizer="adam",
        include=grid.configs,
        n_trials=0,
        max_epochs=epochs,
        cv=[(training, validation)],
        scoring="neg_mean_squared_error",
        task="regression",
        study=study,
        random_state=seed,
        verbose=1,
    )
    variance = float(np.var(y[training]))
    by_config = {}
    for trial in result.trials:
        curve = result.curves[trial.number]  # (epochs, 1), NaN after a divergence
        by_config[_key(trial.params)] = -curve[-1, 0] / variance
    errors = np.array([by_config[_key(config)] for config in grid.configs])
    return np.where(np.isfinite(errors), errors, np.inf)


def _key(config: dict[str, Any]) -> str:
    """Return a lookup key of a configuration: its values in the order of their names."""
    return repr([config[name] for name in sorted(NAMES)])


@dataclass(frozen=True)
class Comparison:
    """The agreement of our errors with the published ones.

    Attributes:
        spearman: rank correlation of our errors with the published means.
        between_seeds: mean rank correlation of one published seed with another.
        best_rank: mean published rank of the best configurations by our errors, as a share of
            the sample (0: the best).
        diverged: number of configurations without a finite error.
    """

    spearman: float
    between_seeds: float
    best_rank: float
    diverged: int


def compare(errors: np.ndarray, grid: Grid) -> Comparison:
    """Compare errors (N,) with the published errors of the same configurations."""
    means = grid.errors.mean(1)
    n_seeds = grid.errors.shape[1]
    between = [
        spearmanr(grid.errors[:, a], grid.errors[:, b]).statistic
        for a in range(n_seeds)
        for b in range(a)
    ]
    ranks = means.argsort().argsort()
    best = np.argsort(errors, kind="stable")[:BEST]
    return Comparison(
        spearman=float(spearmanr(errors, means).statistic),
        between_seeds=float(np.mean(between)),
        best_rank=float(ranks[best].mean() / max(1, len(ranks) - 1)),
        diverged=int((~np.isfinite(errors)).sum()),
    )


def member_steps(grid: Grid, n_train: int, epochs: int) -> int:
    """Return the number of optimizer steps of all configurations."""
    return sum(epochs * -(-n_train // config["batch_size"]) for config in grid.configs)


def run(options: Namespace) -> int:
    """Train the sample, print the comparison, and write the result file."""
    X, y = read_rows(options.rows)
    grid = read_grid(options.table)
    sample = grid.sample(None if options.all else options.configurations, options.seed)
    clock = Clock()
    errors = train(sample, X, y, epochs=options.epochs, seed=options.seed, study=options.study)
    seconds, cpu = clock()
    agreement = compare(errors, sample)
    steps = member_steps(sample, len(split(len(y), options.seed)[0]), options.epochs)
    hours = float(sample.seconds.sum()) / 3600
    rows = [
        f"configurations|{len(sample.configs):,}",
        f"epochs|{options.epochs}",
        f"rank correlation (Spearman) with the published means|{agreement.spearman:.3f}",
        f"rank correlation of one published seed with another|{agreement.between_seeds:.3f}",
        f"mean published rank of our best {BEST}|top {100 * agreement.best_rank:.1f}%",
        f"configurations that diverged|{agreement.diverged}",
        f"seconds|{seconds:,.0f}",
        f"CPU seconds|{cpu:,.0f}",
        f"member-steps per second|{steps / seconds:,.0f}",
        f"recorded hours of the same trainings, one seed|{hours:,.1f}",
    ]
    machine = describe_machine()
    trained = [
        {**config, "error": float(error) if np.isfinite(error) else None, "published": float(mean)}
        for config, error, mean in zip(sample.configs, errors, sample.errors.mean(1))
    ]
    return publish(
        options.out,
        "fcnet",
        "FCNet, protein structure",
        DESCRIPTION,
        table("figure|value", rows),
        machine=machine,
        seed=options.seed,
        agreement=agreement,
        seconds=seconds,
        cpu=cpu,
        member_steps=steps,
        recorded_hours=hours,
        trials=trained,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the options and run; the exit code is 2 for invalid files."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("rows", type=Path, metavar="ROWS", help="text file of the data, the target last")
    add("table", type=Path, metavar="TABLE", help=".npz file of the published grid")
    add(
        "--configurations",
        type=positive,
        default=200,
        metavar="N",
        help="size of the random sample [default: 200]",
    )
    add("--all", action="store_true", help="train the whole grid, for a GPU")
    add("--epochs", type=positive, default=EPOCHS, help=f"[default: {EPOCHS}]")
    add("--seed", type=int, default=0, help="random seed of the sample and the split [default: 0]")
    add("--study", type=Path, help="study file, to continue after an interruption")
    add("--out", type=Path, default=HERE / "results", help="folder of the result files")
    return run_script(run, parser, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
