"""The frequencies of RealMLP's embedding, and two scalings of its numbers."""

from argparse import Namespace
from dataclasses import dataclass
from itertools import product

from benchmark.report import Clock, describe_machine, publish, published, table
from benchmark.studies.tables import FOLDS, loader, split_of

NAMES = ("california", "kc_house", "protein", "wine_quality", "adult", "letter")
SIGMAS = (0.1, 1.0, 4.0)
NUMBERS = ("robust", "quantile")
ROWS = 10_000
EPOCHS = 16

HOW = """\
RealMLP's published configuration with three values of module__sigma and two scalings of the numbers. It
trains for {epochs} epochs in {folds} folds on up to {rows:,} rows of each table (four fifths of a smaller
table). An error is the error on the validation rows of the folds at the best epoch: an RMSE (of kc_house
that of the logarithm of the price), or 1 - accuracy. The lowest error of each table is bold.
"""


@dataclass(frozen=True)
class Result:
    """The validation error of a configuration on a table, and the epoch with this error."""

    table: str
    sigma: float
    numbers: str
    error: float
    epoch: int


def run(options: Namespace) -> int:
    load = loader(options.data, "--frequencies")
    machine = describe_machine()
    results = published(options.out, "frequencies", machine, "results", Result)
    for name in options.rows or NAMES:
        if any(result.table == name for result in results):
            continue
        split = split_of(name, load, 0, ROWS)
        configs = [
            {"module__sigma": sigma, "numbers": numbers}
            for numbers, sigma in product(NUMBERS, SIGMAS)
        ]
        clock = Clock()
        study = split.search(
            "realmlp",
            include=configs,
            include_default=False,
            n_trials=0,
            max_epochs=options.epochs or EPOCHS,
        )
        offset = 0.0 if split.task == "regression" else 1.0
        for trial in study.trials:
            sigma, numbers = trial.params["module__sigma"], trial.params["numbers"]
            error = offset - trial.score
            results.append(Result(name, sigma, numbers, error, trial.best_epoch))
        print(name, f"{clock()[1]:.0f} CPU s", flush=True)
        whole = {"machine": machine, "results": results}
        publish(options.out, "frequencies", "Frequencies of RealMLP", *words(results), **whole)
    return 0


def words(results: list[Result]) -> tuple[str, str]:
    """Return the description and the table of errors."""
    how = HOW.format(epochs=EPOCHS, folds=FOLDS, rows=ROWS)
    errors = {(result.table, result.numbers, result.sigma): result.error for result in results}
    columns = list(product(NUMBERS, SIGMAS))
    rows = []
    for name in dict.fromkeys(result.table for result in results):
        row = [errors[name, *column] for column in columns]
        cells = [f"**{error:.4f}**" if error == min(row) else f"{error:.4f}" for error in row]
        rows.append("|".join([name, *cells]))
    head = [f"{numbers}, {sigma:g}" for numbers, sigma in columns]
    return how, table("|".join(["table", *head]), rows)
