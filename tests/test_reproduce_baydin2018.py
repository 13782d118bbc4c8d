"""The comparison of Baydin et al. (2018), run again: its table and files on digits, its readers, its errors."""

import csv
import gzip
import os
import re
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from tqdm import tqdm

from gputune.errors import InputError

SCRIPTS = Path(__file__).parents[1] / "scripts" / "reproduce"
EPOCHS, SEEDS, WIDTH, STEPS = 8, 2, 128, 12  # 1,437 rows in batches of 128
METHODS = ["SGD", "SGD-HD", "SGDN", "SGDN-HD", "Adam", "Adam-HD", "SGD, tuned lr"]
MODELS = {"logistic regression": "logreg", "MLP": "mlp"}


def run_script(*options, folder):
    return subprocess.run(
        [sys.executable, SCRIPTS / "baydin2018.py", *options],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One run of the script as a person starts it: what it printed, and the folder of its files."""
    out = tmp_path_factory.mktemp("baydin") / "new" / "folder"
    options = ["--epochs", str(EPOCHS), "--seeds", str(SEEDS), "--width", str(WIDTH), "--out", str(out)]
    done = run_script(*options, folder=out.parents[1])
    assert (done.returncode, done.stderr) == (0, "")
    return SimpleNamespace(stdout=done.stdout, out=out, cells=table(done.stdout))


def table(page):
    """Return the cells after the first two by (model, method), the header's among them."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line[:1] == "|"]
    return {(model, method): cells for model, method, *cells in rows if not model.startswith("-")}


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def script(monkeypatch):
    """Import a file of scripts/reproduce/ as Python does when it is run from there."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return import_module


@pytest.mark.long
def test_the_table_has_every_row_and_says_what_was_run(ran):
    assert ran.cells.pop(("model", "method")) == ["epoch 1", f"epoch {EPOCHS}", "lr at the end"]
    assert list(ran.cells) == [(model, method) for model in MODELS for method in METHODS]
    assert "scikit-learn's digits: 1437 rows to train on, 360 to validate, 64 pixels" in ran.stdout
    assert f"2 hidden layers of {WIDTH} units" in ran.stdout and "the medians of 2 runs" in ran.stdout
    assert "The published numbers are of MNIST and are shown for MNIST only" in ran.stdout


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
def test_the_claims_of_the_paper_at_its_rate(ran, model):
    end = {method: float(ran.cells[model, method][1]) for method in METHODS}
    assert end["SGD-HD"] < end["SGD"] - 0.05
    assert end["SGDN-HD"] < end["SGDN"] - 0.5
    assert end["Adam-HD"] == pytest.approx(end["Adam"], rel=0.1)  # far less than the others gain
    assert end["SGD, tuned lr"] < end["SGD-HD"]


@pytest.mark.long
def test_the_curves_are_written_and_are_those_of_the_table(ran):
    losses, rates = rows_of(ran.out / "losses.csv"), rows_of(ran.out / "learning_rates.csv")
    assert len(losses) == len(MODELS) * len(METHODS) * SEEDS * EPOCHS
    assert len(rates) == len(losses) * STEPS
    for (model, method), cells in ran.cells.items():
        mine = [row for row in losses if (row["model"], row["method"]) == (MODELS.get(model), method)]
        last = [row for row in mine if row["epoch"] == str(EPOCHS)]
        if mine:
            valid = np.median([float(row["valid_loss"]) for row in last])
            assert cells[1:] == [f"{valid:.4f}", f"{np.median([float(row['lr']) for row in last]):.3g}"]
            assert float(mine[0]["train_loss"]) > float(last[0]["train_loss"])  # of one seed
            assert len({row["valid_loss"] for row in last}) == SEEDS
    assert (ran.out / "table.md").read_text() in ran.stdout


@pytest.mark.long
def test_only_hypergradient_descent_moves_the_rate(ran):
    rates = rows_of(ran.out / "learning_rates.csv")
    for model in MODELS.values():
        for method in METHODS:
            of_seed = [
                float(row["lr"])
                for row in rates
                if (row["model"], row["method"], row["seed"]) == (model, method, "0")
            ]
            assert len(of_seed) == STEPS * EPOCHS
            if method.endswith("HD"):
                assert of_seed[0] == 1e-3 and len(set(of_seed)) == len(of_seed)
            elif method.endswith("tuned lr"):
                assert len(set(of_seed)) == 1 and of_seed[0] > 1e-2
            else:
                assert set(of_seed) == {1e-3}


@pytest.mark.long
def test_the_figure_draws_every_curve_inside_its_panel(ran):
    svg = ElementTree.parse(ran.out / "curves.svg").getroot()
    panels = [r for r in svg.findall(".//{*}rect") if r.get("fill") == "none"]
    lines = svg.findall(".//{*}polyline")
    assert len(panels) == 2 * len(MODELS) and len(lines) == len(panels) * len(METHODS)
    for k, line in enumerate(lines):
        x, y, width, height = (float(panels[k // 7].get(key)) for key in ("x", "y", "width", "height"))
        points = np.array([point.split(",") for point in line.get("points").split()], float)
        assert len(points) == (EPOCHS, EPOCHS * STEPS)[k // 7 % 2]
        assert (points[0, 0], points[-1, 0]) == (x, x + width)
        assert (points >= [x, y]).all() and (points <= [x + width, y + height]).all()
    sgd, sgd_hd = (np.array([p.split(",") for p in line.get("points").split()], float) for line in lines[:2])
    assert sgd_hd[-1, 1] > sgd[-1, 1]  # a lower loss is further down
    texts = [text.text for text in svg.findall(".//{*}text")]
    assert set(METHODS) <= set(texts) and "MLP: learning rate" in texts and "0.001" in texts


def test_a_diverged_or_short_curve_leaves_the_figure_whole(script):
    nothing, one = np.array([np.inf, np.nan]), np.array([0.5, np.inf])
    curves = {"a < b": {name: (one if name == "SGD" else nothing, nothing) for name in METHODS}}
    svg = ElementTree.fromstring(script("baydin2018_figure").figure(curves, 1e-3))
    assert len(svg.findall(".//{*}circle")) == 1
    assert "nan" not in ElementTree.tostring(svg, "unicode") and "a < b: learning rate" in [
        text.text for text in svg.findall(".//{*}text")
    ]


def test_the_same_call_prints_the_same_page(script, capsys):
    main = script("baydin2018").main
    options = ["--models", "mlp", "mlp", "--epochs", "1", "--width", "8"]
    pages = []
    for _ in range(2):
        assert main(options) == 0
        pages.append(capsys.readouterr().out)
        torch.rand(3)  # what was drawn before does not count
    assert pages[0] == pages[1]
    assert len(table(pages[0])) == 1 + len(METHODS) and "one run each" in pages[0]
    assert table(pages[0])["model", "method"] == ["epoch 1", "lr at the end"]


def test_a_diverged_rate_is_shown_and_never_chosen(script, monkeypatch):
    training, page = script("baydin2018"), script("baydin2018").report
    data = script("baydin2018_data").bundled_digits()
    far = partial(torch.optim.SGD, lr=1e8)
    run = training.train("mlp", far, data, epochs=1, seed=0, width=8, bar=tqdm(disable=True))
    assert np.isnan(run.valid_loss).all()
    monkeypatch.setattr(training, "GRID", (1e8,))
    monkeypatch.setattr(training, "METHODS", {"SGD": training.METHODS["SGD"], "SGDN": far})
    runs = training.compare(data, ["mlp"], epochs=1, seeds=1, width=8)
    assert runs["mlp"]["SGD, tuned lr"] is runs["mlp"]["SGD"]
    assert table(page(data, runs, 8))["MLP", "SGDN"] == ["diverged", "1e+08"]


def test_one_diverged_seed_of_three_does_not_hide_the_median(script):
    median = script("baydin2018").median
    np.testing.assert_array_equal(median(np.array([[1.0, 4.0], [np.nan, 2.0], [3.0, 9.0]])), [3.0, 4.0])


def test_the_bundled_digits_are_standardised_by_their_training_rows(script):
    data = script("baydin2018_data").bundled_digits()
    assert data.X.mean() == pytest.approx(0, abs=1e-6) and data.X.std() == pytest.approx(1, abs=1e-4)
    pixels = torch.cat([data.X, data.X_valid])
    black = float(pixels.min())  # pixel 0 of 0..16
    restored = ((pixels - black) / (pixels.max() - black) * 16).round()
    expected, _ = load_digits(return_X_y=True)
    assert sorted(map(tuple, restored.tolist())) == sorted(map(tuple, expected.tolist()))
    assert torch.bincount(data.y_valid).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]


IMAGES = np.arange(3 * 2 * 4, dtype=np.uint8).reshape(3, 2, 4) * 10


def idx(array):
    """Return the bytes of an idx file."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_files_are_read_plain_and_compressed(script, tmp_path, pack):
    path = tmp_path / "images"
    path.write_bytes(pack(idx(IMAGES)))
    read = script("baydin2018_data").read_idx(path)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, IMAGES)


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"", "begins with 00 00 08, got an empty file"),
        (b"\x89PNG\r\n", "begins with 00 00 08, got 89 50 4e 47"),
        (b"\0\0\x0d" + idx(IMAGES)[3:], "unsigned bytes, which begins with 00 00 08, got 00 00 0d 03"),
        (idx(IMAGES)[:9], "must be an idx file"),
        (idx(IMAGES)[:-5], "must hold 24 bytes for its shape (3, 2, 4), got 19"),
        (idx(IMAGES) + b"more", "must hold 24 bytes for its shape (3, 2, 4), got 28"),
        (gzip.compress(idx(IMAGES), mtime=0)[:-9], "must be readable, got: "),
        (gzip.compress(idx(IMAGES), mtime=0)[:12] + b"\xff" * 30, "must be readable, got: "),
    ],
)
def test_a_file_that_is_no_idx_file_is_named(script, tmp_path, content, complaint):
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{re.escape(str(path))}.*{re.escape(complaint)}.*torchvision"):
        script("baydin2018_data").read_idx(path)


