"""Presets choose a model, a portfolio and the options of a search for a table. The user's arguments
win, and the plan says who chose what."""

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_diabetes, load_iris
from sklearn.model_selection import ShuffleSplit

import gputune
from command_line import run
from gputune.cli.flags import CommandLine
from gputune.data.folds import parse_cv
from gputune.ground.errors import PYTHON
from gputune.study.store import Store
from gputune.tuning.choices import choose_model
from gputune.tuning.options import make_options
from gputune.tuning.preset_table import PRESETS
from gputune.tuning.presets import with_preset
from gputune.tuning.record import SearchCall, read_rows
from problems import Linear
from refused import refused

IRIS = load_iris(return_X_y=True)
DIABETES = load_diabetes(return_X_y=True)
tune = partial(gputune.tune, verbose=0, workers=1)


def chosen(name, rows=1000, columns=5, model="auto", classes=False, as_tensor=False, **given):
    """The call of a search with a preset's choices, for random rows."""
    X = np.random.default_rng(0).normal(size=(rows, columns))
    y = np.arange(rows) % 2 == 0 if classes else X[:, 0]
    options = make_options(**given)
    choice = choose_model("mlp" if model == "auto" else model, None)
    X = torch.from_numpy(X) if as_tensor else X
    call = SearchCall(choice, read_rows(choice, options.rows, X, y), options, given=given)
    return with_preset(call, name, model, None)


def settings(call):
    options = call.options
    return (
        call.choice.name,
        options.search.space,
        options.search.n_trials,
        options.rows.cv,
        options.training.max_epochs,
        options.training.n_ens,
        options.training.patience,
        options.search.timeout,
    )


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        ("best", 1000, ("RealMLP", "realmlp", 8, 5, 256, 1, None, None)),
        ("best", 10_000, ("RealMLP", "realmlp", 8, 5, 256, 1, None, None)),
        ("best_quality", 50_000, ("RealMLP", "realmlp-large", 8, 3, 100, 1, None, None)),
        ("best", 400_000, ("RealMLP", "realmlp-large", 8, 3, 16, 1, None, None)),
        ("medium", 1000, ("mlp", "mlp", 24, 5, 100, 1, 16, None)),
        ("medium_quality", 50_000, ("mlp", "mlp", 24, 3, 20, 1, 16, None)),
        ("fast", 1000, ("mlp", "mlp", 8, 5, 50, 1, None, 20)),
        ("fast", 50_000, ("mlp", "mlp", 8, 3, 4, 1, None, 20)),
    ],
)
def test_a_preset_chooses_by_the_number_of_rows(name, rows, expected):
    call = chosen(name, rows)
    assert settings(call) == expected
    assert call.final_model == ({} if name == "fast" else {"ensemble": True})
    assert chosen(name, 1000, classes=True).final_model["calibrate"]


def test_only_realmlp_has_a_space_for_large_tables():
    large = chosen("best", 10_001, model="realmlp")
    assert large.options.search.space == "realmlp-large"
    assert chosen("best", 10_001, model="mlp").options.search.space == "mlp"
    assert chosen("best", 10_001, space="realmlp").options.search.space == "realmlp"
    assert chosen("medium", 10_001, model="realmlp").options.search.space == "realmlp"
    # This space chooses the scaling of the numbers, which tensors and the user's value do not allow.
    assert chosen("best", 10_001, numbers="standard").options.search.space == "realmlp"
    assert chosen("best", 10_001, as_tensor=True).options.search.space == "realmlp"


def test_a_timeout_changes_epochs_networks_and_model():
    long = chosen("best", 1000, timeout="10h")
    assert settings(long)[4:6] == (256, 8)
    middle = chosen("best", 10_000, timeout="10m")
    assert middle.choice.name == "RealMLP" and 16 <= middle.options.training.max_epochs < 256
    short = chosen("best", 10_000, timeout="60s")
    assert short.choice.name == "mlp" and short.options.search.timeout == 60
    wide = chosen("medium", 20_000, columns=400, timeout="5m")
    narrow = chosen("medium", 20_000, columns=4, timeout="5m")
    assert wide.options.training.max_epochs < narrow.options.training.max_epochs
    # Without a timeout, these rows allow 25 epochs.
    assert chosen("best", 200_000).options.training.max_epochs == 25
    assert chosen("best", 200_000, timeout="4h").options.training.max_epochs > 150
    assert chosen("medium", 200_000, timeout="3h").options.training.max_epochs == 100
    kept = chosen("best", 10_000, timeout="60s", model="realmlp")
    assert kept.choice.name == "RealMLP" and kept.options.training.max_epochs == 16


