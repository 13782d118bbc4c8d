"""Learning-rate schedules by hypergradients compared with random search for one constant rate.

    python scripts/reproduce/hypergradient_schedules.py
    python scripts/reproduce/hypergradient_schedules.py --splits 10 --out OUT

The second command writes table.md and results.json into OUT.

The data are digits. A 64-32-10 tanh network is trained by Adam for 5 epochs in batches of 64, which
is 100 steps of 1,280 rows per fold. Ten learning rates (5 segments of the training x 2 layers) move
down the mean validation loss by hypergradients, from 3 constant starting points. They are compared
with the best of 10, 30 and 240 constant rates drawn from the same range, and with the same
hypergradient search on one rate, for which random search is as good. Every best configuration is
trained again on all rows of the search. Its loss on rows that no search has used is shown too.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import loguniform
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, train_test_split

import gputune

sys.path.append(str(Path(__file__).parents[1]))
from benchmark.report import describe_machine, positive, table

ROWS = 1600
FOLDS = 5
BATCH = 64
EPOCHS = 5
LOW = 1e-5
HIGH = 1.0
STARTS = (1e-3, 1e-2, 1e-1)
OUTER_STEPS = 10
DRAWS = (10, 30, 240)
NETWORK = {"depth": 1, "width": 32, "activation": "tanh", "batch_size": BATCH}

SCHEDULES = "descent, 10 rates"
ONE_RATE = "descent, 1 rate"


@dataclass(frozen=True)
class Result:
    """The result of one search on one split.

    ``trials`` is the number of configurations trained, each in all folds. ``seconds`` is the time
    of the search, without the training of its best configuration on all rows. ``loss`` is the best
    mean validation loss, with its standard error over the folds. ``held_out`` has the log loss of
    each held-out row under the best configuration. ``rates`` are its rates: a number, or (segments,
    layers). ``groups`` has the best loss of every n draws out of all, if n draws are the search;
    otherwise it is empty.
    """

    search: str
    trials: int
    seconds: float
    loss: float
    std_error: float
    held_out: np.ndarray
    rates: Any
    groups: tuple[float, ...] = ()

    @property
    def held_out_loss(self) -> float:
        return float(self.held_out.mean())

    def row(self) -> str:
        """The line of the report after the split's number."""
        numbers = (
            f"{self.seconds:.1f}|{self.loss:.4f}|{self.std_error:.4f}|{self.held_out_loss:.4f}"
        )
        if len(self.groups) > 1:
            low, middle, high = np.quantile(self.groups, (0, 0.5, 1), method="nearest")
            numbers += (
                f"|{low:.4f} to {high:.4f}, median {middle:.4f}, of {len(self.groups)} groups"
            )
        return f"{self.search}|{self.trials} x {FOLDS}|{numbers}"


@dataclass(frozen=True)
class Split:
    """Rows to search on with their folds, and held-out rows.

    Draws, starting weights and row order have the same ``seed``.
    """

    seed: int
    X: np.ndarray
    y: np.ndarray
    folds: list[tuple[np.ndarray, np.ndarray]]
    X_out: np.ndarray
    y_out: np.ndarray


