"""A study ranks its trials, says why none is best, becomes a table, and is read from its file, as
its record is."""

import dataclasses
import math
import pickle
import re
import sys
import types
from html import unescape

import numpy as np
import pytest

import gputune
from gputune.api.study import Study
from gputune.ground.errors import SearchFailedError, StudyCorruptError
from gputune.study import rows
from gputune.study import study as study_file
from gputune.study.record import IDENTITY, RECORD_FIELDS, SearchRecord, has_form, lost_option
from gputune.study.study import Trial
from gputune.tuning.refit import Access
from made_studies import HOSTILE, META, hostile_study, made_study
from refused import refused
from study_rows import candidates, make_study, result

NAN = math.nan


def trial(number, score, *, folds=(), state="complete", **params):
    return Trial(number, params, score, folds or (score, score), 1, state, 0.5, "random")


def study(*trials, **meta):
    return Study(meta=meta, trials=trials, curves=np.zeros((len(trials), 1, 2)))


def test_the_standard_error_over_the_folds():
    # scores 0.2, 0.4, 0.9: mean 0.5, squared gaps 0.09 + 0.01 + 0.16, over 2, over 3
    assert trial(0, 0.5, folds=(0.2, 0.4, 0.9)).std_error == pytest.approx(math.sqrt(0.26 / 2 / 3))
    for folds in [(0.5,), (0.5, math.nan), (0.5, -math.inf)]:
        assert math.isnan(trial(0, 0.5, folds=folds).std_error)


def test_the_best_trial_is_finite_and_highest_and_the_lower_number_on_a_tie():
    scores = [math.nan, 0.5, 0.9, math.inf, 0.9, -math.inf, -1.0]
    found = study(*[trial(n, score, lr=n / 10) for n, score in enumerate(scores)])
    assert found.best_trial.number == 2
    found.best_params["lr"] = 7  # a copy
    assert found.best_score == 0.9 and found.best_params == {"lr": 0.2}
    assert [t.number for t in found.ranking()] == [2, 4, 1, 6, 0, 3, 5]
    trials = trial(0, 0.8), trial(1, math.nan, state="failed"), trial(2, 0.91234567)
    assert (
        repr(study(*trials, model="mlp", scoring="r2"))
        == "Study(mlp, 3 trials, 1 failed, best r2 0.9123 in trial 2)"
    )
    assert repr(study()) == "Study(0 trials)"
    assert (
        repr(study(trial(0, 0.5, state="stopped")))
        == "Study(1 trial, 1 stopped, best score 0.5 in trial 0)"
    )


def test_a_killed_study_says_that_its_training_waits_in_checkpoints(tmp_path):
    waiting = dataclasses.replace(study(trial(0, NAN, state="waiting")), file=tmp_path / "s.db")
    assert "none has been trained yet" in waiting.failure_message()
    (tmp_path / "s.db.state").mkdir()
    (tmp_path / "s.db.state" / "0-0123456789abcdef.safetensors").touch()
    assert waiting.failure_message() == (
        "the study has 1 trial, and none has ended yet. Their training waits in checkpoints, and "
        "'gputune resume' continues it."
    )


@pytest.mark.parametrize(
    ("trials", "message"),
    [
        ([], r"the study has no trials. Search with at least one trial"),
        (
            [(NAN, "waiting")] * 2,
            r"the study has 2 trials, but none has been trained yet. Run the search",
        ),
        (
            [(NAN, "failed")] * 3 + [(NAN, "waiting")],
            "3 of 4 trials diverged, and 1 have not been trained. Lower",
        ),
        ([(NAN, "failed")] * 2, "2 of 2 trials diverged. Lower"),
    ],
)
def test_a_search_without_a_best_trial_says_why(trials, message):
    found = study(*[trial(n, score, state=state) for n, (score, state) in enumerate(trials)])
    for get in ("best_trial", "best_params", "best_score"):
        with pytest.raises(SearchFailedError, match=message):
            getattr(found, get)


