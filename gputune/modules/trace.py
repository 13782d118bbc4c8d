"""Records the operations of a training step below autograd and vmap, after both have done their
work.

A trace is the list of these operations. Tensors are identified by their place: the memory, dtype,
offset, shape and strides. Memory that existed before the step stays the same. Memory that the step
makes is different each time, so a trace only records how it was made.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

Leaf = TypeVar("Leaf")
Function: TypeAlias = Callable[..., Any]
Operator: TypeAlias = "OpOverload[..., Any]"
Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = dict[str, Any]
TakeStep: TypeAlias = Callable[[], None]
Decompose: TypeAlias = Callable[..., Function | None]
"""Returns the function that computes an operation by simpler operations, or None."""
Storages: TypeAlias = dict[int, torch.UntypedStorage]
"""Storages of blocks of memory, by their identifier or their address."""

ALIGNED = 64  # bytes: a cache line, and the widest vector
# New memory of a traced step after which the trace frees results without further use.
_FREED_BYTES = 16 << 20

_HIDDEN = {aten.native_batch_norm.default: (3, 4)}
"""Arguments that an operation writes although its schema does not say so, such as running
statistics."""

_RULES = (
    (torch.Tag.data_dependent_output, "reads a value of a tensor"),
    (torch.Tag.dynamic_output_shape, "returns a tensor with a shape that depends on values"),
    (torch.Tag.nondeterministic_seeded, "draws random numbers"),
)


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode of torch that torch.compile ignores.

    Otherwise torch would import all of torch.compile, which takes some seconds, only to hide the
    mode from it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class TraceError(RuntimeError):
    """Raised if a step does something that cannot be recorded."""


@dataclass(frozen=True)
class Place:
    """The place of a tensor in memory: the memory's identifier, and dtype, offset, shape and
    strides."""

    memory: int
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> "Place":
        """Return the place (memory, dtype and layout) of a tensor."""
        at = memory_of(tensor), tensor.dtype, int(tensor.storage_offset())
        return Place(*at, tuple(tensor.shape), tuple(tensor.stride()))

    def on(self, storage: torch.UntypedStorage, begin: int = 0) -> Tensor:
        """Return the tensor at this place. The place's memory begins at byte ``begin`` of
        ``storage``."""
        offset = begin // self.dtype.itemsize + self.offset
        return torch.empty(0, dtype=self.dtype).set_(storage, offset, self.shape, self.stride)

    @property
    def extent(self) -> tuple[int, int]:
        """The first byte that the tensor covers in its memory, and the byte after the last."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride))
        return self.offset * self.dtype.itemsize, (self.offset + last + 1) * self.dtype.itemsize

    def overlaps(self, other: "Place") -> bool:
        """Return whether the tensors at two places may share bytes of memory."""
        if self.memory != other.memory:
            return False
        begin, end = self.extent
        other_begin, other_end = other.extent
        return begin < other_end and other_begin < end


@dataclass
class Operation:
    """One recorded call of a torch operation, with the places in memory of its tensors.

    ``results`` are in memory that the operation makes, ``writes`` in memory that existed before. If
    ``out`` is set, it is the keyword by which the call receives the memory of its only result or of
    its written tensor. ``replaced`` is the name of the operation that the step itself calls, if the
    trace has simpler operations in its place.
    """

    function: Any
    args: list[Any]
    kwargs: Kwargs
    results: list[Place | None] = field(default_factory=list)
    writes: list[Place] = field(default_factory=list)
    out: str | None = None
    replaced: str = ""

    @property
    def name(self) -> str:
        """The name of the operation in torch, or "" for another function."""
        packet = getattr(self.function, "overloadpacket", None)
        return "" if packet is None else str(packet.__name__)

    @property
    def reads(self) -> list[Place]:
        """The places in memory that the operation reads: the tensors among its arguments."""
        return leaves((self.args, self.kwargs), Place)

    @property
    def makes(self) -> list[Place]:
        """The places of the operation's results, in memory that the operation makes."""
        return [place for place in self.results if place is not None]

    @property
    def outputs(self) -> list[Place]:
        """The places in memory of the operation's new results and of the tensors that it writes."""
        return self.makes + self.writes

    @property
    def places(self) -> list[Place]:
        """All places in memory that the operation reads, makes or writes."""
        return self.reads + self.outputs


@dataclass
class Trace:
    """The recorded operations of one training step.

    ``outside`` is the memory that existed before the step. ``sizes`` are the bytes of the memory
    that the step made.
    """

    operations: list[Operation]
    outside: Storages
    sizes: dict[int, int]

    def last_uses(self) -> dict[int, int]:
        """Return the index of the last operation that uses each memory, by the memory's
        identifier."""
        last = {}
        for i, op in enumerate(self.operations):
            for place in op.places:
                last[place.memory] = i
        return last

    def arranged(self, made: dict[int, int]) -> tuple[dict[int, int], int]:
        """Arrange the memories of a step in one block, so that later results reuse free bytes.

        Return the first byte of each memory, and the block's size in bytes. ``made`` has the index
        of the operation that makes each memory, in ascending order.
        """
        last = self.last_uses()
        uses = [(i, last[memory], self.sizes[memory]) for memory, i in made.items()]
        begins, size = arrange(uses)
        return dict(zip(made, begins)), size


