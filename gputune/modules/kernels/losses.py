"""Writes C code for losses of classes."""

from collections.abc import Iterator

from gputune.modules.kernels.places import require
from gputune.modules.kernels.writer import Line, Writer
from gputune.modules.trace import Kwargs, Operation, Place


def class_loss(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
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
