"""Heads (``frozen``) and LoRA (``lora``): members share one frozen, pretrained base.

A member is one trial on one fold. It is only its trained tensors: all members, chunks and threads
read the same frozen tensors, which are never copied and never converted.

The outputs of the frozen layers before the first trained layer are the same for all members.
``kept_features.py`` computes these features once for each row. The module then replays them: a call
of a frozen layer returns its kept output instead of computing it.

Rank and alpha of a LoRA are values of a member: A and B have ``max_rank`` columns and rows, and the
padding is 0 in both, so that it stays 0.

Source: Hu et al. (2021), LoRA: Low-Rank Adaptation of Large Language Models,
https://arxiv.org/abs/2106.09685. The targets and the saved files are those of PEFT.
"""

import copy
import inspect
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import TreeSpec, tree_unflatten

from gputune.ground.device import is_out_of_memory
from gputune.ground.errors import InputError, Verbatim, advice_on_keys, with_argument_hints
from gputune.ground.text import did_you_mean
from gputune.ground.types import Config, Params
from gputune.models import Dropout
from gputune.population.outputs import call_module, in_mode
from gputune.population.population import InputKind
from gputune.population.traits import Traits

ADAPTER_DEFAULTS: Config = {"rank": 8, "alpha": 8.0, "rslora": False}
"""The keys of a space that only LoRA has, with PEFT's defaults.

The default rank is smaller if an adapted layer has a smaller side.
"""

ALL_LINEAR = "all-linear"
_HEADS = ("classifier", "score")  # PEFT's names for the head of a classifier
_TASKS = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
"""PEFT's task types, by the end of the name of a class of transformers. PEFT trains the head of
these models by default."""

Targets: TypeAlias = str | Sequence[str]

Head: TypeAlias = Callable[..., nn.Module]
"""A class of modules, or a function that returns a module."""

# No argument of a user's module begins like this ("input_ids" is a common one).
KEPT = "gputune_kept_"
"""Begin of the names of inputs that hold kept features."""
INPUT = "gputune_input_"
"""Begin of the names that inputs without names get next to kept features."""

ROWS = object()
"""Stands for a tensor in the output of a frozen layer that is kept for each row."""


