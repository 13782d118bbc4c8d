"""search(): the search of those who have a training loop of their own."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from gputune.api.study import Study
from gputune.api.tuning import study_so_far, with_near_words
from gputune.callbacks.callback import Callback
from gputune.executors.objective import Objective
from gputune.tuning.loops import search_loop
from gputune.tuning.method import Method
from gputune.tuning.options import RULES, Options


@with_near_words
def search(
    objective: Objective,
    space: object,
    *,
    direction: Literal["maximize", "minimize"],
    n_trials: int = 64,
    include: Sequence[Mapping[str, object]] = (),
    warm_start: str | Path | Study | Sequence[str | Path | Study] = (),
    method: Method | Literal["halving", "median"] = "random",
    max_epochs: int | None = None,
    timeout: float | None = None,
    target_score: float | None = None,
    patience_trials: int | None = None,
    study: str | Path | None = None,
    workers: int | Literal["auto"] = "auto",
    random_state: object = 0,
    callbacks: Sequence[Callback] = (),
    verbose: int = 1,
) -> Study:
    """Search hyperparameters of a training loop of your own, a trial at a time on each core or GPU; return the Study.

    objective    ``objective(params, report)`` trains one configuration, a dict, and returns its score.
                 ``report(value)`` after each epoch keeps the learning curve, and ends the training, by an exception,
                 where the search prunes it or its time is over; ``report.number`` is the trial's. What else it raises
                 makes the trial "failed", with ``trial.detail["error"]``, and the search goes on
    space        as in ``tune``, with any keys and values
    direction    whether the objective is to be large ("maximize") or small. As in scikit-learn greater scores of a
                 study are better: those of "minimize" have the other sign
    n_trials     configurations that are drawn, or asked of Optuna's sampler; ``include`` (dicts with all keys of the
                 space) comes on top, and first
    warm_start   as in ``tune``
    method       "random"; "halving", "median", ``gputune.Halving(...)``, ``gputune.Median(...)``: a trial is pruned
                 at a report, compared with those that have come as far (none waits for others, so with several workers
                 the order in which they come decides); ``gputune.OptunaSampler(...)``, by its batch
    max_epochs   how often a whole training calls ``report``; halving and the median rule need it
    timeout      seconds after which no trial begins, and those that train end at their next report; a later call with
                 the same ``study`` trains these anew
    target_score, patience_trials  no trial begins, and those that train end at their next report, when the objective
                 has returned that or better, or so many trials in a row were no better than the best before them
    study        path of an SQLite file to keep the study in; the same call goes on where the file ends
    workers      processes that train, a trial each; "auto": one for each GPU, else for each core; 1: this process. Each
                 has a GPU of its own as "cuda" (by CUDA_VISIBLE_DEVICES) and its part of the cores for torch
    random_state seed of the draws. ``random``, ``numpy.random`` and ``torch`` begin each trial at this seed
    callbacks, verbose  as in ``tune``

    Raises as ``tune`` does.
    """
    arguments = locals()
    given = {name: arguments[name] for name in RULES.keys() & arguments.keys()}
    options = Options(**{**given, "max_epochs": 1 if max_epochs is None else max_epochs})
    if options.target_score is not None and direction == "minimize":
        options = replace(options, target_score=-options.target_score)
    run = partial(
        search_loop, objective, options, direction=direction, max_epochs=max_epochs, study_type=Study
    )
    return study_so_far(run, verbose)
