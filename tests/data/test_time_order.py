"""Rows in the order of time: ``cv="time:5"`` follows the date column of a table."""

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import TimeSeriesSplit

import gputune
from gputune.data.folds import in_time_order, parse_cv, time_remark
from gputune.data.source import read_source, split_held_out
from gputune.data.table import as_table
from gputune.data.target import check_target
from gputune.ground.errors import PYTHON
from refused import refused

N = 40
DATES = pd.date_range("2024-01-01", periods=N, freq="D")
SHUFFLED = np.random.default_rng(0).permutation(N)


def table(**columns):
    return as_table(pd.DataFrame({"value": np.arange(N), **columns}))


def order_of(X, cv="time:3"):
    return in_time_order(parse_cv(cv), X).order


def test_a_time_split_follows_an_unsorted_date_column():
    X = table(day=DATES[SHUFFLED])
    splitter = in_time_order(parse_cv("time:3"), X)
    in_order = np.argsort(SHUFFLED)
    for (train, valid), (first, later) in zip(
        splitter.split(np.zeros(N)), TimeSeriesSplit(3).split(np.zeros(N)), strict=True
    ):
        assert np.array_equal(train, in_order[first]) and np.array_equal(valid, in_order[later])
        assert DATES[SHUFFLED[train]].max() < DATES[SHUFFLED[valid]].min()
    assert "not sorted by the date column 'day'" in time_remark(splitter, X)


def test_sorted_rows_and_tables_without_dates_keep_their_order():
    other = DATES[SHUFFLED]
    for X in (table(day=DATES), table(), table(day=DATES, other=other), np.zeros((N, 2))):
        cv = parse_cv("time:3")
        assert in_time_order(cv, X) is cv and time_remark(cv, X) == ""
    days = DATES.to_series().reset_index(drop=True)
    days[5] = pd.NaT
    assert order_of(table(day=days)) is None


def test_rows_sorted_by_none_of_several_date_columns_keep_their_order_with_a_remark():
    X = table(start=DATES[SHUFFLED], end=DATES[::-1])
    assert order_of(X) is None
    assert time_remark(parse_cv("time:3"), X).startswith(
        "the rows are sorted by none of the date columns 'start', 'end', so the folds take the rows "
        "in their given order; sort the rows first"
    )


def test_a_date_column_with_one_value_does_not_hide_the_order_of_another():
    some = DATES.to_series().reset_index(drop=True).where(np.arange(N) == 5)
    for exported in (["2024-05-05"] * N, some):
        X = table(exported=pd.to_datetime(exported), day=DATES[SHUFFLED])
        assert np.array_equal(order_of(X), np.argsort(SHUFFLED))
        assert "not sorted by the date column 'day'" in time_remark(parse_cv("time:3"), X)
    assert order_of(table(exported=pd.to_datetime(["2024-05-05"] * N))) is None


def test_a_dropped_date_column_still_orders_the_rows(tmp_path):
    frame = pd.DataFrame({"day": DATES[SHUFFLED], "value": np.arange(N), "y": np.arange(N) + 0.5})
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.loc[7, "y"] = np.nan
    for X in (tmp_path / "t.csv", frame):
        source = read_source(X, "y", drop=["day"], missing_target="drop")
        target = check_target(source.y, n_rows=len(source.X))
        rest, test = split_held_out(source, target, test_size=0.2, cv="time:3", seed=0)
        days = frame["day"].to_numpy()
        assert (
            days[rest.X.column("value").astype(int)].max()
            < days[test.X.column("value").astype(int)].min()
        )
        assert "not sorted by the date column 'day'" in time_remark(parse_cv("time:3"), rest.X)
        in_order = days[rest.X.column("value").astype(int)[order_of(rest.X)]]
        assert (np.diff(in_order) > np.timedelta64(0)).all()
    # A date column that the model reads comes first.
    X = table(day=DATES[SHUFFLED], other=DATES[::-1]).drop("other")
    assert np.array_equal(order_of(X), np.argsort(SHUFFLED))
    assert order_of(table(day=DATES[SHUFFLED], other=DATES).drop("other")) is None


