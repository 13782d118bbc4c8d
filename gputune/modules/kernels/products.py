"""Writes C code for matrix products."""

from collections.abc import Iterator

from gputune.modules.kernels.places import require
from gputune.modules.kernels.writer import Line, Writer
from gputune.modules.trace import Kwargs, Operation, Place, TraceError

# columns of the widest tile of a product; it needs working memory for the inner rows and one tile
_TILE = 96
# Smallest inner and column sizes for which a transposed first factor is copied before a product. Its
# copy takes longer than it saves in smaller products (one EPYC core).
_TURNED_INNER = 64
_TURNED_COLUMNS = 128


def product(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel calls for a matrix product with an added matrix or bias."""
    names = ("self", "mat2")
    added = None
    for pair in (("batch1", "batch2"), ("mat1", "mat2")):
        if pair[0] in kwargs:
            names = pair
            added = kwargs["self"]
    a = kwargs[names[0]]
    b = kwargs[names[1]]
    is_plain = kwargs.get("beta", 1) == kwargs.get("alpha", 1) == 1 and out.stride[-1] == 1
    require(is_plain and a.dtype == b.dtype == out.dtype, op, "other factors")
    if out.dtype != writer.dtype:
        raise TraceError(f"a product of {out.dtype} is not supported")
    # A matrix or a bias that the kernel can add.
    matrix: Place | None = None
    if (
        added is not None
        and added.dtype == out.dtype
        and (added.stride[-1], added.shape[-1]) == (1, out.shape[-1])
        and (added.memory != out.memory or added == out)
    ):
        matrix = added
    factors = [out, a, b] if matrix is None else [out, a, b, matrix]
    begins = [p.stride[0] if len(p.shape) > 2 and p.shape[0] > 1 else 0 for p in factors]
    sizes = [
        out.shape[0] if len(out.shape) > 2 else 1,
        *out.shape[-2:],
        a.shape[-1],
        *a.stride[-2:],
        *b.stride[-2:],
        *begins,
        out.stride[-2],
    ]
    if matrix is None:
        addition = "0, 0"
    else:
        # A bias is one row that is added to all rows of the product.
        is_bias = len(matrix.shape) == 1 or matrix.shape[-2] == 1
        addition = f"p3 + i * n11, n{len(sizes)}"
        sizes.append(0 if is_bias else matrix.stride[-2])
    workspace = _TILE * (a.shape[-1] + _TILE)
    function = "matrix_product"
    is_large = a.shape[-1] >= _TURNED_INNER and out.shape[-1] >= _TURNED_COLUMNS
    if is_large and a.stride[-2] == 1 and a.stride[-1] != 1:
        function = "turned_product"
        workspace += a.shape[-2] * a.shape[-1]
    body = (
        f"for (long i = 0; i < n0; i++) library->{function}(n1, n2, n3, p1 + i * n9, n4, n5, p2 + i * "
        f"n10, n6, n7, {addition}, p0 + i * n8, n{8 + len(begins)}, w);"
    )
    yield writer.call(factors, body, sizes=sizes, workspace=workspace)
    if added is not None and matrix is None:
        yield writer.pointwise("add", {"self": out, "other": added, "alpha": 1}, out)
