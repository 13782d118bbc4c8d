"""Implicit differentiation of the logistic regression that a solver fits to its exact minimum.

This module computes d validation loss / d log C for every C in every fold. At the minimum of the
training objective, ``C * slope of the loss + slope of the penalty = 0`` for every C. Therefore

    d W / d log C = H^-1 (slope of the penalty),    H = C * (Hessian of the loss) + (1 - l1_ratio)
                                                    I.

Intercepts carry no penalty. The product of this vector and the slope of the validation loss is the
hypergradient. H is built and factored directly. No iteration is involved, so no error of an
unfinished iteration remains.

Sources: Larsen et al. (1996), doi:10.1109/NNSP.1996.548336; Bengio (2000),
doi:10.1162/089976600300015187.

Axes: m members, K outputs (1 = sigmoid), n rows, D inputs, E = D + 1 columns (the last one is the
intercept).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gputune.data.dataset import Dataset
from gputune.engine.stop import entry
from gputune.ground.errors import DivergedError, InputError, Verbatim, option
from gputune.ground.types import Config, Params
from gputune.hypergradients.first_step import free_bytes
from gputune.hypergradients.inner import HypergradientResult
from gputune.models import LogisticRegression
from gputune.solver.objective import Point, SolverRows, point_at, product, rows_of
from gputune.solver.solve import (
    LogisticProblem,
    Solution,
    problem_of,
    solve,
    solve_all,
    solved_module,
)

BLOCK = 512  # training rows whose curvature is held at once


@dataclass(frozen=True)
class ImplicitGradient:
    """The validation losses of solved logistic regressions, and their derivatives with respect to
    log C.

    There are P = F * C members: F folds, C configurations. Members are fold-major (p = f * C + c).

    ``value`` is the unweighted mean cross-entropy of the fold's validation rows. ``value`` is inf
    if a validation row has a class without a training row in that fold. The loss is then infinite
    for every C, and ``gradient`` is 0.

    ``gradient`` is also 0 if the coefficients do not change with C:

    - C = inf;
    - an l1 penalty holds all coefficients at zero;
    - all training rows of the fold have the same class.

    ``gradient`` is NaN for a member that has not converged, because the formula holds only at the
    minimum. ``value`` then belongs to the coefficients that were reached. ``gradient`` is also NaN
    if float64 cannot factor the member's H. This can happen with a pure l1 penalty if the class
    probabilities of all training rows are so close to 0 or 1 that no curvature is left.
    """

    value: Tensor  # (P,) float64
    gradient: Tensor  # (P,) float64


def implicit_chunk(
    data: Dataset, configs: Sequence[Config], *, memory: int | None = None
) -> tuple[Solution, ImplicitGradient]:
    """Fit logistic regressions for all configurations in all folds, and return d validation loss /
    d log C.

    A configuration has the hyperparameters ``C`` and ``l1_ratio``. The data is float64. Warns, like
    ``solve_all``, about members that did not converge. Raises InputError like
    ``implicit_gradients``.
    """
    solution = solve_all(data, configs)
    valid = [fold.valid for fold in data.folds]
    return solution, implicit_gradients(problem_of(data, configs), solution, valid, memory=memory)


def implicit_gradients(
    problem: LogisticProblem,
    solution: Solution,
    valid: Sequence[Tensor],
    *,
    memory: int | None = None,
) -> ImplicitGradient:
    """Differentiate the validation losses of solved logistic regressions with respect to log C.

    The problem must have fitted intercepts. ``valid`` has the row indices of each fold's validation
    rows.

    With an l1 part, coefficients at zero stay at zero and the other coefficients keep their sign.
    The result is exact except at the single values of C at which a coefficient leaves or reaches
    zero. The loss has a kink at these values. The result is then the slope on the side on which the
    coefficients that were found to be zero stay zero.

    ``memory`` is the largest number of bytes for the matrices and class probabilities that are held
    at once. None means 4 GiB on the CPU and 80% of the free memory of a GPU. If the members do not
    all fit, they are processed in groups. Raises InputError if a single member does not fit.
    """
    trials = torch.arange(len(problem.C), device=problem.y.device)
    values = []
    gradients = []
    for f, rows in enumerate(valid):
        fold = _Fold(problem, f, rows, solution.coef.shape[1])
        for group in torch.split(trials, fold.members_at_once(memory)):
            members = f * len(trials) + group
            value, gradient = _differentiate(
                fold, solution, members, problem.C[group], problem.l1_ratio[group]
            )
            values.append(value)
            gradients.append(gradient)
    return ImplicitGradient(torch.cat(values), torch.cat(gradients))


class _Fold:
    """The training and validation rows of one fold, centered at the training rows' mean input.

    ``total`` is the sum of the training rows' weights. ``center`` (D,) is the weighted mean input.
    Intercepts are not penalized, so centering changes only rounding errors.
    """

    def __init__(self, problem: LogisticProblem, fold: int, valid: Tensor, outputs: int) -> None:
        weights = problem.weights[fold]
        keep = weights > 0
        self.total = weights.sum()
        share = weights[keep] / self.total
        self.center = share @ problem.x[fold, keep]
        x = problem.x[fold, keep] - self.center
        self.train = rows_of(x, problem.y[keep], share, outputs, intercept=True)
        x = problem.x[fold, valid] - self.center
        share = share.new_full((len(valid),), 1 / len(valid))
        self.valid = rows_of(x, problem.y[valid], share, outputs, intercept=True)

    def members_at_once(self, memory: int | None) -> int:
        """Return the number of logistic regressions that can be differentiated at once in
        ``memory`` bytes.

        Raises InputError if not even one logistic regression fits.
        """
        rows = len(self.train.design) + len(self.valid.design)
        outputs = self.train.outputs
        size = outputs * self.train.design.shape[1]
        # Bytes of one member: the matrix, its factor and a copy; logits, class chances and their
        # misfits; the curvature of one block of rows. A float64 number has 8 bytes.
        needed = 8 * (3 * size**2 + 4 * outputs * rows + BLOCK * outputs * (outputs + 1) // 2)
        device = self.center.device
        limit = memory or (free_bytes(device) if device.type == "cuda" else 4 << 30)
        if limit < needed:
            raise InputError(
                "memory",
                f"must be at least {needed} bytes for implicit differentiation of one member with "
                f"{outputs} outputs of {size // outputs} coefficients",
                got=Verbatim(f"{limit} bytes"),
                remedy="Allow that much memory, use fewer inputs, or search C with "
                f"{option('method', 'random')}.",
            )
        return limit // needed


def _differentiate(
    fold: _Fold, solution: Solution, members: Tensor, C: Tensor, l1_ratio: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the validation losses (m,) of m logistic regressions of a fold, and d loss / d log C
    (m,)."""
    coef = solution.coef[members]
    converged = solution.converged[members]
    intercept = solution.intercept[members] + (coef @ fold.center)
    present = intercept.isfinite()  # (m, K): the classes that occur in the fold's training rows
    held_out = _point(fold.valid, coef, intercept)
    l1 = l1_ratio[:, None, None]
    # The penalty's slope, (m, K, E). At the minimum it equals minus C times the slope of the loss,
    # but it has no rounding errors from the cancellation in that sum.
    penalty_slope = _with_intercept((1 - l1) * coef + l1 * coef.sign())
    active = present[..., None] & ~_with_intercept((l1 > 0) & (coef == 0))
    gradient = torch.zeros_like(held_out.loss).masked_fill(~converged, torch.nan)
    moves = converged & C.isfinite() & ~held_out.loss.isinf()
    moves &= (penalty_slope != 0).flatten(1).any(1)
    if moves.any():
        chance = _point(fold.train, coef[moves], intercept[moves]).chance
        matrix = _curvature(fold.train, chance)
        matrix *= (C[moves] * fold.total)[:, None, None, None, None]
        _make_solvable(matrix, 1 - l1_ratio[moves], active[moves], present[moves])
        change = _solve(matrix, penalty_slope[moves])
        gradient[moves] = (change * held_out.slope[moves]).sum((1, 2))
    return held_out.loss, gradient


