"""The inputs, the outputs and the file of an exported model, which runs without gputune.

Each format is an integration, which ``export`` finds by the suffix of the file.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gputune.data.arrays import Arrays
from gputune.data.columns import Layout
from gputune.data.table import Table
from gputune.ground.annotations import StrPath
from gputune.ground.entry_points import integration, integrations
from gputune.ground.errors import InputError, option
from gputune.ground.files import no_folder, scratch_folder
from gputune.ground.types import Json
from gputune.study.model_files import ModelContent
from gputune.version import __version__

METADATA = "gputune.json"
"""Key of the model's description in an exported file: in the metadata of an ONNX file, and among
the extra files of a .pt2 file."""


def takes_columns(layout: Layout) -> bool:
    """Return True if an exported model takes raw columns, because all columns are numeric or
    boolean and none is also a category."""
    return all(column.is_plain for column in layout.columns)


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
    """Write the model to a new file, in the format of its suffix. See ``TunedModel.export``."""
    path = Path(path)
    argument = f"export(path={str(path)!r})"
    suffixes = [f".{name}" for name in integrations("exports")]
    if path.suffix not in suffixes:
        raise InputError(argument, f"must end in {', '.join(suffixes[:-1])} or {suffixes[-1]}")
    if path.exists():
        raise InputError(
            argument, "exists already", remedy="Pass another path, or remove the file."
        )
    if not path.parent.is_dir():
        raise no_folder(argument, path)
    transform = None if model.transform is None else model.transform.transform
    if not isinstance(transform, str | None):
        raise InputError(
            None,
            f"export() cannot write {option('target_transform')}={transform!r}, which is a "
            "transformer of scikit-learn",
            remedy="Search with 'log' or 'log1p', or keep the model with save().",
        )
    known = {"format": "gputune export", "gputune": __version__, **description(model)}
    with scratch_folder(path.parent, prefix=".export") as folder:
        draft = folder / path.name
        integration("exports", path.suffix.removeprefix(".")).write_model(model, known, draft)
        os.replace(draft, path)
