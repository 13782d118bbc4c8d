"""A source made ready to train on: target, column layout, encoded rows, folds, and the data on one device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gputune.data.dataset import Dataset, Rows, make_dataset
from gputune.data.encode import Columns, Layout, Statistics, fit_layout
from gputune.data.source import Source
from gputune.data.table import quoted
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
    columns: Columns = "drop-constant"

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

    def columns_in_words(self) -> str:
        """Say which columns are no feature, or several, for messages about shapes; "" where there are none."""
        used = {column.name: len(column.feature_names) for column in self.layout.columns}
        lost = [name for name in self.layout.inputs if name not in used]
        wide = [name for name, features in used.items() if features > 1]
        parts = [f"{quoted(lost)} left out"] * bool(lost) + [f"{quoted(wide)} several features each"] * bool(
            wide
        )
        if not parts:
            return ""
        remedy = "" if self.columns == "keep" else "; columns 'keep' leaves numbers and booleans as they are"
        return (
            f" Of the {len(self.layout.inputs)} columns of X, which are {sum(used.values())} features, "
            f"{' and '.join(parts)}{remedy}."
        )


def make_problem(source: Source, task: Any, choice: ModelChoice, columns: str = "auto") -> Problem:
    """Check the target, fix the column layout and encode the rows.

    ``columns`` "auto" is "keep" for a user's module, which may count on their number and order.
    """
    target = check_target(source.y, task=task, n_rows=len(source.X), name=source.target)
    if choice.solved and target.task == "regression":
        raise InputError(
            "model='logistic' solved with optimizer='exact' predicts classes, and the target is a number: choose "
            "model='mlp', or optimizer='adamw' for a linear regression."
        )
    how: Columns = "drop-constant"
    if columns == "keep" or (columns == "auto" and choice.kind == "module"):
        how = "keep"
    layout = fit_layout(source.X, columns=how)
    return Problem(source, target, layout, layout.raw(source.X), how)
