"""Writes C code for operations along the axes of a tensor: reductions, softmax, running sums and
sorts."""

import math
import re
from collections.abc import Iterator

from gputune.modules.kernels.writer import (
    Line,
    Loops,
    Writer,
    c_type,
    loops_over,
    named,
    over,
    pick,
    require,
)
from gputune.modules.trace import Kwargs, Operation, Place

# Rows of fewer numbers are joined in C.
_JOINED = 64
_LARGER = "x > s || x != x"
_SMALLER = "x < s || x != x"
_EXTREME = "T s = FIRST;\nEACH {{ T x = X; s = {0} ? x : s; }}\nOUT0 = s;"
# The first of equal numbers is chosen, as in torch on a CPU.
_PLACE = "T s = FIRST; long at = 0;\nEACH {{ T x = X; if (s == s && ({0})) s = x, at = AT; }}\n{1}"
_BOTH = "OUT0 = s;\nOUT1 = at;"

REDUCTIONS = {
    "sum": "U s = 0;\nSUM(s) s += X;\nOUT0 = s;",
    "mean": "U s = 0;\nSUM(s) s += X;\nOUT0 = s / n0;",
    "amax": _EXTREME.format(_LARGER),
    "amin": _EXTREME.format(_SMALLER),
    "max": _PLACE.format(_LARGER, _BOTH),
    "min": _PLACE.format(_SMALLER, _BOTH),
    "argmax": _PLACE.format(_LARGER, "OUT0 = at;"),
    "argmin": _PLACE.format(_SMALLER, "OUT0 = at;"),
    "prod": "T s = 1;\nEACH s *= X;\nOUT0 = s;",
    "any": "int s = 0;\nEACH s |= X != 0;\nOUT0 = s;",
    "var": (
        "T m = 0, s = 0;\nSUM(m) m += X;\nm /= n0;\nSUM(s) s += (X - m) * (X - m);\n"
        "OUT0 = s / (n0 > s0 ? n0 - s0 : 0);"
    ),
}
"""C code of reductions over axes, for each entry of the result.

X is a number of the reduced axes, FIRST the first one, and AT the index of X. EACH and SUM stand
for the loops over the reduced axes. T is the type of X, and U the type of the result.
"""

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


