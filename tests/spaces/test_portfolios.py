"""The portfolio of RealMLP: its configurations run first, with keys that the space does not have."""

from functools import partial

import pytest
from sklearn.datasets import load_diabetes, load_iris

import gputune
from gputune.spaces.portfolios import PORTFOLIOS, portfolio_of
from refused import refused

search = partial(gputune.tune, "realmlp", space="realmlp", max_epochs=1, cv=2, verbose=0, workers=1)
SMOOTHING = "loss__label_smoothing"


@pytest.mark.parametrize("task", ["classes", "numbers"])
def test_the_portfolio_of_realmlp_follows_the_default(task, monkeypatch):
    X, y = load_iris(return_X_y=True) if task == "classes" else load_diabetes(return_X_y=True)
    small = {"module__width": 8, "module__depth": 1}
    listed = [{**config, **small} for config in PORTFOLIOS["realmlp"]]
    monkeypatch.setattr("gputune.spaces.portfolios.PORTFOLIOS", {"realmlp": listed})
    trials = search(X[:60], y[:60], n_trials=len(listed) + 1).trials
    assert [trial.origin for trial in trials] == ["default", *["portfolio"] * len(listed)]
    for config, trial in zip(listed, trials[1:], strict=True):
        expected = dict(config)
        if task == "numbers":
            expected.pop(SMOOTHING, None)
            assert SMOOTHING not in trial.params
        assert expected.items() <= trial.params.items()
    assert [trial.origin for trial in search(X[:60], y[:60], n_trials=1).trials] == ["default"]


def test_the_portfolio_of_a_space_depends_on_the_target():
    of_classes = portfolio_of("realmlp", "classes")
    assert of_classes == list(PORTFOLIOS["realmlp"]) and len(of_classes) <= 7
    assert any(SMOOTHING in config for config in of_classes)
    assert SMOOTHING not in {key for config in portfolio_of("realmlp", "numbers") for key in config}
    assert portfolio_of("realmlp-tabarena", "classes") == []


def test_a_space_with_a_portfolio_needs_its_model_and_adamw():
    X, y = load_iris(return_X_y=True)
    with refused(r"space='realmlp' needs .*realmlp"):
        gputune.tune("mlp", X, y, space="realmlp")
    with refused("begins with configurations that were measured with adamw"):
        search(X, y, optimizer="lion")
    # The space is also the default space of the model, without the portfolio.
    small = {"module__width": 8, "module__depth": 1}
    study = search(X, y, space=None, optimizer="lion", n_trials=2, include=[small])
    assert [trial.origin for trial in study.trials] == ["default", "include", "random"]
