"""Train one list of trials with gputune and with every alternative that is installed: the same scores, then the times.

    python scripts/benchmark.py                     digits, widths 16..64 and 16..256, into benchmarks/
    python scripts/benchmark.py --work narrow:128 narrow:2000 wide:64 narrow:1
                                                    these lists, with so many trials, in one report
    python scripts/benchmark.py --engines sklearn,torch,ray:32,gputune
                                                    only these; Ray Tune on the first 32 trials of each list
    python scripts/benchmark.py --grid              gputune, scikit-learn and the loop over trials x widths x batch
                                                    sizes; time and memory against trials, folds and epochs
    python scripts/benchmark.py --quality [--adult adult.data.gz]
                                                    best held-out score against time, random search and halving
    python scripts/benchmark.py --big               100,000 rows: the plan, the time, the peak memory
    python scripts/benchmark.py --hypergradients    what each mode costs over plain training, into benchmarks/
    python scripts/benchmark.py --halving [--adult adult.data.gz]   halving beside the full search, over seeds
    python scripts/benchmark.py --logistic          the solved logistic regression beside scikit-learn's
    python scripts/benchmark.py --profile           share of the matrix-product peak, and a trial's cost beside training
    python scripts/benchmark.py --optuna            Optuna's TPE beside random search, and what asking costs

The engines are sklearn, torch (a plain loop), compile (its step through torch.compile), optuna, ray, skorch, jax and
gputune. One whose package is missing is named in the report and left out: pip install optuna "ray[tune]" skorch jax.

Run it on a machine that does nothing else.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmark_big import big_work, run_big
from benchmark_engines import ENGINES, Chosen, choose
from benchmark_grid import EPOCHS as GRID_EPOCHS
from benchmark_grid import TRIALS as FEWER_TRIALS
from benchmark_grid import run_grid
from benchmark_halving import EPOCHS as HALVED_EPOCHS
from benchmark_halving import SEEDS, TRIALS, run_halving, tables
from benchmark_hypergradients import EPOCHS, MEMBERS, run_hypergradients
from benchmark_logistic import CANDIDATES, run_logistic
from benchmark_machine import ROOT, card, describe_machine
from benchmark_profile import NARROW_TRIALS, WIDE_TRIALS, run_profile
from benchmark_quality import EPOCHS as QUALITY_EPOCHS
from benchmark_quality import SEEDS as QUALITY_SEEDS
from benchmark_quality import TRIALS as QUALITY_TRIALS
from benchmark_quality import run_quality
from benchmark_training import run_training
from benchmark_work import WIDTHS, digits_work


def main(arguments: list[str] | None = None) -> int:
    """Return 0, or 1 where the engines' scores differ."""
    options = _parse(arguments)
    for name, part in PARTS.items():
        if getattr(options, name):
            return part(options)
    works = [
        digits_work(name, n_trials=trials or options.trials, epochs=options.epochs or 20)
        for name, trials in options.work
    ]
    engines = options.engines or choose(",".join(ENGINES))
    return run_training(options.out, describe_machine(), works, engines, repeats=options.repeats or 3)


def _big(options: argparse.Namespace) -> int:
    run_big(big_work(n_trials=options.trials, epochs=options.epochs or 5), "cuda" if card() else "cpu")
    return 0


def _hypergradients(options: argparse.Namespace) -> int:
    return run_hypergradients(
        options.out,
        {**describe_machine(), "card": None},  # one thread of the processor, whatever else there is
        members=MEMBERS,
        epochs=options.epochs or EPOCHS,
        repeats=options.repeats or 7,
    )


def _halving(options: argparse.Namespace) -> int:
    return run_halving(
        options.out,
        describe_machine(),
        tables(options.adult),
        trials=TRIALS,
        epochs=options.epochs or HALVED_EPOCHS,
        seeds=options.repeats or SEEDS,
    )


def _logistic(options: argparse.Namespace) -> int:
    return run_logistic(options.out, {**describe_machine(), "card": None}, candidates=CANDIDATES)


