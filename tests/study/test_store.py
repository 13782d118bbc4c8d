"""The store returns the stored data, bit for bit, and each trial has at most one result."""

import math
import os
import pickle
import re
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from gputune.ground.errors import StudyCorruptError, StudyVersionError
from gputune.ground.types import Outputs
from gputune.study import database
from gputune.study.repair import repair
from gputune.study.rows import read_rows
from gputune.study.store import Candidate, PlannedChunk, Store
from refused import refused
from study_rows import bits, candidates, change, make_study, result

META = {
    "model": "mlp",
    "seed": 0,
    "weights": {0: 1.0, 1: math.inf},
    "rows": np.arange(6).reshape(2, 3),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "study.db"


@pytest.fixture
def store(path):
    """A study of five trials without a result."""
    with Store.create(path, {"a": 1, "b": 2}) as store:
        store.add_trials(candidates(range(5)))
        yield store


def damaged(words):
    return pytest.raises(StudyCorruptError, match=words)


def test_everything_comes_back_bit_for_bit_in_order_of_number(path):
    odd = result(
        1, curve=np.array([[math.nan, -0.0], [5e-324, math.inf]]), state="failed", score=math.nan
    )
    detail = {"slope": {"lr": [[0.1, math.inf]]}, "usable": False, "rung": 3}
    point = Candidate(3, {"lr": [0.1, 0.2]}, (0, 12))
    with Store.create(path, META) as store:
        store.add_trials(candidates([2, 0]))
        store.add_trials([point, *candidates([1])])
        store.finish([odd, result(0, detail=detail), result(3, state="pruned")])
    with Store.open(str(path)) as store:
        meta = store.meta
        rows = store.trials()
    assert list(meta) == list(META) and meta["weights"] == META["weights"]
    np.testing.assert_array_equal(meta["rows"], META["rows"])
    assert [candidate for candidate, _ in rows] == [*candidates([0, 1, 2]), point]
    wanted = [bits(result(0)), bits(odd), None, bits(result(3, state="pruned"))]
    assert [found and bits(found) for _, found in rows] == wanted
    assert rows[0][1].detail == detail and rows[3][1].detail == {}


def test_rows_of_unlike_length_are_read_together_and_the_damaged_one_is_named(path):
    written = [result(n, epochs=1 + n % 3, folds=1 + (n == 7)) for n in range(150)]
    make_study(path, 150, written)
    with Store.open(path) as store:
        assert [bits(found) for found in store.results().values()] == list(map(bits, written))
    change(path, "UPDATE results SET best_epoch = 9 WHERE number = 137")
    with Store.open(path) as store, damaged("result of trial 137 does not fit"):
        store.results()


def test_a_result_is_never_replaced_and_a_chunk_is_written_whole_or_not_at_all(store):
    store.finish([result(1)])
    with refused(r"study\.db': trial 1 exists already and is never replaced, so nothing"):
        store.finish([result(0), result(1, score=9.0), result(2)])
    with refused("trial 7 was never added, so nothing was written"):
        store.finish([result(0), result(7)])
    assert {number: bits(found) for number, found in store.results().items()} == {
        1: bits(result(1))
    }
    store.finish([result(0), result(2)])  # the store goes on after an error
    assert list(store.results()) == [0, 1, 2]


def test_outputs_are_kept_of_the_best_trials_and_not_by_a_repair(store, path, monkeypatch):
    monkeypatch.setattr("gputune.ground.types.KEPT_BYTES", 3 * 4 * 6)
    outputs = {n: Outputs(n + 1, np.full((3, 2), n, dtype=np.float32)) for n in range(5)}
    assert store.outputs(range(5)) == {}
    for part in ([0, 1], [2, 3, 4]):
        scores = dict(zip(range(5), [0.1, 0.5, 0.1, 0.4, 0.1]))
        store.finish([result(n, score=scores[n]) for n in part], {n: outputs[n] for n in part})
    found = store.outputs(range(5))
    assert found.keys() == {1, 3, 4}
    assert all(one.epoch == n + 1 and (one.values == n).all() for n, one in found.items())
    repair(path, path.with_name("whole.db"))
    with Store.open(path.with_name("whole.db")) as whole:
        assert whole.outputs(range(5)) == {} and len(whole.trials()) == 5
    change(path, "UPDATE outputs SET epoch = 9 WHERE number = 3")
    with damaged("row of outputs of trial 3 does not fit"):
        store.outputs([3])


def test_a_result_that_contradicts_itself_is_refused():
    for changed, message in (
        ({"state": "running"}, r"Result\(state=...\) must be one of .*, got 'running'"),
        (
            {"fold_scores": (1.0,)},
            r"curve=...\) must be \(epochs, F\) .* got shape \(3, 2\) and 1 fold_scores",
        ),
        ({"fold_scores": ()}, "0 fold_scores in trial 4"),
        ({"curve": np.zeros(3)}, r"got shape \(3,\)"),
    ):
        with refused(message):
            result(4, **changed)


def test_settings_of_the_file_which_is_on_the_disk_before_it_has_its_name(
    path, durable, monkeypatch
):
    calls = []
    flush = database.flush
    monkeypatch.setattr(
        database, "flush", lambda place: calls.append((place.name, path.exists())) or flush(place)
    )
    with Store.create(path, {}) as store:
        assert calls == [("draft.db", False), (path.parent.name, True)]
        names = (
            "application_id user_version journal_mode synchronous busy_timeout foreign_keys "
            "trusted_schema"
        ).split()
        found = [store._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names]
        assert found == [int.from_bytes(b"gptu", "big"), 3, "wal", 2, 30_000, 1, 0]  # 2 is FULL
        strict = store._connection.execute(
            "SELECT name FROM pragma_table_list WHERE strict"
        ).fetchall()
        assert {name for (name,) in strict} == {"meta", "trials", "plan", "results", "claims"}


@pytest.mark.parametrize("what", ["folder removed", "folder moved", "file replaced"])
def test_a_study_that_is_not_in_its_place_takes_nothing_more(tmp_path, what):
    """A result would seem to be kept, in a file that no name leads to."""
    (folder := tmp_path / "study").mkdir()
    with Store.create(folder / "s.db", META) as store:
        store.add_trials(candidates(range(3)))
        store.finish([result(0)])
        if what == "folder removed":
            shutil.rmtree(folder)
        elif what == "folder moved":
            folder.rename(tmp_path / "elsewhere")
        else:
            make_study(tmp_path / "other.db").replace(folder / "s.db")
        with pytest.raises(
            OSError, match="was removed, moved or replaced during .* If it was moved, move it"
        ):
            store.finish([result(1)])
        if what == "folder moved":
            (tmp_path / "elsewhere").rename(folder)
            store.finish([result(1)])
            assert store.n_finished() == 2


def test_odd_file_names(tmp_path):
    names = ["a?b#c %41.db", "日本 'x'.db", "x;DROP TABLE meta", "-journal"]
    for name in names:
        make_study(tmp_path / name, meta={"a": 1})
        with Store.open(str(tmp_path / name)) as store:
            assert store.meta == {"a": 1}
    assert {entry.name for entry in tmp_path.iterdir()} == {*names}


def test_what_cannot_be_made_is_refused_and_leaves_nothing(path, monkeypatch):
    with refused(
        r"must be in an existing folder, but '.*missing' does not exist. Create the folder first"
    ):
        Store.create(path.parent / "missing" / "study.db", {})
    with refused(r"meta\['scoring'\] holds"):
        Store.create(path, {"scoring": print})
    assert not list(path.parent.iterdir())
    link = os.link
    # Another process makes the file while ours is filled.
    monkeypatch.setattr(
        database.os,
        "link",
        lambda draft, place: place.write_text("precious") and link(draft, place),
    )
    for _ in range(2):
        with refused(r"study='.*study\.db' exists already. Open it, or pass another path"):
            Store.create(path, {})
        assert path.read_text() == "precious" and len(list(path.parent.iterdir())) == 1
    path.unlink()
    # a file system without hard links
    monkeypatch.setattr(database.os, "link", Mock(side_effect=PermissionError))
    with Store.create(path, {"a": 1}) as store:
        assert store.meta == {"a": 1}


def test_a_file_system_without_shared_memory_gets_a_rollback_journal_and_a_warning(
    path, monkeypatch
):
    connect = sqlite3.connect
    # This VFS of SQLite locks by files and has no shared memory, as on many network file systems.
    monkeypatch.setattr(
        sqlite3, "connect", lambda at, **kw: connect(at + "&vfs=unix-dotfile", **kw)
    )
    with pytest.warns(
        UserWarning,
        match="does not support SQLite's write-ahead log, so gputune uses a rollback journal",
    ):
        store = Store.create(path, {})
    with store:
        assert store._connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        store.add_trials(candidates([0]))
        store.finish([result(0)])
        assert bits(store.trials()[0][1]) == bits(result(0))


@pytest.mark.parametrize("without_memory", [False, True])
def test_a_study_that_may_not_be_written_is_read(path, monkeypatch, without_memory):
    make_study(path, 1, meta={"a": 1})
    connect = database.connect
    before = path.read_bytes()
    monkeypatch.setattr(database.os, "access", lambda *_: False)
    if without_memory:  # whose files cannot be made
        connections = {
            "ro": lambda p: connect(p.with_name("none"), "ro"),
            "ro&immutable=1": lambda p: connect(p, "ro"),
        }
        monkeypatch.setattr(database, "connect", lambda p, mode: connections[mode](p))
    with Store.open(path) as store:
        assert store.meta == {"a": 1} and len(store.trials()) == 1
        with pytest.raises(PermissionError, match=r"study\.db' may not be written"):
            store.finish([result(0)])
    assert path.read_bytes() == before


FULL = """
import resource, signal, warnings
from gputune.study.store import Candidate, Store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    with Store.open("study.db") as store:
        print(store.meta, len(store.trials()), *[w.message for w in said], sep="\\n")
        try:
            store.add_trials([Candidate(1, {}, "random")])
        except OSError as error:
            print(error)
"""


def test_a_closed_study_is_read_where_nothing_can_be_written(path):
    make_study(path, 1, meta={"a": 1})
    command = [sys.executable, "-P", "-c", FULL]
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=True)
    meta, trials, warning, error = done.stdout.strip().split("\n")
    assert (meta, trials) == ("{'a': 1}", "1")
    assert warning == (
        "The study is opened read-only: study 'study.db': disk I/O error; check the disk, the permissions of "
        "its folder and limits on files. Free disk space before you resume its search."
    )
    assert "study 'study.db' may not be written" in error
    with Store.open(path) as store:
        store.add_trials(candidates([1]))


