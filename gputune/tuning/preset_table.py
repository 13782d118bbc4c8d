"""The table of presets: named choices of model, portfolio, epochs and final model for a table.

This file imports nothing slow, because ``gputune --help`` reads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

ModelName = Literal["mlp", "realmlp"]


@dataclass(frozen=True)
class Preset:
    """The choices of a preset.

    Attributes:
        help: What the preset is for, a noun phrase.
        model: The model.
        n_trials: The number of trials.
        epochs: The fewest and the most epochs.
        row_epochs: The number of epochs times the number of rows, without a timeout of the user. More
            rows get fewer epochs.
        large_space: The named space for tables of more than 10,000 rows. "": the space that has the
            name of the model.
        faster: The preset that replaces this one if the timeout is too short, or "".
        patience: Epochs without a better score after which a trial ends, or None.
        timeout: The seconds after which the training stops if the user sets no timeout, or None.
        ensemble: Whether the final model is an ensemble of the trials.
    """

    help: str
    model: ModelName
    n_trials: int
    epochs: tuple[int, int]
    row_epochs: int
    large_space: str = ""
    faster: str = ""
    patience: int | None = None
    timeout: float | None = None
    ensemble: bool = True

    def epochs_for(self, rows: int) -> int:
        """Return the number of epochs for a table with this number of rows."""
        fewest, most = self.epochs
        return min(most, max(fewest, self.row_epochs // rows))


PRESETS: Mapping[str, Preset] = {
    # RealMLP's authors train for 256 epochs. A short patience costs accuracy, because the learning
    # rate rises four times.
    "best": Preset(
        "RealMLP, its portfolio and an ensemble",
        "realmlp",
        n_trials=8,
        epochs=(16, 256),
        row_epochs=5_000_000,
        large_space="realmlp-large",
        faster="medium",
    ),
    "medium": Preset(
        "an MLP, its portfolio and an ensemble, in about a tenth of the time",
        "mlp",
        n_trials=24,
        epochs=(10, 100),
        row_epochs=1_000_000,
        faster="fast",
        patience=16,
    ),
    "fast": Preset(
        "an MLP and its portfolio, within a minute",
        "mlp",
        n_trials=8,
        epochs=(4, 50),
        row_epochs=100_000,
        timeout=20,
        ensemble=False,
    ),
}
"""The presets by name. AutoGluon has presets of the same names, except "fast"."""

ALIASES = {"best_quality": "best", "medium_quality": "medium"}
"""Longer names of presets, as in AutoGluon."""
