"""Operations of modules: a training step in compiled code, compared with a recorded step.

Each operation of ``tests/operations.py`` that trains in compiled code is in a small net between two
linear layers, in float64, with 50 batches of 32 rows in an epoch. Both backends train 4 trials on 2
folds, on one core, and take turns. A time is the CPU time of one training step of one member, and
the smallest of all turns counts. Other programs on the machine hardly change it. Operations that
are slower in compiled code are in bold.
"""

import sys
import time
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmark.report import counted, publish, table
from gputune.engine.backend import torch_threads
from gputune.engine.members import MemberChunk
from gputune.engine.stacked import StackedChunk
from gputune.modules.inspection import traits_of
from gputune.modules.module import StackedModule
from gputune.scoring.validation import Validation

TESTS = Path(__file__).parents[3] / "tests"
ROWS = 3200
BATCH = 32
RATES = (0.001, 0.003, 0.01, 0.03)
TURNS = 5
HEAD = "operation|recorded, ms|compiled, ms|recorded / compiled"


@dataclass(frozen=True)
class Row:
    """The smallest measured times of a training step of one member, in milliseconds."""

    name: str
    recorded: float
    compiled: float

    @property
    def ratio(self) -> float:
        """The speed of compiled code divided by the speed of recorded steps."""
        return self.recorded / self.compiled

    def row(self) -> str:
        ratio = f"{self.ratio:.2f}" if self.ratio >= 1 else f"**{self.ratio:.2f}**"
        return f"`{self.name}`|{self.recorded:.4f}|{self.compiled:.4f}|{ratio}"


def run(options: Namespace) -> int:
    """Measure the chosen operations, print them, and write them.

    Returns 1 if an operation is slower in compiled code.
    """
    operations = _of_tests("operations").OPERATIONS
    rows = []
    for name, operation in operations.items():
        if operation.backend != "compiled":
            continue
        if options.rows and not any(word in name for word in options.rows):
            continue
        row = measure(name, operation, options.repeats or TURNS)
        rows.append(row)
        print(f"| {row.row().replace('|', ' | ')} |", flush=True)
    slower = [row.name for row in rows if row.ratio < 1]
    sentence = f"{counted(len(slower), 'operation')} of {len(rows)} slower in compiled code"
    if slower:
        sentence += f": {', '.join(slower)}"
    rows.sort(key=lambda row: row.ratio)
    parts = (__doc__ or "", sentence + ".", table(HEAD, (row.row() for row in rows)))
    publish(options.out, "operations", "Steps of operations", *parts, rows=rows)
    return int(bool(slower))


def _of_tests(name: str) -> ModuleType:
    """Import a module of gputune's tests."""
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    return __import__(name)


def measure(name: str, operation: Any, turns: int) -> Row:
    """Measure a training step with an operation in both backends, which take turns."""
    problems = _of_tests("problems")
    data = problems.make_data(operation.task, n=ROWS, weights=operation.weights, copies=False)
    inputs: Tensor = _of_tests("operations").INPUTS[operation.rows]
    repeats = -(-ROWS // len(inputs))
    # (rows, ...) -> (1, ROWS, ...)
    tiled = torch.cat([inputs] * repeats)[:ROWS]
    data = replace(data, inputs=(tiled[None],))
    config = {"optimizer": "adam", **operation.config, "batch_size": BATCH}
    configs = problems.fill(*({"lr": rate, **config} for rate in RATES))
    objective = operation.objective
    network = StackedModule(
        operation.build,
        configs,
        problems.shape_of(data),
        seed=0,
        traits=traits_of(operation.build, configs[0], data, objective=objective),
        objective=objective,
    )
    steps = sum(-(-length // BATCH) for length in data.train_lengths)
    validation = Validation(data, None)
    with torch_threads(1), torch.no_grad():
        chunks = {
            "recorded": StackedChunk(network, validation, seed=0, horizon=100, recorded=True),
            "compiled": MemberChunk(network, validation, seed=0, horizon=100),
        }
        times: dict[str, list[float]] = {backend: [] for backend in chunks}
        # The first epoch also records the steps.
        for epoch in range(turns + 1):
            for backend, chunk in chunks.items():
                begin = time.process_time()
                chunk.advance(epoch)
                times[backend].append(time.process_time() - begin)
    milliseconds = {
        backend: 1e3 * min(seconds[1:]) / (steps * len(configs))
        for backend, seconds in times.items()
    }
    return Row(name, **milliseconds)