def test_an_option_that_is_lost_is_named(store, path):
    meta = store.meta
    change(path, "DELETE FROM meta WHERE key = 'b'")
    held = store.meta
    assert held == {"a": 1} and held.get("b") is None and meta == {"a": 1, "b": 2}
    with damaged(r"study\.db' has lost the option 'b' of its search\. Its trials can be"):
        held["b"]
    assert pickle.loads(pickle.dumps(held)) == held


def test_a_lock_that_is_held_too_long_another_thread_and_a_closed_store_get_an_error_with_a_remedy(
    path, store, monkeypatch
):
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    with Store.open(path) as second:
        store._connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(
            TimeoutError,
            match=r"another process has held its lock for 0\.05 s; wait for it or end it",
        ):
            second.add_trials(candidates([9]))
        store._connection.execute("ROLLBACK")
        second.add_trials(candidates([9]))
    with ThreadPoolExecutor(1) as pool:
        errors = [pool.submit(store.n_finished).exception()]
    store.close()
    store.close()
    with pytest.raises(ValueError) as caught:
        store.n_finished()
    for error in (*errors, caught.value):
        assert type(error) is ValueError and re.search(
            "cannot be used here: .* Open it again", str(error)
        )


def of_another_program(path):
    path.unlink()
    change(path, "CREATE TABLE studies (x)")


