"""A trace as a straight Python function: no autograd, no vmap, no views, and hardly an allocation.

What a step makes lies in one block of memory, where each result has a place from its making to its last use, so that a
step stays in the cache and asks the system for no pages. Every tensor is made once; a line of the function is one
kernel. The numbers are those of the step itself: the same kernels in the same order.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from gputune.modules.trace import ALIGNED, Operation, Place, Trace, TraceError, arrange

aten = torch.ops.aten
_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key

_CHANNELS = 8  # a vector of them

_FACTORIES = {
    *("zeros", "ones", "full", "empty", "arange", "scalar_tensor", "empty_strided"),
    *("zeros_like", "ones_like", "full_like", "empty_like"),
    *("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"),
}
"""Operations whose result depends on the shape of what they are given, and on none of its numbers."""

_PLAIN = {
    *("add", "sub", "mul", "div", "bmm", "baddbmm", "addcmul", "exp", "log", "sqrt", "rsqrt", "sum", "mean"),
    *("gather", "index_select", "scatter_add", "tanh", "sigmoid", "neg", "where", "clamp_min", "clamp_max"),
    *("amax", "cat", "pow", "cos"),
}
"""Operations whose function in ``torch`` takes the same arguments and, called from Python, half the time."""


def compile_trace(trace: Trace) -> Callable[[], None]:
    """Return a function that takes the step again, on what its memory holds then. Raises TraceError."""
    constants, operations = _without_constants(trace)
    operations = _written_at_once(_without_unused([_with_out(op) for op in operations], trace), trace)
    return _Source(operations, trace, constants).function()


def split_constants(trace: Trace) -> tuple[dict[int, Tensor], list[Operation]]:
    """Return what is the same in every step, by its memory, and the operations that compute the rest of it.

    Their results lie where they would be copied to, of those with one result.
    """
    constants, operations = _without_constants(trace)
    given = [op if op.writes or len(op.results) != 1 else replace(op, out="out") for op in operations]
    return constants, _written_at_once(_without_unused(given, trace), trace)


def _without_constants(trace: Trace) -> tuple[dict[int, Tensor], list[Operation]]:
    """Compute what is the same in every step now; return it by its memory, and the other operations."""
    changed = {place.memory for op in trace.operations for place in op.writes}
    constants: dict[int, Tensor] = {}
    rest = []
    for op in trace.operations:
        reads = [] if op.name in _FACTORIES else op.reads
        constant = all(place.memory in constants for place in reads) and len(op.results) == 1 and not op.writes
        if constant and op.makes[0].memory not in changed:
            constants[op.makes[0].memory] = _constant_result(op, constants)
        else:
            rest.append(op)
    return constants, rest


def _constant_result(op: Operation, constants: dict[int, Tensor]) -> Tensor:
    def tensor(place: Place) -> Tensor:
        held = constants.get(place.memory)
        return place.on(held.untyped_storage()) if held is not None else _empty_at(place)

    args, kwargs = _map_places(op.args, tensor), _map_places(op.kwargs, tensor)
    result: Tensor = op.function(*args, **kwargs)
    if tuple(result.stride()) == op.makes[0].stride:
        return result
    return _empty_at(op.makes[0]).copy_(result)


def _empty_at(place: Place) -> Tensor:
    return torch.empty_strided(place.shape, place.stride, dtype=place.dtype)


def _with_out(op: Operation) -> Operation:
    """Let an operation write its result into memory that it is given, where it has a kernel that does."""
    if (
        op.function is aten.max_pool2d_with_indices.default
        and op.args[0].shape[-3] >= _CHANNELS
        and op.args[0].stride[-3] > 1
    ):
        return replace(op, function=_max_pool)
    if len(op.results) != 1 or op.writes:
        return op
    if op.name in _FACTORIES:  # of memory that is written into later
        return _prepare(op)
    if (writer := _WRITERS.get(op.function)) is not None:
        return replace(op, function=writer, out="out")
    found = _out_variant(op.function)
    if found is None:
        return op
    name = op.name
    function = getattr(torch, name) if name in _PLAIN and found[1] == "out" else found[0]
    return replace(op, function=function, out=found[1])


def _prepare(op: Operation) -> Operation:
    name = op.name
    if "zeros" in name:
        return replace(op, function=_zero, args=[], kwargs={}, out="out")
    if "empty" in name:
        return replace(op, function=_do_nothing, args=[], kwargs={}, out="out")
    return op


def _zero(*, out: Tensor) -> None:
    out.zero_()


def _do_nothing(*, out: Tensor) -> None:
    """Leave memory as it is: the operation's result was not initialised."""


