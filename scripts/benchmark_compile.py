"""The PyTorch loop whose whole step (forward, backward, Adam) is one function of ``torch.compile``."""

import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from benchmark_cores import over_cores
from benchmark_torch import accuracy, batches, denormals_as_zero, make_network
from benchmark_work import Fold, Outcome, Trial, Work
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy, linear

BETAS, EPSILON = (0.9, 0.999), 1e-8  # of torch.optim.Adam

_seconds = 0.0  # that this process has compiled


def train_with_compile(work: Work, cores: int) -> Outcome:
    """Train the work with one process a core; each compiles, and no earlier call has left it anything."""
    forget()
    with empty_cache():
        return over_cores(fit, work, cores, compile_seconds)


def fit(fold: Fold, trial: Trial, epochs: int) -> float:
    """Train one network on one fold; return its accuracy on the validation rows after the last epoch."""
    x, y = (torch.from_numpy(part) for part in fold[:2])
    torch.manual_seed(0)
    network = make_network(x.shape[1], trial["width"], int(y.max()) + 1)
    weights = [parameter.detach() for parameter in network.parameters()]
    first, second = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    # Tensors, because another number would be compiled anew.
    lr, steps = torch.tensor(trial["lr"]), torch.zeros(())
    with denormals_as_zero():
        for _ in range(epochs):
            for rows, labels in batches(x, y, trial["batch_size"]):
                _timed(_compiled_step(), weights, first, second, rows, labels, lr, steps)
    return accuracy(network, fold)


def compile_seconds() -> float:
    """Return the seconds that this process has compiled since ``forget``: of the steps in which it did."""
    return _seconds


def forget() -> None:
    """Let this process compile again."""
    global _seconds
    _seconds = 0.0
    torch.compiler.reset()


@contextmanager
def empty_cache() -> Iterator[None]:
    """Inside the block, this process and those it starts compile into a folder that begins empty."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        try:
            yield
        finally:
            os.environ.clear()
            os.environ |= before


@functools.cache
def _compiled_step() -> Callable[..., None]:
    # One compilation for all widths and batch sizes; one for each of them takes longer than it saves.
    compiled: Callable[..., None] = torch.compile(_step, dynamic=True)
    return compiled


def _step(
    weights: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    x: Tensor,
    y: Tensor,
    lr: Tensor,
    steps: Tensor,
) -> None:
    gradients = torch.func.grad(_loss)(weights, x, y)
    steps += 1
    fast, slow = (1 - beta**steps for beta in BETAS)
    for w, m, v, g in zip(weights, first, second, gradients):
        m.lerp_(g, 1 - BETAS[0])
        v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
        w.sub_(lr / fast * m / ((v / slow).sqrt() + EPSILON))


def _loss(weights: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
    for layer in range(0, len(weights), 2):
        x = linear(x if layer == 0 else x.relu(), weights[layer], weights[layer + 1])
    return cross_entropy(x, y)


def _timed(step: Callable[..., None], *arguments: Any) -> None:
    global _seconds
    before, begin = counters["stats"]["unique_graphs"], time.perf_counter()
    step(*arguments)
    if counters["stats"]["unique_graphs"] > before:
        _seconds += time.perf_counter() - begin
