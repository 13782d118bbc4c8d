"""The options from a TOML file, and checks of the paths that a command names.

Both run before the slow imports. A key of the file is the name of a flag without its dashes, or the
name of an argument in Python. Flags on the command line override the file.
"""

import argparse
import os
import sys
import time
import tomllib
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from gputune.cli.arguments import MODEL, READERS, aliases, study_file
from gputune.cli.commands import COMMANDS, Command
from gputune.ground.errors import InputError
from gputune.ground.files import MISSING_TABLE, check_file, check_model_folder
from gputune.ground.text import did_you_mean
from gputune.study.database import check_study_file
from gputune.study.file_system import check_one_process
from gputune.tuning.rules import Rule

_NO_VALUE = "config_file"  # a file cannot name another file
_MOST_BYTES = 1 << 20


def add_config(arguments: argparse.Namespace) -> Sequence[str]:
    """Add the options from the ``--config`` file that the user did not type as flags.

    Returns the flags of the added options. Raises InputError if the file or one of its values is
    not valid.
    """
    flags: list[str] = []
    file = getattr(arguments, "config_file", None)
    if file is None:
        return flags
    options = _options(COMMANDS[arguments.command])
    keys: dict[str, str] = {}  # the key of each option
    for key, value in _table(file).items():
        place = f"{file}: {key}"
        if key.replace("_", "-") not in options:
            remedy = did_you_mean(key, options).strip() or "Remove it."
            message = f"is not an option of gputune {arguments.command}"
            raise InputError(place, message, remedy=remedy)
        name, rule, is_opposite = options[key.replace("_", "-")]
        if name in keys:
            raise InputError(place, f"is the same option as {keys[name]}", remedy="Remove one.")
        keys[name] = key
        converted = _value(place, rule, value, is_opposite=is_opposite)
        if name == "verbose":
            arguments.verbose = 0 if converted else arguments.verbose
        elif getattr(arguments, name) is None:
            setattr(arguments, name, converted)
            flags.append(rule.name)
    return flags


def _table(file: str) -> Mapping[str, object]:
    """Return the content of a TOML file.

    Raises InputError if the file is not valid TOML.
    """
    path = Path(file)
    check_file(path)
    if path.stat().st_size > _MOST_BYTES:
        raise InputError("--config", "must be a TOML file of at most 1 MiB", got=file)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise InputError("--config", "must be a TOML file in UTF-8", got=file) from None
    except tomllib.TOMLDecodeError as error:
        raise InputError("--config", f"must be a TOML file, but {file}: {error}") from None


def _options(command: Command) -> dict[str, tuple[str, Rule, bool]]:
    """Return a command's options as (name, rule, is_opposite), keyed by each accepted name.

    ``is_opposite`` marks a name that means the opposite of the flag, such as ``include-default``
    for ``--no-default``.
    """
    options = {}
    flags = {}
    for rules in command.groups.values():
        for name, rule in rules.items():
            if name != _NO_VALUE:
                flags[rule.name] = (name, rule)
                options[rule.name[2:]] = (name, rule, False)
    for alias, flag in aliases(command).items():
        name, rule = flags[flag]
        options[alias[2:]] = (name, rule, False)
        if alias.startswith("--no-"):
            options[alias.removeprefix("--no-")] = (name, rule, True)
    return options


def _value(place: str, rule: Rule, value: object, *, is_opposite: bool) -> object:
    """Return an option's value in the form that the argument parser returns.

    Raises InputError if the option does not accept the value.
    """
    if not rule.metavar or rule.takes == "yes or no":
        if not isinstance(value, bool):
            raise InputError(place, "must be true or false", got=value)
        # The option of --no-default is false if the flag is given.
        is_negative = rule.name.startswith("--no-") and not is_opposite
        return not value if is_negative else value
    if rule.choices is not None:
        if value not in rule.choices:
            remedy = did_you_mean(value, rule.choices).strip()
            names = ", ".join(map(repr, rule.choices))
            raise InputError(place, f"must be one of {names}", got=value, remedy=remedy)
        return value
    if rule.takes == "specs":
        return _specs(place, value)
    if rule.takes == "config":
        return _configurations(place, value)
    if rule.takes in ("names", "columns", "scorers"):
        return _names(place, rule, value)
    if rule.takes in ("integers", "numbers") and isinstance(value, list):
        value = ",".join(map(str, value))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if rule.takes in ("0..", "1..", "number") and not is_number:
        raise InputError(place, "must be a number", got=value)
    if not is_number and not isinstance(value, str):
        raise InputError(place, "must be text or a number", got=value)
    try:
        return READERS[rule.takes](str(value))
    except argparse.ArgumentTypeError as error:
        raise InputError(place, str(error).partition(", got ")[0], got=value) from None