def _point(rows: SolverRows, coef: Tensor, intercept: Tensor) -> Point:
    """Return the loss, its gradient and the class probabilities of logistic regressions at their
    coefficients.

    The intercepts may be infinite.
    """
    logits = product(coef, (rows.design[:, :-1] / rows.root[:, None]).T) + intercept[..., None]
    no_penalty = coef.new_zeros(len(coef), 1, 1)
    return point_at(rows, _with_intercept(coef), logits, no_penalty, no_penalty)


def _with_intercept(coef: Tensor) -> Tensor:
    """Append a zero (or False) for the intercept to coefficients: (m, K, D) -> (m, K, E)."""
    return functional.pad(coef, (0, 1))


def _curvature(rows: SolverRows, chance: Tensor) -> Tensor:
    """Return the Hessian of the mean training loss, (m, K, E, K, E).

    ``chance`` (m, K, n) has the class probabilities of the members. Each entry of the Hessian is a
    sum over rows of (curvature of a pair of classes) x (product of a pair of inputs). All members
    of a fold share the second factor. Therefore one wide matrix product per column serves all
    members and all pairs of classes.
    """
    members = len(chance)
    outputs = rows.outputs
    columns = rows.design.shape[1]
    k, l = torch.triu_indices(outputs, outputs, device=chance.device)
    blocks = chance.new_zeros(members * len(k), columns, columns)
    for part, design in zip(torch.split(chance, BLOCK, -1), torch.split(rows.design, BLOCK)):
        # The curvature in the logits is diag(p) - p p' for softmax and p (1 - p) for sigmoid.
        # (members, pairs of classes, rows of the block)
        weight = part[:, k] * torch.where((k == l)[:, None], 1 - part[:, l], -part[:, l])
        for e in range(columns):
            # Only the upper triangle: (members * pairs, rows) @ (rows, E - e)
            blocks[:, e, e:].addmm_(weight.flatten(0, 1), design[:, e : e + 1] * design[:, e:])
    blocks += blocks.triu(1).mT
    blocks = blocks.view(members, len(k), columns, columns)
    matrix = chance.new_empty(members, outputs, columns, outputs, columns)
    by_classes = matrix.transpose(2, 3)
    by_classes[:, k, l] = blocks
    by_classes[:, l, k] = blocks
    return matrix


def _make_solvable(matrix: Tensor, ridge: Tensor, active: Tensor, present: Tensor) -> None:
    """Turn C times the curvature, (m, K, E, K, E), into the invertible matrix H, in place.

    Coefficients that are not active (``active`` is (m, K, E)) become a separate diagonal part.

    If all present classes (``present`` is (m, K)) are active in a column, softmax and the
    validation loss do not change when all coefficients of this column shift by the same amount.
    This shift is an eigenvector of H, so any multiple of its projector may be added. With a pure l1
    penalty, an even number of classes can all be active in one input. If as many of these
    coefficients are above zero as below, every shift of this kind has the same penalty.
    """
    members, outputs, columns = active.shape
    matrix *= active[:, :, :, None, None] & active[:, None, None]
    flat = matrix.view(members, outputs * columns, outputs * columns)
    diagonal = flat.diagonal(dim1=1, dim2=2).view(members, outputs, columns)
    diagonal[..., :-1] += ridge[:, None, None]
    scale = diagonal.amax(1)
    diagonal += ~active
    if outputs > 1:
        shift = present[..., None] & (active | ~present[..., None]).all(1, keepdim=True)
        matrix.diagonal(dim1=2, dim2=4).add_(
            (shift[:, :, None] & shift[:, None]) * scale[:, None, None]
        )


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve the linear systems H z = ``right`` (m, K, E) by Cholesky factorization.

    The result is NaN for a matrix without a Cholesky factor.
    """
    size = right[0].numel()
    flat = matrix.view(-1, size, size)
    factor, failed = torch.linalg.cholesky_ex(flat)
    again = failed > 0
    if again.any():
        # H is singular up to rounding. For example, with an l1 penalty the one-hot columns of a
        # category add up to the intercept's column. The right side is a slope of the loss. It has
        # no component in directions that leave all logits unchanged. Therefore increasing the
        # diagonal by the size of the factorization's own rounding error does not change the result.
        lifted = flat[again]
        lifted.diagonal(dim1=1, dim2=2).mul_(1 + size * torch.finfo(flat.dtype).eps)
        factor[again], failed[again] = torch.linalg.cholesky_ex(lifted)
    moved = torch.cholesky_solve(right.reshape(-1, size, 1), factor).view_as(right)
    return moved.masked_fill((failed > 0)[:, None, None], torch.nan)


@entry
def differentiate_minimum(
    module: nn.Module,
    loss: Callable[[object, object], Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],
    valid: tuple[Tensor, Tensor],
    hyperparameters: Mapping[str, object],
    *,
    memory: int | None,
) -> HypergradientResult:
    """Fit a logistic regression, and return its validation loss and the derivative with respect to
    C.

    The objective is ``C * sum of losses + |W|^2 / 2``, as in
    sklearn.linear_model.LogisticRegression. The computation uses float64. Raises InputError if the
    problem is not this convex problem. Raises DivergedError if it has no minimum that the solver
    can reach.
    """
    C, classes = _check_problem(module, loss, hyperparameters)
    problem, places = _join(batches, valid, C, classes)
    solution = solve(problem)
    if not bool(solution.converged):
        raise DivergedError(
            f"The solver reached no minimum of the logistic regression with C={C:g}. Choose a "
            "smaller C, or scale the inputs."
        )
    implicit = implicit_gradients(problem, solution, [places], memory=memory)
    value = float(implicit.value)
    slope = implicit.gradient[0]
    parameters: Params = dict(solved_module(solution, 0).named_parameters())
    reason = (
        "requested; the derivative at the minimum of a convex problem, without any training step"
    )
    return HypergradientResult(
        value, {"C": slope / C}, {"C": slope}, parameters, 0.0, "implicit", reason
    )


def _join(
    batches: Sequence[tuple[Tensor, Tensor]], valid: tuple[Tensor, Tensor], C: float, classes: int
) -> tuple[LogisticProblem, Tensor]:
    """Join all minibatches into one logistic regression problem. Returns the problem and the
    indices of the validation rows.

    In the problem, the validation rows have weight 0.
    """
    if not all(isinstance(part, Tensor) for pair in (*batches, valid) for part in pair):
        raise InputError(
            "batches",
            f"must be pairs of tensors for {option('optimizer', 'exact')}, which joins all "
            "minibatches",
            remedy="Convert each x and y with torch.from_numpy or torch.as_tensor.",
        )
    x, y = (torch.cat(parts) for parts in zip(*batches, valid))
    if y.is_floating_point() or y.dim() != 1 or int(y.min()) < 0 or int(y.max()) >= classes:
        raise InputError(
            "y",
            f"must be class codes 0 .. {classes - 1}, one integer per row, for "
            f"{option('optimizer', 'exact')}",
            got=Verbatim(
                f"{y.dtype} of shape {tuple(y.shape)} with values "
                f"{y.min().item()} .. {y.max().item()}"
            ),
        )
    places = torch.arange(len(x) - len(valid[0]), len(x), device=x.device)
    weights = torch.ones(1, len(x), dtype=torch.float64, device=x.device)
    weights[:, places] = 0.0
    problem = LogisticProblem(
        x.double()[None],
        y.long(),
        weights,
        C=weights.new_tensor([C]),
        l1_ratio=weights.new_zeros(1),
        n_classes=classes,
    )
    return problem, places


def _check_problem(
    module: nn.Module, loss: object, hyperparameters: Mapping[str, Any]
) -> tuple[float, int]:
    """Check the arguments for a logistic regression, and return C and the number of classes.

    Raises InputError if the module, the loss or the hyperparameters do not define the convex
    problem.
    """
    if not isinstance(module, LogisticRegression) or module.n_outputs < 2:
        raise InputError(
            "module",
            "must be a gputune.models.LogisticRegression with at least two outputs for "
            f"{option('optimizer', 'exact')}, which needs the minimum of a convex problem",
            got=Verbatim(type(module).__name__),
            remedy="Train the model with another optimizer, for example 'adamw', and "
            f"{option('mode', 'reverse')}.",
        )
    plain = isinstance(loss, nn.CrossEntropyLoss) and (
        (loss.weight, loss.label_smoothing, loss.reduction, loss.ignore_index)
        == (None, 0.0, "mean", -100)
    )
    if loss is not functional.cross_entropy and not plain:
        raise InputError(
            "loss",
            f"must be torch.nn.functional.cross_entropy for {option('optimizer', 'exact')}, which "
            "solves the logistic regression",
            got=loss,
            remedy="For other losses, train the module with another optimizer.",
        )
    if set(hyperparameters) != {"C"}:
        raise InputError(
            "hyperparameters",
            f"must be only C for {option('optimizer', 'exact')}",
            got=Verbatim(", ".join(map(str, hyperparameters)) or "none"),
            remedy='For example {"C": 1.0}.',
        )
    try:
        C = float(hyperparameters["C"])
    except (TypeError, ValueError, RuntimeError):
        C = -1.0
    if not 0 < C < float("inf"):
        got = hyperparameters["C"]
        raise InputError("hyperparameters['C']", "must be one finite number > 0", got=got)
    return C, module.n_outputs
