"""A space is checked before anything trains, and its text is the same in every process."""

import numpy as np
import pytest
from scipy import stats
from torch import nn

from forked import Fork
from gputune.spaces.config import legal_keys
from gputune.spaces.distributions import log_int, space_text
from gputune.spaces.space import check_include, check_space
from refused import refused

MLP = legal_keys("mlp", "adamw")
EXACT = legal_keys("logistic", "exact")


NO_SPACES = (3, "lr", None, [3], [{"lr": 0.1}, "lr"])


def check(space, keys=MLP, module=False):
    return check_space(space, keys=keys, module=module)


@pytest.mark.parametrize(
    "choices, expected",
    [
        ([32, 64.0], [32, 64]),
        (range(1, 4), [1, 2, 3]),
        (np.array([32, 64]), [32, 64]),
        (np.array(32.0), [32]),
        (np.int64(32), [32]),
        (32, [32]),
        ([32, 32], [32, 32]),
    ],
)
def test_choices_become_a_list_of_pythons_numbers(choices, expected):
    (space,) = check({"width": choices})
    assert space == {"width": expected} and all(type(v) is int for v in space["width"])


def test_distributions_are_kept_dicts_are_alternatives_and_arguments_are_the_modules_business():
    laws = {"lr": stats.loguniform(1e-4, 1e-1), "width": log_int(8, 64)}
    assert check(laws | {"activation": "relu"}) == [laws | {"activation": ["relu"]}]
    two = [{"optimizer": "sgd", "momentum": [0.0, 0.9]}, {"optimizer": ["adamw"]}]
    assert check(tuple(two)) == [
        {"optimizer": ["sgd"], "momentum": [0.0, 0.9]},
        {"optimizer": ["adamw"]},
    ]
    arguments = {
        "module__act": [nn.ReLU, nn.Tanh],
        "module__sizes": [[8], [8, 8]],
        "module__k": stats.norm(0, 1),
    }
    space = {**arguments, "module__p": None, "lr": 0.1}
    assert check(space, legal_keys("module", "adamw"), True) == [
        {**arguments, "module__p": [None], "lr": [0.1]}
    ]
    with refused("must have parameters in their range"):
        check({"module__k": stats.norm(0, -1)}, module=True)


def test_penalty_stays_a_key_of_the_space():
    assert check({"penalty": ["l1", "l2", None], "C": [1]}, EXACT) == [
        {"penalty": ["l1", "l2", "none"], "C": [1.0]}
    ]
    with refused(r"^space\[1\] must have only one of 'penalty' and 'l1_ratio'"):
        check([{"C": 1}, {"penalty": "l1", "l1_ratio": 0.5}], EXACT)


