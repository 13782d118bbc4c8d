"""Keeps the outputs of frozen layers before the first trained layer: the features of the rows.

These outputs do not depend on any trained tensor, so they are the same for all trials, folds and
epochs. gputune records them for each row. Then the module replays them: a call of a frozen layer
returns its recorded output instead of computing it.

A frozen layer is a submodule without trained parameters, and not a part of another one. In shapes,
n counts rows. An output is taken apart into leaves: tensors and other values. A leaf of rows has
the rows as its first axis.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

# No argument of a user's module begins like this ("input_ids" is a common one).
KEPT = "gputune_kept_"
"""Begin of the names of inputs that hold kept features."""
INPUT = "gputune_input_"
"""Begin of the names that inputs without names get next to kept features."""

Forward: TypeAlias = Callable[..., object]
Recorded: TypeAlias = list[tuple[str, object]]
"""The calls of frozen layers in their order: the path of the layer, and its output."""


class NotKept(Exception):
    """The reason why features of a module cannot be kept, as a clause."""


class _Stop(Exception):
    """Ends a forward pass at its first trained layer."""


class _Unread(NamedTuple):
    """A leaf of rows that no later layer reads. ``shape`` is the shape of one row."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class _Row(NamedTuple):
    """A leaf of rows that is kept. ``number`` is its place among the kept features."""

    number: int


@dataclass(frozen=True)
class Call:
    """A call of a frozen layer that is replayed.

    Each leaf is a ``_Row``, an ``_Unread``, or a constant: a tensor or another value.
    """

    path: str
    spec: TreeSpec
    leaves: tuple[object, ...]

    def output(self, kept: Sequence[Tensor]) -> object:
        """Return the output of the call for the rows of ``kept``, one tensor (n, ...) each."""
        leaves = []
        for leaf in self.leaves:
            if isinstance(leaf, _Row):
                leaf = kept[leaf.number]
            elif isinstance(leaf, _Unread):
                zero = torch.zeros((), dtype=leaf.dtype, device=kept[0].device)
                leaf = zero.expand(len(kept[0]), *leaf.shape)
            elif isinstance(leaf, Tensor):
                leaf = leaf.to(kept[0].device)
            leaves.append(leaf)
        return tree_unflatten(leaves, self.spec)


class FeatureStore:
    """The calls that the modules of one builder replay. It is empty until features are kept."""

    def __init__(self) -> None:
        self.calls: tuple[Call, ...] = ()
        self.width = 0
        """The number of features that a frozen body returns for a row; 0 if it is not known."""

    def replay(self, module: nn.Module, kept: Sequence[Tensor]) -> Any:
        """Return a context in which the first calls of frozen layers return kept features."""
        return replaying(module, self.calls, kept)


def _is_trained(part: nn.Module) -> bool:
    return any(w.requires_grad for w in part.parameters())


def frozen_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the paths and the frozen layers of a module."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        # A list of modules is never called, only its entries are.
        if _is_trained(child) or isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from frozen_layers(child, f"{path}.")
        else:
            yield path, child


@contextmanager
def _forwards(
    layers: Sequence[tuple[str, nn.Module]], make: Callable[[str, nn.Module], Forward]
) -> Iterator[None]:
    """Inside the context, the layers have the forward functions that ``make`` returns."""
    changed = []
    try:
        for path, layer in layers:
            if "forward" not in vars(layer):
                vars(layer)["forward"] = make(path, layer)
                changed.append(layer)
        yield
    finally:
        for layer in changed:
            vars(layer).pop("forward", None)


def _copies(output: object) -> object:
    """Return an output with copies of its tensors, into which later code cannot write."""
    leaves, spec = tree_flatten(output)
    copies = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return tree_unflatten(copies, spec)


def record(module: nn.Module, forward: Forward) -> Recorded:
    """Return the calls of frozen layers before the first trained layer in ``forward()``, a forward
    pass of the module."""
    calls: Recorded = []

    def make(path: str, layer: nn.Module) -> Forward:
        original = layer.forward

        def recorded(*args: object, **kwargs: object) -> object:
            output = original(*args, **kwargs)
            calls.append((path, _copies(output)))
            return output

        return recorded

    def stop(*_: object) -> None:
        raise _Stop

    hooks = []
    for part in module.modules():
        if any(w.requires_grad for w in part.parameters(recurse=False)):
            hooks.append(part.register_forward_pre_hook(stop))
    try:
        with _forwards(list(frozen_layers(module)), make), torch.no_grad(), suppress(_Stop):
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return calls


