"""Keeps the outputs of frozen layers before the first trained layer: the features of the rows.

These outputs do not depend on any trained tensor, so they are the same for all trials, folds and
epochs. gputune computes them once for each row, before the training. The features become inputs of
the dataset, and the module replays them (``pretrained.py``).

A frozen layer is a submodule without trained parameters, and not a part of another one. In shapes,
n counts rows. An output is taken apart into leaves: tensors and other values.
"""

import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from gputune.data.dataset import Dataset, stage_rows
from gputune.ground.device import free_of_gpu
from gputune.ground.errors import InputError
from gputune.ground.memory import free_memory
from gputune.ground.text import size_words
from gputune.ground.types import Config
from gputune.modules.calls import convert
from gputune.modules.construction import Builder, build_module
from gputune.modules.pretrained import (
    INPUT,
    KEPT,
    ROWS,
    Call,
    Pretrained,
    Unread,
    pretrained_of,
    replaying,
)
from gputune.population.outputs import call_module
from gputune.population.population import Shape, module_arguments
from gputune.scoring.objective import Objective

_EXAMPLES = 6  # rows on which the layers are tried
_SHARE = 0.25  # of the free memory that features may take
_BLOCK_BYTES = 64 << 20  # of the features that are computed at once

Forward: TypeAlias = Callable[[slice, bool], object]
"""Runs a module on a slice of example rows, in training mode if its second argument is True."""
Recorded: TypeAlias = list[tuple[str, object]]
"""The calls of frozen layers in their order: the path of the layer, and its output."""


class NotKept(Exception):
    """The reason why features of a module cannot be kept, as a clause."""


class _Stop(Exception):
    """Ends a forward pass at its first trained layer."""


def with_kept_features(
    builder: Builder | None,
    configs: Sequence[Config],
    data: Dataset,
    objective: Objective | None = None,
) -> tuple[Dataset, str]:
    """Return a dataset with kept features as its inputs, and a text for the plan.

    The text says how much memory the features take, or why they are not kept. Then the dataset is
    unchanged. The text is "" for a module without a pretrained base.
    """
    settings = pretrained_of(builder)
    if builder is None or settings is None or not configs:
        return data, ""
    try:
        _check(configs, data, objective, settings)
        kept = _features(builder, configs[0], data, settings)
    except NotKept as reason:
        settings.shared.calls = ()
        return data, f"features of frozen layers are not kept: {reason}"
    inputs: tuple[Tensor, ...] = ()
    names: tuple[str, ...] = ()
    if settings.reads_inputs:
        inputs = data.inputs
        numbered = tuple(f"{INPUT}{number}" for number in range(len(inputs)))
        names = data.names or numbered
    size = sum(x.nbytes for x in kept)
    kept_data = replace(
        data,
        inputs=(*inputs, *(x[None] for x in kept)),
        names=(*names, *(f"{KEPT}{number}" for number in range(len(kept)))),
        scaling=(None,) * (len(inputs) + len(kept)),
        feature_groups=None,
    )
    place = "" if settings.folder is None else " on disk"
    return kept_data, f"features of frozen layers are kept{place} ({size_words(size)})"


def _check(
    configs: Sequence[Config], data: Dataset, objective: Objective | None, settings: Pretrained
) -> None:
    """Raise NotKept if a search cannot use kept features."""
    if objective is not None and objective.augment is not None:
        raise NotKept("augment changes the inputs in each step")
    if data.scorer_rows is not None:
        raise NotKept("the custom score calls the module with rows of X")
    targets = {repr(config.get("module__targets")) for config in configs}
    if settings.reads_inputs and len(targets) > 1:
        raise NotKept("trials adapt different layers (module__targets)")
    is_scaled = any(scaling is not None for scaling in data.scaling)
    if data.preparations or is_scaled or any(len(x) > 1 for x in data.inputs):
        raise NotKept("the inputs are scaled by the training rows of each fold")
    if data.on_host:
        raise NotKept("the inputs do not fit into the memory of the GPU")


