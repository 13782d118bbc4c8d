"""PyTorch's side of the benchmark: the plain loop, as fast as eager PyTorch trains one network.

The file also has skorch, which wraps such a loop, Ray Tune, which runs it, and the loop with its
whole step in one function of ``torch.compile``.
"""

import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from benchmark import work as shared
from benchmark.work import Fold, Outcome, Trial, Work, over_cores

# of torch.optim.Adam
BETAS = (0.9, 0.999)
EPSILON = 1e-8


def fit(fold: Fold, trial: Trial, epochs: int) -> float:
    """Train one network on one fold; return its last-epoch accuracy on the validation rows."""
    with denormals_as_zero():
        for _, network in zip(range(epochs), trained(fold, trial)):
            last = network
    return accuracy(last, fold)


train = functools.partial(over_cores, fit)  # one process a core


def trained(fold: Fold, trial: Trial) -> Iterator[nn.Module]:
    """Yield the network after each epoch, forever.

    These choices were faster than their alternatives: fused Adam, rows shuffled once per epoch and
    sliced, and no DataLoader. The caller flushes denormal numbers to zero.
    """
    x, y, network = _begin(fold, trial)
    optimizer = torch.optim.Adam(network.parameters(), lr=trial["lr"], fused=True)
    while True:
        for rows, labels in batches(x, y, trial["batch_size"]):
            optimizer.zero_grad()
            cross_entropy(network(rows), labels).backward()
            optimizer.step()
        yield network


def _begin(fold: Fold, trial: Trial) -> tuple[Tensor, Tensor, nn.Sequential]:
    x, y = map(torch.from_numpy, fold[:2])
    torch.manual_seed(0)
    width = trial["width"]
    classes = int(y.max()) + 1
    hidden = nn.Linear(x.shape[1], width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
    return x, y, nn.Sequential(*hidden, nn.Linear(width, classes))


@contextmanager
def denormals_as_zero() -> Iterator[None]:
    """Flush denormal numbers to zero in the block: products with them are many times slower."""
    torch.set_flush_denormal(True)
    # If gputune has set torch's threads in this process, MKL ignores threadpoolctl's limit. Two
    # threads that wait for each other at every product made this loop many times slower.
    torch.set_num_threads(torch.get_num_threads())
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def batches(
    x: Tensor, y: Tensor, size: int, generator: torch.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one epoch's minibatches in a new order; the last one may be shorter.

    The order is drawn from ``generator``, or from torch's own generator if it is None.
    """
    order = torch.randperm(len(x), generator=generator)
    yield from zip(*(torch.split(part.index_select(0, order), size) for part in (x, y)))


def accuracy(network: nn.Module, fold: Fold) -> float:
    x, y = map(torch.from_numpy, fold[2:])
    with torch.no_grad():
        return float((network(x).argmax(1) == y).float().mean())


def fit_skorch(fold: Fold, trial: Trial, epochs: int) -> float:
    """Train skorch's classifier of the same network, without its own validation split and
    callbacks.
    """
    import skorch

    X, y, X_valid, y_valid = fold
    classifier = skorch.NeuralNetClassifier(
        _begin(fold, trial)[2],
        # The loss of logits, as in the other engines; skorch's default expects probabilities.
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        optimizer__fused=True,
        lr=trial["lr"],
        batch_size=trial["batch_size"],
        max_epochs=epochs,
        iterator_train__shuffle=True,
        iterator_valid__batch_size=len(X_valid),
        train_split=None,
        callbacks="disable",
        verbose=0,
    )
    with denormals_as_zero():
        classifier.fit(X, y)
    return float(classifier.score(X_valid, y_valid))


train_skorch = functools.partial(over_cores, fit_skorch)


RAY_SETTINGS = {
    # Log files and a table on the screen would cost time and are not read.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    # Ray's signal handler would stay after the search and catch Ctrl-C in later work.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}


def train_ray(work: Work, cores: int) -> Outcome:
    """Train the work with Ray Tune, every trial on one core.

    Ray is started and stopped inside the call.
    """
    os.environ |= RAY_SETTINGS
    import ray
    from ray import tune

    begin = time.monotonic()
    folds = shared.standardised(work)
    trials = work.trials
    epochs = work.epochs

    def train_one(config: dict[str, Any]) -> None:
        began = time.monotonic()
        torch.set_num_threads(1)
        parts = ray.get(rows)  # mapped
        scores = [
            fit([part.copy() for part in fold], trials[config["position"]], epochs)
            for fold in parts
        ]
        tune.report({"scores": scores, "began": began, "process": os.getpid()})

    # The workers get this process's import path.
    with (
        patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)),
        tempfile.TemporaryDirectory() as folder,
    ):
        try:
            ray.init(
                "local",
                num_cpus=cores,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="error",
            )
            rows = ray.put(folds)
            results = tune.Tuner(
                tune.with_resources(train_one, {"cpu": 1}),
                param_space={"position": tune.grid_search(shared.longest_first(trials))},
                tune_config=tune.TuneConfig(reuse_actors=True),
                run_config=tune.RunConfig(storage_path=folder, verbose=0),
            ).fit()
        finally:
            ray.shutdown()
    scores = work.no_scores()
    began = []
    for result in results:
        if result.error is not None:
            raise result.error
        scores[result.metrics["config"]["position"]] = result.metrics["scores"]
        began.append((result.metrics["process"], result.metrics["began"]))
    return Outcome(scores, shared.last_began(began) - begin)


def train_compiled(work: Work, cores: int) -> Outcome:
    """Train the work with the compiled step.

    Each process compiles, and the cache of earlier calls is not used.
    """
    torch.compiler.reset()
    with tempfile.TemporaryDirectory() as folder:  # a cache that begins empty
        empty = {"TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        with patch.dict(os.environ, empty):
            return over_cores(fit_compiled, work, cores)


def fit_compiled(fold: Fold, trial: Trial, epochs: int) -> float:
    """Train one network on one fold; return its last-epoch accuracy on the validation rows."""
    x, y, network = _begin(fold, trial)
    weights = [parameter.detach() for parameter in network.parameters()]
    first, second = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    # Tensors, because a new Python number would cause another compilation.
    lr = torch.tensor(trial["lr"])
    steps = torch.zeros(())
    with denormals_as_zero():
        for _ in range(epochs):
            for rows, labels in batches(x, y, trial["batch_size"]):
                _timed(_compiled_step(), weights, first, second, rows, labels, lr, steps)
    return accuracy(network, fold)


@functools.cache
def _compiled_step() -> Callable[..., None]:
    # One compilation serves all widths and batch sizes. A compilation for each of them would take
    # longer than it saves.
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
    # here: it takes the plain loop's workers long to import
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    begin = time.perf_counter()
    step(*arguments)
    if counters["stats"]["unique_graphs"] > before:
        shared.add_compile_seconds(time.perf_counter() - begin)
