"""``--json``: one document on standard output, for a result and for an error."""

import json
import os
from pathlib import Path

import pytest

from command_line import FAST, NET, kinds, run, write_table
from forked import Fork

START = "import sys; from gputune.cli.main import main; sys.exit(main())"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("data") / "t.csv", kind=kinds())


def document(*arguments):
    """Run a command with --json; return its exit code, its document and standard error."""
    code, out, err = run(*arguments, "--json")
    answer = json.loads(out)
    assert answer["exit_code"] == code
    return code, answer, err


def test_the_document_of_a_search(table, tmp_path):
    out = tmp_path / "o"
    words = ("tune", table, "--target", "kind", "--out", out, *FAST, "--trials", "10", "--quiet")
    space = ("--space", "lr=1e-4,1e-3,1e-1", "width=4,8", "--seed", "1")
    code, answer, err = document(*words, *space, "--budget", "300s")
    assert (code, answer["status"], answer["ended"], err) == (0, "done", None, "")
    assert (answer["study"], answer["model"]) == (str(out / "study.db"), str(out / "model"))
    assert (answer["scoring"], answer["direction"]) == ("accuracy", "maximize")
    best = answer["best"]
    assert best == {**answer["top"][0], "default": best["default"]}
    assert best["score"] == max(trial["score"] for trial in answer["top"])
    assert sum(answer["trials"].values()) == len(answer["top"]) == answer["trials"]["complete"]
    assert answer["held_out"]["rows"] == 8 and answer["held_out"]["baseline"]["score"] == 0.5
    budget = answer["budget"]
    assert budget["seconds"] == 300 and budget["unspent"] == 300 - budget["used"] < 300
    assert all(edge["name"] == "lr" and edge["high"] == 0.1 for edge in answer["next"]["edges"])
    # The same document without a time limit; the trials are not trained again.
    again = document(*words, *space)[1]
    assert again["best"] == best and again["budget"]["unspent"] is None
    resumed = document("resume", out)[1]
    assert resumed["best"] == best and resumed["next"] == answer["next"]


def test_edges_and_importance_say_what_to_search_next(table, tmp_path):
    words = ("tune", table, "--target", "c", "--out", tmp_path, *FAST, "--trials", "12")
    answer = document(*words, "--space", "lr=1e-6,1e-5,1e-4", "width=4,8,16,32")[1]
    assert {edge["end"] for edge in answer["next"]["edges"]} <= {"lower", "upper"}
    for edge in answer["next"]["edges"]:
        assert answer["best"]["params"][edge["name"]] == edge["value"]
        assert edge["text"].startswith(f"The best {edge['name']}, ")
    importance = answer["next"]["importance"]
    assert set(importance["of"]) == {"lr", "width"} and importance["trials"] >= 10
    assert answer["next"]["more_epochs"] is (answer["best"]["best_epoch"] == 2)


@pytest.mark.parametrize(
    ("words", "argument", "rule", "got", "remedy"),
    [
        (
            "--budget 0",
            "--budget",
            "must be a number of seconds above 0, or a time such as '60s', '5m' or '1h30m'",
            "'0'",
            "",
        ),
        (
            "--timeout 0",
            "--timeout",
            "must be a number of seconds above 0, or a time such as '60s', '5m' or '1h30m'",
            "'0'",
            "",
        ),
        ("--budget", "--budget", "expected one argument", None, "Try 'gputune tune --help'."),
        (
            "--trials x",
            "--trials",
            "must be a whole number of at least 0",
            "'x'",
            "Try 'gputune tune --help'.",
        ),
        ("--cv", "--cv", "expected one argument", None, "Try 'gputune tune --help'."),
        (
            "--tragets x",
            None,
            "unrecognized arguments: --tragets x. Did you mean '--target'?",
            None,
            "Try 'gputune tune --help'.",
        ),
        ("--dry-run", None, "--json and --dry-run exclude each other", None, "Leave one out."),
        ("--profile", None, "--json and --profile exclude each other", None, "Leave one out."),
        (
            "--space lr=2..1",
            None,
            "A range must have LOW < HIGH",
            "'lr=2..1'",
            "Swap the ends, or write lr=2 for one value.",
        ),
    ],
)
def test_an_error_has_four_fields(table, tmp_path, words, argument, rule, got, remedy):
    words = words.split()
    code, answer, err = document("tune", table, "--target", "kind", "--out", tmp_path / "o", *words)
    assert (code, answer["status"]) == (2, "error")
    error = answer["error"]
    assert (error["argument"], error["rule"], error["got"]) == (argument, rule, got)
    assert error["remedy"] == remedy
    assert err.startswith("gputune: error: ")
    assert not (tmp_path / "o").exists()


def test_other_errors_have_a_message(tmp_path):
    code, answer, err = document("tune", tmp_path / "no.csv", "--target", "y")
    assert (code, answer["error"]["type"]) == (2, "FileNotFoundError")
    assert answer["error"]["rule"] == answer["error"]["message"]
    assert err == f"gputune: error: {answer['error']['message']}\n"


def test_a_bug_is_a_document_too(monkeypatch, table):
    from gputune.cli import tune

    def fail(*_):
        raise ZeroDivisionError("by 0")

    monkeypatch.setattr(tune, "read_rows", fail)
    code, answer, err = document("tune", table, "--target", "kind")
    assert (code, answer["error"]["type"]) == (1, "ZeroDivisionError")
    assert answer["error"]["message"] == "internal error: ZeroDivisionError: by 0"
    assert "Traceback" in err


@pytest.mark.skipif(os.name == "nt", reason="pipes of a forked process")
def test_a_module_that_prints_does_not_reach_standard_output(table, tmp_path):
    """Neither by print nor by the file descriptor, as a worker or compiled code would."""
    net = tmp_path / "net.py"
    net.write_text(f"import os\nprint('printed')\nos.write(1, b'written\\n')\n{NET}")
    words = ["tune", table, "--target", "kind", "--out", tmp_path / "o", *FAST, "--json"]
    process = Fork(START, *words, "--model", f"{net}:Net", cwd=Path(tmp_path))
    out, err = process.communicate()
    assert json.loads(out)["status"] == "done"
    assert "printed" in err and "written" in err and process.returncode == 0


def test_an_infinite_time_limit_is_none_in_the_document(table, tmp_path):
    words = ("tune", table, "--target", "kind", "--out", tmp_path, *FAST, "--trials", "1")
    code, answer, _ = document(*words, "--timeout", "inf")
    assert (code, answer["status"]) == (0, "done")
    assert answer["budget"]["seconds"] is None and answer["budget"]["unspent"] is None
