"""The trainings of the comparison: six methods of the paper and SGD with a tuned rate, alike in all else."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from reproduce_baydin2018_data import Data
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from gputune.models import MLP, LogisticRegression
from gputune.optim import SGDHD, AdamHD

BATCH, ALPHA0, DECAY, WIDTH = 128, 1e-3, 1e-4, 1000
GRID = (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)  # further constant rates for SGD
TUNED = "SGD, tuned lr"

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
METHODS: dict[str, Optimizer] = {
    "SGD": partial(torch.optim.SGD, lr=ALPHA0, weight_decay=DECAY),
    "SGD-HD": partial(SGDHD, lr=ALPHA0, hypergrad_lr=1e-3, rule="additive", lr_min=None, weight_decay=DECAY),
    "SGDN": partial(torch.optim.SGD, lr=ALPHA0, momentum=0.9, nesterov=True, weight_decay=DECAY),
    "SGDN-HD": partial(
        SGDHD, lr=ALPHA0, hypergrad_lr=1e-3, rule="additive", lr_min=None, momentum=0.9, nesterov=True,
        weight_decay=DECAY,
    ),
    "Adam": partial(torch.optim.Adam, lr=ALPHA0, weight_decay=DECAY),
    "Adam-HD": partial(AdamHD, lr=ALPHA0, hypergrad_lr=1e-7, rule="additive", lr_min=None, weight_decay=DECAY),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training: mean losses of each epoch (E,), and the learning rate of each step (T,)."""

    train_loss: np.ndarray
    valid_loss: np.ndarray
    lr: np.ndarray


Runs = dict[str, dict[str, list[Run]]]
"""Model -> method -> one run for each seed."""


def compare(data: Data, models: Sequence[str], *, epochs: int, seeds: int, width: int) -> Runs:
    """Train every model with every method; the tuned SGD is the best of the grid and of the paper's rate."""
    runs: Runs = {}
    total = len(models) * (len(METHODS) + len(GRID)) * seeds * epochs
    with tqdm(total=total, unit=" epochs", disable=None, leave=False, dynamic_ncols=True) as bar:
        for model in models:
            bar.set_description(model)

            def repeat(optimizer: Optimizer, model: str = model) -> list[Run]:
                return [
                    train(model, optimizer, data, epochs=epochs, seed=seed, width=width, bar=bar)
                    for seed in range(seeds)
                ]

            runs[model] = {method: repeat(optimizer) for method, optimizer in METHODS.items()}
            tried = {lr: repeat(partial(torch.optim.SGD, lr=lr, weight_decay=DECAY)) for lr in GRID}
            tried[ALPHA0] = runs[model]["SGD"]
            best = min(tried, key=lambda lr: median(run.valid_loss for run in tried[lr])[-1])
            runs[model][TUNED] = tried[best]
    return runs


def train(
    model: str, optimizer: Optimizer, data: Data, *, epochs: int, seed: int, width: int, bar: tqdm
) -> Run:
    """Train one model; the seed fixes the starting weights and the batches of every epoch."""
    torch.manual_seed(seed)
    network = build(model, data.X.shape[1], width)
    stepper = optimizer(network.parameters())
    train_loss, valid_loss, rates = [], [], []
    for _ in range(epochs):
        losses = []
        for rows in torch.randperm(len(data.y)).split(BATCH):
            losses.append(step(network, stepper, data.X[rows], data.y[rows]))
            rates.append(float(stepper.param_groups[0]["lr"]))
        train_loss.append(float(np.mean(losses)))
        with torch.no_grad():
            valid_loss.append(float(cross_entropy(network(data.X_valid), data.y_valid)))
        bar.update()
    return Run(np.array(train_loss), np.array(valid_loss), np.array(rates))


def build(model: str, n_features: int, width: int) -> nn.Module:
    """Return a model with torch's default starting weights, for ten classes."""
    if model == "logreg":
        return LogisticRegression(n_features, 10)
    return MLP(n_features, 10, width=width, depth=2, activation="relu")


def step(network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """Make one training step and return the loss of the batch before it."""
    optimizer.zero_grad()
    loss = cross_entropy(network(x), y)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def median(curves: Iterable[np.ndarray]) -> np.ndarray:
    """Return the median over seeds; a diverged value (NaN) is the worst of all."""
    return np.median([np.where(np.isnan(curve), np.inf, curve) for curve in curves], axis=0)
