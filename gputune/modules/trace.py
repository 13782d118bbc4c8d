"""The operations of a step, noted below autograd and vmap: what is left of it once those have done their work.

Tensors are known by their place in memory. What was there before the step keeps its memory; what the step makes gets
other memory each time, so a trace says only how it came about.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

ALIGNED = 64  # bytes: a line of the cache, and the widest vector

_HIDDEN = {aten.native_batch_norm.default: (3, 4)}
"""Arguments that an operation writes without its schema saying so: running statistics."""

_RULES = (
    (torch.Tag.data_dependent_output, "reads a number"),
    (torch.Tag.dynamic_output_shape, "gives a tensor whose shape depends on numbers"),
    (torch.Tag.nondeterministic_seeded, "draws random numbers"),
)


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that torch.compile never sees: torch would import all of it, some seconds, to keep it from that."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class TraceError(RuntimeError):
    """A step did what cannot be recorded."""


@dataclass(frozen=True)
class Place:
    """A tensor by its memory."""

    memory: int
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> "Place":
        offset = int(tensor.storage_offset())
        return Place(memory_of(tensor), tensor.dtype, offset, tuple(tensor.shape), tuple(tensor.stride()))

    def on(self, storage: torch.UntypedStorage, begin: int = 0) -> Tensor:
        """Return the tensor at this place of a memory that begins at a byte of a storage."""
        offset = begin // self.dtype.itemsize + self.offset
        return torch.empty(0, dtype=self.dtype).set_(storage, offset, self.shape, self.stride)

    @property
    def extent(self) -> tuple[int, int]:
        """The bytes of the memory between which it lies."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride))
        return self.offset * self.dtype.itemsize, (self.offset + last + 1) * self.dtype.itemsize

    def overlaps(self, other: "Place") -> bool:
        """Whether both may share bytes."""
        (begin, end), (other_begin, other_end) = self.extent, other.extent
        return self.memory == other.memory and begin < other_end and other_begin < end


@dataclass
class Operation:
    """A call: ``results`` are in memory that it makes, ``writes`` in memory that was there.

    With ``out`` it is given the memory of its only result, or of what it writes, by that keyword.
    """

    function: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]
    results: list[Place | None] = field(default_factory=list)
    writes: list[Place] = field(default_factory=list)
    out: str | None = None

    @property
    def name(self) -> str:
        """Its name among torch's operations, "" for a function that is none."""
        packet = getattr(self.function, "overloadpacket", None)
        return "" if packet is None else str(packet.__name__)

    @property
    def reads(self) -> list[Place]:
        """The places among its arguments."""
        return list(places((self.args, self.kwargs)))

    @property
    def makes(self) -> list[Place]:
        """The places of its results."""
        return [place for place in self.results if place is not None]


@dataclass
class Trace:
    """The operations of a step; ``outside`` is the memory that they found, ``sizes`` the bytes of what they made."""

    operations: list[Operation]
    outside: dict[int, torch.UntypedStorage]
    sizes: dict[int, int]


def trace(step: Callable[[], None]) -> Trace:
    """Return the operations of a step; all that it wrote is afterwards as it was before. Raises TraceError."""
    mode = _OperationRecorder()
    try:
        with mode:
            step()
    finally:
        for held, before in mode.written.values():
            held.copy_(before)
    return Trace(mode.operations, mode.outside, mode.sizes)


