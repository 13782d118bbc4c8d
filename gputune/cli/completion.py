"""The scripts that complete commands, flags and values in bash, zsh and fish.

They are made from the table of commands, so they know every flag.
"""

import re
import shlex
from argparse import Namespace
from collections.abc import Iterator

from gputune.cli.commands import COMMANDS, SHELLS, Command, Flag
from gputune.tuning.rules import Rule

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
            values = " ".join(_values(rule))
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


def _values(rule: Rule) -> list[str]:
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
            values = " ".join(_values(rule))
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
