"""The file system of a study: whether it is shared by several machines."""

import re
from pathlib import Path

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
