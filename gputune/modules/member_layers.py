"""What is more than a formula of each number, as C: products, sums, softmax, norms, losses, and rows that are chosen.

Each function yields the calls that an operation is made into, of its arguments by name and the place of its result.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from gputune.modules.member_kernels import Line, Loops, Writer, named, over
from gputune.modules.trace import Operation, Place, TraceError

Given = dict[str, Any]
_TILE = 96  # columns of the widest tile of a product, and rows beside the inner ones that it works in


def _product(writer: Writer, given: Given, op: Operation, out: Place) -> Iterator[Line]:
    a, b = (
        given[name]
        for name in (
            ("batch1", "batch2") if "batch1" in given else ("mat1", "mat2") if "mat1" in given else ("self", "mat2")
        )
    )
    added = given["self"] if a is not given["self"] else None
    if (
        given.get("beta", 1) != 1
        or given.get("alpha", 1) != 1
        or out.stride[-1] != 1
        or len({p.dtype for p in (a, b, out)}) > 1
    ):
        raise TraceError(f"{op.function} of other factors is in no code")
    if out.dtype != writer.dtype:
        raise TraceError(f"a product of {out.dtype} is in no code")
    is_bias = added is not None and _of_rows(added, out)
    factors = [out, a, b, *[added] * is_bias]
    batch = out.shape[0] if len(out.shape) > 2 else 1
    begins = [p.stride[0] if len(p.shape) > 2 and p.shape[0] > 1 else 0 for p in factors]
    body = (
        "for (long i = 0; i < n0; i++) matrix_product(n1, n2, n3, p1 + i * n9, n4, n5, p2 + i * n10, n6, n7, "
        f"{'p3 + i * n11' if is_bias else '0'}, p0 + i * n8, {f'n{8 + len(factors)}'}, w);"
    )
    sizes = [batch, *out.shape[-2:], a.shape[-1], *a.stride[-2:], *b.stride[-2:], *begins, out.stride[-2]]
    yield writer.call(factors, body, sizes=sizes, room=_TILE * (a.shape[-1] + _TILE))
    if added is not None and not is_bias:
        yield writer.pointwise("add", {"self": out, "other": added, "alpha": 1}, out)


def _of_rows(added: Place, out: Place) -> bool:
    """Whether what is added to a product is one row for all of its rows."""
    one = len(added.shape) == 1 or added.shape[-2] == 1 or added.stride[-2] == 0
    return one and added.stride[-1] == 1 and added.shape[-1] == out.shape[-1] and added.memory != out.memory


def _reduce(writer: Writer, given: Given, op: Operation, out: Place) -> Iterator[Line]:
    x: Place = given["self"]
    if given.get("dtype") not in (None, out.dtype):
        raise TraceError(f"{op.function} of another type is in no code")
    axes = given.get("dim")
    axes = [axes] if isinstance(axes, int) else axes or range(len(x.shape))
    gone = {axis % len(x.shape) for axis in axes}
    strides, own = [], list(out.stride)
    for axis in range(len(x.shape)):
        if axis not in gone:
            strides.append(own.pop(0))
        else:
            strides.append(0)
            if given.get("keepdim"):
                own.pop(0)
    kept = [axis for axis in range(len(x.shape)) if axis not in gone]
    outer = over([x.shape[a] for a in kept], [[x.stride[a] for a in kept], [strides[a] for a in kept]])
    inner = over([x.shape[a] for a in sorted(gone)], [[x.stride[a] for a in sorted(gone)]], "j")
    n = 1
    for axis in gone:
        n *= x.shape[axis]
    sizes = [n]
    outer, inner = outer.named(sizes), inner.named(sizes)
    mean = op.name == "mean"
    at, to = f"p1[{outer.index(0)} + {inner.index(0)}]", f"p0[{outer.index(1)}]"
    t = writer.type(out)
    if outer.sizes and outer.strides[0][-1] == 1:  # rows are added to each other
        front = Loops(outer.sizes[:-1], tuple(s[:-1] for s in outer.strides))
        last = f"i{len(outer.sizes) - 1}"
        row = f"#pragma GCC ivdep\nfor (long {last} = 0; {last} < {outer.sizes[-1]}; {last}++)"
        body = front.nest(
            f"{row} {to} = 0;\n{inner.nest(f'{row} {to} += {at};', '')}" + (f"\n{row} {to} /= n0;" if mean else ""), ""
        )
    else:
        each = inner.nest(f"s += {at};", "omp simd reduction(+ : s)")
        body = outer.nest(f"{t} s = 0;\n{each}\n{to} = s{' / n0' if mean else ''};", "")
    yield writer.call([out, x], body, sizes=sizes)


_TOP = "T top = -INFINITY, s = 0;\nEACH top = p1[X] > top ? p1[X] : top;\n"
_ALONG = {
    "_softmax": _TOP + "SUM(s) { T e = exponential(p1[X] - top); p0[O] = e; s += e; }\nEACH p0[O] /= s;",
    "_log_softmax": _TOP + "SUM(s) s += exponential(p1[X] - top);\ns = log(s);\nEACH p0[O] = p1[X] - top - s;",
    "_softmax_backward_data": "T s = 0;\nSUM(s) s += p1[X] * p2[Y];\nEACH p0[O] = (p1[X] - s) * p2[Y];",
    "_log_softmax_backward_data": "T s = 0;\nSUM(s) s += p1[X];\nEACH p0[O] = p1[X] - exponential(p2[Y]) * s;",
}
"""What is made along one axis, for all others."""


def _along(writer: Writer, given: Given, op: Operation, out: Place) -> Iterator[Line]:
    body, names = _ALONG[op.name], ["grad_output", "output"] if "output" in given else ["self"]
    places = [out, *(given[name] for name in names)]
    if any(place.dtype != writer.dtype for place in places):
        raise TraceError(f"{op.function} of {out.dtype} is in no code")
    axis = given["dim"] % len(out.shape)
    others = [i for i in range(len(out.shape)) if i != axis]
    loops = over([out.shape[i] for i in others], [[p.stride[i] for i in others] for p in places])
    sizes: list[int] = []
    loops = loops.named(sizes)
    loop = f"for (long j = 0; j < {named(out.shape[axis], sizes)}; j++)"
    for k, letter in enumerate("OXY"[: len(places)]):
        body = body.replace(f"[{letter}]", f"[{loops.index(k)} + j * {named(places[k].stride[axis], sizes)}]")
    body = body.replace("SUM(s)", f"#pragma omp simd reduction(+ : s)\n{loop}").replace("EACH", loop)
    yield writer.call(places, loops.nest(body.replace("T ", f"{writer.type(out)} "), ""), sizes=sizes)


def _chosen(writer: Writer, given: Given, op: Operation, out: Place) -> Iterator[Line]:
    """Rows, or numbers, whose places an index says."""
    x: Place = given["self"]
    one = op.name != "gather"
    if op.name == "index":
        axis, index = _one_index(op, given["indices"])
    else:
        axis, index = given["dim"] % max(1, len(x.shape)), given["index"]
    of_index = [0] * len(out.shape) if one else list(index.stride)
    if one:
        of_index[axis] = index.stride[0] if index.shape else 0
    along = [0 if i == axis else x.stride[i] for i in range(len(out.shape))]
    loops = over(out.shape, [out.stride, of_index, along])
    sizes: list[int] = []
    loops = loops.named(sizes)
    at = f"p1[{loops.index(2)} + p2[{loops.index(1)}] * {named(x.stride[axis], sizes)}]"
    yield writer.call([out, x, index], loops.nest(f"p0[{loops.index(0)}] = {at};"), sizes=sizes)


def _one_index(op: Operation, indices: Sequence[Place | None]) -> tuple[int, Place]:
    """Return the axis along which places are chosen, and their numbers, where that is all."""
    (axis, index), *others = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if others or len(index.shape) != 1 or index.dtype == torch.bool:
        raise TraceError(f"{op.function} of several indices is in no code")
    return axis, index


def _embedding(writer: Writer, given: Given, op: Operation, out: Place) -> Iterator[Line]:
    table, index = given["weight"], given["indices"]
    rows = [*index.stride, 0], [*[0] * len(index.shape), table.stride[1]]
    loops = over(out.shape, [out.stride, *rows])
    sizes: list[int] = []
    loops = loops.named(sizes)
    at = f"p1[{loops.index(2)} + p2[{loops.index(1)}] * {named(table.stride[0], sizes)}]"
    yield writer.call([out, table, index], loops.nest(f"p0[{loops.index(0)}] = {at};"), sizes=sizes)


def _embedding_slope(writer: Writer, given: Given, op: Operation, out: Place) -> Iterator[Line]:
    slope, index = given["grad_output"], given["indices"]
    if given["padding_idx"] >= 0 or given["scale_grad_by_freq"]:
        raise TraceError(f"{op.function} of other arguments is in no code")
    yield writer.filled(out, 0.0)
    shape = [*index.shape, out.shape[1]]
    loops = over(shape, [slope.stride, [*index.stride, 0], [*[0] * len(index.shape), out.stride[1]]])
    sizes: list[int] = []
    loops = loops.named(sizes)
    to = f"p0[p2[{loops.index(1)}] * {named(out.stride[0], sizes)} + {loops.index(2)}]"
    # Along rows of the index no two may be written at once: a code may come twice.
    yield writer.call([out, slope, index], loops.nest(f"{to} += p1[{loops.index(0)}];", ""), sizes=sizes)


def _concatenate(writer: Writer, given: Given, op: Operation, out: Place) -> Iterator[Line]:
    axis = given["dim"] % len(out.shape)
    begin = 0
    stacked = op.name == "stack"
    for part in given["tensors"]:
        if part.shape == (0,):
            continue
        if stacked:
            yield writer.copied(_without(out, axis, begin), part)
            begin += 1
        else:
            yield writer.copied(_part(out, axis, begin, part.shape[axis]), part)
            begin += part.shape[axis]


def _part(place: Place, axis: int, begin: int, size: int, step: int = 1) -> Place:
    """Return the part of a place along an axis."""
    shape, stride = list(place.shape), list(place.stride)
    offset = place.offset + begin * stride[axis]
    shape[axis], stride[axis] = size, stride[axis] * step
    return replace(place, offset=offset, shape=tuple(shape), stride=tuple(stride))


def _without(place: Place, axis: int, index: int) -> Place:
    """Return the part of a place at an index of an axis, without the axis."""
    at = _part(place, axis, index, 1)
    keep = [i for i in range(len(at.shape)) if i != axis]
    return replace(at, shape=tuple(at.shape[i] for i in keep), stride=tuple(at.stride[i] for i in keep))


def _select_slope(writer: Writer, given: Given, op: Operation, out: Place) -> Iterator[Line]:
    axis = given["dim"] % len(out.shape)
    yield writer.filled(out, 0.0)
    yield writer.copied(_without(out, axis, given["index"] % out.shape[axis]), given["grad_output"])


def _slice_slope(writer: Writer, given: Given, op: Operation, out: Place) -> Iterator[Line]:
    axis, slope = given["dim"] % len(out.shape), given["grad_output"]
    n = out.shape[axis]
    begin = max(0, given["start"] + n if given["start"] < 0 else given["start"])
    yield writer.filled(out, 0.0)
    yield writer.copied(_part(out, axis, begin, slope.shape[axis], given["step"]), slope)


def _layer_norm_slope(writer: Writer, given: Given, op: Operation, out: Place) -> Iterator[Line]:
    slope, x = given["grad_out"], given["input"]
    n = 1
    for size in given["normalized_shape"]:
        n *= size
    places = [slope, x, given["mean"], given["rstd"]]
    if given["weight"] is not None or list(op.makes) != [out] or not all(map(_is_whole, [out, *places])):
        raise TraceError(f"{op.function} of other arguments is in no code")
    rows = _size(x) // n
    yield writer.call([out, *places], "layer_norm_slope(n0, n1, p1, p2, p3, p4, p0);", sizes=[rows, n])


def _batch_norm(writer: Writer, given: Given, op: Operation, out: Place) -> Iterator[Line]:
    x = given["input"]
    places = [x, *(given[name] for name in ("weight", "bias", "running_mean", "running_var")), *op.makes]
    if not given["training"] or len(x.shape) != 2 or not all(_is_whole(p) for p in places if p):
        raise TraceError(f"{op.function} of other arguments is in no code")
    pointers = ", ".join(f"p{i}" for i in range(8))
    body = f"batch_norm(n0, n1, s0, s1, {pointers});"
    yield writer.call(places, body, [given["momentum"], given["eps"]], sizes=x.shape)


def _batch_norm_slope(writer: Writer, given: Given, op: Operation, out: Place) -> Iterator[Line]:
    x = given["input"]
    places = [given["grad_out"], x, given["weight"], given["save_mean"], given["save_invstd"], *op.makes]
    whole = all(_is_whole(p) for p in places if p)
    if not given["train"] or len(x.shape) != 2 or len(op.makes) != 3 or not whole:
        raise TraceError(f"{op.function} of other arguments is in no code")
    pointers = ", ".join(f"p{i}" for i in range(8))
    yield writer.call(places, f"batch_norm_slope(n0, n1, {pointers});", sizes=x.shape)


def _is_whole(place: Place) -> bool:
    """Whether a place lies in one piece, row by row."""
    expected, found = 1, True
    for n, stride in zip(reversed(place.shape), reversed(place.stride)):
        found &= n == 1 or stride == expected
        expected *= n
    return found


def _size(place: Place) -> int:
    size = 1
    for n in place.shape:
        size *= n
    return size


def _class_loss(writer: Writer, given: Given, op: Operation, out: Place) -> Iterator[Line]:
    x, y = given["self"], given["target"]
    if given["weight"] is not None or given["reduction"] != 0 or len(x.shape) != 2:
        raise TraceError(f"{op.function} of other arguments is in no code")
    at = f"p2[i * {y.stride[0]}]"
    value = f"{at} == (int64_t)s0 ? 0 : -p1[i * {x.stride[0]} + {at} * {x.stride[1]}]"
    body = f"for (long i = 0; i < n0; i++) p0[i * {out.stride[0]}] = {value};"
    yield writer.call([out, x, y], body, [given["ignore_index"]], sizes=x.shape[:1])


def _class_loss_slope(writer: Writer, given: Given, op: Operation, out: Place) -> Iterator[Line]:
    slope, y = given["grad_output"], given["target"]
    if given["weight"] is not None or given["reduction"] != 0 or len(out.shape) != 2:
        raise TraceError(f"{op.function} of other arguments is in no code")
    yield writer.filled(out, 0.0)
    at, step = f"p2[i * {y.stride[0]}]", slope.stride[0]
    body = (
        f"for (long i = 0; i < n0; i++) if ({at} != (int64_t)s0) "
        f"p0[i * {out.stride[0]} + {at} * {out.stride[1]}] = -p1[i * {step}];"
    )
    yield writer.call([out, slope, y], body, [given["ignore_index"]], sizes=out.shape[:1])


LAYERS: dict[str, Callable[..., Iterator[Line]]] = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), _product),
    **dict.fromkeys(("sum", "mean"), _reduce),
    **dict.fromkeys(_ALONG, _along),
    **dict.fromkeys(("gather", "index_select", "index"), _chosen),
    "embedding": _embedding,
    "embedding_dense_backward": _embedding_slope,
    **dict.fromkeys(("cat", "stack"), _concatenate),
    "select_backward": _select_slope,
    "slice_backward": _slice_slope,
    "native_layer_norm_backward": _layer_norm_slope,
    "native_batch_norm": _batch_norm,
    "native_batch_norm_backward": _batch_norm_slope,
    "nll_loss_forward": _class_loss,
    "nll_loss_backward": _class_loss_slope,
}
"""By the names of operations."""
