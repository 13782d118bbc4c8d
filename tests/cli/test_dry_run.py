"""``--dry-run`` prints what a search would do, trains nothing, and writes no file."""

import re
from unittest import mock

import pytest

from command_line import FAST, NET, kinds, output, refusal, run, write_table
from gputune.tuning.trainer import Trainer


@pytest.fixture
def bugs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "net.py").write_text(NET)
    return write_table(tmp_path / "bugs.csv", kind=kinds(), price=list(range(40)))


def dry(bugs, *options, target="kind"):
    """Return the labeled lines of a dry run, which must train and write nothing."""
    before = sorted(bugs.parent.rglob("*"))
    with mock.patch.object(Trainer, "train", side_effect=AssertionError("trained")):
        text = output("tune", "bugs.csv", "--target", target, *options, "--dry-run")
    after = [path for path in bugs.parent.rglob("*") if "__pycache__" not in str(path)]
    assert sorted(after) == before
    assert "\n\nNothing was trained or written.\nNext     gputune tune bugs.csv" in text
    assert text.rstrip().endswith(" ".join(["--target", target, *options]))
    return text


def value(text, label):
    return re.search(rf"^{label} +(.*)$", text, re.M)[1]


@pytest.mark.cpu  # the device and the time
def test_a_dry_run_says_what_a_search_would_do(bugs):
    text = dry(bugs, *FAST)
    assert value(text, "Data") == "bugs.csv: 32 rows to search on and 8 held out"
    assert value(text, "Columns") == "3 numbers, 1 category, made into 5 features"
    assert value(text, "Search") == "mlp trained with adamw; 3 trials x 2 folds x 2 epochs"
    assert re.fullmatch(
        r"about [\d.]+ \w+ for the data and 1 chunk \(estimate\)", value(text, "Memory")
    )
    assert re.match(r"cpu, 1 process with \d+ threads?$", value(text, "Device"))
    expected = (
        r"about [\d.]+ s of training on idle cores, an estimate of the planner's cost model "
        r"\(nothing was measured\)"
    )
    assert re.fullmatch(expected, value(text, "Time"))
    assert "Method" not in text


@pytest.mark.parametrize("options", [[], ["--method", "median"]])
def test_the_plan_is_that_of_the_search(bugs, options):
    planned = value(dry(bugs, *FAST, *options), "Plan")
    code, _, err = run("tune", "bugs.csv", "--target", "kind", *FAST, *options, loud=True)
    assert code == 0
    said = re.search(r"^plan: (.*)$", err, re.M)[1]
    assert said.partition("; the states")[0] == planned


@pytest.mark.cpu  # the time
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "halving"], ["Method   halving", "; at most, because trials may end early"]),
        (["--patience", "1"], ["; at most, because trials may end early"]),
        (["--timeout", "30"], ["; the timeout ends it after 30.0 s"]),
        (
            ["--method", "hypergradient", "--epochs", "2"],
            ["Method   hypergradient", "Search   mlp trained with adamw; 3 trials", "; at most"],
        ),
        (
            ["--model", "logistic"],
            ["Plan     solve each trial to convergence", "Time     no estimate for a model that"],
        ),
        (
            ["--model", "net.py:Net", "--space", "module__hidden=2,3"],
            [
                "Net trained with adamw",
                "(nothing was measured), which can be several times too low",
            ],
        ),
        (
            ["--sampler", "tpe"],
            ["Note     2 random configurations replace the sampler's proposals in this plan."],
        ),
    ],
)
def test_dry_runs_of_other_searches(bugs, options, words):
    if "--sampler" in options:
        pytest.importorskip("optuna")
    text = dry(bugs, *FAST, *options)
    assert [word for word in words if word not in text] == []


def test_a_dry_run_of_one_training(bugs):
    text = output(
        "train", "bugs.csv", "--target", "price", "--set", "lr=1e-2", "--cv", "2", "--dry-run"
    )
    assert "; 1 trial x 2 folds x 50 epochs" in text
    assert not bugs.with_name("gputune-train").exists()


def test_a_dry_run_leaves_an_existing_study_unchanged(bugs):
    output("tune", "bugs.csv", "--target", "kind", *FAST)
    study = bugs.parent / "gputune-out" / "study.db"
    before = study.read_bytes()
    text = output("tune", "bugs.csv", "--target", "kind", *FAST, "--dry-run")
    expected = (
        "gputune-out/study.db exists: this command would resume its search, if the search is the "
        "same"
    )
    assert value(text, "Study") == expected
    assert study.read_bytes() == before


def test_a_dry_run_refuses_what_a_search_refuses(bugs):
    words = ["tune", "bugs.csv", "--target", "kind", "--dry-run"]
    assert "Did you mean 'width'?" in refusal(*words, "--space", "widht=8")
    assert "--intervals needs a model" in refusal(*words, "--intervals")
    assert "--cv must" in refusal(*words, "--cv", "33")
