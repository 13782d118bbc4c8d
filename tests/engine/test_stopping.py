"""When training ends, as this process and as a worker's copy see it."""

import pickle
import time

from gputune.engine.stop import Stop


def test_a_deadline_passes_in_copies_too():
    for stop in (Stop(time.monotonic() - 1), pickle.loads(pickle.dumps(Stop(time.monotonic() - 1)))):
        assert stop.is_over()
    assert not Stop().is_over() and not Stop(time.monotonic() + 60).is_over()


def test_a_copy_hears_what_is_asked_here(tmp_path, monkeypatch):
    monkeypatch.setattr("os.getppid", lambda: __import__("os").getpid())  # as in a worker of this process
    stop = Stop()
    with stop.heard_by_workers(tmp_path / "stop"):
        copy = pickle.loads(pickle.dumps(stop))
        assert not copy.is_over()
        stop.ask()
        assert copy.is_over() and stop.is_over()
    with stop.heard_by_workers(tmp_path / "later"):
        assert pickle.loads(pickle.dumps(Stop())).is_over() is False
        assert (tmp_path / "later").exists()  # what was asked before there were workers


def test_a_copy_whose_parent_has_died_is_over():
    assert pickle.loads(pickle.dumps(Stop())).is_over()  # the parent of this process never made it


def test_asking_where_the_folder_is_gone_is_no_error(tmp_path):
    stop = Stop()
    with stop.heard_by_workers(tmp_path / "gone" / "stop"):
        stop.ask()
    assert stop.is_over()
