"""Every command from its words to its output, in this process."""

import contextlib
import csv
import io
import json
import re
import shlex
import sqlite3
from dataclasses import replace
from datetime import UTC, datetime
from html import unescape
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import f1_score

import gputune
from command_line import FAST, NET, kinds, output, refusal, run, searched, write_table
from gputune.cli import tune
from gputune.cli.held_out import HeldOut
from gputune.cli.summary import Ending, summary_text
from gputune.data.folds import hold_out
from gputune.data.source import Source, read_again, read_source, read_with_held_out
from gputune.data.target import check_target
from gputune.methods.halving import Halving
from gputune.spaces.edges import edge_remarks
from made_studies import made_batches, study_of
from problems import Net

PRICES = [i * 1.5 + 0.25 for i in range(40)]


def study_in(folder):
    return gputune.Study.open(folder / "study.db")


def read_csv(text):
    return list(csv.reader(io.StringIO(text)))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A search on a table with two classes: the folder of its input, and its output."""
    folder = tmp_path_factory.mktemp("tuned")
    table = write_table(folder / "bugs.csv", 60, id=[f"row{i}" for i in range(60)], kind=kinds(60))
    out = output("tune", table, "--target", "kind", "--out", folder / "out", *FAST)
    return folder, out


def test_tune_says_what_it_understood_the_best_trials_where_all_lies_and_what_comes_next(tuned):
    folder, out = tuned
    study = study_in(folder / "out")
    lines = out.split("\n")
    assert " ".join(out.split()).startswith(
        f"Data {folder / 'bugs.csv'}: 48 rows to search on and 12 held out"
    )
    # without id, which is left out
    assert "Columns  2 numbers, 1 category, made into 4 features" in lines
    assert "Task     2 classes of 'kind': ant, bee" in lines
    assert "Search   mlp trained with adamw; 3 trials x 2 folds x 2 epochs" in lines
    assert "Note     Column 'id': left out, text with all 48 values distinct." in lines
    begin = out.index("The best 3 of 3 trials by accuracy, mean ± standard error over 2 folds:")
    header, *rows = out[begin:].split("\n")[2:6]
    assert header.split() == ["trial", "accuracy", "epoch", *study.best_params]
    for row, trial in zip(rows, study.ranking(), strict=True):
        score = f"{trial.score:.4f}"
        error = f"{trial.std_error:.4f}"
        assert row.split()[:5] == [str(trial.number), score, "±", error, str(trial.best_epoch)]
    *_, trials, file, model, following, _ = lines
    assert trials.startswith("Trials   3 complete; ") and re.search(
        r"; this command took [\d.]+ s$", trials
    )
    assert file == f"Study    {folder / 'out' / 'study.db'}"
    assert model == f"Model    {folder / 'out' / 'model'}"
    assert following == f"Next     gputune predict {folder / 'out' / 'model'} FILE"


def test_tune_ends_with_the_saved_models_own_honest_score(tuned):
    folder, out = tuned
    model = gputune.load_model(folder / "out" / "model")
    study = study_in(folder / "out")
    searched = {tuple(row) for row in zip(*read_again(study.meta["source"]).X.columns)}
    table = pl.read_csv(folder / "bugs.csv")
    held = table.filter([row not in searched for row in table.drop("kind").iter_rows()])
    assert len(held) == 12 == model.info["held_out_rows"]
    score = np.mean(model.predict(held.drop("kind")) == held["kind"].to_numpy())
    assert model.info["held_out_score"] == pytest.approx(score)
    said = " ".join(out.split())
    assert f"Scores accuracy held-out {score:.4f} the saved model on 12 rows" in said
    assert "that nothing was fitted on (95% interval: " in said
    assert (
        f"cross-validated {study.best_score:.4f} the best of 3 trials on the folds that chose it, "
        "so optimistic" in said
    )


def test_trials_and_best_show_a_study_by_its_file_or_its_folder(tuned):
    folder, _ = tuned
    study = study_in(folder / "out")
    code, out, err = run("trials", folder / "out")
    assert (code, err) == (0, "") and len(out.split("\n")) == 2 + 1 + 3 + 1
    assert out == run("trials", folder / "out" / "study.db")[1]
    found = json.loads(run("trials", folder / "out", "--format", "json")[1])
    assert [row["score"] for row in found] == [trial.score for trial in study.trials]
    header, *rows = read_csv(run("trials", folder / "out", "--format", "csv")[1])
    assert header == list(study.to_pandas())
    assert [float(row[header.index("score")]) for row in rows] == [
        trial.score for trial in study.trials
    ]
    out = output("best", folder / "out")
    assert out.startswith(f"trial {study.best_trial.number}: accuracy {study.best_score:.4f} ± ")
    found = json.loads(run("best", folder / "out", "--format", "json")[1])
    assert (found["params"], found["score"]) == (study.best_params, study.best_score)


def test_predict_writes_one_column_named_as_the_target_or_one_for_each_class(tuned):
    folder, _ = tuned
    model = gputune.load_model(folder / "out" / "model")
    table = folder / "bugs.csv"
    out = output("predict", folder / "out" / "model", table)
    assert read_csv(out) == [["kind"], *([label] for label in model.predict(table))]
    assert run("predict", folder / "out" / "model", table, "--out", folder / "guess.csv")[:2] == (
        0,
        "",
    )
    assert (folder / "guess.csv").read_text() == out
    header, *rows = read_csv(run("predict", folder / "out" / "model", table, "--proba")[1])
    assert header == ["ant", "bee"]
    np.testing.assert_array_equal(np.array(rows, dtype=float), model.predict_proba(table))


def test_predict_ignores_further_columns_and_says_so_once(tuned, tmp_path):
    folder, _ = tuned
    n = 9000  # more than one batch
    table = write_table(tmp_path / "new.csv", n, id=["x"] * n, more=[1] * n)
    code, out, err = run("predict", folder / "out" / "model", table)
    assert code == 0 and len(read_csv(out)) == n + 1
    assert (
        err
        == f"gputune: warning: {str(table)!r} has columns that the model does not read: 'more'.\n"
    )


def test_a_space_by_its_name(tmp_path):
    _, out, _ = searched(
        tmp_path, "--model", "realmlp", "--space", "realmlp", "--trials", "1", "--epochs", "1"
    )
    assert study_in(out).best_params["module__embedding"] == "pbld"


def test_where_the_result_cannot_be_written_is_said_before_anything_is_read(tmp_path, monkeypatch):
    def refused(out, words):
        code, _, err = run("tune", tmp_path / "none.csv", "--target", "kind", "--out", out, *FAST)
        assert code == 2 and words in err

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").touch()
    refused("", "--out must be a folder, got ''. Pass a folder, or omit --out for gputune-out.")
    refused("text", "--out 'text' must be a folder, but 'text' is a file. Name another folder.")
    refused(
        "text/o",
        f"--out 'text/o' must be a folder, but '{tmp_path / 'text'}' is a file. Name another "
        "folder.",
    )
    monkeypatch.setattr("gputune.cli.tune.os.access", lambda place, mode: False)
    refused(
        "o",
        f"--out 'o' cannot be written. Check the permissions of '{tmp_path}', or name another "
        "folder.",
    )
    assert sorted(place.name for place in tmp_path.iterdir()) == ["text"]


def test_a_note_is_said_once(tmp_path, capsys):
    table = write_table(
        tmp_path / "bugs.csv", 40, id=[f"row{i}" for i in range(40)], kind=kinds(40)
    )
    code, out, err = run(
        "tune", table, "--target", "kind", "--out", tmp_path / "out", *FAST, loud=True
    )
    assert code == 0 and (out + err).count("left out, text with all 32 values distinct") == 1
    # without a closing text
    gputune.tune("mlp", table, "kind", n_trials=1, max_epochs=1, cv=2, workers=1)
    assert (
        "note: Column 'id': left out, text with all 40 values distinct" in capsys.readouterr().err
    )


def test_the_same_command_continues_where_it_ended(tmp_path, monkeypatch):
    table, folder, _ = searched(tmp_path)
    command = ["tune", table, "--target", "kind", "--out", folder, *FAST]
    before = study_in(folder).trials
    study = folder / "study.db"
    with contextlib.closing(sqlite3.connect(study)) as connection, connection:
        connection.execute("DELETE FROM results WHERE number = 1")
    assert "3 complete" in output(*command)
    after = study_in(folder).trials
    assert [t.fold_scores for t in after] == [t.fold_scores for t in before]
    assert [t.seconds == u.seconds for t, u in zip(after, before)] == [True, False, True]
    err = refusal(*command, "--epochs", "3")
    assert "holds a different search" in err and "--epochs" in err
    assert "4 complete" in output(*command, "--trials", "4")


def test_a_loss_is_shown_as_what_it_measures(tmp_path):
    _, folder, out = searched(tmp_path, "--scoring", "neg_log_loss")
    study = study_in(folder)
    held = gputune.load_model(folder / "model").info["held_out_score"]
    said = " ".join(out.split())
    assert held < 0 and study.best_score < 0
    assert "by log_loss (lower is better), mean" in said and "neg_" not in said
    assert f"Scores log_loss (lower is better) held-out {-held:.4f} the saved model" in said
    assert f"cross-validated {-study.best_score:.4f} the best of" in said
    assert "log_loss (lower is better) 0." in run("best", folder)[1]


def test_a_score_of_one_class_says_which(tmp_path):
    # of bee a model that always says ant scores 0
    kind = ["ant" if i % 4 else "bee" for i in range(40)]
    table = write_table(tmp_path / "bugs.csv", kind=kind)
    out = tmp_path / "o"
    command = ["tune", table, "--target", "kind", "--scoring", "f1", "--out", out, *FAST]
    code, _, err = run(*command)
    assert code == 2 and "--positive ant or --positive bee" in err and not out.exists()
    said = output(*command, "--positive", "ant")
    assert "The best 3 of 3 trials by f1 of class 'ant', mean" in said
    study = study_in(out)
    model = gputune.load_model(out / "model")
    assert study.meta["positive"] == model.info["positive"] == "ant"
    _, apart = read_with_held_out(study.meta["source"])
    score = f1_score(apart.y, model.predict(apart.X), pos_label="ant")
    assert score > 0.5
    assert f"Scores f1 of class 'ant' held-out {score:.4f} " in " ".join(said.split())
    assert "f1 of class 'ant'" in repr(study) and "f1 of class 'ant'" in unescape(
        model._repr_html_()
    )
    code, again, _ = run("resume", out, "--trials", "4")
    assert (
        code == 0
        and "Scores   f1 of class 'ant'\n  held-out " in again
        and "4 trials by f1 of class 'ant'" in again
    )
    assert (
        "f1 of class 'ant'" in run("status", out)[1]
        and "f1 of class 'ant'" in run("trials", out)[1]
    )
    assert json.loads(run("best", out, "--format", "json")[1])["positive"] == "ant"
    assert run("report", out, "--out", tmp_path / "report.html")[0] == 0
    html = unescape((tmp_path / "report.html").read_text())
    assert "best cross-validated f1 of class 'ant'" in html
    words = "differs from this command in: --positive ('ant' in the study, 'bee' now)"
    assert words in refusal(*command, "--positive", "bee")


def test_a_guess_of_the_task_that_may_be_wrong_is_a_warning_said_once(tmp_path):
    # One number fewer than in all rows is left to search on, and these would be classes.
    codes = [*(i % 20 for i in range(400)), 20]
    for seed in range(100):
        rest, _ = hold_out(
            check_target(np.array(codes) + 0.5, n_rows=401), test_size=0.2, seed=seed
        )
        if 400 not in rest:
            break
    table = write_table(tmp_path / "t.csv", 401, code=codes)
    out = tmp_path / "o"
    command = ["tune", table, "--target", "code", "--seed", str(seed), "--out", out, *FAST]
    code, said, err = run(*command)
    assert code == 0 and "Task     regression: predict the number 'code'" in said
    assert err.count("gputune: warning: code has 21 distinct whole numbers in 401 rows") == 1
    assert run("resume", out, "--trials", "3")[::2] == (0, "")
    command[command.index(out)] = tmp_path / "c"
    code, said, err = run(*command, "--task", "classification")
    assert code == 0 and "distinct" not in err
    assert "21 classes of 'code'" in said and "if they are numbers" not in said
    rated = write_table(tmp_path / "r.csv", code=[3, 5, 6, 8] * 10)
    said = output("tune", rated, "--target", "code", "--out", tmp_path / "r", *FAST)
    assert "(if they are numbers, add --task regression)" in " ".join(said.split())


def test_without_held_out_rows_no_honest_score_is_left(tmp_path):
    _, folder, out = searched(tmp_path, "--test-size", "0")
    assert ": 40 rows to search on Columns " in " ".join(out.split())
    assert re.search("held-out +- +All rows were used, so there is no unbiased score", out)
    assert "held_out_score" not in gputune.load_model(folder / "model").info


def test_a_number_is_a_regression_with_all_options(tmp_path):
    options = (
        "--task regression --groups site --space width=4,8 lr=1e-3..1e-1:log --space "
        "dropout=0..0.5 --optimizer sgd --schedule cosine --numbers quantile --columns keep "
        "--test-size 0.4 --seed 3 --device cpu --dtype float64 --memory 1GB --timeout 600 "
        "--scoring neg_mean_absolute_error"
    ).split()
    table, folder, out = searched(
        tmp_path, *options, target="price", price=PRICES, site=[i // 8 for i in range(40)]
    )
    assert "Task     regression: predict the number 'price'" in out
    assert "mlp trained with sgd, cosine; 3 trials" in out
    assert "16 held out" in out  # two whole groups of five
    study = study_in(folder)
    assert set(study.best_params) == {"width", "lr", "dropout"}
    kept = {name: study.meta[name] for name in ("columns", "numbers", "dtype", "seed")}
    assert kept == {"columns": "keep", "numbers": "quantile", "dtype": "float64", "seed": 3}
    header, *rows = read_csv(run("predict", folder / "model", table)[1])
    values = gputune.load_model(folder / "model").predict(table)
    assert header == ["price"] and np.isfinite(values).all()
    assert [float(row[0]) for row in rows] == values.tolist()  # in full precision
    assert "--proba needs a model that predicts classes" in refusal(
        "predict", folder / "model", table, "--proba"
    )


def test_columns_as_they_are_said_to_be(tmp_path):
    day = [f"2020{1 + i % 12:02}{1 + i % 28:02}" for i in range(40)]
    words = (
        "--drop id,a --kind zip=category day=date --class-weight ant=3 --include lr=0.5 width=8 "
        "--include width=9"
    )
    columns = {"id": range(40), "zip": ["007", "7"] * 20, "day": day, "kind": kinds()}
    table, folder, _ = searched(tmp_path, *words.split(), "--trials", "1", **columns)
    study = study_in(folder)
    model = gputune.load_model(folder / "model")
    names = [
        "b",
        "c=blue",
        "c=red",
        "zip=007",
        "zip=7",
        "day.days",
        "day.month",
        "day.day",
        "day.weekday",
    ]
    assert list(model.layout.feature_names) == names
    assert [(t.params["width"], t.params["lr"]) for t in study.trials] == [
        (128, 1e-3),
        (8, 0.5),
        (9, 1e-3),
    ]
    assert study.meta["class_weight"] == "{'ant': 3.0, 'bee': 1.0}"
    again = study.best_model()  # which reads the same columns from the file
    rows = read_source(table, "kind", drop=["id", "a"], kinds={"zip": "category", "day": "date"}).X
    assert (again.predict(rows) == model.predict(rows.frame())).all()
    _, out, err = run("predict", folder / "model", table)
    assert [label for (label,) in read_csv(out)[1:]] == model.predict(rows).tolist() and err == ""
    assert run("resume", folder, "--trials", "2")[0] == 0


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (
            r"drop is only for tables, because their columns have names, got \['a'\]",
            {"drop": ["a"]},
        ),
        ("drop must be a list of column names, for example", {"drop": 3}),
        ("kinds must be a dict such as {'zip': 'category'}", {"kinds": 3}),
    ],
)
def test_columns_of_an_array_have_no_names(words, value):
    with pytest.raises(gputune.InputError, match=words):
        gputune.tune("mlp", torch.zeros(40, 2), np.arange(40) % 2, **value)


def test_a_sampler_by_its_name(tmp_path):
    command = [
        "tune",
        "sklearn:iris",
        "--sampler",
        "tpe",
        "--out",
        tmp_path / "o",
        *FAST,
    ]
    assert "Sampler  Optuna's TPESampler proposed 2 trials in 1 batch" in output(*command)
    words = "Repeat the command that began the search to resume it."
    assert words in refusal("resume", tmp_path / "o", "--trials", "9")
    assert run(*command, "--trials", "4")[0] == 0


def test_one_configuration_is_trained_without_a_search(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = write_table(tmp_path / "bugs.csv", 60, kind=kinds(60))
    command = ["train", table, "--target", "kind", "--epochs", "3", "--cv", "2", "--workers", "1"]
    assert run(*command, "--set", "lr=0.5")[0] == 0
    # another trial of the same study
    code, out, err = run(*command, "--set", "lr=1e-3", "--set", "width=8")
    assert (code, err) == (0, "")
    study = gputune.Study.open("gputune-train/study.db")
    first, trial = study.trials
    assert (first.params["lr"], trial.params["lr"], trial.params["width"], trial.origin) == (
        0.5,
        1e-3,
        8,
        "include",
    )
    said = " ".join(out.split())
    folds = ", ".join(f"{score:.4f}" for score in trial.fold_scores)
    assert "Trial 1 batch_size=32, lr=0.001, weight_decay=0.01, width=8 Score accuracy" in said
    assert f"Folds {folds} Curve " in said and f"after epoch {trial.best_epoch} of 3" in said
    assert set(said.split("Curve ")[1].split()[0]) <= set("▁▂▃▄▅▆▇█")
    assert (
        "at the epoch that scored best on these folds, so optimistic" in said
        and "the best of" not in said
    )
    assert gputune.load_model("gputune-train/model").info["params"] == trial.params
    code, out, _ = run(*command, "--set", "lr=0.5", "--quiet")
    assert (code, out) == (0, "")
    assert gputune.load_model("gputune-train/model").info["params"] == first.params
    code, _, err = run("resume", "gputune-train")
    assert (
        code == 2
        and "were trained one by one, not a search. Repeat the command" in err
        and "with --trials 8 or more" in err
    )
    assert run("resume", "gputune-train", "--trials", "2", "-q") == (0, "", "")
    diverged = ["--optimizer", "sgd", "--set", "lr=1e30", "--out", "o"]
    code, _, err = run(*command, *diverged)
    assert code == 1 and "no trial has a finite score" in err
    monkeypatch.setattr(
        "gputune.tuning.pipeline.check_ending", lambda study, number: study
    )  # as beside a trial that has one
    code, _, err = run(*command, *diverged)
    assert code == 1 and "trial 0 has no finite score: it diverged" in err
    for words, said in {
        "lr=1,2": "got 'lr=1,2'. Lists and ranges are for",
        "lr=1..2": "got 'lr=1..2'",
    }.items():
        code, _, err = run(*command, "--set", words)
        assert code == 2 and "--set takes one value for each key" in err and said in err
    assert run(*command, "--trials", "3")[0] == 2


def test_an_interrupted_ensemble_leaves_the_best_trial(tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tune.Study, "ensemble", stopped)
    code, out, err = run("tune", "sklearn:iris", "--out", tmp_path / "o", "--ensemble", *FAST)
    assert code == 130 and "The best 3 of 3 trials" in out and "\n  held-out " in out
    assert err == "gputune: the ensemble was interrupted. The model of the best trial is saved.\n"
    assert gputune.load_model(tmp_path / "o" / "model").info["held_out_rows"] == 30


def test_a_time_series_keeps_the_last_rows_apart(tmp_path):
    _, folder, _ = searched(
        tmp_path, "--cv", "time:3", target="price", step=list(range(40)), price=PRICES
    )
    study = study_in(folder)
    assert read_again(study.meta["source"]).X.column("step").tolist() == list(range(32))
    assert study.meta["cv"] == "time:3" and study.meta["folds"] == 3


def test_a_time_series_with_an_unsorted_date_column_keeps_the_last_days_apart(tmp_path):
    days = [f"2024-{1 + day // 28:02}-{1 + day % 28:02}" for day in range(40)]
    _, folder, _ = searched(
        tmp_path, "--cv", "time:3", target="price", day=days[::2] + days[1::2], price=PRICES
    )
    study = study_in(folder)
    seconds = read_again(study.meta["source"]).X.column("day")
    assert len(seconds) == 32 and seconds.max() == datetime(2024, 2, 4, tzinfo=UTC).timestamp()
    assert any("not sorted by the date column 'day'" in note for note in study.meta["notes"])


def test_the_solved_logistic_regression_of_a_bundled_set(tmp_path):
    code, out, err = run("tune", "sklearn:iris", "--model", "logistic", "--out", tmp_path, *FAST)
    assert (code, err) == (
        0,
        "",
    ) and "Search   logistic, solved to convergence; 3 trials x 2 folds\n" in out
    assert "Task     3 classes of 'target': setosa, versicolor, virginica" in out
    code, out, _ = run(
        "tune",
        "sklearn:iris",
        "--model",
        "logistic",
        "--out",
        tmp_path / "b",
        *FAST,
        "--trials",
        "1",
    )
    assert code == 0 and "The best trial by accuracy" in out and "optimistic" not in out


def test_a_custom_module(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    table, folder, out = searched(
        tmp_path, "--model", f"{tmp_path}/net.py:Net", "--space", "module__hidden=2,3"
    )
    assert "Search   Net trained with adamw" in out and "module__hidden" in out
    code, out, _ = run("predict", folder / "model", table)
    assert code == 0 and len(read_csv(out)) == 41


def test_a_timeout_is_reported_and_what_it_left_out_is_run_by_the_same_command(tmp_path):
    _, folder, out = searched(tmp_path, "--timeout", "1e-6")
    stopped = sum(trial.state == "stopped" for trial in study_in(folder).trials)
    assert stopped and f"{stopped} cut short" in out
    options = ["--model", "logistic", *FAST, "--trials", "20", "--out", tmp_path]
    code, out, _ = run("tune", "sklearn:iris", "--timeout", "1e-6", *options, "--target-score=1")
    waiting = sum(trial.state == "waiting" for trial in study_in(tmp_path).trials)
    assert code == 0 and waiting and f"{waiting} waiting; " in out
    assert out.endswith(f"\nResume   gputune tune sklearn:iris {shlex.join(map(str, options))}\n")
    assert f"the best of {20 - waiting} trials" in " ".join(out.split())
    assert "Trials   20 complete; " in output("tune", "sklearn:iris", *options)


def test_diverged_trials_are_counted_and_where_all_are_the_command_ends_with_1(tmp_path):
    options = ["--optimizer", "sgd", "--space"]
    table, _, out = searched(tmp_path, *options, "lr=0.01,0.02,1e30", target="price", price=PRICES)
    assert "2 complete, 1 diverged" in out and "The best 2 of 3 trials" in out
    code, out, err = run(
        "tune", table, "--target", "price", *options, "lr=1e30", "--out", tmp_path / "p", *FAST
    )
    assert (code, out) == (1, "")
    assert (
        err.startswith("gputune: error: no trial has a finite score")
        and "Lower the learning rates" in err
    )


def test_a_bug_ends_with_1_and_its_traceback(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ValueError("surprise")

    monkeypatch.setattr(tune, "search", broken)
    code, out, err = run("tune", "sklearn:iris", "--out", tmp_path / "o", *FAST)
    assert (code, out) == (1, "")
    assert "Traceback" in err and "ValueError: surprise" in err
    assert not (tmp_path / "o").exists()  # an empty folder does not stay


@pytest.mark.parametrize("stop_after", [0, 1])
def test_an_interrupt_says_what_is_kept(tmp_path, monkeypatch, stop_after):
    original = tune.search
    out = tmp_path / "o"

    def search(*arguments, **options):
        if stop_after:
            original(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "search", search)
    code, printed, err = run("tune", "sklearn:iris", "--out", out, *FAST)
    assert (code, printed, err.count("\n")) == (130, "", 1)
    if stop_after:
        assert (
            "interrupted: 3 of 3 trials are finished. The results are kept in "
            f"'{out / 'study.db'}': repeat" in err
        )
    else:
        assert err == "gputune: interrupted before the first trial. Nothing is stored.\n"


def test_names_from_a_file_do_not_steer_the_terminal(tmp_path):
    evil = "\x1b[2Jevil\x07"
    table = write_table(
        tmp_path / "t.csv",
        **{f"{evil}col": [f"{evil}{i}" for i in range(40)]},
        **{f"{evil}y": [f"{evil}ant" if i % 2 else f"{evil}bee" for i in range(40)]},
    )
    code, out, err = run(
        "tune", table, "--target", f"{evil}y", "--out", tmp_path / "o", *FAST, loud=True
    )
    assert code == 0
    assert "[2Jevilant" in out and "left out" in out
    assert not set(out + err.replace("\r", "")) & set(map(chr, [*range(10), *range(11, 32), 127]))
    code, out, err = run("tune", table, "--target", f"{evil}z", "--out", tmp_path / "p", *FAST)
    assert code == 2 and "\x1b" not in err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_predictions_are_exact_in_a_file_and_cleaned_for_a_terminal(tmp_path):
    table, folder, _ = searched(tmp_path, kind=[f"\x1b[3{i % 2}m" for i in range(40)])
    _, exact, _ = run("predict", folder / "model", table)
    _, shown, _ = run("predict", folder / "model", table, out=Terminal())
    assert "\x1b" in exact
    assert shown == exact.replace("\x1b", "")


def test_a_warning_is_one_line_said_once(tmp_path):
    kind = [*kinds(37), "cat", "cat", "cat"]
    warning = (
        "kind has classes with fewer rows than the 5 folds: 'cat' (3). Some folds have no "
        "validation row of these classes."
    )
    said = f"gputune: warning: {warning}\n"
    searched(tmp_path, "--test-size", "0", "--cv", "5", kind=kind, warnings=said)


def test_predict_says_nothing_of_columns_that_the_search_was_told_to_leave_out(tmp_path):
    columns = {"id": range(40), "who": [f"p{i % 8}" for i in range(40)], "kind": kinds()}
    table, folder, _ = searched(tmp_path, "--drop", "id", "--groups", "who", **columns)
    code, out, err = run("predict", folder / "model", table)
    assert (code, err, len(read_csv(out))) == (0, "", 41)
    assert gputune.load_model(folder / "model").info["drop"] == ["id", "who"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--target-score", "0.01"],
            r"trial \d has reached the target score \(--target-score 0.01\)",
        ),
        (
            ["--patience-trials", "1", "--memory", "1KB", "--trials", "8"],
            r"\d trials? in a row were no better .*1\)",
        ),
    ],
)
def test_the_closing_text_says_why_a_search_was_good_enough(tmp_path, options, words):
    out = searched(tmp_path, *options)[2]
    assert re.search(f"Ended {words}", " ".join(out.split()))


def test_several_metrics_are_kept_shown_and_continued(tmp_path):
    options = ["--scoring", "accuracy,roc_auc,f1", "--positive", "bee"]
    table, out, text = searched(tmp_path, *options)
    assert re.search(r"trial +accuracy +roc_auc +f1 +epoch", text)
    assert re.search(r"By accuracy, roc_auc and f1 \d trials? (is|are) Pareto-optimal:", text)
    assert "Scores   accuracy\n" in text
    assert run("resume", out, "--trials", "4")[0] == 0
    assert study_in(out).curves_of("roc_auc").shape == (4, 2, 2)
    header, *rows = read_csv(run("trials", out, "--format", "csv")[1])
    assert len(rows) == 4 and {"score_accuracy", "score_roc_auc", "score_f1"} <= {*header}
    text = run("trials", out, "--by", "roc_auc")[1]
    assert re.search(r"^4 trials by roc_auc, .*\s+trial +roc_auc +accuracy +f1 +epoch", text)
    best = study_in(out).ranked_by("f1").best_trial
    assert json.loads(run("best", out, "--by", "f1", "--format", "json")[1])["score"] == best.score
    page = tmp_path / "page.html"
    assert run("report", out, "--by", "f1", "--importance", "--out", page)[::2] == (0, "")
    html = page.read_text()
    assert (
        f"{best.score:.4f}" in html
        and f"Trial {best.number}, scored at epoch {best.best_epoch}" in html
    )
    assert "which accuracy chose, as in the search" in html and "fall of f1 of class" in html
    for command in ("best", "report"):
        assert (
            "error: --by must be one of the study's metrics, " in run(command, out, "--by", "f2")[2]
        )
    for other in ("accuracy,f1", "f1,accuracy"):  # the scores are named once, whichever ranks
        words = run(
            "tune", table, "--target", "kind", *options, "--out", out, *FAST, "--scoring", other
        )[2]
        here = other.replace(",", ", ")
        assert (
            f"this command in: --scoring (accuracy, roc_auc, f1 in the study, {here} now). Use "
            "another" in words
        )


def test_no_predicted_text_is_a_formula(tmp_path):
    table, folder, _ = searched(tmp_path, kind=["=1+1", "@x", "-", "+3", "-cheap"] * 8)
    model = folder / "model"
    code, out, err = run("predict", model, table, "--proba")
    assert (code, read_csv(out)[0]) == (0, ["+3", "-", "'-cheap", "'=1+1", "'@x"])
    assert err == (
        "gputune: warning: A spreadsheet would read '-cheap' as a formula, so gputune writes a ' "
        "before the text. Pass --raw to omit the '.\n"
    )
    code, out, err = run("predict", model, table, "--proba", "--raw")
    assert (code, read_csv(out)[0], err) == (0, ["+3", "-", "-cheap", "=1+1", "@x"], "")
    predicted = gputune.load_model(model).predict(table).tolist()
    assert read_csv(run("predict", model, table, "--raw")[1]) == [
        ["kind"],
        *([label] for label in predicted),
    ]
    guarded = [f"'{label}" if label in ("-cheap", "=1+1", "@x") else label for label in predicted]
    assert read_csv(run("predict", model, table)[1])[1:] == [[label] for label in guarded]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("net.py:Net", "after the rows. Write the file again with X[:, None]"),
        ("net.py:Last", "expect them first. Write the file again with X.transpose("),
        (
            "mlp",
            "Choose --model cnn for images, --model gru for sequences, .* write the file again "
            "with X.reshape(",
        ),
    ],
)
def test_images_that_a_model_does_not_take_are_written_again(tmp_path, monkeypatch, model, message):
    monkeypatch.chdir(tmp_path)
    np.savez(
        "digits.npz",
        image=np.random.default_rng(0).random((40, 8, 7), np.float32),
        kind=np.arange(40) % 2,
    )
    head = (
        "def __init__(self, n_outputs):\n        super().__init__(nn.{}, nn.Flatten(), "
        "nn.Linear(2, n_outputs))\n"
    )
    layers = {"Net": "Conv2d(1, 2, 3)", "Last": "Conv1d(7, 2, 3)"}
    bodies = [
        f"class {name}(nn.Sequential):\n    {head.format(layer)}" for name, layer in layers.items()
    ]
    (tmp_path / "net.py").write_text("from torch import nn\n" + "\n".join(bodies))
    code, _, err = run("tune", "digits.npz", "--target", "kind", "--model", model, *FAST)
    assert code == 2 and re.search(message.replace("(", r"\(").replace("[", r"\["), err)


def test_sequences_of_several_channels_are_tuned_from_a_file(tmp_path):
    signals = np.random.default_rng(0).normal(size=(40, 3, 16)).astype(np.float32)
    np.savez(tmp_path / "signals.npz", signal=signals, kind=np.arange(40) % 2)
    command = ["tune", tmp_path / "signals.npz", "--target", "kind", "--model", "cnn", *FAST]
    code, _, err = run(*command)
    assert code == 2 and "got 3 x 16" in err and "need spatial_dims=1" in err
    folder = tmp_path / "out"
    assert run(*command, "--space", "module__spatial_dims=1", "--out", folder)[0] == 0
    model = gputune.load_model(folder / "model")
    assert isinstance(model.module.blocks[0][0], torch.nn.Conv1d)


def test_one_logit_of_two_classes(tmp_path):
    (tmp_path / "net.py").write_text(
        NET.replace("n_outputs, hidden", "hidden").replace("n_outputs", "1")
    )
    table, folder, out = searched(
        tmp_path, "--model", f"{tmp_path}/net.py:Net", "--scoring", "roc_auc"
    )
    assert "Net is trained on the loss bce: its one logit per row is for kind" in out
    header, *rows = read_csv(run("predict", folder / "model", table, "--proba")[1])
    assert header == ["ant", "bee"] and all(abs(sum(map(float, row)) - 1) < 1e-9 for row in rows)


def test_a_module_that_changes_the_folder_leaves_study_and_model_where_they_were_asked_for(
    tmp_path, monkeypatch
):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    leave = f"os.chdir({str(elsewhere)!r})"
    (tmp_path / "net.py").write_text(
        f"import os\nfrom torch import nn\n\n{leave}\n"
        "class Net(nn.Linear):\n"
        "    def __init__(self, n_features, n_outputs):\n"
        "        super().__init__(n_features, n_outputs)\n"
        "    def forward(self, x):\n"
        f"        {leave}\n"
        "        return super().forward(x)\n"
    )
    table = write_table(tmp_path / "bugs.csv", kind=kinds())
    monkeypatch.chdir(tmp_path)
    code, out, err = run(
        "tune", table, "--target", "kind", "--model", "net.py:Net", "--out", "found", *FAST
    )
    assert code == 0, err
    assert "found/study.db" in out and str(tmp_path) not in out.split("Study")[-1]
    monkeypatch.chdir(tmp_path)
    code, _, err = run("resume", "found", "--trials", "3", "-q")
    assert code == 0, err
    monkeypatch.chdir(tmp_path)
    how = {"n_trials": 1, "max_epochs": 1, "cv": 2, "study": "my.db", "verbose": 0}
    study = gputune.tune(f"{tmp_path}/net.py:Net", table, "kind", **how)
    assert (
        study.file == tmp_path / "my.db" and len(gputune.Study.open(tmp_path / "my.db").trials) == 1
    )
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == ["model", "study.db"]
    assert not any(elsewhere.iterdir())


def closing(study, **more):
    rest: Source = read_source(np.zeros((4, 2)), np.array([0, 1, 0, 1]))
    ending = Ending("houses.csv", study, rest, Path("out/study.db"), seconds=3.0, **more)
    return " ".join(summary_text(ending, width=90).split())


def test_the_closing_text_says_what_is_to_be_known_of_the_scores():
    laws = {"lr": {"kind": "choices", "choices": [0.1, 0.2, 0.3]}}
    baseline = {"score": 0.4, "answer": "ant"}
    made = study_of([{"lr": lr} for lr in (0.1, 0.2, 0.3)], distributions=laws, baseline=baseline)
    study = replace(made, trials=[replace(trial, best_epoch=30) for trial in made.trials])
    text = closing(study, held_out=HeldOut(0.75, 20, unseen=1))
    assert "held-out 0.7500 the saved model on 20 rows that nothing was fitted on" in text
    assert "Warning 1 row of a class that no row of the search has counts as wrong." in text
    assert "baseline 0.4000 ant on the same folds, without a model" in text
    assert (
        "Warning The best trial was best after the last of 30 epochs, so more epochs may be better."
        in text
    )
    assert (
        text.endswith("gputune.Study.open('out/study.db').best_model()")
        and edge_remarks(study)[0] in text
    )


def test_an_accuracy_of_labels_is_one_of_rows():
    X = np.random.default_rng(0).normal(size=(30, 2)).astype("float32")
    y = np.arange(60).reshape(30, 2) % 2
    y[::3] = 1
    words = {"n_trials": 1, "max_epochs": 1, "cv": 2, "verbose": 0}
    rows = "accuracy is the share of rows with only correct labels"
    assert rows in closing(gputune.tune(Net, X, y, **words))
    assert rows not in closing(gputune.tune(Net, X, y, scoring="neg_loss", **words))


def test_features_are_counted_by_the_numbers_that_trials_have():
    X = np.random.default_rng(0).normal(size=(30, 2))
    y = np.arange(30) % 2
    how = {"n_trials": 2, "max_epochs": 1, "cv": 2, "verbose": 0}
    for space, numbers, words in (
        (
            {"numbers": ["standard", "piecewise"]},
            "auto",
            "Features 2 with numbers 'standard' ",
        ),
        ({"width": [8]}, "piecewise", "Features 32 Task"),
    ):
        assert words in closing(gputune.tune("mlp", X, y, space=space, numbers=numbers, **how))


@pytest.mark.parametrize(
    ("trials", "words"),
    [(21, "proposed 20 trials in 3 batches"), (2, "proposed 1 trial in 1 batch")],
)
def test_a_sampler_is_reported_with_its_batches(trials, words):
    text = closing(made_batches(trials))
    assert f"Sampler Optuna's TPESampler {words} " in text
    assert "hypergradient" not in text and "outer step" not in text and "pruned" not in text


def test_a_sampler_whose_batches_are_halved():
    study = made_batches(40, halving=Halving(min_epochs=3))
    text = closing(study)
    assert any(trial.state == "pruned" for trial in study.trials)
    assert (
        "Sampler Optuna's TPESampler proposed 39 trials in 5 batches Halving of 40 trials these "
        "were pruned" in text
    )
    assert "after epoch 3" in text and "hypergradient" not in text
    pruned = tuple(trial for trial in study.trials if trial.state == "pruned")
    alone = replace(study, trials=pruned, curves=study.curves[: len(pruned)])
    assert (
        f"The best 5 of {len(pruned)} trials, pruned like all trials with a score, by"
        in closing(alone)
    )


def block_of(study, **more):
    """Return the aligned block of scores in a closing text, and the warnings below it."""
    rest: Source = read_source(np.zeros((4, 2)), np.array([0, 1, 0, 1]))
    ending = Ending("houses.csv", study, rest, Path("out/study.db"), **more)
    text = summary_text(ending, width=200)
    block, _, rest = text[text.index("Scores ") :].partition("\n\n")
    return block, rest.partition("\n\n")[0]


def test_scores_are_aligned_lines_and_warnings_follow():
    baseline = {"score": 0.4, "answer": "always 'ant'"}
    laws = {"lr": {"kind": "choices", "choices": [0.1, 0.2, 0.3]}}
    study = study_of([{"lr": lr} for lr in (0.1, 0.2, 0.3)], distributions=laws, baseline=baseline)
    first, second, third = study.trials
    first = replace(first, origin="default", score=0.5, fold_scores=(0.4, 0.6), best_epoch=1)
    second = replace(second, origin="random", score=0.75, fold_scores=(0.7, 0.8), best_epoch=1)
    third = replace(third, origin="random", score=0.25, fold_scores=(0.2, 0.3), best_epoch=1)
    study = replace(study, trials=(first, second, third))
    held_out = HeldOut(
        0.7, 20, interval=(0.6, 0.8), interval_method="wilson", baseline=("always 'ant'", 0.35)
    )
    default = HeldOut(0.65, 20, interval=(0.5, 0.75), interval_method="wilson")
    block, warnings = block_of(study, held_out=held_out, default_held_out=default)
    assert block.split("\n") == [
        "Scores   accuracy",
        "  held-out         0.7000  the saved model on 20 rows that nothing was fitted on (95% "
        "interval: 0.6000 to 0.8000)",
        "    default        0.6500  the default configuration, also trained on all rows (95% "
        "interval: 0.5000 to 0.7500)",
        "    baseline       0.3500  always 'ant' on these rows, without a model",
        "  cross-validated  0.7500  the best of 3 trials on the folds that chose it, so optimistic",
        "    default        0.5000  the default configuration (trial 0) on the same folds",
        "    improvement    0.2500  ± 0.0500 over the default (paired standard error over 2 folds)",
        "    baseline       0.4000  always 'ant' on the same folds, without a model",
    ]
    assert "did not improve" not in warnings
    same = replace(first, score=0.9, fold_scores=(0.9, 0.9))
    block, warnings = block_of(replace(study, trials=(same, second, third)), held_out=held_out)
    assert "improvement" not in block and "    default        0.9000  " in block
    assert "Warning  The search did not improve on the default.\n" in f"{warnings}\n"
