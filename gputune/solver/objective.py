"""The logistic regression's objective on the rows of one fold: value, slope and curvature.

All functions work on many members at once. The objective is scikit-learn's, divided by C times the
sum of the row weights. Any C up to infinity then has the same scale:

``mean loss + ridge / 2 ||W||^2 + lasso ||W||_1``, with intercepts not penalized.

All members read the same rows. A product with the rows is therefore one matrix product of width
members x outputs, and no operation mixes members.

Axes: m members (one trial on one fold each), K outputs (1 = sigmoid, otherwise softmax), n rows, D
inputs, E columns of the design matrix (inputs or their principal axes, and the intercept).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

# Largest penalty relative to the mean loss. Its square is still finite in float64, and it holds
# every weight at zero.
STRONGEST = 1e150


@dataclass(frozen=True)
class SolverRows:
    """The training rows of one fold with a weight above zero, which all members of the fold
    share."""

    # (n, E) inputs, then a column of 1 if there is an intercept; each row is multiplied by ``root``
    design: Tensor
    squares: Tensor  # (n, E) the design squared
    root: Tensor  # (n,) square root of the row's share of all weight
    codes: Tensor  # (n,) class of each row
    truth: Tensor  # (K, n) 1 where the row is of the class; one output: the chance of class 1
    # (E,) factor that converts a weight to the inputs' original units; 0 for the intercept
    penalised: Tensor
    # (D or D + 1,) weighted root mean square of each input, the unit of its slope
    unit: Tensor
    # (E, D or D + 1) direction of each column among the inputs; None: the columns are the inputs
    basis: Tensor | None
    bound: Tensor  # () upper bound of the mean loss's curvature
    coarse: Tensor  # (n, E) the design in single precision

    def single(self) -> "SolverRows":
        """Return the rows with the design matrix in single precision instead of double
        precision."""
        return replace(self, design=self.coarse)

    def scaled(self, scale: Tensor) -> "SolverRows":
        """Return the rows for inputs that were divided by ``scale`` (D,).

        Their weights are penalized as if the inputs had not been divided.
        """
        whole = functional.pad(scale, (0, len(self.penalised) - len(scale)), value=1.0)
        return replace(self, penalised=self.penalised / whole)

    def change_of_logits(self, step: Tensor) -> Tensor:
        """Return the change of the logits, (m, K, n), if the weights change by ``step`` (m, K,
        E)."""
        return product(step, self.design.T).div_(self.root)

    @property
    def outputs(self) -> int:
        """The count K of weight vectors of a member: 1 for a sigmoid, otherwise one for each
        class."""
        return len(self.truth)


@dataclass(frozen=True)
class Point:
    """The weights of each member in the solver, with their loss, slope and penalty strengths."""

    weight: Tensor  # (m, K, E)
    logits: Tensor  # (m, K, n)
    # (m, K, n) chance of each class; for a sigmoid, the chance of the wrong class
    chance: Tensor
    loss: Tensor  # (m,) mean loss
    slope: Tensor  # (m, K, E) of the mean loss and the ridge term
    error: Tensor  # (m,) mean over rows of the largest difference between chance and truth
    ridge: Tensor  # (m, 1, E) zero for the intercept
    lasso: Tensor  # (m, 1, E) zero for the intercept

    def __getitem__(self, members: Tensor) -> "Point":
        return Point(**{name: part[members] for name, part in vars(self).items()})

    @property
    def objective(self) -> Tensor:
        """The value of the objective for each member, (m,): the mean loss plus the penalties."""
        penalty = self.ridge / 2 * self.weight**2 + self.lasso * self.weight.abs()
        return self.loss + penalty.sum((1, 2))

    @property
    def steepest(self) -> Tensor:
        """The smallest subgradient of each member's objective, (m, K, E).

        It is zero exactly at the optimum.
        """
        at_zero = self.slope.sign() * (self.slope.abs() - self.lasso).clamp_min(0)
        return torch.where(self.weight == 0, at_zero, self.slope + self.lasso * self.weight.sign())

    def violation(self, rows: SolverRows) -> Tensor:
        """Return each member's distance from optimality, (m,); see ``Solution.residual``."""
        slopes = self.steepest if rows.basis is None else self.steepest @ rows.basis
        largest = (slopes.abs() / rows.unit).amax((1, 2))
        return largest / self.error.clamp_min(torch.finfo(slopes.dtype).tiny)


