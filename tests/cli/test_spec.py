"""The command line's KEY=SPEC becomes the value that a Python user would write."""

import math

import pytest

from gputune.cli.options import parse_spec, parse_specs
from gputune.methods.config import legal_keys
from gputune.methods.distributions import distribution_text, log_int
from gputune.methods.space import check_space
from refused import refused


@pytest.mark.parametrize(
    "text, expected",
    [
        ("width=32,64,128", [32, 64, 128]),
        ("width=64", 64),
        ("width=(100,50),64", [(100, 50), 64]),
        (" lr = 0.1 , 1e-2 ", [0.1, 0.01]),
        ("lr=1e-3", 0.001),
        ("C=inf", math.inf),
        ("activation=relu,tanh", ["relu", "tanh"]),
        ("optimizer=sgd", "sgd"),
        ("penalty=none,l1", ["none", "l1"]),
        ("module__hidden=8,16", [8, 16]),
        ("module__flag=true,False", [True, False]),
        ("module__mode=fast,2,0.5", ["fast", 2, 0.5]),
        ("module__path=../here", "../here"),
        ("module__text=a=b", "a=b"),
        ("optimizer__betas=(0.9,0.99),( .8, 0.9 )", [(0.9, 0.99), (0.8, 0.9)]),
        ("optimizer__betas=(0.9,0.99)", [(0.9, 0.99)]),
        ("module__kernel=(3,5),7", [(3, 5), 7]),
        ("module__text=f(a,b)", "f(a,b)"),
    ],
)
def test_lists_and_single_values(text, expected):
    key, value = parse_spec(text)
    assert (key, value) == (text.partition("=")[0].strip(), expected)
    assert [type(v) for v in (value if isinstance(value, list) else [value])] == [
        type(v) for v in (expected if isinstance(expected, list) else [expected])
    ]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("width=16..256", "randint(low=16, high=257)"),
        ("width=1e1..1e2", "randint(low=10, high=101)"),
        ("lr=1e-4..1e-1:log", "loguniform(a=0.0001, b=0.1)"),
        ("lr=1..10:log", "loguniform(a=1.0, b=10.0)"),
        ("dropout=0..0.5", "uniform(loc=0.0, scale=0.5)"),
        ("dropout= .1 .. .5 ", "uniform(loc=0.1, scale=0.4)"),
        ("module__k=-1..1", "randint(low=-1, high=2)"),
        ("module__k=0..1.0", "uniform(loc=0.0, scale=1.0)"),
    ],
)
def test_ranges_are_scipys(text, expected):
    assert distribution_text(parse_spec(text)[1]) == expected


def test_both_ends_of_an_integer_range_are_drawn():
    assert set(parse_spec("depth=1..3")[1].rvs(size=100, random_state=0)) == {1, 2, 3}
    assert parse_spec("width=16..256:log") == ("width", log_int(16, 256))
    assert parse_spec("module__k=1..9:log") == ("module__k", log_int(1, 9))


@pytest.mark.parametrize(
    "text, message",
    [
        ("width", r"A space is written KEY=SPEC, got 'width'\. Examples: width=32"),
        ("=3", "A space is written KEY=SPEC, got '=3'"),
        ("width=", "A space is written KEY=SPEC, got 'width='"),
        ("width=a..b", "two finite numbers, got 'width=a..b'. Examples"),
        ("width=16..", "two finite numbers, got 'width=16..'. Examples"),
        ("lr=0.1..inf", "two finite numbers"),
        ("lr=1e-4..1e-1:lg", "may end in ':log', not in ':lg', got 'lr=1e-4..1e-1:lg'. Examples"),
        ("width=9..9", "needs LOW < HIGH, got 'width=9..9'. Swap the ends, or write width=9 for one value"),
        ("lr=0.1..0.01:log", "needs LOW < HIGH"),
        ("lr=0..0.1:log", "needs LOW > 0, got 'lr=0..0.1:log'. For example lr=0.0001..0.1:log"),
        ("module__k=-2..-1.5:log", "needs LOW > 0, .*For example module__k=1e-4..1e-1:log"),
        ("width=1.5..3", "A range of width needs integer ends, got 'width=1.5..3'. Examples"),
        ("width=0..9:log", "needs LOW > 0"),
        ("width=32,,64", "needs a value at each place, got 'width=32,,64'. Examples"),
        ("width=wide", "width must be an integer >= 1, got the text 'wide' in 'width=wide'. Examples"),
        ("lr=0.1..0.2,0.5", "lr must be a finite number > 0, got the text '0.1..0.2' in"),
    ],
)
def test_malformed_text_gets_the_remedy(text, message):
    with refused(message):
        parse_spec(text)


def test_several_specs_make_one_space():
    space = parse_specs(["lr=1e-4..1e-1:log", "width=16..256", "activation=relu,tanh", "dropout=0..0.5", "depth=2"])
    assert list(space) == ["lr", "width", "activation", "dropout", "depth"]
    assert check_space(space, keys=legal_keys("mlp", "adamw"), module=False)[0]["depth"] == [2]
    with refused(r"must name a key once, got 'lr' twice\. Join them: lr=A,B"):
        parse_specs(["lr=0.1", "lr=0.2"])
