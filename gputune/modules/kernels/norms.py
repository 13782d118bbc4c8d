"""Writes C code for the gradient of layer norm, and for batch norm."""

import math
from collections.abc import Iterator

from gputune.modules.kernels.places import is_contiguous, require
from gputune.modules.kernels.writer import Line, Writer
from gputune.modules.trace import Kwargs, Operation, Place


def layer_norm_gradient(
    writer: Writer, kwargs: Kwargs, op: Operation, out: Place
) -> Iterator[Line]:
    """Yield the C kernel call for the gradient of a layer norm without weights."""
    places = [out, kwargs["grad_out"], kwargs["input"], kwargs["mean"], kwargs["rstd"]]
    is_plain = kwargs["weight"] is None and op.makes == [out]
    require(is_plain and all(map(is_contiguous, places)), op)
    n = math.prod(kwargs["normalized_shape"])
    body = "layer_norm_slope(n0, n1, p1, p2, p3, p4, p0);"
    sizes = [math.prod(kwargs["input"].shape) // n, n]
    yield writer.call(places, body, sizes=sizes)


def batch_norm(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
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
        require(place is None or is_contiguous(place), op)
        code += f", p{i}"
    yield writer.call(places, f"{code});", numbers, sizes=rows)
