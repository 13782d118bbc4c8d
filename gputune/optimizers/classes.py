"""The optimizer classes of torch.optim.

This module maps each class to the update rule that computes the same steps, and builds the
optimizer of a configuration.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from inspect import signature, unwrap
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from gputune.ground.errors import InputError, Verbatim, option, per_interface
from gputune.ground.text import did_you_mean, nearest
from gputune.ground.types import (
    DEFAULT_LR,
    OPTIMIZERS,
    Config,
    default_momentum,
    default_weight_decay,
)
from gputune.optimizers.rules import BETA1, n_moments, schedule_factor

OPTIMIZER_PREFIX = "optimizer__"

_RULES: Mapping[str, str] = {
    "SGD": "sgd",
    "Adam": "adam",
    "AdamW": "adamw",
    "RMSprop": "rmsprop",
    "Muon": "muon",
}
"""Maps the name of a class of torch.optim to the update rule that trains all members at once."""

_REFUSED: Mapping[str, str] = {
    "LBFGS": "evaluates the loss of a minibatch several times per step",
    "SparseAdam": "supports only sparse gradients",
}

_OWN_KEYS = ("lr", "weight_decay", "momentum")
"""Arguments of an optimizer that users write in a search space without the prefix
``optimizer__``."""

_MACHINERY = ("params", "maximize", "foreach", "capturable", "differentiable", "fused")
"""Optimizer arguments that are not hyperparameters.

For example, some choose the implementation of a step.
"""

Class = type[torch.optim.Optimizer]

_CLASSES: Mapping[str, Class] = {
    name: kind
    for name, kind in sorted(vars(torch.optim).items())
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and kind is not torch.optim.Optimizer
}

CLASSES = {
    name: kind for name, kind in _CLASSES.items() if name not in _RULES and name not in _REFUSED
}
"""Maps class names to the classes that train members one by one.

A configuration stores such an optimizer by the name of its class.
"""

_CLASS_OF_RULE = {word: _CLASSES[name] for name, word in _RULES.items() if word != "muon"}
_CLASS_OF_RULE["nesterov"] = torch.optim.SGD


def _without_compiler(kind: Class) -> Class:
    """Return a subclass of an optimizer class that does not import ``torch._dynamo``.

    The methods of torch.optim only tell this compiler to leave them alone, but the import takes
    more than two seconds of CPU time. The steps are the same.
    """
    methods = {
        "__module__": kind.__module__,
        "add_param_group": unwrap(kind.add_param_group),
        "step": torch.no_grad()(unwrap(kind.step)),
    }
    return type(kind.__name__, (kind,), methods)


_LIGHT_CLASSES = {kind: _without_compiler(kind) for kind in _CLASS_OF_RULE.values()}


def optimizer_word(value: object, name: str, *, more: Collection[str] = ()) -> str:
    """Return the name under which a configuration stores an optimizer.

    ``value`` is a name or a class of torch.optim. The result is one of ``OPTIMIZERS`` or ``more``,
    or the name of another class of torch.optim. ``name`` is the argument's name in errors. Raises
    InputError if the value is neither a known name nor a class of torch.optim, or if the class
    cannot train members.
    """
    words = (*OPTIMIZERS, *more)
    text = value
    if isinstance(value, type):
        text = value.__name__
        if value not in _CLASSES.values():
            text = f"{value.__module__}.{value.__qualname__}"
    if isinstance(text, str):
        if text in words:
            return text
        short = text.removeprefix("torch.optim.")
        for refused, reason in _REFUSED.items():
            if refused.lower() == short.lower():
                rule = f"cannot be torch.optim.{refused}, which {reason}"
                raise InputError(name, rule, remedy="Choose a different optimizer.")
        if short in CLASSES or short in _RULES:
            return _RULES.get(short, short)
    if isinstance(value, torch.optim.Optimizer):
        raise InputError(
            name,
            "must be the class, not an instance, because gputune builds one optimizer per member",
            remedy=f"Pass torch.optim.{type(value).__name__}, and put its arguments into the "
            "search space: lr and optimizer__*.",
        )
    hint = did_you_mean(value, (*words, *CLASSES)) if isinstance(value, str) else ""
    raise InputError(
        name,
        f"must be one of {', '.join(words)}, or a class of torch.optim, such as RAdam",
        got=Verbatim(text) if isinstance(value, type) else value,
        remedy=hint.strip() or "For example 'adamw'.",
    )


def optimizer_arguments(config: Config) -> Config:
    """Return the ``optimizer__*`` values of a configuration, keyed by the argument names of the
    optimizer's class."""
    keys = keys_with(config, OPTIMIZER_PREFIX)
    return {key.removeprefix(OPTIMIZER_PREFIX): config[key] for key in keys}


