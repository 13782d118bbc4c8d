"""From rows to a study and its model, through the public tune()."""

import re
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
import optuna
import pandas as pd
import polars as pl
import pytest
import torch
from scipy.stats import loguniform
from sklearn.datasets import make_classification, make_regression
from sklearn.model_selection import (
    GroupKFold,
    KFold,
    ShuffleSplit,
    StratifiedKFold,
    TimeSeriesSplit,
)
from torch import nn

import gputune
import reference
from gputune.data.folds import hold_out
from gputune.data.target import check_target
from gputune.population.population import complete
from gputune.report.snippet import snippet
from gputune.spaces.edges import edge_remarks
from gputune.spaces.portfolios import PORTFOLIOS
from gputune.study.store import Store
from problems import largest_difference, living_tensors
from refused import refused

tune = partial(gputune.tune, max_epochs=3, cv=3, verbose=0, workers=1)
tune_one = partial(tune, n_trials=1, include_default=False)


class Net(nn.Module):
    """A user's module, as a script or a test would define it."""

    def __init__(self, n_features, n_outputs, hidden=8):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(n_features, hidden), nn.Tanh(), nn.Linear(hidden, n_outputs)
        )

    def forward(self, x):
        return self.body(x)


def test_a_study_has_trials_scores_curves_and_a_best_one(iris, capsys):
    threads = torch.get_num_threads()
    study = tune("mlp", *iris, n_trials=6, verbose=1)
    assert [trial.origin for trial in study.trials] == ["default"] + ["random"] * 5
    assert study.curves.shape == (6, 3, 3)
    assert study.best_score == max(trial.score for trial in study.trials)
    for trial, curve in zip(study.trials, study.curves):
        mean = curve.mean(1)
        assert trial.state == "complete"
        assert trial.score == mean.max()
        assert trial.best_epoch == 1 + mean.argmax()
        assert trial.fold_scores == tuple(curve[trial.best_epoch - 1])
        for score in trial.fold_scores:  # an accuracy has the digits of double precision
            assert score * 50 == pytest.approx(round(score * 50), abs=1e-12)
    assert study.best_params == study.best_trial.params
    assert set(study.best_params) == {"lr", "batch_size", "width", "weight_decay"}
    said = capsys.readouterr().err
    assert "mlp on 150 rows, 4 features; target 'y': 3 classes" in said
    assert "plan: 6 trials in" in said and "note: memory" not in said
    assert torch.get_num_threads() == threads
    assert torch.tensor(1e-39) * 1 != 0  # denormal numbers are not taken for zero
    narrow = tune("mlp", *iris, n_trials=6, memory="1KB", verbose=1)
    np.testing.assert_allclose(narrow.curves, study.curves, atol=1e-6)
    words = r"memory='1KB' does not hold one trial of the largest size, which takes about [\d.]+ [KM]iB; a"
    assert re.search(
        f"note: {words} trial of that size trains alone, and uses that much memory\n",
        capsys.readouterr().err,
    )


def test_the_same_call_gives_the_same_study(iris):
    first, second = (tune("mlp", *iris, n_trials=4, random_state=3) for _ in range(2))
    np.testing.assert_array_equal(first.curves, second.curves)
    # which is used once
    other = tune("mlp", *iris, n_trials=4, random_state=np.random.RandomState(0))
    assert [t.params for t in other.trials[1:]] != [t.params for t in first.trials[1:]]
    assert other.meta["seed"] == np.random.RandomState(0).randint(2**31)
    assert tune("mlp", *iris, n_trials=1, random_state=None).meta["seed"] >= 0


def test_a_fold_equals_a_plain_loop_on_its_own_preprocessing(iris):
    """Laws 1 and 5 through the public door: statistics of the training rows, then the plain
    loop."""
    X, y = iris
    folds = list(StratifiedKFold(3, shuffle=True, random_state=0).split(X, y))
    params = {"lr": 0.01, "batch_size": 20, "width": 24}
    study = tune(
        "mlp",
        X,
        y,
        n_trials=0,
        include=[params],
        include_default=False,
        space=params,
        dtype="float64",
        scoring="neg_log_loss",
        epoch="last",
        cv=folds,
    )
    config = complete(params, optimizer="adamw", schedule="constant")
    for f, (train, valid) in enumerate(folds):
        center = X[train].mean(0)
        scale = X[train].std(0)
        x = torch.tensor((X - center) / scale)
        rows = torch.tensor(valid)
        losses = []

        def after_epoch(epoch, module, x=x, rows=rows, losses=losses):
            with torch.no_grad():
                losses.append(
                    nn.functional.cross_entropy(module(x[rows]), torch.tensor(y)[rows]).item()
                )

        reference.train_mlp(
            x[train], torch.tensor(y)[train], config, n_outputs=3, epochs=3, after_epoch=after_epoch
        )
        np.testing.assert_allclose(-study.curves[0, :, f], losses, rtol=1e-9)


@pytest.mark.parametrize("width", [16, (16, 5)])
def test_the_refit_equals_a_plain_loop_for_the_best_epochs(iris, width, tmp_path):
    X, y = iris
    params = {"lr": 0.03, "batch_size": 16, "width": width, "schedule": "cosine"}
    space = {**params, "width": [width]}
    path = tmp_path / "study.db"
    tune_one("mlp", X, y, space=space, dtype="float64", max_epochs=5, study=path)
    study = gputune.Study.open(path)
    assert study.best_params == params
    study.best_model(X, y).save(tmp_path / "model")
    model = gputune.load_model(tmp_path / "model")
    x = torch.tensor((X - X.mean(0)) / X.std(0))
    config = complete(params, optimizer="adamw", schedule="constant")
    epochs = study.best_trial.best_epoch
    alone = reference.train_mlp(
        x, torch.tensor(y), config, n_outputs=3, epochs=epochs, max_epochs=5
    )
    assert largest_difference(model.module, alone) <= 1e-10
    assert model.info["epochs"] == epochs


