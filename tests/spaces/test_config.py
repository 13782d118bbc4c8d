"""One configuration: every key has its range and type, and an error names a remedy."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest

from gputune.ground.errors import shown_value
from gputune.ground.types import ACTIVATIONS, NUMBERS, OPTIMIZERS, SCHEDULES
from gputune.spaces.config import KEYS, WORDS, check_config, check_key, legal_keys
from refused import refused

MLP = legal_keys("mlp", "adamw")
EXACT = legal_keys("logistic", "exact")
MODULE = legal_keys("module", "adamw")

VALUES = {
    "lr": ((1e-8, 1, 10.0), (0, -1.0, math.inf, math.nan, 10**400)),
    "hypergrad_lr": ((0, 0.02, 0.999), (-0.1, 1, math.nan)),
    "batch_size": ((1, 10**6), (0, -3, math.inf, math.nan, 10**400)),
    "width": ((1, 32.0, (100, 50)), (0, 17.3)),
    "depth": ((1, 9), (0, 0.5)),
    "dropout": ((0, 0.999), (-0.1, 1, math.nan)),
    "rank": ((1, 64), (0, 2.5)),
    "alpha": ((0.5, 16), (0, math.inf)),
    "rslora": ((True, False), (1, "yes")),
    "init_seed": ((0, 2**40), (-1, 0.5)),
    "weight_decay": ((0, 3.0), (-1e-9, math.inf)),
    "momentum": ((0, 0.999), (-0.1, 1)),
    "clip_norm": ((0.5, math.inf), (0, -1, math.nan)),
    "ema": ((0, 0.999), (-0.1, 1)),
    "C": ((1e-9, math.inf), (0, -1, math.nan)),
    "l1_ratio": ((0, 0.5, 1), (-0.1, 1.1)),
    "numbers": (NUMBERS, ("auto", 1)),
    "activation": (ACTIVATIONS, ("swish", None, 1)),
    "optimizer": (OPTIMIZERS, ("exact", "adaam", 3)),
    "beta2": ((0, 0.95), (-0.1, 1)),
    **dict.fromkeys(
        ("schedule", "weight_decay_schedule", "dropout_schedule"), (SCHEDULES, ("step",))
    ),
    "hypergrad_rule": (("multiplicative",), ("adam",)),
}
"""The legal ones of each key, and some that are not."""


def test_the_keys_of_each_kind_of_model():
    trained = {
        "lr",
        "batch_size",
        "weight_decay",
        "momentum",
        "optimizer",
        "schedule",
        "clip_norm",
        "ema",
    }
    trained |= {"beta2", "weight_decay_schedule", "numbers"}
    assert set(legal_keys("logistic", "sgd")) == trained
    assert set(MODULE) == trained | {"dropout", "dropout_schedule", "init_seed"}
    assert set(MLP) == trained | {"width", "depth", "activation", "dropout"}
    assert set(EXACT) == {"C", "l1_ratio", "penalty", "numbers"}
    assert set(KEYS) == set(MLP) | set(EXACT) | {
        "hypergrad_lr",
        "hypergrad_rule",
        "dropout_schedule",
        "init_seed",
        "rank",
        "alpha",
        "rslora",
    }
    assert set(VALUES) == set(KEYS) - {"penalty"}  # no key escapes the tests below


@pytest.mark.parametrize("key", VALUES)
def test_values_in_range_are_kept_and_others_refused(key):
    for value in VALUES[key][0]:
        assert check_config({key: value}) == {key: value}
    for value in VALUES[key][1]:
        with refused(
            rf"^trial\['{key}'\] must be .*, got {re.escape(shown_value(value))}\.? [A-Z]"
        ):
            check_config({key: value}, name="trial")
    if key not in (*WORDS, "rslora"):
        with refused(r"got the text '32'. For example"):
            check_config({key: "32"})
        for value in (True, np.True_, None, {1}, 1j):
            with refused("Use a number, for example"):
                check_config({key: value})


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("width", 32.0, 32),
        ("width", np.float32(32), 32),
        ("width", np.int16(32), 32),
        ("width", (np.int16(32), 8.0), (32, 8)),
        ("width", [32, 8], (32, 8)),
        ("width", 2**60 + 1, 2**60 + 1),
        ("lr", 1, 1.0),
        ("lr", np.float32(0.5), 0.5),
        ("lr", np.array(0.5), 0.5),
        ("lr", Fraction(1, 4), 0.25),
        ("activation", np.str_("relu"), "relu"),
        ("module__flag", np.True_, True),
    ],
)
def test_values_become_pythons_own(key, value, expected):
    value = check_config({key: value})[key]
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"width": (8, 0)},
            r"each layer of trial\['width'\] must be an integer >= 1, got 0\. For example 128",
        ),
        (
            {"width": ()},
            r"trial\['width'\] must have a value for each hidden layer, got \(\)\. For example \(100",
        ),
        (
            {"activation": ("relu", "tanh"), "dropout": (0.1, 0.2, 0.3)},
            r"trial\['dropout'\] must have 2 values, one for each hidden layer, because its activation is "
            r"\('relu', 'tanh'\), got \(0\.1, 0\.2, 0\.3\)\. Give 'dropout' 2 values, or one number",
        ),
        (
            {"width": (8, 4), "depth": 3},
            r"no 'depth', because its width \(8, 4\) sets 2 layers, got 3\. Leave",
        ),
        ({"activation": "ReLU"}, "one of relu, gelu, silu, tanh, got 'ReLU'. Did you mean 'relu'?"),
        ({"activation": "tahn"}, "got 'tahn'. Did you mean 'tanh'?"),
        ({"schedule": "step"}, "got 'step'. For example 'constant'"),
        (
            {"penalty": "elasticnet"},
            "one of l2, l1, none, got 'elasticnet'. .* leave 'penalty' out",
        ),
        (
            {"penalty": "l1", "l1_ratio": 0.5},
            r"one of 'penalty' and 'l1_ratio', .* got both. Use only 'l1_ratio'",
        ),
    ],
)
def test_configurations_that_cannot_be(config, message):
    with refused(message):
        check_config(config, name="trial")


def test_keys_are_sorted_modules_keep_their_values_and_penalty_is_the_older_word_for_l1_ratio():
    config = check_config({"module__b": (1, 2), "lr": 0.1, "module__a": None})
    assert list(config.items()) == [("lr", 0.1), ("module__a", None), ("module__b", (1, 2))]
    for penalty, C, ratio in (
        ("l2", 3.0, 0.0),
        ("l1", 3.0, 1.0),
        ("none", math.inf, 0.0),
        (None, math.inf, 0.0),
    ):
        assert check_config({"penalty": penalty, "C": 3}) == {"C": C, "l1_ratio": ratio}


@pytest.mark.parametrize(
    "key, keys, remedy",
    [
        ("widht", MLP, "Did you mean 'width'\\?"),
        ("learning_rate_init", MLP, "Did you mean 'lr'\\?"),
        ("hidden_layer_sizes", MLP, "Did you mean 'width'\\?"),
        ("hidden", MODULE, "Write an argument of the module as 'module__hidden'."),
        ("dropout_rate", MODULE, "Did you mean 'dropout'\\? Write an argument of the module as"),
        ("module__", MODULE, "Write an argument of the module"),
        ("width", EXACT, "Leave it out."),
        (
            "lr",
            EXACT,
            "The solved .* has no lr. Pass optimizer='adamw' to train it by gradient descent.",
        ),
        ("C", MLP, "Only the logistic regression solved with optimizer='exact' has C."),
        ("zzz", MLP, "Leave it out."),
        (3, MLP, "Leave it out."),
    ],
)
def test_an_unknown_key_is_an_error_that_says_what_to_do(key, keys, remedy):
    with refused(
        rf"^space must have only the keys {', '.join(sorted(keys))}.*, got {key!r}\. {remedy}"
    ):
        check_key(key, keys=keys, module=keys is MODULE, name="space")


def test_module_keys_need_a_module():
    check_key("module__hidden", keys=(), module=True, name="space")
    with refused(
        r"space has the key 'module__hidden', but module__\*, loss__\*, .* keys need an nn.Module"
    ):
        check_key("module__hidden", keys=MLP, module=False, name="space")
