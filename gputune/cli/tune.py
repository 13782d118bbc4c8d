"""The commands ``gputune tune``, ``train`` and ``resume``.

Each command holds rows out, searches, trains the best trial on all other rows, scores it on the
held-out rows, and saves everything in one folder.
"""

import argparse
import math
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from gputune.api.study import Study
from gputune.cli.arguments import MODEL, STUDY, model_folder, study_file
from gputune.cli.flags import CommandLine
from gputune.cli.held_out import (
    HeldOut,
    calibration_text,
    check_extras,
    comparison_text,
    coverage_text,
    held_out_baseline,
    held_out_score,
    is_default_best,
    is_worth_comparing,
    read_saved_description,
    same_model_text,
)
from gputune.cli.json_output import search_json
from gputune.cli.options import options_of, typed_options
from gputune.cli.summary import (
    Ending,
    ensemble_text,
    facts,
    label_lines,
    notes_on,
    stopped_text,
    summary_text,
)
from gputune.data.source import split_held_out
from gputune.data.target import check_spread, check_target, with_transform
from gputune.engine.plan import Plan
from gputune.ground.errors import (
    DivergedError,
    InputError,
    SearchFailedError,
    SearchInterrupted,
    Terminated,
    option,
)
from gputune.ground.text import count, size_words
from gputune.population.kinds import is_module
from gputune.report.facts import seconds_text
from gputune.spaces.random import n_counted
from gputune.study.code import class_from_flag
from gputune.study.database import option_errors
from gputune.study.model import TunedModel
from gputune.study.study import Trial
from gputune.tuning.interrupt import (
    CTRL_C,
    SIGNALS,
    TERMINATED,
    finishing_after_warning,
    interruption,
)
from gputune.tuning.options import Options, RowOptions
from gputune.tuning.pipeline import Preview, preview, search
from gputune.tuning.presets import AUTO, choose_before_preset, with_preset
from gputune.tuning.progress import PREPARING, Profile, Progress
from gputune.tuning.record import SearchCall, read_rows, recorded_search
from gputune.tuning.session import checked_space, first_trials
from gputune.tuning.task_choice import chosen_task
from gputune.views.default_trial import default_trial
from gputune.views.scores import score_view


def tune(arguments: argparse.Namespace) -> str:
    """Run ``gputune tune`` or ``train``, and return the text to print at the end.

    Raises SearchInterrupted with the results so far, and the errors of ``gputune.tune``.
    """
    begin = time.perf_counter()
    profile = Profile()
    usual = "gputune-train" if arguments.command == "train" else "gputune-out"
    if arguments.study == "":
        remedy = f"Pass a folder, or omit --out for {usual}."
        raise InputError("--out", "must be a folder", got="", remedy=remedy)
    out = Path(arguments.study or usual)
    _check_out(out)
    options = options_of(arguments, out / STUDY)
    rows = options.rows
    preset = getattr(arguments, "preset", None)
    model = arguments.model or (AUTO if preset is not None else "mlp")
    choice = choose_before_preset(preset, model, arguments.optimizer)
    with profile.clock(PREPARING):
        source = read_rows(choice, rows, arguments.file, arguments.target, arguments.groups)
    task = chosen_task(source, choice, options)
    target = check_target(source.y, task=task, n_rows=len(source.X), name=source.target)
    # Check all rows, because the seed decides which rows are held out.
    check_spread(with_transform(target, rows.target_transform))
    share = 0.2 if arguments.test_size is None else arguments.test_size
    cv = arguments.cv or str(RowOptions.cv)
    rest, test = split_held_out(
        source, target, test_size=share, cv=cv, seed=options.search.random_state
    )
    if rows.task is None and rest.origin is not None:
        options = options.changed(task=rest.origin["task"])
        rest = replace(rest, is_task_guessed=True)
    if arguments.json and (arguments.dry_run or arguments.profile):
        other = "--dry-run" if arguments.dry_run else "--profile"
        raise InputError(None, f"--json and {other} exclude each other", remedy="Leave one out.")
    call = SearchCall(choice, rest, options, test, given=typed_options(arguments))
    if preset is not None:
        call = with_preset(call, preset, model, arguments.optimizer)
    if arguments.dry_run:
        return dry_run(arguments, call, out / STUDY)
    with _folder((options.machine.study or out / STUDY).parent):
        return _Run(arguments, call, out / STUDY, begin, profile).finish()


