"""The steps of a class of torch.optim on the parameters of one member, and its state as rows as long as theirs."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from gputune.errors import InputError
from gputune.optimizers.classes import make_optimizer
from gputune.types import Config


class ClassRule:
    """A ``RowRule`` whose optimizer holds the parameters themselves, which are views of the row, as their gradients.

    Each tensor of a parameter's state lies at the parameter's place in a row of its own; a shorter one, such as the
    number of steps, has zeros behind it.
    """

    def __init__(self, config: Config, parameters: Sequence[Tensor]) -> None:
        self.config, self.parameters = config, list(parameters)
        self.optimizer = make_optimizer(config, self.parameters)

    def state(self) -> list[Tensor]:
        """Return a row of each tensor that the optimizer keeps for a parameter, most of them from its first step on."""
        kept = [list(_tensors(self.optimizer, w).values()) for w in self.parameters]
        return [
            torch.cat(
                [self._as_row(own[i] if i < len(own) else None, w) for own, w in zip(kept, self.parameters)]
            )
            for i in range(max(map(len, kept)))
        ]

    def _as_row(self, value: Tensor | None, parameter: Tensor) -> Tensor:
        row = parameter.new_zeros(0) if value is None else value.detach().flatten().to(parameter)
        if len(row) > parameter.numel():
            raise InputError(
                f"optimizer: torch.optim.{type(self.optimizer).__name__} keeps more numbers than a parameter of shape "
                f"{tuple(parameter.shape)} has, which no study holds; choose another."
            )
        return pad(row, (0, parameter.numel() - len(row)))

    def resume(self, rows: Sequence[Tensor]) -> None:
        """Go on from what ``state`` returned."""
        # What a state consists of, only a step tells: one of other tensors of the same shapes.
        others = [torch.zeros_like(w, requires_grad=True) for w in self.parameters]
        for other in others:
            other.grad = torch.zeros_like(other)
        made = make_optimizer(self.config, others)
        made.step()
        parts = [torch.split(row, [w.numel() for w in self.parameters]) for row in rows]
        for i, (parameter, other) in enumerate(zip(self.parameters, others)):
            for part, value in zip(parts, _tensors(made, other).values()):
                value.copy_(part[i][: value.numel()].view(value.shape))
            self.optimizer.state[parameter] = made.state[other]

    def step(self, theta: Tensor, grad: Tensor, rate: float, count: int) -> None:
        """Take one step at a rate; how many there were, the optimizer counts itself."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def scored(self, theta: Tensor) -> Tensor:
        """Return the row itself."""
        return theta


def _tensors(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return what an optimizer keeps for a parameter."""
    state = optimizer.state.get(parameter, {})
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}
