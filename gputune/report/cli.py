"""The command line: what can be typed, and how it ends (0 done, 1 failed, 2 bad input or usage, 130 interrupted).

Everything heavy is imported inside the commands, so that ``gputune --help`` waits for nothing.
"""

import argparse
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from gputune.errors import DivergedError, InputError, SearchFailedError
from gputune.version import __version__

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

_EXAMPLES = """\
examples:
  gputune tune sklearn:digits
  gputune tune houses.csv --target price --trials 100 --epochs 30
  gputune tune houses.csv --target price --space lr=1e-4..1e-1:log width=64,128 dropout=0..0.5
  gputune tune houses.csv --target price --model net.py:Net --space module__hidden=16..256:log
  gputune trials gputune-out --format csv
  gputune predict gputune-out/model new-houses.csv --out prices.csv
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; what it has to say goes to standard output, the rest to standard error."""
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding lacks must not end a search in an error.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as ending:
        return int(ending.code or 0)
    with _warnings_in_words():
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    try:
        return _write(arguments.command(arguments))
    except KeyboardInterrupt as stop:
        _say(str(stop) or "interrupted.")
        return INTERRUPTED
    except (InputError, FileNotFoundError) as error:
        _say(f"error: {_in_words(error)}")
        return BAD_INPUT
    except (SearchFailedError, DivergedError, OSError) as error:
        _say(f"error: {_in_words(error)}")
        return FAILED
    except Exception:  # a bug: whoever reports it needs the traceback
        traceback.print_exc()
        return FAILED


def _tune(arguments: argparse.Namespace) -> str:
    from gputune.report.tuning import tune

    return tune(arguments)


def _trials(arguments: argparse.Namespace) -> str:
    from gputune.report import trials

    study = _open(arguments.study)
    if arguments.format == "json":
        return trials.trials_json(study)
    if arguments.format == "csv":
        return trials.trials_csv(study)
    return trials.trials_table(study, width=shutil.get_terminal_size().columns)


def _best(arguments: argparse.Namespace) -> str:
    from gputune.report import trials

    study = _open(arguments.study)
    return trials.best_json(study) if arguments.format == "json" else trials.best_text(study)


def _predict(arguments: argparse.Namespace) -> str:
    from gputune.report.predicting import predictions_csv, write_new

    text = predictions_csv(arguments.model, arguments.file, proba=arguments.proba)
    if arguments.out is None:
        return text
    write_new(text, arguments.out, source=arguments.file)
    return ""


def _open(place: str) -> Any:
    """Return the study of a file, or of the folder that ``gputune tune`` made."""
    from gputune.study.study import Study

    path = Path(place)
    return Study.open(path / "study.db" if path.is_dir() else path)


def _write(text: str) -> int:
    """Print the outcome. Whoever stops reading, as ``head`` does, ends the command quietly."""
    from gputune.report.text import clean

    if sys.stdout.isatty():
        text = clean(text, keep="\n")
    try:
        print(text, end="\n" if text else "", flush=True)
    except BrokenPipeError:
        # Python would flush once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return DONE


def _say(text: str) -> None:
    from gputune.report.text import clean

    print(f"gputune: {clean(text)}", file=sys.stderr)


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.strerror}: {error.filename!r}"
    return str(error)


@contextmanager
def _warnings_in_words() -> Iterator[None]:
    """Show a warning that is meant for the user as one line, once, instead of as a line of our code."""
    said = set()
    shown_otherwise = warnings.showwarning

    def show(message: Any, category: Any, *place: Any, **more: Any) -> None:
        if not issubclass(category, UserWarning):
            shown_otherwise(message, category, *place, **more)
        elif str(message) not in said:
            said.add(str(message))
            _say(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"gputune: error: {message}\nTry '{self.prog} --help'.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gputune",
        description="Tune an MLP, a logistic regression or your own torch module: every configuration and every "
        "fold trains at the same time, as one tensor program.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"gputune {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_tune(commands)
    _add_trials(commands)
    _add_best(commands)
    _add_predict(commands)
    return parser


def _add(commands: Any, name: str, run: Callable[[argparse.Namespace], str], text: str) -> Any:
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(command=run)
    return parser


def _add_tune(commands: Any) -> None:
    parser = _add(
        commands, "tune", _tune, "search hyperparameters on a table, and save the study and the model"
    )
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
        default=64,
        metavar="N",
        help="configurations to draw, beside the default one (64)",
    )
    group.add_argument("--epochs", type=_whole(1), default=50, metavar="E", help="epochs at most (50)")
    group.add_argument("--scoring", metavar="NAME", help="a scikit-learn scorer name (accuracy, or r2)")
    group.add_argument(
        "--space", nargs="+", action="extend", default=[], metavar="KEY=SPEC",
        help="what to search: width=32,64 is a list, width=16..256 all integers between, lr=1e-4..1e-1:log is "
        "log-uniform, dropout=0..0.5 uniform, depth=3 fixed",
    )  # fmt: skip
    group.add_argument(
        "--optimizer", metavar="O", help="adamw (default), adam, sgd, nesterov; logistic: exact"
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
        "--numbers", default="standard", metavar="HOW", help="scaling: standard (default), quantile or none"
    )


def _add_machine(group: Any) -> None:
    group.add_argument("--device", default="auto", metavar="D", help="auto (default), cpu, cuda or cuda:1")
    group.add_argument("--dtype", default="float32", metavar="T", help="float32 (default) or float64")
    group.add_argument(
        "--memory", metavar="8GB", help="what trials that train together may take on the device"
    )
    group.add_argument(
        "--workers", type=_workers, default="auto", metavar="N", help="processes on a CPU (auto)"
    )
    group.add_argument(
        "--out", default="gputune-out", metavar="DIR",
        help="folder for study.db and model/ (gputune-out); the same command goes on where it was stopped",
    )  # fmt: skip
    loudness = group.add_mutually_exclusive_group()
    loudness.add_argument(
        "-q",
        "--quiet",
        dest="verbose",
        action="store_const",
        const=0,
        default=1,
        help="no bar and no remarks",
    )
    loudness.add_argument("-v", "--verbose", action="store_const", const=2, help="say the plan too")


def _add_trials(commands: Any) -> None:
    parser = _add(commands, "trials", _trials, "list the trials of a study")
    parser.add_argument("study", metavar="STUDY", help="a study.db, or the folder that holds it")
    parser.add_argument(
        "--format", choices=["table", "json", "csv"], default="table",
        help="json and csv have scores in scikit-learn's sign: greater is better",
    )  # fmt: skip


def _add_best(commands: Any) -> None:
    parser = _add(commands, "best", _best, "show the best score of a study and its parameters")
    parser.add_argument("study", metavar="STUDY", help="a study.db, or the folder that holds it")
    parser.add_argument("--format", choices=["text", "json"], default="text")


def _add_predict(commands: Any) -> None:
    parser = _add(commands, "predict", _predict, "predict the rows of a file with a saved model, as CSV")
    parser.add_argument("model", metavar="MODEL_DIR", help="the folder of a saved model")
    parser.add_argument("file", metavar="FILE", help="a table with the columns of the training data")
    parser.add_argument("--proba", action="store_true", help="a column of probabilities for each class")
    parser.add_argument("--out", metavar="FILE", help="write there instead of to standard output")


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
