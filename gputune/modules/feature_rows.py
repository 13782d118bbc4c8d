"""Replaces the inputs of a dataset by kept features: the outputs of a module's frozen layers.

The features of all rows are computed once, before the training. All folds and trials read them.
"""

import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gputune.data.dataset import Dataset, stage_rows
from gputune.ground.device import free_of_gpu
from gputune.ground.errors import InputError
from gputune.ground.memory import free_memory
from gputune.ground.text import size_words
from gputune.ground.types import Config
from gputune.modules.calls import convert
from gputune.modules.construction import Builder, build_module
from gputune.modules.kept_features import INPUT, KEPT, NotKept, find_calls, kept_leaves, record
from gputune.modules.pretrained import Pretrained, pretrained_of
from gputune.population.outputs import call_module
from gputune.population.population import Shape, module_arguments
from gputune.scoring.objective import Objective

_EXAMPLES = 6  # rows on which the layers are tried
_SHARE = 0.25  # of the free memory that features may take
_BLOCK_BYTES = 64 << 20  # of the features that are computed at once


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
        settings.store.calls = ()
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
    place = "" if settings.features_folder is None else " on disk"
    return kept_data, f"features of frozen layers are kept{place} ({size_words(size)})"


def _check(
    configs: Sequence[Config], data: Dataset, objective: Objective | None, settings: Pretrained
) -> None:
    """Raise NotKept if a search cannot use kept features."""
    if objective is not None and objective.augment is not None:
        raise NotKept("augment changes the inputs in each step")
    if data.scorer_rows is not None:
        raise NotKept("the custom score calls the module with rows of X")
    if settings.reads_inputs and _has_several_targets(configs):
        raise NotKept("trials adapt different layers (module__targets)")
    is_scaled = any(scaling is not None for scaling in data.scaling)
    if data.preparations or is_scaled or any(len(x) > 1 for x in data.inputs):
        raise NotKept("the inputs are scaled by the training rows of each fold")
    if data.on_host:
        raise NotKept("the inputs do not fit into the memory of the GPU")


def _has_several_targets(configs: Sequence[Config]) -> bool:
    """Return whether configurations of a LoRA adapt different layers."""
    return len({repr(config.get("module__targets")) for config in configs}) > 1


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
        if training:
            module.train()
        else:
            module.eval()
        return call_module(module, inputs, data.names)

    settings.store.calls = ()
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
    _check_size(of_row * data.n_rows, device, settings.features_folder)
    settings.store.calls = tuple(calls)
    block = max(1, min(256, _BLOCK_BYTES // max(1, of_row)))
    features: list[Tensor] = []
    for places in torch.split(torch.arange(data.n_rows), block):
        run = partial(call_module, module, _rows(data, places), data.names)
        leaves = kept_leaves(calls, record(inner, run))
        if not features:
            features = [_empty(x, data.n_rows, settings.features_folder) for x in leaves]
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
    weakref.finalize(numbers, _delete, path)
    return torch.from_numpy(numbers).view(leaf.dtype).view(shape)


def _delete(path: str) -> None:
    """Delete a file if it still exists."""
    Path(path).unlink(missing_ok=True)


def _rows(data: Dataset, positions: Tensor) -> list[Tensor]:
    """Return the rows at some positions, one tensor (m, ...) per input."""
    rows = []
    for number, x in enumerate(data.inputs):
        gathered = stage_rows(x[0].index_select(0, positions.to(x.device)), data.device)
        rows.append(data.read(number, gathered[None], slice(0, 1))[0])
    return rows
