"""Where a benchmark ran and what it found: one page of Markdown, and its numbers as JSON, in files
of the machine."""

import json
import platform
import re
import subprocess
from argparse import ArgumentTypeError
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, TypeVar

import joblib
import torch

Kind = TypeVar("Kind")

HERE = Path(__file__).parent
PACKAGES = ("gputune", "torch", "scikit-learn", "numpy", "scipy", "joblib")


def _commit() -> str:
    """Return the commit of the source tree, with "-dirty" where files differ from it; "unknown"
    without git."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


SOURCE = {"commit": _commit(), "date": datetime.now(UTC).date().isoformat()}
"""What is measured: the tree as it was read, which others may change before the measuring ends."""


def describe_machine(*, with_card: bool = False) -> dict[str, Any]:
    """Return what a reader needs to judge the times, or to measure again; ``card`` None where none
    is used."""
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


def card() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def table(head: str, rows: Iterable[str]) -> str:
    """Return a table; bars part the cells of its head and of a row, and a short row ends with empty
    cells."""
    bars = head.count("|")
    first, *others = (
        f"| {row.replace('|', ' | ')}{' | ' * (bars - row.count('|'))} |" for row in (head, *rows)
    )
    return "\n".join([first, "|" + "---|" * (bars + 1), *others])


def positive(text: str) -> int:
    """Return the number that an option says; ArgumentTypeError for one that is not a whole number
    above 0."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise ArgumentTypeError(f"must be an integer of at least 1, got {text}")
    return number


def counted(number: int, noun: str) -> str:
    """Return "1 trial", "2,000 trials"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def publish(
    out: Path,
    what: str,
    title: str,
    *parts: str,
    machine: dict[str, Any] | None = None,
    **numbers: Any,
) -> int:
    """Write a page of these parts and, with the machine, the numbers into a folder, made if need
    be; return 0.

    The page is printed too. ``machine`` is this one, without its card, where none is given. Values
    of dataclasses among the numbers become objects of their fields.
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
    """Return the values of that name among the numbers that were published; none where there is no
    file."""
    file = out / f"{file_stem(machine, what)}.json"
    return [kind(**one) for one in json.loads(file.read_text())[name]] if file.exists() else []


class Clock:
    """Seconds of wall clock and of the processor since it was made, beside those that were spent
    before."""

    def __init__(self, seconds: float = 0.0, cpu: float = 0.0) -> None:
        self.begin = perf_counter() - seconds, process_time() - cpu

    def __call__(self) -> tuple[float, float]:
        return perf_counter() - self.begin[0], process_time() - self.begin[1]


def file_stem(machine: dict[str, Any], what: str = "training") -> str:
    """Return for example "training-amd-epyc-9r14-2-cores", or the card's name where there is
    one."""
    plain = re.sub(
        r"\((r|tm)\)", "", (machine["card"] or f"{machine['cpu']} {machine['cores']} cores").lower()
    )
    return f"{what}-" + re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
