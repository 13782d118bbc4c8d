"""Checks of the argument ``model``, and its conversion to and from a study file."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from torch import nn

from gputune.data.target import Target
from gputune.ground.errors import InputError, option, per_interface, warn
from gputune.ground.text import did_you_mean
from gputune.ground.types import OPTIMIZERS, Config, Goal, Json
from gputune.models import CNN, GRU, RealMLP
from gputune.modules.construction import Builder, name_of, refuse_transformers_class, what_to_pass
from gputune.modules.own_training import OwnTraining
from gputune.modules.pretrained import adapters_of
from gputune.optimizers.classes import CLASSES, check_optimizer, optimizer_word
from gputune.population.kinds import ModelKind
from gputune.population.population import complete
from gputune.scoring.objective import Objective
from gputune.spaces.space import recipe_of
from gputune.study.code import class_from_file, class_source, find_class, is_builder, is_changed

SearchedModel = Literal["mlp", "logistic", "module"]

NAMED: dict[str, Builder] = {"cnn": CNN, "gru": GRU, "realmlp": RealMLP}
"""Names of modules of ``gputune.models``. A search treats them like any other module."""

BUILT_IN = ("mlp", "logistic")


@dataclass(frozen=True)
class ModelChoice:
    """The model and the optimizer of a search, after their check.

    They determine the default space, the engine that trains the model, and the way a saved model is
    built again.
    """

    searched: SearchedModel
    optimizer: str
    module_class: Builder | None
    goal: Goal = ""
    """The kind of target that the model predicts: "classes", "numbers" (regression) or "" (other,
    or not known yet)."""
    recorded_spec: Json | None = field(default=None, compare=False)
    """The description of the model in the study from which it was read, or None."""
    is_optimizer_open: bool = field(default=False, compare=False)
    """True if a module may choose its own optimizer, because the user has named none."""
    own_defaults: Config = field(default_factory=dict, compare=False)
    """The hyperparameters of the optimizer that the module itself defines."""
    own_remark: str = field(default="", compare=False)
    """A remark for the user on the parts of the module's own training that gputune uses."""

    def of(self, target: Target, objective: Objective | None) -> "ModelChoice":
        """Return the model choice for a target and a loss, because some default values depend on
        them."""
        classes = objective is not None and objective.is_named and objective.loss == "cross_entropy"
        goal: Goal = "classes" if classes else "numbers" if target.task == "regression" else ""
        return replace(self, goal=goal)

    def with_training(self, training: OwnTraining | None) -> "ModelChoice":
        """Return the model choice with the training that the module itself defines.

        If the user has named another optimizer, only the schedule of the module is left.
        """
        if training is None:
            return self
        optimizer = self.optimizer
        if training.optimizer and self.is_optimizer_open:
            optimizer = training.optimizer
        defaults = dict(training.defaults) if optimizer == training.optimizer else {}
        if training.schedule:
            defaults["schedule"] = training.schedule
        return replace(
            self,
            optimizer=optimizer,
            is_optimizer_open=False,
            own_defaults=defaults,
            own_remark=training.remark,
        )

    @cached_property
    def recipe(self) -> Config:
        """The default hyperparameters of this model, which replace gputune's common defaults."""
        return recipe_of(self.module_class, self.goal)

    def defaults(self, schedule: str, params: Mapping[str, object] = ({})) -> Config:
        """Return the default hyperparameters of the model, with the optimizer and the schedule.

        ``params`` are the hyperparameters of a trial. The default rank of a LoRA depends on them.
        The argument ``schedule="constant"`` does not replace a schedule among the model's defaults.
        """
        defaults = {**self.recipe, **self.own_defaults, "optimizer": self.optimizer}
        adapters = adapters_of(self.module_class)
        if adapters is not None:
            defaults |= adapters.defaults(params)
        if schedule != "constant" or "schedule" not in defaults:
            defaults["schedule"] = schedule
        return defaults

    def complete(self, params: Config, schedule: str) -> Config:
        """Return the hyperparameters of a trial, with default values for all missing keys."""
        return complete(
            {**self.defaults(schedule, params), **params},
            optimizer=self.optimizer,
            schedule=schedule,
        )

    @property
    def solved(self) -> bool:
        """True if a solver computes the model's optimum directly, without training steps."""
        return self.optimizer == "exact"

    @property
    def kind(self) -> ModelKind:
        """The name of the model in gputune's engine: "linear", "mlp" or "module"."""
        return "linear" if self.searched == "logistic" else self.searched

    @property
    def takes_arrays(self) -> bool:
        """True if the model accepts images, sequences and several inputs in addition to tables."""
        return self.searched == "module" and self.module_class is not RealMLP

    @property
    def spec(self) -> Json:
        """The description of the model that studies and model folders store, as plain JSON."""
        if self.recorded_spec is not None:
            return self.recorded_spec
        if self.module_class is None:
            return {"kind": self.searched}
        return {"kind": "module", **class_source(self.module_class)}

    @property
    def name(self) -> str:
        """The name of the model, as messages show it:

        "mlp", "logistic" or the name of the module.
        """
        return self.searched if self.module_class is None else name_of(self.module_class)


