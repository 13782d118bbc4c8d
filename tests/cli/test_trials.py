"""The trials of a study as table, JSON and CSV."""

import csv
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from torch import nn

from gputune.api.study import Study
from gputune.cli.study import FIELDS, best_json, best_text, trials_csv, trials_json, trials_table
from gputune.study.study import Trial

META = {"model": "mlp", "scoring": "accuracy", "folds": 2}


def make_study(trials, scoring="accuracy", folds=2):
    curves = np.zeros((len(trials), 1, folds))
    return Study(
        meta={**META, "scoring": scoring, "folds": folds}, trials=tuple(trials), curves=curves
    )


def trial(number, score, params=None, state="complete"):
    spread = (score - 0.1, score + 0.1)
    params = {"lr": 0.001, "width": 64} if params is None else params
    return Trial(number, params, score, spread, 7, state, 1.25, "random")


@pytest.fixture
def study():
    waiting = Trial(2, {"lr": 0.5, "width": 32}, math.nan, (), 0, "waiting", math.nan, "random")
    return make_study([trial(0, 0.8), trial(1, math.nan, state="failed"), waiting])


def test_a_table_has_a_line_for_each_trial(study):
    assert trials_table(study, width=100).split("\n") == [
        "3 trials by accuracy, mean ± standard error over 2 folds",
        "",
        "trial         accuracy  epoch  state     seconds     lr  width",
        "    0  0.8000 ± 0.1000      7  complete     1.25  0.001     64",
        "    1                -      -  failed       1.25  0.001     64",
        "    2                -      -  waiting         -    0.5     32",
        "",
        "Failed:",
        "  trial 1: diverged in epoch 8",
    ]


def test_a_failed_trial_says_why_and_one_without_reports_has_no_epoch():
    errors = [{"error": "ValueError: no"}, *[{"reason": "out of memory"}] * 20]
    failed = [
        replace(trial(n, math.nan, state="failed"), detail=d) for n, d in enumerate([{}, *errors])
    ]
    done = replace(trial(22, 0.8), best_epoch=0)
    study = replace(make_study([*failed, done]), meta={**META, "face": "loop"})
    lines = trials_table(study, width=80).split("\n")
    assert lines[0] == "23 trials by accuracy"
    nan, raised, big, *others = lines[lines.index("Failed:") + 1 :]
    assert len(others) == 17 + 1
    assert "trial 0: a NaN or infinite score was returned or reported" in nan
    assert "trial 1: ValueError: no" in raised and "trial 2: out of memory" in big
    assert lines[-1] == "  and 2 more (--format json lists all)"
    row = next(line.split() for line in lines if line.split()[:1] == ["22"])
    assert row[1:5] == ["0.8000", "±", "0.1000", "-"]
    assert best_text(study).split("\n")[0] == "trial 22: accuracy 0.8000 ± 0.1000"
    assert json.loads(trials_json(study))[1]["reason"] == "ValueError: no"


def test_the_best_trial_says_that_it_was_sent_away():
    assert best_text(make_study([trial(0, 0.8, state="pruned")])).startswith(
        "trial 0: accuracy 0.8000 ± 0.1000, epoch 7, pruned\n"
    )


@pytest.mark.parametrize(("width", "gone"), [(61, ["seconds"]), (52, ["±", "seconds"])])
def test_a_narrow_table_has_fewer_columns(study, width, gone):
    text = trials_table(study, width=width)
    assert not any(word in text for word in gone)
    assert all(len(line) <= width for line in text.split("\n"))
    assert "state" in text and "lr  width" in text


def test_many_parameters_share_a_column_of_several_lines():
    params = {f"module__argument_{i}": 1000 + i for i in range(6)}
    lines = trials_table(make_study([trial(0, 0.8, params)]), width=80).split("\n")
    assert all(len(line) <= 80 for line in lines)
    assert lines[2].split() == ["trial", "accuracy", "epoch", "state", "parameters"]
    assert " ".join(" ".join(lines[3:]).split()).endswith(
        " ".join(f"{k}={v}" for k, v in params.items())
    )


def test_one_fold_has_no_error():
    one = Trial(0, {"lr": 1.0}, 0.5, (0.5,), 1, "complete", 1.0, "default")
    text = trials_table(make_study([one], folds=1), width=80)
    assert text.startswith("1 trial by accuracy, mean over 1 fold\n")
    assert "±" not in text


def test_a_loss_is_shown_positive_and_stays_negative_in_json():
    study = make_study([trial(0, -0.31)], scoring="neg_log_loss")
    text = trials_table(study, width=80)
    assert (
        "log_loss (lower is better)" in text and " 0.3100 ± 0.1000" in text and "-0.31" not in text
    )
    assert json.loads(trials_json(study))[0]["score"] == -0.31
    lines = trials_table(
        make_study([trial(0, -0.31)], scoring="neg_root_mean_squared_error"), width=80
    ).split("\n")
    # a long name is in the title alone
    assert "root_mean_squared_error (lower is better)" in " ".join(lines)
    assert ["trial", "score", "epoch"] in [line.split()[:3] for line in lines]


def test_json_has_null_for_nan(study):
    rows = json.loads(
        trials_json(study), parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
    )
    assert [list(row) for row in rows] == [list(FIELDS), [*FIELDS, "reason"], list(FIELDS)]
    assert rows[0] == {
        "number": 0,
        "params": {"lr": 0.001, "width": 64},
        "score": 0.8,
        "fold_scores": [0.8 - 0.1, 0.8 + 0.1],
        "best_epoch": 7,
        "state": "complete",
        "seconds": 1.25,
        "origin": "random",
    }
    assert (rows[1]["score"], rows[1]["fold_scores"], rows[2]["seconds"]) == (
        None,
        [None, None],
        None,
    )


def test_csv_reads_back(study):
    rows = list(csv.DictReader(io.StringIO(trials_csv(study))))
    assert list(rows[0]) == list(study.to_pandas())
    assert {
        name: float(rows[0][name]) for name in ("params_lr", "params_width", "fold_1", "score")
    } == {"params_lr": 0.001, "params_width": 64, "fold_1": 0.8 + 0.1, "score": 0.8}
    assert (rows[1]["score"], rows[1]["fold_0"], rows[2]["seconds"]) == ("", "", "")


@pytest.mark.parametrize("begin", ["=", "+", "-", "@", "\t", "\r"])
def test_no_text_of_the_csv_is_a_formula(begin):
    params = {f"{begin}key": f"{begin}SUM(A1)", "module__name": f"{begin}S"}
    header, cells = csv.reader(io.StringIO(trials_csv(make_study([trial(0, -2.0, params)]))))
    row = dict(zip(header, cells, strict=True))
    assert float(row["score"]) == -2.0  # a number keeps its sign
    texts = [row[name] for name in row if name.startswith(("params_", "origin"))]
    assert not any(text.startswith(("=", "+", "@", "-S", "\t", "\r")) for text in [*row, *texts])


def test_parameters_that_json_lacks_are_words():
    study = make_study([trial(0, 0.8, {"C": math.inf, "module__act": nn.Tanh})])
    assert json.loads(trials_json(study))[0]["params"] == {"C": "inf", "module__act": "Tanh"}
    (row,) = csv.DictReader(io.StringIO(trials_csv(study)))
    assert (row["params_C"], row["params_module__act"]) == ("inf", "Tanh")
    assert "inf" in trials_table(study, width=80)


def test_no_name_steers_the_terminal():
    study = make_study([trial(0, 0.8, {"module__\x1b[2J": "\x1b]0;title\x07"})])
    for text in (
        trials_table(study, width=80),
        *(show(study) for show in (best_text, trials_json, trials_csv, best_json)),
    ):
        assert "\x1b" not in text and "\x07" not in text


def test_best_shows_parameters_in_full():
    study = make_study([trial(0, 0.5), trial(1, 0.8, {"lr": 0.009637248262359661, "width": 64})])
    assert best_text(study).split("\n") == [
        "trial 1: accuracy 0.8000 ± 0.1000, epoch 7",
        "",
        "parameter  value",
        "lr         0.009637248262359661",
        "width      64",
    ]
    found = json.loads(best_json(study))
    assert (found["scoring"], found["number"], found["params"]) == (
        "accuracy",
        1,
        study.best_params,
    )
