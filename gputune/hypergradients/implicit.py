"""Implicit differentiation of the solved logistic regression: d validation loss / d log C of every C in every fold.

Where the training objective is at its minimum, ``C * slope of the loss + slope of the penalty = 0`` for every C, so

    d W / d log C = H^-1 (slope of the penalty),    H = C * (Hessian of the loss) + (1 - l1_ratio) I,

with no penalty on the intercepts, and the wanted number is that times the slope of the validation loss. Source:
Larsen et al. (1996), doi:10.1109/NNSP.1996.548336; Bengio (2000), doi:10.1162/089976600300015187. H is built and
factored as it is: nothing is iterated, so nothing is left unsolved.
Axes as in engine/logistic.py: m members, K outputs (1 = sigmoid), n rows, D inputs, E = D + 1 with the intercept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gputune.data.dataset import Dataset
from gputune.errors import InputError
from gputune.solver.job import solve_all
from gputune.solver.objective import Point, Rows, point_at, product, rows_of
from gputune.solver.solve import Solution
from gputune.types import Config

BLOCK = 512  # training rows whose curvature is held at once
CPU_BYTES, GPU_SHARE = 4 << 30, 0.8  # memory without a limit: on the CPU; of a GPU's free memory


@dataclass(frozen=True)
class ImplicitGradient:
    """The validation loss of P = F * C members, fold-major (p = f * C + c), and its slope in log C.

    ``value`` is the mean cross-entropy of the fold's validation rows, not weighted. It is inf, and the gradient 0,
    where a validation row is of a class that the fold has no training row of: it is so for every C.

    ``gradient`` is 0 where the coefficients do not move with C: at C = inf, where an l1 penalty holds all of them at
    zero, and in a fold with training rows of one class alone. It is NaN for a member that has not converged, since
    the formula holds at the minimum only (``value`` is then that of the coefficients reached), and for one whose H
    float64 cannot factor (under pure l1, where all training rows are so sure of their class that no curvature is left).
    """

    value: Tensor  # (P,) float64
    gradient: Tensor  # (P,) float64


def implicit_chunk(
    data: Dataset, configs: Sequence[Config], *, memory: int | None = None
) -> tuple[Solution, ImplicitGradient]:
    """Solve C configurations (``C``, ``l1_ratio``) in all folds of float64 data, and differentiate in log C.

    Warns, as ``solve_all`` does, of members that did not converge. Raises InputError as ``solve`` and
    ``implicit_gradients`` do.
    """
    solution = solve_all(data, configs)
    weights = torch.zeros(data.n_folds, data.n_rows, dtype=torch.float64, device=data.device)
    for f, fold in enumerate(data.folds):
        weights[f, fold.train] = 1.0 if data.weights is None else data.weights[f, fold.train].double()
    C, l1_ratio = weights.new_tensor([[float(c["C"]), float(c["l1_ratio"])] for c in configs]).T
    x = torch.stack([data.x[copy] for copy in data.copies])
    valid = [fold.valid for fold in data.folds]
    return solution, implicit_gradients(
        solution, x, data.y, weights, valid, C=C, l1_ratio=l1_ratio, memory=memory
    )


def implicit_gradients(
    solution: Solution,
    x: Tensor,
    y: Tensor,
    weights: Tensor,
    valid: Sequence[Tensor],
    *,
    C: Tensor,
    l1_ratio: Tensor,
    memory: int | None = None,
) -> ImplicitGradient:
    """Differentiate the validation loss of each member that ``solve`` returned, intercepts fitted, in log C.

    x (F, n, D), y, weights, C and l1_ratio are what ``solve`` was given; ``valid`` are the positions of each fold's
    validation rows. With an l1 part, coefficients at zero stay there and the others keep their sign, which is
    exact but for the single values of C where a coefficient leaves zero or comes to it: there the loss has a kink,
    and this is its slope on the side where the coefficients found zero are zero.

    ``memory`` bounds the bytes of the matrices and chances of the members worked on at once (None: 4 GiB on the
    CPU, 80 % of the free memory of a GPU); more members than fit are taken one lot after the other. Raises
    InputError where one member alone does not fit, and where shapes do not agree.
    """
    _check(solution, x, y, weights, valid, C, l1_ratio)
    everyone = torch.arange(len(C), device=x.device)
    values, gradients = [], []
    for f, rows in enumerate(valid):
        fold = _fold(x[f], y, weights[f], rows, outputs=solution.coef.shape[1])
        for own in torch.split(everyone, _members_at_once(fold, memory)):
            value, gradient = _differentiate(fold, solution, f * len(C) + own, C[own], l1_ratio[own])
            values.append(value)
            gradients.append(gradient)
    return ImplicitGradient(torch.cat(values), torch.cat(gradients))


@dataclass(frozen=True)
class _Fold:
    """Training and validation rows of one fold, both less the training rows' mean input."""

    train: Rows
    valid: Rows
    total: Tensor  # () sum of the training rows' weights
    center: Tensor  # (D,) that mean; intercepts are not penalised, so it changes nothing but rounding


