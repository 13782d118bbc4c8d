"""Writes C code for sums and means over axes, and for softmax along an axis."""

import math
from collections.abc import Iterator

from gputune.modules.kernels.places import pick, require
from gputune.modules.kernels.writer import Line, Loops, Writer, c_type, loops_over, named, over
from gputune.modules.trace import Kwargs, Operation, Place

# Rows of fewer numbers are joined in C.
_JOINED = 64


def reduced(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel call for a sum or mean over some axes."""
    x: Place = kwargs["self"]
    require(kwargs.get("dtype") in (None, out.dtype), op, "another type")
    axes = kwargs.get("dim")
    if isinstance(axes, int):
        axes = [axes]
    every = range(len(x.shape))
    reduced_axes = sorted({axis % len(x.shape) for axis in axes or every})
    remaining = [axis for axis in every if axis not in reduced_axes]
    out_strides = pick(out.stride, remaining) if kwargs.get("keepdim") else out.stride
    sizes = [math.prod(pick(x.shape, reduced_axes))]
    strides = [pick(x.stride, remaining), out_strides]
    columns = over(pick(x.shape, remaining), strides)
    rows = over(pick(x.shape, reduced_axes), [pick(x.stride, reduced_axes)], "j")
    if _is_narrow(columns, rows) and x.dtype == out.dtype == writer.dtype:
        sizes.append(int(columns.sizes[0]))
        body = "library->column_sums(n0, n1, p1, p0, w);"
        if op.name == "mean":
            body += "\nfor (long j = 0; j < n1; j++) p0[j] /= n0;"
        yield writer.call([out, x], body, sizes=sizes, workspace=_JOINED)
        return
    outer = columns.named(sizes)
    inner = rows.named(sizes)
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


def _is_narrow(columns: Loops, rows: Loops) -> bool:
    """Return whether a table is contiguous and so narrow that loops over a row take long to
    start. ``column_sums`` then adds several rows at once."""
    if len(columns.sizes) != 1 or len(rows.sizes) != 1:
        return False
    is_contiguous = columns.strides == ((1,), (1,)) and rows.strides[0] == columns.sizes
    return is_contiguous and int(columns.sizes[0]) < _JOINED


_TOP = "T top = -INFINITY, s = 0;\nMAX(top) top = p1[X] > top ? p1[X] : top;\n"
ALONG = {
    "_softmax": _TOP
    + "SUM(s) { T e = exponential(p1[X] - top); p0[O] = e; s += e; }\nEACH p0[O] /= s;",
    # A row without an allowed entry is 0.
    "_safe_softmax": _TOP
    + "SUM(s) { T e = top == -INFINITY ? 0 : exponential(p1[X] - top); p0[O] = e; s += e; }\n"
    "EACH p0[O] /= s == 0 ? 1 : s;",
    "_log_softmax": _TOP
    + "SUM(s) s += exponential(p1[X] - top);\ns = log(s);\nEACH p0[O] = p1[X] - top - s;",
    "_softmax_backward_data": "T s = 0;\nSUM(s) s += p1[X] * p2[Y];\nEACH p0[O] = (p1[X] - s) * p2[Y];",
    "_log_softmax_backward_data": "T s = 0;\nSUM(s) s += p1[X];\nEACH p0[O] = p1[X] - exponential(p2[Y]) * s;",
    "cumsum": "T s = 0;\nEACH { s += p1[X]; p0[O] = s; }",
    "cumprod": "T s = 1;\nEACH { s *= p1[X]; p0[O] = s; }",
}
"""C code of operations along one axis. Loops repeat the code for all other axes."""


def along_axis(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel call that computes a softmax or its gradient along one axis."""
    body = ALONG[op.name]
    places: list[Place] = [out]
    for name in ("grad_output", "output") if "output" in kwargs else ("self",):
        places.append(kwargs[name])
    if not op.name.startswith("cum"):  # of whole numbers too
        require(all(place.dtype == writer.dtype for place in places), op, str(out.dtype))
    axis = kwargs["dim"] % len(out.shape)
    others = [i for i in range(len(out.shape)) if i != axis]
    loops, sizes = loops_over(pick(out.shape, others), [pick(p.stride, others) for p in places])
    loop = f"for (long j = 0; j < {named(out.shape[axis], sizes)}; j++)"
    for k, place in enumerate(places):
        number = f"[{loops.index(k)} + j * {named(place.stride[axis], sizes)}]"
        body = body.replace(f"[{'OXY'[k]}]", number)
    body = body.replace("SUM(s)", f"#pragma omp simd reduction(+ : s)\n{loop}")
    body = body.replace("MAX(top)", f"#pragma omp simd reduction(max : top)\n{loop}")
    body = body.replace("EACH", loop).replace("T ", f"{c_type(out.dtype)} ")
    yield writer.call(places, loops.nest(body, ""), sizes=sizes)
