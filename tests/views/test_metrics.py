"""The trials that no other one beats, and a study by another of its metrics."""

import re
from dataclasses import replace

import numpy as np
import pytest

from gputune.cli.study import best_json, best_text, trials_json, trials_table
from gputune.ground.errors import InputError
from gputune.report.charts import pareto_charts
from gputune.report.page import page
from gputune.views.scores import epochs_by
from made_studies import study_of

METRICS = [
    {"name": "accuracy", "scorer": "accuracy", "positive": None},
    {"name": "neg_log_loss", "scorer": "neg_log_loss", "positive": None},
]


def study_by(pairs, states=()):
    """Return a study of trials with these fold means of the accuracy and of minus the log loss."""
    made = study_of(
        [{"lr": 0.1 * (n + 1)} for n in range(len(pairs))], [a for a, _ in pairs], metrics=METRICS
    )
    trials = [
        replace(
            t,
            score=a,
            fold_scores=(a,),
            metrics={"accuracy": (a,), "neg_log_loss": (b,)},
            state=s or t.state,
        )
        for t, (a, b), s in zip(made.trials, pairs, [*states, *[None] * len(pairs)])
    ]
    curves = np.array(pairs)[:, None, None, :]
    return type(made)(meta=made.meta, trials=trials, curves=curves)


@pytest.mark.parametrize(
    ("pairs", "states", "best"),
    [
        ([(0.9, -0.3), (0.8, -0.2), (0.7, -0.4)], (), [0, 1]),
        ([(0.8, -0.2), (0.9, -0.2), (0.9, -0.2)], (), [1, 2]),
        ([(0.8, -0.2), (0.9, np.nan)], (), [0]),
        ([(0.8, -0.2), (0.9, -0.1)], ("complete", "pruned"), [0]),
        ([(0.8, -0.2), (0.9, -0.1)], ("pruned", "pruned"), [1]),
        ([(0.5, np.nan)], (), []),
    ],
)
def test_best_trials_are_those_that_no_other_one_beats(pairs, states, best):
    study = study_by(pairs, states)
    assert [trial.number for trial in study.best_trials] == best
    # As the definition has it, trial by trial.
    known = [t for t in study.trials if np.isfinite(list(t.scores.values())).all()]
    known = [t for t in known if t.state != "pruned"] or known
    scores = [np.array(list(t.scores.values())) for t in known]
    expected = [
        t.number
        for t, s in zip(known, scores)
        if not any((o >= s).all() and (o > s).any() for o in scores)
    ]
    assert sorted(best) == expected


def test_with_one_metric_the_best_trial_is_the_only_one():
    assert [trial.number for trial in study_of([{"a": 1}, {"a": 2}], [0.5, 0.7]).best_trials] == [1]


def test_a_study_by_another_metric_has_its_scores_order_and_curves():
    study = study_by([(0.9, -0.3), (0.8, -0.2)])
    other = study.ranked_by("log_loss")  # as its table is headed
    assert (other.best_trial.number, other.best_score, other.metrics) == (
        1,
        -0.2,
        ("neg_log_loss", "accuracy"),
    )
    np.testing.assert_array_equal(other.curves, study.curves_of("neg_log_loss"))
    np.testing.assert_array_equal(other.curves_of("accuracy"), study.curves)
    assert (
        other.ranked_by("accuracy").trials == study.trials and study.ranked_by("accuracy") is study
    )
    assert (epochs_by(study), epochs_by(other), epochs_by(other.ranked_by("accuracy"))) == (
        "",
        "accuracy",
        "",
    )
    assert "which accuracy chose" in page(other) and "which accuracy" not in page(study)
    ensemble = {
        "ensemble": {"0": 1.0},
        "scoring": "accuracy",
        "held_out_score": 0.9,
        "held_out_rows": 9,
    }
    assert "0.9000" in page(study, model=ensemble)
    with pytest.raises(
        InputError, match="must be the tuned model of this study, got a model with other"
    ):
        page(other, model=ensemble)


