"""The plots show the content of the study."""

import math
import sys

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from gputune.api.study import Study
from gputune.ground.errors import InputError, MissingExtraError
from gputune.views.parameters import importance, parallel_axes
from gputune.views.scores import score_view
from made_studies import made_descent, made_study, study_of


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def study():
    return made_study(40, epochs=8)


@pytest.fixture(scope="module")
def descent():
    return made_descent()


def scores(study):
    return np.array([trial.score for trial in study.trials])


def test_history(study):
    ax = study.plot_history()
    points = ax.collections[0].get_offsets()
    finite = np.isfinite(scores(study))
    np.testing.assert_array_equal(points[:, 0], np.flatnonzero(finite))
    np.testing.assert_array_equal(points[:, 1], scores(study)[finite])
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), np.fmax.accumulate(scores(study)))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("trial", "accuracy")


def test_curves(study):
    ax = study.plot_curves(best=3)
    lines = {
        line.get_label(): line.get_ydata()
        for line in ax.lines
        if line.get_label().startswith("trial ")
    }
    best = study.ranking()[:3]
    assert list(lines) == [f"trial {trial.number}" for trial in best]
    for trial in best:
        np.testing.assert_allclose(
            lines[f"trial {trial.number}"], study.curves[trial.number].mean(1)
        )
    band = ax.collections[1].get_paths()[0].vertices
    curve = study.curves[best[0].number]
    top = (curve.mean(1) + curve.std(1, ddof=1)).max()
    assert band[:, 1].max() == pytest.approx(top)
    assert len(ax.lines) == 3 and len(ax.collections) == 4
    thin = ax.collections[0].get_segments()
    assert len(thin) == 37
    np.testing.assert_array_equal(thin[0][:, 0], np.arange(1, 9))


def test_slice_of_one(study):
    ax = study.plot_slice("lr")
    points = ax.collections[0].get_offsets()
    finite = np.isfinite(scores(study))
    np.testing.assert_allclose(
        points[:, 0], np.array([t.params["lr"] for t in study.trials])[finite]
    )
    np.testing.assert_array_equal(points[:, 1], scores(study)[finite])
    assert ax.get_xscale() == "log" and ax.get_xlabel() == "lr"
    assert study.plot_slice("dropout").get_xscale() == "linear"


def test_slice_of_words_and_slices_of_all(study):
    ax = study.plot_slice("activation")
    names = [label.get_text() for label in ax.get_xticklabels()]
    assert sorted(names) == ["gelu", "relu", "tanh"]
    shown = [names[int(place)] for place in ax.collections[0].get_offsets()[:, 0]]
    assert shown == [t.params["activation"] for t in study.trials if math.isfinite(t.score)]
    cells = study.plot_slice()
    assert [cell.get_xlabel() for cell in cells] == list(study.best_params)
    assert all(isinstance(cell, Axes) for cell in cells)


def test_parallel(study):
    ax = study.plot_parallel()
    finite = [trial for trial in study.trials if math.isfinite(trial.score)]
    assert len(ax.lines) == len(finite)
    assert [label.get_text() for label in ax.get_xticklabels()] == [*study.best_params, "accuracy"]
    drawn = {(text.get_text().strip(), *text.get_position()) for text in ax.texts}
    for place, axis in enumerate(parallel_axes(score_view(study))):
        assert {
            (label, place, float(axis.scale(value))) for value, label in axis.scale.ticks
        } <= drawn
        assert sum(position == place for _, position, _ in drawn) >= 2
    top = ax.lines[-1].get_ydata()  # the best lies on top
    logs = np.log([trial.params["lr"] for trial in study.trials])
    expected = (math.log(study.best_params["lr"]) - logs.min()) / (logs.max() - logs.min())
    assert top[3] == pytest.approx(expected) and top[-1] == 1.0


def test_importance(study):
    ax = study.plot_importance()
    found = importance(study)
    np.testing.assert_allclose([bar.get_width() for bar in ax.patches], found.drops)
    assert [label.get_text() for label in ax.get_yticklabels()] == list(found.names)
    assert f"R² {found.fit:.2f}" in ax.get_xlabel()


