"""Whatever a study of somebody else holds, a command ends in words: no traceback, and nothing of
the user's is lost."""

import json
import os
import sqlite3
import struct

import pytest

import gputune
from command_line import FAST, kinds, output, refusal, run, searched, write_table
from gputune.ground.errors import InputError
from gputune.study.rows import checksum

VALUES = [
    "null",
    "-1",
    "99999999999999999999",
    '"x"',
    "[]",
    '["\\ud800"]',
    '{"name":"hypergradient"}',
    '{"kind":"module","import":"os:system"}',
    "[" * 300 + "]" * 300,
    '{"array":{"dtype":"<f8","shape":[1],"items":[1.0]}}',
    '{"pairs":[[1,2]]}',
    '{"torch":"torch.nn:Linear"}',
]
LOOKS = ["trials", "best", "report"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a search."""
    return searched(tmp_path_factory.mktemp("whole"))[1]


@pytest.fixture
def study(whole, tmp_path):
    (tmp_path / "model").symlink_to(whole / "model")
    return tmp_path / "study.db"


def write(whole, study, table, changed, row=0):
    """Make the study with changed values in a row and a matching checksum, as an attacker could."""
    study.write_bytes((whole / "study.db").read_bytes())
    key = {"meta": "key", "plan": "chunk"}.get(table, "number")
    raw = sqlite3.connect(study)
    for column, value in changed.items():
        raw.execute(f"UPDATE {table} SET {column} = ? WHERE {key} = ?", (value, row))
    (values,) = raw.execute(f"SELECT * FROM {table} WHERE {key} = ?", (row,))
    raw.execute(f"UPDATE {table} SET checksum = ? WHERE {key} = ?", (checksum(*values[:-1]), row))
    raw.commit()
    raw.close()


def ends_in_words(study, *commands):
    for command in commands:
        out = {
            "report": ["--out", study.with_name("report.html")],
            "repair": ["--out", study.with_name("new.db")],
        }
        study.with_name("new.db").unlink(missing_ok=True)
        code, _, err = run(command, study, *out.get(command, ()))
        assert code in (0, 1, 2) and "Traceback" not in err, (command, err)


def looked_at(study):
    """Read a study with every command; all of them must refuse it in the same way."""
    try:
        gputune.Study.open(study)
    except InputError:
        ends_in_words(study, "status")
    else:
        ends_in_words(study, *LOOKS)


def parts(value):
    """Every value with one part of it replaced by each hostile one, or gone."""
    for key in value if isinstance(value, dict) else ():
        for other in (VALUES[0], VALUES[9]):
            yield json.dumps({**value, key: json.loads(other)})
        yield json.dumps({name: part for name, part in value.items() if name != key})


def options(whole):
    raw = sqlite3.connect(whole / "study.db")
    found = raw.execute("SELECT key, value FROM meta").fetchall()
    raw.close()
    return found


def test_no_option_of_another_type_ends_in_a_traceback(whole, study, pytestconfig):
    every = 1 if pytestconfig.getoption("--all") else 16
    for number, (key, text) in enumerate(options(whole)):
        for value in [*VALUES, *parts(json.loads(text))][number % every :: every]:
            write(whole, study, "meta", {"value": value}, key)
            looked_at(study)
        ends_in_words(study, "status", "repair")


def test_no_option_of_another_type_ends_a_resume_in_a_traceback(whole, study):
    arguments = json.loads(dict(options(whole))["arguments"])
    kept = [
        {**arguments, "kept": {**arguments["kept"], name: [1]}}
        for name in (*arguments["kept"], "pairs")
    ]
    cases = [
        ("arguments", json.dumps(value))
        for value in (*kept, {**arguments, "space": None, "folds": [[]]})
    ]
    cases += [(key, value) for key, text in options(whole) for value in parts(json.loads(text))][
        ::8
    ]
    cases += [(key, '"x"') for key, text in options(whole) if text.startswith('"')]
    for key, value in cases:
        write(whole, study, "meta", {"value": value}, key)
        ends_in_words(study, "resume")


def test_no_row_of_another_type_ends_in_a_traceback(whole, study):
    for value in VALUES:
        write(whole, study, "trials", {"params": value})
        looked_at(study)
        write(whole, study, "trials", {"params": f'{{"lr":{value},"width":16}}'})
        looked_at(study)
        write(whole, study, "results", {"detail": value})
        looked_at(study)
        write(whole, study, "plan", {"trials": value, "facts": f'{{"threads":{value}}}'})
        ends_in_words(study, "resume", "repair")
    for value in (float("inf"), float("nan"), -1.0, 1e150, -1e150):
        for column in ("score", "seconds", "fold_scores", "curve"):
            number = struct.pack("<d", value)
            write(
                whole,
                study,
                "results",
                {column: number * (1 + (column in ("fold_scores", "curve")))},
            )
            looked_at(study)
    for lr in ("1e308", "-1e308", "1" + "0" * 400):
        write(whole, study, "trials", {"params": f'{{"lr":{lr}}}'})
        looked_at(study)


@pytest.mark.parametrize(
    ("table", "changed", "words"),
    [
        ("meta", {"value": "[1]"}, r"option 'folds' cannot be read \(\[1\] has a wrong type\)"),
        ("trials", {"params": "1"}, r"trial 0 cannot be read \(parameters 1 are not an object\)"),
        (
            "results",
            {"best_epoch": 2**40},
            r"the result of trial 0 cannot be read \(its best epoch or seconds",
        ),
        (
            "results",
            {"detail": '{"usable":1}'},
            r"the result of trial 0 cannot be read \(its detail has",
        ),
        (
            "results",
            {"score": b"123"},
            r"the result of trial 0 cannot be read \(3 bytes are not float64",
        ),
        (
            "meta",
            {"value": '{"array":{"dtype":"<U400000000","shape":[1],"items":["a"]}}'},
            "has no item of that length",
        ),
    ],
)
def test_what_is_odd_is_named_when_the_study_is_opened(whole, study, table, changed, words):
    write(whole, study, table, changed, "folds" if table == "meta" else 0)
    with pytest.raises(
        gputune.StudyCorruptError, match=rf"study\.db' is damaged: .*{words}.* gputune repair "
    ):
        gputune.Study.open(study)


def test_a_plan_that_is_odd_is_named(whole, study):
    write(whole, study, "plan", {"trials": '["../thesis"]'})
    assert (
        'chunk 0 of the plan cannot be read (its trials are ["../thesis"], and its facts'
        in refusal("resume", study)
    )


def test_an_origin_is_no_formula_in_a_spreadsheet(whole, study):
    write(whole, study, "trials", {"origin": "=cmd|' /C calc'!A0"})
    assert ",'=cmd|' /C calc'!A0," in output("trials", study, "--format", "csv")


def test_a_page_is_written_whole_or_not_at_all(whole, study, monkeypatch):
    page = study.with_name("report.html")
    page.write_text("before")
    write(whole, study, "meta", {"value": '"\\udce9 \\ud800"'}, "device")
    assert run("report", study, "--out", page)[0] == 0
    assert "\\udce9 \\ud800" in page.read_text()
    whole_page = page.read_bytes()

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gputune.ground.files.os.fsync", full)
    assert run("report", study, "--out", page)[0] == 1
    assert page.read_bytes() == whole_page and sorted(p.name for p in page.parent.glob(".*")) == []


def test_a_page_and_predictions_may_go_to_a_pipe_or_through_a_link(whole, tmp_path):
    (tmp_path / "link.csv").symlink_to(tmp_path / "rows.csv")
    table = whole.parent / "t.csv"
    assert run("predict", whole / "model", table, "--out", tmp_path / "link.csv")[0] == 0
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "rows.csv").read_text().startswith(
        "kind\n"
    )
    assert run("predict", whole / "model", table, "--out", os.devnull)[0] == 0
    assert not os.path.isfile(os.devnull)


def test_names_that_are_no_text_are_read_and_written(tmp_path):
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    table = write_table(folder / "caf\udce9.csv", kind=kinds())
    assert run("tune", table, "--target", "kind", "--out", folder / "out", *FAST)[0] == 0
    for command in ("status", "report", "resume"):
        extra = ["--out", tmp_path / "report.html"] if command == "report" else []
        code, _, err = run(command, folder / "out", *extra)
        assert code == 0, err
