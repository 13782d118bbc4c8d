"""Predictions of trials on unseen rows, confusions and important columns of the best trial, and its
refit.
"""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_diabetes, load_iris, make_multilabel_classification
from sklearn.inspection import permutation_importance
from sklearn.metrics import confusion_matrix, r2_score
from sklearn.model_selection import KFold, RepeatedKFold, TimeSeriesSplit
from torch import nn

import gputune
from command_line import FAST, kinds, run, write_table
from gputune.models import CNN, MLP
from gputune.report.charts import columns_chart, confusion_chart
from gputune.scoring.losses import best_temperature
from gputune.study.record import Arguments, SearchRecord
from gputune.study.rows import FoldReport
from gputune.tuning import record as records
from gputune.tuning import refit
from gputune.tuning.choices import recorded_model
from gputune.tuning.refit import Access
from gputune.tuning.validation import fold_report
from refused import refused

tune = partial(gputune.tune, n_trials=2, max_epochs=3, verbose=0, workers=1)
IRIS = load_iris(return_X_y=True)
SPACE = {"lr": [1e-3], "module__in_features": [4], "module__out_features": [4]}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return tune("mlp", *IRIS, study=tmp_path_factory.mktemp("oof") / "study.db", cv=3)


@pytest.fixture(scope="module")
def points():
    return tune("mlp", *IRIS, cv=3, method=gputune.Hypergradient(outer_steps=1))


@pytest.fixture(scope="module")
def labels():
    """Rows with several labels, and their study on folds that repeat."""
    X, y = make_multilabel_classification(60, random_state=0)
    return y, tune(MLP, X, y, cv=RepeatedKFold(n_splits=2, n_repeats=2, random_state=0))


@pytest.mark.parametrize("model", ["mlp", "logistic"])
def test_classes_score_as_in_the_search(model):
    study = tune(model, *IRIS, cv=3, scoring="accuracy", random_state=1)
    for trial in study.trials:
        predicted = study.oof_predictions(trial=trial.number)
        assert predicted.shape == (150, 3) and np.allclose(predicted.sum(1), 1)
        assert (predicted.argmax(1) == IRIS[1]).mean() == pytest.approx(np.mean(trial.fold_scores))


def test_a_calibrated_model_has_the_temperature_of_what_its_folds_predict(study, tmp_path):
    np.testing.assert_array_equal(
        gputune.Study.open(study.file).oof_predictions(*IRIS), study.oof_predictions()
    )
    plain = study.best_model()
    model = study.best_model(calibrate=True)
    logits = torch.tensor(study.oof_predictions()).log()
    assert plain.temperature == 1 != model.temperature
    assert model.temperature == pytest.approx(
        best_temperature(logits, torch.tensor(IRIS[1])), rel=1e-6
    )
    expected = (torch.tensor(plain.predict_proba(IRIS[0])).log() / model.temperature).softmax(1)
    np.testing.assert_allclose(model.predict_proba(IRIS[0]), expected, rtol=1e-9)
    np.testing.assert_array_equal(model.predict(IRIS[0]), plain.predict(IRIS[0]))
    model.save(tmp_path / "model")
    loaded = gputune.load_model(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict_proba(IRIS[0]), model.predict_proba(IRIS[0]))
    assert "temperature" in model._repr_html_() and "temperature" not in plain._repr_html_()


@pytest.mark.filterwarnings("ignore:.* train without rows of a class")
def test_rows_of_a_class_that_their_fold_has_not_seen_calibrate_nothing():
    X, y = (part[np.argsort(IRIS[1], kind="stable")] for part in IRIS)
    study = tune("mlp", X, y, cv=KFold(3), scoring="accuracy")  # a class a fold
    assert study.best_model(calibrate=True).temperature == 1


def test_models_ranked_by_the_log_loss_are_calibrated(points):
    study = tune("mlp", *IRIS, cv=3, scoring="neg_log_loss")
    assert study.best_model().temperature == study.best_model(calibrate=True).temperature != 1
    assert (
        study.best_model(*IRIS, check=False).temperature
        == 1
        == study.best_model(calibrate=False).temperature
    )
    assert study.ensemble(verbose=0, size=1).temperature == study.best_model().temperature
    assert study.ensemble(verbose=0, calibrate=False).temperature == 1
    assert points.record.scoring == "neg_log_loss" and points.best_model().temperature == 1


