"""JAX's side of the benchmark: one program per batch size and width, vmapped over trials and folds.

Each shape is compiled once, in the process that trains it. The workers are the same as for the
other engines: one process per core, one thread each, the longest work first.
"""

import functools
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np

from benchmark.work import Fold, Outcome, Trial, Work, add_compile_seconds, longest_first, run_jobs

# Bytes of weights, gradients and moments of one chunk, which should stay in the cache.
CHUNK_BYTES = 16 << 20
# of torch.optim.Adam
BETAS = (0.9, 0.999)
EPSILON = 1e-8

Group = tuple[int, ...]
"""Positions of trials with one batch size and width."""

Weights = list[tuple[Any, Any]]
"""A matrix (inputs, outputs) and a bias of each layer."""


def train(work: Work, cores: int) -> Outcome:
    groups = defaultdict[tuple[int, int], list[int]](list)
    for position in longest_first(work.trials):
        groups[work.trials[position]["batch_size"], work.trials[position]["width"]].append(position)
    # The widest of a batch size first, and larger groups before smaller ones.
    jobs = sorted(
        (tuple(group) for group in groups.values()), key=lambda group: -_flops(work, group)
    )
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    # The started processes compute with one thread each.
    with patch.dict(os.environ, XLA_FLAGS=flags):
        one = functools.partial(train_group, work.trials, work.epochs)
        results, *seconds = run_jobs(one, jobs, work, cores)
    scores = work.no_scores()
    for group, result in zip(jobs, results):
        scores[list(group)] = result
    return Outcome(scores, *seconds)


def _flops(work: Work, group: Group) -> float:
    width = work.trials[group[0]]["width"]
    steps = work.steps([work.trials[position] for position in group])
    return steps * (work.trials[group[0]]["batch_size"] * width * (width + work.X.shape[1]) + 1e5)


