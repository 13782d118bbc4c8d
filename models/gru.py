"""A recurrent net for sequences of numbers or of token ids: GRU layers, of whose last state one
linear layer."""

from torch import Tensor, nn

from .layers import check_size


class GRU(nn.Module):
    """Gated recurrent units that return logits (classes) or values (regression) of sequences.

    ``layers`` GRU layers of ``hidden`` units; the state after the last step, with ``dropout`` in
    [0, 1), goes to the linear layer. Token ids, integers from 0 to ``n_tokens - 1``, go through an
    embedding of ``hidden`` numbers first.

    ``input_shape`` is that of one sequence: (steps, numbers a step), or of token ids (steps,).
    Shape: ``(B, *input_shape) -> (B, K)``. Raises ValueError for rows that are no sequences, token
        ids without
    ``n_tokens``, and arguments out of range.
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
                f"shape {input_shape}: reshape X, or choose a model for such rows"
            )
        if (len(input_shape) == 1) != (n_tokens is not None):
            raise ValueError(
                f"rows of shape {input_shape} and n_tokens={n_tokens} do not fit: token ids, "
                "(steps,), need n_tokens, the largest id plus 1 (module__n_tokens in the space), "
                "and numbers, (steps, numbers), none"
            )
        self.embedding = None if n_tokens is None else nn.Embedding(n_tokens, hidden)
        size = hidden if n_tokens is not None else input_shape[1]
        self.recurrent = nn.GRU(size, hidden, num_layers=layers, batch_first=True)
        self.drop = nn.Dropout(dropout)
        self.last = nn.Linear(hidden, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.last.weight.dtype) if self.embedding is None else self.embedding(x.long())
        states, _ = self.recurrent(x)  # (B, T, hidden)
        output: Tensor = self.last(self.drop(states[:, -1]))
        return output
