"""The update rules as pure functions with per-member hyperparameters, and the schedules.

A rule is ``rule(params, grads, moments, rates) -> (params, moments)`` and follows the definition of
torch.optim. P is the number of members (one trial on one fold each). Every hyperparameter is a (P,)
tensor, or has the shape of its parameter. Every parameter is (P, ...). A rule changes nothing in
place, so it can be differentiated, as hypergradients need. Plain training calls these functions
only for rmsprop, lion, muon and schedulefree. For sgd, nesterov, adam and adamw, ``update.py`` has
the same rules in place, and tests compare both.

A schedule returns the factor on a rate from the number of finished steps and the total number of
steps. The schedules follow PyTorch.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import overload

import numpy as np
import torch
from torch import Tensor

from gputune.ground import types
from gputune.ground.types import Params

Moments = dict[str, Params]

BETA1 = 0.9
BETA2 = 0.999
EPS = 1e-8
RMSPROP_ALPHA = 0.99
LION_BETA2 = 0.99

# The coefficients and the number of steps of torch.optim.Muon.
_NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
_NEWTON_SCHULZ_STEPS = 5
_LEAST_NORM = 1e-7
MUON_SCALE = 0.2  # makes a step as long as a step of AdamW, so the same rates work for both


@dataclass(frozen=True)
class Rates:
    """The hyperparameters of one optimizer step.

    ``count`` (P,) is the index of this step, starting at 1.
    """

    lr: Tensor
    weight_decay: Tensor
    momentum: Tensor
    count: Tensor
    beta1: Tensor | float = BETA1
    beta2: Tensor | float = BETA2
    eps: float = EPS
    sides: Mapping[str, Tensor] = field(default_factory=dict)
    """Maps the hidden matrices that muon updates to the length of each member's longer side."""


UpdateRule = Callable[[Params, Params, Moments, Rates], tuple[Params, Moments]]


def sgd(params: Params, grads: Params, moments: Moments, rates: Rates) -> tuple[Params, Moments]:
    """Gradient descent with heavy-ball momentum: b = mu b + g; w -= lr b. Source: Polyak (1964)."""
    buffer = _heavy_ball(_with_l2(params, grads, rates), moments, rates)
    return _descend(params, buffer, rates.lr), {"buffer": buffer}


def nesterov(
    params: Params, grads: Params, moments: Moments, rates: Rates
) -> tuple[Params, Moments]:
    """Nesterov momentum: b = mu b + g; w -= lr (g + mu b).

    Source: Sutskever et al. (2013), in PyTorch's form.
    """
    grads = _with_l2(params, grads, rates)
    buffer = _heavy_ball(grads, moments, rates)
    ahead = {k: g + _per_member(rates.momentum, g) * buffer[k] for k, g in grads.items()}
    return _descend(params, ahead, rates.lr), {"buffer": buffer}


def adam(params: Params, grads: Params, moments: Moments, rates: Rates) -> tuple[Params, Moments]:
    """Adam with L2 weight decay, which is part of the gradient.

    Source: Kingma and Ba (2015), algorithm 1.
    """
    return _adam_step(params, _with_l2(params, grads, rates), moments, rates)


def adamw(params: Params, grads: Params, moments: Moments, rates: Rates) -> tuple[Params, Moments]:
    """Adam with decoupled weight decay: w *= 1 - lr wd.

    Source: Loshchilov and Hutter (2019), algorithm 2.
    """
    return _adam_step(_shrunk(params, rates), grads, moments, rates)


def rmsprop(
    params: Params, grads: Params, moments: Moments, rates: Rates
) -> tuple[Params, Moments]:
    """RMSprop: gradients divided by the root of their mean square, with momentum.

    Source: Hinton (2012), in PyTorch's form.
    """
    grads = _with_l2(params, grads, rates)
    v = {}
    scaled = {}
    for k, g in grads.items():
        v[k] = RMSPROP_ALPHA * moments["v"][k] + (1 - RMSPROP_ALPHA) * g * g
        scaled[k] = g / (_root(v[k]) + rates.eps)
    buffer = _heavy_ball(scaled, moments, rates)
    return _descend(params, buffer, rates.lr), {"v": v, "buffer": buffer}


def lion(params: Params, grads: Params, moments: Moments, rates: Rates) -> tuple[Params, Moments]:
    """Lion: the sign of a momentum, with decoupled weight decay.

    Source: Chen et al. (2023), arXiv:2302.06675, program 1.
    """
    direction = {}
    m = {}
    for k, g in grads.items():
        before = moments["m"][k]
        direction[k] = torch.sign(BETA1 * before + (1 - BETA1) * g)
        m[k] = LION_BETA2 * before + (1 - LION_BETA2) * g
    return _descend(_shrunk(params, rates), direction, rates.lr), {"m": m}


