"""LoRA: small trained matrices next to the frozen linear layers of a pretrained module.

A member is one trial on one fold. Rank and alpha are values of a member: A and B have ``max_rank``
columns and rows, and the padding is 0 in both, so that it stays 0.

Source: Hu et al. (2021), LoRA: Low-Rank Adaptation of Large Language Models,
https://arxiv.org/abs/2106.09685. The targets and the saved files are those of PEFT.
"""

import copy
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gputune.ground.errors import InputError, advice_on_keys, with_argument_hints
from gputune.ground.text import did_you_mean
from gputune.ground.types import Config, Params
from gputune.models import Dropout
from gputune.modules.pretrained import (
    Adapted,
    Pretrained,
    check_base,
    checked_folder,
    pretrained_of,
)
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


@dataclass(frozen=True)
class Adapters(Pretrained):
    """The settings of ``gputune.lora``: the base, and the layers that train."""

    targets: Targets = ALL_LINEAR
    modules_to_save: tuple[str, ...] = ()
    ranks: dict[Targets, int] = field(default_factory=dict, repr=False, kw_only=True)
    """The default rank, by targets."""

    def defaults(self, params: Mapping[str, object]) -> Config:
        """Return the default values of ``ADAPTER_DEFAULTS`` for a configuration.

        The rank is at most the smallest side of the adapted layers.
        """
        targets = plain_targets(params.get("module__targets", self.targets))
        if targets not in self.ranks:
            trained = self._trained_modules(self.base)
            rank: int = ADAPTER_DEFAULTS["rank"]
            for path in self._targets(self.base, targets, trained):
                rank = min(rank, *sizes_of(self.base.get_submodule(path)))
            self.ranks[targets] = rank
        return ADAPTER_DEFAULTS | {"rank": self.ranks[targets]}

    def build(self, targets: Targets, max_rank: int, drops: bool) -> Adapted:
        """Return a module with new adapters and with the frozen tensors of the base."""
        module = copy.deepcopy(self.base, dict[int, Any](self.frozen_parameters()))
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
        return Adapted(module, dtype, paths, self.moved, self.store)

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
    if output is not None and dict(base.named_modules()).get(path) is output:
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
    check_base(base)
    if modules_to_save is None:
        modules_to_save = default_heads(base)
    elif not _are_names(modules_to_save):
        is_name = isinstance(modules_to_save, str)
        raise InputError(
            "modules_to_save",
            "must be a list of names",
            got=modules_to_save,
            remedy=f"Pass {[modules_to_save]!r}." if is_name else "For example ['classifier'].",
        )
    folder = checked_folder(features_folder)
    names = tuple(modules_to_save)
    settings = Adapters(base, plain_targets(targets), names, features_folder=folder)
    default_targets = settings.targets

    def build(
        *, targets: Targets = default_targets, max_rank: int = 16, drops: bool = False
    ) -> nn.Module:
        return settings.build(plain_targets(targets), max_rank, drops)

    build.__name__ = f"lora({type(base).__name__})"
    vars(build)["pretrained"] = settings
    build()
    return build


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
