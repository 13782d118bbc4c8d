"""Print the size of each package in tokens, compared with another commit.

    python scripts/size.py [COMMIT]     [default: origin/main if there is one, else the commit before this one]

Tokens are names, operators, numbers and strings. Docstrings, comments, blank lines and imports do
not count. No formatter can change this number, so it measures how much there is to read. "per line"
is tokens per line of code: a high number means that lines are packed. The other languages (C, CUDA,
JavaScript, CSS, HTML) have one row together, in which words and signs are counted.

If no other commit is known, as in a shallow clone or without git, the sizes are printed without a
comparison.
"""

import ast
import io
import re
import subprocess
import sys
import tarfile
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("gputune", "models", "tests", "scripts")
OTHER_LANGUAGES = (".c", ".h", ".cu", ".js", ".css", ".html")
OTHERS = "other languages"

_COUNTED = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_WORD_OR_SIGN = re.compile(r"\w+|[^\w\s]")


@dataclass
class Size:
    """The size of some files: their number, their tokens, and the lines that hold these tokens."""

    files: int = 0
    tokens: int = 0
    lines: int = 0

    def __add__(self, other: "Size") -> "Size":
        return Size(self.files + other.files, self.tokens + other.tokens, self.lines + other.lines)

    @property
    def density(self) -> float:
        """Tokens per line of code."""
        return self.tokens / max(1, self.lines)


def is_docstring(statement: ast.stmt) -> bool:
    """Return whether a statement is a string that stands alone."""
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Constant):
        return False
    return isinstance(statement.value.value, str)


def lines_left_out(tree: ast.Module) -> set[int]:
    """Return the line numbers of docstrings and imports."""
    left_out: list[ast.stmt] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            left_out.append(node)
        if isinstance(node, _DOCUMENTED) and node.body and is_docstring(node.body[0]):
            left_out.append(node.body[0])
    numbers: set[int] = set()
    for statement in left_out:
        numbers.update(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    return numbers


def python_size(source: str) -> Size:
    """Return the size of a Python file."""
    left_out = lines_left_out(ast.parse(source))
    n_tokens = 0
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        first_line = token.start[0]
        if token.type in _COUNTED and first_line not in left_out:
            n_tokens += 1
            lines.update(range(first_line, token.end[0] + 1))
    return Size(1, n_tokens, len(lines))


def other_size(source: str) -> Size:
    """Return the size of a file of another language, comments included."""
    counts = [len(_WORD_OR_SIGN.findall(line)) for line in source.splitlines()]
    return Size(1, sum(counts), sum(count > 0 for count in counts))


def git(*arguments: str) -> bytes | None:
    """Return the output of a git command, or None if it fails or git is missing."""
    try:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def files_of_tree() -> dict[str, bytes]:
    """Return the files of the working tree as {path: content}; without git, all files in the
    folders."""
    listed = git("ls-files", *FOLDERS)
    if listed is None:
        paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    else:
        paths = [ROOT / path for path in listed.decode().splitlines()]
    return {
        path.relative_to(ROOT).as_posix(): path.read_bytes() for path in paths if path.is_file()
    }


def files_of_commit(commit: str) -> dict[str, bytes] | None:
    """Return the files of a commit as {path: content}, or None if the commit is not known."""
    packed = git("archive", commit, *FOLDERS)
    if packed is None:
        return None
    contents: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None:
                contents[member.name] = file.read()
    return contents


def package_of(path: str) -> str:
    """Return the package that a file counts for: a folder of gputune, or a folder at the top."""
    first, *rest = path.split("/")
    if first != "gputune":
        return first
    return f"gputune/{rest[0]}" if len(rest) > 1 else "gputune/"


def sizes(contents: dict[str, bytes]) -> dict[str, Size]:
    """Return the size of each package."""
    packages: dict[str, Size] = {}
    for path, content in contents.items():
        if path.endswith(".py"):
            package = package_of(path)
            size = python_size(content.decode())
        elif path.endswith(OTHER_LANGUAGES):
            package = OTHERS
            size = other_size(content.decode())
        else:
            continue
        packages[package] = packages.get(package, Size()) + size
    return packages


def total(packages: dict[str, Size], names: Iterable[str]) -> Size:
    """Return the summed size of the named packages."""
    return sum((packages[name] for name in names if name in packages), Size())


def row(name: str, now: Size, before: Size) -> str:
    """Return one line of the table."""
    columns = [
        f"{name:<24}",
        f"{now.files:>6}{now.files - before.files:>+6}",
        f"{now.tokens:>9}{now.tokens - before.tokens:>+8}",
        f"{now.density:>10.1f}{now.density - before.density:>+7.1f}",
    ]
    return "".join(columns)


def main() -> None:
    """Print the table."""
    now = sizes(files_of_tree())
    before = now
    compared = "no other commit is known"
    for commit in sys.argv[1:] or ["origin/main", "HEAD~1"]:
        contents = files_of_commit(commit)
        if contents is not None:
            before = sizes(contents)
            compared = f"compared with {commit}"
            break
    print(f"{'':<24}{'files':>6}{'':>6}{'tokens':>9}{'':>8}{'per line':>10}{'':>7}   {compared}")
    names = sorted(now.keys() | before.keys(), key=lambda name: (name == OTHERS, name))
    for name in names:
        print(row(name, total(now, [name]), total(before, [name])))
    product = [name for name in names if name.startswith(("gputune", "models"))]
    print(row("product, Python", total(now, product), total(before, product)))


if __name__ == "__main__":
    main()
