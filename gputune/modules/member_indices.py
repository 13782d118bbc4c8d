"""Operations of a member's step that read or write at the places in an index, as C.

A negative index counts from the end if torch allows one.
"""

from collections.abc import Iterator, Sequence

import torch

from gputune.modules.member_kernels import Line, Loops, Writer, named, over
from gputune.modules.trace import Operation, Place, TraceError, Words


def require(known: bool, op: Operation, what: str = "other arguments") -> None:
    """Raise TraceError for an operation with unsupported arguments, unless ``known``."""
    if not known:
        raise TraceError(f"{op.function} of {what} is in no code")


def loops_over(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[Loops, list[int]]:
    """Return loops over a shape, with names for their sizes, and these sizes."""
    sizes: list[int] = []
    return over(shape, strides).named(sizes), sizes


def chosen_rows(writer: Writer, given: Words, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the call that copies rows or numbers from the places in an index."""
    if op.name == "embedding":
        x = given["weight"]
        axis = 0
        index = given["indices"]
        of_index = [*index.stride, 0]
        along = [*[0] * len(index.shape), x.stride[1]]
    else:
        x = given["self"]
        if op.name == "index":
            (axis, index), *others = [
                (i, index) for i, index in enumerate(given["indices"]) if index is not None
            ]
            one = not others and len(index.shape) == 1 and index.dtype != torch.bool
            require(one, op, "several indices")
        else:
            axis = given["dim"] % max(1, len(x.shape))
            index = given["index"]
        along = [0 if i == axis else x.stride[i] for i in range(len(out.shape))]
        of_index = list(index.stride)
        if op.name != "gather":
            of_index = [sum(index.stride) if i == axis else 0 for i in range(len(out.shape))]
    loops, sizes = loops_over(out.shape, [out.stride, of_index, along])
    chosen = f"p2[{loops.index(1)}]"
    if op.name == "index":  # the other operations take no negative index
        chosen = _index_at(chosen, named(x.shape[axis], sizes))
    at = f"p1[{loops.index(2)} + {chosen} * {named(x.stride[axis], sizes)}]"
    yield writer.call([out, x, index], loops.nest(f"p0[{loops.index(0)}] = {at};"), sizes=sizes)


def embedding_slope(writer: Writer, given: Words, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the calls of the gradient of an embedding: zeros, then each slope added to its row."""
    slope = given["grad_output"]
    index = given["indices"]
    require(given["padding_idx"] < 0 and not given["scale_grad_by_freq"], op)
    yield writer.filled(out, 0.0)
    strides = [slope.stride, [*index.stride, 0], [*[0] * len(index.shape), out.stride[1]]]
    loops, sizes = loops_over([*index.shape, out.shape[1]], strides)
    to = f"p0[p2[{loops.index(1)}] * {named(out.stride[0], sizes)} + {loops.index(2)}]"
    # No vectors along rows of the index: an id may occur twice, and must not be written twice at
    # once.
    yield writer.call(
        [out, slope, index], loops.nest(f"{to} += p1[{loops.index(0)}];", ""), sizes=sizes
    )


def added_at_places(writer: Writer, given: Words, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the calls that add numbers at the places in an index. Several of these places may be
    equal."""
    x = given["self"]
    if op.name.startswith("index_put"):
        (axis, index), *others = [
            (i, index) for i, index in enumerate(given["indices"]) if index is not None
        ]
        one = not others and len(index.shape) == 1 and index.dtype != torch.bool
        require(one and given["accumulate"], op, "several indices, or one that replaces")
        source = given["values"]
        shape = list(out.shape)
        shape[axis] = index.shape[0]
        of_index = [index.stride[0] if i == axis else 0 for i in range(len(shape))]
        lacking = len(shape) - len(source.shape)
        steps = [0 if n == 1 else step for n, step in zip(source.shape, source.stride)]
        of_source = [*[0] * lacking, *steps]
    else:
        axis = given["dim"] % max(1, len(x.shape))
        index = given["index"]
        source = given["src"]
        shape = list(index.shape)
        of_index = list(index.stride)
        of_source = list(source.stride)
    if x != out:
        yield writer.copied(out, x)
    of_out = [0 if i == axis else step for i, step in enumerate(out.stride)]
    # The index is the first operand, so the innermost loop runs along it. No loop may be
    # vectorized, because places may be equal.
    loops, sizes = loops_over(shape, [of_index, of_source, of_out])
    at = _index_at(f"p1[{loops.index(0)}]", named(out.shape[axis], sizes))
    to = f"p0[{loops.index(2)} + {at} * {named(out.stride[axis], sizes)}]"
    yield writer.call(
        [out, index, source], loops.nest(f"{to} += p2[{loops.index(1)}];", ""), sizes=sizes
    )


def _index_at(index: str, size: int | str) -> str:
    """Return the C code of an index of an axis. A negative index counts from the end of the
    axis."""
    return f"({index} < 0 ? {index} + {size} : {index})"
