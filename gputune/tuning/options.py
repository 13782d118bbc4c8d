"""The options of a search in four groups, each with its default value, check and help text.

The checks import slow modules only when they run, because ``gputune --help`` reads this file and
must not wait for torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

from gputune.ground.types import NUMBERS, SCHEDULES, MethodWord, Numbers
from gputune.tuning import checks
from gputune.tuning.machine_options import MachineOptions
from gputune.tuning.rules import DATA, MODEL, SEARCH, STOPPING, OptionGroup, Rule, option_field

if TYPE_CHECKING:
    from gputune.data.columns import Columns
    from gputune.data.kinds import Kind
    from gputune.data.target import MissingTarget, TaskWord
    from gputune.data.target_transform import TargetTransform
    from gputune.data.weights import ClassWeight
    from gputune.scoring.metrics import Scorings
    from gputune.study.study import Study
    from gputune.tuning.method import Method


_data = partial(option_field, group=DATA)
_model = partial(option_field, group=MODEL)
_search = partial(option_field, group=SEARCH)
_stopping = partial(option_field, group=STOPPING)


@dataclass(frozen=True, kw_only=True)
class SearchOptions(OptionGroup):
    """The options on the search space, the trials, their scores, and the end of the search."""

    n_trials: int = _search(
        64,
        "--trials <INT>",
        "Number of configurations",
        "The default configuration is one of these trials. With --method hypergradient the "
        "default is 8, and gputune trains up to 11 points for each configuration.",
        "64",
        takes="0..",
        stored=True,
        resume="Total number of configurations; a larger number adds configurations",
    )
    include: Sequence[Mapping[str, object]] = _search(
        (),
        "--include <KEY=VALUE>...",
        "A configuration to run in addition to the random configurations",
        "Hyperparameters that you leave out have their default values. Repeat the flag for more "
        "configurations.",
        takes="config",
    )
    include_default: bool = _search(
        True,
        "--no-default",
        "Do not run the default configuration",
        "Without this flag it is trial 0, with its values moved into the ranges of --space.",
        "run it",
        stored=True,
    )
    warm_start: "Sequence[Study]" = _search(
        (),
        "--warm-start <STUDY,...>",
        "Earlier studies whose best trials in this space run first",
        "gputune runs the best five trials of each study, in addition to --trials.",
        takes="names",
        check=checks.studies,
    )
    method: "Method" = _search(
        "random",
        "--method <NAME>",
        "Search method",
        default="random",
        choices=get_args(MethodWord),
        check=checks.method,
    )
    scoring: "Scorings | None" = _search(
        None,
        "--scoring <NAME,...>",
        "scikit-learn scorers",
        "The first scorer ranks the trials. With --loss mae, huber or quantile, the default is the "
        "score of that loss. With --method hypergradient, it is the minimized loss.",
        "accuracy or r2",
        takes="scorers",
        stored=True,
    )
    positive: object = _search(
        None,
        "--positive <CLASS>",
        "Positive class for f1, precision, recall, average_precision, ...",
    )
    space: object = _search(
        None,
        "--space <KEY=SPEC>...",
        "Search space",
        "width=32,64 chooses from a list. width=16..256 samples integers, dropout=0..0.5 samples "
        "real numbers, and lr=1e-4..1e-1:log samples on a log scale. depth=3 fixes the value. "
        "A name, such as mlp, selects one of gputune's own spaces. The default space is at the end "
        "of this help. You may repeat the flag.",
        "the space of the model",
        takes="specs",
        values=("KEY=SPEC", "mlp", "realmlp", "realmlp-large", "realmlp-tabarena"),
    )
    random_state: int = _search(
        0, "--seed <INT>", "Random seed", default="0", takes="0..", check=checks.seed
    )
    timeout: float | None = _stopping(
        None,
        "--timeout <TIME>",
        "Stop training after this time",
        "A number of seconds, or a time such as 60s, 5m or 1h30m. auto: until the SLURM job ends.",
        takes="duration",
        check=checks.duration,
        resume=True,
        aliases=("--budget",),
    )
    target_score: float | None = _stopping(
        None,
        "--target-score <NUMBER>",
        "Stop when a trial reaches this score",
        "Scores have the sign of the scikit-learn scorer, such as -0.3 for neg_log_loss.",
        takes="number",
        check=checks.score,
        stored=True,
        resume=True,
    )
    patience_trials: int | None = _stopping(
        None,
        "--patience-trials <INT>",
        "Stop after this number of trials in a row without a better score",
        takes="1..",
        check=partial(checks.count, none=True),
        stored=True,
        resume=True,
    )

    @property
    def samples_first(self) -> bool:
        """True if all trials are sampled before the first one trains."""
        return self.method.samples_first

    @property
    def differentiates(self) -> bool:
        """True if the search method needs derivatives of the training."""
        return self.method.differentiates


@dataclass(frozen=True, kw_only=True)
class RowOptions(OptionGroup):
    """The options on the rows of the data and their division into folds."""

    task: "TaskWord | None" = _data(
        None,
        "--task <NAME>",
        "Task, if gputune's guess from the target is wrong",
        default="guessed",
        values=("classification", "regression"),
    )
    missing_target: "MissingTarget" = _data(
        "error",
        "--missing-target <NAME>",
        "What to do with rows that have a missing target",
        default="error",
        choices=("error", "drop"),
        check=checks.one_of("error", "drop"),
        stored=True,
    )
    target_transform: "TargetTransform | None" = _data(
        None,
        "--target-transform <NAME>",
        "Transform of the target before training",
        "log needs numbers above 0, log1p numbers above -1. Scores and predictions are in the "
        "units of the target.",
        values=("log", "log1p"),
        check=checks.target_transform,
    )
    cv: object = _data(
        5,
        "--cv <FOLDS>",
        "Number of folds, or time:INT",
        "time:5 makes five folds in the order of the date column, or of the rows.",
        "5",
        values=("an integer from 2", "time:INT"),
    )
    drop: Sequence[str] = _data(
        (),
        "--drop <NAME,...>",
        "Columns to leave out, such as an id",
        takes="columns",
        check=checks.names,
        stored=True,
    )
    kinds: "Mapping[str, Kind] | None" = _data(
        None,
        "--kind <COLUMN=KIND>...",
        "Kinds of columns that gputune guesses wrongly",
        "For example zip=category for a postal code, or day=date for 20200131.",
        "guessed",
        takes="specs",
        values=("category", "number", "date"),
        check=checks.kinds,
        stored=True,
    )
    max_levels: int = _data(
        32,
        "--max-levels <INT>",
        "Maximum number of levels of a categorical column that get their own feature",
        "The most frequent levels get one each. The others share one feature.",
        "32",
        takes="1..",
        check=checks.count,
        stored=True,
    )
    category_copies: Sequence[str] = _data(
        (),
        "--category-copies <NAME,...>",
        "Columns of numbers that are also categories, in addition to their number",
        "Values with at least 10 rows (or 1% of the rows, if that is less) get a feature each. "
        "Use it for numbers that are like names, such as codes. --preset finds such columns, and "
        "--category-copies '' turns this off.",
        takes="names",
        check=checks.names,
        stored=True,
    )
    columns: "Columns | Literal['auto']" = _data(
        "auto",
        "--columns <NAME>",
        "How to prepare the columns",
        "keep: each numeric column is one feature. drop-constant: leave out constant columns, and "
        "add features that mark missing values. auto: keep for your own module, drop-constant "
        "otherwise.",
        "auto",
        values=("auto", "keep", "drop-constant"),
        check=checks.one_of("auto", "keep", "drop-constant"),
    )
    numbers: Numbers | Literal["auto"] = _data(
        "auto",
        "--numbers <NAME>",
        "Scaling of numeric columns",
        "robust: median, quartiles and a smooth clip. piecewise: 16 bins between quantiles. "
        "piecewise-tree: bins of a decision tree on the target. auto: standard for tables, none "
        "for images, sequences and a pretrained base.",
        "auto",
        values=("auto", *NUMBERS),
        check=checks.one_of("auto", *NUMBERS),
    )


DEFAULT_EPOCHS = 50
"""The default of ``max_epochs``, except for large tables (``pipeline.py``)."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(OptionGroup):
    """The options on the training of one configuration, such as epochs and loss."""

    @property
    def epochs(self) -> int:
        """The maximum number of epochs, in a search that has replaced "auto"."""
        return DEFAULT_EPOCHS if self.max_epochs == "auto" else self.max_epochs

    @property
    def patience_epochs(self) -> int | None:
        """The patience in epochs, or None, in a search that has replaced "auto"."""
        return None if self.patience == "auto" else self.patience

    max_epochs: int | Literal["auto"] = _search(
        "auto",
        "--epochs <INT>",
        "Maximum number of epochs",
        "With --method hypergradient the derivative spans all epochs, so a short training run "
        "favors small learning rates. Above 50,000 rows, mlp, realmlp and logistic train for 50 "
        "epochs x 50,000 / rows, at least 10.",
        "50 or fewer",
        takes="1..",
        check=partial(checks.count, auto=True),
        stored=True,
    )
    patience: int | Literal["auto"] | None = _stopping(
        "auto",
        "--patience <INT>",
        "Stop a trial after this number of epochs without a better score",
        "The score is the mean over the folds. Above 50,000 rows, the default of mlp and logistic "
        "without a schedule is a quarter of the epochs, at least 3.",
        "all train to the end",
        takes="1..",
        check=partial(checks.count, none=True, auto=True),
    )
    epoch: Literal["best", "last"] = option_field("best", check=checks.one_of("best", "last"))
    n_ens: int = _model(
        1,
        "--n-ens <INT>",
        "Number of networks that each trial trains per fold and averages",
        "The networks of a trial have different initial weights and orders of the rows. The trial's "
        "score is the score of their mean prediction. Only for the models mlp and realmlp.",
        "1",
        takes="1..",
        check=checks.count,
        stored=True,
    )
    schedule: str = _model(
        "constant",
        "--schedule <NAME>",
        "Schedule of the learning rate",
        default="constant",
        values=SCHEDULES,
        check=checks.one_of(*SCHEDULES),
    )
    loss: str | Callable[..., object] | None = _model(
        None,
        "--loss <NAME>",
        "Training loss",
        "mse, mae, huber and quantile are for numeric targets, cross_entropy is for classes, and "
        "bce is for labels. mae and huber rank trials by absolute errors, quantile by the pinball loss.",
        "the usual loss for the task",
        values=(
            "mse",
            "mae",
            "huber",
            "huber:DELTA",
            "quantile",
            "quantile:LEVEL",
            "cross_entropy",
            "bce",
        ),
        stored=True,
    )
    training_step: Callable[..., object] | None = None
    augment: Callable[..., object] | None = None
    class_weight: "ClassWeight" = _model(
        None,
        "--class-weight <WEIGHTS>",
        "Weights of the classes in the training loss",
        values=("balanced", "CLASS=WEIGHT,... such as left=5,stayed=1"),
        stored=True,
    )
    sample_weight: object = None


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of ``tune`` except model, optimizer, X, y and groups, in four groups."""

    search: SearchOptions
    rows: RowOptions
    training: TrainingOptions
    machine: MachineOptions

    def __post_init__(self) -> None:
        machine = self.machine
        if machine.precision != "full":
            from gputune.engine.backend import check_precision

            descends = self.search.differentiates
            device = machine.device_here()
            check_precision(machine.precision, machine.dtype, device, descends=descends)

    def values(self) -> dict[str, Any]:
        """Return a dict from the name of each option to its value."""
        return {name: value for group in vars(self).values() for name, value in vars(group).items()}

    def changed(self, **values: object) -> "Options":
        """Return a copy of the options in which some values are replaced and checked."""
        return make_options(**{**self.values(), **values})


def make_options(**values: Any) -> Options:
    """Check option values, and return them as ``Options``.

    Options that are not passed get their default values.
    """
    groups: dict[str, Any] = {}
    for name, kind in GROUPS.items():
        keys = {option.name for option in fields(kind)} & values.keys()
        groups[name] = kind(**{key: values.pop(key) for key in keys})
    return Options(**groups, **values)


GROUPS: Mapping[str, type[OptionGroup]] = {
    "search": SearchOptions,
    "rows": RowOptions,
    "training": TrainingOptions,
    "machine": MachineOptions,
}
RULES: Mapping[str, Rule] = {
    option.name: option.metadata.get("rule", Rule())
    for kind in GROUPS.values()
    for option in fields(kind)
}
STORED = tuple(name for name, rule in RULES.items() if rule.stored)