@pytest.fixture
def small_mnist(script, monkeypatch, tmp_path):
    """Four files of random pixels that pass for MNIST: 20 rows, 8 to validate; beside the arrays in them."""
    module = script("baydin2018_data")
    monkeypatch.setattr(module, "TRAIN_ROWS", 20)
    monkeypatch.setattr(module, "VALID_ROWS", 8)
    images = np.random.default_rng(0).integers(0, 256, (28, 28, 28))
    classes = np.array([5, 0, 4, 1, 9, *range(10), *range(10), *range(3)])
    for part, rows in (("train", slice(20)), ("t10k", slice(20, None))):
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images[rows])))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(classes[rows]))
    return SimpleNamespace(folder=tmp_path, images=images, classes=classes, load=module.load, module=module)


def check_small_mnist(data, small_mnist):
    expected = (small_mnist.images.reshape(28, 784) / 255 - 0.1307) / 0.3081
    np.testing.assert_allclose(torch.cat([data.X, data.X_valid]), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(torch.cat([data.y, data.y_valid]), small_mnist.classes)
    assert (len(data.y), len(data.y_valid), data.X.dtype, data.y.dtype) == (20, 8, torch.float32, torch.int64)
    assert data.is_mnist


def test_mnist_is_read_from_a_folder(small_mnist):
    check_small_mnist(small_mnist.load(str(small_mnist.folder)), small_mnist)


def test_mnist_comes_from_openml(small_mnist, monkeypatch):
    def fetch(name, **options):
        assert (name, options["version"], options["as_frame"]) == ("mnist_784", 1, False)
        return SimpleNamespace(
            data=small_mnist.images.reshape(28, 784).astype(float), target=small_mnist.classes.astype(str)
        )

    monkeypatch.setattr(small_mnist.module, "fetch_openml", fetch)
    check_small_mnist(small_mnist.load("openml"), small_mnist)


def test_published_numbers_stand_beside_those_of_mnist(small_mnist, script, capsys):
    main = script("baydin2018").main
    assert main(["--data", str(small_mnist.folder), "--epochs", "2"]) == 0
    cells = table(capsys.readouterr().out)
    assert cells["model", "method"][2:] == ["lr at the end", "published: epoch 1", "published: epoch 10"]
    assert cells["logistic regression", "SGD-HD"][3:] == ["0.3158", "0.2878"]
    assert cells["MLP", "SGDN-HD"][3:] == ["0.2089", "0.0833"]
    assert cells["MLP", "Adam-HD"][3:] == ["-", "-"]
    assert all(cells[model, "SGD, tuned lr"][3:] == ["-", "-"] for model in MODELS)
    assert main(["--data", str(small_mnist.folder), "--epochs", "1", "--width", "9"]) == 0
    page = capsys.readouterr().out
    assert table(page)["MLP", "SGD"][2:] == ["-", "-"]
    assert table(page)["logistic regression", "SGD"][2:] == ["0.7690", "0.3737"]
    assert "The published MLP has 1000 units a layer, so it is not shown." in page


@pytest.mark.parametrize(
    "name, array, complaint",
    [
        ("train-labels-idx1-ubyte", np.arange(20) % 10, "the first classes (5, 0, 4, 1, 9); got 28 images"),
        ("train-labels-idx1-ubyte", np.zeros(19), "got shapes (20, 28, 28) and (19,)"),
        ("t10k-images-idx3-ubyte", np.zeros((8, 784)), "got shapes (8, 784) and (8,)"),
        ("t10k-images-idx3-ubyte", np.zeros((8, 14, 14)), "one size, got (28, 28) and (14, 14)"),
    ],
)
def test_files_that_are_not_mnist_are_refused(small_mnist, name, array, complaint):
    (small_mnist.folder / name).write_bytes(idx(array))
    with pytest.raises(InputError, match=re.escape(complaint)):
        small_mnist.load(str(small_mnist.folder))


def test_a_missing_folder_ends_with_its_remedy(tmp_path):
    done = run_script("--data", "nowhere", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --data must be a folder that holds train-images-idx3-ubyte or ")
    assert "got nowhere. torchvision.datasets.MNIST('data', download=True) puts the four files" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_file_is_named(small_mnist, script, capsys):
    (small_mnist.folder / "t10k-labels-idx1-ubyte").unlink()
    assert script("baydin2018").main(["--data", str(small_mnist.folder)]) == 2
    assert "holds t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz, got" in capsys.readouterr().err


def test_an_unreachable_network_ends_with_its_remedy(script, monkeypatch, capsys):
    def fetch(*arguments, **options):
        raise URLError("Name or service not known")

    monkeypatch.setattr(script("baydin2018_data"), "fetch_openml", fetch)
    assert script("baydin2018").main(["--data", "openml"]) == 2
    said = capsys.readouterr().err
    assert "error: --data openml needs a network that reaches openml.org, got: <urlopen error Name or" in said
    assert "give their folder, --data DIR" in said


def test_a_file_in_the_place_of_the_folder_is_refused_before_the_training(script, tmp_path, capsys):
    (tmp_path / "taken").write_text("a file")
    assert script("baydin2018").main(["--out", str(tmp_path / "taken")]) == 2
    assert "error: --out must be a folder or a new name for one, got" in capsys.readouterr().err
    assert (tmp_path / "taken").read_text() == "a file"


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--epoch5"], "unrecognized arguments: --epoch5"),
        (["--models", "vgg"], "argument --models: invalid choice: 'vgg'"),
        (["--epochs", "0"], "argument --epochs: must be an integer of at least 1, got 0"),
        (["--seeds", "1.5"], "argument --seeds: must be an integer of at least 1, got 1.5"),
        (["--width", "-3"], "argument --width: must be an integer of at least 1, got -3"),
    ],
)
def test_a_bad_option_is_named(script, capsys, options, complaint):
    with pytest.raises(SystemExit) as stopped:
        script("baydin2018").main(options)
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err
