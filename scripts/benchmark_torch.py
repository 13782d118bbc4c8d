"""PyTorch's side of the benchmark: the plain loop, as fast as eager PyTorch goes with one network at a time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from benchmark_cores import over_cores
from benchmark_work import BATCH_SIZES, Fold, Outcome, Trial, Work, standardised
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


def train_with_torch(work: Work, cores: int) -> Outcome:
    """Train the work with one process a core."""
    return over_cores(fit, work, cores)


def fit(fold: Fold, trial: Trial, epochs: int, device: str = "cpu") -> float:
    """Train one network on one fold; return its accuracy on the validation rows after the last epoch."""
    with denormals_as_zero():
        for _, network in zip(range(epochs), train(fold, trial, device)):
            trained = network
    return accuracy(trained, fold)


def train(fold: Fold, trial: Trial, device: str = "cpu") -> Iterator[nn.Module]:
    """Yield the network after each epoch, for ever.

    What was faster than its alternatives: fused Adam, rows shuffled once an epoch and sliced, no DataLoader; the
    caller takes denormal numbers for zero.
    """
    x, y = (torch.from_numpy(part).to(device) for part in fold[:2])
    torch.manual_seed(0)
    network = make_network(x.shape[1], trial["width"], int(y.max()) + 1).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=trial["lr"], fused=True)
    while True:
        for rows, labels in batches(x, y, trial["batch_size"]):
            optimizer.zero_grad()
            cross_entropy(network(rows), labels).backward()
            optimizer.step()
        yield network


@contextmanager
def denormals_as_zero() -> Iterator[None]:
    """Take denormal numbers for zero in the block: products of them are many times slower."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def make_network(inputs: int, width: int, classes: int) -> nn.Sequential:
    """Return two hidden relu layers and a linear one."""
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)
    )


def batches(x: Tensor, y: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one epoch's minibatches in a new order, the last one shorter."""
    order = torch.randperm(len(x), device=x.device)
    yield from zip(*(torch.split(part.index_select(0, order), size) for part in (x, y)))


def accuracy(network: nn.Module, fold: Fold) -> float:
    """Return the accuracy on the validation rows of a fold."""
    device = next(network.parameters()).device
    x, y = (torch.from_numpy(part).to(device) for part in fold[2:])
    with torch.no_grad():
        return float((network(x).argmax(1) == y).float().mean())


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
