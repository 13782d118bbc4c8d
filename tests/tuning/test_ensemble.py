"""An ensemble is the greedy choice of Caruana et al., of trials that train again as they did in the
search."""

import re
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_diabetes, load_iris
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold
from torch import nn

import gputune
from gputune.callbacks import Callback, StopSearch
from gputune.cli.held_out import HeldOut
from gputune.cli.main import main
from gputune.cli.summary import ensemble_text
from gputune.data.table import as_table
from gputune.integrations.whole_model import WholeModel
from gputune.population.population import Ensemble
from gputune.study.model_files import share_of_rows
from gputune.tuning.predictions import Predictions, predictions_of
from gputune.tuning.progress import Progress
from gputune.tuning.refit import Access, search_of
from refused import refused

tune = partial(gputune.tune, n_trials=6, max_epochs=4, cv=3, verbose=0, workers=1)
IRIS = load_iris(return_X_y=True)
DIABETES = load_diabetes(return_X_y=True)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return tune("mlp", *IRIS, study=tmp_path_factory.mktemp("ensemble") / "study.db")


def predicted(study, trials=None):
    """The predictions of a study's trials, by default all in the order of their scores."""
    return predictions_of(
        search_of(Access(study)), study.ranking() if trials is None else trials, Progress(0)
    )


@pytest.fixture
def predictions(study):
    return predicted(study)


@pytest.mark.parametrize("kept", [True, False])
def test_the_candidates_score_again_as_in_the_search(study, kept):
    study = study if kept else tune("mlp", *IRIS, keep_predictions=False)
    predictions = predicted(study)
    again = np.array(
        [predictions.scores(fold, v)[0] for fold, v in enumerate(predictions.values)]
    ).T
    np.testing.assert_array_equal(again, [trial.fold_scores for trial in study.ranking()])


def greedy(predictions, size, folds):
    """The obvious form: every ensemble of a step scored by scikit-learn's words, from its list of
    members."""
    targets = [predictions.data.target[fold.valid].cpu().numpy() for fold in predictions.data.folds]

    def key(members):
        p = [predictions.values[fold][members].mean(0).cpu().numpy() for fold in folds]
        right = [np.mean(q.argmax(1) == targets[fold]) for q, fold in zip(p, folds)]
        loss = [log_loss(targets[fold], q, labels=[0, 1, 2]) for q, fold in zip(p, folds)]
        return np.mean(right), -np.mean(loss)

    chosen = []
    keys = []
    for _ in range(size):
        tried = [key([*chosen, m]) for m in range(len(predictions.values[0]))]
        chosen.append(tried.index(max(tried)))
        keys.append(max(tried))
    return Counter(chosen[: keys.index(max(keys)) + 1])


@pytest.mark.parametrize("space", [{"lr": [0.01, 0.02]}, {"numbers": ["standard", "robust"]}])
def test_an_ensemble_of_one_fold_knows_only_its_training_rows(space):
    X, y = IRIS
    order = np.random.default_rng(0).permutation(len(y))
    train, valid = np.sort(order[:100]), np.sort(order[100:])
    X = X.copy()
    X[valid] *= 100
    search = gputune.tune("mlp", X, y, space=space, cv=(train, valid), max_epochs=2, verbose=0)
    tuned = search.ensemble(refit="folds", size=2, verbose=0)
    assert abs(tuned.statistics.fill).max() < 10
    assert abs(search.ensemble(size=2, verbose=0).statistics.fill).max() > 50
    values = pd.DataFrame(X, columns=[f"x{j}" for j in range(4)])
    share = partial(share_of_rows, tuned.info["row_sample"], tuned.layout)
    table = as_table(values)
    assert share(table.select(train), y[train]) == 1 and share(table.select(valid), y[valid]) == 0


@pytest.mark.parametrize("folds", [[0, 1, 2], [0, 2]])
def test_the_choice_is_the_greedy_one(predictions, folds):
    def weights(choice):
        return {m: pytest.approx(n / choice.total()) for m, n in choice.items()}

    assert weights(predictions.choose(8, folds)) == weights(greedy(predictions, 8, folds))


