"""The other parts of the benchmark in a tiny form: each writes its report, and none where numbers
must not stand."""

import json
import math
import re
import statistics
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import joblib
import numpy as np
import pandas as pd
import polars as pl
import pytest
from sklearn.datasets import load_digits, load_iris
from sklearn.dummy import DummyClassifier

from gputune.native.library import find_compiler
from problems import needs_compiled_code


@pytest.fixture
def study(script, tmp_path, capsys, monkeypatch):
    """Run a part by its name with other constants; return its result, its numbers, and its printed
    page.
    """

    def run(name, *options, **constants):
        module = script(f"benchmark.studies.{name}")
        for key, value in constants.items():
            monkeypatch.setattr(module, key, value)
        option = name.replace("_", "-")
        code = script("benchmark.__main__").main([f"--{option}", "--out", str(tmp_path), *options])
        said = capsys.readouterr().out
        files = list(tmp_path.iterdir())
        if code and not (name in ("modules", "operations") and files):
            assert not files and "|" not in said.partition("NO ")[2]
            return code, None, said
        (numbers,), (page,) = tmp_path.glob(f"{name}-*.json"), tmp_path.glob(f"{name}-*.md")
        text = page.read_text()
        assert text in said
        return code, json.loads(numbers.read_text()), text

    return run


ROOT = Path(__file__).parents[2]


def test_the_speeds_of_modules_in_the_docs_are_those_of_the_results():
    page = (ROOT / "docs/benchmark-modules.md").read_text()
    (path,) = (ROOT / "scripts/benchmark/results").glob("modules-amd-*.json")
    for row in json.loads(path.read_text())["rows"]:
        ours, loop, optuna = (
            statistics.median(row["seconds"][e]) for e in ("gputune", "loop", "optuna")
        )
        numbers = f"{ours:.1f} | {loop:.1f} | {loop / ours:.1f} | {optuna / ours:.1f}"
        assert f"| {row['name']} | {row['work']} | {numbers} |" in page


def test_the_speeds_of_operations_in_the_docs_are_those_of_the_results():
    page = (ROOT / "docs/benchmark-modules.md").read_text()
    (path,) = (ROOT / "scripts/benchmark/results").glob("operations-*.json")
    rows = json.loads(path.read_text())["rows"]
    ratios = sorted(row["recorded"] / row["compiled"] for row in rows)
    assert f"recorded steps for {len(rows)} [common operations]" in page and ratios[0] > 1
    median = statistics.median(ratios)
    assert f"{ratios[0]:.1f}x to {ratios[-1]:.0f}x faster, {median:.1f}x in the median" in page
    assert f"({ratios[0]:.1f}x to {ratios[2]:.1f}x)" in page


def test_the_larger_tables_in_the_docs_are_those_of_the_results():
    page = (ROOT / "docs/benchmark-tables.md").read_text()
    results = ROOT / "scripts/benchmark/results"
    (path,) = results.glob("realmlp_large-*.json")
    searches = json.loads(path.read_text())["results"]
    known = json.loads((results / "tables-amd-epyc-1-cores.json").read_text())["results"]
    of = {(one["table"], one.get("trials", 8), one["epochs"]): one for one in searches}
    sizes = ((8, 64), (8, 128), (16, 128))
    reductions = {size: [] for size in sizes}
    for name in dict.fromkeys(one["table"] for one in searches):
        ways = {one["way"]: one for one in known if one["table"] == f"{name}, 10,000 rows"}
        cells = [name]
        for found in (ways["realmlp ensemble"], *(of[name, *size] for size in sizes)):
            error = found["ensemble" if "ensemble" in found else "score"]
            cells.append(f"{error:.4f} ({found['cpu']:.0f} s)")
        for size in sizes:
            reductions[size].append(1 - of[name, *size]["ensemble"] / ways["mlp"]["score"])
        assert f"| {' | '.join(cells)} | {reductions[16, 128][-1]:.1%} |" in page
    in_words = " ".join(page.split())
    for (trials, epochs), values in reductions.items():
        assert f"{statistics.mean(values):.1%} with {trials} trials of {epochs} epochs" in in_words
    (path,) = results.glob("frequencies-*.md")
    rows = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    assert len(rows) > 2 and all(row in page for row in rows[1:])