def test_what_cannot_be_calibrated_is_refused(study, points, labels):
    numbers = tune("mlp", IRIS[0], IRIS[0][:, 0], cv=3)
    asked = {"X": IRIS[0], "y": IRIS[1][::-1].copy(), "check": False}
    words = "is for studies that predict one class per row, but this study predicts"
    for make, how, said in (
        (numbers.best_model, {}, rf"\(calibrate=True\) {words} numbers. Leave it out"),
        (numbers.ensemble, {}, rf"\(calibrate=True\) {words} numbers. Leave it out"),
        (labels[1].best_model, {}, f"{words} several labels"),
        (
            study.best_model,
            {"calibrate": "yes"},
            r"best_model\(calibrate=...\) must be True, False or None, got 'yes'",
        ),
        (
            study.best_model,
            asked,
            r"best_model\(calibrate=True\) needs the rows of the search.* Leave check=False out",
        ),
        (
            points.best_model,
            {},
            r"best_model\(calibrate=True\) trains a trial again on its folds, .* a study of a hypergradient search",
        ),
    ):
        with refused(said):
            make(**{"calibrate": True, **how})


def test_values_are_in_the_units_of_the_target():
    X, y = load_diabetes(return_X_y=True)
    rows = np.arange(len(y)) % 4
    folds = [(np.flatnonzero(rows != f), np.flatnonzero(rows == f)) for f in range(4)]
    study = tune("mlp", X, y, cv=folds, scoring="r2")
    predicted = study.oof_predictions()
    assert predicted.shape == y.shape
    scores = [r2_score(y[valid], predicted[valid]) for _, valid in folds]
    np.testing.assert_allclose(scores, study.best_trial.fold_scores, rtol=1e-5)
    two = tune(MLP, X, np.stack([y, -y], 1), cv=folds).oof_predictions()
    assert two.shape == (len(y), 2) and np.corrcoef(two[:, 0], -y)[0, 1] < 0


def test_labels_and_rows_of_several_folds_or_of_none(labels):
    y, study = labels
    predicted = study.oof_predictions()
    assert predicted.shape == y.shape and ((predicted > 0) & (predicted < 1)).all()
    predicted = tune("mlp", *IRIS, cv=TimeSeriesSplit(2), task="regression").oof_predictions()
    assert np.isnan(predicted[:50]).all() and np.isfinite(predicted[50:]).all()


def test_what_cannot_train_again_on_its_folds_is_refused(study, points):
    with refused(r"oof_predictions\(trial=9\) must be the number of a trial that has a score"):
        study.oof_predictions(trial=9)
    with refused(r"oof_predictions\("):
        gputune.Study.open(study.file).oof_predictions(IRIS[0][::2], IRIS[1][::2])
    how = {"direction": "maximize", "n_trials": 1, "workers": 1, "verbose": 0}
    loop = gputune.search(lambda params, report: params["x"], {"x": [1.0]}, **how)
    X = IRIS[0]

    def loss(outputs, y):
        return (outputs - y).abs().sum(1)

    custom = tune(nn.Linear, X, X, task="custom", loss=loss, space=SPACE, cv=2)
    for other, words in (
        (
            points,
            "trains a trial again on its folds, but this is a study of a hypergradient search, .* "
            "another method",
        ),
        (
            loop,
            "this is a study of search.., whose training loop is your own. Keep the predictions",
        ),
        (custom, "this is a study of a custom target, .* your own folds"),
    ):
        with refused(words):
            other.oof_predictions()


RNG = np.random.default_rng(0)
longer = partial(tune, max_epochs=8, cv=KFold(3, shuffle=True, random_state=0))
FRAME = pd.DataFrame(
    {"idle": RNG.normal(size=150), "city": RNG.choice(["a", "b"], 150), "big": RNG.normal(size=150)}
)
Y = 3 * FRAME.big + (FRAME.city == "a")


@pytest.fixture(scope="module")
def insects():
    return longer("mlp", IRIS[0], np.array(["ant", "bee", "cat"])[IRIS[1]])


