"""The records: the rule, the log files, and the tables of the page."""

import json
import shutil
import statistics
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "scripts" / "benchmark" / "results"


@pytest.fixture
def records(script):
    return script("benchmark.studies.records")


@pytest.fixture
def tasks(script):
    return script("benchmark.studies.record_tasks")


def attempts_of(records, qualities):
    return [records.Attempt(seed, q, 2.0 + seed, 1.0) for seed, q in enumerate(qualities)]


def test_the_tables_of_the_pages_are_made_of_the_log_files(records):
    for page in records.PAGES:
        text = page.read_text()
        is_new = records.with_tables(text, RESULTS) == text
        assert is_new, f"{page.name} is old: run python scripts/benchmark --records"
    text = (ROOT / "docs" / "records.md").read_text()
    for name in records.TASKS:
        assert f"<!-- {name} -->" in text
    assert "<!-- figures of fcnet -->" in (ROOT / "docs" / "published-results.md").read_text()


@pytest.mark.long
def test_a_seed_is_measured_in_a_process_of_its_own(records, monkeypatch):
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # Python then does not search the current folder
    attempt = records.in_fresh_process(records.TASKS["digits"], 1, None)
    assert attempt.seed == 1 and attempt.quality > 0.9
    assert attempt.seconds > 0 and attempt.cpu_seconds > 0


def test_a_measured_record_has_a_log_file_and_a_verdict(
    script, records, tmp_path, capsys, monkeypatch
):
    # without the time to start a process
    monkeypatch.setattr(records, "in_fresh_process", records.measure_here)
    before = [page.read_text() for page in records.PAGES]
    words = ["--records", "digits", "--seeds", "1", "--change", "a test", "--out", str(tmp_path)]
    assert script("benchmark.__main__").main(words) == 0
    said = capsys.readouterr().out
    (path,) = (tmp_path / "records").glob("digits-*.json")
    log = json.loads(path.read_text())
    (seed,) = log["seeds"]
    assert seed["quality"] > 0.9 and seed["seconds"] > 0 and seed["cpu_seconds"] > 0
    assert log["p"] is None and log["target"] == 0.97
    assert f"digits: cross-validated accuracy {seed['quality']:.4f}, target 0.97" in said
    assert "The rule is not met (no: 1 of 5 seeds)." in said and "| a test |" in said
    # these results are in another folder
    assert [page.read_text() for page in records.PAGES] == before


@pytest.fixture
def seeds_measured(script, records, tmp_path, monkeypatch):
    """Return a function that measures digits with two seeds, and returns the measured seeds.

    Training is replaced, and seed 1 is stopped if ``stop`` is true.
    """

    def measure_digits(*words, commit="abc", date="2026-01-01", stop=False):
        measured = []

        def measure(task, seed, data):
            if stop and seed == 1:
                raise KeyboardInterrupt
            measured.append(seed)
            return records.Attempt(seed, 0.98, 2.0, 1.0)

        machine = {"cpu": "A", "cores": 2, "card": None, "commit": commit, "date": date}
        monkeypatch.setattr(records, "describe_machine", lambda: machine)
        monkeypatch.setattr(records, "in_fresh_process", measure)
        options = ["--records", "digits", "--seeds", "2", "--out", str(tmp_path), *words]
        with pytest.raises(KeyboardInterrupt) if stop else nullcontext():
            script("benchmark.__main__").main(options)
        return measured

    return measure_digits


def test_a_stopped_measurement_resumes_after_the_seeds_that_ended(seeds_measured, tmp_path, capsys):
    assert seeds_measured(stop=True) == [0]
    assert seeds_measured(date="2026-01-02") == [1]
    (path,) = (tmp_path / "records").glob("digits-*.json")
    assert f"digits: measured before: seeds 0. To measure again, delete {path}." in (
        capsys.readouterr().out
    )
    log = json.loads(path.read_text())
    assert [seed["seed"] for seed in log["seeds"]] == [0, 1]
    assert log["p"] == 0.0 and log["machine"]["date"] == "2026-01-01"
    assert seeds_measured() == []
    assert seeds_measured("--seeds", "4") == [2, 3]
    path.unlink()
    assert seeds_measured() == [0, 1]


def test_other_measurements_do_not_resume(seeds_measured):
    seeds_measured()
    assert seeds_measured("--change", "fewer epochs") == [0, 1]
    assert seeds_measured(commit="def") == [0, 1]
    for commit in ("abc-dirty", "unknown"):  # the code of the first seed may have been different
        assert seeds_measured(commit=commit) == [0, 1]
        assert seeds_measured(commit=commit) == [0, 1]


WITHOUT_MNIST1D = """
from importlib import metadata
found = metadata.distribution
def distribution(name):
    if name == "mnist1d":
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.distribution = distribution
"""


