"""A small convolutional network for images.

It consists of blocks (convolution, BatchNorm, ReLU, pooling), followed by one linear layer.
"""

from torch import Tensor, nn

from .layers import check_size


class CNN(nn.Module):
    """A convolutional network that returns logits (classes) or values (regression) for images.

    Each block is a 3 x 3 convolution, BatchNorm, ReLU and a max pooling that halves height and
    width. Then come the mean over the remaining height and width, dropout and a linear layer.
    BatchNorm removes the scale of the images, so bytes from 0 to 255 work as well as floats.

    Shape: ``(B, *input_shape) -> (B, K)``.

    Args:
        input_shape: shape of one image, (channels, height, width), or (height, width) if there is
            one channel. Height and width must be at least ``2**depth``.
        n_outputs: number of outputs K.
        channels: channels of the first block, at least 1. Each further block has twice as many
            channels as the block before.
        depth: number of blocks, at least 1.
        dropout: dropout rate before the linear layer, in [0, 1).

    Raises:
        ValueError: the rows are not images, the images are too small for ``depth`` blocks, or an
            argument is out of range.

    Example:
        >>> import gputune, torch
        >>> model = gputune.models.CNN((3, 32, 32), 10)  # color images, ten classes
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> sum(parameter.numel() for parameter in model.parameters())
        5466
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        n_outputs: int,
        *,
        channels: int = 16,
        depth: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_size("channels", channels, 1)
        check_size("depth", depth, 1)
        if len(input_shape) not in (2, 3):
            raise ValueError(
                "a CNN takes images, (channels, height, width) or (height, width), got rows of "
                f"shape {input_shape}: reshape X, or choose a different model"
            )
        self.one_channel = len(input_shape) == 2
        if min(input_shape[-2:]) < 2**depth:
            raise ValueError(
                f"depth={depth} halves height and width {depth} times, which needs images of "
                f"{2**depth} x {2**depth} or more, got {input_shape[-2]} x {input_shape[-1]}: "
                "lower depth, or check the order of the axes"
            )
        # channels of the images, then of each block
        sizes = [
            1 if self.one_channel else input_shape[0],
            *(channels * 2**i for i in range(depth)),
        ]
        self.blocks = nn.Sequential(*(self._block(a, b) for a, b in zip(sizes[:-1], sizes[1:])))
        self.drop = nn.Dropout(dropout)
        self.last = nn.Linear(sizes[-1], n_outputs)

    def _block(self, inputs: int, outputs: int) -> nn.Sequential:
        """Return one block: convolution, BatchNorm, ReLU and pooling."""
        # BatchNorm adds its own shift, so a bias of the convolution would have no effect.
        convolution = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        r"""Return the outputs (B, K) for images (B, \*input_shape)."""
        x = x[:, None] if self.one_channel else x
        # (B, channels, height, width); bytes become floats
        x = self.blocks(x.to(self.last.weight.dtype))
        output: Tensor = self.last(self.drop(x.mean((2, 3))))
        return output
