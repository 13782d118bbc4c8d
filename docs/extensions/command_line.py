"""Write the commands and options of the command line, from their tables, to the end of their page."""

import inspect
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import gputune
from gputune.cli import commands
from gputune.cli.commands import COMMANDS, Command
from gputune.cli.help import SECTIONS, flag_words
from gputune.tuning.rules import Rule

if TYPE_CHECKING:
    from sphinx.application import Sphinx

PAGE = "docs/reference/command-line"
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>$|])")


def setup(app: "Sphinx") -> dict[str, Any]:
    """Register the addition to the page."""
    app.connect("source-read", _add_commands)
    return {"parallel_read_safe": True}


def _add_commands(app: "Sphinx", page: str, source: list[str]) -> None:
    if page == PAGE:
        app.env.note_dependency(inspect.getfile(commands))
        source[0] += "\n".join(command_lines())


def command_lines() -> Iterator[str]:
    """Yield the lines of Markdown that describe every command."""
    yield ""
    for names in SECTIONS.values():
        for name in names:
            yield from _one_command(COMMANDS[name])


def _one_command(command: Command) -> Iterator[str]:
    """Yield the description, the examples, the arguments and the options of a command."""
    yield f"\n## gputune {command.name}\n"
    yield f"{_escaped(command.help)}.\n"
    if command.examples:
        yield "```sh"
        yield from command.examples
        yield "```\n"
    if command.places:
        yield "**Arguments**\n"
    for metavar, help in command.places.values():
        yield f"`{metavar}`\n: {_escaped(help)}\n"
    for title, rules in command.groups.items():
        yield f"**{_escaped(title)}**\n"
        for argument, rule in rules.items():
            yield f"`{flag_words(rule)}`\n: {_explanation(argument, rule)}\n"


def _explanation(argument: str, rule: Rule) -> str:
    """Return the help of an option, its default, its values, and its name in Python if it differs."""
    text = _escaped(rule.help)
    if rule.details:
        text = f"{text}. {_escaped(rule.details)}"
    text = text if text.endswith(".") else f"{text}."
    is_switch = not rule.metavar and rule.default == "none"
    default = "off" if is_switch else rule.default
    if getattr(rule, "required", False):
        text = f"{text} Required."
    elif default:
        text = f"{text} Default: {_escaped(default)}."
    values = rule.choices or rule.values
    if values:
        text = f"{text} Possible values: {', '.join(_escaped(value) for value in values)}."
    is_argument = argument in inspect.signature(gputune.tune).parameters
    if is_argument and argument != rule.name.removeprefix("--").replace("-", "_"):
        text = f"{text} In Python: `{argument}`."
    return text


def _escaped(text: str) -> str:
    """Return a text whose signs mean nothing in Markdown."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
