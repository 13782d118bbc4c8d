"""A recurrent network for sequences of numeric vectors or of token ids.

It consists of GRU layers, followed by one linear layer on their last state.
"""

from torch import Tensor, nn

from .layers import check_size


class GRU(nn.Module):
    """Gated recurrent units that return logits (classes) or values (regression) for sequences.

    Dropout and a linear layer follow the last state of the GRU layers. Token ids are embedded
    first, as vectors of ``hidden`` values.

    Shape: ``(B, *input_shape) -> (B, K)``.

    Args:
        input_shape: shape of one sequence, (steps, values per step), or (steps,) for token ids.
        n_outputs: number of outputs K.
        hidden: number of units per layer, at least 1.
        layers: number of GRU layers, at least 1.
        n_tokens: number of different token ids, which are integers from 0 to ``n_tokens - 1``. None
            for sequences of numeric vectors.
        dropout: dropout rate before the linear layer, in [0, 1).

    Raises:
        ValueError: the rows are not sequences, token ids come without ``n_tokens``, or an argument
            is out of range.

    Example:
        >>> import gputune, torch
        >>> model = gputune.models.GRU((20, 6), 2)  # 20 steps of 6 numbers, two outputs
        >>> model(torch.zeros(4, 20, 6)).shape
        torch.Size([4, 2])
        >>> words = gputune.models.GRU((20,), 2, n_tokens=1000)  # 20 token ids
        >>> words(torch.zeros(4, 20, dtype=torch.int64)).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        n_outputs: int,
        *,
        hidden: int = 32,
        layers: int = 1,
        n_tokens: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_size("hidden", hidden, 1)
        check_size("layers", layers, 1)
        if len(input_shape) not in (1, 2):
            raise ValueError(
                "a GRU takes sequences, (steps, numbers) or (steps,) of token ids, got rows of "
                f"shape {input_shape}: reshape X, or choose a different model"
            )
        if (len(input_shape) == 1) != (n_tokens is not None):
            raise ValueError(
                f"rows of shape {input_shape} and n_tokens={n_tokens} do not fit: token ids of "
                "shape (steps,) need n_tokens, the largest id plus 1 (module__n_tokens in the "
                "space), and sequences of shape (steps, numbers) need n_tokens=None"
            )
        self.embedding = None if n_tokens is None else nn.Embedding(n_tokens, hidden)
        # numbers per step that the first layer receives
        size = hidden if n_tokens is not None else input_shape[1]
        self.recurrent = nn.GRU(size, hidden, num_layers=layers, batch_first=True)
        self.drop = nn.Dropout(dropout)
        self.last = nn.Linear(hidden, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        r"""Return the outputs (B, K) for sequences (B, \*input_shape)."""
        x = x.to(self.last.weight.dtype) if self.embedding is None else self.embedding(x.long())
        states, _ = self.recurrent(x)  # (B, T, hidden), the states of the last layer
        output: Tensor = self.last(self.drop(states[:, -1]))
        return output