def test_curves_must_fit_the_trials_and_cannot_be_changed():
    with refused(
        r"Study\(curves=...\) must be \(C, epochs, F\) .* the 1 trials, got shape \(2, 3\)"
    ):
        Study(meta={}, trials=(trial(0, 1.0),), curves=np.zeros((2, 3)))
    given = np.zeros((1, 2, 3))
    found = Study(meta={}, trials=[trial(0, 1.0)], curves=given)
    given[:] = 1  # the study has its own
    assert found.curves.shape == (1, 2, 3) and not found.curves.any()
    with pytest.raises(ValueError, match="read-only"):
        found.curves[0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.trials = ()


TRIALS = (
    Trial(
        0,
        {"lr": 0.1, "width": 16, "activation": "relu"},
        0.5,
        (0.4, 0.6),
        3,
        "complete",
        1.5,
        "default",
    ),
    Trial(
        1,
        {"lr": 1e-3, "layers": [8, 4], "C": 1},
        math.nan,
        (math.nan, 0.5),
        1,
        "failed",
        0.5,
        "random",
    ),
    Trial(
        2, {"lr": 0.2, "width": 32, "layers": (2,), "C": 0.5}, NAN, (), 0, "waiting", NAN, "random"
    ),
)
COLUMNS = [
    "number",
    "state",
    "score",
    "std_error",
    "fold_0",
    "fold_1",
    "best_epoch",
    "seconds",
    "origin",
]
COLUMNS += ["params_lr", "params_width", "params_activation", "params_layers", "params_C"]


def test_to_pandas(monkeypatch):
    pandas = pytest.importorskip("pandas")
    table = study(*TRIALS).to_pandas()
    assert list(table.columns) == COLUMNS and len(table) == 3
    assert table["number"].tolist() == [0, 1, 2]
    assert table["state"].tolist() == ["complete", "failed", "waiting"]
    assert table["score"].dtype == np.float64 and table.loc[0, "std_error"] == pytest.approx(0.1)
    assert table.loc[1, "fold_1"] == 0.5 and table[["fold_0", "fold_1"]].loc[2].isna().all()
    assert table["params_lr"].tolist() == [0.1, 1e-3, 0.2]
    # Integers stay integers beside a gap.
    assert table["params_width"].dtype == pandas.Int64Dtype()
    assert table["params_width"].isna().tolist() == [0, 1, 0]
    assert table["params_layers"].tolist()[1:] == [[8, 4], (2,)]
    assert study().to_pandas().shape == (0, 7)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(
        ImportError, match=r"to_pandas\(\) needs pandas: pip install pandas, or use to_polars"
    ):
        study().to_pandas()


def test_to_polars():
    polars = pytest.importorskip("polars")
    table = study(*TRIALS).to_polars()
    assert table.columns == COLUMNS and table.height == 3
    assert table["number"].dtype == polars.Int64 and table["score"].dtype == polars.Float64
    assert (
        table["params_width"].to_list() == [16, None, 32]
        and table["params_width"].dtype == polars.Int64
    )
    assert table["params_C"].to_list() == [None, 1.0, 0.5]
    assert table["params_layers"].to_list() == [None, "[8, 4]", "(2,)"]  # unlike types as text
    assert table["fold_1"].to_list()[:2] == [0.6, 0.5] and math.isnan(table["fold_1"][2])
    assert study().to_polars().shape == (0, 7)


def test_a_study_is_read_from_its_file(tmp_path):
    path = tmp_path / "study.db"
    diverged = result(1, epochs=2, state="failed", score=math.nan)
    make_study(path, 3, [result(0, epochs=4), diverged], {"model": "mlp", "scoring": "accuracy"})
    found = Study.open(str(path))
    assert found.meta == {"model": "mlp", "scoring": "accuracy"}
    assert [t.state for t in found.trials] == ["complete", "failed", "waiting"]
    assert [t.params for t in found.trials] == [c.params for c in candidates(range(3))]
    first = found.trials[0]
    assert (first.score, first.best_epoch, first.seconds) == (result(0, epochs=4).score, 4, 0.1)
    assert first.fold_scores == result(0, epochs=4).fold_scores and first.origin == "random"
    assert found.best_trial == first
    assert found.curves.shape == (3, 4, 2)
    np.testing.assert_array_equal(found.curves[0], result(0, epochs=4).curve)
    np.testing.assert_array_equal(found.curves[1, :2], diverged.curve)
    assert np.isnan(found.curves[1, 2:]).all() and np.isnan(found.curves[2]).all()
    waiting = found.trials[2]
    assert math.isnan(waiting.score) and waiting.fold_scores == () and waiting.best_epoch == 0
    empty = Study.open(make_study(tmp_path / "empty.db", 1))
    assert empty.curves.shape == (1, 0, 0)
    with pytest.raises(
        SearchFailedError, match="the study has 1 trial, but none has been trained yet"
    ):
        empty.best_model()


def test_opening_a_study_makes_no_curves_until_they_are_asked_for(tmp_path, monkeypatch):
    make_study(tmp_path / "study.db", 3, [result(0), result(2, epochs=5)])
    stack_curves = study_file.stack_curves
    made = []
    monkeypatch.setattr(
        study_file, "stack_curves", lambda rows: made.append(len(rows)) or stack_curves(rows)
    )
    found = Study.open(tmp_path / "study.db")
    assert (
        found.best_trial.state == "complete"
        and "3 trials" in repr(found)
        and len(found.to_polars()) == 3
    )
    assert made == []
    assert found.curves.shape == (3, 5, 2) and found.curves is found.curves and made == [3]
    np.testing.assert_array_equal(found.curves[2], result(2, epochs=5).curve)
    assert np.isnan(found.curves[1]).all() and not found.curves.flags.writeable
    assert {"trials", "curves"} <= {
        *dir(Study)
    } and Study.__getattribute__ is object.__getattribute__
    monkeypatch.undo()
    again = pickle.loads(pickle.dumps(Study.open(tmp_path / "study.db")))
    np.testing.assert_array_equal(dataclasses.replace(again, meta={}).curves, found.curves)


def test_curves_that_few_trials_fill_are_bounded_by_what_they_hold(tmp_path, monkeypatch):
    long = result(7, epochs=2000, folds=1)
    wide = result(8, epochs=1, folds=2000)
    make_study(tmp_path / "study.db", 9, [*(result(n, epochs=1) for n in range(7)), long, wide])
    monkeypatch.setattr(rows, "_LARGE", 2**20)
    found = Study.open(tmp_path / "study.db")
    with refused(
        r"of 9 trials, 2000 epochs and 2000 folds would take 274\.7 MiB as one array, but they hold only 31\.\d KiB"
    ):
        found.curves  # noqa: B018


def test_best_model_is_a_refit_of_this_study_on_the_given_rows(monkeypatch):
    module = types.ModuleType("gputune.tuning.validation")
    module.refit_with_folds = lambda *arguments, **how: (*arguments, how)
    monkeypatch.setitem(sys.modules, "gputune.tuning.validation", module)
    found = study(trial(0, 1.0))
    plain = {"trial": None, "intervals": False, "calibrate": None}
    assert found.best_model() == (Access(found, None, None, True, False), plain)
    how = {"trial": 3, "intervals": True, "calibrate": False}
    assert found.best_model("X", y="y", check=False, trust_code=True, **how) == (
        Access(found, "X", "y", False, True),
        how,
    )


def test_the_card_of_a_study():
    study = made_study(30, halved=True)
    html = study._repr_html_()
    best = study.best_trial
    assert (
        "Study of mlp" in html and f"{best.score:.4f} ± {best.std_error:.4f} over 5 folds" in html
    )
    assert all(f">{name}</th>" in html for name in best.params)
    assert f"{sum(t.state == 'pruned' for t in study.trials)} pruned" in html and len(html) < 2500
    assert (
        "none" in made_study(0)._repr_html_()
        and "4 waiting" in made_study(4, waiting=4)._repr_html_()
    )
    assert (
        Study(meta={}, trials=(), curves=np.zeros((0, 0, 0)))
        ._repr_html_()
        .startswith("<div><strong>Study</strong>")
    )


def test_the_card_of_a_model():
    X = np.random.default_rng(0).normal(size=(40, 3))
    y = np.array(["<b>", "x"])[np.arange(40) % 2]
    study = gputune.tune("mlp", X, y, n_trials=1, max_epochs=2, cv=2, workers=1, verbose=0)
    html = study.best_model()._repr_html_()
    assert "TunedModel: MLP" in html and "2: &lt;b&gt;, x" in html and "3 columns" in html
    assert (
        f'cross-validated accuracy</th><td style="text-align:left">{study.best_score:.4f}' in html
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_adds_an_element_to_a_card(text):
    html = hostile_study(text)._repr_html_()
    assert re.findall(r"<(/?\w+)", html) == re.findall(
        r"<(/?\w+)", hostile_study("plain")._repr_html_()
    )
    assert gputune.ground.text.clean(text) in unescape(html)


LATER = (
    "positive",
    "objective",
    "code",
    "target_transform",
    "metrics",
    "patience",
    "max_levels",
    "n_ens",
    "category_copies",
)


def test_a_record_gives_its_options_back():
    record = SearchRecord.from_json({**META, "of_a_later_version": 1})
    assert record.to_json() == META and record.scoring == "accuracy" and not record.lost
    assert record.absent == {*LATER, "face", "distributions", "arguments", "baseline"}


def test_what_a_damaged_file_lacks_is_said_and_is_empty_as_what_no_descent_has():
    record = SearchRecord.from_json({"model": "mlp"})
    assert record.to_json() == {"model": "mlp"}
    assert (record.method_name, record.changed_hyperparameters, record.folds, record.seed) == (
        "",
        [],
        0,
        None,
    )
    assert record.lost == [name for name in IDENTITY if name not in LATER]
    with pytest.raises(
        StudyCorruptError, match=r"study 'a\.db' has lost the option 'seed' .*open\('a\.db'\)"
    ):
        raise lost_option("a.db", "seed")
    with pytest.raises(
        StudyCorruptError, match="study has lost the option 'seed' of its search. Its trials"
    ):
        raise lost_option(None, "seed")
    method = {"name": "hypergradient", "hyperparameters": ("lr", "momentum")}
    assert SearchRecord(method=method).changed_hyperparameters == ["lr", "momentum"]
    assert SearchRecord(method=method, optimizer="exact").changed_hyperparameters == ["C"]


def test_the_order_in_which_a_checkpoint_digests_a_search_stays():
    training = (
        "spec optimizer schedule task target_transform fingerprint columns numbers class_weight "
        "sample_weight"
    )
    training += " splits objective scoring positive max_epochs seed dtype"
    assert [name for name, part in RECORD_FIELDS.items() if part.training] == training.split()
    others = {"target", "space", "method", "epoch", "patience", "metrics", "code", "max_levels"}
    others |= {"n_ens", "category_copies"}
    assert {*IDENTITY} - {*training.split()} == others


def test_whole_numbers_have_64_bits():
    assert all(has_form(value, [int]) for value in ([], [3, -(2**63)], (2**63 - 1,)))
    assert not any(has_form(value, [int]) for value in ([1, 2**63], [1, True], 1))
