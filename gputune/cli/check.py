"""The command ``gputune check``: check a device, or measure how fast a module trains."""

from argparse import Namespace

from tqdm.auto import tqdm

from gputune.check.check import check as check_device
from gputune.check.check import checks_of, timed_of
from gputune.check.module import MEASUREMENTS, check_module, made_table
from gputune.cli.flags import CommandLine
from gputune.cli.options import parse_specs
from gputune.engine.backend import choose_device
from gputune.ground.errors import CheckFailedError, InputError
from gputune.ground.text import count
from gputune.ground.types import Say
from gputune.tuning.choices import BUILT_IN, NAMED, choose_model
from gputune.tuning.options import make_options
from gputune.tuning.record import SearchCall, read_rows


def check(arguments: Namespace) -> str:
    """Return the table of ``gputune check``, or JSON.

    Raises CheckFailedError with the same text if a guarantee does not hold.
    """
    if arguments.module is not None:
        return _check_module(arguments)
    others = {"FILE": arguments.file, "--target": arguments.target, "--set": arguments.set}
    for name, value in others.items():
        if value is not None:
            remedy = "Add --module FILE.py:NAME."
            raise InputError(name, "is for the check of your own module", remedy=remedy)
    return _check_device(arguments)


def _check_device(arguments: Namespace) -> str:
    """Return the results of all checks of a device."""
    device = choose_device(arguments.device)
    with _bar(len(timed_of(device)) + len(checks_of(device)), "check") as bar:
        report = check_device(device, _shown_in(bar))
    text = report.json() if arguments.json else CommandLine().render(str(report))
    if not report.ok:
        failed = sum(not row.ok for row in report.rows)
        raise CheckFailedError(
            f"{failed} of {count(len(report.rows), 'check')} failed on {report.device}, so do not "
            "trust results from this device. Please report the table, with the versions in its "
            "first line.",
            report=text,
        )
    return text


def _check_module(arguments: Namespace) -> str:
    """Return the backend and the speeds of a user's module."""
    module = arguments.module
    if ":" not in module and module not in NAMED:
        remedy = "Built-in models are part of the check without --module."
        if module not in BUILT_IN:
            remedy = "Write the file and the name of the class, such as net.py:Net."
        raise InputError("--module", "must be a module, FILE.py:NAME", got=module, remedy=remedy)
    choice = choose_model(module, None)
    options = make_options(
        device=arguments.device,
        n_trials=0,
        include_default=False,
        include=[parse_specs(arguments.set or (), "--set")],
        verbose=0,
        workers=1,
    )
    if arguments.file is not None:
        source = read_rows(choice, options.rows, arguments.file, arguments.target)
    elif arguments.target is not None:
        raise InputError("--target", "is a column of a file", remedy="Add the FILE.")
    else:
        source = read_rows(choice, options.rows, *made_table())
    interface = CommandLine("check", arguments.file or "FILE")
    with _bar(len(MEASUREMENTS), "measurement") as bar:
        report = check_module(SearchCall(choice, source, options), _shown_in(bar), interface)
    return report.json() if arguments.json else interface.render(str(report))


def _bar(total: int, unit: str) -> "tqdm[object]":
    """Return a progress bar on standard error, which disappears at the end."""
    return tqdm(total=total, unit=unit, disable=None, leave=False, dynamic_ncols=True)


def _shown_in(bar: "tqdm[object]") -> Say:
    """Return a function that shows the name of the next measurement in a progress bar."""

    def show(name: str) -> None:
        bar.set_postfix_str(name)
        bar.update()

    return show