def trace(step: TakeStep, decompose: Decompose | None = None) -> Trace:
    """Run a step, record its operations, and undo all of its writes.

    Operations for which ``decompose`` returns a function are replaced by the operations of this
    function. Raises TraceError if the step does something that cannot be recorded.
    """
    mode = _OperationRecorder(decompose)
    try:
        with mode:
            step()
    finally:
        for tensor, before in mode.written.values():
            tensor.copy_(before)
    return Trace(mode.operations, mode.outside, mode.sizes)


class _OperationRecorder(DispatchMode):  # type: ignore[no-untyped-call]
    """Runs operations, and records each operation except views.

    A view computes nothing: it is only another place in known memory.
    """

    def __init__(self, decompose: Decompose | None = None) -> None:
        super().__init__()
        self.decompose = decompose
        self.replaced: list[Operator] = []
        self.operations: list[Operation] = []
        self.outside: Storages = {}
        self.sizes: dict[int, int] = {}
        self.made = _MadeMemories()
        # bytes that existed before the step, and a copy of their values
        self.written: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Operator, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        if reason := reason_against(func, args):
            raise TraceError(f"{func} {reason}")
        if func is aten.lift_fresh.default:  # numbers of the host: the step makes its own copy
            func = aten.clone.default
        if self.decompose is not None and func not in self.replaced:
            function = self.decompose(func, args, kwargs)
            if function is not None:
                return self._simpler(func, partial(function, *args, **kwargs))
        inputs = tensors((args, kwargs))
        targets = written_tensors(func, args, kwargs)
        _check_plain(inputs)
        for tensor in inputs:
            if not self._knows(tensor):
                self.outside[memory_of(tensor)] = tensor.untyped_storage()
        for tensor in targets:
            memory = memory_of(tensor)
            if memory in self.outside and memory not in self.written:
                numbers = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self.written[memory] = numbers, numbers.clone()
        before = list(map(Place.of, inputs))
        result = func(*args, **kwargs)
        if before != list(map(Place.of, inputs)):
            raise TraceError(f"{func} moves or resizes a tensor")
        parts = list(result) if isinstance(result, tuple | list) else [result]
        outputs = tensors(parts)
        _check_plain(outputs)
        made = [tensor for tensor in outputs if not self._knows(tensor)]
        if made or targets:
            for tensor in made:
                self.made.add(tensor.untyped_storage())
            sizes = {memory_of(tensor): tensor.untyped_storage().nbytes() for tensor in made}
            self.sizes |= sizes
            results: list[Place | None] = []
            for part in parts if made else []:
                is_made = isinstance(part, Tensor) and memory_of(part) in sizes
                results.append(Place.of(part) if is_made else None)
            places, kwargs = mapped_leaves((list(args), kwargs), Tensor, Place.of)
            writes = list(map(Place.of, targets))
            replaced = str(self.replaced[0].overloadpacket) if self.replaced else ""
            op = Operation(func, places, kwargs, results, writes, replaced=replaced)
            self.operations.append(op)
        return result

    def _simpler(self, func: Operator, function: Callable[[], Any]) -> Any:
        """Compute an operation by simpler operations, and record these."""
        self.replaced.append(func)
        try:
            with self:
                return function()
        except RuntimeError as error:
            raise TraceError(f"{self.replaced[0].overloadpacket} has no C code") from error
        finally:
            self.replaced.pop()

    def _knows(self, tensor: Tensor) -> bool:
        """Return whether the recorder has already seen the memory of a tensor."""
        return memory_of(tensor) in self.sizes or memory_of(tensor) in self.outside


class _MadeMemories:
    """The memories that a traced step makes. They are kept, so that none gets the identifier of an
    earlier one.

    The bytes of a memory that no tensor uses any more are freed. Otherwise a trace would take the
    sum of all results of a step.
    """

    def __init__(self) -> None:
        self.used: list[torch.UntypedStorage] = []
        self.freed: list[torch.UntypedStorage] = []
        self.new_bytes = 0  # since the last look for unused memories

    def add(self, memory: torch.UntypedStorage) -> None:
        """Keep a new memory. After some new megabytes, free the memories without tensors."""
        self.used.append(memory)
        self.new_bytes += memory.nbytes()
        if self.new_bytes > _FREED_BYTES:
            self.new_bytes = 0
            self._free_unused()

    def _free_unused(self) -> None:
        used = []
        for memory in self.used:
            # Only this object refers to it.
            if torch._C._storage_Use_Count(memory._cdata) == 1 and memory.resizable():
                memory.resize_(0)
                self.freed.append(memory)
            else:
                used.append(memory)
        self.used = used