def test_a_missing_package_is_an_error_without_a_traceback(script, tmp_path, capfd, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_MNIST1D)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        script("benchmark.__main__").main(["--records", "mnist1d", "--out", str(tmp_path)])
    assert stopped.value.code == 1
    errors = capfd.readouterr().err.strip()
    assert errors == "error: the package mnist1d is not installed. Run: pip install mnist1d."
    assert not list((tmp_path / "records").iterdir())


def test_the_p_value_is_that_of_a_one_sided_t_test(records):
    qualities = [0.972, 0.974, 0.971, 0.975, 0.973]
    gap = statistics.mean(qualities) - 0.97
    statistic = gap / (statistics.stdev(qualities) / 5**0.5)
    attempts = attempts_of(records, qualities)
    p = records.p_value(records.TASKS["digits"], attempts)
    assert p == pytest.approx(student.sf(statistic, df=4))
    assert records.reason_against(records.TASKS["digits"], attempts) is None
    # An error must be smaller than its target.
    errors = attempts_of(records, [0.44 - (q - 0.97) for q in qualities])
    assert records.p_value(records.TASKS["california"], errors) == pytest.approx(p)
    larger = attempts_of(records, [0.44 + (q - 0.97) for q in qualities])
    assert records.p_value(records.TASKS["california"], larger) == pytest.approx(1 - p)


@pytest.mark.parametrize(
    "qualities, reason",
    [
        ([0.98] * 4, "no: 4 of 5 seeds"),
        ([0.98] * 5, None),
        ([0.97] * 5, "no: p is not below 0.01"),
        ([0.96, 0.97, 0.99, 0.98, 0.97], "no: p is not below 0.01"),
        ([0.98, 0.985, 0.99, 0.98, 0.98], None),
    ],
)
def test_a_record_needs_five_seeds_that_hold_the_quality(records, qualities, reason):
    task = records.TASKS["digits"]
    attempts = attempts_of(records, qualities)
    assert records.reason_against(task, attempts) == reason
    sentence = "The rule is met." if reason is None else f"The rule is not met ({reason})."
    assert sentence in records.verdict(task, attempts)


@pytest.fixture
def logs(records, tmp_path):
    """Two measurements of digits in a results folder: a record, and a slower one."""
    (tmp_path / "records").mkdir()
    machine = {"cpu": "A", "cores": 2, "card": None, "commit": "abc"}
    for date, seconds in (("2026-01-02", 5.0), ("2026-01-01", 7.0)):
        seeds = [
            {"seed": i, "quality": 0.98, "seconds": seconds, "cpu_seconds": 9.0} for i in range(5)
        ]
        log = {"machine": machine | {"date": date}, "change": "none", "seeds": seeds}
        path = tmp_path / "records" / f"digits-{date}-abc-a-2-cores.json"
        path.write_text(json.dumps(log))
    return tmp_path


def test_the_fastest_record_is_bold_and_the_oldest_is_first(records, logs):
    rows = records.record_table(logs, records.TASKS["digits"]).splitlines()[2:]
    link = "[log](../scripts/benchmark/results/records/digits-2026-01-0{}-abc-a-2-cores.json)"
    row = "| 2026-01-0{} | {} | 9.00 | 0.9800 ± 0.0000 | 0 | yes | abc | A, 2 cores | none | {} |"
    assert rows == [
        row.format(1, "7.00", link.format(1)),
        row.format(2, "**5.00**", link.format(2)),
    ]
    assert records.record_table(logs, records.TASKS["adult"]) == "Not measured yet."


def test_a_second_measurement_of_a_commit_on_a_day_replaces_the_first(records, logs):
    task = records.TASKS["digits"]
    text = "before\n<!-- digits -->\n<!-- end of digits -->\nafter\n"
    once = records.with_tables(text, logs)
    assert once.count("| abc |") == 2 and once.startswith("before") and once.endswith("after\n")
    assert records.with_tables(once, logs) == once
    machine = {"cpu": "A", "cores": 2, "card": None, "commit": "abc", "date": "2026-01-02"}
    assert (logs / "records" / records.log_name(task, machine)).exists()


def test_a_result_of_fcnet_is_a_measurement_with_one_seed(records, tmp_path):
    result = {
        "machine": {"cpu": "A", "cores": 2, "commit": "abc", "date": "2026-01-02"},
        "seed": 0,
        "seconds": 1234.5,
        "cpu": 2345.0,
        "agreement": {"spearman": 0.961},
        "trials": [{}] * 200,
    }
    (tmp_path / "fcnet-a.json").write_text(json.dumps(result))
    table = records.record_table(tmp_path, records.TASKS["fcnet"])
    assert "| 1,234.50 | 2,345.00 | 0.9610 | unknown | no: 1 of 5 seeds | abc |" in table
    assert "| 200 configurations | [log](../scripts/benchmark/results/fcnet-a.json) |" in table


