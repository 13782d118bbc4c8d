"""The benchmark: every engine gets the same work, and where scores differ no speed is shown. No time is asserted."""

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def script(monkeypatch):
    """Import a file of scripts/ as Python does when it is run from there."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return import_module


@pytest.fixture
def work(script):
    """Two folds of the digits, four trials, three epochs."""
    whole = script("benchmark_work").digits_work("wide", n_trials=4, epochs=3)
    return replace(whole, folds=whole.folds[:2])


def test_the_list_is_shared_and_a_longer_one_begins_with_it(script):
    module = script("benchmark_work")
    trials = module.draw_trials(64, module.WIDTHS["wide"])
    assert trials[:10] == module.draw_trials(10, module.WIDTHS["wide"])
    assert {trial["width"] for trial in trials} == set(module.WIDTHS["wide"])
    assert {trial["batch_size"] for trial in trials} == set(module.BATCH_SIZES)
    low, high = module.LEARNING_RATES
    assert all(low <= trial["lr"] <= high for trial in trials)
    assert len({trial["lr"] for trial in trials}) == 64


def test_steps_count_the_short_last_batch(script, work):
    few = replace(work, trials=[{"batch_size": 256}, {"batch_size": 2000}])
    rows = len(work.folds[0][0])
    assert 1280 < rows <= 1536
    assert few.steps(few.trials) == 3 * 2 * (6 + 1)


def test_rows_are_scaled_by_the_training_rows_of_their_fold(script, work):
    folds = script("benchmark_work").standardised(work)
    for (train, valid), (X, y, X_valid, y_valid) in zip(work.folds, folds):
        np.testing.assert_array_equal(y, work.y[train])
        np.testing.assert_array_equal(y_valid, work.y[valid])
        deviation = work.X[train].std(0)
        expected = (work.X[valid] - work.X[train].mean(0)) / np.where(deviation > 0, deviation, 1)
        np.testing.assert_allclose(X_valid, expected, rtol=1e-4, atol=1e-4)
        assert X.dtype == np.float32


def test_scores_stand_at_their_trial_and_fold(script, work):
    scores = script("benchmark_cores").over_cores(
        lambda fold, trial, epochs: trial["lr"] + epochs + fold[3][0], work, 1
    )
    expected = [[t["lr"] + 3 + work.y[valid[0]] for _, valid in work.folds] for t in work.trials]
    np.testing.assert_allclose(scores, expected)


def test_the_three_engines_train_the_same_work(script, work):
    work = replace(work, trials=[{"lr": 0.01, "batch_size": size, "width": 32} for size in (16, 64)])
    results = [
        script("benchmark_sklearn").train_with_sklearn(work, 1),
        script("benchmark_torch").train_with_torch(work, 1),
        script("benchmark_gputune").train_with_gputune(work),
    ]
    for scores in results:
        assert scores.shape == (2, 2)
        np.testing.assert_allclose(scores, results[0], atol=0.04)
        assert 0.85 < scores.min() < 1


def test_scores_that_differ_or_diverge_do_not_agree(script):
    report = script("benchmark_report")

    def measured(*accuracies):
        return [report.Measured("x", (1.0,), np.full((1, 2, 2), value)) for value in accuracies]

    assert report.agree(measured(0.95, 0.959, 0.955))
    assert not report.agree(measured(0.95, 0.961, 0.955))
    assert not report.agree(measured(0.95, float("nan"), 0.95))


def fake_engines(**accuracies):
    """Engines that know their scores already."""

    def engine(accuracy):
        return lambda work: np.full((len(work.trials), len(work.folds)), accuracy)

    return {name: engine(accuracy) for name, accuracy in accuracies.items()}


def test_no_speed_is_shown_where_the_scores_differ(script, monkeypatch, tmp_path, capsys):
    benchmark = script("benchmark")
    monkeypatch.setattr(benchmark, "engines", lambda: fake_engines(sklearn=0.9, torch=0.9, gputune=0.95))
    assert benchmark.main(["--trials", "6", "--repeats", "1", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "NO SPEED: the mean accuracies differ by more than 0.01" in out
    assert "gputune: mean last-epoch accuracy 0.9500" in out and "trials/s" not in out
    assert list(tmp_path.iterdir()) == []


def test_engines_take_turns(script, work):
    benchmark = script("benchmark")
    calls = []

    def engine(name):
        def train(work):
            calls.append((name, len(work.trials), work.epochs))
            return np.zeros((len(work.trials), len(work.folds)))

        return train

    work = replace(work, trials=work.trials * 2)
    measured = benchmark.measure({name: engine(name) for name in "abc"}, work, 2)
    assert calls[:3] == [(name, 4, 1) for name in "abc"]  # the warm-up, on a small piece
    assert calls[3:] == [(name, 8, 3) for name in "abcbca"]
    assert [(m.engine, len(m.seconds), m.scores.shape) for m in measured] == [
        (name, 2, (2, 8, 2)) for name in "abc"
    ]


def test_the_report_is_written(script, monkeypatch, tmp_path, capsys):
    benchmark = script("benchmark")
    monkeypatch.setattr(benchmark, "engines", lambda: fake_engines(sklearn=0.951, torch=0.95, gputune=0.95))
    monkeypatch.setattr(script("benchmark_machine"), "card", lambda: None)
    assert benchmark.main(["--trials", "6", "--repeats", "2", "--out", str(tmp_path)]) == 0
    (numbers,), (page,) = tmp_path.glob("training-*.json"), tmp_path.glob("training-*.md")
    report = json.loads(numbers.read_text())
    assert [part["work"] for part in report["works"]] == ["narrow", "wide"]
    assert report["machine"]["cores"] >= 1 and report["machine"]["versions"]["torch"]
    assert len(report["works"][0]["trials"]) == 6
    assert [e["engine"] for e in report["works"][1]["engines"]] == ["sklearn", "torch", "gputune"]
    assert all(len(e["seconds"]) == 2 for e in report["works"][1]["engines"])
    text = page.read_text()
    assert "## wide: 6 trials x 5 folds x 20 epochs" in text
    assert "| gputune on a GPU | not measured" in text
    assert text in capsys.readouterr().out


def test_ratios_are_to_the_faster_of_the_others(script, work):
    report = script("benchmark_report")
    seconds = {
        "scikit-learn": (8.0, 9.0, 10.0),
        "PyTorch loop": (12.0, 8.0, 12.0),
        "gputune": (2.0, 4.0, 2.5),
    }
    scores = np.full((3, 4, 2), 0.9)
    measured = [report.Measured(name, values, scores) for name, values in seconds.items()]
    card = {
        "gputune_accuracy": 0.9, "gputune_median": 0.5, "gputune_min": 0.25, "gputune_max": 1.0,
        "eager_seconds": 100.0, "eager_trials": 3,
    }  # fmt: skip
    part = report.summary(work, measured, card)
    assert part["speed"] == {"rival": "scikit-learn", "ratio": 9 / 2.5, "min": 2.0, "max": 4.0}
    assert part["engines"][2]["trials_per_second"] == 4 / 2.5
    machine = {**script("benchmark_machine").describe_machine(), "card": "NVIDIA H100 80GB HBM3"}
    text = report.markdown(machine, [part])
    assert "| gputune | 0.9000 | 2.50 | 2.00 | 4.00 | 1.60 |" in text
    assert "| gputune on the GPU | 0.9000 | 0.50 | 0.25 | 1.00 | 8.00 |" in text
    assert "| PyTorch loop on the GPU, one at a time | from 3 trials | 100.00 |  |  | 0.04 |" in text
    assert "gputune is 3.60x as fast as scikit-learn" in text and "(2.00 to 4.00 within a repeat)" in text
    assert script("benchmark_machine").file_stem(machine) == "training-nvidia-h100-80gb-hbm3"
    machine |= {"card": None, "cpu": "Intel(R) Xeon(R) Processor", "cores": 2}
    assert script("benchmark_machine").file_stem(machine) == "training-intel-xeon-processor-2-cores"


def test_the_one_at_a_time_loop_is_timed_on_a_part(script, work):
    work = replace(work, epochs=1, trials=work.trials * 3)
    seconds, trials = script("benchmark_torch").eager_seconds(work, "cpu")
    assert seconds > 0
    assert trials == len({trial["batch_size"] for trial in work.trials})


def test_the_large_table_shows_its_plan_and_its_memory(script, capsys):
    big = script("benchmark_big")
    work = big.big_work(n_trials=2, epochs=1, rows=600)
    assert work.X.shape == (600, 50) and len(work.folds) == 3
    big.run_big(work, "cpu")
    said = capsys.readouterr()
    assert "plan: 2 trials in" in said.err
    assert "600 rows x 50 columns, 2 trials, 3 folds, 1 epochs" in said.out
    assert "peak memory: " in said.out and 0 < big.peak_gib(0) < big.machine_gib()


def test_a_bad_option_is_named(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        script("benchmark").main(["--trials", "0"])
    assert stopped.value.code == 2
    assert "argument --trials: must be an integer of at least 1, got 0" in capsys.readouterr().err
