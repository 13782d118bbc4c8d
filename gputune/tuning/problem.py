"""What the ``model`` argument means: a built-in name, a user's class, or a class in a file.

A source made ready to train on: target, column layout, encoded rows, folds, and the data on one device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from gputune.data.arrays import ArrayLayout, Arrays, ArrayStatistics, fit_channels
from gputune.data.dataset import Dataset, Rows, make_dataset
from gputune.data.encode import Columns, Layout, Numbers, Statistics, fit_layout, fit_statistics
from gputune.data.source import Source
from gputune.data.table import quoted
from gputune.data.target import Target, check_target, with_transform
from gputune.data.weights import check_weights
from gputune.engine.choice import DeviceChoice, Work, device_for
from gputune.errors import InputError
from gputune.methods.descent import Hypergradient
from gputune.methods.recipes import recipe_of
from gputune.models import CNN, GRU, RealMLP
from gputune.modules.construction import Builder, name_of
from gputune.modules.inspection import returns_one_logit
from gputune.optimizers.classes import CLASSES, check_optimizer, optimizer_word
from gputune.population.population import ModelKind, complete
from gputune.scoring.objective import Objective, make_objective
from gputune.scoring.scoring import Scoring
from gputune.study.model_files import DTYPES
from gputune.study.module_source import class_from_file, class_source, find_class, is_builder
from gputune.text import did_you_mean
from gputune.tuning.options import Options
from gputune.types import OPTIMIZERS, Config, Goal, Json

SearchedModel = Literal["mlp", "logistic", "module"]

NAMED: dict[str, Builder] = {"cnn": CNN, "gru": GRU, "realmlp": RealMLP}
"""Modules of ``gputune.models`` that have a name; they are searched as any module is."""

BUILT_IN = ("mlp", "logistic")

_KINDS: dict[SearchedModel, ModelKind] = {"mlp": "mlp", "logistic": "linear", "module": "module"}


@dataclass(frozen=True)
class ModelChoice:
    """A checked model: which space it has, which engine trains it, and how a saved model builds it again."""

    searched: SearchedModel
    optimizer: str
    module_class: Builder | None
    goal: Goal = ""
    """What it predicts, once that is known."""

    def of(self, problem: "Problem") -> "ModelChoice":
        """Return the choice for a problem, whose target decides some defaults."""
        objective = problem.objective
        classes = objective is not None and objective.is_named and objective.loss == "cross_entropy"
        goal: Goal = "classes" if classes else "numbers" if problem.target.task == "regression" else ""
        return replace(self, goal=goal)

    @property
    def recipe(self) -> Config:
        """Return what its trials take in the place of the common defaults."""
        return recipe_of(self.module_class, self.goal)

    def defaults(self, schedule: str) -> Config:
        """Return its recipe, with the optimizer, and a ``schedule`` where that is not the constant one."""
        recipe = self.recipe
        if schedule != "constant" or "schedule" not in recipe:
            recipe["schedule"] = schedule
        return {**recipe, "optimizer": self.optimizer}

    def complete(self, params: Config, schedule: str) -> Config:
        """Return a trial's parameters with every key that training reads."""
        return complete({**self.defaults(schedule), **params}, optimizer=self.optimizer, schedule=schedule)

    @property
    def solved(self) -> bool:
        """Whether it is solved to convergence instead of trained."""
        return self.optimizer == "exact"

    @property
    def kind(self) -> ModelKind:
        """The engine's word for its stacked form."""
        return _KINDS[self.searched]

    @property
    def takes_arrays(self) -> bool:
        """Whether it takes images, sequences and several inputs, not tables alone."""
        return self.searched == "module" and self.module_class is not RealMLP

    @property
    def spec(self) -> Json:
        """What a study and a model folder store of it: plain JSON."""
        if self.module_class is None:
            return {"kind": self.searched}
        return {"kind": "module", **class_source(self.module_class)}

    @property
    def name(self) -> str:
        """What a person calls it."""
        return self.searched if self.module_class is None else name_of(self.module_class)


def choose_model(model: object, optimizer: object) -> ModelChoice:
    """Check ``model`` and ``optimizer`` and return the choice.

    Raises InputError for another model, a file or class that cannot be imported, an optimizer that does not fit.
    """
    searched, module_class = _resolve(model)
    if optimizer is None:
        return ModelChoice(searched, "exact" if searched == "logistic" else "adamw", module_class)
    more = ("exact",) if searched == "logistic" else ()
    name = f"optimizer for model={model!r}" if isinstance(model, str) else "optimizer"
    word = optimizer_word(optimizer, name, more=more)
    check_optimizer(complete({}, optimizer=word, schedule="constant"), searched)
    return ModelChoice(searched, word, module_class)