def test_a_fold_is_scored_by_what_the_others_choose(predictions):
    before = predictions.nested_scores(5)
    target = predictions.data.target
    # another answer on one fold changes the choices for the others alone
    target[predictions.data.folds[1].valid] = 0
    choice = greedy(predictions, 5, [0, 2])
    mean = sum(n * predictions.values[1][m] for m, n in choice.items())
    after = predictions.nested_scores(5)
    assert after[1] == float((mean.argmax(1) == 0).double().mean()) != before[1]


def test_halves_of_the_only_fold_are_scored_by_what_the_other_half_chooses():
    study = tune("mlp", *IRIS, cv=[(np.arange(0, 150, 2), np.arange(1, 150, 2))])
    predictions = predicted(study)
    (values,), (fold,) = predictions.values, predictions.data.folds
    data = [
        replace(predictions.data, folds=(replace(fold, valid=fold.valid[start::2]),))
        for start in (0, 1)
    ]
    halves = [
        replace(predictions, values=[values[:, start::2]], data=data[start]) for start in (0, 1)
    ]
    scores = []
    for half, other in (halves, halves[::-1]):
        mean = sum(n * half.values[0][m] for m, n in greedy(other, 5, [0]).items())
        scores.append(
            float((mean.argmax(1) == half.data.target[half.data.folds[0].valid]).double().mean())
        )
    tuned = study.ensemble(size=5, refit="folds", verbose=0)
    assert predictions.nested_scores(5) == scores and scores[0] != scores[1]
    assert tuned.info["score"] == pytest.approx(np.mean(scores))
    assert len(tuned.module.members) == len(tuned.info["ensemble"])


@pytest.mark.parametrize("task", ["multiclass", "multilabel", "regression"])
def test_the_module_is_the_weighted_mean(task):
    members = [nn.Linear(4, 3).double() for _ in range(3)]
    x = torch.randn(5, 4).double()
    weights = torch.tensor([0.5, 0.3, 0.2]).double()
    link = {
        "multiclass": lambda z: z.softmax(-1),
        "multilabel": torch.sigmoid,
        "regression": lambda z: z,
    }[task]
    mean = sum(w * link(member(x)) for w, member in zip(weights, members))
    torch.testing.assert_close(link(Ensemble(members, weights.tolist(), task)(x)), mean)


def test_one_step_is_the_best_model_and_more_starts_are_other_members(study):
    best = study.best_model()
    one = study.ensemble(size=1, verbose=0)
    np.testing.assert_allclose(one.predict_proba(IRIS[0]), best.predict_proba(IRIS[0]), rtol=1e-5)
    assert one.info["ensemble"] == {str(study.best_trial.number): 1.0}
    first, second = study.ensemble(size=1, refit=2, verbose=0).module.members
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), best.module.parameters()))
    assert not torch.equal(first.layers[0].weight, second.layers[0].weight)


def test_each_start_of_a_member_has_its_part_of_the_share():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(80, 4))
    tuned = tune(
        "mlp", X, X[:, 0] + 0.8 * rng.normal(size=80), n_trials=6, cv=2, max_epochs=4
    ).ensemble(size=10, refit=2, verbose=0)
    shares = list(tuned.info["ensemble"].values())
    assert len(set(shares)) > 1
    np.testing.assert_allclose(tuned.module.weights, np.divide([*shares, *shares], 2))


def test_a_member_of_a_fold_is_that_of_the_search():
    folds = list(StratifiedKFold(3).split(*IRIS))
    study = tune("mlp", *IRIS, cv=folds, numbers="none")
    together = study.ensemble(size=1, refit="folds", verbose=0)
    out_of_fold = study.oof_predictions()
    assert together.info["refit"] == "folds" and len(together.module.members) == 3
    for member, (_, valid) in zip(together.module.members, folds):
        outputs = member(torch.tensor(IRIS[0][valid], dtype=torch.float32)).softmax(1).detach()
        np.testing.assert_allclose(outputs, out_of_fold[valid], rtol=1e-4)