class _OperationRecorder(DispatchMode):
    """Runs operations and notes those that compute; a view only gives another place to memory that is known."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.outside: dict[int, torch.UntypedStorage] = {}
        self.sizes: dict[int, int] = {}
        self.kept: list[Tensor] = []  # what the step makes, so that no memory is given twice
        self.written: dict[int, tuple[Tensor, Tensor]] = {}  # bytes that were there before, and what they were

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _check(func, args)
        if func is aten.lift_fresh.default:  # numbers of the host: the step has a copy of its own
            func = aten.clone.default
        inputs = list(tensors((args, kwargs)))
        _check_plain(inputs)
        targets = list(_targets(func, args, kwargs))
        for tensor in inputs:
            self._find(tensor)
        for tensor in targets:
            self._remember(tensor)
        before = [Place.of(tensor) for tensor in inputs]
        result = func(*args, **kwargs)
        if before != [Place.of(tensor) for tensor in inputs]:
            raise TraceError(f"{func} moves or resizes a tensor")
        self._note(func, args, kwargs, result, targets)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any, targets: Sequence[Tensor]) -> None:
        parts = list(result) if isinstance(result, tuple | list) else [result]
        _check_plain([part for part in parts if isinstance(part, Tensor)])
        made = [part for part in parts if isinstance(part, Tensor) and not self._knows(part)]
        if not made and not targets:
            return
        for tensor in made:
            self.kept.append(tensor)
            self.sizes[memory_of(tensor)] = tensor.untyped_storage().nbytes()
        fresh = {memory_of(tensor) for tensor in made}
        results = [Place.of(part) if isinstance(part, Tensor) and memory_of(part) in fresh else None for part in parts]
        encoded = [_encode(value) for value in args], {k: _encode(v) for k, v in kwargs.items()}
        self.operations.append(
            Operation(func, *encoded, results if made else [], [Place.of(tensor) for tensor in targets])
        )

    def _knows(self, tensor: Tensor) -> bool:
        return memory_of(tensor) in self.sizes or memory_of(tensor) in self.outside

    def _find(self, tensor: Tensor) -> None:
        if not self._knows(tensor):
            self.outside[memory_of(tensor)] = tensor.untyped_storage()

    def _remember(self, tensor: Tensor) -> None:
        memory = memory_of(tensor)
        if memory in self.outside and memory not in self.written:
            held = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            self.written[memory] = held, held.clone()


def _check(func: Any, args: Any) -> None:
    masked = any(tensor.dtype == torch.bool for tensor in tensors(args[1:]))
    for tag, reason in _RULES:
        if tag in func.tags and (func is not aten.index.Tensor or masked):
            raise TraceError(f"{func} {reason}")


def _check_plain(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not plain or tensor.is_conj() or tensor.is_neg():
            raise TraceError(f"a tensor of {tensor.layout} on {tensor.device} is not a plain one in main memory")


def _targets(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """What an operation writes in place."""
    hidden = _HIDDEN.get(func, ())
    for i, argument in enumerate(func._schema.arguments):
        if i in hidden or (argument.alias_info is not None and argument.alias_info.is_write):
            yield from tensors(args[i] if i < len(args) else kwargs.get(argument.name))


def memory_of(tensor: Tensor) -> int:
    """Return the number of a tensor's memory, its own as long as the tensor lives."""
    return int(tensor.untyped_storage()._cdata)


def tensors(value: object) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    yield from _of_kind(value, Tensor)


def places(value: object) -> Iterator[Place]:
    """Every place in nested tuples, lists and dicts."""
    yield from _of_kind(value, Place)


def _of_kind(value: object, kind: type) -> Iterator[Any]:
    if isinstance(value, kind):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _of_kind(part, kind)
    elif isinstance(value, dict):
        yield from _of_kind(list(value.values()), kind)


def _encode(value: object) -> Any:
    """An argument with places for tensors."""
    if isinstance(value, Tensor):
        return Place.of(value)
    return [_encode(part) for part in value] if isinstance(value, tuple | list) else value


def arrange(uses: Sequence[tuple[int, int, int]]) -> tuple[list[int], int]:
    """Return where results begin in one block, and its bytes, of the moments of (making, last use) and their bytes.

    In the order of their making each takes the smallest gap among those that are in use then.
    """
    begins: list[int] = []
    size = 0
    for i, (made, _, wanted) in enumerate(uses):
        held = sorted((begins[j], uses[j][2]) for j in range(i) if uses[j][1] >= made)
        gaps, end = [], 0
        for begin, length in held:
            gaps.append((begin - end, end))
            end = max(end, _round_up(begin + length))
        fitting = [gap for gap in gaps if gap[0] >= wanted]
        begins.append(min(fitting)[1] if fitting else end)
        size = max(size, _round_up(begins[-1] + wanted))
    return begins, size


def _round_up(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