def recorded_model(spec: Json, optimizer: str, *, trust_code: bool) -> ModelChoice:
    """Return the choice that a study stored.

    Raises InputError where a user's class is gone or has changed, or for an optimizer that there is not;
    UntrustedCodeError where code is not trusted.
    """
    if optimizer not in (*OPTIMIZERS, *CLASSES, "exact"):
        raise InputError(
            f"the study was searched with optimizer={optimizer!r}, which this gputune does not have; open it with the "
            "version that wrote it."
        )
    module_class = find_class(spec, trust_code=trust_code) if spec["kind"] == "module" else None
    return ModelChoice(spec["kind"], optimizer, module_class)


def _resolve(model: object) -> tuple[SearchedModel, Builder | None]:
    if model == "mlp" or model == "logistic":
        return model, None
    if isinstance(model, str) and model in NAMED:
        return "module", NAMED[model]
    if isinstance(model, str) and ":" in model:
        path, _, name = model.rpartition(":")
        return "module", class_from_file(path, name)
    if is_builder(model):
        return "module", model
    if isinstance(model, nn.Module):
        raise InputError(
            "model must be the class, not an instance, since every trial builds its own: pass "
            f"{type(model).__name__}."
        )
    raise InputError(
        f"model must be {', '.join(map(repr, (*BUILT_IN, *NAMED)))}, a torch.nn.Module class, a function that makes "
        f"modules, or 'FILE.py:NAME', got {model!r}."
        f"{did_you_mean(model, (*BUILT_IN, *NAMED)) if isinstance(model, str) else ''}"
    )


@dataclass(frozen=True, eq=False)
class Problem:
    """Rows and target of a source, encoded; statistics are not fitted yet, since they belong to folds."""

    source: Source
    target: Target
    layout: Layout | ArrayLayout
    raw: np.ndarray | Tensor | Arrays
    columns: Columns = "drop-constant"
    numbers: Numbers = "standard"
    objective: Objective | None = None

    def device_choice(
        self,
        folds: Sequence[Rows],
        options: Options,
        choice: ModelChoice,
        configs: Sequence[Config],
        *,
        repeats: float = 1.0,
    ) -> DeviceChoice:
        """Return the device on which configurations train, with X in hand."""
        if options.tf32 and options.device == "auto":
            return DeviceChoice(options.device_here())  # TF32 is a GPU's
        parts = self.raw.parts if isinstance(self.raw, Arrays) else (self.raw,)
        place = next((part.device for part in parts if isinstance(part, Tensor)), None)
        work = Work(
            kind=choice.kind,
            configs=configs or [choice.complete({}, options.schedule)],
            rows=[len(train) for train, _ in folds],
            n_features=self.n_features if isinstance(self.layout, Layout) else 1,
            n_outputs=self.target.n_outputs,
            epochs=options.max_epochs,
            repeats=repeats,
            solved=choice.solved,
            differentiated=isinstance(options.method, Hypergradient),
            backend=options.backend,
            dtype=DTYPES[options.dtype],
            held_by=place,
        )
        return device_for(options.device, work)

    def dataset(
        self, folds: Sequence[Rows], options: Options, choice: ModelChoice, device: torch.device
    ) -> tuple[Dataset, tuple[Statistics, ...] | tuple[ArrayStatistics, ...]]:
        """Return the data of some folds on a device, and the statistics of each fold."""
        # The solver's tolerance lies beyond single precision.
        dtype = torch.float64 if choice.solved else DTYPES[options.dtype]
        weights = check_weights(options.sample_weight, options.class_weight, self.target)
        statistics = self._statistics([train for train, _ in folds])
        data = make_dataset(
            self.raw,
            statistics,
            self.target,
            folds,
            weights=weights,
            like=torch.empty(0, dtype=dtype, device=device),
            standardise=self.objective is None or self.objective.is_named,
        )
        if isinstance(self.layout, Layout):
            data = replace(data, feature_groups=self.layout.groups(self.layout.places(self.numbers)))
        one_logit = self.objective is not None and self.objective.one_logit
        return data.with_one_logit() if one_logit else data, statistics

    def _statistics(
        self, trains: Sequence[np.ndarray]
    ) -> tuple[Statistics, ...] | tuple[ArrayStatistics, ...]:
        if isinstance(self.raw, Arrays):
            return fit_channels(self.raw, trains, self.numbers)
        assert isinstance(self.layout, Layout)
        fit = partial(fit_statistics, self.raw, self.layout, numbers=self.numbers, target=self.target.values)
        return tuple(map(fit, trains))

    @property
    def n_features(self) -> int:
        """Numbers that a row of a table becomes; inputs where X is arrays."""
        layout = self.layout
        return sum(layout.widths(self.numbers)) if isinstance(layout, Layout) else len(layout.shapes)

    def in_words(self) -> str:
        """Say how many rows of what there are."""
        layout = self.layout
        what = f" of {layout}" if isinstance(layout, ArrayLayout) else f", {self.n_features} features"
        return f"{len(self.source.X)} rows{what}"

    def remarks_on_scaling(self) -> tuple[str, ...]:
        """Return which inputs that are no table are scaled, and which are taken as they are, a sentence."""
        if not isinstance(self.raw, Arrays):
            return ()
        parts = dict(zip(self.raw.labels, self.raw.parts, strict=True))
        can = [label for label, x in parts.items() if x.is_floating_point() or x.dtype == torch.uint8]
        if not can:
            return ()
        if self.numbers == "none":
            return (f"not scaled: {', '.join(can)}; numbers='standard' scales by channel",)
        rest = ", ".join(label for label in parts if label not in can)
        return (f"scaled by channel: {', '.join(can)}{f'; not scaled: {rest}' if rest else ''}",)

    def columns_in_words(self) -> str:
        """Say which columns are no feature, or several, for messages about shapes; "" where there are none."""
        if isinstance(self.layout, ArrayLayout):
            return ""
        used = dict(zip((c.name for c in self.layout.columns), self.layout.widths(self.numbers)))
        lost = [name for name in self.layout.inputs if name not in used]
        wide = [name for name, features in used.items() if features > 1]
        named = ((lost, "left out"), (wide, "several features each"))
        parts = [f"{quoted(names)} {what}" for names, what in named if names]
        if not parts:
            return ""
        remedy = "" if self.columns == "keep" else "; columns 'keep' leaves numbers and booleans as they are"
        return (
            f" Of the {len(self.layout.inputs)} columns of X, which are {sum(used.values())} features, "
            f"{' and '.join(parts)}{remedy}."
        )


