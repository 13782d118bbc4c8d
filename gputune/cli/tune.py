"""``gputune tune`` and ``resume``: rows apart, search, refit, held-out score, and everything saved in one folder."""

import argparse
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gputune.api.study import Study
from gputune.cli.arguments import MODEL, OF_METHODS, STUDY, in_flags, model_folder, study_file
from gputune.cli.closing import Ending, closing_text, held_out_score, stopped_text
from gputune.data.folds import parse_cv
from gputune.data.source import read_source, set_apart
from gputune.errors import InputError, SearchInterrupted
from gputune.executors.ray_connection import Ray
from gputune.search.descent import Hypergradient
from gputune.search.space import parse_specs
from gputune.search.stopping import Halving, Median
from gputune.study.database import blaming_options
from gputune.tuning.interrupt import CTRL_C, TERMINATED, interrupted_words
from gputune.tuning.options import RULES, Options
from gputune.tuning.pipeline import search
from gputune.tuning.problem import choose_model
from gputune.tuning.profile import PREPARING, Profile
from gputune.tuning.progress import Progress
from gputune.tuning.record import RecordedSearch, recorded_search

DESCENTS, _HELD_OUT = 8, 0.2
"""Starts of descents, and the share of the rows held out, where the command does not say."""


def tune(arguments: argparse.Namespace) -> str:
    """Run the command and return its closing text.

    Raises SearchInterrupted with a line that says what is kept and the table so far, and what ``gputune.tune`` raises.
    """
    begin = time.perf_counter()
    if arguments.study == "":
        raise InputError("--out '' is no folder; name one, or leave it out for gputune-out.")
    out = Path(arguments.study or "gputune-out")
    _check_out(out)
    options = _options(arguments, out / STUDY)
    choice = choose_model(arguments.model or "mlp", arguments.optimizer)
    profile = Profile()
    with profile.clock(PREPARING):
        source = read_source(
            arguments.file, _target(arguments), arguments.groups, module=choice.kind == "module"
        )
    rest, test = set_apart(
        source,
        test_size=_HELD_OUT if arguments.test_size is None else arguments.test_size,
        cv=arguments.cv or str(Options.cv),
        seed=options.random_state,
        task=options.task,
    )
    if options.task is None and rest.origin is not None:
        options = replace(options, task=rest.origin["task"])
    with _folder(options.study.parent):
        again = RecordedSearch(choice, rest, test, options)
        return _to_the_end(arguments, arguments.file, again, out / STUDY, begin, profile)


def resume(arguments: argparse.Namespace) -> str:
    """Go on with the search of a study file and return its closing text, as ``tune`` does."""
    begin = time.perf_counter()
    study = study_file(arguments.study)
    changed = _said(arguments)
    record = Study.open(study).record
    profile = Profile()
    with profile.clock(PREPARING), blaming_options(study):
        again = recorded_search(study, record, changed, trust_code=arguments.trust_code)
    if callbacks := record.arguments.get("callbacks"):
        Progress(arguments.verbose).say(
            f"note: {', '.join(callbacks)}: callbacks are not held by a study file, so these are not called."
        )
    return _to_the_end(arguments, (record.source or {})["path"], again, study, begin, profile)


def _to_the_end(
    arguments: argparse.Namespace,
    file: str,
    again: RecordedSearch,
    shown: Path,
    begin: float,
    profile: Profile,
) -> str:
    """Search, train the best trial on all rows, score it on the held-out ones, save it, and say so.

    ``shown`` is the study file as it was typed; a module of the user's may change the working folder.
    """
    # Only the command ``tune`` keeps rows apart, and a model beside the study.
    keeps_model = "test_size" in (again.source.origin or {})
    model_shown = model_folder(shown) if keeps_model else None
    with _kept(again.options.study):
        try:
            signals = (CTRL_C, TERMINATED)
            study = search(
                again.choice,
                again.source,
                again.options,
                signals,
                say_notes=False,
                profile=profile,
                words=in_flags,
                study_type=Study,
            )
        except SearchInterrupted as stop:
            seconds = time.perf_counter() - begin
            ending = Ending(file, stop.study, again.source, None, shown, model_shown, seconds)
            stop.report = stopped_text(ending, arguments.typed, width=shutil.get_terminal_size().columns)
            raise
        held_out = None
        if keeps_model:
            with profile.clock("training the best on all rows"):
                model = study.best_model()
            if again.test is not None:
                record = study.record
                held_out = held_out_score(model, record.scoring, again.test, positive=record.positive)
                known = {"held_out_score": held_out.score, "held_out_rows": held_out.rows}
                model = replace(model, info={**model.info, **known})
            model.save(model_folder(again.options.study))
    seconds = time.perf_counter() - begin
    ending = Ending(file, study, again.source, held_out, shown, model_shown, seconds)
    said = closing_text(ending, width=shutil.get_terminal_size().columns)
    if not arguments.profile:
        return said
    dtype = getattr(torch, again.options.dtype)
    return f"{said}\n\n{profile.report(dtype=dtype, device=again.options.device_here())}"


