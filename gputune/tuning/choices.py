"""What the arguments ``model`` and ``method`` mean: their words, classes, values, and how a study
file holds them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Literal

from torch import nn

from gputune.data.target import Target
from gputune.errors import InputError
from gputune.methods.descent import Hypergradient
from gputune.methods.optuna import OptunaSampler
from gputune.methods.space import recipe_of
from gputune.methods.stopping import STOPPING_RULES, StoppingRule
from gputune.models import CNN, GRU, RealMLP
from gputune.modules.construction import Builder, name_of, what_to_pass
from gputune.optimizers.classes import CLASSES, check_optimizer, optimizer_word
from gputune.population.population import ModelKind, complete
from gputune.scoring.objective import Objective
from gputune.study.module_source import class_from_file, class_source, find_class, is_builder
from gputune.text import did_you_mean
from gputune.types import OPTIMIZERS, Config, Goal, Json

SearchedModel = Literal["mlp", "logistic", "module"]

NAMED: dict[str, Builder] = {"cnn": CNN, "gru": GRU, "realmlp": RealMLP}
"""Modules of ``gputune.models`` that have a name; they are searched as any module is."""

BUILT_IN = ("mlp", "logistic")


@dataclass(frozen=True)
class ModelChoice:
    """A checked model: which space it has, which engine trains it, and how a saved model builds it
    again."""

    searched: SearchedModel
    optimizer: str
    module_class: Builder | None
    goal: Goal = ""
    """What it predicts, once that is known."""

    def of(self, target: Target, objective: Objective | None) -> "ModelChoice":
        """Return the choice for a target and a loss, which decide some defaults."""
        classes = objective is not None and objective.is_named and objective.loss == "cross_entropy"
        goal: Goal = "classes" if classes else "numbers" if target.task == "regression" else ""
        return replace(self, goal=goal)

    @cached_property
    def recipe(self) -> Config:
        """What its trials take in the place of the common defaults."""
        return recipe_of(self.module_class, self.goal)

    def defaults(self, schedule: str) -> Config:
        """Return its recipe, with the optimizer, and a ``schedule`` where that is not the constant
        one."""
        own = {} if schedule == "constant" and "schedule" in self.recipe else {"schedule": schedule}
        return {**self.recipe, **own, "optimizer": self.optimizer}

    def complete(self, params: Config, schedule: str) -> Config:
        return complete(
            {**self.defaults(schedule), **params}, optimizer=self.optimizer, schedule=schedule
        )

    @property
    def solved(self) -> bool:
        """Whether it is solved to convergence instead of trained."""
        return self.optimizer == "exact"

    @property
    def kind(self) -> ModelKind:
        """The engine's word for its stacked form."""
        return "linear" if self.searched == "logistic" else self.searched

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
    """Return the checked choice. Raises InputError for what cannot be imported, and an optimizer
    that does not fit."""
    searched, module_class = _resolve(model)
    if optimizer is None:
        return ModelChoice(searched, "exact" if searched == "logistic" else "adamw", module_class)
    name = f"optimizer for model={model!r}" if isinstance(model, str) else "optimizer"
    word = optimizer_word(optimizer, name, more=("exact",) if searched == "logistic" else ())
    check_optimizer(complete({}, optimizer=word, schedule="constant"), searched)
    return ModelChoice(searched, word, module_class)


def recorded_model(spec: Json, optimizer: str, *, trust_code: bool) -> ModelChoice:
    """Return the choice that a study stored. Raises InputError where a class has gone,
    UntrustedCodeError."""
    if optimizer not in (*OPTIMIZERS, *CLASSES, "exact"):
        why = (
            f"the study was searched with optimizer={optimizer!r}, which this gputune does not have"
        )
        raise InputError(f"{why}; open it with the version that wrote it.")
    module_class = find_class(spec, trust_code=trust_code) if spec["kind"] == "module" else None
    return ModelChoice(spec["kind"], optimizer, module_class)


def _resolve(model: object) -> tuple[SearchedModel, Builder | None]:
    if model == "mlp" or model == "logistic":
        return model, None
    if is_builder(model):
        return "module", model
    if isinstance(model, nn.Module):
        raise InputError(f"model {what_to_pass(model)}")
    words = (*BUILT_IN, *NAMED)
    meant = ""
    if isinstance(model, str):
        path, colon, name = model.rpartition(":")
        if model in NAMED or colon:
            return "module", NAMED.get(model) or class_from_file(path, name)
        meant = did_you_mean(model, words)
    kinds = (
        f"{', '.join(map(repr, words))}, a torch.nn.Module class, a function that makes modules, "
        "or 'FILE.py:NAME'"
    )
    raise InputError(f"model must be {kinds}, got {model!r}.{meant}")


Method = Literal["random"] | StoppingRule | Hypergradient | OptunaSampler

METHODS: Mapping[str, type[StoppingRule] | type[Hypergradient]] = {
    **STOPPING_RULES,
    "hypergradient": Hypergradient,
}
"""The methods that a word names; "random" is another one, without options."""


def check_method(method: object) -> Method:
    if isinstance(method, str) and method in METHODS:
        return METHODS[method]()
    if isinstance(method, StoppingRule | Hypergradient | OptunaSampler):
        return method
    if method == "random":
        return "random"
    words = "random", *METHODS
    values = *map(repr, words), *(f"gputune.{kind.__name__}(...)" for kind in METHODS.values())
    meant = did_you_mean(method, words) if isinstance(method, str) else ""
    raise InputError(
        f"method must be {', '.join(values)} or gputune.OptunaSampler(...), got {method!r}.{meant}"
    )


def check_patience(method: Method, epoch: str, *, solved: bool) -> None:
    """Raise InputError where ``patience`` has no part in a search: trials must train, and to their
    best epoch."""
    if solved:
        why = "the logistic regression solved with optimizer='exact' has no epochs"
    elif epoch == "last":
        why = "epoch='last' scores the last one"
    elif method == "random" or (isinstance(method, OptunaSampler) and method.halving is None):
        return
    else:
        why = f"method={method_name(method)!r} decides itself how long a trial trains"
    raise InputError(
        f"patience is for trials that train on from their best epoch, and {why}; leave patience "
        "out."
    )


def method_name(method: Method) -> str:
    if isinstance(method, OptunaSampler):
        return "optuna"
    return method if isinstance(method, str) else type(method).__name__.lower()


def method_to_json(method: Method) -> str | Json:
    if isinstance(method, str):
        return method
    if isinstance(method, OptunaSampler):
        halving = None if method.halving is None else asdict(method.halving)
        return {"name": "optuna", "sampler": type(method.sampler).__name__, "halving": halving}
    return {"name": method_name(method), **asdict(method)}


def method_from_json(value: str | Json) -> Method:
    """Return the method that ``method_to_json`` wrote, for a refit; a sampler has no part in
    that."""
    if isinstance(value, str):
        return check_method(value)
    if value["name"] == "optuna":
        return "random"
    return METHODS[value["name"]](**{key: option for key, option in value.items() if key != "name"})
