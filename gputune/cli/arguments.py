"""The parser of the command line, and the paths of a study and its model.

Nothing heavy is imported, so that ``gputune --help`` is fast. Errors suggest the flag that was
probably meant.
"""

import argparse
import csv
import math
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from gputune.cli.commands import COMMANDS, SHELLS, Command, Flag
from gputune.cli.help import Style, command_help, overview
from gputune.ground.text import did_you_mean, nearest
from gputune.tuning.rules import Rule, Takes
from gputune.version import __version__


def make_parser() -> argparse.ArgumentParser:
    """Return gputune's argument parser, with one subparser for each command.

    The attribute ``command`` of the parsed arguments is the name of the user's command.
    """
    parser = _Parser("gputune", allow_abbrev=False, add_help=False)
    parser.add_argument("--version", action="version", version=f"gputune {__version__}")
    parser.add_argument("-h", "--help", action=_Help)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parser.commands = commands.choices
    for name, description in COMMANDS.items():
        command = commands.add_parser(name, allow_abbrev=False, add_help=False)
        command.description_of = description
        command.add_argument("-h", "--help", action=_Help)
        for place, (metavar, _) in description.places.items():
            nargs = "?" if metavar.startswith("[") else None
            choices = SHELLS if place == "shell" else None
            command.add_argument(place, metavar=metavar, nargs=nargs, choices=choices)
        for rules in description.groups.values():
            for dest, rule in rules.items():
                _add_flag(command, dest, rule)
    return parser


class UsageError(SystemExit):
    """Exception for a wrong command line, which ends the command with exit code 2.

    The parser has already printed the message to standard error.
    """

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(2)
        self.message = message
        self.remedy = remedy


class _Parser(argparse.ArgumentParser):
    """An argparse parser that prints gputune's help texts and suggests names for misspelled ones.

    ``commands`` maps the name of each command to its parser. ``description_of`` is the command that
    this parser reads. ``description_of`` is None for the parser of ``gputune`` itself. ``names``
    maps flags to other names that the user has typed for them.
    """

    commands: Mapping[str, "_Parser"] = MappingProxyType({})
    description_of: Command | None = None
    names: Mapping[str, str] = MappingProxyType({})

    def format_help(self, *, full: bool = True, style: Style | None = None) -> str:
        """Return the help text of a command, in its long or its short form."""
        width = shutil.get_terminal_size().columns
        style = style or Style()
        if self.description_of is None:
            text = overview(full=full, width=width, style=style)
        else:
            text = command_help(self.description_of, full=full, width=width, style=style)
        return f"{text}\n"

    def error(self, message: str, hints: str = "") -> NoReturn:
        """Print a usage error with hints, and end the process with exit code 2."""
        # argparse gives the legal choices only in its message.
        choice = re.search(r"invalid choice: ('.*') \(choose from (.*)\)", message)
        if choice is not None:
            hints = did_you_mean(choice[1][1:-1], re.findall(r"'([^']*)'", choice[2]))
        if hints:
            message = f"{message}.{hints}"
        for flag, name in self.names.items():
            message = re.sub(rf"{flag}(?![\w-])", name, message)
        with suppress(OSError, ValueError):
            print(f"gputune: error: {message}\nTry '{self.prog} --help'.", file=sys.stderr)
        raise UsageError(message, f"Try '{self.prog} --help'.")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse like argparse, but report an unknown flag as an error of the command, not of
        ``gputune``."""
        words = list(sys.argv[1:] if args is None else args)
        for command in self.commands.values():
            command.names = typed_names(words)
        typed, unknown = self.parse_known_args(rewritten(words), namespace)
        if not unknown:
            return typed
        hints = ""
        for argument in unknown:
            if not argument.startswith("--"):
                continue
            flag = argument[2:].partition("=")[0]
            commands = [name for name in COMMANDS if flag in _flag_names(name)]
            near = nearest(flag, _flag_names(typed.command), others=_OTHER_FLAGS)
            if commands:
                hints += f" {typed.command} has no --{flag}, a flag of {', '.join(commands)}."
            elif near:
                hints += f" Did you mean '--{near}'?"
        hints += _value_hint(typed.command, words, unknown)
        self.commands[typed.command].error(f"unrecognized arguments: {' '.join(unknown)}", hints)


def _value_hint(command: str, words: Sequence[str], unknown: Sequence[str]) -> str:
    """Return a hint for a value after a flag without a value, if a similar flag takes a value."""
    rules = {}
    for group in COMMANDS[command].groups.values():
        rules.update({rule.name: rule for rule in group.values()})
    for flag, value in pairwise(words):
        rule = rules.get(flag)
        if rule is None or rule.metavar or value not in unknown:
            continue
        others = [name for name, other in rules.items() if other.metavar]
        hint = did_you_mean(flag, others)
        return f" {flag} takes no value.{hint}"
    return ""


class _Help(argparse.Action):
    """An argparse action: ``-h`` prints the short help, and ``--help`` prints the long help."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS)

    def __call__(
        self, parser: Any, namespace: object, values: object, option_string: str | None = None
    ) -> None:
        """Print the help text of the command, and end the process."""
        print(parser.format_help(full=option_string != "-h", style=Style.of(sys.stdout)), end="")
        parser.exit()