def _copy(source: Tensor, *, out: Tensor, **_: object) -> None:
    out.copy_(source)


def _relu(source: Tensor, *, out: Tensor) -> None:
    torch.clamp_min(source, 0, out=out)


def _max_pool(x: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    """Pool with the channels last, in vectors; otherwise the kernel takes one number at a time, 4 times as long."""
    last = x.contiguous(memory_format=torch.channels_last)
    pooled, indices = aten.max_pool2d_with_indices(last, *args)
    return pooled.contiguous(memory_format=torch.contiguous_format), indices.contiguous()


def _select_backward(slope: Tensor, shape: Sequence[int], axis: int, index: int, *, out: Tensor) -> None:
    out.zero_().select(axis, index).copy_(slope)


_WRITERS: dict[Any, Callable[..., object]] = {
    aten.clone.default: _copy,
    aten._to_copy.default: _copy,
    aten.relu.default: _relu,
    aten.select_backward.default: _select_backward,
    aten.mul.Scalar: torch.mul,
    aten.div.Scalar: torch.div,
    aten.add.Scalar: torch.add,
    aten.sub.Scalar: torch.sub,
}
"""What writes the result of an operation that has no such kernel of its own."""


@cache
def _out_variant(function: Any) -> tuple[Any, str] | None:
    """Return an operation's variant that writes into a given tensor by a kernel of its own, and the keyword for it."""
    wanted = [(a.name, str(a.type)) for a in function._schema.arguments]
    if len(function._schema.returns) != 1:
        return None
    for name in function.overloadpacket.overloads():
        variant = getattr(function.overloadpacket, name)
        given = [(a.name, str(a.type)) for a in variant._schema.arguments if not a.is_out]
        outs = [a.name for a in variant._schema.arguments if a.is_out]
        # One without a kernel of its own computes its result elsewhere and copies it.
        if len(outs) == 1 and given == wanted and _has_kernel(variant.name(), "CPU"):
            return variant, outs[0]
    return None


def _without_unused(operations: Sequence[Operation], trace: Trace) -> list[Operation]:
    """Leave out what nothing reads."""
    wanted: set[int] = set()
    kept = []
    for op in reversed(operations):
        into = {place.memory for place in (*op.makes, *op.writes)}
        if into & wanted or not into <= trace.sizes.keys():
            wanted.update(place.memory for place in op.reads)
            kept.append(op)
    return kept[::-1]


def _written_at_once(operations: Sequence[Operation], trace: Trace) -> list[Operation]:
    """Write a result where it is only made to be copied to, rather than copy it."""
    found = list(operations)
    makers = {place.memory: i for i, op in enumerate(found) for place in op.makes}
    uses = Counter(place.memory for op in found for place in (*op.reads, *op.writes))
    copies = set()
    for i, op in enumerate(found):
        if op.function is not aten.copy_.default or not isinstance(op.args[1], Place):
            continue
        target, source = op.args[:2]
        maker = makers.get(source.memory, i)
        if uses[source.memory] == 1 and (goal := _goal(found[maker], source, target)) is not None:
            between = (p for other in found[maker:i] for p in (*other.reads, *other.writes))
            if not any(target.overlaps(place) for place in between):
                found[maker] = replace(found[maker], results=[], writes=[goal])
                copies.add(i)
    return [op for i, op in enumerate(found) if i not in copies]


def _goal(maker: Operation, source: Place, target: Place) -> Place | None:
    """Return where an operation must write its result, so that ``source`` of it would be ``target``; None: nowhere."""
    if maker.out is None or len(maker.makes) != 1 or maker.function in (_zero, _do_nothing):
        return None
    result = maker.makes[0]
    alike = (source.dtype, _layout(source)) == (target.dtype, _layout(target))
    if not alike or result.extent != source.extent or result.dtype != source.dtype:
        return None
    offset = target.offset + result.offset - source.offset
    return Place(target.memory, target.dtype, offset, result.shape, result.stride)


def _layout(place: Place) -> list[tuple[int, int]]:
    """The memory that a tensor covers: its axes of more than one entry, those that follow on each other as one."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(place.shape, place.stride):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


class _Source:
    """Writes the function: every line an operation, every tensor a global name."""

    def __init__(self, operations: Sequence[Operation], trace: Trace, constants: dict[int, Tensor]) -> None:
        self.operations = operations
        self.storages = {**trace.outside, **{m: t.untyped_storage() for m, t in constants.items()}}
        self.last = {
            place.memory: i
            for i, op in enumerate(operations)
            for place in (*op.reads, *op.writes, *op.makes)
            if place.memory not in self.storages
        }
        ours = {p.memory: i for i, op in enumerate(operations) if op.out for p in op.makes}
        self.begins, size = arrange([(ours[m], self.last[m], trace.sizes[m]) for m in ours])
        self.begin = dict(zip(ours, self.begins))
        self.arena = torch.empty(size + ALIGNED, dtype=torch.uint8)
        self.shift = -self.arena.data_ptr() % ALIGNED
        self.names: dict[Any, str] = {}
        self.values: dict[str, Any] = {"as_strided": torch.as_strided}
        self.results: dict[int, tuple[Place, str]] = {}

    def function(self) -> Callable[[], None]:
        """Return the function."""
        source = "\n    ".join(["def step():", *(self.lines() or ["pass"])])
        exec(compile(source, "<recorded step>", "exec"), self.values)
        step: Callable[[], None] = self.values["step"]
        return step

    def lines(self) -> list[str]:
        """Return its lines."""
        gone = defaultdict(list)
        for memory, i in self.last.items():
            if memory not in self.begin:
                gone[i].append(memory)
        lines = []
        for i, op in enumerate(self.operations):
            if op.function is not _do_nothing:
                lines.append(self._line(op))
            if gone[i]:
                lines.append(f"del {', '.join(self.results[memory][1] for memory in gone[i])}")
        return lines

    def _line(self, op: Operation) -> str:
        words = [*map(self._text, op.args), *(f"{key}={self._text(value)}" for key, value in op.kwargs.items())]
        if op.out is not None and (op.makes or op.out not in op.kwargs):
            words.append(f"{op.out}={self._text((op.makes or op.writes)[0])}")
            return f"{self._name(op.function, 'f')}({', '.join(words)})"
        method = op.name
        if not op.results and method.endswith("_") and hasattr(Tensor, method):
            return f"{words[0]}.{method}({', '.join(words[1:])})"
        call = f"{self._name(op.function, 'f')}({', '.join(words)})"
        return f"{self._prepare(op)} = {call}" if op.makes else call

    def _prepare(self, op: Operation) -> str:
        """Give names to results in memory that an operation takes itself."""
        names = []
        for place in op.results:
            names.append("_" if place is None else f"v{len(self.results)}")
            if place is not None:
                self.results[place.memory] = (place, names[-1])
        return ", ".join(names)

    def _text(self, value: object) -> str:
        if isinstance(value, Place):
            return self._tensor(value)
        if isinstance(value, list):
            return f"[{', '.join(map(self._text, value))}]"
        if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and isfinite(value)):
            return repr(value)
        return self._name(value, "c")

    def _tensor(self, place: Place) -> str:
        if place.memory not in self.results:
            return self._name(place, "t")
        whole, name = self.results[place.memory]
        if whole.dtype != place.dtype:
            raise TraceError(f"a result of {whole.dtype} is read as {place.dtype}")
        if whole == place:
            return name
        return f"as_strided({name}, {place.shape}, {place.stride}, {place.offset})"

    def _name(self, value: object, prefix: str) -> str:
        if value not in self.names:
            self.names[value] = f"{prefix}{len(self.names)}"
            self.values[self.names[value]] = self._value(value) if isinstance(value, Place) else value
        return self.names[value]

    def _value(self, place: Place) -> Tensor:
        if place.memory in self.begin:
            return place.on(self.arena.untyped_storage(), self.shift + self.begin[place.memory])
        return place.on(self.storages[place.memory])


def _map_places(value: object, tensor: Callable[[Place], Tensor]) -> Any:
    if isinstance(value, Place):
        return tensor(value)
    if isinstance(value, list):
        return [_map_places(part, tensor) for part in value]
    return {k: _map_places(part, tensor) for k, part in value.items()} if isinstance(value, dict) else value
