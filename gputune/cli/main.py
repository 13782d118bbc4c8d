"""The entry point of the command line.

``main`` runs one command and returns its exit code: 0 done, 1 failed, 2 bad input or usage, 130
Ctrl-C, 143 SIGTERM, 138 SIGUSR1. Everything heavy is imported inside the commands, so that
``gputune --help`` is fast.
"""

import argparse
import gc
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from typing import Any, Literal

from gputune.cli.arguments import UsageError, make_parser, typed_names
from gputune.cli.commands import COMMANDS
from gputune.cli.flags import CommandLine
from gputune.cli.help import Style, command_help, overview
from gputune.cli.json_output import error_json, only_one_document, usage_json
from gputune.ground.errors import (
    CheckFailedError,
    ClusterError,
    DivergedError,
    InputError,
    Interface,
    SearchFailedError,
    SearchInterrupted,
    Terminated,
)
from gputune.ground.memory import without_collector
from gputune.ground.text import clean, did_you_mean
from gputune.tuning.interrupt import end_command, end_process, take_signals

_MODULES = {
    **dict.fromkeys(("tune", "train", "resume"), "tune"),
    **dict.fromkeys(("trials", "best", "status", "report", "repair"), "study"),
    **dict.fromkeys(("predict", "evaluate", "export"), "model"),
    "search": "search",
    "stop": "stop",
    "check": "check",
    "help": "main",
    "completion": "help",
}
"""Maps each command to the module of its function. The function returns the text for standard
output."""

_READING = ("tune", "train", "resume", "report", "predict", "evaluate", "export")
"""The commands that read files. gputune checks these files before slow imports."""

_LABELED = ("tune", "train", "search", "resume", "stop", "report", "status")
"""The commands that print lines with a label at the beginning."""

_TRUSTED = ("help", "completion")
"""The commands that print no text of a user, such as column names."""

DONE = 0
FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130
TERMINATED = 143
_BAD_INPUT = InputError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    The result goes to standard output, and everything else to standard error.

    Args:
        argv: the arguments. None: the arguments of the process, which then runs only this command.
    """
    own_process = argv is None
    if own_process:
        take_signals(end_command)
    _open_streams()
    try:
        return _command(sys.argv[1:] if argv is None else list(argv))
    except KeyboardInterrupt as stop:
        _say(str(stop) or "interrupted.")
        return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
    finally:
        if own_process:
            take_signals(end_process)  # everything is printed, and libraries end slowly
            # At its end Python would search all objects for garbage, which takes half a second.
            gc.freeze()
        _flush_streams()


def _command(typed: list[str]) -> int:
    """Parse the arguments and run the command."""
    if not typed:
        width = shutil.get_terminal_size().columns
        text = overview(full=False, width=width, style=Style.of(sys.stderr))
        with suppress(OSError, ValueError):
            print(text, file=sys.stderr)
        return BAD_INPUT
    try:
        arguments = make_parser().parse_args(typed, argparse.Namespace(typed=typed))
    except UsageError as error:
        if "--json" in typed:
            _write(usage_json(error.message, error.remedy), command="")
        return BAD_INPUT
    except SystemExit as ending:
        return int(ending.code or 0)
    file = repr(arguments.file) if hasattr(arguments, "file") else "FILE"
    interface = CommandLine(arguments.command, file, typed_names(typed))
    with _warnings_on_one_line(interface):
        return _run(arguments, interface)


def _open_streams() -> None:
    """Redirect closed standard streams to the null device.

    Otherwise the next opened file would get the number of a closed stream, and receive its output.
    """
    # 0, 1 and 2 are standard input, output and error.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The opened file gets the lowest free number, the number of the closed stream.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        # A character that the terminal cannot encode must not end a search with an error.
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _flush_streams() -> None:
    """Discard the output that a full disk or a broken pipe did not accept.

    Otherwise Python would write again at its end, and print an error.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(arguments: argparse.Namespace, interface: Interface) -> int:
    """Run the command, print its result, and return its exit code."""
    from_config: Sequence[str] = ()  # the flags that a --config file sets
    as_json = bool(getattr(arguments, "json", None))
    try:
        if arguments.command in _READING:
            # It imports numpy, for which --help must not wait.
            from gputune.cli.inputs import add_config, check_paths

            from_config = add_config(arguments)
            check_paths(arguments)
        with without_collector():
            module = import_module(f"gputune.cli.{_MODULES[arguments.command]}")
        with only_one_document() if as_json else nullcontext():
            text = getattr(module, arguments.command)(arguments)
        is_quiet = getattr(arguments, "verbose", 1) == 0 and not as_json
        return _write("" if is_quiet else text, command=arguments.command)
    except SearchInterrupted as stop:
        is_shown = arguments.verbose or as_json
        _write(stop.report if is_shown else "", command=arguments.command)
        _say(interface.render(stop.message))
        return 128 + stop.signal  # the exit code that a shell gives for a signal
    except CheckFailedError as failed:
        _write(failed.report, command=arguments.command)
        _say(str(failed))
        return FAILED
    except (InputError, SearchFailedError, ClusterError, DivergedError, OSError) as error:
        text = interface.render(_message(error))
        if text.partition(" ")[0] in from_config:
            text = f"{arguments.config_file}: {text}"
        _say(text, kind="error")
        code = BAD_INPUT if isinstance(error, _BAD_INPUT) else FAILED
        if as_json:
            _write(error_json(error, interface, exit_code=code, text=text), command="")
        return code
    except KeyboardInterrupt as stop:
        if as_json:
            code = TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
            text = str(stop) or "interrupted."
            _write(error_json(stop, interface, exit_code=code, text=text), command="")
        raise
    except Exception as error:  # a bug: the report needs the traceback
        with suppress(OSError, ValueError):
            traceback.print_exc()
        if as_json:
            text = f"internal error: {type(error).__name__}: {error}"
            _write(error_json(error, interface, exit_code=FAILED, text=text), command="")
        return FAILED


