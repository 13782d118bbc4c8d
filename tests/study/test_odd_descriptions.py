"""A model.json with values of other types is refused in words, or the model works: no call ends in
a traceback."""

import copy
import hashlib
import json
import os
from dataclasses import replace

import numpy as np
import pandas
import pytest
import torch
from sklearn.preprocessing import PowerTransformer

from gputune.data.arrays import ArrayLayout, ArrayStatistics
from gputune.data.target_transform import fit_transform
from gputune.errors import InputError
from gputune.models import CNN
from gputune.study.code import class_source
from gputune.study.model import TunedModel, load_model
from refused import refused
from study_models import make_model, rows

ODD = [
    None,
    True,
    -1,
    10**30,
    "x",
    [],
    ["x"],
    {"a": 1},
    {"float": "nan"},
    {"tuple": [1]},
    {"torch": "torch.nn:ReLU"},
    [[1]],
    {"array": {"dtype": "O", "shape": [1], "items": [None]}},
]

# scikit-learn, NumPy and torch warn of odd numbers
pytestmark = pytest.mark.filterwarnings("ignore")

FRAME = pandas.DataFrame(rows())
IMAGES = torch.ones(3, 1, 6, 6)


def of_classes():
    return make_model(FRAME), FRAME


def of_numbers():
    """Piecewise numbers, a transformed target and intervals."""
    transform = fit_transform(PowerTransformer(), np.linspace(1, 5, 30))
    model = make_model(FRAME, classes=None, numbers="piecewise")
    return replace(model, residuals=np.linspace(0, 1, 50), transform=transform), FRAME


def of_images():
    size = {"input_shape": (1, 6, 6), "n_outputs": 2}
    model = TunedModel(
        module=CNN(**size, channels=2, depth=1),
        layout=ArrayLayout(((1, 6, 6),), ("float32",)),
        statistics=ArrayStatistics(((np.zeros((1, 1, 1)), np.ones((1, 1, 1))),)),
        task="binary",
        classes=np.array([0, 1]),
        center=0.0,
        scale=1.0,
        dtype=torch.float32,
        target="y",
        spec={"kind": "module", "kwargs": {"channels": 2, "depth": 1}, **class_source(CNN)},
        info={"params": {}},
    )
    return model, IMAGES


def places(value, at=()):
    """Every place in a description, of lists the first item only."""
    if at:
        yield at
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:1])
        if isinstance(value, list)
        else ()
    )
    for key, part in items:
        yield from places(part, (*at, key))


def with_value(body, at, value):
    """A copy of a description with another value at a place, or without it (...)."""
    changed = copy.deepcopy(body)
    holder = changed
    for key in at[:-1]:
        holder = holder[key]
    if value is ...:
        del holder[at[-1]]
    else:
        holder[at[-1]] = value
    return changed


def write(path, whole, body):
    text = json.dumps(body, separators=(",", ":"))
    path.write_text(
        json.dumps({**whole, "body": body, "sha256": hashlib.sha256(text.encode()).hexdigest()})
    )


def use(folder, data):
    """Use a model like people do, if it is not refused."""
    model = load_model(folder)
    model.predict(data)
    assert repr(model) and model._repr_html_()
    if model.residuals is not None:
        model.predict_interval(data)


@pytest.mark.long
@pytest.mark.parametrize("make", [of_classes, of_numbers, of_images])
def test_a_value_of_another_type_is_refused_or_harmless(make, tmp_path):
    model, data = make()
    model.save(folder := tmp_path / "model")
    path = folder / "model.json"
    whole = json.loads(path.read_text())
    changes = [(at, value) for at in places(whole["body"]) for value in (..., *ODD)]
    n_refused = 0
    for at, value in changes[::5]:  # each place, with values in turn
        write(path, whole, with_value(whole["body"], at, value))
        try:
            use(folder, data)
        except InputError:
            n_refused += 1
    assert n_refused > len(changes) / 15


WRONG = {
    ("layout", "columns", 0, "kind"): ("text", "a column has the unknown kind 'text'"),
    ("layout", "columns", 0, "parts"): (
        ["x"],
        "the column 'age' has features that do not fit its kind",
    ),
    ("layout", "columns", 0, "missing"): (1, "the column 'age' has fields of a wrong type"),
    ("layout", "columns"): ([], "its layout has no column, or names of a wrong type"),
    ("statistics", "fill"): (
        [1.0],
        "its statistics have a wrong number of values for 'fill'",
    ),
    ("statistics", "ranked"): ([99], "positions in 'ranked' that no feature has|cannot reshape"),
    ("statistics", "clipped"): (
        [99],
        "its statistics have positions in 'clipped' that no feature has",
    ),
    ("task",): ("ranking", "its task, its target and its classes do not fit each other"),
    ("center",): ([1.0, 2.0], "the center and the scale of its target have wrong shapes"),
    ("info", "params"): (None, "its info has a wrong type"),
}


def test_what_is_wrong_with_a_description_is_said(tmp_path):
    make_model(FRAME).save(folder := tmp_path / "model")
    path = folder / "model.json"
    whole = json.loads(path.read_text())
    for at, (value, words) in WRONG.items():
        write(path, whole, with_value(whole["body"], at, value))
        with refused(rf"model\.json' is damaged: .*({words}).*\. Restore it from a copy"):
            load_model(folder)


def test_what_is_wrong_with_arrays_and_transformations_is_said(tmp_path):
    wrong = {
        of_images: {
            ("layout", "dtypes"): (["hub"], "the dtypes of its inputs are not dtypes of torch"),
            ("layout", "shapes"): (
                [[1, 6, -6]],
                "the shapes of its inputs are not positive integers",
            ),
            ("layout", "names"): ([1], "the names of its inputs are not text"),
            ("statistics", "channels"): (
                [],
                "its statistics belong to a different number of inputs",
            ),
        },
        of_numbers: {
            ("target_transform", "ends"): (1.0, "its target_transform lacks the limits"),
            ("target_transform", "transformer", "state"): (
                {"a": 1},
                "its target_transform does not work",
            ),
            ("residuals",): ([1], "its residuals are not numbers"),
        },
    }
    for make, changes in wrong.items():
        make()[0].save(folder := tmp_path / make.__name__)
        path = folder / "model.json"
        whole = json.loads(path.read_text())
        for at, (value, words) in changes.items():
            write(path, whole, with_value(whole["body"], at, value))
            with refused(words):
                load_model(folder)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_file_of_a_model_that_is_a_device_a_pipe_or_a_folder_is_refused(name, tmp_path):
    make_model(FRAME).save(folder := tmp_path / "model")
    path = folder / name
    kinds = {
        "a device": lambda: path.symlink_to("/dev/zero"),
        "a pipe": lambda: os.mkfifo(path),
        "is a folder": path.mkdir,
    }
    for words, make in kinds.items():
        path.unlink()
        make()
        with refused(words):
            load_model(folder)
        if words == "is a folder":
            path.rmdir()
            path.touch()