def test_a_study_without_a_result_can_be_by_any_metric():
    study = study_by([(np.nan, np.nan)])
    study = type(study)(meta=study.meta, trials=study.trials, curves=np.empty((1, 0, 0)))
    assert (
        study.ranked_by("neg_log_loss").curves.shape
        == study.curves_of("neg_log_loss").shape
        == (1, 0, 0)
    )


@pytest.mark.parametrize("method", ["ranked_by", "curves_of", "plot_pareto"])
def test_a_metric_that_a_study_has_not_is_refused(method):
    words = (
        rf"{method}\(\w+=...\) must be one of the study's metrics, 'accuracy', 'neg_log_loss', got "
        "'acuracy'. Did you"
    )
    with pytest.raises(InputError, match=words):
        getattr(study_by([(0.9, -0.3)]), method)("acuracy")
    with pytest.raises(
        InputError,
        match=rf"{method}\(\w+='f1'\) needs a study of several metrics, but this study has only 'acc",
    ):
        getattr(study_of([{"a": 1}], [0.5]), method)("f1")


def test_a_chart_of_two_metrics_is_refused_by_its_name():
    with pytest.raises(InputError, match="^plot_pareto needs a study of several metrics"):
        study_of([{"a": 1}], [0.5]).plot_pareto()


def test_tables_and_json_show_all_metrics():
    study = study_by([(0.9, -0.3), (0.8, -0.2), (0.7, -0.4)])
    assert re.search(r"trial +accuracy +log_loss", trials_table(study, width=100))
    assert '"neg_log_loss": [\n    -0.3\n   ]' in trials_json(study)
    text = best_text(study)
    assert (
        "log_loss 0.3000" in text
        and "By accuracy and log_loss 2 trials are Pareto-optimal:" in text
    )
    assert re.search(r"\n +1 +0.8000 +0.2000", text)
    assert '"best_trials": [\n  0,\n  1\n ]' in best_json(study)


def test_the_page_has_a_chart_and_columns_of_the_metrics():
    study = study_by([(0.9, -0.3), (0.8, -0.2), (0.7, -0.4)])
    (chart,) = pareto_charts(study)
    assert chart.title == "accuracy and log_loss of the trials"
    far = study_by([*((0.9 + n / 1000, -0.3) for n in range(9)), (0.1, -0.3)])
    assert "The points at the edge include 1 trial beyond the axes." in pareto_charts(far)[0].svg
    html = page(study)
    assert 'id="pareto"' in html and ">log_loss<" in html and ">Pareto-optimal<" in html
    assert 'id="pareto"' not in page(study_of([{"a": 1}, {"a": 2}], [0.5, 0.7]))


def test_a_chart_for_each_metric_that_has_scores():
    study = study_by([(0.9, -0.3), (0.8, np.nan)])
    metrics = [*METRICS, {"name": "roc_auc", "scorer": "roc_auc", "positive": None}]
    trials = [
        replace(trial, metrics={**trial.metrics, "roc_auc": (np.nan,)}) for trial in study.trials
    ]
    (chart,) = pareto_charts(
        type(study)(meta={**study.meta, "metrics": metrics}, trials=trials, curves=study.curves)
    )
    assert chart.title == "accuracy and log_loss of the trials" and "trial 1:" not in chart.svg
    assert pareto_charts(study_by([(0.9, np.nan)])) == []


def test_an_export_to_optuna_has_all_metrics_next_to_the_value_of_the_first():
    pytest.importorskip("optuna")
    (trial,) = study_by([(0.9, -0.3)]).to_optuna().trials
    assert (trial.value, trial.user_attrs["metrics"]) == (
        0.9,
        {"accuracy": [0.9], "neg_log_loss": [-0.3]},
    )


def test_the_plot_draws_the_trials_and_the_line_through_the_front():
    pytest.importorskip("matplotlib").use("agg")
    ax = study_by([(0.9, -0.3), (0.8, -0.2), (0.7, -0.4)]).plot_pareto()
    (line,) = ax.lines
    np.testing.assert_allclose(line.get_xydata(), [(0.9, 0.3), (0.8, 0.2)])
    assert (len(ax.collections[0].get_offsets()), ax.get_ylabel()) == (
        3,
        "log_loss (lower is better)",
    )
