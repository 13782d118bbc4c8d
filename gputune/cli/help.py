"""The help texts of the command line, their bold and colored text, and the completion for shells.

Text is plain if the output is not a terminal, if ``TERM=dumb``, or if ``NO_COLOR``
(https://no-color.org) is set.
"""

import os
import re
import shlex
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from gputune.cli.commands import COMMANDS, SHELLS, Command, Flag
from gputune.ground.text import count, paragraph
from gputune.tuning.rules import Rule

_RESET = "\x1b[0m"
_BOLD = "\x1b[1m"
_YELLOW = "\x1b[33m"
_RED = "\x1b[31m"

_LABELS = re.compile(
    r"^(Data|Inputs|Columns|Task|Search|Preset|Method|Sampler|Halving|Median|Copies|Schedule|Memory|Device|Plan|Time"
    r"|Scores|Ended|Trials|Trial \d+|Score|Others|Folds|Curve|Study|Model|Next|Resume|Note|Best|Running"
    r"|Written|Report)(?= )",
    re.MULTILINE,
)
"""The labels at the beginning of lines in the text that a search prints at its end."""

_WARNING = re.compile(r"^Warning(?= )", re.MULTILINE)


@dataclass(frozen=True)
class Style:
    """Makes text for one stream bold or colored. Without color, all methods return plain text."""

    has_color: bool = False

    @classmethod
    def of(cls, stream: TextIO) -> "Style":
        """Return the style for a stream. It has color only if the stream is a terminal that
        supports color."""
        wants_color = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        return cls(wants_color and stream.isatty())

    def bold(self, text: str) -> str:
        """Return the text in bold, or unchanged if the stream has no color."""
        return self._in(_BOLD, text)

    def warning(self, text: str) -> str:
        """Return the text in the color of a warning, or unchanged if the stream has no color."""
        return self._in(_YELLOW, text)

    def error(self, text: str) -> str:
        """Return the text in the color of an error, or unchanged if the stream has no color."""
        return self._in(_RED, text)

    def labeled(self, text: str) -> str:
        """Return the text at the end of a search with bold labels and colored warnings."""
        if not self.has_color:
            return text
        with_labels = _LABELS.sub(lambda label: self.bold(label[1]), text)
        return _WARNING.sub(lambda label: self.warning(label[0]), with_labels)

    def _in(self, code: str, text: str) -> str:
        return f"{code}{text}{_RESET}" if self.has_color else text


_DESCRIPTION = (
    "Tune an MLP, a logistic regression or your own torch module. All configurations and all folds "
    "train at the same time."
)

SECTIONS = {
    "Search": ("tune", "train", "search", "resume", "stop"),
    "Inspect": ("status", "trials", "best", "report"),
    "Model": ("predict", "evaluate", "export"),
    "Maintenance": ("check", "repair", "completion", "help"),
}
"""The sections of the list of commands in ``gputune --help``."""

_EXAMPLES = (
    "gputune tune sklearn:digits",
    "gputune tune houses.csv --target price --trials 100 --epochs 30",
    "gputune train houses.csv --target price --set lr=1e-3 width=64",
    "gputune resume gputune-out",
    "gputune status gputune-out",
    "gputune report gputune-out --out report.html",
    "gputune trials gputune-out --format csv",
    "gputune predict gputune-out/model new-houses.csv --out prices.csv",
    "gputune evaluate gputune-out/model sold-houses.csv",
    "gputune check --device cuda",
)

_SHORT = (
    "target",
    "test_size",
    "cv",
    "model",
    "config_file",
    "config",
    "space",
    "n_trials",
    "max_epochs",
    "method",
    "scoring",
    "random_state",
    "timeout",
    "device",
    "study",
    "dry_run",
    "verbose",
)
"""The options that the short help shows for a command with many options."""

_BLANK = "\xa0"  # at which no line breaks
_WHOLE = 40  # letters of a default in brackets that stays on one line
_FEW = 20  # options of a command, which its short help lists completely
_WIDEST = 100  # letters of a line in a wide terminal
_MOST_FLAG = 26  # letters of a flag that share a line with its help text


def overview(*, full: bool, width: int, style: Style) -> str:
    """Return the help of ``gputune``: its commands by section. ``full`` adds examples."""
    width = min(width, _WIDEST)
    lines = [paragraph(_DESCRIPTION, width), "", _usage("gputune [OPTIONS] COMMAND", style, width)]
    longest = max(len("-h, --help"), *map(len, COMMANDS))
    for title, names in SECTIONS.items():
        lines += ["", style.bold(f"{title}:")]
        for name in names:
            lines.append(_row(name, COMMANDS[name].help, longest, width))
    lines += ["", style.bold("Options:")]
    lines.append(_row("--version", "Print the version", longest, width))
    lines.append(_row("-h, --help", _about_help(""), longest, width))
    if full:
        lines += ["", style.bold("Examples:"), *_indented(_EXAMPLES)]
    return "\n".join(lines)


