"""The kernels of a member's step as C: one for each kind of loops and formula.

Kernels are called on places of memory. Addresses, numbers of the host, and all except small sizes
are arguments of the calls. Models of other widths and minibatches of other sizes therefore share a
kernel. Loops go over the places of tensors. Axes that follow each other in memory become one loop.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from gputune.modules.trace import Operation, Place, Trace, TraceError, Words, arrange

C_TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.bool: "uint8_t",
    torch.uint8: "uint8_t",
}

_COMPARED = dict(
    zip("gt lt ge le eq ne logical_and logical_or".split(), "> < >= <= == != && ||".split())
)

_E = "EXP({self} < 20 ? {self} : 20)"
_W = f"({_E} * ({_E} + 2))"
_R = f"(1 / ({_W} + 2))"
"""Parts of mish: tanh(log(1 + e)) = w / (w + 2) with w = e (e + 2) and e = exp(x).

This form needs no difference of nearly equal numbers. Its slope in x is 4 e (1 + e) / (w + 2)^2,
because w + 1 = (1 + e)^2.
"""

FORMULAS = {
    "add": "{self} + {alpha} * {other}",
    "sub": "{self} - {alpha} * {other}",
    "rsub": "{other} - {alpha} * {self}",
    "mul": "{self} * {other}",
    "div": "{self} / {other}",
    "neg": "-{self}",
    "abs": "fabs({self})",
    "exp": "EXP({self})",
    **{
        name: f"{name}({{self}})"
        for name in "log log2 log1p expm1 floor sqrt sin cos erf isinf".split()
    },
    "rsqrt": "1 / sqrt({self})",
    "reciprocal": "1 / {self}",
    "tanh": "1 - 2 / (1 + EXP(2 * {self}))",
    "sigmoid": "1 / (1 + EXP(-{self}))",
    "relu": "{self} < 0 ? 0 : {self}",
    "pow": "pow({self}, {exponent})",
    "addcmul": "{self} + {value} * {tensor1} * {tensor2}",
    "lerp": "{self} + {weight} * ({end} - {self})",
    "where": "{condition} ? {self} : {other}",
    "clamp_min": "{self} < {min} ? {min} : {self}",
    "clamp_max": "{self} > {max} ? {max} : {self}",
    "masked_fill": "{mask} ? {value} : {self}",
    "threshold_backward": "{self} <= {threshold} ? 0 : {grad_output}",
    "tanh_backward": "{grad_output} * (1 - {output} * {output})",
    "sigmoid_backward": "{grad_output} * {output} * (1 - {output})",
    "silu": "{self} / (1 + EXP(-{self}))",
    "gelu": "{self} * (REAL)0.5 * (1 + erf({self} * (REAL)0.70710678118654752))",
    "gelu_backward": (
        "{grad_output} * ((REAL)0.5 * (1 + erf({self} * (REAL)0.70710678118654752))"
        " + {self} * (REAL)0.39894228040143268 * EXP((REAL)-0.5 * {self} * {self}))"
    ),
    "mish": f"{{self}} * {_W} / ({_W} + 2)",
    "mish_backward": f"{{grad_output}} * ({_W} * {_R} + {{self}} * (4 * {_E} * (1 + {_E}) * ({_R} * {_R})))",
    "elu": "{self} > 0 ? {scale} * {self} : {scale} * {alpha} * (EXP({input_scale} * {self}) - 1)",
    "elu_backward": (
        "{self_or_result} > 0 ? {scale} * {grad_output} : {grad_output} * {input_scale} * "
        "{scale} * {alpha} * EXP({input_scale} * {self_or_result})"
    ),
    "leaky_relu": "{self} > 0 ? {self} : {negative_slope} * {self}",
    "leaky_relu_backward": "{self} > 0 ? {grad_output} : {negative_slope} * {grad_output}",
    "softplus": "{self} * {beta} > {threshold} ? {self} : log1p(EXP({self} * {beta})) / {beta}",
    "softplus_backward": "{self} * {beta} > {threshold} ? {grad_output} : {grad_output} / (1 + EXP(-{self} * "
    "{beta}))",
    "remainder": "({self} % {other} + {other}) % {other}",
    "fill": "{value}",
    "copy": "{src}",
    **dict.fromkeys(("clone", "_to_copy"), "{self}"),
    **dict.fromkeys(("logical_not", "bitwise_not"), "!{self}"),
    **{
        f"bitwise_{name}": f"{{self}} {sign} {{other}}"
        for name, sign in {"and": "&&", "or": "||"}.items()
    },
    "isnan": "{self} != {self}",
    **dict.fromkeys(("sgn", "sign"), "({self} > 0) - ({self} < 0)"),
    "maximum": "{self} != {self} || {self} > {other} ? {self} : {other}",
    "minimum": "{self} != {self} || {self} < {other} ? {self} : {other}",
    "clamp": "{self} < {min} ? {min} : {self} > {max} ? {max} : {self}",
    **{name: f"{{self}} {sign} {{other}}" for name, sign in _COMPARED.items()},
}
"""Formula of each operation for one number. Names are the names of its arguments."""

# Operations that are computed in the type of their arguments.
_OF_INPUTS = {*_COMPARED, "logical_not", "isinf", "isnan"}
_POWERS = {2: "{self} * {self}", 0.5: "sqrt({self})", 3: "{self} * {self} * {self}"}
_DEFAULTS = {
    "rounding_mode": None,
    "approximate": "none",
    "is_result": False,
    "self_is_result": False,
}


def c_type(dtype: torch.dtype) -> str:
    """Return the C type of a dtype. Raises TraceError for a dtype that is not supported."""
    if dtype not in C_TYPES:
        raise TraceError(f"{dtype} is in no code")
    return C_TYPES[dtype]


def arguments(op: Operation) -> Words:
    """Return all arguments of an operation by their names in its schema."""
    schema = op.function._schema.arguments
    defaults = {a.name: a.default_value for a in schema if a.has_default_value()}
    return {**defaults, **{a.name: value for a, value in zip(schema, op.args)}, **op.kwargs}


def formula_of(name: str, given: Words) -> str:
    """Return the formula of an operation with these arguments. Raises TraceError for other
    options."""
    if any(given.get(key, value) != value for key, value in _DEFAULTS.items()):
        raise TraceError(f"{name} of another kind is in no code")
    if name == "clamp" and None in (given["min"], given["max"]):
        name = "clamp_min" if given["max"] is None else "clamp_max"
    if name == "pow" and given["exponent"] in _POWERS:
        return _POWERS[given["exponent"]]
    # A product with 1 is left out.
    return FORMULAS[name].replace("{alpha} * ", "") if given.get("alpha") == 1 else FORMULAS[name]


# Largest size that is written into the code, so that its loop can be unrolled.
_SMALL = 32


@dataclass(frozen=True)
class Loops:
    """Loops of some ``sizes``, the outermost first, with the ``strides`` of each operand along
    them."""

    sizes: tuple[int | str, ...]
    strides: tuple[tuple[int | str, ...], ...]
    variable: str = "i"

    def named(self, sizes: list[int]) -> "Loops":
        """Return the loops with names instead of sizes and strides, which are appended to
        ``sizes``.

        The outermost size is appended last.
        """
        strides = tuple(tuple(named(int(stride), sizes) for stride in own) for own in self.strides)
        inner = [named(int(size), sizes) for size in self.sizes[1:]]
        outer = [named(int(size), sizes, most=-1) for size in self.sizes[:1]]
        return replace(self, sizes=(*outer, *inner), strides=strides)

    def index(self, operand: int) -> str:
        """Return the position of an operand's number, in the variables of the loops."""
        terms = [f"{self.variable}{i} * {s}" for i, s in enumerate(self.strides[operand]) if s]
        return " + ".join(terms) or "0"

    def nest(self, body: str, pragma: str = "GCC ivdep") -> str:
        """Return the code of the loops around a body. The innermost loop may be vectorized."""
        names = [f"{self.variable}{i}" for i in range(len(self.sizes))]
        lines = [f"for (long {v} = 0; {v} < {size}; {v}++)" for v, size in zip(names, self.sizes)]
        if pragma and lines:
            lines.insert(-1, f"#pragma {pragma}")
        return "\n".join([*lines, f"{{\n{body}\n}}"])


