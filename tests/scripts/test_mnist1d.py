"""The comparison with the published accuracies on MNIST-1D, with few rows and short searches."""

import json
import sys
from importlib.metadata import PackageNotFoundError
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
from tqdm import tqdm

pytest.importorskip("mnist1d")

SCRIPT = Path(__file__).parents[2] / "scripts" / "reproduce" / "mnist1d.py"


@pytest.fixture(scope="module")
def mnist():
    """The script, under another name than that of the package mnist1d."""
    spec = spec_from_file_location("mnist1d_script", SCRIPT)
    module = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mnist1d_script", module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def rows(mnist):
    """The published rows."""
    return mnist.load()


def test_the_rows_are_the_published_ones(rows):
    assert rows.X.shape == (4000, 40) and rows.X_test.shape == (1000, 40)
    assert rows.X.dtype == np.float32
    np.testing.assert_allclose(rows.X[0, :3], [-0.332006, -0.471910, -0.778697], atol=1e-5)
    assert rows.y[:8].tolist() == [2, 6, 4, 5, 6, 6, 6, 0]
    assert np.bincount(np.append(rows.y, rows.y_test)).tolist() == [500] * 10


def test_each_model_is_tuned_and_compared(mnist, monkeypatch, tmp_path, capsys):
    small = mnist.load(n_samples=100)
    monkeypatch.setattr(mnist, "load", lambda: small)
    monkeypatch.setattr(mnist, "BUDGETS", dict.fromkeys(mnist.PUBLISHED, mnist.Budget(1, 1)))
    assert mnist.main(["--seeds", "4", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "seed 4, model gru" in printed.err
    assert "| model | published | standard error | mean | reached | seed 4 | CV |" in printed.out
    (file,) = tmp_path.glob("mnist1d-*.json")
    numbers = json.loads(file.read_text())
    assert [line["model"] for line in numbers["summary"]] == ["logistic", "mlp", "cnn", "gru"]
    assert len(numbers["results"]) == 4
    for result in numbers["results"]:
        assert result["accuracy"] * 20 == pytest.approx(round(result["accuracy"] * 20))
        assert set(result["params"]) == set(mnist.SPACES[result["model"]])


def test_a_test_accuracy_is_that_of_the_best_model(mnist, monkeypatch):
    small = mnist.load(n_samples=100)
    models = []
    tune = mnist.gputune.tune

    def watched(*arguments, **options):
        study = tune(*arguments, **options)
        models.append(study.best_model())
        return study

    monkeypatch.setattr(mnist.gputune, "tune", watched)
    result = mnist.tune("cnn", small, 0, mnist.Budget(2, 2))
    predicted = models[0].predict(small.X_test[:, None])
    assert result.accuracy == np.mean(predicted == small.y_test)
    assert models[0].module.blocks[0][0].weight.shape[1:] == (1, 3)


def test_a_figure_is_reached_one_standard_error_below_it(mnist):
    def results(*accuracies):
        return [
            mnist.Result("cnn", seed, accuracy, 0.9, {}, 1.0, 2.0)
            for seed, accuracy in enumerate(accuracies)
        ]

    (line,) = mnist.summary(results(0.92, 0.95), n_test=1000)
    assert line["mean"] == pytest.approx(0.935)
    assert line["standard_error"] == pytest.approx(0.00751, abs=1e-5)
    assert line["reached"]
    (line,) = mnist.summary(results(0.92, 0.944), n_test=1000)
    assert not line["reached"]


def test_the_notebook_is_repeated(mnist, rows):
    batches = mnist.minibatches(rows, mnist.STEPS)
    with tqdm(disable=True) as bar:
        rates = mnist.plain_loop(0.15, batches, 4, bar)
    assert rates[3] == pytest.approx(0.4909, abs=5e-5)  # printed by the notebook


@pytest.mark.parametrize("start", [1.5, 0.15])
def test_both_loops_learn_the_same_rate(mnist, rows, start):
    learned = mnist.learn_rate(rows, start, steps=10, outer_steps=3)
    np.testing.assert_allclose(learned.gputune, learned.plain, rtol=1e-5)
    assert learned.gputune[0] != start
    assert learned.difference < 1e-5


def test_the_learned_rates_are_published(mnist, rows, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(mnist, "load", lambda: rows)
    monkeypatch.setattr(mnist, "STEPS", 5)
    assert mnist.main(["--learn-rate", "--outer-steps", "2", "--out", str(tmp_path)]) == 0
    assert "| 0.15 | 0.6203 | - |" in capsys.readouterr().out
    (file,) = tmp_path.glob("learned-rate-*.json")
    learned = json.loads(file.read_text())["learned"]
    assert [result["start"] for result in learned] == [1.5, 0.15]
    assert all(len(result["gputune"]) == 2 for result in learned)


def test_a_missing_package_is_named(mnist, monkeypatch, capsys):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(mnist, "distribution", missing)
    assert mnist.main([]) == 2
    message = "error: the package mnist1d is not installed. Run: pip install mnist1d"
    assert message in capsys.readouterr().err
