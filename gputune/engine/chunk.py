"""The protocol of a chunk: trials of one tensor shape that train together, in one backend."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from gputune.ground.types import Config
from gputune.population.population import Network
from gputune.population.state import State
from gputune.scoring.validation import Validation


class Chunk(Protocol):
    """Trials that train together. A member is one trial on one fold. No method mixes members.

    All tensors and scores hold only the trials that train now, C in number.
    """

    validation: Validation  # has the outputs of the last scores
    epoch: int  # epochs that the members have trained

    @property
    def network(self) -> Network:
        """The stacked model of the trials that train now."""

    @property
    def flat(self) -> Tensor:
        """Flat tensor with the parameters and buffers of all members."""

    @property
    def scored(self) -> Tensor:
        """Flat tensor with the weights that gputune scores and saves: the parameters, or their
        moving average."""

    @property
    def moments(self) -> tuple[Tensor, ...]:
        """Flat tensors with the optimizer's moments."""

    @property
    def steps_taken(self) -> np.ndarray:
        """Number of optimizer steps that each member has taken, (C, F)."""

    @property
    def scoring_share(self) -> float:
        """Fraction of the training time of ``advance`` that computing the outputs on the validation
        rows took."""

    @property
    def holds_only_state(self) -> bool:
        """True if the chunk takes little memory in addition to the state of its trials."""

    @property
    def faults(self) -> Mapping[str, None]:
        """Problems that did no harm: sentences, as an ordered set."""

    def advance(self, epoch: int) -> None:
        """Train all members. ``epoch`` is the number of epochs that they have trained."""

    def scores(self) -> np.ndarray:
        """Return the scores of all members on the validation rows of their folds, (C, F). With
        several metrics, a last axis has the metrics."""

    def select(self, slots: Sequence[int], configs: Sequence[Config | None] | None = None) -> None:
        """Replace the trials, in place on the device.

        The new trial i continues from the state of the trial at the position ``slots[i]``, on each
        fold from the state of the same fold. A position may occur several times. At least one trial
        stays.

        Args:
            slots: Positions among the trials that train now.
            configs: The new configuration of each new trial, or None to keep the configuration of
                its slot. None: no configuration changes.

        Raises:
            ValueError: A new configuration needs other tensors.
        """

    def release(self) -> None:
        """Free memory that the next ``advance`` or ``scores`` allocates again."""

    @property
    def state(self) -> State:
        """A copy of the training state, from which ``resume`` continues."""

    def resume(self, state: State) -> None:
        """Continue from the state of the same trials."""
