"""Modules of Lightning in ``gputune.tune``: their training step and their optimizer.

gputune trains the module itself, without a Lightning ``Trainer``.
"""

import dis
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from gputune.ground.errors import InputError, Verbatim, option
from gputune.ground.types import DEFAULTS, OPTIMIZERS, Config
from gputune.modules.own_training import Horizon, OwnTraining
from gputune.optimizers.classes import has_weight_decay, optimizer_word
from gputune.spaces.config import OPTIMIZERS_WITH

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


_SAME_STEPS = {"foreach", "fused", "capturable", "differentiable"}
"""Arguments of optimizers that change how a step is computed, but not its result."""


@dataclass
class ReadOptimizer:
    """The optimizer of a LightningModule.

    Attributes:
        optimizer: Its name in gputune, or "" if gputune lacks it.
        defaults: The values of its hyperparameters.
        schedule: The schedule of the learning rate in gputune, or "".
        ignored: Descriptions of what gputune does not take.
    """

    optimizer: str = ""
    defaults: Config = field(default_factory=dict)
    schedule: str = ""
    ignored: list[str] = field(default_factory=list)


def optimizer_of(module: Any) -> ReadOptimizer:
    """Call ``configure_optimizers``, and return its optimizer, scheduler and hyperparameters.

    Raises InputError for several optimizers, and if the call needs a trainer.
    """
    optimizers, schedulers = _parts(module.configure_optimizers())
    name = type(module).__name__
    if len(optimizers) > 1:
        raise InputError(
            None,
            f"configure_optimizers of {name} returns {len(optimizers)} optimizers, but gputune "
            "trains a module with one optimizer",
            remedy="Keep the Lightning Trainer: gputune.search with "
            "gputune.integrations.lightning.LightningCallback.",
        )
    read = ReadOptimizer()
    if not optimizers:
        return read
    (optimizer,) = optimizers
    group = dict(optimizer.param_groups[0])
    for scheduler in schedulers:
        _read_scheduler(scheduler, group, read)
    try:
        word = optimizer_word(type(optimizer), "optimizer")
    except InputError:
        word = ""
    if word in ("", "muon"):  # Muon has other defaults in PyTorch
        read.ignored.append(f"its optimizer {type(optimizer).__name__}")
        return read
    group["lr"] = group.pop("max_lr", group.get("initial_lr", group["lr"]))
    read.optimizer = "nesterov" if word == "sgd" and group.get("nesterov") else word
    read.defaults = _defaults(optimizer, read.optimizer, group)
    if len(optimizer.param_groups) > 1:
        read.ignored.append("the options of all parameter groups after the first")
    trained = {id(w) for group in optimizer.param_groups for w in group["params"]}
    others = [k for k, w in module.named_parameters() if w.requires_grad and id(w) not in trained]
    if others:
        raise InputError(
            None,
            f"The optimizer of {name} does not train {len(others)} parameters, such as "
            f"{others[0]!r}, but gputune trains every parameter with requires_grad",
            remedy="Call requires_grad_(False) on these parameters in __init__.",
        )
    return read


def _parts(returned: Any) -> tuple[list[torch.optim.Optimizer], list[Any]]:
    """Return the optimizers and the schedulers in a result of ``configure_optimizers``."""
    if returned is None:
        return [], []
    if isinstance(returned, torch.optim.Optimizer):
        return [returned], []
    if isinstance(returned, Mapping):
        scheduler = returned.get("lr_scheduler")
        schedulers = [] if scheduler is None else [_scheduler_in(scheduler)]
        return [returned["optimizer"]], schedulers
    if len(returned) == 2 and all(isinstance(part, list | tuple) for part in returned):
        return list(returned[0]), [_scheduler_in(scheduler) for scheduler in returned[1]]
    optimizers: list[torch.optim.Optimizer] = []
    schedulers = []
    for part in returned:
        more_optimizers, more_schedulers = _parts(part)
        optimizers += more_optimizers
        schedulers += more_schedulers
    return optimizers, schedulers


