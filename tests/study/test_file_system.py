"""A study on a network file system: one process at a time."""

import re

import pytest

import gputune
from command_line import refusal
from gputune.study import claims as claims_file
from gputune.study import file_system
from gputune.study.claims import Claims
from gputune.study.file_system import network_file_system
from gputune.study.store import Store
from study_rows import candidates

MOUNTS = """\
22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw
30 22 0:26 / /home rw - nfs4 server:/home rw
31 30 0:27 / /home/me/local\\040disk rw shared:1 - xfs /dev/sdb rw
32 22 0:28 / /scratch rw - lustre mds:/scratch rw
33 22 0:29 / /mnt rw - fuse.sshfs host: rw
34 22 0:30 / /over rw - nfs server:/over rw
35 22 0:31 / /over rw - tmpfs tmpfs rw
a line of another form
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/tmp/study.db", ""),
        ("/home/me/study.db", "nfs4"),
        ("/homes/study.db", ""),
        ("/home/me/local disk/study.db", ""),
        ("/scratch/study.db", "lustre"),
        ("/mnt/study.db", "fuse.sshfs"),
        ("/over/study.db", ""),
    ],
)
def test_the_last_and_longest_mount_counts(path, kind, tmp_path, monkeypatch):
    table = tmp_path / "mountinfo"
    table.write_text(MOUNTS)
    monkeypatch.setattr(file_system, "_MOUNTS", table)
    assert network_file_system(type(table)(path)) == kind


def test_a_system_without_a_list_of_mounts(tmp_path, monkeypatch):
    monkeypatch.setattr(file_system, "_MOUNTS", tmp_path / "none")
    assert network_file_system(tmp_path) == ""


def test_this_folder(tmp_path):
    assert network_file_system(tmp_path) == ""


def search(path):
    return gputune.search(
        lambda params, report: params["a"],
        {"a": [1, 2]},
        direction="maximize",
        n_trials=2,
        workers=1,
        study=path,
        verbose=0,
    )


def test_a_second_process_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(claims_file, "network_file_system", lambda path: "nfs4")
    path = tmp_path / "study.db"
    assert search(path).best_params == {"a": 2}  # one process alone works as usual
    assert [file.name for file in tmp_path.iterdir()] == ["study.db"]
    with Claims(path) as other:
        assert other.take_setup() is None
        (owner,) = other.owners()
        message = (
            f"study='{path}' is on a network file system (nfs4), where only one process at a time "
            f"can work on a study, but {owner} works on it. Wait for it, or end it. Or put the "
            "study on a local disk. In SLURM, submit jobs that run one after another: sbatch "
            "--dependency=singleton."
        )
        with pytest.raises(gputune.InputError, match=re.escape(message)):
            search(path)
    assert search(path).best_params == {"a": 2}


@pytest.fixture
def network_folder(tmp_path, monkeypatch):
    """A folder that the list of mounts describes as a network file system."""
    table = tmp_path / "mountinfo"
    folder = tmp_path / "home"
    folder.mkdir()
    table.write_text(f"{MOUNTS}40 22 0:40 / {folder} rw - nfs4 server:/home rw\n")
    monkeypatch.setattr(file_system, "_MOUNTS", table)
    return folder


ARRAY = (
    "is on a network file system (nfs4), where only one process at a time can work on a study, but "
    "this process is a task of a SLURM job array. Put the study on a local disk of one node. In "
    "SLURM, submit jobs that run one after another: sbatch --dependency=singleton."
)


def test_a_task_of_an_array_is_refused_before_it_trains(network_folder, monkeypatch):
    path = network_folder / "study.db"
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "4")
    message = re.escape(f"study={str(path)!r} {ARRAY}")
    with pytest.raises(gputune.InputError, match=message):
        search(path)
    with pytest.raises(gputune.InputError, match=message):
        gputune.tune("mlp", [[0.0], [1.0]] * 5, [0, 1] * 5, n_trials=1, study=path, verbose=0)
    assert not list(network_folder.iterdir())
    local = network_folder.parent / "study.db"
    assert search(local).best_params == {"a": 2}
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "1")  # a single process
    assert search(path).best_params == {"a": 2}


def test_resume_wait_is_refused_at_once(network_folder, monkeypatch):
    reason = (
        "but --wait joins the search of another process. Put the study on a local disk, or leave "
        "--wait out after the other process ended."
    )
    assert reason in refusal("resume", network_folder, "--wait")  # no study exists: it would wait
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert ARRAY in refusal("resume", network_folder)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    assert "there is no study file" in refusal("resume", network_folder)


def test_a_study_on_a_local_disk_is_shared(tmp_path):
    path = tmp_path / "study.db"
    with Store.create(path, {"model": "mlp", "scoring": "accuracy", "folds": 2}) as store:
        store.add_trials(candidates(range(1)))
    with Claims(path) as mine, Claims(path) as other:
        assert other.take_setup() is None
        mine.check_sharing()
