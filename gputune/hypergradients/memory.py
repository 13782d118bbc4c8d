"""How much memory a hypergradient will need, measured on one step before the training starts."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gputune.hypergradients.inner import (
    Tables,
    Training,
    active_rows,
    first_state,
    rates_at,
    rows_of,
    slope,
    update,
)
from gputune.memory import free_memory

_SHARE = 0.8  # of the memory that is free


@dataclass(frozen=True)
class Need:
    """Bytes of one step's graph and of one state (parameters and moments), of all members."""

    step: int
    state: int

    def reverse(self, steps: int) -> int:
        """Bytes of going back through so many steps."""
        return steps * self.step

    def checkpointed(self, steps: int) -> int:
        """Bytes of going back through so many steps, blocks of sqrt(T) at a time."""
        block = math.isqrt(steps - 1) + 1
        return block * self.step + -(-steps // block) * self.state

    def forward(self, hyperparameters: int) -> int:
        """Bytes of carrying tangents along, for any number of steps: in the update rule, four times the tangents."""
        return self.step + 4 * (1 + hyperparameters) * self.state

    def longest(self, budget: int) -> int:
        """The number of steps that can be gone back through within so many bytes."""
        return budget // self.step


def measure(training: Training, optimizer: str, tables: Tables) -> Need:
    """Take the first step once and count what its graph keeps."""
    leaves = {name: table.detach().requires_grad_() for name, table in tables.items()}
    state = first_state(training, optimizer).leaves()
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Held, so that no address comes up twice; detached, or the graph would hold itself, beyond Python's collector.
        kept[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.enable_grad():
        gradient = slope(training, state.weights, 0, graph=True)
        clock = training.clock(0)
        rates = rates_at(rows_of(leaves, training.layer), clock, training.totals)
        end = update(optimizer, state, gradient, rates, active_rows(clock, gradient))
    for tensor in (end.weights, *end.moments):
        kept[tensor.untyped_storage().data_ptr()] = tensor.detach()
    step = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return Need(step, sum(tensor.nbytes for tensor in (end.weights, *end.moments)))


def free_bytes(device: torch.device) -> int:
    """Return the bytes that may be used on a device: most of what is free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(_SHARE * free)
    return int(_SHARE * free_memory())


def fastest_that_fits(
    need: Need, budget: int, *, steps: int, hyperparameters: int
) -> Literal["forward", "reverse", "checkpointed"]:
    """Return the mode for these steps and hyperparameters; "forward" where not even that may fit.

    With one hyperparameter forward mode is about as fast as reverse mode, with memory that does not grow.
    """
    if hyperparameters > 1:
        if need.reverse(steps) <= budget:
            return "reverse"
        if need.checkpointed(steps) <= budget:
            return "checkpointed"
    return "forward"
