"""How fast a device trains the built-in MLP: the same steps of few and of many members, timed.

A step takes some time whatever trains, and some more for each member: two numbers of members tell both.
"""

import math
import time
from itertools import pairwise

import numpy as np
import torch

from gputune.data.dataset import Dataset, Fold
from gputune.engine.backend import computing
from gputune.engine.findings import Speed
from gputune.engine.job import Job, train_chunk
from gputune.engine.plan import cores
from gputune.memory import synchronize
from gputune.population.population import ModelKind, Population, complete, hidden_widths
from gputune.types import Backend, Config

FOLDS, FEATURES, CLASSES, WIDTH, BATCH = 5, 64, 10, 64, 32
FEW = 4
MANY = {"cpu": 40, "cuda": 200}
"""Trials, each of which has a member in every fold."""

_ROWS, _EPOCHS = 640, 4  # 16 steps an epoch
_WARM = 2  # of these epochs: what is made on first use, and the recording


def measure_speed(device: torch.device, backend: Backend) -> Speed:
    """Train few and many trials for some epochs, in seconds, and return the seconds of a step."""
    data, many = _data(device), MANY[device.type]
    few, most = (_seconds_of_a_step(data, trials, backend) for trials in (FEW, many))
    member = max(0.0, most - few) / (FOLDS * (many - FEW))
    return Speed(max(0.0, few - FOLDS * FEW * member), member)


def work_of_a_step(config: Config, n_features: int, n_outputs: int, rows: int, kind: ModelKind) -> float:
    """Return what one step of a member costs, as a multiple of those that are timed here.

    Both of its parts go with the number of parameters: the update, once, and the products, for each row. One row costs
    a tenth of the update, in compiled code on an EPYC core.
    """
    hidden = hidden_widths(config) if kind == "mlp" else ()
    parameters: float = _parameters(n_features, *hidden, n_outputs)
    batch = min(int(config["batch_size"]), rows)
    return parameters * (10 + batch) / (_TIMED * (10 + BATCH))


def _parameters(*sizes: int) -> int:
    return sum((a + 1) * b for a, b in pairwise(sizes))


_TIMED = _parameters(FEATURES, WIDTH, WIDTH, CLASSES)


def _data(device: torch.device) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (_ROWS,), generator=generator).to(device)
    positions = torch.arange(_ROWS, device=device)
    nothing = torch.zeros(FOLDS, dtype=torch.float64, device=device)
    return Dataset(
        inputs=(torch.randn(1, _ROWS, FEATURES, generator=generator).to(device),),
        copies=(0,) * FOLDS,
        y=y,
        weights=None,
        folds=tuple(
            Fold(positions[positions % FOLDS != f], positions[positions % FOLDS == f]) for f in range(FOLDS)
        ),
        present=None,
        center=nothing,
        scale=nothing + 1,
        n_outputs=CLASSES,
        task="multiclass",
        target=y,
    )


def _seconds_of_a_step(data: Dataset, trials: int, backend: Backend) -> float:
    rates = np.geomspace(1e-4, 1e-2, trials).tolist()
    configs = (
        complete({"lr": lr, "width": WIDTH, "batch_size": BATCH}, optimizer="adamw", schedule="constant")
        for lr in rates
    )
    times: list[float] = []

    def note(_trials: int, _scores: np.ndarray) -> None:
        synchronize(data.device)
        times.append(time.perf_counter())

    job = Job(seed=0, epochs=_EPOCHS + _WARM, horizon=10**6, backend=backend)
    with computing(cores() if backend == "compiled" else 1):
        train_chunk(job, data, Population("mlp", tuple(range(trials)), tuple(configs)), note)
    steps = math.ceil(max(len(fold.train) for fold in data.folds) / BATCH)
    return min(b - a for a, b in pairwise(times[_WARM - 1 :])) / steps
