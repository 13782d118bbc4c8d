"""The benchmark's engines: each gets the same work, and where scores differ no speed is shown. No
time is asserted."""

import functools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch


@pytest.fixture
def work(script):
    """Two folds of the digits, four trials, three epochs."""
    whole = script("benchmark.work").digits_work("wide", n_trials=4, epochs=3)
    return replace(whole, folds=whole.folds[:2])


def test_the_list_is_shared_and_a_longer_one_begins_with_it(script):
    module = script("benchmark.work")
    trials = module.draw_trials(64, module.WIDTHS["wide"])
    assert trials[:10] == module.draw_trials(10, module.WIDTHS["wide"])
    assert {trial["width"] for trial in trials} == set(module.WIDTHS["wide"])
    assert {trial["batch_size"] for trial in trials} == set(module.BATCH_SIZES)
    order = [(trials[c]["batch_size"], -trials[c]["width"]) for c in module.longest_first(trials)]
    assert order == sorted(order)


def test_rows_are_scaled_by_the_training_rows_of_their_fold(script, work):
    folds = script("benchmark.work").standardised(work)
    for (train, valid), (X, y, X_valid, y_valid) in zip(work.folds, folds):
        np.testing.assert_array_equal(y, work.y[train])
        np.testing.assert_array_equal(y_valid, work.y[valid])
        deviation = work.X[train].std(0)
        expected = (work.X[valid] - work.X[train].mean(0)) / np.where(deviation > 0, deviation, 1)
        np.testing.assert_allclose(X_valid, expected, rtol=1e-4, atol=1e-4)
        assert X.dtype == np.float32


ENGINES = ("sklearn", "compile", "optuna", "ray", "skorch", "jax")


@pytest.mark.filterwarnings("ignore")  # those of other projects are not ours
@pytest.mark.parametrize(
    "word", ["torch", "gputune", *(pytest.param(word, marks=pytest.mark.long) for word in ENGINES)]
)
def test_every_engine_trains_the_same_work(script, work, word, monkeypatch):
    engine = script("benchmark.engines").ENGINES[word]
    if (lack := engine.lacks()) is not None:
        pytest.skip(lack)
    if word == "compile":  # traced, but its C++ takes a compiler half a minute
        script("benchmark.engines.torch")._compiled_step.cache_clear()
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    work = replace(
        work, trials=[{"lr": 0.01, "batch_size": size, "width": 32} for size in (16, 64)]
    )
    reference = script("benchmark.engines.sklearn").train(work, 1).scores
    outcome = engine.load()(work, 1)
    np.testing.assert_allclose(outcome.scores, reference, atol=0.04)
    assert outcome.scores.shape == (2, 2) and 0.85 < outcome.scores.min() < 1 and outcome.start > 0
    assert (outcome.compile > 0) == (word in ("compile", "jax"))


@pytest.mark.parametrize(
    "option, message",
    [
        (["--trials", "0"], "argument --trials: must be an integer of at least 1, got 0"),
        (["--engines", "sklearn,keras"], "argument --engines: must be of sklearn, torch, "),
        (
            ["--engines", "sklearn:0"],
            "sklearn: must have a number of trials of at least 1 after it, got '0'",
        ),
        (
            ["--engines", "gputune:3"],
            "gputune trains the whole list, and a part of it where another engine",
        ),
        (
            ["--work", "broad"],
            "must be narrow or wide, or one of them and a number of trials as in narrow:128",
        ),
        (["--work", "wide:x"], "as in narrow:128, got 'wide:x'"),
    ],
)
def test_a_bad_option_is_named(script, capsys, option, message):
    with pytest.raises(SystemExit) as stopped:
        script("benchmark.__main__").main(option)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def measured(script, engine, seconds, accuracies, compile=0.0, rival=True):
    """One engine on as many trials as there are accuracies."""
    repeats = len(seconds)
    scores = np.broadcast_to(np.reshape(accuracies, (1, -1, 1)), (repeats, len(accuracies), 2))
    times = tuple(seconds), scores, (0.5,) * repeats, (compile,) * repeats
    return script("benchmark.studies.training").Measured(engine, *times, rival)


@pytest.mark.parametrize(
    "accuracies, agree",
    [
        (([0.95], [0.959], [0.955]), True),
        (([0.95], [0.961], [0.955]), False),
        (([0.95], [float("nan")], [0.95]), False),
        # One that trained the first trial only is compared on that trial, and so is no other.
        (([0.95, 0.5], [0.951], [0.949, 0.499]), True),
        (([0.95, 0.5], [0.7], [0.949, 0.499]), False),
        (([0.95, 0.5], [0.951], [0.949, 0.55]), False),
    ],
)
def test_scores_that_differ_or_diverge_do_not_agree(script, accuracies, agree):
    found = [measured(script, "x", (1.0,), value) for value in accuracies]
    assert script("benchmark.studies.training").agree(found) is agree


def test_engines_take_turns(script, work):
    module = script("benchmark.studies.training")
    calls = []

    def engine(name):
        def train(work):
            calls.append((name, len(work.trials), work.epochs))
            return script("benchmark.work").Outcome(work.no_scores(), 0.25, 0.5)

        return train

    work = replace(work, trials=work.trials * 2)
    runs = [module.Run(name, engine(name), trials) for name, trials in zip("abc", (8, 5, 8))]
    found = module.measure(runs, work, 2)
    assert calls[:3] == [(name, 4, 1) for name in "abc"]  # the warm-up, on a small piece
    assert calls[3:] == [(name, 5 if name == "b" else 8, 3) for name in "abcbca"]
    assert [(m.engine, len(m.seconds), m.trials) for m in found] == [
        ("a", 2, 8),
        ("b", 2, 5),
        ("c", 2, 8),
    ]
    assert found[0].start == (0.25, 0.25) and found[0].compile == (0.5, 0.5)


