"""Compiles a trace into a plain Python function without autograd, vmap or views.

A trace lists the operations of one training step (``trace.py``). A place is a tensor's position and
layout in memory.

Almost no memory is allocated: the results of a step are in one block of memory. Each result has a
place there from its computation to its last use. The step therefore stays in the cache and asks the
system for no pages. Every tensor object is made once, and each line of the function calls one
kernel. The results equal the results of the step itself, because the same kernels run in the same
order.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from math import isfinite

import torch
from torch import Tensor

from gputune.modules.trace import (
    ALIGNED,
    Kwargs,
    Operation,
    Operator,
    Place,
    TakeStep,
    Trace,
    TraceError,
    mapped_leaves,
    memories_of,
)

aten = torch.ops.aten
_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key

_CHANNELS = 8  # channels that fill a vector

_FACTORIES = set(
    "zeros ones full empty arange scalar_tensor empty_strided zeros_like ones_like full_like "
    "empty_like new_zeros new_ones new_full new_empty new_empty_strided".split()
)
"""Operations with a result that depends only on the argument's shape, not on its values."""

_PLAIN = set(
    "add sub mul div bmm baddbmm addcmul exp log sqrt rsqrt sum mean gather index_select "
    "scatter_add tanh sigmoid neg where clamp_min clamp_max amax cat pow cos".split()
)
"""Operations with a function in ``torch`` that takes the same arguments.

Calls of these functions from Python take half the time.
"""


def compile_trace(trace: Trace) -> TakeStep:
    """Return a function that repeats a traced training step on the current values in its memory.
    Raises TraceError."""
    return _Source(simplify_trace(trace, _with_out)).function()


def _with_place(op: Operation) -> Operation:
    """Return a copy of an operation with a single result that writes into given memory. Other
    operations are returned unchanged."""
    return op if op.writes or len(op.results) != 1 else replace(op, out="out")


def simplify_trace(trace: Trace, with_out: Callable[[Operation], Operation] = _with_place) -> Trace:
    """Return a trace without constant results, unused results and needless copies.

    A copy is needless if its source was made only to be copied. A result that is the same in every
    step is computed now, and its memory is then outside of the step. The function ``with_out``
    returns an operation that writes its result into given memory.
    """
    changed = set[int]()
    for op in trace.operations:
        changed |= memories_of(op.writes)
    constants: dict[int, Tensor] = {}
    rest = []

    def tensor(place: Place) -> Tensor:
        if place.memory in constants:
            return place.on(constants[place.memory].untyped_storage())
        return torch.empty_strided(place.shape, place.stride, dtype=place.dtype)

    for op in trace.operations:
        reads = [] if op.name in _FACTORIES else op.reads
        if (
            all(place.memory in constants for place in reads)
            and len(op.results) == 1
            and not op.writes
            and op.makes[0].memory not in changed
        ):
            args, kwargs = mapped_leaves((op.args, op.kwargs), Place, tensor)
            result = op.function(*args, **kwargs)
            place = op.makes[0]
            if result.stride() != place.stride:
                result = tensor(place).copy_(result)
            constants[place.memory] = result
        else:
            rest.append(op)
    wanted = set[int]()
    used = []
    for op in reversed([*map(with_out, rest)]):
        outputs = memories_of(op.outputs)
        if outputs & wanted or not outputs <= trace.sizes.keys():  # else nothing reads the result
            wanted |= memories_of(op.reads)
            used.append(op)
    outside = dict(trace.outside)
    for memory, constant in constants.items():
        outside[memory] = constant.untyped_storage()
    return Trace(_written_at_once(used[::-1]), outside, trace.sizes)


def _with_out(op: Operation) -> Operation:
    """Return a form of an operation that writes into given memory, if torch has a kernel for
    this."""
    if op.function is aten.max_pool2d_with_indices.default:
        x = op.args[0]
        is_wide = x.shape[-3] >= _CHANNELS and x.stride[-3] > 1
        return replace(op, function=_max_pool) if is_wide else op
    if len(op.results) != 1 or op.writes:
        return op
    if op.name in _FACTORIES:  # later operations write into this memory
        if "zeros" in op.name:
            return replace(op, function=_zero, args=[], kwargs={}, out="out")
        if "empty" in op.name:
            return replace(op, function=_do_nothing, args=[], kwargs={}, out="out")
        return op
    if op.function in _WRITERS:
        return replace(op, function=_WRITERS[op.function], out="out")
    function, out = _out_variant(op.function)
    if op.name in _PLAIN and out == "out":
        function = getattr(torch, op.name)
    return replace(op, function=function, out=out) if out else op


