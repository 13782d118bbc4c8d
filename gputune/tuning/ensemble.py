"""An ensemble of the best trials of a study, chosen greedily on the rows that each fold validates on.

Source: Caruana et al. (2004), Ensemble selection from libraries of models: with repetition, from the best one on.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import nn

from gputune.data.dataset import Dataset
from gputune.data.encode import Statistics
from gputune.data.folds import unpack_folds
from gputune.data.scaling import side_by_side
from gputune.engine.stop import entry
from gputune.errors import InputError, check_count
from gputune.population.network import Ensemble
from gputune.seeding import stream_seed
from gputune.study.model import TunedModel
from gputune.study.study import Study, Trial
from gputune.tuning.predictions import check_folds_train, is_calibrated, predictions_of, search_for
from gputune.tuning.progress import Progress
from gputune.tuning.refit import Search


@entry
def ensemble(
    study: Study,
    X: object = None,
    y: object = None,
    *,
    size: int = 25,
    candidates: int = 25,
    refit: int | Literal["all", "folds"] = "all",
    calibrate: bool | None = None,
    trust_code: bool = False,
    verbose: int = 1,
) -> TunedModel:
    """Choose and train an ensemble of the trials of a study; see ``Study.ensemble``."""
    check_count(size, "ensemble(size=...)")
    check_count(candidates, "ensemble(candidates=...)", least=2)
    starts = 1 if isinstance(refit, str) and refit in ("all", "folds") else refit
    check_count(starts, "ensemble(refit=...), unless it is 'all' or 'folds',")
    trials, calibrated = _candidates(study, candidates), is_calibrated(study, calibrate, "ensemble")
    search = search_for("ensemble", study, X, y, trust_code)
    predictions = predictions_of(search, trials, Progress(verbose))
    chosen, scores = predictions.choose(size), predictions.nested_scores(size)
    shares = torch.tensor([chosen[place] / chosen.total() for place in range(len(trials))])
    kept = [trials[place] for place in sorted(chosen)]
    weights = [chosen[place] / chosen.total() for place in sorted(chosen)]
    whole = search.all_rows(kept)
    parts = _parts(search, whole) if refit == "folds" else [whole] * int(starts)
    modules: list[nn.Module] = []
    for number, data in enumerate(parts):
        seed = search.options.random_state
        seed = seed if number == 0 or refit == "folds" else stream_seed(seed, "ensemble", number)
        modules += [module for (module,) in search.train(data, kept, seed=seed)]
    columns, statistics = _columns(search, whole, kept)
    columns *= len(parts)
    task = search.problem.target.task
    network = Ensemble(modules, [w / len(parts) for w in weights] * len(parts), task, columns)
    arguments = [search.arguments(search.config(trial), whole) for trial in kept] * len(parts)
    model = search.model(
        network.eval(),
        whole,
        statistics=statistics,
        spec={"kwargs": arguments[0], "ensemble": arguments, **({"columns": columns} if columns else {})},
        info={
            "ensemble": {str(trial.number): weight for trial, weight in zip(kept, weights)},
            "refit": refit,
            **search.score(float(np.mean(scores)), float(np.std(scores, ddof=1)) / math.sqrt(len(scores))),
        },
    )
    temperature = predictions.temperature(shares) if calibrated else 1.0
    return replace(model, residuals=predictions.residuals(shares), temperature=temperature)


def _parts(search: Search, whole: Dataset) -> list[Dataset]:
    """Return the training rows of each fold of the search, prepared as all rows are: members then read the same."""
    (every,), parts = whole.folds, []
    for train, _ in unpack_folds(search.study.record.arguments.folds):
        rows = torch.as_tensor(train, device=whole.device)
        parts.append(replace(whole, folds=(replace(every, train=rows),)))
    return parts


def _columns(search: Search, data: Dataset, trials: Sequence[Trial]) -> tuple[list[list[int]], Statistics | None]:
    """Return the first column and the end of what each trial reads of an ensemble's inputs, and what makes these."""
    own = [data.of(search.config(trial)) for trial in trials]
    distinct = {one.numbers: one for one in own}
    if len(distinct) == 1:
        return [], None  # all columns of the data itself
    ends = np.cumsum([one.n_features for one in distinct.values()]).tolist()
    columns = {word: [end - one.n_features, end] for end, (word, one) in zip(ends, distinct.items())}
    parts = [part for one in distinct.values() for part in one.statistics if isinstance(part, Statistics)]
    return [columns[one.numbers] for one in own], side_by_side(parts)


def _candidates(study: Study, most: int) -> list[Trial]:
    """Return the best finished trials of a study; raises InputError where no ensemble can be made of them."""
    check_folds_train(study, "ensemble()")
    trials = [t for t in study.ranking() if t.state == "complete" and math.isfinite(t.score)][:most]
    if len(trials) < 2:
        raise InputError(
            f"ensemble() needs two finished trials, and the study has {len(trials)}; search on, or use best_model()."
        )
    return trials
