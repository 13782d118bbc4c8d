"""The commands: their help texts, their files and folders, and their options."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from gputune.cli.flags import option_groups
from gputune.ground.types import defaults_in_words
from gputune.tuning.rules import COMPUTE, DATA, MODEL, OUTPUT, SEARCH, STOPPING, Rule


@dataclass(frozen=True)
class Flag(Rule):
    """A command-line flag that sets no argument of ``gputune.tune``, such as ``--format``.

    Attributes:
        initial: The value if the flag is not typed.
        required: Whether the flag must be typed.
        short: The flag's one-letter form, such as "-q", or "" if it has none.
    """

    initial: str | None = None
    required: bool = False
    short: str = ""


@dataclass(frozen=True)
class Command:
    """A command of the command line, such as ``gputune tune``, with its help and its flags.

    Attributes:
        name: The word after ``gputune``.
        help: The help text, without a full stop.
        places: File and folder arguments: dest -> (metavar, help).
        groups: The flags by the title of their group: title -> dest -> rule.
        examples: Calls for the help.
        epilog: A function that returns the end of the long help, or None.
    """

    name: str
    help: str
    places: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    groups: Mapping[str, Mapping[str, Rule]] = field(default_factory=dict)
    examples: Sequence[str] = ()
    epilog: Callable[[], str] | None = None


_SET = Rule(
    "--set <KEY=VALUE>...",
    "Hyperparameters, such as lr=1e-3 width=64",
    default="the default of each key",
    takes="specs",
)
_QUIET = Flag("--quiet", "Print only warnings and errors", short="-q")
# options of a search that ``gputune train`` has too
_OF_TRAINING = ("max_epochs", "scoring", "positive", "random_state")
_OF_SEARCH = ("ensemble", "compare_default")  # flags of the output that ``gputune train`` lacks

_STUDY = ("STUDY", "A study file such as study.db, or its folder")
_TABLE = (
    "FILE",
    "Table (.csv, .tsv, .parquet), arrays (.npz, .npy, .pt) or sklearn:digits",
)
_FOLDER = ("MODEL_DIR", "The folder of a saved model")
_ROWS = (
    "FILE",
    "A table with the columns of the training data, or a .npz, .npy or .pt file with the same "
    "arrays",
)
_TRUST = Flag(
    "--trust-code",
    "Run the code of the module that the study or model names",
    "gputune does not remember this permission.",
)
_BY = Flag("--by <NAME>", "Metric to rank by", default="the first of --scoring")
_CLASS = Flag(
    "--module <FILE.py:NAME>",
    "The class of your module and its file",
    "This runs the file. A model of gputune needs no file.",
)


def _format(*choices: str, details: str = "") -> Flag:
    """Return the flag ``--format`` for the output of a command. The first choice is its default."""
    first = choices[0]
    return Flag("--format <NAME>", "Format", details, first, choices=choices, initial=first)


def _tuning() -> dict[str, dict[str, Rule]]:
    """Return the flags of ``gputune tune``, grouped as in its help."""
    groups = option_groups()
    groups[OUTPUT]["verbose"] = _QUIET
    return groups


def _training() -> dict[str, dict[str, Rule]]:
    """Return the flags of ``gputune train``, grouped as in its help."""
    groups = _tuning()
    training = {name: groups[SEARCH][name] for name in _OF_TRAINING}
    timeout = groups[STOPPING]["timeout"]
    groups[OUTPUT]["study"] = replace(groups[OUTPUT]["study"], default="gputune-train")
    output = {name: rule for name, rule in groups[OUTPUT].items() if name not in _OF_SEARCH}
    return {
        DATA: groups[DATA],
        MODEL: groups[MODEL],
        "Training": {
            "config_file": groups[SEARCH]["config_file"],
            "config": _SET,
            **training,
            "timeout": timeout,
        },
        COMPUTE: groups[COMPUTE],
        OUTPUT: output,
    }


def _resuming() -> dict[str, dict[str, Rule]]:
    """Return the flags of ``gputune resume``, grouped as in its help."""
    groups = {}
    for title, rules in option_groups().items():
        changeable = {name: _for_resume(rule) for name, rule in rules.items() if rule.resume}
        if changeable:
            groups[title] = changeable
    groups[COMPUTE]["wait"] = Flag(
        "--wait",
        "Wait until the study exists",
        "For a process that joins the search of another process, such as a task of a SLURM array.",
    )
    groups[OUTPUT]["verbose"] = _QUIET
    groups[OUTPUT]["module"] = _CLASS
    groups[OUTPUT]["trust_code"] = _TRUST
    return groups


def _for_resume(rule: Rule) -> Rule:
    """Return an option that ``gputune resume`` may change, with its help text for that command."""
    # A resume keeps the values of the search, so the help must not name another default.
    default = "as in the search" if rule.stored else rule.default
    if rule.resume is True:
        return replace(rule, default=default)
    return replace(rule, help=str(rule.resume), details="", default=default)


_DIRECTIONS = ("maximize", "minimize")
_LOOP_METHODS = ("random", "halving", "median", "tpe")
# the options that ``gputune search`` shares with ``gputune tune``
_OF_LOOPS = {
    SEARCH: ("n_trials", "include", "warm_start", "random_state"),
    STOPPING: (
        "timeout",
        "target_score",
        "patience_trials",
        "factor",
        "min_epochs",
        "brackets",
        "rungs",
        "keep",
        "every",
    ),
    COMPUTE: ("workers",),
    OUTPUT: ("study", "verbose", "json"),
}


def _searching() -> dict[str, dict[str, Rule]]:
    """Return the flags of ``gputune search``, grouped as in the help of ``gputune tune``."""
    groups = _tuning()
    own: dict[str, Rule] = {
        "space": Flag(
            "--space <KEY=SPEC>...",
            "Search space, with the keys that the function reads from params",
            "a=1,2,3 chooses from a list. a=1..9 samples integers, a=0..0.5 samples real numbers, "
            "and lr=1e-4..1e-1:log samples on a log scale. You may repeat the flag.",
            "required",
            takes="specs",
            required=True,
        ),
        "direction": Flag(
            "--direction <NAME>",
            "Direction of the search, maximize or minimize the function",
            default="required",
            choices=_DIRECTIONS,
            required=True,
        ),
        "method": Flag("--method <NAME>", "Search method", default="random", choices=_LOOP_METHODS),
        "max_epochs": Flag(
            "--epochs <INT>",
            "Number of report calls of a trial that is not pruned",
            "For --method halving and median.",
            takes="1..",
        ),
    }
    shared = {}
    for title, names in _OF_LOOPS.items():
        shared[title] = {name: groups[title][name] for name in names if name in groups[title]}
    shared[OUTPUT]["study"] = replace(
        shared[OUTPUT]["study"], help="Folder for study.db", default="gputune-search"
    )
    return {SEARCH: {**own, **shared.pop(SEARCH)}, **shared}


def _flags(*flags: Rule) -> dict[str, dict[str, Rule]]:
    """Return a command's flags as one group, keyed by their names as Python arguments."""
    return {"Options": {flag.name[2:].replace("-", "_"): flag for flag in flags}}


