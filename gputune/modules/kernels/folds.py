"""Writes C code for reductions other than sums: maxima, products, norms and variances over axes."""

import math
import re
from collections.abc import Iterator

from gputune.modules.kernels.places import pick, require
from gputune.modules.kernels.writer import Line, Writer, c_type, over
from gputune.modules.trace import Kwargs, Operation, Place

_SUM = "omp simd reduction(+ : {})"
_LARGER = "x > s || x != x"
_SMALLER = "x < s || x != x"
_EXTREME = "T s = FIRST;\nEACH {{ T x = X; s = {0} ? x : s; }}\nOUT0 = s;"
# The first of equal numbers is chosen, as in torch on a CPU.
_PLACE = "T s = FIRST; long at = 0;\nEACH {{ T x = X; if (s == s && ({0})) s = x, at = AT; }}\n{1}"
_VARIANCE = (
    "T m = 0, s = 0;\nSUM(m) m += X;\nm /= n0;\nSUM(s) s += (X - m) * (X - m);\n"
    "s /= n0 > s0 ? n0 - s0 : 0;\n"
)
_NORMS = {
    0: "T s = 0;\nSUM(s) s += X != 0;\nOUT0 = s;",
    1: "T s = 0;\nSUM(s) s += fabs(X);\nOUT0 = s;",
    2: "T s = 0;\nSUM(s) s += X * X;\nOUT0 = sqrt(s);",
    math.inf: "T s = 0;\nEACH { T x = fabs(X); s = x > s || x != x ? x : s; }\nOUT0 = s;",
    -math.inf: "T s = INFINITY;\nEACH { T x = fabs(X); s = x < s || x != x ? x : s; }\nOUT0 = s;",
}
_POWER_NORM = "T s = 0;\nEACH s += pow(fabs(X), s0);\nOUT0 = pow(s, 1 / s0);"
_BOTH = "OUT0 = s;\nOUT1 = at;"

FOLDS = {
    "amax": _EXTREME.format(_LARGER),
    "amin": _EXTREME.format(_SMALLER),
    "max": _PLACE.format(_LARGER, _BOTH),
    "min": _PLACE.format(_SMALLER, _BOTH),
    "argmax": _PLACE.format(_LARGER, "OUT0 = at;"),
    "argmin": _PLACE.format(_SMALLER, "OUT0 = at;"),
    "prod": "T s = 1;\nEACH s *= X;\nOUT0 = s;",
    "any": "int s = 0;\nEACH s |= X != 0;\nOUT0 = s;",
    "all": "int s = 1;\nEACH s &= X != 0;\nOUT0 = s;",
    "var": _VARIANCE + "OUT0 = s;",
    "std": _VARIANCE + "OUT0 = sqrt(s);",
    "var_mean": _VARIANCE + "OUT0 = s;\nOUT1 = m;",
    "std_mean": _VARIANCE + "OUT0 = sqrt(s);\nOUT1 = m;",
    "logsumexp": (
        "T top = FIRST, s = 0;\nEACH top = X > top ? X : top;\n"
        "T shift = isinf(top) ? 0 : top;\nSUM(s) s += EXP(X - shift);\nOUT0 = log(s) + shift;"
    ),
    "linalg_vector_norm": "",
    "norm": "",
}
"""C code of reductions over axes, for each entry of the result.

X is a number of the reduced axes, FIRST the first one, and AT the index of X. EACH and SUM stand
for the loops over the reduced axes.
"""


def folded(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel call for a reduction over some axes."""
    x: Place = kwargs["self"]
    require(kwargs.get("dtype") in (None, out.dtype), op, "another type")
    axes = kwargs.get("dim")
    if isinstance(axes, int):
        axes = [axes]
    every = range(len(x.shape))
    reduced_axes = sorted({axis % len(x.shape) for axis in axes or every})
    remaining = [axis for axis in every if axis not in reduced_axes]
    code = FOLDS[op.name]
    numbers = list[float]()
    if code.startswith(_VARIANCE):
        correction = kwargs.get("correction", kwargs.get("unbiased", 1))
        numbers.append(1 if correction is None else float(correction))
    if "norm" in op.name:
        order = kwargs.get("ord", kwargs.get("p"))
        order = 2 if order is None else order
        code = _NORMS.get(order, _POWER_NORM)
        if code is _POWER_NORM:
            numbers.append(float(order))
    if op.name in ("max", "min") and len(op.makes) == 1:
        code = FOLDS[f"a{op.name}"]
    # The index of an entry is known only along one axis.
    require("AT" not in code or len(reduced_axes) == 1, op, "several axes")
    places = [out, x]
    if "OUT1" in code:
        places.append(op.makes[1])
    strides = [pick(x.stride, remaining)]
    for place in (out, *places[2:]):
        strides.append(pick(place.stride, remaining) if kwargs.get("keepdim") else [*place.stride])
    sizes = [math.prod(pick(x.shape, reduced_axes))]
    outer = over(pick(x.shape, remaining), strides).named(sizes)
    inner = over(pick(x.shape, reduced_axes), [pick(x.stride, reduced_axes)], "j").named(sizes)
    loop = "\n".join(inner.heads())
    values = {
        "T": c_type(writer.dtype if "norm" in op.name else x.dtype),
        "OUT0": f"p0[{outer.index(1)}]",
        "OUT1": f"p2[{outer.index(2)}]" if len(places) > 2 else "",
        "FIRST": f"p1[{outer.index(0)}]",
        "X": f"p1[{outer.index(0)} + {inner.index(0)}]",
        "AT": "j0" if inner.sizes else "0",
        "EACH": loop,
        "EXP": "exponential" if x.dtype == writer.dtype else "exp",
    }
    code = re.sub(
        r"SUM\((\w)\)", lambda match: "\n".join(inner.heads(_SUM.format(*match.groups()))), code
    )
    code = re.sub(r"\b[A-Z]+[01]?\b", lambda match: values.get(match[0], match[0]), code)
    yield writer.call(places, outer.nest(code, ""), numbers, sizes=sizes)
