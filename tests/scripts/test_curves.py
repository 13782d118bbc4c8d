"""The data set of learning curves, on small tables."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import gputune

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "scripts" / "benchmark" / "results" / "curves-sample.npz"

FILE = """
from sklearn.datasets import load_diabetes, load_iris
def load(name):
    X, y = (load_diabetes if name == "protein" else load_iris)(return_X_y=True, as_frame=True)
    return X, y, "regression" if name == "protein" else "multiclass"
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tables.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def options(file, tmp_path):
    """The arguments of a tiny run: four configurations of the MLP, one of RealMLP."""
    studies = ["--studies", str(tmp_path / "studies")]
    size = ["--tables", "phoneme", "protein", "--configurations", "4", "--rows", "60"]
    return [str(file), str(tmp_path / "curves.npz"), *size, "--epochs", "3", "2", *studies]


def read(path):
    with np.load(path, allow_pickle=False) as arrays:
        return {**arrays}, json.loads(str(arrays["description"]))


def test_every_score_is_in_the_file_with_its_description(script, options, tmp_path, capsys):
    assert script("curves").main(options) == 0
    arrays, description = read(tmp_path / "curves.npz")
    assert arrays["mlp"].shape == (2, 4, 3, 3) and arrays["realmlp"].shape == (2, 1, 2, 3)
    assert arrays["mlp"].dtype == np.float32 and np.isfinite(arrays["mlp"]).all()
    assert [one["name"] for one in description["tables"]] == ["phoneme", "protein"]
    assert [one["metric"] for one in description["tables"]] == [
        "accuracy",
        "neg_root_mean_squared_error",
    ]
    assert all(one["rows"] == 60 and one["license"] for one in description["tables"])
    configs = description["models"]["mlp"]["configurations"]
    # The scores are those of the studies, in the order of the configurations.
    study = gputune.Study.open(tmp_path / "studies" / "protein-mlp-4-3-60-0.db")
    np.testing.assert_array_equal(arrays["mlp"][1], study.curves.astype(np.float32))
    for config, trial in zip(configs, study.trials):
        assert config.items() <= trial.params.items()
        assert trial.state == "complete"
    said = capsys.readouterr().out
    assert "table 2 of 2: protein, realmlp" in said
    assert re.search(r"^\| mlp \| 4 \| 3 \| 24 \| \d+ \| [\d,]+ \|$", said, re.M)


def test_a_finished_run_is_read_again_without_training(script, options, tmp_path, monkeypatch):
    short = [*options, "--tables", "phoneme", "--epochs", "2", "1"]
    module = script("curves")
    assert module.main(short) == 0
    first, about = read(tmp_path / "curves.npz")
    monkeypatch.setattr("gputune.engine.train.train", None)
    assert module.main(short) == 0
    second, about_second = read(tmp_path / "curves.npz")
    np.testing.assert_array_equal(first["mlp"], second["mlp"])
    # The seconds of both runs are added.
    cost, second_cost = (a["tables"][0]["costs"]["mlp"]["seconds"] for a in (about, about_second))
    assert second_cost > cost


def test_more_configurations_begin_with_the_same(script):
    mlp, realmlp = script("curves").MODELS
    assert [len(model.configs(500, 0)) for model in (mlp, realmlp)] == [450, 50]
    assert [len(model.configs(50, 0)) for model in (mlp, realmlp)] == [45, 5]
    for model in (mlp, realmlp):
        assert model.configs(500, 0)[: len(model.configs(50, 0))] == model.configs(50, 0)
        json.dumps(model.configs(500, 0))
    assert mlp.configs(50, 0) != mlp.configs(50, 1)


def test_two_equal_configurations_are_an_error(script, file, tmp_path):
    module = script("curves")
    split = module.read_split("phoneme", module.read_loader(file), 60)
    with pytest.raises(RuntimeError, match="2 configurations made 1 trials: two of them are equal"):
        module.search(
            split, "mlp", [{"lr": 0.1}] * 2, epochs=1, seed=0, study=tmp_path / "study.db"
        )


@pytest.mark.parametrize(
    "text, complaint",
    [
        (None, r"tables.py must be a Python file with a function load\(name\) -> X, y, task: "),
        ("x = 1\n", r"tables.py must be a Python file with .*no attribute 'load'"),
        ("x = \n", r"tables.py must be a Python file with .*invalid syntax"),
        (
            "def load(name):\n    raise KeyError(name)\n",
            r"load\('phoneme'\) must return X, y and task of this table: 'phoneme'",
        ),
    ],
)
def test_a_file_that_is_wrong_is_named(script, options, file, capsys, text, complaint):
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    assert script("curves").main(options) == 2
    assert re.search(f"^error: .*{complaint}", capsys.readouterr().err)


def rounded(configs):
    """The configurations with 12 digits of each drawn number."""
    return [
        {key: f"{v:.12g}" if isinstance(v, float) else v for key, v in config.items()}
        for config in configs
    ]


def test_the_sample_and_the_numbers_of_the_page_agree(script):
    module = script("curves")
    page = (ROOT / "docs" / "published-results.md").read_text()
    arrays, description = read(SAMPLE)
    assert [one["name"] for one in description["tables"]] == list(module.TABLES)
    cpu = {}
    for model in module.MODELS:
        part = description["models"][model.name]
        scores = arrays[model.name]
        # The last digit of a drawn number depends on the processor.
        stored = rounded(part["configurations"])
        assert rounded(model.configs(50, 0)) == stored
        assert rounded(model.configs(500, 0)[: len(scores[0])]) == stored
        assert scores.shape == (11, len(part["configurations"]), part["epochs"], 3)
        shape = "({} tables, {} configurations, {} epochs, {} folds), float32".format(*scores.shape)
        assert f"| `{model.name}` | {shape} |" in page
        assert np.isfinite(scores).all()  # no training of the sample diverged
        cpu[model.name] = sum(
            one["costs"][model.name]["cpu_seconds"] for one in description["tables"]
        )
    text = " ".join(page.split())
    parts = f"{cpu['mlp']:.0f} for `mlp`, and {cpu['realmlp']:.0f} for `realmlp`"
    assert f"The sample took {sum(cpu.values()):.0f} CPU seconds: {parts}" in text
    assert f"takes {10 * sum(cpu.values()):,.0f} CPU seconds" in text
    assert SAMPLE.stat().st_size < 1e6