def test_what_is_measured_is_the_commit_of_when_it_was_read(script, monkeypatch):
    report = script("benchmark.report")
    before = report.describe_machine()
    monkeypatch.setattr(
        report.subprocess, "run", lambda *_, **__: pytest.fail("git is asked once more")
    )
    assert report.describe_machine() == before and before["date"] and before["commit"]


def test_the_grid(script, study, monkeypatch):
    grid = script("benchmark.studies.grid")
    said = []
    monkeypatch.setattr(grid, "print", lambda line, **_: said.append(line), raising=False)
    monkeypatch.setattr(
        grid, "in_fresh_process", lambda *case: grid.Growth(*case, 0.5, 300.0, 310.0)
    )
    small = {"ROWS": (1000,), "SHORT": (1,), "WIDTHS": (16,), "BATCH_SIZES": (256,), "GROWTH": 2}
    # Six steps are too few for scores to agree.
    _, whole, text = study(
        "grid", "--engines", "torch:1", "--trials", "2", "--epochs", "2", **small, AGREEMENT=1.0
    )
    cells = [(c["trials"], c["width"], c["batch_size"]) for c in whole["cells"]]
    assert cells == [(1, 16, 256), (2, 16, 256)] and [line.count("gputune") for line in said] == [
        1,
        1,
    ]
    cases = [(g["trials"], g["folds"], g["epochs"], g["rows"]) for g in whole["growth"]]
    assert cases == [(2, 5, 2, 0), (4, 5, 2, 0), (2, 10, 2, 0), (2, 5, 4, 0), (1, 5, 1, 1000)]
    assert "| width | batch size | 1 trial | 2 trials |" in text
    assert re.search(r"^\| 16 \| 256 \| \S+x\S* \| \S+x\S* \|$", text, re.M)
    assert (
        "| 2 | 10 | 2 | 40 | 0.50 | 12500 | 310 | 10 |" in text
        and "| 1,000 | 0.5 | 500.0 | 310 | 10 |" in text
    )


def test_a_search_that_grows_by_rows(script):
    grown = script("benchmark.studies.grid").measure_here(1, 2, 1, 300)
    assert (
        (grown.work, grown.rows) == (2, 300)
        and grown.seconds > 0
        and grown.peak >= grown.before > 0
    )


@pytest.mark.long
def test_a_million_rows_in_four_gibibytes(script):
    assert script("benchmark.studies.grid").in_fresh_process(1, 5, 1, 1_000_000).peak < 4096


@pytest.fixture
def flowers(tmp_path_factory):
    data = tmp_path_factory.mktemp("data") / "data.py"
    data.write_text(
        "from sklearn.datasets import load_iris\n"
        "def load(name):\n"
        "    X, y = load_iris(return_X_y=True, as_frame=True)\n"
        "    X['kind'] = y.map(lambda code: f'kind {code % 2}')\n"
        "    return X, y, 'multiclass'\n"
    )
    return ("--data", str(data))


NETWORKS = ("mlp", "mlp portfolio", "realmlp default", "realmlp")


@pytest.mark.long
def test_tables(study, flowers):
    small = {
        "NAMES": ("iris",),
        "LARGE": {"iris": 50},
        "SEARCHES": dict.fromkeys(NETWORKS, (2, 1)),
        "SECONDS": 1,
    }
    _, whole, text = study("tables", *flowers, "--repeats", "1", **small)
    ways = [one["way"] for one in whole["results"] if one["way"].startswith(("mlp", "realmlp"))]
    assert ways == [
        f"{way}{what}" for way in (*NETWORKS, "mlp", "realmlp") for what in ("", " ensemble")
    ]
    assert {one["table"] for one in whole["results"][-4:]} == {"iris, 50 rows"}
    assert all(one["score"] > 0.3 for one in whole["results"])
    assert "| iris | " in text and "accuracy" in text
    with pytest.raises(SystemExit, match="--tables needs --data FILE.py"):
        study("tables")


