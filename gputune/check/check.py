"""All laws on one device, and how fast it trains: a table, what is kept of it, and one line on what to choose."""

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass

import torch

from gputune.check.laws import LAWS, Law
from gputune.engine.choice import FEW, FOLDS, measure_speed
from gputune.engine.findings import Findings, Speed, device_name, keep_findings
from gputune.engine.kernel import obstacle
from gputune.engine.plan import cores
from gputune.native.library import NotBuiltError, library
from gputune.text import count, size_words, table
from gputune.types import Backend
from gputune.version import __version__

_CPU = torch.device("cpu")
_MEMBERS = 1000  # of the speed that is shown beside that of few


@dataclass(frozen=True)
class Row:
    """What a law said of a backend: ``difference`` is NaN where it raised ``error``."""

    law: str
    backend: str
    difference: float
    allowed: float
    seconds: float
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether the law holds."""
        return self.difference <= self.allowed


@dataclass(frozen=True)
class Report:
    """What was found of a device; ``speeds`` by device and backend."""

    device: str
    facts: str
    rows: tuple[Row, ...]
    speeds: Mapping[tuple[str, Backend], Speed]

    @property
    def ok(self) -> bool:
        """Whether every law holds."""
        return all(row.ok for row in self.rows)

    def __str__(self) -> str:
        cells = [
            [row.law, row.backend, _number(row.difference), _number(row.allowed), f"{row.seconds:.1f} s",
             "ok" if row.ok else "FAILED"]
            for row in self.rows
        ]  # fmt: skip
        laws = table(
            ["law", "backend", "largest difference", "allowed", "time", ""], cells, left=("law", "backend", "")
        )
        failed = [row for row in self.rows if not row.ok]
        failures = [f"FAILED   {row.law}, {row.backend}: {row.error or 'the difference'}" for row in failed]
        return "\n".join([f"{self.device}; {self.facts}", "", laws, "", *failures, *self._speeds()])

    def _speeds(self) -> list[str]:
        """Return the table of speeds, and from how many members on a GPU is the faster one."""
        if not self.speeds:
            return []
        few = FEW * FOLDS
        header = ["speed", "backend", f"steps/s of {few} members", f"member-steps/s of {_MEMBERS:,}"]
        cells = [
            [device, backend, f"{1 / speed.of(few):,.0f}", f"{_MEMBERS / speed.of(_MEMBERS):,.0f}"]
            for (device, backend), speed in self.speeds.items()
        ]
        lines = [table(header, cells, left=("speed", "backend"))]
        cpu = self.speeds.get(("cpu", "compiled"))
        gpu = [speed for (device, _), speed in self.speeds.items() if device != "cpu"]
        if cpu is not None and gpu:
            faster = [speed for speed in gpu if speed.member < cpu.member]
            counts = [max(1.0, (speed.step - cpu.step) / (cpu.member - speed.member)) for speed in faster]
            much = f"from about {round(min(counts)):,} members on" if counts else "never"
            lines.append(f"An MLP of this size trains faster on {self.device} than compiled on the CPU {much}.")
        return lines

    def json(self) -> str:
        """Return the same as JSON; a difference is null where a law raised an error."""
        rows = [
            {**asdict(row), "difference": None if math.isnan(row.difference) else row.difference, "ok": row.ok}
            for row in self.rows
        ]
        speeds = [{"device": d, "backend": b, **asdict(speed)} for (d, b), speed in self.speeds.items()]
        report = {"device": self.device, "facts": self.facts, "ok": self.ok, "laws": rows, "speeds": speeds}
        return json.dumps(report, indent=1)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0e}"


def checks_of(device: torch.device) -> list[tuple[Law, Backend]]:
    """Return every law with each backend of a device that it is for."""
    known, gpus = backends_of(device), torch.cuda.device_count() if device.type == "cuda" else 0
    return [
        (law, backend)
        for law in LAWS
        for backend in law.backends or ("eager",)
        if backend in known and law.gpus <= gpus
    ]


def backends_of(device: torch.device) -> tuple[Backend, ...]:
    """Return the ways to train the built-in MLP on a device."""
    if device.type == "cpu":
        with suppress(NotBuiltError):
            library(torch.float64)
            return "eager", "graph", "compiled"
    return ("eager", "graph") if obstacle(device) else ("eager", "graph", "kernel")


def timed_of(device: torch.device) -> list[tuple[torch.device, Backend]]:
    """Return what is timed: the backends of a device, and compiled training on the CPU."""
    besides = device != _CPU and "compiled" in backends_of(_CPU)
    return [(device, backend) for backend in backends_of(device)] + [(_CPU, "compiled")] * besides


def check(device: torch.device, tell: Callable[[str], object]) -> Report:
    """Time a device, put the laws to it and keep what was found; ``tell`` is told each time what begins."""
    speeds: dict[tuple[str, Backend], Speed] = {}
    for place, backend in timed_of(device):  # before a recording is made to fail
        tell(f"speed, {backend}")
        speeds[str(place), backend] = measure_speed(place, backend)
    rows, failed = [], dict[Backend, str]()
    for law, backend in checks_of(device):
        tell(f"{law.name}, {backend}")
        rows.append(_row(law, backend, device))
        if not rows[-1].ok:
            failed[backend] = law.name
    for place in dict.fromkeys((device, _CPU)):
        own = {backend: speed for (name, backend), speed in speeds.items() if name == str(place)}
        keep_findings(place, Findings(failed if place == device else None, own))
    return Report(device_name(device), _facts(device), tuple(rows), speeds)


def _row(law: Law, backend: Backend, device: torch.device) -> Row:
    begin, difference, error = time.monotonic(), math.nan, ""
    try:
        difference = law.measure(device, backend)
    except Exception as raised:  # whatever it is, it is what was found
        lines = str(raised).splitlines()
        error = f"{type(raised).__name__}: {lines[0] if lines else ''}"
    name = backend if law.backends else "-"
    return Row(law.name, name, difference, law.allowed, time.monotonic() - begin, error)


def _facts(device: torch.device) -> str:
    """Return what there is of a device, and the versions."""
    versions = f"torch {torch.__version__}, gputune {__version__}"
    if device.type == "cpu":
        return f"{count(cores(), 'core')}; {versions}"
    free, whole = map(size_words, torch.cuda.mem_get_info(device))
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return f"capability {capability}, {free} of {whole} free; {versions}, CUDA {torch.version.cuda}"
