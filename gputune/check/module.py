"""The command ``gputune check --module``: find out in which backend a user's module trains, and how
fast each backend is.

A member is one trial on one fold. The times are seconds of one training step of one member. The
plain loop is what a PyTorch user would write: a module, an optimizer of ``torch.optim``, and a loop
over minibatches.
"""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from gputune.engine.backend import device_name, torch_threads
from gputune.engine.backends.base import Machine, Refusal, TrialWork
from gputune.engine.backends.selection import way_of
from gputune.engine.backends.table import BACKENDS, backend_named
from gputune.engine.choice import fastest_way, seconds_of_backend
from gputune.engine.job import Job
from gputune.engine.plan import backends_text
from gputune.engine.stop import entry
from gputune.ground.device import synchronize
from gputune.ground.errors import InputError, Interface
from gputune.ground.text import count, table
from gputune.ground.types import Config, Say
from gputune.modules.inspection import known_traits, note_fastest
from gputune.modules.network import ModuleNetwork
from gputune.population.outputs import call_module, in_mode
from gputune.population.population import arguments_text
from gputune.tuning.context import Context
from gputune.tuning.pipeline import prepared
from gputune.tuning.progress import Progress
from gputune.tuning.record import SearchCall
from gputune.version import __version__

FEATURES = 8
CLASSES = 3
_ROWS = 320  # of the made table
_TRIALS = 4  # trials that are timed together
PLAIN = "plain loop"
"""The name of the plain PyTorch loop in the report."""

MEASUREMENTS = (PLAIN, "compiled", "recorded", "eager", "loop")
"""The measurements of a module that trains in every backend."""

_PLAIN_STEPS = 10  # of an epoch
_PATIENCE_SECONDS = 0.2  # after this time, two epochs of the plain loop are enough
_IN_TURN_SECONDS = 2.0  # for the backend "loop" and the plain loop in turn


