"""The longest row of tokens that a model of transformers accepts."""

from collections.abc import Sequence

from torch import Tensor, nn

from gputune.ground.errors import InputError


def too_long(module: nn.Module, inputs: Sequence[Tensor], name: str) -> InputError | None:
    """Return the error for rows of more tokens than a module has positions, or None.

    Token ids are integers of shape (n rows, T tokens). ``name`` is the module's name in messages.
    Call this function after the forward pass has failed.
    """
    limit = _positions(module)
    if limit is None:
        return None
    lengths = [x.shape[1] for x in inputs if x.dim() == 2 and not x.is_floating_point()]
    if max(lengths, default=0) <= limit:
        return None
    return InputError(
        "X",
        f"has rows of {max(lengths)} tokens, but {name} has positions for at most {limit} tokens",
        remedy=f"Make the rows shorter, for example with tokenizer(texts, truncation=True, "
        f"max_length={limit}).",
    )


def _positions(module: nn.Module) -> int | None:
    """Return the number of tokens for which a model of transformers has position embeddings, or
    None."""
    parts = list(module.modules())
    sizes = {getattr(getattr(part, "config", None), "max_position_embeddings", 0) for part in parts}
    limits = []
    for part in parts:
        if isinstance(part, nn.Embedding) and part.num_embeddings in sizes:
            # RoBERTa's positions begin behind the entry for padding.
            unused = 0 if part.padding_idx is None else part.padding_idx + 1
            limits.append(part.num_embeddings - unused)
    return min(limits, default=None)
