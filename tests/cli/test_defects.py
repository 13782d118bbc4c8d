"""Defects that were found from outside, as a user meets them on the command line.

Each test uses only commands, options and public functions that commit 3592e8d5 has too, and failed
there.
"""

import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_absolute_error
from sklearn.model_selection import KFold

import gputune
from command_line import run, searched

rng = np.random.default_rng(0)
A, B = rng.normal(size=(2, 60)).round(3)  # the columns a and b of ``write_table``
PRICES = {"target": "price", "price": (10 + 3 * A + B).round(3).tolist(), "n_rows": 60}


def on_one_line(text):
    return " ".join(text.split())


@pytest.fixture(scope="module")
def of_prices(tmp_path_factory):
    """A search of 12 trials on numbers: its table, its folder, and its closing text."""
    folder = tmp_path_factory.mktemp("prices")
    space = ["--trials", "12", "--cv", "3", "--space", "lr=0.001..0.1:log"]
    table, out, text = searched(folder, *space, "--intervals", **PRICES)
    return table, out, on_one_line(text)


@pytest.fixture(scope="module")
def of_kinds(tmp_path_factory):
    """A search by two scores on classes that column a separates: table, folder, closing text."""
    folder = tmp_path_factory.mktemp("kinds")
    options = ["--scoring", "accuracy,roc_auc", "--model", "logistic", "--space", "C=1,1e-9"]
    table, out, text = searched(
        folder,
        *options,
        a=(A + 3 * np.sign(A)).tolist(),
        kind=["ant" if a < 0 else "bee" for a in A],
        id=[f"row {i}" for i in range(60)],
        constant=["same"] * 60,
        n_rows=60,
    )
    return table, out, on_one_line(text)


def test_the_closing_text_says_whether_tuning_helped(of_prices):
    study = gputune.Study.open(of_prices[1] / "study.db")
    default = study.trials[0]
    best = study.best_trial
    assert default.origin == "default" and best.number != 0
    gains = np.subtract(best.fold_scores, default.fold_scores)
    error = gains.std(ddof=1) / 3**0.5
    found = re.search(
        r"improvement ([\d.]+) ± ([\d.]+) over the default \(paired standard error", of_prices[2]
    )
    assert found is not None, of_prices[2]
    assert [float(text) for text in found.groups()] == pytest.approx(
        [gains.mean(), error], abs=1e-4
    )


def test_the_closing_text_says_that_tuning_did_not_help(tmp_path):
    _, out, text = searched(tmp_path, "--space", "lr=0.001,1e-9", **PRICES)
    assert gputune.Study.open(out / "study.db").best_trial.number == 0
    assert "The search did not improve on the default." in on_one_line(text)


def test_the_closing_text_has_the_held_out_score_of_the_default(of_prices):
    found = re.search(
        r"default (-?[\d.]+) the default configuration, also trained on all rows", of_prices[2]
    )
    assert found is not None and float(found[1]) < 1, of_prices[2]


def test_the_closing_text_says_how_many_held_out_rows_the_intervals_hold(of_prices):
    assert re.search(r"Intervals with level 90% hold \d+ of 12 held-out rows", of_prices[2])


def test_evaluating_the_training_rows_is_remarked(of_prices):
    table, out, _ = of_prices
    assert "was trained on about 80% of these rows" in on_one_line(
        run("evaluate", out / "model", table)[1]
    )


def test_a_perfect_held_out_accuracy_has_an_interval_below_one(of_kinds):
    text = of_kinds[2]
    assert "1.0000 to 1.0000" not in text
    low = re.search(r"\(95%[ a-z]*: (\d\.\d+) to 1\.0000\)", text)
    assert low is not None and 0.7 < float(low[1]) < 1, text


def test_the_number_of_columns_is_that_of_the_columns_in_use(of_kinds):
    # a, b and c; "id" and "constant" are left out
    assert "Columns 2 numbers, 1 category, made into" in of_kinds[2]


def test_trials_that_no_other_beats_are_called_pareto_optimal(of_kinds):
    assert re.search(r"By accuracy and roc_auc \d trials? (is|are) Pareto-optimal", of_kinds[2])


def array_header(shape):
    file = io.BytesIO()
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}\n"
    file.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode())
    return file.getvalue()