@dataclass(frozen=True)
class Unread:
    """Stands for a tensor in the output of a frozen layer that no later layer reads.

    ``shape`` is the shape of one row.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: float = 0.0


@dataclass(frozen=True)
class Call:
    """A call of a frozen layer that is replayed.

    Its output is taken apart into leaves. Each leaf is ``ROWS``, an ``Unread``, or a constant: a
    tensor or another value.
    """

    path: str
    spec: TreeSpec
    leaves: tuple[object, ...]


class Shared:
    """The frozen tensors and kept features of all modules of one builder.

    Attributes:
        frozen: The frozen parameters, which share the memory of the base, by the id of the
            original.
        moved: Copies of frozen parameters, by the id of the original and the device.
        calls: The calls that the modules replay. It is empty until features are kept.
        width: The number of features that a frozen body returns for a row; 0 if it is not known.
    """

    def __init__(self) -> None:
        self.frozen: dict[int, nn.Parameter] = {}
        self.moved: dict[tuple[int, str], nn.Parameter] = {}
        self.calls: tuple[Call, ...] = ()
        self.width = 0


@contextmanager
def replaying(module: nn.Module, calls: Sequence[Call], kept: Sequence[Tensor]) -> Iterator[None]:
    """Inside the context, the first calls of the module's frozen layers return kept features, one
    tensor (n, ...) for each leaf ``ROWS``."""
    features = iter(kept)
    waiting = []
    for call in calls:
        leaves = []
        for leaf in call.leaves:
            if leaf is ROWS:
                leaf = next(features)
            elif isinstance(leaf, Unread):
                value = torch.full((), leaf.fill, dtype=leaf.dtype, device=kept[0].device)
                leaf = value.expand(len(kept[0]), *leaf.shape)
            elif isinstance(leaf, Tensor):
                leaf = leaf.to(kept[0].device)
            leaves.append(leaf)
        waiting.append((call.path, tree_unflatten(leaves, call.spec)))
    waiting.reverse()

    def make(path: str, original: Callable[..., object]) -> Callable[..., object]:
        def replayed(*args: object, **kwargs: object) -> object:
            if not waiting:
                return original(*args, **kwargs)
            expected, output = waiting.pop()
            if expected != path:
                raise RuntimeError(
                    f"the forward pass called {path!r} in the place of {expected!r}, so its kept "
                    "features cannot be used"
                )
            return output

        return replayed

    # Only the layers of the recorded calls. Which other layers are frozen cannot be found here:
    # stacked members have tensors without a gradient in evaluation mode.
    layers = [(path, module.get_submodule(path)) for path in {call.path for call in calls}]
    try:
        for path, layer in layers:
            vars(layer)["forward"] = make(path, layer.forward)
        yield
    finally:
        for _, layer in layers:
            vars(layer).pop("forward", None)


class Adapted(nn.Module):
    """A pretrained module with a trained part, as ``gputune.lora`` and ``gputune.frozen`` build it.

    Calling it returns a tensor: the logits, if ``module`` returns an output of transformers. All
    modules of a builder share the frozen tensors. ``to`` moves and converts only the trained
    tensors. A frozen tensor is replaced by a copy on the other device, made only once.
    """

    trained: tuple[str, ...]
    """The paths of the modules that train as a whole."""

    def __init__(
        self,
        module: nn.Module,
        dtype: torch.dtype,
        trained: Sequence[str],
        shared: Shared,
    ) -> None:
        super().__init__()
        self.module = module
        self.dtype = dtype
        self.trained = tuple(trained)
        self.shared = shared

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
        with replaying(self.module, self.shared.calls if kept else (), kept):
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
        moved = self.shared.moved
        key = id(w), str(device)
        if key not in moved:
            try:
                moved[key] = nn.Parameter(w.detach().to(device), requires_grad=False)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise InputError(
                    "base",
                    f"does not fit into the free memory of {str(device)!r}",
                    remedy="Use a smaller base or a smaller dtype, such as bfloat16.",
                ) from error
            moved[id(moved[key]), str(w.device)] = w
        return moved[key]


@dataclass(eq=False)
class Pretrained:
    """The settings of a builder. Its modules share the frozen tensors of ``base``."""

    base: nn.Module
    features_folder: str | PathLike[str] | None = field(default=None, kw_only=True)
    """The folder for files with kept features, or None if they are kept in memory."""
    shared: Shared = field(default_factory=Shared, repr=False, kw_only=True)

    reads_inputs = True
    """Whether the trained part may read the inputs of the module next to the kept features."""

    def __post_init__(self) -> None:
        if not isinstance(self.base, nn.Module):
            raise InputError(
                "base",
                "must be a torch.nn.Module with its weights",
                got=Verbatim(type(self.base).__name__),
                remedy="Pass the pretrained module itself, not its class.",
            )
        folder = self.features_folder
        self.folder: Path | None = None
        if folder is None:
            return
        if not isinstance(folder, str | PathLike) or not Path(folder).is_dir():
            raise InputError(
                "features_folder",
                "must be an existing folder",
                got=folder,
                remedy="Create it, or leave it out to keep the features in memory.",
            )
        self.folder = Path(folder).absolute()

    def copy_of_base(self) -> nn.Module:
        """Return a copy of the base with frozen parameters that share the memory of the base."""
        frozen = self.shared.frozen
        for w in self.base.parameters():
            if id(w) not in frozen:
                frozen[id(w)] = nn.Parameter(w.detach(), requires_grad=False)
        return copy.deepcopy(self.base, dict[int, Any](frozen))

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


@with_argument_hints(
    {"target_modules": "targets", "model": "base", "module": "base"},
    advice_on_keys(
        {
            **dict.fromkeys(("r", "rank", "lora_r"), "rank"),
            **dict.fromkeys(("alpha", "lora_alpha"), "alpha"),
            **dict.fromkeys(("dropout", "lora_dropout"), "dropout"),
            **dict.fromkeys(("rslora", "use_rslora"), "rslora"),
            "lr": "lr",
        }
    ),
)
def lora(
    base: nn.Module,
    targets: Targets = ALL_LINEAR,
    modules_to_save: Sequence[str] | None = None,
    *,
    features_folder: str | PathLike[str] | None = None,
) -> Callable[..., nn.Module]:
    """Return a builder of ``base`` with LoRA adapters, to pass to ``gputune.tune``.

    All trials share the frozen tensors of ``base``. Trials of different ranks and alphas train
    together. The space of the search may have all keys of a training, and these keys:

    - ``rank`` [default: 8, or the smallest side of the adapted layers if that is smaller]
    - ``alpha`` [default: 8]
    - ``rslora`` [default: False]
    - ``dropout`` of the adapters' inputs [default: 0]
    - ``lr_factor__B``, a factor on the learning rate of the second matrix (LoRA+) [default: 1]

    Args:
        base: The pretrained module. gputune does not change it, and ignores ``requires_grad``. A
            model of transformers returns its logits.
        targets: The linear layers that get an adapter, with PEFT's meaning: a list with the ends of
            their names, a regular expression for the whole name, or "all-linear". The key
            ``module__targets`` searches it.
        modules_to_save: The ends of the names of modules that train as a whole, such as the head.
            The default is PEFT's: the modules "classifier" and "score" of a sequence or token
            classifier of transformers, and no module of another base. With an empty list, only the
            adapters train.
        features_folder: A folder for kept features, as for ``frozen``. [default: in memory]

    Returns:
        A function that builds one adapted module.

    Raises:
        InputError: ``base`` is not a module, a name matches nothing, a regular expression is not
            valid, or the folder does not exist.

    Example:
        >>> import gputune, torch
        >>> from torch import nn
        >>> base = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> builder = gputune.lora(base, targets=["0"], modules_to_save=["2"])
        >>> X, y = torch.randn(60, 4), torch.arange(60) % 2
        >>> space = {"rank": [2, 4], "alpha": [4, 8], "lr": [1e-3, 1e-2]}
        >>> study = gputune.tune(builder, X, y, space=space, n_trials=4, max_epochs=2, verbose=0)
        >>> len(study.trials)
        4
    """
    if modules_to_save is None:
        is_module = isinstance(base, nn.Module)
        modules_to_save = default_heads(base) if is_module else ()
    elif not _are_names(modules_to_save):
        is_name = isinstance(modules_to_save, str)
        raise InputError(
            "modules_to_save",
            "must be a list of names",
            got=modules_to_save,
            remedy=f"Pass {[modules_to_save]!r}." if is_name else "For example ['classifier'].",
        )
    names = tuple(modules_to_save)
    settings = Adapters(base, plain_targets(targets), names, features_folder=features_folder)
    default_targets = settings.targets

    def build(
        *, targets: Targets = default_targets, max_rank: int = 16, drops: bool = False
    ) -> nn.Module:
        return settings.build(plain_targets(targets), max_rank, drops)

    build.__name__ = f"lora({type(base).__name__})"
    vars(build)["pretrained"] = settings
    build()
    return build


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
    settings = FrozenBody(base, head=head, features_folder=features_folder)
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


@dataclass(eq=False)
class Adapters(Pretrained):
    """The settings of ``gputune.lora``: the base, and the layers that train."""

    targets: Targets = ALL_LINEAR
    modules_to_save: tuple[str, ...] = ()

    def defaults(self, params: Mapping[str, object]) -> Config:
        """Return the default values of ``ADAPTER_DEFAULTS`` for a configuration.

        The rank is at most the smallest side of the adapted layers.
        """
        targets = plain_targets(params.get("module__targets", self.targets))
        rank: int = ADAPTER_DEFAULTS["rank"]
        for path in self._targets(self.base, targets, self._trained_modules(self.base)):
            rank = min(rank, *sizes_of(self.base.get_submodule(path)))
        return ADAPTER_DEFAULTS | {"rank": rank}

    def build(self, targets: Targets, max_rank: int, drops: bool) -> Adapted:
        """Return a module with new adapters and with the frozen tensors of the base."""
        module = self.copy_of_base()
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            # a cache is only for generation, and takes memory
            config.use_cache = False  # type: ignore[union-attr]
        trained = self._trained_modules(module)
        frozen = []
        for name, w in module.named_parameters():
            if not any(name.startswith(f"{path}.") for path in trained):
                frozen.append(w)
        if not frozen:
            raise InputError(
                "modules_to_save",
                "contains all parameters of the base, so nothing is frozen",
                got=list(self.modules_to_save),
                remedy="Name only the head, or pass the class of the module to tune() instead.",
            )
        for path in self._targets(module, targets, trained):
            parent, _, name = path.rpartition(".")
            owner = module.get_submodule(parent)
            setattr(owner, name, LoraLinear(module.get_submodule(path), max_rank, drops))
        for path in trained:
            parent, _, name = path.rpartition(".")
            part = copy.deepcopy(module.get_submodule(path))
            part.register_forward_pre_hook(_cast_inputs)
            setattr(module.get_submodule(parent), name, part.requires_grad_(True))
        _disable_fast_path(module)
        floats = [w.dtype for w in frozen if w.is_floating_point()]
        dtype = floats[0] if floats else torch.float32
        paths = [f"module.{path}" for path in trained]
        return Adapted(module, dtype, paths, self.shared)

    def remarks(self) -> tuple[str, ...]:
        """Return a sentence about the modules that train as a whole."""
        trained = self._trained_modules(self.base)
        if trained:
            return (f"next to the adapters, gputune trains as a whole: {', '.join(trained)}",)
        return (
            f"only the adapters of {type(self.base).__name__} train; modules_to_save names modules "
            "that train as a whole, such as a new head",
        )

    def _trained_modules(self, module: nn.Module) -> list[str]:
        """Return the paths of the modules that train as a whole."""
        paths = [path for path, _ in module.named_modules() if path]
        found = []
        for name in self.modules_to_save:
            ends = [path for path in paths if path.endswith(name)]  # as PEFT
            if not ends:
                raise InputError(
                    "modules_to_save",
                    f"must name modules of {type(self.base).__name__}",
                    got=name,
                    remedy=did_you_mean(name, paths).strip() or _some_of(paths),
                )
            found += ends
        inner = [path for path in found if any(path.startswith(f"{other}.") for other in found)]
        return [path for path in dict.fromkeys(found) if path not in inner]

    def _targets(self, module: nn.Module, targets: Targets, trained: Sequence[str]) -> list[str]:
        """Return the paths of the linear layers that get an adapter."""
        paths = []
        for path, part in linear_layers(module):
            if not any(path == other or path.startswith(f"{other}.") for other in trained):
                paths.append(path)
                if targets == ALL_LINEAR and not _has_adapter_by_default(self.base, path, part):
                    paths.pop()
        chosen = [path for path in paths if is_target(path, targets)]
        if not chosen:
            names = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
            word = targets if isinstance(targets, str) else next(iter(targets), "")
            near = did_you_mean(word, [*names, *paths]).strip()
            raise InputError(
                "targets",
                f"must match a linear layer of {type(self.base).__name__}",
                got=targets,
                remedy=near or _some_of(names),
            )
        return chosen

    def check_traits(self, traits: Traits, module: nn.Module) -> None:
        """Raise InputError if adapters cannot train, because a layer is never called or a batch
        norm trains."""
        for path, part in module.named_modules():
            if isinstance(part, _BatchNorm) and f"{path}.running_mean" in traits.changing:
                raise InputError(
                    "base",
                    f"has {path.removeprefix('module.')!r}, a batch norm whose statistics change "
                    "in training, so that the saved adapter would not be the trained model",
                    remedy="Replace it by a frozen batch norm, such as "
                    "torchvision.ops.FrozenBatchNorm2d.",
                )
        for path, part in module.named_modules():
            if isinstance(part, LoraLinear) and f"{path}.A" in traits.unused:
                name = path.removeprefix("module.")
                raise InputError(
                    "targets",
                    f"contains {name!r}, but the forward pass never calls this layer: it only reads "
                    "the layer's weight, so the adapter has no effect",
                    remedy="Leave this layer out of the targets.",
                )

    def check_config(self, config: Config, module: nn.Module) -> None:
        """Raise InputError for a rank above the size of a target layer."""
        for path, part in module.named_modules():
            if isinstance(part, LoraLinear):
                largest = min(sizes_of(part.base))
                rank = (ADAPTER_DEFAULTS | config)["rank"]
                if rank > largest:
                    raise InputError(
                        "space['rank']",
                        f"must be at most {largest}, the smaller side of the layer "
                        f"{path.removeprefix('module.')!r}",
                        got=rank,
                        remedy="Use smaller ranks, or leave this layer out of the targets.",
                    )


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


@dataclass(eq=False)
class FrozenBody(Pretrained):
    """The settings of ``gputune.frozen``: the body, and the builder of the head."""

    head: Head | None = None

    reads_inputs = False

    def build(self, n_features: int, arguments: Config) -> Adapted:
        """Return a module with a new head and with the frozen tensors of the body.

        ``n_features`` is the number of features that the body returns for a row.
        """
        body = self.copy_of_base()
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
        return Adapted(module, dtype_of(self.base), ["module.head"], self.shared)

    def sizes(self, inputs: Sequence[InputKind], names: Sequence[str] | None) -> Config:
        """Return the number of features that the body returns for a row."""
        if self.shared.width:
            return {"n_features": self.shared.width}
        rows = []
        for shape, dtype in inputs:
            is_float = dtype.is_floating_point
            rows.append(torch.zeros(2, *shape, dtype=dtype_of(self.base) if is_float else dtype))
        name = type(self.base).__name__
        body = in_mode(self.copy_of_base(), training=False)
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
        self.shared.width = features.shape[-1]
        return {"n_features": self.shared.width}


class LoraLinear(nn.Module):
    """A frozen linear layer plus the product of two trained matrices.

    Computes ``base(x) + scale * dropout(x) @ A @ B``. Shapes: x (..., d), A (d, R), B (R, k),
    result (..., k).

    Args:
        base: The frozen ``nn.Linear``, or ``Conv1D`` of transformers.
        max_rank: The number R of columns of A. A member may use fewer.
        drops: Whether the adapter's inputs have dropout.
    """

    base: Any
    scale: Tensor

    def __init__(self, base: nn.Module, max_rank: int, drops: bool) -> None:
        super().__init__()
        self.base = base
        d, k = sizes_of(base)
        rank = min(max_rank, d, k)
        bound = 1 / math.sqrt(d)  # as PEFT: kaiming_uniform_ with a = sqrt(5)
        start = torch.rand(rank, d) * 2 * bound - bound
        self.A = nn.Parameter(start.T.contiguous())
        self.B = nn.Parameter(torch.zeros(rank, k))
        self.register_buffer("scale", torch.ones(()))
        # without the layer, a search draws no random numbers
        self.drop = Dropout() if drops else nn.Identity()

    @property
    def weight(self) -> Tensor:
        """The frozen weight. Some modules read its dtype."""
        weight: Tensor = self.base.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        bias: Tensor | None = self.base.bias
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the frozen layer plus the adapter's outputs."""
        outputs: Tensor = self.base(x)
        inner = self.drop(x.to(self.A.dtype)) @ self.A
        update: Tensor = inner @ self.B * self.scale
        return outputs + update.to(outputs.dtype)

    def start_member(self, config: Config, tensors: Params) -> None:
        """Change the initial tensors of one member, in place: the scale, and zeros beyond its
        rank."""
        values = ADAPTER_DEFAULTS | config
        rank = values["rank"]
        tensors["scale"].fill_(scale_of(values["alpha"], rank, rslora=values["rslora"]))
        tensors["A"][:, rank:] = 0
        tensors["B"][rank:] = 0