def _names(place: str, rule: Rule, value: object) -> object:
    """Return an option's value that is a name or a list of names.

    Raises InputError for any other value.
    """
    if isinstance(value, str):
        return READERS[rule.takes](value)
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise InputError(place, "must be a name or a list of names", got=value)
    return value


def _specs(place: str, value: object) -> list[str]:
    """Return the KEY=SPEC texts of a table. A list of texts, or a text, needs no conversion.

    Raises InputError for any other value.
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return value
    if not isinstance(value, dict):
        raise InputError(place, "must be a table, a list of texts or a text", got=value)
    return [f"{key}={_spec(f'{place}.{key}', entry)}" for key, entry in value.items()]


def _configurations(place: str, value: object) -> list[list[str]]:
    """Return the KEY=VALUE texts of each table, one list for each configuration.

    Raises InputError if the value is not a table or a list of tables.
    """
    tables = value if isinstance(value, list) else [value]
    if not all(isinstance(table, dict) for table in tables):
        raise InputError(place, "must be a table or a list of tables", got=value)
    return [_specs(place, table) for table in tables]


def _spec(place: str, value: object) -> str:
    """Return the text of a value, of a list of values, or of a list with tuples.

    Raises InputError for a value of any other type.
    """
    if isinstance(value, list):
        parts = []
        for entry in value:
            text = _spec(place, entry)
            parts.append(f"({text})" if isinstance(entry, list) else text)
        return ",".join(parts)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    raise InputError(place, "must be text, a number, true, false or a list of these", got=value)


_ARRAYS = (".npz", ".npy", ".pt", ".pth")  # which have no other remedy than the right path


def check_paths(arguments: Namespace) -> None:
    """Raise an error if a file or folder that a command reads does not exist.

    Without this check, the command would raise the same error after some seconds of imports. The
    command itself checks the content of the files.
    """
    command = arguments.command
    if command == "resume":
        check_one_process(study_file(arguments.study), joins=arguments.wait)
    if command == "resume" and arguments.wait:
        _wait_for_study(arguments.study, quiet=arguments.verbose == 0)
    if command in ("resume", "report"):
        check_study_file(study_file(arguments.study))
    if command in ("predict", "evaluate", "export"):
        check_model_folder(Path(arguments.folder))
    if command in ("predict", "evaluate"):
        _check_rows(arguments.file)
    # The command says first that the result cannot be written.
    if command in ("tune", "train") and _can_write(arguments):
        _check_rows(arguments.file)


_LOOK_SECONDS = 0.5
"""The time between two looks for a study that another process will create."""


def _wait_for_study(place: str, *, quiet: bool) -> None:
    """Wait until another process has created a study. A signal ends the wait."""
    is_said = quiet
    while not study_file(place).is_file():
        if not is_said:
            print(f"waiting for the study {study_file(place)}", file=sys.stderr, flush=True)
            is_said = True
        time.sleep(_LOOK_SECONDS)


def _can_write(arguments: Namespace) -> bool:
    """Return True if the command can write into the folder for its result, or can create that
    folder."""
    if arguments.study is None:
        return True
    out = Path(arguments.study)
    there = next(place for place in (out, *out.absolute().parents) if place.exists())
    is_writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    return bool(arguments.study) and is_writable and not (out / MODEL).exists()


def _check_rows(file: str) -> None:
    """Raise FileNotFoundError if the input is neither a file nor a data set of scikit-learn."""
    if file.startswith("sklearn:") or os.path.exists(file):
        return
    path = Path(file)
    if path.suffix.lower() in _ARRAYS:
        check_file(path)
    else:
        check_file(path, missing=MISSING_TABLE)
