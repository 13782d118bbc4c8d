"""One search with a custom training loop in three ways: Optuna, gputune.search and gputune.tune.

    python scripts/examples/own_loop.py [optuna] [search] [tune] [--trials 32]

All use the same network, rows, epochs and distributions of hyperparameters. Optuna and ``search``
call the same loop. The script prints the number of statements, the wall-clock seconds on all cores,
and the best validation accuracy. The seconds include imports and starts of processes. Optuna and
``search`` prune by a median, each by its own rule.
"""

import argparse
import ast
import inspect
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

TRIALS = 32


def with_optuna() -> float:
    import optuna
    import torch
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from torch import nn

    X, y = map(torch.tensor, load_digits(return_X_y=True))
    train, valid = train_test_split(range(len(X)), random_state=0, stratify=y)

    def objective(trial: optuna.Trial) -> float:
        lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
        width = trial.suggest_categorical("width", [32, 64, 128])
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
        optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
        x = X.float() / 16
        for epoch in range(20):
            for rows in torch.tensor(train)[torch.randperm(len(train))].split(32):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
            accuracy = (net(x[valid]).argmax(1) == y[valid]).float().mean().item()
            trial.report(accuracy, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return accuracy

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=TRIALS, n_jobs=-1)
    return study.best_value


def with_search() -> float:
    import torch
    from scipy.stats import loguniform
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from torch import nn

    import gputune

    X, y = map(torch.tensor, load_digits(return_X_y=True))
    train, valid = train_test_split(range(len(X)), random_state=0, stratify=y)

    def objective(params: dict[str, Any], report: Callable[[float], None]) -> float:
        net = nn.Sequential(
            nn.Linear(64, params["width"]), nn.ReLU(), nn.Linear(params["width"], 10)
        )
        optimizer = torch.optim.AdamW(net.parameters(), lr=params["lr"])
        x = X.float() / 16
        for _ in range(20):
            for rows in torch.tensor(train)[torch.randperm(len(train))].split(32):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
            accuracy = (net(x[valid]).argmax(1) == y[valid]).float().mean().item()
            report(accuracy)
        return accuracy

    space = {"lr": loguniform(1e-4, 1e-1), "width": [32, 64, 128]}
    study = gputune.search(
        objective,
        space,
        direction="maximize",
        n_trials=TRIALS,
        method="median",
        max_epochs=20,
        verbose=0,
    )
    return study.best_score


def with_tune() -> float:
    from scipy.stats import loguniform
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from torch import nn

    import gputune

    X, y = load_digits(return_X_y=True)
    fold = train_test_split(range(len(X)), random_state=0, stratify=y)

    def net(n_features: int, n_outputs: int, width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(n_features, width), nn.ReLU(), nn.Linear(width, n_outputs))

    space = {"lr": loguniform(1e-4, 1e-1), "module__width": [32, 64, 128], "batch_size": 32}
    study = gputune.tune(
        net,
        X,
        y,
        space=space,
        cv=[fold],
        n_trials=TRIALS,
        method="median",
        max_epochs=20,
        verbose=0,
    )
    return study.best_score


WAYS: dict[str, Callable[[], float]] = {
    "optuna": with_optuna,
    "search": with_search,
    "tune": with_tune,
}


def statements(way: Callable[[], float]) -> int:
    """Return the number of statements within a function, which no formatter changes."""
    nodes = ast.walk(ast.parse(inspect.getsource(way)))
    return sum(isinstance(node, ast.stmt) for node in nodes) - 1  # without the function itself


def main() -> None:
    """Run each way in a separate process."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("ways", nargs="*", default=list(WAYS))
    parser.add_argument("--trials", type=int, default=TRIALS)
    arguments = parser.parse_args()
    print(f"{'':8} statements  seconds  best accuracy of {arguments.trials} trials")
    for name in arguments.ways:
        begin = time.perf_counter()
        code = (
            f"import own_loop; own_loop.TRIALS = {arguments.trials}; "
            f"print(own_loop.WAYS[{name!r}]())"
        )
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            cwd=sys.path[0],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=True,
        )
        seconds = time.perf_counter() - begin
        print(
            f"{name:8} {statements(WAYS[name]):10} {seconds:8.1f}  {float(done.stdout.split()[-1]):.4f}"
        )


if __name__ == "__main__":
    main()
