"""Gradient descent on hyperparameters, on iris, beside a fine grid: C of a logistic regression, the rate of an MLP.

    python scripts/examples/iris_hypergradient.py

Both descend on the mean validation loss of 5 folds, by its derivative in the logarithm of the hyperparameter: C by
implicit differentiation of the solved regression, the learning rate by differentiating through training. The grid is
trained on the same folds, so that its losses and the path's are of one curve.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import loguniform
from sklearn.datasets import load_iris
from sklearn.model_selection import StratifiedKFold

import gputune

N_GRID = 61
EPOCHS = 20

Folds = list[tuple[np.ndarray, np.ndarray]]  # (train, valid) rows of each


@dataclass(frozen=True)
class Descent:
    """A path, as trials in the order of their outer step, and a grid of values with their losses."""

    name: str
    path: list[gputune.Trial]
    grid: np.ndarray
    losses: np.ndarray

    @property
    def values(self) -> list[float]:
        """The hyperparameter at each point of the path."""
        return [trial.params[self.name] for trial in self.path]


def descend(
    model: str, name: str, X: np.ndarray, y: np.ndarray, folds: Folds,
    *, start: float, low: float, high: float, **options: Any,
) -> Descent:  # fmt: skip
    """Descend on one hyperparameter from ``start`` within [low, high], then train a grid over the whole range."""
    common = {"n_trials": 0, "include_default": False, "cv": folds, "verbose": 0, **options}
    space = {name: loguniform(low, high)}  # nothing is drawn from it: it sets the bounds
    found = gputune.tune(model, X, y, space=space, include=[{name: start}], method="hypergradient", **common)
    values = np.geomspace(low, high, N_GRID)
    grid = gputune.tune(
        model, X, y, include=[{name: value} for value in values], scoring="neg_log_loss", epoch="last",
        **common,
    )  # fmt: skip
    path = sorted(found.trials, key=lambda trial: trial.origin[1])
    losses = [-trial.score if np.isfinite(trial.score) else math.inf for trial in grid.trials]
    return Descent(name, path, values, np.array(losses))


def slope_of(descent: Descent, trial: gputune.Trial) -> tuple[float, float]:
    """Return the slope of the mean loss in the logarithm, and its standard error over the folds."""
    return tuple(trial.detail[key][descent.name][0][0] for key in ("slope", "slope_error"))


def table(descent: Descent) -> str:
    """Return the path: value, loss, and slope in the logarithm, both with their standard errors over the folds."""
    lines = [f"step {descent.name:>10}     loss  +-           slope  +-"]
    for trial, value in zip(descent.path, descent.values):
        slope, error = slope_of(descent, trial)
        lines.append(
            f"{trial.origin[1]:4} {value:10.4g}  {-trial.score:7.4f}  {trial.std_error:6.4f}  "
            f"{slope:8.4f}  {error:6.4f}{'' if trial.detail['mode'] == 'exact' else '  by differences'}"
        )
    return "\n".join(lines)


def verdict(descent: Descent) -> str:
    """Return how far the best point of the path, which is what tune returns, lies from the grid's best one."""
    name, grid, losses = descent.name, descent.grid, descent.losses
    best = max(descent.path, key=lambda trial: trial.score)
    value, i = best.params[name], int(losses.argmin())
    beside = losses[[max(i - 1, 0), min(i + 1, len(grid) - 1)]].min()
    excess = -best.score - losses[i]
    better = (losses < losses[np.abs(np.log(grid / value)).argmin()]).sum()
    slope, error = slope_of(descent, descent.path[-1])
    sign = "clear" if abs(slope) >= error else "not, it is within its standard error"
    return (
        f"path:  {name} = {value:.4g}, loss {-best.score:.4f}, the best of {len(descent.path)} points\n"
        f"grid:  {name} = {grid[i]:.4g}, loss {losses[i]:.4f}, the best of {len(grid)}; the better of its neighbours "
        f"has {beside:.4f}\n"
        f"apart: a factor of {math.exp(abs(math.log(value / grid[i]))):.2g} in {name}; {excess:+.4f} in loss, "
        f"{excess / best.std_error:.2g} of its standard error over the folds;\n"
        f"       {better} values of the grid are better than the one nearest to the path's\n"
        f"end:   the sign of the last slope is {sign}"
    )


def sketch(descent: Descent, rows: int = 12) -> str:
    """Return the grid's losses as dots, higher up for more, and above them the path's points by their step."""
    height = np.log(np.minimum(descent.losses, descent.losses[np.isfinite(descent.losses)].max()))
    level = np.round((height - height.min()) / (height.max() - height.min()) * (rows - 1)).astype(int)
    picture = np.full((rows, len(descent.grid)), " ")
    picture[level, np.arange(len(level))] = "."
    for trial, value in zip(descent.path, descent.values):
        column = np.abs(np.log(descent.grid / value)).argmin()
        picture[level[column], column] = format(min(trial.origin[1], 15), "x")
    low, high = f"{descent.grid[0]:g}", f"{descent.grid[-1]:g}"
    axis = f"{low}{descent.name:^{len(descent.grid) - len(low) - len(high)}}{high}"
    return "\n".join([*("".join(row).rstrip() for row in picture[::-1]), axis])


def show(title: str, descent: Descent) -> None:
    """Print all of it."""
    print(f"\n{title}\n\n{table(descent)}\n\n{sketch(descent)}\n\n{verdict(descent)}")


def main() -> None:
    """Run both on the same folds."""
    X, y = load_iris(return_X_y=True)
    folds = list(StratifiedKFold(5, shuffle=True, random_state=0).split(X, y))
    regression = descend("logistic", "C", X, y, folds, start=1.0, low=0.1, high=1000)
    show("logistic regression: descent on C, from 1", regression)
    perceptron = descend(
        "mlp", "lr", X, y, folds, start=1e-4, low=1e-5, high=1, optimizer="adam", max_epochs=EPOCHS
    )
    show(
        f"multilayer perceptron, Adam, {EPOCHS} epochs: descent on the learning rate, from 0.0001", perceptron
    )


if __name__ == "__main__":
    main()
