"""The options of a search, each with its rule.

A rule says how an option is checked, whether a study file stores it, and how it is typed on the
command line. The checks import slow modules only when they run, because ``gputune --help`` reads
this file and must not wait for torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from gputune.tuning import checks
from gputune.types import NUMBERS, SCHEDULES, BackendWord, MethodWord, Numbers, Precision

if TYPE_CHECKING:
    import torch

    from gputune.callbacks import Callback
    from gputune.data.columns import Columns
    from gputune.data.kinds import Kind
    from gputune.data.missing_target import MissingTarget
    from gputune.data.target import TaskWord
    from gputune.data.target_transform import TargetTransform
    from gputune.data.weights import ClassWeight
    from gputune.executors.ray_cluster import Ray
    from gputune.scoring.metrics import Scorings
    from gputune.study.study import Study
    from gputune.tuning.choices import Method

Takes = Literal[
    "text", "number", "0..", "1..", "names", "scorers", "specs", "config", "workers", "yes or no"
]


@dataclass(frozen=True)
class Rule:
    """The rule of an option, or of anything else on the command line.

    Attributes:
        flag: The flag on the command line. "--epochs E" takes a value, "--tf32" takes none. "" for
            an option that the command line lacks.
        help: The help text.
        takes: The kind of value: integers from 0 or 1, names separated by commas, several KEY=SPEC,
            and so on.
        choices: The allowed strings, or None.
        check: A function of a name and a value. It returns the value to use or raises InputError.
        stored: If True, a study file stores the given value, for a resume and a refit.
        resume: If True or a text, ``gputune resume`` may change the option. A text is its help text
            there.
        group: The section of the help that lists the option.
    """

    flag: str = ""
    help: str = ""
    takes: Takes = "text"
    choices: Sequence[str] | None = None
    check: Callable[[str, object], object] | None = None
    stored: bool = False
    resume: bool | str = False
    group: str = ""

    @property
    def name(self) -> str:
        """The flag without its value."""
        return self.flag.partition(" ")[0]


def _option(default: object, *rule: Any, **settings: Any) -> Any:
    """Return a field of ``Options`` with a default and a rule."""
    return field(default=default, metadata={"rule": Rule(*rule, **settings)})


_BACKENDS = get_args(BackendWord)

SEARCH = "the search"
ROWS = "the rows"
MACHINE = "the machine and the output"
_search = partial(_option, group=SEARCH)
_rows = partial(_option, group=ROWS)
_machine = partial(_option, group=MACHINE)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of ``tune`` as they were given, except model, optimizer, X, y and groups."""

    n_trials: int = _search(
        64,
        "--trials N",
        "number of configurations, including the default one [default: 64; 8 with --method "
        "hypergradient, which trains up to 11 points for each]",
        takes="0..",
        stored=True,
        resume="total number of configurations, to add more",
    )
    include: Sequence[Mapping[str, object]] = _search(
        (),
        "--include KEY=VALUE",
        "a configuration to run in addition to the drawn ones, completed with defaults; repeat the "
        "flag for more",
        takes="config",
    )
    include_default: bool = _search(
        True,
        "--no-default",
        "do not run the default configuration (trial 0, moved into the ranges of --space)",
        stored=True,
    )
    warm_start: "Sequence[Study]" = _search(
        (),
        "--warm-start STUDY,...",
        "earlier studies of this space: the five best trials of each run first, in addition to "
        "--trials",
        takes="names",
        check=checks.studies,
    )
    max_epochs: int = _search(
        50,
        "--epochs E",
        "largest number of epochs; with --method hypergradient the derivative spans them, so that "
        "a short training favors small rates [default: 50]",
        takes="1..",
        check=checks.count,
        stored=True,
    )
    patience: int | None = _search(
        None,
        "--patience E",
        "end a trial after E epochs without a better mean validation score [default: all train to "
        "the end]",
        takes="1..",
        check=partial(checks.count, none=True),
    )
    epoch: Literal["best", "last"] = _option("best", check=checks.one_of("best", "last"))
    method: "Method" = _search(
        "random",
        "--method",
        "halving: the best third continues at each rung; median: trials below the median stop; "
        "hypergradient: each drawn configuration follows the gradient of its validation loss "
        "[default: random]",
        choices=get_args(MethodWord),
        check=checks.method,
    )
    scoring: "Scorings | None" = _search(
        None,
        "--scoring NAME,...",
        "a scikit-learn scorer name, or several: the first one ranks the trials [default: "
        "accuracy or r2; with --loss mae, huber or quantile the score of that loss; with "
        "hypergradients the minimized loss]",
        takes="scorers",
        stored=True,
    )
    positive: object = _search(
        None,
        "--positive CLASS",
        "the positive class for f1, precision, recall, average_precision, ...",
    )
    space: object = _search(
        None,
        "--space KEY=SPEC",
        "search space: width=32,64 is a list, width=16..256 all integers in this range, "
        "lr=1e-4..1e-1:log is log-uniform, dropout=0..0.5 uniform, depth=3 fixed; or a name: "
        "mlp, realmlp, realmlp-tabarena",
        takes="specs",
    )
    schedule: str = _search(
        "constant",
        "--schedule S",
        f"schedule of the learning rate: {', '.join(SCHEDULES)} [default: constant]",
        check=checks.one_of(*SCHEDULES),
    )
    random_state: int = _search(
        0, "--seed S", "random seed [default: 0]", takes="0..", check=checks.seed
    )
    timeout: float | None = _search(
        None,
        "--timeout SEC",
        "stop training after SEC seconds",
        takes="number",
        check=partial(checks.seconds, none=True),
        resume=True,
    )
    target_score: float | None = _search(
        None,
        "--target-score S",
        "stop when a trial has this score, in scikit-learn's sign (-0.3 for neg_log_loss)",
        takes="number",
        check=checks.score,
        stored=True,
        resume=True,
    )
    patience_trials: int | None = _search(
        None,
        "--patience-trials N",
        "stop when N trials in a row are no better than the best trial before them",
        takes="1..",
        check=partial(checks.count, none=True),
        stored=True,
        resume=True,
    )

    task: "TaskWord | None" = _rows(
        None, "--task T", "classification or regression, if gputune's guess is wrong"
    )
    missing_target: "MissingTarget" = _rows(
        "error",
        "--missing-target",
        "treatment of rows with a missing target: error, or drop them [default: error]",
        choices=("error", "drop"),
        check=checks.one_of("error", "drop"),
        stored=True,
    )
    target_transform: "TargetTransform | None" = _rows(
        None,
        "--target-transform T",
        "predict log (of numbers above 0) or log1p (above -1) of the target; scores and "
        "predictions are in the units of the target",
        check=checks.target_transform,
    )
    cv: object = _rows(
        5, "--cv K", "number of folds, or time:5 for rows in order of time [default: 5]"
    )
    loss: str | Callable[..., object] | None = _rows(
        None,
        "--loss NAME",
        "training loss: mse, mae, huber or huber:DELTA, quantile or quantile:LEVEL for numbers "
        "(mae and huber rank by absolute errors, quantile by the pinball loss); cross_entropy for "
        "classes, bce for labels",
        stored=True,
    )
    training_step: Callable[..., object] | None = None
    augment: Callable[..., object] | None = None
    class_weight: "ClassWeight" = _rows(
        None,
        "--class-weight W",
        "weights in the training loss: balanced, or CLASS=WEIGHT,... (left=5,stayed=1)",
        stored=True,
    )
    sample_weight: object = None
    drop: Sequence[str] = _rows(
        (),
        "--drop COL,COL",
        "columns to leave out, such as an id",
        takes="names",
        check=checks.names,
        stored=True,
    )
    kinds: "Mapping[str, Kind] | None" = _rows(
        None,
        "--kind COL=KIND",
        "kind of a column: category (a postal code), number or date (20200131)",
        takes="specs",
        check=checks.kinds,
        stored=True,
    )
    max_levels: int = _rows(
        32,
        "--max-levels N",
        "number of levels of a category (the most frequent ones) with a feature each [default: 32]",
        takes="1..",
        check=checks.count,
        stored=True,
    )
    columns: "Columns | Literal['auto']" = _rows(
        "auto",
        "--columns HOW",
        "keep: each numeric column is one feature; drop-constant: leave out constant columns, and "
        "add features that mark missing values; auto: keep for your own class [default: auto]",
        check=checks.one_of("auto", "keep", "drop-constant"),
    )
    numbers: Numbers | Literal["auto"] = _rows(
        "auto",
        "--numbers HOW",
        "scaling: standard, robust (median, quartiles, a smooth clip), quantile, piecewise (16 "
        "bins between quantiles), piecewise-tree (bins of a decision tree on the target) or none; "
        "auto: standard for tables, none for images and sequences [default: auto]",
        check=checks.one_of("auto", *NUMBERS),
    )

    device: str = _machine(
        "auto",
        "--device D",
        "auto (GPUs for long work), cpu, cuda (all GPUs of the machine) or cuda:1 [default: auto]",
        stored=True,
        resume="a different device; results are then equal up to rounding",
    )
    backend: BackendWord = _machine(
        "auto",
        "--backend",
        "training of members: compiled code on a CPU, a kernel on a GPU, recorded steps (graph), "
        "operations on stacked tensors (eager; stacked requires them for a module), or one member "
        "after another (loop) [default: auto]",
        choices=_BACKENDS,
        check=checks.one_of(*_BACKENDS),
        stored=True,
        resume=True,
    )
    dtype: str = _machine(
        "float32",
        "--dtype T",
        "float32 or float64 [default: float32]",
        check=checks.one_of("float32", "float64"),
        stored=True,
    )
    tf32: bool = _machine(
        False, "--tf32", "let a GPU multiply matrices faster and with fewer bits", stored=True
    )
    precision: Precision = _machine(
        "full",
        "--precision P",
        "precision of a module in training: full, or bf16 for matrix products and convolutions "
        "[default: full]",
        choices=("full", "bf16"),
        check=checks.one_of("full", "bf16"),
        stored=True,
    )
    memory: int | str | None = _machine(
        None,
        "--memory 8GB",
        "memory of the device for trials that train together",
        check=checks.memory,
        stored=True,
        resume="memory of the device for new chunks of trials",
    )
    workers: "int | Literal['auto'] | Ray" = _machine(
        "auto",
        "--workers N",
        "number of processes on a CPU [default: auto]",
        takes="workers",
        check=checks.workers,
        stored=True,
        resume=True,
    )
    study: Path | None = _option(None, check=checks.path)
    checkpoint_seconds: float = _machine(
        60,
        "--checkpoint-seconds SEC",
        "interval of the checkpoints in DIR/study.db.state; a killed search repeats at most this "
        "time [default: 60]",
        takes="number",
        check=checks.seconds,
        stored=True,
        resume=True,
    )
    keep_predictions: bool = _machine(
        True,
        "--no-predictions",
        "do not store the predictions of validation rows; ensembles and calibration then train "
        "trials again",
        check=checks.one_of(True, False),
        stored=True,
        resume=True,
    )
    callbacks: "tuple[Callback, ...]" = _option((), check=checks.callbacks)
    verbose: int = _option(1, check=checks.verbosity)

    def __post_init__(self) -> None:
        for name, rule in RULES.items():
            if rule.check is not None:
                # The dataclass is frozen, so this replaces a given value by the checked value.
                object.__setattr__(self, name, rule.check(name, getattr(self, name)))
        if self.is_on_cluster:
            from gputune.executors.ray_cluster import check_ray

            check_ray(self.device)
        device = self.device_here()
        if self.tf32 is not False or self.precision != "full":
            from gputune.engine.backend import check_precision, check_tf32
            from gputune.methods.descent import Hypergradient

            check_tf32(self.tf32, self.dtype, self.workers, device)
            check_precision(
                self.precision, self.dtype, device, descends=isinstance(self.method, Hypergradient)
            )

    @property
    def is_on_cluster(self) -> bool:
        """True if a Ray cluster trains."""
        from gputune.executors.ray_cluster import Ray

        return isinstance(self.workers, Ray)

    def device_here(self) -> "torch.device":
        """Return the device of this process.

        For a search on a cluster, ``device`` is the device of the tasks. This process then uses any
        available device.
        """
        from gputune.engine.backend import choose_device

        return choose_device("auto" if self.is_on_cluster else self.device)


def make_options(**values: Any) -> Options:
    """Return the options of a search, made from unchecked values."""
    return Options(**values)


RULES: Mapping[str, Rule] = {
    option.name: option.metadata.get("rule", Rule()) for option in fields(Options)
}
STORED = tuple(name for name, rule in RULES.items() if rule.stored)
