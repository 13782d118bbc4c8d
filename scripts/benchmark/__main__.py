"""Train one list of trials with gputune and with every installed alternative, and compare times.

All engines must reach the same scores before their times are shown.

    python scripts/benchmark                     digits, widths 16..64 and 16..256, into
                                                 scripts/benchmark/results/
    python scripts/benchmark --work narrow:128 narrow:2000 wide:64 narrow:1
                                                 these lists, each with this number of trials, in
                                                 one report
    python scripts/benchmark --engines sklearn,torch,ray:32,gputune
                                                 only these engines; Ray Tune on the first 32 trials
                                                 of each list
    python scripts/benchmark --grid              gputune, scikit-learn and the loop over trials x
                                                 widths x batch sizes; time and memory against
                                                 trials, folds and epochs
    python scripts/benchmark --quality [--adult adult.data.gz]
                                                 best held-out score against time, for random search
                                                 and halving
    python scripts/benchmark --hypergradients    cost of each mode compared with plain training
    python scripts/benchmark --halving [--adult adult.data.gz]
                                                 halving compared with the full search, over seeds
    python scripts/benchmark --logistic          the solved logistic regression compared with
                                                 scikit-learn's
    python scripts/benchmark --profile           share of the matrix-product peak, and cost of a
                                                 trial in addition to training
    python scripts/benchmark --modules [--rows GRU LSTM] [--small] [--steps]
                                                 user's modules, compared with a plain loop on all
                                                 cores and Optuna
    python scripts/benchmark --operations [--rows Conv norm]
                                                 steps of operations of modules in compiled code,
                                                 compared with recorded steps
    python scripts/benchmark --many              a study file of 100,000 trials: opening and
                                                 resuming it
    python scripts/benchmark --native            the compiled code compared with a build with
                                                 -march=native
    python scripts/benchmark --optuna            Optuna's TPE compared with random search, and the
                                                 cost of asking
    python scripts/benchmark --tables --data FILE.py
                                                 networks and boosted trees on your own tables
    python scripts/benchmark --many-rows --data FILE.py [--rows adult LightGBM]
                                                 tables of at least 20,000 rows: gputune and tuned
                                                 boosted trees for equal seconds (9 CPU hours; resumes)
    python scripts/benchmark --tabm --data FILE.py
                                                 TabM-mini and RealMLP for equal seconds (90 minutes)
    python scripts/benchmark --portfolio --data FILE.py
                                                 a short list of good configurations, chosen over
                                                 these tables
    python scripts/benchmark --lora [--rows "top layer"]
                                                 LoRA and heads on a frozen BERT, compared with
                                                 loops of PEFT and PyTorch
    python scripts/benchmark --heads                LoRA and a tuned head on MiniLM: held-out scores
    python scripts/benchmark --sizes                three batch sizes together and apart
    python scripts/benchmark --realmlp --data FILE.py
                                                 RealMLP's space in gputune and in pytabkit
    python scripts/benchmark --realmlp-portfolio --data FILE.py
                                                 the same short list for RealMLP; resumes by table
    python scripts/benchmark --frequencies --data FILE.py
                                                 frequencies of RealMLP and two scalings (6 minutes)
    python scripts/benchmark --realmlp-large --data FILE.py
                                                 RealMLP's space for large tables (15 minutes; resumes)
    python scripts/benchmark --records digits --seeds 5 --change "fewer epochs"
    python scripts/benchmark --records california adult --data FILE.py
    python scripts/benchmark --records           seconds to reach a fixed quality, on the page
                                                 docs/records.md; without names only the tables of
                                                 the page are made again

The engines are sklearn, torch (a plain loop), compile (the loop's step through torch.compile),
optuna, ray, skorch, jax and gputune. An engine whose package is missing is named in the report and
left out. To install the packages: pip install optuna "ray[tune]" skorch jax.

Run it on a machine that does nothing else.
"""

import argparse
import sys
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":
    # This folder is the package "benchmark". Python has put the folder itself on the path, and its
    # profile.py would hide the standard library's profile.
    sys.path[0] = str(Path(__file__).parents[1])

from benchmark.engines import choose
from benchmark.report import HERE, positive
from benchmark.work import WIDTHS

