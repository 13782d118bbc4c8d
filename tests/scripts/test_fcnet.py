"""The reproduction of FCNet's grid, on a small grid of made rows."""

import json
import re

import numpy as np
import pytest
import torch

import reference

SPACE = {
    "activation_fn_1": ["relu", "tanh"],
    "activation_fn_2": ["relu", "tanh"],
    "batch_size": [8, 16],
    "dropout_1": [0.0, 0.3],
    "dropout_2": [0.0, 0.3],
    "init_lr": [0.001, 0.01],
    "lr_schedule": ["cosine", "const"],
    "n_units_1": [4, 16],
    "n_units_2": [4, 16],
}


@pytest.fixture
def files(tmp_path):
    """The files of 50 rows, and of a grid of 30 configurations with 3 seeds."""
    generator = np.random.default_rng(0)
    X = generator.normal(size=(50, 3))
    y = 5 * X[:, :1] * X[:, 1:2] + 7
    np.savetxt(tmp_path / "rows.txt.gz", np.hstack([X, y]))
    np.savez(
        tmp_path / "grid.npz",
        index=generator.integers(0, 2, size=(30, len(SPACE))).astype(np.uint8),
        metric=generator.uniform(size=(30, 3)).astype(np.float32),
        mean_train_time_s=np.full(30, 1200, dtype=np.float32),
        space=np.frombuffer(json.dumps({"space": SPACE}).encode(), dtype=np.uint8),
    )
    return tmp_path / "rows.txt.gz", tmp_path / "grid.npz"


def test_a_sample_is_trained_and_compared(script, files, tmp_path, capsys):
    arguments = [*map(str, files), "--configurations", "12", "--epochs", "3"]
    assert script("fcnet").main([*arguments, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "| recorded hours of the same trainings, one seed | 4.0 |" in printed
    (file,) = tmp_path.glob("fcnet-*.json")
    numbers = json.loads(file.read_text())
    assert len(numbers["trials"]) == 12
    steps = [3 * -(-30 // trial["batch_size"]) for trial in numbers["trials"]]
    assert numbers["member_steps"] == sum(steps)
    assert all(trial["error"] > 0 for trial in numbers["trials"])
    assert -1 <= numbers["agreement"]["spearman"] <= 1


def test_an_error_is_the_scaled_squared_error_after_the_last_epoch(script, files):
    module = script("fcnet")
    X, y = module.read_rows(files[0])
    grid = module.read_grid(files[1]).sample(3, seed=4)
    errors = module.train(grid, X, y, epochs=3, seed=0, study=None)
    training, validation = module.split(len(y), 0)
    assert (len(training), len(validation)) == (30, 10)
    assert not set(training) & set(validation)
    for config, error in zip(grid.configs, errors):
        expected = plain_error(config, X, y, training, validation)
        assert error == pytest.approx(expected, rel=1e-4)


def plain_error(config, X, y, training, validation):
    """The error of a plain loop in double precision."""
    center, scale = X[training].mean(0), X[training].std(0)
    inputs = torch.tensor((X - center) / scale)
    target = torch.tensor((y - y[training].mean()) / y[training].std())
    rows = torch.from_numpy(training)
    full = {**config, "depth": 2, "optimizer": "adam", "weight_decay": 0.0}
    trained = reference.train_mlp(
        inputs[rows], target[rows], full, n_outputs=1, epochs=3, max_epochs=3
    )
    with torch.no_grad():
        outputs = trained.eval()(inputs[validation]).ravel()
    return float(((outputs - target[validation]) ** 2).mean())


def test_equal_ranks_agree_completely(script):
    module = script("fcnet")
    errors = np.linspace(0.1, 1, 40)
    grid = module.Grid([{}] * 40, np.stack([errors, errors**2], axis=1), np.ones(40))
    agreement = module.compare(errors, grid)
    assert agreement.spearman == pytest.approx(1)
    assert agreement.between_seeds == pytest.approx(1)
    assert agreement.best_rank == pytest.approx(4.5 / 39)  # ranks 0 to 9
    assert module.compare(-errors, grid).spearman == pytest.approx(-1)
    errors[3] = np.inf
    assert module.compare(errors, grid).diverged == 1


@pytest.mark.parametrize(
    "name, text, complaint",
    [
        ("rows.txt.gz", None, "rows.txt.gz must be a text file of numbers, .*not found"),
        ("rows.txt", "1 2\n3 word\n", "rows.txt must be a text file of numbers, .*'word'"),
        ("rows.txt", "1\n3\n", r"rows.txt must be .*shape \(2,\)"),
        ("grid.npz", None, "grid.npz must be FCNet's table with the arrays index.*No such file"),
    ],
)
def test_files_that_are_wrong_are_named(script, files, capsys, name, text, complaint):
    folder = files[0].parent
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)
    rows = folder / (name if name.startswith("rows") else "rows.txt.gz")
    assert script("fcnet").main([str(rows), str(files[1])]) == 2
    assert re.search(f"error: .*{complaint}", capsys.readouterr().err)
