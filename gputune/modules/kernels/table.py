"""The table of operations that need more than a formula per entry, with the function that writes
the C code of each.

Such a function yields the kernel calls that an operation becomes. It receives the arguments of the
operation by name, and the place of its result. It raises TraceError for arguments that it does not
support. Operations that are neither here nor in ``formulas.py`` are decomposed
(``modules/decompositions.py``).
"""

from collections.abc import Callable, Iterator

from gputune.modules.kernels.axes import ALONG, REDUCTIONS, along_axis, ordered, reduced
from gputune.modules.kernels.convolutions import convolution, convolution_gradient
from gputune.modules.kernels.formulas import FORMULAS, is_formula
from gputune.modules.kernels.indices import chosen, put
from gputune.modules.kernels.layers import (
    batch_norm,
    batch_norm_gradient,
    layer_norm_gradient,
    max_pool,
    max_pool_gradient,
    product,
)
from gputune.modules.kernels.writer import Formula, Line, Writer
from gputune.modules.trace import Kwargs, Operation, TraceError, arguments_of

KERNELS: dict[str, Callable[..., Iterator[Line | Formula]]] = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), product),
    **dict.fromkeys(REDUCTIONS, reduced),
    **dict.fromkeys(ALONG, along_axis),
    "sort": ordered,
    **dict.fromkeys(("gather", "index", "_unsafe_index"), chosen),
    **dict.fromkeys(("scatter", "scatter_add", "index_put", "_unsafe_index_put"), put),
    "native_layer_norm_backward": layer_norm_gradient,
    "native_batch_norm": batch_norm,
    "native_batch_norm_backward": batch_norm_gradient,
    "convolution": convolution,
    "convolution_backward": convolution_gradient,
    **dict.fromkeys(("max_pool2d_with_indices", "adaptive_max_pool2d"), max_pool),
    "max_pool2d_with_indices_backward": max_pool_gradient,
    "adaptive_max_pool2d_backward": max_pool_gradient,
}
"""Functions that yield the kernel calls of an operation, by the operation's name in torch."""


def is_coded(name: str, kwargs: Kwargs) -> bool:
    """Return whether C code computes an operation of torch with these arguments.

    The ``name`` has no "_" of a writing operation at its end.
    """
    return name in KERNELS or _filled_with(name) is not None or is_formula(name, kwargs)


def written(writer: Writer, op: Operation) -> Iterator[Line | Formula]:
    """Yield the C kernel calls that compute one operation. Raises TraceError for an operation that
    is not supported."""
    name = op.name.removesuffix("_")
    kwargs = arguments_of(op.function, op.args, op.kwargs)
    out = (op.makes or op.writes)[0]
    if name in KERNELS:
        yield from KERNELS[name](writer, kwargs, op, out)
    elif name in FORMULAS:
        yield writer.pointwise(name, kwargs, out)
    elif value := _filled_with(name):
        if value != "empty":
            yield writer.filled(out, kwargs.get("fill_value", float(value == "ones")))
    else:
        operation = op.replaced or str(op.function).removesuffix(".default")
        raise TraceError(f"{operation} has no C code")


def _filled_with(name: str) -> str | None:
    """Return "zeros", "ones", "full" or "empty" for an operation that makes or fills a tensor, or
    None for another operation."""
    base = name.removeprefix("new_").removesuffix("_like").removesuffix("_strided")
    base = "zeros" if base == "zero" else base
    return base if base in ("zeros", "ones", "full", "empty") else None
