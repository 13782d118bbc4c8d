"""Several metrics of one search: each as if it were alone, the first ranks, a study keeps all."""

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.metrics import get_scorer

import gputune
from gputune.callbacks import Callback, StopSearch
from gputune.report.snippet import snippet
from problems import Linear
from refused import refused

X, Y = (part[:90] for part in load_breast_cancer(return_X_y=True))
WORDS = np.array(["ill", "well"])[Y]
FAST = {"n_trials": 2, "max_epochs": 2, "cv": 2, "verbose": 0, "workers": 1}
SPACE = {"lr": [1e-3, 1e-2, 0.1], "width": [8, 16]}
METRICS = ["accuracy", "roc_auc", "neg_log_loss", "f1"]


def search(*, model="mlp", scoring=METRICS, y=Y, **options):
    space = options.pop("space", SPACE if model == "mlp" else {"lr": [1e-3, 0.1]})
    return gputune.tune(model, X, y, space=space, scoring=scoring, **{**FAST, **options})


WAYS = {
    "compiled": {},
    "eager": {"backend": "eager"},
    "recorded": {"backend": "recorded"},
    "halving": {"method": gputune.Halving(min_epochs=1), "n_trials": 6},
    "hypergradient": {
        "method": gputune.Hypergradient(outer_steps=1),
        "n_trials": 1,
        "space": {"lr": [1e-2]},
    },
    "solved": {"model": "logistic", "space": {"C": [0.1, 1.0]}, "n_trials": 2},
    "module": {"model": Linear},
    "loop": {"model": Linear, "backend": "loop", "n_trials": 2},
}


@pytest.mark.parametrize(
    "way", [*WAYS, pytest.param("workers", marks=[pytest.mark.cpu, pytest.mark.long])]
)
@pytest.mark.usefixtures("recorded_on_cpu")
def test_each_metric_is_that_of_scikit_learn_and_the_first_ranks_as_alone(way):
    """A scorer of scikit-learn's sees each member's own predictions, epoch by epoch and fold by
    fold."""
    options = WAYS.get(way, {"workers": 2, "memory": "1KB"})
    scorers = {f"{name} of scikit-learn": get_scorer(name) for name in METRICS}
    study = search(scoring={**dict(zip(METRICS, METRICS)), **scorers}, **options)
    for name in METRICS:
        expected = study.curves_of(f"{name} of scikit-learn")
        assert np.isfinite(expected).any()
        np.testing.assert_allclose(study.curves_of(name), expected, rtol=0, atol=1e-6)
    if way != "workers":
        alone = search(scoring="accuracy", **options)
        np.testing.assert_array_equal(study.curves, alone.curves)
        assert [(t.state, t.best_epoch, t.score) for t in study.trials] == [
            (t.state, t.best_epoch, t.score) for t in alone.trials
        ]


def test_numbers_have_several_metrics_too():
    x, y = load_diabetes(return_X_y=True)
    scoring = ("r2", "neg_mean_absolute_error")
    study = gputune.tune("mlp", x, y, space=SPACE, scoring=scoring, **FAST)
    for name in scoring:
        alone = gputune.tune("mlp", x, y, space=SPACE, scoring=name, **FAST)
        np.testing.assert_allclose(study.curves_of(name), alone.curves, rtol=1e-12)


def test_a_trial_has_the_scores_of_its_best_epoch_and_only_the_first_fails_it():
    def undefined(outputs, y):
        return np.nan

    study = search(scoring=["accuracy", "roc_auc", undefined])
    for row, trial in enumerate(study.trials):
        folds = study.curves_of("roc_auc")[row, trial.best_epoch - 1]
        assert trial.state == "complete" and trial.metrics["roc_auc"] == tuple(folds)
        assert trial.scores["accuracy"] == trial.score and trial.scores["roc_auc"] == folds.mean()
        assert np.isnan(trial.scores["undefined"])
    frame = study.to_pandas()
    assert frame["score_roc_auc"].tolist() == [trial.scores["roc_auc"] for trial in study.trials]
    assert "score_accuracy" not in search(scoring="accuracy").columns()


class EndAfter(Callback):
    """Ends a search after this number of epochs."""

    def __init__(self, epochs):
        self.epochs = epochs

    def on_epoch(self, curves):
        assert curves.ndim == 3
        self.epochs -= 1
        if not self.epochs:
            raise StopSearch