def _features(
    builder: Builder, config: Config, data: Dataset, settings: Pretrained
) -> list[Tensor]:
    """Return the kept features of all rows, one tensor (n, ...) each, on the data's device.

    Raises NotKept.
    """
    device = data.device
    n_examples = min(_EXAMPLES, data.n_rows)
    if n_examples < 2:
        raise NotKept("there is only one row")
    shape = replace(Shape.of(data), folds=1, replicas=1)
    module = convert(build_module(builder, module_arguments(config), shape, seed=0), data.dtype)
    module = module.to(device)
    inner = module.module
    assert isinstance(inner, nn.Module)
    examples = [x[:n_examples] for x in _rows(data, torch.arange(n_examples))]

    def forward(rows: slice, training: bool) -> object:
        inputs = [x[rows].clone() for x in examples]
        module.train(training)
        return call_module(module, inputs, data.names)

    settings.shared.calls = ()
    try:
        calls = find_calls(inner, forward, n_examples)
    except (InputError, NotKept):
        raise
    except Exception as error:
        first = str(error).strip().split("\n")[0].rstrip(".")
        raise NotKept(f"the module failed on {n_examples} rows: {first}") from error
    module.eval()
    tried = record(inner, lambda: forward(slice(0, n_examples), False))
    of_row = sum(x[0].nbytes for x in kept_leaves(calls, tried))
    _check_size(of_row * data.n_rows, device, settings.folder)
    settings.shared.calls = tuple(calls)
    block = max(1, min(256, _BLOCK_BYTES // max(1, of_row)))
    features: list[Tensor] = []
    for places in torch.split(torch.arange(data.n_rows), block):
        run = partial(call_module, module, _rows(data, places), data.names)
        leaves = kept_leaves(calls, record(inner, run))
        if not features:
            features = [_empty(x, data.n_rows, settings.folder) for x in leaves]
        for all_rows, x in zip(features, leaves, strict=True):
            all_rows[places[0] : places[-1] + 1] = x
    return features


def _check_size(size: int, device: torch.device, folder: Path | None) -> None:
    """Raise NotKept if there is not enough space for features of ``size`` bytes."""
    if folder is not None:
        if device.type != "cpu":
            raise NotKept("features_folder is only for training on the CPU")
        free = shutil.disk_usage(folder).free
        if size > free:
            raise NotKept(
                f"they take {size_words(size)}, and {str(folder)!r} has only {size_words(free)} of "
                "free space"
            )
        return
    free = free_memory() if device.type == "cpu" else free_of_gpu(device)
    if size > _SHARE * free:
        raise NotKept(
            f"they take {size_words(size)}, and only {size_words(int(_SHARE * free))} of memory "
            "are for them"
        )


def _empty(leaf: Tensor, n_rows: int, folder: Path | None) -> Tensor:
    """Return a tensor for a feature of all rows, (n, ...), in memory or in a file that is mapped
    into memory. ``leaf`` is the feature of some rows."""
    shape = (n_rows, *leaf.shape[1:])
    if folder is None:
        return torch.empty(shape, dtype=leaf.dtype, device=leaf.device)
    descriptor, path = tempfile.mkstemp(prefix="gputune-features-", dir=folder)
    os.close(descriptor)
    size = math.prod(shape) * leaf.element_size()
    numbers = np.memmap(path, np.uint8, "w+", shape=(size,))
    # The file is deleted with the last tensor on it, or when Python ends.
    weakref.finalize(numbers, Path(path).unlink, missing_ok=True)
    return torch.from_numpy(numbers).view(leaf.dtype).view(shape)


def _rows(data: Dataset, positions: Tensor) -> list[Tensor]:
    """Return the rows at some positions, one tensor (m, ...) per input."""
    rows = []
    for number, x in enumerate(data.inputs):
        gathered = stage_rows(x[0].index_select(0, positions.to(x.device)), data.device)
        rows.append(data.read(number, gathered[None], slice(0, 1))[0])
    return rows


def find_calls(module: nn.Module, forward: Forward, n_rows: int) -> list[Call]:
    """Return the calls of frozen layers that later forward passes replay.

    Args:
        module: The module. Its trained tensors change here.
        forward: Runs the module on example rows.
        n_rows: The number of example rows, at least 2.

    Raises:
        NotKept: Nothing can be kept.
    """
    whole = slice(0, n_rows)
    half = slice(0, n_rows // 2)
    alone = record(module, lambda: forward(whole, False))
    trained = record(module, lambda: forward(whole, True))
    shorter = record(module, lambda: forward(half, False))
    if not any(_has_product(module.get_submodule(path)) for path, _ in alone):
        raise NotKept("no frozen linear or convolution layer comes before the first trained layer")
    calls = []
    for (path, output), (_, in_training), (_, of_half) in zip(alone, trained, shorter):
        leaves, spec = tree_flatten(output)
        replayed = []
        others = zip(tree_flatten(in_training)[0], tree_flatten(of_half)[0])
        for leaf, (other, part) in zip(leaves, others):
            if not _is_equal(leaf, other):
                raise NotKept(
                    f"{path!r}, which comes before the first trained layer, has other outputs in "
                    "training than in evaluation, such as with dropout"
                )
            if not isinstance(leaf, Tensor) or _is_equal(leaf, part):
                replayed.append(leaf)
            elif leaf.shape[:1] == (n_rows,) and _is_equal(leaf[half], part):
                replayed.append(ROWS)
            else:
                raise NotKept(f"the rows of a minibatch change each other's outputs in {path!r}")
        calls.append(Call(path, spec, tuple(replayed)))
    # The trained tensors change after the recording, so a feature that reads one of them differs.
    with torch.no_grad():
        draws = torch.Generator().manual_seed(0)
        for w in module.parameters():
            if w.requires_grad:
                w.add_(0.05 * torch.randn(w.shape, generator=draws).to(w))
        calls = _without_unread(module, calls, alone, lambda: forward(whole, False))
        kept = kept_leaves(calls, alone)
        for training in (False, True):
            with replaying(module, calls, kept):
                outputs = forward(whole, training)
            if not _is_equal(outputs, forward(whole, training)):
                raise NotKept("the module returns other outputs with kept features")
    return calls


def _without_unread(
    module: nn.Module, calls: list[Call], recorded: Recorded, run: Callable[[], object]
) -> list[Call]:
    """Return the calls without the features that no later layer reads: NaN in their place does not
    change the outputs of ``run``."""
    expected = run()
    for place, (_, output) in enumerate(recorded):
        for position, value in enumerate(tree_flatten(output)[0]):
            leaves = list(calls[place].leaves)
            if leaves[position] is not ROWS or not value.is_floating_point():
                continue
            leaves[position] = Unread(tuple(value.shape[1:]), value.dtype, torch.nan)
            tried = list(calls)
            tried[place] = replace(calls[place], leaves=tuple(leaves))
            kept = kept_leaves(tried, recorded)
            if not kept:
                return calls
            with replaying(module, tried, kept):
                outputs = run()
            if _is_equal(outputs, expected):
                leaves[position] = Unread(tuple(value.shape[1:]), value.dtype)
                calls[place] = replace(calls[place], leaves=tuple(leaves))
    return calls


def record(module: nn.Module, run: Callable[[], object]) -> Recorded:
    """Return the calls of frozen layers before the first trained layer in ``run()``, a forward
    pass of the module."""
    calls: Recorded = []

    def note(path: str, _layer: nn.Module, _inputs: object, output: object) -> None:
        # Copies, into which later code cannot write.
        calls.append((path, tree_map_only(Tensor, lambda x: x.detach().clone(), output)))

    def stop(*_: object) -> None:
        raise _Stop

    hooks = []
    for path, layer in _frozen_layers(module):
        hooks.append(layer.register_forward_hook(partial(note, path), prepend=True))
    for part in module.modules():
        if any(w.requires_grad for w in part.parameters(recurse=False)):
            hooks.append(part.register_forward_pre_hook(stop))
    try:
        with torch.no_grad(), suppress(_Stop):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def kept_leaves(calls: Sequence[Call], recorded: Recorded) -> list[Tensor]:
    """Return the kept features (n, ...) among the outputs of recorded calls."""
    kept = []
    for call, (_, output) in zip(calls, recorded, strict=True):
        for leaf, value in zip(call.leaves, tree_flatten(output)[0], strict=True):
            if leaf is ROWS:
                kept.append(value)
    return kept


def _frozen_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the paths and the frozen layers of a module."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        is_trained = any(w.requires_grad for w in child.parameters())
        # A list of modules is never called, only its entries are.
        if is_trained or isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _frozen_layers(child, f"{path}.")
        else:
            yield path, child


def _has_product(layer: nn.Module) -> bool:
    """Return whether a layer has a weight matrix that is not an embedding."""
    for part in layer.modules():
        is_embedding = isinstance(part, nn.Embedding | nn.EmbeddingBag)
        weights = part.parameters(recurse=False)
        if not is_embedding and any(w.dim() > 1 for w in weights):
            return True
    return False


def _is_equal(a: object, b: object) -> bool:
    """Return whether two leaves are equal, up to rounding."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    epsilon = torch.finfo(a.dtype).eps
    scale = float(a.abs().nan_to_num(0.0).max()) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=1e3 * epsilon, atol=1e3 * epsilon * scale)