def test_the_estimate_counts_the_beginning_and_the_final_model():
    # 1,000 rows, 5 columns, 5 folds and 256 epochs: 20 s + 8 x 256 x 4.5 x 1,000 x 20.75 us = 211 s
    assert chosen("best", timeout=212).options.training.max_epochs == 256
    assert chosen("best", timeout=150).options.training.max_epochs == 174
    # The beginning alone takes 20 s.
    assert chosen("best", timeout=20).choice.name == "mlp"
    assert chosen("best", timeout=5, model="realmlp").options.training.max_epochs == 16
    assert chosen("best", timeout=424).options.training.n_ens == 1
    assert chosen("best", timeout=846).options.training.n_ens == 2


@pytest.mark.parametrize(("rows", "n_ens"), [(9, 1), (30, 2), (60, 4), (90, 8)])
def test_few_rows_have_few_networks(rows, n_ens):
    assert chosen("best", rows, timeout="10h").options.training.n_ens == n_ens


@pytest.mark.parametrize("kind", [np.array, pd.Series, list])
def test_a_preset_with_weights_of_rows(kind):
    weights = kind([1.0] * 60)
    study = gputune.tune(
        "auto",
        *(data[:60] for data in DIABETES),
        preset="fast",
        sample_weight=weights,
        n_trials=2,
        max_epochs=2,
        verbose=0,
    )
    assert study.record.arguments.preset["name"] == "fast"


def test_the_arguments_of_the_user_win_and_the_plan_says_so():
    call = chosen("best", n_trials=64, cv=3, max_epochs=50, space={"lr": [0.1]}, n_ens=2)
    assert settings(call)[2:6] == (64, 3, 50, 2)
    assert call.options.search.space == {"lr": [0.1]}
    text = PYTHON.render(call.preset)
    assert text == (
        "preset='best' chooses for 1000 rows and 5 columns: model='realmlp', an ensemble; you chose "
        "space={'lr': [0.1]}, n_trials=64, cv=3, max_epochs=50, n_ens=2; study.ensemble() then makes "
        "the model"
    )
    copies = chosen("best", category_copies=["x0"]).preset
    assert "you chose category_copies=['x0'];" in PYTHON.render(copies)
    assert "you chose cv='time:4';" in PYTHON.render(chosen("best", cv="time:4").preset)
    split = chosen("best", cv=parse_cv("time:4"), timeout="90s")  # as the command line passes it
    assert "you chose --cv time:4, --timeout 90" in CommandLine().render(split.preset)
    assert chosen("best", max_epochs="auto").options.training.max_epochs == 256
    call = chosen("medium", model="realmlp", method="halving")
    assert call.options.training.patience == "auto"  # halving decides how long a trial trains
    assert "you chose model='realmlp'" in PYTHON.render(call.preset)


def test_a_default_that_the_user_writes_wins_too(capsys):
    X, y = IRIS
    small = {"n_trials": 1, "max_epochs": 2, "cv": 2}
    study = gputune.tune("auto", X, y, preset="medium", patience=None, **small)
    assert study.record.patience is None and len(study.trials) == 1
    assert (
        "preset='medium' chooses for 150 rows and 4 columns: model='mlp'" in capsys.readouterr().err
    )
    study = tune("auto", X, y, preset="medium", **small)
    assert study.record.patience == PRESETS["medium"].patience
    model = study.best_model()
    assert model.temperature != 1  # the preset calibrates


