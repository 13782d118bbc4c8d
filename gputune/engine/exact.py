"""The logistic regression solved to convergence for every (C, l1_ratio, fold) at once, in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gputune.engine.logistic import Rows, smooth_slope, start, violation
from gputune.engine.newton import newton_step
from gputune.engine.proximal import bound_of_curvature, proximal_newton_step

CHUNK = 2**18


@dataclass(frozen=True)
class Solution:
    coef: Tensor
    intercept: Tensor
    steps: Tensor
    residual: Tensor
    converged: Tensor


def solve(x: Tensor, y: Tensor, weights: Tensor, *, C: Tensor, l1_ratio: Tensor, n_classes: int,
          fit_intercept: bool = True, tolerance: float = 1e-10, max_steps: int = 200, present: Tensor | None = None) -> Solution:
    outs = []
    for f in range(len(x)):
        outs.append(_fold(x[f], y, weights[f], C, l1_ratio, n_classes, fit_intercept, tolerance, max_steps))
    return Solution(*(torch.cat(t) for t in zip(*outs)))


def _fold(x, y, w, C, ratio, n_classes, fit_intercept, tolerance, max_steps):
    keep = w > 0
    x, y, w = x[keep], y[keep], w[keep]
    total = w.sum()
    share = w / total
    sigmoid = n_classes == 2
    m, D = len(C), x.shape[1]
    K = 1 if sigmoid else n_classes
    coef = x.new_zeros(m, K, D); intercept = x.new_zeros(m, K)
    steps = torch.zeros(m, dtype=torch.int64); res = x.new_zeros(m)
    center = share @ x if fit_intercept else x.new_zeros(D)
    strength = 1 / (C * total)
    lasso = strength * ratio
    ridge = strength * (1 - ratio)
    for plain in (True, False):
        which = ((lasso == 0) == plain).nonzero()[:, 0]
        if not len(which): continue
        z = x - center
        basis = None
        rms = (share @ z**2).sqrt()
        rms[rms == 0] = 1
        scale = torch.cat([rms, rms.new_ones(1)]) if fit_intercept else rms
        if plain:
            _, v = torch.linalg.eigh((z * share[:, None]).T @ z)
            z = z @ v
            basis = torch.block_diag(v.T, v.new_ones(1, 1)) if fit_intercept else v.T
        if fit_intercept:
            z = torch.cat([z, z.new_ones(len(z), 1)], 1)
        pen = z.new_ones(z.shape[1])
        if fit_intercept: pen[-1] = 0
        rows = Rows(z * share.sqrt()[:, None], share.sqrt(), y, n_classes, fit_intercept, pen, scale, basis, sigmoid)
        bound = None if plain else bound_of_curvature(rows)
        adv = newton_step if plain else (lambda r, p: proximal_newton_step(r, p, bound))
        size = max(1, CHUNK // (len(z) * K))
        for idx in which.split(size):
            wt, st, re = run(rows, ridge[idx], lasso[idx], adv, tolerance, max_steps)
            if basis is not None: wt = wt @ basis
            coef[idx] = wt[..., :D]
            if fit_intercept:
                b = wt[..., -1] - wt[..., :D] @ center
                if not sigmoid: b = b - b.mean(1, keepdim=True)
                intercept[idx] = b
            steps[idx] = st; res[idx] = re
    return coef, intercept, steps, res, res <= tolerance


def run(rows, ridge, lasso, adv, tolerance, max_steps):
    point = start(rows, ridge, lasso)
    m = len(ridge)
    out = torch.zeros_like(point.weight); steps = torch.zeros(m, dtype=torch.int64); res = ridge.new_zeros(m)
    left = torch.arange(m)
    for step in range(max_steps + 1):
        r = violation(rows, point, smooth_slope(rows, point))
        out[left] = point.weight; steps[left] = step; res[left] = r
        go = r > tolerance
        if VERBOSE: print(step, len(left), r.max().item(), r.min().item(), (point.weight!=0).double().mean().item())
        if not go.any(): break
        point, left = point[go], left[go]
        point = adv(rows, point)
    return out, steps, res
VERBOSE = False
