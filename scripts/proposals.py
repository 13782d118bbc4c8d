"""Compare ways to propose trials on published tables of results, by look-up instead of training.

    python scripts/proposals.py FOLDER [--runs 100] [--json FILE]

FOLDER holds one file for each table, such as ``hpolib_protein_structure.npz``. A table has the
scores of every configuration of a grid, for several random seeds. Everything except the training
is gputune's own code: the driver that refills slots, successive halving and the proposals.

- The final score of a trial is its score with one random seed of the table.
- The score at a rung is the final score plus normal noise (a surrogate of the learning curve).
  Spearman's rank correlation between both is printed for each rung.
- A run is judged by the mean score, over all seeds, of the trial with the best final score. The
  figure is its share of the way from the median configuration (0) to the optimum (1).
- Run ``i`` of every method uses the random seed ``--first-seed`` plus ``i``. The runs are paired,
  and a difference has the standard error of its pairs.

Needs Optuna (``pip install ".[optuna]"``).
"""

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import optuna
from scipy.stats import randint, spearmanr

from gputune.methods.halving import Halving
from gputune.methods.rungs import fill_slots
from gputune.methods.sampling import AskedTrial, OptunaStudy, SlotStudy, tpe_sampler
from gputune.spaces.config import plain_config
from gputune.spaces.distributions import CheckedSpace
from gputune.study.store import Result

RUNS = 100
SLOTS = 32
EPOCHS = 27
HALVING = Halving(factor=3, min_epochs=3)  # rungs at 1/9 and 1/3 of the epochs
NOISE = {3: 0.2, 9: 0.08}
"""Standard deviation of the noise at each rung, as a share of the standard deviation of scores."""

SIZES = (64, 128)  # trials of a search
Sampler = Callable[[int], optuna.samplers.BaseSampler]


class Table:
    """A published grid of configurations with the scores of several seeds, as rising scores.

    Attributes:
        space: The number of choices of each hyperparameter, or the choices that have no order.
        final: The scores of a configuration by its positions in the grid, one for each seed.
        spread: The standard deviation of the mean scores.
    """

    def __init__(self, path: Path) -> None:
        arrays = np.load(path, allow_pickle=False)
        about = json.loads(arrays["space"].tobytes())
        self.name = path.stem
        metric = arrays["metric"].astype(float)
        self.sign = -1.0 if about["minimize"] else 1.0
        # Errors such as mean squared errors span orders of magnitude, so their logarithms get the
        # noise. Samplers see the logarithms too.
        self.is_log = bool(about["minimize"] and metric.min() > 0)
        self.keys = list(about["space"])
        self.space: CheckedSpace = [{}]
        for key, choices in about["space"].items():
            is_text = isinstance(choices[0], str)
            positions = list(range(len(choices)))
            self.space[0][key] = positions if is_text else randint(0, len(choices))
        self.final = {}
        for row, scores in zip(arrays["index"].tolist(), metric):
            self.final[tuple(row)] = scores
        means = metric.mean(1)
        self.best = float((self.sign * means).max())
        self.median = float(np.median(self.sign * means))
        self.spread = float(np.std(self.seen(means)))

    def seen(self, metric: np.ndarray) -> np.ndarray:
        """Return the scores that a sampler sees, greater is better."""
        scores: np.ndarray = self.sign * (np.log(metric) if self.is_log else metric)
        return scores

    def place(self, params: Mapping[str, object]) -> tuple[int, ...]:
        """Return the positions of a configuration in the grid."""
        return tuple(int(str(params[key])) for key in self.keys)

    def share(self, params: Mapping[str, object]) -> float:
        """Return the share of the way from the median configuration (0) to the optimum (1)."""
        score = self.sign * float(self.final[self.place(params)].mean())
        return (score - self.median) / (self.best - self.median)

    def correlations(self) -> dict[int, float]:
        """Return the rank correlation of the score at each rung with the final score."""
        rng = np.random.default_rng(0)
        rows = np.stack(list(self.final.values()))
        final = self.seen(rng.permuted(rows, axis=1)[:, 0])
        found = {}
        for rung, share in NOISE.items():
            early = final + rng.normal(size=len(final)) * share * self.spread
            found[rung] = float(spearmanr(early, final)[0])
        return found


