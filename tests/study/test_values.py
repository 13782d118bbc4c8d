"""Values come back from JSON with their type and every bit; values that cannot be stored are
refused by name.
"""

import json
import math
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from gputune.study.values import from_json, to_json
from refused import refused


def same(a, b):
    """Equal in type, structure and bits (NaN equals NaN, -0.0 is not 0.0, True is not 1)."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and same(a.tolist(), b.tolist())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(k, l) and same(a[k], b[l]) for k, l in zip(a, b))
    return a == b


BITS = np.random.default_rng(0).integers(0, 2**64, size=1000, dtype=np.uint64).view(np.float64)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        False,
        1,
        0,
        2**70,
        1.0,
        -0.0,
        0.1 + 0.2,
        5e-324,
        1.7976931348623157e308,
        math.inf,
        -math.inf,
        math.nan,
        BITS[~np.isnan(BITS)].tolist(),
        "",
        'naïve 🐍 \x00 " \ud800',
        {},
        [],
        (),
        [1, 1.0, True, None, "1"],
        (1, (2.5, [3])),
        {"lr": 0.1, "width": 32, "nested": {"a": (1, 2)}},
        {0: 1.0, 1: 2.5, "other": True, None: "x", (1, 2): []},
        {"float": "nan"},
        {"torch": {"dict": {"tuple": 1}}},  # these look like our own tags
        np.array([3, 1, 2]),
        np.array([1, 2], dtype=np.int8),
        np.array([True, False]),
        np.empty((0, 4)),
        np.array(["setosa", "", "日本"]),
        np.array(["a", 1, None, 2.5, True], dtype=object),
        np.array([0.1, math.nan, math.inf, -0.0], dtype=np.float32),
        np.arange(6.0).reshape(2, 3),
        np.array(["a", "b" * 1000]),
        [nn.ReLU, nn.Linear, nn.functional.relu, nn.functional.gelu, nn.functional.logsigmoid],
    ],
)
def test_round_trip_in_plain_ascii_json_without_nan(value):
    text = to_json({"a": value})
    assert same(from_json(text), {"a": value}) and text.isascii()
    json.loads(text, parse_constant=pytest.fail)


def test_numpy_scalars_become_pythons():
    value = [np.float64(0.1), np.float32(0.1), np.int64(3), np.bool_(True), np.str_("a")]
    assert same(from_json(to_json(value)), [0.1, float(np.float32(0.1)), 3, True, "a"])


def test_other_values_are_refused_by_name():
    for value in (
        lambda x: x,
        print,
        object(),
        {1, 2},
        1j,
        b"raw",
        torch.ones(2),
        np.datetime64(1, "D"),
    ):
        with refused(r"trial 7 holds .* cannot be stored in a file. Use numbers"):
            to_json([value], name="trial 7")
    endless = []
    endless.append(endless)
    with refused("trial 7 is nested too deeply"):
        to_json(endless, name="trial 7")


WIDE = '{"array":{"dtype":"<U%d","shape":[2],"items":["a","b"]}}'


@pytest.mark.parametrize(
    "text",
    [
        '{"torch":"os:system"}',
        '{"torch":"torch.nn:does_not_exist"}',
        '{"torch":"torch.nn.no_such_module:x"}',
        # torch's imports
        '{"torch":"torch.nn.modules.module:warnings"}',
        '{"torch":"torch.nn.functional:Callable"}',
        '{"torch":"torch.hub:load"}',
        '{"torch":3}',
        '{"float":"one"}',
        '{"float":[1]}',
        '{"pairs":[1]}',
        '{"array":{"dtype":"V8","shape":[0],"items":[]}}',
        '{"array":{"dtype":"<f8","shape":[2],"items":[1.0]}}',
        '{"array":{}}',
        WIDE % 400_000_000,
        "{",
        "[" * 100_000,
    ],
)
def test_text_that_was_never_written_is_a_value_error(text):
    with pytest.raises(ValueError, match="not a stored value: "):
        from_json(text)


def test_an_array_takes_the_memory_of_its_items():
    assert from_json(WIDE % 1000).dtype == "<U1000"
    with pytest.raises(ValueError, match="2 items of <U400000000 has no item of that length"):
        from_json(WIDE % 400_000_000)


def test_reading_a_study_does_not_import_torch():
    code = "import sys, gputune.study.study; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
