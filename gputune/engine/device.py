"""Which device "auto" is: a GPU for what fills it, the CPU for what its compiled code has done before.

Modules and what nothing compiles go to the GPU. The built-in MLP goes where it is done first, by the speeds of both,
which are measured where they are not known; the solved logistic regression stays on the CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gputune.engine.backend import choose_backend, choose_device, trains_as
from gputune.engine.findings import Findings, Speed, device_name, keep_findings, read_findings
from gputune.engine.speed import measure_speed, work_of_a_step
from gputune.population.population import ModelKind, populations
from gputune.types import BY_MEMBER, Backend, BackendWord, Config

CPU = torch.device("cpu")

_SOON = 5.0  # seconds on the CPU, in which a GPU has hardly begun: to make a context and load libraries takes some


@dataclass(frozen=True)
class DeviceChoice:
    """A device, and why "auto" is not the GPU that there is; "" where it is, or where there is none."""

    device: torch.device
    why: str = ""


_SOLVED = DeviceChoice(
    CPU, "the logistic regression is solved in many small products, which wait for each other"
)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be trained: complete configurations, on so many training ``rows`` of each fold, for ``epochs``.

    ``repeats`` is how often as much comes again, one after the other. ``held_by`` is the device of a tensor that was
    given, None for rows in main memory.
    """

    kind: ModelKind
    configs: Sequence[Config]
    rows: Sequence[int]
    n_features: int
    n_outputs: int
    epochs: int
    repeats: float = 1.0
    solved: bool = False
    differentiated: bool = False
    backend: BackendWord = "auto"
    dtype: torch.dtype = torch.float32
    held_by: torch.device | None = None

    def seconds(self, speed: Speed, *, alone: bool) -> float:
        """Estimate how long it takes at a speed; ``alone`` where every member takes its own steps."""
        rows = max(self.rows)
        groups = populations(self.configs, self.kind, rows=rows, own_steps=lambda config: alone)
        seconds = 0.0
        for group in groups:
            steps = [
                sum(-(-n // min(config["batch_size"], n)) for n in self.rows) for config in group.configs
            ]
            work = (
                work_of_a_step(c, self.n_features, self.n_outputs, rows, self.kind) for c in group.configs
            )
            seconds += speed.member * sum(n * each for n, each in zip(steps, work))
            seconds += speed.step * max(steps) / len(self.rows)
        return self.repeats * self.epochs * seconds


def device_for(word: str, work: Work) -> DeviceChoice:
    """Return the device of "auto", "cpu", "cuda" or "cuda:1"; InputError where there is none."""
    if word != "auto":
        return DeviceChoice(choose_device(word))
    if work.held_by is not None and work.held_by.type != "cpu":
        return DeviceChoice(work.held_by)
    gpu = choose_device("auto")
    if gpu == CPU or work.backend == "compiled":
        return DeviceChoice(CPU)
    if work.solved:
        return _SOLVED
    return _by_speed(gpu, work) if _compiles(work) else DeviceChoice(gpu)


def device_for_solver(word: str) -> DeviceChoice:
    """Return the device on which the logistic regression is solved, whose X is in main memory."""
    return _SOLVED if word == "auto" else DeviceChoice(choose_device(word))


def _compiles(work: Work) -> bool:
    """Whether all of it can train in compiled code on the CPU."""
    if work.kind == "module" or work.differentiated or work.backend != "auto":
        return False
    backend, _ = choose_backend("auto", CPU, work.dtype)
    return all(trains_as(backend, work.kind, config) == "compiled" for config in work.configs)


def _by_speed(gpu: torch.device, work: Work) -> DeviceChoice:
    backend, _ = choose_backend("auto", gpu, work.dtype)
    if why := read_findings(gpu).why_not(backend):
        return DeviceChoice(CPU, why)
    here = work.seconds(_speed(CPU, "compiled"), alone=True)
    if here < _SOON:
        return DeviceChoice(CPU, f"compiled code takes about {here:.1f} s on the CPU")
    there = work.seconds(_speed(gpu, backend), alone=backend in BY_MEMBER)
    if there < here:
        return DeviceChoice(gpu)
    return DeviceChoice(
        CPU, f"compiled code takes about {here:.0f} s on the CPU, {device_name(gpu)} about {there:.0f} s"
    )


def _speed(device: torch.device, backend: Backend) -> Speed:
    """Return a speed that is known, or measure it and keep it."""
    known = read_findings(device).speeds.get(backend)
    if known is None:
        known = measure_speed(device, backend)
        keep_findings(device, Findings(None, {backend: known}))
    return known