@pytest.mark.parametrize(
    "options", [{"numbers": "quantile", "schedule": "linear"}, {"numbers": "standard"}]
)
def test_numbers_and_schedule_of_the_user_win_in_every_trial(options, capsys):
    small = {"n_trials": 8, "max_epochs": 1, "cv": 2}
    for model in ({"model": "auto", "preset": "medium"}, {"model": "mlp", "space": "mlp"}):
        study = gputune.tune(X=IRIS[0], y=IRIS[1], **model, **small, **options)
        assert sum(trial.origin == "portfolio" for trial in study.trials) >= 6
        for trial in study.trials:
            params = {"numbers": study.record.numbers, "schedule": study.record.schedule}
            assert options.items() <= {**params, **trial.params}.items()
    words = ", ".join(f"{name}={value!r}" for name, value in options.items())
    assert f"you chose n_trials=8, cv=2, max_epochs=1, {words};" in capsys.readouterr().err
    free = gputune.tune("mlp", *IRIS, space="mlp", numbers="auto", verbose=0, **small)
    assert {"quantile", "piecewise"} <= {trial.params.get("numbers") for trial in free.trials}


def test_a_constant_schedule_that_realmlp_would_replace_is_refused():
    small = {"n_trials": 1, "max_epochs": 1, "cv": 2, "schedule": "constant"}
    why = "schedule='constant' cannot replace the schedule 'coslog4' of RealMLP, .*a space of your own"
    with refused(why):
        tune("auto", *IRIS, preset="best", **small)
    with refused(why):
        tune("realmlp", *IRIS, **small)
    space = {"schedule": ["constant"], "module__width": [8]}
    (trial,) = tune("realmlp", *IRIS, space=space, **small).trials
    assert trial.params["schedule"] == "constant"


def with_codes(rows=3000):
    """A table with a column of codes, each with its own class, and a target."""
    rng = np.random.default_rng(0)
    code = rng.integers(0, 60, rows)
    X = pd.DataFrame({"code": code * 7, "age": rng.integers(20, 60, rows)})
    return X, rng.integers(0, 2, 60)[code]


def test_a_preset_finds_numbers_that_are_like_names(tmp_path, capsys):
    X, y = with_codes()
    small = {"n_trials": 1, "max_epochs": 2, "cv": 2, "study": tmp_path / "s.db"}
    study = gputune.tune("auto", X, y, preset="medium", **small)
    assert study.record.category_copies == ["code"]
    assert "space='mlp', category_copies=['code']" in capsys.readouterr().err
    assert "Column 'code': 60 of 60 values are categories too." in study.record.notes
    # A later call takes the columns from the study, whatever it would find itself.
    again = gputune.tune("auto", X, y, preset="medium", **small, verbose=0)
    assert again.trials == study.trials
    study = tune("auto", X, y, preset="medium", category_copies=[], **small | {"study": None})
    assert study.record.category_copies == []


def test_numbers_like_names_are_not_searched_in_chosen_rows_or_across_groups():
    X, y = with_codes()
    small = {"n_trials": 1, "max_epochs": 1}
    rows = np.arange(len(X))
    half = len(X) // 2
    for cv in ("time:2", (rows[:half], rows[half:]), [(rows[::2], rows[1::2])], ShuffleSplit(2)):
        study = tune("auto", X, y, preset="medium", cv=cv, **small)
        assert study.record.category_copies == []
    study = tune("auto", X, y, preset="medium", cv=2, groups=X["code"], **small)
    assert study.record.category_copies == []


def test_a_study_of_an_earlier_version_chose_no_copies(tmp_path):
    X, y = with_codes()
    path = tmp_path / "s.db"
    call = partial(tune, "auto", X, y, preset="medium", n_trials=1, max_epochs=2, cv=2, study=path)
    record = call(category_copies=[]).record
    choices = {
        key: value
        for key, value in record.arguments.preset["choices"].items()
        if key != "category_copies"
    }
    arguments = replace(record.arguments, preset={"name": "medium", "choices": choices})
    with Store.open(path) as store:
        store.replace_option(
            "arguments", replace(record, arguments=arguments).to_json()["arguments"]
        )
    assert len(call(n_trials=2).trials) == 2


