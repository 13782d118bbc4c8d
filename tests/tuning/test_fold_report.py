"""The best trial on its validation rows: the matrix is that of its predictions, and what decides is known."""

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_iris
from sklearn.inspection import permutation_importance
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import KFold

import gputune
from command_line import FAST, kinds, run, write_table
from gputune.models import CNN
from gputune.report.importance import columns_chart, confusion_chart
from gputune.study.curves import FoldReport
from gputune.tuning.validation import fold_report
from refused import refused

RNG = np.random.default_rng(0)
HOW = {
    "n_trials": 2, "max_epochs": 8, "verbose": 0, "workers": 1, "cv": KFold(3, shuffle=True, random_state=0),
}  # fmt: skip
FRAME = pd.DataFrame({"idle": RNG.normal(size=150), "city": RNG.choice(["a", "b"], 150), "big": RNG.normal(size=150)})
Y = 3 * FRAME.big + (FRAME.city == "a")


@pytest.fixture(scope="module")
def iris():
    X, y = load_iris(return_X_y=True)
    return gputune.tune("mlp", X, np.array(["ant", "bee", "cat"])[y], **HOW), y


def test_the_matrix_is_that_of_the_predictions_out_of_fold(iris):
    study, y = iris
    report = fold_report(study, confusion=True)
    expected = confusion_matrix(y, study.oof_predictions().argmax(1))
    np.testing.assert_array_equal(report.confusion, expected)
    assert report.trial == study.best_trial.number and report.columns == ()


@pytest.mark.parametrize("scoring", ["r2", "neg_mean_absolute_error"])
@pytest.mark.parametrize("transform", [None, "log1p"])
def test_columns_as_scikit_learn_shuffles_them(scoring, transform):
    """Of another shuffle, and of the model that all rows have trained: near, not equal."""
    y = Y - Y.min()
    study = gputune.tune("mlp", FRAME, y, scoring=scoring, target_transform=transform, **{**HOW, "max_epochs": 20})
    report = fold_report(study, importance=True)
    assert report.columns[0] == "big" and report.confusion.size == 0
    theirs = permutation_importance(study.best_model(), FRAME, y, scoring=scoring, random_state=0)
    drops = dict(zip(report.columns, report.drops))
    np.testing.assert_allclose([drops[c] for c in FRAME], theirs.importances_mean, atol=0.25 * report.drops[0])
    assert abs(drops["idle"]) < 0.1 * drops["big"] and report.errors.shape == (3,)


def test_columns_by_another_metric(tmp_path):
    how, error = {**HOW, "n_trials": 1, "epoch": "last"}, "neg_mean_absolute_error"
    file = tmp_path / "study.db"
    several = gputune.tune("mlp", FRAME, Y, scoring=["r2", error], study=file, **how)
    alone = fold_report(gputune.tune("mlp", FRAME, Y, scoring=error, **how), importance=True)
    for study in (several, gputune.Study.open(file)):
        report = fold_report(study.ranked_by(error), FRAME, Y, importance=True)
        np.testing.assert_allclose(report.drops, alone.drops)
    assert not np.allclose(fold_report(several, importance=True).drops, alone.drops)


def test_many_rows_are_thinned(iris, monkeypatch):
    study, _ = iris
    whole = fold_report(study, importance=True)
    monkeypatch.setattr("gputune.tuning.validation._ROWS", 20)
    thin = fold_report(study, importance=True)
    assert {*thin.columns} == {*whole.columns} and not np.array_equal(np.sort(thin.drops), np.sort(whole.drops))


def test_the_page_draws_them(iris, tmp_path):
    study, _ = iris
    path = tmp_path / "report.html"
    study.report(path)
    assert "Confusion matrix" not in path.read_text()
    study.report(path, confusion=True, importance=True)
    text = path.read_text()
    matrix = fold_report(study, confusion=True).confusion
    assert f"<title>bee predicted as cat: {matrix[1, 2]}</title>" in text and "Importance of the columns" in text
    gputune.tune("mlp", FRAME, Y, scoring="neg_mean_absolute_error", **HOW).report(path, importance=True)
    assert "rise of mean_absolute_error" in path.read_text() and "Confusion matrix" not in path.read_text()


def test_many_classes_and_columns_are_left_out_with_a_note(iris):
    study, _ = iris
    none = np.zeros(0)
    many = FoldReport(0, np.eye(40, dtype=np.int64), tuple(f"c{i}" for i in range(31)), np.ones(31), np.zeros(31))
    columns = columns_chart(study, many)
    assert columns.notes == ("The 30 most important columns; 1 others are left out.",)
    study.record.classes[:] = [f"a long name {i}" for i in range(40)]
    chart = confusion_chart(study, many)
    assert chart.notes == ("The 25 most frequent classes; 15 others are left out.",) and "rotate(-40" in chart.svg
    empty = FoldReport(0, np.zeros((0, 0), np.int64), (), none, none)
    assert confusion_chart(study, empty) is None and columns_chart(study, empty) is None


def test_the_command_line(tmp_path):
    table = write_table(tmp_path / "bugs.csv", 60, kind=kinds(60), age=list(range(60)))
    assert run("tune", table, "--target", "kind", "--out", tmp_path / "out", *FAST)[0] == 0
    page = tmp_path / "report.html"
    code, said, err = run("report", tmp_path / "out", "--out", page, "--confusion", "--importance")
    assert (code, said, err) == (0, f"Report   {page}\n", "")
    assert "Confusion matrix" in page.read_text() and "Importance of the columns" in page.read_text()
    assert run("tune", table, "--target", "age", "--out", tmp_path / "age", *FAST)[0] == 0
    page.unlink()
    for live in ([], ["--live"]):
        code, _, err = run("report", tmp_path / "age", "--out", page, "--confusion", "--importance", *live)
        assert code == 2 and not page.exists()
        assert "--confusion is of classes, and the study predicts numbers; leave --confusion out" in err


SHORT = {"n_trials": 1, "max_epochs": 1}


def test_what_is_refused():
    images = gputune.tune(CNN, RNG.normal(size=(24, 1, 8, 8)), RNG.integers(0, 2, 24), **{**HOW, **SHORT})
    with refused(r"report\(importance=True\) is of the columns of a table, and X is .*; leave importance out"):
        images.report("x.html", importance=True)
    descent = gputune.Hypergradient(outer_steps=1)
    points = gputune.tune("mlp", FRAME, Y > 0, method=descent, **{**HOW, **SHORT})
    with refused(r"report\(confusion=True\) trains a trial again on its folds, and this study is of descents"):
        points.report("x.html", confusion=True)
