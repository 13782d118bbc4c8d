"""A small convolutional net for images: blocks of convolution, BatchNorm and pooling, then one
linear layer."""

from torch import Tensor, nn

from .layers import check_size


class CNN(nn.Module):
    """A convolutional net that returns logits (classes) or values (regression) of images.

    ``depth`` blocks, each a 3 x 3 convolution, BatchNorm, ReLU and a pooling that halves height and
    width; the first has ``channels`` channels, each other twice those of the one before. The mean
    over what is left of height and width, with ``dropout`` in [0, 1), goes to the linear layer.
    BatchNorm takes away the scale of the images: bytes from 0 to 255 are as good as floats.

    ``input_shape`` is that of one image, (channels, height, width), or (height, width) where there
    is one channel.
    Shape: ``(B, *input_shape) -> (B, K)``. Raises ValueError for rows that are no images, images
    too small for so many blocks, and arguments out of range.
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
                f"shape {input_shape}: reshape X, or choose a model for such rows"
            )
        self.one_channel = len(input_shape) == 2
        if min(input_shape[-2:]) < 2**depth:
            raise ValueError(
                f"depth={depth} halves height and width {depth} times, which takes images of "
                f"{2**depth} x {2**depth} or more, got {input_shape[-2]} x {input_shape[-1]}: "
                "lower depth, or check the order of the axes"
            )
        sizes = [
            1 if self.one_channel else input_shape[0],
            *(channels * 2**i for i in range(depth)),
        ]
        self.blocks = nn.Sequential(*(self._block(a, b) for a, b in zip(sizes[:-1], sizes[1:])))
        self.drop = nn.Dropout(dropout)
        self.last = nn.Linear(sizes[-1], n_outputs)

    def _block(self, inputs: int, outputs: int) -> nn.Sequential:
        # BatchNorm has a shift of its own, so that the convolution needs none.
        convolution = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None] if self.one_channel else x
        x = self.blocks(x.to(self.last.weight.dtype))  # (B, C, H, W), also of bytes
        output: Tensor = self.last(self.drop(x.mean((2, 3))))
        return output
