"""The axes of plots and charts: ticks at round numbers, places in order."""

import math

import numpy as np
import pytest

from gputune.views.axes import linear_scale, log_scale, number_text, parameter_scale
from gputune.views.parameters import Parameter


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0, 1, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.912, 0.987, ["0.92", "0.94", "0.96", "0.98"]),
        (-3, 12, ["-2.5", "0.0", "2.5", "5.0", "7.5", "10.0"]),
        (1, 50, ["10", "20", "30", "40", "50"]),
        (0, 3e7, ["0", "5e6", "1e7", "1.5e7", "2e7", "2.5e7", "3e7"]),
    ],
)
def test_linear_ticks(low, high, texts):
    scale = linear_scale(low, high)
    assert [text for _, text in scale.ticks] == texts
    assert all(low <= value <= high for value, _ in scale.ticks)
    assert scale([low, high]).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (1e-4, 1e-1, ["0.0001", "0.001", "0.01", "0.1"]),
        (16, 512, ["20", "50", "100", "200", "500"]),
        (1e-9, 1e3, ["1e-9", "1e-6", "0.001", "1", "1000"]),
        (3.1, 3.9, ["3.2", "3.4", "3.6", "3.8"]),
    ],
)
def test_log_ticks(low, high, texts):
    scale = log_scale(low, high)
    assert [text for _, text in scale.ticks] == texts
    middle = scale([low, math.sqrt(low * high), high])
    np.testing.assert_allclose(middle, [0, 0.5, 1], atol=1e-12)
    assert np.isnan(scale([0.0, -1.0])).all()


def test_one_value_has_an_axis():
    for scale in (linear_scale(0.5, 0.5), linear_scale(0, 0), log_scale(3, 3)):
        assert scale.low < scale.high and scale.ticks


def test_few_values_are_their_own_ticks():
    values = np.array([16.0, 32, 64, 128, np.nan])
    scale = parameter_scale(Parameter("batch_size", "batch_size", values, log=True))
    assert [text for _, text in scale.ticks] == ["16", "32", "64", "128"]
    words = parameter_scale(Parameter("a", "a", np.array([0.0, 1.0]), levels=("x", "y")), pad=0.1)
    assert words.ticks == ((0, "x"), (1, "y")) and (words.low, words.high) == (-0.5, 1.5)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.001, "0.001"), (2e4, "20000"), (1e-5, "1e-5"), (2.5e8, "2.5e8"), (1e6, "1e6"), (-3e-7, "-3e-7")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert number_text(value) == text


@pytest.mark.parametrize("ends", [(0, 1), (0, 3), (1, 24), (1, 1), (-0.24, 24.24)])
def test_whole_ticks(ends):
    ticks = linear_scale(*ends, most=10, whole=True).ticks
    assert ticks and all(value == int(value) and words == str(int(value)) for value, words in ticks)
