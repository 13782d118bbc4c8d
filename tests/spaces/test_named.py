"""Search spaces with a name."""

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes

import gputune
from gputune.spaces.named import named_space
from gputune.spaces.random import draw
from refused import refused


@pytest.mark.parametrize("goal", ["numbers", "classes"])
def test_the_space_for_large_tables_has_high_frequencies_and_two_scalings(goal):
    drawn = draw(named_space("realmlp-large", goal), 200, 0)
    frequencies = [config["module__sigma"] for config in drawn]
    assert 0.1 <= min(frequencies) < 0.2 and 5 < max(frequencies) <= 10
    assert math.isclose(np.median(frequencies), 1, rel_tol=0.3)  # the range is logarithmic
    assert {config["numbers"] for config in drawn} == {"robust", "quantile"}
    published = draw(named_space("realmlp", goal), 200, 0)
    assert max(config["module__sigma"] for config in published) <= 0.5
    assert all("numbers" not in config for config in published)


def test_a_search_for_large_tables_begins_with_the_published_configuration():
    X, y = load_diabetes(return_X_y=True)
    X, y = X[:80], y[:80]
    search = {"max_epochs": 1, "cv": 2, "verbose": 0, "workers": 1}
    study = gputune.tune("realmlp", X, y, space="realmlp-large", n_trials=3, **search)
    first = study.trials[0]
    published = {
        "numbers": "robust",
        "module__embedding": "pbld",
        "module__sigma": 0.1,
        "module__activation": "mish",
        "lr": 0.2,
        "dropout": 0.15,
        "weight_decay": 0.02,
    }
    assert first.origin == "default" and published.items() <= first.params.items()
    # The ensemble reads the columns in both scalings.
    assert {trial.params["numbers"] for trial in study.trials} == {"robust", "quantile"}
    assert study.ensemble(verbose=0).predict(X[:3]).shape == (3,)


def test_the_space_for_large_tables_needs_a_table():
    X, y = load_diabetes(return_X_y=True)
    with refused("numbers.*quantile"):
        gputune.tune("realmlp", torch.tensor(X), y, space="realmlp-large", verbose=0)
