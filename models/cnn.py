"""A small convolutional network for images and sequences.

It consists of blocks (convolution, BatchNorm, ReLU, pooling), followed by one linear layer.
"""

from functools import partial

from torch import Tensor, nn

from .layers import check_places, check_size, spatial_dims_of

# convolution, BatchNorm and pooling, by the number of axes that they slide along
_LAYERS = {
    1: (nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d),
    2: (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d),
}


class CNN(nn.Module):
    """A convolutional network that returns logits (classes) or values (regression) for images and
    sequences.

    Each block is a convolution with a kernel of 3 x 3 pixels, or 3 steps of a sequence, BatchNorm,
    ReLU and a max pooling that halves height and width, or the length. Then come the mean over the
    remaining pixels or steps, dropout and a linear layer. BatchNorm removes the scale of the
    inputs, so bytes from 0 to 255 work as well as floats.

    Shape: ``(B, *input_shape) -> (B, K)``.

    Args:
        input_shape: shape of one row. An image is (channels, height, width), or (height, width) if
            there is one channel. A sequence is (channels, length), as in ``nn.Conv1d``. Height,
            width and length must be at least ``2**depth``.
        n_outputs: number of outputs K.
        channels: channels of the first block, at least 1. Each further block has twice as many
            channels as the block before.
        depth: number of blocks, at least 1.
        dropout: dropout rate before the linear layer, in [0, 1).
        spatial_dims: 1 for sequences, 2 for images. None (the default) chooses 1 for rows of shape
            (1, length), and 2 for all other rows.

    Raises:
        ValueError: the rows are neither images nor sequences, they are too small for ``depth``
            blocks, or an argument is out of range.

    Example:
        >>> import gputune, torch
        >>> model = gputune.models.CNN((3, 32, 32), 10)  # color images, ten classes
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> sum(parameter.numel() for parameter in model.parameters())
        5466
        >>> sequences = gputune.models.CNN((6, 100), 2, spatial_dims=1)  # 6 channels, 100 steps
        >>> sequences(torch.zeros(4, 6, 100)).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        n_outputs: int,
        *,
        channels: int = 16,
        depth: int = 2,
        dropout: float = 0.0,
        spatial_dims: int | None = None,
    ) -> None:
        super().__init__()
        check_size("channels", channels, 1)
        check_size("depth", depth, 1)
        dims = spatial_dims_of(input_shape, spatial_dims)
        check_places(input_shape, dims, depth)
        self.one_channel = len(input_shape) == dims
        # channels of the rows, then of each block
        sizes = [
            1 if self.one_channel else input_shape[0],
            *(channels * 2**i for i in range(depth)),
        ]
        self.blocks = nn.Sequential(*map(partial(_block, dims), sizes[:-1], sizes[1:]))
        self.drop = nn.Dropout(dropout)
        self.last = nn.Linear(sizes[-1], n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        r"""Return the outputs (B, K) for rows (B, \*input_shape)."""
        x = x[:, None] if self.one_channel else x
        # (B, channels, height, width) or (B, channels, length); bytes become floats
        x = self.blocks(x.to(self.last.weight.dtype))
        output: Tensor = self.last(self.drop(x.mean(tuple(range(2, x.dim())))))
        return output


def _block(dims: int, inputs: int, outputs: int) -> nn.Sequential:
    """Return one block: convolution, BatchNorm, ReLU and pooling."""
    convolution, norm, pooling = _LAYERS[dims]
    # BatchNorm adds its own shift, so a bias of the convolution would have no effect.
    first = convolution(inputs, outputs, kernel_size=3, padding=1, bias=False)
    return nn.Sequential(first, norm(outputs), nn.ReLU(), pooling(2))
