"""What can be typed on the command line. Nothing heavy is imported, so that ``gputune --help`` waits for nothing.

Where ``gputune tune`` puts what it makes, and how a command finds it again.
"""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gputune.cli.flags import MORE_RULES, Parser
from gputune.tuning.options import RULES, SEARCH, Rule, Takes
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
    """A flag that is no option of a search."""

    default: str | None = None
    required: bool = False


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line; ``command`` is the name of the command."""
    parser = Parser(
        prog="gputune",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"gputune {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parser.commands = commands.choices
    for name, (text, places, flags) in _COMMANDS.items():
        about = f"{text[0].upper()}{text[1:]}."
        ending = defaults_in_words() if name in ("tune", "train") else None
        command = commands.add_parser(name, help=text, description=about, epilog=ending, allow_abbrev=False)
        for place, (metavar, help) in places.items():
            command.add_argument(place, metavar=metavar, help=help)
        if name in ("tune", "train"):
            _add_options(command, train=name == "train")
        elif name == "resume":
            _add_changes(command, flags)
        else:
            _add_flags(command, flags)
    return parser


def _add_options(command: argparse.ArgumentParser, *, train: bool) -> None:
    """Let the options of a search be typed, or those of one training, with ``--set``."""
    for title, rules in option_groups():
        group = command.add_argument_group("the training" if train and title == SEARCH else title)
        if train and title == SEARCH:
            rules = {"config": _SET, **{name: rules[name] for name in _OF_TRAINING}}
        for name, rule in rules.items():
            if not (train and name in _OF_SEARCH):
                _add_flag(group, name, rule)
    _add_quiet(group)


def _add_changes(resume: argparse.ArgumentParser, flags: Sequence[_Flag]) -> None:
    """Let what a search that goes on may change be typed."""
    changes = {name: rule for _, rules in option_groups() for name, rule in rules.items() if rule.resume}
    for name, rule in changes.items():
        unchanged = re.sub(r"\((auto|60)\)$", "(as the search began)", rule.help)
        _add_flag(resume, name, replace(rule, help=unchanged if rule.resume is True else str(rule.resume)))
    _add_flags(resume, flags)
    _add_quiet(resume)


def _add_flags(command: argparse.ArgumentParser, flags: Sequence[_Flag]) -> None:
    for flag in flags:
        name = flag.name.removeprefix("--").replace("-", "_")
        _add_flag(command, name, flag, default=flag.default, required=flag.required)


def _add_flag(group: Any, name: str, rule: Rule, **more: Any) -> None:
    """Let a flag be typed; what is not said is None, and an option then has its own default."""
    metavar = rule.flag.partition(" ")[2]
    how: dict[str, object] = {"type": _READERS[rule.takes], "metavar": metavar}
    if rule.choices is not None:
        how = {"choices": rule.choices}
    elif not metavar:
        how = {"action": "store_false" if rule.name.startswith("--no-") else "store_true"}
    elif name == "ray":
        how |= {"nargs": "?", "const": "local"}
    elif rule.takes in ("specs", "config"):
        how |= {"nargs": "+", "action": "extend" if rule.takes == "specs" else "append"}
    group.add_argument(rule.name, dest=name, help=rule.help, **{"default": None, **how, **more})


def _add_quiet(group: Any) -> None:
    how = {"dest": "verbose", "action": "store_const", "const": 0, "default": 1}
    group.add_argument("-q", "--quiet", help="print nothing but warnings and errors", **how)


def option_groups() -> list[tuple[str, dict[str, Rule]]]:
    """Return the title and the flags of each group of ``gputune tune --help``, those of the command itself last."""
    return [
        (title, {name: rule for name, rule in RULES.items() if rule.flag and rule.group == title} | rules)
        for title, rules in MORE_RULES.items()
    ]


_SET = Rule(
    "--set KEY=VALUE", "a hyperparameter, such as lr=1e-3 or width=64; what is not set has its default", takes="specs"
)
_OF_TRAINING = ("max_epochs", "scoring", "positive", "schedule", "random_state", "timeout")
_OF_SEARCH = ("ensemble",)
"""Options of a search that one training has too, and one of the machine that it has not."""

_STUDY = ("STUDY", "a study.db, or the folder that holds it")
_TABLE = ("FILE", "a .csv, .tsv or .parquet file, sklearn:digits, :iris, ..., or for a module a .npz, .npy or .pt file")
_MODEL = ("MODEL_DIR", "the folder of a saved model")
_TRUST = _Flag(
    "--trust-code", "run the code that it names, also where you have not trained or saved it on this machine"
)
_BY = _Flag("--by NAME", "rank by this one of several metrics (the first of --scoring)")
_CLASS = _Flag("--model FILE.py:NAME", "the model's class, where its file has moved; it runs that file")

_COMMANDS: Mapping[str, tuple[str, Mapping[str, tuple[str, str]], Sequence[_Flag]]] = {
    "tune": ("search hyperparameters on a table, and save the study and the model", {"file": _TABLE}, ()),
    "train": (
        "train one configuration without a search: its score in every fold, its curve, its model",
        {"file": _TABLE},
        (),
    ),
    "resume": ("go on with a search where it was stopped, from its study alone", {"study": _STUDY}, [_TRUST]),
    "trials": (
        "list the trials of a study",
        {"study": _STUDY},
        [
            _Flag(
                "--format",
                "json and csv have scores in scikit-learn's sign: greater is better",
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
        {"folder": _MODEL, "file": ("FILE", "a table with the columns of the training data")},
        [
            _Flag("--proba", "a column of probabilities for each class"),
            _Flag(
                "--interval LEVEL",
                "two more columns, _lower and _upper, between which a share of the values lies, such as 0.9",
                "number",
            ),
            _Flag(
                "--keep COL,COL",
                "columns of the file to write before the predictions, such as an id; the target is named TARGET_given",
                "names",
            ),
            _Flag("--raw", "no ' before text that a spreadsheet takes for a formula"),
            _Flag("--out FILE", "write there instead of to standard output"),
            _CLASS,
            _TRUST,
        ],
    ),
    "evaluate": (
        "score a saved model on the rows of a file that has the target's column",
        {"folder": _MODEL, "file": ("FILE", "a table with the columns of the training data and the target")},
        [
            _Flag("--scoring NAME,NAME", "scikit-learn scorer names (the usual ones of the task)", "names"),
            _Flag("--positive CLASS", "the class that f1, precision, recall, average_precision, ... are of"),
            _Flag("--format", choices=("text", "json"), default="text"),
            _CLASS,
            _TRUST,
        ],
    ),
    "repair": (
        "save what is whole in a damaged study into a new file",
        {"study": ("STUDY", f"{_STUDY[1]}; it is only read")},
        [_Flag("--out NEW", "the new file; the folder where it lies exists", required=True)],
    ),
    "report": (
        "write one page of HTML about a study, finished or running",
        {"study": _STUDY},
        [
            _Flag("--out FILE", "where the page is written (report.html)", default="report.html"),
            _Flag("--live", "write it again every few seconds, a page that reloads itself, until the search has ended"),
            _Flag("--confusion", "a confusion matrix of what the best trial predicts on its folds"),
            _Flag("--importance", "what each column is worth, by shuffling it; the best trial trains once more"),
            _BY,
            _TRUST,
        ],
    ),
    "status": (
        "look at a running search: trials by state, the best so far, the last result",
        {"study": _STUDY},
        [_Flag("--watch", "look again every two seconds, with the best curves, until it has ended")],
    ),
    "export": (
        "write a saved model as one file that runs without gputune",
        {"folder": _MODEL},
        [_Flag("--out FILE", "a new file: .onnx for ONNX, .pt2 for torch.export", required=True), _CLASS, _TRUST],
    ),
    "check": (
        "try on a device that members equal a plain loop, and how fast it trains: about a minute",
        {},
        [
            _Flag("--device D", "auto (default), cpu, cuda or cuda:1", default="auto"),
            _Flag("--json", "the table as JSON"),
        ],
    ),
}
"""Of each command its help, the files or folders that it takes, and its flags beside the options of a search."""


def _whole(least: int, other: str = "") -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}{other}, got {text!r}")
        return value

    return read


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number such as 0.5, got {text!r}") from None


def _workers(text: str) -> int | str:
    return text if text == "auto" else _whole(1, other=", or 'auto'")(text)


_READERS: dict[Takes, Callable[[str], object]] = {
    "text": str,
    "specs": str,
    "config": str,
    "number": _number,
    "0..": _whole(0),
    "1..": _whole(1),
    "names": lambda text: text.split(","),
    "scorers": lambda text: [word.strip() for word in text.split(",")] if "," in text else text,
    "workers": _workers,
}

STUDY, MODEL = "study.db", "model"
"""What the folder of a search holds."""


def model_folder(study: Path) -> Path:
    """Return where the model of a study lies: beside it, under the study's own name where that is not the usual one."""
    return study.parent / (MODEL if study.name == STUDY else f"{study.stem}.{MODEL}")


def study_file(place: str) -> Path:
    """Return the study file of a path, which may be the folder of a search."""
    path = Path(place)
    return path / STUDY if path.is_dir() else path