def rows_of(
    x: Tensor, codes: Tensor, share: Tensor, classes: int, *, intercept: bool, rotate: bool = False
) -> SolverRows:
    """Prepare the training rows of one fold for the solver, from inputs (n, D).

    If there is an intercept, the inputs must be centered. ``share`` (n,) has the relative weights
    of the rows, which are > 0 and sum to one. ``classes`` is 1 for a sigmoid.

    With ``rotate``, the columns of the design matrix are the principal axes of the rows. There are
    at most n of these axes. The curvature is nearly diagonal along these axes. A ridge penalty does
    not change under this rotation, but a lasso penalty does.
    """
    classes_of_outputs = codes.new_ones(1)
    if classes > 1:
        classes_of_outputs = torch.arange(classes, device=x.device)
    unit = (share @ x**2).sqrt()
    basis = None
    # basis: orthonormal directions (E, D) that span the rows; the rows' second moment is diagonal
    # along them
    if rotate:
        seen = x * share.sqrt()[:, None]
        if x.shape[1] > len(x):
            span = torch.linalg.qr(seen.T)[0].T
        else:
            span = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        seen = seen @ span.T
        basis = torch.linalg.eigh(seen.T @ seen).eigenvectors.T @ span
        x = x @ basis.T
    penalised = x.new_ones(x.shape[1])
    if intercept:
        one = x.new_ones(1)
        x = torch.cat([x, one.expand(len(x), 1)], 1)
        penalised = torch.cat([penalised, 0 * one])
        unit = torch.cat([unit, one])
        if basis is not None:
            basis = functional.pad(basis, (0, 1, 0, 1))
            basis[-1, -1] = 1
    x = x * share.sqrt()[:, None]  # replaces x, so that the memory of the old x can be freed
    return SolverRows(
        design=x,
        squares=x**2,
        root=share.sqrt(),
        codes=codes,
        truth=(codes == classes_of_outputs[:, None]).to(x.dtype),
        penalised=penalised,
        unit=unit.where(unit > 0, 1),
        basis=basis,
        bound=_curvature_bound(x, classes),
        coarse=x.float(),
    )


def _curvature_bound(design: Tensor, classes: int) -> Tensor:
    """Return an upper bound of the mean loss's curvature.

    It is half the largest eigenvalue of the second moment for softmax, and a quarter for a sigmoid.
    Source: Böhning (1992), doi:10.1007/BF00048682.
    """
    tall = len(design) >= design.shape[1]
    moment = design.T @ design if tall else design @ design.T
    if not moment.isfinite().all():
        return moment.new_tensor(torch.inf)
    largest: Tensor = torch.linalg.eigvalsh(moment)[-1]
    return largest * (0.25 if classes == 1 else 0.5)


def point_at(
    rows: SolverRows, weight: Tensor, logits: Tensor, ridge: Tensor, lasso: Tensor
) -> Point:
    """Return the ``Point`` (loss, slope, chances) at weights (m, K, E) with known logits (m, K,
    n)."""
    share = rows.root**2
    if rows.outputs == 1:
        against = (1 - 2 * rows.truth) * logits
        chance = against.sigmoid()
        loss = functional.softplus(against)[:, 0] @ share
    else:
        log_chance = logits.log_softmax(1)
        loss = -(log_chance.gather(1, rows.codes.expand(len(logits), 1, -1))[:, 0] @ share)
        chance = log_chance.exp_()
    # (m, K, n), then its mean over rows (m,) and its product with the design (m, K, E)
    wrong = misfit(rows, chance)
    error = wrong.abs().amax(1) @ share
    slope = product(wrong.mul_(rows.root), rows.design) + ridge * weight
    return Point(weight, logits, chance, loss, slope, error, ridge, lasso)


def origin(rows: SolverRows, ridge: Tensor, lasso: Tensor) -> Point:
    """Return the point at which all weights are zero; ``ridge`` and ``lasso`` are (m,)."""
    weight = rows.design.new_zeros(len(ridge), rows.outputs, rows.design.shape[1])
    logits = rows.design.new_zeros(len(ridge), rows.outputs, len(rows.design))
    ridge = (ridge[:, None, None] * rows.penalised**2).clamp_max(STRONGEST)
    lasso = (lasso[:, None, None] * rows.penalised).clamp_max(STRONGEST)
    return point_at(rows, weight, logits, ridge, lasso)


def misfit(rows: SolverRows, chance: Tensor) -> Tensor:
    """Return the predicted minus the true class probabilities, (m, K, n).

    This avoids the cancellation of 1 - chance if the chance is near 1.
    """
    if rows.outputs == 1:
        return (1 - 2 * rows.truth) * chance
    wrong = chance * (1 - rows.truth)
    return wrong.addcmul_(wrong.sum(1, keepdim=True), rows.truth, value=-1)


def curvature_times(rows: SolverRows, chance: Tensor, direction: Tensor) -> Tensor:
    """Return the Hessian of the mean loss times a direction, (m, K, E).

    The curvature in the logits is diag(p) - p p' for softmax and p (1 - p) for a sigmoid.
    """
    along = product(direction, rows.design.T).mul_(chance)
    if rows.outputs == 1:
        return product(along.mul_(1 - chance), rows.design)
    return product(along.addcmul_(chance, along.sum(1, keepdim=True), value=-1), rows.design)


def curvature_diagonal(rows: SolverRows, chance: Tensor) -> Tensor:
    """Return the diagonal of the Hessian of the mean loss, (m, K, E)."""
    return product(chance * (1 - chance), rows.squares)


def product(left: Tensor, shared: Tensor) -> Tensor:
    """Multiply a tensor (m, K, a) by a matrix (a, b) that all members share, in one wide
    product."""
    return (left.flatten(0, 1) @ shared).view(*left.shape[:2], -1)
