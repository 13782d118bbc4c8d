"""What can be typed on the command line. Nothing heavy is imported, so that ``gputune --help`` waits for nothing.

Where ``gputune tune`` puts what it makes, and how a command finds it again.
"""

import argparse
import re
import shlex
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

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


_PYTHON_NAMES = {
    "trials": "n_trials",
    "epochs": "max_epochs",
    "seed": "random_state",
    "out": "study",
    "descend_on": "hyperparameters",
}
_OTHER_FLAGS = {"include_default": "--no-default", "verbose": "--quiet"}

_PHRASES = {
    "Give this search a path of its own": "Give this search a folder of its own, --out OTHER",
    "give this search a path of its own": "give this search a folder of its own, --out OTHER",
    "repeat the first call's arguments": "repeat the first command's options",
    "differs from this call in": "differs from this command in",
    "the same call goes on from there where study= names a file": "the same command goes on from there",
    "folds (cv, groups)": "folds (--cv, --groups)",
    "with gputune.Study.open": "with gputune trials",
}


@cache
def flags() -> dict[str, str]:
    """Return the option of ``gputune tune`` for each argument of ``gputune.tune``, and of a method, that has one."""
    options = vars(make_parser().parse_args(["tune", "FILE"])).keys() - {"command", "file"}
    return {
        _PYTHON_NAMES.get(option, option): _OTHER_FLAGS.get(option, f"--{option.replace('_', '-')}")
        for option in options
    }


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


def _add(commands: Any, name: str, text: str) -> Any:
    return commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
    )


def _add_tune(commands: Any) -> None:
    parser = _add(commands, "tune", "search hyperparameters on a table, and save the study and the model")
    parser.add_argument(
        "file", metavar="FILE", help="a .csv, .tsv or .parquet file, or sklearn:digits, :iris, ..."
    )
    parser.add_argument("--target", metavar="COL", help="the column to predict (sklearn:NAME has 'target')")
    _add_search(parser.add_argument_group("the search"))
    _add_data(parser.add_argument_group("the rows"))
    _add_machine(parser.add_argument_group("the machine, and what is written"))


def _add_search(group: Any) -> None:
    group.add_argument(
        "--model", default="mlp", metavar="M", help="mlp (default), logistic, or PATH.py:CLASS"
    )
    group.add_argument(
        "--trials",
        type=_whole(0),
        metavar="N",
        help="configurations, the default one among them (64; 8 with --method hypergradient, which trains up to 11 "
        "points for each)",
    )
    group.add_argument(
        "--no-default",
        dest="include_default",
        action="store_false",
        help="do not run the default configuration (trial 0, held to --space wherever that names a key)",
    )
    group.add_argument(
        "--epochs", type=_whole(1), default=50, metavar="E",
        help="epochs at most (50); with --method hypergradient also what the derivative looks through, so that a short "
        "training favours small rates",
    )  # fmt: skip
    group.add_argument(
        "--method", choices=["random", "halving", "median", "hypergradient"], default="random",
        help="halving: at each rung the best third goes on; median: those below the median leave; hypergradient: every "
        "drawn configuration descends on its validation loss (random)",
    )  # fmt: skip
    group.add_argument(
        "--factor",
        type=_number,
        metavar="F",
        help="with --method halving: the best 1/F go on from a rung (3)",
    )
    group.add_argument(
        "--min-epochs", type=_whole(1), metavar="E",
        help="with --method halving: epochs before the first rung (a 27th of --epochs); median: before the first "
        "decision (a tenth)",
    )  # fmt: skip
    group.add_argument(
        "--every", type=_whole(1), metavar="E",
        help="with --method median: epochs between two decisions (as many as before the first)",
    )  # fmt: skip
    group.add_argument(
        "--brackets", type=_whole(1), metavar="N",
        help="with --method halving: brackets, each with its first rung later (1)",
    )  # fmt: skip
    group.add_argument(
        "--descend-on", type=lambda text: text.split(","), metavar="KEY,KEY",
        help="with --method hypergradient: some of lr (default), momentum, weight_decay, beta1, beta2; C for the "
        "solved logistic regression",
    )  # fmt: skip
    group.add_argument(
        "--outer-steps",
        type=_whole(1),
        metavar="N",
        help="with --method hypergradient: steps of a descent (10)",
    )
    group.add_argument(
        "--segments", type=_whole(1), metavar="S",
        help="with --method hypergradient: so many values of each over the time of training (1)",
    )  # fmt: skip
    group.add_argument(
        "--per-layer", action="store_true", default=None,
        help="with --method hypergradient: values of its own for each layer",
    )  # fmt: skip
    group.add_argument(
        "--scoring",
        metavar="NAME",
        help="a scikit-learn scorer name (accuracy, or r2; with hypergradients the loss that is descended)",
    )
    group.add_argument(
        "--positive",
        metavar="CLASS",
        help="the class that f1, precision, recall, average_precision, ... are of",
    )
    group.add_argument(
        "--space", nargs="+", action="extend", default=[], metavar="KEY=SPEC",
        help="what to search: width=32,64 is a list, width=16..256 all integers between, lr=1e-4..1e-1:log is "
        "log-uniform, dropout=0..0.5 uniform, depth=3 fixed",
    )  # fmt: skip
    group.add_argument(
        "--optimizer",
        metavar="O",
        help="adamw (default), adam, sgd, nesterov, each with hd at its end to adapt its rate online; logistic: exact",
    )
    group.add_argument("--schedule", default="constant", metavar="S", help="constant (default) or cosine")
    group.add_argument(
        "--seed", type=_whole(0), default=0, metavar="S", help="of everything that is drawn (0)"
    )
    group.add_argument("--timeout", type=_number, metavar="SEC", help="stop training after so many seconds")