@pytest.fixture
def fake(script, monkeypatch, tmp_path, capsys):
    """Run the command with engines of known scores in place of all engines; return its exit code
    and its output.
    """

    def run(*options, lacks=None, **accuracies):
        def engine(word, accuracy):
            def train(work, cores):
                scores = np.full((len(work.trials), len(work.folds)), accuracy)
                return script("benchmark.work").Outcome(scores, 0.001, 0.0)

            lack = (lacks or {}).get(word)
            return SimpleNamespace(
                word=word, name=word, package="sklearn", lacks=lambda: lack, load=lambda: train
            )

        fakes = {word: engine(word, accuracy) for word, accuracy in accuracies.items()}
        for name in ("benchmark.engines", "benchmark.studies.training"):
            monkeypatch.setattr(script(name), "ENGINES", fakes)
        for name in ("benchmark.report", "benchmark.studies.training"):
            monkeypatch.setattr(script(name), "card", lambda: None)
        return script("benchmark.__main__").main(
            [*options, "--out", str(tmp_path)]
        ), capsys.readouterr().out

    return run


def test_no_speed_is_shown_where_the_scores_differ(fake, tmp_path):
    code, out = fake("--trials", "6", "--repeats", "1", sklearn=0.9, torch=0.9, gputune=0.95)
    assert code == 1
    assert "NO SPEED: the mean accuracies differ by more than 0.01" in out
    assert "gputune: mean last-epoch accuracy 0.9500" in out and "trials/s" not in out
    assert list(tmp_path.iterdir()) == []


def test_the_report_is_written(fake, tmp_path):
    command = "--repeats 2 --engines sklearn,ray,torch:3 --work narrow:6 wide --trials 7".split()
    lacks = {"ray": "ray.tune is not installed"}
    code, said = fake(*command, lacks=lacks, sklearn=0.951, torch=0.95, ray=0.95, gputune=0.95)
    assert code == 0
    (numbers,), (page,) = tmp_path.glob("training-*.json"), tmp_path.glob("training-*.md")
    report = json.loads(numbers.read_text())
    assert [(part["work"], len(part["trials"])) for part in report["works"]] == [
        ("narrow", 6),
        ("wide", 7),
    ]
    assert report["machine"]["cores"] >= 1 and report["machine"]["versions"]["torch"]
    engines = report["works"][1]["engines"]
    # gputune is also run on each part of the list that another engine gets.
    expected = [("sklearn", 7), ("torch", 3), ("gputune", 3), ("gputune", 7)]
    assert [(e["engine"], e["trials"]) for e in engines] == expected
    assert all(len(e["seconds"]) == 2 for e in engines)
    text = page.read_text()
    assert "## wide: 7 trials x 5 folds x 20 epochs" in text
    assert "| torch (measured on the first 3 trials) | 0.9500 |" in text
    assert (
        "| ray: ray.tune is not installed |" in text
        and "ray is left out: ray.tune is not installed" in said
    )
    assert text in said


def test_ratios_are_to_the_same_trials(script, work):
    report = script("benchmark.studies.training")
    found = [
        measured(script, "scikit-learn", (8.0, 9.0, 10.0), [0.9] * 4),
        measured(script, "PyTorch loop", (12.0, 8.0, 12.0), [0.9] * 4, compile=4.0),
        measured(script, "Ray Tune", (1.0, 0.5, 2.0), [0.9] * 2),
        measured(script, "gputune", (2.0, 1.0, 1.0), [0.9] * 2, rival=False),
        measured(script, "gputune", (2.0, 4.0, 2.5), [0.9] * 4, compile=0.5, rival=False),
        measured(script, "gputune on the GPU", (0.5, 0.25, 1.0), [0.9] * 4, rival=False),
    ]
    part = report.summary(work, found, {"skorch": "skorch is not installed"})
    assert part["speed"] == {"rival": "Ray Tune", "ratio": 1.0, "trials": 2}
    ratios = [
        part["engines"][0][key] for key in ("ratio", "ratio_min", "ratio_max", "ratio_compiled")
    ]
    assert ratios == [9 / 2.5, 9 / 4, 4.0, 9 / 2] and part["engines"][1]["ratio_compiled"] == 8 / 2
    machine = {**script("benchmark.report").describe_machine(), "card": "NVIDIA H100 80GB HBM3"}
    text = "\n".join(report.section(part))
    for line in (
        "| scikit-learn | 0.9000 | 9.00 | 8.00 | 10.00 | 0.50 | 0.00 | 0.44 | 3.60x (2.25 to "
        "4.00) | 4.50x |",
        "| Ray Tune (measured on the first 2 trials) | 0.9000 | 1.00 |",
        "| gputune | 0.9000 | 2.50 | 2.00 | 4.00 | 0.50 | 0.50 | 1.60 |  |  |",
        "| gputune on the GPU | 0.9000 | 0.50 | 0.25 | 1.00 | 0.50 | 0.00 | 8.00 |  |  |",
        "| skorch: skorch is not installed |",
        "gputune is 1.00x as fast as the fastest other one, Ray Tune, on the first 2 trials.",
    ):
        assert line in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    stem = script("benchmark.report").file_stem
    assert stem(machine) == "training-nvidia-h100-80gb-hbm3"
    machine |= {"card": None, "cpu": "Intel(R) Xeon(R) Processor", "cores": 2}
    assert stem(machine) == "training-intel-xeon-processor-2-cores"
