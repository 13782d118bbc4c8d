"""The command ``gputune check``: check the correctness of training on a device, and measure its
speed.

The result is a table, findings that gputune stores for later runs, and one line of advice on the
device to choose. A law is a property of training that must hold on every device. ``gputune check``
checks the laws on the user's device. The tests check the laws on the CPU and on a simulated GPU.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional

from gputune.check import laws
from gputune.check.laws import Case, difference
from gputune.engine.backend import Findings, Speed, device_name, keep_findings
from gputune.engine.backends.base import Machine, TrialWork
from gputune.engine.backends.selection import choose_backend, way_of
from gputune.engine.backends.table import BACKENDS, backend_named
from gputune.engine.choice import FEW, FOLDS, measure_speed
from gputune.engine.plan import backends_text, cores
from gputune.ground.device import CPU
from gputune.ground.errors import InputError
from gputune.ground.text import count, size_words, table
from gputune.ground.types import Say
from gputune.hypergradients.hypergradient import Mode, hypergradient
from gputune.population.kinds import ModelKind, is_module
from gputune.population.population import complete
from gputune.solver.solve import solve_all, solved_module
from gputune.version import __version__

_MEMBERS = 1000  # the table shows the speed of this many members next to the speed of a few

EXACT = 1e-10
ROUNDED = 1e-4
"""The largest relative differences allowed in double (EXACT) and in single precision (ROUNDED).

They apply to training runs of at most 50 steps.
"""


@dataclass(frozen=True)
class Law:
    """A property of training that must hold on every device, and the function that measures it.

    ``measure`` returns the largest difference between the device's result and the right result,
    relative to the largest value of the right result. The difference must be at most ``allowed``
    with each of ``backends`` that the device has. If ``backends`` is (), the law does not train
    with a backend, and gputune measures it once, as "eager".
    """

    name: str
    measure: Callable[[torch.device, str], float]
    allowed: float = EXACT
    backends: tuple[str, ...] = ("eager", "recorded", "compiled")
    gpus: int = 0  # number of GPUs that the law needs


_SIZES = (
    {"width": 16, "batch_size": 9, "lr": 0.01},
    {"width": 12, "batch_size": 11, "lr": 0.003},
    {"width": 9, "batch_size": 16, "lr": 0.01},
)
_RATES = ({"lr": 0.01}, {"lr": 0.003}, {"lr": 0.001})

CASES: Mapping[str, Case] = {
    "sgd": Case(_SIZES, {"optimizer": "sgd", "weight_decay": 0.01}),
    "sgd with momentum": Case(_SIZES, {"optimizer": "sgd", "momentum": 0.9}),
    "nesterov": Case(_SIZES, {"optimizer": "nesterov", "weight_decay": 0.01}),
    "adam": Case(_SIZES, {"optimizer": "adam", "weight_decay": 0.01}),
    "adamw": Case(_SIZES, {"weight_decay": 0.1}),
    "one batch size": Case(_RATES),
    "gelu": Case(_SIZES, {"activation": "gelu"}),
    "silu": Case(_SIZES, {"activation": "silu", "depth": 3}),
    "tanh": Case(_SIZES, {"activation": "tanh", "depth": 1}),
    "dropout": Case(tuple({**config, "dropout": 0.2} for config in _SIZES)),
    "cosine schedule": Case((*_RATES, {"lr": 0.01, "batch_size": 13}), {"schedule": "cosine"}),
    "weights": Case(_SIZES, weights=True),
    "a class that a fold lacks": Case(_SIZES, absent=True),
    "regression": Case(_SIZES, task="regression", weights=True),
}
"""Test cases: members (trials on folds) of the built-in MLP that a plain loop can train too."""

_ROUNDED = Case(  # tanh, because rounding could cross the kink of a relu
    tuple({**config, "lr": 0.001} for config in _SIZES), {"activation": "tanh"}, dtype=torch.float32
)
_MODULE = Case(_RATES, module=True)


def solution(device: torch.device, _backend: str) -> float:
    """Return the largest difference between gputune's solved logistic regression and
    scikit-learn's.

    The function compares class probabilities. scikit-learn stops at a residual of 1e-12.
    """
    case = Case(({"C": 0.1}, {"C": 2.0}))
    worst = []
    data = case.data(CPU)
    configs = case.complete()
    solution = solve_all(case.data(device), configs)
    for (f, fold), (c, config) in product(enumerate(data.folds), enumerate(configs)):
        x = data.x[f].numpy()
        expected = LogisticRegression(C=config["C"], tol=1e-12, max_iter=10_000)
        expected.fit(x[fold.train], data.y[fold.train].numpy())
        outputs = solved_module(solution, f * len(configs) + c)(data.x[f])
        chances = outputs.softmax(-1).detach().numpy()
        worst.append(np.abs(chances - expected.predict_proba(x)).max())
    return float(np.max(worst))


def gradients(mode: Mode, other: Mode, device: torch.device, _backend: str) -> float:
    """Return the difference between two methods of computing hypergradients, for the learning rate
    and the weight decay."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, generator=generator, dtype=torch.float64).to(device)
    y = torch.randint(3, (40,), generator=generator).to(device)
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        module = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double().to(device)
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 32, 8)]
    run = partial(
        hypergradient,
        module,
        functional.cross_entropy,
        batches,
        (x[32:], y[32:]),
        optimizer="adamw",
        seed=0,
    )
    values = {"lr": 0.1, "weight_decay": 0.01}
    slopes = run(hyperparameters=values, mode=mode).gradient
    expected = run(hyperparameters=values, mode=other).gradient
    return difference(torch.stack([*slopes.values()]), torch.stack([*expected.values()]))


