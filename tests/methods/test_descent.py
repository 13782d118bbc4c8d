"""The search by hypergradients, through the public tune()."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import loguniform
from sklearn.datasets import load_breast_cancer, load_diabetes
from torch import nn

import gputune
import reference
from gputune.methods import descent
from gputune.models import MLP
from gputune.tuning.trainer import Trainer
from moments import time_is_over
from problems import Net
from refused import refused

FAST = {
    "max_epochs": 4,
    "cv": 3,
    "verbose": 0,
    "workers": 1,
    "optimizer": "adam",
    "include_default": False,
}
LR = {
    "lr": loguniform(1e-4, 1.0),
    "batch_size": [16],
    "width": [8],
    "activation": ["tanh"],
    "depth": [1],
}
tune = partial(gputune.tune, **FAST, space=LR, method="hypergradient")


def paths(study):
    """The trials of each start, in the order of its outer steps."""
    found = {}
    for trial in study.trials:
        found.setdefault(trial.origin[0], []).append(trial)
    assert all([t.origin[1] for t in path] == list(range(len(path))) for path in found.values())
    return found


def assert_same_points(study, other, rel=1e-4):
    for a, b in zip(study.trials, other.trials, strict=True):
        assert a.params["lr"] == pytest.approx(
            b.params["lr"], rel=rel
        ) and a.score == pytest.approx(b.score, rel=rel)


@pytest.fixture(scope="module")
def study(iris):
    return tune("mlp", *iris, n_trials=3)


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
    """Two studies of one fixed rate each, a little apart: the difference of their scores is the
    slope."""
    search = partial(
        tune, "mlp", *iris, dtype="float64", n_trials=1, method=gputune.Hypergradient(outer_steps=1)
    )
    first, up, down = (
        search(space={**LR, "lr": [0.01 * math.exp(h)]}).trials[0] for h in (0, 1e-5, -1e-5)
    )
    slope = (down.score - up.score) / 2e-5
    assert first.detail["slope"]["lr"][0][0] == pytest.approx(slope, rel=1e-6)


def test_rates_for_segments_and_layers_reach_the_best_params_and_the_refit(iris):
    """The refit equals a plain loop with a parameter group per layer and a rate that changes from
    segment to segment.
    """
    X, y = iris
    method = gputune.Hypergradient(segments=2, per_layer=True, outer_steps=3)
    study = tune("mlp", X, y, n_trials=2, method=method, dtype="float64")
    rates = study.best_params["lr"]
    assert np.shape(rates) == (2, 2) and len(set(np.ravel(rates))) > 1
    x = torch.as_tensor((X - X.mean(0)) / X.std(0))
    module = reference.start(MLP(4, 3, width=8, depth=1, activation="tanh").double(), 0)
    groups = [{"params": layer.parameters(), "lr": 0.0} for layer in module.layers]
    optimizer = torch.optim.Adam(groups)
    steps = 10  # an epoch: 150 rows in batches of 16
    for epoch, step in itertools.product(range(4), range(steps)):
        rows = torch.randperm(150, generator=reference.stream(0, "rows", 150, epoch))[
            step * 16 : step * 16 + 16
        ]
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
    space = {
        **LR,
        "batch_size": [8, 16, 32],
        "width": [4, 8],
        "depth": [1, 2],
        "weight_decay": [1e-3],
    }
    method = gputune.Hypergradient(
        per_layer=True, outer_steps=2, hyperparameters=("lr", "weight_decay")
    )
    for path in paths(tune("mlp", *iris, space=space, n_trials=5, method=method)).values():
        assert (
            len({(t.params["batch_size"], t.params["width"], t.params["depth"]) for t in path}) == 1
        )
        shape = (1, path[0].params["depth"] + 1)
        assert {np.shape(t.params[name]) for t in path[1:] for name in ("lr", "weight_decay")} <= {
            shape
        }


def test_momentum_and_betas_move_too(iris):
    method = gputune.Hypergradient(hyperparameters=("lr", "momentum"), segments=2, outer_steps=3)
    study = tune(
        "mlp", *iris, space={**LR, "momentum": [0.5]}, n_trials=1, method=method, optimizer="sgd"
    )
    momentum = study.trials[-1].params["momentum"]
    assert np.shape(momentum) == (2,) and set(momentum) != {0.5}
    method = gputune.Hypergradient(hyperparameters=("beta1", "beta2"), outer_steps=3)
    study = tune("mlp", *iris, n_trials=1, method=method)
    assert len({trial.params.get("beta1", 0.9) for trial in study.trials}) > 1
    assert (study.best_model().predict(iris[0]) == iris[1]).mean() > 0.3


def test_another_scoring_ranks_the_points_but_the_loss_is_descended(study, iris):
    by_accuracy = tune("mlp", *iris, scoring="accuracy", n_trials=3)
    assert [t.params for t in study.trials] == [t.params for t in by_accuracy.trials]
    assert by_accuracy.best_score == max(t.score for t in by_accuracy.trials) <= 1
    assert by_accuracy.trials[0].detail == study.trials[0].detail


def test_a_regression_descends_its_squared_error_in_the_targets_units():
    study = tune("mlp", *load_diabetes(return_X_y=True), n_trials=2)
    assert study.meta["scoring"] == "neg_mean_squared_error"
    for trial in study.trials:
        assert trial.detail["loss"] == pytest.approx(-trial.score, rel=1e-5)
    assert study.best_score > study.trials[0].score or len(study.trials) > 1


def test_the_solved_logistic_regression_descends_on_c():
    X, y = (part[::3] for part in load_breast_cancer(return_X_y=True))
    solve = partial(
        gputune.tune, "logistic", X, y, cv=3, verbose=0, n_trials=0, include_default=False
    )
    starts = [{"C": C, "l1_ratio": r} for C, r in ((0.005, 0.0), (100.0, 1.0))]
    ratios = (0.0, 1.0)
    study = solve(space={"C": loguniform(1e-3, 1e3)}, include=starts, method="hypergradient")
    points = [{"C": C, "l1_ratio": r} for C in np.logspace(-2, 1, 4) for r in ratios]
    grid = solve(scoring="neg_log_loss", include=points)
    assert study.best_score > grid.best_score - grid.best_trial.std_error / 4
    for path in paths(study).values():
        assert len({trial.params["l1_ratio"] for trial in path}) == 1
        assert path[-1].score >= path[0].score - 1e-3
    assert study.best_model().predict(X).shape == y.shape


def test_the_slopes_of_solved_points_are_those_of_their_losses(iris):
    """Points that are solved together: each has the slope of its own C."""
    include = [{"C": C * math.exp(h)} for C in (0.05, 2.0) for h in (0, 1e-3, -1e-3)]
    how = {
        "method": gputune.Hypergradient(outer_steps=1),
        "n_trials": 0,
        "include_default": False,
        "cv": 2,
    }
    trials = gputune.tune(
        "logistic", *iris, space={"C": loguniform(1e-3, 1e3)}, include=include, **how, verbose=0
    ).trials
    for first, up, down in (trials[:3], trials[3:6]):
        slope = (down.score - up.score) / 2e-3
        assert first.detail["slope"]["C"][0][0] == pytest.approx(slope, rel=1e-4)


def test_a_users_module_descends(iris):
    space = {"lr": [1e-3], "batch_size": [16], "module__hidden": [4, 6]}
    method = gputune.Hypergradient(per_layer=True, outer_steps=3)
    study = tune(Net, *iris, space=space, n_trials=2, method=method)
    assert study.best_score > study.trials[0].score
    assert np.shape(study.best_params["lr"]) == (1, 2)
    models = study.best_model(), study.best_model()
    np.testing.assert_array_equal(*(model.predict(iris[0]) for model in models))


def test_chaos_is_flagged_stepped_down_from_and_counted(iris):
    """Momentum 0.9 at a rate of 10: the slope is noise, and the search still ends at a good
    rate."""
    space = {**LR, "lr": [30.0], "momentum": [0.9]}
    study = tune("mlp", *iris, space=space, n_trials=1, optimizer="sgd", max_epochs=10)
    assert study.guarded["chaotic"] >= 2 and study.guarded["differences"] >= 1
    (path,) = paths(study).values()
    assert path[1].params["lr"] < path[0].params["lr"]
    assert all(math.isfinite(trial.score) for trial in path[1:])
    assert study.best_score > path[0].score + 0.1 or not math.isfinite(path[0].score)


def test_a_stopped_search_continues_without_training_a_point_twice(iris, tmp_path, monkeypatch):
    space = {**LR, "lr": [1e-4, 3e-4, 1e-3]}
    path = tmp_path / "s.db"
    search = partial(
        tune, "mlp", *iris, space=space, n_trials=3, method=gputune.Hypergradient(outer_steps=4)
    )
    whole = search()
    trained = []
    limit = 2
    train = Trainer.train

    def counting(trainer, job, plan, **rest):
        if len(trained) == limit:
            raise KeyboardInterrupt
        trained.append(sum(len(chunk.index) for chunk in plan.chunks))
        return train(trainer, job, plan, **rest)

    monkeypatch.setattr(Trainer, "train", counting)
    with pytest.raises(KeyboardInterrupt):
        search(study=path)
    kept = [trial for trial in gputune.Study.open(path).trials if trial.state == "complete"]
    assert len(kept) == sum(trained)
    trained = []
    limit = None
    study = search(study=path)
    assert sum(trained) == len(whole.trials) - len(kept)
    assert [t.origin for t in study.trials] == [t.origin for t in whole.trials]
    assert_same_points(study, whole)
    opened = gputune.Study.open(path)
    assert [t.detail for t in opened.trials] == [t.detail for t in study.trials]
    models = opened.best_model(*iris), study.best_model()
    np.testing.assert_allclose(*(model.predict_proba(iris[0]) for model in models), atol=1e-6)


def test_more_starts_and_longer_descents_join_a_study(iris, tmp_path):
    search = partial(tune, "mlp", *iris, study=tmp_path / "s.db")
    first, second, longer = (
        search(n_trials=n, method=gputune.Hypergradient(outer_steps=steps))
        for n, steps in ((1, 1), (3, 1), (3, 3))
    )
    assert [t.score for t in second.trials[: len(first.trials)]] == [t.score for t in first.trials]
    assert len(paths(second)) == 3
    assert [t.score for t in longer.trials[: len(second.trials)]] == [
        t.score for t in second.trials
    ]
    assert len(longer.trials) > len(second.trials)
    words = r"in: method \('hypergradient' in the study, 'random' now\), scoring"
    with refused(f"holds a different search. It differs from this call {words}"):
        search(n_trials=1, method="random")


def test_processes_give_what_one_process_gives(iris):
    space = {**LR, "width": [8, 20, 40]}
    method = gputune.Hypergradient(outer_steps=1)
    assert_same_points(
        *(tune("mlp", *iris, space=space, n_trials=4, method=method, workers=n) for n in (1, 2))
    )


def test_little_memory_cuts_chunks_and_changes_nothing(iris):
    search = partial(
        tune, "mlp", *iris, n_trials=4, method=gputune.Hypergradient(outer_steps=1, segments=2)
    )
    plenty = search()
    for memory in ("3MB", "800KB"):
        assert [t.score for t in search(memory=memory).trials] == pytest.approx(
            [t.score for t in plenty.trials], 1e-5
        )
    with refused("memory does not suffice to differentiate one trial in 3 folds"):
        search(memory="20KB")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            "halfing",
            {},
            "method must be 'random', 'halving', 'median', 'pbt', 'hypergradient', 'tpe', "
            "gputune.Halving",
        ),
        ({"hyperparameters": "C"}, {}, "can have 'C' only for the logistic regression solved with"),
        ({"hyperparameters": "momentum"}, {}, "for adam, which trial 0 uses, got 'momentum'"),
        ({"hyperparameters": "weight_decay"}, {}, "start from weight_decay=0.0, as trial 0"),
        (
            {"segments": 50},
            {},
            r"segments=...\) must be at most the number of steps, got 50 segments for",
        ),
        ({}, {"optimizer": "sgdhd"}, "optimizer='sgdhd', which trial 0 has. Choose one of sgd"),
        ({}, {"optimizer": "muon"}, "optimizer='muon', which trial 0 has. Choose one of sgd"),
        ({}, {"space": {"clip_norm": [1.0]}}, "clip_norm=1.0, which trial 0 has. Leave it out"),
        ({}, {"space": {"ema": [0.9]}}, "ema=0.9, which trial 0 has. Leave it out"),
        *(
            (
                options,
                {"model": "logistic", "optimizer": None, "space": None},
                "can search only C of the solved logistic regression.*got hyperparameters=.*segments=",
            )
            for options in (
                {"segments": 2},
                {"per_layer": True},
                {"hyperparameters": "weight_decay"},
            )
        ),
        (
            {},
            {"model": "logistic", "optimizer": None, "space": {"C": [math.inf]}},
            "cannot start from C=inf, as trial 0 does.*finite values above 0",
        ),
    ],
)
def test_bad_methods_are_named(iris, method, options, message):
    method = gputune.Hypergradient(**method) if isinstance(method, dict) else method
    how = {"model": "mlp", "n_trials": 1, **options}
    with refused(message):
        tune(how.pop("model"), *iris, method=method, **how)


@pytest.mark.filterwarnings("ignore:y has classes with fewer rows than the 3 folds")
@pytest.mark.parametrize("options", [{}, {"scoring": "neg_log_loss"}])
@pytest.mark.parametrize("model", ["mlp", "logistic"])
def test_a_class_that_a_fold_does_not_train_on_is_said_before_anything_trains(
    iris, monkeypatch, model, options
):
    """Its loss is infinite at every point: no learning rate is to blame."""
    monkeypatch.setattr(Trainer, "train", None)
    monkeypatch.setattr(descent, "implicit_chunk", None)
    names = np.array(["a", "b", "c"])[np.where(np.arange(150) == 149, 2, np.minimum(iris[1], 1))]
    with refused(
        "cv must give each fold a training row for every class .*, got none of class 'c' in fold ."
    ):
        gputune.tune(
            model, iris[0], names, method="hypergradient", n_trials=1, cv=3, verbose=0, **options
        )


def test_what_a_timeout_cut_short_continues_in_a_later_call(iris, tmp_path, monkeypatch):
    method = gputune.Hypergradient(outer_steps=1)
    path = tmp_path / "s.db"
    search = partial(
        tune, "mlp", *iris, space={**LR, "lr": [1e-3]}, n_trials=1, method=method, max_epochs=10
    )
    with monkeypatch.context() as patch:
        time_is_over(patch, 5)
        first = search(study=path, timeout=600)
    assert [trial.state for trial in first.trials] == ["stopped"]
    for study in (search(study=path), gputune.Study.open(path)):
        assert [trial.state for trial in study.trials] == ["complete"] * 2
        assert study.trials[0].best_epoch == 10


class Detached(nn.Module):
    """A module with a second derivative that torch computes wrongly without an error."""

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.first = nn.Linear(n_features, 6)
        self.last = nn.Linear(6, n_outputs)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(h / (h.norm(dim=1, keepdim=True).detach() + 1e-3))


def test_a_module_without_second_derivatives_is_refused(iris):
    with refused("cannot be differentiated twice"):
        tune(Detached, *iris, space={"lr": [0.05], "batch_size": [16]}, n_trials=1, dtype="float64")


@pytest.mark.parametrize("width", [6, 20])
def test_what_fills_narrow_members_is_at_no_kink(width):
    X, y = (part[:120] for part in load_breast_cancer(return_X_y=True))
    space = {"lr": [0.01], "width": [width], "depth": [1], "activation": ["relu"]}
    method = gputune.Hypergradient(outer_steps=1)
    assert tune("mlp", X, y, space=space, n_trials=1, method=method, dtype="float64").best_score < 0


def test_the_score_is_the_loss_however_large_it_is(iris):
    """scikit-learn's log loss has a limit, the loss that is descended has none."""
    space = {**LR, "lr": [3.0], "activation": ["relu"]}
    method = gputune.Hypergradient(outer_steps=1)
    search = partial(tune, "mlp", *iris, space=space, n_trials=1, method=method)
    own, limited = (search(scoring=scoring).trials[0] for scoring in (None, "neg_log_loss"))
    assert own.score == pytest.approx(-own.detail["loss"], rel=1e-4)
    assert limited.score > own.score + 1
