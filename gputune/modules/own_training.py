"""Read the training step and the optimizer of a module that defines them, such as a LightningModule.

``gputune/integrations/modules/`` has one file for each library with such modules.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from gputune.ground.entry_points import integration, integrations
from gputune.ground.errors import InputError, Verbatim, option
from gputune.ground.types import Config
from gputune.modules.construction import Builder


@dataclass(frozen=True)
class OwnTraining:
    """The training that a module defines itself.

    Attributes:
        step: Computes the loss, as the argument ``training_step`` of ``gputune.tune``. None if the
            module leaves the loss to gputune.
        optimizer: The optimizer of the module by gputune's name, or "" if there is none.
        defaults: The default values of hyperparameters of the optimizer.
        schedule: The schedule of the learning rate, or "" if there is none that gputune has.
        remark: What gputune takes from the module and what it ignores, in one sentence.
    """

    step: Callable[..., Tensor] | None = None
    optimizer: str = ""
    defaults: Config = field(default_factory=dict)
    schedule: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Horizon:
    """The length of a training: the numbers of its epochs and of its optimizer steps."""

    epochs: int
    steps: int


def library_of(kind: type) -> str | None:
    """Return the name of the integration for the library that defines a base of a module class.

    Returns None for a class without such a base.
    """
    names = integrations("modules")
    for base in kind.__mro__:
        package = base.__module__.partition(".")[0]
        if package in names:
            return package
    return None


def may_train_itself(builder: Builder) -> bool:
    """Return whether the modules of a builder may define their own training.

    The bases of a class are known. A function may return any module.
    """
    made = builder.func if isinstance(builder, partial) else builder
    return not isinstance(made, type) or library_of(made) is not None


def step_of_class(builder: Builder) -> Callable[..., Tensor] | None:
    """Return the training step that a module class defines itself.

    Returns None if the class defines no step, and for a function, which may return any module.
    """
    made = builder.func if isinstance(builder, partial) else builder
    library = library_of(made) if isinstance(made, type) else None
    if library is None:
        return None
    step: Callable[..., Tensor] | None = integration("modules", library).step_of(made)
    return step


def training_of_module(module: nn.Module, horizon: Horizon) -> OwnTraining | None:
    """Return the training that a module defines itself, or None.

    Raises InputError if gputune cannot train the module in this way.
    """
    library = library_of(type(module))
    if library is None:
        return None
    training: OwnTraining | None = integration("modules", library).own_training(module, horizon)
    return training


@dataclass(frozen=True)
class LossOfLabels:
    """The loss that a module computes if it receives ``labels``, as models of transformers do."""

    def __post_init__(self) -> None:
        # the name in messages and in studies
        vars(self).update(__module__="gputune", __qualname__="loss_of_labels")

    def __call__(self, module: nn.Module, batch: tuple[object, Tensor]) -> Tensor:
        """Return the mean loss of a minibatch (x, y)."""
        x, y = batch
        if isinstance(x, Mapping):
            outputs = module(**x, labels=y)
        elif isinstance(x, Sequence):
            outputs = module(*x, labels=y)
        else:
            outputs = module(x, labels=y)
        loss = getattr(outputs, "loss", None)
        if isinstance(loss, Tensor):
            return loss
        name = type(module).__name__
        raise InputError(
            None,
            f"{name} receives labels, but its output has no loss",
            got=Verbatim(type(outputs).__name__),
            remedy=f"Pass {option('loss', Verbatim('callable(outputs, y)'))}.",
        )


def takes_labels(module: nn.Module) -> bool:
    """Return whether the forward pass of a module has an argument ``labels``."""
    return "labels" in inspect.signature(module.forward).parameters
