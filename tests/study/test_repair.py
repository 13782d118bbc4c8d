"""Only the undamaged parts of a study are saved into a new file; a backup is an unchanged copy of
the study.
"""

import random
import re
import shutil
import sqlite3
import threading
from contextlib import closing

import numpy as np
import pytest

import gputune
from command_line import FAST, kinds, run, write_table
from gputune.ground.errors import StudyCorruptError
from gputune.study.repair import RepairResult, _connect, repair
from gputune.study.store import PlannedChunk, Store
from refused import refused
from study_rows import bits, candidates, change, content, make_study, result

META = {"model": "mlp", "seed": 0, "notes": ["a" * 300]}
TRIALS = 60


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study of many pages; long curves lie on pages of their own, and one result replaced
    another."""
    path = tmp_path_factory.mktemp("whole") / "study.db"
    with Store.create(path, META) as store:
        store.add_trials(candidates(range(TRIALS)))
        store.add_chunks(
            [PlannedChunk(n, 0, tuple(range(3 * n, 3 * n + 3)), 1) for n in range(TRIALS // 3)]
        )
        store.finish([result(0, state="stopped"), result(TRIALS - 2, state="stopped")])
        store.finish([result(n, epochs=900 if n % 10 == 0 else 5) for n in range(TRIALS - 2)])
    return path


def saved(path, tmp_path):
    """Repair into a new file and return its content; every value must be a value of the whole
    study.
    """
    out = tmp_path / "out.db"
    out.unlink(missing_ok=True)
    report = repair(path, out)
    return report, content(out)


def losses(whole, tmp_path, files):
    """The losses of a repair of such files, by kind, compared with the whole study; None if the
    repair is refused.
    """
    parts = meta, trials, results, plan = content(whole)
    for raw in files:
        (tmp_path / "study.db").write_bytes(raw)
        try:
            _, found = saved(tmp_path / "study.db", tmp_path)
        except StudyCorruptError:
            yield None
            continue
        assert found[0].items() <= meta.items() and found[2].items() <= results.items()
        assert all(c in trials for c in found[1]) and all(c in plan for c in found[3])
        yield [len(all_of) - len(kept) for all_of, kept in zip(parts, found)]


def test_a_healthy_file_is_saved_whole(whole, tmp_path):
    report, found = saved(whole, tmp_path)
    assert found == content(whole)
    assert report == RepairResult((3, 3), (60, 60), (20, 20), 58)
    assert str(report).split("\n") == [
        "options  3 of 3",
        "trials   60 of 60",
        "chunks   20 of 20 of the frozen plan",
        "results  of 58 of the 60 trials; trials without a result train when the search resumes",
    ]


def test_a_lost_page_takes_the_rows_below_it_and_no_others(whole, tmp_path):
    raw = whole.read_bytes()
    parts = content(whole)
    pages = range(0, len(raw), 4096)
    first, *lost = losses(
        whole, tmp_path, (raw[:page] + bytes(4096) + raw[page + 4096 :] for page in pages)
    )
    # The first page leads to all tables, the root of a table to all its rows, any other page to its
    # own.
    assert first is None and None not in lost
    wholly = [
        sum(table[kind] == len(all_of) for table in lost) for kind, all_of in enumerate(parts)
    ]
    assert wholly == [1, 1, 2, 2]  # without its candidates no result and no chunk is kept
    assert sum(0 < results_lost < 25 for _, _, results_lost, _ in lost) > 10


def test_a_flipped_bit_never_changes_a_row_and_a_cut_leaves_what_is_before(whole, tmp_path):
    raw = whole.read_bytes()
    draw = random.Random(0)
    files = []
    for _ in range(30):
        files.append(bytearray(raw))
        files[-1][draw.randrange(100, len(raw))] ^= 1 << draw.randrange(8)
    *lost, cut = losses(whole, tmp_path, [*files, raw[: len(raw) // 2]])
    # else the page that leads to all others
    assert sum(one is not None and one[2] <= 1 for one in lost) > 24
    assert cut[0] == 0 and 0 < cut[2] < 48


def test_pages_in_a_circle_and_records_longer_than_the_file_are_left(tmp_path):
    path = tmp_path / "study.db"
    make_study(path, 3, [result(n, epochs=2000 if n == 1 else 3) for n in range(3)], META)
    raw = bytearray(path.read_bytes())
    inside = raw.index(result(1, epochs=2000).curve[1000:1100].tobytes()) // 4096
    # The next page of the curve is this one.
    raw[inside * 4096 : inside * 4096 + 4] = (inside + 1).to_bytes(4, "big")
    path.write_bytes(raw)
    assert repair(path, tmp_path / "new.db").finished == 2
    with closing(_connect(path)) as connection:
        assert connection.getlimit(sqlite3.SQLITE_LIMIT_LENGTH) == len(raw)


def test_rows_that_are_only_in_the_log_are_saved(tmp_path):
    (tmp_path / "copy").mkdir()
    with Store.create(tmp_path / "study.db", META) as store:
        store.add_trials(candidates(range(5)))
        store.finish([result(n, epochs=700) for n in range(5)])
        for file in tmp_path.glob("study.db*"):
            shutil.copy(file, tmp_path / "copy")
    path = tmp_path / "copy" / "study.db"
    path.write_bytes(b"\xff" * 200 + path.read_bytes()[200:])
    with pytest.raises(StudyCorruptError):
        Store.open(path)
    report, found = saved(path, tmp_path)
    assert report.trials == (5, 5) and report.finished == 5
    assert found[2] == {n: bits(result(n, epochs=700)) for n in range(5)}


def test_what_holds_nothing_is_refused_and_an_existing_file_too(whole, tmp_path):
    (tmp_path / "text").write_text("number,score\n" * 500)
    words = "text' holds no readable, undamaged row of a study. Check the path"
    for name, error, said in (
        ("text", StudyCorruptError, words),
        ("none", FileNotFoundError, "no study file"),
    ):
        with pytest.raises(error, match=said):
            repair(tmp_path / name, tmp_path / "new.db")
    assert not (tmp_path / "new.db").exists()
    with refused("^repair\\(out='.*text'\\) exists already"):
        repair(whole, tmp_path / "text")
    with refused(
        "^repair\\(out='.*new.db'\\) must be in an existing folder, but '.*none' does not exist"
    ):
        repair(whole, tmp_path / "none" / "new.db")


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A folder with a table and the study of a search through it."""
    folder = tmp_path_factory.mktemp("searched")
    write_table(folder / "bugs.csv", kind=kinds())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run("tune", "bugs.csv", "--target", "kind", *FAST)[0] == 0
    return folder


