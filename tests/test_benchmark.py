"""The benchmark: every engine gets the same work, and where scores differ no speed is shown. No time is asserted."""

import functools
import json
import os
import sys
import tempfile
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def script(monkeypatch):
    """Import a file of scripts/ as Python does when it is run from there."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return import_module


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
    low, high = module.LEARNING_RATES
    assert all(low <= trial["lr"] <= high for trial in trials)
    assert len({trial["lr"] for trial in trials}) == 64


def test_steps_count_the_short_last_batch(script, work):
    few = replace(work, trials=[{"batch_size": 256}, {"batch_size": 2000}])
    rows = len(work.folds[0][0])
    assert 1280 < rows <= 1536
    assert few.steps(few.trials) == 3 * 2 * (6 + 1)


def test_rows_are_scaled_by_the_training_rows_of_their_fold(script, work):
    folds = script("benchmark.work").standardised(work)
    for (train, valid), (X, y, X_valid, y_valid) in zip(work.folds, folds):
        np.testing.assert_array_equal(y, work.y[train])
        np.testing.assert_array_equal(y_valid, work.y[valid])
        deviation = work.X[train].std(0)
        expected = (work.X[valid] - work.X[train].mean(0)) / np.where(deviation > 0, deviation, 1)
        np.testing.assert_allclose(X_valid, expected, rtol=1e-4, atol=1e-4)
        assert X.dtype == np.float32


def test_scores_stand_at_their_trial_and_fold(script, work):
    outcome = script("benchmark.work").over_cores(
        lambda fold, trial, epochs: trial["lr"] + epochs + fold[3][0], work, 1, compiled=lambda: 1.5
    )
    expected = [[t["lr"] + 3 + work.y[valid[0]] for _, valid in work.folds] for t in work.trials]
    np.testing.assert_allclose(outcome.scores, expected)
    assert outcome.start > 0 and outcome.compile == 1.5


def test_few_steps_are_trained_in_this_process_with_one_thread(script, work):
    cores = script("benchmark.work")
    assert cores.processes(work, 2) == 1
    assert cores.processes(replace(work, epochs=300), 2) == 2
    seen = []

    def fit(fold, trial, epochs):
        seen.append((os.getpid(), torch.get_num_threads()))
        return 0.5

    cores.over_cores(fit, work, 2)
    assert seen == [(os.getpid(), 1)] * 8


def test_longest_first(script):
    shapes = [(64, 16), (16, 16), (64, 256), (16, 32)]
    trials = [{"batch_size": size, "width": width} for size, width in shapes]
    assert script("benchmark.work").longest_first(trials) == [3, 1, 2, 0]


@pytest.mark.filterwarnings("ignore")  # those of other projects are not ours
@pytest.mark.parametrize(
    "word",
    [
        "torch",
        "gputune",
        *(
            pytest.param(word, marks=pytest.mark.long)
            for word in "sklearn compile optuna ray skorch jax".split()
        ),
    ],
)
def test_every_engine_trains_the_same_work(script, work, word, monkeypatch):
    engine = script("benchmark.engines").ENGINES[word]
    if (lack := engine.lacks()) is not None:
        pytest.skip(lack)
    if word == "compile":  # traced, but its C++ takes a compiler half a minute
        script("benchmark.engines.torch")._compiled_step.cache_clear()
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    work = replace(work, trials=[{"lr": 0.01, "batch_size": size, "width": 32} for size in (16, 64)])
    reference = script("benchmark.engines.sklearn").train(work, 1).scores
    outcome = engine.load()(work, 1)
    assert outcome.scores.shape == (2, 2)
    np.testing.assert_allclose(outcome.scores, reference, atol=0.04)
    assert 0.85 < outcome.scores.min() < 1
    assert outcome.start > 0
    assert (outcome.compile > 0) == (word in ("compile", "jax", "gputune"))


def test_the_processes_of_one_study_train_each_trial_of_the_list_once(script, work):
    pytest.importorskip("optuna")
    loop, cores = script("benchmark.engines.optuna"), script("benchmark.work")
    work = replace(work, trials=[{"lr": 0.002 * k, "batch_size": 64, "width": 16 * k} for k in (1, 2, 3)])
    taken = []

    def objective(trial, params):
        taken.append((trial.user_attrs["position"], params))
        return 0.5

    with tempfile.TemporaryDirectory() as folder:
        study, _ = loop.share(work, cores.longest_first(work.trials), objective, None, 1, folder)
        assert taken == [(c, work.trials[c]) for c in (2, 1, 0)]
        assert [t.value for t in study.trials[:3]] == [0.5] * 3


def test_a_step_without_rows_changes_nothing(script, work):
    pytest.importorskip("jax")
    module = script("benchmark.engines.jax")
    folds = script("benchmark.work").standardised(work)
    short = [tuple(part[:n] for part in folds[0][:2]) + folds[0][2:] for n in (32, 33)]
    trials = [{"lr": 0.01, "batch_size": 16, "width": 8}]
    together = module.train_group(trials, 2, short, (0,))
    # The shorter fold's rows are drawn first, so alone it has the same order.
    np.testing.assert_allclose(together[0, 0], module.train_group(trials, 2, short[:1], (0,))[0, 0])


def test_a_compiled_step_is_that_of_torch(script):
    module = script("benchmark.engines.torch")
    torch.manual_seed(0)
    network = script("benchmark.engines.torch").make_network(5, 4, 3).double()
    x, y = torch.randn(12, 5, dtype=torch.float64), torch.randint(3, (12,))
    weights = [p.detach().clone() for p in network.parameters()]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    lr, steps = torch.tensor(0.01, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for rows, labels in zip(x.split(5), y.split(5)):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(rows), labels).backward()
        optimizer.step()
        module._step(weights, first, second, rows, labels, lr, steps)
    for ours, theirs in zip(weights, network.parameters()):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-12)


def test_engines_are_chosen_by_their_words(script, monkeypatch):
    engines = script("benchmark.engines")
    chosen = engines.choose("gputune,ray:32, sklearn")
    assert [(one.engine.word, one.trials) for one in chosen] == [
        ("ray", 32),
        ("sklearn", None),
        ("gputune", None),
    ]
    assert engines.choose("torch")[-1].engine.word == "gputune"  # which all others are compared to
    monkeypatch.setattr(engines, "find_spec", lambda package: None if package == "ray.tune" else package)
    able, lacks = engines.split_by_lack(chosen)
    assert [one.engine.word for one in able] == ["sklearn", "gputune"]
    assert lacks == {"Ray Tune, PyTorch loop": "ray.tune is not installed"}
    monkeypatch.setattr(engines.shutil, "which", lambda name: None)
    assert engines.ENGINES["compile"].lacks() == "no C++ compiler is installed"


@pytest.mark.parametrize(
    "option, message",
    [
        (["--trials", "0"], "argument --trials: must be an integer of at least 1, got 0"),
        (["--engines", "sklearn,keras"], "argument --engines: must be of sklearn, torch, "),
        (["--engines", "sklearn:0"], "sklearn: must have a number of trials of at least 1 after it, got '0'"),
        (
            ["--engines", "gputune:3"],
            "gputune trains the whole list, and a part of it where another engine does",
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
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def measured(script, engine, seconds, accuracies, compile=(0.0,), rival=True):
    """One engine on as many trials as there are accuracies."""
    scores = np.broadcast_to(np.reshape(accuracies, (1, -1, 1)), (len(seconds), len(accuracies), 2))
    compile = tuple(compile) * (len(seconds) // len(compile))
    return script("benchmark.measure").Measured(
        engine, tuple(seconds), scores, (0.5,) * len(seconds), compile, rival
    )


def test_scores_that_differ_or_diverge_do_not_agree(script):
    report = script("benchmark.studies.training")

    def all_of(*accuracies):
        return [measured(script, "x", (1.0,), value) for value in accuracies]

    assert report.agree(all_of([0.95], [0.959], [0.955]))
    assert not report.agree(all_of([0.95], [0.961], [0.955]))
    assert not report.agree(all_of([0.95], [float("nan")], [0.95]))
    # One that trained the first trial only is compared on that trial, and so is no other.
    assert report.agree(all_of([0.95, 0.5], [0.951], [0.949, 0.499]))
    assert not report.agree(all_of([0.95, 0.5], [0.7], [0.949, 0.499]))
    assert not report.agree(all_of([0.95, 0.5], [0.951], [0.949, 0.55]))


class FakeEngine:
    """An engine that knows its scores already."""

    def __init__(self, word, accuracy, lack=None):
        self.word, self.name, self.package, self.accuracy, self.lack = word, word, "sklearn", accuracy, lack

    def lacks(self):
        return self.lack

    def load(self):
        def train(work, cores):
            scores = np.full((len(work.trials), len(work.folds)), self.accuracy)
            return sys.modules["benchmark.work"].Outcome(scores, 0.001, 0.0)

        return train


@pytest.fixture
def fake(script, monkeypatch):
    """Put engines that know their scores in the place of all."""

    def put(**accuracies):
        engines = script("benchmark.engines")
        fakes = {word: FakeEngine(word, accuracy) for word, accuracy in accuracies.items()}
        for name in ("benchmark.engines", "benchmark.studies.training"):
            monkeypatch.setattr(script(name), "ENGINES", fakes)
        monkeypatch.setattr(script("benchmark.report"), "card", lambda: None)
        monkeypatch.setattr(script("benchmark.studies.training"), "card", lambda: None)
        return engines, fakes

    return put


def test_no_speed_is_shown_where_the_scores_differ(script, fake, tmp_path, capsys):
    fake(sklearn=0.9, torch=0.9, gputune=0.95)
    benchmark = script("benchmark.__main__")
    assert benchmark.main(["--trials", "6", "--repeats", "1", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "NO SPEED: the mean accuracies differ by more than 0.01" in out
    assert "gputune: mean last-epoch accuracy 0.9500" in out and "trials/s" not in out
    assert list(tmp_path.iterdir()) == []


def test_engines_take_turns(script, work):
    module = script("benchmark.measure")
    calls = []

    def engine(name):
        def train(work):
            calls.append((name, len(work.trials), work.epochs))
            return script("benchmark.work").Outcome(np.zeros((len(work.trials), len(work.folds))), 0.25, 0.5)

        return train

    work = replace(work, trials=work.trials * 2)
    runs = [module.Run(name, engine(name), trials) for name, trials in zip("abc", (8, 5, 8))]
    found = module.measure(runs, work, 2)
    assert calls[:3] == [(name, 4, 1) for name in "abc"]  # the warm-up, on a small piece
    assert calls[3:] == [(name, 5 if name == "b" else 8, 3) for name in "abcbca"]
    assert [(m.engine, len(m.seconds), m.trials, m.scores.shape) for m in found] == [
        ("a", 2, 8, (2, 8, 2)),
        ("b", 2, 5, (2, 5, 2)),
        ("c", 2, 8, (2, 8, 2)),
    ]
    assert found[0].start == (0.25, 0.25) and found[0].compile == (0.5, 0.5)


def test_gputune_is_also_run_on_each_part_that_another_engine_gets(script, fake, work):
    engines, _ = fake(sklearn=0.9, torch=0.9, ray=0.9, gputune=0.9)
    runs = script("benchmark.studies.training").runs(engines.choose("sklearn:2,torch:9,ray:3"), work)
    assert [(run.engine, run.trials, run.rival) for run in runs] == [
        ("sklearn", 2, True),
        ("torch", 4, True),  # there are no more
        ("ray", 3, True),
        ("gputune", 2, False),
        ("gputune", 3, False),
        ("gputune", 4, False),
    ]


def test_the_report_is_written(script, fake, tmp_path, capsys):
    _, fakes = fake(sklearn=0.951, torch=0.95, ray=0.95, gputune=0.95)
    fakes["ray"].lack = "ray.tune is not installed"
    command = ["--repeats", "2", "--out", str(tmp_path), "--engines", "sklearn,ray,torch:3"]
    assert script("benchmark.__main__").main([*command, "--work", "narrow:6", "wide", "--trials", "7"]) == 0
    (numbers,), (page,) = tmp_path.glob("training-*.json"), tmp_path.glob("training-*.md")
    report = json.loads(numbers.read_text())
    assert [(part["work"], len(part["trials"])) for part in report["works"]] == [("narrow", 6), ("wide", 7)]
    assert report["machine"]["cores"] >= 1 and report["machine"]["versions"]["torch"]
    engines = report["works"][1]["engines"]
    expected = [("sklearn", 7), ("torch", 3), ("gputune", 3), ("gputune", 7)]
    assert [(e["engine"], e["trials"]) for e in engines] == expected
    assert all(len(e["seconds"]) == 2 for e in engines)
    text = page.read_text()
    assert "## wide: 7 trials x 5 folds x 20 epochs" in text
    assert "| torch (measured on the first 3 trials) | 0.9500 |" in text
    assert "| ray: ray.tune is not installed |" in text
    assert "| gputune on a GPU | not measured" in text
    said = capsys.readouterr().out
    assert text in said and "ray is left out: ray.tune is not installed" in said


def test_ratios_are_to_the_same_trials(script, work):
    report = script("benchmark.studies.training")
    found = [
        measured(script, "scikit-learn", (8.0, 9.0, 10.0), [0.9] * 4),
        measured(script, "PyTorch loop", (12.0, 8.0, 12.0), [0.9] * 4, compile=(4.0,)),
        measured(script, "Ray Tune", (1.0, 0.5, 2.0), [0.9] * 2),
        measured(script, "gputune", (2.0, 1.0, 1.0), [0.9] * 2, rival=False),
        measured(script, "gputune", (2.0, 4.0, 2.5), [0.9] * 4, compile=(0.5,), rival=False),
    ]
    card = {
        "gputune_accuracy": 0.9, "gputune_median": 0.5, "gputune_min": 0.25, "gputune_max": 1.0,
        "eager_seconds": 100.0, "eager_trials": 3,
    }  # fmt: skip
    part = report.summary(work, found, card, {"skorch": "skorch is not installed"})
    assert part["speed"] == {"rival": "Ray Tune", "ratio": 1.0, "trials": 2}
    assert part["engines"][0]["ratio"] == 9 / 2.5
    assert (part["engines"][0]["ratio_min"], part["engines"][0]["ratio_max"]) == (9 / 4, 4.0)
    assert part["engines"][0]["ratio_compiled"] == 9 / 2
    assert part["engines"][1]["ratio_compiled"] == 8 / 2
    assert part["engines"][4]["trials_per_second"] == 4 / 2.5
    machine = {**script("benchmark.report").describe_machine(), "card": "NVIDIA H100 80GB HBM3"}
    text = report.markdown(machine, [part])
    assert (
        "| scikit-learn | 0.9000 | 9.00 | 8.00 | 10.00 | 0.50 | 0.00 | 0.44 | 3.60x (2.25 to 4.00) | 4.50x |"
        in text
    )
    assert (
        "| Ray Tune (measured on the first 2 trials) | 0.9000 | 1.00 |" in text
        and "1.00x (0.50 to 2.00)" in text
    )
    assert "| gputune | 0.9000 | 2.50 | 2.00 | 4.00 | 0.50 | 0.50 | 1.60 |  |  |" in text
    assert "| skorch: skorch is not installed |" in text
    assert "| gputune on the GPU | 0.9000 | 0.50 | 0.25 | 1.00 |  |  | 8.00 |  |  |" in text
    assert (
        "| PyTorch loop on the GPU, one at a time | from 3 trials | 100.00 |  |  |  |  | 0.04 |  |  |" in text
    )
    assert "gputune is 1.00x as fast as the fastest other one, Ray Tune, on the first 2 trials." in text
    rows = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert len(set(rows)) == 1
    assert script("benchmark.report").file_stem(machine) == "training-nvidia-h100-80gb-hbm3"
    machine |= {"card": None, "cpu": "Intel(R) Xeon(R) Processor", "cores": 2}
    assert script("benchmark.report").file_stem(machine) == "training-intel-xeon-processor-2-cores"


def test_the_one_at_a_time_loop_is_timed_on_a_part(script, work):
    work = replace(work, epochs=1, trials=work.trials * 3)
    seconds, trials = script("benchmark.engines.torch").eager_seconds(work, "cpu")
    assert seconds > 0
    assert trials == len({trial["batch_size"] for trial in work.trials})


def test_the_large_table_shows_its_plan_and_its_memory(script, capsys, monkeypatch):
    big = script("benchmark.studies.big")
    work = big.big_work(n_trials=2, epochs=1, rows=600)
    assert work.X.shape == (600, 50) and len(work.folds) == 3
    monkeypatch.setattr(big, "ROWS", 600)
    monkeypatch.setattr(big, "card", lambda: None)
    assert script("benchmark.__main__").main(["--big", "--trials", "2", "--epochs", "1"]) == 0
    said = capsys.readouterr()
    assert "plan: 2 trials in" in said.err
    assert "600 rows x 50 columns, 2 trials, 3 folds, 1 epochs" in said.out
    assert "peak memory: " in said.out and 0 < big.peak_gib(0) < big.machine_gib()
