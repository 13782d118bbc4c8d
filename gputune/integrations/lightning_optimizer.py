"""Reads the optimizer and the scheduler of a LightningModule as hyperparameters of gputune."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.optim import lr_scheduler

from gputune.errors import InputError
from gputune.optimizers.classes import has_weight_decay, optimizer_word
from gputune.spaces.config import OPTIMIZERS_WITH
from gputune.types import DEFAULTS, OPTIMIZERS, Config

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
        read.ignored.append(f"its scheduler {_name_of(scheduler)}")
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


def _name_of(scheduler: Any) -> str:
    """Return the name of a scheduler for the note."""
    return type(scheduler).__name__


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
    usual = _signature_defaults(type(optimizer))
    for name in _other_arguments(group, taken):
        value = group[name]
        if name in usual and value != usual[name]:
            # PyTorch's own class then takes the steps, one member at a time.
            defaults[f"optimizer__{name}"] = value
    if word in OPTIMIZERS and any(key.startswith("optimizer__") for key in defaults):
        beta2 = defaults.pop("beta2", None)
        if beta2 is not None:
            defaults["optimizer__betas"] = betas
    return defaults


def _signature_defaults(kind: type) -> dict[str, Any]:
    """Return the default of each argument of an optimizer class."""
    parameters = inspect.signature(kind).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


def _other_arguments(group: Mapping[str, Any], taken: Iterable[str]) -> list[str]:
    """Return the names of the options in a parameter group that are not ``taken``."""
    return [name for name in group if name not in set(taken)]
