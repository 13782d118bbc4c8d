"""The help texts of the command line: short (``-h``), long (``--help``), and a list of commands."""

from collections.abc import Iterator, Mapping, Sequence

from gputune.cli.commands import COMMANDS, Command, Flag
from gputune.cli.style import Style
from gputune.ground.text import count, paragraph
from gputune.tuning.rules import Rule

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