def scale_of(alpha: float, rank: int, *, rslora: bool) -> float:
    """Return the factor on the update of a LoRA."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def dtype_of(module: nn.Module) -> torch.dtype:
    """Return the dtype of a module's first floating-point parameter, by default single
    precision."""
    for w in module.parameters():
        if w.is_floating_point():
            return w.dtype
    return torch.float32


def _some_of(names: Sequence[str]) -> str:
    """Return a sentence with the first names of a list."""
    return f"For example {', '.join(map(repr, names[:5]))}." if names else ""


def _cast_inputs(part: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
    """Convert the inputs of a trained module to the dtype of its parameters.

    Its frozen surroundings may be in another dtype, such as bfloat16.
    """
    dtype = next(part.parameters()).dtype
    cast = []
    for x in inputs:
        is_float = isinstance(x, Tensor) and x.is_floating_point()
        cast.append(x.to(dtype) if is_float else x)  # type: ignore[attr-defined]
    return tuple(cast)


def is_transposed(layer: nn.Module) -> bool:
    """Return whether a layer is the ``Conv1D`` of transformers. Its weight is (d, k), the transpose
    of the weight of ``nn.Linear``."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def sizes_of(layer: nn.Module) -> tuple[int, int]:
    """Return the number of inputs and the number of outputs of a linear layer."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    first, second = weight.shape
    return (first, second) if is_transposed(layer) else (second, first)


def linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the paths and the linear layers of a module."""
    for path, part in module.named_modules():
        if path and (isinstance(part, nn.Linear) or is_transposed(part)):
            yield path, part


