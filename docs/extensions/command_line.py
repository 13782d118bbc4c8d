"""Write the commands and options of the command line, from its parser, to the end of their page."""

import argparse
import inspect
import re
from collections.abc import Iterator
from typing import Any

from sphinx.application import Sphinx

import gputune
from gputune.cli.arguments import make_parser

PAGE = "docs/reference/command-line"
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>$|])")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the addition to the page."""
    app.connect("source-read", _add_commands)
    return {"parallel_read_safe": True}


def _add_commands(app: Sphinx, page: str, source: list[str]) -> None:
    if page == PAGE:
        app.env.note_dependency(inspect.getfile(make_parser))
        source[0] += "\n".join(command_lines())


def command_lines() -> Iterator[str]:
    """Yield the lines of Markdown that describe every command."""
    parser = make_parser()
    (subparsers,) = (
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    )
    yield ""
    for choice in subparsers._choices_actions:
        command = subparsers.choices[choice.dest]
        yield f"\n## gputune {choice.dest}\n"
        yield f"{_escaped(command.description or choice.help or '')}\n"
        yield from _group_lines(command)


def _group_lines(command: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the arguments of a command, group by group."""
    for group in command._action_groups:
        actions = [action for action in group._group_actions if _is_shown(action)]
        if not actions:
            continue
        yield f"**{_escaped((group.title or 'options').capitalize())}**\n"
        for action in actions:
            yield f"{_name(action)}\n: {_explanation(action)}\n"


def _is_shown(action: argparse.Action) -> bool:
    return action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)


def _name(action: argparse.Action) -> str:
    """Return an argument as a user types it."""
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest
    if not action.option_strings:
        return f"`{metavar}`"
    takes_value = action.nargs != 0
    names = []
    for option in action.option_strings:
        typed = f"{option} {metavar}" if takes_value and action.choices is None else option
        names.append(f"`{typed}`")
    return ", ".join(names)


def _explanation(action: argparse.Action) -> str:
    """Return the help text of an argument, its choices, and its name in Python if that differs."""
    text = _escaped(action.help or "").replace("%%", "%")
    if action.choices is not None:
        choices = ", ".join(f"`{choice}`" for choice in action.choices)
        text = f"{text} (one of {choices})"
    parameters = inspect.signature(gputune.tune).parameters
    flag_names = [option.lstrip("-").replace("-", "_") for option in action.option_strings]
    if action.option_strings and action.dest in parameters and action.dest not in flag_names:
        text = f"{text}. In Python: `{action.dest}`"
    return text


def _escaped(text: str) -> str:
    """Return a text whose signs mean nothing in Markdown."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
