"""One shared list of trials through every engine: the scores must agree, then the times are shown."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from benchmark_engines import Chosen, split_by_lack, versions
from benchmark_gputune import train_with_gputune
from benchmark_machine import card
from benchmark_measure import Measured, Run, measure
from benchmark_report import AGREEMENT, agree, markdown, summary, write
from benchmark_torch import eager_seconds
from benchmark_work import Work

ON_CARD = "gputune on the GPU"


def run_training(
    out: Path, machine: dict[str, Any], works: Sequence[Work], chosen: list[Chosen], *, repeats: int
) -> int:
    """Measure, print and write; return 1 where the engines' scores differ."""
    able, lacks = split_by_lack(chosen)
    for name, lack in lacks.items():
        print(f"{name} is left out: {lack}")
    parts = []
    for work in works:
        measured = measure(runs(able, work), work, repeats)
        for m in measured:
            print(f"{work.name}: {m.engine}: mean last-epoch accuracy {m.accuracy():.4f}", flush=True)
        if not agree(measured):
            print(
                f"NO SPEED: the mean accuracies differ by more than {AGREEMENT}, so the work was not the same."
            )
            return 1
        on_cpu = [m for m in measured if m.engine != ON_CARD]
        parts.append(summary(work, on_cpu, _card_part(work, measured), lacks))
    machine = {**machine, "versions": machine["versions"] | versions(able)}
    paths = write(out, machine, parts)
    print(f"\n{markdown(machine, parts)}\nwritten: {', '.join(map(str, paths))}")
    return 0


def runs(chosen: Sequence[Chosen], work: Work) -> list[Run]:
    """Return each engine on its trials, gputune also on every part of the list that another one gets."""
    whole, found, parts = len(work.trials), [], set()
    for one in chosen:
        trials = min(one.trials or whole, whole)
        parts.add(trials)
        train = functools.partial(_train, one, joblib.cpu_count())
        found.append(Run(one.engine.name, train, trials, rival=one.engine.word != "gputune"))
    own = found.pop()
    found += [Run("gputune", own.train, trials, rival=False) for trials in sorted(parts - {whole})]
    found.append(own)
    if card():
        on_card = functools.partial(train_with_gputune, device="cuda")
        found.append(Run(ON_CARD, on_card, whole, rival=False))
    return found


def _train(one: Chosen, cores: int, work: Work) -> Any:
    return one.engine.load()(work, cores)


def _card_part(work: Work, measured: list[Measured]) -> dict[str, float] | None:
    own = next((m for m in measured if m.engine == ON_CARD), None)
    if own is None:
        return None
    seconds, trials = eager_seconds(work, "cuda")
    return {
        "gputune_accuracy": own.accuracy(),
        "gputune_median": float(np.median(own.seconds)),
        "gputune_min": min(own.seconds),
        "gputune_max": max(own.seconds),
        "eager_seconds": seconds,
        "eager_trials": trials,
    }
