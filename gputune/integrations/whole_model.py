"""A tuned model with its preprocessing as one module, traced by ``torch.export``.

The formats of ``exports/`` write this module.
"""

import copy
import io
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import torch
from torch import Tensor, nn

from gputune.data.arrays import ArrayStatistics
from gputune.data.columns import Layout
from gputune.data.encode import Statistics, normal_scores_of, smooth_clip
from gputune.ground.errors import InputError
from gputune.modules.calls import Stateless
from gputune.population.outputs import call_module, class_logits, first_output, in_mode
from gputune.study.export import description, takes_columns
from gputune.study.model_files import ModelContent

_TALKATIVE = (
    "torch.onnx",
    "torch.export",
    "torch._export",
    "torch.fx.experimental.symbolic_shapes",
)
"""Loggers of torch's exporters. gputune hides their messages."""


class TableInputs(nn.Module):
    """The preprocessing of a table as a module: missing values, scaling, quantiles and bins.

    Shape letters: n rows, C inputs, D features.

    Shape: (n, C) float64 -> (n, D) float64, the features.

    If all columns are numeric or boolean, the C inputs are the columns, NaN for a missing value.
    Otherwise the C inputs are the features of ``Layout.raw``, because text and dates cannot be
    tensors.
    """

    fill: Tensor
    center: Tensor
    scale: Tensor
    quantiles: Tensor
    least: Tensor
    most: Tensor
    source: Tensor
    indicator: Tensor

    def __init__(self, layout: Layout, statistics: Statistics) -> None:
        super().__init__()
        for name in ("fill", "center", "scale", "quantiles", "least", "most"):
            self.register_buffer(name, torch.tensor(getattr(statistics, name)))
        self.ranked = statistics.ranked.tolist()
        self.clipped = statistics.clipped.tolist()
        self.places = statistics.places.tolist()
        self.from_columns = takes_columns(layout)
        # For each feature, the position of its column, and whether it marks missing values.
        source = []
        indicator = []
        for position, column in enumerate(layout.columns):
            for feature in range(len(column.feature_names)):
                source.append(position)
                indicator.append(feature >= len(column.parts))
        self.register_buffer("source", torch.tensor(source))
        self.register_buffer("indicator", torch.tensor(indicator))

    def forward(self, X: Tensor) -> tuple[Tensor, ...]:
        # (n, C) -> (n, features): an indicator of missing values repeats its column
        x = X[:, self.source] if self.from_columns else X
        missing = x.isnan()
        x = torch.where(missing, self.fill, x)
        if self.from_columns:
            x = torch.where(self.indicator, missing.double(), x)
        # (n, features) -> (n, D): a feature with bins is repeated once per bin
        x = x[:, self.places] if self.places else x
        scaled = (x - self.center) / self.scale
        if self.least.numel():
            scaled = torch.minimum(torch.maximum(scaled, self.least), self.most)
        if self.clipped:
            clipped = smooth_clip(scaled[:, self.clipped])
            scaled = scaled.index_copy(1, torch.tensor(self.clipped), clipped)
        if not self.ranked:
            return (scaled,)
        ranks = normal_scores_of(x[:, self.ranked], self.quantiles)
        return (scaled.index_copy(1, torch.tensor(self.ranked), ranks),)


class ArrayInputs(nn.Module):
    """The scaling of inputs (n, ...) that are not tables.

    Each input with channel statistics is scaled. The other inputs stay unchanged.
    """

    def __init__(self, statistics: ArrayStatistics) -> None:
        super().__init__()
        self.scaled = [channels is not None for channels in statistics.channels]
        for number, channels in enumerate(statistics.channels):
            for name, part in zip(("center", "scale"), channels or ()):
                self.register_buffer(f"{name}{number}", torch.tensor(part, dtype=torch.float64))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        scaled = []
        for number, x in enumerate(inputs):
            if self.scaled[number]:
                center = self.get_buffer(f"center{number}")
                x = (x.double() - center) / self.get_buffer(f"scale{number}")
            scaled.append(x)
        return tuple(scaled)