@pytest.mark.skipif(find_spec("mnist1d") is None, reason="needs the package mnist1d")
def test_a_search_of_the_cnn_is_scored_on_the_test_rows(tasks, monkeypatch):
    few = tasks.load_mnist1d(500)
    monkeypatch.setattr(tasks, "load_mnist1d", lambda: few)
    monkeypatch.setitem(tasks.MNIST1D, "max_epochs", 2)
    score = tasks.TASKS["mnist1d"].prepare(None)(0)
    assert 0.1 < score() < 1


def test_the_figures_of_a_result_page_are_copied_with_a_link(records, tmp_path):
    text = "<!-- figures of fcnet -->\n<!-- end of figures of fcnet -->\n"
    assert "Not measured yet." in records.with_tables(text, tmp_path)
    (tmp_path / "fcnet-a.md").write_text(
        "# FCNet\n\nA, 2 cores\n\n| a | b |\n|---|---|\n| c | 1 |\n"
    )
    assert records.with_tables(text, tmp_path) == (
        "<!-- figures of fcnet -->\n\n| a | b |\n|---|---|\n| c | 1 |\n\n"
        "[The result page](../scripts/benchmark/results/fcnet-a.md) names the machine, the "
        "versions and the date.\n\n<!-- end of figures of fcnet -->\n"
    )


def test_the_published_split_has_the_published_numbers_of_rows(tasks):
    X = pd.DataFrame({"row": np.arange(20_640)})
    parts = tasks.published_parts("california", X, pd.Series(np.linspace(0, 1, 20_640)))
    assert (parts.n_train, len(parts.y), len(parts.y_test)) == (13_209, 13_209 + 3_303, 4_128)
    rows = [*parts.X["row"], *parts.X_test["row"]]
    assert sorted(rows) == list(range(20_640))
    np.testing.assert_allclose(parts.y, parts.X["row"] / 20_639)
    X = pd.DataFrame({"row": np.arange(48_842)})
    parts = tasks.published_parts("adult", X, pd.Series(np.arange(48_842) % 4 == 0).astype(int))
    assert (parts.n_train, len(parts.y), len(parts.y_test)) == (26_048, 32_561, 16_281)
    assert parts.X_test["row"].min() == 32_561


FILE = """
from sklearn.datasets import load_diabetes
def load(name):
    X, y = load_diabetes(return_X_y=True, as_frame=True)
    return X[:200], y[:200] / 100, "regression"
"""


def test_a_search_on_a_table_is_scored_on_the_test_rows(tasks, tmp_path):
    (tmp_path / "tables.py").write_text(FILE)
    search = tasks.TableSearch("california", {"n_trials": 2, "max_epochs": 2}, refit=1)
    score = search(tmp_path / "tables.py")(0)
    assert 0.4 < score() < 2
    assert tasks.quality(np.array([1.0, 5.0]), np.array([1.0, 1.0]), True) == 8**0.5
    assert tasks.quality(np.array([1, 0, 1, 1]), np.ones(4), False) == 0.75


def test_a_search_gets_copies_of_columns_as_categories(tasks, tmp_path, monkeypatch):
    X = pd.DataFrame({"age": [30, 40], "hours": [1.0, 2.0]})
    copied = tasks.with_copies(X, ["age"])
    expected = {"age": [30, 40], "hours": [1.0, 2.0], "age as category": ["30", "40"]}
    assert copied.to_dict("list") == expected and list(X) == ["age", "hours"]
    (tmp_path / "tables.py").write_text(FILE)
    search = tasks.TableSearch("california", {}, refit=1, copies=["sex"])
    columns = []

    class Stopped(Exception):
        pass

    def tune(model, X, y, **options):
        columns.extend(X)
        raise Stopped

    monkeypatch.setattr(tasks.gputune, "tune", tune)
    with pytest.raises(Stopped):
        search(tmp_path / "tables.py")(0)
    assert columns[-2:] == ["s6", "sex as category"]


def test_the_options_are_checked(script, tmp_path, capsys, monkeypatch):
    main = script("benchmark.__main__").main
    with pytest.raises(SystemExit):
        main(["--records", "iris"])
    assert "invalid choice: 'iris'" in capsys.readouterr().err
    module = script("benchmark.studies.record_tasks")
    with pytest.raises(SystemExit, match="--records needs --data FILE.py, a file with load"):
        module.TASKS["adult"].prepare(None)
    measured = [name for name, task in module.TASKS.items() if task.prepare is not None]
    assert list(script("benchmark.__main__").RECORDS) == measured
    # Without names, only the tables are made again.
    records = script("benchmark.studies.records")
    page = tmp_path / "records.md"
    shutil.copy(records.PAGES[0], page)
    monkeypatch.setattr(records, "PAGES", [page])
    assert main(["--records"]) == 0
    assert page.read_text() == records.with_tables(page.read_text(), RESULTS)
