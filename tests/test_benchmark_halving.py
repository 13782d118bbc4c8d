"""The benchmark of halving, with few trials: what is read off the full curves is what is run."""

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_iris

import gputune

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return import_module("benchmark.studies.halving")


@pytest.mark.long
def test_what_is_read_off_is_what_halving_does(benchmark):
    common = {"n_trials": 17, "max_epochs": 27, "cv": 3, "workers": 1, "verbose": 0, "dtype": "float64"}
    full, halved = (
        gputune.tune("mlp", *load_iris(return_X_y=True), method=m, **common) for m in ("random", "halving")
    )
    stays, spent = benchmark.halved(full.curves, gputune.Halving(), 27)
    assert stays.tolist() == [t.number for t in halved.trials if t.state == "complete"]
    assert spent == halved.spent[0]


@pytest.fixture
def small(benchmark, monkeypatch):
    """The command with 9 trials of iris."""
    main = import_module("benchmark.__main__")
    monkeypatch.setattr(benchmark, "TRIALS", 9)
    monkeypatch.setattr(benchmark, "tables", lambda adult: {"iris": load_iris(return_X_y=True)})
    return lambda out: main.main(["--halving", "--epochs", "4", "--repeats", "2", "--out", str(out)])


def test_the_report_is_written(benchmark, small, tmp_path, capsys):
    assert small(tmp_path) == 0
    (numbers,), (page,) = tmp_path.glob("halving-*.json"), tmp_path.glob("halving-*.md")
    whole = json.loads(numbers.read_text())
    assert (whole["trials"], whole["epochs"], len(whole["seeds"])) == (9, 4, 2)
    first, second = (benchmark.Seed(**one) for one in whole["seeds"])
    assert first.run == pytest.approx(first.halving, abs=2e-3) and second.run is None
    assert first.full_epochs == 36 and first.halving_epochs == 9 + 3 * 2 + 1 * 1
    text = page.read_text()
    assert text in capsys.readouterr().out
    for one in (first, second):
        assert f"| iris | {one.seed} | {one.full:.4f} | {one.halving:.4f} | {one.loss:.2%} | 44.4% |" in text
    assert "0 of 2 reach the aim." in text  # four epochs are too few to save much


@pytest.mark.long
def test_a_benchmark_that_was_stopped_goes_on(benchmark, small, tmp_path, monkeypatch):
    compare, done = benchmark.compare, []

    def stopped(*arguments, seed, **options):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(seed)
        return compare(*arguments, seed=seed, **options)

    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "compare", stopped)
        with pytest.raises(KeyboardInterrupt):
            small(tmp_path)
    assert [place.name for place in tmp_path.iterdir()] == ["halving.jsonl"]
    again = []
    monkeypatch.setattr(
        benchmark, "compare", lambda *a, seed, **o: again.append(seed) or compare(*a, seed=seed, **o)
    )
    assert small(tmp_path) == 0 and again == [1]
    assert {place.suffix for place in tmp_path.iterdir()} == {".json", ".md"}
    small(tmp_path)
    assert again == [1, 0, 1]


@pytest.mark.long
def test_no_table_is_shown_where_halving_ends_otherwise(benchmark, small, tmp_path, monkeypatch, capsys):
    curves = benchmark.halved
    monkeypatch.setattr(
        benchmark, "halved", lambda *a: (np.array([np.argmin(a[0][:, -1].mean(1))]), curves(*a)[1])
    )
    assert small(tmp_path) == 1
    assert "NO COMPARISON: halving as it is run ends with another score" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_census_table_is_read(benchmark, tmp_path):
    row = "{age}, Private, 77516, Bachelors, 13, ?, White, Male, 2174, 0, 40, {income}"
    rows = [row.format(age=20 + i, income=">50K" if i % 3 else "<=50K") for i in range(30)]
    (tmp_path / "adult.data").write_text("\n".join(rows) + "\n")
    X, y = benchmark.adult_sample(tmp_path / "adult.data")
    assert X.shape == (30, 11) and y.sum() == 20
    assert X[:, 5].is_null().all() and X[:, 2].dtype.is_integer() and X[0, 1] == "Private"
    assert list(benchmark.tables(None)) == ["digits"]
    assert list(benchmark.tables(tmp_path / "adult.data")) == ["digits", "adult"]