_OTHER_FLAGS: Mapping[str, str] = {
    "epoch": "epochs",
    "lr": "space",
    "metric": "scoring",
    "metrics": "scoring",
}
"""Maps flags that people often type by mistake to gputune's flags."""


def _flag_names(command: str) -> list[str]:
    """Return the names of a command's flags without the leading dashes."""
    names = []
    for rules in COMMANDS[command].groups.values():
        names += [rule.name.removeprefix("--") for rule in rules.values()]
    return names


def _add_flag(parser: argparse.ArgumentParser, name: str, rule: Rule) -> None:
    """Add a flag to a parser.

    If the user does not write the flag, its value is None. The option then has its own default.
    """
    if rule.takes == "yes or no":
        action = argparse.BooleanOptionalAction
        parser.add_argument(rule.name, dest=name, action=action, default=None)
        return
    settings: dict[str, Any] = {"type": READERS[rule.takes], "metavar": rule.metavar}
    names = [rule.name]
    if rule.choices is not None:
        settings = {"choices": rule.choices}
    elif name == "verbose":
        settings = {"action": "store_const", "const": 0}
    elif not rule.metavar:
        is_negative = rule.name.startswith("--no-")
        settings = {"action": "store_false" if is_negative else "store_true"}
        if is_negative:  # --include-default is the opposite of --no-default
            opposite = f"--{name.replace('_', '-')}"
            parser.add_argument(opposite, dest=name, action="store_true", default=None)
    elif rule.metavar.startswith("["):
        settings |= {"nargs": "?", "const": rule.values[0]}
    elif rule.takes in SEVERAL:
        settings |= {"nargs": "+", "action": "extend" if rule.takes == "specs" else "append"}
    settings["default"] = 1 if name == "verbose" else None
    if isinstance(rule, Flag):
        names = [rule.short, rule.name] if rule.short else names
        if name != "verbose":
            settings |= {"default": rule.initial, "required": rule.required}
    parser.add_argument(*names, dest=name, **settings)


def _integers(text: str) -> list[int]:
    """Return the integers of a text in which commas separate them."""
    read = _reader(int, f"{_WHOLE} 1, or several separated by commas", 1)
    return [int(read(part)) for part in text.split(",")]


def _numbers(text: str) -> list[float]:
    """Return the numbers of a text in which commas separate them."""
    read = _reader(float, "a number such as 0.5, or several separated by commas")
    return [read(part) for part in text.split(",")]


def _columns(text: str) -> list[str]:
    """Return the names of columns, which commas separate. A name with a comma is in quotes.

    "" is the name of the column that has none, such as the first column of ``DataFrame.to_csv``.
    """
    try:
        return next(csv.reader([text])) or [""]
    except csv.Error:  # a line break outside of quotes
        rule = (
            "must be names, separated by commas, and in quotes if they have commas or line breaks"
        )
        raise argparse.ArgumentTypeError(f"{rule}, got {text!r}") from None


def _reader(
    read: Callable[[str], float], rule: str, least: float = -math.inf
) -> Callable[[str], float]:
    """Return a function that parses text as a number, and refuses values below ``least``."""

    def number(text: str) -> float:
        with suppress(ValueError):
            value = read(text)
            if not value < least:
                return value
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")

    return number


_WHOLE = "a whole number of at least"
READERS: dict[Takes, Callable[[str], object]] = {
    "text": str,
    "specs": str,
    "config": str,
    "number": _reader(float, "a number such as 0.5"),
    "duration": str,
    "0..": _reader(int, f"{_WHOLE} 0", 0),
    "1..": _reader(int, f"{_WHOLE} 1", 1),
    "integers": _integers,
    "numbers": _numbers,
    "names": lambda text: _columns(text) if text else [],
    "columns": _columns,
    "scorers": lambda text: [word.strip() for word in text.split(",")] if "," in text else text,
    "workers": lambda text: (
        text if text == "auto" else _reader(int, f"{_WHOLE} 1, or 'auto'", 1)(text)
    ),
}