@pytest.mark.long
def test_portfolio(study, flowers):
    small = {"NAMES": ("iris", "again"), "WIDE_TRIALS": 4, "TRIALS": 3, "EPOCHS": 2, "SIZE": 2}
    _, whole, text = study("portfolio", *flowers, **small)
    assert (
        len(whole["configurations"]) == 2
        and whole["configurations"][0]["numbers"]
        and "| mean | " in text
    )


def test_many_rows(script, study, flowers):
    module = script("benchmark.studies.many_rows")

    def trees(library, X, y, task, scoring, *, folds, seconds):
        assert (library, folds, len(X), seconds) == ("lightgbm", 3, 120, pytest.approx(7.2))
        return DummyClassifier().fit(X, y), 5, 0

    small = {
        "NAMES": ("iris",),
        "trees": SimpleNamespace(tuned=trees, versions=lambda: {"lightgbm": "4"}),
    }
    _, whole, text = study("many_rows", *flowers, "--rows", "LightGBM", "CatBoost", **small)
    (result,) = whole["results"]
    assert (result["table"], result["side"], result["trials"]) == ("iris", "LightGBM", 5)
    assert result["error"] == pytest.approx(2 / 3)
    assert 50 < result["peak"] < 100_000
    assert f"| iris | 120 | 0.6667 (0 s, 5 trials, {result['peak'] / 1024:.1f} GiB) |" in text
    dates = pd.DataFrame({"date": ["20150103", "20150101", "20150102", "20150105", "20150104"]})
    split = module.split_of(
        "kc_house", lambda name: (dates, pd.Series([3.0, 1, 2, 5, 4]), "regression")
    )
    assert list(split.X_test["date"]) == [pd.Timestamp("2015-01-05")]
    assert np.exp(split.y).tolist() == pytest.approx([1, 2, 3, 4])


@pytest.mark.long
def test_many_rows_with_gputune(study, flowers):
    small = {"NAMES": ("iris",), "PER_ROW": 0.2}
    _, whole, text = study("many_rows", *flowers, "--rows", "gputune", **small)
    (result,) = whole["results"]
    assert result["trials"] >= 1 and 0 <= result["error"] < 0.5
    assert "| iris | 120 |" in text


@pytest.mark.long
def test_tabm(study, flowers):
    small = {"NAMES": ("iris",), "TRIALS": 2, "EPOCHS": 2, "LONGEST": 2}
    _, whole, text = study("tabm", *flowers, **small)
    assert [one["epochs"] for one in whole["results"]] == [4, 4, 4]
    assert all(0 < one["error"] < 1 for one in whole["results"])
    assert "| iris | 120 | " in text


@pytest.fixture
def patients(tmp_path_factory):
    """The options for a file of tables with a numeric target."""
    file = tmp_path_factory.mktemp("data") / "patients.py"
    file.write_text(
        "from sklearn.datasets import load_diabetes\n"
        "def load(name):\n"
        "    X, y = load_diabetes(as_frame=True, return_X_y=True)\n"
        "    return X, y / 100, 'regression'\n"
    )
    return "--data", str(file)


@pytest.mark.long
def test_realmlp_large(study, patients):
    small = {"LARGE": {"diabetes": 60}, "TRIALS": 2, "EPOCHS": 2}
    _, whole, text = study("realmlp_large", *patients, **small)
    (result,) = whole["results"]
    assert (result["rows"], result["epochs"]) == (60, 2)
    assert all(0 < result[key] < 3 for key in ("validation", "best_trial", "ensemble"))
    assert sum(weight for _, weight in result["frequencies"]) == pytest.approx(1, abs=0.01)
    assert "| diabetes, 60 rows | 2 | 2 | " in text


@pytest.mark.long
def test_frequencies(study, patients):
    small = {"NAMES": ("table",), "EPOCHS": 1}
    _, whole, text = study("frequencies", *patients, **small)
    pairs = {(one["numbers"], one["sigma"]) for one in whole["results"]}
    assert len(whole["results"]) == len(pairs) == 6
    assert text.count("**") == 2 and all(0 < one["error"] < 3 for one in whole["results"])


