"""Check a training run before gputune differentiates it: its second derivatives and the memory.

gputune tests second derivatives on the first minibatch, because PyTorch often returns wrong second
derivatives without an error. It measures the memory on one step.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from gputune.ground.device import free_of_gpu
from gputune.ground.errors import InputError, Verbatim, option
from gputune.ground.memory import free_memory
from gputune.ground.seeding import stream
from gputune.ground.types import Config
from gputune.hypergradients.inner import (
    BETWEEN_0_AND_1,
    AnyProblem,
    InnerTraining,
    hessian_times,
    leaves_of,
    rows_of,
    slope,
    to_coordinate,
)
from gputune.optimizers.classes import OPTIMIZER_PREFIX
from gputune.population.population import beyond_adam

HYPERPARAMETERS_OF = {
    **dict.fromkeys(("sgd", "nesterov"), ("lr", "momentum", "weight_decay")),
    **dict.fromkeys(("adam", "adamw"), ("lr", "weight_decay", "beta1", "beta2")),
}

_FINITE_DIFFERENCES = "call gputune.hypergradient with mode='fd'."


def check_start(config: Config, name: str, start: str, *, argument: str, remedy: str = "") -> None:
    """Raise InputError if a hypergradient search cannot start from a configuration.

    The search must be able to differentiate with respect to the hyperparameter ``name``. ``config``
    is the starting configuration, and ``start`` is its name in errors. ``argument`` is the argument
    that chose the hyperparameter. ``remedy`` is advice other than changing the configuration. It
    ends a sentence, as in ", or use RandomizedSearchCV".
    """
    optimizer = config["optimizer"]
    unsupported = [key for key in config if key.startswith(OPTIMIZER_PREFIX)]
    if config["clip_norm"] < math.inf:
        unsupported.append("clip_norm")
    unsupported += [key for key in beyond_adam(config) if key != "beta2"]
    if config["ema"]:
        unsupported.append("ema")
    change = "Leave it out"
    if optimizer not in HYPERPARAMETERS_OF:
        unsupported = ["optimizer"]
        change = f"Choose one of {', '.join(HYPERPARAMETERS_OF)}"
    if unsupported:
        key = unsupported[0]
        owner = f"{start} has"
        if key.startswith(OPTIMIZER_PREFIX):
            owner = f"{start} passes to a class of torch.optim"
        raise InputError(
            None,
            "A hypergradient search cannot differentiate "
            f"{option(key, config[key])}, which {owner}",
            remedy=f"{change}{remedy}.",
        )
    if name not in HYPERPARAMETERS_OF[optimizer]:
        raise InputError(
            argument,
            f"must be some of {', '.join(HYPERPARAMETERS_OF[optimizer])} for {optimizer}, which "
            f"{start} uses",
            got=name,
            remedy=f"Leave the name out, or use an optimizer that has {name!r}.",
        )


def check_coordinate(name: str, value: float, start: str, *, called: str, space: str) -> None:
    """Check that the logarithm (or logit) of a starting value is finite.

    A hypergradient search cannot move away from values such as 0 or infinity. The function raises
    InputError for such values. ``start`` is the name of the starting configuration. Errors name the
    hyperparameter ``called`` and the space ``space``.
    """
    number = torch.tensor(float(value), dtype=torch.float64, device="cpu")
    if not math.isfinite(to_coordinate(name, number)):
        coordinate = "logit" if name in BETWEEN_0_AND_1 else "logarithm"
        valid = "finite values above 0" if name == "C" else "values above 0"
        raise InputError(
            None,
            f"A hypergradient search cannot start from {option(called, value)}, as {start} does, "
            f"because it moves the {coordinate}",
            remedy=f"Put {called!r} in {space} with {valid}, or leave it out of "
            f"{option('hyperparameters')}.",
        )


def check_classes(
    fold: int, valid: Iterable[str | float], train: Iterable[str | float], *, weighed: bool = False
) -> None:
    """Check that each class in the validation rows of a fold also occurs in its training rows.

    Raises InputError otherwise. ``valid`` and ``train`` are labels. With ``weighed``, ``train`` has
    only the labels of training rows whose weight is above 0.
    """
    lacking = set(valid) - set(train)
    if lacking:
        weighing = " with sample_weight above 0" if weighed else ""
        raise InputError(
            "cv",
            f"must give each fold a training row{weighing} for every class in its validation rows",
            got=Verbatim(f"none of class {sorted(lacking)[0]!r} in fold {fold}"),
            remedy="The log loss of this fold is always infinite. Use stratified folds, fewer "
            "folds, or leave the class out.",
        )


@contextmanager
def twice_differentiable(training: InnerTraining) -> Iterator[None]:
    """Raise InputError if PyTorch cannot differentiate a training run twice.

    The context manager tests the first minibatch at its start. If torch fails inside the ``with``
    block for the same reason, it raises the same InputError.
    """
    try:
        _check_second_derivatives(training)
        yield
    except RuntimeError as error:
        message = str(error).split("\n")[0]
        if not re.search("derivative for|differentiate twice|double backward", message.lower()):
            raise
        remedy = "Replace it"
        if "scaled_dot_product" in message:
            remedy = "Run it inside torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        raise InputError(
            "module or loss",
            f"has an operation that cannot be differentiated twice ({message.rstrip('.')})",
            remedy=f"{remedy}, or {_FINITE_DIFFERENCES}",
        ) from error


def nodes(tensor: Tensor) -> set[Node]:
    """Return the autograd nodes of all operations that computed a tensor."""
    graph: set[Node] = set()
    waiting = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in graph:
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
    # not reach this node, because the node is on no path to the weights. So this searches the
    # graph.
    missing = any(type(node).__name__ == "Error" for node in nodes(gradient))
    if (
        not missing
        and _symmetric(gradient, weights, v)
        and _agrees_with_difference(training, gradient, weights, v)
    ):
        return
    # Operations without a second derivative, and the user's own autograd functions.
    suspects = set[str]()
    for node in nodes(training.losses(weights, 0)):
        name = type(node).__name__
        if isinstance(node, BackwardCFunction) or "WeightNorm" in name:
            suspects.add(name.removesuffix("0").removesuffix("Backward"))
    shown = f" ({', '.join(sorted(suspects))})" if suspects else ""
    raise InputError(
        "module or loss",
        f"has an operation that cannot be differentiated twice{shown}: torch's second derivative "
        "is incomplete. The usual causes are weight_norm, a .detach() of a tensor that depends on "
        "the parameters, and an autograd.Function whose backward has no derivative",
        remedy=f"Replace it, or {_FINITE_DIFFERENCES}",
    )


def _symmetric(gradient: Tensor, weights: Tensor, v: Tensor) -> bool:
    """Return whether the Hessian that autograd computes is symmetric, as every Hessian must be.

    With the Hessian H and p = H'v, the products p'p and v'(H'p) are equal if H is symmetric. In
    single precision, rounding makes the products differ, but by far less than the tolerance. The
    tolerance is the cube root of the dtype's machine epsilon.
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
    """Return whether autograd's second derivative agrees with a finite difference of the gradient
    along ``v``.

    Differences over two tiny distances tell how accurate the measurement is. The two differences
    disagree if a kink (for example of a relu) lies between them, or if operations run in lower
    precision. The differences in the two directions disagree if the kink is at the weights
    themselves, as for a relu whose input is exactly 0. In single precision kinks are too close to
    each other for this comparison. In single precision, the result is therefore True without a
    measurement.
    """
    if weights.dtype != torch.float64:
        return True
    here = gradient.detach()
    start = weights.detach()
    # The padding of narrower members is 0 and stays 0. Moving it would put its relu at a kink.
    v = v.where((weights != 0) | (gradient != 0), 0)
    v *= (start.norm() / v.norm()).clamp_min(1e-3)

    def gradient_at(shift: float) -> Tensor:
        return slope(training, (start + shift * v).requires_grad_(), 0, graph=False)

    def changes(h: float) -> tuple[Tensor, Tensor]:
        return (gradient_at(h) - here) / h, (here - gradient_at(-h)) / h

    above, below = changes(1e-8)
    above_further, below_further = changes(2e-8)
    measured = (above + below) / 2
    further = (above_further + below_further) / 2
    product = hessian_times(gradient, weights, v)
    allowed = 10 * (measured - further).norm() + (above - below).norm() + 1e-3 * product.norm()
    return not bool((measured - product).norm() > allowed)