def _add_data(group: Any) -> None:
    group.add_argument("--task", metavar="T", help="classification or regression, where the guess is wrong")
    group.add_argument(
        "--cv", default="5", metavar="K", help="folds (5), or time:5 where rows are in order of time"
    )
    group.add_argument("--groups", metavar="COL", help="rows of one group are never split between folds")
    group.add_argument(
        "--test-size", type=_number, default=0.2, metavar="SHARE",
        help="share of the rows kept apart for one honest score (0.2); 0 uses all rows",
    )  # fmt: skip
    group.add_argument(
        "--columns", default="auto", metavar="HOW",
        help="keep: each column of numbers is one feature; drop-constant: constant ones are left out, and features say "
        "where values are missing; auto (default): keep for a class of your own",
    )  # fmt: skip
    group.add_argument(
        "--numbers", default="standard", metavar="HOW", help="scaling: standard (default), quantile or none"
    )


def _add_machine(group: Any) -> None:
    group.add_argument("--device", default="auto", metavar="D", help="auto (default), cpu, cuda or cuda:1")
    _add_backend(group, default="auto")
    group.add_argument("--dtype", default="float32", metavar="T", help="float32 (default) or float64")
    group.add_argument(
        "--tf32", action="store_true", help="let a GPU multiply matrices faster and with fewer bits"
    )
    group.add_argument(
        "--memory", metavar="8GB", help="what trials that train together may take on the device"
    )
    group.add_argument(
        "--workers", type=_workers, default="auto", metavar="N", help="processes on a CPU (auto)"
    )
    _add_ray(group)
    _add_profile(group)
    group.add_argument(
        "--out", default="gputune-out", metavar="DIR",
        help="folder for study.db and model/ (gputune-out); the same command goes on where it was stopped",
    )  # fmt: skip
    _add_checkpoints(group, default=60)
    _add_quiet(group)


def _add_resume(commands: Any) -> None:
    parser = _add(commands, "resume", "go on with a search where it was stopped, from its study alone")
    parser.add_argument("study", metavar="STUDY", help="a study.db, or the folder that holds it")
    parser.add_argument(
        "--trials", type=_whole(0), metavar="N", help="configurations in all, where there are to be more"
    )
    parser.add_argument("--timeout", type=_number, metavar="SEC", help="stop training after so many seconds")
    parser.add_argument("--device", metavar="D", help="another device; results are then equal up to rounding")
    _add_backend(parser, default=None)
    parser.add_argument("--memory", metavar="8GB", help="what new chunks of trials may take on the device")
    parser.add_argument("--workers", type=_workers, metavar="N", help="processes on a CPU")
    _add_ray(parser)
    _add_checkpoints(parser, default=None)
    _add_trust(parser)
    _add_profile(parser)
    _add_quiet(parser)


def _add_backend(group: Any, *, default: str | None) -> None:
    group.add_argument(
        "--backend", choices=("auto", "eager", "compiled", "graph"), default=default,
        help="how members train: compiled on a CPU with a C compiler, as recorded steps (graph) on a GPU, or as "
        f"operations on tensors (eager); auto chooses ({_unsaid(default)})",
    )  # fmt: skip


