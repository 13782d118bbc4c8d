"""The interface of a search method, and the table of all methods.

A search method is a subclass of ``Method`` in a file of ``gputune/methods/``. The file usually has
the name by which users choose the method. Other code asks a method for its properties and never for its
class.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, get_args

from gputune.ground.errors import InputError, option
from gputune.ground.text import did_you_mean
from gputune.ground.types import Config, Json, MethodWord
from gputune.tuning.rules import Rule

# The modules that define these classes import this one. The types are therefore not imported here,
# and a method writes them out in its own signatures.
Context: TypeAlias = Any  # gputune.tuning.context.Context
Session: TypeAlias = Any  # gputune.tuning.session.Session
Trainer: TypeAlias = Any  # gputune.tuning.trainer.Trainer
Plan: TypeAlias = Any  # gputune.engine.plan.Plan
Module: TypeAlias = Any  # torch.nn.Module

if TYPE_CHECKING:
    from gputune.executors.worker import PruningRule
    from gputune.spaces.config import ConfigCheck
    from gputune.spaces.distributions import CheckedSpace
    from gputune.study.store import Candidate
    from gputune.study.study import Study


class Method:
    """Base class of all search methods.

    A subclass is a frozen dataclass whose fields are the options of the method. It defines at least
    ``name`` and ``run``. The other members have a default that fits a method which trains every
    trial to its end.

    Attributes:
        name: The name of the method in arguments and in study files. It is also the name of the
            file in ``gputune/methods/``.
        flags: The flags of the command line for the options, keyed by the name of the option.
        help: What the method does, for the help of ``--method``: one sentence without a full stop,
            or "" if the help does not describe the method.
        samples_first: True if all trials are sampled before the first one trains.
        differentiates: True if the method needs derivatives of the training.
        compares_trials: True if the method compares trials while they train. Such trials train
            together from one comparison to the next.
        shares_trials: True if several processes can train trials of one study at the same time.
        ends_single_trials: True if ``gputune stop --trial`` can end one trial of a search.
        about_length: Why trials of a method with ``decides_length`` cannot end by themselves, for
            messages that begin with the name of the method.
        lacks: The part of the method that a study file cannot store, in words, or "".
    """

    name: ClassVar[str] = ""
    flags: ClassVar[Mapping[str, Rule]] = {}
    help: ClassVar[str] = ""
    samples_first: ClassVar[bool] = True
    differentiates: ClassVar[bool] = False
    shares_trials: ClassVar[bool] = False
    ends_single_trials: ClassVar[bool] = True
    about_length: ClassVar[str] = "decides how long a trial trains"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.__dict__.get("name"):
            _CLASSES[cls.name] = cls

    @property
    def compares_trials(self) -> bool:
        return False

    @property
    def lacks(self) -> str:
        return ""

    @property
    def decides_length(self) -> bool:
        """True if the method decides for how many epochs each trial trains."""
        return self.compares_trials or self.differentiates

    @property
    def trainings_per_trial(self) -> int:
        """The largest number of trainings that follow from one sampled configuration."""
        return 1

    def check_space(self, space: "CheckedSpace") -> None:
        """Raise InputError if the method cannot search the space."""

    def check(self, context: Context, space: "CheckedSpace", trials: "Sequence[Candidate]") -> None:
        """Raise InputError if the method cannot search these trials, before anything is trained or
        stored."""

    def run(self, context: Context, space: "CheckedSpace") -> None:
        """Train the trials of the study, and add further trials if the method proposes them."""
        raise NotImplementedError

    def run_loop(
        self,
        session: Session,
        space: "CheckedSpace",
        train: Callable[[], bool],
        check: "ConfigCheck",
    ) -> None:
        """Train the trials of a custom training loop.

        Args:
            session: The running search.
            space: The search space.
            train: A function that trains all waiting trials, and returns whether the search
                continues.
            check: A function that checks a proposed configuration.
        """
        train()

    def pruning_rule(self, max_epochs: int | None) -> "PruningRule | None":
        """Return the rule that ends the trials of a custom training loop early, or None.

        Raises InputError if the method cannot search over a custom training loop.
        """
        return None

    def plan(self, context: Context, configs: Sequence[Config]) -> Plan:
        """Return the plan that ``gputune tune --dry-run`` shows for these configurations."""
        plan = context.plan(configs, epochs=context.epochs)
        if not self.compares_trials:
            # Reorders the chunks so that a first result comes soon, as in the search.
            plan = plan.answering_early(context.data.n_folds)
        return plan

    def complete(self, config: Config) -> Config:
        """Return a complete configuration, with additional values that the method needs."""
        return config

    def retrain(self, trainer: Trainer, config: Config, epochs: int) -> Module | None:
        """Train one configuration again on data with one fold, and return the module.

        None means that the configuration trains in the ordinary way.
        """
        return None

    def to_json(self) -> str | Json:
        """Return the method as plain JSON for the study file."""
        return {"name": self.name, **asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, options: Json) -> "Method":
        """Return the method of a study file, from its options without the name."""
        return cls(**options)

    @classmethod
    def summary(cls, study: "Study") -> list[tuple[str, str]]:
        """Return labels and lines about the method for the closing text of ``gputune tune``."""
        return []


_CLASSES: dict[str, type[Method]] = {}
_FILES = {"random": "stopping", "tpe": "optuna"}
"""The files of methods without a file of their name."""


def method_class(name: str) -> type[Method]:
    """Return the class of a search method by its name in a study file or an argument."""
    if name not in _CLASSES:
        import_module(f"gputune.methods.{_FILES.get(name, name)}")
    return _CLASSES[name]


def method_classes() -> dict[str, type[Method]]:
    """Return the classes of all search methods that users can choose by name, in the order of the
    help."""
    return {name: method_class(name) for name in get_args(MethodWord)}


def check_method(method: object) -> Method:
    """Return the search method for the argument ``method``, which is a name or an object with
    options.

    Raises InputError for an unknown method.
    """
    if isinstance(method, Method):
        return method
    names = get_args(MethodWord)
    if isinstance(method, str) and method in names:
        return method_class(method)()
    objects = [
        f"gputune.{kind.__name__}(...)" for name, kind in method_classes().items() if kind.flags
    ]
    values = ", ".join([*map(repr, names), *objects])
    suggestion = did_you_mean(method, names).strip() if isinstance(method, str) else ""
    if type(method).__module__.startswith("optuna."):
        suggestion = "Wrap a sampler of Optuna: method=gputune.OptunaSampler(sampler)."
    rule = f"must be {values} or gputune.OptunaSampler(...)"
    raise InputError("method", rule, got=method, remedy=suggestion)


def method_from_json(value: str | Json) -> Method:
    """Return the search method that a study file describes."""
    if isinstance(value, str):
        return check_method(value)
    options = {key: option for key, option in value.items() if key != "name"}
    return method_class(value["name"]).from_json(options)


def why_no_patience(method: Method, epoch: str, *, solved: bool) -> str:
    """Return the reason why the option ``patience`` has no effect in a search, as a clause, or "".

    ``patience`` needs trials that train epoch by epoch and are scored at their best epoch. The
    method must not decide itself how long a trial trains.
    """
    if solved:
        solver = option("optimizer", "exact")
        return f"the logistic regression solved with {solver} has no epochs"
    if epoch == "last":
        return f"{option('epoch', 'last')} scores the last epoch"
    if method.decides_length:
        return f"{option('method', method.name)} {method.about_length}"
    return ""


def check_patience(method: Method, epoch: str, *, solved: bool) -> None:
    """Raise InputError if the option ``patience`` has no effect in a search."""
    reason = why_no_patience(method, epoch, solved=solved)
    if not reason:
        return
    raise InputError(
        "patience",
        f"needs trials that continue to train after their best epoch, but {reason}",
        remedy=f"Leave {option('patience')} out.",
    )
