"""Writes C code for a gated linear unit: one half of an axis times the sigmoid of the other half."""

from collections.abc import Iterator

from gputune.modules.kernels.places import part_of
from gputune.modules.kernels.writer import Line, Writer
from gputune.modules.trace import Kwargs, Operation, Place

_SIGMOID = "1 / (1 + EXP(-{gate}))"
_GATED = "{value} / (1 + EXP(-{gate}))"
_GATE_GRADIENT = f"{{grad_output}} * {{value}} * ({_SIGMOID}) * (1 - {_SIGMOID})"


def gated(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel calls for a gated linear unit, or for its gradient."""
    x: Place = kwargs["self"]
    axis = kwargs["dim"] % len(x.shape)
    half = x.shape[axis] // 2
    value = part_of(x, axis, 0, half)
    gate = part_of(x, axis, half, half)
    if op.name == "glu":
        yield writer.by_formula(_GATED, {"value": value, "gate": gate}, out)
        return
    gradient = kwargs["grad_output"]
    of_value = part_of(out, axis, 0, half)
    yield writer.by_formula(_GATED, {"value": gradient, "gate": gate}, of_value)
    values = {"grad_output": gradient, "value": value, "gate": gate}
    yield writer.by_formula(_GATE_GRADIENT, values, part_of(out, axis, half, half))