def command_help(command: Command, *, full: bool, width: int, style: Style) -> str:
    """Return the help of a command: a line for each option, or all details if ``full`` is True."""
    width = min(width, _WIDEST)
    lines = [paragraph(f"{command.help}.", width), "", _usage(_call(command), style, width)]
    if command.places:
        lines += ["", style.bold("Arguments:")]
        longest = max(len(metavar) for metavar, _ in command.places.values())
        for metavar, help in command.places.values():
            lines.append(_row(metavar, help, longest, width))
    lines += _long_options(command, width, style) if full else _short_options(command, width, style)
    if command.examples:
        lines += ["", style.bold("Examples:"), *_indented(command.examples)]
    if full and command.epilog:
        lines.append("")
        for text in command.epilog().split("\n"):
            lines.append(paragraph(text, width, then="  "))
    return "\n".join(lines)


def flag_words(rule: Rule) -> str:
    """Return a flag's forms and its value for the help, such as "-q, --quiet" or "--epochs <INT>"."""
    if rule.takes == "yes or no":
        return f"{rule.name}, --no-{rule.name.removeprefix('--')}"
    short = f"{rule.short}, " if isinstance(rule, Flag) and rule.short else ""
    return f"{short}{rule.flag}"


def _short_options(command: Command, width: int, style: Style) -> Iterator[str]:
    """Yield the help lines of a command's most important options, or of all options if it has few."""
    options: dict[str, Rule] = {}
    for rules in command.groups.values():
        options |= rules
    shown = options if len(options) <= _FEW else _named(options, _SHORT)
    yield from ("", style.bold("Options:"))
    entries = {}
    for rule in shown.values():
        entries[flag_words(rule)] = f"{rule.help} {_default(rule)}{_values(rule.choices)}"
    n_more = len(options) - len(shown)
    entries["-h, --help"] = _about_help(f"all {count(len(options), 'option')}" if n_more else "")
    longest = max(len(flag) for flag in entries if len(flag) <= _MOST_FLAG)
    for flag, text in entries.items():
        yield _row(flag, text, longest, width)


def _long_options(command: Command, width: int, style: Style) -> Iterator[str]:
    """Yield the help lines of all options by group, with defaults and possible values."""
    for title, rules in command.groups.items():
        yield from ("", style.bold(f"{title}:"))
        for rule in rules.values():
            yield f"  {style.bold(flag_words(rule))}"
            text = f"{rule.help}. {rule.details}" if rule.details else rule.help
            indent = " " * 10
            text = f"{text} {_default(rule)}{_values(rule.choices or rule.values)}"
            yield _paragraph(text, width, indent, indent)
    yield from ("", style.bold("Help:"), f"  {style.bold('-h, --help')}")
    yield f"          {_about_help('')}"


def _named(options: Mapping[str, Rule], names: Sequence[str]) -> dict[str, Rule]:
    """Return the options that have one of the given names, in the order of the names."""
    return {name: options[name] for name in names if name in options}


def _about_help(everything: str) -> str:
    """Return the help text for the flags ``-h`` and ``--help``."""
    return f"Print the short help (-h) or {everything or 'the full help'} (--help)"


def _default(rule: Rule) -> str:
    """Return the default of an option as "[default: ...]", or "[required]"."""
    if isinstance(rule, Flag) and rule.required:
        return "[required]"
    is_switch = not rule.metavar and rule.default == "none"
    text = f"[default: {'off' if is_switch else rule.default}]"
    return text.replace(" ", _BLANK) if len(text) <= _WHOLE else text


def _values(values: Sequence[str] | None) -> str:
    """Return an option's possible values in brackets, after a space, or "" without such values."""
    return f" [possible values: {', '.join(values)}]" if values else ""


def _usage(call: str, style: Style, width: int) -> str:
    text = paragraph(f"Usage: {call}", width, then=" " * 7)
    return text.replace("Usage:", style.bold("Usage:"), 1)


def _call(command: Command) -> str:
    """Return the usage line of a command, with its required flags and its files."""
    words = ["gputune", command.name, "[OPTIONS]"]
    for rules in command.groups.values():
        words += [r.flag for r in rules.values() if isinstance(r, Flag) and r.required]
    words += [metavar for metavar, _ in command.places.values()]
    return " ".join(words)