@pytest.fixture
def folder(searched, tmp_path, monkeypatch):
    """A copy of it, in which commands run."""
    monkeypatch.chdir(shutil.copytree(searched, tmp_path / "copy"))
    return tmp_path / "copy"


def test_the_command_that_the_error_names_repairs_and_the_search_continues(folder):
    path = folder / "gputune-out" / "study.db"
    before = gputune.Study.open(path).trials
    change(path, "UPDATE results SET best_epoch = 9 WHERE number = 1")
    code, _, err = run("trials", "gputune-out")
    assert code == 2
    command = re.search(r"gputune (repair .*) --out NEW\.db$", err.strip())[1]
    code, out, err = run(*command.split(), "--out", "new.db")
    assert (code, err) == (0, "") and "results  of 2 of the 3 trials" in out
    assert out.endswith("\n\nResume: gputune resume new.db\n")
    path.unlink()
    (folder / "new.db").rename(path)
    assert run("tune", "bugs.csv", "--target", "kind", *FAST)[0] == 0
    after = gputune.Study.open(path).trials
    assert [t.fold_scores for t in after] == [t.fold_scores for t in before]


def test_a_report_that_needs_a_missing_table_says_so_in_words_of_the_command_line(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "bugs.csv", kind=kinds())
    assert run("tune", "bugs.csv", "--target", "kind", *FAST)[0] == 0
    (tmp_path / "bugs.csv").unlink()
    code, _, err = run("report", "gputune-out", "--importance")
    assert code == 2 and re.search(
        r"report cannot read '.*bugs.csv' again, because the file is gone\. Put the file back\.",
        err,
    )


