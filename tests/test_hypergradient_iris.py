"""The descents on iris: each path falls, ends near the grid's best, and lies on the curve that the grid draws."""

import math
import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.model_selection import StratifiedKFold

SCRIPTS = Path(__file__).parents[1] / "scripts" / "examples"


@pytest.fixture(scope="module")
def script():
    """The script, imported as Python does when it is run from its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield import_module("iris_hypergradient")


@pytest.fixture(scope="module")
def iris():
    X, y = load_iris(return_X_y=True)
    return X, y, list(StratifiedKFold(5, shuffle=True, random_state=0).split(X, y))


@pytest.fixture(scope="module")
def regression(script, iris):
    return script.descend("logistic", "C", *iris, start=1.0, low=0.1, high=1000)


@pytest.fixture(scope="module")
def perceptron(script, iris):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "N_GRID", 6)
        return script.descend(
            "mlp", "lr", *iris, start=1e-4, low=1e-5, high=1, optimizer="adam", max_epochs=10
        )


def on_the_curve(descent):
    """The grid's losses, read at the path's values."""
    return np.interp(np.log(descent.values), np.log(descent.grid), descent.losses)


@pytest.mark.long
def test_c_descends_to_the_best_of_the_grid(regression):
    losses = [-trial.score for trial in regression.path]
    assert regression.values[0] == 1 and regression.path[0].origin == (0, 0)
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] / 2
    np.testing.assert_allclose(losses, on_the_curve(regression), atol=0.003)
    best = regression.grid[regression.losses.argmin()]
    assert abs(math.log(regression.values[-1] / best)) < 1
    assert losses[-1] - regression.losses.min() < regression.path[-1].std_error / 4


def test_the_slopes_are_those_of_the_grids_curve(script, regression):
    middle = np.sqrt(regression.grid[1:] * regression.grid[:-1])
    slopes = np.diff(regression.losses) / np.diff(np.log(regression.grid))
    expected = np.interp(np.log(regression.values), np.log(middle), slopes)
    found = [script.slope_of(regression, trial)[0] for trial in regression.path]
    np.testing.assert_allclose(found, expected, atol=3e-4)


@pytest.mark.long
def test_the_rate_descends_from_a_bad_start(perceptron):
    losses = [-trial.score for trial in perceptron.path]
    assert perceptron.values[0] == 1e-4
    assert min(losses) < losses[0] / 3
    assert min(losses) < np.median(perceptron.losses)
    assert losses[0] == pytest.approx(perceptron.losses[1], rel=1e-4)  # the grid has 1e-4 too


def test_it_is_shown_beside_the_grid(script, regression, perceptron, capsys):
    script.show("C", regression)
    out = capsys.readouterr().out
    rows = re.findall(r"^ +(\d+) +([\d.]+) +(\d\.\d{4}) +\d\.\d{4} +(-?\d\.\d{4}) +\d\.\d{4}$", out, re.M)
    assert [float(row[1]) for row in rows] == pytest.approx(regression.values, rel=1e-3)
    assert [float(row[2]) for row in rows] == pytest.approx([-t.score for t in regression.path], abs=1e-4)
    assert f"loss {regression.losses.min():.4f}, the best of 61" in out
    slope, error = script.slope_of(regression, regression.path[-1])
    assert ("the last slope is not, it is within" in out) == (abs(slope) < error)
    picture = script.sketch(regression).splitlines()
    assert all(sum(line.count(str(step)) for line in picture[:-1]) == 1 for step in range(len(rows)))
    assert sum(line.count(".") for line in picture[:-1]) == 61 - len(rows)
    assert picture[0][0] == "." and "0.1" in picture[-1]  # the loss is highest at the smallest C
    script.show("lr", perceptron)
    assert "of 6; the better of its neighbours" in capsys.readouterr().out


def test_a_grid_value_that_diverged_is_never_its_best(script, regression):
    losses = regression.losses.copy()
    losses[-1] = math.inf
    broken = script.Descent("C", regression.path, regression.grid, losses)
    assert script.verdict(broken).splitlines()[1] == script.verdict(regression).splitlines()[1]
    assert script.sketch(broken).splitlines()[0][-1] == "."
