"""Checks for state in a module's plain attributes, which gputune does not keep in members or saved
models.

A member (one trial on one fold) consists of its parameters, its buffers, and the numbers of
Python or NumPy in its attributes that training changes (counters). A tensor in a plain attribute,
or anything in a list or an object there, is lost together with the module that trained. This does
no harm if predictions do not depend on it. Examples are activations that a forward pass keeps, or a
table that it makes again.
"""

from collections import deque
from collections.abc import Container, Sequence
from types import FunctionType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gputune.ground.errors import InputError
from gputune.modules.calls import named_tensors, not_trained, put_numbers, state_of
from gputune.modules.construction import start_from
from gputune.modules.module_trial import ModuleTrial, is_close

# Attributes that every module has.
_OF_MODULES = frozenset(vars(nn.Module()))
# Levels of nested containers and objects that are compared.
_DEPTH = 3
_LARGEST = 1 << 16  # most bytes of an array that is compared
_PLAIN = (bool, int, float, str, np.generic, type(None))


class KeptState:
    """A snapshot of an object's plain attributes and buffers, by name, to find values that change
    later.

    The object is a module, or any object of a class in Python code. Functions have no state here.

    With ``counts_only``, only lists, dicts, sets, NumPy arrays and objects in attributes count. They
    change if a number or text in them changes, or their length. Tensors in them do not count.
    """

    def __init__(self, owner: object, *, counts_only: bool = False) -> None:
        self._counts_only = counts_only
        # keeps objects alive, so that no other object gets their ids
        self._alive: list[object] = []
        self._marks = self._marks_of(owner)

    def changed(self, owner: object) -> list[str]:
        """Return the names of the buffers and attributes that changed since the snapshot, in
        submodule order."""
        marks = self._marks_of(owner)
        return [name for name, mark in marks.items() if self._marks.get(name) != mark]

    def _marks_of(self, owner: object) -> dict[str, object]:
        """Return a comparable value for each buffer and plain attribute of an object, by name."""
        if not isinstance(owner, nn.Module):
            if isinstance(owner, type | FunctionType):
                return {}
            attributes = getattr(owner, "__dict__", {})
            return {name: self._mark(value, _DEPTH) for name, value in attributes.items()}
        marks = dict[str, object]()
        if not self._counts_only:
            marks = {name: self._mark(tensor, 0) for name, tensor in owner.named_buffers()}
        for path, part in owner.named_modules():
            if isinstance(part, torch.jit.ScriptModule):
                continue
            for name, value in vars(part).items():
                is_plain = isinstance(value, _PLAIN)
                if name not in _OF_MODULES and not (self._counts_only and is_plain):
                    marks[f"{path}.{name}".lstrip(".")] = self._mark(value, _DEPTH)
        return marks

    def _mark(self, value: object, depth: int) -> object:
        """Return a comparable value that changes if ``value`` is replaced or written into."""
        if isinstance(value, _PLAIN):
            return repr(value)
        if self._counts_only and (isinstance(value, Tensor | nn.Module | type) or callable(value)):
            return None
        self._alive.append(value)
        if isinstance(value, Tensor):
            # PyTorch increases the version of a tensor with every write into it.
            return id(value), value._version
        if isinstance(value, np.ndarray):
            return value.tobytes() if value.nbytes <= _LARGEST else id(value)
        identity = None if self._counts_only else id(value)
        if depth == 0 or isinstance(value, nn.Module | type) or callable(value):
            return identity
        if isinstance(value, dict):
            return [(repr(key), self._mark(item, depth - 1)) for key, item in value.items()]
        if isinstance(value, list | tuple | set | deque):
            return [self._mark(item, depth - 1) for item in value]
        return identity, self._mark(dict(getattr(value, "__dict__", {})), depth - 1)


class Untrained(NamedTuple):
    """The state of a module before its first call: its Python numbers, copies of the tensors that
    are not trained, and a snapshot of everything else."""

    numbers: dict[str, float]
    tensors: dict[str, Tensor]
    kept: KeptState

    @staticmethod
    def of(trial: ModuleTrial) -> "Untrained":
        """Return the present state of a trial's module."""
        tensors = not_trained(trial.module).items()
        copies = {name: tensor.detach().clone() for name, tensor in tensors}
        return Untrained(trial.numbers(), copies, KeptState(trial.module))


def check_evaluation(trial: ModuleTrial, before: KeptState, outputs: Tensor) -> None:
    """Raise InputError if predictions depend on the rows that were predicted before.

    Args:
        trial: The module, which has been called once in evaluation mode since ``before``.
        before: The module's state before that call.
        outputs: The outputs of that call, for all rows.
    """
    changed = before.changed(trial.module)
    if changed and not _close(trial.forward(trial.inputs, training=False), outputs):
        raise InputError(
            None,
            f"{trial.name} changes {changed[0]!r} in evaluation mode, so each prediction would "
            "depend on the rows before it",
            remedy="Change it only if self.training is True.",
        )


