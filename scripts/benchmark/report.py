"""Reports of benchmarks: one page of Markdown and the numbers as JSON, named after the machine."""

import json
import platform
import re
import subprocess
import sys
import warnings
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, TypeVar

import joblib
import torch

import gputune

Kind = TypeVar("Kind")

HERE = Path(__file__).parent
PACKAGES = ("gputune", "torch", "scikit-learn", "numpy", "scipy", "joblib")


def _commit() -> str:
    """Return the commit of the source tree.

    "-dirty" is appended if the code differs from it. Pages and results are no code. The result is
    "unknown" without git.
    """
    code = [":/", ":(top,exclude)docs", ":(top,exclude)scripts/benchmark/results"]
    try:
        commit = _git("describe", "--always", "--abbrev=12")
        changes = _git("status", "--porcelain", "--untracked-files=no", "--", *code)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if changes else commit


def _git(*words: str) -> str:
    """Return what a git command prints about this source tree."""
    command = ["git", "-C", str(HERE), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


SOURCE = {"commit": _commit(), "date": datetime.now(UTC).date().isoformat()}
"""What is measured: the tree as it was read, which others may change before the measuring ends."""


def describe_machine(*, with_card: bool = False) -> dict[str, Any]:
    """Return a description of the machine, for judging or repeating the measurement.

    ``card`` is None if no GPU is used.
    """
    listing = Path("/proc/cpuinfo")
    model = (
        re.search(r"^model name\s*:\s*(.+)$", listing.read_text(), re.M)
        if listing.exists()
        else None
    )
    return {
        "cpu": model[1].strip() if model else (platform.processor() or platform.machine()),
        "cores": joblib.cpu_count(),
        "card": card() if with_card else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        **SOURCE,
    }


def begin_on_one_thread() -> dict[str, Any]:
    """Use one thread of torch, ignore warnings, and return the description of the machine."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    return describe_machine()


def card() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def table(head: str, rows: Iterable[str]) -> str:
    """Return a table in Markdown; bars separate the cells, and short rows end with empty cells."""
    bars = head.count("|")
    first, *others = (
        f"| {row.replace('|', ' | ')}{' | ' * (bars - row.count('|'))} |" for row in (head, *rows)
    )
    return "\n".join([first, "|" + "---|" * (bars + 1), *others])


def positive(text: str) -> int:
    """Return the value of an option as a number; ArgumentTypeError unless it is a whole number
    above 0.
    """
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise ArgumentTypeError(f"must be an integer of at least 1, got {text}")
    return number


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 trial", "2,000 trials"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def publish(
    out: Path,
    what: str,
    title: str,
    *parts: str,
    machine: dict[str, Any] | None = None,
    **numbers: Any,
) -> int:
    """Write a page of these parts, and the numbers, into a folder; return 0.

    The folder is created if needed. The page is printed too. The numbers are stored together with
    the machine; by default it is this machine without its GPU. Dataclasses among the numbers become
    objects of their fields.
    """
    out.mkdir(parents=True, exist_ok=True)
    machine = machine or describe_machine()
    used = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    place = (
        f"{machine['cpu']}, {machine['cores']} cores; {machine['card'] or 'no GPU'}; "
        f"{machine['system']}; Python {machine['python']}, {used}; commit {machine['commit']}; "
        f"{machine['date']}."
    )
    text = "\n\n".join([f"# {title}", place, *(part.strip() for part in parts)]) + "\n"
    in_json, in_words = (out / f"{file_stem(machine, what)}{suffix}" for suffix in (".json", ".md"))
    in_json.write_text(
        json.dumps({"machine": machine, **numbers}, default=asdict, indent=1, allow_nan=False)
        + "\n"
    )
    in_words.write_text(text)
    print(f"\n{text}\nwritten: {in_json}, {in_words}")
    return 0


def published(
    out: Path, what: str, machine: dict[str, Any], name: str, kind: type[Kind]
) -> list[Kind]:
    """Return the values of this name among the published numbers; none if there is no file."""
    file = out / f"{file_stem(machine, what)}.json"
    numbers = json.loads(file.read_text()) if file.exists() else {}
    return [kind(**one) for one in numbers.get(name, [])]


class Clock:
    """Seconds of wall clock and of the processor since the clock was made.

    Seconds that were spent before are added.
    """

    def __init__(self, seconds: float = 0.0, cpu: float = 0.0) -> None:
        self.begin = perf_counter() - seconds, process_time() - cpu

    def __call__(self) -> tuple[float, float]:
        return perf_counter() - self.begin[0], process_time() - self.begin[1]


@contextmanager
def kept_clock(path: Path) -> Iterator[Clock]:
    """Yield a clock that continues the clock of earlier runs.

    The file keeps the seconds of all runs, as JSON. A run that is killed adds nothing.
    """
    clock = Clock(*json.loads(path.read_text())) if path.exists() else Clock()
    try:
        yield clock
    finally:
        path.write_text(json.dumps(clock()))


def script_parser(description: str | None) -> ArgumentParser:
    """Return a parser whose help text has the description with its line breaks."""
    return ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)


def run_script(
    run: Callable[[Namespace], int], parser: ArgumentParser, arguments: Sequence[str] | None
) -> int:
    """Run a script with its options, and return its exit code.

    An input that gputune refuses is printed as an error, and the exit code is 2.
    """
    try:
        return run(parser.parse_args(arguments))
    except gputune.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def file_stem(machine: dict[str, Any], what: str = "training") -> str:
    """Return a file name such as "training-amd-epyc-9r14-2-cores".

    If a GPU is used, it has the GPU's name.
    """
    plain = re.sub(
        r"\((r|tm)\)", "", (machine["card"] or f"{machine['cpu']} {machine['cores']} cores").lower()
    )
    return f"{what}-" + re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
