"""Flags and the arguments of gputune.tune: KEY=SPEC becomes a value, and errors of the Python API
are reported with flags.
"""

import inspect
import math
import shlex
from dataclasses import fields

import pytest

import gputune
from gputune.api.tuning import tune
from gputune.cli.arguments import make_parser
from gputune.cli.flags import CommandLine, flags
from gputune.cli.options import parse_spec, parse_specs
from gputune.ground.errors import PYTHON, InputError, option
from gputune.ground.types import defaults_in_words
from gputune.spaces.config import legal_keys
from gputune.spaces.distributions import distribution_text, log_int
from gputune.spaces.space import check_space
from gputune.study.record import IDENTITY
from refused import refused

PYTHON_ALONE = {"X", "y", "sample_weight", "epoch", "callbacks", "training_step", "augment"}
OF_METHODS = {
    field.name
    for method in (gputune.Halving, gputune.Median, gputune.Hypergradient)
    for field in fields(method)
} - {"min_trials", "step", "first_step", "smallest_step"}


def test_every_argument_that_has_an_option_is_known():
    known = flags()
    assert {*inspect.signature(tune).parameters} - PYTHON_ALONE | OF_METHODS <= known.keys()
    typed = [
        "tune",
        "FILE",
        *(f for f in known.values() if f in ("--no-default", "--quiet", "--per-layer")),
    ]
    assert make_parser().parse_args(typed).verbose == 0
    assert "tune" in make_parser().format_help()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--n-trials 3 --max-epochs=4 --random-state 5", "--trials 3 --epochs 4 --seed 5"),
        ("--study there --kinds zip=category", "--out there --kind zip=category"),
        ("--no-include-default --no-keep-predictions", "--no-default --no-predictions"),
        ("--hyperparameters lr,momentum", "--descend-on lr,momentum"),
        ("--budget 5m", "--timeout 5m"),
        ("--include-default --keep-predictions", ""),
    ],
)
def test_names_of_the_python_api_are_flags(typed, meant):
    parsed = vars(make_parser().parse_args(["tune", "FILE", *typed.split()]))
    expected = vars(make_parser().parse_args(["tune", "FILE", *meant.split()]))
    if not meant:
        expected |= {"include_default": True, "keep_predictions": True}
    assert parsed == expected


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("--space lr=0.1 FILE", {"space": ["lr=0.1"]}),
        ("--space lr=0.1 width=8 FILE --trials 3", {"space": ["lr=0.1", "width=8"]}),
        ("--space lr=0.1 --space width=8 FILE", {"space": ["lr=0.1", "width=8"]}),
        ("--space=lr=0.1 FILE", {"space": ["lr=0.1"]}),
        ("--space realmlp FILE", {"space": ["realmlp"]}),
        ("FILE --space lr=0.1 width", {"space": ["lr=0.1", "width"]}),
        ("--space lr=0.1 width FILE", {"space": ["lr=0.1", "width"]}),
        ("--kind a=date FILE", {"kinds": ["a=date"]}),
        (
            "--include lr=1 width=2 --include lr=2 FILE",
            {"include": [["lr=1", "width=2"], ["lr=2"]]},
        ),
        ("--ray FILE", {"ray": "local"}),
        ("--ray auto FILE", {"ray": "auto"}),
        ("FILE --ray here:80", {"ray": "here:80"}),
        ("--target-score -0.3 --space lr=1 FILE", {"target_score": -0.3, "space": ["lr=1"]}),
        ("--space lr=1 -- FILE", {"space": ["lr=1"]}),
    ],
)
def test_a_file_may_follow_an_option_with_several_values(words, options):
    parsed = make_parser().parse_args(["tune", *words.split()])
    assert parsed.file == "FILE"
    assert {name: getattr(parsed, name) for name in options} == options