class Net(nn.Module):
    def __init__(self, n_features, n_outputs, width=4):
        super().__init__()
        self.norm = nn.BatchNorm1d(n_features)
        self.layers = nn.Sequential(nn.Linear(n_features, width), nn.Tanh())
        self.last = nn.Linear(width, n_outputs)

    def forward(self, x):
        return self.last(self.layers(self.norm(x)))


class OneLogit(Net):
    """As most PyTorch users write two classes."""

    def __init__(self, n_features):
        super().__init__(n_features, 1)

    def forward(self, x):
        return super().forward(x)[:, 0]


NET = {"space": {"module__width": [4, 8], "lr": [0.01, 0.03]}}
TWO = IRIS[0][50:], IRIS[1][50:]


@pytest.mark.parametrize(
    ("model", "data", "how"),
    [
        ("mlp", IRIS, {"scoring": "neg_log_loss", "patience": 1}),
        (
            "mlp",
            IRIS,
            {"scoring": ["accuracy", "f1_macro"], "backend": "eager", "method": "halving"},
        ),
        (
            "mlp",
            DIABETES,
            {
                "dtype": "float64",
                "space": {"numbers": ["standard", "quantile"], "lr": [0.01, 0.03]},
            },
        ),
        pytest.param("realmlp", TWO, {}, marks=pytest.mark.long),
        ("logistic", TWO, {}),
        (Net, IRIS, NET),
        (Net, IRIS, {**NET, "backend": "recorded", "method": gputune.Median(min_epochs=1)}),
        (OneLogit, TWO, {"space": {"lr": [0.01, 0.03]}, "backend": "loop"}),
    ],
)
def test_kept_predictions_are_those_of_members_that_train_again(model, data, how):
    study = tune(model, *data, **how)
    trials = [trial for trial in study.ranking() if trial.state == "complete"]
    assert study.data.outputs.keys() == {trial.number for trial in trials} != set()
    lacking = replace(study, data=replace(study.data, outputs={}))
    kept, again = (predicted(one, trials) for one in (study, lacking))
    for one, other in zip(kept.values, again.values, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    first, second = (
        {place: n / one.total() for place, n in one.items()}
        for one in (kept.choose(8), again.choose(8))
    )
    assert first == pytest.approx(second)


def test_a_file_keeps_them_and_what_continues_adds_its_own(tmp_path, capsys):
    tune("mlp", *IRIS, study=tmp_path / "study.db", n_trials=2)
    study = tune("mlp", *IRIS, study=tmp_path / "study.db")
    first = study.ensemble(verbose=0)
    second = gputune.Study.open(study.file).ensemble(*IRIS)
    assert "train on their folds" not in capsys.readouterr().err
    np.testing.assert_array_equal(first.predict_proba(IRIS[0]), second.predict_proba(IRIS[0]))
    assert first.info == second.info


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (
            True,
            "3 trials train on their folds once more: the study has not stored their predictions",
        ),
        (
            False,
            "6 trials train on their folds once more: the search had keep_predictions=False",
        ),
    ],
)
def test_what_was_not_kept_trains_again(keep, words, monkeypatch, capsys):
    limit = 4 * 3 * 150 * 3  # three trials
    for place in ("ground.types", "tuning.pipeline"):
        monkeypatch.setattr(f"gputune.{place}.KEPT_BYTES", limit)
    study = tune("mlp", *IRIS, keep_predictions=keep, verbose=1)
    said = (
        "only the best trials, about 3, keep their predictions of validation rows, because those "
        "of all trials take more than 5"
    )
    assert (said in capsys.readouterr().err) == keep
    best = {trial.number for trial in study.ranking()[:3]}
    assert study.data.outputs.keys() == (best if keep else set())
    study.ensemble()
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "data", "how"),
    [
        pytest.param("mlp", IRIS, {}, marks=pytest.mark.long),
        (
            "mlp",
            DIABETES,
            {"space": {"width": [8, 16], "numbers": ["standard", "piecewise"], "lr": [0.01, 0.03]}},
        ),
        pytest.param("logistic", IRIS, {}, marks=pytest.mark.long),
        (OneLogit, TWO, {"space": {"lr": [0.01, 0.03]}}),
        pytest.param(Net, IRIS, {**NET, "optimizer": "sgd"}, marks=pytest.mark.long),
    ],
)
def test_it_is_saved_loaded_and_exported_as_any_model(model, data, how, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    X, y = data
    with np.errstate(all="ignore"):
        study = tune(model, X, y, **how)
    tuned = study.ensemble(refit="folds" if model == "mlp" else 2, verbose=0)
    tuned.save(tmp_path / "model")
    loaded = gputune.load_model(
        tmp_path / "model", module=None if isinstance(model, str) else model
    )
    predict, again = (
        one.predict if tuned.classes is None else one.predict_proba for one in (tuned, loaded)
    )
    np.testing.assert_array_equal(again(X), predict(X))
    assert loaded.info == tuned.info and sum(loaded.info["ensemble"].values()) == pytest.approx(1)
    # of some columns each, where they differ
    assert ("columns" in tuned.spec) == ("numbers" in how.get("space", {}))
    if model in ("logistic", "mlp") and tuned.classes is not None:
        return  # the others are exported
    tuned.export(tmp_path / "model.onnx")
    outputs = ort.InferenceSession(tmp_path / "model.onnx").run(None, {"X": tuned.encoded(X)})
    np.testing.assert_allclose(np.squeeze(outputs[-1]), predict(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["mlp", pytest.param("realmlp", marks=pytest.mark.long)])
def test_its_members_may_prepare_numbers_each_otherwise(model, monkeypatch, tmp_path):
    frame = pd.DataFrame(IRIS[0]).assign(kind=np.where(IRIS[0][:, 0] > 5, "large", "small"))
    frame.iloc[::9, 1] = np.nan
    sizes = {"width": [8]} if model == "mlp" else {"module__width": [8], "module__depth": [1]}
    space = {"numbers": ["quantile", "piecewise", "robust", "none"], **sizes}
    study = tune(model, frame, IRIS[1], space=space, n_trials=4, max_epochs=2)
    monkeypatch.setattr(Predictions, "choose", lambda *_: Counter({0: 1, 1: 1, 2: 1, 3: 1}))
    tuned = study.ensemble(verbose=0)
    assert tuned.spec["columns"] and tuned.module.members[0] is not tuned.module.members[1]
    alone = [study.best_model(trial=trial).predict_proba(frame) for trial in range(4)]
    np.testing.assert_allclose(tuned.predict_proba(frame), np.mean(alone, 0), rtol=1e-5)
    tuned.save(tmp_path / "model")
    loaded = gputune.load_model(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict_proba(frame), tuned.predict_proba(frame))
    _, exported = WholeModel(loaded)(torch.from_numpy(loaded.encoded(frame)))
    np.testing.assert_allclose(exported.detach(), tuned.predict_proba(frame), rtol=1e-5)


def test_rows_that_are_not_the_studys_are_refused_in_the_callers_words(study, tmp_path):
    opened = gputune.Study.open(study.file)
    report = partial(opened.report, tmp_path / "report.html", confusion=True)
    for name, call in {
        "ensemble": opened.ensemble,
        "oof_predictions": opened.oof_predictions,
        "report": report,
    }.items():
        with refused(rf"^{name}\(\) needs X and y, because the search had its data in memory"):
            call()
        with refused(rf"^{name}\(X, y\): these are not the rows.* Pass the rows of the search\.$"):
            call(X=IRIS[0][:100], y=IRIS[1][:100])


class StopAfter(Callback):
    """Stop the search after some epochs."""

    def __init__(self, epochs):
        self.left = epochs

    def on_epoch(self, curves):
        self.left -= curves.shape[1]
        if self.left <= 0:
            raise StopSearch


def scores_again(study):
    """The fold scores of all trials, computed from the predictions of an ensemble's candidates."""
    found = predicted(study)
    return np.array([found.scores(fold, v)[0] for fold, v in enumerate(found.values)]).T


@pytest.mark.parametrize("in_file", [False, True])
def test_trials_that_a_deadline_has_stopped_form_an_ensemble(in_file, tmp_path, capsys):
    how = {"n_trials": 3, "max_epochs": 40, "space": {"lr": [1e-3, 1e-2, 3e-2]}}
    how |= {"study": tmp_path / "study.db"} if in_file else {}
    study = tune("mlp", *IRIS, callbacks=[StopAfter(4)], **how)
    assert {trial.state for trial in study.trials} == {"stopped"}
    np.testing.assert_array_equal(
        scores_again(study), [trial.fold_scores for trial in study.ranking()]
    )
    capsys.readouterr()
    ensemble = study.ensemble(verbose=1)
    assert "train on their folds" not in capsys.readouterr().err  # their predictions are stored
    assert ensemble.info["ensemble"].keys() <= {"0", "1", "2"}
    if in_file:
        whole = tune("mlp", *IRIS, **how)
        assert {trial.state for trial in whole.trials} == {"complete"}
        np.testing.assert_array_equal(
            scores_again(whole), [trial.fold_scores for trial in whole.ranking()]
        )


@pytest.mark.parametrize(
    ("how", "asked", "message"),
    [
        ({}, {"size": 0}, r"ensemble\(size=...\) must be an integer of at least 1, got 0"),
        (
            {},
            {"candidates": True},
            r"ensemble\(candidates=...\) must be an integer of at least 2, got True",
        ),
        (
            {},
            {"refit": 1.5},
            r"ensemble\(refit=...\) must be an integer .* 1, got 1.5. Or pass 'all' or 'folds'",
        ),
        (
            {},
            {"refit": "fold"},
            r"ensemble\(refit=...\) must be an integer .* 1, got 'fold'. Or pass 'all' or 'folds'",
        ),
        (
            {"n_trials": 1},
            {},
            "needs two trials with a score, but the study has 1. Search on, or use best_model",
        ),
        (
            {},
            {"candidates": 1},
            r"ensemble\(candidates=...\) must be an integer of at least 2, got 1",
        ),
        (
            {"method": "hypergradient", "n_trials": 1},
            {},
            "this is a study of a hypergradient search, and each of its points has",
        ),
    ],
)
def test_what_cannot_be_an_ensemble_is_said(study, how, asked, message):
    study = tune("mlp", *IRIS, **how) if how else study
    with refused(message):
        study.ensemble(**asked)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ([], "An ensemble of"),
        (["--test-size", "0"], "and is saved as the model."),
        (["--trials", "1"], "No ensemble: ensemble() needs two trials with a score"),
    ],
)
def test_the_command_line_saves_the_better_one(typed, words, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        main(
            [*"tune sklearn:iris --trials 4 --epochs 3 --ensemble --out".split(), str(out), *typed]
        )
        == 0
    )
    text = " ".join(capsys.readouterr().out.split())
    assert words in text and " on the same folds, without a model" in text
    is_ensemble = isinstance(gputune.load_model(out / "model").module, Ensemble)
    assert is_ensemble == ("The ensemble is saved" in text or "is saved as the model" in text)
    assert main(["resume", str(out)]) == 0  # what was saved as an ensemble is one again
    assert isinstance(gputune.load_model(out / "model").module, Ensemble) == is_ensemble


@pytest.mark.parametrize(
    ("ensemble", "best", "words"),
    [
        (
            0.95,
            0.91,
            "The ensemble is saved.* One score lies within the other's 95% interval, .* be chance",
        ),
        (0.91, 0.95, "The best trial is saved.* may be chance"),
        (
            0.95,
            0.80,
            "The ensemble is saved. These rows chose the saved model, so its score on them is a "
            "little optimistic.$",
        ),
        (
            0.95,
            0.95,
            "The best trial is saved. These rows chose the saved model, so its score on them is "
            "a little optimistic.$",
        ),
    ],
)
def test_a_difference_within_an_interval_may_be_chance(study, ensemble, best, words):
    model = replace(study.best_model(), info={"ensemble": {"0": 1.0}, "score": 0.9})
    scores = [
        HeldOut(score, 100, interval=(score - 0.05, score + 0.03)) for score in (ensemble, best)
    ]
    assert re.search(words, ensemble_text(study, model, *scores, is_saved=ensemble > best))
    scores = [replace(score, interval=None) for score in scores]  # of which nothing is said
    assert "chance" not in ensemble_text(study, model, *scores, is_saved=ensemble > best)
