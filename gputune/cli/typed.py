"""Rewrite the words of a command line for the argument parser.

Names of Python's arguments become flags: ``--n-trials`` is ``--trials``. A file after an option that
takes several values is moved before the options: ``tune --space lr=0.1 FILE``.
"""

import re
from collections.abc import Mapping, Sequence

from gputune.cli.commands import COMMANDS, Command
from gputune.tuning.rules import Rule, Takes

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
