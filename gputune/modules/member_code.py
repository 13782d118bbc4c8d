"""Writes the training steps of one member as C code, from their traces.

A member is one trial on one fold. A trace lists the operations of one training step (``trace.py``).
A place is a tensor's position and layout in memory. A kernel is a C function for one kind of loop.

Each operation becomes a loop or a call, on memory that is known by its index. Operations that are
more than a formula per entry have a function here: matrix products, sums, softmax, norms, losses,
and indexing. Such a function yields the calls that an operation becomes. It receives the arguments
of the operation by name, and the place of its result. An operation that is not supported here
raises TraceError.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from gputune.modules.member_indices import (
    added_at_places,
    chosen_rows,
    embedding_gradient,
    loops_over,
    require,
)
from gputune.modules.member_kernels import (
    FORMULAS,
    Line,
    Loops,
    Writer,
    c_type,
    kwargs_of,
    named,
    over,
    with_entry,
)
from gputune.modules.program import simplify_trace
from gputune.modules.trace import Kwargs, Operation, Place, Storages, Trace, TraceError, memories_of

# columns of the widest tile of a product; it needs working memory for the inner rows and one tile
_TILE = 96


def _pick(values: Sequence[int], axes: Iterable[int]) -> list[int]:
    """Return the sizes or strides of the selected axes."""
    return [values[axis] for axis in axes]


def _product(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel calls for a matrix product with an added matrix or bias."""
    names = ("self", "mat2")
    added = None
    for pair in (("batch1", "batch2"), ("mat1", "mat2")):
        if pair[0] in kwargs:
            names = pair
            added = kwargs["self"]
    a = kwargs[names[0]]
    b = kwargs[names[1]]
    is_plain = kwargs.get("beta", 1) == kwargs.get("alpha", 1) == 1 and out.stride[-1] == 1
    require(is_plain and a.dtype == b.dtype == out.dtype, op, "other factors")
    if out.dtype != writer.dtype:
        raise TraceError(f"a product of {out.dtype} is not supported")
    # A bias: one row that is added to all rows of the product.
    is_bias = (
        added is not None
        and (len(added.shape) == 1 or added.shape[-2] == 1 or added.stride[-2] == 0)
        and (added.stride[-1], added.shape[-1]) == (1, out.shape[-1])
        and added.memory != out.memory
    )
    factors = [out, a, b, added] if is_bias else [out, a, b]
    begins = [p.stride[0] if len(p.shape) > 2 and p.shape[0] > 1 else 0 for p in factors]
    sizes = [
        out.shape[0] if len(out.shape) > 2 else 1,
        *out.shape[-2:],
        a.shape[-1],
        *a.stride[-2:],
        *b.stride[-2:],
        *begins,
        out.stride[-2],
    ]
    body = (
        "for (long i = 0; i < n0; i++) matrix_product(n1, n2, n3, p1 + i * n9, n4, n5, p2 + i * "
        f"n10, n6, n7, {'p3 + i * n11' if is_bias else '0'}, p0 + i * n8, n{len(sizes) - 1}, w);"
    )
    workspace = _TILE * (a.shape[-1] + _TILE)
    yield writer.call(factors, body, sizes=sizes, workspace=workspace)
    if added is not None and not is_bias:
        yield writer.pointwise("add", {"self": out, "other": added, "alpha": 1}, out)


