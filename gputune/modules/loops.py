"""Loops of C over the places of tensors: axes that follow on each other in memory are one loop."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gputune.modules.trace import Place


@dataclass(frozen=True)
class Loops:
    """Loops of some ``sizes``, the outermost first, and the ``strides`` of each operand along them."""

    sizes: tuple[int | str, ...]
    strides: tuple[tuple[int | str, ...], ...]
    variable: str = "i"

    def with_outer(self, size: str) -> "Loops":
        """Return the loops with a name for the size of the outermost: minibatches of all sizes share them."""
        return replace(self, sizes=(size, *self.sizes[1:])) if self.sizes else self

    @property
    def is_flat(self) -> bool:
        """Whether it is one loop over operands that each lie in one piece, or are one number."""
        return len(self.sizes) == 1 and all(own in ((0,), (1,)) for own in self.strides)

    def index(self, operand: int) -> str:
        """Return where an operand's number lies, in the variables of the loops."""
        terms = [f"{self.variable}{i} * {s}" for i, s in enumerate(self.strides[operand]) if s]
        return " + ".join(terms) or "0"

    def nest(self, body: str, pragma: str = "GCC ivdep") -> str:
        """Return the loops around a body; the innermost may be taken in vectors."""
        lines = []
        for i, size in enumerate(self.sizes):
            if pragma and i == len(self.sizes) - 1:
                lines.append(f"#pragma {pragma}")
            v = f"{self.variable}{i}"
            lines.append(f"for (long {v} = 0; {v} < {size}; {v}++)")
        return "\n".join([*lines, f"{{\n{body}\n}}"])


def over(shape: Sequence[int], strides: Sequence[Sequence[int]], variable: str = "i") -> Loops:
    """Return the loops over a shape; the axis along which the first operand lies closest is innermost."""
    axes = [(n, tuple(own[i] for own in strides)) for i, n in enumerate(shape) if n != 1]
    axes.sort(key=lambda axis: -max(axis[1][:1], default=0))
    merged: list[tuple[int, tuple[int, ...]]] = []
    for n, own in axes:
        if merged and all(outer == n * inner for outer, inner in zip(merged[-1][1], own)):
            merged[-1] = (merged[-1][0] * n, own)
        else:
            merged.append((n, own))
    sizes, by_axis = tuple(n for n, _ in merged), [own for _, own in merged]
    return Loops(sizes, tuple(tuple(own[k] for own in by_axis) for k in range(len(strides))), variable)


def broadcast(place: Place, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a place as one of a larger shape."""
    missing = len(shape) - len(place.shape)
    own = zip(place.shape, place.stride)
    return (*[0] * missing, *(0 if n == 1 else stride for n, stride in own))
