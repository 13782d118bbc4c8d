"""What can be typed on the command line. Nothing heavy is imported, so that ``gputune --help`` waits for nothing.

Where ``gputune tune`` puts what it makes, and how a command finds it again.
"""

import argparse
import re
import shlex
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn

from gputune.tuning.options import MACHINE, ROWS, RULES, SEARCH, Rule, Takes
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
  gputune resume gputune-out
  gputune status gputune-out
  gputune report gputune-out --out report.html
  gputune trials gputune-out --format csv
  gputune predict gputune-out/model new-houses.csv --out prices.csv
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"gputune: error: {message}\nTry '{self.prog} --help'.\n")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line; ``command`` is the name of the command."""
    parser = _Parser(
        prog="gputune",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"gputune {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_tune(commands)
    _add_resume(commands)
    _add_trials(commands)
    _add_best(commands)
    _add_predict(commands)
    _add_repair(commands)
    _add_report(commands)
    _add_status(commands)
    _add_export(commands)
    return parser


_PHRASES = {
    "Give this search a path of its own": "Give this search a folder of its own, --out OTHER",
    "give this search a path of its own": "give this search a folder of its own, --out OTHER",
    "repeat the first call's arguments": "repeat the first command's options",
    "differs from this call in": "differs from this command in",
    "the same call goes on from there where study= names a file": "the same command goes on from there",
    "folds (cv, groups)": "folds (--cv, --groups)",
    "with gputune.Study.open": "with gputune trials",
}


def flags() -> dict[str, str]:
    """Return the option of ``gputune tune`` for each argument of ``gputune.tune``, and of a method, that has one."""
    known = {name: rule.name for _, group in _groups() for name, rule in group.items()}
    return {**known, "verbose": "--quiet"}


def _groups() -> list[tuple[str, dict[str, Rule]]]:
    """Return the title and the flags of each group of the help, those of the command itself last."""
    return [
        (title, {name: rule for name, rule in RULES.items() if rule.flag and rule.group == title} | own)
        for title, own in _OWN.items()
    ]


def in_flags(text: str, *, kept: Collection[str] = ()) -> str:
    """Return what ``gputune.tune`` says in the words of the command line: arguments, but those ``kept``, as options."""
    known = flags()
    names = "|".join(name for name in known if name not in kept)
    before, change, after = text.partition("differs from this call in: ")
    if change:
        differing, end, remedy = after.partition(". Give this search")
        differing = re.sub(rf"(?:^|(?<=, ))({names})\b(?= \(|, |$)", lambda found: known[found[1]], differing)
        text = f"{before}{change}{differing}{end}{remedy}"
    for phrase, other in _PHRASES.items():
        text = text.replace(phrase, other)
    text = re.sub(
        r"\b(?:Halving|Median|Hypergradient)\((\w+)=\.\.\.\)", lambda f: known.get(f[1], f[0]), text
    )
    text = re.sub(r"\bspace\['(\w+)'\]", r"--space \1", text)
    value = r"""'[^']*'|"[^"]*"|\([^()]*\)|-?\d+(?:\.\d+)?(?:e[+-]?\d+)?\b|True|False|None|(?=[\s.,;:)]|$)"""
    text = re.sub(rf"(?<![\w'\"./-])({names})=({value})", lambda found: _option(known, *found.groups()), text)
    verbs = "must|is|are|for|has|needs|cannot|would|with|and"
    text = re.sub(rf"^({names})\b(?=:| (?:{verbs})\b)", lambda found: known[found[1]], text)
    alone = "|".join(name for name in names.split("|") if "_" in name)
    return re.sub(rf"(?<![\w'\"./-])({alone})\b(?!['\"/(=])", lambda found: known[found[1]], text)


def _option(known: dict[str, str], name: str, value: str) -> str:
    """Return ``name=value`` as it is typed; a study by the folder that holds it."""
    if value in ("", "True", "False"):
        return known[name]
    text = value[1:-1] if value[0] in "'\"" else value
    if value[0] == "(":
        text = ",".join(re.findall(r"\w+", value))
    if (name, text) == ("workers", "ray"):
        return "--ray"
    if name == "study":
        folder, here = Path(text).parent, Path.cwd()
        text = str(folder.relative_to(here) if folder.is_relative_to(here) else folder)
    return f"{known[name]} {shlex.quote(text)}"


