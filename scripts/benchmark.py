"""Train one list of trials with scikit-learn, a plain PyTorch loop and gputune: the same scores, then the times.

    python scripts/benchmark.py                     digits, widths 16..64 and 16..256, into benchmarks/
    python scripts/benchmark.py --work narrow --trials 128
    python scripts/benchmark.py --big               100,000 rows: the plan, the time, the peak memory
    python scripts/benchmark.py --hypergradients    what each mode costs over plain training, into benchmarks/
    python scripts/benchmark.py --halving [--adult adult.data.gz]   halving beside the full search, over seeds
    python scripts/benchmark.py --logistic          the solved logistic regression beside scikit-learn's
    python scripts/benchmark.py --optuna            Optuna's TPE beside random search, and what asking costs

Run it on a machine that does nothing else.
"""

import argparse
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import joblib
import numpy as np
from benchmark_big import big_work, run_big
from benchmark_cores import stop_workers
from benchmark_gputune import train_with_gputune
from benchmark_halving import EPOCHS as HALVED_EPOCHS
from benchmark_halving import SEEDS, TRIALS, run_halving, tables
from benchmark_hypergradients import EPOCHS, MEMBERS, run_hypergradients
from benchmark_logistic import CANDIDATES, run_logistic
from benchmark_machine import ROOT, card, describe_machine
from benchmark_report import AGREEMENT, Measured, agree, markdown, summary, write
from benchmark_sklearn import train_with_sklearn
from benchmark_torch import eager_seconds, train_with_torch
from benchmark_work import WIDTHS, Work, digits_work

Engine = Callable[[Work], np.ndarray]
"""A work -> its last-epoch accuracies (C, F)."""

ON_CARD = "gputune on the GPU"


def main(arguments: list[str] | None = None) -> int:
    """Return 0, or 1 where the engines' scores differ."""
    options = _parse(arguments)
    if options.big:
        work = big_work(n_trials=options.trials, epochs=options.epochs or 5)
        run_big(work, "cuda" if card() else "cpu")
        return 0
    if options.hypergradients:
        return run_hypergradients(
            options.out,
            {**describe_machine(), "card": None},  # one thread of the processor, whatever else there is
            members=MEMBERS,
            epochs=options.epochs or EPOCHS,
            repeats=options.repeats or 7,
        )
    if options.halving:
        return run_halving(
            options.out,
            describe_machine(),
            tables(options.adult),
            trials=TRIALS,
            epochs=options.epochs or HALVED_EPOCHS,
            seeds=options.repeats or SEEDS,
        )
    if options.logistic:
        return run_logistic(options.out, {**describe_machine(), "card": None}, candidates=CANDIDATES)
    if options.optuna:
        import benchmark_optuna  # Optuna is an extra

        machine = {**describe_machine(), "card": None}
        return benchmark_optuna.run_optuna(
            options.out, machine, seeds=options.repeats or benchmark_optuna.SEEDS
        )
    machine, parts = describe_machine(), []
    for name in WIDTHS if options.work == "both" else (options.work,):
        work = digits_work(name, n_trials=options.trials, epochs=options.epochs or 20)
        measured = measure(engines(), work, options.repeats or 3)
        for m in measured:
            print(f"{name}: {m.engine}: mean last-epoch accuracy {m.accuracy:.4f}")
        if not agree(measured):
            print(
                f"NO SPEED: the mean accuracies differ by more than {AGREEMENT}, so the work was not the same."
            )
            return 1
        on_cpu = [m for m in measured if m.engine != ON_CARD]
        parts.append(summary(work, on_cpu, _card_part(work, measured)))
    paths = write(options.out, machine, parts)
    print(f"\n{markdown(machine, parts)}\nwritten: {', '.join(map(str, paths))}")
    return 0


def engines() -> dict[str, Engine]:
    """Return the engines by name: three on all cores, and gputune on the card where there is one."""
    cores = joblib.cpu_count()
    found: dict[str, Engine] = {
        "scikit-learn": functools.partial(train_with_sklearn, cores=cores),
        "PyTorch loop": functools.partial(train_with_torch, cores=cores),
        "gputune": train_with_gputune,
    }
    return found | ({ON_CARD: functools.partial(train_with_gputune, device="cuda")} if card() else {})


def measure(engines: Mapping[str, Engine], work: Work, repeats: int) -> list[Measured]:
    """Run each engine on the whole work ``repeats`` times, in turns, after each one's warm-up on a small piece."""
    names = list(engines)
    piece = replace(work, trials=work.trials[:4], epochs=1)
    for engine in engines.values():
        stop_workers()
        engine(piece)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    scores: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            stop_workers()
            begin = time.perf_counter()
            result = engines[name](work)
            seconds[name].append(time.perf_counter() - begin)
            scores[name].append(result)
    stop_workers()
    return [Measured(name, tuple(seconds[name]), np.stack(scores[name])) for name in names]


def _card_part(work: Work, measured: list[Measured]) -> dict[str, float] | None:
    own = next((m for m in measured if m.engine == ON_CARD), None)
    if own is None:
        return None
    seconds, trials = eager_seconds(work, "cuda")
    return {
        "gputune_accuracy": own.accuracy,
        "gputune_median": float(np.median(own.seconds)),
        "gputune_min": min(own.seconds),
        "gputune_max": max(own.seconds),
        "eager_seconds": seconds,
        "eager_trials": trials,
    }


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=_positive, default=64, help="length of the shared list (default 64)")
    parser.add_argument("--epochs", type=_positive, help="default 20, with --big and --hypergradients 5")
    parser.add_argument("--repeats", type=_positive, help="default 3, with --hypergradients 7, --optuna 10")
    parser.add_argument("--work", choices=[*WIDTHS, "both"], default="both")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="folder of the two files")
    parser.add_argument("--big", action="store_true", help="100,000 rows x 50 columns with gputune alone")
    parser.add_argument("--hypergradients", action="store_true", help="the modes on one stacked population")
    parser.add_argument(
        "--halving", action="store_true", help="243 trials, 54 epochs; --repeats is the seeds (10)"
    )
    parser.add_argument(
        "--adult", type=Path, metavar="FILE", help="with --halving: UCI's adult.data, also .gz"
    )
    parser.add_argument("--logistic", action="store_true", help="60 values of C with each penalty, on digits")
    parser.add_argument("--optuna", action="store_true", help="a search of 160 trials for each of 10 seeds")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text}")
    return number


if __name__ == "__main__":
    raise SystemExit(main())