@pytest.mark.long
def test_realmlp_portfolio(study, flowers):
    small = {"NAMES": ("iris", "again"), "TRIALS": 3, "EPOCHS": 2, "SIZE": 3}
    _, whole, text = study("realmlp_portfolio", *flowers, **small)
    assert len(whole["candidates"]) == 2 + 2 * 3 and len(whole["results"]) == 2
    assert whole["candidates"][1]["module__waves"] == 64
    assert np.shape(whole["results"][0]["fold_scores"]) == (8, 3)
    assert "| mean | " in text and text.count("\n- {") == 3


def test_native_needs_a_compiler(study):
    with pytest.raises(SystemExit, match="--native needs a C compiler"):
        study("native", find_compiler=lambda: None)


@needs_compiled_code
@pytest.mark.long
@pytest.mark.skipif(find_compiler() is None, reason="no C compiler is installed")
def test_native(study):
    small = {"WIDTHS": (19,), "BATCH_SIZES": (32,), "ACTIVATIONS": ("relu",), "ROWS": 200}
    _, numbers, text = study("native", "--repeats", "3", **small)
    assert {(dtype, width) for dtype, _, _, width, _, _ in numbers["rows"]} == {
        ("float32", 19),
        ("float64", 19),
    }
    assert all(0.2 < row[-1] < 5 for row in numbers["rows"])
    assert text.count("| relu | 19 | 32 | ") == len(numbers["rows"])


def test_many_trials(study):
    _, numbers, text = study("many", "--repeats", "1", TRIALS=8)
    assert numbers["bytes"] > 10_000 and len(numbers["times"]) == text.count("\n| ") - 1
    assert all(
        seconds > 0 for pairs in numbers["times"].values() for pair in pairs for seconds in pair
    )


@pytest.mark.skipif(find_spec("pytabkit") is not None, reason="pytabkit is here, and would train")
def test_realmlp_needs_its_authors_package(study, flowers):
    with pytest.raises(SystemExit, match="--realmlp needs pytabkit: pip install pytabkit"):
        study("realmlp", *flowers)


def test_halving(script, study):
    small = {"TRIALS": 9, "tables": lambda adult: {"iris": load_iris(return_X_y=True)}}
    _, whole, text = study("halving", "--epochs", "4", "--repeats", "2", **small)
    first, second = (script("benchmark.studies.halving").Seed(**one) for one in whole["seeds"])
    assert first.run == pytest.approx(first.halving, abs=2e-3) and second.run is None
    assert first.full_epochs == 36 and first.halving_epochs == 9 + 3 * 2 + 1 * 1
    for one in (first, second):
        assert (
            f"| iris | {one.seed} | {one.full:.4f} | {one.halving:.4f} | {one.loss:.2%} | 44.4% |"
            in text
        )
    assert "0 of 2 reach the aim." in text  # four epochs are too few to save much


def test_hypergradients(study):
    _, whole, text = study("hypergradients", "--epochs", "1", "--repeats", "1", MEMBERS=(10,))
    costs = whole["costs"]
    assert [(c["optimizer"], c["members"], c["steps"]) for c in costs] == [
        ("sgd", 10, 10),
        ("adam", 10, 10),
    ]
    for cost in costs:
        assert len(cost["seconds"]) == 7 and cost["disagreement"] < 1e-4
        for kind, seconds in cost["seconds"].items():
            plain, optimised = (seconds / cost["seconds"][base] for base in ("plain", "optimised"))
            row = (
                f"| {cost['optimizer']} | 10 | 10 | {kind} | {seconds * 1e3:.2f} | {plain:.2f} | "
                f"{optimised:.2f} |"
            )
            assert row in text