@pytest.mark.parametrize(
    ("model", "kind"),
    [("mlp", "multiclass"), ("logistic", "binary"), (Net, "binary")]
    + [
        pytest.param(*one, marks=pytest.mark.long)
        for one in (("mlp", "binary"), ("logistic", "multiclass"))
    ],
)
def test_models_and_class_tasks(model, kind):
    classes = 2 if kind == "binary" else 3
    X, y = make_classification(80, 6, n_informative=4, n_classes=classes, random_state=0)
    labels = np.array(["ant", "bee", "cat"])[y]
    study = tune(model, X, labels, n_trials=3, max_epochs=20)
    assert study.meta["task"] == kind
    tuned = study.best_model()
    assert set(tuned.predict(X)) <= set(labels)
    assert tuned.predict_proba(X).shape == (80, classes)
    assert (tuned.predict(X) == labels).mean() > 1.2 / classes


@pytest.mark.parametrize("model", ["mlp", "logistic", Net])
def test_regression_scores_are_in_original_units(model):
    X, y = make_regression(90, 4, noise=1.0, random_state=0)
    y = 1000 + 50 * y
    how = {"optimizer": "adamw", "scoring": "neg_root_mean_squared_error", "max_epochs": 40}
    study = tune_one(model, X, y, space={"lr": 0.05}, **how)
    assert study.meta["task"] == "regression"
    assert np.sqrt(((study.best_model().predict(X) - y) ** 2).mean()) < y.std() / 2
    assert y.std() / 1000 < -study.best_score < y.std()


def test_frames_files_tensors_and_arrays_give_one_answer(iris, tmp_path):
    (X, y), names = iris, ["a", "b", "c", "d"]
    frame = pl.DataFrame(X, schema=names).with_columns(kind=pl.Series(y).cast(pl.String))
    frame.write_csv(tmp_path / "iris.csv")
    frame.write_parquet(tmp_path / "iris.parquet")
    expected = tune("mlp", X, y, n_trials=2).curves
    for data in (
        (pd.DataFrame(X, columns=names), pd.Series(y)),
        (pl.DataFrame(X, schema=names), pl.Series(y)),
        (pd.DataFrame(X, columns=names).assign(kind=y), "kind"),
        (tmp_path / "iris.csv", "kind"),
        (tmp_path / "iris.parquet", "kind"),
    ):
        np.testing.assert_array_equal(tune("mlp", *data, n_trials=2).curves, expected)
    np.testing.assert_allclose(tune("mlp", "sklearn:iris", n_trials=2).curves, expected, atol=0.05)
    tensors = tune("mlp", torch.tensor(X), torch.tensor(y), n_trials=2)
    np.testing.assert_allclose(tensors.curves, expected, atol=0.05)
    assert tensors.best_model().predict(torch.tensor(X)).shape == (150,)


WAYS = ["robust", "piecewise"]


@pytest.mark.parametrize("model", ["mlp", "logistic", Net])
def test_trials_that_prepare_numbers_in_a_way_are_those_of_a_search_of_it_alone(
    iris, model, tmp_path
):
    search = partial(tune, model, *iris, n_trials=4, include_default=False)
    space = {"C": [1.0, 0.1]} if model == "logistic" else {"lr": [1e-2, 1e-3]}
    study = search(space={"numbers": WAYS, **space}, study=tmp_path / "study.db")
    opened = gputune.Study.open(study.file)
    for way in WAYS if model == "mlp" else WAYS[1:]:
        alone = search(space=space, numbers=way)
        for trial in alone.trials:
            params = {**trial.params, "numbers": way}
            number = next(other.number for other in study.trials if other.params == params)
            np.testing.assert_array_equal(study.curves[number], alone.curves[trial.number])
            models = alone.best_model(trial=trial.number), opened.best_model(*iris, trial=number)
            np.testing.assert_array_equal(*(found.predict_proba(iris[0]) for found in models))
    assert not isinstance(model, type) or models[1].module.body[0].in_features == 64
    assert f"'numbers': [{study.best_params['numbers']!r}]" in "".join(snippet(opened)).replace(
        '"', "'"
    )


@pytest.mark.parametrize(
    "how",
    [
        {"method": "halving", "max_epochs": 9},
        pytest.param({"method": "median"}, marks=pytest.mark.long),
        {"method": gputune.OptunaSampler(optuna.samplers.RandomSampler(seed=0))},
        {"method": gputune.Hypergradient(outer_steps=1), "scoring": "neg_log_loss"},
        {
            "method": gputune.Hypergradient(outer_steps=1),
            "model": "logistic",
            "space": {"C": loguniform(0.1, 1)},
        },
    ],
)
def test_each_method_prepares_numbers_as_its_trials_say(iris, how):
    how = {"model": "mlp", "space": {"lr": loguniform(1e-3, 1e-2)}, "n_trials": 4, **how}
    model = how.pop("model")
    space = {"numbers": WAYS, **how.pop("space")}
    study = tune(model, *iris, space=space, **how)
    assert {trial.params["numbers"] for trial in study.trials} == {*WAYS}
    how |= {"method": "random", "workers": 1, "scoring": study.record.scoring}
    plain = tune(model, *iris, space=space, **how)
    alike = [
        (a.number, b.number) for a in study.trials for b in plain.trials if a.params == b.params
    ]
    for number, other in alike:
        done = np.isfinite(study.curves[number]).all(1)
        np.testing.assert_allclose(study.curves[number][done], plain.curves[other][done], atol=1e-6)
    assert alike


def test_numbers_of_a_space_have_a_default_continue_and_are_included(iris, tmp_path):
    search = partial(tune, "mlp", *iris, space={"numbers": WAYS, "lr": loguniform(1e-3, 1e-2)})
    first = search(n_trials=2, study=tmp_path / "study.db")
    assert first.trials[0].params["numbers"] == "robust"
    more = search(n_trials=4, study=tmp_path / "study.db", include=[{"numbers": "quantile"}])
    assert more.trials[:2] == first.trials and more.trials[2].params["numbers"] == "quantile"
    for study in (more, search(warm_start=[more], n_trials=1)):
        assert study.record.numbers == "robust" and np.isfinite(study.curves).all()
    own = tune("mlp", *iris, n_trials=1, numbers="robust", include=[{"numbers": "none"}])
    # goes before the argument
    assert own.record.numbers == "robust" and own.trials[1].params["numbers"] == "none"