def split_of(seed: int) -> Split:
    """Return digits, pixels in 0..1, with 1,600 rows to search on and 197 held out."""
    X, y = load_digits(return_X_y=True)
    X, X_out, y, y_out = train_test_split(X / 16, y, train_size=ROWS, stratify=y, random_state=seed)
    folds = list(StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(X, y))
    # 20 steps an epoch in every fold
    assert {len(train) for train, _ in folds} == {ROWS - ROWS // FOLDS}
    return Split(seed, X, y, folds, X_out, y_out)


def run(split: Split, *, draws: Sequence[int], outer_steps: int) -> list[Result]:
    common = {
        "cv": split.folds,
        "numbers": "none",
        "optimizer": "adam",
        "max_epochs": EPOCHS,
        "epoch": "last",
        "include_default": False,
        "space": {"lr": loguniform(LOW, HIGH), **NETWORK},
        "random_state": split.seed,
        "verbose": 0,
    }
    results = []
    for name, segments, per_layer in ((SCHEDULES, 5, True), (ONE_RATE, 1, False)):
        method = gputune.Hypergradient(
            outer_steps=outer_steps, segments=segments, per_layer=per_layer
        )
        begin = time.perf_counter()
        starts = [{"lr": lr, **NETWORK} for lr in STARTS]
        study = gputune.tune(
            "mlp", split.X, split.y, n_trials=0, include=starts, method=method, **common
        )
        results.append(_result(name, study, split, time.perf_counter() - begin))
    begin = time.perf_counter()
    study = gputune.tune(
        "mlp", split.X, split.y, n_trials=max(draws), scoring="neg_log_loss", **common
    )
    seconds = time.perf_counter() - begin
    losses = np.array(
        [-trial.score if np.isfinite(trial.score) else np.inf for trial in study.trials]
    )
    for n in draws:  # the first n draws of a search equal a search with n draws
        part = replace(study, trials=study.trials[:n], curves=study.curves[:n])
        found = _result(f"random, 1 rate, {n} draws", part, split, seconds * n / len(losses))
        groups = losses[: len(losses) // n * n].reshape(-1, n).min(1)
        results.append(replace(found, groups=tuple(groups.tolist())))
    return results


def _result(name: str, study: gputune.Study, split: Split, seconds: float) -> Result:
    best = study.best_trial
    chances = study.best_model().predict_proba(split.X_out)[
        np.arange(len(split.y_out)), split.y_out
    ]
    # a chance of 0 stays a number
    held_out = -np.log(np.maximum(chances, np.finfo(chances.dtype).tiny))
    return Result(
        name, len(study.trials), seconds, -best.score, best.std_error, held_out, best.params["lr"]
    )


def report(splits: Sequence[Sequence[Result]]) -> str:
    """Return the page: every split's table, gains and losses, and the resulting rates."""
    head = "split|search|trainings|seconds|fold-mean loss|+-|held-out loss|best of every n draws"
    rows = [f"{seed}|{result.row()}" for seed, results in enumerate(splits) for result in results]
    names = [r.search for r in splits[0]]
    pairs = [(SCHEDULES, other) for other in names[1:]] + [(ONE_RATE, other) for other in names[2:]]
    gaps = "first|second|fold-mean loss|lower in|held-out loss|lower in|clearly lower, higher"
    rates = []
    for seed, results in enumerate(splits):
        layers = [", ".join(f"{lr:.2g}" for lr in layer) for layer in np.array(results[0].rates).T]
        rates.append(f"- split {seed}: first layer {layers[0]}; second layer {layers[1]}")
    parts = [
        f"Digits, {ROWS} rows in {FOLDS} folds; 64-32-10 tanh, Adam, {EPOCHS} epochs in batches "
        f"of {BATCH}. The rows\nheld out took no part in the search. +- is the standard error, "
        "over folds or over rows.",
        table(head, rows),
        "Losses of the first less those of the second, mean and range over the splits; clear is "
        "a difference of more\nthan two standard errors over the held-out rows.",
        table(gaps, [_compared(splits, *pair) for pair in pairs]),
        "The 10 rates, segments of the training from first to last:",
        "\n".join(rates),
    ]
    return "\n\n".join(parts) + "\n"


def _compared(splits: Sequence[Sequence[Result]], first: str, second: str) -> str:
    """Return a row that compares two searches.

    It has the difference of their losses, and the number of splits in which the first one is lower.
    """
    pairs = [
        tuple(next(r for r in s if r.search == name) for name in (first, second)) for s in splits
    ]
    in_folds = np.array([a.loss - b.loss for a, b in pairs])
    rows = np.array([a.held_out - b.held_out for a, b in pairs])
    held_out = rows.mean(1)
    clear = np.abs(held_out) > 2 * rows.std(1, ddof=1) / np.sqrt(rows.shape[1])
    lower = "|".join(
        f"{gaps.mean():+.4f} ({gaps.min():+.4f} to {gaps.max():+.4f})|{(gaps < 0).sum()} of "
        f"{len(pairs)}"
        for gaps in (in_folds, held_out)
    )
    return (
        f"{first}|{second}|{lower}|{(clear & (held_out < 0)).sum()}, "
        f"{(clear & (held_out > 0)).sum()}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--splits", type=positive, default=3, help="each with other held-out rows (default 3)")
    add("--out", type=Path, help="folder for the table (Markdown) and all numbers (JSON)")
    add("--draws", type=positive, default=max(DRAWS), help=f"at most (default {max(DRAWS)})")
    add("--outer-steps", type=positive, default=OUTER_STEPS, help=f"default {OUTER_STEPS}")
    options = parser.parse_args(arguments)
    draws = sorted({min(n, options.draws) for n in DRAWS})
    splits = []
    rows = []
    for seed in range(options.splits):
        splits.append(run(split_of(seed), draws=draws, outer_steps=options.outer_steps))
        print(
            f"split {seed}: {', '.join(f'{r.search}: {r.loss:.4f}' for r in splits[-1])}",
            flush=True,
        )
        for r in splits[-1]:
            rows.append(
                asdict(r)
                | {"split": seed, "held_out": r.held_out.tolist(), "held_out_loss": r.held_out_loss}
            )
    page = report(splits)
    print(f"\n{page}", end="")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        whole = {"machine": describe_machine(with_card=True), "results": rows}
        (options.out / "table.md").write_text(page)
        (options.out / "results.json").write_text(
            json.dumps(whole, indent=1, allow_nan=False) + "\n"
        )
        print(f"\nwritten: {options.out / 'table.md'}, {options.out / 'results.json'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