def nested():
    parts = [torch.zeros(2), torch.zeros(3)]
    return torch.nested.nested_tensor(parts)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: array_header((-(10**11), 10)) + bytes(24),
            "does not fit into the file",
        ),
        (
            nested,
            r"'X' in .*t.pt' is a nested tensor, .* with torch.nested.to_padded_tensor, and pass",
        ),
        # 8 TB, which no machine gives: 4 bytes in the file
        (lambda: torch.zeros(1).expand(10**12, 2), r"needs about \d+\.\d GiB of memory or more"),
    ],
    ids=["negative", "nested", "stride 0"],
)
def test_a_hostile_file_of_arrays(make, words, tmp_path):
    made = make()
    if isinstance(made, bytes):
        path = tmp_path / "t.npy"
        path.write_bytes(made)
        (tmp_path / "y.npy").write_bytes(made)
        arguments = [path, "--target", tmp_path / "y.npy"]
    else:
        path = tmp_path / "t.pt"
        torch.save({"X": made, "y": torch.zeros(3)}, path)
        arguments = [path, "--target", "y"]
    code, out, err = run("tune", *arguments, "--trials", "1", "--quiet")
    assert (code, out) == (2, "")
    assert re.search(words, on_one_line(err)), err


def test_an_archive_of_arrays_that_memory_does_not_hold(tmp_path, monkeypatch):
    """Without a check of its size, the array of 8 MB would be read."""
    X = np.arange(2.0**20).reshape(-1, 8) // 8
    np.savez_compressed(tmp_path / "t.npz", X=X, y=X[:, 0] % 2)
    limit_memory(monkeypatch, tmp_path, free=2**20)
    with pytest.raises((gputune.InputError, MemoryError), match=r"needs .* MiB .*are free"):
        gputune.tune("mlp", str(tmp_path / "t.npz"), "y", n_trials=1, max_epochs=1, verbose=0)


def limit_memory(monkeypatch, folder, *, free):
    """Let this process be in a control group with little memory left of a large limit."""
    limit = 2**45
    (folder / "memory.max").write_text(str(limit))
    (folder / "memory.current").write_text(str(limit - free))
    (folder / "memory.stat").write_text("")
    mount = f"32 31 0:29 / {folder} rw shared:9 - cgroup2 cgroup2 rw"
    files = {
        "/proc/self/cgroup": "0::/\n",
        "/proc/self/mountinfo": mount,
        "/sys/fs/cgroup/memory.max": str(limit),
    }
    read = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda path, *how, **more: files.get(str(path)) or read(path, *how, **more),
    )


def test_the_memory_that_is_left_of_a_limit_counts(tmp_path, monkeypatch):
    table = tmp_path / "t.csv"
    table.write_text("a,y\n" + "0.123456789,1\n0.987654321,2\n" * 10_000)
    limit_memory(monkeypatch, tmp_path, free=2**16)
    code, out, err = run("tune", table, "--target", "y", "--trials", "1", "--quiet")
    assert (code, out) == (2, "")
    assert re.search(r"needs .* of memory .*only .* free", on_one_line(err)), err


@pytest.mark.parametrize("scoring", ["f1"])
def test_scores_of_one_class_are_not_computed_one_by_one(scoring, monkeypatch, iris):
    """Scikit-learn's scorers may be called for the best trial, and not for each fold and epoch."""
    from sklearn.metrics import _scorer

    calls = []
    score = _scorer._BaseScorer.__call__

    def counted(scorer, *arguments, **options):
        calls.append(scorer)
        return score(scorer, *arguments, **options)

    monkeypatch.setattr(_scorer._BaseScorer, "__call__", counted)
    X, y = iris
    options = {"n_trials": 2, "max_epochs": 5, "cv": 2, "workers": 1, "verbose": 0}
    study = gputune.tune("mlp", X, y == 1, scoring=scoring, positive=True, **options)
    assert 0 <= study.best_score <= 1
    assert len(calls) < 2 * 5 * 2


def test_the_baseline_of_an_absolute_error_is_the_median():
    y = np.exp(rng.normal(size=60))
    cv = KFold(3)
    study = gputune.tune(
        "mlp",
        rng.normal(size=(60, 2)),
        y,
        scoring="neg_mean_absolute_error",
        cv=cv,
        n_trials=1,
        max_epochs=1,
        verbose=0,
    )
    expected = []
    for train, valid in cv.split(y):
        constant = np.full(len(valid), np.median(y[train]))
        expected.append(-mean_absolute_error(y[valid], constant))
    assert study.meta["baseline"]["score"] == pytest.approx(np.mean(expected), abs=1e-6)


def test_a_full_disk_while_a_model_is_saved_is_reported_with_its_place(
    of_prices, tmp_path, monkeypatch
):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    model = gputune.load_model(of_prices[1] / "model")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        model.save(tmp_path / "saved")
    assert str(tmp_path / "saved") in str(caught.value)
