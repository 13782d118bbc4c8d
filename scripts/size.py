"""Print lines and files of each room of the product, of tests and of scripts, against another commit.

python scripts/size.py [COMMIT]     (default: origin/main where there is one, else the commit before this one)

Where no such commit is known, as in a shallow clone or without git, the sizes stand alone.
"""

import io
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("gputune", "models", "tests", "scripts")
COUNTED = (".py", ".c", ".h", ".js", ".css", ".html")

Sizes = tuple[Counter[str], Counter[str]]
"""Files and lines of each room."""


def git(*words: str) -> bytes | None:
    """Return what git says; None where it fails or there is none."""
    try:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def now() -> dict[str, bytes]:
    """Return the files that lie here, those that git knows where it knows any: path -> content."""
    listed = git("ls-files", *FOLDERS)
    found = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    paths = found if listed is None else [ROOT / path for path in listed.decode().splitlines()]
    return {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in paths if path.is_file()}


def before(commit: str) -> dict[str, bytes] | None:
    """Return the files of a commit; None where it is not known."""
    packed = git("archive", commit, *FOLDERS)
    if packed is None:
        return None
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        return {file.name: archive.extractfile(file).read() for file in archive if file.isfile()}


def sizes(contents: dict[str, bytes]) -> Sizes:
    """Count; a folder of gputune is a room, and so is each other folder at the top."""
    files, lines = Counter[str](), Counter[str]()
    for path, content in contents.items():
        first, *rest = path.split("/")
        room = f"gputune/{rest[0] if len(rest) > 1 else ''}" if first == "gputune" else first
        if path.endswith(COUNTED):
            files[room] += 1
            lines[room] += content.count(b"\n")
    return files, lines


def main() -> None:
    asked = sys.argv[1:] or ["origin/main", "HEAD~1"]
    contents, commit = next(((found, c) for c in asked if (found := before(c)) is not None), (None, None))
    files, lines = sizes(now())
    old_files, old_lines = (files, lines) if contents is None else sizes(contents)
    rooms = sorted(files.keys() | old_files.keys())
    product = [room for room in rooms if room.startswith(("gputune", "models"))]
    print(f"{'':<24}{'files':>6}{'':>7}{'lines':>8}   {f'against {commit}' if commit else 'against nothing known'}")
    for name, parts in [*((room, [room]) for room in rooms), ("product, all", product)]:
        n, size, n_old, size_old = (sum(c[p] for p in parts) for c in (files, lines, old_files, old_lines))
        print(f"{name:<24}{n:>6}{n - n_old:>+7}{size:>8}{size - size_old:>+8}")


if __name__ == "__main__":
    main()
