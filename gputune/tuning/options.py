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
        takes: The kind of value: whole numbers from 0 or 1, names between commas, several KEY=SPEC,
            and so on.
        choices: The allowed words, or None.
        check: A function of a name and a value. It returns the value to use or raises InputError.
        kept: If True, a study file stores the given value, for a resume and a refit.
        resume: If True or a text, ``gputune resume`` may change the option. A text is its help text
            there.
        group: The section of the help that lists the option.
    """

    flag: str = ""
    help: str = ""
    takes: Takes = "text"
    choices: Sequence[str] | None = None
    check: Callable[[str, object], object] | None = None
    kept: bool = False
    resume: bool | str = False
    group: str = ""

    @property
    def name(self) -> str:
        """The flag without its value."""
        return self.flag.partition(" ")[0]


def _option(default: object, *rule: Any, **more: Any) -> Any:
    """Return a field of ``Options`` with a default and a rule."""
    return field(default=default, metadata={"rule": Rule(*rule, **more)})


_BACKENDS = get_args(BackendWord)

SEARCH = "the search"
ROWS = "the rows"
MACHINE = "the machine, and what is written"
_search, _rows, _machine = (partial(_option, group=group) for group in (SEARCH, ROWS, MACHINE))


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of ``tune`` as they were given, except model, optimizer, X, y and groups."""

    n_trials: int = _search(
        64,
        "--trials N",
        "configurations, the default one among them (64; 8 with --method hypergradient, which "
        "trains up to 11 points for each)",
        takes="0..",
        kept=True,
        resume="configurations in all, where there are to be more",
    )
    include: Sequence[Mapping[str, object]] = _search(
        (),
        "--include KEY=VALUE",
        "a configuration to run beside the drawn ones, filled up with defaults; once for each",
        takes="config",
    )
    include_default: bool = _search(
        True,
        "--no-default",
        "do not run the default configuration (trial 0, held to --space wherever that names a key)",
        kept=True,
    )
    warm_start: "Sequence[Study]" = _search(
        (),
        "--warm-start STUDY,...",
        "earlier studies of this space: the best five of each come first, beyond --trials",
        takes="names",
        check=checks.studies,
    )
    max_epochs: int = _search(
        50,
        "--epochs E",
        "epochs at most (50); with --method hypergradient also what the derivative looks "
        "through, so that a short training favours small rates",
        takes="1..",
        check=checks.whole,
        kept=True,
    )
    patience: int | None = _search(
        None,
        "--patience E",
        "end a trial after so many epochs without a better fold mean (all train to the end)",
        takes="1..",
        check=partial(checks.whole, none=True),
    )
    epoch: Literal["best", "last"] = _option("best", check=checks.one_of("best", "last"))
    method: "Method" = _search(
        "random",
        "--method",
        "halving: at each rung the best third goes on; median: those below the median leave; "
        "hypergradient: every drawn configuration descends on its validation loss (random)",
        choices=get_args(MethodWord),
        check=checks.method,
    )
    scoring: "Scorings | None" = _search(
        None,
        "--scoring NAME,...",
        "a scikit-learn scorer name (accuracy, or r2; with --loss mae, huber or quantile the "
        "score of that loss; with hypergradients the loss that is descended), or several, of "
        "which the first ranks the trials",
        takes="scorers",
        kept=True,
    )
    positive: object = _search(
        None,
        "--positive CLASS",
        "the class that f1, precision, recall, average_precision, ... are of",
    )
    space: object = _search(
        None,
        "--space KEY=SPEC",
        "what to search: width=32,64 is a list, width=16..256 all integers between, "
        "lr=1e-4..1e-1:log is log-uniform, dropout=0..0.5 uniform, depth=3 fixed; or a name: "
        "mlp, realmlp, realmlp-tabarena",
        takes="specs",
    )
    schedule: str = _search(
        "constant",
        "--schedule S",
        f"constant (default), {', '.join(SCHEDULES[1:])}",
        check=checks.one_of(*SCHEDULES),
    )
    random_state: int = _search(
        0, "--seed S", "of everything that is drawn (0)", takes="0..", check=checks.seed
    )
    timeout: float | None = _search(
        None,
        "--timeout SEC",
        "stop training after so many seconds",
        takes="number",
        check=partial(checks.seconds, none=True),
        resume=True,
    )
    target_score: float | None = _search(
        None,
        "--target-score S",
        "stop when a trial has this score, in scikit-learn's sign (-0.3 of neg_log_loss)",
        takes="number",
        check=checks.score,
        kept=True,
        resume=True,
    )
    patience_trials: int | None = _search(
        None,
        "--patience-trials N",
        "stop when so many trials in a row are no better than the best before them",
        takes="1..",
        check=partial(checks.whole, none=True),
        kept=True,
        resume=True,
    )

    task: "TaskWord | None" = _rows(
        None, "--task T", "classification or regression, where the guess is wrong"
    )
    missing_target: "MissingTarget" = _rows(
        "error",
        "--missing-target",
        "what to do with rows whose target is missing: error, or drop them",
        choices=("error", "drop"),
        check=checks.one_of("error", "drop"),
        kept=True,
    )
    target_transform: "TargetTransform | None" = _rows(
        None,
        "--target-transform T",
        "predict log (of numbers above 0) or log1p (above -1) of the target; scores and "
        "predictions are in its units",
        check=checks.target_transform,
    )
    cv: object = _rows(5, "--cv K", "folds (5), or time:5 where rows are in order of time")
    loss: str | Callable[..., object] | None = _rows(
        None,
        "--loss NAME",
        "training loss: mse, mae, huber or huber:DELTA, quantile or quantile:LEVEL of numbers "
        "(mae and huber rank by absolute errors, quantile by the pinball loss); cross_entropy of "
        "classes, bce of labels",
        kept=True,
    )
    training_step: Callable[..., object] | None = None
    augment: Callable[..., object] | None = None
    class_weight: "ClassWeight" = _rows(
        None,
        "--class-weight W",
        "weights in the training loss: balanced, or CLASS=WEIGHT,... (left=5,stayed=1)",
        kept=True,
    )
    sample_weight: object = None
    drop: Sequence[str] = _rows(
        (),
        "--drop COL,COL",
        "columns to leave out, such as an id",
        takes="names",
        check=checks.names,
        kept=True,
    )
    kinds: "Mapping[str, Kind] | None" = _rows(
        None,
        "--kind COL=KIND",
        "what a column is read as: category (a postal code), number or date (20200131)",
        takes="specs",
        check=checks.kinds,
        kept=True,
    )
    max_levels: int = _rows(
        32,
        "--max-levels N",
        "levels of a category, the most frequent, that have a feature each (32)",
        takes="1..",
        check=checks.whole,
        kept=True,
    )
    columns: "Columns | Literal['auto']" = _rows(
        "auto",
        "--columns HOW",
        "keep: each column of numbers is one feature; drop-constant: constant ones are left out, "
        "and features say where values are missing; auto (default): keep for a class of your own",
        check=checks.one_of("auto", "keep", "drop-constant"),
    )
    numbers: Numbers | Literal["auto"] = _rows(
        "auto",
        "--numbers HOW",
        "scaling: standard, robust (median, quartiles, a smooth clip), quantile, piecewise (16 "
        "bins between quantiles), piecewise-tree (bins that a tree makes for the target) or "
        "none; auto (default): standard for tables, none for images and sequences",
        check=checks.one_of("auto", *NUMBERS),
    )

    device: str = _machine(
        "auto",
        "--device D",
        "auto (default: GPUs for long work), cpu, cuda (all GPUs of the machine) or cuda:1",
        kept=True,
        resume="another device; results are then equal up to rounding",
    )
    backend: BackendWord = _machine(
        "auto",
        "--backend",
        "how members train: in compiled code on a CPU, in a kernel of a GPU, as recorded steps "
        "(graph), as operations on stacked tensors (eager; stacked: a module must be), or one by "
        "one (loop); auto chooses (auto)",
        choices=_BACKENDS,
        check=checks.one_of(*_BACKENDS),
        kept=True,
        resume=True,
    )
    dtype: str = _machine(
        "float32",
        "--dtype T",
        "float32 (default) or float64",
        check=checks.one_of("float32", "float64"),
        kept=True,
    )
    tf32: bool = _machine(
        False, "--tf32", "let a GPU multiply matrices faster and with fewer bits", kept=True
    )
    precision: Precision = _machine(
        "full",
        "--precision P",
        "of what a module computes while it trains: full, or bf16 for matrix products and "
        "convolutions (full)",
        choices=("full", "bf16"),
        check=checks.one_of("full", "bf16"),
        kept=True,
    )
    memory: int | str | None = _machine(
        None,
        "--memory 8GB",
        "what trials that train together may take on the device",
        check=checks.memory,
        kept=True,
        resume="what new chunks of trials may take on the device",
    )
    workers: "int | Literal['auto'] | Ray" = _machine(
        "auto",
        "--workers N",
        "processes on a CPU (auto)",
        takes="workers",
        check=checks.workers,
        kept=True,
        resume=True,
    )
    study: Path | None = _option(None, check=checks.path)
    checkpoint_seconds: float = _machine(
        60,
        "--checkpoint-seconds SEC",
        "what trains longer keeps its state in DIR/study.db.state, so that no more than this is "
        "repeated (60)",
        takes="number",
        check=checks.seconds,
        kept=True,
        resume=True,
    )
    keep_predictions: bool = _machine(
        True,
        "--no-predictions",
        "do not keep what trials predict of the rows that their folds validate on (ensembles and "
        "calibration train again without)",
        check=checks.one_of(True, False),
        kept=True,
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


RULES: Mapping[str, Rule] = {
    option.name: option.metadata.get("rule", Rule()) for option in fields(Options)
}
KEPT = tuple(name for name, rule in RULES.items() if rule.kept)
