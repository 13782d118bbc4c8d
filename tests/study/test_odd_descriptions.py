"""A damaged part of a saved model is refused in words."""

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
from gputune.models import CNN
from gputune.study.code import class_source
from gputune.study.model import TunedModel, load_model
from refused import refused
from study_models import make_model, rows

# scikit-learn, NumPy and torch warn of odd numbers
pytestmark = pytest.mark.filterwarnings("ignore")

FRAME = pandas.DataFrame(rows())
IMAGES = torch.ones(3, 1, 6, 6)


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
