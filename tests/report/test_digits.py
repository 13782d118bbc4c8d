"""Numbers on the page have at most four significant digits, except in the code that is run."""

import json
from html.parser import HTMLParser

import pytest

from gputune.report.page import page
from long_numbers import (
    folds_of_long_numbers,
    long_numbers,
    model_of_long_numbers,
    study_of_long_numbers,
)
from made_studies import made_descent, made_study


class Shown(HTMLParser):
    """The texts of a page that a reader sees, and the data of its table."""

    HIDDEN = ("script", "style", "code")

    def __init__(self, html):
        super().__init__()
        self.tags = []
        self.texts = []
        self.data = None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br"):
            self.tags.append(tag)
        for name, value in attributes:
            if name in ("title", "aria-label"):
                self.texts.append(value)

    def handle_endtag(self, tag):
        assert self.tags.pop() == tag

    def handle_data(self, data):
        if self.tags and self.tags[-1] not in self.HIDDEN:
            self.texts.append(data)
        elif self.tags[-1:] == ["script"] and data.startswith("{"):
            self.data = json.loads(data)


def shown_on(html):
    """Return all texts of a page, and those that its script shows later."""
    shown = Shown(html)
    texts = list(shown.texts)
    for column in shown.data["columns"]:
        texts += column.get("levels") or [repr(v).removesuffix(".0") for v in column["values"]]
    return texts


def assert_short(html):
    texts = shown_on(html)
    assert len(texts) > 100
    # in quotes: a text of the user
    long = {text: long_numbers(text.replace("'1.23456 in quotes'", "")) for text in texts}
    assert {text: numbers for text, numbers in long.items() if numbers} == {}


@pytest.mark.parametrize(
    ("first_score", "step", "scoring"),
    [
        (-12.345678901234567, 1.2345678901234567, "neg_log_loss"),
        (-1.2345678901234567, 1e-5, "neg_log_loss"),
        (0.9123456789012345, 1e-6, "accuracy"),
        (-123456.78901234567, 12345.678901234567, "neg_mean_squared_error"),
        (-1.2345678901234567e-5, 1e-6, "neg_mean_squared_error"),
        (-1.2345678901234567e9, 1e9, "neg_mean_squared_error"),
    ],
)
def test_no_number_on_the_page_has_more_than_four_digits(first_score, step, scoring):
    study = study_of_long_numbers(first_score, step, scoring=scoring)
    model = model_of_long_numbers(study)
    html = page(study, model=model, folds=folds_of_long_numbers(study))
    assert_short(html)
    text = " ".join(shown_on(html))
    for shown in ("0.0001235", "without a model", "moved into the space", "PowerTransformer"):
        assert shown in text
    assert repr(study.best_params["C"]) in html  # in full in the code


def test_no_number_on_the_page_of_another_kind_of_search_has_more_than_four_digits():
    for study in (made_descent(), made_study(20, halved=True)):
        assert_short(page(study))


def test_a_number_with_more_than_four_digits_is_found():
    text = "0.000123457 0.0001235 123456.0 12350 12345 gputune 0.1.12345, 1.23456e-5, 1.000 1.0000"
    assert long_numbers(text) == ["0.000123457", "123456.0", "12345", "1.23456e-5", "1.0000"]
