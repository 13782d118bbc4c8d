"""The reproductions in a small form: their tables, their files, their inputs, and their errors."""

import csv
import gzip
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch

import gputune
from gputune.ground.errors import InputError

BAYDIN = Path(__file__).parents[2] / "scripts" / "reproduce" / "baydin2018.py"
# 1,437 rows in batches of 128
EPOCHS = 8
SEEDS = 2
WIDTH = 128
STEPS = 12
METHODS = ["SGD", "SGD-HD", "SGDN", "SGDN-HD", "Adam", "Adam-HD", "SGD, tuned lr"]
MODELS = {"logistic regression": "logreg", "MLP": "mlp"}


def cells_of(page):
    """The cells after the first two by (model, method), the header's among them."""
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in page.splitlines()
        if line[:1] == "|"
    ]
    return {(model, method): cells for model, method, *cells in rows if not model.startswith("-")}


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.long
def test_the_claims_of_the_paper_and_the_files(tmp_path):
    out = tmp_path / "new" / "folder"
    size = ("--epochs", EPOCHS, "--seeds", SEEDS, "--width", WIDTH, "--out", out)
    done = subprocess.run(
        [sys.executable, BAYDIN, *map(str, size)], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    cells = cells_of(done.stdout)
    assert cells.pop(("model", "method")) == ["epoch 1", f"epoch {EPOCHS}", "lr at the end"]
    assert list(cells) == [(model, method) for model in MODELS for method in METHODS]
    assert (
        "1437 rows to train on, 360 to validate" in done.stdout
        and "the medians of 2 runs" in done.stdout
    )
    assert (out / "table.md").read_text() in done.stdout and "<svg" in (
        out / "curves.svg"
    ).read_text()
    for model in MODELS:
        end = {method: float(cells[model, method][1]) for method in METHODS}
        assert end["SGD-HD"] < end["SGD"] - 0.05 and end["SGDN-HD"] < end["SGDN"] - 0.5
        # far less than the others gain
        assert end["Adam-HD"] == pytest.approx(end["Adam"], rel=0.1)
        assert end["SGD, tuned lr"] < end["SGD-HD"]
    losses = rows_of(out / "losses.csv")
    rates = rows_of(out / "learning_rates.csv")
    assert len(losses) == len(cells) * SEEDS * EPOCHS and len(rates) == len(losses) * STEPS
    for (model, method), (_, loss, lr) in cells.items():
        mine = [row for row in losses if (row["model"], row["method"]) == (MODELS[model], method)]
        last = [row for row in mine if row["epoch"] == str(EPOCHS)]
        medians = [np.median([float(row[key]) for row in last]) for key in ("valid_loss", "lr")]
        assert [loss, lr] == [f"{medians[0]:.4f}", f"{medians[1]:.3g}"]
        assert len({row["valid_loss"] for row in last}) == SEEDS
        moves = {
            row["lr"] for row in rates if (row["model"], row["method"]) == (MODELS[model], method)
        }
        assert (len(moves) > 1) == method.endswith("HD")


def test_the_same_call_prints_the_same_page(script, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(script("baydin2018"), "GRID", (1.0,))
    options = ["--models", "logreg", "logreg", "--epochs", "1", "--out", str(tmp_path)]
    pages = []
    for _ in range(2):
        assert script("baydin2018").main(options) == 0
        pages.append(capsys.readouterr().out)
        torch.rand(3)  # what was drawn before does not count
    assert pages[0] == pages[1] and "one run each" in pages[0]
    assert len(cells_of(pages[0])) == 1 + len(METHODS)


def idx(array):
    """Return the bytes of an idx file."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def small_mnist(script, monkeypatch, tmp_path):
    """Four files of random pixels that pass for MNIST: 20 rows, 8 to validate; beside the arrays in
    them."""
    module = script("baydin2018")
    monkeypatch.setattr(module, "TRAIN_ROWS", 20)
    monkeypatch.setattr(module, "VALID_ROWS", 8)
    images = np.random.default_rng(0).integers(0, 256, (28, 28, 28))
    classes = np.array([5, 0, 4, 1, 9, *range(10), *range(10), *range(3)])
    for part, rows in (("train", slice(20)), ("t10k", slice(20, None))):
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images[rows])))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(classes[rows]))
    return SimpleNamespace(folder=tmp_path, images=images, classes=classes, module=module)


def test_mnist_is_read_from_a_folder_and_comes_from_openml(small_mnist, monkeypatch):
    def fetch(name, **options):
        assert (name, options["version"], options["as_frame"]) == ("mnist_784", 1, False)
        pixels = small_mnist.images.reshape(28, 784).astype(float)
        return SimpleNamespace(data=pixels, target=small_mnist.classes.astype(str))

    monkeypatch.setattr(small_mnist.module, "fetch_openml", fetch)
    expected = (small_mnist.images.reshape(28, 784) / 255 - 0.1307) / 0.3081
    for source in (str(small_mnist.folder), "openml"):
        data = small_mnist.module.load(source)
        np.testing.assert_allclose(
            torch.cat([data.X, data.X_valid]), expected, rtol=1e-4, atol=1e-5
        )
        np.testing.assert_array_equal(torch.cat([data.y, data.y_valid]), small_mnist.classes)
        assert (len(data.y), data.X.dtype, data.y.dtype) == (
            20,
            torch.float32,
            torch.int64,
        ) and data.is_mnist


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        (
            "train-labels-idx1-ubyte",
            idx(np.arange(20) % 10),
            "the first classes (5, 0, 4, 1, 9); got 28 images",
        ),
        (
            "train-labels-idx1-ubyte",
            idx(np.zeros(19)),
            "cannot reshape array of size 19 into shape (20,)",
        ),
        ("t10k-labels-idx1-ubyte", b"", "offset must be non-negative"),
        ("t10k-labels-idx1-ubyte", gzip.compress(idx(np.zeros(8)), mtime=0)[:-9], "ended before"),
        ("t10k-labels-idx1-ubyte", None, "No such file"),
    ],
)
def test_files_that_are_not_mnist_are_refused(small_mnist, name, content, complaint):
    if content is None:
        (small_mnist.folder / name).unlink()
    else:
        (small_mnist.folder / name).write_bytes(content)
    with pytest.raises(InputError, match=f"--data must be .*{re.escape(complaint)}.*torchvision"):
        small_mnist.module.load(str(small_mnist.folder))


def test_what_cannot_be_had_ends_with_its_remedy(script, monkeypatch, tmp_path, capsys):
    assert script("baydin2018").main(["--data", "nowhere"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "error: --data must be a folder of MNIST's four idx files, got nowhere: "
    )
    assert "torchvision.datasets.MNIST('data', download=True) puts the four files" in said

    def fetch(*arguments, **options):
        raise URLError("Name or service not known")

    monkeypatch.setattr(script("baydin2018"), "fetch_openml", fetch)
    assert script("baydin2018").main(["--data", "openml"]) == 2
    said = capsys.readouterr().err
    assert (
        "--data openml needs a network that reaches openml.org, got: <urlopen error Name or" in said
    )
    (tmp_path / "taken").write_text("a file")
    assert script("baydin2018").main(["--out", str(tmp_path / "taken")]) == 2
    assert "error: --out must be a folder or a new name for one, got" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, options, complaint",
    [
        (
            "baydin2018",
            ["--seeds", "1.5"],
            "argument --seeds: must be an integer of at least 1, got 1.5",
        ),
        (
            "hypergradient_schedules",
            ["--splits", "0"],
            "--splits: must be an integer of at least 1, got 0",
        ),
    ],
)
def test_a_bad_option_is_named(script, capsys, name, options, complaint):
    with pytest.raises(SystemExit) as stopped:
        script(name).main(options)
    assert stopped.value.code == 2 and complaint in capsys.readouterr().err


SEARCHES = [
    "descent, 10 rates",
    "descent, 1 rate",
    "random, 1 rate, 2 draws",
    "random, 1 rate, 4 draws",
]


@pytest.fixture(scope="module")
def schedules(script):
    module = script("hypergradient_schedules")
    module.EPOCHS = 3  # the module is this file's alone
    return module.run(module.split_of(0), draws=(2, 4), outer_steps=1)


def test_the_table_and_the_files_of_the_schedules(script, schedules, monkeypatch, tmp_path, capsys):
    module = script("hypergradient_schedules")
    out = tmp_path / "new" / "folder"
    monkeypatch.setattr(module, "run", lambda split, *, draws, outer_steps: schedules)
    assert module.main(["--splits", "2", "--draws", "4", "--out", str(out)]) == 0
    page = (out / "table.md").read_text()
    assert page in capsys.readouterr().out and [r.search for r in schedules] == SEARCHES
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in page.splitlines()
        if line[:1] == "|"
    ]
    table = [row for row in rows if len(row) == 8 and row[0] in "01"]
    for row, r in zip(table, 2 * schedules, strict=True):
        assert row[1:3] == [r.search, f"{r.trials} x 5"]
        numbers = [r.loss, r.std_error, r.held_out_loss]
        assert [float(row[i]) for i in (4, 5, 6)] == pytest.approx(numbers, abs=1e-4)
    compared = {tuple(row[:2]): row[2:] for row in rows if len(row) == 7 and row[0] in SEARCHES}
    assert len(compared) == 3 + 2
    in_folds, wins, held_out, held_out_wins, clear = compared[SEARCHES[0], SEARCHES[3]]
    gap = schedules[0].loss - schedules[3].loss
    assert (in_folds, wins) == (f"{gap:+.4f} ({gap:+.4f} to {gap:+.4f})", f"{2 * (gap < 0)} of 2")
    gaps = schedules[0].held_out - schedules[3].held_out
    assert float(held_out.split()[0]) == pytest.approx(gaps.mean(), abs=1e-4)
    assert held_out_wins == f"{2 * (gaps.mean() < 0)} of 2"
    assert (clear != "0, 0") == (abs(gaps.mean()) > 2 * gaps.std(ddof=1) / math.sqrt(197))
    assert (
        len(re.findall(r"^- split \d: first layer (?:\S+, ){4}\S+; second layer", page, re.M)) == 2
    )
    whole = json.loads((out / "results.json").read_text())
    assert [(r["split"], r["search"]) for r in whole["results"]] == [
        (s, n) for s in (0, 1) for n in SEARCHES
    ]
    assert whole["results"][0]["held_out_loss"] == schedules[0].held_out_loss


@pytest.fixture
def papers_tables(tmp_path):
    """Two small tables as TabM's authors write them: churn of all kinds of columns, california of
    numbers."""
    rng = np.random.default_rng(0)
    for name, targets in (("churn", lambda x: (x > 0).astype(int)), ("california", lambda x: x)):
        folder = tmp_path / "tables" / name
        folder.mkdir(parents=True)
        for part, rows in (("train", 40), ("val", 20), ("test", 30)):
            numbers = rng.normal(size=(rows, 2)).astype(np.float32)
            np.save(folder / f"X_num_{part}.npy", numbers)
            np.save(folder / f"Y_{part}.npy", targets(numbers[:, 0]))
            if name == "churn":
                np.save(folder / f"X_bin_{part}.npy", (numbers[:, 1:] > 0).astype(np.float32))
                np.save(folder / f"X_cat_{part}.npy", np.where(numbers > 0.5, "high", "low"))
    return tmp_path / "tables"


def test_published_tables_are_searched_and_a_stopped_run_continues(
    script, papers_tables, monkeypatch, tmp_path, capsys
):
    module = script("tuned_mlp")
    monkeypatch.setattr(module, "SEARCHES", {"portfolio": ("mlp", "mlp", 3, 8)})
    options = [
        str(papers_tables),
        "--studies",
        str(tmp_path / "studies"),
        "--out",
        str(tmp_path),
        "--tables",
        "churn",
    ]
    assert module.main([*options, "--seeds", "2"]) == 0
    data = module.read(papers_tables, "churn")
    assert [*data.X] == ["n0", "n1", "b0", "c0", "c1"] and (
        len(data.X),
        data.n_train,
        len(data.X_test),
    ) == (60, 40, 30)
    assert (
        module.main(
            [*options, "california", "--rows", "training", "all", "--note", "Rows of a test."]
        )
        == 0
    )
    (page,), (numbers,) = tmp_path.glob("tuned-mlp-*.md"), tmp_path.glob("tuned-mlp-*.json")
    text = page.read_text()
    results = [module.Result(**one) for one in json.loads(numbers.read_text())["results"]]
    assert text in capsys.readouterr().out and "Rows of a test." in text
    asked = [
        ("churn", 0, "training"),
        ("churn", 1, "training"),
        ("churn", 0, "all"),
        ("california", 0, "training"),
    ]
    asked.append(("california", 0, "all"))
    ways = [(*one, way) for one in asked for way in ("best trial", "ensemble")]
    assert [(one.table, one.seed, one.rows, one.way) for one in results] == ways
    assert all(one.seconds > 0 and one.members == 1 for one in results if one.way == "best trial")
    mean = sum(one.score for one in results[:3:2]) / 2
    assert (
        f"| churn | gputune, portfolio, 3 trials: best trial, on training rows | {mean:.4f} ± "
        in text
    )
    assert "| churn | TabM, tuned | 0.8605 ± 0.0016 |  | 561 |  | A100 |" in text
    # The best trial trains on the training rows alone: it is the member of the search.
    study = gputune.Study.open(tmp_path / "studies" / "california-portfolio-3-0.db")
    data = module.read(papers_tables, "california")
    rmse = data.score(study.ensemble(data.X, data.y, size=1, refit="folds", verbose=0))
    assert rmse == next(one.score for one in results if one.table == "california")
    before = numbers.read_text()
    monkeypatch.setattr(module, "search", None)  # nothing is left to be searched
    assert (
        module.main([*options, "california", "--seeds", "1"]) == 0 and numbers.read_text() == before
    )


@pytest.mark.parametrize(
    "change, complaint",
    [
        (
            lambda at: at.rename(at.with_name("other")),
            r"must have churn/X_num_train.npy, X_bin_train.npy or X_cat",
        ),
        (
            lambda at: (at / "Y_val.npy").unlink(),
            r"Y_val.npy must be an array of numbers or text: .*No such file",
        ),
        (lambda at: np.save(at / "Y_test.npy", np.ones(3)), r"got \(30, 5\) and 3 targets"),
        (
            lambda at: (at / "X_cat_test.npy").unlink(),
            r"test files must have the columns of the train files",
        ),
    ],
)
def test_a_table_that_is_not_there_is_reported_with_its_address(
    script, papers_tables, capsys, change, complaint
):
    change(papers_tables / "churn")
    assert script("tuned_mlp").main([str(papers_tables), "--tables", "churn"]) == 2
    assert re.search(
        f"error: .*{complaint}.*https://github.com/yandex-research/tabm", capsys.readouterr().err
    )