ExactMode = Literal["reverse", "checkpointed", "forward"]


@dataclass(frozen=True)
class MemoryNeed:
    """The bytes that one training run needs for all its members (trials on folds).

    ``step`` is the memory of the autograd graph of one step. ``state`` is the memory of the
    parameters and the optimizer's moments.
    """

    step: int
    state: int

    def of_modes(self, steps: int, hyperparameters: int) -> dict[ExactMode, int]:
        """Return the bytes of memory that each mode of differentiation needs for T = ``steps``
        steps.

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


def measure(problem: AnyProblem) -> MemoryNeed:
    """Take the first training step, and return the bytes that its autograd graph and the training
    state need."""
    leaves = {name: table.detach().requires_grad_() for name, table in problem.tables.items()}
    state = leaves_of(problem.start())
    stored: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Keep the tensor, so that its address cannot be reused and counted twice. Keep it detached:
        # otherwise the graph would hold itself, and Python's garbage collector cannot free that.
        stored[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.enable_grad():
        end = problem.step(state, 0, rows=rows_of(leaves, problem.training.layer), graph=True)
    for tensor in end:
        pack(tensor)
    step = sum(tensor.untyped_storage().nbytes() for tensor in stored.values())
    return MemoryNeed(step, sum(tensor.nbytes for tensor in end))


def free_bytes(device: torch.device) -> int:
    """Return the number of bytes that gputune may use on a device: 80% of the free memory."""
    return int(0.8 * (free_of_gpu(device) if device.type == "cuda" else free_memory()))


def fastest_that_fits(
    sizes: Mapping[ExactMode, int], budget: int, *, hyperparameters: int
) -> ExactMode:
    """Return the fastest mode of differentiation that fits into ``budget`` bytes, or "forward" if
    no mode fits.

    For one hyperparameter forward mode is about as fast as reverse mode, and its memory does not
    grow with the number of steps.
    """
    modes: tuple[ExactMode, ...] = ("reverse", "checkpointed")
    if hyperparameters == 1:
        modes = ("forward", *modes)
    return next((mode for mode in modes if sizes[mode] <= budget), "forward")