class WholeModel(nn.Module):
    """The preprocessing, the network, and the final step to probabilities or target units, in one
    module.

    Shape: inputs as for ``TableInputs`` or ``ArrayInputs``. Outputs by task:

    - classes: label (n,) int64 and probabilities (n, K) float64.
    - several labels: labels and probabilities, both (n, K).
    - regression: prediction (n,) or (n, K) float64.
    - custom target: the outputs (n, ...).
    """

    target_center: Tensor
    target_scale: Tensor
    temperature: Tensor

    def __init__(self, model: ModelContent) -> None:
        super().__init__()
        module = model.module
        if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
            raise InputError(
                None,
                f"{type(module).__name__} cannot be exported: it has a part that TorchScript "
                "compiled, and torch.export cannot read that part",
                remedy="Leave out torch.jit in the function that makes the module, and search "
                "again.",
            )
        # torch cannot copy tensors with a graph, such as activations that a forward kept.
        copies = {id(tensor): tensor.detach() for tensor in _graph_tensors(module)}
        self.network = in_mode(copy.deepcopy(module, copies).cpu(), training=False)
        self.network.requires_grad_(False)  # numpy() reads only tensors without a gradient
        self.dtype = model.dtype
        self.task = model.task
        self.transform = model.transform
        self.several = not isinstance(model.center, float)
        numbers = {
            "target_center": model.center,
            "target_scale": model.scale,
            "temperature": model.temperature,
        }
        # as buffers, because a plain number would be written in single precision
        for name, number in numbers.items():
            self.register_buffer(name, torch.tensor(number, dtype=torch.float64))
        self.names = None if isinstance(model.layout, Layout) else model.layout.names
        self.inputs: nn.Module
        if isinstance(model.statistics, ArrayStatistics):
            self.inputs = ArrayInputs(model.statistics)
        else:
            assert isinstance(model.layout, Layout)
            self.inputs = TableInputs(model.layout, model.statistics)

    def forward(self, *rows: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        inputs = []
        for x in self.inputs(*rows):
            # Unscaled inputs are the caller's own rows. They are copied, because the network may
            # write into them.
            if any(x is row for row in rows):
                x = x.clone()
            inputs.append(x.to(self.dtype) if x.is_floating_point() else x)
        # torch.export refuses a forward that keeps activations in its module.
        with Stateless(self.network).substitute({}) as network:
            output = first_output(call_module(network, inputs, self.names)).double()
        if self.task == "custom":
            return output
        if self.task == "multilabel":
            return (output > 0).long(), output.sigmoid()
        if self.task == "regression":
            output = output if self.several else output.reshape(-1)
            output = output * self.target_scale + self.target_center
            return output if self.transform is None else self.transform.inverse(output)
        logits = class_logits(output, self.task, 1) / self.temperature
        return logits.argmax(1), logits.softmax(1)


def _graph_tensors(module: nn.Module) -> list[Tensor]:
    """Return the tensors with an autograd graph in a module's attributes, and in its dicts and
    lists."""
    values: list[object] = []
    for part in module.modules():
        for value in vars(part).values():
            values.append(value)
            if isinstance(value, dict):
                values += value.values()
    for value in list(values):
        if isinstance(value, list):
            values += value
    tensors = [value for value in values if isinstance(value, Tensor)]
    return [tensor for tensor in tensors if not tensor.is_leaf]


def example_inputs(model: ModelContent) -> tuple[Tensor, ...]:
    """Return two rows of zeros for each input of an exported model."""
    layout = model.layout
    inputs: Iterable[tuple[tuple[int, ...], str]]
    if isinstance(layout, Layout):
        n_inputs = len(description(model)["names"])
        inputs = [((n_inputs,), "float64")]
    else:
        inputs = zip(layout.shapes, layout.dtypes)
    # Two rows, because PyTorch takes a size of 1 for a constant.
    return tuple(torch.zeros(2, *shape, dtype=getattr(torch, dtype)) for shape, dtype in inputs)


def trace(whole: WholeModel, examples: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """Return the program of a whole model, for any number of rows."""
    shapes = open_rows(examples, torch.export.Dim("rows"))
    return torch.export.export(whole, examples, dynamic_shapes=shapes)


def open_rows(examples: tuple[Tensor, ...], rows: object) -> tuple[object]:
    """Return dynamic shapes for torch.export that allow any number of rows. ``forward`` takes
    ``*rows``."""
    return (tuple({0: rows} for _ in examples),)


@contextmanager
def export_errors(model: ModelContent, path: Path) -> Iterator[None]:
    """Turn the errors from tracing a user's module into InputError.

    Warnings and log messages of the exporters are hidden, because a user cannot act on them.
    """
    levels = {logger: logger.level for logger in map(logging.getLogger, _TALKATIVE)}
    try:
        for logger in levels:
            logger.setLevel(logging.ERROR)
        # torch.export prints its graph when it fails.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    except OSError:
        raise
    except Exception as error:  # torch.export and the module may raise anything
        cause = error.__cause__ or error
        kind = type(cause).__name__
        lines = str(cause).splitlines()
        reason = f"{kind}: {next(filter(None, map(str.strip, lines)), kind)}"
        if "Constraints violated (rows)" in reason:
            reason = (
                "its forward() fixes the number of rows. Write x.shape[0] instead of len(x), and "
                "do not branch on it"
            )
        raise InputError(
            None,
            f"{type(model.module).__name__} cannot be exported to {path.suffix}: {reason}",
            remedy="torch.export must be able to trace its forward() for any number of rows. "
            "Otherwise keep the model with save().",
        ) from error
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
