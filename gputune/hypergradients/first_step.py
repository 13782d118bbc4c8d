"""Checks before a training is differentiated: does it have derivatives, and how much memory do they
need?

Second derivatives are tested on the first minibatch, because PyTorch often returns wrong ones
without an error. Memory is measured on one step.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from gputune.errors import InputError
from gputune.hypergradients.inner import (
    BETWEEN_0_AND_1,
    InnerProblem,
    InnerTraining,
    hessian_times,
    leaves_of,
    rows_of,
    slope,
    to_coordinate,
)
from gputune.main_memory import free_memory
from gputune.memory import free_of_gpu
from gputune.optimizers.classes import OPTIMIZER_PREFIX
from gputune.population.population import beyond_adam
from gputune.seeding import stream
from gputune.types import Config

HYPERPARAMETERS_OF = {
    **dict.fromkeys(("sgd", "nesterov"), ("lr", "momentum", "weight_decay")),
    **dict.fromkeys(("adam", "adamw"), ("lr", "weight_decay", "beta1", "beta2")),
}


def check_start(config: Config, name: str, start: str, *, argument: str, remedy: str = "") -> None:
    """Raise InputError if a starting point of a hypergradient search cannot be differentiated in
    ``name``.

    ``config`` is the configuration of the starting point, and ``start`` is its name in errors.
    ``argument`` is the argument that chose the hyperparameter. ``remedy`` is a remedy other than
    changing the configuration.
    """
    optimizer = config["optimizer"]
    taken = [key for key in config if key.startswith(OPTIMIZER_PREFIX)]
    others = [key for key in beyond_adam(config) if key != "beta2"] + ["ema"] * bool(config["ema"])
    if optimizer not in HYPERPARAMETERS_OF:
        reason = f"optimizer={optimizer!r}; choose one of {', '.join(HYPERPARAMETERS_OF)}"
    elif taken:
        reason = (
            f"{taken[0]}={config[taken[0]]!r}, which torch.optim's own class takes; leave it out"
        )
    elif config["clip_norm"] < math.inf:
        reason = f"clip_norm={config['clip_norm']:g}; leave it out"
    elif others:
        reason = f"{others[0]}={config[others[0]]!r}; leave it out"
    elif name in HYPERPARAMETERS_OF[optimizer]:
        return
    else:
        raise InputError(
            f"{argument}: {optimizer} has no {name!r}, and {start} uses it; choose from "
            f"{', '.join(HYPERPARAMETERS_OF[optimizer])}, or an optimizer that has it."
        )
    raise InputError(f"a descent cannot differentiate what {start} has: {reason}{remedy}.")


def check_coordinate(name: str, value: float, start: str, *, called: str, space: str) -> None:
    """Raise InputError if the value of a starting point has no finite coordinate, for example 0 or
    infinity.

    A hypergradient search cannot move away from such a value. ``start`` is the name of the starting
    point. Errors name the hyperparameter ``called`` and the space ``space``.
    """
    if not math.isfinite(
        to_coordinate(name, torch.tensor(float(value), dtype=torch.float64, device="cpu"))
    ):
        raise InputError(
            f"a descent cannot start from {called}={value:g}, as {start} does, because it moves "
            f"in the {'logit' if name in BETWEEN_0_AND_1 else 'logarithm'}; put {called!r} in "
            f"{space} with values above 0{' and finite' if name == 'C' else ''}, or leave it out "
            "of hyperparameters."
        )


def check_classes(
    fold: int, valid: Iterable[str | float], train: Iterable[str | float], *, weighed: bool = False
) -> None:
    """Raise InputError if the validation rows of a fold have a class without a training row in that
    fold.

    ``valid`` and ``train`` are labels. With ``weighed``, ``train`` has only the labels of training
    rows whose weight is above 0.
    """
    if lacking := set(valid) - set(train):
        weighing = " with sample_weight above 0" if weighed else ""
        raise InputError(
            f"cv: the validation rows of fold {fold} have class {sorted(lacking)[0]!r}, of which "
            f"it has no training row{weighing}: its log loss is infinite at every point of a "
            "descent. Use stratified folds, fewer of them, or leave the class out."
        )


@contextmanager
def twice_differentiable(training: InnerTraining) -> Iterator[None]:
    """Raise InputError if a training cannot be differentiated twice.

    The first minibatch is tested on entry. Errors that torch raises inside the ``with`` block for
    the same reason are reported in the same words.
    """
    try:
        _check_second_derivatives(training)
        yield
    except RuntimeError as error:
        text = str(error).split("\n")[0]
        if not any(
            word in text.lower()
            for word in ("derivative for", "differentiate twice", "double backward")
        ):
            raise
        attention = "scaled_dot_product" in text
        remedy = (
            "run it inside torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
            if attention
            else "replace it"
        )
        raise InputError(
            "module or loss has an operation that cannot be differentiated twice "
            f"({text.rstrip('.')}); {remedy}, or call gputune.hypergradient with mode='fd'."
        ) from error


def nodes(tensor: Tensor) -> set[Node]:
    """Return the autograd nodes that a tensor was computed by."""
    graph: set[Node] = set()
    waiting = [tensor.grad_fn]
    while waiting:
        if (node := waiting.pop()) is not None and node not in graph:
            graph.add(node)
            waiting += [following for following, _ in node.next_functions]
    return graph


@torch.enable_grad()
def _check_second_derivatives(training: InnerTraining) -> None:
    """Raise InputError if the second derivatives of the loss on the first minibatch are wrong or
    missing.
    """
    weights = training.start().requires_grad_()
    gradient = slope(training, weights, 0, graph=True)
    drawn = torch.randn(
        weights.shape, generator=stream(0, "curvature"), dtype=torch.float64, device="cpu"
    )
    v = drawn.to(weights.device, weights.dtype)
    # If a derivative is missing, torch puts a node named Error into the graph. autograd.grad does
    # not
    # reach this node, because the node is on no path to the weights. So the graph is searched here.
    missing = any(type(node).__name__ == "Error" for node in nodes(gradient))
    if (
        not missing
        and _symmetric(gradient, weights, v)
        and _agrees_with_difference(training, gradient, weights, v)
    ):
        return
    # Operations without a second derivative, and the user's own autograd functions.
    kinds = {type(node) for node in nodes(training.losses(weights, 0))}
    suspects = [k for k in kinds if issubclass(k, BackwardCFunction) or "WeightNorm" in k.__name__]
    names = sorted({kind.__name__.removesuffix("0").removesuffix("Backward") for kind in suspects})
    shown = f" ({', '.join(names)})" if names else ""
    raise InputError(
        f"module or loss has an operation that cannot be differentiated twice{shown}: the second "
        "derivative that torch takes is incomplete. The usual causes are weight_norm, a "
        ".detach() of what depends on the parameters, and an autograd.Function whose backward "
        "has no derivative; replace it, or call gputune.hypergradient with mode='fd'."
    )


def _symmetric(gradient: Tensor, weights: Tensor, v: Tensor) -> bool:
    """Return whether the derivative H of a gradient is symmetric, as every true second derivative
    is.

    With p = H'v, the products p'p and v'(H'p) are equal if H is symmetric. In single precision
    rounding makes them differ, but by far less than the tolerance. The tolerance is the cube root
    of the dtype's machine epsilon.
    """
    p = hessian_times(gradient, weights, v)
    q = hessian_times(gradient, weights, p)
    once = (p.double() ** 2).sum()
    twice = (v.double() * q.double()).sum()
    # "not >" instead of "<=": infinite and NaN values pass here, because training reports them.
    return not bool((once - twice).abs() > torch.finfo(weights.dtype).eps ** (1 / 3) * once)


def _agrees_with_difference(
    training: InnerTraining, gradient: Tensor, weights: Tensor, v: Tensor
) -> bool:
    """Return whether the second derivative agrees with a finite difference of the gradient along
    ``v``.

    Differences over two tiny distances tell how accurate the measurement is. They disagree if a
    kink (of a relu) lies between them, or if operations run in lower precision. The differences to
    the two sides disagree if the kink is at the weights themselves, as for a relu whose input is
    exactly 0. In single precision kinks are too close to each other for this comparison. Then
    nothing is measured, and the result is True.
    """
    if weights.dtype != torch.float64:
        return True
    here = gradient.detach()
    start = weights.detach()
    # The padding of narrower members is 0 and stays 0. Moving it would put its relu at a kink.
    v = v.where((weights != 0) | (gradient != 0), 0)
    v *= (start.norm() / v.norm()).clamp_min(1e-3)

    def changes(h: float) -> tuple[Tensor, Tensor]:
        up, down = (
            slope(training, (start + s * h * v).requires_grad_(), 0, graph=False) for s in (1, -1)
        )
        return (up - here) / h, (here - down) / h

    (above, below), (above_further, below_further) = changes(1e-8), changes(2e-8)
    measured = (above + below) / 2
    further = (above_further + below_further) / 2
    product = hessian_times(gradient, weights, v)
    allowed = 10 * (measured - further).norm() + (above - below).norm() + 1e-3 * product.norm()
    return not bool((measured - product).norm() > allowed)


ExactMode = Literal["reverse", "checkpointed", "forward"]


@dataclass(frozen=True)
class MemoryNeed:
    """The memory, in bytes, that one training needs for all its members.

    ``step`` is the memory of the graph of one step. ``state`` is the memory of one state
    (parameters and moments).
    """

    step: int
    state: int

    def of_modes(self, steps: int, hyperparameters: int) -> dict[ExactMode, int]:
        """Return the bytes of each mode.

        Reverse mode holds the graphs of all steps. Checkpointed reverse mode holds the graphs of
        one block of sqrt(T) steps, and one state per block. Forward mode holds the graph of one
        step and, in the update rule, four times the tangents.
        """
        block = math.isqrt(steps - 1) + 1
        return {
            "reverse": steps * self.step,
            "checkpointed": block * self.step + -(-steps // block) * self.state,
            "forward": self.step + 4 * (1 + hyperparameters) * self.state,
        }


def measure(problem: InnerProblem[InnerTraining]) -> MemoryNeed:
    """Take the first step once, and return the bytes that its graph and the state need."""
    leaves = {name: table.detach().requires_grad_() for name, table in problem.tables.items()}
    state = leaves_of(problem.start())
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Keep the tensor, so that its address cannot be reused and counted twice. Keep it detached:
        # otherwise the graph would hold itself, and Python's garbage collector cannot free that.
        kept[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.enable_grad():
        end = problem.step(state, 0, rows=rows_of(leaves, problem.training.layer), graph=True)
    for tensor in end:
        pack(tensor)
    step = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return MemoryNeed(step, sum(tensor.nbytes for tensor in end))


def free_bytes(device: torch.device) -> int:
    """Return the bytes that may be used on a device: 80% of the free memory."""
    return int(0.8 * (free_of_gpu(device) if device.type == "cuda" else free_memory()))


def fastest_that_fits(
    sizes: Mapping[ExactMode, int], budget: int, *, hyperparameters: int
) -> ExactMode:
    """Return the fastest mode that fits into ``budget`` bytes, or "forward" if no mode fits.

    For one hyperparameter forward mode is about as fast as reverse mode, and its memory does not
    grow with the number of steps.
    """
    modes: tuple[ExactMode, ...] = ("forward", "reverse", "checkpointed")
    modes = modes if hyperparameters == 1 else modes[1:]
    return next((mode for mode in modes if sizes[mode] <= budget), "forward")