def check_hidden_state(
    trial: ModuleTrial, before: KeptState, counted: Sequence[str], outputs: Tensor
) -> None:
    """Raise InputError if predictions depend on values that training stored in plain attributes.

    Args:
        trial: The module, which has been called in training since ``before``.
        before: The module's state before that call.
        counted: The names of the Python numbers that training changes. Members keep them.
        outputs: The current outputs of the module in evaluation mode, on all rows.
    """
    fresh = trial.fresh()
    saved = {*counted, *dict(fresh.named_buffers())}
    changed = [name for name in before.changed(trial.module) if name not in saved]
    if changed:
        finding = f"keeps state in {changed[0]!r}, a plain attribute"
        _check_same(trial, fresh, counted, outputs, finding, changed[0])


def check_frozen(module: nn.Module, frozen: Container[str], name: str) -> None:
    """Raise InputError if a parameter in ``frozen`` has requires_grad now. ``name`` is the name of
    the module.

    The optimizer does not have this parameter.
    """
    for key, parameter in module.named_parameters():
        if parameter.requires_grad and key in frozen:
            raise InputError(
                None,
                f"{name} unfreezes its parameter {key!r} in training, but gputune trains only the "
                "parameters with requires_grad=True at the end of __init__",
                remedy="Leave requires_grad=True, and use the parameter's detach() in forward "
                "while it must not change.",
            )


def checked_losses(trial: ModuleTrial) -> Tensor:
    """Return the losses of one step of a trial's module.

    Raises InputError if the loss or the training step changes its own attributes. All members would
    share such state, and a stacked step would put a tensor of functorch into it. A value that the first
    call makes and later calls only read, such as a cache, is no state.
    """
    function = trial.objective.step or trial.objective.loss
    before = KeptState(function)
    losses = trial.losses()
    if not before.changed(function):
        return losses
    before = KeptState(function)
    trial.losses()
    for name in before.changed(function):
        remedy = "Keep it in a buffer of the module"
        if trial.objective.step is None:
            remedy += ", and compute the loss in a training_step"
        raise InputError(
            None,
            f"{trial.objective.in_words} keeps state in {name!r}, which all trials and folds would "
            "share",
            remedy=f"{remedy}.",
        )
    return losses


def buffers_at_start(trial: ModuleTrial) -> list[str]:
    """Return the names of the buffers with ``persistent=False`` that a module's ``start_from``
    changes.

    Raises InputError if predictions depend on values that ``start_from`` stores in plain
    attributes.
    """
    if not hasattr(trial.module, "start_from"):
        return []
    started = trial.fresh()
    before = KeptState(started)
    start_from(started, trial.inputs, trial.y, seed=0)
    buffers = dict(started.named_buffers())
    changed = before.changed(started)
    hidden = [name for name in changed if name not in buffers]
    if hidden:
        begun = trial.of_module(started)
        outputs = begun.forward(trial.inputs, training=False)
        finding = f"sets {hidden[0]!r}, a plain attribute, in start_from"
        _check_same(begun, trial.fresh(), (), outputs, finding, hidden[0])
    persistent = started.state_dict().keys()
    return [name for name in changed if name in buffers and name not in persistent]


def _copy_state(module: nn.Module, other: nn.Module, counted: Sequence[str]) -> None:
    """Copy the complete state of a member to another module: tensors and the Python numbers
    ``counted``."""
    tensors = named_tensors(module)
    with torch.no_grad():
        for name, tensor in named_tensors(other).items():
            if name in tensors and tensors[name].shape == tensor.shape:
                tensor.copy_(tensors[name])
    put_numbers(other, state_of(module, counted))


def _check_same(
    trial: ModuleTrial,
    other: nn.Module,
    counted: Sequence[str],
    outputs: Tensor,
    finding: str,
    name: str,
) -> None:
    """Raise InputError if a new module with the member's complete state predicts differently.

    The new module lacks only the plain attribute ``name`` of the tried module.
    """
    _copy_state(trial.module, other, counted)
    if not _close(trial.of_module(other).forward(trial.inputs, training=False), outputs):
        key = name.rpartition(".")[2]
        raise InputError(
            None,
            f"{trial.name} {finding}, and its predictions depend on it. A saved model would lose "
            "this attribute",
            remedy=_remedy(key, _value_of(trial.module, name)),
        )


def _value_of(module: nn.Module, name: str) -> object:
    """Return the value of a module's plain attribute at a dotted path, or None if it no longer
    exists."""
    value: object = module
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def _remedy(key: str, value: object) -> str:
    """Return a sentence that tells the user how to keep a plain attribute in saved models."""
    if isinstance(value, Tensor):
        return f"Make it a buffer in __init__: self.register_buffer({key!r}, tensor)."
    if isinstance(value, np.ndarray):
        call = f"self.register_buffer({key!r}, torch.from_numpy(array))"
        return f"Make it a tensor and a buffer in __init__: {call}."
    return (
        f"Store the numbers of this {type(value).__name__} in tensors of a fixed shape, and "
        "register each in __init__ with self.register_buffer(name, tensor)."
    )


def _close(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same shape and the same values, up to rounding."""
    return a.shape == b.shape and is_close(a, b)
