"""Several processes on one study: each trial is trained once, and the work of a dead process is
taken over.
"""

import json
import os
import platform
import re
import signal
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from sklearn.datasets import load_iris

import gputune
from gputune.engine.stop import Stop
from gputune.ground.types import Outputs
from gputune.study import claims as claims_file
from gputune.study.claims import Claims
from gputune.study.ledger import Ledger, open_ledger
from gputune.study.store import PlannedChunk, Store
from gputune.tuning.options import make_options
from gputune.tuning.progress import Progress
from gputune.tuning.session import Session, wait_for_others
from moments import at_call, at_finish
from refused import refused
from study_processes import done, finish, start, table
from study_rows import candidates, change, record, result

CHUNKS = [PlannedChunk(0, 0, (0, 1), 1), PlannedChunk(1, 0, (2,), 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The study of one process that nothing disturbed."""
    path = tmp_path_factory.mktemp("alone") / "study.db"
    finish(start(40, study=str(path)))
    return table(path)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "study.db"
    with Store.create(path, {}) as store:
        store.add_trials(candidates(range(3)))
        store.add_chunks(CHUNKS)
    return path


@pytest.fixture
def mine(path):
    with Claims(path) as mine:
        yield mine


@pytest.fixture
def other(path):
    with Claims(path) as other:
        yield other


def left_over(folder):
    return [entry.name for entry in folder.iterdir() if entry.name != "study.db"]


def foreign(path, chunk=0, **owner):
    """Claim a chunk like a process of another host, because the locks of other hosts do not work
    here.
    """
    lock = path.with_name(f"study.db-{'0' * 16}.lock")
    lock.write_text(json.dumps({"host": "far", "boot": "another", "pid": 7, **owner}))
    change(path, "INSERT INTO claims VALUES (?, ?)", (chunk, lock.name))
    return lock


def test_four_processes_share_a_search(tmp_path, alone):
    path = tmp_path / "study.db"
    processes = [start(40, study=str(path)) for _ in range(4)]
    # each returns the whole study
    assert [finish(process) for process in processes] == ["40 40\n"] * 4
    assert table(path) == alone
    assert left_over(tmp_path) == []


def test_what_a_killed_process_had_is_trained_by_another(tmp_path, alone):
    path = tmp_path / "study.db"
    # It has a third chunk by then, which it keeps for as long as it lives.
    holds = at_finish(3, "print('holds', flush=True) or signal.pause()", before=True)
    first = start(12, first=holds, study=str(path))
    assert first.stdout.readline() == "holds\n"
    second = start(12, study=str(path), verbose=1)
    said = iter(second.stderr.readline, "")
    assert any(f"waiting for 1 trial of process {first.pid} on " in line for line in said)
    assert done(path) == 11 and second.poll() is None
    first.kill()
    first.communicate()
    assert second.communicate()[0] == "12 12\n" and second.returncode == 0
    assert [row[:5] for row in table(path)] == [row[:5] for row in alone[:12]]
    assert left_over(tmp_path) == []


def test_a_claim_is_one_processs_by_a_link_too_until_it_is_closed_and_a_finished_chunk_is_nobodys(
    path, mine, other
):
    with Store.open(path) as store:
        store.finish([result(0), result(1, state="stopped")])
        assert mine.take(CHUNKS[0]) and mine.take(CHUNKS[0]) and mine.holder(CHUNKS[0]) is None
        assert not other.take(CHUNKS[0]) and other.take(CHUNKS[1])
        assert other.holder(CHUNKS[0]).pid == os.getpid()
        mine.close()
        assert other.holder(CHUNKS[0]) is None and other.take(CHUNKS[0])
        store.finish([result(1)])
        assert not other.take(CHUNKS[0])
    link = path.with_name("link.db")
    link.symlink_to(path)
    with Claims(link) as third:
        assert not third.take(CHUNKS[1])
    other.close()
    assert left_over(path.parent) == ["link.db"]


def test_a_process_says_how_far_it_is_for_as_long_as_it_lives(path, mine, other):
    said = {"done": 3, "of": 9, "unit": "trial-epochs", "best": 0.5, "left": None}
    mine.show(said)  # it has no lock file yet
    assert other.shown() == []
    assert mine.take(CHUNKS[0])
    mine.show(said)
    ((owner, heard),) = other.shown()
    assert (owner.pid, heard) == (os.getpid(), said)
    for broken in ("", '{"done": "3"}'):
        next(path.parent.glob("*.progress")).write_text(broken)
        assert other.shown() == []
    mine.close()
    dead = foreign(path, host=platform.node(), boot=claims_file.boot(), pid=2**22 + 1)
    dead.with_suffix(".progress").write_text("{}")
    assert other.shown() == [] and left_over(path.parent) == []


@pytest.mark.parametrize("kind", ["absolute", "relative", "name", "pipe", "link", "folder"])
def test_a_claim_names_a_lock_file_of_its_study_or_is_void(path, kind):
    victim = path.with_name("thesis.txt")
    victim.write_text("mine")
    lock = f"study.db-{16 * '0'}.lock"
    names = {
        "absolute": str(victim),
        "relative": f"../{path.parent.name}/thesis.txt",
        "name": "thesis.txt",
    }
    place = path.with_name(lock)
    make = {"pipe": os.mkfifo, "link": lambda place: place.symlink_to(victim), "folder": os.mkdir}
    make.get(kind, lambda place: None)(place)
    change(path, "INSERT INTO claims VALUES (0, ?), (-1, ?)", 2 * (names.get(kind, lock),))
    with Claims(path) as claims:
        assert (
            claims.holder(CHUNKS[0]) is None
            and claims.take(CHUNKS[0])
            and claims.take_setup() is None
        )
    assert victim.read_text() == "mine" and os.path.lexists(place) == (kind in make)


def test_one_process_at_a_time_adds_to_the_plan_and_what_it_has_planned_is_planned_no_more(
    path, mine, other
):
    assert mine.take_setup() is None and other.take_setup().pid == os.getpid()
    mine.leave_setup()
    assert other.take_setup() is None
    other.leave_setup()
    with Store.open(path) as store:
        ledger = Ledger(store, mine)
        store.add_chunks([PlannedChunk(2, 1, (0, 1, 2), 1)])
        assert ledger.chunks(ledger.candidates, 1, lambda left: pytest.fail("cut twice")) == [
            PlannedChunk(2, 1, (0, 1, 2), 1)
        ]


RECORD = record()


@pytest.mark.parametrize("method", ["halving", "hypergradient"])
def test_a_search_that_one_process_decides_refuses_a_second_one_before_it_trains(tmp_path, method):
    with (
        open_ledger(tmp_path / "s.db", RECORD) as ledger,
        open_ledger(tmp_path / "s.db", RECORD) as second,
    ):
        ledger.claim_search(method)
        words = rf"works on this .* method='{method}' .* Wait for it, or end it\.$"
        with refused(rf"process {os.getpid()} on '.*' {words}"):
            second.claim_search(method)


def test_a_claim_of_another_host_is_respected_until_its_lock_file_is_removed(path, mine):
    lock = foreign(path)
    assert not mine.take(CHUNKS[0]) and mine.take(CHUNKS[1])
    assert str(mine.holder(CHUNKS[0])) == "process 7 on 'far'" and lock.exists()
    lock.unlink()
    assert mine.take(CHUNKS[0])
    lock = foreign(path, claims_file.SEARCH)
    with refused(rf"process 7 on 'far' .* no longer exists, remove '.*{lock.name}'"):
        mine.take_search("halving")


def test_a_process_that_waits_to_plan_says_for_whom_until_its_time_is_over(
    tmp_path, capsys, monkeypatch
):
    X, y = load_iris(return_X_y=True)
    call = {
        "include_default": False,
        "max_epochs": 1,
        "cv": 2,
        "workers": 1,
        "study": tmp_path / "study.db",
    }
    gputune.tune("mlp", X, y, n_trials=1, verbose=0, **call)
    lock = foreign(tmp_path / "study.db", claims_file.SETUP)
    monkeypatch.setattr("gputune.study.ledger._PATIENCE", -1)
    words = (
        f"process 7 on 'far' is adding trials to the study '{tmp_path / 'study.db'}', and this "
        "process waits for it. Wait for that process, or end it. If that process no longer "
        f"exists, remove '{lock}'."
    )
    with pytest.raises(TimeoutError, match=re.escape(f"the time is over; {words}")):
        gputune.tune("mlp", X, y, n_trials=2, verbose=1, timeout=1e-9, **call)
    assert f"{words}\n" in capsys.readouterr().err
    lock.unlink()
    assert len(gputune.tune("mlp", X, y, n_trials=2, verbose=0, **call).trials) == 2


def test_ctrl_c_ends_the_wait_for_a_plan(path, mine, monkeypatch):
    monkeypatch.setattr("gputune.study.ledger._PATIENCE", -1)
    foreign(path, claims_file.SETUP)
    stop = Stop()
    with Store.open(path) as store:
        ledger = Ledger(store, mine)
        ledger.on_wait = Session(ledger, make_options(), Progress(0), stop)._wait
        at_call(ledger, "on_wait", 2, stop.ask, patch=monkeypatch.setattr)
        with pytest.raises(KeyboardInterrupt), ledger.exclusive_setup():
            pass


def test_who_trains_what_is_waited_for_is_said(path, mine, other):
    lock = foreign(path)
    with Store.open(path) as store:
        ledger = Ledger(store, mine)
        remedy = (
            f"Wait for that process, or end it. If that process no longer exists, remove '{lock}'."
        )
        assert ledger.owners_of(CHUNKS) == ("process 7 on 'far'", remedy)
        other.take(CHUNKS[1])
        names = ["process 7 on 'far'", f"process {os.getpid()} on '{platform.node()}'"]
        assert ledger.owners_of(CHUNKS) == (", ".join(sorted(names)), remedy)
        assert ledger.owners_of(CHUNKS[1:])[1] == ""
        other.close()
        said = []
        progress = SimpleNamespace(say=lambda text, once: said.append(text))
        session = SimpleNamespace(ledger=ledger, progress=progress, is_over=lambda: True)
        wait_for_others(session, CHUNKS)
        assert said == [f"waiting for 3 trials of process 7 on 'far'. {remedy}"]
        lock.unlink()
        assert ledger.owners_of(CHUNKS) == ("another process", "")
        wait_for_others(session, CHUNKS[1:])
        assert said[1:] == ["waiting for 1 trial of another process."]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # torch's threads, all asleep
def test_a_forked_child_does_not_keep_what_its_dead_parent_had(path, mine):
    """The lock of the parent is gone with it, although the child inherited the open file."""
    ready = os.pipe()
    done = os.pipe()
    if (child := os.fork()) == 0:
        claims = Claims(path)
        claims.take(CHUNKS[0])
        if os.fork() == 0:
            os.read(done[0], 1)
            os._exit(0)
        os.write(ready[1], b"x")
        os.kill(os.getpid(), signal.SIGKILL)
    os.read(ready[0], 1)
    os.waitpid(child, 0)
    try:
        assert mine.take(CHUNKS[0])
    finally:
        os.write(done[1], b"x")


def test_an_interrupt_while_claims_are_given_up_leaves_none(mine, other, monkeypatch):
    assert mine.take(CHUNKS[0])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mine, "_delete", Mock(side_effect=KeyboardInterrupt))
        mine.close()
    assert mine._connection is None  # Python 3.13 warns of one that is left open
    assert other.take(CHUNKS[0])


@pytest.mark.parametrize("owner", [{"host": platform.node()}, {"boot": claims_file.boot()}])
def test_a_claim_of_before_the_last_start_or_of_a_dead_process_is_void(path, mine, owner):
    lock = foreign(path, **owner)
    assert mine.take(CHUNKS[0]) and not lock.exists()
    path.with_name(f"study.db-{'1' * 16}.lock").touch()  # of one that died at once
    path.with_name("study.db-mine.lock").touch()  # no name of ours
    mine.close()
    assert left_over(path.parent) == ["study.db-mine.lock"]


def test_another_process_that_looks_at_a_lock_for_a_moment_is_no_owner(path, monkeypatch):
    # its own file is looked at too
    lock = claims_file.lock_descriptor
    answers = iter([False, False, True, False])
    with Claims(path) as mine:
        foreign(path, host=platform.node())
        monkeypatch.setattr(
            claims_file,
            "lock_descriptor",
            lambda file, **how: next(answers, True) and lock(file, **how),
        )
        assert mine.take(CHUNKS[0])
        # one lock file, two of SQLite
        assert next(answers, None) is None and len(left_over(path.parent)) == 3
    assert left_over(path.parent) == []


def test_a_lock_file_that_cannot_be_made_is_named(path, monkeypatch):
    with (
        Claims(path) as mine,
        pytest.raises(OSError, match=r"lock file of study .* cannot be created \(No space left"),
    ):
        full = Mock(side_effect=OSError(28, "No space left on device"))
        monkeypatch.setattr(claims_file, "lock_descriptor", full)
        mine.take(CHUNKS[0])
    assert left_over(path.parent) == []


def test_a_study_that_another_process_makes_meanwhile_is_opened(tmp_path, monkeypatch):
    path = tmp_path / "study.db"
    create = Store.create

    def late(place, meta):
        create(place, meta).close()
        return create(place, meta)

    monkeypatch.setattr(Store, "create", late)
    with open_ledger(path, RECORD) as ledger:
        assert ledger.candidates == []


def test_results_of_an_ended_process_stay_if_they_are_final_or_of_more_epochs(path, mine):
    with Store.open(path) as store, Store.open(path) as earlier:
        ledger = Ledger(store, mine)
        stored = [
            result(0, state="failed"),
            result(1, state="stopped", epochs=5),
            result(2, state="stopped", epochs=2),
        ]
        earlier.finish(stored)
        late = [result(number, state="stopped", epochs=4) for number in range(3)]
        output = Outputs(4, np.zeros((3, 1), np.float32))
        ledger.finish(late, {1: output, 2: output})
        results = {number: (r.state, len(r.curve)) for number, r in store.results().items()}
        assert results == {0: ("failed", 3), 1: ("stopped", 5), 2: ("stopped", 4)}
        assert store.outputs([0, 1, 2]).keys() == {2}
        shown = [(r.state, len(r.curve)) for _, r in ledger.rows()]
        assert shown == list(results.values())
