"""The parser of the command line, and the paths of a study and its model.

Nothing heavy is imported, so that ``gputune --help`` is fast. Errors suggest the flag that was
probably meant.
"""

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from gputune.cli.flags import option_groups
from gputune.text import did_you_mean, nearest
from gputune.tuning.options import MACHINE, SEARCH, Rule, Takes
from gputune.types import defaults_in_words
from gputune.version import __version__

_DESCRIPTION = """\
Tune an MLP, a logistic regression or a torch module of your own: every
configuration and every fold trains at the same time, as one tensor program.
"""

_EXAMPLES = """\
examples:
  gputune tune sklearn:digits
  gputune tune houses.csv --target price --trials 100 --epochs 30
  gputune tune houses.csv --target price --space lr=1e-4..1e-1:log width=64,128
  gputune tune houses.csv --target price --model net.py:Net --cv 3
  gputune train houses.csv --target price --set lr=1e-3 width=64
  gputune resume gputune-out
  gputune status gputune-out
  gputune report gputune-out --out report.html
  gputune trials gputune-out --format csv
  gputune predict gputune-out/model new-houses.csv --out prices.csv
  gputune evaluate gputune-out/model sold-houses.csv
  gputune check --device cuda
"""


@dataclass(frozen=True)
class _Flag(Rule):
    """A flag that is not an option of a search."""

    default: str | None = None
    required: bool = False


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line. ``command`` is the name of the command."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        "gputune", None, _DESCRIPTION, _EXAMPLES, formatter_class=formatter, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"gputune {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parser.commands = commands.choices
    for name, (text, places, flags) in _COMMANDS.items():
        about = f"{text[0].upper()}{text[1:]}."
        ending = defaults_in_words() if name in ("tune", "train") else None
        command = commands.add_parser(
            name, help=text, description=about, epilog=ending, allow_abbrev=False
        )
        for place, (metavar, help) in places.items():
            command.add_argument(place, metavar=metavar, help=help)
        for title, rules in _groups(name, flags).items():
            group = command.add_argument_group(title) if title else command
            for dest, rule in rules.items():
                _add_flag(group, dest, rule)
        if name in ("tune", "train", "resume"):
            group.add_argument(
                "-q",
                "--quiet",
                dest="verbose",
                action="store_const",
                const=0,
                default=1,
                help="print only warnings and errors",
            )
    return parser


class _Parser(argparse.ArgumentParser):
    """A parser with errors that suggest the intended names.

    ``commands`` are the parsers of the commands, by name.
    """

    commands: Mapping[str, "_Parser"] = MappingProxyType({})

    def error(self, message: str, hints: str = "") -> NoReturn:
        """Print an error with hints, and exit with code 2."""
        # argparse gives the legal choices only in its message.
        choice = re.search(r"invalid choice: ('.*') \(choose from (.*)\)", message)
        if choice is not None:
            hints = did_you_mean(choice[1][1:-1], re.findall(r"'([^']*)'", choice[2]))
        if hints:
            message = f"{message}.{hints}"
        self.exit(2, f"gputune: error: {message}\nTry '{self.prog} --help'.\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse like argparse, but report an unknown flag as an error of the command, not of
        ``gputune``."""
        typed, unknown = self.parse_known_args(args, namespace)
        if not unknown:
            return typed
        # The flags of every command show which command has an unknown flag.
        flags = {
            name: re.findall(r"--([\w-]+)", command.format_usage())
            for name, command in self.commands.items()
        }
        hints = ""
        for argument in unknown:
            if not argument.startswith("--"):
                continue
            flag = argument[2:].partition("=")[0]
            commands = [name for name, names in flags.items() if flag in names]
            near = nearest(flag, flags[typed.command], others=_OTHER_FLAGS)
            if commands:
                hints += f" {typed.command} has no --{flag}, a flag of {', '.join(commands)}."
            elif near:
                hints += f" Did you mean '--{near}'?"
        self.commands[typed.command].error(f"unrecognized arguments: {' '.join(unknown)}", hints)


_OTHER_FLAGS: Mapping[str, str] = {
    "epoch": "epochs",
    "lr": "space",
    "metric": "scoring",
    "metrics": "scoring",
    "random-state": "seed",
}
"""Flags that people type by mistake -> the flag of ours."""


def _groups(command: str, flags: Sequence[Rule]) -> dict[str, dict[str, Rule]]:
    """Return the flags of a command by the title of their group. "" holds flags without a group."""
    groups = option_groups()
    if command == "tune":
        return groups
    if command == "train":
        training = {name: groups[SEARCH][name] for name in _OF_TRAINING}
        machine = {name: rule for name, rule in groups[MACHINE].items() if name not in _OF_SEARCH}
        changed = {
            SEARCH: ("the training", {"config": _SET, **training}),
            MACHINE: (MACHINE, machine),
        }
        return dict(changed.get(title, (title, rules)) for title, rules in groups.items())
    ungrouped: dict[str, Rule] = {}
    if command == "resume":
        for rules in groups.values():
            ungrouped |= {name: _for_resume(rule) for name, rule in rules.items() if rule.resume}
    for flag in flags:
        ungrouped[flag.name.removeprefix("--").replace("-", "_")] = flag
    return {"": ungrouped}


def _for_resume(rule: Rule) -> Rule:
    """Return the rule of an option that ``gputune resume`` may change, with its help text there."""
    if rule.resume is not True:
        return replace(rule, help=str(rule.resume))
    # A resume keeps the values of the search, so the help must not name a default.
    default = r"(\((auto|60)\)|\[default: (auto|60)\])$"
    return replace(rule, help=re.sub(default, "[default: as in the search]", rule.help))


def _add_flag(group: argparse._ActionsContainer, name: str, rule: Rule) -> None:
    """Add a flag to a parser.

    A flag that is not typed has the value None. The option then has its own default.
    """
    if rule.takes == "yes or no":
        action = argparse.BooleanOptionalAction
        group.add_argument(rule.name, dest=name, help=rule.help, action=action, default=None)
        return
    metavar = rule.flag.partition(" ")[2]
    settings: dict[str, Any] = {"type": _READERS[rule.takes], "metavar": metavar}
    if rule.choices is not None:
        settings = {"choices": rule.choices}
    elif not metavar:
        settings = {"action": "store_false" if rule.name.startswith("--no-") else "store_true"}
    elif name == "ray":
        settings |= {"nargs": "?", "const": "local"}
    elif rule.takes in ("specs", "config"):
        settings |= {"nargs": "+", "action": "extend" if rule.takes == "specs" else "append"}
    settings["default"] = None
    if isinstance(rule, _Flag):
        settings |= {"default": rule.default, "required": rule.required}
    group.add_argument(rule.name, dest=name, help=rule.help, **settings)


_SET = Rule(
    "--set KEY=VALUE",
    "hyperparameters, such as lr=1e-3 width=64; all others have their defaults",
    takes="specs",
)
# options of a search that ``gputune train`` has too
_OF_TRAINING = "max_epochs", "scoring", "positive", "schedule", "random_state", "timeout"
_OF_SEARCH = ("ensemble", "compare_default")  # flags of the machine that ``gputune train`` lacks

_STUDY = ("STUDY", "a study.db, or the folder that holds it")
_TABLE = (
    "FILE",
    "a .csv, .tsv or .parquet file, sklearn:digits, :iris, ..., or for a module a .npz, .npy or "
    ".pt file",
)
_MODEL = ("MODEL_DIR", "the folder of a saved model")
_ROWS = (
    "FILE",
    "a table with the columns of the training data, or a .npz, .npy or .pt file with such arrays",
)
_TRUST = _Flag(
    "--trust-code",
    "run the code that the study or model names, even if it was not trained or saved on this "
    "machine",
)
_BY = _Flag("--by NAME", "the metric to rank by [default: the first of --scoring]")
_CLASS = _Flag(
    "--model FILE.py:NAME", "the model's class, if its file has moved; this runs the file"
)

_COMMANDS: Mapping[str, tuple[str, Mapping[str, tuple[str, str]], Sequence[_Flag]]] = {
    "tune": (
        "search hyperparameters on a table, and save the study and the model",
        {"file": _TABLE},
        (),
    ),
    "train": (
        "train one configuration without a search: its score in every fold, its curve, its model",
        {"file": _TABLE},
        (),
    ),
    "resume": (
        "continue a stopped search, using only its study",
        {"study": _STUDY},
        [_TRUST],
    ),
    "trials": (
        "list the trials of a study",
        {"study": _STUDY},
        [
            _Flag(
                "--format",
                "the format; json and csv have scores in scikit-learn's sign (greater is better) "
                "[default: table]",
                choices=("table", "json", "csv"),
                default="table",
            ),
            _BY,
        ],
    ),
    "best": (
        "show the best score of a study and its parameters",
        {"study": _STUDY},
        [_Flag("--format", choices=("text", "json"), default="text"), _BY],
    ),
    "predict": (
        "predict the rows of a file with a saved model, as CSV",
        {"folder": _MODEL, "file": _ROWS},
        [
            _Flag("--proba", "write a column of probabilities for each class"),
            _Flag(
                "--interval LEVEL",
                "add columns _lower and _upper with intervals that hold this share of the values, "
                "such as 0.9",
                "number",
            ),
            _Flag(
                "--keep COL,COL",
                "columns of the file to write before the predictions, such as an id; the target "
                "is named TARGET_given",
                "names",
            ),
            _Flag("--raw", "write no ' before text that a spreadsheet would read as a formula"),
            _Flag("--out FILE", "the file to write [default: standard output]"),
            _CLASS,
            _TRUST,
        ],
    ),
    "evaluate": (
        "score a saved model on the rows of a file with right answers",
        {
            "folder": _MODEL,
            "file": (_ROWS[0], f"{_ROWS[1]}; with the target, unless --target is a file"),
        },
        [
            _Flag(
                "--target NAME",
                "the column or array with the right answers; for a .npy file, another .npy file "
                "[default: the target of the training]",
            ),
            _Flag(
                "--scoring NAME,NAME",
                "scikit-learn scorer names [default: the usual ones of the task]",
                "names",
            ),
            _Flag(
                "--positive CLASS",
                "the positive class of f1, precision, recall, average_precision, ...",
            ),
            _Flag(
                "--missing-target",
                "rows whose target is missing: end with an error, or drop them [default: error]",
                choices=("error", "drop"),
                default="error",
            ),
            _Flag("--format", choices=("text", "json"), default="text"),
            _CLASS,
            _TRUST,
        ],
    ),
    "repair": (
        "save the intact part of a damaged study into a new file",
        {"study": ("STUDY", f"{_STUDY[1]}; it is only read")},
        [_Flag("--out NEW", "the new file, in an existing folder", required=True)],
    ),
    "report": (
        "write an HTML report on a finished or running study",
        {"study": _STUDY},
        [
            _Flag("--out FILE", "the report [default: report.html next to the study]"),
            _Flag(
                "--live",
                "write the report again every few seconds until the search has ended; the page "
                "reloads itself",
            ),
            _Flag("--confusion", "add a confusion matrix of the best trial's predictions"),
            _Flag(
                "--importance",
                "add the importance of each column, by shuffling it; trains the best trial again",
            ),
            _BY,
            _TRUST,
        ],
    ),
    "status": (
        "show the progress of a search: trials by state, the best so far, the last result",
        {"study": _STUDY},
        [
            _Flag(
                "--watch",
                "show it every two seconds, with the best curves, until the search has ended",
            )
        ],
    ),
    "export": (
        "write a saved model as one file that runs without gputune",
        {"folder": _MODEL},
        [
            _Flag(
                "--out FILE", "the new file: .onnx for ONNX, .pt2 for torch.export", required=True
            ),
            _CLASS,
            _TRUST,
        ],
    ),
    "check": (
        "check that members equal a plain loop on a device, and how fast it trains (one minute)",
        {},
        [
            _Flag("--device D", "auto, cpu, cuda or cuda:1 [default: auto]", default="auto"),
            _Flag("--json", "print the table as JSON"),
        ],
    ),
}
"""For each command its help, its file or folder arguments, and its flags that are not options of a
search."""


def _reader(
    read: Callable[[str], float], rule: str, least: float = -math.inf
) -> Callable[[str], float]:
    """Return a function that converts text to a numeric value of at least ``least``."""

    def number(text: str) -> float:
        with suppress(ValueError):
            value = read(text)
            if not value < least:
                return value
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")

    return number


_WHOLE = "a whole number of at least"
_READERS: dict[Takes, Callable[[str], object]] = {
    "text": str,
    "specs": str,
    "config": str,
    "number": _reader(float, "a number such as 0.5"),
    "0..": _reader(int, f"{_WHOLE} 0", 0),
    "1..": _reader(int, f"{_WHOLE} 1", 1),
    "names": lambda text: text.split(","),
    "scorers": lambda text: [word.strip() for word in text.split(",")] if "," in text else text,
    "workers": lambda text: (
        text if text == "auto" else _reader(int, f"{_WHOLE} 1, or 'auto'", 1)(text)
    ),
}

# names of the files in the folder of a search
STUDY = "study.db"
MODEL = "model"


def model_folder(study: Path) -> Path:
    """Return the path of a study's model folder, next to the study.

    It is named after the study, unless the study has the default name.
    """
    return study.parent / (MODEL if study.name == STUDY else f"{study.stem}.{MODEL}")


def report_page(study: Path) -> Path:
    """Return the path of the HTML report of a study, next to the study.

    It is named after the study, unless the study has the default name.
    """
    return study.parent / ("report.html" if study.name == STUDY else f"{study.stem}.report.html")


def study_file(place: str) -> Path:
    """Return the path of a study file, for a file or for the folder that holds it."""
    path = Path(place)
    return path / STUDY if path.is_dir() else path
