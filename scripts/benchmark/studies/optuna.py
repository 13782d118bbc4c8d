"""Optuna's TPE through gputune compared with random search on digits, and the cost of ask and tell.

For each seed both searches have the same folds, starting weights and number of trials. Random
search draws all trials at once. TPE proposes them in batches, and receives the scores of a batch
before it proposes the next one. Requirement: the median over the seeds of TPE's best score is at
least that of random search. Ask and tell are timed inside the search. They are timed again with
only Optuna: a new sampler with the same seed is asked and told the same.
"""

import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import optuna
from scipy.stats import loguniform
from sklearn.datasets import load_digits

import gputune
from benchmark.report import describe_machine, publish, table
from gputune.api.study import Study
from gputune.methods.sampling import OptunaStudy, check_askable

BATCH = 16
BATCHES = 10
SEEDS = 10
EPOCHS = 10
FOLDS = 3
SPACE = {
    "lr": loguniform(1e-4, 1e-1),
    "batch_size": [64, 128, 256],
    "width": [16, 32, 64],
    "weight_decay": loguniform(1e-5, 1.0),
    "dropout": [0.0, 0.2],
}
HEAD = (
    "seed|best of random search|best of TPE|seconds: random, TPE|"
    "asking and telling, ms a trial: in the search, Optuna alone"
)


@dataclass(frozen=True)
class Row:
    """One seed: the best score and the seconds of each search, and the seconds of ask and tell.

    Ask and tell are timed in both ways.
    """

    seed: int
    random_best: float
    tpe_best: float
    random_seconds: float
    tpe_seconds: float
    bridge_seconds: float
    alone_seconds: float


def run(options: Namespace) -> int:
    machine = describe_machine()
    rows = []
    machine["versions"]["optuna"] = optuna.__version__
    for seed in range(options.repeats or SEEDS):
        rows.append(compare(seed, BATCHES))
        print(rows[-1], flush=True)
    middle = Row(0, *(statistics.median(column) for column in list(zip(*map(astuple, rows)))[1:]))
    trials = BATCH * BATCHES
    what = (
        f"Digits, {FOLDS} folds, {EPOCHS} epochs, {trials} trials a search; best accuracy, the "
        "mean over the folds."
    )
    text = table(
        HEAD, [*(_line(row.seed, row, trials) for row in rows), _line("median", middle, trials)]
    )
    title = f"Optuna's TPE in batches of {BATCH}"
    publish(options.out, "optuna", title, __doc__ or "", what, text, machine=machine, rows=rows)
    return int(middle.tpe_best < middle.random_best)


def compare(seed: int, batches: int) -> Row:
    begin = time.perf_counter()
    drawn = search(seed, "random", batches)
    middle = time.perf_counter()
    with timed() as spent:
        proposed = search(seed, gputune.OptunaSampler(sampler(seed), batch=BATCH), batches)
    seconds = middle - begin, time.perf_counter() - middle, sum(spent), alone(seed, proposed)
    return Row(seed, drawn.best_score, proposed.best_score, *seconds)


def search(seed: int, method: Any, batches: int) -> Study:
    X, y = load_digits(return_X_y=True)
    return gputune.tune(
        "mlp",
        X,
        y,
        space=SPACE,
        n_trials=BATCH * batches,
        include_default=False,
        method=method,
        cv=FOLDS,
        max_epochs=EPOCHS,
        random_state=seed,
        verbose=0,
    )


def sampler(seed: int) -> optuna.samplers.TPESampler:
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


@contextmanager
def timed() -> Iterator[list[float]]:
    """Collect the seconds of every ask and tell of gputune's Optuna integration in the block."""
    spent: list[float] = []

    def clocked(call: Callable[..., Any]) -> Callable[..., Any]:
        def timed_call(*arguments: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                spent.append(time.perf_counter() - begin)

        return timed_call

    with patch.multiple(OptunaStudy, ask=clocked(OptunaStudy.ask), tell=clocked(OptunaStudy.tell)):
        yield spent


def alone(seed: int, study: Study) -> float:
    """Return the seconds of the same asks and tells with only Optuna.

    Optuna must propose the same configurations.
    """
    _, laws = check_askable([SPACE])
    scores = [trial.score for trial in study.trials]
    asked = []
    seconds = 0.0
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    plain = optuna.create_study(sampler=sampler(seed), direction="maximize")
    for begin in range(0, len(scores), BATCH):
        start = time.perf_counter()
        trials = [plain.ask(laws) for _ in scores[begin : begin + BATCH]]
        for trial, score in zip(trials, scores[begin:]):
            if np.isnan(score):
                plain.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                plain.tell(trial, score)
        seconds += time.perf_counter() - start
        asked += [trial.params for trial in trials]
    if asked != [trial.params for trial in study.trials]:
        raise AssertionError(
            "Optuna alone proposed something else, so the times are not of the same work."
        )
    return seconds


def _line(name: int | str, row: Row, trials: int) -> str:
    bridge, alone = (
        f"{seconds / trials * 1e3:.2f}" for seconds in (row.bridge_seconds, row.alone_seconds)
    )
    seconds = f"{row.random_seconds:.1f}, {row.tpe_seconds:.1f}"
    return f"{name}|{row.random_best:.4f}|{row.tpe_best:.4f}|{seconds}|{bridge}, {alone}"
