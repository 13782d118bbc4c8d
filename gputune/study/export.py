"""Export a tuned model to one file that runs without gputune: ONNX or torch.export's format."""

import copy
import io
import json
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gputune.annotations import StrPath
from gputune.data.arrays import Arrays, ArrayStatistics
from gputune.data.columns import Layout
from gputune.data.encode import Statistics, normal_scores_of, smooth_clip
from gputune.data.table import Table
from gputune.errors import InputError, import_extra
from gputune.modules.calls import Stateless
from gputune.population.population import call_module, class_logits, first_output
from gputune.scratch import no_folder, scratch_folder
from gputune.study.model_files import ModelContent
from gputune.types import Json
from gputune.version import __version__
from gputune.wording import option

METADATA = "gputune.json"
"""Key of the model's description, in the metadata of an ONNX file and among the extra files of a
.pt2 file."""

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
        self.network = copy.deepcopy(module, copies).cpu().eval()
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


def takes_columns(layout: Layout) -> bool:
    """Return True if an exported model takes raw columns, because all columns are numeric or
    boolean."""
    return all(column.kind in ("number", "boolean") for column in layout.columns)


def encoded(model: ModelContent, table: Table | Arrays) -> Any:
    """Return the inputs of an exported model for some rows.

    The inputs are (n, C) float64, or the arrays in the dtypes of training.
    """
    layout = model.layout
    if not isinstance(layout, Layout):
        assert isinstance(table, Arrays)
        arrays = zip(layout.raw(table).gathered(), layout.dtypes)
        parts = tuple(x.to(getattr(torch, dtype)) for x, dtype in arrays)
        return Arrays(parts, layout.names).as_given()
    assert isinstance(table, Table)
    features = layout.raw(table)  # also checks the columns
    if not takes_columns(layout):
        return features
    columns = []
    for column in layout.columns:
        name = column.name
        columns.append(column.read(table.kind(name), table.column(name)).astype(np.float64))
    return np.stack(columns, axis=1)


def description(model: ModelContent) -> Json:
    """Return a JSON description of the exported model's inputs and outputs.

    One array is called X. Several arrays have their own names, or X0, X1.
    """
    layout = model.layout
    if isinstance(layout, Layout):
        inputs: dict[str, object] = {"inputs": "features", "names": list(layout.feature_names)}
        if takes_columns(layout):
            inputs = {"inputs": "columns", "names": [column.name for column in layout.columns]}
        inputs["columns"] = [column.to_json() for column in layout.columns]
    else:
        names = ["X"]
        if len(layout.shapes) > 1:
            names = [f"X{number}" for number in range(len(layout.shapes))]
        inputs = {
            "inputs": "arrays",
            "names": list(layout.names or names),
            "shapes": [["rows", *shape] for shape in layout.shapes],
            "dtypes": list(layout.dtypes),
        }
    is_labeled = model.task not in ("regression", "custom")
    return inputs | {
        "outputs": ["label", "probabilities"] if is_labeled else ["prediction"],
        "task": model.task,
        "target": model.target,
        "classes": None if model.classes is None else model.classes.tolist(),
    }


def export(model: ModelContent, path: StrPath) -> None:
    """Write the model to a new file, ``.onnx`` or ``.pt2``; see ``TunedModel.export``."""
    path = Path(path)
    argument = f"export(path={str(path)!r})"
    if path.suffix not in (".onnx", ".pt2"):
        raise InputError(argument, "must end in .onnx or .pt2")
    if path.exists():
        raise InputError(
            argument, "exists already", remedy="Pass another path, or remove the file."
        )
    if not path.parent.is_dir():
        raise no_folder(argument, path)
    if model.transform is not None and not isinstance(model.transform.transform, str):
        raise InputError(
            None,
            f"export() cannot write {option('target_transform')}={model.transform.transform!r}, which is "
            "a transformer of scikit-learn",
            remedy="Search with 'log' or 'log1p', or keep the model with save().",
        )
    if path.suffix == ".onnx":
        for library in ("onnx", "onnxscript"):
            import_extra(library, extra="onnx", used_by=f"export({path.name!r})")
    whole = WholeModel(model).eval()
    known = description(model)
    layout = model.layout
    inputs: Iterable[tuple[tuple[int, ...], str]]
    if isinstance(layout, Layout):
        inputs = zip([(len(known["names"]),)], ["float64"])
    else:
        inputs = zip(layout.shapes, layout.dtypes)
    # Two rows, because PyTorch takes a size of 1 for a constant.
    examples = tuple(torch.zeros(2, *shape, dtype=getattr(torch, dtype)) for shape, dtype in inputs)
    text = json.dumps({"format": "gputune export", "gputune": __version__, **known})
    with scratch_folder(path.parent, prefix=".export") as folder:
        draft = folder / path.name
        with _export_errors(f"{type(model.module).__name__} cannot be exported to {path.suffix}"):
            if path.suffix == ".onnx":
                _write_onnx(whole, examples, text, draft)
            else:
                torch.export.save(_trace(whole, examples), draft, extra_files={METADATA: text})
        os.replace(draft, path)


@contextmanager
def _export_errors(failure: str) -> Iterator[None]:
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
            f"{failure}: {reason}",
            remedy="torch.export must be able to trace its forward() for any number of rows. "
            "Otherwise keep the model with save().",
        ) from error
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _write_onnx(whole: WholeModel, examples: tuple[Tensor, ...], text: str, draft: Path) -> None:
    known = json.loads(text)

    def converted_program() -> Any:
        return torch.onnx.export(
            # Traced here: torch.onnx.export would silently fix the number of rows if it cannot keep
            # it open.
            _trace(whole, examples),
            dynamo=True,
            verbose=False,
            input_names=known["names"] if known["inputs"] == "arrays" else ["X"],
            output_names=known["outputs"],
            dynamic_shapes=_open_rows(examples, "rows"),
        )

    program = converted_program()
    # GELU's error function: ONNX Runtime lacks it for doubles on a CPU, so the network runs in
    # float32.
    operators = {node.op_type for node in program.model.graph}
    if whole.dtype == torch.float64 and operators & {"Erf", "Gelu"}:
        whole.network.float()
        whole.dtype = torch.float32
        program = converted_program()
    program.model.metadata_props[METADATA] = text
    program.save(draft, external_data=False)


def _trace(whole: WholeModel, examples: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    shapes = _open_rows(examples, torch.export.Dim("rows"))
    return torch.export.export(whole, examples, dynamic_shapes=shapes)


def _open_rows(examples: tuple[Tensor, ...], rows: object) -> tuple[object]:
    """Return dynamic shapes for torch.export that allow any number of rows. ``forward`` takes
    ``*rows``."""
    return (tuple({0: rows} for _ in examples),)