@pytest.mark.parametrize("method", ["random", gputune.Halving(min_epochs=1)])
def test_a_search_that_was_stopped_continues_with_all_metrics(tmp_path, method):
    options = {"method": method, "n_trials": 4, "memory": "1KB", "checkpoint_seconds": 1e-9}
    whole = search(**options)
    file = tmp_path / "study.db"
    search(**options, study=file, callbacks=[EndAfter(2)])
    begun = gputune.Study.open(file)
    assert any(trial.state in ("waiting", "stopped") for trial in begun.trials)
    search(**options, study=file)
    study = gputune.Study.open(file)
    for name in METRICS:
        np.testing.assert_array_equal(study.curves_of(name), whole.curves_of(name))
    assert [trial.metrics for trial in study.trials] == [trial.metrics for trial in whole.trials]


@pytest.mark.parametrize("other", ["accuracy", ["accuracy", "f1", "roc_auc", "neg_log_loss"]])
def test_other_metrics_are_another_search(tmp_path, other):
    file = tmp_path / "study.db"
    search(study=file, n_trials=1)
    there = ", ".join(METRICS)
    here = "one" if isinstance(other, str) else ", ".join(other)
    with refused(
        rf"differs .* in: scoring( \({there} in the study, {here} now\))?(, positive .*)?\. Pass"
    ):
        search(scoring=other, study=file, n_trials=1)


def test_the_positive_class_goes_to_the_metrics_that_are_of_one():
    study = search(
        scoring=["accuracy", "f1", "average_precision"], y=WORDS, positive="ill", n_trials=1
    )
    alone = search(scoring="f1", y=WORDS, positive="ill", n_trials=1)
    np.testing.assert_array_equal(study.curves_of("f1"), alone.curves)
    assert (study.record.positive, study.record.ranked_class) == ("ill", None)
    assert "of class" not in repr(study)


def test_a_study_of_several_metrics_trains_its_best_again(tmp_path):
    """Also where another metric than the first is of a class."""
    study = search(
        scoring=["roc_auc", "f1"], y=WORDS, positive="ill", n_trials=2, study=tmp_path / "study.db"
    )
    opened = gputune.Study.open(tmp_path / "study.db")
    model = study.best_model()
    assert (opened.best_model(X, WORDS).predict(X) == model.predict(X)).all()
    assert (model.info["scoring"], model.info["positive"]) == ("roc_auc", None)
    assert study.oof_predictions().shape == (len(X), 2)
    assert study.ensemble(verbose=0).info["score"] > 0.5
    code = snippet(study)
    assert 'scoring="roc_auc"' in code.replace("'", '"') and "positive=" not in code
    study.ranked_by("f1").report(tmp_path / "page.html")
    assert "f1 of class" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("scoring", "words"),
    [
        (
            [],
            r"scoring needs at least one score, got \[\]\. Name a score, or leave out this argument",
        ),
        ({}, r"scoring needs at least one score, got \{\}\. Name a score"),
        (
            ["accuracy", "acuracy"],
            "scorer names or a callable, got 'acuracy'. Did you mean 'accuracy'?",
        ),
        (
            ["f1_macro", "accuracy", "f1_macro"],
            "scoring names 'f1_macro' twice. Leave one out, or pass a dict",
        ),
        (
            ["accuracy", 3],
            r"scoring must hold scikit-learn scorer names and callables .*, got 3. Replace it",
        ),
        (
            {"a": "accuracy", 2: "f1_macro"},
            "scoring must have strings as keys, got 2. Name each score",
        ),
        (
            ["accuracy", "r2"],
            "scoring='r2' does not fit a binary task. Choose for example accuracy",
        ),
        ({"accuracy", "f1"}, r"or \(outputs, y\), or a list or dict of these, got \{"),
        (["accuracy", lambda outputs, y: 0.0], "scoring='.*<lambda>' has no name by which study="),
    ],
)
def test_what_is_no_list_of_metrics_is_refused(tmp_path, scoring, words):
    with refused(words):
        search(scoring=scoring, study=tmp_path / "study.db")


ONE_CLASS = [(np.arange(60), np.flatnonzero(Y == 1)[-5:])]


@pytest.mark.parametrize(
    ("scoring", "options", "words"),
    [
        (["accuracy", "f1"], {"y": WORDS}, "Choose the positive"),
        (["accuracy"], {"y": WORDS, "positive": "ill"}, "has no positive"),
        (
            ["accuracy", "roc_auc"],
            {"cv": ONE_CLASS},
            "scoring='roc_auc' needs every class among the validation rows",
        ),
    ],
)
def test_a_metric_without_its_class_is_refused(scoring, options, words):
    with refused(words):
        search(scoring=scoring, **options)
