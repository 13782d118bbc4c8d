"""The held-out score is the study's score on rows that were kept apart."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy
import torch
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import f1_score, get_scorer, log_loss, make_scorer, roc_auc_score

import gputune
from command_line import kinds, run, write_table
from gputune.cli.held_out import held_out_baseline, held_out_score, wilson_interval
from gputune.data.source import read_source
from gputune.ground.text import measure_of
from study_models import make_model

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 3))
LABELS = np.array(["ant", "bee", "cat"])


def fitted(y, kind=LogisticRegression):
    """A fitted scikit-learn estimator in the place of a tuned model, which has its methods."""
    estimator = kind().fit(X[:40], y[:40])
    classes = getattr(estimator, "classes_", None)
    task = "regression" if classes is None else "binary" if len(classes) == 2 else "multiclass"

    def outputs(table):
        rows = np.column_stack(table.columns)
        values = (
            estimator.predict(rows) if classes is None else np.log(estimator.predict_proba(rows))
        )
        return torch.from_numpy(values.astype(np.float64))

    return estimator, SimpleNamespace(
        classes=classes, task=task, _outputs=outputs, _predict=torch.Tensor.numpy
    )


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(
    "scoring",
    [
        "accuracy",
        "balanced_accuracy",
        "neg_log_loss",
        "f1_macro",
        "roc_auc_ovr",
        "matthews_corrcoef",
    ],
)
def test_classes_are_scored_as_scikit_learn_does(scoring, classes):
    y = LABELS[RNG.integers(0, classes, 60)]
    estimator, model = fitted(y)
    held = held_out_score(model, scoring, read_source(X[40:], y[40:]))
    assert held.score == pytest.approx(get_scorer(scoring)(estimator, X[40:], y[40:]), abs=1e-9)
    assert (held.rows, held.unseen, held.reason) == (20, 0, "")


@pytest.mark.parametrize("scoring", ["roc_auc", "f1", "average_precision"])
@pytest.mark.parametrize("positive", [0, 1])
def test_a_score_of_one_class_is_of_the_class_that_was_asked_for(scoring, positive):
    codes = RNG.integers(0, 2, 60)
    estimator, _ = fitted((codes == positive).astype(int))
    _, model = fitted(LABELS[codes])
    named = None if scoring == "roc_auc" else LABELS[positive]
    held = held_out_score(model, scoring, read_source(X[40:], LABELS[codes][40:]), positive=named)
    expected = get_scorer(scoring)(estimator, X[40:], codes[40:] == positive)
    assert held.score == pytest.approx(expected, abs=1e-9)


def test_saturated_probabilities_tie_as_those_that_the_model_gives():
    model = make_model(X, classes=("ant", "bee"))
    with torch.no_grad():
        model.module.layers[-1].weight.mul_(300)
    p = model.predict_proba(X)[:, 1]
    y = LABELS[RNG.integers(0, 2, 60)]
    assert 2 < len(set(p.tolist())) < 50
    held = held_out_score(model, "roc_auc", read_source(X, y))
    assert held.score == pytest.approx(roc_auc_score(y, p), abs=1e-15)


@pytest.mark.parametrize(
    "scoring", ["r2", "neg_root_mean_squared_error", "neg_median_absolute_error"]
)
def test_numbers_are_scored_as_scikit_learn_does(scoring):
    y = X[:, 0] ** 3 * 100 + 1000
    estimator, model = fitted(y, LinearRegression)
    held = held_out_score(model, scoring, read_source(X[40:], y[40:]))
    assert held.score == pytest.approx(get_scorer(scoring)(estimator, X[40:], y[40:]), rel=1e-9)


def test_a_class_that_the_held_out_rows_lack_is_no_trouble():
    y = LABELS[np.arange(60) % 3]
    estimator, model = fitted(y)
    rows = np.flatnonzero(y != "cat")[-10:]
    held = held_out_score(model, "neg_log_loss", read_source(X[rows], y[rows]))
    expected = -log_loss(y[rows], estimator.predict_proba(X[rows]), labels=estimator.classes_)
    assert held.score == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("scoring", ["accuracy", "matthews_corrcoef"])
def test_a_class_that_only_held_out_rows_have_counts_as_wrong(scoring):
    y = LABELS[np.arange(60) % 2]
    estimator, model = fitted(y)
    test = y[40:].astype("<U9")
    test[:3] = "dragonfly"  # longer than any class of the model
    held = held_out_score(model, scoring, read_source(X[40:], test))
    assert held.score == pytest.approx(get_scorer(scoring)(estimator, X[40:], test), abs=1e-9)
    assert held.unseen == 3


def test_an_undefined_score_is_nan_with_the_reason():
    y = LABELS[np.arange(60) % 2]
    _, model = fitted(y)
    alone = np.flatnonzero(y == "ant")[:5]
    held = held_out_score(model, "roc_auc", read_source(X[alone], y[alone]))
    assert math.isnan(held.score) and held.reason == "it is undefined on these rows"


SCORES = [
    "average_precision",
    "f1",
    "precision",
    "recall",
    "balanced_accuracy",
    "roc_auc",
    "neg_log_loss",
]


@pytest.mark.parametrize("scoring", SCORES)
def test_an_unknown_class_is_not_the_positive_one_and_has_no_mean_or_probability(scoring):
    y = np.where(np.arange(60) % 3 == 0, "ant", "bee")
    estimator, model = fitted(y)
    tested = y[40:].copy()
    rows = np.arange(40, 60)
    tested[[0, 1, 5]] = "cat"
    of_class = scoring in SCORES[:4]
    held = held_out_score(
        model, scoring, read_source(X[rows], tested), positive="ant" if of_class else None
    )
    if of_class:
        estimator, _ = fitted(y == "ant")
        expected = get_scorer(scoring)(estimator, X[rows], tested == "ant")
    else:
        known = tested != "cat"
        expected = get_scorer(scoring)(estimator, X[rows[known]], tested[known])
    assert held.score == pytest.approx(expected, abs=1e-9) and held.unseen == 3


def test_an_interval_holds_the_scores_of_bootstrap_samples(monkeypatch):
    """A binomial share: of a score a over n rows 95% lie within about 1.96 sqrt(a (1 - a) / n)."""
    monkeypatch.setattr("gputune.cli.held_out._SAMPLES", 400)
    rng = np.random.default_rng(1)
    for rows in (400, 60_000):  # of many rows smaller samples are drawn, and their spread is scaled
        y = np.repeat([0, 1], rows // 2)
        right = rng.random(rows) < 0.8
        outputs = torch.from_numpy(np.eye(2)[np.where(right, y, 1 - y)])
        model = SimpleNamespace(
            classes=np.array([0, 1]), task="binary", _outputs=lambda X, o=outputs: o
        )
        for scoring, method in (("balanced_accuracy", "bootstrap"), ("accuracy", "wilson")):
            held = held_out_score(model, scoring, read_source(np.zeros((rows, 1)), y))
            width = 1.96 * math.sqrt(held.score * (1 - held.score) / rows)
            np.testing.assert_allclose(
                np.array(held.interval) - held.score, [-width, width], rtol=0.2
            )
            assert held.interval_method == method


def perfect(rows):
    """Return a model that is right on all rows, and these rows."""
    y = np.arange(rows) % 2
    outputs = torch.from_numpy(np.eye(2)[y])
    model = SimpleNamespace(classes=np.array([0, 1]), task="binary", _outputs=lambda X: outputs)
    return model, read_source(np.zeros((rows, 1)), y)


def test_the_interval_of_a_perfect_accuracy_is_not_one_point():
    model, source = perfect(36)
    held = held_out_score(model, "accuracy", source)
    assert held.score == 1.0
    assert held.interval == (pytest.approx(36 / (36 + 1.96**2), abs=1e-4), 1.0)
    assert held.interval_text(measure_of("accuracy", 1.0)) == " (95% interval: 0.9036 to 1.0000)"


@pytest.mark.parametrize(
    ("successes", "n"), [(0, 10), (10, 10), (5, 10), (34, 36), (59_000, 60_000)]
)
def test_wilsons_interval_equals_scipys(successes, n):
    expected = scipy.stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert wilson_interval(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_where_all_bootstrap_samples_score_the_same_there_is_no_interval():
    model, source = perfect(36)
    held = held_out_score(model, "roc_auc", source)
    assert (held.score, held.interval, held.interval_method) == (1.0, None, "bootstrap")
    text = " (no interval: all bootstrap samples of the 36 rows have this score)"
    assert held.interval_text(measure_of("roc_auc", 1.0)) == text


def test_there_is_no_interval_where_few_samples_have_a_score():
    outputs = torch.linspace(0, 1, 16, dtype=torch.float64).view(8, 2) ** 2
    model = SimpleNamespace(classes=np.array([0, 1]), task="binary", _outputs=lambda X: outputs)
    y = np.array([0, 1, 0, 0, 1, 0, 0, 1])
    assert held_out_score(model, "roc_auc", read_source(np.zeros((8, 1)), y)).interval is not None
    y = np.zeros(8, dtype=int)
    assert held_out_score(model, "roc_auc", read_source(np.zeros((8, 1)), y)).interval is None


def test_a_loss_that_has_a_name_is_of_known_rows_and_another_one_is_no_score():
    y = LABELS[np.arange(60) % 2]
    estimator, model = fitted(y)
    tested = np.where(np.arange(20) < 3, "cat", y[40:])
    model.info = {"loss": ""}
    model.spec = {"kind": "module"}
    held = held_out_score(model, "neg_loss", read_source(X[40:], tested))
    expected = -log_loss(y[43:], estimator.predict_proba(X[43:]), labels=estimator.classes_)
    assert held.score == pytest.approx(expected) and held.unseen == 3
    model.info = {"loss": "my:loss"}
    held = held_out_score(model, "neg_loss", read_source(X[40:], tested))
    assert (
        held.reason == "a saved model keeps its loss only if the loss has a name"
        and held.rows == 20
    )


def test_the_command_calibrates_where_that_is_asked_or_the_log_loss_ranks(tmp_path):
    prices = RNG.normal(size=40).round(3)
    file = write_table(tmp_path / "ants.csv", kind=kinds(), price=prices)
    out = tmp_path / "out"
    words = ["tune", file, "--trials", "2", "--epochs", "2", "--cv", "2", "--workers", "1"]
    assert run(*words, "--target", "kind", "--out", out)[0] == 0
    assert gputune.load_model(out / "model").temperature == 1
    for more in (["--calibrate"], ["--trials", "3"], ["--ensemble"]):  # which keep it calibrated
        assert run("resume", out, *more)[0] == 0
        model = gputune.load_model(out / "model")
        assert model.temperature != 1
    loss = ["--scoring", "neg_log_loss", "--out", tmp_path / "loss"]
    assert run(*words, "--target", "kind", *loss)[0] == 0
    assert gputune.load_model(tmp_path / "loss" / "model").temperature != 1
    code, _, err = run(*words, "--target", "price", "--calibrate", "--out", tmp_path / "no")
    assert (
        code == 2 and "--calibrate needs a model that predicts one class, but the target is" in err
    )
    code, _, err = run(
        *words, "--target", "price", "--intervals", "--calibrate", "--out", tmp_path / "no"
    )
    assert (
        code == 2 and "--calibrate needs a model that predicts one class, but the target is" in err
    )
    assert not (tmp_path / "no").exists()  # nothing was trained


@pytest.mark.parametrize("scoring", ["accuracy", "f1_macro", "neg_log_loss", "f1"])
def test_the_best_constant_of_the_other_rows_is_scored_on_the_held_out_rows(scoring):
    y = LABELS[(np.arange(60) % 3 == 0).astype(int)]  # two thirds are "ant"
    _, model = fitted(y)
    positive = "bee" if scoring == "f1" else None
    rest = read_source(X[:40], y[:40])
    test = read_source(X[40:], y[40:])
    answer, score = held_out_baseline(model, scoring, rest, test, positive=positive)
    strategy = (
        {"strategy": "constant", "constant": "bee"} if scoring == "f1" else {"strategy": "prior"}
    )
    dummy = DummyClassifier(**strategy).fit(X[:40], y[:40])
    scorer = make_scorer(f1_score, pos_label="bee") if scoring == "f1" else get_scorer(scoring)
    assert score == pytest.approx(scorer(dummy, X[40:], y[40:]), abs=1e-12)
    names = {"accuracy": "always 'ant'", "f1": "always 'bee'"}
    assert answer == names.get(scoring, "the share of each class in the training rows")


def test_the_constant_of_numbers_and_rows_of_an_unseen_class():
    y = X[:, 0] ** 3
    rest = read_source(X[:40], y[:40])
    test = read_source(X[40:], y[40:])
    _, model = fitted(y, LinearRegression)
    answer, score = held_out_baseline(model, "neg_mean_absolute_error", rest, test)
    assert (answer, score) == (
        "the median of the training rows",
        pytest.approx(-np.abs(y[40:] - np.median(y[:40])).mean()),
    )
    labels = LABELS[np.r_[np.arange(40) % 2, np.full(20, 2)]]
    labels[40:50] = "ant"
    _, model = fitted(labels[:40].repeat(2)[:60])
    rest = read_source(X[:39], labels[:39])
    test = read_source(X[40:], labels[40:])
    assert held_out_baseline(model, "accuracy", rest, test) == ("always 'ant'", 0.5)
    assert held_out_baseline(model, "neg_loss", rest, test) is None
