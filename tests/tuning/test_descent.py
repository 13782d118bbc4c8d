"""The search by hypergradients, through the public tune()."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import loguniform
from sklearn.datasets import load_breast_cancer, load_diabetes
from torch import nn

import gputune
import reference
from gputune.errors import InputError
from gputune.models import MLP
from gputune.tuning import descent
from gputune.tuning.trainer import Trainer
from moments import time_is_over
from problems import Net

FAST = {"max_epochs": 4, "cv": 3, "verbose": 0, "workers": 1, "optimizer": "adam", "include_default": False}
LR = {"lr": loguniform(1e-4, 1.0), "batch_size": [16], "width": [8], "activation": ["tanh"], "depth": [1]}


def paths(study):
    """The trials of each start, in the order of its outer steps."""
    found = {}
    for trial in study.trials:
        found.setdefault(trial.origin[0], []).append(trial)
    assert all([t.origin[1] for t in path] == list(range(len(path))) for path in found.values())
    return found


@pytest.fixture(scope="module")
def study(iris):
    return gputune.tune("mlp", *iris, space=LR, n_trials=3, method="hypergradient", **FAST)


def test_every_point_is_a_trial_and_the_best_so_far_is_returned(study):
    found = paths(study)
    assert sorted(found) == [0, 1, 2]
    assert max(map(len, found.values())) > 1
    assert study.meta["scoring"] == "neg_log_loss"
    assert study.best_score == max(trial.score for trial in study.trials)
    assert study.best_score > max(trial.score for trial in study.trials if trial.origin[1] == 0)
    for trial in study.trials:
        assert trial.best_epoch == 4  # the horizon, whose loss is descended
        assert trial.detail["loss"] == pytest.approx(-trial.score, rel=1e-5)
    assert study.guarded["chaotic"] == 0


def test_the_slopes_of_the_study_are_those_of_its_losses(iris):
    """Two studies of one fixed rate each, a little apart: the difference of their scores is the slope."""
    common = {**FAST, "dtype": "float64", "n_trials": 1, "method": gputune.Hypergradient(outer_steps=1)}
    first, up, down = (
        gputune.tune("mlp", *iris, space={**LR, "lr": [0.01 * math.exp(h)]}, **common).trials[0]
        for h in (0, 1e-5, -1e-5)
    )
    slope = (down.score - up.score) / 2e-5
    assert first.detail["slope"]["lr"][0][0] == pytest.approx(slope, rel=1e-6)


def test_momentum_of_several_segments(iris):
    method = gputune.Hypergradient(hyperparameters=["lr", "momentum"], segments=2, outer_steps=1)
    how = {**FAST, "optimizer": "sgd", "max_epochs": 2}
    study = gputune.tune("mlp", *iris, space={**LR, "momentum": [0.9]}, n_trials=1, method=method, **how)
    assert np.shape(study.trials[-1].params["momentum"]) == (2,)


def test_rates_for_segments_and_layers_reach_the_best_params_and_the_refit(iris):
    """The refit equals a plain loop with a parameter group for each layer, whose rate changes from part to part."""
    X, y = iris
    method = gputune.Hypergradient(segments=2, per_layer=True, outer_steps=3)
    study = gputune.tune("mlp", X, y, space=LR, n_trials=2, method=method, **FAST, dtype="float64")
    rates = study.best_params["lr"]
    assert np.shape(rates) == (2, 2) and len(set(np.ravel(rates))) > 1
    x = torch.as_tensor((X - X.mean(0)) / X.std(0))
    module = reference.start(MLP(4, 3, width=8, depth=1, activation="tanh").double(), 0)
    groups = [{"params": layer.parameters(), "lr": 0.0} for layer in module.layers]
    optimizer = torch.optim.Adam(groups)
    steps = 10  # an epoch: 150 rows in batches of 16
    for epoch, step in itertools.product(range(4), range(steps)):
        rows = torch.randperm(150, generator=reference.stream(0, "rows", 150, epoch))[step * 16 : step * 16 + 16]
        segment = int(epoch * steps + step >= 4 * steps // 2)
        for group, rate in zip(optimizer.param_groups, rates[segment]):
            group["lr"] = rate
        loss = nn.functional.cross_entropy(module(x[rows]), torch.as_tensor(y)[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model = study.best_model()
    np.testing.assert_allclose(model.predict_proba(X), module(x).softmax(1).detach(), atol=1e-9)
    assert model.info["params"]["lr"] == rates


def test_batch_size_width_and_depth_stay_population_axes(iris):
    space = {**LR, "batch_size": [8, 16, 32], "width": [4, 8], "depth": [1, 2]}
    method = gputune.Hypergradient(per_layer=True, outer_steps=2, hyperparameters=("lr", "weight_decay"))
    space["weight_decay"] = [1e-3]
    study = gputune.tune("mlp", *iris, space=space, n_trials=5, method=method, **FAST)
    for path in paths(study).values():
        shapes = {(t.params["batch_size"], t.params["width"], t.params["depth"]) for t in path}
        assert len(shapes) == 1
        for trial in path[1:]:
            assert (
                np.shape(trial.params["lr"])
                == np.shape(trial.params["weight_decay"])
                == (1, path[0].params["depth"] + 1)
            )


def test_momentum_and_betas_move_too(iris):
    space = {**LR, "momentum": [0.5]}
    method = gputune.Hypergradient(hyperparameters=("lr", "momentum"), outer_steps=3)
    study = gputune.tune("mlp", *iris, space=space, n_trials=1, method=method, **{**FAST, "optimizer": "sgd"})
    assert {trial.params["momentum"] for trial in study.trials} != {0.5}
    method = gputune.Hypergradient(hyperparameters=("beta1", "beta2"), outer_steps=3)
    study = gputune.tune("mlp", *iris, space=LR, n_trials=1, method=method, **FAST)
    assert len({trial.params.get("beta1", 0.9) for trial in study.trials}) > 1
    model = study.best_model()
    assert (model.predict(iris[0]) == iris[1]).mean() > 0.3


def test_another_scoring_ranks_the_points_but_the_loss_is_descended(study, iris):
    common = {"space": LR, "n_trials": 3, "method": "hypergradient", **FAST}
    by_accuracy = gputune.tune("mlp", *iris, scoring="accuracy", **common)
    assert [t.params for t in study.trials] == [t.params for t in by_accuracy.trials]
    assert by_accuracy.best_score == max(t.score for t in by_accuracy.trials) <= 1
    assert by_accuracy.trials[0].detail == study.trials[0].detail


def test_a_regression_descends_its_squared_error_in_the_targets_units():
    X, y = load_diabetes(return_X_y=True)
    study = gputune.tune("mlp", X, y, space=LR, n_trials=2, method="hypergradient", **FAST)
    assert study.meta["scoring"] == "neg_mean_squared_error"
    for trial in study.trials:
        assert trial.detail["loss"] == pytest.approx(-trial.score, rel=1e-5)
    assert study.best_score > study.trials[0].score or len(study.trials) > 1


def test_the_solved_logistic_regression_descends_on_c():
    X, y = (part[::3] for part in load_breast_cancer(return_X_y=True))
    starts = [{"C": C, "l1_ratio": r} for C, r in ((0.005, 0.0), (100.0, 1.0))]
    study = gputune.tune(
        "logistic", X, y, space={"C": loguniform(1e-3, 1e3)}, n_trials=0, include=starts, cv=3,
        method="hypergradient", verbose=0, include_default=False,
    )  # fmt: skip
    grid = gputune.tune(
        "logistic", X, y, scoring="neg_log_loss", cv=3, verbose=0, n_trials=0, include_default=False,
        include=[{"C": C, "l1_ratio": r} for C in np.logspace(-2, 1, 4) for r in (0.0, 1.0)],
    )  # fmt: skip
    assert study.best_score > grid.best_score - grid.best_trial.std_error / 4
    for path in paths(study).values():
        assert len({trial.params["l1_ratio"] for trial in path}) == 1
        assert path[-1].score >= path[0].score - 1e-3
    assert study.best_model().predict(X).shape == y.shape


def test_a_users_module_descends(iris):
    study = gputune.tune(
        Net, *iris, space={"lr": [1e-3], "batch_size": [16], "module__hidden": [4, 6]}, n_trials=2,
        method=gputune.Hypergradient(per_layer=True, outer_steps=3), **FAST,
    )  # fmt: skip
    assert study.best_score > study.trials[0].score
    assert np.shape(study.best_params["lr"]) == (1, 2)
    model = study.best_model()
    np.testing.assert_array_equal(model.predict(iris[0]), study.best_model().predict(iris[0]))


def test_chaos_is_flagged_stepped_down_from_and_counted(iris):
    """Momentum 0.9 at a rate of 10: the slope is noise, and the search still ends at a good rate."""
    space = {**LR, "lr": [30.0], "momentum": [0.9]}
    options = {**FAST, "optimizer": "sgd", "max_epochs": 10}
    study = gputune.tune("mlp", *iris, space=space, n_trials=1, method="hypergradient", **options)
    assert study.guarded["chaotic"] >= 2 and study.guarded["differences"] >= 1
    (path,) = paths(study).values()
    assert path[1].params["lr"] < path[0].params["lr"]
    assert all(math.isfinite(trial.score) for trial in path[1:])
    assert study.best_score > path[0].score + 0.1 or not math.isfinite(path[0].score)


def test_a_stopped_search_goes_on_without_training_a_point_twice(iris, tmp_path, monkeypatch):
    space = {**LR, "lr": [1e-4, 3e-4, 1e-3]}
    common = {"space": space, "n_trials": 3, "method": gputune.Hypergradient(outer_steps=4), **FAST}
    whole = gputune.tune("mlp", *iris, **common)
    trained, train = [], Trainer.train

    def interrupted(trainer, job, plan, **rest):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(sum(len(chunk.index) for chunk in plan.chunks))
        return train(trainer, job, plan, **rest)

    monkeypatch.setattr(Trainer, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gputune.tune("mlp", *iris, study=tmp_path / "s.db", **common)
    kept = [trial for trial in gputune.Study.open(tmp_path / "s.db").trials if trial.state == "complete"]
    assert len(kept) == sum(trained)
    again = []
    monkeypatch.setattr(
        Trainer,
        "train",
        lambda trainer, job, plan, **rest: (again.extend(plan.chunks), train(trainer, job, plan, **rest))[1],
    )
    study = gputune.tune("mlp", *iris, study=tmp_path / "s.db", **common)
    assert sum(len(chunk.index) for chunk in again) == len(whole.trials) - len(kept)
    assert [t.origin for t in study.trials] == [t.origin for t in whole.trials]
    for a, b in zip(study.trials, whole.trials):
        assert a.params["lr"] == pytest.approx(b.params["lr"], rel=1e-4)
        assert a.score == pytest.approx(b.score, rel=1e-4)
    opened = gputune.Study.open(tmp_path / "s.db")
    assert [t.detail for t in opened.trials] == [t.detail for t in study.trials]
    np.testing.assert_allclose(
        opened.best_model(*iris).predict_proba(iris[0]), study.best_model().predict_proba(iris[0]), atol=1e-6
    )


def test_more_starts_join_a_study(iris, tmp_path):
    common = {"space": LR, "method": gputune.Hypergradient(outer_steps=2), "study": tmp_path / "s.db", **FAST}
    first = gputune.tune("mlp", *iris, n_trials=1, **common)
    second = gputune.tune("mlp", *iris, n_trials=3, **common)
    assert [t.score for t in second.trials[: len(first.trials)]] == [t.score for t in first.trials]
    assert len(paths(second)) == 3
    with pytest.raises(InputError, match="holds another search, which differs from this call in: method, scoring"):
        gputune.tune("mlp", *iris, n_trials=1, **{**common, "method": "random"})


def test_processes_give_what_one_process_gives(iris):
    common = {
        "space": {**LR, "width": [8, 20, 40]},
        "n_trials": 4,
        "method": gputune.Hypergradient(outer_steps=1),
        **FAST,
    }
    one, two = (gputune.tune("mlp", *iris, **{**common, "workers": n}) for n in (1, 2))
    for a, b in zip(one.trials, two.trials):
        assert a.score == pytest.approx(b.score, rel=1e-4) and a.params["lr"] == pytest.approx(b.params["lr"], rel=1e-4)


def test_little_memory_cuts_chunks_and_changes_nothing(iris):
    common = {"space": LR, "n_trials": 4, "method": gputune.Hypergradient(outer_steps=1, segments=2), **FAST}
    plenty, little, least = (gputune.tune("mlp", *iris, **common, memory=memory) for memory in (None, "3MB", "800KB"))
    for a, b, c in zip(plenty.trials, little.trials, least.trials):
        assert a.score == pytest.approx(b.score, rel=1e-5) and a.score == pytest.approx(c.score, rel=1e-5)
    with pytest.raises(InputError, match="memory does not suffice to differentiate one trial in 3 folds"):
        gputune.tune("mlp", *iris, **common, memory="20KB")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("halfing", {}, "method must be 'random', 'halving', 'median', 'hypergradient', gputune.Halving"),
        (gputune.Hypergradient(hyperparameters="C"), {}, "only the logistic regression solved with .* has 'C'"),
        (gputune.Hypergradient(hyperparameters="momentum"), {}, "adam has no 'momentum', and trial 0 uses it"),
        (gputune.Hypergradient(hyperparameters="weight_decay"), {}, "start from weight_decay=0, as trial 0"),
        ("hypergradient", {"optimizer": "sgdhd"}, "trial 0 has: optimizer='sgdhd'; choose one of sgd"),
        ("hypergradient", {"optimizer": "muon"}, "trial 0 has: optimizer='muon'; choose one of sgd"),
        ("hypergradient", {"space": {"clip_norm": [1.0]}}, "trial 0 has: clip_norm=1; leave it out"),
        ("hypergradient", {"space": {"ema": [0.9]}}, "trial 0 has: ema=0.9; leave it out"),
    ],
)  # fmt: skip
def test_bad_methods_are_named(iris, method, options, message):
    with pytest.raises(InputError, match=message):
        gputune.tune("mlp", *iris, n_trials=1, method=method, **{"space": LR, **FAST, **options})


@pytest.mark.filterwarnings("ignore:y has classes with fewer rows than the 3 folds")
@pytest.mark.parametrize("options", [{}, {"scoring": "neg_log_loss"}])
@pytest.mark.parametrize("model", ["mlp", "logistic"])
def test_a_class_that_a_fold_does_not_train_on_is_said_before_anything_trains(iris, monkeypatch, model, options):
    """Its loss is infinite at every point: no learning rate is to blame."""
    monkeypatch.setattr(Trainer, "train", None)
    monkeypatch.setattr(descent, "implicit_chunk", None)
    X, y = iris
    names = np.array(["a", "b", "c"])[np.where(np.arange(150) == 149, 2, np.minimum(y, 1))]
    common = {"method": "hypergradient", "n_trials": 1, "cv": 3, "verbose": 0}
    with pytest.raises(
        InputError, match="validation rows of fold . have class 'c', of which it has no training row: its log loss"
    ):
        gputune.tune(model, X, names, **common, **options)


@pytest.mark.parametrize("options", [{"segments": 2}, {"per_layer": True}, {"hyperparameters": "weight_decay"}])
def test_the_solved_logistic_regression_has_c_alone(iris, options):
    with pytest.raises(InputError, match="the solved logistic regression has C alone"):
        gputune.tune("logistic", *iris, method=gputune.Hypergradient(**options), verbose=0)
    with pytest.raises(InputError, match="cannot start from C=inf, as trial 0 does.*above 0 and finite"):
        gputune.tune("logistic", *iris, space={"C": [math.inf]}, n_trials=1, include_default=False,
                     method="hypergradient", verbose=0)  # fmt: skip


def test_what_a_timeout_cut_short_goes_on_in_a_later_call(iris, tmp_path, monkeypatch):
    common = {"space": {**LR, "lr": [1e-3]}, "n_trials": 1, "method": gputune.Hypergradient(outer_steps=1)}
    options = {**FAST, "max_epochs": 10, "study": tmp_path / "s.db"}
    with monkeypatch.context() as patch:
        time_is_over(patch, 5)
        first = gputune.tune("mlp", *iris, **common, **options, timeout=600)
    assert [trial.state for trial in first.trials] == ["stopped"]
    second = gputune.tune("mlp", *iris, **common, **options)
    assert [trial.state for trial in second.trials] == ["complete"] * 2
    assert second.trials[0].best_epoch == 10
    opened = gputune.Study.open(tmp_path / "s.db")
    assert [trial.state for trial in opened.trials] == ["complete"] * 2


def test_a_longer_descent_goes_on_from_a_shorter_one(iris, tmp_path):
    common = {"space": {**LR, "lr": [1e-4]}, "n_trials": 1, "study": tmp_path / "s.db", **FAST}
    first, second = (gputune.tune("mlp", *iris, method=gputune.Hypergradient(outer_steps=n), **common) for n in (1, 3))
    assert [t.score for t in second.trials[:2]] == [t.score for t in first.trials]
    assert len(second.trials) > len(first.trials)


def test_more_segments_than_steps_are_refused(iris):
    method = gputune.Hypergradient(segments=50)
    with pytest.raises(InputError, match=r"segments=...\) must be at most the number of steps, got 50 segments for"):
        gputune.tune("mlp", *iris, space=LR, n_trials=1, method=method, **FAST)


class Detached(nn.Module):
    """A module whose second derivative torch gets wrong without a word."""

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.first, self.last = nn.Linear(n_features, 6), nn.Linear(6, n_outputs)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(h / (h.norm(dim=1, keepdim=True).detach() + 1e-3))


def test_a_module_without_second_derivatives_is_refused(iris):
    with pytest.raises(InputError, match="cannot be differentiated twice"):
        gputune.tune(
            Detached, *iris, space={"lr": [0.05], "batch_size": [16]}, n_trials=1, method="hypergradient",
            **FAST, dtype="float64",
        )  # fmt: skip


@pytest.mark.parametrize("width", [6, 20])
def test_what_fills_narrow_members_is_at_no_kink(width):
    X, y = (part[:120] for part in load_breast_cancer(return_X_y=True))
    space = {"lr": [0.01], "width": [width], "depth": [1], "activation": ["relu"]}
    method = gputune.Hypergradient(outer_steps=1)
    study = gputune.tune("mlp", X, y, space=space, n_trials=1, method=method, **FAST, dtype="float64")
    assert study.best_score < 0


def test_the_score_is_the_loss_however_large_it_is(iris):
    """scikit-learn's log loss has a limit, the loss that is descended has none."""
    method = gputune.Hypergradient(outer_steps=1)
    common = {"space": {**LR, "lr": [3.0], "activation": ["relu"]}, "n_trials": 1, "method": method, **FAST}
    own, limited = (gputune.tune("mlp", *iris, scoring=s, **common).trials[0] for s in (None, "neg_log_loss"))
    assert own.score == pytest.approx(-own.detail["loss"], rel=1e-4)
    assert limited.score > own.score + 1
