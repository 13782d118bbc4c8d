"""The scripts that a newcomer reads: gputune's numbers beside scikit-learn's."""

import re
from importlib import import_module
from pathlib import Path

import pytest
from sklearn.datasets import load_iris
from sklearn.model_selection import StratifiedKFold

SCRIPTS = Path(__file__).parents[1] / "scripts" / "examples"


@pytest.fixture
def script(monkeypatch):
    """Import a file of scripts/examples/ as Python does when it is run from there."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return import_module


@pytest.fixture(scope="module")
def iris():
    X, y = load_iris(return_X_y=True)
    return X, y, list(StratifiedKFold(5, shuffle=True, random_state=0).split(X, y))


def test_the_example_goes_from_the_rows_to_a_saved_model(tmp_path, monkeypatch, capsys):
    """In a short form; once more, it goes on from the file, where nothing is left to do."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason='pip install "gputune[report]"')
    pyplot.switch_backend("Agg")
    text = (SCRIPTS / "digits.py").read_text()
    short = text.replace("N_TRIALS, EPOCHS = 32, 20", "N_TRIALS, EPOCHS = 10, 4")
    assert short != text and text.count("\n# %%") >= 7
    monkeypatch.setattr("sys.argv", ["digits.py", str(tmp_path / "out")])
    shown = []
    for _ in range(2):
        exec(compile(short, "digits.py", "exec"), {"__name__": "__main__"})
        pyplot.close("all")
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    found = re.search(
        r"cross-validated (0\.\d{4}), held out (0\.\d{4})\nthe same predictions: True\n$", shown[0]
    )
    assert min(map(float, found.groups())) > 0.7
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {
        "study.db",
        "plots.png",
        "report.html",
        "model",
    }


def test_cross_validation_shows_the_same_numbers_twice(script, capsys):
    script("iris_cross_validation").main()
    pairs = re.findall(r"^(?:fold \d|mean) +(-?\d\.\d{4}) +(-?\d\.\d{4})$", capsys.readouterr().out, re.M)
    assert len(pairs) == 12  # five folds and their mean, of accuracy and of log loss
    assert all(ours == theirs for ours, theirs in pairs)
    assert len(set(pairs)) > 6


def test_the_search_of_the_logistic_regression_agrees(script, iris, monkeypatch):
    search = script("iris_random_search")
    monkeypatch.setattr(search, "N_TRIALS", 8)  # all there are
    rows = search.search_logistic(*iris)
    assert len({tuple(params.items()) for params, _, _ in rows}) == 8
    for params, ours, theirs in rows:
        assert ours == pytest.approx(theirs, abs=1e-12), params
    assert len({ours for _, ours, _ in rows}) > 2


def test_the_search_of_the_perceptron_is_shown_side_by_side(script, monkeypatch, capsys):
    search = script("iris_random_search")
    monkeypatch.setattr(search, "N_TRIALS", 3)
    monkeypatch.setattr(search, "EPOCHS", 30)
    search.main()
    logistic, perceptron = capsys.readouterr().out.split("multilayer perceptron")
    pattern = r"^ *(\d\.\d{4}) +(\d\.\d{4})  (.+)$"
    assert all(ours == theirs for ours, theirs, _ in re.findall(pattern, logistic, re.M))
    rows = re.findall(pattern, perceptron, re.M)
    assert len(rows) == 3
    assert all(abs(float(ours) - float(theirs)) < 0.1 for ours, theirs, _ in rows)
    assert all(re.search(r"batch_size=\d+, lr=\S+, width=\d+", words) for _, _, words in rows)
