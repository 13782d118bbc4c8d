"""The text of ``gputune tune --dry-run``: the plan of a search that is not run."""

import argparse
import shlex
import shutil
from pathlib import Path

from gputune.api.study import Study
from gputune.cli.ending import Ending
from gputune.cli.flags import CommandLine
from gputune.cli.saved_model import check_extras
from gputune.cli.summary import facts, label_lines, notes_on
from gputune.engine.plan import Plan
from gputune.ground.text import count, size_words
from gputune.population.kinds import is_module
from gputune.report.facts import seconds_text
from gputune.tuning.options import Options
from gputune.tuning.pipeline import Preview, preview
from gputune.tuning.record import SearchCall


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