def test_the_matrix_is_that_of_the_predictions_out_of_fold(insects):
    report = fold_report(Access(insects), confusion=True)
    expected = confusion_matrix(IRIS[1], insects.oof_predictions().argmax(1))
    np.testing.assert_array_equal(report.confusion, expected)
    assert report.trial == insects.best_trial.number and report.columns == ()


@pytest.mark.parametrize("scoring", ["r2", "neg_mean_absolute_error"])
@pytest.mark.parametrize("transform", [None, "log1p"])
def test_columns_as_scikit_learn_shuffles_them(scoring, transform):
    """Of another shuffle, and of the model that all rows have trained: near, not equal."""
    y = Y - Y.min()
    study = longer("mlp", FRAME, y, scoring=scoring, target_transform=transform, max_epochs=20)
    report = fold_report(Access(study), importance=True)
    assert report.columns[0] == "big" and report.confusion.size == 0
    theirs = permutation_importance(study.best_model(), FRAME, y, scoring=scoring, random_state=0)
    drops = dict(zip(report.columns, report.drops))
    np.testing.assert_allclose(
        [drops[c] for c in FRAME], theirs.importances_mean, atol=0.25 * report.drops[0]
    )
    assert abs(drops["idle"]) < 0.1 * drops["big"] and report.errors.shape == (3,)


def test_columns_by_another_metric(tmp_path):
    error = "neg_mean_absolute_error"
    file = tmp_path / "study.db"
    search = partial(longer, "mlp", FRAME, Y, n_trials=1, epoch="last")
    several = search(scoring=["r2", error], study=file)
    alone = fold_report(Access(search(scoring=error)), importance=True)
    for study in (several, gputune.Study.open(file)):
        report = fold_report(Access(study.ranked_by(error), FRAME, Y), importance=True)
        np.testing.assert_allclose(report.drops, alone.drops)
    assert not np.allclose(fold_report(Access(several), importance=True).drops, alone.drops)


def test_many_rows_are_thinned(insects, monkeypatch):
    whole = fold_report(Access(insects), importance=True)
    monkeypatch.setattr("gputune.tuning.validation._ROWS", 20)
    thin = fold_report(Access(insects), importance=True)
    assert {*thin.columns} == {*whole.columns} and not np.array_equal(
        np.sort(thin.drops), np.sort(whole.drops)
    )


def test_the_page_draws_them(insects, tmp_path):
    path = tmp_path / "report.html"
    insects.report(path)
    assert "Confusion matrix" not in path.read_text()
    insects.report(path, confusion=True, importance=True)
    text = path.read_text()
    matrix = fold_report(Access(insects), confusion=True).confusion
    assert (
        "Confusion matrix" in text
        and f">{matrix[1, 2]}<" in text
        and "Importance of the columns" in text
    )
    longer("mlp", FRAME, Y, scoring="neg_mean_absolute_error").report(path, importance=True)
    assert (
        "rise of mean_absolute_error" in path.read_text()
        and "Confusion matrix" not in path.read_text()
    )


def test_many_classes_and_columns_are_left_out_with_a_note(insects):
    many = FoldReport(
        0, np.eye(40, dtype=np.int64), tuple(f"c{i}" for i in range(31)), np.ones(31), np.zeros(31)
    )
    columns = columns_chart(insects, many)
    assert columns.notes == ("The 30 most important columns of 31 are drawn.",)
    insects.record.classes[:] = [f"a long name {i}" for i in range(40)]
    chart = confusion_chart(insects, many)
    assert (
        chart.notes == ("The 25 most frequent classes of 40 are drawn.",)
        and "rotate(-40" in chart.svg
    )
    empty = FoldReport(0, np.zeros((0, 0), np.int64), (), np.zeros(0), np.zeros(0))
    assert confusion_chart(insects, empty) is None and columns_chart(insects, empty) is None