_TUNE_EXAMPLES = (
    "gputune tune sklearn:digits",
    "gputune tune houses.csv --target price --trials 100 --epochs 30",
    "gputune tune houses.csv --target price --space lr=1e-4..1e-1:log width=64,128",
    "gputune tune houses.csv --target price --method halving --timeout 600",
    "gputune tune houses.csv --target price --model net.py:Net --cv 3",
)

SHELLS = ("bash", "zsh", "fish")

_ALL = (
    Command(
        "tune",
        "Tune a model's hyperparameters on a table, and save the study and the model",
        {"file": _TABLE},
        _tuning(),
        _TUNE_EXAMPLES,
        defaults_in_words,
    ),
    Command(
        "train",
        "Train one configuration in every fold, show its scores and curve, and save its model",
        {"file": _TABLE},
        _training(),
        ("gputune train houses.csv --target price --set lr=1e-3 width=64",),
        defaults_in_words,
    ),
    Command(
        "search",
        "Tune the hyperparameters of your own training loop, a function in a Python file",
        {
            "objective": (
                "FILE.py:NAME",
                "The function objective(params, report), which returns the score of a trial",
            )
        },
        _searching(),
        ("gputune search train.py:objective --space lr=0.1,0.01 --direction minimize",),
    ),
    Command(
        "resume",
        "Continue a stopped search, using only its study",
        {"study": _STUDY},
        _resuming(),
        ("gputune resume gputune-out", "gputune resume gputune-out --trials 200"),
    ),
    Command(
        "stop",
        "End a running search, or one of its trials, from another terminal",
        {"study": _STUDY},
        _flags(
            Flag(
                "--trial <INT>",
                "Number of the only trial to end",
                "The trial is then pruned, and the search continues with the other trials.",
                "the whole search",
                "0..",
            ),
            Flag("--json", "Print the result, or the error, as one JSON document"),
        ),
        ("gputune stop gputune-out", "gputune stop gputune-out --trial 7"),
    ),
    Command(
        "trials",
        "List the trials of a study",
        {"study": _STUDY},
        _flags(
            _format(
                "table",
                "json",
                "csv",
                details="In json and csv, scores have the sign of the scikit-learn scorer (greater is better).",
            ),
            _BY,
        ),
    ),
    Command(
        "best",
        "Show the best score of a study and its parameters",
        {"study": _STUDY},
        _flags(_format("text", "json"), _BY),
    ),
    Command(
        "status",
        "Show the progress of a search: trials by state, the best so far, the last result",
        {"study": _STUDY},
        _flags(
            Flag(
                "--watch",
                "Show the progress every two seconds, with the best curves, until the search has "
                "ended",
            )
        ),
    ),
    Command(
        "report",
        "Write an HTML report on a finished or running study",
        {"study": _STUDY},
        _flags(
            Flag("--out <FILE>", "File to write", default="report.html next to the study"),
            Flag(
                "--live",
                "Write the report again every few seconds until the search has ended",
                "The page reloads itself.",
            ),
            Flag("--confusion", "Add a confusion matrix of the best trial's predictions"),
            Flag(
                "--importance",
                "Add the importance of each column, measured by shuffling its values",
                "This trains the best trial again.",
            ),
            _BY,
            _CLASS,
            _TRUST,
        ),
    ),
    Command(
        "predict",
        "Predict the targets of a file's rows with a saved model, and write them as CSV",
        {"folder": _FOLDER, "file": _ROWS},
        _flags(
            Flag("--proba", "Write a column of probabilities for each class"),
            Flag(
                "--interval <LEVEL>",
                "Add columns _lower and _upper with intervals that contain this share of the "
                "true values",
                "For example 0.9.",
                "no intervals",
                "number",
            ),
            Flag(
                "--keep <NAME,...>",
                "Columns of the file to write before the predictions, such as an id",
                "The target is named TARGET_given.",
                takes="columns",
            ),
            Flag("--raw", "Write no ' before text that a spreadsheet would read as a formula"),
            Flag("--out <FILE>", "File to write", default="standard output"),
            _CLASS,
            _TRUST,
        ),
        ("gputune predict gputune-out/model new-houses.csv --out prices.csv",),
    ),
    Command(
        "evaluate",
        "Score a saved model on the rows of a file with known targets",
        {
            "folder": _FOLDER,
            "file": (_ROWS[0], f"{_ROWS[1]}; with the target, unless --target is a file"),
        },
        _flags(
            Flag(
                "--target <NAME>",
                "Column or array with the true targets; for a .npy file, another .npy file",
                default="the target used in training",
            ),
            Flag(
                "--scoring <NAME,...>",
                "scikit-learn scorer names",
                default="the usual scorers for the task",
                takes="names",
            ),
            Flag(
                "--positive <CLASS>",
                "Positive class for f1, precision, recall, average_precision, ...",
                default="that of the search",
            ),
            Flag(
                "--missing-target <NAME>",
                "Treatment of rows with a missing target",
                default="error",
                choices=("error", "drop"),
                initial="error",
            ),
            _format("text", "json"),
            _CLASS,
            _TRUST,
        ),
        ("gputune evaluate gputune-out/model sold-houses.csv",),
    ),
    Command(
        "export",
        "Write a saved model as one file that runs without gputune",
        {"folder": _FOLDER},
        _flags(
            Flag(
                "--out <FILE>",
                "The new file: .onnx for ONNX, .pt2 for torch.export",
                required=True,
            ),
            _CLASS,
            _TRUST,
        ),
        ("gputune export gputune-out/model --out model.onnx",),
    ),
    Command(
        "check",
        "Check that results on a device equal those of a plain training loop, and measure the speed "
        "(one minute); or measure how your own module trains",
        {
            "file": (
                f"[{_TABLE[0]}]",
                f"{_TABLE[1]}, for --module; without a file, gputune uses a random table of 8 "
                "columns and 3 classes",
            )
        },
        _flags(
            Flag(
                "--module <FILE.py:NAME>",
                "Your own module, instead of the check of the device",
                "gputune prints the backend in which a long search trains the module, the reason "
                "why a faster backend does not train it, and the time of a step in each backend "
                "and in a plain PyTorch loop.",
            ),
            Flag("--target <NAME>", "Column to predict, for a FILE"),
            _SET,
            Flag(
                "--device <NAME>",
                "Device to check",
                default="auto",
                values=("auto", "cpu", "cuda", "cuda:INDEX"),
                initial="auto",
            ),
            Flag("--json", "Print the table as JSON"),
        ),
        ("gputune check --device cuda", "gputune check --module net.py:Net data.csv --target y"),
    ),
    Command(
        "repair",
        "Save the intact part of a damaged study to a new file",
        {"study": ("STUDY", f"{_STUDY[1]}; it is only read")},
        _flags(Flag("--out <FILE>", "The new file, in an existing folder", required=True)),
    ),
    Command(
        "completion",
        "Print a script that completes commands, flags and values in a shell",
        {"shell": ("SHELL", f"Shell: {', '.join(SHELLS)}")},
        examples=(
            "source <(gputune completion bash)",
            "gputune completion fish | source",
        ),
    ),
    Command(
        "help",
        "Print the help of gputune or of a command",
        {"topic": ("[COMMAND]", "Command to explain")},
    ),
)

COMMANDS: Mapping[str, Command] = {command.name: command for command in _ALL}
"""The commands by name."""