LAWS: tuple[Law, ...] = (
    *(
        Law(f"members equal the plain loop: {name}", partial(laws.from_plain_loop, case))
        for name, case in CASES.items()
    ),
    Law(
        "float32 against the plain loop in float64",
        partial(laws.from_plain_loop, _ROUNDED),
        ROUNDED,
    ),
    Law(
        "the kernel's members equal the loop's",
        partial(laws.from_plain_loop, _ROUNDED),
        ROUNDED,
        ("kernel",),
    ),
    Law(
        "a module equals the plain loop",
        partial(laws.from_plain_loop, _MODULE),
        backends=("eager", "recorded"),
    ),
    Law("scores equal scikit-learn's", partial(laws.scores, _SIZES)),
    Law("the solved logistic regression equals scikit-learn's", solution, 1e-6, ()),
    Law(
        "hypergradient: reverse equals forward",
        partial(gradients, "reverse", "forward"),
        backends=(),
    ),
    Law(
        "hypergradient: reverse equals finite differences",
        partial(gradients, "reverse", "fd"),
        1e-5,
        (),
    ),
    Law("members that leave change nothing", laws.members_that_leave),
    Law("a chunk that exceeds memory is halved", laws.run_out_of_memory, gpus=1),
    Law(
        "the other GPUs give the same",
        partial(laws.on_other_gpus, CASES["adamw"]),
        EXACT,
        ("eager", "recorded"),
        gpus=2,
    ),
    # This law must be the last: after a failed capture, PyTorch < 2.13 cannot record any more.
    Law("a recording that fails falls back", laws.recording_fails, 0.0, ("recorded",)),
)
"""All guarantees that ``gputune check`` tests, in order."""


@dataclass(frozen=True)
class CheckRow:
    """The result of checking one property (law) of training with one backend.

    ``difference`` is NaN if the measurement raised an error, and ``error`` then has the error's
    text.
    """

    law: str
    backend: str
    difference: float
    allowed: float
    seconds: float
    error: str = ""

    @property
    def ok(self) -> bool:
        """True if the measured difference is at most the allowed difference."""
        return self.difference <= self.allowed