def muon(params: Params, grads: Params, moments: Moments, rates: Rates) -> tuple[Params, Moments]:
    """Muon: Nesterov momentum, made orthogonal, for hidden matrices (P, A, B...).

    AdamW updates the other parameters.

    Source: Jordan et al. (2024), in the form of torch.optim.Muon. The scale follows Liu et al.
    (2025), arXiv:2502.16982.
    Departure: this rule computes in the precision of the parameters; torch rounds to bfloat16.
    """
    rest = {k: g for k, g in grads.items() if k not in rates.sides}
    new, after = adamw({k: params[k] for k in rest}, rest, moments, rates)
    shrunk = _shrunk(params, rates)
    for k, side in rates.sides.items():
        g = grads[k]
        mu = _per_member(rates.momentum, g)
        m = torch.lerp(moments["m"][k], g, 1 - mu)
        axes = 1 if side.dim() == 1 else 2  # number of member axes in front of the matrix
        ahead = torch.lerp(g, m, mu).flatten(axes + 1)
        step = orthogonal(ahead).view_as(g)
        scale = _per_member(rates.lr, g) * MUON_SCALE * _per_member(side, g).sqrt()
        new[k] = shrunk[k] - scale * step
        after["m"][k] = m
        after["v"][k] = moments["v"][k]
    return new, after


def schedulefree(
    params: Params, grads: Params, moments: Moments, rates: Rates
) -> tuple[Params, Moments]:
    """Schedule-free AdamW. The weights z take the steps, and x is an average of z.

    The parameters are y, a point between z and x, at which gradients are computed. The average x is
    scored; ``schedule_free_average`` returns it.

    Source: Defazio et al. (2024), arXiv:2405.15682, algorithm 1, without warm-up.
    Departure: a schedule scales the steps, but not the weights of the average.
    """
    corrected = 1 - rates.beta2**rates.count
    # the sum of all ``corrected`` so far
    weights = rates.count - rates.beta2 * corrected / (1 - rates.beta2)
    new = {}
    z = {}
    v = {}
    for k, g in grads.items():
        y = params[k]
        share = _per_member(corrected / weights, g)
        rate = _per_member(rates.lr * corrected.sqrt(), g)
        z[k] = torch.where(_per_member(rates.count, g) == 1, y, moments["z"][k])
        b2 = _per_member(rates.beta2, g)
        v[k] = b2 * moments["v"][k] + (1 - b2) * g * g
        step = rate * (g / (_root(v[k]) + rates.eps) + _per_member(rates.weight_decay, g) * y)
        new[k] = y + share * (z[k] - y) + (BETA1 * (1 - share) - 1) * step
        z[k] = z[k] - step
    return new, {"z": z, "v": v}


def schedule_free_average(y: Tensor, z: Tensor) -> Tensor:
    """Return the average x of schedule-free training, from y = (1 - b1) z + b1 x."""
    return (y - (1 - BETA1) * z) / BETA1


RULES: Mapping[str, UpdateRule] = {
    rule.__name__: rule for rule in (sgd, nesterov, adam, adamw, rmsprop, lion, muon, schedulefree)
}

MOMENTS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("sgd", "nesterov"), ("buffer",)),
    **dict.fromkeys(("adam", "adamw", "muon"), ("m", "v")),
    "rmsprop": ("v", "buffer"),
    "lion": ("m",),
    "schedulefree": ("z", "v"),
}
"""The names of each update rule's moments, in the order of their flat buffers."""


def n_moments(optimizer: str, momentum: Iterable[float]) -> int:
    """Return how many flat buffers of moments an optimizer keeps for members with these
    ``momentum`` values.

    Gradient descent without momentum needs no buffer. An optimizer that adapts its rate has the
    same number as the optimizer in its name: "adamhd" has the number of "adam".
    """
    rule = optimizer.removesuffix("hd")
    return int(any(momentum)) if rule == "sgd" else len(MOMENTS[rule])


@overload
def _per_member(values: Tensor, like: Tensor) -> Tensor: ...
@overload
def _per_member(values: Tensor | float, like: Tensor) -> Tensor | float: ...
def _per_member(values: Tensor | float, like: Tensor) -> Tensor | float:
    """Return one value per member, (P,), with axes that broadcast against a parameter (P, ...).

    A float, which applies to all members, is returned unchanged.
    """
    if isinstance(values, float):
        return values
    values = values.to(device=like.device, dtype=like.dtype)
    if values.dim() == like.dim() > 1:
        return values
    return values.view(-1, *[1] * (like.dim() - 1))


def _shrunk(params: Params, rates: Rates) -> Params:
    """Return the parameters after decoupled weight decay: w * (1 - lr wd)."""
    shrink = 1 - rates.lr * rates.weight_decay
    return {k: w * _per_member(shrink, w) for k, w in params.items()}


def orthogonal(x: Tensor) -> Tensor:
    """Return matrices (..., A, B) with their singular values replaced by values near 1.

    The method is a Newton-Schulz iteration. Rows and columns of zeros stay zero, so padding changes
    nothing.
    """
    a, b, c = _NEWTON_SCHULZ
    is_wide = x.shape[-2] <= x.shape[-1]
    wide: Tensor = x if is_wide else x.mT
    norm = wide.flatten(-2).norm(dim=-1)[..., None, None]
    wide = wide / norm.clamp_min(_LEAST_NORM)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        # (..., A, B) @ (..., B, A) -> (..., A, A), with A the shorter side
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if is_wide else wide.mT