_STUDY = ("STUDY", "a study.db, or the folder that holds it")
_MODEL_DIR = ("MODEL_DIR", "the folder of a saved model")


def _add(commands: Any, name: str, text: str, **places: tuple[str, str]) -> Any:
    """Return the parser of a command that takes files or folders, each with its name in the help and what it is."""
    about = f"{text[0].upper()}{text[1:]}."
    parser = commands.add_parser(name, help=text, description=about, allow_abbrev=False)
    for place, (metavar, help) in places.items():
        parser.add_argument(place, metavar=metavar, help=help)
    return parser


def _add_tune(commands: Any) -> None:
    file = ("FILE", "a .csv, .tsv or .parquet file, or sklearn:digits, :iris, ...")
    about = "search hyperparameters on a table, and save the study and the model"
    parser = _add(commands, "tune", about, file=file)
    for title, group in _groups():
        listed = parser.add_argument_group(title)
        for name, rule in group.items():
            _add_flag(listed, name, rule, rule.help)
    _add_quiet(listed)


def _add_resume(commands: Any) -> None:
    about = "go on with a search where it was stopped, from its study alone"
    parser = _add(commands, "resume", about, study=_STUDY)
    for _, group in _groups():
        for name, rule in group.items():
            unsaid = re.sub(r"\((auto|60)\)$", "(as the search began)", rule.help)
            if rule.resume:
                _add_flag(parser, name, rule, unsaid if rule.resume is True else rule.resume)
    _add_trust(parser)
    _add_quiet(parser)


def _add_flag(group: Any, name: str, rule: Rule, help: str) -> None:
    """Let a flag be typed; what is not said is None, and the option then has its own default."""
    metavar = rule.flag.partition(" ")[2]
    how: dict[str, Any] = {"type": _READERS[rule.takes], "metavar": metavar}
    if rule.choices is not None:
        how = {"choices": rule.choices}
    elif not metavar:
        how = {"action": "store_false" if rule.name.startswith("--no-") else "store_true"}
    elif name == "ray":
        how |= {"nargs": "?", "const": "local"}
    elif rule.takes == "specs":
        how |= {"nargs": "+", "action": "extend"}
    group.add_argument(rule.name, dest=name, default=None, help=help, **how)


def _add_trust(parser: Any) -> None:
    parser.add_argument(
        "--trust-code", action="store_true",
        help="run the code that it names, also where you have not trained or saved it on this machine",
    )  # fmt: skip


def _add_quiet(group: Any) -> None:
    how = {"dest": "verbose", "action": "store_const", "const": 0, "default": 1}
    group.add_argument("-q", "--quiet", help="no bar and no remarks", **how)


def _add_trials(commands: Any) -> None:
    parser = _add(commands, "trials", "list the trials of a study", study=_STUDY)
    parser.add_argument(
        "--format", choices=["table", "json", "csv"], default="table",
        help="json and csv have scores in scikit-learn's sign: greater is better",
    )  # fmt: skip


def _add_best(commands: Any) -> None:
    parser = _add(commands, "best", "show the best score of a study and its parameters", study=_STUDY)
    parser.add_argument("--format", choices=["text", "json"], default="text")


def _add_predict(commands: Any) -> None:
    file = ("FILE", "a table with the columns of the training data")
    about = "predict the rows of a file with a saved model, as CSV"
    parser = _add(commands, "predict", about, model=_MODEL_DIR, file=file)
    parser.add_argument("--proba", action="store_true", help="a column of probabilities for each class")
    parser.add_argument(
        "--raw", action="store_true", help="no ' before text that a spreadsheet takes for a formula"
    )
    parser.add_argument("--out", metavar="FILE", help="write there instead of to standard output")
    _add_trust(parser)


def _add_repair(commands: Any) -> None:
    study = ("STUDY", f"{_STUDY[1]}; it is only read")
    parser = _add(commands, "repair", "save what is whole in a damaged study into a new file", study=study)
    parser.add_argument(
        "--out", metavar="NEW", required=True, help="the new file; the folder where it lies exists"
    )


def _add_report(commands: Any) -> None:
    about = "write one page of HTML about a study, finished or running"
    parser = _add(commands, "report", about, study=_STUDY)
    parser.add_argument(
        "--out", default="report.html", metavar="FILE", help="where the page is written (report.html)"
    )