def _skips_axes(op: Operation) -> bool:
    """Return whether an operation has None among its indices, which methods of tensors refuse.

    None stands for an axis without an index.
    """
    return any(isinstance(value, list | tuple) and None in value for value in op.args)


def _zero(*, out: Tensor) -> None:
    out.zero_()


def _do_nothing(*, out: Tensor) -> None:
    """Leave memory unchanged, for operations such as ``empty`` with uninitialized results."""


def _copy(source: Tensor, *, out: Tensor, **_: object) -> None:
    out.copy_(source)


def _max_pool(x: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    """Compute max pooling with the channels last, in vectors.

    Otherwise the kernel processes one value at a time, which makes it 4x slower.
    """
    last = x.contiguous(memory_format=torch.channels_last)
    pooled, indices = aten.max_pool2d_with_indices(last, *args)
    return pooled.contiguous(memory_format=torch.contiguous_format), indices.contiguous()


def _select_backward(
    gradient: Tensor, shape: Sequence[int], axis: int, index: int, *, out: Tensor
) -> None:
    out.zero_().select(axis, index).copy_(gradient)


_WRITERS: dict[Operator, Callable[..., object]] = {
    aten.clone.default: _copy,
    aten._to_copy.default: _copy,
    aten.relu.default: partial(torch.clamp_min, min=0),
    aten.select_backward.default: _select_backward,
    **{getattr(aten, name).Scalar: getattr(torch, name) for name in ("add", "sub", "mul", "div")},
}
"""Functions that write their result into given memory, for operations without such a kernel."""


@cache
def _out_variant(function: Operator) -> tuple[Operator, str]:
    """Return the variant of an operation that writes into a given tensor, and the tensor's keyword
    or "".

    The variant must have its own kernel for this.
    """
    if len(function._schema.returns) != 1:
        return function, ""
    inputs, _ = _arguments(function)
    for name in function.overloadpacket.overloads():
        variant = getattr(function.overloadpacket, name)
        variant_inputs, outs = _arguments(variant)
        # A variant without its own kernel computes its result elsewhere and copies it.
        if len(outs) == 1 and variant_inputs == inputs and _has_kernel(variant.name(), "CPU"):
            return variant, outs[0]
    return function, ""


def _arguments(function: Operator) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the names and types of an operation's inputs, and the names of its ``out``
    arguments."""
    inputs = []
    outs = []
    for argument in function._schema.arguments:
        if argument.is_out:
            outs.append(argument.name)
        else:
            inputs.append((argument.name, str(argument.type)))
    return inputs, outs


def _written_at_once(operations: Sequence[Operation]) -> list[Operation]:
    """Remove copies: a result that is only copied is written directly to the copy's destination."""
    result = list(operations)
    copies = set()
    makers = dict[int, int]()
    uses = Counter[int]()
    places = [op.places for op in result]
    for i, op in enumerate(result):
        makers |= dict.fromkeys(memories_of(op.makes), i)
        uses.update(place.memory for place in op.reads + op.writes)
    for i, op in enumerate(result):
        if op.function is not aten.copy_.default or not isinstance(op.args[1], Place):
            continue
        target, source = op.args[:2]
        maker = makers.get(source.memory, i)
        destination = _destination(result[maker], source, target)
        if uses[source.memory] != 1 or destination is None:
            continue
        # New results are included: they may lie in the destination before its own memory is made.
        between = itertools.chain.from_iterable(places[maker:i])
        if not any(target.overlaps(place) for place in between):
            result[maker] = replace(result[maker], results=[], writes=[destination])
            places[maker] = result[maker].places
            copies.add(i)
    return [op for i, op in enumerate(result) if i not in copies]


def _destination(maker: Operation, source: Place, target: Place) -> Place | None:
    """Return the place in memory where an operation must write to make a copy of its result
    unnecessary.

    ``source`` is the place that the copy reads, and ``target`` the place that it writes. The result
    is None if that is impossible.
    """
    if maker.out is None or len(maker.makes) != 1 or maker.function in (_zero, _do_nothing):
        return None
    result = maker.makes[0]
    is_same = (source.dtype, _layout(source)) == (target.dtype, _layout(target))
    if not is_same or result.extent != source.extent or result.dtype != source.dtype:
        return None
    return replace(
        result, memory=target.memory, offset=target.offset + result.offset - source.offset
    )


def _layout(place: Place) -> list[tuple[int, int]]:
    """Return the memory layout of a tensor as (size, stride) pairs.

    Axes with one entry are left out. Axes that follow each other in memory are merged.
    """
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
    """Writes the source code of the compiled step. Every line is an operation, and every tensor a
    global variable."""

    def __init__(self, trace: Trace) -> None:
        self.operations = trace.operations
        self.storages = trace.outside
        self.last = trace.last_uses()
        made = {
            op.makes[0].memory: i for i, op in enumerate(self.operations) if op.out and op.makes
        }
        self.begin, size = trace.arranged(made)
        self.arena = torch.empty(size + ALIGNED, dtype=torch.uint8)
        self.shift = -self.arena.data_ptr() % ALIGNED
        self.names: dict[object, str] = {}
        self.values: Kwargs = {"as_strided": torch.as_strided}
        self.results: dict[int, tuple[Place, str]] = {}

    def function(self) -> TakeStep:
        """Return a Python function that runs the recorded operations of a training step again.

        The function deletes each result that has its own memory after the last use of the result.
        """
        unused = defaultdict(list)
        for memory, i in self.last.items():
            if memory not in self.begin and memory not in self.storages:
                unused[i].append(memory)
        lines = ["def step():", "pass"]
        for i, op in enumerate(self.operations):
            if op.function is not _do_nothing:
                lines.append(self._line(op))
            for memory in unused[i]:
                lines.append(f"del {self.results[memory][1]}")
        exec(compile("\n    ".join(lines), "<recorded step>", "exec"), self.values)
        step: TakeStep = self.values["step"]
        return step

    def _line(self, op: Operation) -> str:
        """Return the line of Python source code that runs an operation."""
        arguments = [*map(self._text, op.args)]
        for key, value in op.kwargs.items():
            arguments.append(f"{key}={self._text(value)}")
        if op.out is not None and (op.makes or op.out not in op.kwargs):
            arguments.append(f"{op.out}={self._text(op.outputs[0])}")
        elif (
            not op.results
            and op.name.endswith("_")
            and hasattr(Tensor, op.name)
            and not _skips_axes(op)
        ):
            return f"{arguments[0]}.{op.name}({', '.join(arguments[1:])})"
        call = f"{self._name(op.function, 'f')}({', '.join(arguments)})"
        if op.out is not None or not op.makes:
            return call
        names = []
        for place in op.results:  # in memory that the operation allocates itself
            name = "_"
            if place is not None:
                name = f"v{len(self.results)}"
                self.results[place.memory] = (place, name)
            names.append(name)
        return f"{', '.join(names)} = {call}"

    def _text(self, value: object) -> str:
        """Return the source code of an operation's argument."""
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(self._text, value))}]"
        if value is None or isinstance(value, bool | int | str):
            return repr(value)
        if isinstance(value, float) and isfinite(value):
            return repr(value)
        if not isinstance(value, Place):
            return self._name(value, "c")
        if value.memory not in self.results:
            return self._name(value, "t")
        result, name = self.results[value.memory]
        if result.dtype != value.dtype:
            raise TraceError(f"a result of {result.dtype} is read as {value.dtype}")
        if result == value:
            return name
        return f"as_strided({name}, {value.shape}, {value.stride}, {value.offset})"

    def _name(self, value: object, prefix: str) -> str:
        """Return the name of a value's global variable, and define the variable at the first
        use."""
        if value not in self.names:
            name = f"{prefix}{len(self.names)}"
            self.names[value] = name
            if not isinstance(value, Place):
                self.values[name] = value
            elif value.memory in self.begin:
                begin = self.shift + self.begin[value.memory]
                self.values[name] = value.on(self.arena.untyped_storage(), begin)
            else:
                self.values[name] = value.on(self.storages[value.memory])
        return self.names[value]