def train_group(
    trials: Sequence[Trial], epochs: int, folds: list[Fold], group: Group
) -> np.ndarray:
    """Train trials of one shape on all folds, in chunks of equal size; return accuracies (C, F)."""
    batch = trials[group[0]]["batch_size"]
    width = trials[group[0]]["width"]
    rows = stacked(folds, batch, epochs)
    classes = int(max(fold[1].max() for fold in folds)) + 1
    start = start_weights((rows["x"].shape[-1], width, width, classes))
    together = max(1, CHUNK_BYTES // (16 * len(folds) * sum(w.size + b.size for w, b in start)))
    chunks = -(-len(group) // together)
    size = -(-len(group) // chunks)
    rates = np.array([trials[position]["lr"] for position in group], np.float32)
    rates = np.pad(rates, (0, chunks * size - len(group)), mode="edge").reshape(chunks, size)
    begin = time.perf_counter()
    one = functools.partial(train_one, bool((rows["weights"].sum(-1) == 0).any()))
    over_trials = jax.vmap(one, in_axes=(0, None, None))  # a fold's trials share their minibatches
    compiled = (
        jax.jit(jax.vmap(over_trials, in_axes=(None, None, 0)))
        .lower(rates[0], start, rows)
        .compile()
    )
    add_compile_seconds(time.perf_counter() - begin)  # tracing too
    scores = np.concatenate([np.asarray(compiled(chunk, start, rows)).T for chunk in rates])
    return scores[: len(group)]


def start_weights(sizes: tuple[int, ...]) -> Weights:
    """Return starting weights from the distribution that ``torch.nn.Linear`` uses."""
    rng = np.random.default_rng(0)
    layers = []
    for inputs, outputs in zip(sizes, sizes[1:]):
        w, b = (
            rng.uniform(-(inputs**-0.5), inputs**-0.5, shape)
            for shape in ((inputs, outputs), outputs)
        )
        layers.append((w.astype(np.float32), b.astype(np.float32)))
    return layers


def stacked(folds: list[Fold], batch: int, epochs: int) -> dict[str, np.ndarray]:
    """Return the rows of all folds and their order, fold first; shorter folds are padded.

    ``order`` (F, epochs, steps, batch) has positions in x. The order is drawn here, because a
    program that draws and sorts takes longer to compile. ``weights`` (F, steps, batch) is 1 for a
    row, and 0 for padding.
    """
    rng = np.random.default_rng(0)
    longest, longest_valid = (max(len(fold[part]) for fold in folds) for part in (0, 2))
    batch = min(batch, longest)
    steps = -(-longest // batch)

    def padded(part: np.ndarray, length: int) -> np.ndarray:
        return np.pad(part, [(0, length - len(part))] + [(0, 0)] * (part.ndim - 1))

    def orders(rows: int) -> np.ndarray:
        drawn = [
            padded(rng.permutation(rows).astype(np.int32), steps * batch) for _ in range(epochs)
        ]
        return np.stack(drawn).reshape(epochs, steps, batch)

    classes = max(int(fold[1].max()) for fold in folds) + 1
    found = [
        {
            "x": padded(x, longest),
            "labels": padded(np.eye(classes, dtype=np.float32)[y], longest),
            "order": orders(len(x)),
            "weights": padded(np.ones(len(x), np.float32), steps * batch).reshape(steps, batch),
            "x_valid": padded(x_valid, longest_valid),
            "y_valid": np.pad(y_valid, (0, longest_valid - len(y_valid)), constant_values=-1),
            "n_valid": np.array(len(y_valid)),
        }
        for x, y, x_valid, y_valid in folds
    ]
    return {name: np.stack([one[name] for one in found]) for name in found[0]}


def train_one(some_steps_are_empty: bool, lr: Any, start: Any, rows: Any) -> Any:
    """Return the last-epoch accuracy of one trial on one fold, by scans over epochs and steps.

    The last minibatch of a shorter fold may have no row. A step without rows must change nothing.
    """

    def step(state: Any, where: Any) -> Any:
        order, weights = where
        gradients = jax.grad(_loss)(state[0], rows["x"][order], rows["labels"][order], weights)
        new = _adam(state, gradients, lr)
        if some_steps_are_empty:
            new = jax.tree.map(lambda a, b: jnp.where(weights.sum() > 0, a, b), new, state)
        return new, None

    def epoch(state: Any, order: Any) -> Any:
        return jax.lax.scan(step, state, (order, rows["weights"]))

    zeros = jax.tree.map(jnp.zeros_like, start)
    (trained, *_), _ = jax.lax.scan(epoch, (start, zeros, zeros, jnp.zeros(())), rows["order"])
    right = _logits(trained, rows["x_valid"]).argmax(1) == rows["y_valid"]
    return right.sum() / rows["n_valid"]


def _logits(weights: Any, x: Any) -> Any:
    for number, (w, b) in enumerate(weights):
        x = (x if number == 0 else jax.nn.relu(x)) @ w + b
    return x


def _loss(weights: Any, x: Any, labels: Any, w: Any) -> Any:
    losses = -(jax.nn.log_softmax(_logits(weights, x)) * labels).sum(1)
    return (w * losses).sum() / jnp.maximum(w.sum(), 1)


def _adam(state: Any, gradients: Any, lr: Any) -> Any:
    weights, first, second, steps = state
    steps = steps + 1

    def update(w: Any, m: Any, v: Any) -> Any:
        m = m / (1 - BETAS[0] ** steps)
        v = v / (1 - BETAS[1] ** steps)
        return w - lr * m / (jnp.sqrt(v) + EPSILON)

    first = jax.tree.map(lambda m, g: BETAS[0] * m + (1 - BETAS[0]) * g, first, gradients)
    second = jax.tree.map(lambda v, g: BETAS[1] * v + (1 - BETAS[1]) * g * g, second, gradients)
    return jax.tree.map(update, weights, first, second), first, second, steps
