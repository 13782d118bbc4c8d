"""A study on a network file system: one process at a time."""

import re

import pytest

import gputune
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
            "study on a local disk. In SLURM, let the jobs run one after another: --array=0-9%1."
        )
        with pytest.raises(gputune.InputError, match=re.escape(message)):
            search(path)
    assert search(path).best_params == {"a": 2}


def test_a_study_on_a_local_disk_is_shared(tmp_path):
    path = tmp_path / "study.db"
    with Store.create(path, {"model": "mlp", "scoring": "accuracy", "folds": 2}) as store:
        store.add_trials(candidates(range(1)))
    with Claims(path) as mine, Claims(path) as other:
        assert other.take_setup() is None
        mine.check_sharing()