FINAL_MODEL = ("ensemble", "intervals", "calibrate")
"""Flags for the model that a search saves at its end. The study stores their values."""

train = tune  # one included trial, no drawn trials


def resume(arguments: argparse.Namespace) -> str:
    """Resume the search in a study file, and return the text to print at the end."""
    begin = time.perf_counter()
    profile = Profile()
    study = study_file(arguments.study)
    changes = typed_options(arguments)
    stored = Study.open(study)
    record = stored.record
    with profile.clock(PREPARING), option_errors(study):
        module = class_from_flag(arguments.module)
        call = recorded_search(
            study, record, changes, module=module, trust_code=arguments.trust_code
        )
        if "n_trials" not in changes:
            # The study stores the options of its first call. A later call may have asked for more
            # trials.
            n_trials = max(call.options.search.n_trials, n_counted(stored.trials))
            call = replace(call, options=call.options.changed(n_trials=n_trials))
    callbacks = record.arguments.callbacks
    if callbacks:
        Progress(arguments.verbose).say(
            f"note: a study file does not store callbacks, so these are not called: "
            f"{', '.join(callbacks)}."
        )
    return _Run(arguments, call, study, begin, profile).finish()


@dataclass
class _Run:
    """A search of the command line, from its rows to its closing text.

    ``shown`` is the path of the study file as the user wrote it. A user's module may change the
    working folder.
    """

    arguments: argparse.Namespace
    call: SearchCall
    shown: Path
    begin: float
    profile: Profile

    def __post_init__(self) -> None:
        rest = self.call.source
        options = self.call.options
        self.place = options.machine.study or self.shown
        # Only the command ``tune`` holds rows out and keeps a model next to the study.
        self.keeps_model = "test_size" in (rest.origin or {})
        self.folder = model_folder(self.place)
        final_model = self._final_model()
        # None compares only if the comparison is cheap.
        self.compares_default = final_model.get("compare_default")
        self.call = replace(self.call, final_model=final_model)
        self.has_ensemble = final_model["ensemble"]
        self.intervals = final_model["intervals"]
        # None leaves the choice to ``best_model``, which calibrates if the log loss ranks the
        # trials.
        self.calibrate = True if final_model["calibrate"] else None
        check_extras(rest, options, intervals=self.intervals, calibrate=final_model["calibrate"])

    def _final_model(self) -> dict[str, bool]:
        """Return the options of the model that the command saves, such as ``ensemble``.

        The options are flags of this command, or choices of its preset. If the command resumes a
        search, gputune adds the flags of the original command, which the study stores. A study of
        an earlier version does not store the flags. gputune then derives the options from the saved
        model, if there is one.
        """
        final_model = {name: bool(getattr(self.arguments, name, None)) for name in FINAL_MODEL}
        compares = getattr(self.arguments, "compare_default", None)
        stored = self.call.final_model  # by the original command, or by a preset
        if self.arguments.command != "resume":
            final_model |= {name: True for name in FINAL_MODEL if stored.get(name)}
        else:
            if compares is None:
                compares = stored.get("compare_default")
            saved = read_saved_description(self.folder)
            of_saved_model = {
                "ensemble": "ensemble" in saved.get("info", {}),
                "intervals": saved.get("residuals") is not None,
                "calibrate": saved.get("temperature", 1.0) != 1.0,
            }
            for name, is_typed in final_model.items():
                final_model[name] = is_typed or stored.get(name, of_saved_model[name])
        if compares is not None:
            final_model["compare_default"] = compares
        return final_model

    def finish(self) -> str:
        """Search, train the best trial on all rows, score it on the held-out rows, and save it.

        Return the closing text.
        """
        with _explaining_interrupts(self.place):
            ending = self._make_ending(self._search())
            if self.keeps_model:
                with finishing_after_warning(Progress(self.arguments.verbose).say):
                    ending = self._with_models(ending)
        text = self._text(ending)
        if self.arguments.json or not self.arguments.profile:
            return text
        dtype = getattr(torch, self.call.options.machine.dtype)
        return f"{text}\n\n{self.profile.report(dtype=dtype, device=self.profile.device)}"

    def _with_models(self, ending: Ending) -> Ending:
        """Train the models that the command saves or compares, after the search has ended."""
        with self.profile.clock("training the best on all rows"):
            if self.arguments.command == "train":
                ending = replace(ending, trial=_requested_trial(ending.study))
            ending = self._with_best(ending)
        if self.has_ensemble:
            ending = self._with_ensemble(ending)
        if self.arguments.command != "train":
            ending = self._with_comparison(ending)
        return replace(ending, model_sentences=self._model_sentences(ending.model))

    def _search(self) -> Study:
        """Run the search. After an interrupt save the best model so far."""
        run = partial(search, self.call, SIGNALS, say_notes=False)
        try:
            return run(profile=self.profile, interface=CommandLine(), study_type=Study)
        except SearchInterrupted as stop:
            ending = self._make_ending(stop.study)
            is_gentle = stop.signal != TERMINATED and not stop.at_once
            if self.keeps_model and self.arguments.command != "train" and is_gentle:
                ending = self._with_best_so_far(ending)
            stop.report = self._text(ending, stopped_text, exit_code=128 + stop.signal)
            raise

    def _make_ending(self, study: Study) -> Ending:
        """Return the description of a finished search that has no saved model yet."""
        file = getattr(self.arguments, "file", None) or (study.record.source or {})["path"]
        return Ending(file, study, self.call.source, self.shown, typed=self.arguments.typed)

    def _text(
        self, ending: Ending, make: Callable[..., str] = summary_text, *, exit_code: int = 0
    ) -> str:
        """Return the text or the JSON document that the command prints at the end of this
        search."""
        ended = CommandLine().render(self.profile.ended)
        ending = replace(ending, ended=ended, seconds=time.perf_counter() - self.begin)
        if self.arguments.json:
            timeout = self.call.options.search.timeout
            return search_json(ending, timeout=timeout, exit_code=exit_code)
        return make(ending, width=shutil.get_terminal_size().columns)

    def _with_best(self, ending: Ending) -> Ending:
        """Train the best or the requested trial on all rows of the search, and save the model."""
        number = None if ending.trial is None else ending.trial.number
        model = ending.study.best_model(
            trial=number, intervals=self.intervals, calibrate=self.calibrate
        )
        model, held_out = self._score_model(model, ending.study)
        model.save(self.folder)
        folder = model_folder(self.shown)
        return replace(
            ending, held_out=held_out, model=model, model_folder=folder, layout=model.layout
        )

    def _with_best_so_far(self, ending: Ending) -> Ending:
        """Save the model of the best trial so far, if a trial has a score.

        A trial that was cut short trains up to its best epoch. Another Ctrl-C cancels this. An
        ensemble of an earlier call is not replaced.
        """
        scored = any(math.isfinite(trial.score) for trial in ending.study.trials)
        if scored and "ensemble" not in read_saved_description(self.folder).get("info", {}):
            message = "training the best trial so far on all rows (Ctrl-C skips this)"
            Progress(self.call.options.machine.verbose).say(message)
            with suppress(DivergedError, KeyboardInterrupt):
                return self._with_best(ending)
        return ending

    def _with_ensemble(self, ending: Ending) -> Ending:
        """Make an ensemble, and save it if it scores better than the best trial on held-out rows.

        The ensemble is also saved if no rows are held out.
        """
        study = ending.study
        best = ending.held_out
        try:
            with self.profile.clock("an ensemble"):
                model = study.ensemble(calibrate=self.calibrate, verbose=self.arguments.verbose)
                model, held_out = self._score_model(model, study)
                # Without held-out rows the ensemble is saved.
                is_saved = held_out is None or best is None or held_out.score > best.score
                chosen = model if is_saved else ending.model
                assert chosen is not None
                score = held_out if is_saved else best
                if score is not None:  # the held-out rows chose the model; the report says so
                    chosen = replace(chosen, info={**chosen.info, "held_out_chose": True})
                    score = replace(score, chose=True)
                chosen.save(self.folder)
        except (DivergedError, InputError) as error:
            return replace(ending, ensemble=f"No ensemble: {error}")
        except KeyboardInterrupt as stop:
            message = "the ensemble was interrupted. The model of the best trial is saved."
            raise self._interrupted(message, ending, stop) from None
        text = ensemble_text(study, model, held_out, best, is_saved=is_saved)
        return replace(ending, held_out=score, model=chosen, ensemble=text)

    def _interrupted(
        self, message: str, ending: Ending, stop: KeyboardInterrupt
    ) -> SearchInterrupted:
        """Return the error for an interrupt after the model of the best trial was saved."""
        signal = TERMINATED if isinstance(stop, Terminated) else CTRL_C
        report = self._text(ending, exit_code=128 + signal)
        return SearchInterrupted(message, study=ending.study, signal=signal, report=report)

    def _with_comparison(self, ending: Ending) -> Ending:
        """Train the default configuration on all rows too, and compare its model with the saved
        model.

        Both models are scored on the held-out rows.
        """
        study = ending.study
        compares = self.compares_default
        if compares is None:
            compares = is_worth_comparing(study, ending.held_out)
        return self._compared(ending) if compares else ending

    def _compared(self, ending: Ending) -> Ending:
        """Return the results with the default model's held-out score, or with the reason for its
        absence."""
        study = ending.study
        saved = ending.held_out
        default = default_trial(study)
        if saved is None:
            reason = "No rows are held out to compare the model with the default's model."
            return replace(ending, comparison=reason)
        if default is None:
            reason = (
                "The model of the default configuration is not compared, because no trial with a "
                "score has the default configuration."
            )
            return replace(ending, comparison=reason)
        if is_default_best(study):
            assert ending.model is not None
            return replace(ending, comparison=same_model_text(ending.model))
        try:
            with self.profile.clock("training the default on all rows"):
                model = study.best_model(trial=default.number, calibrate=self.calibrate)
                model, held_out = self._score_model(model, study)
        except DivergedError:
            reason = "The default's model diverged when it was trained on all rows."
            return replace(ending, comparison=reason)
        except KeyboardInterrupt as stop:
            message = "the comparison with the default was interrupted. The best model is saved."
            raise self._interrupted(message, ending, stop) from None
        assert held_out is not None  # the saved model has a score, so this one has too
        remark = comparison_text(score_view(study).measure, saved, held_out)
        return replace(ending, default_held_out=held_out, comparison=remark)

    def _model_sentences(self, model: TunedModel | None) -> list[str]:
        """Return sentences on the calibration and the intervals of the saved model."""
        if model is None:
            return []
        sentences = [calibration_text(model)]
        if self.intervals:
            sentences.append(coverage_text(model, self.call.test))
        return sentences

    def _score_model(self, model: TunedModel, study: Study) -> tuple[TunedModel, HeldOut | None]:
        """Return the model with its held-out score in ``info``, and this score (None without
        held-out rows)."""
        test = self.call.test
        record = study.record
        if test is None:
            return model, None
        positive = record.ranked_class
        rest = self.call.source
        held_out = held_out_score(model, record.scoring, test, positive=positive)
        baseline = held_out_baseline(model, record.scoring, rest, test, positive=positive)
        held_out = replace(held_out, baseline=baseline)
        # The HTML report reads these entries of the model's info.
        info = {**model.info, "held_out_score": held_out.score, "held_out_rows": held_out.rows}
        if baseline is not None:
            answer, score = baseline
            info["held_out_baseline"] = {"answer": answer, "score": score}
        return replace(model, info=info), held_out


