"""Read the fields of a tuned model from its JSON description.

Each field is checked before it is used.
"""

import math
from typing import get_args

import numpy as np
import torch

from gputune.annotations import FloatArray
from gputune.data.arrays import ArrayLayout, ArrayStatistics
from gputune.data.column import DATE_PARTS, Column
from gputune.data.columns import Layout
from gputune.data.encode import Statistics
from gputune.data.target_transform import FittedTransform
from gputune.study.record import has_form
from gputune.study.trained_rows import RowSample
from gputune.types import Json, Task

DTYPES = {"float32": torch.float32, "float64": torch.float64}

_INFO = {
    "drop?": [str],
    "loss?": str,
    "loss_arguments?": {"": (int, float)},
    "params?": dict,
    "scoring?": (str, None),
    "score?": (int, float),
    "std_error?": (int, float),
    "positive?": (str, bool, int, float, None),
    "held_out_score?": (int, float, None),
    "held_out_rows?": int,
    "trained_rows?": str,
}
"""The form of the entries of a model's info that gputune reads. Other keys are allowed."""


def read_content(body: Json) -> Json:
    """Return the fields of a saved model (``ModelContent``) from its description, except the
    module.

    Raises:
        ValueError: a field has an impossible value.
    """
    # defaults for files of old versions
    body = {"target_transform": None, "residuals": None, "temperature": 1.0, **body}
    layout, classes, transform, residuals = (
        body[n] for n in ("layout", "classes", "target_transform", "residuals")
    )
    if classes is not None and not (isinstance(classes, np.ndarray) and classes.ndim == 1):
        raise ValueError(f"its classes are not a list of labels but {type(classes).__name__}")
    if not has_form(info := dict(body["info"]), _INFO):
        raise ValueError("its info has a wrong type")
    if "trained_rows" in info:
        info["trained_rows"] = RowSample(info["trained_rows"])
    numbers = (
        isinstance(residuals, np.ndarray) and residuals.dtype.kind == "f" and residuals.ndim == 1
    )
    if not (residuals is None or numbers):
        raise ValueError("its residuals are not numbers")
    if not 0 < (temperature := float(body["temperature"])) < math.inf:
        raise ValueError(f"its temperature is {body['temperature']}")
    fields = {
        **_read_layout(layout, body["statistics"]),
        "task": body["task"],
        "classes": classes,
        "center": _of_target(body["center"]),
        "scale": _of_target(body["scale"]),
        "dtype": DTYPES[body["dtype"]],
        "target": body["target"],
        "spec": dict(body["spec"]),
        "info": info,
        "transform": None if transform is None else FittedTransform.from_json(transform),
        "residuals": residuals,
        "temperature": temperature,
    }
    _check_target(fields)
    return fields


def _read_layout(layout: Json, statistics: Json) -> Json:
    """Return the layout of a model's rows, and the statistics that fit the layout."""
    if "shapes" in layout:
        array_layout = ArrayLayout.from_json(layout)
        array_statistics = ArrayStatistics.from_json(statistics)
        array_statistics.check(array_layout)
        return {"layout": array_layout, "statistics": array_statistics}
    table_layout = Layout.from_json(layout)
    _check_layout(table_layout)
    table_statistics = Statistics.from_json(statistics)
    _check_statistics(table_statistics, len(table_layout.feature_names))
    return {"layout": table_layout, "statistics": table_statistics}


def _check_target(fields: Json) -> None:
    """Raise ValueError unless the fields that describe the target fit each other."""
    task, classes, center, transform = (
        fields[name] for name in ("task", "classes", "center", "transform")
    )
    n_classes = 0 if classes is None else len(classes)
    is_known = task in get_args(Task) and isinstance(fields["target"], str)
    if (
        not is_known
        or (task in ("binary", "multiclass")) != (n_classes > 0)
        or (task == "binary" and n_classes != 2)
    ):
        raise ValueError("its task, its target and its classes do not fit each other")
    if np.ndim(center) > 1 or np.size(center) == 0 or np.shape(center) != np.shape(fields["scale"]):
        raise ValueError("the center and the scale of its target have wrong shapes")
    limits = None if transform is None else transform.limits
    if limits is not None and limits.shape[1] != np.size(center):
        raise ValueError("its target_transform has a wrong number of targets")


def _of_target(value: float | list[float] | np.ndarray) -> float | FloatArray:
    """Return the center or scale of a model's target: a float, or an array with one value per
    column."""
    return np.asarray(value, np.float64) if isinstance(value, list | np.ndarray) else float(value)


_PARTS_OF = {"number": ("value",), "boolean": ("value",), "category": (), "date": DATE_PARTS}
"""For each kind of column, the numeric parts that its values may become."""


def _check_column(column: Column) -> None:
    """Raise ValueError for a column with fields that no layout of a table can have."""
    if column.kind not in _PARTS_OF:
        raise ValueError(f"a column has the unknown kind {column.kind!r:.60}")
    texts = [column.name, *column.parts, *column.levels]
    flags = [column.other, column.missing]
    if not ({str}.issuperset(map(type, texts)) and {bool}.issuperset(map(type, flags))):
        raise ValueError(f"the column {column.name!r:.60} has fields of a wrong type")
    may_have_levels = column.kind in ("category", "number")
    if (column.levels and not may_have_levels) or (column.other and not column.is_category):
        raise ValueError(f"the column {column.name!r:.60} has levels that do not fit its kind")
    if not set(_PARTS_OF[column.kind]).issuperset(column.parts) or not column.feature_names:
        raise ValueError(f"the column {column.name!r:.60} has features that do not fit its kind")


def _check_layout(layout: Layout) -> None:
    """Raise ValueError for a layout that cannot belong to a table."""
    if not layout.columns or not {str}.issuperset(map(type, (*layout.inputs, *layout.notes))):
        raise ValueError("its layout has no column, or names of a wrong type")
    for column in layout.columns:
        _check_column(column)


def _check_statistics(statistics: Statistics, n_features: int) -> None:
    """Raise ValueError unless the statistics fit rows with ``n_features`` features."""
    n_inputs = len(statistics.places) or n_features
    ends = (n_inputs,) if statistics.least.size else (0,)
    shapes = {
        "fill": (n_features,),
        "center": (n_inputs,),
        "scale": (n_inputs,),
        "least": ends,
        "most": ends,
    }
    for name, shape in shapes.items():
        if getattr(statistics, name).shape != shape:
            raise ValueError(f"its statistics have a wrong number of values for {name!r}")
    for name, end in (("ranked", n_inputs), ("clipped", n_inputs), ("places", n_features)):
        positions = getattr(statistics, name)
        if positions.ndim != 1 or not ((positions >= 0) & (positions < end)).all():
            raise ValueError(f"its statistics have positions in {name!r} that no feature has")
    if len(statistics.ranked) and not len(statistics.quantiles):
        raise ValueError("its statistics lack the quantiles of its features")
