"""The steps of one member as C, written from their traces.

Each operation becomes a loop or a call, on memory that is known by its number. Operations that are
more than a formula of each number have a function here: products, sums, softmax, norms, losses, and
chosen rows. Such a function yields the calls that an operation becomes. It receives the arguments
of the operation by name, and the place of its result. An operation that is not supported here
raises TraceError.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from gputune.modules.member_indices import (
    added_at_places,
    chosen_rows,
    embedding_slope,
    loops_over,
    require,
)
from gputune.modules.member_kernels import (
    FORMULAS,
    Line,
    Loops,
    Span,
    Writer,
    arguments,
    c_type,
    named,
    over,
)
from gputune.modules.program import simplify_trace
from gputune.modules.trace import Operation, Place, Trace, TraceError, Words

# columns of the widest tile of a product; it needs working memory for the inner rows and one tile
_TILE = 96


def _product(writer: Writer, given: Words, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the calls of a matrix product, with an added matrix or bias."""
    names = next(
        (pair for pair in (("batch1", "batch2"), ("mat1", "mat2")) if pair[0] in given),
        ("self", "mat2"),
    )
    a = given[names[0]]
    b = given[names[1]]
    added = None if names[0] == "self" else given["self"]
    plain = given.get("beta", 1) == given.get("alpha", 1) == 1 and out.stride[-1] == 1
    require(plain and a.dtype == b.dtype == out.dtype, op, "other factors")
    if out.dtype != writer.dtype:
        raise TraceError(f"a product of {out.dtype} is in no code")
    # A bias: one row that is added to all rows of the product.
    is_bias = (
        added is not None
        and (len(added.shape) == 1 or added.shape[-2] == 1 or added.stride[-2] == 0)
        and (added.stride[-1], added.shape[-1]) == (1, out.shape[-1])
        and added.memory != out.memory
    )
    factors = [out, a, b, *[added] * is_bias]
    batch = out.shape[0] if len(out.shape) > 2 else 1
    begins = [p.stride[0] if len(p.shape) > 2 and p.shape[0] > 1 else 0 for p in factors]
    body = (
        "for (long i = 0; i < n0; i++) matrix_product(n1, n2, n3, p1 + i * n9, n4, n5, p2 + i * "
        f"n10, n6, n7, {'p3 + i * n11' if is_bias else '0'}, p0 + i * n8, "
        f"{f'n{8 + len(factors)}'}, w);"
    )
    sizes = [
        batch,
        *out.shape[-2:],
        a.shape[-1],
        *a.stride[-2:],
        *b.stride[-2:],
        *begins,
        out.stride[-2],
    ]
    yield writer.call(factors, body, sizes=sizes, room=_TILE * (a.shape[-1] + _TILE))
    if added is not None and not is_bias:
        yield writer.pointwise("add", {"self": out, "other": added, "alpha": 1}, out)


