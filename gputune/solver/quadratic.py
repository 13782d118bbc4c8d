"""Minimise each member's quadratic model of the objective over its free weights, whose signs are kept.

Conjugate gradients with a diagonal preconditioner; where the minimiser lies across zero, a projected search
fixes the weights that reached zero there, and conjugate gradients go on with the rest.
Source: Moré and Toraldo (1991), doi:10.1137/0801008; departure: conjugate gradients stop by their residual.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gputune.solver.objective import Rows, curvature_times

ROUNDS = 3  # of conjugate gradients; what they leave is for the next Newton step
SEARCHES = 10  # lengths of the projected search, each a quarter of the last
SUFFICIENT = 0.1  # of the decrease that the slope promises
FLOOR = 1e-12  # smallest entry of the preconditioner's diagonal, as a share of the largest


@dataclass(frozen=True)
class Model:
    """``slopes . step + step . (Hessian + diag(hold)) step / 2`` around weights, for m members."""

    weight: Tensor  # (m, K, E)
    slopes: Tensor  # (m, K, E) zero for weights that are not free
    free: Tensor  # (m, K, E) bool
    signed: Tensor  # (m, 1, E) bool: the weight may not change its sign
    chance: Tensor  # (m, K, n) where the Hessian is taken
    hold: Tensor  # (m, K, E)
    diagonal: Tensor  # (m, K, E) of the Hessian plus hold
    forcing: Tensor  # (m,) share of the slopes that may be left, in (0, 1)

    def __getitem__(self, members: Tensor) -> "Model":
        return Model(*(getattr(self, name)[members] for name in self.__dataclass_fields__))

    def single(self) -> "Model":
        """The model in single precision."""
        parts = (getattr(self, name) for name in self.__dataclass_fields__)
        return Model(*(part if part.dtype == torch.bool else part.float() for part in parts))

    def times(self, rows: Rows, step: Tensor) -> Tensor:
        """The model's matrix times a step, on the free weights."""
        return curvature_times(rows, self.chance, step).addcmul_(self.hold, step).mul_(self.free)


def minimise(rows: Rows, model: Model) -> Tensor:
    """Return the step (m, K, E) of each member; the model's value there is below zero unless all slopes are."""
    total = torch.zeros_like(model.slopes)
    left = torch.arange(len(total), device=total.device)
    for _ in range(ROUNDS):
        step, bent = conjugate_gradients(rows, model)
        crossing = model.signed & ((model.weight + step) * model.weight < 0)
        crosses = crossing.flatten(1).any(1)
        total[left[~crosses]] += step[~crosses]
        if not crosses.any():
            break
        left, model, step, bent = left[crosses], model[crosses], step[crosses], bent[crosses]
        step, bent = projected_search(rows, model, step, bent)
        total[left] += step
        weight = model.weight + step
        free = model.free & ((weight != 0) | ~model.signed)
        model = replace(model, weight=weight, free=free, slopes=(model.slopes + bent) * free)
    return total


def conjugate_gradients(rows: Rows, model: Model) -> tuple[Tensor, Tensor]:
    """Return the model's minimiser but for its signs, and the model's matrix times it; (m, K, E) each."""
    floor = FLOOR * model.diagonal.amax((1, 2), keepdim=True) + torch.finfo(model.slopes.dtype).tiny
    inverse = model.free / model.diagonal.maximum(floor)
    slopes = model.slopes
    steps, rests = torch.zeros_like(slopes), -slopes
    left, step, rest = torch.arange(len(steps), device=steps.device), steps, rests
    direction = inverse * rest
    size = dot(rest, direction)
    goal = model.forcing**2 * size
    for _ in range(2 * steps[0].numel() + 10):
        going = size > goal
        running = int(going.sum())
        if 2 * running <= len(left):  # the others have stopped, let them cost nothing
            steps, rests = steps.index_copy(0, left, step), rests.index_copy(0, left, rest)
            if not running:
                break
            left, model, inverse = left[going], model[going], inverse[going]
            step, rest, direction = step[going], rest[going], direction[going]
            size, goal, going = size[going], goal[going], going[going]
        bent = model.times(rows, direction)
        bend = dot(direction, bent)
        going = going & (bend > 0)
        stride = torch.where(going, size / bend, 0)[:, None, None]
        step = torch.addcmul(step, stride, direction)
        rest = torch.addcmul(rest, stride, bent, value=-1)
        scaled = inverse * rest
        last, size = size, torch.where(going, dot(rest, scaled), 0)
        direction = torch.addcmul(scaled, torch.where(going, size / last, 0)[:, None, None], direction)
    return steps.index_copy(0, left, step), -slopes - rests.index_copy(0, left, rest)


def projected_search(rows: Rows, model: Model, step: Tensor, bent: Tensor) -> tuple[Tensor, Tensor]:
    """Shorten each step until, with the weights that cross zero put to zero, the model falls enough.

    Where no length does, the step ends where the first weight reaches zero: there the model always falls.
    """
    crossing = model.signed & ((model.weight + step) * model.weight < 0)
    lengths = torch.where(crossing, -model.weight / step, 1.0)
    reach = lengths.flatten(1).amin(1)[:, None, None]
    chosen, chosen_bent = torch.where(lengths <= reach, lengths * step, reach * step), reach * bent
    chosen = torch.where(crossing & (lengths <= reach), -model.weight, chosen)
    left, length = torch.arange(len(step), device=step.device), 1.0
    for _ in range(SEARCHES):
        target = model.weight + length * step
        trial = torch.where(model.signed & (target * model.weight < 0), -model.weight, length * step)
        trial_bent = model.times(rows, trial)
        promised = dot(model.slopes, trial)
        good = promised + dot(trial, trial_bent) / 2 <= SUFFICIENT * promised.clamp_max(0)
        chosen[left[good]], chosen_bent[left[good]] = trial[good], trial_bent[good]
        if good.all():
            break
        left, model, step = left[~good], model[~good], step[~good]
        length /= 4
    return chosen, chosen_bent


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each member's two (K, E)."""
    return (a * b).sum((1, 2))