def _optuna(options: argparse.Namespace) -> int:
    import benchmark_optuna  # Optuna is an extra

    machine = {**describe_machine(), "card": None}
    return benchmark_optuna.run_optuna(options.out, machine, seeds=options.repeats or benchmark_optuna.SEEDS)


def _grid(options: argparse.Namespace) -> int:
    machine = {**describe_machine(), "card": None}
    return run_grid(
        options.out,
        machine,
        options.engines or choose("sklearn,torch"),
        trials=sorted({*FEWER_TRIALS, options.trials}),
        epochs=options.epochs or GRID_EPOCHS,
        repeats=options.repeats or 1,
    )


def _quality(options: argparse.Namespace) -> int:
    machine = {**describe_machine(), "card": None}
    return run_quality(
        options.out,
        machine,
        options.adult,
        epochs=options.epochs or QUALITY_EPOCHS,
        seeds=options.repeats or QUALITY_SEEDS,
        trials=QUALITY_TRIALS,
    )


def _profile(options: argparse.Namespace) -> int:
    return run_profile(
        options.out,
        {**describe_machine(), "card": None},
        trials=WIDE_TRIALS,
        many=NARROW_TRIALS,
        epochs=options.epochs or 20,
        repeats=options.repeats or 3,
    )


PARTS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "grid": _grid,
    "quality": _quality,
    "big": _big,
    "hypergradients": _hypergradients,
    "halving": _halving,
    "logistic": _logistic,
    "profile": _profile,
    "optuna": _optuna,
}
"""The other parts by the name of their option."""


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=_positive, default=64, help="length of the shared list (default 64)")
    parser.add_argument(
        "--epochs",
        type=_positive,
        help="default 20, with --big and --hypergradients 5, --grid 10, --quality 27",
    )
    parser.add_argument(
        "--repeats", type=_positive, help="default 3, with --hypergradients 7, --optuna 10, --grid 1"
    )
    parser.add_argument(
        "--work",
        nargs="+",
        type=_work,
        default=[(name, None) for name in WIDTHS],
        metavar="NAME[:TRIALS]",
        help=f"{' or '.join(WIDTHS)}, each with its own number of trials (default: both, --trials long)",
    )
    parser.add_argument(
        "--engines", type=_engines, metavar="WORD[:TRIALS],...",
        help="of those above, with a number: on the first trials only (default: all; --grid: sklearn,torch)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="folder of the two files")
    parser.add_argument("--grid", action="store_true", help="losing cases too, and what grows with the work")
    parser.add_argument("--quality", action="store_true", help="81 trials; --repeats is the seeds (5)")
    parser.add_argument("--big", action="store_true", help="100,000 rows x 50 columns with gputune alone")
    parser.add_argument("--hypergradients", action="store_true", help="the modes on one stacked population")
    parser.add_argument(
        "--halving", action="store_true", help="243 trials, 54 epochs; --repeats is the seeds (10)"
    )
    parser.add_argument(
        "--adult", type=Path, metavar="FILE", help="with --halving, --quality: UCI's adult.data, also .gz"
    )
    parser.add_argument("--logistic", action="store_true", help="60 values of C with each penalty, on digits")
    parser.add_argument("--profile", action="store_true", help="32 trials of width 256, of 128; 10,000 of 16")
    parser.add_argument("--optuna", action="store_true", help="a search of 160 trials for each of 10 seeds")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text}")
    return number


def _work(text: str) -> tuple[str, int | None]:
    name, colon, number = text.partition(":")
    if name not in WIDTHS or (colon and not (number.isdecimal() and int(number) > 0)):
        raise argparse.ArgumentTypeError(
            f"must be {' or '.join(WIDTHS)}, or one of them and a number of trials as in narrow:128, got {text!r}"
        )
    return name, int(number) if colon else None


def _engines(text: str) -> list[Chosen]:
    try:
        return choose(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    raise SystemExit(main())