def named(size: int, sizes: list[int], *, most: int = _SMALL) -> int | str:
    """Return a size up to ``most`` itself, or a name for a larger size.

    Loops over small sizes are unrolled. A larger size is appended to ``sizes``.
    """
    if 0 <= size <= most:
        return size
    sizes.append(size)
    return f"n{len(sizes) - 1}"


def over(shape: Sequence[int], strides: Sequence[Sequence[int]], variable: str = "i") -> Loops:
    """Return the loops over a shape. The innermost axis is the densest axis of the first
    operand."""
    axes = [(n, tuple(own[i] for own in strides)) for i, n in enumerate(shape) if n != 1]
    axes.sort(key=lambda axis: -max(axis[1][:1], default=0))
    merged: list[tuple[int, tuple[int, ...]]] = []
    for n, own in axes:
        # Two axes become one loop if they follow each other in the memory of all operands.
        if merged and all(outer == n * inner for outer, inner in zip(merged[-1][1], own)):
            merged[-1] = (merged[-1][0] * n, own)
        else:
            merged.append((n, own))
    by_operand = tuple(tuple(own[k] for _, own in merged) for k in range(len(strides)))
    return Loops(tuple(n for n, _ in merged), by_operand, variable)


@dataclass(frozen=True)
class Span:
    """The bytes from ``begin`` to ``end`` of a memory.

    A loop passes through them by ``step`` bytes; 0 means all at once.
    """

    memory: int
    begin: int
    end: int
    step: int

    def overlaps(self, other: "Span") -> bool:
        """Return whether two spans have bytes in common."""
        return self.memory == other.memory and self.begin < other.end and other.begin < self.end

    def in_rows(self, unit: int, rows: int) -> tuple[int, int, bool]:
        """Return the begin, the bytes of ``unit`` steps, and if ``rows`` such parts do not overlap."""
        step = self.step * unit
        return self.begin, step, self.end - self.begin - (rows - 1) * step <= step