def keys_with(config: Config, *prefixes: str) -> tuple[str, ...]:
    """Return the keys of a configuration that begin with one of the prefixes."""
    return _keys_with(tuple(config), prefixes)


# Cached: 100,000 trials have the same keys, and filtering the keys of each trial takes seconds.
@lru_cache(maxsize=256)
def _keys_with(keys: tuple[str, ...], prefixes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(key for key in keys if key.startswith(prefixes))


def class_of(config: Config) -> Class | None:
    """Return the class of torch.optim for a configuration that trains each member separately.

    Return None if an update rule trains all members at once. An update rule with ``optimizer__*``
    values is replaced by its class. Raises InputError if the rule has no class.
    """
    word = config["optimizer"]
    if word in CLASSES:
        return CLASSES[word]
    keys = keys_with(config, OPTIMIZER_PREFIX)
    if not keys:
        return None
    if word not in _CLASS_OF_RULE:
        raise InputError(
            keys[0],
            f"is for classes of torch.optim, but {option('optimizer', word)} is not a class of "
            "torch.optim",
            remedy="Leave the argument out, or choose one of "
            f"{', '.join((*_CLASS_OF_RULE, *CLASSES))}.",
        )
    return _CLASS_OF_RULE[word]


def class_of_rule(config: Config) -> Class | None:
    """Return the class of torch.optim that computes the same steps as the rule of a configuration,
    or None.
    """
    return _CLASS_OF_RULE.get(config["optimizer"])


def loop_reason(config: Config) -> str:
    """Return the reason why an optimizer trains each member separately.

    Return "" if it trains all members at once.
    """
    kind = class_of(config)
    return f"torch.optim.{kind.__name__} updates only one member at a time" if kind else ""


def optimizer_defaults(word: str) -> Config:
    """Return the default ``lr``, ``weight_decay`` and ``momentum`` of an optimizer.

    A class of torch.optim keeps its own defaults.
    """
    if word not in CLASSES:
        return {
            "lr": DEFAULT_LR,
            "weight_decay": default_weight_decay(word),
            "momentum": default_momentum(word),
        }
    parameters = signature(CLASSES[word]).parameters
    defaults = dict.fromkeys(_OWN_KEYS, 0.0)
    for name in defaults.keys() & parameters.keys():
        defaults[name] = float(parameters[name].default)
    return defaults


def has_weight_decay(word: str) -> bool:
    """Return True if an optimizer has an argument ``weight_decay``. A few classes of torch.optim
    have none."""
    return word not in CLASSES or "weight_decay" in signature(CLASSES[word]).parameters


def argument_defaults(word: str) -> Config:
    """Return the default of each ``optimizer__*`` key that an optimizer supports."""
    kind = CLASSES.get(word, _CLASS_OF_RULE.get(word))
    return {} if kind is None else _defaults_of(kind)


def _defaults_of(kind: Class) -> Config:
    """Return the default of each ``optimizer__*`` key that an optimizer class supports."""
    parameters = signature(kind).parameters
    names = [name for name in parameters if name not in (*_MACHINERY, *_OWN_KEYS)]
    return {f"{OPTIMIZER_PREFIX}{name}": parameters[name].default for name in names}


def make_optimizer(config: Config, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Build the torch.optim optimizer of one member from its configuration.

    Raises InputError for arguments that the optimizer's class does not have, or for values that the
    class refuses.
    """
    kind = class_of(config) or class_of_rule(config)
    assert kind is not None
    signature_names = signature(kind).parameters.keys()
    arguments = optimizer_arguments(config)
    if arguments:
        _check_arguments(kind, arguments)
    kwargs = {key: config[key] for key in _OWN_KEYS if key in signature_names}
    if config["optimizer"] == "nesterov":
        kwargs["nesterov"] = config["momentum"] > 0
    if not class_of(config):  # the steps of a rule, computed in the fewest calls
        # Limited to the largest number of the dtype. Members diverge with any such value anyway.
        kwargs["weight_decay"] = min(config["weight_decay"], torch.finfo(parameters[0].dtype).max)
        # SGD is not fused: torch's fused SGD fails if some parameter gets its first gradient later
        # than the others.
        if "betas" in signature_names:
            kwargs |= {"betas": (BETA1, config["beta2"]), "fused": True}
        else:
            kwargs["foreach"] = True
    for name, value in arguments.items():
        kwargs[name] = tuple(value) if isinstance(value, list) else value
    if not class_of(config):
        kind = _LIGHT_CLASSES[kind]
    try:
        return kind(list(parameters), **kwargs)
    except Exception as error:
        shown = ", ".join(f"{name}={value!r}" for name, value in kwargs.items())
        remedy = "Change the values."
        for key, default in _defaults_of(kind).items():
            value = config.get(key, default)
            if isinstance(default, tuple) and not isinstance(value, tuple):
                python = f"as a tuple in a list, [{default}]"
                numbers = per_interface(python, f"in parentheses, '{default}'")
                remedy = f"{remedy} If one value consists of several numbers, write it {numbers}."
                break
        raise InputError(
            None,
            f"torch.optim.{kind.__name__}({shown}) raised {type(error).__name__}: {error}",
            remedy=remedy,
        ) from error


def _check_arguments(kind: Class, arguments: Config) -> None:
    """Raise InputError for ``optimizer__*`` arguments that an optimizer class does not have."""
    keys = {}
    for name in signature(kind).parameters:
        if name not in _MACHINERY:
            keys[name] = _key_of_argument(name)
    for name in arguments:
        key = OPTIMIZER_PREFIX + name
        if name in _OWN_KEYS:
            raise InputError(key, f"must be written without a prefix: {name!r}")
        if name not in keys:
            near = nearest(name, keys)
            raise InputError(
                key,
                f"is not a hyperparameter of torch.optim.{kind.__name__}, which has "
                f"{', '.join(keys.values())}",
                remedy=f"Did you mean '{keys[near]}'?" if near else "",
            )


def _key_of_argument(name: str) -> str:
    """Return the key of an optimizer argument, as users of each interface write it."""
    key = OPTIMIZER_PREFIX + name
    if name == "lr":
        return name
    # Estimators have the parameter optimizer__weight_decay, as in skorch.
    return per_interface(name, name, key) if name in _OWN_KEYS else key


def check_optimizer(config: Config, model: str, *, stacked: bool = False) -> None:
    """Raise InputError if the optimizer of a complete configuration cannot train a ``model``.

    ``model`` is "module" for a user's own module. ``stacked`` tells if the members must be stacked.
    """
    reason = loop_reason(config)
    if not reason:
        return
    optimizers = ", ".join(OPTIMIZERS)
    if model != "module":
        module = per_interface(
            "Pass a module, for example model=gputune.models.MLP",
            "Pass a module with --model FILE.py:NAME",
        )
        raise InputError(
            None,
            f"{reason}, but {option('model', model)} trains all members at once",
            remedy=f"{module}, or choose {option('optimizer')} from {optimizers}.",
        )
    if stacked:
        raise InputError(
            None,
            f"{option('backend', 'stacked')} trains all members at once, but {reason}",
            remedy=f"Choose one of {optimizers}, or let {option('backend', 'auto')} train the "
            "members one by one.",
        )
    make_optimizer(config, [torch.zeros(2, 2)])


NORM_EPS = 1e-6  # the same number as in torch.nn.utils.clip_grad_norm_


class RowUpdate:
    """The optimizer of one member: a class of torch.optim with gradient clipping and averaging.

    The member's parameters and gradients are views of a row (N,). In each step the gradient is
    clipped, the class takes its step, and the weights are averaged. A schedule runs over
    ``horizon`` epochs of ``steps`` steps. The optimizer updates the ``parameters`` in place. If
    ``parameters`` is empty, the row is treated as one parameter, and the state has the same layout
    as for stacked members.
    """

    def __init__(
        self, config: Config, row: Tensor, parameters: Sequence[Tensor], *, steps: int, horizon: int
    ) -> None:
        self.config = config
        self.row = row
        self.by_parameter = bool(parameters)
        self.parameters = list(parameters) or [row]
        self.optimizer = make_optimizer(config, self.parameters)
        # Without the layer that reports each step to a profiler and to global hooks, which takes
        # half of the time of a fused step of a small module.
        step = type(self.optimizer).step
        self.take_step = getattr(step, "__wrapped__", step)
        self.steps = steps
        self.total = steps * horizon
        self.lr = float(config["lr"])
        self.schedule = config["schedule"]
        self.clip_norm = float(config["clip_norm"])
        self.ema = float(config["ema"])
        self.average = torch.zeros_like(row) if self.ema else None
        self.factors: list[float] = []  # the schedule's factors on lr in the current epoch
        self.done = 0

    def state(self) -> list[Tensor]:
        """Return the optimizer's state as rows (N,), from which ``resume`` continues.

        Each row has one state tensor of every parameter, at the parameter's position. A state
        tensor that is shorter than its parameter, such as the count of steps, is padded with zeros.
        """
        states = [self._tensors(self.optimizer, parameter) for parameter in self.parameters]
        rows = []
        for tensors in zip_longest(*states):
            parts = map(self._as_row, tensors, self.parameters)
            rows.append(torch.cat(list(parts)))
        # Without momentum the class keeps no buffer, but the rule keeps one that is not used. Zeros
        # give both the same layout.
        if not self.by_parameter:
            moments = n_moments(self.config["optimizer"], [self.config["momentum"]])
            rows += [torch.zeros_like(self.row)] * (moments - len(rows))
        return rows if self.average is None else [*rows, self.average]

    def _tensors(self, optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
        """Return the state tensors that a torch.optim optimizer holds for one parameter."""
        state = dict(optimizer.state.get(parameter, {}))
        if not self.by_parameter:
            state.pop("step", None)
        return [value for value in state.values() if isinstance(value, Tensor)]

    def _as_row(self, value: Tensor | None, parameter: Tensor) -> Tensor:
        """Return a state tensor as a row of the parameter's length, padded with zeros for
        storage."""
        row = parameter.new_zeros(0) if value is None else value.detach().flatten().to(parameter)
        if len(row) > parameter.numel():
            raise InputError(
                None,
                f"torch.optim.{type(self.optimizer).__name__} keeps more numbers than a parameter "
                f"of shape {tuple(parameter.shape)} has, and a study cannot store them",
                remedy=f"Choose a different {option('optimizer')}.",
            )
        return pad(row, (0, parameter.numel() - len(row)))

    def resume(self, rows: Sequence[Tensor]) -> None:
        """Restore the optimizer's state from the rows that ``state`` returned."""
        if self.average is not None:
            *rows, average = rows
            self.average.copy_(average)
        # A class creates its state only in its first step. So one step on other tensors of the same
        # shapes creates the state, which is then filled from the rows.
        stand_ins = [torch.zeros_like(w, requires_grad=True) for w in self.parameters]
        for stand_in in stand_ins:
            stand_in.grad = torch.zeros_like(stand_in)
        optimizer = make_optimizer(self.config, stand_ins)
        optimizer.step()
        begin = 0
        for parameter, stand_in in zip(self.parameters, stand_ins):
            for row, value in zip(rows, self._tensors(optimizer, stand_in)):
                value.copy_(row[begin : begin + value.numel()].view(value.shape))
            self.optimizer.state[parameter] = optimizer.state[stand_in]
            begin += parameter.numel()

    def begin(self, epoch: int) -> None:
        """Start an epoch: count from its first step and compute the schedule's factors."""
        self.done = epoch * self.steps
        done = np.arange(self.done, self.done + self.steps)
        total = np.full(self.steps, self.total)
        self.factors = schedule_factor(self.schedule, done, total).tolist()
        state = self.optimizer.state.get(self.row, {})
        if not self.by_parameter and "step" in state:
            state["step"].fill_(self.done)

    def step(self, row: Tensor, grad: Tensor) -> None:
        """Take one optimizer step with the gradient (N,) of the row, which is clipped in place."""
        if self.clip_norm < math.inf:
            grad.mul_((self.clip_norm / (grad.norm() + NORM_EPS)).clamp(max=1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.factors[self.done % self.steps]
        self.take_step(self.optimizer)
        self.done += 1
        if self.average is not None:  # after the first step the average equals the weights
            self.average.lerp_(row, 1.0 if self.done == 1 else 1 - self.ema)

    def scored(self, row: Tensor) -> Tensor:
        """Return the weights to score and save: the average if there is one, otherwise the row
        itself.
        """
        return row if self.average is None else self.average
