"""Export a tuned model to one file that runs without gputune: ONNX, or PyTorch's exported
program."""

import copy
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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

METADATA = "gputune.json"
"""Key of the description, in the metadata of ONNX and among the extra files of a .pt2."""

_TALKATIVE = (
    "torch.onnx",
    "torch.export",
    "torch._export",
    "torch.fx.experimental.symbolic_shapes",
)
"""Loggers of the exporters."""


class TableInputs(nn.Module):
    """The preprocessing of a table as a module: missing values, scaling, quantiles and bins.

    Shape: (n, C) float64 -> (n, D) float64, the features.

    If all columns are numbers or booleans, the C inputs are the columns, NaN for a missing value.
    Otherwise they are the features of ``Layout.raw``, because text and dates cannot be tensors.
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
        features = [
            (i, k >= len(c.parts))
            for i, c in enumerate(layout.columns)
            for k, _ in enumerate(c.feature_names)
        ]
        self.register_buffer("source", torch.tensor([i for i, _ in features]))
        self.register_buffer(
            "indicator", torch.tensor([is_indicator for _, is_indicator in features])
        )

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
        buffer = self.get_buffer
        return tuple(
            (x.double() - buffer(f"center{number}")) / buffer(f"scale{number}")
            if self.scaled[number]
            else x
            for number, x in enumerate(inputs)
        )


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
        # torch cannot copy tensors with a graph, such as activations that a forward kept.
        values = [value for part in model.module.modules() for value in vars(part).values()]
        values += [
            member for value in values if isinstance(value, dict) for member in value.values()
        ]
        values += [member for value in values if isinstance(value, list) for member in value]
        graphs = [value for value in values if isinstance(value, Tensor) and not value.is_leaf]
        if any(isinstance(part, torch.jit.ScriptModule) for part in model.module.modules()):
            name = type(model.module).__name__
            raise InputError(
                f"{name} cannot be exported: it has a part that TorchScript compiled, which "
                "torch.export does not read. Leave out torch.jit in the function that makes it, "
                "and search again."
            )
        self.network = (
            copy.deepcopy(model.module, {id(value): value.detach() for value in graphs})
            .cpu()
            .eval()
        )
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
        # Unscaled inputs are the caller's own rows. They are copied, because the network may write
        # into them.
        own = [x.clone() if any(x is row for row in rows) else x for x in self.inputs(*rows)]
        inputs = [x.to(self.dtype) if x.is_floating_point() else x for x in own]
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


def takes_columns(layout: Layout) -> bool:
    """Return True if an exported model takes the columns themselves: all are numbers or
    booleans."""
    return all(column.kind in ("number", "boolean") for column in layout.columns)


def encoded(model: ModelContent, table: Table | Arrays) -> Any:
    """Return the inputs of an exported model for some rows.

    They are (n, C) float64, or the arrays in the dtypes of training.
    """
    layout = model.layout
    if not isinstance(layout, Layout):
        assert isinstance(table, Arrays)
        parts = tuple(
            x.to(getattr(torch, dtype))
            for x, dtype in zip(layout.raw(table).gathered(), layout.dtypes)
        )
        return Arrays(parts, layout.names).as_given()
    assert isinstance(table, Table)
    features = layout.raw(table)  # also checks the columns
    if not takes_columns(layout):
        return features
    columns = layout.columns
    return np.stack(
        [c.read(table.kind(c.name), table.column(c.name)).astype(np.float64) for c in columns],
        axis=1,
    )


def description(model: ModelContent) -> Json:
    """Return the description of the inputs and outputs, as plain JSON.

    One array is called X. Several arrays have their own names, or X0, X1.
    """
    layout = model.layout
    if isinstance(layout, Layout):
        columns = takes_columns(layout)
        names = (
            [column.name for column in layout.columns] if columns else list(layout.feature_names)
        )
        inputs: dict[str, object] = {"inputs": "columns" if columns else "features", "names": names}
        inputs["columns"] = [column.to_json() for column in layout.columns]
    else:
        several = len(layout.shapes) > 1
        names = list(
            layout.names or ([f"X{i}" for i in range(len(layout.shapes))] if several else ["X"])
        )
        shapes = [["rows", *shape] for shape in layout.shapes]
        inputs = {
            "inputs": "arrays",
            "names": names,
            "shapes": shapes,
            "dtypes": list(layout.dtypes),
        }
    return inputs | {
        "outputs": ["prediction"]
        if model.task in ("regression", "custom")
        else ["label", "probabilities"],
        "task": model.task,
        "target": model.target,
        "classes": None if model.classes is None else model.classes.tolist(),
    }


def export(model: ModelContent, path: str | os.PathLike[str]) -> None:
    """Write the model to a new file, ``.onnx`` or ``.pt2``; see ``TunedModel.export``."""
    path = Path(path)
    layout = model.layout
    if path.suffix not in (".onnx", ".pt2"):
        raise InputError(
            f"export(path={str(path)!r}) must end in .onnx or .pt2; choose one of them."
        )
    if path.exists():
        raise InputError(
            f"export(path={str(path)!r}) exists already; give a path that is free, or remove it."
        )
    if not path.parent.is_dir():
        raise no_folder(f"export(path={str(path)!r})", path)
    if model.transform is not None and not isinstance(model.transform.transform, str):
        raise InputError(
            f"export() cannot write target_transform={model.transform.transform!r}, which is code of "
            "scikit-learn's: search with 'log' or 'log1p', or keep the model with save()."
        )
    for needed in ("onnx", "onnxscript") if path.suffix == ".onnx" else ():
        import_extra(needed, extra="onnx", used_by=f"export({path.name!r})")
    whole = WholeModel(model).eval()
    known = description(model)
    shapes = [(len(known["names"]),)] if isinstance(layout, Layout) else layout.shapes
    dtypes = ["float64"] if isinstance(layout, Layout) else layout.dtypes
    # Two rows, because PyTorch takes a size of 1 for a constant.
    examples = tuple(
        torch.zeros(2, *shape, dtype=getattr(torch, dtype)) for shape, dtype in zip(shapes, dtypes)
    )
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
        reason = next(
            (line for line in str(cause).splitlines() if line.strip()), type(cause).__name__
        )
        reason = f"{type(cause).__name__}: {reason.strip()}"
        if "Constraints violated (rows)" in reason:
            reason = (
                "its forward() fixes the number of rows: write x.shape[0] for len(x), and no if "
                "on it."
            )
        raise InputError(
            f"{failure}: {reason} Its forward() must be one that torch.export can trace for any "
            "number of rows; save() keeps the model as it is."
        ) from error
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _write_onnx(whole: WholeModel, examples: tuple[Tensor, ...], text: str, draft: Path) -> None:
    known = json.loads(text)

    def converted_program() -> Any:
        # Traced here: torch.onnx.export would silently fix the number of rows if it cannot keep it
        # open.
        traced = _trace(whole, examples)
        names = known["names"] if known["inputs"] == "arrays" else ["X"]
        shapes = (tuple({0: "rows"} for _ in examples),)  # name of the axis
        more = {"input_names": names, "output_names": known["outputs"], "dynamic_shapes": shapes}
        return torch.onnx.export(traced, dynamo=True, verbose=False, **more)

    program = converted_program()
    # GELU's error function: ONNX Runtime lacks it for doubles on a CPU, so the network runs in
    # float32.
    if whole.dtype == torch.float64 and any(
        node.op_type in ("Erf", "Gelu") for node in program.model.graph
    ):
        whole.network.float()
        whole.dtype = torch.float32
        program = converted_program()
    program.model.metadata_props[METADATA] = text
    program.save(draft, external_data=False)


def _trace(whole: WholeModel, examples: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    rows = torch.export.Dim("rows")
    shapes = (tuple({0: rows} for _ in examples),)  # forward takes them as *rows
    return torch.export.export(whole, examples, dynamic_shapes=shapes)
