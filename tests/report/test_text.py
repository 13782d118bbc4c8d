"""Text for a terminal: nothing in a name steers it, numbers are short, columns are aligned."""

import math

import pytest
from torch import nn

from gputune.ground.text import clean, did_you_mean, measure_of, paragraph, short, table


@pytest.mark.parametrize(
    ("show", "value", "shown"),
    [
        (clean, "\x1b[31mred\x1b[0m", "[31mred[0m"),
        (clean, "a\nb\tc\r", "a b c "),
        (clean, "bell\x07 \x9b1m del\x7f", "bell 1m del"),
        (clean, "\u202egnp.exe", "gnp.exe"),
        (clean, "Größe 日本 ±", "Größe 日本 ±"),
        (clean, 3, "3"),
        (short, 0.0012075633, "0.001208"),
        (short, 64, "64"),
        (short, 1e-5, "1e-05"),
        (short, True, "True"),
        (short, "relu", "relu"),
        (short, nn.ReLU, "ReLU"),
        (short, [[0.0012075633, 1e-5], [0.5, 2.0]], "[[0.001208, 1e-05], [0.5, 2]]"),
    ],
)
def test_nothing_steers_a_terminal_and_numbers_are_short(show, value, shown):
    assert show(value) == shown


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("SIGMOID", " Did you mean 'sigmoid'?"),
        ("radam", " Did you mean 'RAdam'?"),
        ("alpha", " Did you mean 'sigmoid'?"),
        ("sig", " Did you mean 'sigmoid'?"),
        ("adagrad", ""),
        ("si", ""),
        ("cube", ""),
        (None, ""),
    ],
)
def test_a_near_word_is_suggested(word, sentence):
    assert did_you_mean(word, ("sigmoid", "RAdam"), others={"alpha": "sigmoid"}) == sentence


def test_clean_keeps_what_it_is_told_to():
    assert clean("a\nb\x1b\tc", keep="\n") == "a\nb c"


@pytest.mark.parametrize(
    ("best", "score", "shown"),
    [
        (0.95, 0.9, "0.9000"),
        (1.0, 1.0, "1.0000"),
        (0.0, 0.0, "0.0000"),
        (math.nan, 0.5, "0.5000"),
        (53.219, 7.1, "7.10"),
        (53219.7, 53219.7, "53220"),
        (0.0001234, 0.0001234, "0.0001234"),
        (0.9, -3e12, "-3.000e+12"),
        (0.9, math.nan, "-"),
    ],
)
def test_scores_have_four_digits_of_the_best(best, score, shown):
    assert measure_of("r2", best).text(score) == shown


def test_a_negated_score_is_shown_as_what_it_measures():
    measure = measure_of("neg_log_loss", -0.31)
    assert measure.title == "log_loss (lower is better)"
    assert measure.text(-0.31) == "0.3100"
    assert measure.size(0.02) == "0.0200"
    assert measure_of("neg_log_loss", 0.0).text(0.0) == "0.0000"
    assert measure_of("accuracy", 0.31).title == "accuracy"
    assert measure_of("my.module:cost", 0.31).name == "cost"


def test_table_aligns_numbers_right_and_words_left():
    lines = table(
        ["n", "state"], [["1", "complete"], ["10", "failed"]], left=["state"], indent="  "
    )
    assert lines == "   n  state\n   1  complete\n  10  failed"


def test_paragraph_hangs_and_keeps_words_whole():
    text = paragraph("weight_decay=0.001 " * 4, 40, first="A  ", then="   ")
    assert (
        text == "A  weight_decay=0.001 weight_decay=0.001\n   weight_decay=0.001 weight_decay=0.001"
    )
