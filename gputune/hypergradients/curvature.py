"""Whether a training has second derivatives: tried on its first minibatch, since wrong ones often say nothing."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import Node

from gputune.errors import InputError
from gputune.hypergradients.inner import Training, slope
from gputune.seeding import stream


@contextmanager
def twice_differentiable(training: Training) -> Iterator[None]:
    """Raise InputError, with the name of the operation, where a training cannot be differentiated twice.

    The first minibatch is tried before what is inside begins; what torch itself refuses inside is said in the same
    words.
    """
    try:
        _try(training)
        yield
    except RuntimeError as error:
        text = str(error).split("\n")[0]
        if not any(
            words in text.lower() for words in ("derivative for", "differentiate twice", "double backward")
        ):
            raise
        remedy = "replace it"
        if "scaled_dot_product" in text:
            remedy = "run it inside torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        raise InputError(
            f"module or loss has an operation that cannot be differentiated twice ({text.rstrip('.')}); {remedy}, or "
            "use mode='fd'."
        ) from error


def nodes(tensor: Tensor) -> set[Node]:
    """Return the nodes of the graph that a tensor was computed by."""
    found: set[Node] = set()
    waiting = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [following for following, _ in node.next_functions]
    return found


@torch.enable_grad()
def _try(training: Training) -> None:
    weights = training.start().requires_grad_()
    gradient = slope(training, weights, 0, graph=True)
    if not gradient.requires_grad:  # the loss is linear in the parameters, as far as torch sees
        gradient = gradient + 0 * weights
    # autograd.grad walks only the paths to what it differentiates by, and the node that torch puts in the place of a
    # missing derivative is on none of them.
    missing = any(type(node).__name__ == "Error" for node in nodes(gradient))
    if missing or not _symmetric(gradient, weights) or not _as_measured(training, gradient, weights):
        raise InputError(
            f"module or loss has an operation that cannot be differentiated twice{_suspects(training)}: the second "
            "derivative that torch takes is incomplete. The usual causes are weight_norm, a .detach() of what depends "
            "on the parameters, and an autograd.Function whose backward has no derivative; replace it, or use "
            "mode='fd'."
        )


def _symmetric(gradient: Tensor, weights: Tensor) -> bool:
    """Tell whether the derivative H of a gradient is symmetric, as every true second derivative is.

    With p = H'v the products p'p and v'(H'p) are equal if it is. In single precision rounding makes them differ by
    far less than the tolerance, the cube root of the dtype's spacing.
    """
    v = _direction(weights)
    p = _product(gradient, weights, v)
    q = _product(gradient, weights, p)
    once, twice = (p.double() ** 2).sum(), (v.double() * q.double()).sum()
    # Not <=: where either is infinite or NaN, the training says so by itself.
    return not bool((once - twice).abs() > torch.finfo(weights.dtype).eps ** (1 / 3) * once)


def _as_measured(training: Training, gradient: Tensor, weights: Tensor) -> bool:
    """Tell whether the derivative of a gradient is how the gradient changes, over a tiny distance.

    Two distances tell how far the measurement can be trusted: a kink (of a relu) between them, or operations of lower
    precision, make them differ. So do its two sides, where the kink is at the weights themselves, as that of a relu
    whose input is exactly 0. In single precision kinks are too close to each other for that: it is not measured.
    """
    if weights.dtype != torch.float64:
        return True
    v = _direction(weights)
    v *= (weights.detach().norm() / v.norm()).clamp_min(1e-3)

    def changes(h: float) -> tuple[Tensor, Tensor]:
        ends = [(weights.detach() + s * h * v).requires_grad_() for s in (1, -1)]
        up, down = (slope(training, end, 0, graph=False) for end in ends)
        here = gradient.detach()
        return (up - here) / h, (here - down) / h

    (above, below), (above_further, below_further) = changes(1e-8), changes(2e-8)
    measured, further = (above + below) / 2, (above_further + below_further) / 2
    product = _product(gradient, weights, v)
    allowed = 10 * (measured - further).norm() + (above - below).norm() + 1e-3 * product.norm()
    return not bool((measured - product).norm() > allowed)


def _direction(weights: Tensor) -> Tensor:
    drawn = torch.randn(weights.shape, generator=stream(0, "curvature"), dtype=torch.float64)
    return drawn.to(weights.device, weights.dtype)


def _product(gradient: Tensor, weights: Tensor, v: Tensor) -> Tensor:
    (product,) = torch.autograd.grad(gradient, weights, v, retain_graph=True, materialize_grads=True)
    return product


def _suspects(training: Training) -> str:
    """Name what is known to have no second derivative, and the functions of the user's own."""
    weights = training.start().requires_grad_()
    with torch.enable_grad():
        found = nodes(training.losses(weights, 0))
    own = {n for n in found if isinstance(n, torch.autograd.function.BackwardCFunction)}
    known = {n for n in found if "WeightNorm" in type(n).__name__}
    names = sorted({type(n).__name__.removesuffix("0").removesuffix("Backward") for n in own | known})
    return f" ({', '.join(names)})" if names else ""