def _add_status(commands: Any) -> None:
    about = "look at a running search: trials by state, the best so far, the last result"
    _add(commands, "status", about, study=_STUDY)


def _add_export(commands: Any) -> None:
    about = "write a saved model as one file that runs without gputune"
    parser = _add(commands, "export", about, model=_MODEL_DIR)
    parser.add_argument(
        "--out", metavar="FILE", required=True, help="a new file: .onnx for ONNX, .pt2 for torch.export"
    )
    _add_trust(parser)


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return value

    return read


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number such as 0.5, got {text!r}") from None


def _workers(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return _whole(1)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or 'auto'") from None


_READERS: dict[Takes, Callable[[str], Any]] = {
    "text": str,
    "specs": str,
    "number": _number,
    "0..": _whole(0),
    "1..": _whole(1),
    "names": lambda text: text.split(","),
    "workers": _workers,
}

_MIN_EPOCHS = Rule(
    "--min-epochs E",
    "with --method halving: epochs before the first rung (a 27th of --epochs); median: before the first decision (a "
    "tenth)",
    "1..",
)

OF_METHODS: dict[str, dict[str, Rule]] = {
    "halving": {
        "factor": Rule("--factor F", "with --method halving: the best 1/F go on from a rung (3)", "number"),
        "min_epochs": _MIN_EPOCHS,
        "brackets": Rule(
            "--brackets N", "with --method halving: brackets, each with its first rung later (1)", "1.."
        ),
    },
    "median": {
        "min_epochs": _MIN_EPOCHS,
        "every": Rule(
            "--every E",
            "with --method median: epochs between two decisions (as many as before the first)",
            "1..",
        ),
    },
    "hypergradient": {
        "hyperparameters": Rule(
            "--descend-on KEY,KEY",
            "with --method hypergradient: some of lr (default), momentum, weight_decay, beta1, beta2; C for the "
            "solved logistic regression",
            "names",
        ),
        "outer_steps": Rule("--outer-steps N", "with --method hypergradient: steps of a descent (10)", "1.."),
        "segments": Rule(
            "--segments S",
            "with --method hypergradient: so many values of each over the time of training (1)",
            "1..",
        ),
        "per_layer": Rule("--per-layer", "with --method hypergradient: values of its own for each layer"),
    },
}
"""The options of the methods that can be typed."""

_OWN: dict[str, dict[str, Rule]] = {
    "the target and the model": {
        "target": Rule("--target COL", "the column to predict (sklearn:NAME has 'target')"),
        "model": Rule("--model M", "mlp (default), logistic, or PATH.py:CLASS"),
        "optimizer": Rule(
            "--optimizer O",
            "adamw (default), adam, sgd, nesterov, each with hd at its end to adapt its rate online; logistic: exact",
        ),
    },
    SEARCH: {name: rule for group in OF_METHODS.values() for name, rule in group.items()},
    ROWS: {
        "groups": Rule("--groups COL", "rows of one group are never split between folds"),
        "test_size": Rule(
            "--test-size SHARE",
            "share of the rows kept apart for one honest score (0.2); 0 uses all rows",
            "number",
        ),
    },
    MACHINE: {
        "study": Rule(
            "--out DIR",
            "folder for study.db and model/ (gputune-out); the same command goes on where it was stopped",
        ),
        "ray": Rule(
            "--ray ADDRESS",
            "train on a Ray cluster: local (default), auto, HOST:PORT or ray://HOST:PORT; after FILE",
            resume=True,
        ),
        "profile": Rule(
            "--profile",
            "say at the end where the time went, and what share of the machine's matrix products the steps reached",
            resume=True,
        ),
    },
}
"""What can be typed and is no option of a search, beside the file, by the title of its group."""

STUDY, MODEL = "study.db", "model"
"""What the folder of a search holds."""


def model_folder(study: Path) -> Path:
    """Return where the model of a study lies: beside it, under the study's own name where that is not the usual one."""
    return study.parent / (MODEL if study.name == STUDY else f"{study.stem}.{MODEL}")


def study_file(place: str) -> Path:
    """Return the study file of a path, which may be the folder of a search."""
    path = Path(place)
    return path / STUDY if path.is_dir() else path