def help(arguments: argparse.Namespace) -> str:
    """Return the long help of a command, or the list of commands.

    Raises InputError if no command has the typed name.
    """
    style = Style.of(sys.stdout)
    width = shutil.get_terminal_size().columns
    if arguments.topic is None:
        return overview(full=True, width=width, style=style)
    if arguments.topic not in COMMANDS:
        remedy = did_you_mean(arguments.topic, COMMANDS) or f"Choose {', '.join(COMMANDS)}."
        raise InputError(
            "COMMAND", "must be a command of gputune", got=arguments.topic, remedy=remedy.strip()
        )
    return command_help(COMMANDS[arguments.topic], full=True, width=width, style=style)


def _write(text: str, *, command: str) -> int:
    """Print the result of a command, and return the exit code.

    A pipe that its reader has closed, such as ``head``, is no error.
    """
    if sys.stdout.isatty() and command not in _TRUSTED:
        text = clean(text, keep="\n")
    if command in _LABELED and not text.startswith("{"):
        text = Style.of(sys.stdout).labeled(text)
    try:
        print(text, end="\n" if text else "", flush=True)
    except BrokenPipeError:
        return FAILED
    except OSError as error:
        _say(f"the result cannot be written to standard output: {_message(error)}", kind="error")
        return FAILED
    return DONE


def _say(text: str, *, kind: Literal["", "error", "warning"] = "") -> None:
    """Print a line to standard error. Errors and warnings have their own colors."""
    with suppress(OSError, ValueError):  # the exit code reports the failure in any case
        style = Style.of(sys.stderr)
        mark = ""
        if kind:
            color = style.error if kind == "error" else style.warning
            mark = f"{color(f'{kind}:')} "
        print(f"gputune: {mark}{clean(text)}", file=sys.stderr)


def _message(error: Exception) -> str:
    """Return the message of an exception. For an OSError, the message includes the file name."""
    if not isinstance(error, OSError):
        return getattr(error, "message", str(error))
    if not error.strerror:
        return str(error)
    return error.strerror if error.filename is None else f"{error.strerror}: {error.filename!r}"


@contextmanager
def _warnings_on_one_line(interface: Interface) -> Iterator[None]:
    """Show each warning for the user once, as one line without gputune's source code."""
    seen = set()
    show_as_python = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **kwargs: Any) -> None:
        text = str(message)
        if not issubclass(category, UserWarning):
            show_as_python(message, category, *place, **kwargs)
        elif text not in seen:
            seen.add(text)
            _say(interface.render(getattr(message, "marked", text)), kind="warning")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield
