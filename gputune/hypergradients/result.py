"""What hypergradient() returns."""

from dataclasses import dataclass

from gputune.hypergradients.guard import CHAOTIC
from gputune.types import Params


@dataclass(frozen=True, eq=False)
class HypergradientResult:
    """The validation loss after training, and its derivatives.

    value         the validation loss
    gradient      hyperparameter -> d value / d hyperparameter, in the shape that the hyperparameter was given in
    log_gradient  the same times the hyperparameter: d value / d log hyperparameter
    parameters    name -> parameter after the last step
    ratio         by how much training amplifies a small change: above ``guard.CHAOTIC`` (100) the gradient is noise
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