def as_folder(path, inside="../whole.db"):
    path.rename(path.with_name("whole.db"))
    path.mkdir()
    path.with_name("whole.db").rename(path / inside)


NO_FILE = FileNotFoundError
CORRUPT = StudyCorruptError
VERSION = StudyVersionError
OTHER_TABLES = "is damaged: its tables are not those of a study"
BEFORE = "of a gputune before its first release"


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (os.unlink, NO_FILE, r"there is no study file; check the path: '.*study\.db'"),
        (as_folder, NO_FILE, "no study file; this is a folder, give the file in it: "),
        (lambda p: as_folder(p, "s.db"), NO_FILE, r"this is a folder, give .*/s\.db: "),
        (
            lambda p: p.write_bytes(b""),
            CORRUPT,
            r"study\.db' is not .*: it is empty. Remove it, or check the path",
        ),
        (
            lambda p: p.write_bytes(b"number,score\n1,2\n" * 20),
            CORRUPT,
            r"study\.db' is not a gputune study: it is not an SQLite file\. Check the path\..* try gputune repair",
        ),
        (of_another_program, CORRUPT, "an SQLite file of another program. Check the path"),
        (
            lambda p: p.with_name("study.db-wal").mkdir(),
            OSError,
            r"study\.db': unable to open database file; check the disk, the permissions",
        ),
        (
            lambda p: p.write_bytes(p.read_bytes().replace(b"seconds B", b"seconds\xa0B")),
            CORRUPT,
            OTHER_TABLES,
        ),
        ("UPDATE results SET number = 5", CORRUPT, "is damaged: 1 results belong to no trial"),
        (
            "PRAGMA user_version = 4",
            VERSION,
            "format 4, but this gputune reads formats up to 3. Upgrade gputune",
        ),
        *((f"PRAGMA user_version = {n}", VERSION, f"format {n}, {BEFORE}") for n in (1, 2)),
        ("PRAGMA user_version = 0", CORRUPT, OTHER_TABLES),
        ("DROP TABLE results", CORRUPT, OTHER_TABLES),
        ("CREATE VIEW v AS SELECT 1", CORRUPT, OTHER_TABLES),
        (
            "CREATE TRIGGER t AFTER INSERT ON results BEGIN DELETE FROM trials; END",
            CORRUPT,
            OTHER_TABLES,
        ),
    ],
)
def test_what_is_no_study_of_this_version_is_refused(path, spoil, error, message):
    make_study(path, 2, [result(0)])
    change(path, spoil) if isinstance(spoil, str) else spoil(path)
    with pytest.raises(error, match=message):
        Store.open(path)


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("UPDATE meta SET value = '1' WHERE key = 'seed'", "option 'seed'"),
        ("UPDATE trials SET params = '{}'", "trial 0"),
        ("UPDATE trials SET origin = 'include'", "trial 0"),
        ("UPDATE results SET score = zeroblob(8)", "the result of trial 0"),
        ("UPDATE results SET best_epoch = 2", "the result of trial 0"),
        ("UPDATE results SET curve = substr(curve, 1, 16)", "the result of trial 0"),
        ("UPDATE results SET number = 1", "the result of trial 1"),
    ],
)
@pytest.mark.parametrize("read", [Store.trials])
def test_a_changed_value_is_never_returned(path, statement, what, read):
    make_study(path, 2, [result(0)], META)
    change(path, statement)
    with (
        Store.open(path) as store,
        damaged(f"is damaged: {what} does not fit its checksum.* Restore the file"),
    ):
        assert store.meta
        read(store)


