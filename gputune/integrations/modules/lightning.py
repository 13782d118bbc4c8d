"""Modules of Lightning in ``gputune.tune``: their training step and their optimizer.

gputune trains the module itself, without a Lightning ``Trainer``.
"""

import dis
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from gputune.errors import InputError
from gputune.integrations.lightning_optimizer import optimizer_of
from gputune.modules.own_training import Horizon, OwnTraining
from gputune.wording import Verbatim, option

_TO_SEARCH = (
    "Or keep the Lightning Trainer: gputune.search with "
    "gputune.integrations.lightning.LightningCallback."
)
_LOGGING = {"log", "log_dict", "logger", "loggers", "print"}
_TRAINED = {"forward", "training_step", "configure_optimizers"}
"""The methods of a LightningModule that gputune uses."""


def own_training(module: Any, horizon: Horizon) -> OwnTraining:
    """Return the training step and the optimizer of a LightningModule.

    Raises InputError for manual optimization, several optimizers, and a module without a forward.
    """
    kind: Any = type(module)
    base = _base_of(kind)
    name = kind.__name__
    _check_optimization(module)
    if kind.forward is base.forward:
        raise InputError(
            None,
            f"{name} has no forward, with which gputune computes its predictions",
            remedy="Add def forward(self, x): ..., which returns the outputs for the inputs x.",
        )
    ignored = _ignored(kind, base)
    step = step_of(kind)
    if step is None:
        ignored = [part for part in ignored if part != "logging"]
    _check_attributes(kind, base, ignored)
    if step is None:
        taken = [
            f"{name} has no training_step, so it trains on the default loss of the target, or on "
            f"the one in {option('loss')}"
        ]
    else:
        taken = [f"{name} trains with its training_step"]
    optimizer = ""
    defaults = {}
    schedule = ""
    if kind.configure_optimizers is not base.configure_optimizers:
        trainer = _StandIn(name, "configure_optimizers", _lengths(horizon))
        with _attached(module, trainer):
            read = optimizer_of(module)
        optimizer = read.optimizer
        defaults = read.defaults
        schedule = read.schedule
        values = [f"{key}={value!r}" for key, value in defaults.items()]
        if schedule:
            values.append(f"schedule={schedule!r} over all epochs")
        if optimizer:
            found = ", ".join([f"optimizer={optimizer!r}", *values])
            taken.append(f"the defaults of configure_optimizers are {found}")
        elif not read.ignored:
            taken.append(
                "configure_optimizers returns no optimizer, so gputune uses its own defaults (return "
                "the optimizer to use it)"
            )
        ignored += read.ignored
    remark = "; ".join(taken)
    if ignored:
        remark = f"{remark}; gputune ignores {', '.join(ignored)}"
    return OwnTraining(step, optimizer, defaults, schedule, remark)


def step_of(kind: Any) -> "TrainingStep | None":
    """Return the training step of a class of LightningModules, or None if the class has none."""
    if kind.training_step is _base_of(kind).training_step:
        return None
    return TrainingStep(f"{kind.__module__}", f"{kind.__qualname__}.training_step")


def _check_optimization(module: Any) -> None:
    """Raise InputError if a LightningModule takes the optimizer steps itself."""
    if not module.automatic_optimization:
        raise InputError(
            None,
            f"{type(module).__name__} sets automatic_optimization = False, but gputune takes the optimizer steps "
            "itself",
            remedy=f"Return the loss from training_step, with automatic optimization. {_TO_SEARCH}",
        )


def _base_of(kind: Any) -> Any:
    """Return the class LightningModule from which a class is derived."""
    return next(base for base in kind.__mro__ if base.__name__ == "LightningModule")


def _ignored(kind: Any, base: Any) -> list[str]:
    """Return the names of the methods that a LightningModule overrides and gputune never calls.

    The list begins with "logging" if the training logs values.
    """
    ignored = ["logging"] if _LOGGING & _attributes_read(kind, base).keys() else []
    for name in dir(base):
        of_torch = name.startswith("_") or hasattr(nn.Module, name) or name in _TRAINED
        if not of_torch and getattr(kind, name) is not getattr(base, name):
            is_method = callable(inspect.getattr_static(base, name))
            if is_method and inspect.isfunction(getattr(kind, name)):
                ignored.append(name)
    return ignored


def _check_attributes(kind: Any, base: Any, ignored: Sequence[str]) -> None:
    """Raise InputError if the training reads an attribute that an ignored method sets.

    Without the method, the attribute would be missing, or would keep its first value.
    """
    reads = _attributes_read(kind, base)
    for method in ignored:
        if method.startswith(_OTHER_STAGES):
            continue
        for code in _codes(kind, base, method):
            stores = {step.argval for step in dis.get_instructions(code) if step.opname == _STORE}
            if common := sorted(stores & reads.keys()):
                name = common[0]
                raise InputError(
                    None,
                    f"The {reads[name]} of {kind.__name__} reads self.{name}, which {method} sets, "
                    f"but gputune never calls {method}",
                    remedy=f"Set self.{name} only in __init__. {_TO_SEARCH}",
                )