STUDIES = {
    "grid": "losing cases too, and what grows with the work",
    "quality": "81 trials; --repeats is the seeds (5)",
    "hypergradients": "the modes on one stacked population",
    "halving": "243 trials, 54 epochs; --repeats is the seeds (10)",
    "logistic": "60 values of C with each penalty, on digits",
    "profile": "32 trials of width 256, of 128; 10,000 of 16",
    "many": "a study file of 100,000 trials: opened, looked at, gone on with",
    "native": "an epoch in compiled code of each level, beside -march=native",
    "optuna": "a search of 160 trials for each of 10 seeds",
    "modules": "25 searches over modules of a user's own beside a plain loop and Optuna",
    "operations": "steps in compiled code and recorded; --rows are words in names of operations",
    "lora": "LoRA and heads on a frozen BERT beside loops that keep the base",
    "heads": "LoRA and a tuned head on texts whose words do not show the class, 5 seeds",
    "sizes": "trials of three batch sizes together and in one population per size",
    "tables": "networks and boosted trees; --rows are ways, --repeats the splits (3)",
    "many_rows": "gputune and boosted trees on large tables; --rows are tables and sides",
    "tabm": "TabM-mini as a user's module, and RealMLP; --rows are tables",
    "portfolio": "a short list of good configurations of the MLP, over the tables of --data",
    "realmlp_portfolio": "a short list of good configurations of RealMLP, over the tables of --data",
    "frequencies": "frequencies of RealMLP's embedding and two scalings; --rows are tables of --data",
    "realmlp_large": "RealMLP's space for large tables on 10,000 rows; --rows are tables of --data",
    "realmlp": "RealMLP's space here and in pytabkit, its authors' package; --rows are tables of --data",
}
"""What else is measured, and what the option says of it. The ``run`` of the module of that name
measures, prints and writes; it returns 0, or 1 where what must hold does not: then it writes
nothing, but for ``--optuna``, ``--operations``, and ``--modules``, which leaves out the rows that
disagree."""

RECORDS = ("digits", "california", "adult", "mnist1d")

HELP = {
    "trials": "trials of the shared list (default 64), or with --realmlp-large of each search (8)",
    "epochs": "default 20, with --hypergradients 5, --grid 10, --quality 27, --realmlp-large 64",
    "repeats": "default 3, with --hypergradients 7, --optuna 10, --native 15, --grid 1",
    "work": f"{' or '.join(WIDTHS)}, each with its own number of trials (default: both, --trials long)",
    "engines": "of those above, with a number: on the first trials only (default: all; --grid: "
    "sklearn,torch)",
    "records": f"measure {', '.join(RECORDS)} (or none of them), and update docs/records.md",
    "data": "with --tables, --portfolio, --many-rows, --tabm, --realmlp, --realmlp-large, "
    "--frequencies, --realmlp-portfolio, --records: has load(name) -> X, y, task",
    "rows": "with --modules: only rows with one of these in their name; with --tables: these ways; "
    "with --realmlp, --realmlp-large and --realmlp-portfolio: these tables; with --many-rows: these tables and sides",
}


def main(arguments: list[str] | None = None) -> int:
    """Return 0, or 1 if results that must be equal differ."""
    how = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("python scripts/benchmark", **how)
    add = parser.add_argument
    add("--trials", type=positive, help=HELP["trials"])
    add("--epochs", type=positive, help=HELP["epochs"])
    add("--repeats", type=positive, help=HELP["repeats"])
    works = [(name, None) for name in WIDTHS]
    add("--work", nargs="+", type=_work, default=works, metavar="NAME[:TRIALS]", help=HELP["work"])
    add("--engines", type=choose, metavar="WORD[:TRIALS],...", help=HELP["engines"])
    add("--out", type=Path, default=HERE / "results", help="folder of the two files")
    add(
        "--adult",
        type=Path,
        metavar="FILE",
        help="with --halving, --quality: UCI's adult.data, also .gz",
    )
    add("--records", nargs="*", choices=RECORDS, metavar="NAME", help=HELP["records"])
    add("--seeds", type=positive, default=5, help="with --records: number of seeds [default: 5]")
    add("--change", default="", metavar="WORDS", help="with --records: what changed, for the table")
    add("--rows", nargs="+", metavar="WORDS", help=HELP["rows"])
    add("--data", type=Path, metavar="FILE.py", help=HELP["data"])
    add("--small", action="store_true", help="with --modules: fewer trials of the loop, no Optuna")
    add("--steps", action="store_true", help="with --modules: only the time of one step")
    for name, says in STUDIES.items():
        add(f"--{name.replace('_', '-')}", action="store_true", help=says)
    options = parser.parse_args(arguments)
    chosen = next((name for name in STUDIES if getattr(options, name)), "training")
    if options.records is not None:
        chosen = "records"
    code: int = import_module(f"benchmark.studies.{chosen}").run(options)
    return code


def _work(text: str) -> tuple[str, int | None]:
    name, colon, number = text.partition(":")
    if name not in WIDTHS or (colon and not (number.isdecimal() and int(number) > 0)):
        raise argparse.ArgumentTypeError(
            f"must be {' or '.join(WIDTHS)}, or one of them and a number of trials as in "
            f"narrow:128, got {text!r}"
        )
    return name, int(number) if colon else None


if __name__ == "__main__":
    raise SystemExit(main())
