"""Modules that consist of a frozen, pretrained part and of a part that trains.

A member is one trial on one fold. All members, chunks and threads read the same frozen tensors,
which are never copied and never converted. The outputs of the frozen layers before the first trained
layer are the same for all members. gputune can keep these features for each row (kept_features.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from gputune.ground.device import is_out_of_memory
from gputune.ground.errors import InputError, Verbatim
from gputune.ground.types import Config
from gputune.models import Dropout
from gputune.modules.kept_features import INPUT, KEPT, FeatureStore
from gputune.population.population import InputKind
from gputune.population.traits import Traits


class Adapted(nn.Module):
    """A pretrained module with a trained part, as ``gputune.lora`` and ``gputune.frozen`` build it.

    Calling it returns a tensor: the logits, if ``module`` returns an output of transformers. All
    modules of a builder share the frozen tensors. ``to`` moves and converts only the trained
    tensors. A frozen tensor is replaced by a copy on the other device, made only once.
    """

    moved: dict[tuple[int, str], nn.Parameter]
    """Copies of frozen parameters, by the id of the original and the device. All modules of a
    builder share this dict."""

    trained: tuple[str, ...]
    """The paths of the modules that train as a whole."""

    def __init__(
        self,
        module: nn.Module,
        dtype: torch.dtype,
        trained: Sequence[str],
        moved: dict[tuple[int, str], nn.Parameter],
        store: FeatureStore,
    ) -> None:
        super().__init__()
        self.module = module
        self.dtype = dtype
        self.trained = tuple(trained)
        self.moved = moved
        self.store = store

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Return the outputs of the module.

        Inputs with the names of kept features take the place of what the frozen layers compute.
        """
        args = tuple(map(self._as_read, args))
        kept = []
        named = {}
        for name, x in kwargs.items():
            x = self._as_read(x)
            if name.startswith(KEPT):
                kept.append(x)
            elif name.startswith(INPUT):
                args = (*args, x)
            else:
                named[name] = x
        if kept:
            with self.store.replay(self.module, kept):
                outputs = self.module(*args, **named)
        else:
            outputs = self.module(*args, **named)
        logits: Tensor = getattr(outputs, "logits", outputs)
        return logits

    def _as_read(self, x: Tensor) -> Tensor:
        """Return an input in the dtype of the frozen parameters."""
        return x.to(self.dtype) if x.is_floating_point() else x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Adapted":
        trained: dict[int, nn.Parameter] = {}
        for part in self.modules():
            is_trained = any(w.requires_grad for w in part._parameters.values() if w is not None)
            is_trained = is_trained or isinstance(part, Dropout)
            for name, w in part._parameters.items():
                if w is None:
                    continue
                if not w.requires_grad:
                    part._parameters[name] = self._on_device(w, fn)
                    continue
                if id(w) not in trained:
                    trained[id(w)] = nn.Parameter(fn(w.detach()))
                part._parameters[name] = trained[id(w)]
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    changed = fn(buffer)
                    part._buffers[name] = changed if is_trained else buffer.to(changed.device)
        return self

    def _on_device(self, w: nn.Parameter, fn: Callable[[Tensor], Tensor]) -> nn.Parameter:
        """Return a frozen parameter on the device to which ``fn`` moves tensors."""
        device = fn(w.detach().flatten()[:1]).device
        if device == w.device:
            return w
        key = id(w), str(device)
        if key not in self.moved:
            try:
                self.moved[key] = nn.Parameter(w.detach().to(device), requires_grad=False)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise InputError(
                    "base",
                    f"does not fit into the free memory of {str(device)!r}",
                    remedy="Use a smaller base or a smaller dtype, such as bfloat16.",
                ) from error
            self.moved[id(self.moved[key]), str(w.device)] = w
        return self.moved[key]


@dataclass(frozen=True)
class Pretrained:
    """The settings of a builder. Its modules share the frozen tensors of ``base``."""

    base: nn.Module
    frozen: dict[int, nn.Parameter] = field(default_factory=dict, repr=False, kw_only=True)
    """The frozen parameters, which share the memory of the base, by the id of the original."""
    moved: dict[tuple[int, str], nn.Parameter] = field(
        default_factory=dict, repr=False, kw_only=True
    )
    store: FeatureStore = field(default_factory=FeatureStore, repr=False, kw_only=True)
    features_folder: Path | None = field(default=None, kw_only=True)
    """The folder for files with kept features, or None if they are kept in memory."""

    reads_inputs = True
    """Whether the trained part may read the inputs of the module next to the kept features."""

    def frozen_parameters(self) -> dict[int, nn.Parameter]:
        """Return frozen parameters that share the memory of the base, by the id of the original."""
        for w in self.base.parameters():
            if id(w) not in self.frozen:
                self.frozen[id(w)] = nn.Parameter(w.detach(), requires_grad=False)
        return self.frozen

    def sizes(self, inputs: Sequence[InputKind], names: Sequence[str] | None) -> Config:
        """Return sizes for the builder that differ from the sizes of the data."""
        del inputs, names
        return {}

    def remarks(self) -> tuple[str, ...]:
        """Return sentences for the user about the modules that train."""
        return ()

    def check_traits(self, traits: Traits, module: nn.Module) -> None:
        """Raise InputError for a module that cannot train as the user expects."""

    def check_config(self, config: Config, module: nn.Module) -> None:
        """Raise InputError for a configuration that does not fit the base."""


def pretrained_of(builder: object) -> Pretrained | None:
    """Return the settings of a builder with a shared base, or None for another builder."""
    settings = getattr(builder, "pretrained", None)
    return settings if isinstance(settings, Pretrained) else None


def checked_folder(folder: str | PathLike[str] | None) -> Path | None:
    """Return the folder for kept features. Raises InputError if it does not exist."""
    if folder is None:
        return None
    if not isinstance(folder, str | PathLike) or not Path(folder).is_dir():
        raise InputError(
            "features_folder",
            "must be an existing folder",
            got=folder,
            remedy="Create it, or leave it out to keep the features in memory.",
        )
    return Path(folder).absolute()


def dtype_of(module: nn.Module) -> torch.dtype:
    """Return the dtype of a module's first floating-point parameter, by default single
    precision."""
    for w in module.parameters():
        if w.is_floating_point():
            return w.dtype
    return torch.float32


def check_base(base: object) -> None:
    """Raise InputError if ``base`` is not a module."""
    if not isinstance(base, nn.Module):
        raise InputError(
            "base",
            "must be a torch.nn.Module with its weights",
            got=Verbatim(type(base).__name__),
            remedy="Pass the pretrained module itself, not its class.",
        )
