"""The user's rows prepared for training: target, column layout, encoded rows, folds and data."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gputune.data.arrays import ArrayLayout, Arrays, ArrayStatistics, fit_channels
from gputune.data.columns import Columns, Layout, check_copies, fit_layout
from gputune.data.dataset import (
    Dataset,
    Inputs,
    Preparations,
    Rows,
    ScorerRows,
    inputs_of,
    make_dataset,
    with_replicas,
)
from gputune.data.encode import LIMIT, Statistics, check_numbers, fit_statistics
from gputune.data.folds import Splitter, in_time_order, make_folds, parse_cv, time_remark
from gputune.data.scaling import limited_features
from gputune.data.source import Source
from gputune.data.table import quoted
from gputune.data.target import (
    Target,
    TaskWord,
    are_many_whole_numbers,
    are_soft_labels,
    check_spread,
    check_target,
    dropped_words,
    whole_numbers_words,
    with_transform,
)
from gputune.data.weights import check_weights
from gputune.engine.choice import DeviceChoice, Workload, device_for
from gputune.ground.errors import InputError, option
from gputune.ground.types import DEFAULTS, NUMBERS, TENSOR_NUMBERS, Config, Numbers
from gputune.modules.construction import build_module
from gputune.modules.inspection import returns_one_logit
from gputune.modules.own_training import (
    Horizon,
    LossOfLabels,
    OwnTraining,
    may_train_itself,
    takes_labels,
    training_of_module,
)
from gputune.modules.pretrained import pretrained_of
from gputune.population.kinds import is_module
from gputune.population.population import InputKind, Shape, module_arguments
from gputune.scoring.losses import takes_probabilities
from gputune.scoring.metrics import (
    has_function,
    loss_scoring,
    make_scoring,
    output_units,
    refuse_other_units,
    soft_label_scoring,
)
from gputune.scoring.objective import Objective
from gputune.scoring.scoring import Scoring
from gputune.spaces.distributions import CheckedSpace
from gputune.spaces.portfolios import portfolio_of
from gputune.spaces.random import draw
from gputune.spaces.space import choices_of
from gputune.study.model_files import DTYPES
from gputune.tuning.choices import NAMED, ModelChoice
from gputune.tuning.objective_choice import check_machine, choose_objective
from gputune.tuning.options import Options, SearchOptions
from gputune.tuning.session import checked_space
from gputune.tuning.trainer import Trainer

_TRIED = 8  # configurations that show whether the module's optimizer depends on its arguments


@dataclass(frozen=True, eq=False)
class Problem:
    """The model, the encoded rows and the target of a search.

    The scaling statistics are computed later, because each fold has its own.
    """

    choice: ModelChoice
    options: Options
    source: Source
    target: Target
    layout: Layout | ArrayLayout
    raw: np.ndarray | Tensor | Arrays
    columns: Columns
    numbers: Numbers
    objective: Objective | None
    # remarks for the user on a number of epochs or a patience that depends on the number of rows
    remarks_on_length: tuple[str, ...] = ()

    def device_choice(
        self, folds: Sequence[Rows], configs: Sequence[Config], *, repeats: float = 1.0
    ) -> DeviceChoice:
        """Return the device for the training, chosen by the amount of work and the device of X."""
        options = self.options
        machine = options.machine
        choice = self.choice
        if machine.tf32 and machine.device == "auto":
            return DeviceChoice(machine.device_here())  # TF32 exists only on a GPU
        parts = self.raw.parts if isinstance(self.raw, Arrays) else (self.raw,)
        work = Workload(
            kind=choice.kind,
            configs=configs or [choice.complete({}, options.training.schedule)],
            epochs=options.training.epochs,
            rows=[len(train) for train, _ in folds] * options.training.n_ens,
            repeats=repeats,
            n_outputs=self.target.n_outputs,
            n_features=self.n_features if isinstance(self.layout, Layout) else 1,
            solved=choice.solved,
            differentiated=options.search.differentiates,
            backend=machine.backend,
            dtype=DTYPES[machine.dtype],
            held_by=next((part.device for part in parts if isinstance(part, Tensor)), None),
        )
        return device_for(machine.device, work)

    def dataset(self, folds: Sequence[Rows], device: torch.device) -> Dataset:
        """Return the data of some folds on a device, scaled and ready for training.

        The dataset can also scale numeric columns in other ways, if trials search the option
        ``numbers``.
        """
        training = self.options.training
        objective = self.objective
        trains = [train for train, _ in folds]
        # The tolerance of the solver is too small for single precision.
        dtype = torch.float64 if self.choice.solved else DTYPES[self.options.machine.dtype]
        like = torch.empty(0, dtype=dtype, device=device)
        weights = check_weights(training.sample_weight, training.class_weight, self.target)
        # A custom loss or training step receives the target in its own units.
        target = replace(self.target, standardize=objective is None or objective.is_named)
        data = make_dataset(
            self.raw,
            self._statistics(trains, self.numbers),
            target,
            folds,
            weights=weights,
            like=like,
        )
        data = replace(data, numbers=self.numbers)
        if isinstance(self.layout, Layout):
            groups = self.layout.groups(self.layout.places(self.numbers))
            data = replace(
                data,
                feature_groups=groups,
                preparations=Preparations(partial(self._inputs, trains, like)),
            )
        return data.with_one_logit() if objective is not None and objective.one_logit else data

    def trainer(self, data: Dataset, **fields: Any) -> Trainer:
        """Return the trainer of the model on the rows, without a scoring unless it is passed."""
        options = self.options
        choice = self.choice
        values = {
            "seed": options.search.random_state,
            "horizon": 1 if choice.solved else options.training.epochs,
            "precision": options.machine.precision,
            **fields,
        }
        return Trainer(
            data=with_replicas(data, options.training.n_ens),
            kind=choice.kind,
            module_class=choice.module_class,
            objective=self.objective,
            **values,
        )

    def with_scorer_rows(self, data: Dataset) -> Dataset:
        """Return the dataset with the original rows, if a custom scoring function receives them."""
        if not has_function(self.options.search.scoring):
            return data
        return replace(data, scorer_rows=ScorerRows(self.source.original_rows(), self.layout))

    def _statistics(
        self, trains: Sequence[np.ndarray], numbers: Numbers
    ) -> tuple[Statistics, ...] | tuple[ArrayStatistics, ...]:
        """Compute the scaling statistics of the columns from the training rows of each fold."""
        if isinstance(self.raw, Arrays):
            return fit_channels(self.raw, trains, numbers)
        assert isinstance(self.layout, Layout)
        fit = partial(
            fit_statistics, self.raw, self.layout, numbers=numbers, target=self.target.values
        )
        return tuple(map(fit, trains))

    def _inputs(self, trains: Sequence[np.ndarray], like: Tensor, numbers: Numbers) -> Inputs:
        """Return the inputs of a table after scaling its numeric columns by the method ``numbers``.

        The scaling is computed from the training rows of each fold.
        """
        assert isinstance(self.layout, Layout) and not isinstance(self.raw, Arrays)
        groups = self.layout.groups(self.layout.places(numbers))
        return inputs_of(self.raw, self._statistics(trains, numbers), like, groups)

    def with_space(self, space: CheckedSpace, search: SearchOptions) -> "Problem":
        """Return the problem for the space of a search.

        The trials of this space may scale columns differently. Raises InputError if the rows do not
        allow one of these scalings.
        """
        ways = choices_of(space, "numbers", default=self.numbers)
        included = {str(config["numbers"]) for config in search.include if "numbers" in config}
        for way in sorted({*ways, *included} - {self.numbers}):
            if isinstance(self.raw, Arrays):
                raise InputError(
                    "space['numbers']",
                    f"can be searched only for tables, but {option('X')} is {self.layout}",
                    remedy=f"Leave the key out, and pass {option('numbers', way)} for the whole "
                    "search.",
                )
            check_numbers(way, self.raw)
        # Prepare the data in a way that some trial uses.
        numbers = self.numbers if self.numbers in ways else ways[0]
        rows = replace(self.options.rows, numbers=numbers)
        options = replace(self.options, search=search, rows=rows)
        return replace(self, numbers=numbers, options=options)

    def portfolio(self, given: Collection[str]) -> list[Config]:
        """Return the tested configurations of a named space that fit the rows and the method.

        They leave out the options ``given`` that the user chose. The list is empty for a
        hypergradient search, which cannot average weights.
        """
        space = self.options.search.space
        if not isinstance(space, str) or self.options.search.differentiates:
            return []
        ways = TENSOR_NUMBERS if isinstance(self.raw, Tensor) else NUMBERS
        configs = portfolio_of(space, self.choice.goal, without=given)
        return [config for config in configs if config.get("numbers", "standard") in ways]

    def folds(self) -> list[Rows]:
        """Return the training and validation rows of each fold.

        A scikit-learn splitter receives the rows in the form that the user passed.
        """
        cv = in_time_order(self.cv, self.source.X)
        groups = self.source.groups
        seed = self.options.search.random_state
        X = self.source.original_rows() if isinstance(cv, Splitter) else None
        if isinstance(X, Arrays):  # a splitter cannot count the rows of several inputs
            X = None if len(X.parts) > 1 else X.as_given()
        return make_folds(cv, self.target, X=X, groups=groups, seed=seed)

    @property
    def cv(self) -> object:
        """The option ``cv``, with the splitter for a text such as "time:5"."""
        cv = self.options.rows.cv
        return parse_cv(cv) if isinstance(cv, str) and cv.startswith("time:") else cv

    @property
    def has_soft_labels(self) -> bool:
        """True if the target holds a probability of each class, and the loss accepts such a
        target."""
        objective = self.objective
        if objective is None or objective.step is not None:
            return False
        return takes_probabilities(objective.loss) and are_soft_labels(self.target)

    def scoring(self) -> Scoring:
        """Return the scores by which a search ranks its trials.

        Raises InputError if the score is a function that a later process cannot import by its name.
        """
        target = self.target
        search = self.options.search
        if search.scoring is None and search.differentiates and target.task != "custom":
            return loss_scoring(target.task, target.classes, search.positive)
        scorers = search.scoring
        if self.has_soft_labels:
            scorers = soft_label_scoring(scorers)
        elif self.output_units and self.objective:
            refuse_other_units(scorers, self.objective, target)
        scoring = make_scoring(
            scorers,
            target.task,
            target.classes,
            search.positive,
            self.objective,
            n_labels=target.n_outputs,
        )
        study = self.options.machine.study
        if study is not None:
            for metric in (scoring, *scoring.others):
                _check_has_name("scoring", metric.name, study)
            _check_has_name("target_transform", repr(self.options.rows.target_transform), study)
        return scoring

    @property
    def output_units(self) -> str:
        """The units of the module's outputs that the loss expects, such as "log rates".

        The text is "" if the loss expects the units of y.
        """
        if self.objective is None or self.target.task != "regression":
            return ""
        return output_units(self.objective, self.target.n_outputs)

    @property
    def n_features(self) -> int:
        """The number of features that gputune makes of the columns of a table.

        For arrays, it is the number of inputs of the module.
        """
        if isinstance(self.layout, Layout):
            return sum(self.layout.widths(self.numbers))
        return len(self.layout.shapes)

    def default_loss(self, data: Dataset, params: Config) -> str:
        """Return "bce" if the user set no loss and the module returns one logit per row for two
        classes.

        Otherwise return "".
        """
        module = self.choice.module_class
        training = self.options.training
        has_step = self.objective is not None and self.objective.step is not None
        if module is None or training.loss is not None or has_step:
            return ""
        return "bce" if returns_one_logit(module, params, data) else ""

    def summary(self) -> str:
        """Return a line of text about the model, the number of rows and features, and the
        target."""
        layout = self.layout
        target = self.target
        is_array = isinstance(layout, ArrayLayout)
        size = f" of {layout}" if is_array else f", {self.n_features} features"
        is_guess = self.options.rows.task is None or self.source.is_task_guessed
        override = f"; {target.override}" if target.override and is_guess else ""
        rows = f"{self.choice.name} on {len(self.source.X)} rows{size}"
        return f"{rows}; target {target.name!r}: {target.in_words}{override}"

    def remarks(self) -> list[str]:
        """Return remarks for the user on the scale of the target and of array inputs, one sentence
        each."""
        target = self.target
        objective = self.objective
        remarks = list[str]()
        if objective is not None and not objective.is_named and target.task == "regression":
            values = target.values
            form = f"unscaled (mean {values.mean():.4g}, standard deviation {values.std():.4g})"
            if target.transform is not None:
                form = f"as {option('target_transform')} makes it"
            remarks.append(
                f"{objective.name} receives {target.name} {form}; a loss chosen by name receives a "
                "standardized target"
            )
        if not isinstance(self.raw, Arrays):
            is_pretrained = pretrained_of(self.choice.module_class) is not None
            if is_pretrained and self.numbers == "none":
                scaling = option("numbers", "standard")
                remarks.append(
                    "the columns are not scaled, because the base is pretrained; "
                    f"{scaling} scales by column"
                )
            return remarks
        scalable = list[str]()
        others = list[str]()
        for label, x in zip(self.raw.labels, self.raw.parts, strict=True):
            is_scalable = x.is_floating_point() or x.dtype == torch.uint8
            (scalable if is_scalable else others).append(label)
        names = ", ".join(scalable)
        if scalable and self.numbers == "none":
            scaling = option("numbers", "standard")
            remarks.append(f"not scaled: {names}; {scaling} scales by channel")
        elif scalable:
            unscaled = f"; not scaled: {', '.join(others)}" if others else ""
            remarks.append(f"scaled by channel: {names}{unscaled}")
        return remarks

    def remarks_on_target(self) -> tuple[str, ...]:
        """Return remarks for the user on the rows and the target, such as their order in time,
        dropped rows, or integers that may be classes."""
        source = self.source
        remarks = list[str]()
        if remark := time_remark(self.cv, source.X):
            remarks.append(remark)
        if source.n_dropped:
            remarks.append(dropped_words(source.n_dropped, self.target.name))
        is_guess = self.options.rows.task is None or source.is_task_guessed
        if is_guess and are_many_whole_numbers(self.target):
            remarks.append(whole_numbers_words(self.target))
        if self.has_soft_labels:
            remarks.append(
                f"{self.target.name} holds a probability of each class, so trials are ranked by "
                "the loss (neg_loss); predict returns the module's outputs, and a softmax converts "
                "the outputs to probabilities"
            )
        elif self.objective is not None and self.output_units:
            remarks.append(
                f"with the loss {self.objective.name} the outputs are {self.output_units}, and "
                "predict returns them unchanged"
            )
        return tuple(remarks)

    def remarks_on_loss(self, scoring: Scoring) -> tuple[str, ...]:
        """Return remarks for the user on the loss, one sentence each.

        The remarks name the class that a single logit predicts, and the loss that ranks the trials.
        """
        classes = self.target.classes
        objective = self.objective
        if objective is None:
            return ()
        ranks = any(metric.is_loss for metric in (scoring, *scoring.others))
        remarks = objective.remarks_on_neg_loss() if ranks else ()
        if not objective.one_logit or classes is None:
            return remarks
        negative, positive = classes.tolist()
        remark = (
            f"{self.choice.name} is trained on the loss {objective.name}: its one logit per row is "
            f"for {self.target.name} = {positive!r} against {negative!r}"
        )
        return (remark, *remarks)

    def remarks_on_limits(self, data: Dataset) -> tuple[str, ...]:
        """Return a remark for the user on columns with clipped values, or nothing.

        gputune clips numbers that are very far from the values in the training rows.
        """
        if (
            self.numbers != "standard"
            or not isinstance(self.layout, Layout)
            or isinstance(self.raw, Arrays)
        ):
            return ()
        columns = [column.name for column in self.layout.columns for _ in column.feature_names]
        statistics = [part for part in data.statistics if isinstance(part, Statistics)]
        features = limited_features(self.raw, statistics)
        names = list(dict.fromkeys(columns[feature] for feature in features))
        if not names:
            return ()
        label = "Column" if len(names) == 1 else "Columns"
        remark = (
            f"{label} {quoted(names)}: numbers beyond {LIMIT:g} standard deviations and beyond all "
            "training rows of a fold are clipped at the farther of these two limits."
        )
        return (remark,)

    @cached_property
    def columns_text(self) -> str:
        """A text for messages about shapes that lists columns with no feature or several features.

        The text is "" if every column has exactly one feature, and for inputs that are not tables.
        """
        if isinstance(self.layout, ArrayLayout):
            return ""
        widths = self.layout.widths(self.numbers)
        used = {column.name: width for column, width in zip(self.layout.columns, widths)}
        lost = [name for name in self.layout.inputs if name not in used]
        wide = [name for name, width in used.items() if width > 1]
        if not lost and not wide:
            return ""
        n_columns = len(self.layout.inputs)
        text = f" The {n_columns} columns of X became {sum(widths)} features."
        if lost:
            text += f" Left out: {quoted(lost)}."
        if wide:
            text += f" Several features each: {quoted(wide)}."
        if self.columns != "keep":
            text += " The option columns='keep' leaves numbers and booleans unchanged."
        return text


def make_problem(
    source: Source,
    task: TaskWord | None,
    choice: ModelChoice,
    options: Options,
    given: Sequence[Config] = (),
) -> Problem:
    """Check the target and the loss, choose the form of the columns, and encode the rows.

    ``given`` are configurations that train without a search.
    """
    rows = options.rows
    check_machine(choice, options.machine)
    target = check_target(source.y, task=task, n_rows=len(source.X), name=source.target)
    target = with_transform(target, rows.target_transform)
    check_spread(target)
    X = source.X
    # A custom module may rely on the number and order of the columns.
    is_own = is_module(choice.kind) and not choice.recipe
    keeps = rows.columns == "keep" or (rows.columns == "auto" and is_own)
    columns: Columns = "keep" if keeps else "drop-constant"
    # RealMLP uses robust scaling of tables, as in its paper.
    default: Numbers = "robust" if choice.recipe and not isinstance(X, Tensor) else "standard"
    if pretrained_of(choice.module_class) is not None:
        # The base was trained on inputs with the user's own scaling.
        default = "none"
    layout: Layout | ArrayLayout
    raw: np.ndarray | Tensor | Arrays
    if isinstance(X, Arrays):
        check_copies(X, rows.category_copies)
        layout = ArrayLayout.of(X)
        raw = X
        default = "none"
    else:
        layout = fit_layout(
            X, columns=columns, max_levels=rows.max_levels, copies=rows.category_copies
        )
        raw = layout.raw(X)
    numbers = default if rows.numbers == "auto" else rows.numbers
    own = own_training(choice, options, target, layout, numbers, given)
    own_step = None if own is None else own.step
    objective = choose_objective(target, choice, options.training, own_step)
    choice = choice.with_training(own).of(target, objective)
    return Problem(choice, options, source, target, layout, raw, columns, numbers, objective)


def _check_has_name(argument: str, name: str, study: Path) -> None:
    """Raise InputError for a function that a later process could not find by its name."""
    if any(part in name for part in ("<lambda>", "<locals>", "<function ")):
        raise InputError(
            f"{argument}={name!r}",
            f"has no name by which {option('study', str(study))} could find it again",
            remedy="Define it with def at the top level of a module, or leave "
            f"{option('study')} out.",
        )


def own_training(
    choice: ModelChoice,
    options: Options,
    target: Target,
    layout: Layout | ArrayLayout,
    numbers: Numbers,
    given: Sequence[Config],
) -> OwnTraining | None:
    """Return the training that the user's module defines itself, or None.

    ``given`` are configurations that train without a search. Otherwise the configurations of a few
    trials are drawn from the space.

    Raises InputError if gputune cannot train the module as it defines.
    """
    builder = choice.module_class
    if builder is None or builder in NAMED.values() or pretrained_of(builder) is not None:
        return None
    training = options.training
    needs_loss = target.task == "custom" and training.loss is None and not training.training_step
    if not needs_loss and not may_train_itself(builder):
        return None
    configs = list(given[:_TRIED])
    if not configs:
        search = options.search
        configs = draw(checked_space(choice, options), _TRIED, search.random_state)
    shape = _shape(target, layout, numbers)
    rows = len(target.values)
    horizon = Horizon(training.epochs, training.epochs * -(-rows // DEFAULTS["batch_size"]))
    found: list[tuple[Config, OwnTraining]] = []
    for config in configs:
        arguments = module_arguments(config)
        if any(arguments == tried for tried, _ in found):
            continue
        try:
            module = build_module(builder, arguments, shape, seed=0)
        except InputError:  # a later check of the module gives a better message
            continue
        own = training_of_module(module, horizon)
        if own is None:
            return _of_labels(choice.name) if needs_loss and takes_labels(module) else None
        found.append((arguments, own))
    _check_defaults(choice.name, found)
    return found[0][1] if found else None


def _of_labels(name: str) -> OwnTraining:
    """Return the training on the loss that a module computes from ``labels``."""
    return OwnTraining(
        LossOfLabels(),
        remark=f"{name} trains on the loss that it computes from its argument labels",
    )


def _shape(target: Target, layout: Layout | ArrayLayout, numbers: Numbers) -> Shape:
    """Return the sizes for which the module is built."""
    if isinstance(layout, ArrayLayout):
        inputs: list[InputKind] = []
        for row, dtype in zip(layout.shapes, layout.dtypes, strict=True):
            # Bytes are scaled to floats.
            kind = torch.float32 if dtype == "uint8" else getattr(torch, dtype)
            inputs.append((row, kind))
        first = layout.shapes[0]
        return Shape(
            n_features=first[-1] if first else 1,
            n_outputs=target.n_outputs,
            input_shape=first,
            inputs=tuple(inputs),
            names=layout.names,
        )
    n_features = sum(layout.widths(numbers))
    groups = layout.groups(layout.places(numbers))
    return Shape(n_features=n_features, n_outputs=target.n_outputs, feature_groups=groups)


def _check_defaults(name: str, found: Sequence[tuple[Config, OwnTraining]]) -> None:
    """Raise InputError if arguments of the module in the space change its optimizer.

    gputune reads the optimizer once. A trial would train with the learning rate of another trial.
    """
    for arguments, own in found[1:]:
        first_arguments, first = found[0]
        training = (own.optimizer, own.schedule, own.defaults)
        if training == (first.optimizer, first.schedule, first.defaults):
            continue
        keys = [f"module__{key}" for key in arguments if arguments[key] != first_arguments.get(key)]
        raise InputError(
            "space",
            f"has {', '.join(keys)}, which changes the optimizer in configure_optimizers of {name}. "
            "gputune takes the optimizer of all trials from one call",
            remedy="Search lr or another key of the optimizer instead.",
        )
