"""Checkpoint files: their content, the errors for bad files, and the time of their removal."""

import os
import shutil
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gputune.engine.checkpoint import Checkpoint, CheckpointFolder, Checkpointing
from gputune.population.state import State

CONFIGS = {3: {"lr": 0.1, "width": 8}, 5: {"lr": 0.2, "width": 8}}


def checkpoint(trials=(3, 5), *, epoch=2):
    buffers = tuple(torch.randn(1, 2, n, dtype=torch.float64) for n in (7, 7))
    curves = np.array([[[0.1, 0.2]] * epoch, [[np.nan, -0.0]] * epoch])[: len(trials)]
    return Checkpoint(trials, (0,), curves, State(epoch, buffers), 1.5)


@pytest.fixture
def folder(tmp_path):
    return CheckpointFolder(tmp_path / "s.db.state", "of this search")


def written(folder, one=None):
    one = one or checkpoint()
    folder.write(one, [CONFIGS[trial] for trial in one.trials])
    return one, folder.path(one.trials)


def keep(folder, *, epoch=2, seconds=60.0):
    return Checkpointing(folder, (3, 5), seconds).keep(
        checkpoint(epoch=epoch), list(CONFIGS.values())
    )


def test_it_comes_back_bit_for_bit(folder):
    one, path = written(folder)
    (found,) = folder.read(CONFIGS)
    assert (found.trials, found.alive, found.seconds) == ((3, 5), (0,), 1.5)
    assert found.state.epoch == 2 and found.curves.tobytes() == one.curves.tobytes()
    assert all(torch.equal(a, b) for a, b in zip(found.state.buffers, one.state.buffers))
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    written(folder, checkpoint(epoch=3))  # takes its place
    assert [found.state.epoch for found in folder.read(CONFIGS)] == [3]


def test_curves_may_be_read_only(folder):
    # as the arrays that come from the workers of a Ray cluster
    one = checkpoint()
    one.curves.setflags(write=False)
    torch.set_warn_always(True)  # torch warns only once otherwise, and a warning fails the test
    try:
        written(folder, one)
    finally:
        torch.set_warn_always(False)
    assert folder.read(CONFIGS)[0].curves.tobytes() == one.curves.tobytes()


def test_step_counts_come_back_if_there_are_any(folder):
    one, _ = written(folder)
    (found,) = folder.read(CONFIGS)
    assert found.state.steps is None  # as in the files of older versions
    counted = replace(one, state=replace(one.state, steps=torch.tensor([[5, 7]])))
    written(folder, counted)
    (found,) = folder.read(CONFIGS)
    assert found.state.steps.tolist() == [[5, 7]] and len(found.state.buffers) == 2


def test_every_changed_or_missing_byte_is_seen(folder):
    _, path = written(folder)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in [*rng.integers(0, len(whole), 150), *range(len(whole) - 64, len(whole))]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.warns(
            UserWarning, match="1 checkpoint in .* cannot be used .* train from the start"
        ):
            assert folder.read(CONFIGS) == []
    for end in range(0, len(whole), 37):
        path.write_bytes(whole[:end])
        with pytest.warns(UserWarning, match="is damaged"):
            assert folder.read(CONFIGS) == []


def test_those_of_others_are_left_out_with_one_warning(folder):
    written(folder)
    written(folder, checkpoint((3,)))
    other = CheckpointFolder(folder.folder, "of another search")
    with pytest.warns(
        UserWarning, match="2 checkpoints in .* belongs to a different search"
    ) as caught:
        assert other.read(CONFIGS) == []
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="belongs to different configurations"):
        assert folder.read({3: {"lr": 0.3}, 5: CONFIGS[5]}) == []


def test_they_go_when_all_their_trials_have_ended(folder):
    _, path = written(folder)
    path.with_suffix(".tmp").touch()  # of a write that was killed
    folder.drop([3])
    assert path.exists()
    folder.drop([5])
    assert not folder.folder.exists()
    folder.drop([5])  # nothing is left to remove


def test_a_disk_that_takes_nothing_is_a_warning(folder):
    folder.folder.write_text("a file in the place of the folder")
    with pytest.warns(
        UserWarning, match="No checkpoint could be written in .* Free some space on the disk"
    ):
        assert keep(folder) == 60.0


def test_what_results_need_is_left_on_the_disk(folder, monkeypatch):
    _, path = written(folder)
    whole = path.read_bytes()
    free = SimpleNamespace(free=2**24)
    monkeypatch.setattr("gputune.engine.checkpoint.shutil.disk_usage", lambda folder: free)
    with pytest.warns(
        UserWarning, match="No checkpoint .* less than 16 MB for results.* Free some space on the"
    ):
        keep(folder, epoch=3)
    assert [p.name for p in path.parent.iterdir()] == [path.name] and path.read_bytes() == whole
    free.free += 10_000
    written(folder, checkpoint(epoch=3))


def test_another_process_may_remove_the_empty_folder_while_a_checkpoint_is_made(
    folder, monkeypatch
):
    look = shutil.disk_usage
    removals = [1, 2, 3]

    def removed_meanwhile(place):
        usage = look(place)
        if removals and removals.pop():
            place.rmdir()
        return usage

    monkeypatch.setattr("gputune.engine.checkpoint.shutil.disk_usage", removed_meanwhile)
    one, _ = written(folder)
    assert [found.trials for found in folder.read(CONFIGS)] == [one.trials] and not removals


def test_files_of_others_are_not_touched_and_links_are_not_followed(folder, tmp_path):
    (tmp_path / "thesis").write_text("mine")
    _, path = written(folder)
    path.with_suffix(".tmp").symlink_to(tmp_path / "thesis")
    foreign = path.with_name("embeddings.safetensors")
    foreign.write_text("mine")
    os.mkfifo(path.with_name(f"9-{16 * 'a'}.safetensors"))  # opening it would wait for ever
    written(folder)
    assert [found.trials for found in folder.read(CONFIGS)] == [(3, 5)]
    folder.clear()
    assert [p.name for p in path.parent.iterdir()] == [foreign.name]
    assert foreign.read_text() == (tmp_path / "thesis").read_text() == "mine"


def test_the_next_is_due_in_twenty_times_what_writing_took(folder, monkeypatch):
    times = iter([10.0, 10.25, 20.0, 24.0])
    monkeypatch.setattr("gputune.engine.checkpoint.time.monotonic", lambda: next(times))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [keep(folder, seconds=6.0) for _ in range(2)] == [6.0, 80.0]
