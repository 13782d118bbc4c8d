"""A model on a file with the answers: scores as scikit-learn has them, a matrix, classes;
predictions beside an id."""

import csv
import io
import json
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
)
from torch.nn import functional

import gputune
from command_line import FAST, NET, kinds, output, refusal, run, searched, write_table
from gputune.cli.held_out import rows_with_target
from gputune.cli.model import Evaluation, evaluation
from gputune.data.source import read_with_held_out
from gputune.study.model import TunedModel
from refused import refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models of two classes and of a number, with their table."""
    folder = tmp_path_factory.mktemp("models")
    price = [i * 1.5 + 0.25 for i in range(60)]
    table = write_table(
        folder / "t.csv", 60, id=[f"{i:03}" for i in range(60)], kind=kinds(60), price=price
    )
    for target in ("kind", "price"):
        command = ["tune", table, "--target", target, "--drop", "id", "--out", folder / target]
        assert run(*command, *FAST)[0] == 0
    return folder


def refused_file(folder, target, file, *options, words):
    err = refusal("evaluate", folder / target / "model", file, *options)
    assert err.count("\n") == 1 and words in err


def evaluated(folder, target, *options):
    code, out, err = run(
        "evaluate", folder / target / "model", folder / "t.csv", "--format", "json", *options
    )
    assert code == 0, err
    return json.loads(out)


def test_classes_are_scored_as_scikit_learn_does(folder):
    model = gputune.load_model(folder / "kind" / "model")
    table = pl.read_csv(folder / "t.csv").drop("id")
    y = table["kind"].to_numpy()
    labels = model.predict(table)
    proba = model.predict_proba(table)
    found = evaluated(folder, "kind", "--positive", "bee")
    scores = {
        "accuracy": (y == labels).mean(), "balanced_accuracy": balanced_accuracy_score(y, labels),
        "roc_auc": roc_auc_score(y == "bee", proba[:, 1]), "neg_log_loss": -log_loss(y, proba),
        "f1": f1_score(y, labels, pos_label="bee"),
    }  # fmt: skip
    assert {name: found["scores"][name]["score"] for name in scores} == pytest.approx(scores)
    assert (found["rows"], found["classes"]) == (60, ["ant", "bee"])
    assert found["confusion"] == confusion_matrix(y, labels).tolist()
    assert [found["scores"][name]["positive"] for name in ("f1", "accuracy")] == ["bee", None]
    low, high = found["scores"]["accuracy"]["interval"]
    assert low < scores["accuracy"] < high
    methods = {name: found["scores"][name]["interval_method"] for name in ("accuracy", "roc_auc")}
    assert methods == {"accuracy": "wilson", "roc_auc": "bootstrap"}
    text = run("evaluate", folder / "kind" / "model", folder / "t.csv", "--positive", "bee")[1]
    remark = (
        "The interval of the accuracy is Wilson's; the other intervals hold 95% of bootstrap "
        "samples."
    )
    assert remark in " ".join(text.split())
    assert (
        f"f1 of class 'bee'           {scores['f1']:.4f}" in text
        and "true \\ predicted  ant  bee" in text
    )
    precision = (y == labels)[labels == "ant"].mean()
    recall = (y == labels)[y == "ant"].mean()
    assert f"ant      30     {precision:.4f}  {recall:.4f}" in text


@pytest.mark.parametrize("target", ["kind", "price"])
def test_the_model_computes_once_for_all_scores(folder, monkeypatch, target):
    outputs = TunedModel._outputs
    calls = []
    monkeypatch.setattr(
        TunedModel, "_outputs", lambda model, X: calls.append(1) or outputs(model, X)
    )
    assert len(evaluated(folder, target)["scores"]) > 2 and calls == [1]


def test_a_number_is_scored_as_scikit_learn_does(folder):
    table = pl.read_csv(folder / "t.csv").drop("id")
    guess = gputune.load_model(folder / "price" / "model").predict(table)
    found = evaluated(folder, "price")
    assert "confusion" not in found
    assert found["scores"]["r2"]["score"] == pytest.approx(r2_score(table["price"], guess))
    error = mean_absolute_error(table["price"], guess)
    assert found["scores"]["neg_mean_absolute_error"]["score"] == pytest.approx(-error)
    several = evaluated(folder, "price", "--scoring", "neg_max_error,r2")["scores"]
    assert list(several) == ["neg_max_error", "r2"] and several["r2"] == found["scores"]["r2"]


@pytest.mark.parametrize(
    ("target", "loss", "value", "more"),
    [
        ("price", "huber", "loss__delta=0.5", ()),
        ("price", "quantile", "loss__q=0.8", ("--target-transform", "log")),
        ("kind", "bce", "lr=0.1", ()),
        ("kind", "cross_entropy", "loss__label_smoothing=0.1", ()),
    ],
)
def test_a_loss_that_has_a_name_is_a_score(folder, tmp_path, target, loss, value, more):
    (tmp_path / "net.py").write_text(NET)
    command = [
        "tune",
        folder / "t.csv",
        "--target",
        target,
        "--drop",
        "id",
        "--model",
        f"{tmp_path}/net.py:Net",
    ]
    command += [
        "--loss",
        loss,
        "--scoring",
        "neg_loss",
        "--space",
        value,
        *more,
        "--out",
        tmp_path / target,
        *FAST,
    ]
    assert "Scores   loss (lower is better)\n  held-out " in output(*command)
    model = gputune.load_model(tmp_path / target / "model")
    table = pl.read_csv(folder / "t.csv").drop("id")
    outputs = model._outputs(table)
    if target == "kind":
        codes = torch.tensor((table["kind"] == model.classes[1]).to_list())
        of_one = functional.binary_cross_entropy_with_logits(
            outputs.diff(dim=1)[:, 0], codes.double()
        )
        of_all = functional.cross_entropy(outputs, codes.long(), label_smoothing=0.1)
        expected = of_one if loss == "bce" else of_all
    else:
        y = (np.log(table["price"]) if more else table["price"]).to_numpy()
        y = torch.tensor((y - model.center) / model.scale)
        outputs = outputs[:, 0]
        gap = y - outputs
        of_gap = torch.maximum(0.8 * gap, -0.2 * gap).mean()
        expected = of_gap if loss == "quantile" else functional.huber_loss(outputs, y, delta=0.5)
    command = ["evaluate", tmp_path / target / "model", folder / "t.csv", "--format", "json"]
    # it is among the usual ones, as the search's own
    for scoring in ((), ("--scoring", "neg_loss")):
        score = json.loads(run(*command, *scoring)[1])["scores"]["neg_loss"]["score"]
        assert score == pytest.approx(-float(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("task", "loss", "words"),
    [
        (
            "binary",
            "my:loss",
            "but this model was trained with my:loss. Choose another score, for example "
            "neg_log_loss",
        ),
        (
            "custom",
            "",
            "No named score fits a custom target. Use gputune predict, which writes the outputs",
        ),
    ],
)
def test_a_custom_loss_is_no_score(task, loss, words):
    model = SimpleNamespace(task=task, info={"loss": loss}, spec={"kind": "module"})
    with refused(words):
        evaluation(model, None, ["neg_loss"], None)


@pytest.mark.parametrize("name", ["f1", "precision", "recall", "average_precision"])
def test_a_score_of_a_class_without_a_row_is_none(folder, tmp_path, name):
    rows = pl.read_csv(folder / "t.csv", schema_overrides={"id": str}).filter(
        pl.col("kind") == "ant"
    )
    rows.write_csv(tmp_path / "ants.csv")
    command = [
        "evaluate",
        folder / "kind" / "model",
        tmp_path / "ants.csv",
        "--scoring",
        name,
        "--positive",
        "bee",
    ]
    assert f"No {name}: no row has the positive class." in output(*command)
    score = json.loads(run(*command, "--format", "json")[1])["scores"][name]
    assert score == {
        "score": None,
        "why": "no row has the positive class",
        "positive": "bee",
    }


def test_a_class_that_the_model_does_not_know_is_wrong(folder, tmp_path):
    rows = pl.read_csv(folder / "t.csv").with_columns(kind=pl.Series(["cat", *kinds(59)]))
    rows.write_csv(tmp_path / "cats.csv")
    code, out, _ = run(
        "evaluate", folder / "kind" / "model", tmp_path / "cats.csv", "--scoring", "accuracy"
    )
    assert (
        code == 0 and "1 row of a class that the model does not have counts as wrong. Scores" in out
    )
    assert "cat       1          -  0.0000" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--scoring", "acuracy"],
            "--scoring must be one of scikit-learn's scorer names, got 'acuracy'. Did you mean",
        ),
        (["--scoring", "r2"], "--scoring r2 does not fit a binary task"),
        (
            ["--scoring", "accuracy,neg_loss"],
            "--scoring neg_loss needs a module that was trained with a named loss (cross_entropy, "
            "mse, mae, huber, quantile, bce), but this model is a built-in mlp. Choose another "
            "score, for example neg_log_loss.",
        ),
        (["--scoring", "f1"], "Choose the positive class: --positive ant or --positive bee"),
        (
            ["--scoring", "f1", "--positive", "cat"],
            "--positive must be one of the classes 'ant' and 'bee'",
        ),
    ],
)
def test_a_score_that_cannot_be_had(folder, options, words):
    refused_file(folder, "kind", folder / "t.csv", *options, words=words)


SOME = pl.col("id") != 2
COLUMN = pl.lit(0).alias("a")


@pytest.mark.parametrize(
    ("target", "change", "options", "words"),
    [
        ("kind", pl.when(SOME).then("kind"), [], "kind has 1 missing value (the first in line 4)."),
        (
            "price",
            pl.when(SOME).then("price"),
            [],
            "price has 1 missing value (the first in line 4).",
        ),
        (
            "price",
            pl.lit("dear").alias("price"),
            [],
            "needs numbers in price, got text such as 'dear'",
        ),
        (
            "price",
            pl.when(SOME).then(pl.lit("1")).otherwise(pl.lit("dear")).alias("price"),
            [],
            "such as 'dear'. Convert it.",
        ),
        (
            "price",
            COLUMN,
            ["--positive", "1"],
            "--positive needs a model that predicts classes, but ",
        ),
        ("price", COLUMN, ["--scoring", "f1"], "--scoring f1 does not fit a regression task"),
        (
            "kind",
            (pl.col("id") % 2).alias("kind"),
            [],
            "it holds '0', '1', but the model's classes are 'ant', 'bee'",
        ),
    ],
)
def test_rows_that_cannot_be_evaluated(folder, tmp_path, target, change, options, words):
    pl.read_csv(folder / "t.csv").with_columns(change).write_csv(tmp_path / "new.csv")
    refused_file(folder, target, tmp_path / "new.csv", *options, words=words)


@pytest.mark.parametrize(
    ("target", "column", "words"),
    [
        ("price", "a", "new.csv' has no column 'a'"),
        ("kind", "kind", "new.csv' has no column 'kind' with true values. To predict"),
    ],
)
def test_a_file_without_a_column_or_the_answers(folder, tmp_path, target, column, words):
    pl.read_csv(folder / "t.csv").drop(column).write_csv(tmp_path / "new.csv")
    refused_file(folder, target, tmp_path / "new.csv", words=words)


def test_a_missing_number_of_an_array_file_is_refused(tmp_path):
    X = np.random.default_rng(0).normal(size=(40, 1, 8, 8))
    y = np.arange(40) / 8
    np.savez(tmp_path / "t.npz", image=X, size=y)
    command = [
        "tune",
        tmp_path / "t.npz",
        "--target",
        "size",
        "--out",
        tmp_path / "out",
        "--model",
        "cnn",
    ]
    assert run(*command, *FAST)[0] == 0
    assert run("evaluate", tmp_path / "out" / "model", tmp_path / "t.npz")[0] == 0
    np.savez(tmp_path / "t.npz", image=X, size=np.where(y == 0, np.nan, y))
    words = "size has 1 missing value (the first in row 0)"
    assert words in refusal("evaluate", tmp_path / "out" / "model", tmp_path / "t.npz")


def test_a_class_that_no_row_is_predicted_as(folder, tmp_path):
    model = gputune.load_model(folder / "kind" / "model")
    table = pl.read_csv(folder / "t.csv")
    table.filter(pl.Series(model.predict(table.drop("id")) == "ant")).write_csv(
        tmp_path / "ants.csv"
    )
    command = ["evaluate", folder / "kind" / "model", tmp_path / "ants.csv", "--positive", "bee"]
    code, out, err = run(*command, "--scoring", "precision")
    assert (code, err) == (
        0,
        "",
    ) and "No row is predicted as class 'bee': its precision is shown as 0." in out


def test_a_matrix_is_of_few_classes():
    texts = [
        Evaluation(n, {}, list(range(n)), np.eye(n, dtype=int).tolist()).text(80) for n in (12, 13)
    ]
    assert ["predicted" in text for text in texts] == [True, False]


def test_labels_that_read_as_numbers_stay_text(tmp_path):
    table, out, _ = searched(tmp_path, kind=["007", "bee"] * 20)
    pl.read_csv(table, infer_schema=False).filter(pl.col("kind") == "007").write_csv(
        tmp_path / "new.csv"
    )
    assert run("evaluate", out / "model", tmp_path / "new.csv")[0] == 0


def test_it_is_said_that_rows_were_trained_on(folder, tmp_path):
    # Of 60 rows, 12 were held out.
    assert (
        evaluated(folder, "kind")["trained_share"]
        == evaluated(folder, "price")["trained_share"]
        == 0.8
    )
    words = (
        "The model was trained on about 80% of these rows, or on equal rows, so the scores are "
        "better than those"
    )
    assert evaluated(folder, "kind")["notes"][0].startswith(words)
    assert words in " ".join(
        run("evaluate", folder / "kind" / "model", folder / "t.csv")[1].split()
    )
    test = gputune.Study.open(folder / "kind" / "study.db")
    held_out = read_with_held_out(test.record.source)[1].X.column("a")
    is_held_out = pl.col("a").is_in(held_out.tolist())
    for rows, share, text in (
        (~is_held_out, 1.0, "The model was trained on these rows"),
        (is_held_out, 0.0, ""),
    ):
        pl.read_csv(folder / "t.csv").filter(rows).write_csv(tmp_path / "part.csv")
        out = run("evaluate", folder / "kind" / "model", tmp_path / "part.csv", "--format", "json")[
            1
        ]
        assert json.loads(out)["trained_share"] == share
        out = run("evaluate", folder / "kind" / "model", tmp_path / "part.csv")[1]
        assert text in out and ("trained on" in out) == bool(text)


def test_a_model_without_a_sample_of_its_rows_or_with_a_damaged_one(folder):
    model = gputune.load_model(folder / "price" / "model")
    rows = rows_with_target(model, str(folder / "t.csv"))
    model.info["row_sample"] = "no hexadecimal number"
    with refused("The model's sample of its training rows is damaged: .*Save the model again"):
        evaluation(model, rows, None, None)
    del model.info["row_sample"]
    found = evaluation(model, rows, None, None)
    assert found.trained_share is None and "trained on" not in found.text(80)
    assert found.to_json()["trained_share"] is None


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_columns_are_kept_as_they_are_written(folder, tmp_path, suffix):
    table = pl.read_csv(folder / "t.csv", schema_overrides={"id": str})
    getattr(table, f"write_{suffix}")(tmp_path / f"t.{suffix}")
    command = ["predict", folder / "kind" / "model", tmp_path / f"t.{suffix}", "--keep"]
    code, out, err = run(*command, "id,a")
    header, *rows = csv.reader(io.StringIO(out))
    # a column that is meant draws no warning
    assert (code, header, err) == (0, ["id", "a", "kind"], "")
    assert [row[0] for row in rows] == table["id"].to_list()
    np.testing.assert_array_equal([float(row[1]) for row in rows], table["a"])
    code, _, err = run(*command, "aa")
    assert (
        code == 2
        and "--keep names no column 'aa'. The columns of" in err
        and "Did you mean 'a'?" in err
    )


def test_columns_of_a_bundled_set_are_kept(tmp_path):
    assert run("tune", "sklearn:iris", "--out", tmp_path, *FAST)[0] == 0
    out = run("predict", tmp_path / "model", "sklearn:iris", "--keep", "target")[1]
    assert out.startswith("target_given,target\nsetosa,")


def test_a_kept_column_has_a_name_of_its_own(folder, tmp_path):
    command = ["predict", folder / "price" / "model", folder / "t.csv", "--keep", "id,price"]
    code, out, err = run(*command)
    assert (code, err) == (0, "") and out.startswith("id,price_given,price\n000,0.25,")
    pl.read_csv(folder / "t.csv").with_columns(price_given=1).write_csv(tmp_path / "t.csv")
    out = run(
        "predict", folder / "price" / "model", tmp_path / "t.csv", "--keep", "price,price_given"
    )[1]
    assert out.startswith("price_given_given,price_given,price\n0.25,1,")
    code, _, err = run("predict", folder / "kind" / "model", folder / "t.csv", "--interval", "0.9")
    assert (
        code == 2
        and "--interval is only for regression" in err
        and err.endswith("predicts classes. Use --proba.\n")
    )