def test_unsorted_dates_of_text_keep_their_order_with_a_remark():
    days = DATES.strftime("%Y-%m-%d")
    cv = parse_cv("time:3")
    X = table(name=["b", "a"] * (N // 2), day=days[SHUFFLED])
    assert in_time_order(cv, X) is cv
    assert PYTHON.render(time_remark(cv, X)) == (
        "the dates of the column 'day' are text, so the folds take the rows in their given order; "
        "to order the rows by these dates, set kinds={'day': 'date'}"
    )
    assert order_of(X.read_as({"day": "date"})) is not None
    for other in (
        table(day=days),
        table(day=days[SHUFFLED], end=DATES),
        table(day=["b", None] * (N // 2)),
    ):
        assert time_remark(cv, other) == ""
    assert time_remark(TimeSeriesSplit(3), X) == "" and time_remark(5, X) == ""
    assert str(cv) == "time:3"


def test_splitters_of_scikit_learn_take_the_rows_as_they_are():
    X = table(day=DATES[SHUFFLED])
    cv = TimeSeriesSplit(3)
    assert in_time_order(cv, X) is cv and time_remark(cv, X) == ""


def test_missing_dates_cannot_be_sorted():
    days = DATES[SHUFFLED].to_series().reset_index(drop=True)
    days[[3, 8]] = pd.NaT
    with refused(
        r"cv splits by time, but the date column 'day' has 2 missing values \(the first is in row 3\). "
        "Fill in the values, leave out these rows, or sort the rows."
    ):
        order_of(table(day=days))


def test_a_search_says_that_its_folds_follow_the_dates():
    X = pd.DataFrame({"day": DATES[SHUFFLED], "value": np.arange(N)})
    y = np.random.default_rng(1).normal(size=N)
    options = {"n_trials": 2, "max_epochs": 2, "task": "regression", "verbose": 0}
    shuffled = gputune.tune("mlp", X, y, cv="time:3", **options)
    assert any("not sorted by the date column 'day'" in note for note in shuffled.meta["notes"])
    assert shuffled.meta["cv"] == "time:3"
    in_order = np.argsort(SHUFFLED)
    own = list(TimeSeriesSplit(3).split(np.zeros(N)))
    pairs = [(in_order[train], in_order[valid]) for train, valid in own]
    same = gputune.tune("mlp", X, y, cv=pairs, **options)
    assert np.array_equal(shuffled.curves, same.curves)
    with refused("cv must be the number of folds, such as 5, or a time series split, such as"):
        gputune.tune("mlp", X, y, cv="time:1", **options)


@pytest.mark.parametrize("split", ["time", "groups"])
@pytest.mark.parametrize("model", ["mlp", pytest.param("realmlp", marks=pytest.mark.long)])
def test_nothing_leaks_from_one_group_or_time_into_another(split, model):
    """A feature tells the group (or the month) exactly, and the class is random in each group.

    Folds of random rows reach an accuracy of 1. Folds of whole groups, or of later months, cannot
    be better than chance.
    """
    rng = np.random.default_rng(3)
    n_groups = 24
    group = np.repeat(np.arange(n_groups), 25)
    classes = rng.permutation(np.arange(n_groups) % 2)
    mixed = rng.permutation(len(group))
    group = group[mixed]
    noise = rng.normal(size=len(group))
    if split == "time":
        days = pd.Timestamp("2024-01-01") + pd.to_timedelta(group * 30, "D")
        X = pd.DataFrame({"day": days, "noise": noise})
        options = {"cv": "time:4"}
    else:
        name = [f"g{number}" for number in group]
        X = pd.DataFrame({"name": name, "noise": noise})
        options = {"cv": 4, "groups": group}
    y = classes[group]
    search = {"n_trials": 3, "max_epochs": 12, "verbose": 0, "space": model, "random_state": 0}
    study = gputune.tune(model, X, y, **options, **search)
    ensemble = study.ensemble(calibrate=True, verbose=0)
    assert study.best_score < 0.72
    assert ensemble.info["score"] < 0.72
    if split == "groups":
        assert gputune.tune(model, X, y, cv=4, **search).best_score > 0.95
