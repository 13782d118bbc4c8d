"""Optuna's distributions in a space, and a space as Optuna's distributions."""

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from scipy import stats
from sklearn.datasets import load_iris
from torch import nn

import gputune
from gputune.methods.config import legal_keys
from gputune.methods.distributions import as_optuna, describe, label, of_label
from gputune.methods.optuna import check_askable
from gputune.methods.space import check_space, space_text, to_scipy
from refused import refused

KEYS = legal_keys("mlp", "adamw")


@pytest.mark.parametrize(
    "distribution",
    [
        FloatDistribution(0.0, 0.5), FloatDistribution(1e-4, 1e-1, log=True),
        FloatDistribution(0.0, 0.6, step=0.2), IntDistribution(4, 64), IntDistribution(4, 64, log=True),
        IntDistribution(16, 64, step=16), CategoricalDistribution([16, 32, 64]), CategoricalDistribution([0.5]),
    ],
)  # fmt: skip
def test_a_distribution_of_optunas_there_and_back(distribution):
    (there,) = to_scipy([{"x": distribution}])
    assert as_optuna(describe(there["x"])) == distribution


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        (stats.uniform(0.1, 0.4), FloatDistribution(0.1, 0.5)),
        (stats.uniform, FloatDistribution(0.0, 1.0)),
        (stats.loguniform(1e-3, 1e-1), FloatDistribution(1e-3, 1e-1, log=True)),
        (stats.loguniform(1e-3, 1e-1, scale=2), FloatDistribution(2e-3, 2e-1, log=True)),
        (stats.randint(4, 9), IntDistribution(4, 8)),
        (stats.randint(4, 9, loc=1), IntDistribution(5, 9)),
        (gputune.log_int(4, 64), IntDistribution(4, 64, log=True)),
        ([32, 64, 32], CategoricalDistribution([32, 64])),
        ([nn.ReLU, None], CategoricalDistribution(["torch.nn.modules.activation.ReLU", None])),
    ],
)
def test_lists_and_laws_of_scipy_as_optunas(choices, expected):
    assert as_optuna(describe(choices)) == expected


@pytest.mark.parametrize("law", [stats.norm(0, 1), stats.loguniform(1, 10, loc=5), stats.poisson(3)])
def test_a_law_that_optuna_lacks(law):
    assert describe(law) is None
    with refused("space\\['x'\\] must be a list, scipy's uniform, loguniform or randint"):
        check_askable([{"x": law}])


def test_labels_stand_for_choices():
    choices = [nn.ReLU, 1, True, "relu", (1, 2)]
    assert [of_label(label(choice), choices) for choice in choices] == choices
    assert type(of_label(True, choices)) is bool and type(of_label(1, choices)) is int


def test_tune_takes_them():
    space = {
        "lr": FloatDistribution(1e-3, 1e-1, log=True),
        "dropout": FloatDistribution(0.0, 0.4, step=0.2),
        "width": IntDistribution(4, 16, log=True),
        "batch_size": IntDistribution(16, 48, step=16),
        "activation": CategoricalDistribution(["relu", "tanh"]),
        "depth": IntDistribution(1, 1),
    }
    study = gputune.tune(
        "mlp", *load_iris(return_X_y=True), space=space, n_trials=20, include_default=False, max_epochs=1, cv=2,
        verbose=0, workers=1,
    )  # fmt: skip
    drawn = {key: [trial.params[key] for trial in study.trials] for key in space}
    assert all(1e-3 <= lr <= 1e-1 for lr in drawn["lr"]) and set(drawn["dropout"]) == {0.0, 0.2, 0.4}
    assert all(type(width) is int and 4 <= width <= 16 for width in drawn["width"])
    assert set(drawn["batch_size"]) == {16, 32, 48} and set(drawn["activation"]) == {"relu", "tanh"}
    assert set(drawn["depth"]) == {1}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"width": FloatDistribution(4.0, 16.0, step=0.5)}, "which draws real numbers"),
        ({"width": FloatDistribution(4.0, 16.0)}, "which draws real numbers"),
        ({"dropout": FloatDistribution(0.0, 1.0, step=0.5)}, "which draws from 0 to 1. Narrow its range"),
        ({"batch_size": IntDistribution(0, 16)}, "which draws from 0 to 16. Narrow its range"),
        ({"activation": IntDistribution(0, 3)}, "must be a list of words"),
    ],
)
def test_they_are_checked_as_other_distributions(space, message):
    with refused(message):
        check_space(to_scipy(space), keys=KEYS, module=False)


def test_their_text_is_the_same_in_every_process():
    space = {"width": IntDistribution(4, 64, log=True), "dropout": FloatDistribution(0.0, 0.5, step=0.25)}
    text = space_text(check_space(to_scipy(space), keys=KEYS, module=False))
    assert text == "dropout=Steps(low=0.0, high=0.5, step=0.25), width=LogIntegers(low=4, high=64)"


def test_log_integers_favour_small_ones():
    law = to_scipy({"width": IntDistribution(1, 64, log=True)})["width"]
    draws = [law.rvs(random_state=np.random.RandomState(i)) for i in range(400)]
    assert min(draws) == 1 and max(draws) > 50 and np.median(draws) < 14
