"""The tuned MLPs and TabM of two papers on their tables, compared with gputune's networks.

    python scripts/reproduce/tuned_mlp.py FOLDER
    python scripts/reproduce/tuned_mlp.py FOLDER --tables churn --seeds 3 --rows training all

The first command runs churn, california and adult, in this order.

Both use the same rows. FOLDER has a folder for each table with the files of TabM's authors:
X_num_train.npy, X_bin_train.npy, X_cat_train.npy (as far as the table has them), Y_train.npy, and
the same files for val and test. Every trial is trained on the training rows and scored on the
validation rows, as in the papers. The test rows are read only once, by the chosen models. A stopped
run can be continued: each search has its own study in --studies, and results in the result file are
not measured again.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

import numpy as np
import pandas as pd

import gputune

sys.path.append(str(Path(__file__).parents[1]))
from benchmark.report import (
    HERE,
    Clock,
    describe_machine,
    kept_clock,
    positive,
    publish,
    published,
    run_script,
    script_parser,
    table,
)

PARTS = ("train", "val", "test")
REGRESSION = ("california",)
ADDRESS = "https://github.com/yandex-research/tabm, section Data of its README (tabm-data)"
SEARCHES = {
    "mlp": ("mlp", None, 32, 64),
    "portfolio": ("mlp", "mlp", 32, 64),
    "realmlp": ("realmlp", None, 8, 256),
}
"""Of a search the model, the name of its space (None: its default one), trials and epochs."""

RTDL = "MLP, tuned (RTDL)"
TABM = "MLP, tuned (TabM's authors)"
PUBLISHED = {
    "churn": {
        TABM: ("0.8553 ± 0.0029", 294, "A100"),
        "TabM, tuned": ("0.8605 ± 0.0016", 561, "A100"),
    },
    "california": {
        RTDL: ("0.4986 ± 0.0031", 1510, "RTX 2080 Ti"),
        TABM: ("0.4948 ± 0.0058", 1294, "A100"),
        "TabM, tuned": ("0.4414 ± 0.0012", 3465, "A100"),
    },
    "adult": {
        RTDL: ("0.8522 ± 0.0020", 1896, "a GPU, not logged"),
        TABM: ("0.8540 ± 0.0018", 1416, "A100"),
        "TabM, tuned": ("0.8575 ± 0.0008", 2376, "A100"),
    },
}
"""Test score, mean and standard deviation of 15 seeds of the winner; the seconds of tuning (100
trials); where."""

HOW = """\
Test scores (RMSE of california, less is better; else accuracy), and the seconds of the whole search. The published
ones are means of 15 seeds of the winner of 100 trials; their seconds are of tuning, without those seeds, and were
logged by their authors: Gorishniy et al. 2021, arXiv:2106.11959 (output/ of rtdl-revisiting-models) and Gorishniy et
al. 2024, arXiv:2410.24210 (paper/exp/ of tabm). gputune's are of searching, choosing and training, on one CPU core;
with several seeds each is a search of its own: their mean ± standard deviation, and the mean of their seconds.
"mlp" searches the default space of the plain MLP, for 64 epochs; "portfolio" space="mlp", which tries seven
configurations first that were chosen by draws of 2,000 rows of eleven tables, of these three too: they may be a little
too good here. "realmlp" searches RealMLP's published space for 256 epochs, its published configuration first.
All trials are trained on the training rows and scored on the validation rows. "on training rows": the models that are
scored are trained there too, as in the papers (means and scales of the inputs are of both); "on all rows": on training
and validation rows.
"""


@dataclass(frozen=True)
class Data:
    """Training rows, then validation rows, and separate test rows.

    ``n_train`` is the number of training rows.
    """

    X: pd.DataFrame
    y: np.ndarray
    n_train: int
    X_test: pd.DataFrame
    y_test: np.ndarray
    regression: bool

    def score(self, model: gputune.TunedModel) -> float:
        gap = np.asarray(model.predict(self.X_test)).ravel() - self.y_test
        return float(np.sqrt(np.mean(gap**2)) if self.regression else np.mean(gap == 0))


@dataclass(frozen=True)
class Result:
    """One model of one search: test score, members, and seconds of wall clock and processor.

    The seconds include the search.
    """

    table: str
    seed: int
    model: str
    trials: int
    rows: str
    way: str
    score: float
    members: int
    seconds: float
    cpu: float


def read(folder: Path, name: str) -> Data:
    """Return a table of TabM's authors.

    Raises InputError if files are missing or their numbers of rows differ.
    """
    parts = {part: _columns(folder / name, part) for part in PARTS}
    targets = {part: _array(folder / name / f"Y_{part}.npy").ravel() for part in PARTS}
    for part in PARTS:
        if len(parts[part]) != len(targets[part]) or [*parts[part]] != [*parts["train"]]:
            raise gputune.InputError(
                None,
                f"{folder / name}: the {part} files must have the columns of the train files and "
                f"a target for each row, got {parts[part].shape} and {len(targets[part])} "
                f"targets. They come from {ADDRESS}.",
            )
    X = pd.concat([parts["train"], parts["val"]], ignore_index=True)
    y = np.concatenate([targets["train"], targets["val"]])
    return Data(X, y, len(targets["train"]), parts["test"], targets["test"], name in REGRESSION)


def _columns(folder: Path, part: str) -> pd.DataFrame:
    """Return the columns of a part: numbers n0, n1, ..., binary b0, ..., and categories c0, ... as
    text.
    """
    kinds = [kind for kind in ("num", "bin", "cat") if (folder / f"X_{kind}_{part}.npy").exists()]
    if not kinds:
        raise gputune.InputError(
            None,
            f"FOLDER must have {folder.name}/X_num_{part}.npy, X_bin_{part}.npy or "
            f"X_cat_{part}.npy, got {folder.parent}. The files come from {ADDRESS}.",
        )
    frames = [
        pd.DataFrame(_array(folder / f"X_{kind}_{part}.npy")).add_prefix(kind[0]) for kind in kinds
    ]
    return pd.concat([f.astype(str) if k == "cat" else f for k, f in zip(kinds, frames)], axis=1)


def _array(path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise gputune.InputError(
            None, f"{path} must be an array of numbers or text: {error}. See {ADDRESS}."
        ) from error
    return array


def search(
    model: str, data: Data, seed: int, trials: int, file: Path
) -> tuple[gputune.Study, float, float]:
    """Search, or resume the study in the file; return the study and the total time of all calls.

    The time is in seconds and in CPU seconds.
    """
    word, space, _, epochs = SEARCHES[model]
    file.parent.mkdir(parents=True, exist_ok=True)
    with kept_clock(file.with_suffix(".json")) as clock:
        study = gputune.tune(
            word,
            data.X,
            data.y,
            space=space,
            n_trials=trials,
            max_epochs=epochs,
            cv=[(np.arange(data.n_train), np.arange(data.n_train, len(data.y)))],
            scoring="neg_root_mean_squared_error" if data.regression else "accuracy",
            task="regression" if data.regression else "classification",
            device="cpu",
            workers=1,
            study=file,
            random_state=seed,
            verbose=0,
        )
    return study, *clock()


def measure(
    name: str, data: Data, seed: int, model: str, trials: int, rows: Sequence[str], studies: Path
) -> Iterator[Result]:
    """Yield the best trial and the ensemble of a search.

    They are trained on training rows, on all rows, or on both in turn.
    """
    study, *spent = search(
        model, data, seed, trials, studies / f"{name}-{model}-{trials}-{seed}.db"
    )
    for where in rows:
        for way, size in (("best trial", 1), ("ensemble", 25)):
            clock = Clock(*spent)
            # Of one step it is the best trial.
            refit: Literal["folds", "all"] = "folds" if where == "training" else "all"
            tuned = study.ensemble(data.X, data.y, size=size, refit=refit, verbose=0)
            costs = clock()
            yield Result(
                name,
                seed,
                model,
                trials,
                where,
                way,
                data.score(tuned),
                len(tuned.info["ensemble"]),
                *costs,
            )


def scores(results: Sequence[Result]) -> str:
    """Return the table: the published scores, and the scores of each group of results."""
    rows = []
    for name in dict.fromkeys(one.table for one in results):
        rows += [
            f"{name}|{who}|{score}||{s:,}||{on}"
            for who, (score, s, on) in PUBLISHED.get(name, {}).items()
        ]
        groups = dict.fromkeys(
            (one.model, one.trials, one.way, one.rows) for one in results if one.table == name
        )
        for group in groups:
            of = [
                one
                for one in results
                if (one.table, one.model, one.trials, one.way, one.rows) == (name, *group)
            ]
            found = [one.score for one in of]
            spread = f" ± {stdev(found):.4f} ({len(of)} seeds)" if len(of) > 1 else ""
            members = "-".join(
                map(str, sorted({min(one.members for one in of), max(one.members for one in of)}))
            )
            seconds = mean(one.seconds for one in of)
            cpu = mean(one.cpu for one in of)
            who = "gputune, {}, {} trials: {}, on {} rows".format(*group)
            rows.append(
                f"{name}|{who}|{mean(found):.4f}{spread}|{members}|{seconds:,.0f}|{cpu:,.0f}|CPU"
            )
    return table("table|model|test score|trials in it|seconds|CPU seconds|on", rows)


def run(options: Namespace) -> int:
    machine = describe_machine()
    results = published(options.out, "tuned-mlp", machine, "results", Result)
    for name in options.tables:
        data = read(options.folder, name)
        for seed in range(options.seeds):
            for model in options.models:
                trials = options.trials or SEARCHES[model][2]
                asked = name, seed, model, trials
                known = {
                    one.rows
                    for one in results
                    if (one.table, one.seed, one.model, one.trials) == asked
                }
                lacking = [rows for rows in options.rows if rows not in known]
                if not lacking:
                    continue
                results += measure(name, data, seed, model, trials, lacking, options.studies)
                parts = (HOW, options.note, scores(results))
                whole = {"machine": machine, "results": results}
                publish(options.out, "tuned-mlp", "Published tuned MLPs", *parts, **whole)
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help=f"the tables, from {ADDRESS}")
    add("--tables", nargs="+", choices=PUBLISHED, default=[*PUBLISHED])
    add("--models", nargs="+", choices=SEARCHES, default=[*SEARCHES])
    add("--trials", type=positive, help="of each search (default 8 of realmlp, else 32)")
    add(
        "--rows",
        nargs="+",
        choices=["training", "all"],
        default=["training"],
        help="those of the models scored",
    )
    add("--seeds", type=positive, default=1, help="searches of each table (default 1)")
    add("--studies", type=Path, default=Path("tuned-mlp-studies"), help="folder of the studies")
    add("--out", type=Path, default=HERE / "results", help="folder of the two files")
    add("--note", default="", metavar="WORDS", help="said on the page")
    return run_script(run, parser, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
