"""The scripts that a newcomer reads: gputune's numbers beside scikit-learn's, and a descent beside
a grid."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
FEATURES = ROOT / "docs" / "index.md"
EXAMPLES = ROOT / "scripts" / "examples"


def test_the_example_goes_from_the_rows_to_a_saved_model(tmp_path, monkeypatch, capsys):
    """In a short form; once more, it goes on from the file, where nothing is left to do."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason='pip install ".[report]"')
    pyplot.switch_backend("Agg")
    text = (EXAMPLES / "digits.py").read_text()
    short = text.replace("N_TRIALS = 32", "N_TRIALS = 10").replace("EPOCHS = 20", "EPOCHS = 3")
    assert "N_TRIALS = 10" in short and "EPOCHS = 3" in short and text.count("\n# %%") >= 7
    monkeypatch.setattr("sys.argv", ["digits.py", str(tmp_path / "out")])
    shown = []
    for _ in range(2):
        exec(compile(short, "digits.py", "exec"), {"__name__": "__main__"})
        pyplot.close("all")
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    pattern = r"cross-validated (0\.\d{4}), held out (0\.\d{4})\nthe same predictions: True\n$"
    assert min(map(float, re.search(pattern, shown[0]).groups())) > 0.7
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files >= {"study.db", "plots.png", "report.html", "model"}


def test_cross_validation_shows_the_same_numbers_twice(script, capsys):
    script("iris").cross_validation()
    pairs = re.findall(
        r"^(?:fold \d|mean) +(-?\d\.\d{4}) +(-?\d\.\d{4})$", capsys.readouterr().out, re.M
    )
    assert len(pairs) == 12  # five folds and their mean, of accuracy and of log loss
    assert all(ours == theirs for ours, theirs in pairs) and len(set(pairs)) > 6


def test_both_searches_are_shown_side_by_side(script, monkeypatch, capsys):
    monkeypatch.setattr(script("iris"), "N_TRIALS", 2)
    monkeypatch.setattr(script("iris"), "EPOCHS", 10)
    script("iris").random_search()
    pattern = r"^ *(\d\.\d{4}) +(\d\.\d{4})  (.+)$"
    logistic, perceptron = capsys.readouterr().out.split("multilayer perceptron")
    rows = re.findall(pattern, logistic, re.M)
    assert len(rows) == 2 and all(ours == theirs for ours, theirs, _ in rows)
    rows = re.findall(pattern, perceptron, re.M)
    assert len(rows) == 2 and all(
        abs(float(ours) - float(theirs)) < 0.1 for ours, theirs, _ in rows
    )
    assert all(re.search(r"batch_size=\d+, lr=\S+, width=\d+", words) for _, _, words in rows)


@pytest.fixture(scope="module")
def regression(script):
    return script("iris").descend("logistic", "C", 1.0, 0.1, 1000)


def test_the_path_lies_on_the_grids_curve_with_its_slopes_and_is_shown_next_to_it(
    script, regression
):
    logs = np.log(regression.grid)
    losses = [-trial.score for trial in regression.path]
    assert (
        regression.values[0] == 1
        and losses == sorted(losses, reverse=True)
        and losses[-1] < losses[0] / 2
    )
    at = np.log(regression.values)
    np.testing.assert_allclose(losses, np.interp(at, logs, regression.losses), atol=0.003)
    slopes = np.interp(at, (logs[1:] + logs[:-1]) / 2, np.diff(regression.losses) / np.diff(logs))
    np.testing.assert_allclose([regression.slope(t)[0] for t in regression.path], slopes, atol=3e-4)
    assert losses[-1] - regression.losses.min() < regression.path[-1].std_error / 4

    iris = script("iris")
    row = r"^ +\d+ +([\d.]+) +(\d\.\d{4}) +\d\.\d{4} +-?\d\.\d{4} +\d\.\d{4}$"
    shown = np.array(re.findall(row, iris.table(regression), re.M), dtype=float)
    np.testing.assert_allclose(
        shown, np.transpose([regression.values, losses]), rtol=1e-3, atol=1e-4
    )
    assert f"loss {regression.losses.min():.4f}, the best of 61" in iris.verdict(regression)