def _requested_trial(study: Study) -> Trial:
    """Return the trial of ``gputune train``. Raises SearchFailedError if it has no finite score."""
    choice = study.data.choice
    options = study.data.options
    params = first_trials(checked_space(choice, options), choice, options)[0].params
    trial = next(trial for trial in study.trials if trial.params == params)
    if not math.isfinite(trial.score):
        raise SearchFailedError(
            f"trial {trial.number} has no finite score: it diverged, or the timeout stopped it. "
            f"Try a smaller lr, or a longer {option('timeout')}."
        )
    return trial


def _check_out(out: Path) -> None:
    """Raise InputError before any file is read if the results cannot be written to the folder.

    A folder with a model but without its study is refused too, because the model would be lost.
    """
    argument = f"--out {str(out)!r}"
    existing = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not existing.is_dir():
        rule = f"must be a folder, but {str(existing)!r} is a file"
        raise InputError(argument, rule, remedy="Name another folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        remedy = f"Check the permissions of {str(existing)!r}, or name another folder."
        raise InputError(argument, "cannot be written", remedy=remedy)
    if (out / MODEL).exists() and not (out / STUDY).exists():
        rule = f"holds a {MODEL!r} without its {STUDY!r}, and this search would overwrite it"
        raise InputError(argument, rule, remedy="Name another folder.")


@contextmanager
def _folder(out: Path) -> Iterator[None]:
    """Create a folder for the block. If the folder is new and still empty at the end, remove it."""
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if is_new:
            with suppress(OSError):  # the folder is not empty
                out.rmdir()


@contextmanager
def _explaining_interrupts(study_file: Path) -> Iterator[None]:
    """Add advice on saved results and resuming to an interrupt (Ctrl-C or SIGTERM).

    The block is for work before or after the training.
    """
    try:
        yield
    except SearchInterrupted:
        raise
    except KeyboardInterrupt as stop:
        words = "interrupted before the first trial. Nothing is stored."
        if study_file.exists():
            message = interruption(Study.open(study_file), study_file)
            words = CommandLine().render(message)
        raise type(stop)(words) from None


def dry_run(arguments: argparse.Namespace, call: SearchCall, study_file: Path) -> str:
    """Return the plan of a search as text. Nothing is trained or written."""
    options = call.options
    check_extras(
        call.source,
        options,
        intervals=bool(arguments.intervals),
        calibrate=bool(arguments.calibrate) or call.final_model.get("calibrate", False),
    )
    planned = preview(call, verbose=arguments.verbose, interface=CommandLine(), study_type=Study)
    study = planned.study
    ending = Ending(arguments.file, study, call.source, study_file, planned.layout)
    method = options.search.method.name
    lines = facts(ending)
    if call.preset:
        lines.append(("Preset", CommandLine().render(call.preset)))
    if method != "random":
        lines.append(("Method", method))
    lines += notes_on(study)
    if planned.stand_ins:
        trials = count(planned.stand_ins, "random configuration")
        lines.append(("Note", f"{trials} replace the sampler's proposals in this plan."))
    plan = planned.plan
    if plan is None:
        lines.append(("Plan", "solve each trial to convergence in this process"))
    else:
        lines.append(("Plan", CommandLine().render(str(plan))))
        lines.append(("Memory", _memory_text(plan)))
    lines.append(("Device", _device_text(planned)))
    lines.append(("Time", _time_text(planned, options)))
    if study_file.exists():
        file = str(study_file)
        lines.append(
            (
                "Study",
                f"{file} exists: this command would resume its search, if the search is the same",
            )
        )
    typed = [word for word in arguments.typed if word != "--dry-run"]
    following = f"{'Next':9}{shlex.join(['gputune', *typed])}"
    width = shutil.get_terminal_size().columns
    return f"{label_lines(lines, width)}\n\nNothing was trained or written.\n{following}"


def _memory_text(plan: Plan) -> str:
    """Return a text with the estimated memory that the planned search needs."""
    total = plan.at_once * plan.chunk_bytes + plan.data_bytes
    chunks = "1 chunk" if plan.at_once == 1 else f"{plan.at_once} chunks at the same time"
    return f"about {size_words(total)} for the data and {chunks} (estimate)"


def _device_text(planned: Preview[Study]) -> str:
    """Return a text about the device, the processes and the threads of the planned search."""
    plan = planned.plan
    if plan is None:
        return str(planned.device)
    threads = count(plan.threads, "thread")
    if plan.workers == 1:
        return f"{planned.device}, 1 process with {threads}"
    return f"{planned.device}, {plan.workers} processes with {threads} each"


def _time_text(planned: Preview[Study], options: Options) -> str:
    """Return a text with the estimated training time, or with the reason for no estimate."""
    plan = planned.plan
    if plan is None:
        return "no estimate for a model that is solved"
    if planned.device.type != "cpu" or plan.cluster:
        return "no estimate: gputune estimates times only for the CPU of this machine"
    method = options.search.method
    seconds = plan.seconds / (plan.workers * plan.threads)
    limits = []
    seconds *= method.trainings_per_trial
    if method.decides_length or planned.study.record.patience is not None:
        limits.append("at most, because trials may end early")
    if options.search.timeout is not None:
        limits.append(f"the timeout ends it after {seconds_text(options.search.timeout)}")
    text = (
        f"about {seconds_text(seconds)} of training on idle cores, an estimate of the planner's "
        "cost model (nothing was measured)"
    )
    if any(is_module(chunk.kind) for chunk in plan.chunks):
        text += ", which can be several times too low for a module"
    return "; ".join([text, *limits])
