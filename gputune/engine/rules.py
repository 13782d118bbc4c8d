"""The update rules: one pure function each, with per-member hyperparameters, as torch.optim defines them.

``rule(params, grads, moments, rates) -> (params, moments)``. Every hyperparameter is a (P,) tensor, or has the
shape of the parameter it is for; every parameter is (P, ...). Nothing is changed in place, so a rule can be
differentiated, which is what hypergradients do. Plain training does not call them: ``update.py`` holds the same
rules in place, tested against these.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from gputune.types import Params

Moments = dict[str, Params]

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Rates:
    """Hyperparameters of one step; ``count`` (P,) is the number of this step, from 1."""

    lr: Tensor
    weight_decay: Tensor
    momentum: Tensor
    count: Tensor
    beta1: Tensor | float = BETA1
    beta2: Tensor | float = BETA2
    eps: float = EPS


Rule = Callable[[Params, Params, Moments, Rates], tuple[Params, Moments]]


def sgd(params: Params, grads: Params, moments: Moments, rates: Rates) -> tuple[Params, Moments]:
    """Gradient descent with heavy-ball momentum: b = mu b + g; w -= lr b. Source: Polyak (1964)."""
    grads = _with_l2(params, grads, rates)
    buffer = _heavy_ball(grads, moments, rates)
    return _descend(params, buffer, rates.lr), {"buffer": buffer}


def nesterov(params: Params, grads: Params, moments: Moments, rates: Rates) -> tuple[Params, Moments]:
    """Nesterov momentum: b = mu b + g; w -= lr (g + mu b). Source: Sutskever et al. (2013), as torch has it."""
    grads = _with_l2(params, grads, rates)
    buffer = _heavy_ball(grads, moments, rates)
    ahead = {k: g + _per_member(rates.momentum, g) * buffer[k] for k, g in grads.items()}
    return _descend(params, ahead, rates.lr), {"buffer": buffer}


def adam(params: Params, grads: Params, moments: Moments, rates: Rates) -> tuple[Params, Moments]:
    """Adam; weight decay enters the gradient (L2). Source: Kingma and Ba (2015), algorithm 1."""
    return _adam_step(params, _with_l2(params, grads, rates), moments, rates)


def adamw(params: Params, grads: Params, moments: Moments, rates: Rates) -> tuple[Params, Moments]:
    """Adam with decoupled weight decay: w *= 1 - lr wd. Source: Loshchilov and Hutter (2019), algorithm 2."""
    shrink = 1 - rates.lr * rates.weight_decay
    params = {k: w * _per_member(shrink, w) for k, w in params.items()}
    return _adam_step(params, grads, moments, rates)


RULES: Mapping[str, Rule] = MappingProxyType({"sgd": sgd, "nesterov": nesterov, "adam": adam, "adamw": adamw})


def n_moments(optimizer: str, momentum: Iterable[float]) -> int:
    """Return how many flat buffers of moments training keeps, for members with these momenta.

    Plain gradient descent without momentum needs none. An optimizer that adapts its rate keeps those of its namesake.
    """
    rule = optimizer.removesuffix("hd")
    return 2 if rule in ("adam", "adamw") else int(rule == "nesterov" or any(momentum))


def empty_moments(optimizer: str, params: Params) -> Moments:
    """Return the moments before the first step: all zero."""
    names = ("buffer",) if optimizer in ("sgd", "nesterov") else ("m", "v")
    return {name: {k: torch.zeros_like(w) for k, w in params.items()} for name in names}


def _per_member(values: Tensor | float, like: Tensor) -> Tensor:
    values = torch.tensor(values, dtype=torch.float64) if isinstance(values, float) else values
    values = values.to(device=like.device, dtype=like.dtype)
    return values if values.dim() == like.dim() > 1 else values.view(-1, *[1] * (like.dim() - 1))


def _with_l2(params: Params, grads: Params, rates: Rates) -> Params:
    return {k: g + _per_member(rates.weight_decay, g) * params[k] for k, g in grads.items()}


def _heavy_ball(grads: Params, moments: Moments, rates: Rates) -> Params:
    return {k: _per_member(rates.momentum, g) * moments["buffer"][k] + g for k, g in grads.items()}


def _descend(params: Params, direction: Params, lr: Tensor) -> Params:
    return {k: w - _per_member(lr, w) * direction[k] for k, w in params.items()}


def _adam_step(params: Params, grads: Params, moments: Moments, rates: Rates) -> tuple[Params, Moments]:
    m, v, direction = {}, {}, {}
    for k, g in grads.items():
        b1, b2, count = (_per_member(r, g) for r in (rates.beta1, rates.beta2, rates.count))
        m[k] = b1 * moments["m"][k] + (1 - b1) * g
        v[k] = b2 * moments["v"][k] + (1 - b2) * g * g
        # The divisions undo the start at zero.
        direction[k] = m[k] / (1 - b1**count) / (_root(v[k] / (1 - b2**count)) + rates.eps)
    return _descend(params, direction, rates.lr), {"m": m, "v": v}


def _root(squares: Tensor) -> Tensor:
    """The square root, with slope 0 at 0 instead of an infinite one.

    An entry whose gradient has always been 0, as every padded one, stays where it is whatever the hyperparameters
    are; an infinite slope times its gradient of 0 would make the hypergradient NaN. Below the smallest number the
    clamp has no slope, and what it adds is nothing beside eps.
    """
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()
