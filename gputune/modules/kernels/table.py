"""The table of operations that need more than a formula per entry, with the function that writes
the C code of each.

Such a function yields the kernel calls that an operation becomes. It receives the arguments of the
operation by name, and the place of its result. It raises TraceError for arguments that it does not
support.
"""

from collections.abc import Callable, Iterator

from gputune.modules.kernels.convolutions import convolution, convolution_gradient
from gputune.modules.kernels.indices import added_at_places, chosen_rows, embedding_gradient
from gputune.modules.kernels.losses import class_loss
from gputune.modules.kernels.movement import joined, part_gradient
from gputune.modules.kernels.norms import (
    batch_norm,
    batch_norm_gradient,
    group_norm,
    group_norm_gradient,
    layer_norm_gradient,
)
from gputune.modules.kernels.patches import patches, shuffled
from gputune.modules.kernels.pooling import max_pool, max_pool_gradient
from gputune.modules.kernels.products import product
from gputune.modules.kernels.reductions import ALONG, along_axis, reduced
from gputune.modules.kernels.resizing import MAPS, resized
from gputune.modules.kernels.writer import Line

LAYERS: dict[str, Callable[..., Iterator[Line]]] = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), product),
    **dict.fromkeys(("sum", "mean"), reduced),
    **dict.fromkeys(ALONG, along_axis),
    **dict.fromkeys(("gather", "index_select", "index", "embedding"), chosen_rows),
    "embedding_dense_backward": embedding_gradient,
    **dict.fromkeys(("scatter_add", "index_put"), added_at_places),
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
