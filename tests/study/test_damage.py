"""A study file that was cut or changed gives what was committed, or the clear error: never a wrong value."""

import re
import shutil

import numpy as np
import pytest

from gputune.errors import StudyCorruptError, StudyVersionError
from gputune.study.store import Store
from study_rows import bits, candidates, result

META = {"model": "mlp", "seed": 0}
CLEAR = r"study\.db' (is damaged: .* restore the file from a copy|is not a gputune study: |has file format )"


def content(path):
    """Everything a study holds, in a form that compares bits; or the clear error's type."""
    try:
        with Store.open(path) as store:
            rows = store.trials()
            return store.meta, [candidate for candidate, _ in rows], [r and bits(r) for _, r in rows]
    except (StudyCorruptError, StudyVersionError) as error:
        assert re.search(CLEAR, str(error)), error
        return type(error)


def fill(store, commits):
    for n in range(commits):
        store.add_trials(candidates([n]))
        store.finish([result(n, epochs=20)])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "study.db"


def test_the_file_cut_at_every_sector(path):
    with Store.create(path, META) as store:
        fill(store, 3)
    whole, found = path.read_bytes(), content(path)
    assert found[1] == candidates(range(3))
    for end in range(0, len(whole), 512):
        path.write_bytes(whole[:end])
        assert content(path) in (StudyCorruptError, found), end
    path.write_bytes(whole)
    assert content(path) == found


def test_the_log_cut_at_every_sector_gives_the_commits_before(path, tmp_path):
    prefixes, copies = [], tmp_path / "copy"
    copies.mkdir()
    copy = copies / "study.db"
    with Store.create(path, META) as store:
        for n in range(3):
            prefixes.append((META, candidates(range(n)), [bits(result(k, epochs=20)) for k in range(n)]))
            store.add_trials(candidates([n]))
            waiting = prefixes[-1][2] + [None]
            prefixes.append((META, candidates(range(n + 1)), waiting))
            store.finish([result(n, epochs=20)])
        prefixes.append((META, candidates(range(3)), [bits(result(k, epochs=20)) for k in range(3)]))
        log = path.with_name("study.db-wal").read_bytes()
        base = path.read_bytes()
    seen = []
    for end in [*range(0, len(log), 512), len(log)]:
        shutil.rmtree(copies)
        copies.mkdir()
        copy.write_bytes(base)
        copy.with_name("study.db-wal").write_bytes(log[:end])
        seen.append(prefixes.index(content(copy)))
    assert seen == sorted(seen) and set(seen) == set(range(len(prefixes)))


@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_bit_is_found_or_harmless(path, seed):
    with Store.create(path, META) as store:
        fill(store, 3)
    whole, found = path.read_bytes(), content(path)
    rng = np.random.default_rng(seed)
    errors = 0
    for position, bit in zip(rng.integers(0, len(whole), 100), rng.integers(0, 8, 100)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << bit
        path.write_bytes(flipped)
        for rest in path.parent.glob("study.db-*"):
            rest.unlink()
        got = content(path)
        errors += isinstance(got, type)
        assert isinstance(got, type) or got == found, (position, bit)
    assert errors > 0