def make_problem(source: Source, task: Any, choice: ModelChoice, options: Options) -> Problem:
    """Check the target and the loss, fix the column layout and encode the rows.

    ``columns`` "auto" is "keep" for a user's module, which may count on their number and order; ``numbers`` "auto" is
    "standard" for a table, "none" for arrays.
    """
    if options.precision == "bf16" and choice.kind != "module":
        raise InputError(
            f"precision='bf16' is for a module of your own, and model={choice.name!r} trains in full precision: pass a "
            "module, for example model=gputune.models.MLP, or leave it out."
        )
    if options.backend == "loop" and choice.kind != "module":
        raise InputError(
            f"backend='loop' trains the members of a user's module one by one, and the model is {choice.name!r}; "
            "choose backend='auto', or 'eager'."
        )
    target = check_target(source.y, task=task, n_rows=len(source.X), name=source.target)
    target = with_transform(target, options.target_transform)
    objective = _objective(target, choice, options)
    columns, word = options.columns, options.numbers
    keeps = columns == "keep" or (columns == "auto" and choice.kind == "module" and not choice.recipe)
    how: Columns = "keep" if keeps else "drop-constant"
    if isinstance(source.X, Arrays):
        numbers: Numbers = "none" if word == "auto" else word
        return Problem(source, target, ArrayLayout.of(source.X), source.X, how, numbers, objective)
    layout = fit_layout(source.X, columns=how, max_levels=options.max_levels)
    default: Numbers = "robust" if choice.recipe and not isinstance(source.X, Tensor) else "standard"
    numbers = default if word == "auto" else word
    return Problem(source, target, layout, layout.raw(source.X), how, numbers, objective)


def _objective(target: Target, choice: ModelChoice, options: Options) -> Objective | None:
    """Return what a module is trained on, None for a built-in model, whose loss is that of its task."""
    if choice.kind == "module":
        return make_objective(options.loss, options.training_step, options.augment, target.task)
    if target.values.ndim > 1 or target.task == "custom":
        raise InputError(
            f"model={choice.name!r} predicts one class or one number a row, and {target.name} has shape "
            f"{target.values.shape}: pass a module, for example model=gputune.models.MLP, which takes n_outputs."
        )
    if choice.solved and target.task == "regression":
        raise InputError(
            "model='logistic' solved with optimizer='exact' predicts classes, and the target is a number: choose "
            "model='mlp', or optimizer='adamw' for a linear regression."
        )
    for name in ("loss", "training_step", "augment"):
        if getattr(options, name) is not None:
            raise InputError(
                f"{name} is for a module of your own, and model={choice.name!r} trains on its task's loss: pass a "
                "module, for example model=gputune.models.MLP, or leave it out."
            )
    return None


def default_loss(data: Dataset, choice: ModelChoice, options: Options, params: Config) -> str:
    """Return "bce" where no loss is given and the module returns one logit a row of two classes, else ""."""
    if choice.module_class is None or options.loss is not None or options.training_step is not None:
        return ""
    return "bce" if returns_one_logit(choice.module_class, params, data) else ""


def remarks_on_loss(problem: Problem, choice: ModelChoice, scoring: Scoring) -> tuple[str, ...]:
    """Return what the user should know of the loss, a sentence each: of which class one logit is, what ranks."""
    classes, objective = problem.target.classes, problem.objective
    if objective is None:
        return ()
    ranks = any(one.is_loss for one in (scoring, *scoring.others))
    of_values = objective.remarks_on_neg_loss() if ranks else ()
    if not objective.one_logit or classes is None:
        return of_values
    other, positive = classes.tolist()
    return (
        f"{choice.name} is trained on the loss {objective.name}: its one logit a row is of "
        f"{problem.target.name} = {positive!r} against {other!r}",
        *of_values,
    )