@pytest.mark.parametrize(("row", "numbers"), [(0, "auto"), (slice(0, 75), "auto"), (0, "robust")])
def test_a_note_says_which_columns_have_numbers_beyond_those_of_training_rows(iris, row, numbers):
    X = iris[0].copy()
    X[row, 2] = 1e6  # of one row, or of rows that every fold trains on
    notes = tune("mlp", X, iris[1], n_trials=1, numbers=numbers, max_epochs=1).record.notes
    said = (
        "Column 'x2': numbers beyond 20 standard deviations and beyond all training rows of a "
        "fold are clipped at the far"
    )
    assert any(note.startswith(said) for note in notes) == (row == 0 and numbers == "auto")


def test_the_space_of_the_mlp_by_its_name_begins_with_a_portfolio(iris, tmp_path):
    search = partial(tune, "mlp", *iris, space="mlp", max_epochs=1, cv=2)
    few, more = (search(n_trials=n, study=tmp_path / "study.db") for n in (3, 10))
    at_once = search(n_trials=10)
    origins = ["default", *["portfolio"] * len(PORTFOLIOS["mlp"]), *["random"] * 10][:10]
    assert (
        [trial.origin for trial in at_once.trials]
        == [trial.origin for trial in more.trials]
        == origins
    )
    assert more.trials[:3] == few.trials
    assert [trial.params for trial in at_once.trials] == [trial.params for trial in more.trials]
    for listed, trial in zip(PORTFOLIOS["mlp"], at_once.trials[1:]):
        assert listed.items() <= trial.params.items()
    tensors = tune(
        "mlp", torch.tensor(iris[0]), iris[1], n_trials=9, space="mlp", max_epochs=1, cv=2
    ).trials
    assert {trial.params.get("numbers", "standard") for trial in tensors} == {"standard"}
    descent = search(n_trials=2, method=gputune.Hypergradient(outer_steps=1))
    assert "portfolio" not in {trial.origin for trial in descent.trials}
    search(n_trials=2, include_default=False, study=tmp_path / "plain.db")
    # the later search has one more trial, next to the default
    later = search(n_trials=3, study=tmp_path / "plain.db")
    assert [trial.origin for trial in later.trials] == ["random", "random", "default", "portfolio"]


@pytest.mark.parametrize("kind", [int, float])
def test_files_frames_and_arrays_have_one_rule_for_the_task(tmp_path, iris, kind, capsys):
    X = iris[0]
    y = (iris[1] == 1).astype(kind)
    frame = pd.DataFrame(X, columns=list("abcd")).assign(t=y)
    frame.to_csv(tmp_path / "t.csv", index=False)
    rows = [(X, y), (frame.drop(columns="t"), frame.t), (frame, "t"), (tmp_path / "t.csv", "t")]
    rows += [(torch.tensor(X), torch.tensor(y)), (X, y.tolist())]
    assert {tune("mlp", *of, n_trials=1, max_epochs=1).meta["task"] for of in rows} == {"binary"}
    tune("mlp", X, y, n_trials=1, max_epochs=1, verbose=1)
    assert "2 classes\n" in capsys.readouterr().err
    tune("mlp", X, y * 3 + np.arange(len(y)) % 2, n_trials=1, max_epochs=1, verbose=1)
    assert "4 classes; if they are numbers, set task='regression'" in capsys.readouterr().err


def test_a_guess_of_the_task_that_may_be_wrong_is_a_warning_where_tune_was_called():
    X = np.random.default_rng(0).normal(size=(210, 2))
    y = np.repeat(np.arange(21), 10)
    with pytest.warns(
        gputune.InputWarning, match="21 distinct whole numbers in 210 rows"
    ) as caught:
        tune("mlp", X, y, n_trials=1, max_epochs=1)
    assert [warning.filename for warning in caught] == [__file__]


def test_mixed_columns_missing_values_and_unknown_levels(tmp_path):
    rng = np.random.RandomState(0)
    n = 120
    frame = pd.DataFrame(
        {
            "size": np.where(rng.rand(n) < 0.1, np.nan, rng.randn(n)),
            "color": rng.choice(["red", "green", "blue"], n),
            "open": rng.rand(n) < 0.5,
            "day": pd.date_range("2024-01-01", periods=n),
            "id": [f"row {i}" for i in range(n)],
        }
    )
    y = np.where(frame["color"] == "red", "yes", "no")
    study = tune("mlp", frame, y, n_trials=3, max_epochs=20)
    assert study.best_score > 0.9
    assert any("id" in note for note in study.meta["notes"])
    model = study.best_model()
    fresh = frame.head(3).assign(color=["red", "violet", None], extra=1)
    with (
        pytest.warns(UserWarning, match="extra"),
        pytest.warns(gputune.InputWarning, match="column 'color': 'violet'"),
    ):
        assert model.predict(fresh)[0] == "yes"
    model.save(tmp_path / "model")
    loaded = gputune.load_model(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict_proba(frame), model.predict_proba(frame))


def test_the_levels_of_a_category_are_bounded(tmp_path):
    frame = pd.DataFrame({"city": [f"c{i % 6}" for i in range(60)]})
    y = np.arange(60) % 2
    call = partial(tune_one, "mlp", frame, y, study=tmp_path / "study.db", max_epochs=1)
    study = call(max_levels=3)
    assert (
        study.record.features == 4 and "⟦max_levels=3⟧ keeps only the most" in study.record.notes[0]
    )
    model = gputune.Study.open(tmp_path / "study.db").best_model(frame, y)
    assert model.layout.feature_names == ("city=c0", "city=c1", "city=c2", "city=(other)")
    assert "max_levels=3," in snippet(study)
    with refused(r"differs from this call in: max_levels \(3 in the study, 32 now\)"):
        call()
    assert call(study=None).record.features == 6


def test_folds_groups_and_time_series():
    X, y = make_classification(60, 4, random_state=0)
    groups = np.repeat(np.arange(12), 5)
    for cv, given, count in (
        (GroupKFold(4), groups, 4),
        (4, groups, 4),
        (TimeSeriesSplit(3), None, 3),
    ):
        study = tune("mlp", X, y, groups=given, n_trials=1, cv=cv)
        assert study.curves.shape[2] == count
    named = pd.DataFrame(X, columns=list("abcd")).assign(group=groups)
    study = tune("mlp", named, y, groups="group", n_trials=1)
    assert study.meta["features"] == 4
    with refused("cv=ShuffleSplit.* must not split a group"):
        tune("mlp", named, y, groups="group", cv=ShuffleSplit(2, random_state=0))


