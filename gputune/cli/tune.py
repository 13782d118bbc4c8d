"""``gputune tune`` and ``resume``: rows apart, search, refit, held-out score, and everything saved in one folder."""

import argparse
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from gputune.api.study import Study
from gputune.cli.arguments import MODEL, STUDY, model_folder, study_file
from gputune.cli.evaluation import HeldOut, held_out_score
from gputune.cli.options import options_of, typed_options
from gputune.cli.summary import Ending, ensemble_words, stopped_text, summary_text
from gputune.cli.translation import in_flags
from gputune.data.array_files import ARRAY_SUFFIXES
from gputune.data.source import Source, read_source, set_apart
from gputune.data.target import check_target
from gputune.errors import DivergedError, InputError, SearchFailedError, SearchInterrupted, Terminated
from gputune.methods.descent import Hypergradient
from gputune.study.database import blaming_options
from gputune.study.model import TunedModel
from gputune.study.model_files import DESCRIPTION, read_description
from gputune.study.study import Trial
from gputune.tuning.candidates import checked_space, first_trials
from gputune.tuning.interrupt import CTRL_C, TERMINATED, interrupted_words
from gputune.tuning.model_choice import choose_model
from gputune.tuning.options import Options
from gputune.tuning.pipeline import search
from gputune.tuning.progress import PREPARING, Profile, Progress
from gputune.tuning.record import RecordedSearch, recorded_search
from gputune.types import Json

_HELD_OUT = 0.2
"""Share of the rows held out, where the command does not say."""