@dataclass(frozen=True)
class CheckReport:
    """The results of ``gputune check`` for one device.

    ``speeds`` maps device and backend to training speed. ``ways`` are sentences that say how "auto"
    trains on the device.
    """

    device: str
    facts: str
    rows: tuple[CheckRow, ...]
    speeds: Mapping[tuple[str, str], Speed]
    ways: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True if every checked property of training (law) holds on this device."""
        return all(row.ok for row in self.rows)

    def __str__(self) -> str:
        cells = []
        failures = []
        for row in self.rows:
            difference = "-" if math.isnan(row.difference) else f"{row.difference:.0e}"
            allowed = f"{row.allowed:.0e}"
            result = "ok" if row.ok else "FAILED"
            seconds = f"{row.seconds:.1f} s"
            cells.append([row.law, row.backend, difference, allowed, seconds, result])
            if not row.ok:
                reason = row.error or "the difference is too large"
                failures.append(f"FAILED   {row.law}, {row.backend}: {reason}")
        header = ["check", "backend", "largest difference", "allowed", "time", ""]
        checks = table(header, cells, left=("check", "backend", ""))
        lines = [f"{self.device}; {self.facts}", "", checks, "", *failures, *self._speeds()]
        lines += self.ways
        return "\n".join(lines)

    def _speeds(self) -> list[str]:
        """Return the lines of the report with the speeds, and the number of networks from which a
        GPU is faster."""
        if not self.speeds:
            return []
        few = FEW * FOLDS
        header = [
            "speed",
            "backend",
            f"steps/s of {few} members",
            f"member-steps/s of {_MEMBERS:,}",
        ]
        cells = []
        gpus = []
        for (device, backend), speed in self.speeds.items():
            steps = f"{1 / speed.of(few):,.0f}"
            cells.append([device, backend, steps, f"{_MEMBERS / speed.of(_MEMBERS):,.0f}"])
            if device != "cpu":
                gpus.append(speed)
        lines = [table(header, cells, left=("speed", "backend"))]
        cpu = self.speeds.get(("cpu", "compiled"))
        if cpu is not None and gpus:
            # A step of n members takes step + n * member seconds on each device. Both are equally
            # fast at n = (step_gpu - step_cpu) / (member_cpu - member_gpu).
            faster = [gpu for gpu in gpus if gpu.member < cpu.member]
            counts = [(gpu.step - cpu.step) / (cpu.member - gpu.member) for gpu in faster]
            limit = "never"
            if counts:
                limit = f"from about {round(max(1.0, min(counts))):,} members on"
            lines.append(
                f"An MLP of this size trains faster on {self.device} than compiled on the CPU "
                f"{limit}."
            )
        return lines

    def json(self) -> str:
        """Return the report as JSON text. A difference is null if its measurement raised an
        error."""
        rows = []
        for row in self.rows:
            rows.append(asdict(row) | {"ok": row.ok})
            if math.isnan(row.difference):
                rows[-1]["difference"] = None
        speeds = [
            {"device": device, "backend": backend, **asdict(speed)}
            for (device, backend), speed in self.speeds.items()
        ]
        report = {
            "device": self.device,
            "facts": self.facts,
            "ok": self.ok,
            "laws": rows,
            "speeds": speeds,
        }
        return json.dumps(report, indent=1)


def checks_of(device: torch.device) -> list[tuple[Law, str]]:
    """Return the list of checks to run on a device: each law (property of training) with each of
    its available backends."""
    available = backends_of(device)
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    checks = []
    for law in LAWS:
        if law.gpus <= gpus:
            backends = law.backends or ("eager",)
            checks += [(law, backend) for backend in backends if backend in available]
    return checks


def backends_of(device: torch.device) -> tuple[str, ...]:
    """Return the names of the backends that can train the built-in MLP on a device."""
    machine = Machine(device, torch.float64, "mlp")
    names = []
    for name in reversed(BACKENDS):
        backend = backend_named(name)
        with suppress(InputError):  # this device does not have it
            backend.check(machine)
            if backend.trains_built_in:
                names.append(name)
    return tuple(names)


def ways_of(device: torch.device) -> list[str]:
    """Return sentences that say how "auto" trains an MLP and a module on a device, in the format of
    the plan of a search."""
    sentences = []
    config = complete({}, optimizer="adamw", schedule="constant")
    kinds: dict[str, ModelKind] = {"An MLP": "mlp", "Your own module": "module"}
    for name, kind in kinds.items():
        chosen = choose_backend("auto", device, torch.float32, kind)
        reason = chosen.reason
        way = chosen.name
        if is_module(kind):
            way, reason = way_of(way, TrialWork(kind, config), reason)
        sentences.append(f"{name} trains here with: {backends_text([way], [reason])}")
    return sentences


def timed_of(device: torch.device) -> list[tuple[torch.device, str]]:
    """Return the backends to time: all backends of the device, and compiled code on the CPU."""
    pairs = [(device, backend) for backend in backends_of(device)]
    if device != CPU and "compiled" in backends_of(CPU):
        pairs.append((CPU, "compiled"))
    return pairs


def check(device: torch.device, tell: Say) -> CheckReport:
    """Measure the training speed of a device, check all laws (properties of training) on it, and
    store the findings.

    Before each measurement, the function calls ``tell`` with a description.
    """
    speeds: dict[tuple[str, str], Speed] = {}
    # Speeds come first, because the last law makes a recording fail.
    for place, backend in timed_of(device):
        tell(f"speed, {backend}")
        speeds[str(place), backend] = measure_speed(place, backend)
    rows = []
    failed = dict[str, str]()
    for law, backend in checks_of(device):
        tell(f"{law.name}, {backend}")
        begin = time.monotonic()
        difference = math.nan
        error = ""
        try:
            difference = law.measure(device, backend)
        except Exception as raised:  # any error is a finding and goes into the report
            error = f"{type(raised).__name__}: {next(iter(str(raised).splitlines()), '')}"
        # A law without backends was measured as "eager"; the report does not show this word.
        name = backend if law.backends else "-"
        seconds = time.monotonic() - begin
        rows.append(CheckRow(law.name, name, difference, law.allowed, seconds, error))
        if not rows[-1].ok:
            failed[backend] = law.name
    # Later runs use these findings to choose a backend: its failures and its speeds.
    for place in dict.fromkeys((device, CPU)):
        measured = {
            backend: speed for (name, backend), speed in speeds.items() if name == str(place)
        }
        keep_findings(place, Findings(failed if place == device else None, measured))
    ways = tuple(ways_of(device))
    return CheckReport(device_name(device), _facts(device), tuple(rows), speeds, ways)


def _facts(device: torch.device) -> str:
    """Return a text with the device's cores or memory and the versions of torch and gputune."""
    versions = f"torch {torch.__version__}, gputune {__version__}"
    if device.type == "cpu":
        return f"{count(cores(), 'core')}; {versions}"
    free, total = map(size_words, torch.cuda.mem_get_info(device))
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return f"capability {capability}, {free} of {total} free; {versions}, CUDA {torch.version.cuda}"
