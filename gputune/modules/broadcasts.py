"""Detects losses that compare each output with the targets of all rows by mistake.

The mistake is one axis too many: PyTorch broadcasts outputs (n, 1) minus a target (n,) to a matrix
(n, n). This raises no error, but the mean of the matrix trains every output to the mean of the
target.
"""

from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gputune.modules.trace import Args, Function, Kwargs, tensors

Shapes: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]

_BROADCASTING_LOSSES = {
    functional.mse_loss,
    functional.l1_loss,
    functional.smooth_l1_loss,
    functional.huber_loss,
    functional.poisson_nll_loss,
    functional.kl_div,
    functional.hinge_embedding_loss,
    torch.broadcast_tensors,
}
"""Functions that broadcast their arguments, even if the shape of the result does not show the
broadcast."""


_DIAGONALS = {
    torch.diagonal,
    Tensor.diagonal,
    torch.diag,
    Tensor.diag,
    torch.linalg.diagonal,
    torch.trace,
    Tensor.trace,
}
"""PyTorch functions that read only the diagonal of a matrix.

A loss may compare the output of each row with the targets of all rows, which gives a matrix. The
diagonal of the matrix compares each output with the target of the same row. A loss that uses only
the diagonal is therefore correct, and gputune does not refuse it.
"""


def in_one_shape(pair: Shapes, place: str) -> str:
    """Return a sentence that tells users how to give their outputs and targets the same shape."""
    if len(pair[0]) == 2:
        return (
            f"Take outputs[:, 0] or y[:, None] in the {place}, or return (rows,) from the module."
        )
    return f"Take outputs[:, None] or y[:, 0] in the {place}, or pass y of shape (rows,)."


class BroadcastWatch(TorchFunctionMode):
    """Watches a loss for an operation that pairs each output with the targets of all rows.

    Outputs are tensors that require a gradient. A tensor that is computed only from the target also
    counts as a target. A matrix of all pairs is harmless if only its diagonal is used.
    """

    def __init__(self, y: Tensor) -> None:
        super().__init__()
        self._pair: Shapes | None = None
        self._matrices: dict[int, Tensor] = {}  # of all pairs, by id
        self._takes_diagonal = False
        self._uses_others = False
        self._rows = len(y)
        self._targets = {id(y): y}  # kept alive, so that no other tensor gets their ids

    def __torch_function__(
        self, func: Function, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        targets = []
        outputs = []
        uses_matrix = False
        for tensor in tensors((args, kwargs)):
            uses_matrix |= id(tensor) in self._matrices
            if id(tensor) in self._targets:
                targets.append(tensor)
            elif tensor.requires_grad:
                outputs.append(tensor)
        results = {id(tensor): tensor for tensor in tensors(result)}
        if targets and not outputs:
            self._targets |= results
        elif targets and self._pair is None and self._is_broadcast(func, result):
            self._pair = self._pair_of(outputs, targets)
            if self._pair is not None:
                self._matrices |= results
        elif uses_matrix:
            self._follow(func, result)
        return result

    @property
    def pair(self) -> Shapes | None:
        """The shapes of outputs and target in the first operation that pairs each output with all
        targets.

        None if there was no such operation, or if the loss used only the diagonal of the result.
        """
        return None if self._takes_diagonal and not self._uses_others else self._pair

    def _follow(self, func: Function, result: object) -> None:
        """Note whether an operation reads only the diagonal of a matrix of all (output, target)
        pairs."""
        if func in _DIAGONALS:
            self._takes_diagonal = True
        elif isinstance(result, Tensor) and tuple(result.shape) == (self._rows, self._rows):
            self._matrices[id(result)] = result
        elif isinstance(result, Tensor):
            self._uses_others = True

    def _is_broadcast(self, func: Function, result: object) -> bool:
        """Return whether an operation broadcasts outputs and targets of n rows to an (n, n)
        matrix."""
        square = (self._rows, self._rows)
        # Losses return one number or (n,), so their result does not show the (n, n) comparison.
        return func in _BROADCASTING_LOSSES or (
            isinstance(result, Tensor) and tuple(result.shape) == square
        )

    def _pair_of(self, outputs: list[Tensor], targets: list[Tensor]) -> Shapes | None:
        """Return the shapes of an output and a target if they broadcast to an (n, n) matrix.

        These shapes are (n, 1) and (n,), or (n,) and (n, 1). Return None if no output and target
        have them.
        """
        row = (self._rows,)
        column = (self._rows, 1)
        for output in outputs:
            for target in targets:
                shapes = tuple(output.shape), tuple(target.shape)
                if shapes in ((column, row), (row, column)):
                    return shapes
        return None