def test_contour(study):
    ax = study.plot_contour("lr", "dropout")
    shown = (ax.get_xlabel(), ax.get_ylabel(), ax.get_xscale(), ax.get_yscale())
    assert shown == ("lr", "dropout", "log", "linear")
    finite = [trial for trial in study.trials if math.isfinite(trial.score)]
    points = next(c for c in ax.collections if len(c.get_offsets()) == len(finite)).get_offsets()
    expected = sorted((t.params["lr"], t.params["dropout"]) for t in finite)
    np.testing.assert_allclose(sorted(map(tuple, points)), expected)
    first, second = importance(study).names[:2]
    chosen = study.plot_contour()
    assert (chosen.get_xlabel(), chosen.get_ylabel()) == (first, second)


def test_contour_averages_trials_at_one_place():
    places = [(0.1, 1), (0.1, 1), (0.1, 2), (0.2, 1), (0.2, 2)]
    ax = study_of([{"a": a, "b": b} for a, b in places]).plot_contour("a", "b")
    assert sum(len(c.get_offsets()) == 4 for c in ax.collections) == 1
    assert (ax.collections[0].zmin, ax.collections[0].zmax) == pytest.approx((0.505, 0.54))


def of_numbers(**params):
    return study_of([{name: factor * c for name, factor in params.items()} for c in range(12)])


@pytest.mark.parametrize(
    ("made", "plot", "how", "message"),
    [
        *(
            (
                made_study(4),
                "curves",
                {"best": best},
                r"plot_curves\(best=...\) must be an integer of at least 0, got",
            )
            for best in (-1, 1.5, True)
        ),
        (
            made_study(4),
            "slice",
            {"parameter": "rate"},
            "must name a hyperparameter of the trials: activation, ba.*got 'rate'",
        ),
        (
            made_study(4),
            "slice",
            {"ax": 0},
            r"plot_slice\(ax=...\) draws only one hyperparameter. Name it",
        ),
        (
            made_study(1),
            "slice",
            {},
            r"plot_slice\(\) needs a hyperparameter that differs between trials",
        ),
        (
            made_study(4),
            "contour",
            {"x": "lr"},
            "needs two different hyperparameters or none, got x='lr'",
        ),
        (made_study(4), "contour", {"x": "lr", "y": "lr"}, "got x='lr', y='lr'"),
        (
            made_study(4),
            "contour",
            {"x": "lr", "y": "x"},
            r"plot_contour\(\) must name a hyperparameter of the trials: .*, got 'x'",
        ),
        (
            of_numbers(a=1, b=2),
            "contour",
            {"x": "a", "y": "b"},
            "on one line, got 12 points in 'a' and 'b'",
        ),
        (
            made_study(4),
            "contour",
            {},
            r"importance needs 10 finished .* Or name two: plot_contour\(x, y\)",
        ),
        (of_numbers(a=1), "contour", {}, "needs two hyperparameters that vary, got 1"),
        (
            made_study(4),
            "path",
            {},
            r"plot_path\(\) needs a study of a hypergradient search, tune\(..., method=",
        ),
        (
            made_descent(),
            "path",
            {"parameter": "width"},
            r"must be one of lr, weight_decay, got 'width'",
        ),
    ],
)
def test_plots_that_cannot_be(made, plot, how, message):
    with pytest.raises(InputError, match=message):
        getattr(made, f"plot_{plot}")(**how)


def test_path(descent):
    ax = descent.plot_path("lr")
    for start in range(6):
        points = [t for t in descent.trials if t.origin[0] == start]
        line = next(
            x for x in ax.lines if np.array_equal(x.get_ydata(), [t.params["lr"] for t in points])
        )
        np.testing.assert_array_equal(line.get_xdata(), range(len(points)))
    noisy = sum(not trial.detail["usable"] for trial in descent.trials)
    hollow = [line for line in ax.lines if line.get_markerfacecolor() == "white"]
    assert noisy > 0 and sum(len(line.get_xdata()) for line in hollow) == noisy
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()) == ("outer step", "lr", "log")
    assert descent.plot_path().get_ylabel() == "lr"
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(labels) == 5 and f"start {descent.best_trial.origin[0]}" in labels


