"""The axes of the charts: ticks at round numbers, places in order, and what is left out where there is too much."""

import math

import numpy as np
import pytest

from gputune.report.svg import band_path, cut, dots_path, element, line_path, spread_over
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
    [
        (0, "0"),
        (0.001, "0.001"),
        (20000.0, "20000"),
        (1e-5, "1e-5"),
        (2.5e8, "2.5e8"),
        (1e6, "1e6"),
        (-3e-7, "-3e-7"),
    ],
)
def test_numbers_are_short(value, text):
    assert number_text(value) == text


def test_thinning_keeps_the_first_and_the_last_and_is_the_same_every_time():
    order = list(range(1000))
    kept = spread_over(order, 100)
    assert len(kept) == len(set(kept)) == 100 and kept[:25] == order[:25] and kept[-1] == 999
    assert kept == sorted(kept) == spread_over(order, 100)
    assert max(np.diff(kept[25:])) - min(np.diff(kept[25:])) <= 1
    assert spread_over(order[:7], 100) == order[:7]


def test_paths():
    assert line_path([0, 1, 2, 3], [0, 1, math.nan, 2]) == "M0.0 0.0L1.0 1.0M3.0 2.0"
    assert dots_path(np.array([1.0, math.nan, 2.0]), np.array([1.0, 1.0, 3.0])) == "M1.0 1.0h0M2.0 3.0h0"
    x = np.array([0.0, 1.0, 2.0])
    assert (
        band_path(x, np.array([0, 1, math.nan]), np.array([2, 3, math.nan]))
        == "M0.0 2.0L1.0 3.0L1.0 1.0L0.0 0.0Z"
    )
    assert band_path(x, x * math.nan, x) == ""


def test_text_is_cut_in_its_middle():
    assert (
        cut("short", 10) == "short"
        and cut("a long name of a thing", 9) == "a lo…hing"
        and len(cut("x" * 50, 9)) == 9
    )


def test_elements_are_escaped():
    made = element("text", '<b>&"', class_='"><svg onload=x>', x=1.25, data_rank=3, none=None)
    assert str(made) == (
        '<text class="&#34;&gt;&lt;svg onload=x&gt;" x="1.2" data-rank="3">&lt;b&gt;&amp;&#34;</text>'
    )
