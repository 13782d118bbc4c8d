"""A frozen, pretrained body with a head that trains."""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from gputune.ground.errors import InputError, Verbatim, with_argument_hints
from gputune.ground.types import Config
from gputune.modules.pretrained import (
    Adapted,
    Pretrained,
    check_base,
    checked_folder,
    dtype_of,
    pretrained_of,
)
from gputune.population.outputs import call_module, in_mode
from gputune.population.population import InputKind

Head = Callable[..., nn.Module]
"""A class of modules, or a function that returns a module."""


class BodyAndHead(nn.Module):
    """A frozen body that is always in evaluation mode, and a head."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = head

    def train(self, mode: bool = True) -> "BodyAndHead":
        """Set the mode of the head. The body has no dropout in training, and keeps the statistics
        of its batch norm."""
        super().train(mode)
        self.body.eval()
        return self

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Return the outputs of the head for the features of the body."""
        features: Tensor = self.body(*args, **kwargs)
        weights = [w for w in self.head.parameters() if w.is_floating_point()]
        outputs: Tensor = self.head(features.to(weights[0].dtype) if weights else features)
        return outputs


@dataclass(frozen=True)
class FrozenBody(Pretrained):
    """The settings of ``gputune.frozen``: the body, and the builder of the head."""

    head: Head | None = None

    reads_inputs = False

    def build(self, n_features: int, arguments: Config) -> Adapted:
        """Return a module with a new head and with the frozen tensors of the body.

        ``n_features`` is the number of features that the body returns for a row.
        """
        body = self._body()
        if self.head is None:
            head: nn.Module = nn.Linear(n_features, arguments["n_outputs"])
        else:
            head = self.head(**arguments)
        if not isinstance(head, nn.Module):
            raise InputError(
                "head",
                "must return a torch.nn.Module",
                got=Verbatim(type(head).__name__),
                remedy="Return the module.",
            )
        module = BodyAndHead(body, head)
        return Adapted(module, dtype_of(self.base), ["module.head"], self.moved, self.store)

    def _body(self) -> nn.Module:
        """Return a copy of the body with the same tensors."""
        return copy.deepcopy(self.base, dict[int, Any](self.frozen_parameters()))

    def sizes(self, inputs: Sequence[InputKind], names: Sequence[str] | None) -> Config:
        """Return the number of features that the body returns for a row."""
        if not self.store.width:
            self.store.width = self._width(inputs, names)
        return {"n_features": self.store.width}

    def _width(self, inputs: Sequence[InputKind], names: Sequence[str] | None) -> int:
        """Run the body on two rows of zeros, and return the number of its features."""
        rows = []
        for shape, dtype in inputs:
            is_float = dtype.is_floating_point
            rows.append(torch.zeros(2, *shape, dtype=dtype_of(self.base) if is_float else dtype))
        name = type(self.base).__name__
        body = in_mode(self._body(), training=False)
        device = next(body.parameters()).device
        rows = [x.to(device) for x in rows]
        try:
            with torch.no_grad():
                features: object = call_module(body, rows, names)
        except Exception as error:
            raise InputError(
                "base",
                f"raised {type(error).__name__} on two rows of zeros: {error}",
                remedy=f"Pass a base whose forward takes the inputs of X, such as a module that "
                f"calls {name}.",
            ) from error
        if not isinstance(features, Tensor) or features.dim() < 2:
            kind = type(features).__name__
            got = (
                f"{kind} of shape {tuple(features.shape)}" if isinstance(features, Tensor) else kind
            )
            raise InputError(
                "base",
                "must return one tensor with the features of each row, (rows, ..., features)",
                got=Verbatim(got),
                remedy=f"Pass a module that calls {name} and returns the tensor, such as the mean "
                "over the tokens.",
            )
        return features.shape[-1]


@with_argument_hints({"model": "base", "module": "base", "body": "base"})
def frozen(
    base: nn.Module,
    head: Head | None = None,
    *,
    features_folder: str | PathLike[str] | None = None,
) -> Callable[..., nn.Module]:
    """Return a builder of a frozen ``base`` and a head that trains, to pass to ``gputune.tune``.

    The head receives the features that ``base`` returns. All trials share the tensors of ``base``,
    and gputune computes the features of a row only once if they fit into memory. ``base`` is always
    in evaluation mode.

    Args:
        base: The pretrained module, which returns one tensor (rows, ..., features). gputune does
            not change its tensors, and ignores ``requires_grad``.
        head: A class or function that creates the head. It may have the arguments ``n_features``
            (of the last axis of the features) and ``n_outputs``, and arguments for the keys
            ``module__*`` of a space. [default: ``nn.Linear``]
        features_folder: A folder for the features of all rows. They are then read from a file in
            this folder, and may be larger than the main memory. gputune deletes the file after the
            search. It needs a training on the CPU. [default: features are kept in memory]

    Returns:
        A function that builds one module.

    Raises:
        InputError: ``base`` or ``head`` has another type, ``base`` has no parameters, or the folder
            does not exist.

    Example:
        >>> import gputune, torch
        >>> from torch import nn
        >>> body = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU())
        >>> images, y = torch.randn(60, 1, 4, 4), torch.arange(60) % 2
        >>> builder = gputune.frozen(body)
        >>> space = {"lr": [1e-3, 1e-2], "weight_decay": [0.0, 0.1]}
        >>> study = gputune.tune(builder, images, y, space=space, max_epochs=2, verbose=0)
        >>> len(study.trials)
        4
    """
    check_base(base)
    if next(base.parameters(), None) is None:
        raise InputError(
            "base",
            f"is a {type(base).__name__} without parameters",
            remedy="Pass a pretrained module, or compute the features yourself and tune the head "
            "on them.",
        )
    if head is not None and (isinstance(head, nn.Module) or not callable(head)):
        raise InputError(
            "head",
            "must be a class or function that creates the head, because each trial has its own",
            got=Verbatim(type(head).__name__),
            remedy="Pass the class, or a function that returns a new module.",
        )
    settings = FrozenBody(base, head=head, features_folder=checked_folder(features_folder))
    sizes = dict.fromkeys(("n_features", "n_outputs"), 0)
    empty = inspect.Parameter.empty
    parameters = {} if head is None else dict(inspect.signature(head).parameters)

    def build(**kwargs: Any) -> nn.Module:
        arguments = dict(kwargs)
        n_features = arguments["n_features"]
        if head is not None:
            for name in sizes:
                if name not in parameters:
                    del arguments[name]
        return settings.build(n_features, arguments)

    shown = []
    for name in dict.fromkeys([*sizes, *parameters]):
        parameter = parameters.get(name)
        default = empty if parameter is None else parameter.default
        shown.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default))
    build.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    build.__name__ = f"frozen({type(base).__name__})"
    vars(build)["pretrained"] = settings
    return build


def frozen_of(builder: object) -> FrozenBody | None:
    """Return the settings of a builder from ``gputune.frozen``, or None for another builder."""
    settings = pretrained_of(builder)
    return settings if isinstance(settings, FrozenBody) else None