def test_objectives_agree_before_times_are_shown(script, study, monkeypatch):
    logistic = script("benchmark.studies.logistic")
    monkeypatch.setattr(logistic, "FOLDS", 2)
    few = load_digits(n_class=3, return_X_y=True)
    monkeypatch.setattr(logistic, "load_digits", lambda return_X_y: few)
    with joblib.parallel_config("threading"):  # processes would import all again
        row = logistic.compare("l2", 3)
    assert row.gputune_gap < 1e-7 and row.sklearn_gap < 1e-3 and row.score_difference < 1e-2
    far = logistic.Row("l1", 3, 1.0, 9.0, 1e-3, 1e-4, 9e-4, 0.0)
    assert study("logistic", compare=lambda penalty, candidates: far)[0] == 1
    _, _, text = study("logistic", compare=lambda penalty, candidates: row)
    assert "| l2 | 3 x 2 |" in text and "| both |" in text


def test_optuna_alone_proposes_the_same(script, monkeypatch):
    bridge = script("benchmark.studies.optuna")
    monkeypatch.setattr(bridge, "EPOCHS", 1)
    monkeypatch.setattr(bridge, "BATCH", 6)
    row = bridge.compare(0, 2)
    assert row.random_best > 0.5 and row.tpe_best > 0.5
    assert 0 < row.bridge_seconds < row.tpe_seconds and row.alone_seconds > 0
    with pytest.raises(AssertionError, match="proposed something else"):
        bridge.alone(0, bridge.search(0, "random", 2))


def test_what_the_profile_says_is_read(script):
    lines = (
        "  planning   0.80 s   8%\n  storing   1.00 s   10%\n  training   8.00 s   80%\n    "
        "steps   90% of it\n"
    )
    said = f"Where the time went:\n\n{lines}    scores   5% of it\n  the rest   0.20 s   2%\n"
    speed = (
        "Steps reached 50.0 GFLOP/s, 25% of the 200.0 that the product reaches here on 2 cores "
        "(float32)."
    )
    read = script("benchmark.studies.profile").read
    run = read(f"{said}\n{speed}\n", 16, 4)
    assert run.seconds == pytest.approx(10) and run.share == 0.25
    assert run.parts["steps"] == pytest.approx(7.2) and run.parts["scores"] == pytest.approx(0.4)
    assert run.beside == pytest.approx((0.8 + 1.0 + 0.4 + 0.2) / 4 * 1e3)
    assert math.isnan(read(said, 16, 4).share)


@pytest.mark.long
def test_the_profile(study):
    _, whole, text = study(
        "profile", "--epochs", "1", "--repeats", "1", WIDE_TRIALS=2, NARROW_TRIALS=3
    )
    assert [(r["width"], r["trials"]) for r in whole["runs"]] == [(256, 2), (128, 2), (16, 3)]
    assert all(
        r["reached"] > 0 and r["peak"] > 0 and r["parts"]["steps"] >= 0 for r in whole["runs"]
    )
    assert re.search(r"^\| 16 \| 3 \| [\d.]+ \| [\d.]+ \| [\d.]+ \| \d+% \| [\d.]+ \|$", text, re.M)


def quality_work(quality, trials=3, epochs=3):
    """Iris as a work of the study, and the judge of its candidates."""
    X, y = load_iris(return_X_y=True)
    return quality.split(X.astype(np.float32), y, seed=0, trials=trials, epochs=epochs)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # those of other projects are not ours
@pytest.mark.parametrize("place", range(6))
def test_every_search_tells_of_every_candidate(script, place):
    quality = script("benchmark.studies.quality")
    name = list(quality.SEARCHES)[place]
    pytest.importorskip(quality.SEARCHES[name][0])
    work, _ = quality_work(quality)
    events, seconds = quality.search(name, work)
    assert {event.candidate for event in events} == {0, 1, 2}
    assert all(0 < event.seconds < seconds and 0 <= event.score <= 1 for event in events)
    assert [e.seconds for e in events] == sorted(e.seconds for e in events)
    if name == "gputune, random":
        means = script("benchmark.engines.gputune").train(work).scores.mean(1)
        assert {e.candidate: e.score for e in events} == {
            c: pytest.approx(means[c]) for c in range(3)
        }