def _reduce(writer: Writer, given: Words, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the call of a sum or mean over some axes."""
    x: Place = given["self"]
    require(given.get("dtype") in (None, out.dtype), op, "another type")
    axes = given.get("dim")
    gone = sorted(
        {
            i % len(x.shape)
            for i in ([axes] if isinstance(axes, int) else axes or range(len(x.shape)))
        }
    )
    kept = [axis for axis in range(len(x.shape)) if axis not in gone]
    own = [out.stride[i] for i in kept] if given.get("keepdim") else out.stride
    sizes = [math.prod(x.shape[i] for i in gone)]
    outer = over([x.shape[i] for i in kept], [[x.stride[i] for i in kept], own]).named(sizes)
    inner = over([x.shape[i] for i in gone], [[x.stride[i] for i in gone]], "j").named(sizes)
    at = f"p1[{outer.index(0)} + {inner.index(0)}]"
    to = f"p0[{outer.index(1)}]"
    mean = op.name == "mean"
    if outer.sizes and outer.strides[0][-1] == 1:  # whole rows are added to each other
        front = Loops(outer.sizes[:-1], tuple(s[:-1] for s in outer.strides))
        last = f"i{len(outer.sizes) - 1}"
        row = f"#pragma GCC ivdep\nfor (long {last} = 0; {last} < {outer.sizes[-1]}; {last}++)"
        added = inner.nest(f"{row} {to} += {at};", "")
        body = front.nest(
            f"{row} {to} = 0;\n{added}" + (f"\n{row} {to} /= n0;" if mean else ""), ""
        )
    else:
        each = inner.nest(f"s += {at};", "omp simd reduction(+ : s)")
        body = outer.nest(
            f"{c_type(out.dtype)} s = 0;\n{each}\n{to} = s{' / n0' if mean else ''};", ""
        )
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
"""Code of operations along one axis, which is repeated for all other axes."""


def _along(writer: Writer, given: Words, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the call of a softmax or its slope along one axis."""
    body = _ALONG[op.name]
    names = ["grad_output", "output"] if "output" in given else ["self"]
    places = [out, *(given[name] for name in names)]
    require(all(place.dtype == writer.dtype for place in places), op, str(out.dtype))
    axis = given["dim"] % len(out.shape)
    others = [i for i in range(len(out.shape)) if i != axis]
    loops, sizes = loops_over(
        [out.shape[i] for i in others], [[p.stride[i] for i in others] for p in places]
    )
    loop = f"for (long j = 0; j < {named(out.shape[axis], sizes)}; j++)"
    for k, letter in enumerate("OXY"[: len(places)]):
        body = body.replace(
            f"[{letter}]", f"[{loops.index(k)} + j * {named(places[k].stride[axis], sizes)}]"
        )
    body = body.replace("SUM(s)", f"#pragma omp simd reduction(+ : s)\n{loop}").replace(
        "EACH", loop
    )
    yield writer.call(
        places, loops.nest(body.replace("T ", f"{c_type(out.dtype)} "), ""), sizes=sizes
    )


def _concatenate(writer: Writer, given: Words, op: Operation, out: Place) -> Iterator[Line]:
    """Yield a copy for each part of a concatenation or a stack."""
    axis = given["dim"] % len(out.shape)
    begin = 0
    for part in given["tensors"]:
        if op.name == "stack":
            yield writer.copied(_without(out, axis, begin), part)
            begin += 1
        elif part.shape != (0,):
            yield writer.copied(_part(out, axis, begin, part.shape[axis]), part)
            begin += part.shape[axis]


def _part(place: Place, axis: int, begin: int, size: int, step: int = 1) -> Place:
    """Return the part of a place along an axis."""
    shape = list(place.shape)
    stride = list(place.stride)
    offset = place.offset + begin * stride[axis]
    shape[axis] = size
    stride[axis] = stride[axis] * step
    return replace(place, offset=offset, shape=tuple(shape), stride=tuple(stride))


def _without(place: Place, axis: int, index: int) -> Place:
    """Return the part of a place at an index of an axis, without the axis."""
    shape = [*place.shape]
    stride = [*place.stride]
    del shape[axis], stride[axis]
    offset = place.offset + index * place.stride[axis]
    return replace(place, offset=offset, shape=tuple(shape), stride=tuple(stride))


def _part_slope(writer: Writer, given: Words, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the calls of the slope of a selection or a slice: zeros, with the slope in one part."""
    axis = given["dim"] % len(out.shape)
    slope = given["grad_output"]
    n = out.shape[axis]
    if op.name == "select_backward":
        part = _without(out, axis, given["index"] % n)
    else:
        begin = max(0, given["start"] + n if given["start"] < 0 else given["start"])
        part = _part(out, axis, begin, slope.shape[axis], given["step"])
    yield writer.filled(out, 0.0)
    yield writer.copied(part, slope)


def _is_whole(place: Place) -> bool:
    """Return whether a place is contiguous, row by row."""
    steps = [math.prod(place.shape[i + 1 :]) for i in range(len(place.shape))]
    return all(n == 1 or own == step for n, own, step in zip(place.shape, place.stride, steps))


def _layer_norm_slope(writer: Writer, given: Words, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the call of the slope of a layer norm without weights."""
    places = [out, *(given[name] for name in ("grad_out", "input", "mean", "rstd"))]
    require(given["weight"] is None and list(op.makes) == [out] and all(map(_is_whole, places)), op)
    n = math.prod(given["normalized_shape"])
    body = "layer_norm_slope(n0, n1, p1, p2, p3, p4, p0);"
    sizes = [math.prod(given["input"].shape) // n, n]
    yield writer.call(places, body, sizes=sizes)


def _batch_norm(writer: Writer, given: Words, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the call of a batch norm in training, or of its slope."""
    if "grad_out" in given:
        kernel = "batch_norm_slope(n0, n1"
        names = "grad_out input weight save_mean save_invstd"
        numbers = ""
    else:
        kernel = "batch_norm(n0, n1, s0, s1"
        names = "input weight bias running_mean running_var"
        numbers = "momentum eps"
    places = [*(given[name] for name in names.split()), *op.makes]
    rows = given["input"].shape
    whole = (
        len(rows) == 2 and len(op.makes) == 3 and all(_is_whole(place) for place in places if place)
    )
    require(given["training" if numbers else "train"] and whole, op)
    body = f"{', '.join([kernel, *(f'p{i}' for i in range(len(places)))])});"
    yield writer.call(places, body, [given[name] for name in numbers.split()], sizes=rows)


def _class_loss(writer: Writer, given: Words, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the calls of a negative log-likelihood of classes, or of its slope."""
    is_slope = "grad_output" in given
    y = given["target"]
    x = given["grad_output"] if is_slope else given["self"]
    rows = out.shape if is_slope else x.shape
    require(given["weight"] is None and given["reduction"] == 0 and len(rows) == 2, op)
    at = f"p2[i * {y.stride[0]}]"
    if is_slope:
        yield writer.filled(out, 0.0)
        to = f"p0[i * {out.stride[0]} + {at} * {out.stride[1]}]"
        body = f"if ({at} != (int64_t)s0) {to} = -p1[i * {x.stride[0]}];"
    else:
        value = f"{at} == (int64_t)s0 ? 0 : -p1[i * {x.stride[0]} + {at} * {x.stride[1]}]"
        body = f"p0[i * {out.stride[0]}] = {value};"
    body = f"for (long i = 0; i < n0; i++) {body}"
    yield writer.call([out, x, y], body, [given["ignore_index"]], sizes=rows[:1])


LAYERS: dict[str, Callable[..., Iterator[Line]]] = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), _product),
    **dict.fromkeys(("sum", "mean"), _reduce),
    **dict.fromkeys(_ALONG, _along),
    **dict.fromkeys(("gather", "index_select", "index", "embedding"), chosen_rows),
    "embedding_dense_backward": embedding_slope,
    **dict.fromkeys(("scatter_add", "index_put"), added_at_places),
    **dict.fromkeys(("cat", "stack"), _concatenate),
    **dict.fromkeys(("select_backward", "slice_backward"), _part_slope),
    "native_layer_norm_backward": _layer_norm_slope,
    **dict.fromkeys(("native_batch_norm", "native_batch_norm_backward"), _batch_norm),
    **dict.fromkeys(("nll_loss_forward", "nll_loss_backward"), _class_loss),
}
"""Functions by the names of operations."""

# Passes over at least ``_LARGE`` numbers in the same memory run together, ``_BLOCK`` numbers at a
# time.
_LARGE = 4096
_BLOCK = 2048


@dataclass(frozen=True, eq=False)
class Step:
    """A step in compiled code.

    It has its calls of kernels (``native/steps.h``), the numbers of the host that they read, and
    the bytes of working memory that it needs.
    """

    calls: np.ndarray
    numbers: np.ndarray
    room: int


class MemberCode:
    """The code of several steps in one precision, float32 or float64.

    ``kernels`` maps the code of each kernel to its number, in the order of their writing.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.kernels: dict[str, int] = {}

    def add(self, trace: Trace, memories: dict[int, torch.UntypedStorage]) -> Step:
        """Write a step, and add the memories that it uses by their addresses. Raises TraceError."""
        trace = simplify_trace(trace)
        trace.operations = _small_first(trace.operations)
        writer = Writer(self.dtype, self.kernels, trace, memories)
        lines = [line for op in trace.operations for line in _lines(writer, op)]
        calls = [*_in_blocks(lines)]
        # at least one number, so that the array has an address
        numbers = np.array([*writer.numbers, 0.0])
        return Step(
            np.array([len(calls), *calls], dtype=np.int64), numbers, writer.size + writer.room
        )


def _lines(writer: Writer, op: Operation) -> Iterator[Line]:
    """Yield the calls that an operation becomes. Raises TraceError for an operation that is not
    supported."""
    base = op.name.removeprefix("new_").removesuffix("_like")
    plain = op.name.removesuffix("_")
    given = arguments(op)
    out = (op.makes or op.writes)[0]
    if plain in LAYERS:
        yield from LAYERS[plain](writer, given, op, out)
    elif plain in FORMULAS:
        yield writer.pointwise(plain, given, out)
    elif plain == "zero" or base in ("zeros", "ones", "full"):
        yield writer.filled(out, given.get("fill_value", float(base == "ones")))
    elif not base.startswith("empty"):
        raise TraceError(f"{op.function} is in no code")


def _small_first(operations: Sequence[Operation]) -> list[Operation]:
    """Move operations on single numbers in front of large operations that they do not depend on.

    The large operations then follow each other, and can run in blocks.
    """

    # whether one operation writes memory that the other reads or writes
    def depend(a: Operation, b: Operation) -> bool:
        into = [{place.memory for place in (*op.makes, *op.writes)} for op in (a, b)]
        used = [{place.memory for place in op.reads} | own for op, own in zip((a, b), into)]
        return bool(into[0] & used[1] or into[1] & used[0])

    found: list[Operation] = []
    for op in operations:
        at = len(found)
        if all(math.prod(place.shape) == 1 for place in (*op.makes, *op.reads, *op.writes)):
            while at and not depend(op, before := found[at - 1]):
                if all(
                    math.prod(place.shape) < _LARGE for place in (*before.makes, *before.writes)
                ):
                    break
                at -= 1
        found.insert(at, op)
    return found


def _in_blocks(lines: Sequence[Line]) -> Iterator[int]:
    """Yield the numbers of the calls. Calls that go together run one block at a time.

    A block of numbers stays in the cache.
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
            yield from (number for line in run for number in line.call(unit))


def _go_together(lines: Sequence[Line]) -> bool:
    """Return whether calls can run in blocks.

    They must pass over equally many numbers. No call may read or write another row of memory that
    another call writes.
    """
    total = lines[0].total
    unit = max(line.unit for line in lines)
    if total < _LARGE or any(line.total != total or line.unit not in (1, unit) for line in lines):
        return False
    *before, last = lines

    def alike(a: Line, b: Line, x: Span, y: Span) -> bool:
        mine = x.in_rows(unit // a.unit, total // unit)
        other = y.in_rows(unit // b.unit, total // unit)
        return not x.overlaps(y) or (mine == other and mine[1] > 0 and mine[2])

    return all(
        alike(line, last, x, y)
        for line in before
        for i, x in enumerate(line.spans)
        for j, y in enumerate(last.spans)
        if i == 0 or j == 0
    )
