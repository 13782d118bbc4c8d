"""A function or a partial that makes modules is searched, stored and found again as a class is."""

import functools
import sys

import numpy as np
import pytest
import torch
from torch import nn

import gputune
from gputune.modules.construction import build_module
from gputune.population.network import Shape
from gputune.study.module_source import class_from_file, class_source, find_class, is_changed
from refused import refused

FILE = """
import functools
from torch import nn

class Net(nn.Module):
    def __init__(self, n_outputs, hidden=3, kind=nn.Tanh):
        super().__init__()
        self.layers = nn.Sequential(nn.LazyLinear(hidden), kind(), nn.Linear(hidden, n_outputs))

    def forward(self, x):
        return self.layers(x)

def make(input_shape, n_outputs, hidden=4):
    return nn.Sequential(nn.Linear(*input_shape, hidden), nn.Tanh(), nn.Linear(hidden, n_outputs))

rectified = functools.partial(Net, kind=nn.ReLU)
"""

X, Y = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
SPACE = {"lr": [1e-2], "batch_size": [16], "module__hidden": [5, 6]}
WORDS = {"space": SPACE, "cv": 2, "max_epochs": 2, "n_trials": 2, "include_default": False, "verbose": 0}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(FILE)
    return path


def variadic(*sizes, n_outputs):
    return nn.Linear(*sizes, n_outputs)


@pytest.mark.parametrize("name", ["Net", "make", "rectified"])
def test_what_a_file_has_is_searched_resumed_saved_and_loaded(file, tmp_path, name):
    study = gputune.tune(f"{file}:{name}", X, Y, study=tmp_path / "s.db", **WORDS)
    model = gputune.Study.open(tmp_path / "s.db").best_model(X, Y)
    assert model.module[0].out_features in (5, 6) if name == "make" else model.module.layers[0].in_features == 4
    model.save(tmp_path / "model")
    loaded = gputune.load_model(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict_proba(X), study.best_model().predict_proba(X))


@pytest.mark.parametrize(
    ("build", "keywords"),
    [
        (lambda net: functools.partial(net, hidden=7), {"hidden": 7}),
        (lambda net: functools.partial(net, 1, 7), {"n_outputs": 1, "hidden": 7}),
    ],
)
def test_a_partial_without_a_name_is_written_with_its_keywords(build, keywords, file):
    net = class_from_file(file, "Net")
    partial = build(net)
    source = class_source(partial)
    assert source["keywords"] == keywords and source["class"] == "Net" and not is_changed(partial, source)
    found = find_class(source, trust_code=True)
    assert found.func is net and build_module(found, {}, Shape(2, 1), seed=0).layers[0].out_features == 7
    named = class_from_file(file, "rectified")
    assert class_source(named)["class"] == "rectified" and find_class(class_source(named), trust_code=True) is named


def test_a_partial_that_cannot_be_written_is_refused(file):
    net = class_from_file(file, "Net")
    with refused(r"the partial of variadic cannot be written down \(it has arguments without a keyword"):
        class_source(functools.partial(variadic, 2))
    with refused("the partial of Net cannot be written down .*give it a name"):
        gputune.tune(functools.partial(net, kind=nn.ELU), X, Y, **WORDS)


def test_a_builder_gets_what_its_signature_has():
    seen = []

    def positional(n_outputs, input_shape, *, width=2):
        seen.append((n_outputs, input_shape, width))
        return nn.Linear(input_shape[0], n_outputs)

    def counted(num_classes, n_features):
        seen.append((num_classes, n_features))
        return nn.Linear(n_features, num_classes)

    def anything(**words):
        seen.append(sorted(words))
        return nn.Linear(words["n_features"], words["n_outputs"])

    partial, wide = functools.partial, {"width": 5}
    builders = positional, anything, partial(positional, n_outputs=4), counted, counted, partial(counted, num_classes=4)
    for builder, arguments in zip(builders, (wide, wide, {}, {}, {"num_classes": 1}, {})):
        build_module(builder, arguments, Shape(3, 2, input_shape=(3,)), seed=0)
    calls = [(2, (3,), 5), ["n_features", "n_outputs", "width"], (4, (3,), 2), (2, 3), (1, 3), (4, 3)]
    assert seen == [call for call in calls for _ in range(2)]  # the second to see whether modules share tensors


@pytest.mark.parametrize(
    ("builder", "arguments", "message"),
    [
        (lambda n_outputs: n_outputs, {}, "must return a torch.nn.Module, got int"),
        (lambda n_outputs: 1 / 0, {}, r"<lambda>\(n_outputs=2\) raised ZeroDivisionError"),
        (lambda n_outputs: n_outputs, {"depth": 3}, r"module__depth is no argument of <lambda>\(n_outputs\)"),
        (lambda n_outputs: n_outputs, {"n_outputs": 3}, "module__n_outputs is given by the data"),
    ],
)
def test_a_builder_that_does_not_build_is_named(builder, arguments, message):
    with refused(message):
        build_module(builder, arguments, Shape(3, 2), seed=0)


def test_a_function_of_this_process_is_searched_in_workers():
    study = gputune.tune(here, X, Y, **WORDS | {"workers": 2, "memory": 1024})
    assert [trial.state for trial in study.trials] == ["complete"] * 2
    assert here.__module__ in sys.modules


def here(n_features, n_outputs, hidden=2):
    return nn.Sequential(nn.Linear(n_features, hidden), nn.Linear(hidden, n_outputs))
