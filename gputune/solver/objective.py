"""The logistic regression's objective on one fold's rows, for many members at once: value, slope,
curvature.

It is scikit-learn's, divided by C times the sum of the row weights, so that any C up to infinity is
one scale:
``mean loss + ridge / 2 ||W||^2 + lasso ||W||_1``, intercepts not penalised. All members read the
same rows, so a product with the rows is one matrix product of width members x outputs, and no
operation mixes members.
Axes: m members, K outputs (1 = sigmoid, else softmax), n rows, D inputs, E columns of the design.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

# penalty over the mean loss whose square is still a number: under it no weight moves
STRONGEST = 1e150


@dataclass(frozen=True)
class Rows:
    """The rows of one fold that carry weight, as every member of the fold sees them."""

    design: Tensor  # (n, E) inputs, then the intercept's 1 if there is one; each row times ``root``
    squares: Tensor  # (n, E) the design squared
    root: Tensor  # (n,) square root of the row's share of all weight
    codes: Tensor  # (n,) class of each row
    truth: Tensor  # (K, n) 1 where the row is of the class; one output: the chance of class 1
    # (E,) how much a weight is when the inputs are in their own units; 0 for the intercept
    penalised: Tensor
    # (D or D + 1,) weighted root mean square of each input, in which slopes are measured
    unit: Tensor
    # (E, D or D + 1) the columns' directions among the inputs; None: the inputs
    basis: Tensor | None
    bound: Tensor  # () the mean loss's curvature is nowhere higher
    coarse: Tensor  # (n, E) the design in single precision

    def single(self) -> "Rows":
        """The rows with the coarse design in the place of the other."""
        return replace(self, design=self.coarse)

    def scaled(self, scale: Tensor) -> "Rows":
        """The rows of inputs that were divided by ``scale`` (D,), their weights penalised as if
        they had not been."""
        whole = functional.pad(scale, (0, len(self.penalised) - len(scale)), value=1.0)
        return replace(self, penalised=self.penalised / whole)

    def change_of_logits(self, step: Tensor) -> Tensor:
        """By how much a step (m, K, E) changes the logits, (m, K, n)."""
        return product(step, self.design.T).div_(self.root)

    @property
    def outputs(self) -> int:
        """Number of weight vectors of a member: 1 means sigmoid."""
        return len(self.truth)


@dataclass(frozen=True)
class Point:
    """Where each member stands, what it sees there, and its strengths of penalty."""

    weight: Tensor  # (m, K, E)
    logits: Tensor  # (m, K, n)
    chance: Tensor  # (m, K, n) of each class; sigmoid: of the class that the row is not
    loss: Tensor  # (m,) mean loss
    slope: Tensor  # (m, K, E) of the mean loss and the ridge term
    error: Tensor  # (m,) mean over rows of the largest difference between chance and truth
    ridge: Tensor  # (m, 1, E) zero for the intercept
    lasso: Tensor  # (m, 1, E) zero for the intercept

    def __getitem__(self, members: Tensor) -> "Point":
        return Point(*(getattr(self, name)[members] for name in self.__dataclass_fields__))

    @property
    def objective(self) -> Tensor:
        """What is minimised, (m,)."""
        return self.loss + (self.ridge / 2 * self.weight**2 + self.lasso * self.weight.abs()).sum(
            (1, 2)
        )

    @property
    def steepest(self) -> Tensor:
        """The smallest element of the subdifferential, (m, K, E), which is zero exactly at the
        optimum."""
        at_zero = self.slope.sign() * (self.slope.abs() - self.lasso).clamp_min(0)
        return torch.where(self.weight == 0, at_zero, self.slope + self.lasso * self.weight.sign())

    def violation(self, rows: Rows) -> Tensor:
        """How far each member is from optimal, (m,): see ``Solution.residual``."""
        slopes = self.steepest if rows.basis is None else self.steepest @ rows.basis
        return (slopes.abs() / rows.unit).amax((1, 2)) / self.error.clamp_min(
            torch.finfo(slopes.dtype).tiny
        )


def rows_of(
    x: Tensor, codes: Tensor, share: Tensor, classes: int, *, intercept: bool, rotate: bool = False
) -> Rows:
    """The rows of inputs (n, D), centred where there is an intercept, with shares (n,) > 0 that sum
    to one.

    ``rotate`` takes the columns along the principal axes of the rows (no more than there are rows),
    on which the curvature is nearly diagonal; a ridge does not see the rotation, a lasso does.
    ``classes`` is 1 for sigmoid.
    """
    classes_of_outputs = (
        torch.arange(classes, device=x.device) if classes > 1 else codes.new_ones(1)
    )
    unit = (share @ x**2).sqrt()
    basis = None
    # orthonormal directions (E, D) that span the rows, along which their second moment is diagonal
    if rotate:
        seen = x * share.sqrt()[:, None]
        many = x.shape[1] > len(x)
        span = (
            torch.linalg.qr(seen.T)[0].T
            if many
            else torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        )
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
    x = x * share.sqrt()[:, None]  # and the other one is held no longer
    return Rows(
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
    """Source: Böhning (1992), doi:10.1007/BF00048682: half the second moment for softmax, a quarter
    for sigmoid."""
    tall = len(design) >= design.shape[1]
    moment = design.T @ design if tall else design @ design.T
    if not moment.isfinite().all():
        return moment.new_tensor(torch.inf)
    largest: Tensor = torch.linalg.eigvalsh(moment)[-1]
    return largest * (0.25 if classes == 1 else 0.5)


def point_at(rows: Rows, weight: Tensor, logits: Tensor, ridge: Tensor, lasso: Tensor) -> Point:
    """The point of weights (m, K, E) whose logits are known."""
    share = rows.root**2
    if rows.outputs == 1:
        against = (1 - 2 * rows.truth) * logits
        chance = against.sigmoid()
        loss = functional.softplus(against)[:, 0] @ share
    else:
        log_chance = logits.log_softmax(1)
        loss = -(log_chance.gather(1, rows.codes.expand(len(logits), 1, -1))[:, 0] @ share)
        chance = log_chance.exp_()
    wrong = misfit(rows, chance)
    error = wrong.abs().amax(1) @ share
    slope = product(wrong.mul_(rows.root), rows.design) + ridge * weight
    return Point(weight, logits, chance, loss, slope, error, ridge, lasso)


def origin(rows: Rows, ridge: Tensor, lasso: Tensor) -> Point:
    """All members at zero; ridge and lasso are (m,)."""
    weight = rows.design.new_zeros(len(ridge), rows.outputs, rows.design.shape[1])
    logits = rows.design.new_zeros(len(ridge), rows.outputs, len(rows.design))
    ridge = (ridge[:, None, None] * rows.penalised**2).clamp_max(STRONGEST)
    lasso = (lasso[:, None, None] * rows.penalised).clamp_max(STRONGEST)
    return point_at(rows, weight, logits, ridge, lasso)


def misfit(rows: Rows, chance: Tensor) -> Tensor:
    """Chance minus truth, (m, K, n), without the cancellation of 1 - chance where the chance is
    near 1."""
    if rows.outputs == 1:
        return (1 - 2 * rows.truth) * chance
    wrong = chance * (1 - rows.truth)
    return wrong.addcmul_(wrong.sum(1, keepdim=True), rows.truth, value=-1)


def curvature_times(rows: Rows, chance: Tensor, direction: Tensor) -> Tensor:
    """Hessian of the mean loss times a direction, (m, K, E).

    Source: softmax's curvature in the logits is diag(p) - p p', sigmoid's is p (1 - p).
    """
    along = product(direction, rows.design.T).mul_(chance)
    if rows.outputs == 1:
        return product(along.mul_(1 - chance), rows.design)
    return product(along.addcmul_(chance, along.sum(1, keepdim=True), value=-1), rows.design)


def curvature_diagonal(rows: Rows, chance: Tensor) -> Tensor:
    """Diagonal of the Hessian of the mean loss, (m, K, E)."""
    return product(chance * (1 - chance), rows.squares)


def product(left: Tensor, shared: Tensor) -> Tensor:
    """(m, K, a) times the members' common (a, b), as one wide product."""
    return (left.flatten(0, 1) @ shared).view(*left.shape[:2], -1)
