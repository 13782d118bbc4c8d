"""A tuned model as one torch module, from the numbers of a row to its answer: what an export writes."""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gputune.data.columns import convert
from gputune.data.normal_scores import normal_scores_of
from gputune.data.table import Table
from gputune.engine.stateless import Stateless
from gputune.study.model import TunedModel

CLASS_OUTPUTS, VALUE_OUTPUTS = ("label", "probabilities"), ("prediction",)


class WholeModel(nn.Module):
    """Missing values, scaling, quantiles, the network, and probabilities or the target's units, in one module.

    Shape: ``(n, C)`` float64 -> (label (n,) int64, probabilities (n, K) float64), or prediction (n,) float64.
    The C numbers of a row are its columns where all of them are numbers or booleans, NaN where one is missing; else
    the features of ``Layout.raw``, since text and dates are no tensors.
    """

    fill: Tensor
    center: Tensor
    scale: Tensor
    quantiles: Tensor
    source: Tensor
    indicator: Tensor
    target_center: Tensor
    target_scale: Tensor

    def __init__(self, model: TunedModel) -> None:
        super().__init__()
        self.network = _copy(model.module).cpu().eval()
        self.dtype, self.classes = model.dtype, model.classes is not None
        # Buffers, since a plain number would be written in single precision.
        self.register_buffer("target_center", torch.tensor(model.center, dtype=torch.float64))
        self.register_buffer("target_scale", torch.tensor(model.scale, dtype=torch.float64))
        statistics = model.statistics
        for name in ("fill", "center", "scale", "quantiles"):
            self.register_buffer(name, torch.tensor(getattr(statistics, name)))
        self.ranked = statistics.ranked.tolist()
        columns = model.layout.columns
        self.from_columns = takes_columns(model)
        if self.from_columns:
            source = [i for i, column in enumerate(columns) for _ in column.feature_names]
            indicator = [k >= len(c.parts) for c in columns for k, _ in enumerate(c.feature_names)]
        else:
            source, indicator = list(range(len(model.layout.feature_names))), [False]
        self.register_buffer("source", torch.tensor(source))
        self.register_buffer("indicator", torch.tensor(indicator))

    def forward(self, X: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        # torch.export refuses a forward that keeps activations in its module.
        with Stateless(self.network).holding({}) as network:
            output: Tensor = network(self._features(X).to(self.dtype)).double()
        if not self.classes:
            return output.reshape(-1) * self.target_scale + self.target_center
        return output.argmax(1), output.softmax(1)

    def _features(self, X: Tensor) -> Tensor:
        """Return the features as the network sees them, (n, D): what ``Layout.raw`` and ``transform`` give."""
        x = X[:, self.source] if self.from_columns else X
        missing = x.isnan()
        x = torch.where(missing, self.fill, x)
        if self.from_columns:
            x = torch.where(self.indicator, missing.double(), x)
        scaled = (x - self.center) / self.scale
        if not self.ranked:
            return scaled
        return scaled.index_copy(
            1, torch.tensor(self.ranked), normal_scores_of(x[:, self.ranked], self.quantiles)
        )


def _copy(module: nn.Module) -> nn.Module:
    """Return a deep copy; activations that a forward kept lose their graph, with which torch does not copy them."""
    held = [value for part in module.modules() for value in vars(part).values()]
    held += [member for value in held if isinstance(value, dict) for member in value.values()]
    held += [member for value in held if isinstance(value, list) for member in value]
    return copy.deepcopy(module, {id(v): v.detach() for v in held if isinstance(v, Tensor) and not v.is_leaf})


def takes_columns(model: TunedModel) -> bool:
    """Whether an exported model takes the columns themselves, all of which are numbers or booleans."""
    return all(column.kind in ("number", "boolean") for column in model.layout.columns)


def encoded(model: TunedModel, table: Table) -> np.ndarray:
    """Return (n, C) float64, what an exported model takes of these rows."""
    features = model.layout.raw(table)  # it checks the columns, also where only some of it is wanted
    if not takes_columns(model):
        return features
    columns = model.layout.columns
    return np.stack(
        [convert(table.column(c.name), table.kind(c.name), c).astype(np.float64) for c in columns], axis=1
    )


def description(model: TunedModel) -> dict[str, Any]:
    """Return what must be known of the inputs and outputs, as plain JSON."""
    columns = takes_columns(model)
    names = [column.name for column in model.layout.columns] if columns else model.layout.feature_names
    return {
        "inputs": "columns" if columns else "features",
        "names": list(names),
        "columns": [column.to_json() for column in model.layout.columns],
        "outputs": list(CLASS_OUTPUTS if model.classes is not None else VALUE_OUTPUTS),
        "task": model.task,
        "target": model.target,
        "classes": None if model.classes is None else model.classes.tolist(),
    }
