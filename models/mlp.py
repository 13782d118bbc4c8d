"""The multilayer perceptron: hidden layers (linear, activation, dropout), then a linear layer."""

from collections.abc import Sequence

from torch import Tensor, nn

from .layers import check_size

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
        width: units of every hidden layer, at least 1, or a sequence with the units of each hidden
            layer. With a sequence, ``depth`` is ignored.
        depth: number of hidden layers, at least 0. 0 is the linear model.
        activation: "relu", "gelu", "silu" or "tanh".
        dropout: dropout rate after every activation, in [0, 1).

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import gputune, torch
        >>> model = gputune.models.MLP(4, 3, width=16, depth=1)
        >>> model(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
        >>> sum(parameter.numel() for parameter in model.parameters())
        131
    """

    def __init__(
        self,
        n_features: int,
        n_outputs: int,
        *,
        width: int | Sequence[int] = 128,
        depth: int = 2,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_size("n_features", n_features, 0)
        check_size("n_outputs", n_outputs, 1)
        check_size("depth", depth, 0)
        hidden = [*width] if isinstance(width, Sequence) else [width] * depth
        for units in hidden or [width]:
            check_size("width", units, 1)
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}."
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is a probability in [0, 1), got {dropout=}.")
        self.n_features = n_features
        self.n_outputs = n_outputs
        self.width = width
        self.depth = len(hidden)
        self.activation = activation
        self.dropout = dropout
        sizes = [n_features, *hidden, n_outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:]))
        self.act = ACTIVATIONS[activation]()
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (B, K) for rows (B, D)."""
        for layer in self.layers[:-1]:
            x = self.drop(self.act(layer(x)))
        output: Tensor = self.layers[-1](x)
        return output