def test_the_command_line(tmp_path):
    table = write_table(tmp_path / "bugs.csv", 60, kind=kinds(60), age=list(range(60)))
    assert run("tune", table, "--target", "kind", "--out", tmp_path / "out", *FAST)[0] == 0
    page = tmp_path / "report.html"
    code, said, err = run("report", tmp_path / "out", "--out", page, "--confusion", "--importance")
    assert (code, said, err) == (0, f"Report   {page}\n", "")
    assert (
        "Confusion matrix" in page.read_text() and "Importance of the columns" in page.read_text()
    )
    assert run("tune", table, "--target", "age", "--out", tmp_path / "age", *FAST)[0] == 0
    page.unlink()
    for live in ([], ["--live"]):
        code, _, err = run(
            "report", tmp_path / "age", "--out", page, "--confusion", "--importance", *live
        )
        assert code == 2 and not page.exists()
        assert (
            "--confusion needs classes, but the study predicts numbers. Leave --confusion out"
            in err
        )


def test_a_report_of_no_columns_or_of_descents_is_refused():
    short = partial(longer, n_trials=1, max_epochs=1)
    descent = gputune.Hypergradient(outer_steps=1)
    images = short(CNN, RNG.normal(size=(24, 1, 8, 8)), RNG.integers(0, 2, 24))
    with refused(
        r"report\(importance=True\) needs the columns of a table, but X is .*. Leave importance out"
    ):
        images.report("x.html", importance=True)
    with refused(
        r"report\(confusion=True\) trains a trial again on its folds, but this is a study of a hypergradient search"
    ):
        short("mlp", FRAME, Y > 0, method=descent).report("x.html", confusion=True)


def machine(monkeypatch, *devices, **kept):
    def choose(device):
        if device == "auto":
            return torch.device(devices[-1])
        if device not in devices:
            raise gputune.InputError(None, "no such device")
        return torch.device(device)

    monkeypatch.setattr(records, "choose_device", choose)
    record = SearchRecord(dtype="float32", arguments=Arguments(kept=kept))
    return tuple(records.machine_options_here(record).values())


@pytest.mark.parametrize(
    ("devices", "kept", "expected"),
    [
        (["cpu"], {}, ("auto", "auto", False, 1)),
        (["cpu"], {"device": "cpu", "backend": "eager", "workers": 4}, ("cpu", "eager", False, 1)),
        (
            ["cpu", "cuda"],
            {"device": "cuda", "backend": "recorded", "tf32": True},
            ("cuda", "recorded", True, 1),
        ),
        (
            ["cpu"],
            {"device": "cuda", "backend": "recorded", "tf32": True},
            ("auto", "recorded", False, 1),
        ),
        (["cpu"], {"device": "cuda", "backend": "kernel"}, ("auto", "auto", False, 1)),
        (
            ["cpu", "cuda"],
            {"device": "cpu", "backend": "eager", "workers": {"address": "auto", "cpus": 1}},
            ("auto", "eager", False, 1),
        ),
    ],
)
def test_what_the_machine_has_is_kept(monkeypatch, devices, kept, expected):
    assert machine(monkeypatch, *devices, **kept) == expected


def test_a_refit_from_a_file_trains_as_one_from_memory(tmp_path, monkeypatch):
    how = {
        "backend": "eager",
        "device": "cpu",
        "numbers": "quantile",
        "schedule": "cosine",
        "max_epochs": 2,
    }
    study = tune("mlp", *IRIS, study=tmp_path / "study.db", n_trials=1, cv=2, **how)
    trained = []
    choose = refit.choose_backend
    monkeypatch.setattr(
        refit, "choose_backend", lambda word, *where: trained.append(word) or choose(word, *where)
    )
    models = [study.best_model(), gputune.Study.open(study.file).best_model(*IRIS)]
    assert set(trained) == {"eager"}
    first, second = (dict(model.module.named_parameters()) for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_optimizer_of_a_later_version_is_refused_by_name():
    with pytest.raises(
        gputune.InputError,
        match="searched with optimizer='adamx', which this version of gputune does not have",
    ):
        recorded_model({"kind": "mlp"}, "adamx", trust_code=False)


def test_a_file_with_the_target_and_what_was_left_out_predicts_without_a_warning():
    x = np.random.default_rng(0).normal(size=30)
    frame = pd.DataFrame(
        {"x": x, "one": 1, "id": [f"id {i}" for i in range(30)], "price": 2 * x + 0.5}
    )
    study = tune("mlp", frame.drop(columns="price"), frame["price"], n_trials=1, max_epochs=1, cv=2)
    assert study.best_model().predict(frame).shape == (30,)