def test_what_was_read_once_is_not_read_again(path, monkeypatch):
    with Store.create(path, META) as store, Store.open(path) as other:
        other.add_trials(candidates(range(4)))
        other.finish([result(1), result(2, state="stopped")])
        other.add_chunks([PlannedChunk(0, 0, (0, 1), 1)])
        assert [found and found.number for _, found in store.trials()] == [None, 1, 2, None]
        assert store.plan() == [PlannedChunk(0, 0, (0, 1), 1)]
        other.finish([result(0), result(2)])
        other.add_trials(candidates(range(4, 6)))
        other.add_chunks([PlannedChunk(7, 0, (2, 3), 1)])
        read = []
        monkeypatch.setattr(
            "gputune.study.store.read_rows",
            lambda make, rows: read.extend(row[0] for row in rows) or read_rows(make, rows),
        )
        assert [found and found.state for _, found in store.trials()] == 3 * ["complete"] + 3 * [
            None
        ]
        assert [chunk.number for chunk in store.plan()] == [0, 7]
    assert read == [4, 5, 0, 2, 7]


FORMAT_META = {"model": "mlp", "seed": 0, "classes": ["a", "b"], "limit": math.inf}
TRIALS = [*candidates(range(3)), Candidate(3, {"lr": [0.1, 0.2]}, (0, 1))]
PLAN = [PlannedChunk(0, 0, (2, 0), 1), PlannedChunk(1, 0, (1,), 2)]
RESULTS = [result(0), result(2, state="stopped", detail={"rung": 3})]


def write(path):
    """How the file of the present format was made; run it once when the format changes, and keep
    the old files."""
    with Store.create(path, FORMAT_META) as store:
        store.add_trials(TRIALS)
        store.add_chunks(PLAN)
        store.finish(RESULTS)


@pytest.mark.parametrize("name", ["format3.db"])
def test_the_file_that_an_earlier_version_wrote_opens_and_continues(tmp_path, name):
    path = tmp_path / name
    shutil.copy(Path(__file__).with_name(name), path)
    with Store.open(path) as store:
        assert store.meta == FORMAT_META and store.plan() == PLAN and store.candidates() == TRIALS
        found = store.results()
        assert {n: bits(r) for n, r in found.items()} == {r.number: bits(r) for r in RESULTS}
        assert found[2].detail == {"rung": 3} and np.isfinite(found[0].curve).all()
        store.finish([result(1), result(2)])
    assert repair(path, tmp_path / "repaired.db").finished == 3
