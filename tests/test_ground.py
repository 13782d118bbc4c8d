"""The ground layer: the delayed garbage collector, the available memory, scratch folders."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gputune.ground import files as ground_files
from gputune.ground import memory
from gputune.ground.files import scratch_folder, sweep, write_files
from gputune.ground.memory import free_memory

# The collector is held back where many objects are made, and finds garbage among them later.
FEW_AND_MANY = """
for many in (True, False):
    gc.collect()
    with without_collector():
        rows = [[number] for number in range(20_000 if many else 100)]
        circle = Circle()
        circle.itself, alive = circle, weakref.ref(circle)
        del circle
    assert any(kept is rows[0] for kept in gc.get_objects(2)) == many
    assert gc.isenabled() and gc.get_freeze_count() == 0
    gc.collect()
    assert alive() is None
"""
FROZEN = """
gc.freeze()
frozen = gc.get_freeze_count()
with without_collector():
    rows = [[number] for number in range(20_000)]
assert gc.isenabled() and gc.get_freeze_count() == frozen
gc.disable()
with without_collector():
    pass
assert not gc.isenabled()
"""


@pytest.mark.parametrize("code", [FEW_AND_MANY, FROZEN])
def test_many_new_objects_count_as_old_ones_and_what_a_program_has_set_stays(code):
    code = (
        "import gc, weakref\nfrom gputune.ground.memory import without_collector\nclass Circle: "
        f"pass\n{code}"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


of_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def groups(monkeypatch, tmp_path):
    """Let this process see other control groups: write(version, group of the process, {file:
    text})."""
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(f"MemAvailable: {1 << 40} kB\n")
    mount = tmp_path / "cgroup fs"

    def write(version, group, files, root="/"):
        line, kind = (
            ("0::", "cgroup2 cgroup2 rw")
            if version == 2
            else ("3:cpu,memory:", "cgroup cgroup rw,memory")
        )
        (tmp_path / "proc/self/cgroup").write_text(f"7:pids:/other\n{line}{group}\n")
        place = str(mount).replace(" ", "\\040")
        lines = (
            "31 23 0:28 / /sys rw - tmpfs tmpfs rw",
            f"32 31 0:29 {root} {place} rw,nosuid shared:9 - {kind}",
        )
        (tmp_path / "proc/self/mountinfo").write_text("\n".join(lines))
        for name, text in files.items():
            (mount / name).parent.mkdir(parents=True, exist_ok=True)
            (mount / name).write_text(text)

    return write


@of_linux
def test_it_is_some_of_the_machines_memory(monkeypatch):
    monkeypatch.setattr(memory, "_free_of_groups", list)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    lines = map(str.split, Path("/proc/meminfo").read_text().splitlines())
    total = next(int(words[1]) * 1024 for words in lines if words[0] == "MemTotal:")
    assert 0 < free_memory() < total


V1 = {
    "memory.limit_in_bytes": "9223372036854771712",
    "memory.usage_in_bytes": "500",
    "memory.stat": "cache 1\ntotal_inactive_file 0\n",
    "job/memory.limit_in_bytes": "10000",
    "job/memory.usage_in_bytes": "7000",
    "job/memory.stat": "inactive_file 9\ntotal_inactive_file 1000\ntotal_active_file 500\ntotal_shmem 4000\n",
}


@of_linux
@pytest.mark.parametrize(
    ("version", "group", "files", "root", "free"),
    [
        # What is left of the limit, cached files counted as free, and not the limit.
        (
            2,
            "/",
            {
                "memory.max": "10000",
                "memory.current": "4000",
                "memory.stat": "anon 3000\ninactive_file 1000\n",
            },
            "/",
            7000,
        ),
        # The smallest along the path to the root: the group above leaves less.
        (
            2,
            "/a/b",
            {
                "a/memory.max": "9000",
                "a/memory.current": "8500",
                "a/memory.stat": "active_file 300",
                "a/b/memory.max": "max",
                "a/b/memory.high": "6000",
                "a/b/memory.current": "100",
            },
            "/",
            800,
        ),
        (
            2,
            "/a/b",
            {
                "a/memory.max": "max",
                "a/b/memory.max": "max",
                "a/b/memory.high": "6000",
                "a/b/memory.current": "100",
            },
            "/",
            5900,
        ),
        # Another group's limit is none of ours.
        (2, "/a", {"a/memory.max": "max", "b/memory.max": "10"}, "/", None),
        (2, "/a", {"a/memory.max": "10", "a/memory.current": "50"}, "/", 0),
        (1, "/job", V1, "/", 4500),
        # A container: the process's group is the mount point, by a name that is known outside only.
        (
            1,
            "/docker/job",
            {name.removeprefix("job/"): text for name, text in V1.items() if "job" in name},
            "/docker/job",
            4500,
        ),
        (2, "/../../kubepods/pod", {"memory.max": "700"}, "/", 700),
    ],
)
def test_what_its_control_groups_leave(groups, version, group, files, root, free):
    groups(version, group, files, root)
    expected = 1 << 50 if free is None else free
    assert free_memory() == expected


@of_linux
def test_a_limit_of_the_process_counts(monkeypatch):
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    monkeypatch.setattr(resource, "getrlimit", lambda which: (taken + (1 << 30), -1))
    assert free_memory() <= 1 << 30
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1000, -1))
    assert free_memory() == 0


@of_linux
def test_a_system_that_says_nothing_sets_no_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_PROC", tmp_path / "none")
    monkeypatch.setattr(sys, "platform", "win32")
    assert free_memory() == sys.maxsize


# Scratch folders are gone at the end, and after a kill when the next one is made; nothing else is
# ever removed.
HOLD = """
import sys
from pathlib import Path
from gputune.ground.files import scratch_folder
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
    lock = ground_files.lock_descriptor
    swept = []

    def late(file, **how):
        if not swept:
            swept.extend(tmp_path.iterdir())
            shutil.rmtree(swept[0])
        return lock(file, **how)

    monkeypatch.setattr(ground_files, "lock_descriptor", late)
    with scratch_folder(tmp_path) as folder:
        assert folder.exists() and folder not in swept


def test_where_nothing_can_be_made_the_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        OSError, match=r"no file can be made in this folder: Not a directory: '.*/file'"
    ):
        write_files(tmp_path / "file", {"a": b""}, prefix=".draft")