@dataclass
class Run:
    """The result of one search: the share of its best trial, and the epochs that it trained."""

    share: float
    epochs: float


@dataclass
class TableTrial:
    """A trial with its final score and its scores at the rungs, all of which a table answers."""

    params: Mapping[str, object]
    final: float
    rung_means: Mapping[int, float]
    epochs: int = 0
    state: str = "running"

    def curve(self, epochs: int) -> np.ndarray:
        """Return the scores (epochs, 1) of the first epochs. Only those at stops count."""
        known = {**self.rung_means, EPOCHS: self.final}
        curve = np.zeros((epochs, 1))
        for epoch, mean in known.items():
            if epoch <= epochs:
                curve[epoch - 1] = mean
        return curve

    def asked(self) -> AskedTrial:
        """Return the trial as a sampler sees it."""
        means = {rung: mean for rung, mean in self.rung_means.items() if rung <= self.epochs}
        score = self.final if self.state == "complete" else math.nan
        return AskedTrial(dict(self.params), means, self.state, score)


@dataclass
class TableSearch:
    """A search in slots whose training is a look-up in a table."""

    table: Table
    study: SlotStudy
    n_trials: int
    rng: np.random.Generator
    trials: dict[int, TableTrial] = field(default_factory=dict)

    def is_over(self) -> bool:
        return False

    def propose(self, n_free: int, running: Mapping[int, int]) -> Sequence[int]:
        begin = len(self.trials)
        numbers = range(begin, min(begin + n_free, self.n_trials))
        if not numbers:
            return []
        asked = {number: trial.asked() for number, trial in self.trials.items()}
        for number, params in self.study.propose(asked, {}, numbers).items():
            final = float(self.rng.choice(self.table.final[self.table.place(params)]))
            seen = float(self.table.seen(np.array(final)))
            rung_means = {}
            for rung, share in NOISE.items():
                rung_means[rung] = seen + self.rng.normal() * share * self.table.spread
            self.trials[number] = TableTrial(params, seen, rung_means)
        return numbers

    def train(
        self, arrived: Mapping[int, int], later: Mapping[int, int]
    ) -> Mapping[int, np.ndarray]:
        for number, epochs in arrived.items():
            self.trials[number].epochs = epochs
        return {number: self.trials[number].curve(epochs) for number, epochs in arrived.items()}

    def ended_trials(self, rung: int) -> set[int]:
        """Return no trials, because no user ends trials here."""
        return set()

    def end(self, numbers: Sequence[int], rung: int | None = None) -> None:
        for number in numbers:
            self.trials[number].state = "complete" if rung is None else "pruned"

    def run(self) -> Run:
        """Run the search, and return its result."""
        fill_slots(self, HALVING, n_slots=SLOTS, max_epochs=EPOCHS)
        complete = [trial for trial in self.trials.values() if trial.state == "complete"]
        best = max(complete, key=lambda trial: trial.final)
        trained = sum(trial.epochs for trial in self.trials.values())
        return Run(self.table.share(best.params), trained / (self.n_trials * EPOCHS))


def in_slots(sampler: Sampler, table: Table, n_trials: int, seed: int) -> Run:
    """Return the result of a search with halving whose free slots are refilled."""
    study = SlotStudy(sampler(seed), table.space, check=plain_config)
    return TableSearch(table, study, n_trials, np.random.default_rng(seed)).run()