def tune(arguments: argparse.Namespace) -> str:
    """Run the command and return its closing text.

    Raises SearchInterrupted with a line that says what is kept and the table so far, and what ``gputune.tune`` raises.
    """
    begin, profile = time.perf_counter(), Profile()
    if arguments.study == "":
        raise InputError(f"--out '' is no folder; name one, or leave it out for {_folder_of(arguments)}.")
    out = Path(arguments.study or _folder_of(arguments))
    _check_out(out)
    options = options_of(arguments, out / STUDY)
    choice = choose_model(arguments.model or "mlp", arguments.optimizer)
    with profile.clock(PREPARING):
        source = read_source(
            arguments.file,
            _target(arguments),
            arguments.groups,
            module=choice.takes_arrays,
            drop=options.drop,
            kinds=options.kinds,
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
    with _folder((options.study or out / STUDY).parent):
        return _finish(arguments, RecordedSearch(choice, rest, test, options), out / STUDY, begin, profile)


train = tune
"""The command that trains one configuration, which is an included trial of a search that draws none."""


def _folder_of(arguments: argparse.Namespace) -> str:
    return "gputune-train" if arguments.command == "train" else "gputune-out"


def resume(arguments: argparse.Namespace) -> str:
    """Go on with the search of a study file and return its closing text, as ``tune`` does."""
    begin, profile = time.perf_counter(), Profile()
    study = study_file(arguments.study)
    changes = typed_options(arguments)
    record = Study.open(study).record
    with profile.clock(PREPARING), blaming_options(study):
        recorded = recorded_search(study, record, changes, trust_code=arguments.trust_code)
    if callbacks := record.arguments.callbacks:
        Progress(arguments.verbose).say(
            f"note: {', '.join(callbacks)}: callbacks are not held by a study file, so these are not called."
        )
    return _finish(arguments, recorded, study, begin, profile)


def _finish(
    arguments: argparse.Namespace, recorded: RecordedSearch, shown: Path, begin: float, profile: Profile
) -> str:
    """Search, train the best trial on all rows, score it on the held-out ones, save it, and say so.

    ``shown`` is the study file as it was typed; a module of the user's may change the working folder.
    """
    rest, options = recorded.source, recorded.options
    place = options.study or shown
    # Only the command ``tune`` keeps rows apart, and a model beside the study.
    keeps_model = "test_size" in (rest.origin or {})
    width, folder = shutil.get_terminal_size().columns, model_folder(place)
    saved = _saved(folder) if arguments.command == "resume" else {}
    intervals = bool(arguments.intervals) or saved.get("residuals") is not None
    calibrate = True if arguments.calibrate or saved.get("temperature", 1.0) != 1.0 else None
    _check_extras(rest, options, intervals=intervals, calibrate=bool(calibrate))

    def ending(study: Study, held_out: HeldOut | None, ensemble: str = "") -> Ending:
        file = getattr(arguments, "file", None) or (study.record.source or {})["path"]
        model = model_folder(shown) if keeps_model else None
        seconds = time.perf_counter() - begin
        ended = in_flags(profile.ended)
        typed = arguments.typed
        return Ending(file, study, rest, held_out, shown, model, seconds, ensemble, trained, ended, typed)

    held_out, ensemble, trained = None, "", None
    with _explaining_interrupts(place):
        try:
            study = search(
                recorded.choice,
                rest,
                options,
                (CTRL_C, TERMINATED),
                say_notes=False,
                profile=profile,
                words=in_flags,
                study_type=Study,
            )
        except SearchInterrupted as stop:
            is_saved = False
            if keeps_model and arguments.command != "train" and stop.signal == CTRL_C and not stop.at_once:
                is_saved, held_out = _best_so_far(
                    stop.study, recorded, folder, intervals=intervals, calibrate=calibrate
                )
            kept = ending(stop.study, held_out)
            kept = kept if is_saved else replace(kept, model_folder=None)
            stop.report = stopped_text(kept, width=width)
            raise
        if keeps_model:
            with profile.clock("training the best on all rows"):
                trained = _trained(study) if arguments.command == "train" else None
                number = None if trained is None else trained.number
                model = study.best_model(trial=number, intervals=intervals, calibrate=calibrate)
                model, held_out = _scored(model, recorded, study)
            model.save(folder)
            if getattr(arguments, "ensemble", None) or "ensemble" in saved.get("spec", {}):
                try:
                    with profile.clock("an ensemble"):
                        held_out, ensemble = _ensemble(
                            study, recorded, held_out, folder, arguments.verbose, calibrate=calibrate
                        )
                except KeyboardInterrupt as stop:
                    words = "the ensemble was interrupted; the model of the best trial is saved."
                    report = summary_text(ending(study, held_out), width=width)
                    signal = TERMINATED if isinstance(stop, Terminated) else CTRL_C
                    raise SearchInterrupted(words, study=study, signal=signal, report=report) from None
    text = summary_text(ending(study, held_out, ensemble), width=width)
    if not arguments.profile:
        return text
    dtype = getattr(torch, options.dtype)
    return f"{text}\n\n{profile.report(dtype=dtype, device=profile.device)}"


def _saved(folder: Path) -> Json:
    """Return the description of the model in a folder; {} where it holds none that can be read."""
    try:
        return read_description(folder / DESCRIPTION)
    except InputError:
        return {}


def _check_extras(rest: Source, options: Options, *, intervals: bool, calibrate: bool) -> None:
    """Raise InputError, before anything trains, where no model can have intervals, or be calibrated."""
    if not (intervals or calibrate):
        return
    target = check_target(rest.y, task=options.task, n_rows=len(rest.X), name=rest.target)
    flag, what, fits = "--intervals", "one number", target.task == "regression" and target.n_outputs == 1
    if not intervals:
        flag, what, fits = "--calibrate", "one class", target.task in ("binary", "multiclass")
    if not fits:
        raise InputError(
            f"{flag} is for {what} to be predicted, and the target is {target.in_words}; leave it out."
        )
    if isinstance(options.method, Hypergradient):
        raise InputError(
            f"{flag} trains a trial on its folds again, which the points of a descent do not; leave it out."
        )


def _best_so_far(
    study: Study, recorded: RecordedSearch, folder: Path, *, intervals: bool, calibrate: bool | None
) -> tuple[bool, HeldOut | None]:
    """Save the model of the best trial so far, where there is one; return whether it is, and its held-out score.

    A trial that was cut short trains for as many epochs as its best score took. Another Ctrl-C ends this, and an
    ensemble of an earlier call stays.
    """
    if not any(math.isfinite(trial.score) for trial in study.trials) or "ensemble" in _saved(folder).get(
        "spec", {}
    ):
        return False, None
    Progress(recorded.options.verbose).say("training the best trial so far on all rows (Ctrl-C: do without)")
    try:
        model = study.best_model(intervals=intervals, calibrate=calibrate)
        model, held_out = _scored(model, recorded, study)
    except (DivergedError, KeyboardInterrupt):
        return False, None
    model.save(folder)
    return True, held_out


def _trained(study: Study) -> Trial:
    """Return the trial that the command asked for. Raises SearchFailedError where it diverged."""
    choice, _, options, _ = study.data
    params = first_trials(checked_space(choice, options), choice, options)[0].params
    trial = next(trial for trial in study.trials if trial.params == params)
    if not math.isfinite(trial.score):
        raise SearchFailedError(
            f"trial {trial.number}, which was to be trained, has no finite score: it diverged, or its time was over; "
            "try a smaller lr, or more time."
        )
    return trial


def _scored(model: TunedModel, recorded: RecordedSearch, study: Study) -> tuple[TunedModel, HeldOut | None]:
    """Return the model with its score on the held-out rows, where there are some."""
    if recorded.test is None:
        return model, None
    record = study.record
    held_out = held_out_score(model, record.scoring, recorded.test, positive=record.ranked_class)
    scored = {"held_out_score": held_out.score, "held_out_rows": held_out.rows}
    return replace(model, info={**model.info, **scored}), held_out


def _ensemble(
    study: Study,
    recorded: RecordedSearch,
    best: HeldOut | None,
    folder: Path,
    verbose: int,
    *,
    calibrate: bool | None,
) -> tuple[HeldOut | None, str]:
    """Save an ensemble in ``folder``, in place of the best trial, where it scores better on held-out rows, if any.

    Returns the held-out score of the model that is saved, and what is said of the ensemble.
    """
    try:
        model, held_out = _scored(study.ensemble(calibrate=calibrate, verbose=verbose), recorded, study)
    except InputError as error:
        return best, f"No ensemble: {error}"
    is_saved = held_out is None or best is None or held_out.score > best.score
    if is_saved:
        model.save(folder)
    return (held_out if is_saved else best), ensemble_words(study, model, held_out, best, is_saved=is_saved)


def _target(arguments: argparse.Namespace) -> str | None:
    if arguments.target is None and not arguments.file.startswith("sklearn:"):
        arrays = Path(arguments.file).suffix in ARRAY_SUFFIXES
        what, example = ("array", "y") if arrays else ("column", "price")
        raise InputError(
            f"--target is missing: name the {what} of {arguments.file!r} to predict, for example --target {example}."
        )
    return str(arguments.target) if arguments.target is not None else None


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
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if is_new:
            with suppress(OSError):  # it is not empty
                out.rmdir()


@contextmanager
def _explaining_interrupts(study_file: Path) -> Iterator[None]:
    """Say on a Ctrl-C or SIGTERM before or after the training what is safe and how to go on."""
    try:
        yield
    except SearchInterrupted:
        raise
    except KeyboardInterrupt as stop:
        words = "interrupted before the first trial; nothing was kept."
        if study_file.exists():
            words = in_flags(interrupted_words(Study.open(study_file), study_file))
        raise type(stop)(words) from None
