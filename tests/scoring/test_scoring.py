"""A scorer of the user's own sees the user's rows, and its estimator predicts whatever rows it is
given.

Of each trial the outputs at its best fold mean so far are kept; where they take too much, of the
best trials.
"""

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from sklearn.inspection import permutation_importance

import gputune
from gputune.scoring.validation import BestOutputs
from problems import Linear
from refused import refused

RNG = np.random.default_rng(0)
N = 60
X = RNG.normal(size=(N, 3)) * [1, 20, 0.01] + [0, 50, 0]
Y = np.where(X[:, 0] + (X[:, 1] - 50) / 20 > 0, "yes", "no")
FRAME = pd.DataFrame(X, columns=["a", "b", "c"]).assign(d=np.where(X[:, 2] > 0, "left", "right"))
FAST = {"n_trials": 2, "max_epochs": 1, "cv": 2, "verbose": 0, "workers": 1}


def consistent(estimator, X, y):
    """Accuracy, by an estimator that answers for a part, a permutation and other values as for the
    rows scored."""
    guess = estimator.predict(X)
    order = np.argsort(X[:, 1])
    assert 0 < (X[:, 1] > 50).mean() < 1
    assert (estimator.predict(X[:4]) == guess[:4]).all()
    assert (estimator.predict(X[order]) == guess[order]).all()
    np.testing.assert_allclose(
        estimator.predict_proba(X[order]), estimator.predict_proba(X)[order], atol=1e-6
    )
    far = estimator.predict_proba(X * [1000, 1, 1])
    assert not np.allclose(far, estimator.predict_proba(X), atol=1e-3)
    return float((guess == y).mean())


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("mlp", {"max_epochs": 2}),
        ("mlp", {"backend": "recorded"}),
        ("mlp", {"method": "halving", "max_epochs": 2, "numbers": "quantile"}),
        ("mlp", {"method": gputune.Hypergradient(outer_steps=1), "n_trials": 1}),
        pytest.param("mlp", {"workers": 2, "memory": "1KB"}, marks=pytest.mark.cpu),
        ("logistic", {}),
        (Linear, {"dtype": "float64"}),
    ],
    ids=["compiled", "recorded", "halving", "hypergradient", "workers", "solved", "module"],
)
@pytest.mark.usefixtures("recorded_on_cpu")
def test_an_estimator_predicts_what_it_is_given(model, options):
    study = gputune.tune(model, X, Y, scoring=consistent, **{**FAST, **options})
    named = gputune.tune(model, X, Y, scoring="accuracy", **{**FAST, **options})
    assert [t.fold_scores for t in study.trials] == [t.fold_scores for t in named.trials]


def test_a_regression_and_a_tensor():
    def scorer(estimator, X, y):
        guess = estimator.predict(X)
        np.testing.assert_allclose(estimator.predict(X[::-1]), guess[::-1], rtol=1e-5)
        assert (estimator.predict(torch.tensor(X[:3].copy())) == estimator.predict(X[:3])).all()
        assert y.max() > 500
        return -float(np.abs(guess - y).mean())

    assert gputune.tune("mlp", torch.tensor(X), X[:, 1] * 10, scoring=scorer, **FAST).best_score < 0


def test_a_frame_stays_a_frame_and_may_be_written_to():
    def scorer(estimator, X, y):
        before = estimator.predict_proba(X)
        part = X["b"] > 50
        np.testing.assert_allclose(
            estimator.predict_proba(X[part]), before[part.to_numpy()], atol=1e-6
        )
        assert X.index.isin(FRAME.index).all() and list(X) == list("abcd")
        importance = permutation_importance(estimator, X, y, n_repeats=1, random_state=0)
        assert len(importance.importances_mean) == 4
        X["a"] = 1e6
        assert not np.allclose(estimator.predict_proba(X), before, atol=1e-3)
        return float((estimator.classes_[before.argmax(1)] == y).mean())

    study = gputune.tune("mlp", FRAME, Y, scoring=scorer, **FAST)
    named = gputune.tune("mlp", FRAME, Y, scoring="accuracy", **FAST)
    assert [t.fold_scores for t in study.trials] == [t.fold_scores for t in named.trials]


def test_the_rows_of_a_file_are_a_polars_frame(tmp_path):
    def scorer(estimator, X, y):
        assert X.columns == ["a", "b", "c", "d"] and X["d"].is_in(["left", "right"]).all()
        guess = estimator.predict(X)
        assert (
            estimator.predict(X.filter(pl.col("b") > 50)) == guess[(X["b"] > 50).to_numpy()]
        ).all()
        return float((guess == y).mean())

    FRAME.assign(y=Y, g=np.arange(N) // 3).to_csv(tmp_path / "rows.csv", index=False)
    gputune.tune("mlp", tmp_path / "rows.csv", "y", groups="g", scoring=scorer, **FAST)


def test_what_an_estimator_refuses():
    kept = []

    def later(estimator, X, y):
        for old, rows in kept:
            old.predict(rows)
        kept.append((estimator, X))
        return 0.0

    def writes(estimator, X, y):
        X[0] = 0.0
        return 0.0

    for scorer, message in [
        (later, "a scorer receives can predict only while the scorer runs"),
        (lambda estimator, X, y: estimator.fit(X, y), "is fitted and cannot be fitted again"),
        (
            lambda estimator, X, y: estimator.predict(X[:, :2]),
            "columns as in training, got 2 columns",
        ),
        (writes, "read-only"),
    ]:
        with refused(message):
            gputune.tune("mlp", X, Y, scoring=scorer, **FAST)


TRIALS = 5
EPOCHS = 6
SIZES = (3, 2)
BYTES = 4 * sum(SIZES) * 2


@pytest.mark.parametrize("most", [0, 2, TRIALS])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_trials_keep_the_outputs_of_their_best_epochs(most, seed):
    draws = np.random.default_rng(seed)
    means = draws.integers(6, size=(EPOCHS, TRIALS)) / 4
    means[2:, 1] = np.nan  # it has diverged
    outputs = [torch.tensor(draws.normal(size=(EPOCHS, TRIALS, m, 2))) for m in SIZES]
    # of the last one an epoch is known whose outputs are not
    before = np.array([-np.inf] * 4 + [1.0])
    best = BestOutputs(most * BYTES + 1, before.copy())
    for epoch in range(EPOCHS):
        alive = np.flatnonzero(epoch < 4 + np.arange(TRIALS))  # the first trial leaves early
        best.take(
            epoch + 1, alive.tolist(), means[epoch, alive], [one[epoch, alive] for one in outputs]
        )
    means[4:, 0] = np.nan
    tops = np.fmax(np.nanmax(means, 0), before)
    at = np.nanargmax(means, 0)
    kept = [
        t for t in np.argsort(-tops, kind="stable")[:most] if np.nanmax(means[:, t]) > before[t]
    ]
    found = best.of_trials([f"trial {t}" for t in range(TRIALS)])
    assert found.keys() == {f"trial {t}" for t in kept}
    for t in kept:
        one = found[f"trial {t}"]
        expected = torch.cat([o[at[t], t] for o in outputs])
        assert one.epoch == at[t] + 1
        np.testing.assert_array_equal(one.values, expected.float())
