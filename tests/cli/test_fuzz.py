"""Odd tables and odd command lines end in a result or in one line of words: never in a
traceback."""

import warnings

import numpy as np
import pandas
import polars
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gputune
from command_line import run, write_table
from gputune.check import check
from gputune.cli.arguments import make_parser
from gputune.engine import choice

QUICK = {"n_trials": 1, "max_epochs": 1, "cv": 2, "verbose": 0, "workers": 1}
FEW = ["--trials", "1", "--epochs", "2", "--cv", "2", "--workers", "1", "-q"]


def searched(X, y):
    """Search, refit and predict; a refusal is as good, if it is one of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            study = gputune.tune("mlp", X, y, **QUICK)
            return len(study.best_model().predict(X))
        except (gputune.InputError, gputune.SearchFailedError, gputune.DivergedError) as error:
            assert str(error)
            return None


NAMES = st.text(min_size=0, max_size=6) | st.sampled_from(
    ["😀", "a b", "x\ny", "; DROP TABLE", "=1+1", "y", ""]
)
CELLS = st.one_of(
    st.floats(width=32),
    st.integers(-(2**70), 2**70),
    st.booleans(),
    st.none(),
    st.text(max_size=4),
    st.datetimes(),
    st.lists(st.none() | st.integers(0, 3), max_size=2),
)


@st.composite
def frames(draw):
    """A DataFrame of a few rows; columns are constant, mixed, missing, duplicated or nested."""
    rows = draw(st.integers(0, 12))
    names = draw(st.lists(NAMES, max_size=4))
    columns = []
    for _ in names:
        kind = draw(st.sampled_from(["mixed", "constant", "numbers", "missing"]))
        one = draw(CELLS)
        numbers = draw(st.lists(st.floats(), min_size=rows, max_size=rows))
        mixed = draw(st.lists(CELLS, min_size=rows, max_size=rows))
        columns.append(
            {
                "mixed": mixed,
                "constant": [one] * rows,
                "numbers": numbers,
                "missing": [None] * rows,
            }[kind]
        )
    frame = (
        pandas.concat([pandas.Series(c, dtype=object) for c in columns], axis=1)
        if columns
        else pandas.DataFrame()
    )
    frame.columns = names
    return frame, draw(st.lists(st.sampled_from(["a", "b"]) | CELLS, min_size=rows, max_size=rows))


@given(frames())
def test_any_frame_is_searched_or_refused_in_words(case):
    frame, y = case
    searched(frame, y)


@pytest.mark.parametrize("rows", [0, 1, 2, 3])
def test_tables_of_few_rows(rows):
    assert searched(np.ones((rows, 2)), ["a", "b", "a"][:rows]) is None or rows > 1


def test_tables_that_are_searched_all_the_same():
    y = ["a", "b"] * 10
    draw = np.random.default_rng(0)
    duplicate = pandas.DataFrame(
        {"x": draw.normal(size=20), "constant": 1.0, "none": None, "word": "same"}
    )
    duplicate["x again"] = duplicate["x"]
    assert searched(duplicate, y) == 20
    odd = pandas.DataFrame(
        draw.normal(size=(20, 4)), columns=["😀", "a\tb", "عربي", "'; DROP TABLE trials; --"]
    )
    assert searched(odd, y) == 20


def test_a_hundred_thousand_levels():
    levels = polars.DataFrame(
        {"level": [f"l{i}" for i in range(100_000)], "x": [0.5, 1.5] * 50_000}
    )
    y = ["a", "b"] * 50_000
    one = {
        **QUICK,
        "n_trials": 1,
        "include_default": False,
        "space": {"batch_size": [2048], "lr": [0.1]},
    }
    assert gputune.tune("mlp", levels, y, **one).best_score == 1.0
    with pytest.raises(gputune.InputError, match="level"):
        gputune.tune("mlp", levels.drop("x"), y, **one)


def test_nested_and_missing_cells_are_refused_by_name():
    nested = polars.DataFrame({"x": [[1, None], None, [2]] * 4, "z": [1.0] * 12})
    with pytest.raises(gputune.InputError, match="'x'"):
        gputune.tune("mlp", nested, ["a", "b"] * 6, **QUICK)


PARSERS = make_parser()._subparsers._group_actions[0].choices
"""Every command, and what it understands."""
WORDS = """
bugs.csv kind out out/study.db a c nowhere gputune-out
0 1 2 3 -1 0.5 nan inf 1e400 9999999999999999999999 time:3 time: mlp logistic
net.py:Net random halving hypergradient accuracy r2 roc_auc lr=0.1 lr=1..2:log width=4,8 width=x lr= =1 exact sgd
cosine float64 1KB cpu cuda:9 quantile binary csv json ../x /dev/null '' \x00 \x1b[31m é 😀
""".split()


@st.composite
def command_lines(draw):
    """A command, often with its required arguments, then options of any command in any order."""
    command = draw(st.sampled_from([*PARSERS, *PARSERS, "", "-q", "--version", "nonsense"]))
    needed = {
        "tune": ["bugs.csv", "--target", "kind"],
        "predict": ["out/model", "bugs.csv"],
        "export": ["out/model"],
    }
    base = needed.get(command, ["out"]) if draw(st.booleans()) else []
    options = [
        name
        for parser in PARSERS.values()
        for action in parser._actions
        for name in action.option_strings
    ]
    words = st.sampled_from(WORDS) | st.text(max_size=3)
    return [command, *base, *draw(st.lists(st.sampled_from(options) | words, max_size=5))]


@pytest.fixture(scope="module")
def searched_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # that each holds, and how fast, are other tests
        patch.setattr(check, "LAWS", check.LAWS[:1])
        patch.setattr(choice, "MANY", {"cpu": 5, "cuda": 5})
        write_table(folder / "bugs.csv", 20, kind=["ant", "bee"] * 10)
        assert run("tune", "bugs.csv", "--target", "kind", *FEW, "--out", "out")[0] == 0
        yield folder


def test_random_command_lines_show_no_traceback(searched_folder):
    codes = []

    @given(command_lines())
    def run_one(words):
        quick = [*FEW, "--out", "out"] if words[0] == "tune" else []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code, _, err = run(words[0], *quick, *words[1:])
        assert code in (0, 1, 2) and "Traceback" not in err, err
        codes.append(code)

    run_one()
    assert min(map(codes.count, (0, 2))) > 5
