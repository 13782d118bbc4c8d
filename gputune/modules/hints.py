"""Why a user's module fails, in words: what lies behind an error of torch's, where, and ids that no embedding has."""

import re
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn

from gputune.data.dataset import Dataset
from gputune.errors import InputError
from gputune.population.population import call_module


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
    """Return the remedy for channels that are not the axis after the rows."""
    lacking = any(f"expected {axes}D input (got {axes - 1}D" in error for axes in (4, 5))
    if lacking or f"expected input[1, {len(inputs[0])}, " in error:
        return " X lacks the axis of the channels, which torch's layers want after the rows: pass X[:, None]."
    if re.search(r"Expected \dD \(unbatched\) or \dD \(batched\) input to conv[23]d", error) and inputs[0].dim() == 2:
        return (
            f" A convolution takes images, and a row of X is {inputs[0].shape[1]} numbers: pass "
            "X.reshape(-1, channels, height, width)."
        )
    wanted = re.search(r"to have (\d+) channels, but got", error)
    last = next((x for x in inputs if wanted and x.dim() > 2 and x.shape[-1] in {1, 3, 4, int(wanted[1])}), None)
    if last is None:
        return ""
    order = (0, last.dim() - 1, *range(1, last.dim() - 1))
    return (
        f" The channels of X seem to come last, and torch's layers want them first: pass X.transpose{order} of an "
        f"array, X.permute{order} of a tensor."
    )


_MOST_COLUMNS = 64  # of which each may go to an embedding of its own; of longer rows only the outermost ids are tried


def check_ids(module: nn.Module, data: Dataset, name: str) -> None:
    """Raise InputError where an embedding of a module has no place for an id that a row of the data holds.

    The module runs on the rows with the largest and the smallest number of each column. Whatever else it raises there
    is for others to say.
    """
    embeddings = [(path, part) for path, part in module.named_modules() if isinstance(part, nn.Embedding)]
    if not embeddings:
        return
    rows = torch.tensor(sorted({row for x in data.inputs for row in _outermost(x[0])}), dtype=torch.int64)
    inputs = [x.cpu() for x in data.rows(0, rows.to(data.device))]
    wrong: list[str] = []

    def check(path: str, part: nn.Embedding, arguments: tuple[object, ...]) -> None:
        ids, size = arguments[0], part.num_embeddings
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() == 0 or ids.numel() == 0:
            return  # which the embedding says itself
        least, most = int(ids.min()), int(ids.max())
        if least >= 0 and most < size:
            return
        number = most if most >= size else least
        row, own = "", inputs
        if len(ids) == len(rows):  # otherwise the forward has made rows of its own
            place = int((ids == number).nonzero()[0, 0])
            row, own = f" in row {int(rows[place])}", [x[place] for x in inputs]
        holder = next((label for label, x in zip(data.labels, own) if bool((x == number).any())), None)
        where = f"the forward of {name} makes the id" if holder is None else f"{holder} has the id"
        remedy = "give such ids other numbers" if number < 0 else f"give it num_embeddings={number + 1} or more"
        scaled = holder is None and any(x.is_floating_point() for x in own)
        wrong.append(
            f"model: {where} {number}{row}, and the embedding {path!r} of {name} has {size} places, for ids 0 to "
            f"{size - 1}; {remedy}.{_SCALED * scaled}"
        )

    hooks = [part.register_forward_pre_hook(partial(check, path)) for path, part in embeddings]
    with torch.no_grad(), suppress(Exception):
        call_module(module.eval(), inputs, data.names)
    for hook in hooks:
        hook.remove()
    if wrong:
        raise InputError(wrong[0])


_SCALED = (
    " The numbers of a table are scaled: pass a tensor of integers, torch.as_tensor(X), or numbers='none', which "
    "leaves codes as they are."
)


def _outermost(x: Tensor) -> list[int]:
    """Return the rows of an input (n, ...) with the largest and the smallest numbers; none of images and the like."""
    if x.dtype == torch.bool or (x.dim() > 2 and x.is_floating_point()):
        return []
    columns = x.flatten(1) if x.dim() > 1 else x[:, None]
    if columns.shape[1] > _MOST_COLUMNS:
        if x.is_floating_point():
            return []
        columns = torch.stack([columns.amax(1), columns.amin(1)], 1)
    return [*columns.argmax(0).tolist(), *columns.argmin(0).tolist()]


class Trail:
    """Remembers which submodule was running, so that an error can name it, and how much one has returned."""

    def __init__(self, module: nn.Module) -> None:
        self.open: list[str] = []
        self.largest = 0
        for name, part in module.named_modules():
            if not isinstance(part, torch.jit.ScriptModule):  # which takes no hooks
                part.register_forward_pre_hook(lambda _module, _args, name=name: self.open.append(name))
                part.register_forward_hook(self._leave)

    def _leave(self, _module: nn.Module, _args: object, result: object) -> None:
        self.open.pop()
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())

    @property
    def submodule(self) -> str:
        """The submodule that was running, in words; "" for the module itself."""
        name = next((name for name in reversed(self.open) if name), "")
        return f"submodule {name!r}" if name else ""

    def __str__(self) -> str:
        return f" ({self.submodule})" if self.submodule else ""
