"""Compare population based training with other methods on MNIST-1D, at equal trial-epochs.

Each method spends the same number of trial-epochs on the same space, with one batch size, so all
members take equally many steps. A step of a hypergradient search costs more time than other steps.
The table has the mean accuracy of the refitted model on test rows that no search has seen, and its
standard error over seeds.

"random, cosine schedule" lowers the learning rate in all trials, and so shows how much of a gain
comes from any learning rate that falls.

Needs ``pip install mnist1d optuna``. Usage:

    python scripts/pbt.py [--models MLP CNN] [--seeds 10] [--rows 4000] [--json FILE]
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import optuna
from mnist1d.data import get_dataset_args, make_dataset
from scipy.stats import loguniform
from torch import nn

import gputune

TRIALS = 32
SPACE = {
    "lr": loguniform(1e-4, 1e-1),
    "weight_decay": loguniform(1e-5, 1.0),
    "batch_size": [64],
}


class Conv(nn.Module):
    """A convolutional network of three layers for sequences of one channel."""

    def __init__(self, n_features, n_outputs, channels=16):
        super().__init__()
        layers = []
        width = 1
        for _ in range(3):
            layers += [nn.Conv1d(width, channels, 5, stride=2, padding=2), nn.ReLU()]
            width = channels
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(channels * -(-n_features // 8), n_outputs)

    def forward(self, x):
        return self.head(self.body(x[:, None]).flatten(1))


def searches(epochs, seed):
    """Return the arguments of ``tune`` for each method, each with about as many trial-epochs."""
    budget = TRIALS * epochs
    halving = gputune.Halving(min_epochs=max(1, epochs // 9))
    # Of n trials, a third continues at each of three rungs.
    share = (1 / 9 + (1 / 3) * (2 / 9) + (1 / 9) * (2 / 3)) * epochs
    interval = max(1, epochs // 10)
    sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    starts = 4
    steps = TRIALS // starts - 1
    pbt = gputune.PopulationBased
    return {
        "random": {"method": "random", "n_trials": TRIALS},
        "random, cosine schedule": {
            "method": "random",
            "n_trials": TRIALS,
            "space": {"schedule": ["cosine"]},
        },
        "halving": {"method": halving, "n_trials": round(budget / share)},
        "tpe": {"method": gputune.OptunaSampler(sampler, batch=8), "n_trials": TRIALS},
        "pbt": {"method": pbt(interval=interval), "n_trials": TRIALS},
        "pbt, copies only": {"method": pbt(interval=interval, explore=False), "n_trials": TRIALS},
        "pbt, two intervals": {
            "method": pbt(interval=[interval, 4 * interval]),
            "n_trials": TRIALS,
        },
        "hypergradient schedules": {
            "method": gputune.Hypergradient(
                outer_steps=steps, segments=4, hyperparameters=("lr", "weight_decay")
            ),
            "n_trials": starts,
        },
    }


def run(model, rows, arguments, epochs, seed):
    """Return the held-out accuracy, the spent trial-epochs and the seconds of one search."""
    begin = time.perf_counter()
    space = SPACE | arguments.pop("space", {})
    study = gputune.tune(
        model,
        rows["x"],
        rows["y"],
        space={**space, "width": [64]} if model == "mlp" else space,
        include_default=False,
        max_epochs=epochs,
        cv=3,
        random_state=seed,
        verbose=0,
        **arguments,
    )
    predicted = study.best_model().predict(rows["x_test"])
    seconds = time.perf_counter() - begin
    return float(np.mean(predicted == rows["y_test"])), study.spent[0], seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["MLP", "CNN"], choices=["MLP", "CNN"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--rows", type=int, default=4000, help="training rows, at most 4000")
    parser.add_argument("--json", type=Path, help="the file for the results of all searches")
    options = parser.parse_args()
    data = make_dataset(get_dataset_args())
    rows = {
        "x": data["x"][: options.rows].astype(np.float32),
        "y": data["y"][: options.rows],
        "x_test": data["x_test"].astype(np.float32),
        "y_test": data["y_test"],
    }
    print("| model | method | test accuracy | standard error | trial-epochs | seconds |")
    print("|---|---|---|---|---|---|")
    found = []
    for name in options.models:
        model = {"MLP": "mlp", "CNN": Conv}[name]
        for method in searches(options.epochs, 0):
            results = []
            for seed in range(options.seeds):
                arguments = searches(options.epochs, seed)[method]
                results.append(run(model, rows, arguments, options.epochs, seed))
                accuracy, spent, seconds = results[-1]
                found.append(
                    {
                        "model": name,
                        "rows": options.rows,
                        "method": method,
                        "seed": seed,
                        "accuracy": accuracy,
                        "trial_epochs": spent,
                        "seconds": seconds,
                    }
                )
            scores, spent, seconds = (np.array(column) for column in zip(*results))
            error = scores.std(ddof=1) / np.sqrt(len(scores)) if len(scores) > 1 else np.nan
            print(
                f"| {name} | {method} | {scores.mean():.4f} | {error:.4f} | {spent.mean():.0f} "
                f"| {seconds.mean():.1f} |",
                flush=True,
            )
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
