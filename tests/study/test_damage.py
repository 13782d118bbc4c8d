"""A cut or changed study file gives the committed data, or the clear error: never a wrong value."""

import os
import pickle
import re
import shutil
import sqlite3
import struct
from contextlib import suppress
from functools import partial

import numpy as np
import pytest

from command_line import run
from gputune.ground.errors import StudyCorruptError, StudyVersionError
from gputune.study import database
from gputune.study.claims import Claims
from gputune.study.ledger import open_ledger
from gputune.study.repair import repair
from gputune.study.rows import checksum
from gputune.study.store import PlannedChunk, Store
from study_rows import Canary, bits, candidates, change, content, record, result

META = {"model": "mlp", "seed": 0}
CLEAR = r"study\.db' (is damaged: .* Restore the file from a copy, or save|is not a gputune study: |has file format )"


def read(path):
    """The content of the study, or the clear error's type."""
    try:
        return content(path)
    except (StudyCorruptError, StudyVersionError) as error:
        assert re.search(CLEAR, str(error)), error
        return type(error)


def fill(store, trials):
    """Fill a study, commit by commit."""
    for n in range(trials):
        yield partial(store.add_trials, candidates([n]))
        yield partial(store.add_chunks, [PlannedChunk(n, 0, (n,), 1)])
        yield partial(store.finish, [result(n, epochs=20)])


def filled(path, trials, meta=META):
    """Make a study with this number of finished trials; return its bytes."""
    with Store.create(path, meta) as store:
        for commit in fill(store, trials):
            commit()
    return path.read_bytes()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "study.db"


def test_the_file_cut_at_every_sector(path):
    whole = filled(path, 3)
    found = read(path)
    assert found[1] == candidates(range(3))
    for end in range(0, len(whole), 512):
        path.write_bytes(whole[:end])
        assert read(path) in (StudyCorruptError, found), end
    path.write_bytes(whole)
    assert read(path) == found


def test_the_log_cut_at_every_sector_gives_the_commits_before(path, tmp_path):
    prefixes = []
    copy = tmp_path / "copy" / "study.db"
    with Store.create(path, META) as store:
        for commit in fill(store, 3):
            prefixes.append(read(path))
            commit()
        prefixes.append(read(path))
        assert prefixes[-1] == (
            META,
            candidates(range(3)),
            {n: bits(result(n, epochs=20)) for n in range(3)},
            [PlannedChunk(n, 0, (n,), 1) for n in range(3)],
        )
        log = path.with_name("study.db-wal").read_bytes()
        base = path.read_bytes()
    seen = []
    for end in [*range(0, len(log), 512), len(log)]:
        shutil.rmtree(copy.parent, ignore_errors=True)
        copy.parent.mkdir()
        copy.write_bytes(base)
        copy.with_name("study.db-wal").write_bytes(log[:end])
        seen.append(prefixes.index(read(copy)))
    assert seen == sorted(seen) and set(seen) == set(range(len(prefixes)))


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 10))]
)
def test_a_flipped_bit_is_found_or_harmless(path, seed):
    whole = filled(path, 3)
    found = read(path)
    got = []
    rng = np.random.default_rng(seed)
    # 1,000 in all
    for position, bit in zip(rng.integers(0, len(whole), 100), rng.integers(0, 8, 100)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << bit
        path.write_bytes(flipped)
        for rest in path.parent.glob("study.db-*"):
            rest.unlink()
        got.append(read(path))
        assert isinstance(got[-1], type) or got[-1] == found, (position, bit)
    assert any(isinstance(one, type) for one in got)


def test_a_state_that_is_none_is_damage(path):
    path.write_bytes(filled(path, 1).replace(b"complete", b"Complete"))
    with Store.open(path) as store, pytest.raises(StudyCorruptError, match="the result of trial 0"):
        store.results()


def test_a_journal_next_to_a_study_that_names_another_file_is_refused(path):
    Store.create(path, META).close()
    raw = sqlite3.connect(path)
    raw.execute("PRAGMA journal_mode = DELETE")
    raw.close()
    victim = path.with_name("thesis.txt")
    victim.write_text("mine")
    name = str(victim).encode()
    magic = database.JOURNAL_MAGIC
    pages = path.stat().st_size // 4096
    head = (magic + struct.pack(">IIIII", 0, 0, pages, 512, 4096)).ljust(512, b"\0")
    tail = struct.pack(">I", 2**18 + 1) + name + struct.pack(">II", len(name), sum(name)) + magic
    path.with_name("study.db-journal").write_bytes(head + tail)
    with pytest.raises(
        StudyCorruptError, match=r"study\.db-journal' belongs to another file; remove it"
    ):
        Store.open(path)
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("table", ["meta", "trials", "plan", "results", "claims"])
def test_nothing_of_a_study_is_unpickled(path, tmp_path, table):
    canary = tmp_path / "sang"
    payload = pickle.dumps(Canary(canary))
    filled(path, 1, {**META, "method": "random"})
    raw = sqlite3.connect(path)
    raw.execute("INSERT INTO claims VALUES (0, 'x')")
    columns = {
        "meta": "key value",
        "trials": "params origin",
        "plan": "trials facts",
        "claims": "lock",
    }
    columns["results"] = "state score fold_scores seconds curve detail"
    for column in columns[table].split():
        blob = raw.execute(f"SELECT typeof({column}) FROM {table}").fetchone() == ("blob",)
        value = payload if blob else payload.decode("latin-1")
        first = f"WHERE rowid IN (SELECT rowid FROM {table} LIMIT 1)"
        raw.execute(f"UPDATE {table} SET {column} = ? {first}", (value,))
        if table != "claims":
            (row,) = raw.execute(f"SELECT * FROM {table} {first}")
            raw.execute(f"UPDATE {table} SET checksum = ? {first}", (checksum(*row[:-1]),))
        raw.commit()
        read(path)
        with Claims(path) as claims:
            claims.take(PlannedChunk(0, 0, (0,), 1))
        with suppress(StudyCorruptError):
            repair(path, tmp_path / f"{column}.db")
        run("trials", path)
        run("resume", path)
    raw.close()
    assert not canary.exists()
    pickle.loads(payload).close()
    assert canary.exists()  # it would have sung


@pytest.mark.parametrize("how", ["overwritten", "cut", "rows removed", "removed"])
def test_a_file_that_is_damaged_while_a_search_writes_to_it_is_noticed_at_the_end(path, how):
    with Store.create(path, SEARCH.to_json()) as store:
        store.add_trials(candidates(range(2)))
    error = FileNotFoundError if how == "removed" else StudyCorruptError
    with (
        pytest.raises(error, match=r"study\.db' is damaged: |no study file"),
        open_ledger(path, SEARCH) as ledger,
    ):
        ledger.finish([result(0), result(1)])
        match how:
            case "overwritten":
                with path.open("r+b") as file:
                    file.seek(path.read_bytes().index(b'"note"'))
                    file.write(b"\xff" * 200)
            case "cut":
                os.truncate(path, 4096)
            case "rows removed":
                change(path, "DELETE FROM results WHERE number = 1")
            case "removed":
                path.unlink()


SEARCH = record(notes=["note" for _ in range(1000)])