@pytest.mark.parametrize("kind", ["frame", "array", "tensor", "file"])
def test_a_splitter_sees_the_rows_as_they_were_given(tmp_path, kind):
    X = np.random.default_rng(1).normal(size=(60, 3))
    y = np.arange(60) % 2
    time = np.random.default_rng(0).permutation(60)
    frame = pd.DataFrame(X, columns=list("abc")).assign(time=time, label=y, group=time // 10)
    frame.to_csv(tmp_path / "rows.csv", index=False)
    bare = frame.drop(columns=["label", "group"]).to_numpy()
    rows, target, groups = {
        "frame": (frame, "label", "group"),
        "array": (bare, y, time // 10),
        "tensor": (torch.tensor(bare), y, time // 10),
        "file": (tmp_path / "rows.csv", "label", "group"),
    }[kind]

    class ByTime:
        def split(self, X, y=None, groups=None):
            assert X.shape == (60, 4)
            order = np.argsort(X[:, 3] if isinstance(X, np.ndarray) else X["time"].to_numpy())
            yield order[:40], order[40:]

    assert (
        tune_one("mlp", rows, target, groups=groups, scoring=times, cv=ByTime()).best_score == 40.0
    )


def test_a_splitter_of_scikit_learn_cuts_arrays():
    images = np.random.default_rng(0).normal(size=(24, 1, 4, 4))
    y = np.arange(24) % 2
    for rows, n_inputs in ((images, 1), ((images, images), 2)):
        model = partial(Flat, n_inputs=n_inputs)
        study = tune_one(model, rows, y, max_epochs=1, cv=ShuffleSplit(2, random_state=0))
        assert study.curves.shape == (1, 1, 2)


class Flat(nn.Module):
    """A linear layer on several arrays."""

    def __init__(self, n_inputs):
        super().__init__()
        self.layer = nn.Linear(16 * n_inputs, 2)

    def forward(self, *x):
        return self.layer(torch.cat([part.flatten(1) for part in x], 1))


def times(estimator, X, y):
    """The first time of the rows that are scored."""
    return float((X[:, 3] if isinstance(X, np.ndarray) else X["time"]).min())


def test_weights_reach_the_loss():
    X, y = make_classification(300, 4, weights=[0.9], class_sep=0.5, random_state=0)
    options = {"n_trials": 1, "max_epochs": 20, "scoring": "balanced_accuracy"}
    weights = ({}, {"class_weight": "balanced"}, {"sample_weight": np.where(y, 4.0, 1.0)})
    plain, balanced, weighted = (tune("mlp", X, y, **weight, **options) for weight in weights)
    assert balanced.best_score > plain.best_score
    assert weighted.best_score > plain.best_score
    assert weighted.best_model().predict(X).mean() > plain.best_model().predict(X).mean()


def test_a_diverged_trial_is_last_and_never_best(iris):
    study = tune_one("mlp", *iris, space={"lr": [1e-2, 1e30], "optimizer": ["sgd"]}, n_trials=2)
    (failed,) = (trial for trial in study.trials if trial.state == "failed")
    assert np.isnan(failed.score) and np.isnan(study.curves[failed.number]).any()
    assert study.ranking()[-1] is failed and study.best_trial is not failed
    with pytest.raises(gputune.SearchFailedError, match="diverged.*Lower the learning rates"):
        tune_one("mlp", *iris, space={"lr": [1e30], "optimizer": ["sgd"]})


def test_processes_give_what_one_process_gives(iris, capfd):
    search = partial(tune, "mlp", *iris, n_trials=8, max_epochs=4)
    np.testing.assert_allclose(search(workers=2).curves, search().curves, atol=1e-6)
    space = {"module__hidden": [4, 8, 12], "numbers": WAYS}
    module = tune(Net, *iris, space=space, n_trials=8, max_epochs=4, workers=2)
    assert all(trial.state == "complete" for trial in module.trials)
    assert capfd.readouterr().err == ""


def test_a_study_file_holds_the_search_and_continues(tmp_path, iris):
    path, (X, y) = tmp_path / "study.db", iris
    search = partial(tune, "mlp", X, y, study=path)
    whole = search(n_trials=5)
    opened = gputune.Study.open(path)
    np.testing.assert_array_equal(opened.curves, whole.curves)
    assert opened.trials == whole.trials
    assert search(n_trials=5).trials == whole.trials
    more = search(n_trials=7)
    assert more.trials[:5] == whole.trials and len(more.trials) == 7
    with refused("this call in: folds .cv, groups., random_state .0 in the study, 1 now."):
        search(n_trials=5, random_state=1)
    with refused("call in: data"):
        tune("mlp", X + 1, y, n_trials=5, study=path)


def test_a_study_opened_later_refits_from_its_file_or_asks_for_rows(tmp_path, iris):
    frame = pd.DataFrame(iris[0], columns=list("abcd")).assign(kind=iris[1])
    csv = tmp_path / "iris.csv"
    frame.to_csv(csv, index=False)
    expected = (
        tune("mlp", csv, "kind", n_trials=2, study=tmp_path / "a.db")
        .best_model()
        .predict_proba(frame)
    )
    opened = gputune.Study.open(tmp_path / "a.db")
    np.testing.assert_array_equal(opened.best_model().predict_proba(frame), expected)
    frame.head(140).to_csv(csv, index=False)
    changed = r"have changed since .*\(150 rows then, 140 now\)\. Restore the file"
    for words, call in (
        (". With check=False", opened.best_model),
        (r"\.$", opened.oof_predictions),
    ):
        with refused(changed + words):
            call()
    as_it_is = opened.best_model(check=False).info
    assert as_it_is["rows"] == 140 and "score" not in as_it_is
    assert opened.best_model(frame.drop(columns="kind"), iris[1]).info["rows"] == 150
    csv.unlink()
    with refused(r"cannot read .*iris.csv' again, because the file is gone. Pass X and y"):
        opened.best_model()
    tune("mlp", *iris, n_trials=1, study=tmp_path / "b.db")
    with refused("needs X and y, because the search had its data in memory"):
        gputune.Study.open(tmp_path / "b.db").best_model()


def test_a_model_has_the_score_of_its_own_rows_only(tmp_path, iris):
    X, y = iris
    study = tune("mlp", X, y, n_trials=1, study=tmp_path / "a.db")
    opened = gputune.Study.open(tmp_path / "a.db")
    model = opened.best_model(X, y)
    assert (model.info["score"], model.info["fingerprint"]) == (
        study.best_score,
        study.meta["fingerprint"],
    )
    others = {
        r"\(150 rows then, 120 now\)": (X[:120], y[:120]),
        r"\(4 columns then, 3 now\)": (X[:, :3], y),
        r"\(150 rows then and now, with different names or values\)": (X, y + 1),
        r"\(150 rows then, 100 now\)": (X[:100], y[:100]),
    }
    for words, rows in others.items():
        for of in (study, opened):
            with refused(rf"are not the rows of the search .*{words}"):
                of.best_model(*rows)
    with refused("Pass the rows of the search. With check=False the model trains .* has no"):
        opened.best_model(X + 1, y)
    other = opened.best_model(X[:120], y[:120], check=False)
    assert other.info["rows"] == 120 and other.info["params"] == study.best_params
    assert (
        not {"score", "std_error"} & other.info.keys()
        and "cross-validated" not in other._repr_html_()
    )
    for of_other_rows in (
        other,
        replace(model, info={**model.info, "fingerprint": other.info["fingerprint"]}),
    ):
        with refused("with other parameters, another score or other rows. Create the model"):
            study.report(tmp_path / "report.html", model=of_other_rows)
    study.report(tmp_path / "report.html", model=model)
    # of an earlier version
    old = {key: value for key, value in model.info.items() if key != "fingerprint"}
    study.report(tmp_path / "report.html", model=replace(model, info=old))


def test_a_study_runs_code_only_with_permission(tmp_path, iris, forget_code):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Linear):\n    def __init__(self, n_features, "
        "n_outputs):\n        super().__init__(n_features, n_outputs)\n"
    )
    path = tmp_path / "a.db"
    study = tune(f"{tmp_path / 'net.py'}:Net", *iris, n_trials=1, study=path)
    expected = study.best_model().predict(iris[0])
    opened = gputune.Study.open(path)
    np.testing.assert_array_equal(opened.best_model(*iris).predict(iris[0]), expected)
    forget_code()
    with refused(rf"{tmp_path}/net.py', and loading it runs .*, or pass trust_code=True"):
        opened.best_model(*iris)
    np.testing.assert_array_equal(
        opened.best_model(*iris, trust_code=True).predict(iris[0]), expected
    )
    with refused("pass trust_code=True"):  # it was said for that call
        opened.best_model(*iris)


def test_weights_that_a_file_does_not_hold_are_asked_for(tmp_path, iris):
    X, y = iris
    study = tune_one("mlp", X, y, sample_weight=np.ones(150) * 2, study=tmp_path / "a.db")
    with refused("cannot read sample_weight, which this study used, from the study file"):
        gputune.Study.open(tmp_path / "a.db").best_model(X, y)
    with refused("cannot weight other rows"):
        study.best_model(X, y)
    half = {Fraction(0): 2.0}  # equals a class, and is none of the kinds that a file holds
    tune_one("mlp", X, y, class_weight=half, study=tmp_path / "b.db")
    with refused(r"cannot read class_weight={0: 2.0, 1: 1.0, 2: 1.0} from the study"):
        gputune.Study.open(tmp_path / "b.db").best_model(X, y)


@pytest.mark.parametrize("class_weight", ["balanced", {0: 3.0, 2: 0.5}])
def test_class_weights_are_read_from_a_study_file(tmp_path, iris, class_weight):
    # classes of unlike size
    X = iris[0][20:]
    y = iris[1][20:]
    study = tune("mlp", X, y, study=tmp_path / "a.db", class_weight=class_weight, n_trials=1)
    expected = study.best_model().predict_proba(X)
    again = gputune.Study.open(tmp_path / "a.db").best_model(X, y)
    np.testing.assert_array_equal(again.predict_proba(X), expected)
    unweighted = tune("mlp", X, y, n_trials=1).best_model()
    assert np.abs(unweighted.predict_proba(X) - expected).max() > 1e-4


def test_a_timeout_ends_after_the_running_epoch(iris):
    study = tune("mlp", *iris, n_trials=2, timeout=1e-9, max_epochs=500)
    assert {trial.state for trial in study.trials} <= {"stopped", "waiting"}
    assert (study.best_trial.state, study.best_trial.best_epoch) == ("stopped", 1)


OPTUNA = gputune.OptunaSampler(optuna.samplers.RandomSampler(), halving=gputune.Halving())
IMAGES = {"X": np.ones((9, 1, 4, 4)), "y": np.arange(9) % 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"model": "mpl"},
            "model must be 'mlp', 'logistic', 'cnn', 'gru', 'realmlp', a torch.nn.Module.*mean "
            "'mlp'",
        ),
        ({"model": Net(4, 3)}, "must be a class, not an instance.*Pass Net"),
        (
            {"optimizer": "adagrad"},
            "optimizer for model='mlp' must be one of sgd, nesterov, adam, adamw, rmsprop, lion, "
            "muon, schedulefree, sgdhd, nesterovhd, adamhd, adamwhd, or a class of .*'adagrad'. "
            ".* mean 'Adagrad'",
        ),
        (
            {"optimizer": "Adagrad"},
            "torch.optim.Adagrad updates only .*model='mlp' trains all .*models.MLP",
        ),
        ({"method": "halvng"}, "method must be .*got 'halvng'. Did you mean 'halving'"),
        ({"loss": "hubber", "model": Net}, "loss must be .*got 'hubber'. Did you mean 'huber'"),
        ({"task": "clasification"}, "task must be one of .*Did you mean 'classification'"),
        ({"schedule": "one-cycle"}, "schedule must be one of .*Did you mean 'one_cycle'"),
        ({"schedule": "step"}, "schedule must be one of 'constant', 'cosine', 'linear', 'warmup"),
        ({"epoch": "first"}, "epoch must be one of 'best', 'last', got 'first'"),
        (
            {"numbers": "log"},
            "numbers must be one of 'auto', .*'piecewise', 'piecewise-tree', 'none', got 'log'",
        ),
        (
            {"space": {"numbers": ["standrd"]}},
            r"space\['numbers'\] must be one of .*'standrd'. .* mean 'standard'",
        ),
        (
            {
                "numbers": "robust",
                "space": [{"numbers": ["standard"]}, {"numbers": ["none", "quantile"]}],
            },
            r"numbers='robust' is not one of the values in the space \(standard, none, quantile\), "
            "so no trial would use it",
        ),
        (
            {"y": np.full(150, 2.5)},
            "y is 2.5 in every row, so there is nothing to predict. Check the column",
        ),
        (
            {"y": np.append(np.linspace(0, 1, 149), 1e30)},
            r"y has 1e\+30 in row 149, .* half of the other numbers become equal in single precision",
        ),
        (
            {"space": {"numbers": ["robust"]}, "X": torch.rand(9, 2), "y": np.arange(9) % 3},
            "numbers='robust' does not support tensors. Pass a NumPy array",
        ),
        (
            {"space": {"numbers": ["standard"]}, "model": "cnn", **IMAGES},
            r"space\['numbers'\] can be searched only for tables, but X is .* Leave the key out, and pass"
            " numbers='standard' for the whole",
        ),
        (
            {"space": "mlp", "model": "logistic"},
            "space='mlp' needs model='mlp', got model='logistic'. Choose that model, or a space",
        ),
        (
            {"space": "mlp", "optimizer": "sgd"},
            "space='mlp' .* measured with adamw, got optimizer='sgd'. Leave one",
        ),
        ({"dtype": "float16"}, "dtype must be one of 'float32', 'float64', got 'float16'"),
        ({"max_epochs": 0}, "max_epochs must be an integer of at least 1, got 0"),
        (
            {"workers": "rays"},
            "workers must be a number of processes, 'auto', 'ray' or gputune.Ray.*, got 'rays'",
        ),
        ({"workers": 0}, "workers must be an integer of at least 1, got 0"),
        (
            {"study": 3},
            "study must be the path of a file, or None, got 3. If you have an open study, pass its",
        ),
        (
            {"study": "/"},
            "study must be a file, got the folder '/'. Pass a file in this folder, such as "
            "'/study.db'",
        ),
        (
            {"target_score": "0.9"},
            "target_score must be a number such as 0.95, or None, got '0.9'",
        ),
        (
            {"patience_trials": 0},
            "patience_trials must be an integer of at least 1, or None, got 0",
        ),
        ({"patience": 0}, "patience must be an integer of at least 1, or None, got 0"),
        (
            {"patience": 3, "method": "halving"},
            "patience needs .*, but method='halving' decides how long .*. Leave",
        ),
        ({"patience": 3, "method": "hypergradient"}, "but method='hypergradient' decides how"),
        ({"patience": 3, "method": "median"}, "but method='median' decides how"),
        (
            {"patience": 3, "method": "pbt"},
            "but method='pbt' compares all trials after the same number of epochs, so none of them "
            "can end early",
        ),
        ({"patience": 3, "method": OPTUNA}, "but method='optuna' decides how"),
        (
            {"patience": 3, "epoch": "last"},
            "patience needs .*, but epoch='last' scores the last epoch",
        ),
        (
            {"patience": 3, "model": "logistic"},
            "but the logistic regression solved .* has no epochs",
        ),
        (
            {"timeout": -1},
            "timeout must be a number of seconds above 0, or a time such as '60s', '5m' or "
            "'1h30m', or None, got -1",
        ),
        ({"timeout": "5x"}, "timeout must be a number of seconds above 0.*got '5x'"),
        (
            {"memory": "lots"},
            "memory must be a positive number of bytes, or text such as '8GB', got 'lots'",
        ),
        (
            {"device": "cuda:99"},
            r"device must be 'auto' or a device of this machine \(cpu.*\), got 'cuda:99'",
        ),
        ({"device": "gpu"}, "device must be 'auto' or a device of this machine"),
        (
            {"random_state": -1},
            "random_state must be in \\[0, 2\\*\\*32\\), as in scikit-learn, got -1",
        ),
        (
            {"random_state": "0"},
            "random_state must be an integer, a numpy RandomState or Generator, or None, got '0'",
        ),
        ({"verbose": "x"}, r"verbose must be 0 \(silent\) or 1, got 'x'"),
        ({"verbose": -1}, "verbose must be .*, got -1"),
        ({"verbose": 1.5}, "verbose must be .*, got 1.5"),
        ({"verbose": None}, "verbose must be .*, got None"),
        ({"space": {"learning_rate": [1]}}, "learning_rate"),
        ({"scoring": "acuracy"}, "Did you mean 'accuracy'"),
        ({"cv": 200}, "200"),
        ({"y": None}, "y is missing"),
        ({"groups": "group"}, "groups must be a column of the table, got 'group'"),
    ],
)
def test_bad_arguments_are_named(iris, arguments, message):
    how = {"model": "mlp", "X": iris[0], "y": iris[1], "n_trials": 1, **arguments}
    with warnings.catch_warnings(), refused(message):
        warnings.simplefilter("ignore")
        tune(how.pop("model"), how.pop("X"), how.pop("y"), **how)


