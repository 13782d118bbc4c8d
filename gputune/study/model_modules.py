"""The modules of a saved model, built again: with which arguments, for which inputs, of which size."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from gputune.data.arrays import ArrayLayout, ArrayStatistics
from gputune.data.encode import Layout, Statistics
from gputune.errors import InputError
from gputune.modules.calls import convert
from gputune.modules.construction import Builder, call_arguments, construct, materialise, name_of
from gputune.population.network import InputKind
from gputune.seeding import keyed_draws
from gputune.types import Config, Json

TENSORS = "model.safetensors"
"""The file that holds a model's tensors."""


def arguments_of(
    spec: Json, layout: Layout | ArrayLayout, statistics: Statistics | ArrayStatistics, n_outputs: int
) -> list[tuple[Config, Config]]:
    """Return the sizes with which a model's modules are built, an ensemble's several, and what each takes besides."""
    members = [dict(member) for member in spec.get("ensemble", [spec["kwargs"]])]
    pairs = []
    for member, ends in zip(members, spec.get("columns") or [None] * len(members), strict=True):
        if isinstance(layout, Layout):
            assert isinstance(statistics, Statistics)
            begin, end = ends or (0, statistics.n_inputs)
            D, groups = end - begin, layout.groups(statistics.places)[begin:end]
            sizes: Config = {"n_features": D, "input_shape": (D,), "feature_groups": groups}
        else:
            sizes = {"n_features": layout.n_features, "input_shape": layout.shapes[0], "feature_groups": None}
        sizes["n_outputs"] = n_outputs
        sizes |= {name: value for name, value in {**spec["kwargs"], **member}.items() if name in sizes}
        pairs.append((sizes, {name: value for name, value in member.items() if name not in sizes}))
    return pairs


def _input_kinds(layout: ArrayLayout, statistics: Statistics | ArrayStatistics) -> list[InputKind]:
    """Return the kinds of arrays as the module gets them."""
    assert isinstance(statistics, ArrayStatistics)
    parts = zip(layout.shapes, layout.dtypes, statistics.channels, strict=True)
    return [(shape, torch.float32 if scaled else getattr(torch, dtype)) for shape, dtype, scaled in parts]


def check_size(members: Sequence[Config], kind: str, state: dict[str, Tensor]) -> None:
    """Raise ValueError for networks that are larger than their tensors, before they take the memory."""
    words = {"n_features": 0, "n_outputs": 0, "width": 128, "depth": 2 if kind == "mlp" else 0}
    numbers = 0
    for arguments in members:
        if isinstance(width := arguments.get("width"), tuple):  # of each layer
            sizes = (int(arguments.get("n_features") or 0), *map(int, width), int(arguments.get("n_outputs") or 0))
            numbers += sum((a + 1) * b for a, b in pairwise(sizes))
            continue
        D, K, H, depth = (int(arguments.get(word) or least) for word, least in words.items())
        numbers += (D + 1) * H + (depth - 1) * (H + 1) * H + (H + 1) * K if depth else (D + 1) * K
    there = sum(tensor.numel() for tensor in state.values())
    if numbers > there:
        raise ValueError(f"it describes a network of {numbers} parameters, and {TENSORS} holds {there}")


def build_modules(
    module_class: Builder,
    members: Sequence[tuple[Config, Config]],
    layout: Layout | ArrayLayout,
    statistics: Statistics | ArrayStatistics,
    dtype: torch.dtype,
    remedy: str,
) -> list[nn.Module]:
    """Build the modules of a model by their ``arguments_of``; ``remedy`` may mend a failure."""
    kinds = [] if isinstance(layout, Layout) else _input_kinds(layout, statistics)
    names = None if isinstance(layout, Layout) else layout.names
    modules = []
    try:
        # Its start is thrown away, the caller's stream is not.
        with keyed_draws(torch.device("cpu"), 0, "load"):
            for sizes, arguments in members:
                module = construct(module_class, call_arguments(module_class, sizes, arguments))
                materialise(module, kinds or [(sizes["input_shape"], torch.float32)], names)
                convert(module, dtype)
                modules.append(module)
            return modules
    except Exception as error:  # a user's constructor may raise anything
        raise InputError(
            f"{name_of(module_class)} could not be built from the saved arguments {members[0][0] | members[0][1]}: "
            f"{type(error).__name__}: {error}; {remedy}pass the class as it was."
        ) from error
