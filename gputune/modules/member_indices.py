"""Operations of a member's step that read or write rows and numbers at the places that an index
says, as C.

A negative index counts from the end where torch allows one.
"""

from collections.abc import Iterator, Sequence

import torch

from gputune.modules.member_kernels import Line, Loops, Writer, named, over
from gputune.modules.trace import Operation, Place, TraceError, Words


def require(known: bool, op: Operation, what: str = "other arguments") -> None:
    """Raise TraceError for an operation of arguments that no code has, unless they are known."""
    if not known:
        raise TraceError(f"{op.function} of {what} is in no code")


def loops_over(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[Loops, list[int]]:
    """Return loops over a shape, with names for their sizes, and these sizes."""
    sizes: list[int] = []
    return over(shape, strides).named(sizes), sizes


def chosen_rows(writer: Writer, given: Words, op: Operation, out: Place) -> Iterator[Line]:
    """Rows, or numbers, whose places an index says."""
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
    if op.name == "index":  # the others take no negative ones
        chosen = _index_at(chosen, named(x.shape[axis], sizes))
    at = f"p1[{loops.index(2)} + {chosen} * {named(x.stride[axis], sizes)}]"
    yield writer.call([out, x, index], loops.nest(f"p0[{loops.index(0)}] = {at};"), sizes=sizes)


def embedding_slope(writer: Writer, given: Words, op: Operation, out: Place) -> Iterator[Line]:
    slope = given["grad_output"]
    index = given["indices"]
    require(given["padding_idx"] < 0 and not given["scale_grad_by_freq"], op)
    yield writer.filled(out, 0.0)
    strides = [slope.stride, [*index.stride, 0], [*[0] * len(index.shape), out.stride[1]]]
    loops, sizes = loops_over([*index.shape, out.shape[1]], strides)
    to = f"p0[p2[{loops.index(1)}] * {named(out.stride[0], sizes)} + {loops.index(2)}]"
    # Along rows of the index no two may be written at once: a code may come twice.
    yield writer.call(
        [out, slope, index], loops.nest(f"{to} += p1[{loops.index(0)}];", ""), sizes=sizes
    )


def added_at_places(writer: Writer, given: Words, op: Operation, out: Place) -> Iterator[Line]:
    """Add numbers at places that an index says, of which several may be one place."""
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
    # The index is the first operand, along which the innermost loop goes: none may be taken in
    # vectors.
    loops, sizes = loops_over(shape, [of_index, of_source, of_out])
    at = _index_at(f"p1[{loops.index(0)}]", named(out.shape[axis], sizes))
    to = f"p0[{loops.index(2)} + {at} * {named(out.stride[axis], sizes)}]"
    yield writer.call(
        [out, index, source], loops.nest(f"{to} += p2[{loops.index(1)}];", ""), sizes=sizes
    )


def _index_at(index: str, size: int | str) -> str:
    """Return an index of an axis, in C: a negative one counts from the end of the axis."""
    return f"({index} < 0 ? {index} + {size} : {index})"