def reduced(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel call for a reduction over some axes."""
    x: Place = kwargs["self"]
    require(kwargs.get("dtype") in (None, out.dtype), op, "another type")
    code = REDUCTIONS[op.name]
    if op.name in ("max", "min") and len(op.makes) == 1:
        code = REDUCTIONS[f"a{op.name}"]
    dims = kwargs.get("dim")
    dims = [dims] if isinstance(dims, int) else dims or range(len(x.shape))
    axes = sorted({dim % len(x.shape) for dim in dims})
    remaining = [axis for axis in range(len(x.shape)) if axis not in axes]
    # The index of an entry is known only along one axis.
    require("AT" not in code or len(axes) == 1, op, "several axes")
    numbers = list[float]()
    if op.name == "var":
        correction = kwargs.get("correction", kwargs.get("unbiased", 1))
        numbers.append(1 if correction is None else float(correction))
    places = [out, x, *op.makes[1:]]
    strides = [pick(x.stride, remaining)]
    for place in (out, *op.makes[1:]):
        strides.append(pick(place.stride, remaining) if kwargs.get("keepdim") else [*place.stride])
    columns = over(pick(x.shape, remaining), strides)
    rows = over(pick(x.shape, axes), [pick(x.stride, axes)], "j")
    sizes = [math.prod(pick(x.shape, axes))]
    is_sum = op.name in ("sum", "mean")
    if is_sum and _is_narrow(columns, rows) and x.dtype == out.dtype == writer.dtype:
        sizes.append(int(columns.sizes[0]))
        body = "library->column_sums(n0, n1, p1, p0, w);"
        if op.name == "mean":
            body += "\nfor (long j = 0; j < n1; j++) p0[j] /= n0;"
        yield writer.call([out, x], body, sizes=sizes, workspace=_JOINED)
        return
    outer = columns.named(sizes)
    inner = rows.named(sizes)
    if is_sum and outer.sizes and outer.strides[0][-1] == 1:
        yield writer.call(places, _sum_of_rows(outer, inner, op.name == "mean"), sizes=sizes)
        return
    values = {
        "T": c_type(x.dtype),
        "U": c_type(out.dtype),
        "OUT0": f"p0[{outer.index(1)}]",
        "OUT1": f"p2[{outer.index(2)}]" if len(places) > 2 else "",
        "FIRST": f"p1[{outer.index(0)}]",
        "X": f"p1[{outer.index(0)} + {inner.index(0)}]",
        "AT": "j0" if inner.sizes else "0",
    }
    code = _with_loops(code, inner)
    code = re.sub(r"\b[A-Z]+[01]?\b", lambda match: values.get(match[0], match[0]), code)
    yield writer.call(places, outer.nest(code, ""), numbers, sizes=sizes)


def _with_loops(code: str, loops: Loops) -> str:
    """Return C code with loops in place of EACH, SUM and MAX."""
    for name, sign in (("SUM", "+"), ("MAX", "max")):
        for variable in ("s", "m", "top"):
            head = "\n".join(loops.heads(f"omp simd reduction({sign} : {variable})"))
            code = code.replace(f"{name}({variable})", head)
    return code.replace("EACH", "\n".join(loops.heads()))


def _sum_of_rows(columns: Loops, rows: Loops, is_mean: bool) -> str:
    """Return C code that adds whole rows of neighboring numbers to each other."""
    front = Loops(columns.sizes[:-1], tuple(steps[:-1] for steps in columns.strides))
    last = f"i{len(columns.sizes) - 1}"
    row = f"#pragma GCC ivdep\nfor (long {last} = 0; {last} < {columns.sizes[-1]}; {last}++)"
    target = f"p0[{columns.index(1)}]"
    number = f"p1[{columns.index(0)} + {rows.index(0)}]"
    code = [f"{row} {target} = 0;", rows.nest(f"{row} {target} += {number};", "")]
    if is_mean:
        code.append(f"{row} {target} /= n0;")
    return front.nest("\n".join(code), "")


def _is_narrow(columns: Loops, rows: Loops) -> bool:
    """Return whether a table is contiguous and so narrow that loops over a row take long to
    start. ``column_sums`` then adds several rows at once."""
    if len(columns.sizes) != 1 or len(rows.sizes) != 1:
        return False
    is_contiguous = columns.strides == ((1,), (1,)) and rows.strides[0] == columns.sizes
    return is_contiguous and int(columns.sizes[0]) < _JOINED


def along_axis(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel call for a softmax, its gradient, or a running sum along one axis."""
    places: list[Place] = [out]
    for name in ("grad_output", "output") if "output" in kwargs else ("self",):
        places.append(kwargs[name])
    if not op.name.startswith("cum"):  # of whole numbers too
        require(all(place.dtype == writer.dtype for place in places), op, str(out.dtype))
    axis = kwargs["dim"] % len(out.shape)
    others = [i for i in range(len(out.shape)) if i != axis]
    loops, sizes = loops_over(pick(out.shape, others), [pick(p.stride, others) for p in places])
    size = named(out.shape[axis], sizes)
    body = ALONG[op.name]
    for k, place in enumerate(places):
        number = f"[{loops.index(k)} + j0 * {named(place.stride[axis], sizes)}]"
        body = body.replace(f"[{'OXY'[k]}]", number)
    body = _with_loops(body, Loops((size,), (), "j")).replace("T ", f"{c_type(out.dtype)} ")
    yield writer.call(places, loops.nest(body, ""), sizes=sizes)


def ordered(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel call that sorts along an axis, and writes the sorted numbers and their
    indices. Equal numbers stay in their order."""
    x: Place = kwargs["self"]
    index = op.results[1]
    require(x.dtype == writer.dtype and bool(x.shape) and index is not None, op, str(x.dtype))
    assert index is not None
    axis = kwargs["dim"] % len(x.shape)
    others = [i for i in range(len(x.shape)) if i != axis]
    places = [x, out, index]
    loops, sizes = loops_over(pick(x.shape, others), [pick(p.stride, others) for p in places])
    length = named(x.shape[axis], sizes)
    step, to, to_index = [named(place.stride[axis], sizes) for place in places]
    code = (
        f"int64_t *order = (int64_t *)w;\nconst real *x = p0 + {loops.index(0)};\n"
        f"sort_row({length}, x, {step}, {int(kwargs['descending'])}, order, order + {length});\n"
        f"for (long j = 0; j < {length}; j++) {{\n"
        f"p1[{loops.index(1)} + j * {to}] = x[order[j] * {step}];\n"
        f"p2[{loops.index(2)} + j * {to_index}] = order[j];\n}}"
    )
    # two rows of indices and a row of numbers
    numbers = x.shape[axis] * (1 + 16 // writer.dtype.itemsize)
    yield writer.call(places, loops.nest(code, ""), sizes=sizes, workspace=numbers)
