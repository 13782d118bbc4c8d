"""What usually lies behind an error of torch's in the forward of a module, by its words and the inputs."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor


def hint(error: str, inputs: Sequence[Tensor]) -> str:
    """Return a remedy as a sentence with a blank before it, "" where none is known."""
    if "scalar types: Long, Int" in error:
        if any(x.is_floating_point() and x.dim() == 2 for x in inputs):
            return (
                " For token ids pass a tensor of integers, torch.as_tensor(X): an array or a frame of two axes is a "
                "table of numbers."
            )
        return " An embedding takes ids as int64 or int32: pass X.long(), or begin the forward with x.long()."
    if "positional argument" in error or "unexpected keyword argument" in error:
        return (
            " Several inputs are passed in order, those of a dict under their keys; where the items of a Dataset are "
            "(inputs, target), leave y out."
        )
    whole = any(not x.is_floating_point() for x in inputs)
    if whole and any(word in error for word in ("Input type", "dtype", "Byte", "Bool", "Long", "Int")):
        is_bytes = any(x.dtype == torch.uint8 for x in inputs)
        scaled = ", or numbers='standard' makes floats of bytes" * is_bytes
        return f" Integers, bytes and booleans come as they are: begin the forward with x.float(){scaled}."
    return _of_channels(error, inputs)


def _of_channels(error: str, inputs: Sequence[Tensor]) -> str:
    """Return the remedy for channels that are not the axis after the rows, as torch's layers want them."""
    lacking = any(f"expected {axes}D input (got {axes - 1}D" in error for axes in (4, 5))
    if lacking or f"expected input[1, {len(inputs[0])}, " in error:
        return " X lacks the axis of the channels, which torch's layers want after the rows: pass X[:, None]."
    if (
        re.search(r"Expected \dD \(unbatched\) or \dD \(batched\) input to conv[23]d", error)
        and inputs[0].dim() == 2
    ):
        return (
            f" A convolution takes images, and a row of X is {inputs[0].shape[1]} numbers: pass "
            "X.reshape(-1, channels, height, width)."
        )
    wanted = re.search(r"to have (\d+) channels, but got", error)
    last = next(
        (x for x in inputs if wanted and x.dim() > 2 and x.shape[-1] in {1, 3, 4, int(wanted[1])}), None
    )
    if last is None:
        return ""
    order = (0, last.dim() - 1, *range(1, last.dim() - 1))
    return (
        f" The channels of X seem to come last, and torch's layers want them first: pass X.transpose{order} of an "
        f"array, X.permute{order} of a tensor."
    )