IN_THE_SPACE = [
    ("learning_rate", "lr"),
    ("batch_size", "batch_size"),
    ("per_device_train_batch_size", "batch_size"),
    ("module__size", "module__size"),
]


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        (word, f' Hyperparameters belong in the space: space={{"{key}": [...]}}.')
        for word, key in IN_THE_SPACE
    ]
    + [
        ("epochs", " Did you mean 'max_epochs'?"),
        ("scorin", " Did you mean 'scoring'?"),
        ("zzz", ""),
    ]
    + [("n_iter", " Did you mean 'n_trials'?"), ("scorer", " Did you mean 'scoring'?")]
    + [
        ("num_train_epochs", " Pass max_epochs."),
        ("max_steps", " gputune counts epochs. Pass max_epochs."),
        ("accelerator", " Pass device, such as device='cuda'."),
        (
            "monitor",
            " gputune computes the validation scores itself. Pass scoring, such as "
            "scoring='accuracy' or scoring='neg_log_loss'.",
        ),
        (
            "trainer",
            " tune trains without a trainer. To keep the trainer, call it in the objective of "
            "gputune.search.",
        ),
    ],
)
def test_an_argument_that_there_is_not_is_a_type_error(word, meant):
    with pytest.raises(TypeError) as error:
        gputune.tune("mlp", [[0.0]], [0], **{word: 10})
    assert str(error.value) == f"tune() got an unexpected keyword argument {word!r}.{meant}"