def made_table() -> tuple[np.ndarray, np.ndarray]:
    """Return random rows (n, 8) and targets of 3 classes (n,) for a module without a file."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(_ROWS, FEATURES)).astype(np.float32)
    return X, rng.permutation(_ROWS) % CLASSES


@dataclass(frozen=True)
class ModuleReport:
    """The backend in which a long search trains a user's module, and the speed of every backend.

    Attributes:
        module: The name of the module.
        facts: A text about the rows, the device and the versions.
        backend: The name of the backend.
        reason: A clause that says why no faster backend trains the module, or "".
        seconds: The seconds of a training step of one member, by the name of each backend that was
            timed, and of the plain loop.
        reasons: The reasons why other backends cannot train the module, by their names.
    """

    module: str
    facts: str
    backend: str
    reason: str
    seconds: Mapping[str, float]
    reasons: Mapping[str, str]

    def __str__(self) -> str:
        cells = []
        plain = self.seconds[PLAIN]
        for name, seconds in self.seconds.items():
            against = f"{plain / seconds:.1f}x" if name != PLAIN else ""
            cells.append([name, f"{1e3 * seconds:.3g} ms", against])
        header = ["backend", "a step of one trial on one fold", "speed / plain loop"]
        lines = [self.facts, "", table(header, cells, left=("backend",)), ""]
        names_by_reason: dict[str, list[str]] = {}
        for name, reason in self.reasons.items():
            names_by_reason.setdefault(reason, []).append(name)
        names_by_reason.pop(self.reason, None)  # the last line gives this reason
        for reason, names in names_by_reason.items():
            lines.append(f"not {' or '.join(names)}: {reason}")
        text = backends_text([self.backend], [self.reason])
        lines.append(f"{self.module} trains in a long search with: {text}")
        return "\n".join(lines)

    def json(self) -> str:
        """Return the report as JSON text."""
        milliseconds = {name: 1e3 * seconds for name, seconds in self.seconds.items()}
        report = {
            "module": self.module,
            "facts": self.facts,
            "backend": self.backend,
            "reason": self.reason,
            "milliseconds": milliseconds,
            "reasons": dict(self.reasons),
        }
        return json.dumps(report, indent=1)


def _leaves_to_faster(name: str, refusal: Refusal) -> bool:
    """Return whether a backend refuses a module because a faster backend trains it."""
    names = [*BACKENDS]  # from fast to slow
    return refusal.instead in names and names.index(refusal.instead) < names.index(name)


@entry
def check_module(call: SearchCall, tell: Say, interface: Interface) -> ModuleReport:
    """Measure the training speed of a user's module in every backend, and return the report.

    Args:
        call: The module, the rows and the options of a search. Its first trial has the
            hyperparameters.
        tell: A function to call with a description before each measurement.
        interface: The names of arguments in messages.
    """
    with prepared(call, Progress(0, interface=interface)) as (setup, context):
        return _Measurement(context, setup.first, tell).report()


class _Measurement:
    """Times the backends for trials of one module, which differ only in their learning rates."""

    def __init__(self, context: Context, params: Config, tell: Say) -> None:
        self.context = context
        self.tell = tell
        rate = float(context.complete(params)["lr"])
        configs = []
        for factor in np.geomspace(0.5, 1.0, _TRIALS).tolist():
            configs.append(context.complete({**params, "lr": factor * rate}))
        (self.group,) = context.trainer.groups(configs)
        self.config = configs[-1]
        self.data = context.data.of(self.config)
        self.job = context.trainer.job(Job, epochs=context.epochs)
        self.plain = math.inf  # seconds of a step of the plain loop
        self.seconds: dict[str, float] = {}
        self.reasons: dict[str, str] = {}

    def report(self) -> ModuleReport:
        """Time all backends, and return the report."""
        self.tell(PLAIN)
        self.plain = self._plain_seconds(_PATIENCE_SECONDS)
        if way_of("recorded", self._work()).name != "loop" and self.data.device.type == "cpu":
            self._time_as_a_search_does()
        self._time_other_backends()
        if self.seconds.get("loop", math.inf) < math.inf:
            self._time_loops_in_turn()
        trainer = self.context.trainer
        way = way_of(trainer.backend, self._work(), trainer.reason)
        seconds = {}
        for name in BACKENDS:
            if self.seconds.get(name, math.inf) < math.inf:
                seconds[name] = self.seconds[name]
        seconds[PLAIN] = self.plain
        name = self.context.choice.name
        return ModuleReport(name, self._facts(), *way, seconds, self.reasons)

    def _work(self) -> TrialWork:
        """Return the trial of the module, with everything that is known about the module."""
        traits = known_traits(self.context.choice.module_class, self.context.data)
        known = traits.get(arguments_text(self.config))
        return TrialWork(self.group.kind, self.config, known, self.data)

    def _time_as_a_search_does(self) -> None:
        """Choose the backend as a long search does, which times some backends."""
        found = fastest_way(self.job, self.data, self.group, member_steps=math.inf, tell=self.tell)
        self.seconds.update(found.seconds)
        for name, seconds in found.seconds.items():
            if seconds == math.inf:
                self.reasons[name] = found.slow or found.uncoded
        builder = self.context.choice.module_class
        assert builder is not None
        for arguments in {arguments_text(config) for config in self.group.configs}:
            note_fastest(builder, self.context.data, arguments, found)

    def _time_other_backends(self) -> None:
        """Time the backends that are not timed yet, or note why they cannot train the module."""
        work = self._work()
        machine = Machine(self.data.device, self.data.dtype, work.kind)
        for name in BACKENDS:
            if name in self.seconds or name in self.reasons:
                continue
            backend = backend_named(name)
            try:
                backend.check(machine)
            except InputError:  # the device does not have it
                continue
            refusal = backend.refuses(work)
            if refusal is not None:
                if not _leaves_to_faster(name, refusal):
                    self.reasons[name] = refusal.reason
                continue
            self.tell(name)
            trials = 1 if backend.takes_single_trials else _TRIALS
            group = self.group.part(0, trials)
            self.seconds[name] = seconds_of_backend(self.job, self.data, group, name)

    def _time_loops_in_turn(self) -> None:
        """Time the backend "loop" and the plain loop again, in turn, and keep the shortest times.

        Their speeds are nearly equal. On a busy machine, timing one after the other showed 0.5x for
        a module with a measured ratio of 1.0.
        """
        group = self.group.part(0, 1)
        begun = time.perf_counter()
        while time.perf_counter() - begun < _IN_TURN_SECONDS:
            seconds = seconds_of_backend(self.job, self.data, group, "loop")
            self.seconds["loop"] = min(self.seconds["loop"], seconds)
            self.plain = min(self.plain, self._plain_seconds(0.0))

    def _plain_seconds(self, patience: float) -> float:
        """Measure the seconds of one step of a plain PyTorch loop on one thread.

        The result is the shortest time of at least two epochs, for ``patience`` seconds.
        """
        device = self.data.device
        clock = time.process_time if device.type == "cpu" else time.perf_counter
        network = self.job.network(self.data, self.group.part(0, 1))
        assert isinstance(network, ModuleNetwork)
        module = in_mode(network.plain(device), training=True)
        trained = [w for w in module.parameters() if w.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=self.config["lr"], weight_decay=self.config["weight_decay"]
        )
        inputs, y = self.data.training_rows(0)
        y = y.to(self.data.dtype) if y.is_floating_point() else y
        size = int(self.config["batch_size"])
        order = torch.randperm(len(y))[: _PLAIN_STEPS * size].to(device)
        batches = torch.split(order[: max(1, len(order) // size) * size], size)
        objective = network.objective
        names = network.shape.names
        epochs = list[float]()
        begun = time.perf_counter()
        with torch_threads(1):
            while len(epochs) < 2 or time.perf_counter() - begun < patience:
                begin = clock()
                for batch in batches:
                    rows = [x[batch] for x in inputs]
                    if objective.step is None and objective.loss == "cross_entropy":
                        loss = functional.cross_entropy(call_module(module, rows, names), y[batch])
                    else:
                        losses = objective.losses(module, rows, y[batch], self.config, names=names)
                        loss = losses.mean()
                    optimizer.zero_grad()
                    torch.autograd.backward(loss)
                    optimizer.step()
                synchronize(device)
                epochs.append(clock() - begin)
        return min(epochs) / len(batches)

    def _facts(self) -> str:
        """Return a text about the module, the rows, the device and the versions."""
        known = self._work().traits
        parameters = 0 if known is None else known.parameters
        parts = [
            f"{self.context.choice.name} with {count(parameters, 'parameter')}",
            f"{count(self.data.n_rows, 'row')} in {count(self.data.n_folds, 'fold')}",
            f"batch size {self.config['batch_size']}",
            device_name(self.data.device),
            f"torch {torch.__version__}",
            f"gputune {__version__}",
        ]
        return ", ".join(parts)