def test_a_repaired_search_of_rows_in_memory_names_the_call_that_resumes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    X = np.random.default_rng(0).normal(size=(20, 2))
    gputune.tune("mlp", X, X[:, 0], n_trials=1, max_epochs=1, cv=2, study="old.db", verbose=0)
    code, out, _ = run("repair", "old.db", "--out", "new.db")
    assert code == 0 and out.endswith(
        "\n\nRepeating the call of gputune.tune with study='new.db' continues the search.\n"
    )


@pytest.mark.parametrize("key", ["arguments", "task", ""])
def test_a_lost_option_is_counted_and_said_where_the_search_would_continue(folder, key):
    change(folder / "gputune-out" / "study.db", "DELETE FROM meta WHERE key = ?", (key,))
    code, out, _ = run("repair", "gputune-out", "--out", "new.db")
    assert code == 0 and ("Options are lost" in out) == (key != "") == ("Resume" not in out)
    saved, known = map(int, re.search(r"options  (\d+) of (\d+)", out).groups())
    assert known - saved == (key != "")
    assert len(gputune.Study.open("new.db").trials) == 3
    code, _, err = run("resume", "new.db")
    assert code == 0 or (code == 2 and "has lost" in err and "Traceback" not in err)


@pytest.mark.parametrize(
    "commands", [["report", "status"], pytest.param(["trials", "best"], marks=pytest.mark.long)]
)
def test_every_option_can_be_lost_without_a_traceback(folder, commands):
    path = folder / "gputune-out" / "study.db"
    for key in ["", *gputune.Study.open(path).meta]:
        shutil.copy(path, "lost.db")
        change("lost.db", "DELETE FROM meta WHERE key = ?", (key,))
        for command in commands:
            code, _, err = run(command, "lost.db")
            assert code == 0 or (code == 2 and f"has lost the option '{key}'" in err), (
                key,
                command,
                err,
            )


def test_a_backup_while_a_writer_runs_is_a_prefix_of_its_commits(tmp_path):
    path = make_study(tmp_path / "study.db", 300, meta=META)
    ended = threading.Event()

    def write():
        with Store.open(path) as store:
            for n in range(300):
                store.finish([result(n)])
        ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    counts = []
    while not ended.is_set() or not counts:
        copy = tmp_path / f"copy{len(counts)}.db"
        gputune.Study.open(path).backup(copy)
        meta, trials, results, _ = content(copy)
        assert meta == META and len(trials) == 300
        assert results == {n: bits(result(n)) for n in range(len(results))}
        counts.append(len(results))
    writer.join()
    assert counts == sorted(counts)


def test_a_backup_needs_a_file_and_a_free_path_and_has_no_claims(tmp_path):
    change(
        make_study(tmp_path / "study.db"),
        "INSERT INTO claims VALUES (0, 'study.db-0000000000000000.lock')",
    )
    study = gputune.Study.open(tmp_path / "study.db")
    study.backup(tmp_path / "copy.db")
    with closing(sqlite3.connect(tmp_path / "copy.db")) as raw:
        assert raw.execute("SELECT count(*) FROM claims").fetchone() == (0,)
    with refused(r"copy\.db'\) exists already"):
        study.backup(tmp_path / "copy.db")
    with refused(
        "must be in an existing folder, but '.*none' does not exist. Create the folder first"
    ):
        study.backup(tmp_path / "none" / "copy.db")
    with refused(r"backup\(\) copies the file of a study, but this study is in memory"):
        gputune.Study(meta={}, trials=(), curves=np.empty((0, 0, 0))).backup(tmp_path / "other.db")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy.db", "study.db"]
