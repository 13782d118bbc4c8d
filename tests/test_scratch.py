"""Scratch folders: gone at the end, and after a kill when the next one is made; nothing else is ever removed."""

import os
import shutil
import subprocess
import sys

import pytest

from gputune import scratch
from gputune.scratch import scratch_folder, sweep, write_files

HOLD = """
import sys
from pathlib import Path
from gputune.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1])) as folder:
    (folder / "data").write_text("much")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_a_folder_goes_with_its_block_and_is_private(tmp_path):
    with scratch_folder(tmp_path) as folder:
        (folder / "inner").mkdir()
        assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_swept_and_what_lives_stays(tmp_path):
    command = [sys.executable, "-P", "-c", HOLD, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        folder = tmp_path / os.path.basename(process.stdout.readline().strip())
        sweep(tmp_path, prefix="gputune")
        assert (folder / "data").exists()
        process.kill()
    assert (folder / "data").exists()
    with scratch_folder(tmp_path, prefix="other"):
        assert (folder / "data").exists()
    with scratch_folder(tmp_path) as own:
        assert list(tmp_path.iterdir()) == [own]


def test_only_own_folders_of_the_pattern_are_swept(tmp_path, monkeypatch):
    with scratch_folder(tmp_path) as folder:
        name = folder.name[:-8]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").touch()
    (tmp_path / f"{name}linked00").symlink_to(precious)
    (tmp_path / f"{name}file0000").touch()
    os.mkfifo(tmp_path / f"{name}pipe0000")
    (tmp_path / f"{name}longer-than-ours").mkdir()
    (tmp_path / f"gputune-{'0' * 8}-otherhos").mkdir()
    before = sorted(tmp_path.rglob("*"))
    sweep(tmp_path, prefix="gputune")
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / f"{name}another0").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 12345)
        sweep(tmp_path, prefix="gputune")
    assert (tmp_path / f"{name}another0").exists()
    sweep(tmp_path, prefix="gputune")
    assert sorted(tmp_path.rglob("*")) == before
    sweep(tmp_path / "missing", prefix="gputune")


def test_a_folder_that_is_swept_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    lock, swept = scratch.lock_descriptor, []

    def late(file, **how):
        if not swept:
            swept.extend(tmp_path.iterdir())
            shutil.rmtree(swept[0])
        return lock(file, **how)

    monkeypatch.setattr(scratch, "lock_descriptor", late)
    with scratch_folder(tmp_path) as folder:
        assert folder.exists() and folder not in swept


def test_where_nothing_can_be_made_the_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"no file can be made in this folder: Not a directory: '.*/file'"):
        write_files(tmp_path / "file", {"a": b""}, prefix=".draft")