def in_batches(sampler: Sampler, table: Table, n_trials: int, seed: int, *, batch: int) -> Run:
    """Return the result of a search in batches, in which every trial trains to its end."""
    study = OptunaStudy(sampler(seed), table.space, check=plain_config)
    rng = np.random.default_rng(seed)
    trials: list[TableTrial] = []
    while n_missing := min(batch, n_trials - len(trials)):
        proposals = [study.ask() for _ in range(n_missing)]
        for trial, params in proposals:
            final = float(rng.choice(table.final[table.place(params)]))
            seen = float(table.seen(np.array(final)))
            curve = np.array([[seen]])
            study.tell(trial, Result(0, "complete", seen, (seen,), 1, 0.0, curve))
            trials.append(TableTrial(params, seen, {}))
    best = max(trials, key=lambda trial: trial.final)
    return Run(table.share(best.params), 1.0)


def by_default(seed: int) -> optuna.samplers.BaseSampler:
    """Return Optuna's TPE with its default settings."""
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def at_random(seed: int) -> optuna.samplers.BaseSampler:
    """Return Optuna's random sampler."""
    return optuna.samplers.RandomSampler(seed=seed)


METHODS: Mapping[str, Callable[[Table, int, int], Run]] = {
    "random": partial(in_batches, at_random, batch=SLOTS),
    "random, halving, slots": partial(in_slots, at_random),
    "Optuna's default TPE, batches of 32": partial(in_batches, by_default, batch=SLOTS),
    "Optuna's default TPE, halving, slots": partial(in_slots, by_default),
    'method="tpe", halving, slots': partial(in_slots, tpe_sampler),
}
BASELINE = "Optuna's default TPE, batches of 32"


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of a mean."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def compare(
    table: Table, n_trials: int, seeds: Sequence[int], methods: Mapping[str, Callable[..., Run]]
) -> list[dict[str, object]]:
    """Run every method with every seed, and return one row of figures for each method."""
    rows = []
    shares: dict[str, list[float]] = {}
    for name, method in methods.items():
        runs = [method(table, n_trials, seed) for seed in seeds]
        shares[name] = [run.share for run in runs]
        row: dict[str, object] = {
            "table": table.name,
            "trials": n_trials,
            "method": name,
            "share": float(np.mean(shares[name])),
            "standard_error": standard_error(shares[name]),
            "epochs": float(np.mean([run.epochs for run in runs])),
            "shares": shares[name],
        }
        if BASELINE in shares:
            pairs = np.subtract(shares[name], shares[BASELINE])
            row["gain"] = float(pairs.mean())
            row["gain_error"] = standard_error(pairs.tolist())
        rows.append(row)
        print(_line(row), flush=True)
    return rows


def _line(row: Mapping[str, object]) -> str:
    """Return a row of figures as a line of a Markdown table."""
    share = f"{row['share']:.3f} ± {row['standard_error']:.3f}"
    gain = f"{row['gain']:+.3f} ± {row['gain_error']:.3f}" if "gain" in row else ""
    return f"| {row['table']} | {row['trials']} | {row['method']} | {share} | {gain} | {row['epochs']:.0%} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison, print a table, and write the figures to a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the folder with the tables")
    parser.add_argument("--runs", type=int, default=RUNS, help="runs of each method")
    parser.add_argument("--first-seed", type=int, default=0, help="the seed of the first run")
    parser.add_argument("--json", type=Path, help="the file for the figures")
    given = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seeds = range(given.first_seed, given.first_seed + given.runs)
    rows = []
    correlations = {}
    for path in sorted(given.folder.glob("*.npz")):
        table = Table(path)
        correlations[table.name] = table.correlations()
        text = ", ".join(f"epoch {k}: {v:.3f}" for k, v in correlations[table.name].items())
        print(f"{table.name}: rank correlation with the final score: {text}", flush=True)
        print("| table | trials | method | share | gain | epochs |\n|---|---|---|---|---|---|")
        for n_trials in SIZES:
            rows += compare(table, n_trials, seeds, METHODS)
    if given.json is not None:
        facts = {"correlations": correlations, "runs": given.runs, "seed": given.first_seed}
        facts |= {"slots": SLOTS, "epochs": EPOCHS, "rungs": list(NOISE), "rows": rows}
        facts["optuna"] = optuna.__version__
        given.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