def test_the_choice_is_the_best_so_far_and_judged_by_the_rows_held_out(script, monkeypatch):
    quality = script("benchmark.studies.quality")
    work, held_out = quality_work(quality)
    assert len(work.X) == 112 and len(work.folds) == 3 and 0 < held_out(1) < 1
    monkeypatch.setattr(quality, "ROWS", 80)
    assert len(quality_work(quality)[0].X) == 60  # a larger table is sampled
    known = [(3.0, 1, 0.8), (1.0, 0, 0.5), (2.0, 2, 0.4), (4.0, 1, 0.9), (5.0, 3, 0.9)]
    points = quality.choices(
        [quality.Event(*one) for one in known], lambda candidate: candidate / 10
    )
    assert points == (quality.Point(1.0, 0, 0.0), quality.Point(3.0, 1, 0.1))
    curves = [quality.Curve("digits", 0, "x", points[:n], 9.0) for n in (2, 2, 1)]
    times = [quality._time(level, curves) for level in (0.0, 0.05, 0.2)]
    assert times == ["1.00", "3.00 (2 of 3)", "not reached (0 of 3)"]


def test_quality(script, study):
    quality = script("benchmark.studies.quality")
    frame = pl.DataFrame({"age": [1, None, 3], "job": ["a", "b", None]})
    np.testing.assert_array_equal(
        quality.numbers(frame), [[1, 1, 0, 0], [0, 0, 1, 0], [3, 0, 0, 1]]
    )

    def search(name, work):
        return [quality.Event(0.25, 1, 0.6), quality.Event(0.5, 2, 0.7)], 1.0

    searches = dict.fromkeys(("A", "B"), ("sklearn", "")) | {"C": ("no_such_package", "")}
    tables = {"tables": lambda adult: {"digits": load_iris(return_X_y=True)}}
    options = ("--epochs", "2", "--repeats", "2")
    _, whole, text = study(
        "quality", *options, **tables, SEARCHES=searches, search=search, TRIALS=3
    )
    assert [(c["search"], c["seed"]) for c in whole["curves"]] == [
        ("A", 0),
        ("A", 1),
        ("B", 0),
        ("B", 1),
    ]
    assert [p["candidate"] for p in whole["curves"][0]["points"]] == [1, 2]
    assert whole["curves"][0]["points"] == whole["curves"][2]["points"]
    assert "## digits, 2 seeds" in text and "| C: not installed |" in text
    rows = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 5 and len(set(rows)) == 1


@pytest.fixture
def measured_row(script):
    """Return a function that makes the row of a case, without a measurement."""
    modules = script("benchmark.studies.modules")

    def row(case, repeats=1, is_small=False, apart=0.0):
        engines = modules.ENGINES[:2] if is_small else modules.ENGINES
        return modules.Row(
            name=case.name,
            work=f"{case.looped} x 5 x 1",
            asked=case.asked,
            date="2026-01-01",
            load=0.0,
            seconds=dict(zip(engines, ([1.0], [2.0] * repeats, [4.0]))),
            accuracies=dict(zip(engines, (0.9, 0.9, 0.9 - apart))),
            cpu={"gputune": [2.0], "loop": [5.0]},
        )

    return row


def test_modules_are_measured_row_by_row(study, measured_row):
    def with_other_gru(case, repeats, is_small):
        return measured_row(case, repeats, apart=0.1 if case.name == "GRU" else 0.0)

    # Nothing to write: the only row disagrees.
    code, whole, _ = study("modules", "--rows", "GRU", compare=with_other_gru)
    assert code == 1 and whole is None
    study("modules", "--rows", "GRU", compare=measured_row)
    # The other rows are written. The row that disagrees is left out, also its earlier measurement.
    code, whole, text = study("modules", "--rows", "GRU", "LSTM", compare=with_other_gru)
    assert code == 1 and [row["name"] for row in whole["rows"]] == ["LSTM"]
    assert (
        "GRU is left out: its mean accuracies differ by more than 0.02 (gputune 0.900, loop 0.900, "
        "optuna 0.800)." in text
    )
    code, whole, text = study("modules", "--rows", "GRU", compare=measured_row)
    assert code == 0 and "left out" not in text.partition("|")[2]
    assert whole["ratios"]["loop"] == {"GRU": 2.0, "LSTM": 2.0}
    assert whole["ratios"]["optuna"] == {"GRU": 4.0, "LSTM": 4.0}
    assert "| **2.00** | 8.0 | 2.50 | 4.00 |" in text