def _attributes_read(kind: Any, base: Any) -> dict[str, str]:
    """Return the attributes that the training of a LightningModule reads, and for each attribute
    the name of a method that reads it.

    The methods are ``training_step``, ``forward``, and the methods that these call.
    """
    reads: dict[str, str] = {}
    methods = ["training_step", "forward"]
    for method in methods:  # grows
        for code in _codes(kind, base, method):
            for step in dis.get_instructions(code):
                if step.opname not in _LOADS:
                    continue
                reads.setdefault(step.argval, method)
                is_method = inspect.isfunction(getattr(kind, step.argval, None))
                if is_method and step.argval not in methods:
                    methods.append(step.argval)
    return reads


_STORE = "STORE_ATTR"
_LOADS = ("LOAD_ATTR", "LOAD_METHOD")

_OTHER_STAGES = ("test_", "predict_", "on_test_", "on_predict_")
"""The first parts of the names of methods that a fit of Lightning does not call."""


def _codes(kind: Any, base: Any, method: str) -> Iterator[CodeType]:
    """Yield the code of a method in each class from which a LightningModule is derived."""
    for part in kind.__mro__[: kind.__mro__.index(base)]:
        code = getattr(inspect.unwrap(vars(part).get(method, None)), "__code__", None)
        if isinstance(code, CodeType):
            yield code


@dataclass(frozen=True)
class TrainingStep:
    """Calls the ``training_step`` of a LightningModule without a trainer.

    ``place`` and ``name`` are the names of the Python module and of the method. They are the name
    of the step in messages and in studies.
    """

    place: str
    name: str

    def __post_init__(self) -> None:
        vars(self).update(__module__=self.place, __qualname__=self.name)

    def __call__(self, module: Any, batch: tuple[object, Tensor]) -> Tensor:
        """Return the loss of a minibatch (x, y).

        Raises InputError for manual optimization, and if the step needs a trainer or returns no
        loss.
        """
        _check_optimization(module)
        name = type(module).__name__
        arguments = [batch, 0][: _n_arguments(module.__class__)]
        with _attached(module, _StandIn(name, "training_step", {})):
            loss = module.training_step(*arguments)
        if isinstance(loss, dict):
            loss = loss.get("loss")
        if isinstance(loss, Tensor):
            return loss
        raise InputError(
            None,
            f"The training_step of {name} must return the loss, or a dict with the key 'loss'",
            got=Verbatim(type(loss).__name__),
        )


@lru_cache
def _n_arguments(kind: Any) -> int:
    """Return the number of arguments of ``training_step`` after self: the minibatch, and perhaps
    its number."""
    return len(inspect.signature(kind.training_step).parameters) - 1


def _lengths(horizon: Horizon) -> dict[str, object]:
    """Return the attributes of a trainer that say how long the training is."""
    return {
        "max_epochs": horizon.epochs,
        "max_steps": -1,
        "estimated_stepping_batches": horizon.steps,
        "num_training_batches": -(-horizon.steps // horizon.epochs),
    }


class _Ignored:
    """A logger that ignores every call."""

    def __getattr__(self, name: str) -> "_Ignored":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: object, **kwargs: object) -> "_Ignored":
        return self


class _StandIn:
    """Stands for the trainer of a LightningModule that gputune trains.

    It has the attributes of a training on one device without a progress bar. Any other attribute
    raises InputError.
    """

    def __init__(self, module: str, method: str, values: dict[str, object]) -> None:
        self.__dict__.update(values)
        self._module = module
        self._method = method
        self.training = True
        self.sanity_checking = False
        self.is_global_zero = True
        self.global_rank = 0
        self.local_rank = 0
        self.world_size = 1
        self.num_devices = 1
        self.num_nodes = 1
        self.logger = _Ignored()
        self.loggers: list[object] = []
        self.progress_bar_callback = None

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise InputError(
            None,
            f"The {self._method} of {self._module} reads trainer.{name}, but gputune trains the "
            "module without a Lightning Trainer",
            remedy=f"Leave trainer.{name} out of {self._method}. {_TO_SEARCH}",
        )


def _ignore(*args: object, **kwargs: object) -> None:
    """Ignore a value that a module logs."""


def _no_metric(*args: object, **kwargs: object) -> Tensor:
    """Return NaN in place of the value of a metric, which must not enter the loss."""
    return torch.tensor(torch.nan)


@contextmanager
def _attached(module: nn.Module, trainer: _StandIn) -> Iterator[None]:
    """Inside the context, a module has a trainer, and ignores logged values and metrics."""
    metrics = sys.modules.get("torchmetrics")
    changed: list[tuple[nn.Module, dict[str, object]]] = []
    for part in module.modules():
        values: dict[str, object] = {}
        if hasattr(part, "_trainer"):
            values = {"_trainer": trainer, "log": _ignore, "log_dict": _ignore}
        elif metrics is not None and isinstance(part, metrics.Metric):
            values = dict.fromkeys(("forward", "update", "compute"), _no_metric)
        if values:
            changed.append(
                (part, {name: vars(part)[name] for name in values if name in vars(part)})
            )
            vars(part).update(values)
    try:
        yield
    finally:
        _restore(changed)


def _restore(changed: Sequence[tuple[nn.Module, dict[str, object]]]) -> None:
    """Give modules their attributes back."""
    for part, before in changed:
        for name in ("_trainer", "log", "log_dict", "forward", "update", "compute"):
            vars(part).pop(name, None)
        vars(part).update(before)
