"""The same configurations of RealMLP's space in gputune and in pytabkit: seconds and scores.

pytabkit is the package of RealMLP's authors.
"""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np
from joblib import cpu_count
from sklearn.model_selection import KFold, StratifiedKFold

from benchmark.report import Clock, describe_machine, publish, table
from benchmark.studies.tables import FOLDS, HELD_OUT, Split, loader, split_of

NAMES = ("california", "churn")
ROWS = 5_000
CONFIGURATIONS = 8
EPOCHS = 64
NAMES_OF = {
    "num_emb_type": "module__embedding",
    "add_front_scale": "module__scaling",
    "lr": "lr",
    "p_drop": "dropout",
    "wd": "weight_decay",
    "plr_sigma": "module__sigma",
    "act": "module__activation",
    "ls_eps": "loss__label_smoothing",
}
"""What is drawn, in the words of pytabkit and here."""

HOW = """\
{configurations} configurations that pytabkit draws from its space (seeds 0 to {last}), each trained for
{epochs} epochs in {folds} folds of {rows:,} rows and then once on all of them at the best epoch of the folds'
mean; the mean and the best score on up to {held_out:,} other rows (RMSE of numbers, else accuracy), and
the seconds of all {configurations}. pytabkit trains the folds of one configuration at the same time, and the
configurations one after the other. Threads of each: {cores}, in turn on the same cores.
"""


@dataclass(frozen=True)
class Result:
    """All configurations of one table in one package.

    ``scores`` are those on the held-out rows, in the order of the configurations.
    """

    table: str
    package: str
    scoring: str
    seconds: float
    cpu: float
    scores: list[float]


def run(options: Namespace) -> int:
    if find_spec("pytabkit") is None:
        raise SystemExit("--realmlp needs pytabkit: pip install pytabkit")
    load = loader(options.data)
    results = list[Result]()
    machine = describe_machine()
    machine["versions"] |= {"pytabkit": version("pytabkit")}
    for name in options.rows or NAMES:
        split = split_of(name, load, 0, ROWS)
        for package, measure in {"gputune": here, "pytabkit": there}.items():
            clock = Clock()
            scores = list(measure(split, configurations(split.task)))
            results.append(Result(name, package, split.scoring, *clock(), scores))
            print(results[-1], flush=True)
    rows = []
    for one in results:
        best = (min if one.scoring.startswith("neg") else max)(one.scores)  # an RMSE is positive
        error = np.std(one.scores, ddof=1) / np.sqrt(len(one.scores))
        mean = f"{np.mean(one.scores):.4f} ± {error:.4f}"
        rows.append(f"{one.table}|{one.package}|{one.seconds:.0f}|{mean}|{best:.4f}")
    how = HOW.format(
        configurations=CONFIGURATIONS,
        last=CONFIGURATIONS - 1,
        epochs=EPOCHS,
        folds=FOLDS,
        rows=ROWS,
        held_out=HELD_OUT,
        cores=machine["cores"],
    )
    found = table("table|package|seconds|mean score|best", rows)
    return publish(
        options.out, "realmlp", "RealMLP's space", how, found, machine=machine, results=results
    )


def configurations(task: str) -> list[dict[str, Any]]:
    from pytabkit.models.alg_interfaces.nn_interfaces import RealMLPParamSampler

    sampler = RealMLPParamSampler(task != "regression")
    return [sampler.sample_params(seed) for seed in range(CONFIGURATIONS)]


def here(split: Split, drawn: list[dict[str, Any]]) -> Iterator[float]:
    included = [
        {ours: _plain(one[theirs]) for theirs, ours in NAMES_OF.items() if theirs in one}
        | {"module__width": int(one["hidden_sizes"][0]), "module__depth": len(one["hidden_sizes"])}
        for one in drawn
    ]
    study = split.search(
        "realmlp", include=included, include_default=False, n_trials=0, max_epochs=EPOCHS
    )
    yield from map(split.score, study.best_models(range(len(included))))


def there(split: Split, drawn: list[dict[str, Any]]) -> Iterator[float]:
    """Yield the score of each configuration, trained by pytabkit one after the other."""
    from pytabkit import RealMLP_TD_Classifier, RealMLP_TD_Regressor

    numbers = split.task == "regression"
    kind = RealMLP_TD_Regressor if numbers else RealMLP_TD_Classifier
    parts = (KFold if numbers else StratifiedKFold)(FOLDS, shuffle=True, random_state=0)
    valid = [place for _, place in parts.split(split.X, None if numbers else split.y)]
    least = min(map(len, valid))  # pytabkit needs folds of equal length
    for one in drawn:
        model = kind(
            **{
                key: _plain(value)
                for key, value in one.items()
                if key in (*NAMES_OF, "hidden_sizes")
            },
            n_cv=FOLDS,
            n_refit=1,
            n_epochs=EPOCHS,
            n_threads=cpu_count(),
            device="cpu",
            random_state=0,
        )
        model.fit(
            split.X, split.y.to_numpy(), val_idxs=np.stack([place[:least] for place in valid])
        )
        yield split.score(model)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
