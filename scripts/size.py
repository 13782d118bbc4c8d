"""Print lines and files of each room of the product, of tests and of scripts, against another commit.

python scripts/size.py [COMMIT]     (default: origin/main where there is one, else the commit before this one)
"""

import subprocess
import sys
from collections import Counter
from pathlib import Path

COUNTED = (".py", ".c", ".h", ".js", ".css", ".html")


def git(*words):
    return subprocess.run(["git", *words], capture_output=True, check=True).stdout


def room_of(path):
    first, *rest = path.split("/")
    if first == "gputune":
        return "gputune/" + (rest[0] if len(rest) > 1 else "")
    return first


def sizes(commit):
    """Files and lines of each room at a commit, None: of what lies here."""
    listed = git("ls-files") if commit is None else git("ls-tree", "-r", "--name-only", commit)
    files, lines = Counter(), Counter()
    for path in listed.decode().splitlines():
        if path.endswith(COUNTED) and path.split("/")[0] in ("gputune", "models", "tests", "scripts"):
            text = Path(path).read_bytes() if commit is None else git("show", f"{commit}:{path}")
            files[room_of(path)] += 1
            lines[room_of(path)] += text.count(b"\n")
    return files, lines


def base():
    """The commit to compare with."""
    asked = ["git", "rev-parse", "--verify", "--quiet", "origin/main"]
    known = subprocess.run(asked, capture_output=True).returncode == 0
    return "origin/main" if known else "HEAD~1"


def main():
    commit = sys.argv[1] if len(sys.argv) > 1 else base()
    (files, lines), (files_before, lines_before) = sizes(None), sizes(commit)
    rooms = sorted(files.keys() | files_before.keys())
    product = [room for room in rooms if room.startswith(("gputune", "models"))]
    print(f"{'':<24}{'files':>6}{'':>7}{'lines':>8}   against {commit}")
    for name, parts in [*((room, [room]) for room in rooms), ("product, all", product)]:
        n, size = sum(files[p] for p in parts), sum(lines[p] for p in parts)
        more, longer = n - sum(files_before[p] for p in parts), size - sum(lines_before[p] for p in parts)
        print(f"{name:<24}{n:>6}{more:>+7}{size:>8}{longer:>+8}")


if __name__ == "__main__":
    main()
