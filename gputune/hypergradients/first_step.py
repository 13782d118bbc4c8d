"""What the first minibatch tells before a training starts: whether it has second derivatives, and what it will need.

Second derivatives are tried, since wrong ones often say nothing; memory is measured on one step.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from gputune.errors import InputError
from gputune.hypergradients.inner import InnerProblem, Training, hessian_times, leaves_of, rows_of, slope
from gputune.memory import free_memory, free_of_gpu
from gputune.seeding import stream

_SHARE = 0.8  # of the memory that is free


@contextmanager
def twice_differentiable(training: Training) -> Iterator[None]:
    """Raise InputError where a training cannot be differentiated twice: on its first minibatch, or as torch finds it.

    What torch itself refuses inside of the block is said in the same words.
    """
    try:
        _check_second_derivatives(training)
        yield
    except RuntimeError as error:
        text = str(error).split("\n")[0]
        if not any(word in text.lower() for word in ("derivative for", "differentiate twice", "double backward")):
            raise
        attention = "scaled_dot_product" in text
        remedy = "run it inside torch.nn.attention.sdpa_kernel(SDPBackend.MATH)" if attention else "replace it"
        raise InputError(
            f"module or loss has an operation that cannot be differentiated twice ({text.rstrip('.')}); {remedy}, or "
            "call gputune.hypergradient with mode='fd'."
        ) from error


def nodes(tensor: Tensor) -> set[Node]:
    """Return the nodes of the graph that a tensor was computed by."""
    graph: set[Node] = set()
    waiting = [tensor.grad_fn]
    while waiting:
        if (node := waiting.pop()) is not None and node not in graph:
            graph.add(node)
            waiting += [following for following, _ in node.next_functions]
    return graph


@torch.enable_grad()
def _check_second_derivatives(training: Training) -> None:
    weights = training.start().requires_grad_()
    gradient = slope(training, weights, 0, graph=True)
    # autograd.grad walks only the paths to what it differentiates by, and the node that torch puts in the place of a
    # missing derivative is on none of them.
    missing = any(type(node).__name__ == "Error" for node in nodes(gradient))
    if not missing and _symmetric(gradient, weights) and _agrees_with_difference(training, gradient, weights):
        return
    # What is known to have no second derivative, and the functions of the user's own.
    kinds = {type(node) for node in nodes(training.losses(weights, 0))}
    suspects = [k for k in kinds if issubclass(k, BackwardCFunction) or "WeightNorm" in k.__name__]
    names = sorted({kind.__name__.removesuffix("0").removesuffix("Backward") for kind in suspects})
    shown = f" ({', '.join(names)})" if names else ""
    raise InputError(
        f"module or loss has an operation that cannot be differentiated twice{shown}: the second derivative that torch "
        "takes is incomplete. The usual causes are weight_norm, a .detach() of what depends on the parameters, and an "
        "autograd.Function whose backward has no derivative; replace it, or call gputune.hypergradient with mode='fd'."
    )


def _symmetric(gradient: Tensor, weights: Tensor) -> bool:
    """Tell whether the derivative H of a gradient is symmetric, as every true second derivative is.

    With p = H'v the products p'p and v'(H'p) are equal if it is. In single precision rounding makes them differ by
    far less than the tolerance, the cube root of the dtype's spacing.
    """
    v = _direction(weights)
    p = hessian_times(gradient, weights, v)
    q = hessian_times(gradient, weights, p)
    once, twice = (p.double() ** 2).sum(), (v.double() * q.double()).sum()
    # Not <=: where either is infinite or NaN, the training says so by itself.
    return not bool((once - twice).abs() > torch.finfo(weights.dtype).eps ** (1 / 3) * once)


def _agrees_with_difference(training: Training, gradient: Tensor, weights: Tensor) -> bool:
    """Tell whether the derivative of a gradient is how the gradient changes, over a tiny distance.

    Two distances tell how far the measurement can be trusted: a kink (of a relu) between them, or operations of lower
    precision, make them differ. So do its two sides, where the kink is at the weights themselves, as that of a relu
    whose input is exactly 0. In single precision kinks are too close to each other for that: it is not measured.
    """
    if weights.dtype != torch.float64:
        return True
    # What fills narrower members up to one width is 0 and stays so; moved, its relu would be at a kink.
    v = _direction(weights).where((weights != 0) | (gradient != 0), 0)
    v *= (weights.detach().norm() / v.norm()).clamp_min(1e-3)

    def changes(h: float) -> tuple[Tensor, Tensor]:
        ends = [(weights.detach() + s * h * v).requires_grad_() for s in (1, -1)]
        up, down = (slope(training, end, 0, graph=False) for end in ends)
        here = gradient.detach()
        return (up - here) / h, (here - down) / h

    (above, below), (above_further, below_further) = changes(1e-8), changes(2e-8)
    measured, further = (above + below) / 2, (above_further + below_further) / 2
    product = hessian_times(gradient, weights, v)
    allowed = 10 * (measured - further).norm() + (above - below).norm() + 1e-3 * product.norm()
    return not bool((measured - product).norm() > allowed)


def _direction(weights: Tensor) -> Tensor:
    drawn = torch.randn(weights.shape, generator=stream(0, "curvature"), dtype=torch.float64, device="cpu")
    return drawn.to(weights.device, weights.dtype)


ExactMode = Literal["reverse", "checkpointed", "forward"]


@dataclass(frozen=True)
class Need:
    """Bytes of one step's graph and of one state (parameters and moments), of all members."""

    step: int
    state: int

    def of_modes(self, steps: int, hyperparameters: int) -> dict[ExactMode, int]:
        """Return the bytes of each mode.

        Reverse mode holds all steps, checkpointed blocks of sqrt(T) and a state between two of them. Forward mode holds
        one step and, in the update rule, four times the tangents.
        """
        block = math.isqrt(steps - 1) + 1
        return {
            "reverse": steps * self.step,
            "checkpointed": block * self.step + -(-steps // block) * self.state,
            "forward": self.step + 4 * (1 + hyperparameters) * self.state,
        }


def measure(problem: InnerProblem[Training]) -> Need:
    """Take the first step once and count what its graph keeps."""
    leaves = {name: table.detach().requires_grad_() for name, table in problem.tables.items()}
    state = leaves_of(problem.start())
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Held, so that no address comes up twice; detached, or the graph would hold itself, beyond Python's collector.
        kept[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.enable_grad():
        end = problem.step(state, 0, rows=rows_of(leaves, problem.training.layer), graph=True)
    for tensor in end:
        pack(tensor)
    step = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return Need(step, sum(tensor.nbytes for tensor in end))


def free_bytes(device: torch.device) -> int:
    """Return the bytes that may be used on a device: most of what is free."""
    return int(_SHARE * (free_of_gpu(device) if device.type == "cuda" else free_memory()))


def fastest_that_fits(sizes: Mapping[ExactMode, int], budget: int, *, hyperparameters: int) -> ExactMode:
    """Return the fastest of the modes whose bytes the budget holds; "forward" where it holds none.

    With one hyperparameter forward mode is about as fast as reverse mode, with memory that does not grow.
    """
    modes: list[ExactMode] = ["reverse", "checkpointed"]
    modes = ["forward", *modes] if hyperparameters == 1 else modes
    return next((mode for mode in modes if sizes[mode] <= budget), "forward")
