"""RealMLP with the space realmlp-large on tables of up to 10,000 rows."""

from argparse import Namespace
from dataclasses import dataclass

from benchmark.report import Clock, describe_machine, publish, published, table
from benchmark.studies.tables import FOLDS, HELD_OUT, LARGE, loader, split_of

SPACE = "realmlp-large"
TRIALS = 8
EPOCHS = 64

HOW = """\
Of each table up to {rows:,} rows (four fifths of a smaller table) are searched, and up to {held_out:,}
other rows are scored: the same rows as in `--tables`. Each search is in the space {space} (trial 0 is
the published default) and has {folds} folds, and its ensemble has the default options. An error is an
RMSE (of kc_house that of the logarithm of the price). "Validation" is the error of the ensemble on the
validation rows of the folds. "Frequencies" are the values of module__sigma of the networks in the
ensemble, each with its weight. Seconds are of the processor and count the search, the choice and the
final training. One thread.
"""


@dataclass(frozen=True)
class Result:
    """A search on a table: held-out errors of the best trial and the ensemble, and the costs.

    ``frequencies`` are pairs of a network's ``module__sigma`` and its weight in the ensemble.
    """

    table: str
    rows: int
    epochs: int
    validation: float
    best_trial: float
    ensemble: float
    frequencies: list[tuple[float, float]]
    search_cpu: float
    seconds: float
    cpu: float
    trials: int = TRIALS


def run(options: Namespace) -> int:
    load = loader(options.data, "--realmlp-large")
    machine = describe_machine()
    results = published(options.out, "realmlp_large", machine, "results", Result)
    done = {(result.table, result.trials, result.epochs) for result in results}
    trials, epochs = options.trials or TRIALS, options.epochs or EPOCHS
    for name in options.rows or LARGE:
        if (name, trials, epochs) not in done:
            results.append(measure(name, load, trials, epochs))
            print(results[-1], flush=True)
        whole = {"machine": machine, "results": results}
        publish(options.out, "realmlp_large", "RealMLP on larger tables", *words(results), **whole)
    return 0


def measure(name: str, load: object, trials: int, epochs: int) -> Result:
    """Search on a table, and return the errors on the held-out rows."""
    split = split_of(name, load, 0, LARGE[name])
    clock = Clock()
    study = split.search("realmlp", space=SPACE, n_trials=trials, max_epochs=epochs)
    _, search_cpu = clock()
    ensemble = study.ensemble(verbose=0)
    costs = clock()
    weights = ensemble.info["ensemble"]
    frequencies = [
        (round(trial.params["module__sigma"], 3), round(weights[str(trial.number)], 3))
        for trial in study.trials
        if str(trial.number) in weights
    ]
    return Result(
        name,
        len(split.X),
        epochs,
        -float(ensemble.info["score"]),
        split.score(study.best_model()),
        split.score(ensemble),
        frequencies,
        search_cpu,
        *costs,
        trials,
    )


def words(results: list[Result]) -> tuple[str, str]:
    """Return the description and the table of errors."""
    how = HOW.format(
        rows=max(LARGE.values()),
        held_out=HELD_OUT,
        space=SPACE,
        folds=FOLDS,
    )
    rows = [
        "|".join(
            [
                f"{result.table}, {result.rows:,} rows",
                str(result.trials),
                str(result.epochs),
                f"{result.validation:.4f}",
                f"{result.best_trial:.4f}",
                f"{result.ensemble:.4f}",
                f"{result.cpu:.0f} s",
                ", ".join(f"{sigma:.2g}: {weight:.0%}" for sigma, weight in result.frequencies),
            ]
        )
        for result in results
    ]
    head = "table|trials|epochs|validation|best trial|ensemble|CPU seconds|frequencies"
    return how, table(head, rows)
