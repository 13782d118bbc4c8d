"""The training state of trials between two epochs, and their positions in a chunk.

A chunk holds trials of one tensor shape that train together. A member is one trial on one fold.
Shape letters: C trials, F folds, N values of one member.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from gputune.ground.types import Config
from gputune.population.kinds import hidden_layers
from gputune.population.population import Network, shape_of_tensors

_UNKNOWN = -1  # the step count of a state from a file that stores no counts


class WaitingPlace(Protocol):
    """Tensors in which trials have trained, and in which their states wait."""

    nbytes: int


@dataclass(frozen=True)
class State:
    """Parameters and optimizer state of some trials after ``epoch`` epochs.

    ``buffers`` are (C, F, N), with the parameters first. C counts only these trials, without the
    trials of a chunk that no longer train. Index c of all buffers holds everything about trial c.
    Trials can therefore be stored, sent to other processes and regrouped.

    ``steps`` (C, F) counts the optimizer steps that each member has taken. A count differs from the
    epochs times the steps of an epoch if the batch size has changed. None means that the batch
    sizes never changed.
    """

    epoch: int
    buffers: tuple[Tensor, ...]
    steps: Tensor | None = None

    @staticmethod
    def of(
        network: Network, flat: Tensor, moments: Sequence[Tensor], epoch: int, steps: np.ndarray
    ) -> "State":
        """Return the state of all members of a network as rows, from their flat buffers."""
        buffers = [network.blocks.to_rows(flat), *map(network.trained.to_rows, moments)]
        return State(epoch, tuple(buffers), State.counts(steps))

    @staticmethod
    def counts(steps: np.ndarray) -> Tensor:
        """Return step counts (C, F) in the form in which a state holds them."""
        return torch.from_numpy(steps)

    @property
    def nbytes(self) -> int:
        """Memory of the parameters and optimizer states of these trials, in bytes."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def flat_buffers(self, network: Network) -> list[Tensor]:
        """Return the flat buffers of a network of these trials: the parameters, then the
        moments."""
        flat, *moments = (rows.to(network.shape.device) for rows in self.buffers)
        return [network.blocks.from_rows(flat), *map(network.trained.from_rows, moments)]

    def lag(self, steps_per_epoch: np.ndarray) -> np.ndarray:
        """Return how many steps each member would have taken more at its present batch size,
        (F, C).

        ``steps_per_epoch`` (F, C) belongs to the present batch sizes. The result is 0 for a member
        that always had its present batch size.
        """
        if self.steps is None:
            return np.zeros_like(steps_per_epoch)
        taken = self.steps.cpu().numpy().T
        return np.where(taken == _UNKNOWN, 0, self.epoch * steps_per_epoch - taken)

    def cpu(self) -> "State":
        """Return the same state in main memory."""
        return State(self.epoch, tuple(buffer.cpu() for buffer in self.buffers), self.steps)

    def select(self, slots: Sequence[int]) -> "State":
        """Return a copy of the parameters and optimizer states of only the trials at the positions
        ``slots``. A position may occur several times."""
        rows = list(slots)
        steps = None if self.steps is None else self.steps[rows]
        return State(self.epoch, tuple(buffer[rows] for buffer in self.buffers), steps)

    @staticmethod
    def stack(states: "Sequence[State]") -> "State":
        """Join the states of several groups of trials into one state. The states must have the same
        epoch and tensor shape."""
        if (joined := states[0].joined(states)) is not None:
            return joined
        buffers = zip(*(state.buffers for state in states))
        steps = None
        if any(state.steps is not None for state in states):
            steps = torch.cat([state._known_steps() for state in states])
        return State(states[0].epoch, tuple(map(torch.cat, buffers)), steps)

    @property
    def place(self) -> "WaitingPlace | None":
        """The tensors of the chunk in which the trials wait, or None if the state is a copy."""
        return None

    def joined(self, states: "Sequence[State]") -> "State | None":
        """Return the joint state of several groups of trials if it needs no copy, or None."""
        del states
        return None

    def _known_steps(self) -> Tensor:
        """Return the step counts (C, F), with a mark for each count that is not known."""
        if self.steps is not None:
            return self.steps
        return torch.full(self.buffers[0].shape[:2], _UNKNOWN)


@dataclass(frozen=True)
class Selection:
    """The trials of a chunk that train on, and the state from which each of them continues.

    Args:
        trials: Positions, among the trials that now train, of the trials that train on. The scores
            of a trial's later epochs go to its own curve.
        slots: For each of these trials, the position of the trial whose state it takes: parameters,
            moments, step counts and running statistics, on each fold those of the same fold. A
            position may occur several times. None: each trial keeps its own state.
        configs: The new configuration of each trial, or None for a trial that keeps the
            configuration of its slot. None: no configuration changes.
    """

    trials: tuple[int, ...]
    slots: tuple[int, ...] | None = None
    configs: tuple[Config | None, ...] | None = None

    @classmethod
    def of_mask(cls, stays: np.ndarray) -> Self:
        """Return the selection of the trials that a mask (C,) marks with True."""
        return cls(tuple(np.flatnonzero(stays).tolist()))


def selected_configs(
    network: Network, slots: Sequence[int], configs: Sequence[Config | None] | None
) -> list[Config]:
    """Return the configurations of a chunk after ``select(slots, configs)``.

    Raises ValueError if a trial cannot continue from the state of its slot: its tensors must have
    the same shapes, and its optimizer the same buffers.
    """
    selected = [network.configs[slot] for slot in slots]
    for position, (before, after) in enumerate(zip(selected, configs or [])):
        if after is None or after is before:
            continue
        selected[position] = after
        if _tensors_of(before, network, after) != _tensors_of(after, network, after):
            raise ValueError(
                f"the configuration {after} cannot continue from the state of the configuration "
                f"{before}, because its tensors or its minibatches have other shapes"
            )
    return selected


def _tensors_of(config: Config, network: Network, after: Config) -> object:
    """Return a lookup key for the tensors of a trial and for the shapes of its minibatches.

    Built-in models may change the batch size and the dropout rate, also from and to 0.
    """
    shape = shape_of_tensors({**config, "dropout": after["dropout"]}, network.kind)
    widths = hidden_layers(config, network.kind)
    return shape, widths, config["batch_size"] if network.exact else None