def _reduce(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel call for a sum or mean over some axes."""
    x: Place = kwargs["self"]
    require(kwargs.get("dtype") in (None, out.dtype), op, "another type")
    axes = kwargs.get("dim")
    if isinstance(axes, int):
        axes = [axes]
    every = range(len(x.shape))
    reduced = sorted({axis % len(x.shape) for axis in axes or every})
    remaining = [axis for axis in every if axis not in reduced]
    out_strides = _pick(out.stride, remaining) if kwargs.get("keepdim") else out.stride
    sizes = [math.prod(_pick(x.shape, reduced))]
    strides = [_pick(x.stride, remaining), out_strides]
    outer = over(_pick(x.shape, remaining), strides).named(sizes)
    inner = over(_pick(x.shape, reduced), [_pick(x.stride, reduced)], "j").named(sizes)
    number = f"p1[{outer.index(0)} + {inner.index(0)}]"
    target = f"p0[{outer.index(1)}]"
    mean = op.name == "mean"
    if outer.sizes and outer.strides[0][-1] == 1:  # whole rows are added to each other
        front = Loops(outer.sizes[:-1], tuple(steps[:-1] for steps in outer.strides))
        last = f"i{len(outer.sizes) - 1}"
        row = f"#pragma GCC ivdep\nfor (long {last} = 0; {last} < {outer.sizes[-1]}; {last}++)"
        code = [f"{row} {target} = 0;", inner.nest(f"{row} {target} += {number};", "")]
        if mean:
            code.append(f"{row} {target} /= n0;")
        body = front.nest("\n".join(code), "")
    else:
        loop = inner.nest(f"s += {number};", "omp simd reduction(+ : s)")
        result = "s / n0" if mean else "s"
        body = outer.nest(f"{c_type(out.dtype)} s = 0;\n{loop}\n{target} = {result};", "")
    yield writer.call([out, x], body, sizes=sizes)


_TOP = "T top = -INFINITY, s = 0;\nEACH top = p1[X] > top ? p1[X] : top;\n"
_ALONG = {
    "_softmax": _TOP
    + "SUM(s) { T e = exponential(p1[X] - top); p0[O] = e; s += e; }\nEACH p0[O] /= s;",
    "_log_softmax": _TOP
    + "SUM(s) s += exponential(p1[X] - top);\ns = log(s);\nEACH p0[O] = p1[X] - top - s;",
    "_softmax_backward_data": "T s = 0;\nSUM(s) s += p1[X] * p2[Y];\nEACH p0[O] = (p1[X] - s) * p2[Y];",
    "_log_softmax_backward_data": "T s = 0;\nSUM(s) s += p1[X];\nEACH p0[O] = p1[X] - exponential(p2[Y]) * s;",
}
"""C code of operations along one axis. Loops repeat the code for all other axes."""


def _along(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel call that computes a softmax or its gradient along one axis."""
    body = _ALONG[op.name]
    places: list[Place] = [out]
    for name in ("grad_output", "output") if "output" in kwargs else ("self",):
        places.append(kwargs[name])
    require(all(place.dtype == writer.dtype for place in places), op, str(out.dtype))
    axis = kwargs["dim"] % len(out.shape)
    others = [i for i in range(len(out.shape)) if i != axis]
    loops, sizes = loops_over(_pick(out.shape, others), [_pick(p.stride, others) for p in places])
    loop = f"for (long j = 0; j < {named(out.shape[axis], sizes)}; j++)"
    for k, place in enumerate(places):
        number = f"[{loops.index(k)} + j * {named(place.stride[axis], sizes)}]"
        body = body.replace(f"[{'OXY'[k]}]", number)
    body = body.replace("SUM(s)", f"#pragma omp simd reduction(+ : s)\n{loop}")
    body = body.replace("EACH", loop).replace("T ", f"{c_type(out.dtype)} ")
    yield writer.call(places, loops.nest(body, ""), sizes=sizes)


def _concatenate(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel calls for a concatenation or a stack: one copy for each part."""
    axis = kwargs["dim"] % len(out.shape)
    begin = 0
    for part in kwargs["tensors"]:
        if op.name == "stack":
            yield writer.copied(_without(out, axis, begin), part)
            begin += 1
        elif part.shape != (0,):
            yield writer.copied(_part(out, axis, begin, part.shape[axis]), part)
            begin += part.shape[axis]


def _part(place: Place, axis: int, begin: int, size: int, step: int = 1) -> Place:
    """Return the place in memory of a tensor's slice along one axis."""
    along = place.stride[axis]
    shape = with_entry(place.shape, axis, size)
    stride = with_entry(place.stride, axis, along * step)
    offset = place.offset + begin * along
    return replace(place, offset=offset, shape=tuple(shape), stride=tuple(stride))


def _without(place: Place, axis: int, index: int) -> Place:
    """Return the place in memory of a tensor's entries at one index of an axis. The axis is
    removed."""
    shape = [*place.shape]
    stride = [*place.stride]
    del shape[axis], stride[axis]
    offset = place.offset + index * place.stride[axis]
    return replace(place, offset=offset, shape=tuple(shape), stride=tuple(stride))


def _part_gradient(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel calls for the gradient of a selection or a slice: zeros, then one copied
    part."""
    axis = kwargs["dim"] % len(out.shape)
    gradient = kwargs["grad_output"]
    n = out.shape[axis]
    if op.name == "select_backward":
        part = _without(out, axis, kwargs["index"] % n)
    else:
        start = kwargs["start"]
        begin = max(0, start + n if start < 0 else start)
        part = _part(out, axis, begin, gradient.shape[axis], kwargs["step"])
    yield writer.filled(out, 0.0)
    yield writer.copied(part, gradient)


def _is_contiguous(place: Place) -> bool:
    """Return whether a tensor's place in memory is contiguous, row by row."""
    # A tensor on this device has no memory.
    return torch.empty_strided(place.shape, place.stride, device="meta").is_contiguous()


def _layer_norm_gradient(
    writer: Writer, kwargs: Kwargs, op: Operation, out: Place
) -> Iterator[Line]:
    """Yield the C kernel call for the gradient of a layer norm without weights."""
    places = [out, kwargs["grad_out"], kwargs["input"], kwargs["mean"], kwargs["rstd"]]
    is_plain = kwargs["weight"] is None and op.makes == [out]
    require(is_plain and all(map(_is_contiguous, places)), op)
    n = math.prod(kwargs["normalized_shape"])
    body = "layer_norm_slope(n0, n1, p1, p2, p3, p4, p0);"
    sizes = [math.prod(kwargs["input"].shape) // n, n]
    yield writer.call(places, body, sizes=sizes)


def _batch_norm(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel call for a batch norm in training, or for its gradient."""
    rows = kwargs["input"].shape
    is_training = bool(kwargs.get("training") or kwargs.get("train"))
    require(is_training and len(rows) == 2 and len(op.makes) == 3, op)
    if "grad_out" in kwargs:
        code = "batch_norm_slope(n0, n1"
        names = "grad_out input weight save_mean save_invstd"
        numbers = []
    else:
        code = "batch_norm(n0, n1, s0, s1"
        names = "input weight bias running_mean running_var"
        numbers = [kwargs["momentum"], kwargs["eps"]]
    places = [*map(kwargs.get, names.split()), *op.makes]
    for i, place in enumerate(places):
        require(place is None or _is_contiguous(place), op)
        code += f", p{i}"
    yield writer.call(places, f"{code});", numbers, sizes=rows)


def _class_loss(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel calls for a negative log-likelihood loss of classes, or for its
    gradient."""
    is_gradient = "grad_output" in kwargs
    y = kwargs["target"]
    x = kwargs["grad_output"] if is_gradient else kwargs["self"]
    rows = out.shape if is_gradient else x.shape
    require(kwargs["weight"] is None and kwargs["reduction"] == 0 and len(rows) == 2, op)
    label = f"p2[i * {y.stride[0]}]"
    if is_gradient:
        yield writer.filled(out, 0.0)
        target = f"p0[i * {out.stride[0]} + {label} * {out.stride[1]}]"
        body = f"if ({label} != (int64_t)s0) {target} = -p1[i * {x.stride[0]}];"
    else:
        value = f"{label} == (int64_t)s0 ? 0 : -p1[i * {x.stride[0]} + {label} * {x.stride[1]}]"
        body = f"p0[i * {out.stride[0]}] = {value};"
    body = f"for (long i = 0; i < n0; i++) {body}"
    yield writer.call([out, x, y], body, [kwargs["ignore_index"]], sizes=rows[:1])


LAYERS: dict[str, Callable[..., Iterator[Line]]] = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), _product),
    **dict.fromkeys(("sum", "mean"), _reduce),
    **dict.fromkeys(_ALONG, _along),
    **dict.fromkeys(("gather", "index_select", "index", "embedding"), chosen_rows),
    "embedding_dense_backward": embedding_gradient,
    **dict.fromkeys(("scatter_add", "index_put"), added_at_places),
    **dict.fromkeys(("cat", "stack"), _concatenate),
    **dict.fromkeys(("select_backward", "slice_backward"), _part_gradient),
    "native_layer_norm_backward": _layer_norm_gradient,
    **dict.fromkeys(("native_batch_norm", "native_batch_norm_backward"), _batch_norm),
    **dict.fromkeys(("nll_loss_forward", "nll_loss_backward"), _class_loss),
}
"""Functions that yield the kernel calls of an operation, by the operation's name in torch."""

# Passes over at least ``_LARGE`` numbers in the same memory run together, ``_BLOCK`` numbers at a
# time.
_LARGE = 4096
_BLOCK = 2048


@dataclass(frozen=True, eq=False)
class CodedStep:
    """One training step as data for compiled C code: a list of kernel calls.

    ``calls`` is in the format of ``native/steps.h``. ``numbers`` are Python's numeric values that
    these calls read. ``workspace`` is the size of the working memory in bytes.
    """

    calls: np.ndarray
    numbers: np.ndarray
    workspace: int


class MemberCode:
    """The C code of several training steps in one precision, float32 or float64.

    ``kernels`` maps the code of each kernel (a C function) to its index, in the order of writing.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.kernels: dict[str, int] = {}

    def add(self, trace: Trace, memories: Storages) -> CodedStep:
        """Write the C code of a traced training step, and return the step's kernel calls.

        The memory that the step uses is added to ``memories``, by address. Raises TraceError.
        """
        trace = simplify_trace(trace)
        trace.operations = _small_first(trace.operations)
        writer = Writer(self.dtype, self.kernels, trace, memories)
        lines: list[Line] = []
        for op in trace.operations:
            lines += _lines(writer, op)
        calls = [*_in_blocks(lines)]
        # at least one number, so that the array has an address
        numbers = np.array([*writer.numbers, 0.0])
        workspace = writer.size + writer.workspace
        return CodedStep(np.array([len(calls), *calls], dtype=np.int64), numbers, workspace)


def _lines(writer: Writer, op: Operation) -> Iterator[Line]:
    """Yield the C kernel calls that compute one operation. Raises TraceError for an operation that
    is not supported."""
    base = op.name.removeprefix("new_").removesuffix("_like")
    name = op.name.removesuffix("_")
    kwargs = kwargs_of(op)
    out = (op.makes or op.writes)[0]
    if name in LAYERS:
        yield from LAYERS[name](writer, kwargs, op, out)
    elif name in FORMULAS:
        yield writer.pointwise(name, kwargs, out)
    elif name == "zero" or base in ("zeros", "ones", "full"):
        yield writer.filled(out, kwargs.get("fill_value", float(base == "ones")))
    elif not base.startswith("empty"):
        raise TraceError(f"{op.function} is not supported")


def _small_first(operations: Sequence[Operation]) -> list[Operation]:
    """Move operations on scalars in front of large operations that they do not depend on.

    The large operations then follow each other, and can run in blocks.
    """

    # whether one operation writes memory that the other reads or writes
    def depend(a: Operation, b: Operation) -> bool:
        return bool(
            memories_of(a.outputs) & memories_of(b.places)
            or memories_of(b.outputs) & memories_of(a.places)
        )

    ordered: list[Operation] = []
    for op in operations:
        index = len(ordered)
        if all(math.prod(place.shape) == 1 for place in op.places):
            while index and not depend(op, ordered[index - 1]):
                outputs = ordered[index - 1].outputs
                if all(math.prod(place.shape) < _LARGE for place in outputs):
                    break
                index -= 1
        ordered.insert(index, op)
    return ordered


def _in_blocks(lines: Sequence[Line]) -> Iterator[int]:
    """Yield all kernel calls as integers for the compiled code. Calls that can share blocks run
    block by block.

    A block of values then stays in the processor's cache from one call to the next.
    """
    runs: list[list[Line]] = []
    for line in lines:
        if runs and _go_together([*runs[-1], line]):
            runs[-1].append(line)
        else:
            runs.append([line])
    for run in runs:
        if len(run) == 1:
            yield from (1, 1, 1, *run[0].call())
        else:
            unit = max(line.unit for line in run)
            yield from (len(run), run[0].total // unit, max(1, _BLOCK // unit))
            for line in run:
                yield from line.call(unit)


def _go_together(lines: Sequence[Line]) -> bool:
    """Return whether several kernel calls can run together, block by block.

    The calls must pass over equally many values. No call may read or write another row of memory
    that another call writes.
    """
    *before, last = lines
    total = last.total
    unit = max(line.unit for line in lines)
    if total < _LARGE or any(line.total != total or line.unit not in (1, unit) for line in lines):
        return False
    rows = total // unit
    for line in before:
        for i, a in enumerate(line.spans):
            for j, b in enumerate(last.spans):
                # The first span of a call is written, and the others are read.
                if (i == 0 or j == 0) and a.overlaps(b):
                    begin, step, is_apart = a.in_rows(unit // line.unit, rows)
                    other = b.in_rows(unit // last.unit, rows)
                    if other != (begin, step, is_apart) or step <= 0 or not is_apart:
                        return False
    return True
