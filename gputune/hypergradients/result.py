"""What a hypergradient is returned as, and when it is noise or there is none.

Training at too large a rate is chaotic, and its slope says nothing.

There a change of the weights grows at every step, the hypergradient with it (to 1e30 and beyond), while the
validation loss may still look harmless. Forward mode sees the growth in the tangent ratio, the largest
|d weights / d log hyperparameter| / |weights| of any step; reverse mode in its transpose, how much larger a relative
change of the weights weighs in the validation loss before some step than after the last. Metz et al. (2021,
arXiv:2111.05803) describe the effect.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gputune.errors import InputError
from gputune.types import Params

CHAOTIC = 100.0
"""Ratio above which a hypergradient is taken for noise.

Measured on a 10-32-32-3 tanh network over 300 steps: up to 20, finite differences in double precision agree to 1e-6;
from some hundreds on they differ from 1e-3 to 1, and single from double precision as much.
"""


@dataclass(frozen=True)
class Hypergradients:
    """What one training gave, per member: the validation loss ``value`` (P,) after it, and its derivatives.

    ``gradients`` has a (P, S, L) table for each hyperparameter that was asked for. ``ratio`` (P,) tells noise from
    slope. ``weights`` (P, N) are the parameters after the last step.
    """

    value: Tensor
    gradients: Params
    ratio: Tensor
    weights: Tensor


@dataclass(frozen=True, eq=False)
class HypergradientResult:
    """The validation loss after training, and its derivatives.

    value         the validation loss
    gradient      hyperparameter -> d value / d hyperparameter, in the shape that the hyperparameter was given in
    log_gradient  the same times the hyperparameter: d value / d log hyperparameter
    parameters    name -> parameter after the last step
    ratio         by how much training amplifies a small change: above ``CHAOTIC`` (100) the gradient is noise
    mode          "reverse", "forward", "fd" or "implicit": how the gradient was taken
    reason        why that mode
    """

    value: float
    gradient: Params
    log_gradient: Params
    parameters: Params
    ratio: float
    mode: str
    reason: str

    def __repr__(self) -> str:
        slopes = ", ".join(
            f"{name}: {slope.item():.4g}" if slope.dim() == 0 else f"{name}: {tuple(slope.shape)}"
            for name, slope in self.gradient.items()
        )
        noise = ", chaotic" if self.chaotic else ""
        return (
            f"HypergradientResult(value {self.value:.4g}, gradient {{{slopes}}}, ratio {self.ratio:.3g}{noise}, "
            f"{self.mode})"
        )

    @property
    def chaotic(self) -> bool:
        """Whether training amplifies changes so much that the gradient is noise."""
        return not self.ratio <= CHAOTIC


def check_classes(fold: int, valid: Iterable[Any], train: Iterable[Any], *, weighed: bool = False) -> None:
    """Raise InputError where the validation rows of a fold have a class of which it trains on no row.

    ``valid`` and ``train`` are labels; ``weighed``: the latter are those of training rows with a weight above 0.
    """
    if lacking := set(valid) - set(train):
        weighing = " with sample_weight above 0" if weighed else ""
        raise InputError(
            f"cv: the validation rows of fold {fold} have class {sorted(lacking)[0]!r}, of which it has no "
            f"training row{weighing}: its log loss is infinite at every point of a descent. Use stratified folds, "
            "fewer of them, or leave the class out."
        )