def is_target(path: str, targets: Targets) -> bool:
    """Return whether a path of a layer matches targets, with PEFT's meaning.

    The text "all-linear" matches every layer. Another text is a regular expression for the whole
    path. A list has the ends of paths.
    """
    if targets == ALL_LINEAR:
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == target or path.endswith(f".{target}") for target in targets)


def _has_adapter_by_default(base: nn.Module, path: str, layer: nn.Module) -> bool:
    """Return whether "all-linear" contains a layer.

    It leaves out the output layer of a model of transformers, as PEFT does, and the layer of
    ``nn.MultiheadAttention``, which is never called.
    """
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    if not hasattr(base, "config"):
        return True
    output = getattr(base, "get_output_embeddings", lambda: None)()
    if output is not None and base.get_submodule(path) is output:
        return False
    is_classifier = task_type(base) == "SEQ_CLS"
    return not (is_classifier and path.partition(".")[0] in _HEADS)


def task_type(base: nn.Module) -> str | None:
    """Return PEFT's task type of a classifier of transformers, "SEQ_CLS" or "TOKEN_CLS", or None
    for another module."""
    if not hasattr(base, "config"):
        return None
    for kind in type(base).__mro__:
        for end, task in _TASKS.items():
            if kind.__name__.endswith(end):
                return task
    return None


