"""Member-steps per second on one device: gputune and its rivals.

The rivals are a plain loop, the same loop in CUDA graphs, and JAX's vmap if JAX is installed.

    python scripts/gpu_rivals.py [--device cuda] [--trials 1000] [--epochs 20]

The network is an MLP with two hidden layers of 64, for 64 inputs and 10 classes. It is trained by
AdamW with minibatches of 32, in 5 folds of 1,000 rows. The loops train one network for some
seconds. gputune trains all trials in all folds and scores them. Prints one JSON object.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import KFold
from torch import nn
from torch.nn import functional

SECONDS = 5.0
WARM = 11
WIDTH = 64
INPUTS = 64
CLASSES = 10
BATCH = 32
ROWS = 1000
FOLDS = 5


def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(ROWS, INPUTS)).astype(np.float32), rng.integers(CLASSES, size=ROWS)


def steps_a_second(step, wait):
    """Take a step repeatedly and return the number of steps per second."""
    for _ in range(WARM):
        step()
    wait()
    begin = time.perf_counter()
    taken = 0
    while time.perf_counter() - begin < SECONDS:
        for _ in range(20):
            step()
        wait()
        taken += 20
    return taken / (time.perf_counter() - begin)


def loop(device, *, graphed=False):
    """Return a network and a function that takes one minibatch after another."""
    X, y = (torch.from_numpy(array).to(device) for array in data())
    layers = (
        nn.Linear(INPUTS, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, CLASSES),
    )
    module = nn.Sequential(*layers).to(device)
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3, capturable=graphed)
    rows = torch.arange(BATCH, device=device)

    def step():
        rows.add_(BATCH).remainder_(ROWS)
        loss = functional.cross_entropy(module(X[rows]), y[rows])
        optimizer.zero_grad(set_to_none=not graphed)
        loss.backward()
        optimizer.step()

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    if not graphed:
        return steps_a_second(step, wait)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return steps_a_second(graph.replay, wait)


def steps(trials, epochs):
    return trials * FOLDS * -(-(ROWS - ROWS // FOLDS) // BATCH) * epochs


def gputune_search(device, trials, epochs, backend):
    import gputune

    rates = np.geomspace(1e-4, 1e-2, trials).tolist()
    space = {"lr": rates, "width": [WIDTH], "batch_size": [BATCH], "depth": [2]}
    options = {
        "n_trials": trials,
        "include_default": False,
        "cv": FOLDS,
        "verbose": 0,
        "max_epochs": epochs,
    }
    begin = time.perf_counter()
    gputune.tune("mlp", *data(), space=space, device=str(device), backend=backend, **options)
    return steps(trials, epochs) / (time.perf_counter() - begin)


def jax_vmap(trials, epochs):
    """Train all trials in all folds as one JAX program, vmapped over both.

    The time of compilation is not counted.
    """
    sys.path.append(str(Path(__file__).parent))  # python -P leaves it out
    from benchmark import work
    from benchmark.engines import jax

    jax.CHUNK_BYTES = 4 << 30  # all at once: a card has no cache that they should stay in
    X, y = data()
    drawn = [
        {"lr": lr, "batch_size": BATCH, "width": WIDTH} for lr in np.geomspace(1e-4, 1e-2, trials)
    ]
    folds = [(X[train], y[train], X[valid], y[valid]) for train, valid in KFold(FOLDS).split(X)]
    begin = time.perf_counter()
    jax.train_group(drawn, epochs, folds, tuple(range(trials)))
    return steps(trials, epochs) / (time.perf_counter() - begin - work.compile_seconds)


def main():
    """Print the measurements; a method that raised an error is printed with its error."""
    global SECONDS
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    device = options.device
    size = (options.trials, options.epochs)
    SECONDS = min(SECONDS, options.trials / 10)
    ways = {
        "plain loop": partial(loop, device),
        "plain loop in CUDA graphs": partial(loop, device, graphed=True),
        "JAX vmap": partial(jax_vmap, *size),
        "gputune, eager": partial(gputune_search, device, *size, "eager"),
        "gputune, recorded": partial(gputune_search, device, *size, "recorded"),
        "gputune, kernel": partial(gputune_search, device, *size, "kernel"),
    }
    if device.type != "cuda":
        del ways["plain loop in CUDA graphs"], ways["gputune, kernel"]
    found = {}
    for name, measure in ways.items():
        try:
            found[name] = measure()
        except Exception as error:  # the other methods are measured anyway
            found[name] = f"{type(error).__name__}: {error}"
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(
        json.dumps(
            {"device": card, "trials": options.trials, "member-steps a second": found}, indent=1
        )
    )


if __name__ == "__main__":
    main()