@pytest.mark.filterwarnings("ignore:.* train without rows of a class")
def test_more_bad_input(tmp_path, iris):
    X, y = iris
    frame = pd.DataFrame(X, columns=list("abcd")).assign(kind=y)
    csv, folder, latin = (tmp_path / name for name in ("a.csv", "folder.csv", "latin.csv"))
    csv.write_text("a,b\n1,2\n")
    folder.mkdir()
    latin.write_bytes("a,kind\ncaf\xe9,1\n".encode("latin-1"))
    of_types = pd.DataFrame({"x": range(4), "kind": [1, "a"] * 2})
    groups = np.arange(150) // 5
    halves = [(np.arange(100), np.arange(100, 150))]
    last = [(np.arange(149), [149])]
    cases = [
        ("solved with optimizer='exact' predicts classes", "logistic", X, X[:, 0], {}),
        (
            "y and groups must be arrays if X is a tensor or arrays",
            "mlp",
            torch.tensor(X),
            "target",
            {},
        ),
        (r"kind mixes text \('a'\) and int \(1\)", "mlp", of_types, "kind", {}),
        ("y must name the target column of the file", "mlp", csv, y, {}),
        (
            "scoring='roc_auc_ovr' needs every class.*fold 0 lacks one",
            "mlp",
            X,
            y,
            {"scoring": "roc_auc_ovr", "cv": halves},
        ),
        ("scoring='r2' needs two validation rows", "mlp", X, X[:, 0], {"cv": last}),
        (
            "groups cannot be used with a time series",
            "mlp",
            X,
            y,
            {"groups": groups, "cv": TimeSeriesSplit(3)},
        ),
        (
            "groups must not be the column of the target, got 'kind'",
            "mlp",
            frame,
            "kind",
            {"groups": "kind"},
        ),
        ("folder.csv' is a folder. Give the file in it", "mlp", folder, "kind", {}),
        ("Write UTF-8 text", "mlp", latin, "kind", {}),
    ]
    for size, words in (
        (51, "Class 1 has 1 row for 3 folds. Choose another scoring."),
        (52, "Class 1 has 2 rows for 3 folds. Choose 2 stratified folds, or another scoring."),
        (101, "Class 2 has 1 row for 3 folds. Choose another scoring, or leave that class out."),
    ):
        how = {
            "scoring": "roc_auc" if size < 100 else "roc_auc_ovr",
            "cv": list(KFold(3).split(X[:size])),
        }
        said = f"scoring='{how['scoring']}' needs every class.*lacks one. {words}$"
        cases.append((said, "mlp", X[:size], y[:size], how))
    for words, model, rows, target, how in cases:
        with refused(words):
            tune(model, rows, target, **how)