def test_a_loss_is_drawn_in_its_own_sign(descent):
    points = descent.plot_history().collections[0].get_offsets()
    top = score_view(descent).range[1]
    np.testing.assert_array_equal(points[:, 1], np.minimum(-scores(descent), top))
    assert descent.plot_history().get_ylabel() == "log_loss (lower is better)"
    lines = descent.plot_history().lines[0].get_ydata()
    np.testing.assert_array_equal(lines, np.minimum(np.minimum.accumulate(-scores(descent)), top))


def test_losses_of_several_decades_have_a_logarithm():
    study = study_of(
        [{"lr": 0.1 * (c + 1)} for c in range(6)],
        [-(10.0**-c) for c in range(6)],
        scoring="neg_log_loss",
    )
    assert [ax.get_yscale() for ax in (study.plot_history(), study.plot_slice("lr"))] == [
        "log",
        "log",
    ]


def test_scores_that_are_far_off_stand_at_the_edge_of_the_axis():
    lr = [0.001, 0.002, 0.004, 0.008]
    params = [{"lr": lr[i % 4], "schedule": f"a long word {i % 4}"} for i in range(8)]
    study = study_of(params, [-1250.0, 0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.41], scoring="r2")
    curves = np.full((8, 2, 2), 0.3)
    curves[0] = -1e39
    study = Study(meta=study.meta, trials=study.trials, curves=curves)
    for ax in (study.plot_history(), study.plot_slice("lr"), study.plot_slice("schedule")):
        assert ax.get_ylim()[0] > -2
        assert ax.get_title() == "1 score lies beyond the axis and stands at its edge."
        heights = ax.collections[0].get_offsets()[:, 1]
        assert len(heights) == 8 and ax.get_ylim()[0] < heights.min()
    assert study.plot_curves().get_ylim()[0] > -2
    ticks = study.plot_slice("lr").get_xticklabels()
    assert [tick.get_text() for tick in ticks] == ["0.001", "0.002", "0.004", "0.008"]
    assert {tick.get_rotation() for tick in ax.get_xticklabels()} == {30.0}


PLOTS = {
    "plot_history": {},
    "plot_curves": {},
    "plot_slice": {"parameter": "lr"},
    "plot_parallel": {},
    "plot_importance": {},
    "plot_contour": {"x": "lr", "y": "weight_decay"},
    "plot_path": {},
}


@pytest.mark.parametrize("plot", PLOTS)
def test_every_plot_draws_on_the_axes_it_is_given(descent, plot):
    figure, ax = plt.subplots()
    assert getattr(descent, plot)(ax=ax, **PLOTS[plot]) is ax
    figure.canvas.draw()


@pytest.mark.parametrize("plot", PLOTS)
def test_without_matplotlib_the_error_says_what_to_install(descent, plot, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    words = rf'study.{plot}\(\) needs matplotlib, .* Run pip install "\.\[report\]"'
    with pytest.raises(MissingExtraError, match=words):
        getattr(descent, plot)(**PLOTS[plot])


@pytest.mark.parametrize("plot", ["plot_history", "plot_curves", "plot_parallel"])
@pytest.mark.parametrize(
    "made", [lambda: made_study(0), lambda: made_study(3, waiting=3)], ids=["empty", "waiting"]
)
def test_an_empty_study_is_drawn(plot, made):
    getattr(made(), plot)().figure.canvas.draw()


@pytest.mark.parametrize("name", ["$x^$", "a_b{", r"\frac{", "\x1b[2Jx"])
def test_no_name_is_a_formula(name):
    params = [{name: c + 1, "words": name * (c + 1)} for c in range(5)]
    study = study_of(params, epochs=2, scoring=name)
    for ax in (
        study.plot_slice(name),
        study.plot_slice("words"),
        study.plot_parallel(),
        study.plot_curves(),
    ):
        ax.figure.canvas.draw()