def default_heads(base: nn.Module) -> tuple[str, ...]:
    """Return the paths of the modules that PEFT trains as a whole by default.

    They are the head of a sequence or token classifier of transformers.
    """
    if task_type(base) is None:
        return ()
    return tuple(path for path, _ in base.named_modules() if path.endswith(_HEADS))


def _disable_fast_path(module: nn.Module) -> None:
    """Let transformer layers of PyTorch call their linear layers in evaluation mode too.

    Their fast path reads the weights of the layers, and would ignore the adapters.
    """
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoderLayer):
            part.activation_relu_or_gelu = 0


def _are_names(value: object) -> TypeGuard[Collection[str]]:
    """Return whether a value is a list, tuple or set of texts."""
    if isinstance(value, str) or not isinstance(value, Sequence | Set):
        return False
    return all(isinstance(name, str) for name in value)


def plain_targets(targets: object) -> Targets:
    """Return targets as text or as a tuple of texts.

    Raises InputError for another value, and for a text that is not a regular expression.
    """
    if _are_names(targets):
        return tuple(sorted(targets)) if isinstance(targets, Set) else tuple(targets)
    if not isinstance(targets, str):
        raise InputError(
            "targets",
            f"must be {ALL_LINEAR!r}, a regular expression or a list with the ends of layer names",
            got=targets,
            remedy="For example ['query', 'value'].",
        )
    try:
        re.compile(targets)
    except re.error as error:
        raise InputError(
            "targets",
            f"must be a valid regular expression for the whole name of a layer ({error})",
            got=targets,
            remedy="Correct it, or pass a list with the ends of layer names, such as "
            "['query', 'value'].",
        ) from error
    return targets


def adapters_of(builder: object) -> Adapters | None:
    """Return the settings of a builder from ``gputune.lora``, or None for another builder."""
    settings = pretrained_of(builder)
    return settings if isinstance(settings, Adapters) else None


def member_parts(module: nn.Module) -> Mapping[str, LoraLinear]:
    """Return the LoRA layers of a module, by path. Their initial tensors depend on the member."""
    return {path: part for path, part in module.named_modules() if isinstance(part, LoraLinear)}


def member_buffers(module: nn.Module) -> list[str]:
    """Return the names of the scales of a module's LoRA layers. The scales depend on the member."""
    return [f"{path}.scale" for path in member_parts(module)]


def start_member(module: nn.Module, config: Config, tensors: Params) -> None:
    """Change the initial tensors of one member, by name and in place, as its configuration
    says."""
    for path, part in member_parts(module).items():
        part.start_member(config, {name: tensors[f"{path}.{name}"] for name in ("A", "B", "scale")})


def frozen_of(builder: object) -> FrozenBody | None:
    """Return the settings of a builder from ``gputune.frozen``, or None for another builder."""
    settings = pretrained_of(builder)
    return settings if isinstance(settings, FrozenBody) else None