def _scheduler_in(scheduler: Any) -> Any:
    """Return the scheduler in a dict of Lightning with its interval, or the scheduler itself."""
    return scheduler["scheduler"] if isinstance(scheduler, Mapping) else scheduler


def _read_scheduler(scheduler: Any, group: dict[str, Any], read: ReadOptimizer) -> None:
    """Take a scheduler as a schedule of gputune if there is an equal one, otherwise ignore it."""
    schedule = _schedule_of(scheduler)
    if not schedule:
        read.ignored.append(f"its scheduler {type(scheduler).__name__}")
        return
    read.schedule = schedule
    if isinstance(scheduler, lr_scheduler.OneCycleLR):
        if group.get("betas") or group.get("momentum"):
            read.ignored.append("the cycle of momentum of OneCycleLR")
        group["momentum"] = group.get("max_momentum", group.get("momentum", 0.0))
        if "betas" in group:  # the scheduler has changed the first beta
            group["betas"] = (0.9, group["betas"][1])


def _schedule_of(scheduler: Any) -> str:
    """Return the schedule of gputune with the form of a scheduler, or ""."""
    state = vars(scheduler)
    if type(scheduler) is lr_scheduler.CosineAnnealingLR and not state["eta_min"]:
        return "cosine"
    if type(scheduler) is lr_scheduler.LinearLR:
        whole = (state["start_factor"], state["end_factor"]) == (1.0, 0.0)
        return "linear" if whole else ""
    if type(scheduler) is lr_scheduler.OneCycleLR:
        return "one_cycle"
    if type(scheduler) is lr_scheduler.LambdaLR:
        return _schedule_of_function(scheduler.lr_lambdas[0])
    return ""


def _schedule_of_function(function: Any) -> str:
    """Return the schedule of gputune for a function of transformers, such as
    ``get_linear_schedule_with_warmup``, or ""."""
    if not isinstance(function, partial) or not function.func.__module__.startswith("transformers"):
        return ""
    warmup = function.keywords.get("num_warmup_steps")
    name = function.func.__name__
    if "_cosine_schedule_with_warmup_lr" in name and function.keywords.get("num_cycles") == 0.5:
        return "warmup+cosine" if warmup else "cosine"
    return "linear" if "_linear_schedule_with_warmup" in name and not warmup else ""


def _defaults(optimizer: torch.optim.Optimizer, word: str, group: Mapping[str, Any]) -> Config:
    """Return the learning rate and weight decay of an optimizer, and each other hyperparameter that
    differs from gputune's default."""
    defaults: Config = {"lr": float(group["lr"])}
    if has_weight_decay(word):
        defaults["weight_decay"] = float(group.get("weight_decay", 0.0))
    if word in OPTIMIZERS_WITH["momentum"]:
        defaults["momentum"] = float(group.get("momentum", 0.0))
    taken = {"params", "lr", "initial_lr", "weight_decay", "nesterov", *_SAME_STEPS}
    taken |= {"max_lr", "min_lr", "max_momentum", "base_momentum"}
    taken |= {"momentum"} & defaults.keys()
    betas = group.get("betas")
    if word in OPTIMIZERS_WITH["beta2"] and betas is not None and betas[0] == 0.9:
        taken.add("betas")
        if betas[1] != DEFAULTS["beta2"]:
            defaults["beta2"] = float(betas[1])
    for name, parameter in inspect.signature(type(optimizer)).parameters.items():
        if name in group and name not in taken and group[name] != parameter.default:
            # PyTorch's own class then takes the steps, one member at a time.
            defaults[f"optimizer__{name}"] = group[name]
    if word in OPTIMIZERS and any(key.startswith("optimizer__") for key in defaults):
        beta2 = defaults.pop("beta2", None)
        if beta2 is not None:
            defaults["optimizer__betas"] = betas
    return defaults