@dataclass
class Line:
    """A call of a kernel on places. Each place is a memory and the byte at which it begins.

    ``first`` is the index of its first number of the host. Its last size is the length of
    an outer loop that may be taken in parts, with ``unit`` numbers in each pass. 0 means that the
    call lacks such a loop. The ``spans`` are the bytes that this loop writes (the first) and reads.
    """

    kernel: int
    places: list[tuple[int, int]]
    first: int
    sizes: list[int]
    unit: int = 0
    spans: list[Span] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Count of numbers that the call makes, or 0 if it cannot be taken in parts."""
        return self.sizes[-1] * self.unit if self.unit else 0

    def call(self, unit: int = 0) -> list[int]:
        """Return the call in the format of ``native/steps.h``.

        With ``unit``, the call is taken in rows of ``unit`` numbers. With 0, it is taken at once.
        """
        each = unit // self.unit if unit else 0
        moves = [each * span.step for span in self.spans] if unit else [0] * len(self.places)
        places = [number for place, move in zip(self.places, moves) for number in (*place, move)]
        return [
            self.kernel,
            len(self.places),
            len(self.sizes),
            self.first,
            each,
            *places,
            *self.sizes,
        ]


class Writer:
    """Writes one step: each of its operations as calls of kernels."""

    def __init__(
        self,
        dtype: torch.dtype,
        kernels: dict[str, int],
        trace: Trace,
        memories: dict[int, torch.UntypedStorage],
    ) -> None:
        self.dtype = dtype
        self.kernels = kernels
        self.real = C_TYPES[dtype]
        self.storages = trace.outside
        self.memories = memories
        self.numbers: list[float] = []
        last = {
            p.memory: i
            for i, op in enumerate(trace.operations)
            for p in (*op.makes, *op.reads, *op.writes)
        }
        made = dict[int, int]()
        for i, op in enumerate(trace.operations):
            for place in op.makes:
                made.setdefault(place.memory, i)
        begins, self.size = arrange([(made[m], last[m], trace.sizes[m]) for m in made])
        self.begin = dict(zip(made, begins))
        self.room = 0

    def _begin(self, place: Place) -> tuple[int, int]:
        """Return the number of a place's memory, and the byte at which the place begins there."""
        # Memory 0 is the working memory of the step; the others were there before.
        if place.memory in self.begin:
            return 0, self.begin[place.memory] + place.extent[0]
        storage = self.storages[place.memory]
        self.memories.setdefault(storage.data_ptr(), storage)
        return 1 + list(self.memories).index(storage.data_ptr()), place.extent[0]

    def call(
        self,
        places: Sequence[Place | None],
        body: str,
        numbers: Sequence[float] = (),
        *,
        sizes: Sequence[int],
        room: int = 0,
    ) -> Line:
        """Return the call of a kernel.

        Its code knows places as p0, ..., numbers as s0, ..., sizes as n0, ..., and working memory
        as w.
        """
        known = []
        begins = []
        for i, place in enumerate(places):
            of = self.real if place is None else c_type(place.dtype)
            known.append(f"{of} *p{i} = ({of} *)P[{i}];")
            begins.append((-1, 0) if place is None else self._begin(place))
        if room:
            self.room = max(self.room, room * self.dtype.itemsize)
            known.append(f"{self.real} *w = ({self.real} *)P[{len(begins)}];")
            begins.append((0, self.size))
        known += [f"double s{i} = S[{i}];" for i in range(len(numbers))]
        known += [f"int64_t n{i} = N[{i}];" for i in range(len(sizes))]
        # Equal code is one kernel.
        kernel = self.kernels.setdefault("\n".join([*known, body]), len(self.kernels))
        self.numbers += map(float, numbers)
        return Line(kernel, begins, len(self.numbers) - len(numbers), [*sizes])

    def pointwise(self, name: str, given: Words, out: Place) -> Line:
        """Return the call that computes each number of ``out`` by a formula."""
        formula = formula_of(name, given)
        names = list(dict.fromkeys(re.findall(r"{(\w+)}", formula)))
        places = [n for n in names if isinstance(given[n], Place)]
        numbers = [n for n in names if n not in places]
        if not all(isinstance(given[n], int | float) for n in numbers):
            raise TraceError(f"{name} of other arguments than numbers is in no code")
        dtype = out.dtype
        ends = (given[names[0]], given[names[-1]])
        if name in _OF_INPUTS:  # in the common type of both arguments
            like = [
                torch.empty(v.shape, dtype=v.dtype, device="meta") if isinstance(v, Place) else v
                for v in ends
            ]
            dtype = torch.result_type(*like)
        if name == "remainder" and dtype.is_floating_point:
            raise TraceError("a remainder of fractions is in no code")
        if name.startswith("bitwise") and dtype != torch.bool:
            raise TraceError(f"{name} of {dtype} is in no code")
        operands: list[Place] = [out, *(given[n] for n in places)]
        steps = [
            [0 if n == 1 else step for n, step in zip(place.shape, place.stride)]
            for place in operands[1:]
        ]
        # axes are added in front, up to the result's shape
        strides = [[0] * (len(out.shape) - len(own)) + own for own in steps]
        loops = over(out.shape, [out.stride, *strides])
        real = c_type(dtype)
        sizes = list[int]()
        kernel = loops.named(sizes)
        # All operands are read before the formula, because a compiler does not vectorize loads that
        # depend on a condition.
        reads = [f"{real} x{i} = p{i}[{kernel.index(i)}];" for i in range(1, len(operands))]
        words = {word: f"x{i}" for i, word in enumerate(places, 1)}
        words |= {word: f"(({real})s{i})" for i, word in enumerate(numbers)}
        value = formula.format(**words).replace("REAL", real)
        value = value.replace("EXP(", "exponential(" if real == self.real else "exp(")
        body = kernel.nest("\n".join([*reads, f"p0[{kernel.index(0)}] = {value};"]))
        line = self.call(operands, body, [given[n] for n in numbers], sizes=sizes)
        if sizes:
            line.unit = math.prod(map(int, loops.sizes[1:]))
            for own, place, (memory, begin) in zip(loops.strides, operands, line.places):
                first, last = place.extent
                line.spans.append(
                    Span(memory, begin, begin + last - first, int(own[0]) * place.dtype.itemsize)
                )
        return line

    def filled(self, out: Place, value: float) -> Line:
        """Return the call that fills a place with one value."""
        return self.pointwise("fill", {"value": value}, out)

    def copied(self, out: Place, source: Place) -> Line:
        """Return the call that copies a place."""
        return self.pointwise("clone", {"self": source}, out)