@pytest.mark.parametrize("words", ["--space lr=0.1", "--ray auto", "--trials 3"])
def test_a_missing_file_is_an_error(words, capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args(["tune", *words.split()])
    assert "the following arguments are required: FILE" in capsys.readouterr().err


def test_set_may_precede_the_file():
    parsed = make_parser().parse_args("train --set lr=1 width=3 FILE".split())
    assert (parsed.file, parsed.config) == ("FILE", ["lr=1", "width=3"])


@pytest.mark.parametrize(
    ("typed", "hints"),
    [
        (
            "tune FILE --seed=1 --trails 3 --metrics --epoch=4",
            "--trails 3 --metrics --epoch=4. Did you mean '--trials'? Did you mean '--scoring'? "
            "Did you mean '--epochs'?",
        ),
        (
            "train FILE --trials 3",
            "--trials 3. train has no --trials, a flag of tune, search, resume.",
        ),
        ("train FILE --ensemble", "--ensemble. train has no --ensemble, a flag of tune, resume."),
        ("trials STUDY --ra", "--ra"),
        (
            "tune FILE --intervals 2,4",
            "2,4. --intervals takes no value. Did you mean '--interval'?",
        ),
        ("train FILE --metric f1", "--metric f1. Did you mean '--scoring'?"),
    ],
)
def test_each_flag_that_is_not_known_is_told_what_was_meant(typed, hints, capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args(typed.split())
    command = typed.partition(" ")[0]
    assert capsys.readouterr().err == (
        f"gputune: error: unrecognized arguments: {hints}\nTry 'gputune {command} --help'.\n"
    )


def test_the_default_space_is_in_every_help(capsys):
    for command in ("tune", "train"):
        with pytest.raises(SystemExit):
            make_parser().parse_args([command, "--help"])
        assert (
            defaults_in_words().split()
            == capsys.readouterr().out.split()[-len(defaults_in_words().split()) :]
        )
    assert defaults_in_words() in gputune.tune.__doc__


@pytest.mark.parametrize("label", IDENTITY.values())
def test_a_difference_of_two_searches_names_the_option(label):
    name = PYTHON.render(label)
    no_flag = {"data": name, "sample_weight": name, "epoch": name, "code": name}
    flag = no_flag.get(name, flags().get(name, "folds (--cv, --groups)"))
    assert CommandLine().render(label) == flag


@pytest.mark.parametrize("name", sorted(flags()))
def test_a_value_is_said_as_it_is_typed(name):
    flag = flags()[name]
    render = CommandLine().render
    if name not in ("study", "kinds"):
        assert render(f"choose {option(name, 'some')}.") == f"choose {flag} some."
        assert render(f"choose {option(name, -0.5)}.") == f"choose {flag} -0.5."
    assert render(f"a smaller {option(name)} helps") == f"a smaller {flag} helps"
    assert InputError(name, "must be 3", got=4).text(CommandLine()) == f"{flag} must be 3, got 4."


@pytest.mark.parametrize(
    "text, expected",
    [
        ("width=32,64,128", [32, 64, 128]),
        ("width=64", 64),
        ("width=(100,50),64", [(100, 50), 64]),
        ("dropout=(0,0.3),(0.3,0)", [(0, 0.3), (0.3, 0)]),
        ("activation=relu,(relu,tanh)", ["relu", ("relu", "tanh")]),
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
        ("width", r"A hyperparameter must be written KEY=SPEC, got 'width'\. Examples: width=32"),
        ("=3", "A hyperparameter must be written KEY=SPEC, got '=3'"),
        ("width=", "A hyperparameter must be written KEY=SPEC, got 'width='"),
        ("width=a..b", "two finite numbers, got 'width=a..b'. Examples"),
        ("width=16..", "two finite numbers, got 'width=16..'. Examples"),
        ("lr=0.1..inf", "two finite numbers"),
        (
            "lr=1e-4..1e-1:lg",
            "may end in ':log', but not in ':lg', got 'lr=1e-4..1e-1:lg'. Examples",
        ),
        (
            "width=9..9",
            "must have LOW < HIGH, got 'width=9..9'. Swap the ends, or write width=9 for one value",
        ),
        ("lr=0.1..0.01:log", "must have LOW < HIGH"),
        ("lr=0..0.1:log", "must have LOW > 0, got 'lr=0..0.1:log'. For example lr=0.0001..0.1:log"),
        ("module__k=-2..-1.5:log", "must have LOW > 0, .*For example module__k=1e-4..1e-1:log"),
        ("width=1.5..3", "A range of width must have integer ends, got 'width=1.5..3'. Examples"),
        ("width=0..9:log", "must have LOW > 0"),
        ("width=32,,64", "A list must have no empty value, got 'width=32,,64'. Examples"),
        (
            "width=wide",
            "width must be an integer >= 1, got the text 'wide' in 'width=wide'. Examples",
        ),
        ("lr=0.1..0.2,0.5", "lr must be a finite number > 0, got the text '0.1..0.2' in"),
    ],
)
def test_malformed_text_gets_the_remedy(text, message):
    with refused(message):
        parse_spec(text)


def test_several_specs_make_one_space():
    space = parse_specs(
        ["lr=1e-4..1e-1:log", "width=16..256", "activation=relu,tanh", "dropout=0..0.5", "depth=2"]
    )
    assert list(space) == ["lr", "width", "activation", "dropout", "depth"]
    assert check_space(space, keys=legal_keys("mlp", "adamw"), module=False)[0]["depth"] == [2]
    with refused(r"must name each key once, got 'lr' twice\. Join them: lr=A,B"):
        parse_specs(["lr=0.1", "lr=0.2"])


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", [""]),
        ("a,b", ["a", "b"]),
        ('"a,b",c', ["a,b", "c"]),
        ("a,", ["a", ""]),
        ("a b", ["a b"]),
    ],
)
def test_names_of_columns(text, names):
    assert make_parser().parse_args(["tune", "x", "--drop", text]).drop == names
    assert make_parser().parse_args(["predict", "x", "y", "--keep", text]).keep == names
    assert make_parser().parse_args(["tune", "x", "--category-copies", ""]).category_copies == []
    shown = CommandLine().render(option("drop", names))
    assert shlex.split(shown)[0] == "--drop"
    assert make_parser().parse_args(["tune", "x", *shlex.split(shown)]).drop == names
