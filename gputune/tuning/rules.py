"""The description of an option: its check, its default, its storage and its help text.

The constants name the sections of the command line's help.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

DATA = "Data"
MODEL = "Model"
SEARCH = "Search"
STOPPING = "Early stopping"
HYPERGRADIENTS = "Hypergradients"
POPULATION = "Population based training"
COMPUTE = "Compute"
OUTPUT = "Output"

Takes = Literal[
    "text",
    "number",
    "duration",
    "0..",
    "1..",
    "integers",
    "numbers",
    "names",
    "columns",
    "scorers",
    "specs",
    "config",
    "workers",
    "yes or no",
]


@dataclass(frozen=True)
class Rule:
    """The description of an option of ``tune`` or of a command: flag, help text, default and check.

    Attributes:
        flag: The flag on the command line. "--epochs <INT>" takes a value, "--tf32" takes none. ""
            for an option that the command line lacks.
        help: The help text, a noun phrase or an imperative without a full stop.
        details: More sentences for the long help.
        default: The default as the help shows it.
        takes: The kind of value: integers from 0 or 1, names separated by commas, several KEY=SPEC,
            and so on.
        choices: The allowed strings, or None.
        values: The possible values as the help shows them, if they are not ``choices``.
        check: A function of a name and a value. It returns the value to use or raises InputError.
        stored: If True, a study file stores the option's value, which a resumed search or a refit
            reads.
        resume: If True or a text, ``gputune resume`` may change the option. A text is the help text
            of that command.
        group: The section of the help that lists the option.
        aliases: Other flags for the option, which the help does not list.
    """

    flag: str = ""
    help: str = ""
    details: str = ""
    default: str = "none"
    takes: Takes = "text"
    choices: Sequence[str] | None = None
    values: Sequence[str] = ()
    check: Callable[[str, object], object] | None = None
    stored: bool = False
    resume: bool | str = False
    group: str = ""
    aliases: Sequence[str] = ()

    @property
    def name(self) -> str:
        """The flag of the option without its value, such as "--epochs"."""
        return self.flag.partition(" ")[0]

    @property
    def metavar(self) -> str:
        """The placeholder for the option's value in the help, such as "<INT>".

        "" for a flag without a value.
        """
        return self.flag.partition(" ")[2]


def option_field(value: object, *rule: Any, **settings: Any) -> Any:
    """Return a dataclass field for an option with a default value and a rule (check and help
    text)."""
    return field(default=value, metadata={"rule": Rule(*rule, **settings)})


@dataclass(frozen=True, kw_only=True)
class OptionGroup:
    """Base class of a group of options. The constructor checks the value of each option."""

    def __post_init__(self) -> None:
        for option in fields(self):
            check = option.metadata.get("rule", Rule()).check
            if check is not None:
                # The dataclass is frozen, so this replaces a given value by the checked value.
                object.__setattr__(
                    self, option.name, check(option.name, getattr(self, option.name))
                )