def _with_l2(params: Params, grads: Params, rates: Rates) -> Params:
    """Return the gradients with L2 weight decay added: g + wd * w."""
    return {k: g + _per_member(rates.weight_decay, g) * params[k] for k, g in grads.items()}


def _heavy_ball(grads: Params, moments: Moments, rates: Rates) -> Params:
    """Return the momentum buffers after this step: mu b + g."""
    return {k: _per_member(rates.momentum, g) * moments["buffer"][k] + g for k, g in grads.items()}


def _descend(params: Params, direction: Params, lr: Tensor) -> Params:
    """Return the parameters after a step against a direction: w - lr * direction."""
    return {k: w - _per_member(lr, w) * direction[k] for k, w in params.items()}


def _adam_step(
    params: Params, grads: Params, moments: Moments, rates: Rates
) -> tuple[Params, Moments]:
    """Return the parameters and moments after a step of Adam, without weight decay."""
    m = {}
    v = {}
    direction = {}
    for k, g in grads.items():
        count = _per_member(rates.count, g)
        b1 = _per_member(rates.beta1, g)
        b2 = _per_member(rates.beta2, g)
        m[k] = b1 * moments["m"][k] + (1 - b1) * g
        v[k] = b2 * moments["v"][k] + (1 - b2) * g * g
        # The moments start at zero; dividing by 1 - b^t corrects this bias.
        direction[k] = m[k] / (1 - b1**count) / (_root(v[k] / (1 - b2**count)) + rates.eps)
    return _descend(params, direction, rates.lr), {"m": m, "v": v}


def _root(squares: Tensor) -> Tensor:
    """Return the square root, with slope 0 at 0 instead of an infinite slope."""
    # If the gradient of an entry has always been 0, as for padding, the entry never moves. With an
    # infinite slope, infinity times this gradient of 0 would make the hypergradient NaN.
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()


Schedule = Callable[[Tensor, Tensor], Tensor]
"""A function from (finished steps, total steps) to the factor on the learning rate of the next
step.

Both arguments have the same shape and are in double precision.
"""

# Constants of one_cycle, the same as the defaults of torch.optim.lr_scheduler.OneCycleLR.
_FIRST = 1 / 25
_LAST = 1e-4 / 25
_RISING = 0.3


def constant(done: Tensor, _total: Tensor) -> Tensor:
    """Constant schedule: return the factor 1 for every step."""
    return torch.ones_like(done)


def cosine(done: Tensor, total: Tensor) -> Tensor:
    """Cosine schedule: half a cosine from 1 to 0, without restarts, computed per step.

    Source: Loshchilov and Hutter (2017).
    """
    return torch.cos(done / total * math.pi).add(1).mul(0.5)


def linear(done: Tensor, total: Tensor) -> Tensor:
    """Linear schedule: the factor follows a straight line from 1 to 0."""
    return 1 - done / total


def warmup_cosine(done: Tensor, total: Tensor) -> Tensor:
    """Cosine schedule with warm-up: a straight line up to 1, then half a cosine to 0.

    The warm-up has a tenth of the steps, rounded down.
    """
    warmup = torch.floor(total / 10)
    rising = (done + 1) / (warmup + 1)
    return torch.where(done < warmup, rising, cosine(done - warmup, total - warmup))


def one_cycle(done: Tensor, total: Tensor) -> Tensor:
    """One-cycle schedule: half a cosine from 1/25 up to 1, then half a cosine down to 1/250000.

    The maximum is at three tenths of the steps, the minimum at the last step. Momentum does not
    change.

    Source: Smith and Topin (2019), in PyTorch's form.
    """
    top = _RISING * total - 1
    falling = _LAST + (1 - _LAST) * cosine(done - top, total - 1 - top)
    return torch.where(done <= top, 1 - (1 - _FIRST) * cosine(done, top), falling)


def coslog4(done: Tensor, total: Tensor) -> Tensor:
    """Schedule with four waves from 0 to 1 and back, each twice as long as the wave before.

    Source: Holzmueller et al. (2024), arXiv:2407.04491, section 3.
    """
    return 0.5 - torch.cos(torch.log2(1 + 15 * done / total) * (2 * math.pi)) / 2


def flat_cos(done: Tensor, total: Tensor) -> Tensor:
    """Flat cosine schedule: 1 over the first half of the steps, then half a cosine to 0.

    Source: the same as for ``coslog4``.
    """
    return torch.where(2 * done < total, 1.0, cosine(2 * done - total, total))


SCHEDULES: Mapping[str, Schedule] = dict(
    zip(
        types.SCHEDULES,
        (constant, cosine, linear, warmup_cosine, one_cycle, coslog4, flat_cos),
        strict=True,
    )
)


def schedule_factor(name: str, done: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Return a schedule's factors after ``done`` finished steps, computed on the CPU."""
    steps = torch.as_tensor(done, dtype=torch.float64)
    return np.asarray(SCHEDULES[name](steps, torch.as_tensor(total, dtype=torch.float64)))
