"""Measure the cost of a comparison in population based training, as a share of an epoch.

    python scripts/pbt_cost.py [--runs 10] [--trials 256] [--epochs 21]

Trains an MLP of two hidden layers with 64 units on 1,500 rows, of which a fifth validates, with
minibatches of 64 rows on one thread. Each run measures CPU seconds of three searches in turn:

- An epoch: a random search, and a random search with one epoch, divided by the other epochs.
- A comparison: a search with a comparison after every epoch but the last, minus the random search,
  divided by the comparisons. Only the main thread counts, because all training takes place in other
  threads.

Prints the medians, and the lowest and the highest share of all runs.
"""

import argparse
import time

import numpy as np
import torch
from scipy.stats import loguniform
from sklearn.model_selection import ShuffleSplit

import gputune

SPACE = {
    "lr": loguniform(1e-4, 1e-1),
    "weight_decay": loguniform(1e-5, 1e-1),
    "width": [64],
    "depth": [2],
    "batch_size": [64],
}


def measure(method, n_trials, epochs):
    """Return the CPU seconds of a search: those of the main thread, and those of all threads."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(1500, 20)).astype(np.float32)
    y = (X[:, :3].sum(1) + rng.normal(size=1500) > 0).astype(int)
    in_main = time.thread_time()
    in_all = time.process_time()
    gputune.tune(
        "mlp",
        X,
        y,
        space=SPACE,
        method=method,
        n_trials=n_trials,
        max_epochs=epochs,
        cv=ShuffleSplit(1, test_size=0.2, random_state=0),
        include_default=False,
        device="cpu",
        verbose=0,
        random_state=0,
    )
    return time.thread_time() - in_main, time.process_time() - in_all


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--trials", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=21)
    options = parser.parse_args()
    torch.set_num_threads(1)
    every_epoch = gputune.PopulationBased(interval=1)
    measure(every_epoch, options.trials, 3)  # loads everything
    rows = []
    for _ in range(options.runs):
        _, once = measure("random", options.trials, 1)
        main_random, whole = measure("random", options.trials, options.epochs)
        main_pbt, _ = measure(every_epoch, options.trials, options.epochs)
        others = options.epochs - 1
        rows.append(((main_pbt - main_random) / others, (whole - once) / others))
    comparison, epoch = np.transpose(rows)
    shares = comparison / epoch
    print(
        f"comparison {np.median(comparison) * 1000:.1f} ms, epoch {np.median(epoch) * 1000:.0f} ms"
    )
    print(f"share {np.median(shares):.1%}, from {shares.min():.1%} to {shares.max():.1%}")


if __name__ == "__main__":
    main()