# names of the files in the folder of a search
STUDY = "study.db"
MODEL = "model"


def model_folder(study: Path) -> Path:
    """Return the path of the folder for a study's model, next to the study file.

    The folder is named after the study file, unless the study file has the default name.
    """
    return study.parent / (MODEL if study.name == STUDY else f"{study.stem}.{MODEL}")


def report_page(study: Path) -> Path:
    """Return the path of the HTML report on a study, next to the study file.

    The report is named after the study file, unless the study file has the default name.
    """
    return study.parent / ("report.html" if study.name == STUDY else f"{study.stem}.report.html")


def study_file(place: str) -> Path:
    """Return the path of a study file, given the file itself or its folder."""
    path = Path(place)
    return path / STUDY if path.is_dir() else path


SEVERAL: tuple[Takes, ...] = ("specs", "config")
"""The kinds of options that accept several values."""

_CLUSTER = re.compile(r"local|auto|.*:\d+")
"""A pattern for addresses of a cluster, in addition to ``ray://`` for the flag ``--ray``. Any other
word after the flag may be the data file."""


def aliases(command: Command) -> dict[str, str]:
    """Return a map from other names of flags, such as Python's argument names, to gputune's own
    flags."""
    names = {}
    for rules in command.groups.values():
        for name, rule in rules.items():
            names.update(dict.fromkeys(rule.aliases, rule.name))
            alias = f"--{name.replace('_', '-')}"
            if alias == rule.name or name in _WITHOUT_ALIAS:
                continue
            if rule.name.startswith("--no-"):
                names[f"--no-{alias[2:]}"] = rule.name
            else:
                names[alias] = rule.name
    return names


_WITHOUT_ALIAS = ("config", "config_file", "verbose")
"""Command-line options that are not arguments in Python, or that accept other values there."""


def typed_names(words: Sequence[str]) -> dict[str, str]:
    """Return a map from gputune's flags to the other names that the user has typed for them.

    For example, the user may type --budget for --timeout. Messages then name --budget.
    """
    if not words or words[0] not in COMMANDS:
        return {}
    typed = {word.partition("=")[0] for word in words}
    names = {}
    for rule in _flags(COMMANDS[words[0]]).values():
        for alias in typed.intersection(rule.aliases):
            names[rule.name] = alias
    return names


def rewritten(words: Sequence[str]) -> list[str]:
    """Return the words of a command line in the form that the argument parser accepts."""
    if not words or words[0] not in COMMANDS:
        return list(words)
    command = COMMANDS[words[0]]
    flags = _flags(command)
    names = aliases(command)
    renamed = []
    for word in words[1:]:
        flag, equals, value = word.partition("=")
        renamed.append(f"{names.get(flag, flag)}{equals}{value}")
    return [command.name, *_files_first(renamed, flags, len(command.places))]


def _flags(command: Command) -> dict[str, Rule]:
    """Return the descriptions of a command's flags, keyed by flag."""
    return {rule.name: rule for rules in command.groups.values() for rule in rules.values()}


def _files_first(words: list[str], flags: Mapping[str, Rule], n_files: int) -> list[str]:
    """Return the words with files in front that an option with several values would read."""
    n_typed = 0
    movable = []  # places of words that an option would take, but that may be files
    rule: Rule | None = None  # the option whose values follow
    n_values = 0
    for place, word in enumerate(words):
        if word == "--":
            n_typed += len(words) - place - 1
            break
        if word.startswith("-") and len(word) > 1:
            flag, equals, _ = word.partition("=")
            rule = None if equals else flags.get(flag)
            n_values = 0
            continue
        n_values += 1
        if rule is None or not rule.metavar:
            n_typed += 1
        elif rule.takes in SEVERAL:
            if n_values > 1 and "=" not in word:
                movable.append(place)
        elif rule.metavar.startswith("["):
            if n_values > 1:
                n_typed += 1
            elif not _is_address(word, rule):
                movable.append(place)
        elif n_values > 1:
            n_typed += 1
    n_missing = n_files - n_typed
    if n_missing <= 0 or not movable:
        return words
    files = movable[-n_missing:]
    rest = [word for place, word in enumerate(words) if place not in files]
    return [*(words[place] for place in files), *rest]


def _is_address(word: str, rule: Rule) -> bool:
    """Return True if a word after the flag of a cluster can only be its address."""
    protocol = f"{rule.name.removeprefix('--')}://"
    return word.startswith(protocol) or _CLUSTER.fullmatch(word) is not None
