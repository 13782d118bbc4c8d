"""``gputune tune --method hypergradient``: its arguments, its output and its files."""

import itertools
import json

import pytest

import gputune
from command_line import FAST, output, run

SHORT = ["--space", "lr=0.001..0.1:log", "width=8", "batch_size=16", *FAST]
DESCENT = ["--method", "hypergradient", "--segments", "2", "--per-layer", "--outer-steps", "3"]


@pytest.fixture(scope="module")
def descended(tmp_path_factory):
    out = tmp_path_factory.mktemp("descended") / "out"
    text = output("tune", "sklearn:iris", *DESCENT, "--out", out, *SHORT)
    return out, text


def test_the_closing_text_counts_starts(descended):
    out, text = descended
    study = gputune.Study.open(out / "study.db")
    words = "Method hypergradient search on lr from 3 starting points, at most 3 outer steps each"
    assert words in " ".join(text.split())
    assert f"The best {min(5, len(study.trials))} of {len(study.trials)} trials by log_loss" in text
    assert "more epochs may be better" not in text
    assert {trial.origin[0] for trial in study.trials} == {0, 1, 2}


def test_the_best_parameters_can_be_copied_and_are_those_of_the_saved_model(descended):
    out, _ = descended
    rates = gputune.Study.open(out / "study.db").best_params["lr"]
    assert json.loads(run("best", out, "--format", "json")[1])["params"]["lr"] == rates
    assert gputune.load_model(out / "model").info["params"]["lr"] == rates
    assert "lr" in run("trials", out)[1]


def test_chaos_is_counted_in_the_closing_text(tmp_path):
    code, text, _ = run(
        "tune",
        "sklearn:iris",
        "--method",
        "hypergradient",
        "--optimizer",
        "sgd",
        "--space",
        "lr=30",
        "momentum=0.9",
        "width=8",
        "depth=1",
        "activation=tanh",
        "batch_size=16",
        "--epochs",
        "10",
        "--cv",
        "3",
        "--trials",
        "1",
        "--no-default",
        "--workers",
        "1",
        "--out",
        tmp_path / "out",
    )
    guarded = gputune.Study.open(tmp_path / "out" / "study.db").guarded
    assert code == 0 and guarded["chaotic"] and guarded["differences"]
    flat = " ".join(text.split())
    assert f"the slope was noise at {guarded['chaotic']} point" in flat
    estimated = "the slope was estimated by finite differences with wide steps"
    assert f"{estimated} at {guarded['differences']} point" in flat


def test_halving_is_reported_in_the_closing_text(tmp_path):
    common = [
        "tune",
        "sklearn:iris",
        "--method",
        "halving",
        "--space",
        "lr=0.001..0.1:log",
        "width=8",
        "--trials",
        "9",
    ]
    rest = ["--cv", "2", "--workers", "1"]
    code, text, _ = run(
        *common, "--epochs", "9", "--min-epochs", "1", *rest, "--out", tmp_path / "a"
    )
    flat = " ".join(text.split())
    assert (
        code == 0
        and "Halving of 9 trials these were pruned: 6 after epoch 1, 2 after epoch 3;" in flat
    )
    assert "The best trial by accuracy" in flat  # of those that trained to the end
    code, text, _ = run(*common, "--epochs", "1", *rest, "--out", tmp_path / "b")
    assert code == 0 and "Halving no trial was pruned" in " ".join(text.split())


def test_a_descent_from_the_command_line_draws_few_starts(tmp_path):
    code, _, _ = run(
        "tune",
        "sklearn:iris",
        "--method",
        "hypergradient",
        "--space",
        "lr=0.01..0.1:log",
        "width=8",
        "--epochs",
        "1",
        "--outer-steps",
        "1",
        "--cv",
        "2",
        "--workers",
        "1",
        "--out",
        tmp_path / "out",
    )
    study = gputune.Study.open(tmp_path / "out" / "study.db")
    assert code == 0 and len({trial.origin[0] for trial in study.trials}) == 8


def test_a_second_look_at_a_point_is_no_second_row(tmp_path):
    """A starting point with a noisy slope is measured again at the same point: a separate trial
    with the same score.
    """
    out = tmp_path / "out"
    code, text, err = run(
        "tune",
        "sklearn:iris",
        "--method",
        "hypergradient",
        "--space",
        "lr=0.03",
        "width=8",
        "depth=1",
        "activation=tanh",
        "batch_size=16",
        "--epochs",
        "10",
        "--cv",
        "3",
        "--trials",
        "1",
        "--no-default",
        "--workers",
        "1",
        "--test-size",
        "0",
        "--out",
        out,
        loud=True,
    )
    assert code == 0 and "hypergradient search: 1 starting point x at most 11 points" in err
    study = gputune.Study.open(out / "study.db")
    again = [b.number for a, b in itertools.combinations(study.trials, 2) if a.params == b.params]
    assert again, "no point was looked at twice: choose another start"
    table = text[text.index("The best ") :].split("\n\n")[1].split("\n")[1:]
    shown = [int(row.split()[0]) for row in table if row.split()[0].isdigit()]
    assert shown == [t.number for t in study.ranking() if t.number not in again][:5]