def test_a_study_refuses_other_folds_weights_and_nameless_scorers(tmp_path, iris):
    weights = np.ones(150)
    first = StratifiedKFold(3, shuffle=True, random_state=1)
    search = partial(
        tune, "mlp", *iris, n_trials=1, study=tmp_path / "study.db", cv=first, sample_weight=weights
    )
    search()
    for words, changed in (
        ("differs from this call in: folds .cv, groups.", {"cv": StratifiedKFold(3)}),
        ("call in: sample_weight", {"sample_weight": weights * 2}),
        (
            "has no name by which study=",
            {"scoring": lambda *_: 0.0, "study": tmp_path / "other.db"},
        ),
    ):
        with refused(words):
            search(**changed)


def test_included_configurations_join_a_study_that_continues(tmp_path, iris):
    search = partial(tune, "mlp", *iris, study=tmp_path / "study.db", n_trials=1)
    search(include_default=False)
    trials = search(include=[{"lr": 0.5}]).trials
    assert [(trial.number, trial.origin) for trial in trials] == [
        (0, "random"),
        (1, "default"),
        (2, "include"),
    ]


@pytest.mark.parametrize("space", [{"lr": [1e39]}, {"lr": [1e-3], "weight_decay": [1e40]}])
def test_values_beyond_single_precision_diverge_and_harm_nobody(iris, space):
    usual = {"lr": 1e-2, "weight_decay": 0.0, "width": 300}
    study = tune_one("mlp", *iris, space=space, optimizer="sgd", include=[usual])
    assert [trial.state for trial in study.trials] == ["complete", "failed"]


def test_sizes_without_effect_and_a_row_of_no_fold_change_nothing(iris):
    """How far a batch size lies beyond all rows, the size of equal weights, a row that no fold
    uses."""
    large = tune("mlp", *iris, space={"batch_size": [10**20, 10**6]}, n_trials=2).curves
    np.testing.assert_allclose(large[0], large[1], atol=1e-6)
    plain, *weighted = (
        tune_one(
            "mlp", *iris, sample_weight=None if weight is None else np.full(150, weight)
        ).curves
        for weight in (None, 1e38, 1e-42)
    )
    np.testing.assert_allclose(weighted, [plain] * 2, atol=1e-6)
    X = iris[0].copy()
    order = np.random.RandomState(0).permutation(np.arange(1, 150))
    X[0] = 1e300
    study = tune(
        "mlp", X, iris[1], n_trials=1, cv=[(order[:90], order[90:]), (order[:80], order[80:])]
    )
    assert all(trial.state == "complete" for trial in study.trials)


def test_the_default_configuration_is_held_to_the_space_and_counts(iris, capsys):
    space = {"width": [16, 32], "momentum": [0.0, 0.5]}
    study = tune("mlp", *iris, space=space, n_trials=3, include=[{"lr": 0.1}], verbose=1)
    assert {trial.params["width"] for trial in study.trials} == {16, 32}
    assert [trial.origin for trial in study.trials] == ["default", "include", "random", "random"]
    assert study.trials[0].params == {"width": 32, "momentum": 0.0}
    assert study.trials[1].params == {"width": 32, "momentum": 0.0, "lr": 0.1}
    said = capsys.readouterr().err
    notes = study.meta["notes"]
    assert all(f"note: {note}\n" in said for note in notes)
    assert (
        "Trial 0 is the default configuration, moved into the space: width=32 in place of 128."
        in notes
    )
    assert notes[-1].startswith("'momentum' has no effect, because adamw")
    inside = tune("mlp", *iris, space={"width": [16, 128]}, n_trials=1)
    assert inside.trials[0].params == {"width": 128} and inside.meta["notes"] == []


