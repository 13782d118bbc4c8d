"""The file system of a study: whether it is shared by several machines.

File locks and SQLite are not reliable if several machines write to one file of a network file
system. Only one process at a time may work on such a study.
"""

import os
import re
from pathlib import Path

from gputune.ground.errors import InputError

_MOUNTS = Path("/proc/self/mountinfo")
_NETWORK = re.compile(
    r"nfs\d?|cifs|smb\d?|smbfs|lustre|beegfs(_nodev)?|gpfs|ceph|afs|glusterfs|orangefs|panfs|wekafs"
    r"|fuse\.(sshfs|glusterfs|ceph|s3fs|gcsfuse|beegfs\w*)"
)
"""The names of file systems that several machines can mount at the same time."""


def network_file_system(path: Path) -> str:
    """Return the name of the network file system that holds a file, such as "nfs4", or "".

    On systems other than Linux, the result is always "".
    """
    try:
        lines = _MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ""
    path = path.resolve()
    longest = -1
    kind = ""
    for line in lines:
        # "36 35 98:0 /root /mount/point options - type source ...", with spaces as \\040
        before, _, after = line.partition(" - ")
        words = before.split()
        if len(words) < 5 or not after:
            continue
        place = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), words[4]))
        # A later mount at the same place hides an earlier one.
        if path.is_relative_to(place) and len(place.parts) >= longest:
            longest = len(place.parts)
            kind = after.split()[0]
    return kind if _NETWORK.fullmatch(kind) else ""


ONE_BY_ONE = "In SLURM, submit jobs that run one after another: sbatch --dependency=singleton."


def check_one_process(study: Path | None, *, joins: bool = False) -> None:
    """Raise InputError if several processes would work on a study in a network file system.

    gputune cannot see the processes on other machines in time. So it refuses the two calls that are
    made for several processes: a task of a SLURM job array, and a call that joins a search.

    Args:
        study: The study file, which need not exist yet. None: the search has no file.
        joins: Whether the call joins a search that another process may run.
    """
    # An array of one task is a single process.
    is_in_array = "SLURM_ARRAY_TASK_ID" in os.environ and (
        os.environ.get("SLURM_ARRAY_TASK_COUNT") != "1"
    )
    if study is None or not (joins or is_in_array):
        return
    kind = network_file_system(study)
    if not kind:
        return
    reason = "this process is a task of a SLURM job array"
    remedy = f"Put the study on a local disk of one node. {ONE_BY_ONE}"
    if not is_in_array:
        reason = "--wait joins the search of another process"
        remedy = "Put the study on a local disk, or leave --wait out after the other process ended."
    raise InputError(
        f"study={str(study)!r}",
        f"is on a network file system ({kind}), where only one process at a time can work on a "
        f"study, but {reason}",
        remedy=remedy,
    )