def _add_checkpoints(group: Any, *, default: int | None) -> None:
    group.add_argument(
        "--checkpoint-seconds", type=_number, default=default, metavar="SEC",
        help="what trains longer keeps its state in DIR/study.db.state, so that no more than this is repeated "
        f"({_unsaid(default)})",
    )  # fmt: skip


def _add_profile(group: Any) -> None:
    group.add_argument(
        "--profile", action="store_true",
        help="say at the end where the time went, and what share of the machine's matrix products the steps reached",
    )  # fmt: skip


def _unsaid(default: object) -> str:
    """What holds where nothing is said, in words; a search that goes on has it from its study."""
    return "as the search began" if default is None else str(default)


def _add_ray(group: Any) -> None:
    group.add_argument(
        "--ray", nargs="?", const="local", metavar="ADDRESS",
        help="train on a Ray cluster: local (default), auto, HOST:PORT or ray://HOST:PORT; after FILE",
    )  # fmt: skip


def _add_trust(parser: Any) -> None:
    parser.add_argument(
        "--trust-code", action="store_true",
        help="run the code that it names, also where you have not trained or saved it on this machine",
    )  # fmt: skip


def _add_quiet(group: Any) -> None:
    group.add_argument(
        "-q",
        "--quiet",
        dest="verbose",
        action="store_const",
        const=0,
        default=1,
        help="no bar and no remarks",
    )


def _add_trials(commands: Any) -> None:
    parser = _add(commands, "trials", "list the trials of a study")
    parser.add_argument("study", metavar="STUDY", help="a study.db, or the folder that holds it")
    parser.add_argument(
        "--format", choices=["table", "json", "csv"], default="table",
        help="json and csv have scores in scikit-learn's sign: greater is better",
    )  # fmt: skip


def _add_best(commands: Any) -> None:
    parser = _add(commands, "best", "show the best score of a study and its parameters")
    parser.add_argument("study", metavar="STUDY", help="a study.db, or the folder that holds it")
    parser.add_argument("--format", choices=["text", "json"], default="text")


def _add_predict(commands: Any) -> None:
    parser = _add(commands, "predict", "predict the rows of a file with a saved model, as CSV")
    parser.add_argument("model", metavar="MODEL_DIR", help="the folder of a saved model")
    parser.add_argument("file", metavar="FILE", help="a table with the columns of the training data")
    parser.add_argument("--proba", action="store_true", help="a column of probabilities for each class")
    parser.add_argument(
        "--raw", action="store_true", help="no ' before text that a spreadsheet takes for a formula"
    )
    parser.add_argument("--out", metavar="FILE", help="write there instead of to standard output")
    _add_trust(parser)


def _add_repair(commands: Any) -> None:
    parser = _add(commands, "repair", "save what is whole in a damaged study into a new file")
    parser.add_argument(
        "study", metavar="STUDY", help="a study.db, or the folder that holds it; it is only read"
    )
    parser.add_argument(
        "--out", metavar="NEW", required=True, help="the new file; the folder where it lies exists"
    )


def _add_report(commands: Any) -> None:
    parser = _add(commands, "report", "write one page of HTML about a study, finished or running")
    parser.add_argument("study", metavar="STUDY", help="a study.db, or the folder that holds it")
    parser.add_argument(
        "--out", default="report.html", metavar="FILE", help="where the page is written (report.html)"
    )


def _add_status(commands: Any) -> None:
    parser = _add(
        commands, "status", "look at a running search: trials by state, the best so far, the last result"
    )
    parser.add_argument("study", metavar="STUDY", help="a study.db, or the folder that holds it")


def _add_export(commands: Any) -> None:
    parser = _add(commands, "export", "write a saved model as one file that runs without gputune")
    parser.add_argument("model", metavar="MODEL_DIR", help="the folder of a saved model")
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


STUDY, MODEL = "study.db", "model"
"""What the folder of a search holds."""


def model_folder(study: Path) -> Path:
    """Return where the model of a study lies: beside it, under the study's own name where that is not the usual one."""
    return study.parent / (MODEL if study.name == STUDY else f"{study.stem}.{MODEL}")


def study_file(place: str) -> Path:
    """Return the study file of a path, which may be the folder of a search."""
    path = Path(place)
    return path / STUDY if path.is_dir() else path