def test_a_refused_module_leaves_no_study(tmp_path, iris):
    class Broken(Net):
        def forward(self, x):
            return super().forward(x)[:, :1]

    with refused("must return a tensor of shape"):
        tune(Broken, *iris, study=tmp_path / "study.db", n_trials=1)
    assert not (tmp_path / "study.db").exists()


class Square(nn.Module):
    """Takes 2 x 2 images, and counts on all of their pixels."""

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(2, n_outputs))

    def forward(self, x):
        return self.body(x.view(-1, 1, 2, 2))


@pytest.fixture(scope="module")
def images(iris):
    """Rows with a constant second pixel, and their labels."""
    X = iris[0].copy()
    X[:, 1] = 3.0
    return X, iris[1]


@pytest.mark.cpu  # the simulated device has no convolutions
def test_a_module_gets_all_columns_a_built_in_model_those_that_vary(tmp_path, images):
    path = tmp_path / "study.db"
    study = tune(Square, *images, study=path, n_trials=1)
    assert (study.meta["columns"], study.meta["features"], study.meta["notes"]) == ("keep", 4, [])
    models = [study.best_model(), gputune.Study.open(path).best_model(*images)]
    assert largest_difference(*(model.module for model in models)) == 0
    assert models[1].layout.feature_names == ("x0", "x1", "x2", "x3")
    with refused(r"columns \('keep' in the study, 'drop-constant' now\)"):
        tune(Net, *images, study=path, columns="drop-constant", n_trials=1)
    for columns, features in (("auto", 3), ("keep", 4)):
        assert tune("mlp", *images, columns=columns, n_trials=1).meta["features"] == features


def test_a_refused_shape_says_what_became_of_the_columns(images):
    with refused(
        r"forward pass of Square raised RuntimeError: shape .*\(rows, 3\) and return \(rows, 3\)\. The 4 columns of X "
        r"became 3 features\. Left out: 'x1'\. The option columns='keep' leaves numbers and booleans"
    ):
        tune(Square, *images, columns="drop-constant", n_trials=1)
    frame = pd.DataFrame(images[0]).assign(site=["a", "b", "c"] * 50)
    with refused(r"5 columns of X became 7 features\. Several features each: 'site'\."):
        tune(Square, frame, images[1], n_trials=1)


def test_a_study_from_before_columns_had_an_option(tmp_path, images):
    path = tmp_path / "study.db"
    search = partial(tune, Net, *images, study=path, n_trials=1)
    first = search(columns="drop-constant")
    with Store.open(path) as store:
        store._connection.execute("DELETE FROM meta WHERE key = 'columns'")
    again = search(columns="drop-constant")
    assert again.meta["columns"] == "drop-constant" and again.best_score == first.best_score
    assert gputune.Study.open(path).best_model(*images).layout.feature_names == ("x0", "x2", "x3")
    with refused(r"columns \('drop-constant' in the study, 'keep' now\)"):
        search()


class Noisy(Net):
    def forward(self, x):
        return nn.functional.dropout(self.body(x), 0.3, self.training)


def test_a_search_in_a_thread_or_in_inference_mode_is_the_search_alone(iris):
    def search(_):
        return tune(Noisy, *iris, n_trials=1).curves

    before = torch.get_rng_state()
    alone = search(None)
    pause = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as threads:
            for curves in threads.map(search, range(3)):
                np.testing.assert_array_equal(curves, alone)
    finally:
        sys.setswitchinterval(pause)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.inference_mode():
        study = tune(Noisy, *iris, n_trials=1)
        assert study.best_model() is not None
    np.testing.assert_array_equal(study.curves, alone)


class Sharing(Net):
    """Keeps an activation, and has one submodule under two names."""

    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)
        self.head = self.body[2]

    def forward(self, x):
        self.hidden = self.body[:2](x)
        return self.head(self.hidden)


@pytest.mark.parametrize("method", ["halving", gputune.Hypergradient(outer_steps=1)])
def test_a_module_that_keeps_an_activation_has_a_model(iris, method):
    study, plain = (tune(kind, *iris, method=method, n_trials=1) for kind in (Sharing, Net))
    np.testing.assert_array_equal(study.curves, plain.curves)
    found = study.best_model()
    expected = plain.best_model()
    np.testing.assert_array_equal(found.predict_proba(iris[0]), expected.predict_proba(iris[0]))
    assert found.module.head is found.module.body[2]


def test_a_target_of_single_rows_and_the_folder_above_a_model_are_named(tmp_path, iris):
    target = check_target(np.array(list("abcdefghij")), n_rows=10, name="id")
    with refused("'id' has only one row for each of its 10 classes. Choose a different target"):
        hold_out(target, test_size=0.2, seed=0)
    tune("mlp", *iris, n_trials=1).best_model().save(tmp_path / "model")
    with refused("has no model.json. Did you mean .*model'"):
        gputune.load_model(tmp_path)


@pytest.mark.parametrize(
    ("model", "method"),
    [("mlp", "hypergradient"), (Net, "random"), ("logistic", "hypergradient")]
    + [
        pytest.param("mlp", name, marks=pytest.mark.long)
        for name in ("random", "halving", "optuna")
    ]
    + [pytest.param(Net, "hypergradient", marks=pytest.mark.long)],
)
def test_a_search_leaves_no_tensor_behind(iris, model, method):
    values = {"optuna": gputune.OptunaSampler(optuna.samplers.RandomSampler(seed=0))}
    values["hypergradient"] = gputune.Hypergradient(outer_steps=1)
    search = partial(tune, model, *iris, n_trials=2, method=values.get(method, method), cv=2)
    search()  # what is kept once for all searches
    before = living_tensors()
    search()
    assert living_tensors() <= before


def test_a_best_value_at_the_edge_is_a_note(capsys):
    X = np.random.default_rng(0).normal(size=(40, 2))
    y = np.arange(40) % 2
    space = {"lr": [1e-9, 1e-8, 1e-7]}
    study = tune(
        "mlp", X, y, space=space, n_trials=3, max_epochs=1, cv=2, scoring="neg_log_loss", verbose=1
    )
    (remark,) = edge_remarks(study)
    assert f"note: {remark}" in capsys.readouterr().err