@pytest.mark.parametrize(
    "space, message",
    [
        *(
            (space, "space must be a dict or a list of dicts, got .* For example space=")
            for space in NO_SPACES
        ),
        *(
            (space, "space must have at least one key, got .*default space")
            for space in ({}, [], [{}], [{"lr": 1}, {}])
        ),
        *(
            ({"lr": empty}, "must have at least one value, .*leave the key out")
            for empty in ([], (), np.array([]))
        ),
        (
            {"lr": (1e-4, 3e-2)},
            r"^space\['lr'\] must be a list .*Write \[0.0001, 0.03\] for two values to choose from, "
            r"or scipy.stats.loguniform\(0.0001, 0.03\) for a range",
        ),
        ({"depth": (1, 4)}, r"or scipy.stats.randint\(1, 5\) for"),
        ({"dropout": (0, 0.5)}, r"or scipy.stats.uniform\(0, 0.5\) for"),
        ({"widht": [8]}, "^space must have only the keys .*got 'widht'. Did you mean 'width'?"),
        (
            {"max_epochs": [8]},
            "got 'max_epochs'. All trials train for the same number of epochs. Pass max_epochs=20.",
        ),
        ([{"lr": [1]}, {"lrr": [1]}], r"^space\[1\] must have only the keys .*Did you mean 'lr'?"),
        ({"module__k": [8]}, r"^space has the key 'module__k', but module__"),
        ({"lr": [0.1, 0]}, r"^space\['lr'\] must be a finite number > 0, got 0"),
        ([{"lr": 1}, {"lr": -1}], r"^space\[1\]\['lr'\] must be a finite number > 0, got -1"),
        ({"lr": {0.1, 0.2}}, r"^space\['lr'\] must be a list, because a set has no order, got {"),
        (
            {"width": (32, 64)},
            r"a tuple lists the layers of one network, got \(32, 64\)\. Write \[32, 64\] for .*\[\(32, 64\)\]",
        ),
        (
            {"width": [8, (4, 2)], "depth": [1]},
            "no 'depth', because a width that is a tuple.* Write a list of spaces",
        ),
        (
            {"activation": ("relu", "tanh")},
            r"a tuple lists the layers .* Write \['relu', 'tanh'\] for values to choose from, "
            r"\[\('relu', 'tanh'\)\] for one network",
        ),
        ({"dropout": (0.5, 0.1)}, r"a tuple lists the layers of one network, got \(0.5, 0.1\)"),
        (
            {"dropout": [(0.5, 1.0)]},
            r"^each layer of space\['dropout'\] must be a number in \[0, 1\)",
        ),
        ({"dropout": [((0.5, 0.1), 0.1)]}, r"^each layer of space\['dropout'\] must be a number"),
        (
            {"activation": [("relu", "tahn")]},
            r"^each layer of space\['activation'\] must be one of .* Did you mean 'tanh'",
        ),
        (
            {"dropout": [0.1, (0.1, 0.2)], "depth": [2]},
            "no 'depth', because a dropout that is a tuple.* Write a list of spaces",
        ),
        (
            {"width": [(8, 4), (8, 4, 2)], "dropout": [(0.1, 0.2)]},
            r"^space must have tuples for one number of hidden layers, got 'width' for 2 or 3, "
            r"'dropout' for 2\. Write a list of spaces, one for each number of layers",
        ),
        ({"width": [17.3]}, r"^space\['width'\] must be an integer >= 1, got 17.3. Use a list"),
        ({"width": "32"}, r"^space\['width'\] must be an integer >= 1, got the text '32'"),
        ({"width": np.ones((2, 2))}, r"must be 1-D, got an array of shape \(2, 2\)"),
        (
            {"activation": ["relu", "swish"]},
            r"^space\['activation'\] must be one of relu, .*got 'swish'",
        ),
        (
            {"activation": stats.randint(0, 4)},
            "must be a list of values from relu, .*got a distribution.",
        ),
    ],
)
def test_bad_spaces_are_refused_before_any_draw(space, message):
    with refused(message):
        check(space)


class Ours:
    def rvs(self, random_state=None):
        return 17.3


@pytest.mark.parametrize(
    "key, law",
    [
        ("width", Ours()),
        ("lr", stats.uniform(0, 0.1)),
        ("lr", stats.expon(scale=0.01)),
        ("lr", stats.lognorm(1)),
        ("lr", stats.uniform),
        ("weight_decay", stats.randint(0, 3)),
        ("dropout", stats.uniform(0, 1)),
        ("dropout", stats.beta(2, 2)),
        ("width", stats.randint(1, 65)),
        ("width", stats.poisson(20, loc=1)),
        ("width", log_int(1, 64)),
    ],
)
def test_distributions_inside_the_range_are_taken(key, law):
    assert check({key: law}) == [{key: law}]