def _options(arguments: argparse.Namespace, study_file: Path) -> Options:
    said = _said(arguments)
    if "space" in said:
        said["space"] = parse_specs(said["space"]) or None
    if "cv" in said:
        said["cv"] = parse_cv(said["cv"])
    method = _method(arguments.method or "random", arguments)
    if isinstance(method, Hypergradient):
        said.setdefault("n_trials", DESCENTS)
    return Options(**{**said, "method": method, "study": study_file})


def _said(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a search that were typed; of processes and a cluster one alone."""
    names = RULES.keys() - {"study"}
    said = {name: value for name in names if (value := getattr(arguments, name, None)) is not None}
    if arguments.ray is not None:
        if arguments.workers not in (None, "auto"):
            raise InputError(f"--workers {arguments.workers} and --ray exclude each other: leave one out.")
        said["workers"] = Ray(arguments.ray)
    return said


def _method(method: str, arguments: argparse.Namespace) -> str | Halving | Median | Hypergradient:
    """Return the method of the command, with its own options; those of another one are refused."""
    own = OF_METHODS.get(method, {})
    for other, words in OF_METHODS.items():
        for name, rule in words.items():
            if name not in own and getattr(arguments, name) is not None:
                raise InputError(
                    f"{rule.name} belongs to --method {other}, got --method {method}; leave it out, or choose that "
                    "method."
                )
    options = {name: value for name in own if (value := getattr(arguments, name)) is not None}
    kinds: dict[str, Callable[..., Halving | Median | Hypergradient]] = {
        "halving": Halving,
        "median": Median,
        "hypergradient": Hypergradient,
    }
    return kinds[method](**options) if method in kinds else "random"


def _target(arguments: argparse.Namespace) -> str | None:
    if arguments.target is None and not arguments.file.startswith("sklearn:"):
        raise InputError(
            f"--target is missing: name the column of {arguments.file!r} to predict, for example --target price."
        )
    target: str | None = arguments.target
    return target


def _check_out(out: Path) -> None:
    """Refuse, before anything is read, a place where the result could not be written without a loss."""
    there = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not there.is_dir():
        raise InputError(f"--out {str(out)!r}: {str(there)!r} is a file; give a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(
            f"--out {str(out)!r} cannot be written: check the rights of {str(there)!r}, or give another folder."
        )
    if (out / MODEL).exists() and not (out / STUDY).exists():
        raise InputError(
            f"--out {str(out)!r} holds {MODEL!r} but not the {STUDY!r} it came from, and would lose it; "
            "give another folder."
        )


@contextmanager
def _folder(out: Path) -> Iterator[None]:
    """Make the folder; one that a failed command leaves empty goes again."""
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if made:
            with suppress(OSError):  # it is not empty
                out.rmdir()


@contextmanager
def _kept(study_file: Path) -> Iterator[None]:
    """Say on a Ctrl-C or SIGTERM before or after the training what is safe and how to go on."""
    try:
        yield
    except SearchInterrupted:
        raise
    except KeyboardInterrupt as stop:
        words = "interrupted before the first trial; nothing was kept."
        if study_file.exists():
            words = interrupted_words(Study.open(study_file), study_file)
        raise type(stop)(words) from None