@contextmanager
def replaying(module: nn.Module, calls: Sequence[Call], kept: Sequence[Tensor]) -> Iterator[None]:
    """Inside the context, the first calls of the module's frozen layers return kept features."""
    waiting = list(reversed(calls))

    def make(path: str, layer: nn.Module) -> Forward:
        original = layer.forward

        def replayed(*args: object, **kwargs: object) -> object:
            if not waiting:
                return original(*args, **kwargs)
            if waiting[-1].path != path:
                raise RuntimeError(
                    f"the forward pass called {path!r} in the place of {waiting[-1].path!r}, so "
                    "its kept features cannot be used"
                )
            return waiting.pop().output(kept)

        return replayed

    # Only the layers of the recorded calls. Which other layers are frozen cannot be found here:
    # stacked members have tensors without a gradient in evaluation mode.
    paths = dict.fromkeys(call.path for call in calls)
    layers = [(path, module.get_submodule(path)) for path in paths]
    with _forwards(layers, make):
        yield


def kept_leaves(calls: Sequence[Call], recorded: Recorded) -> list[Tensor]:
    """Return the kept features (n, ...) among the outputs of recorded calls."""
    kept: dict[int, Tensor] = {}
    for call, (_, output) in zip(calls, recorded, strict=True):
        for leaf, value in zip(call.leaves, tree_flatten(output)[0], strict=True):
            if isinstance(leaf, _Row):
                kept[leaf.number] = value
    return [kept[number] for number in range(len(kept))]


def find_calls(
    module: nn.Module, forward: Callable[[slice, bool], object], n_rows: int
) -> list[Call]:
    """Return the calls of frozen layers that later forward passes replay.

    Args:
        module: The module. Its trained tensors change here.
        forward: Runs the module on a slice of example rows, in training mode if its second argument
            is True.
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
    number = 0
    for (path, output), (_, in_training), (_, of_half) in zip(alone, trained, shorter):
        leaves, spec = tree_flatten(output)
        found = []
        others = zip(tree_flatten(in_training)[0], tree_flatten(of_half)[0])
        for leaf, (other, part) in zip(leaves, others):
            if not _is_equal(leaf, other):
                raise NotKept(
                    f"{path!r}, which comes before the first trained layer, has other outputs in "
                    "training than in evaluation, such as with dropout"
                )
            if not isinstance(leaf, Tensor) or (leaf.shape == part.shape and _is_equal(leaf, part)):
                found.append(leaf)
            elif leaf.shape[:1] == (n_rows,) and _is_equal(leaf[half], part):
                found.append(_Row(number))
                number += 1
            else:
                raise NotKept(f"the rows of a minibatch change each other's outputs in {path!r}")
        calls.append(Call(path, spec, tuple(found)))
    return _without_unread(module, calls, alone, forward, whole)


def _without_unread(
    module: nn.Module,
    calls: list[Call],
    recorded: Recorded,
    forward: Callable[[slice, bool], object],
    rows: slice,
) -> list[Call]:
    """Return the calls without the features that no later layer reads.

    Raises NotKept if replayed features give other outputs than the module itself.
    """
    # The trained tensors change after the recording, so a feature that reads one of them differs.
    with torch.no_grad():
        draws = torch.Generator().manual_seed(0)
        for w in module.parameters():
            if w.requires_grad:
                w.add_(0.05 * torch.randn(w.shape, generator=draws).to(w))
        expected = forward(rows, False)
        for place, position in _places_of_rows(calls):
            kept = kept_leaves(calls, recorded)
            leaf = calls[place].leaves[position]
            assert isinstance(leaf, _Row)
            number = leaf.number
            value = kept[number]
            if not value.is_floating_point():
                continue
            kept[number] = torch.full_like(value, torch.nan)
            with replaying(module, calls, kept):
                outputs = forward(rows, False)
            if _is_equal(outputs, expected):
                unread = _Unread(tuple(value.shape[1:]), value.dtype)
                calls = _with_leaf(calls, place, position, unread)
        kept = kept_leaves(calls, recorded)
        if not kept:
            raise NotKept("the trained layers read nothing of the frozen layers before them")
        for training in (False, True):
            with replaying(module, calls, kept):
                outputs = forward(rows, training)
            if not _is_equal(outputs, forward(rows, training)):
                raise NotKept("the module returns other outputs with kept features")
    return calls


def _places_of_rows(calls: Sequence[Call]) -> list[tuple[int, int]]:
    """Return the places of all leaves of rows: the number of the call, and of the leaf in it."""
    places = []
    for place, call in enumerate(calls):
        for position, leaf in enumerate(call.leaves):
            if isinstance(leaf, _Row):
                places.append((place, position))
    return places


def _with_leaf(calls: Sequence[Call], place: int, position: int, leaf: object) -> list[Call]:
    """Return the calls after one leaf is replaced. Kept features get consecutive numbers."""
    all_leaves = [list(call.leaves) for call in calls]
    all_leaves[place][position] = leaf
    number = 0
    numbered = []
    for call, leaves in zip(calls, all_leaves, strict=True):
        for other, value in enumerate(leaves):
            if isinstance(value, _Row):
                leaves[other] = _Row(number)
                number += 1
        numbered.append(Call(call.path, call.spec, tuple(leaves)))
    return numbered


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