def arguments_of(func: Operator, args: Args | list[Any], kwargs: Kwargs) -> Kwargs:
    """Return all arguments of an operation by name, with the defaults of torch's schema."""
    arguments = {}
    for i, argument in enumerate(func._schema.arguments):
        if i < len(args):
            arguments[argument.name] = args[i]
        elif argument.has_default_value():
            arguments[argument.name] = argument.default_value
    return arguments | kwargs


def reason_against(func: Operator, args: Args) -> str:
    """Return why an operation cannot be recorded, such as "draws random numbers", or ""."""
    # only a mask as index gives a shape that depends on values
    is_masked = any(tensor.dtype == torch.bool for tensor in tensors(args[1:]))
    if func is aten.index.Tensor and not is_masked:
        return ""
    return next((reason for tag, reason in _RULES if tag in func.tags), "")


def written_tensors(func: Operator, args: Args, kwargs: Kwargs) -> list[Tensor]:
    """Return the tensors that an operation writes into."""
    written: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        is_target = argument.alias_info is not None and argument.alias_info.is_write
        if is_target or i in _HIDDEN.get(func, ()):
            written += tensors(args[i] if i < len(args) else kwargs.get(argument.name))
    return written


def _check_plain(tensors: Sequence[Tensor]) -> None:
    """Raise TraceError for a tensor that is not a plain tensor in main memory."""
    for tensor in tensors:
        is_plain = (
            tensor.layout is torch.strided
            and tensor.device.type == "cpu"
            and not tensor.is_quantized
        )
        if not is_plain or tensor.is_conj() or tensor.is_neg():
            raise TraceError(
                f"a {tensor.layout} tensor on {tensor.device} is not a plain tensor in main memory"
            )


def memory_of(tensor: Tensor) -> int:
    """Return the identifier of a tensor's memory. It is unique while the tensor exists."""
    return int(tensor.untyped_storage()._cdata)


def memories_of(places: Iterable[Place]) -> set[int]:
    """Return the identifiers of the memories that contain some places."""
    return {place.memory for place in places}


def clones(originals: Iterable[Tensor]) -> list[Tensor]:
    """Return a copy of each tensor in a list, in new memory."""
    return [tensor.clone() for tensor in originals]


def tensors(value: object) -> list[Tensor]:
    """Return every tensor in nested tuples, lists and dicts."""
    return leaves(value, Tensor)


def leaves(value: object, kind: type[Leaf]) -> list[Leaf]:
    """Return every value of the type ``kind`` in nested tuples, lists and dicts."""
    # torch's tree_leaves() is not used: it makes half a million Python calls in a search of a small
    # module.
    found: list[Leaf] = []
    _collect((value,), kind, found)
    return found


def _collect(parts: Iterable[object], kind: type[Leaf], found: list[Leaf]) -> None:
    """Append every value of the type ``kind`` in nested tuples, lists and dicts to ``found``."""
    for part in parts:
        if isinstance(part, kind):
            found.append(part)
        elif isinstance(part, tuple | list):
            _collect(part, kind, found)
        elif isinstance(part, dict):
            _collect(part.values(), kind, found)


def mapped_leaves(value: Any, kind: type[Leaf], function: Callable[[Leaf], object]) -> Any:
    """Return nested tuples, lists and dicts with ``function`` applied to each value of the type
    ``kind``.

    torch's tree_map_only() gives the same result, but takes several times as long.
    """
    if isinstance(value, kind):
        return function(value)
    if type(value) is dict:
        return {key: mapped_leaves(part, kind, function) for key, part in value.items()}
    if type(value) is list:
        return [mapped_leaves(part, kind, function) for part in value]
    if type(value) is tuple:
        return tuple([mapped_leaves(part, kind, function) for part in value])
    return value


def arrange(uses: Sequence[tuple[int, int, int]]) -> tuple[list[int], int]:
    """Arrange results in one block of memory: return their first bytes, and the block's size in
    bytes.

    ``uses`` has (creation time, time of last use, bytes) of each result. In the order of creation,
    each result takes the smallest free gap between the results that are in use at that time.
    """
    begins: list[int] = []
    size = 0
    for made, _, wanted in uses:
        # (begin, length) of the results that are in use then
        busy = [(begin, use[2]) for begin, use in zip(begins, uses) if use[1] >= made]
        gaps = []
        end = 0
        for begin, length in sorted(busy):
            if begin - end >= wanted:
                gaps.append((begin - end, end))
            # Each result begins at a multiple of ``ALIGNED`` bytes.
            end = max(end, -(-(begin + length) // ALIGNED) * ALIGNED)
        begins.append(min(gaps, default=(0, end))[1])
        size = max(size, begins[-1] + wanted)
    return begins, -(-size // ALIGNED) * ALIGNED