@pytest.mark.parametrize(
    "key, law, message",
    [
        (
            "lr",
            stats.uniform(-0.1, 0.2),
            r"must be a finite number > 0, got uniform\(loc=-0.1, scale=0.2\)",
        ),
        ("lr", stats.norm(0.1, 0.01), "which draws from -inf to inf. Narrow its range"),
        ("lr", stats.randint(0, 3), "which draws from 0 to 2. Narrow its range"),
        (
            "lr",
            stats.loguniform(0, 1),
            r"parameters in their range, got loguniform\(a=0.0, b=1.0\)",
        ),
        ("lr", stats.loguniform(1, 0.1), "loguniform needs 0 < low < high"),
        ("lr", stats.uniform(1, -1), "needs width > 0"),
        (
            "lr",
            stats.loguniform,
            "a frozen distribution, got stats.loguniform without its parameters a, b",
        ),
        ("dropout", stats.uniform(0, 1.5), r"must be a number in \[0, 1\), .*draws from 0 to 1.5"),
        ("dropout", stats.randint(0, 2), "draws from 0 to 1. Narrow"),
        ("weight_decay", stats.uniform(-1e-9, 1), "must be a finite number >= 0"),
        (
            "width",
            stats.uniform(16, 32),
            r"got uniform\(.*\), which draws real numbers. Use a list, scipy",
        ),
        ("width", stats.randint(0, 9), "must be an integer >= 1, .*draws from 0 to 8"),
        ("width", stats.poisson(20), "draws from 0 to inf"),
        ("width", stats.randint(9, 3), r"randint\(low, high\) needs low < high"),
    ],
)
def test_distributions_outside_the_range_are_refused_before_any_draw(key, law, message):
    with refused(message):
        check({key: law})


@pytest.mark.parametrize(
    "include, message",
    [
        (
            {"lr": 0.1},
            r"include must be a list of dicts, got \{'lr': 0.1\}. For example include=\[\{'lr",
        ),
        ([0.1], "include must be a list of dicts"),
        ([{}, {"widht": 3}], r"^include\[1\] must have only the keys .*Did you mean 'width'?"),
        ([{"module__k": 3}], "need an nn.Module class"),
        (
            [{"lr": [0.1, 0.2]}],
            r"^include\[0\]\['lr'\] must be a finite number > 0, got \[0.1, 0.2\]",
        ),
    ],
)
def test_the_included_configurations_are_checked(include, message):
    with refused(message):
        check_include(include, keys=MLP, module=False)
    assert check_include([{"width": 8.0, "lr": 1}, {}], keys=MLP, module=False) == [
        {"lr": 1.0, "width": 8},
        {},
    ]
    assert check_include(({"module__k": "a"},), keys=(), module=True) == [{"module__k": "a"}]


def test_space_text():
    lr = stats.loguniform(1e-4, 0.1)
    depth = log_int(1, 4)
    space = {"width": [32, 64], "lr": lr, "activation": "relu", "depth": depth}
    text = (
        "activation=['relu'], depth=log_int(1, 4), lr=loguniform(a=0.0001, b=0.1), width=[32, 64]"
    )
    assert space_text(check(space)) == text
    assert space_text(check(dict(reversed(space.items())))) == text
    assert space_text(check([space, {"lr": 0.5}])) == f"{text} | lr=[0.5]"


def named():
    pass


def test_space_text_of_a_modules_arguments_has_the_whole_of_an_array_and_no_address():
    space = {"module__f": [named, nn.ReLU], "module__sizes": [[8], [8, 8]], "module__p": None}
    text = space_text(check(space, (), True))
    assert text.endswith("module__p=[None], module__sizes=[[8], [8, 8]]")
    assert ".named, torch.nn.modules.activation.ReLU]" in text
    values = np.arange(5000.0)
    texts = [
        space_text(check({"module__w": [v]}, (), True))
        for v in (values, values + (values == 2500), values)
    ]
    assert texts[0] == texts[2] != texts[1]
    for value in (lambda: 0, object()):
        with refused(r"space\['module__f'\] must have values with the same text .*Use a number"):
            space_text(check({"module__f": [value]}, (), True))


CODE = """
from scipy import stats
from gputune.spaces.distributions import log_int, space_text
from gputune.spaces.space import check_space

histogram = stats.rv_histogram(([1, 2], [0, 0.1, 0.2]), density=False)
space = {"lr": stats.loguniform(1e-4, 0.1), "width": log_int(1, 9), "activation": ["relu"], "dropout": histogram}
text = space_text(check_space(space, keys=set(space), module=False))
"""


def test_space_text_is_the_same_in_another_process():
    here = {}
    exec(CODE, here)
    there, _ = Fork(CODE + "print(text)").communicate()  # which has other hashes
    assert (
        there.strip() == here["text"]
        and "rv_histogram(draws=" in there
        and "width=log_int(1, 9)" in there
    )