@pytest.mark.parametrize("value", [3, [1], {"a": 1}, None])
def test_damaged_choices_of_copies(tmp_path, value):
    path = tmp_path / "s.db"
    call = partial(tune, "auto", *IRIS, preset="fast", n_trials=1, max_epochs=1, cv=2, study=path)
    record = call().record
    preset = {"name": "fast", "choices": {"category_copies": value}}
    options = replace(record, arguments=replace(record.arguments, preset=preset)).to_json()
    with Store.open(path) as store:
        store.replace_option("arguments", options["arguments"])
    with refused("damaged"):
        call()


def test_a_preset_without_any_work_to_estimate():
    space = {"lr": [0.01, 0.1]}
    nothing = {"n_trials": 0, "include_default": False, "timeout": 600}
    study = tune(
        "auto", *IRIS, preset="medium", include=[{"lr": 0.01}], space=space, cv=2, **nothing
    )
    assert len(study.trials) == 1
    with refused("cv must be at least 2"):
        tune("auto", *IRIS, preset="fast", cv=1, timeout=60)


def test_a_study_with_a_preset_continues(tmp_path):
    call = partial(
        tune, "auto", *DIABETES, preset="best", max_epochs=1, cv=2, study=tmp_path / "s.db"
    )
    small = {"lr": [0.01, 0.03], "module__width": [8], "module__depth": [1]}
    few = call(n_trials=2, space=small)
    more = call(n_trials=3, space=small)
    assert more.trials[:2] == few.trials and more.record.model == "RealMLP"


def test_a_study_keeps_the_choices_of_its_preset_with_another_timeout(tmp_path, capsys):
    study = tmp_path / "s.db"
    call = partial(gputune.tune, "auto", *IRIS, cv=2, study=study)
    first = call(preset="medium", timeout=0.1)
    epochs = first.record.max_epochs
    assert first.record.arguments.preset == {
        "name": "medium",
        "choices": {
            "model": "mlp",
            "space": "mlp",
            "n_trials": 8,  # of the preset fast, because the time is short
            "max_epochs": epochs,
            "n_ens": 1,
            "patience": None,
            "category_copies": [],
            "ensemble": False,
            "calibrate": True,
        },
    }
    new = chosen("medium", rows=150, columns=4, timeout="1h", cv=2).options
    assert new.training.max_epochs > epochs and new.training.n_ens == 8
    capsys.readouterr()
    more = call(preset="medium_quality", timeout=3600, n_trials=9)
    assert (
        "preset='medium_quality' keeps its choices in this study for 150 rows and 4 columns: "
        "model='mlp', space='mlp', "
        f"max_epochs={epochs}, calibrated probabilities; you chose n_trials=9, cv=2, timeout=3600\n"
    ) in capsys.readouterr().err
    assert len(more.trials) == 9 and more.record.max_epochs == epochs
    with refused("holds a different search. It differs from this call in: "):
        call(preset="best")
    with refused(rf"max_epochs \({epochs} in the study, 2 now\)"):
        call(preset="medium", max_epochs=2)


def test_a_file_without_choices_of_the_preset_is_left_to_later_checks(tmp_path):
    study = tmp_path / "s.db"
    study.write_text("not a study")
    with refused("is not a gputune study"):
        tune("auto", *IRIS, preset="fast", study=study)
    study.unlink()
    small = {"space": "mlp", "n_trials": 1, "max_epochs": 2, "cv": 2, "patience": None}
    study_without = tune("mlp", *IRIS, **small, study=study)
    assert tune("mlp", *IRIS, **small, study=study, preset="fast").trials == study_without.trials


def test_choices_of_a_stranger_run_no_code(tmp_path, monkeypatch):
    """A study file may name any file as its model, and any options of a search."""
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Net: pass\n")
    study = tmp_path / "s.db"
    small = {"n_trials": 1, "max_epochs": 1, "cv": 2, "study": study}
    record = tune("auto", *IRIS, preset="fast", **small).record

    def with_choices(**choices):
        arguments = record.arguments
        preset = {"name": "fast", "choices": {**arguments.preset["choices"], **choices}}
        options = replace(record, arguments=replace(arguments, preset=preset)).to_json()
        with Store.open(study) as store:
            store.replace_option("arguments", options["arguments"])

    with_choices(workers={"cluster": "ray", "address": "evil:1"}, drop=["x0"])
    assert len(tune("auto", *IRIS, preset="fast", **{**small, "n_trials": 2}).trials) == 2
    with_choices(model=f"{evil}:Net")
    assert len(tune("auto", *IRIS, preset="fast", **{**small, "n_trials": 3}).trials) == 3
    assert not (tmp_path / "ran").exists()
    with_choices(n_ens="many")
    with refused("damaged"):
        tune("auto", *IRIS, preset="fast", **small)


