"""The multilayer perceptron: hidden layers (linear, activation, dropout), then a linear layer."""

from collections.abc import Sequence

from torch import Tensor, nn

from .layers import check_size, per_layer, shared_depth

# Each activation maps 0 to 0. A hidden unit whose weights are zero then stays invisible in
# training. Padding relies on this.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


class MLP(nn.Module):
    """A multilayer perceptron that returns logits (classes) or values (regression).

    Shape: ``(B, D) -> (B, K)``.

    Args:
        n_features: number of inputs D, at least 0.
        n_outputs: number of outputs K, at least 1.
        width: units of every hidden layer, at least 1.
        depth: number of hidden layers, at least 0. 0 is the linear model. Ignored if another
            argument is a sequence.
        activation: "relu", "gelu", "silu" or "tanh".
        dropout: dropout rate after every activation, in [0, 1).

    ``width``, ``activation`` and ``dropout`` also accept a sequence with one value for each hidden
    layer, for example ``width=(64, 512)``. All sequences must have the same length.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import gputune, torch
        >>> model = gputune.models.MLP(4, 3, width=16, depth=1)
        >>> model(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
        >>> sum(parameter.numel() for parameter in model.parameters())
        131
        >>> gputune.models.MLP(4, 3, width=(8, 16), activation=("relu", "tanh")).depth
        2
    """

    def __init__(
        self,
        n_features: int,
        n_outputs: int,
        *,
        width: int | Sequence[int] = 128,
        depth: int = 2,
        activation: str | Sequence[str] = "relu",
        dropout: float | Sequence[float] = 0.0,
    ) -> None:
        super().__init__()
        check_size("n_features", n_features, 0)
        check_size("n_outputs", n_outputs, 1)
        check_size("depth", depth, 0)
        depth = shared_depth({"width": width, "activation": activation, "dropout": dropout}, depth)
        widths = per_layer(width, depth)
        activations = per_layer(activation, depth)
        rates = per_layer(dropout, depth)
        for units in per_layer(width, max(depth, 1)):
            check_size("width", units, 1)
        for name in per_layer(activation, max(depth, 1)):
            if name not in ACTIVATIONS:
                raise ValueError(
                    f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}."
                )
        for rate in per_layer(dropout, max(depth, 1)):
            if not 0 <= rate < 1:
                raise ValueError(f"dropout is a probability in [0, 1), got {dropout=}.")
        self.n_features = n_features
        self.n_outputs = n_outputs
        self.width = width
        self.depth = depth
        self.activation = activation
        self.dropout = dropout
        sizes = [n_features, *widths, n_outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:]))
        self.activations = nn.ModuleList(ACTIVATIONS[name]() for name in activations)
        self.dropouts = nn.ModuleList(nn.Dropout(rate) for rate in rates)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (B, K) for rows (B, D)."""
        hidden = zip(self.layers, self.activations, self.dropouts, strict=False)
        for layer, activation, dropout in hidden:
            x = dropout(activation(layer(x)))
        output: Tensor = self.layers[-1](x)
        return output
