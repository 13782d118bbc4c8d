"""The table of operations that need more than a formula per entry, with the function that writes
the C code of each.

Such a function yields the kernel calls that an operation becomes. It receives the arguments of the
operation by name, and the place of its result. It raises TraceError for arguments that it does not
support.
"""

from collections.abc import Callable, Iterator

from gputune.modules.kernels.convolutions import convolution, convolution_gradient
from gputune.modules.kernels.folds import FOLDS, folded
from gputune.modules.kernels.gates import gated
from gputune.modules.kernels.indices import (
    chosen_rows,
    embedding_gradient,
    indexed,
    put_at_indices,
    put_at_places,
)
from gputune.modules.kernels.losses import class_loss
from gputune.modules.kernels.movement import (
    diagonal_gradient,
    joined,
    moved,
    part_gradient,
    windows_gradient,
)
from gputune.modules.kernels.norms import (
    batch_norm,
    batch_norm_gradient,
    group_norm,
    group_norm_gradient,
    layer_norm,
    layer_norm_gradient,
)
from gputune.modules.kernels.patches import patches, shuffled
from gputune.modules.kernels.pooling import max_pool, max_pool_gradient
from gputune.modules.kernels.products import product
from gputune.modules.kernels.reductions import ALONG, along_axis, reduced
from gputune.modules.kernels.resizing import MAPS, resized
from gputune.modules.kernels.selection import chosen_by_order
from gputune.modules.kernels.writer import Line

LAYERS: dict[str, Callable[..., Iterator[Line]]] = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), product),
    **dict.fromkeys(("sum", "mean"), reduced),
    **dict.fromkeys(ALONG, along_axis),
    **dict.fromkeys(FOLDS, folded),
    **dict.fromkeys(("sort", "topk", "median", "kthvalue"), chosen_by_order),
    **dict.fromkeys(("flip", "roll", "repeat", "constant_pad_nd"), moved),
    "unfold_backward": windows_gradient,
    "diagonal_backward": diagonal_gradient,
    **dict.fromkeys(("gather", "index_select", "embedding"), chosen_rows),
    **dict.fromkeys(("index", "_unsafe_index"), indexed),
    **dict.fromkeys(("index_put", "_unsafe_index_put"), put_at_indices),
    "embedding_dense_backward": embedding_gradient,
    **dict.fromkeys(
        ("scatter", "scatter_add", "index_add", "index_copy", "index_fill"), put_at_places
    ),
    **dict.fromkeys(("glu", "glu_backward"), gated),
    "native_layer_norm": layer_norm,
    **dict.fromkeys(("cat", "stack"), joined),
    **dict.fromkeys(("select_backward", "slice_backward"), part_gradient),
    "native_layer_norm_backward": layer_norm_gradient,
    "native_batch_norm": batch_norm,
    "native_batch_norm_backward": batch_norm_gradient,
    "native_group_norm": group_norm,
    "native_group_norm_backward": group_norm_gradient,
    **dict.fromkeys(("nll_loss_forward", "nll_loss_backward"), class_loss),
    "convolution": convolution,
    "convolution_backward": convolution_gradient,
    **dict.fromkeys(("max_pool2d_with_indices", "adaptive_max_pool2d"), max_pool),
    "max_pool2d_with_indices_backward": max_pool_gradient,
    "adaptive_max_pool2d_backward": max_pool_gradient,
    **dict.fromkeys(MAPS, resized),
    **{f"{name}_backward": resized for name in MAPS},
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), shuffled),
    **dict.fromkeys(("im2col", "col2im"), patches),
}
"""Functions that yield the kernel calls of an operation, by the operation's name in torch."""