def choose_model(model: object, optimizer: object) -> ModelChoice:
    """Return the ``ModelChoice`` for the user's arguments ``model`` and ``optimizer``.

    Raises InputError for a model that cannot be imported, and for an optimizer that does not fit
    the model.
    """
    searched, module_class = _resolve(model)
    if optimizer is None:
        default = "exact" if searched == "logistic" else "adamw"
        return ModelChoice(searched, default, module_class, is_optimizer_open=True)
    argument = "optimizer"
    if isinstance(model, str):
        argument = f"{option('optimizer')} for {option('model', model)}"
    name = optimizer_word(optimizer, argument, more=("exact",) if searched == "logistic" else ())
    check_optimizer(complete({}, optimizer=name, schedule="constant"), searched)
    return ModelChoice(searched, name, module_class)


def recorded_model(
    spec: Json,
    optimizer: str,
    *,
    script: str | None = None,
    module: Builder | None = None,
    trust_code: bool = False,
) -> ModelChoice:
    """Return the model and the optimizer that a study has stored.

    ``script`` is the path of the script that defined the module class, if a script did. ``module``
    is the class, if the user names it.

    Raises InputError if a class no longer exists, and UntrustedCodeError for code that neither the
    program nor the user has named. Warns if the code has changed.
    """
    if optimizer not in (*OPTIMIZERS, *CLASSES, "exact"):
        raise InputError(
            None,
            f"The study was searched with {option('optimizer', optimizer)}, which this version of "
            "gputune does not have",
            remedy="Open the study with the version of gputune that wrote it.",
        )
    if spec["kind"] != "module":
        return ModelChoice(spec["kind"], optimizer, None)
    if module is None:
        place = spec if script is None else {**spec, "file": script}
        module = find_class(place, trust_code=trust_code)
    if is_changed(module, spec):
        warn(
            f"The code of {name_of(module)} has changed since the search began, so the scores of "
            "the study may belong to other code."
        )
    # The class may have another place in this program. The search keeps the name.
    return ModelChoice("module", optimizer, module, recorded_spec=spec)


def _resolve(model: object) -> tuple[SearchedModel, Builder | None]:
    """Return "mlp", "logistic" or "module" for the argument ``model``.

    For a module, also return its class or function. Raises InputError for an unknown model.
    """
    if model == "mlp" or model == "logistic":
        return model, None
    if is_builder(model):
        return "module", model
    if isinstance(model, nn.Module):
        raise InputError("model", what_to_pass(model))
    refuse_transformers_class(model)
    names = (*BUILT_IN, *NAMED)
    suggestion = ""
    if isinstance(model, str):
        path, colon, name = model.rpartition(":")
        if model in NAMED or colon:
            return "module", NAMED.get(model) or class_from_file(path, name)
        suggestion = did_you_mean(model, names).strip()
        if model == "auto":
            suggestion = f"Or also pass {option('preset', 'best')}, which chooses the model."
    others = per_interface(
        "a torch.nn.Module class, a function that makes modules, or 'FILE.py:NAME'",
        "or FILE.py:NAME",
    )
    rule = f"must be {', '.join(map(repr, names))}, {others}"
    raise InputError("model", rule, got=model, remedy=suggestion)