def _fold(x: Tensor, y: Tensor, weights: Tensor, valid: Tensor, *, outputs: int) -> _Fold:
    keep = weights > 0
    total = weights.sum()
    share = weights[keep] / total
    center = share @ x[keep]
    even = share.new_full((len(valid),), 1 / len(valid))
    train, held_out = (
        rows_of(x[rows] - center, y[rows], part, outputs, intercept=True, rotate=False)
        for rows, part in ((keep, share), (valid, even))
    )
    return _Fold(train, held_out, total, center)


def _members_at_once(fold: _Fold, memory: int | None) -> int:
    """How many members of the fold fit in ``memory`` bytes; raises InputError for none."""
    rows, outputs = len(fold.train.design) + len(fold.valid.design), fold.train.outputs
    size = outputs * fold.train.design.shape[1]
    # The matrix, its factor and a copy between them; logits, chances and their misfit; a block's curvature.
    needed = 8 * (3 * size**2 + 4 * outputs * rows + BLOCK * outputs * (outputs + 1) // 2)
    limit = _memory_limit(fold.center.device, memory)
    if limit < needed:
        raise InputError(
            f"memory={limit} bytes is too little for implicit differentiation: one member with {outputs} outputs of "
            f"{size // outputs} coefficients needs {needed} bytes; allow that much, use fewer inputs, "
            "or search C with method='random'."
        )
    return limit // needed


def _memory_limit(device: torch.device, memory: int | None) -> int:
    if memory is not None:
        return memory
    return int(GPU_SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else CPU_BYTES


def _differentiate(
    fold: _Fold, solution: Solution, members: Tensor, C: Tensor, l1_ratio: Tensor
) -> tuple[Tensor, Tensor]:
    """Value and gradient, each (m,), of some members of a fold."""
    coef, converged = solution.coef[members], solution.converged[members]
    intercept = solution.intercept[members] + (coef @ fold.center)
    known = intercept.isfinite()  # classes that the fold has trained on
    held_out = _point(fold.valid, coef, intercept)
    l1 = l1_ratio[:, None, None]
    # The penalty's slope: at the minimum it is minus C times the loss's, without that sum's cancellation.
    pull = _beside_intercept((1 - l1) * coef + l1 * coef.sign())
    active = known[..., None] & ~_beside_intercept((l1 > 0) & (coef == 0))
    gradient = torch.zeros_like(held_out.loss).masked_fill(~converged, torch.nan)
    moves = converged & C.isfinite() & ~held_out.loss.isinf() & (pull != 0).flatten(1).any(1)
    if moves.any():
        chance = _point(fold.train, coef[moves], intercept[moves]).chance
        matrix = _curvature(fold.train, chance).mul_((C[moves] * fold.total)[:, None, None, None, None])
        _make_solvable(matrix, 1 - l1_ratio[moves], active[moves], known[moves])
        gradient[moves] = (_solve(matrix, pull[moves]) * held_out.slope[moves]).sum((1, 2))
    return held_out.loss, gradient


def _point(rows: Rows, coef: Tensor, intercept: Tensor) -> Point:
    """Loss, slope and chances of members whose intercepts may be infinite."""
    logits = product(coef, (rows.design[:, :-1] / rows.root[:, None]).T) + intercept[..., None]
    none = coef.new_zeros(len(coef), 1, 1)
    return point_at(rows, _beside_intercept(coef), logits, none, none)


def _beside_intercept(coef: Tensor) -> Tensor:
    """(m, K, D) -> (m, K, E), zero (false) for the intercept."""
    return functional.pad(coef, (0, 1))


def _curvature(rows: Rows, chance: Tensor) -> Tensor:
    """Hessian of the mean training loss, (m, K, E, K, E), of members with chances (m, K, n).

    Each of its numbers is a sum over rows of (a pair of classes' curvature) x (a pair of inputs). The members of a
    fold share the second factor, so one wide product a column serves all members and all pairs of classes.
    """
    members, outputs, columns = len(chance), rows.outputs, rows.design.shape[1]
    k, l = torch.triu_indices(outputs, outputs, device=chance.device)
    blocks = chance.new_zeros(members * len(k), columns, columns)
    for part, design in zip(torch.split(chance, BLOCK, -1), torch.split(rows.design, BLOCK)):
        # Softmax's curvature in the logits is diag(p) - p p', sigmoid's is p (1 - p).
        bend = part[:, k] * torch.where((k == l)[:, None], 1 - part[:, l], -part[:, l])
        for e in range(columns):
            blocks[:, e, e:].addmm_(bend.flatten(0, 1), design[:, e : e + 1] * design[:, e:])
    blocks += blocks.triu(1).mT
    blocks = blocks.view(members, len(k), columns, columns)
    matrix = chance.new_empty(members, outputs, columns, outputs, columns)
    by_classes = matrix.transpose(2, 3)
    by_classes[:, k, l] = blocks
    by_classes[:, l, k] = blocks
    return matrix


def _make_solvable(matrix: Tensor, ridge: Tensor, active: Tensor, known: Tensor) -> None:
    """Turn C times the curvature, (m, K, E, K, E), into H, with an inverse, in place.

    What is not active (m, K, E) becomes a part of its own, diagonal. Where all known classes (m, K) are active
    in a column, softmax does not see a common shift of it, nor does the validation loss; the shift is an
    eigenvector, so that any multiple of its projector may be added. (Under pure l1 an even number of classes can
    all be active in one input: as many coefficients above zero as below cost the same wherever they are shifted.)
    """
    members, outputs, columns = active.shape
    matrix *= active[:, :, :, None, None] & active[:, None, None]
    flat = matrix.view(members, outputs * columns, outputs * columns)
    diagonal = flat.diagonal(dim1=1, dim2=2).view(members, outputs, columns)
    diagonal[..., :-1] += ridge[:, None, None]
    scale = diagonal.amax(1)
    diagonal += ~active
    if outputs > 1:
        shift = known[..., None] & (active | ~known[..., None]).all(1, keepdim=True)
        pairs = shift[:, :, None] & shift[:, None]
        matrix.diagonal(dim1=2, dim2=4).add_(pairs * scale[:, None, None])


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve for right (m, K, E) by Cholesky factors; NaN for a member whose matrix has none."""
    size = right[0].numel()
    flat = matrix.view(-1, size, size)
    factor, failed = torch.linalg.cholesky_ex(flat)
    again = failed > 0
    if again.any():
        # Singular to rounding, as under l1 where the columns of a category's levels add up to the intercept's. The
        # right side, a slope of the loss, has no part in directions that the rows do not see, so that a lift
        # of the size of the factorisation's own error does not show.
        lifted = flat[again]
        lifted.diagonal(dim1=1, dim2=2).mul_(1 + size * torch.finfo(flat.dtype).eps)
        factor[again], failed[again] = torch.linalg.cholesky_ex(lifted)
    moved = torch.cholesky_solve(right.reshape(-1, size, 1), factor).view_as(right)
    return moved.masked_fill((failed > 0)[:, None, None], torch.nan)


def _check(
    solution: Solution,
    x: Tensor,
    y: Tensor,
    weights: Tensor,
    valid: Sequence[Tensor],
    C: Tensor,
    l1_ratio: Tensor,
) -> None:
    """Raise InputError where the arguments of ``implicit_gradients`` do not belong together."""
    if x.dtype != torch.float64 or weights.dtype != torch.float64:
        raise InputError(
            f"implicit_gradients needs float64 x and weights, got {x.dtype} and {weights.dtype}; use .double()."
        )
    if x.ndim != 3 or x.shape[:2] != weights.shape or x.shape[1:2] != y.shape or len(valid) != len(x):
        raise InputError(
            "implicit_gradients needs x (folds, rows, inputs), weights (folds, rows), y (rows,) and one valid a fold, "
            f"got {tuple(x.shape)}, {tuple(weights.shape)}, {tuple(y.shape)} and {len(valid)} valid."
        )
    if C.shape != l1_ratio.shape or C.ndim != 1:
        raise InputError(
            "implicit_gradients needs one l1_ratio for each C, "
            f"got shapes {tuple(C.shape)} and {tuple(l1_ratio.shape)}."
        )
    members, inputs = len(x) * len(C), x.shape[2]
    if len(solution.coef) != members or solution.coef.shape[2] != inputs:
        raise InputError(
            f"implicit_gradients needs the solution of these folds and C, with {members} members of {inputs} inputs, "
            f"got {len(solution.coef)} members of {solution.coef.shape[2]} inputs."
        )
    for f, rows in enumerate(valid):
        if len(rows) == 0 or int(rows.min()) < 0 or int(rows.max()) >= x.shape[1]:
            found = f", from {int(rows.min())} to {int(rows.max())}" if len(rows) else ""
            raise InputError(
                f"implicit_gradients needs validation rows in 0 .. {x.shape[1] - 1}, at least one a fold, "
                f"got {len(rows)} in fold {f}{found}."
            )
