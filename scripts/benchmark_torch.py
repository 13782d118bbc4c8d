"""PyTorch's side of the benchmark: the plain loop, as fast as eager PyTorch goes with one network at a time."""

import time

import numpy as np
import torch
from benchmark_cores import over_cores
from benchmark_work import BATCH_SIZES, Fold, Trial, Work, standardised
from torch import nn
from torch.nn.functional import cross_entropy


def train_with_torch(work: Work, cores: int) -> np.ndarray:
    """Return the last-epoch accuracies (C, F)."""
    return over_cores(fit, work, cores)


def fit(fold: Fold, trial: Trial, epochs: int, device: str = "cpu") -> float:
    """Train one network on one fold.

    What was faster than its alternatives: fused Adam, rows shuffled once an epoch and sliced, no DataLoader,
    denormal numbers taken for zero.
    """
    x, y, x_valid, y_valid = (torch.from_numpy(part).to(device) for part in fold)
    width, classes = trial["width"], int(y.max()) + 1
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(x.shape[1], width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)
    ).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=trial["lr"], fused=True)
    torch.set_flush_denormal(True)
    for _ in range(epochs):
        order = torch.randperm(len(x), device=device)
        batches = (torch.split(part.index_select(0, order), trial["batch_size"]) for part in (x, y))
        for rows, labels in zip(*batches):
            optimizer.zero_grad()
            cross_entropy(network(rows), labels).backward()
            optimizer.step()
    torch.set_flush_denormal(False)
    with torch.no_grad():
        return float((network(x_valid).argmax(1) == y_valid).float().mean())


def eager_seconds(work: Work, device: str) -> tuple[float, int]:
    """Seconds that the loop would take for the whole work on one device, and the number of trials it was timed on.

    One trial of each batch size is trained on all folds. The rest is in proportion to the steps, whose time on
    a GPU is that of their launches, whatever the batch and the width.
    """
    firsts = (next((t for t in work.trials if t["batch_size"] == size), None) for size in BATCH_SIZES)
    part = [trial for trial in firsts if trial is not None]
    folds = standardised(work)
    fit(folds[0], part[0], 1, device)  # warm-up
    begin = time.perf_counter()
    for trial in part:
        for fold in folds:
            fit(fold, trial, work.epochs, device)
    seconds = time.perf_counter() - begin
    return seconds * work.steps(work.trials) / work.steps(part), len(part)
