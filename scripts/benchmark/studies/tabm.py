"""TabM-mini as a module, and RealMLP: the ensembles of their trials after equal seconds."""

import math
from argparse import Namespace
from dataclasses import dataclass, field
from time import process_time
from typing import Any

import numpy as np
import torch
from scipy.stats import loguniform, uniform
from torch import Tensor, nn
from torch.nn import functional

import gputune
from benchmark.report import Clock, begin_on_one_thread, publish, published, table
from benchmark.studies import many_rows
from benchmark.studies.tables import FOLDS, Split, loader
from gputune.callbacks import Callback, StopSearch

NAMES = ("california", "letter", "protein")
SECONDS = 600.0
TRIALS = 8
EPOCHS = 64
DRAWN = 2
LONGEST = 500  # epochs of TabM-mini, which its time does not allow
# Epochs without a better score, after which a trial of TabM-mini ends, as in its paper.
PATIENCE = 16
SIDES = {"RealMLP": 0, "TabM-mini, 8 copies": 8, "TabM-mini, 32 copies": 32}

HOW = """\
TabM-mini (Gorishniy et al. 2025, arXiv:2410.24210) as a user's module: copies of the inputs with a
learned scale each, shared hidden layers (3 of width 256), an output layer for each copy, and piecewise
linear encodings of numbers. Each copy has its own loss, and predictions are averaged. It trains up
to {drawn} configurations, each until {patience} epochs bring no better score. RealMLP searches the space
realmlp with up to {trials} trials of {epochs} epochs. All searches have {folds} folds. A fifth of the
rows is held out at random. Each search stops at the latest after {seconds:.0f} seconds of the processor
on one thread. The error is that of the ensemble of the trials with a score on the held-out rows (RMSE in
standard deviations of the target, or 1 - accuracy). Seconds count everything, epochs are those of all
trials.
"""


class TabMMini(nn.Module):
    """TabM-mini. With one output, its output is the mean of the copies.

    Otherwise it is the logarithm of the mean probability.
    """

    def __init__(
        self, n_features: int, n_outputs: int, copies: int = 32, width: int = 256, depth: int = 3
    ) -> None:
        super().__init__()
        self.n_copies = copies
        self.scale = nn.Parameter(torch.randint(0, 2, (copies, n_features)) * 2.0 - 1)
        sizes = [n_features, *[width] * depth]
        self.hidden = nn.ModuleList(
            nn.Linear(*pair) for pair in zip(sizes, sizes[1:], strict=False)
        )
        self.dropout = gputune.models.Dropout()
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(copies, width, n_outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(copies, n_outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        out = self.copies(x)
        if out.shape[-1] == 1:
            return out.mean(1)
        return out.log_softmax(-1).logsumexp(1) - math.log(self.n_copies)

    def copies(self, x: Tensor) -> Tensor:
        """Return the outputs of all copies: (rows, copies, n_outputs)."""
        h = x.unsqueeze(1) * self.scale
        for layer in self.hidden:
            h = self.dropout(functional.relu(layer(h)))
        return torch.einsum("nkw,kwo->nko", h, self.weight) + self.bias


def mean_loss(module: TabMMini, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean of the losses of all copies, for each row."""
    x, y = batch
    outputs = module.copies(x)
    if outputs.shape[-1] == 1:
        return (outputs.squeeze(-1) - y.reshape(-1, 1)).square().mean(1)
    copies = module.n_copies
    logits, labels = outputs.flatten(0, 1), y.repeat_interleave(copies)
    return functional.cross_entropy(logits, labels, reduction="none").reshape(-1, copies).mean(1)


SPACE = {
    "lr": loguniform(1e-3, 4e-3),
    "weight_decay": loguniform(1e-4, 1e-2),
    "dropout": uniform(0.0, 0.3),
    "batch_size": 256,
    "optimizer": "adamw",
    "numbers": "piecewise",
}


class Limit(Callback):
    """Stop a search when the process has used its seconds of the processor."""

    def __init__(self, seconds: float) -> None:
        self.end = process_time() + seconds

    def on_epoch(self, curves: Any) -> None:
        if process_time() > self.end:
            raise StopSearch


@dataclass(frozen=True)
class Result(many_rows.Result):
    """The held-out error of the ensemble of a side's trials, and what the search cost."""

    epochs: int = field(kw_only=True)


def run(options: Namespace) -> int:
    load = loader(options.data, "--tabm")
    machine = begin_on_one_thread()
    results = published(options.out, "tabm", machine, "results", Result)
    done = {(one.table, one.side) for one in results}
    for name in options.rows or NAMES:
        split = standardized(many_rows.split_of(name, load))
        for side in SIDES:
            if (name, side) in done:
                continue
            clock = Clock()
            study = search(side, split)
            model, trials = many_rows.final_model(study)
            error = many_rows.error_of(split, model)
            epochs = int(np.isfinite(study.curves).any(axis=2).sum())
            results.append(Result(name, side, len(split.X), error, *clock(), trials, epochs=epochs))
            print(results[-1], flush=True)
            whole = {"machine": machine, "results": results}
            publish(options.out, "tabm", "TabM-mini and RealMLP", *words(results), **whole)
    return 0


def standardized(split: Split) -> Split:
    """Return the rows with a numeric target in units of its standard deviation."""
    if split.task != "regression":
        return split
    mean, std = split.y.mean(), split.y.std()
    y, y_test = ((y - mean) / std for y in (split.y, split.y_test))
    return Split(split.X, y, split.X_test, y_test, split.task)


def search(side: str, split: Split) -> gputune.Study:
    """Return the search of one of the two models, stopped when its seconds are used."""
    limit = [Limit(SECONDS)]
    if not SIDES[side]:
        return split.search("realmlp", n_trials=TRIALS, max_epochs=EPOCHS, callbacks=limit)
    return split.search(
        TabMMini,
        space={**SPACE, "module__copies": SIDES[side]},
        include_default=False,
        n_trials=DRAWN,
        max_epochs=LONGEST,
        patience=PATIENCE,
        training_step=mean_loss,
        callbacks=limit,
    )


def words(results: list[Result]) -> tuple[str, str]:
    """Return the description and the table of errors."""
    of = {(one.table, one.side): one for one in results}
    rows = []
    for name in dict.fromkeys(one.table for one in results):
        found = [of[name, side] for side in SIDES if (name, side) in of]
        cells = [
            f"{one.error:.4f} ({one.cpu:,.0f} s, {one.trials} trials, {one.epochs} epochs)"
            for one in found
        ]
        gaps = [f"{one.error / found[0].error - 1:+.1%}" for one in found[1:]]
        rows.append("|".join([name, f"{found[0].rows:,}", *cells, *gaps]))
    how = HOW.format(
        drawn=DRAWN,
        patience=PATIENCE,
        seconds=SECONDS,
        trials=TRIALS,
        epochs=EPOCHS,
        folds=FOLDS,
    )
    gaps = "8 copies to RealMLP|32 copies to RealMLP"
    return how, table(f"table|training rows|{'|'.join(SIDES)}|{gaps}", rows)
