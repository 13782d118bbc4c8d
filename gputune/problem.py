"""A source made ready to train on: target, column layout, encoded rows, folds, and the data on one device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gputune.data.dataset import Dataset, Rows, make_dataset
from gputune.data.encode import Layout, Statistics, fit_layout
from gputune.data.source import Source
from gputune.data.target import Target, check_target
from gputune.errors import InputError
from gputune.model_choice import ModelChoice
from gputune.options import Options

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, eq=False)
class Problem:
    """Rows and target of a source, encoded; statistics are not fitted yet, since they belong to folds."""

    source: Source
    target: Target
    layout: Layout
    raw: np.ndarray | Tensor

    def dataset(
        self, folds: Sequence[Rows], options: Options, choice: ModelChoice
    ) -> tuple[Dataset, tuple[Statistics, ...]]:
        """Return the data of some folds on the device, and the statistics of each fold."""
        # The solver's tolerance lies beyond single precision.
        dtype = torch.float64 if choice.solved else DTYPES[options.dtype]
        device = self.raw.device if isinstance(self.raw, Tensor) and options.device == "auto" else None
        return make_dataset(
            self.raw,
            self.layout,
            self.target,
            folds,
            numbers=options.numbers,
            sample_weight=options.sample_weight,
            class_weight=options.class_weight,
            dtype=dtype,
            device=device or options.device_here(),
        )


def make_problem(source: Source, task: Any, choice: ModelChoice) -> Problem:
    """Check the target, fix the column layout and encode the rows."""
    target = check_target(source.y, task=task, n_rows=len(source.X), name=source.target)
    if choice.solved and target.task == "regression":
        raise InputError(
            "model='logistic' solved with optimizer='exact' predicts classes, and the target is a number: choose "
            "model='mlp', or optimizer='adamw' for a linear regression."
        )
    layout = fit_layout(source.X)
    return Problem(source, target, layout, layout.raw(source.X))