def test_small_measurements_of_modules_have_their_own_files(study, measured_row, tmp_path):
    options = ("modules", "--small", "--rows", "MLP-Mixer")
    _, whole, text = study(*options, compare=measured_row)
    assert whole["ratios"] == {"loop": {"MLP-Mixer": 2.0}, "optuna": {}, "CPU": {"MLP-Mixer": 2.5}}
    assert whole["rows"][0]["work"] == "2 x 5 x 1"
    assert "| 2.00 | 1.0 | 2.50 | - |" in text
    assert all(file.name.startswith("modules-small-") for file in tmp_path.iterdir())


def test_steps_of_modules_are_measured_by_the_check_of_a_module(script, monkeypatch, capsys):
    modules = script("benchmark.studies.modules")

    def command(arguments):
        assert arguments[2].endswith("engines/modules.py:SmallConvolutional")
        lines = Path(arguments[3]).read_text().splitlines()
        assert len(lines) == 1798 and lines[1].endswith(",class 0")
        print('{"milliseconds": {"plain loop": 3.0, "compiled": 0.25}}')

    monkeypatch.setattr(modules, "gputune_command", command)
    assert modules.print_steps(["8 x 8"]) == 0
    *_, row = capsys.readouterr().out.splitlines()
    assert row == "| convolutional net, 8 x 8 | 3.000 | 0.250 | - | 12.0 |"


def test_the_loop_trains_a_module_like_gputune(script):
    modules = script("benchmark.studies.modules")
    case = modules.Case("small", modules.modules.Residual, 2, 2, 2, 1.0, 128)
    work = modules.case_work(case)
    by_gputune = modules._tuned(case, work).scores
    folds = script("benchmark.work").standardised(work)
    for trial, scores in zip(work.trials, by_gputune):
        by_loop = [modules.modules.fit(case.module_class, fold, trial, 2) for fold in folds]
        # 359 rows in a fold: at most one row differs
        np.testing.assert_allclose(by_loop, scores, atol=1.5 / 359)


def test_operations_that_are_slower_in_compiled_code_are_named(script, study):
    operations = script("benchmark.studies.operations")

    def measure(name, operation, turns):
        assert operation.backend == "compiled" and turns == 2
        return operations.Row(name, 0.2, 0.25 if name == "nn.ReLU" else 0.1)

    options = ("operations", "--repeats", "2", "--rows")
    code, whole, text = study(*options, "nn.ReLU", "orthogonal", measure=measure)
    assert code == 1 and [row["name"] for row in whole["rows"]] == ["nn.ReLU", "nn.ReLU6"]
    assert "1 operation of 2 slower in compiled code: nn.ReLU." in text
    assert "| `nn.ReLU` | 0.2000 | 0.2500 | **0.80** |" in text
    assert study(*options, "nn.ReLU6", measure=measure)[0] == 0


@needs_compiled_code
def test_a_step_of_an_operation_is_measured_in_both_backends(script):
    operations = script("benchmark.studies.operations")
    relu = operations._of_tests("operations").OPERATIONS["nn.ReLU"]
    row = operations.measure("nn.ReLU", relu, 2)
    assert row.name == "nn.ReLU" and 0 < row.compiled < 1 and 0 < row.recorded < 1


@pytest.mark.long
def test_a_module_is_trained_by_all_engines(script):
    modules = script("benchmark.studies.modules")
    case = modules.Case("small", modules.modules.Recurrent, 2, 1, 2, 1.0, 256, "sequences")
    row = modules.compare(case, 1)
    assert row.cpu_ratio() > 0
    assert row.work == "2 x 5 x 1" and list(row.seconds) == list(row.accuracies) == list(
        modules.ENGINES
    )
    assert all(0 < score < 1 for score in row.accuracies.values()) and row.ratio("loop") > 0