def test_a_custom_loop_takes_no_more_statements_than_with_optuna(script, monkeypatch):
    own_loop = script("own_loop")
    monkeypatch.setattr(own_loop, "TRIALS", 1)
    counts = [own_loop.statements(way) for way in own_loop.WAYS.values()]
    assert counts == sorted(counts, reverse=True)
    assert own_loop.with_search() > 0.5 and own_loop.with_tune() > 0.5


@pytest.mark.parametrize("name", ["table", "images", "scikit_learn", "own_loop", "hypergradient"])
def test_a_notebook_runs_and_holds_such_outputs(script, name):
    pytest.importorskip("matplotlib", reason='pip install ".[report]"')
    path = EXAMPLES / f"{name}.ipynb"
    assert (
        path.stat().st_size < 100_000 and f"scripts/examples/{name}.ipynb" in FEATURES.read_text()
    )
    kept = json.loads(path.read_text())
    kinds, again = (
        [[o["output_type"] for o in c.get("outputs", ())] for c in one["cells"]]
        for one in (kept, script("notebooks").run(kept))
    )
    assert kinds == again and sum(map(len, kinds)) >= 3


def train_alone(idea, lr, fold, n_epochs):
    """Return the accuracy on a fold after each epoch of a network that a plain PyTorch loop
    trains."""
    features, classes, train_rows, valid_rows = idea.load_folds()
    x_valid = features[valid_rows[fold]]
    y_valid = classes[valid_rows[fold]]
    network = idea.make_network(64, 10)
    optimizer = torch.optim.SGD(network.parameters(), lr=float(lr))
    scores = []
    for epoch in range(n_epochs):
        order = torch.randperm(
            len(train_rows[fold]), generator=torch.Generator().manual_seed(epoch)
        )
        for batch in train_rows[fold][order].split(idea.BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(features[batch]), classes[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            outputs = network(x_valid)
        scores.append((outputs.argmax(1) == y_valid).double().mean().item())
    return scores


def test_the_idea_scores_like_a_loop_over_single_networks(script, monkeypatch):
    idea = script("idea")
    monkeypatch.setattr(idea, "EPOCHS", 2)
    curves, survivors, gradients = idea.search()
    halved = idea.EPOCHS // 2
    assert [len(means) for means in curves] == [8] * halved + [4] * (idea.EPOCHS - halved)
    best_half = curves[halved - 1].argsort(descending=True)[:4].sort().values
    assert torch.equal(survivors, idea.LEARNING_RATES[best_half])

    alone = []
    for lr in survivors:
        folds = [train_alone(idea, lr, fold, idea.EPOCHS) for fold in range(idea.F)]
        alone.append(np.mean(folds, axis=0))
    together = torch.stack([*(means[best_half] for means in curves[:halved]), *curves[halved:]])
    np.testing.assert_allclose(together.numpy(), np.transpose(alone), atol=1e-12)
    assert not math.isnan(gradients.sum())


def test_the_hypergradient_of_the_idea_is_the_slope_of_one_more_epoch(script, monkeypatch):
    """Central differences: train one more epoch with the rate moved a little up and a little
    down."""
    idea = script("idea")
    monkeypatch.setattr(idea, "EPOCHS", 2)
    _, survivors, gradients = idea.search()
    step = 1e-5

    def mean_loss(lr, last_lr):
        features, classes, train_rows, valid_rows = idea.load_folds()
        params, _ = idea.stack_module_state([idea.NETWORK] * idea.F)
        for epoch in range(idea.EPOCHS + 1):
            rate = last_lr if epoch == idea.EPOCHS else lr
            rates = torch.full((idea.F,), float(rate), dtype=torch.float64)
            params = idea.train_epoch(
                params, rates, features[train_rows], classes[train_rows], epoch
            )
        return idea.loss_all(params, features[valid_rows], classes[valid_rows]).mean().item()

    lr = survivors[0]
    slope = (mean_loss(lr, lr + step) - mean_loss(lr, lr - step)) / (2 * step)
    np.testing.assert_allclose(gradients[0].item(), slope, rtol=1e-6)


def test_the_margin_of_the_readme_is_measured_on_its_own_example(script):
    margin = script("readme_margin")
    code = margin.example()
    # the rows, and the search
    assert code.count(margin.SEEDED) == 2
    short = code.replace("n_trials=16, max_epochs=20", "n_trials=1, max_epochs=1")
    assert short != code
    default, best = margin.held_out_scores(short, seed=1)
    assert default == best and 0 < best < 1