def test_presets_that_do_not_fit_are_refused():
    X, y = IRIS
    with refused(r"preset must be one of best, medium, fast, got 'bets'. Did you mean 'best'\?"):
        tune("auto", X, y, preset="bets")
    with refused(r"preset='best' chooses the settings of mlp and realmlp .*, got the model Linear"):
        tune(Linear, X, y, preset="best")
    with refused("has none for another model, got the model logistic. Leave preset out, or pass"):
        tune("logistic", X, y, preset="best")
    with refused("which a hypergradient search does not have"):
        tune("mlp", X, y, preset="best", method="hypergradient")
    with refused("got 'auto'. Or also pass preset='best', which chooses the model"):
        tune("auto", X, y)


def test_the_command_line_prints_the_plan_and_resumes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a = [0.1 * (i % 3) + 0.01 * (i % 7) for i in range(60)]
    lines = [f"{number:.2f},{i % 5},k{i % 3}" for i, number in enumerate(a)]
    (tmp_path / "t.csv").write_text("\n".join(["a,b,kind", *lines]))
    words = ["t.csv", "--target", "kind", "--epochs", "2", "--cv", "2", "--out", "out"]
    code, out, err = run("tune", *words, "--preset", "medium", "--trials", "3", "--dry-run")
    plan = "--preset medium chooses for 48 rows and 2 columns: --model mlp,"
    assert code == 0 and plan in " ".join(out.split()), out + err
    code, out, err = run("tune", *words, "--preset", "medium", "--trials", "3", loud=True)
    assert code == 0 and plan in err and "you chose --trials 3, --cv 2, --epochs 2" in err, err
    assert "An ensemble of" in out
    study = gputune.Study.open(tmp_path / "out" / "study.db")
    assert study.record.arguments.final_model == {
        "ensemble": True,
        "intervals": False,
        "calibrate": True,
    }
    code, out, err = run("resume", "out", "--trials", "4")
    assert code == 0 and "An ensemble of" in out, err
    longer = ("--preset", "medium", "--trials", "4", "--timeout", "5m", "--dry-run")
    code, out, err = run("tune", *words, *longer)
    plan = "--preset medium keeps its choices in this study for 48 rows and 2 columns: --model mlp,"
    assert code == 0 and plan in " ".join(out.split()), out + err
    assert "--timeout 300" in out
    code, _, err = run("tune", *words, "--preset", "best", "--model", "cnn")
    assert code == 2 and "or leave --model out" in err, err
    code, _, err = run("tune", *words, "--preset", "high")
    assert code == 2 and "--preset must be one of best, medium, fast" in err, err


def test_the_equal_search_of_a_preset_keeps_its_calibration(tmp_path):
    call = partial(tune, study=tmp_path / "s.db", n_trials=2, max_epochs=2, cv=2, patience=None)
    call("auto", *IRIS, preset="medium")
    study = call("mlp", *IRIS, space="mlp")
    assert study.record.arguments == gputune.Study.open(study.file).record.arguments
    assert study.record.arguments.final_model["calibrate"]
    assert study.best_model().temperature != 1


@pytest.mark.parametrize("changed", [{"code": "a" * 8}, {}])
def test_another_table_in_a_study_with_copies_is_reported_as_other_data(changed, tmp_path):
    X, y = with_codes()
    call = partial(tune, "auto", preset="medium", n_trials=1, max_epochs=1, cv=2)
    call = partial(call, study=tmp_path / "s.db")
    call(X, y)
    other = X.assign(**changed) if changed else X.rename(columns={"code": "number"})
    with refused("holds a different search. It differs from this call in: .*data"):
        call(other, y)
