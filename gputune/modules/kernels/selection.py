"""Writes C code for operations that sort along an axis: sort, topk, median and kthvalue."""

from collections.abc import Iterator

from gputune.modules.kernels.places import pick, require
from gputune.modules.kernels.writer import Line, Writer, loops_over, named
from gputune.modules.trace import Kwargs, Operation, Place


def chosen_by_order(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel call that sorts along an axis, and writes all, the first k or one of the
    sorted numbers and their indices.

    Equal numbers stay in their order. Torch does not specify their order in topk and median.
    """
    x: Place = kwargs["self"]
    require(x.dtype == writer.dtype and "dim" in kwargs, op, str(x.dtype))
    values, index = op.results
    axis = kwargs["dim"] % max(1, len(x.shape))
    size = x.shape[axis] if x.shape else 1
    is_single = op.name in ("median", "kthvalue")
    is_descending = kwargs["largest"] if op.name == "topk" else kwargs.get("descending", False)
    others = [i for i in range(len(x.shape)) if i != axis]
    places = [x]
    strides = [pick(x.stride, others)]
    for place in (values, index):
        assert place is not None
        places.append(place)
        is_kept = not is_single or kwargs["keepdim"]
        strides.append(pick(place.stride, others) if is_kept else [*place.stride])
    loops, sizes = loops_over(pick(x.shape, others), strides)
    length = named(size, sizes)
    step = named(x.stride[axis] if x.shape else 1, sizes)
    first = f"p0[{loops.index(0)} + order[{{}}] * {step}]"
    code = [
        f"int64_t *order = (int64_t *)w, at = 0;\nconst real *x = p0 + {loops.index(0)};",
        f"sort_row({length}, x, {step}, {int(is_descending)}, order, order + {length});",
    ]
    if is_single:
        last = first.format(f"{length} - 1")
        rank = f"({length} - 1) / 2" if op.name == "median" else f"{kwargs['k'] - 1}"
        code.append(f"at = order[{rank}];")
        if op.name == "median":  # NaN, which is the last, is the median
            code.append(f"if ({last} != {last}) at = order[{length} - 1];")
        code.append(f"p1[{loops.index(1)}] = x[at * {step}];\np2[{loops.index(2)}] = at;")
    else:
        count = named(op.makes[0].shape[axis] if x.shape else 1, sizes)
        steps = [named(place.stride[axis] if x.shape else 1, sizes) for place in places[1:]]
        code.append(
            f"for (long j = 0; j < {count}; j++) {{\n"
            f"p1[{loops.index(1)} + j * {steps[0]}] = x[order[j] * {step}];\n"
            f"p2[{loops.index(2)} + j * {steps[1]}] = order[j];\n}}"
        )
    # two rows of indices and a row of numbers
    numbers = size * (1 + 16 // writer.dtype.itemsize)
    yield writer.call(places, loops.nest("\n".join(code), ""), sizes=sizes, workspace=numbers)
