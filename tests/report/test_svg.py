"""SVG as markup: what is left out where there is too much, paths, and text that is escaped."""

import math

import numpy as np

from gputune.report.svg import band_path, cut, dots_path, element, line_path, spread_over


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
    band = band_path(x, np.array([0, 1, math.nan]), np.array([2, 3, math.nan]))
    assert band == "M0.0 2.0L1.0 3.0L1.0 1.0L0.0 0.0Z"
    assert band_path(x, x * math.nan, x) == ""


def test_text_is_cut_in_its_middle():
    assert cut("short", 10) == "short" and cut("a long name of a thing", 9) == "a lo…hing"


def test_elements_are_escaped():
    made = element("text", '<b>&"', class_='"><svg onload=x>', x=1.25, data_rank=3, none=None)
    assert str(made) == (
        '<text class="&#34;&gt;&lt;svg onload=x&gt;" x="1.2" data-rank="3">&lt;b&gt;&amp;&#34;</text>'
    )