def _row(name: str, text: str, longest: int, width: int) -> str:
    """Return a help row: a name and its text. A name wider than the column gets its own line."""
    then = " " * (longest + 4)
    if len(name) > longest:
        return f"  {name}\n{_paragraph(text, width, then, then)}"
    return _paragraph(text, width, f"  {name:{longest}}  ", then)


def _paragraph(text: str, width: int, first: str, then: str) -> str:
    """Return a text wrapped to the width, with ordinary spaces for non-breaking ones."""
    return paragraph(text, width, first=first, then=then).replace(_BLANK, " ")


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]


_WORD = re.compile(r"[\w+.-]+")  # a possible value that can be typed as it is


def completion(arguments: Namespace) -> str:
    """Return the completion script for a shell, which ``gputune completion`` prints."""
    scripts = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    return scripts[arguments.shell]()


def _bash() -> str:
    """Return the completion script for bash. If nothing matches, bash completes file names."""
    return f"""\
# bash completion of gputune: source <(gputune completion bash)
_gputune() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} words=
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{_all_commands()}"
    elif [ "${{word:0:1}}" = - ]; then
        case "${{COMP_WORDS[1]}}" in
{_flag_cases(" " * 12, 'words="{}"')}
        esac
    else
        case "${{COMP_WORDS[1]}} ${{COMP_WORDS[COMP_CWORD-1]}}" in
{_cases(" " * 12, 'words="{}"')}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _gputune gputune"""


def _zsh() -> str:
    """Return the completion script for zsh."""
    return f"""\
#compdef gputune
# zsh completion of gputune: source <(gputune completion zsh)
_gputune() {{
    if (( CURRENT == 2 )); then
        compadd -- {_all_commands()}
        return
    fi
    if [[ $words[CURRENT] == -* ]]; then
        case $words[2] in
{_flag_cases(" " * 12, "compadd -- {}")}
        esac
        return
    fi
    case "$words[2] $words[CURRENT-1]" in
{_cases(" " * 8, "compadd -- {}; return")}
    esac
    _files
}}
compdef _gputune gputune"""


def _fish() -> str:
    """Return the completion script for fish, with the help text of each command and flag."""
    lines = ["# fish completion of gputune: gputune completion fish | source"]
    for name, command in COMMANDS.items():
        about = shlex.quote(command.help)
        lines.append(f"complete -c gputune -n __fish_use_subcommand -f -a {name} -d {about}")
        seen = f"complete -c gputune -n '__fish_seen_subcommand_from {name}'"
        for rule in _rules(command):
            flag = f"-l {rule.name[2:]}"
            if isinstance(rule, Flag) and rule.short:
                flag = f"-s {rule.short[1:]} {flag}"
            values = " ".join(_all_values(rule))
            if values:
                flag = f"{flag} -x -a '{values}'"
            elif rule.metavar and not rule.metavar.startswith("["):
                flag = f"{flag} -r"
            lines.append(f"{seen} {flag} -d {shlex.quote(rule.help)}")
        for words in _places(command):
            lines.append(f"{seen} -f -a '{words}'")
    return "\n".join(lines)


def _all_commands() -> str:
    return " ".join([*COMMANDS, "--help", "--version"])


def _rules(command: Command) -> Iterator[Rule]:
    """Yield the description of each flag of a command."""
    for rules in command.groups.values():
        yield from rules.values()


def _all_values(rule: Rule) -> list[str]:
    """Return the possible values of a flag that a shell reads without quotes."""
    return list(filter(_WORD.fullmatch, rule.choices or rule.values))


def _places(command: Command) -> Iterator[str]:
    """Yield the possible first arguments of a command without a file argument, such as ``help``."""
    if command.name == "help":
        yield " ".join(COMMANDS)
    elif command.name == "completion":
        yield " ".join(SHELLS)


def _cases(indent: str, action: str) -> str:
    """Return the ``case`` branches of a shell script for flag values and first arguments."""
    lines = []
    for name, command in COMMANDS.items():
        for words in _places(command):
            lines.append(f'{indent}"{name} {name}") {action.format(words)} ;;')
        for rule in _rules(command):
            values = " ".join(_all_values(rule))
            if values:
                lines.append(f'{indent}"{name} {rule.name}") {action.format(values)} ;;')
    return "\n".join(lines)


def _flag_cases(indent: str, action: str) -> str:
    """Return the ``case`` branches of a shell script that complete the flags of each command."""
    lines = []
    for name, command in COMMANDS.items():
        flags = []
        for rule in _rules(command):
            flags.append(rule.name)
            if rule.takes == "yes or no":
                flags.append(f"--no-{rule.name[2:]}")
        lines.append(f"{indent}{name}) {action.format(' '.join([*flags, '--help']))} ;;")
    return "\n".join(lines)
