"""The command ``gputune stop``, which ends a running search or one of its trials."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from gputune.cli.arguments import study_file
from gputune.ground.errors import InputError, Verbatim
from gputune.ground.text import clean
from gputune.study.claims import Claims, Owner
from gputune.study.database import check_study_file
from gputune.study.store import Store
from gputune.study.study import Study
from gputune.tuning.method import method_class

_WHOLE = "Leave --trial out to end the whole search."


def stop(arguments: argparse.Namespace) -> str:
    """Request the processes of a running search to end it, or to end one trial.

    Returns the text to print. Raises InputError if no process on this machine works on the study.
    """
    file = study_file(arguments.study)
    check_study_file(file)
    trial = None if arguments.trial is None else int(arguments.trial)
    with Claims(file) as claims:
        owners = claims.owners()
        near = [owner for owner in owners if owner.is_near]
        _check_is_running(file, owners, near)
        if trial is not None:
            _check_trial(file, trial)
        for owner in near:
            claims.request_stop(owner, trial)
    if arguments.json:
        document = {
            "status": "done",
            "exit_code": 0,
            "study": str(file),
            "trial": trial,
            "processes": [owner.pid for owner in near],
        }
        return json.dumps(document, indent=1)
    what = "the search" if trial is None else f"trial {trial}"
    names = ", ".join(f"process {owner.pid}" for owner in near)
    return f"Stop     {names} will end {what} after the running epoch"


def _check_is_running(file: Path, owners: Sequence[Owner], near: Sequence[Owner]) -> None:
    """Raise InputError if no process on this machine works on the study."""
    if near:
        return
    name = repr(clean(file))
    if owners:
        places = ", ".join(sorted(map(str, owners)))
        raise InputError(
            None,
            f"{places} works on the study {name}, and gputune stop reaches only processes on this "
            "machine",
            remedy="Run the command on that machine.",
        )
    raise InputError(
        None,
        f"no process works on the study {name}",
        remedy=f"The search has ended. To see its trials, run gputune status {clean(file)}.",
    )


def _check_trial(file: Path, trial: int) -> None:
    """Raise InputError if the search has no such trial, or cannot end it."""
    with Store.open(file) as store:
        numbers = [candidate.number for candidate in store.candidates()]
        result = store.results().get(trial)
        record = Study.from_rows(store.meta, []).record
    if trial not in numbers:
        rule = f"must be the number of a trial of the study, from 0 to {max(numbers, default=0)}"
        raise InputError("--trial", rule, got=trial)
    if result is not None and result.state != "stopped":
        rule = "must be the number of a trial that has not ended"
        raise InputError("--trial", rule, got=Verbatim(f"{trial}, which is {result.state}"))
    if isinstance(record.arguments.kept.get("workers"), dict):  # a cluster
        raise InputError(
            "--trial",
            "cannot end one trial of a search on a cluster, because its tasks do not receive the "
            "request",
            remedy=_WHOLE,
        )
    method = record.method
    name = method if isinstance(method, str) else method["name"]
    if not method_class(name).ends_single_trials or record.optimizer == "exact":
        reason = "a solved model" if record.optimizer == "exact" else f"--method {name}"
        rule = (
            f"cannot end one trial of a search with {reason}, because its trials are one training"
        )
        if record.optimizer == "exact":
            rule = f"cannot end one trial of {reason}, which takes seconds"
        raise InputError("--trial", rule, remedy=_WHOLE)
