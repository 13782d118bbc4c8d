"""A parser of typed words whose errors say what was meant, of the flags that the command has."""

import argparse
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

from gputune.text import did_you_mean, nearest


class Parser(argparse.ArgumentParser):
    """Names in its errors what was meant; ``commands`` are the parsers of the commands, by name."""

    commands: Mapping[str, "Parser"] = MappingProxyType({})

    def error(self, message: str, hints: str = "") -> NoReturn:
        if choice := re.search(r"invalid choice: ('.*') \(choose from (.*)\)", message):
            hints = did_you_mean(choice[1][1:-1], re.findall(r"'([^']*)'", choice[2]))
        hints = hints and f".{hints}"
        self.exit(2, f"gputune: error: {message}{hints}\nTry '{self.prog} --help'.\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but what a command does not know is an error of the command, not of ``gputune``."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = {name: _flags_of(command) for name, command in self.commands.items()}
            words = [word.partition("=")[0] for word in unknown if word.startswith("--")]
            hints = "".join(_remedy(word, found.command, flags) for word in words)
            self.commands[found.command].error(f"unrecognized arguments: {' '.join(unknown)}", hints)
        return found


def _flags_of(command: argparse.ArgumentParser) -> list[str]:
    return re.findall(r"--[\w-]+", command.format_usage())


def _remedy(flag: str, command: str, flags: Mapping[str, Sequence[str]]) -> str:
    """Return what was meant by a flag that the command does not have, behind a blank; "" for nothing."""
    if having := [name for name, known in flags.items() if flag in known]:
        return f" {command} has no {flag}, a flag of {', '.join(having)}."
    near = nearest(flag[2:], [known[2:] for known in flags[command]], others=_OTHER_FLAGS)
    return f" Did you mean '--{near}'?" if near else ""


_OTHER_FLAGS: Mapping[str, str] = {
    "epoch": "epochs",
    "lr": "space",
    "metric": "scoring",
    "metrics": "scoring",
    "random-state": "seed",
}
