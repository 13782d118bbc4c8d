"""Hypergradient descent on the learning rate: the comparison of Baydin et al. (2018), repeated.

Paper: arXiv:1703.04782.

    python scripts/reproduce/baydin2018.py                        scikit-learn's digits, no download
    python scripts/reproduce/baydin2018.py --data openml          MNIST from the network
    python scripts/reproduce/baydin2018.py --data DIR --out OUT   MNIST from its idx files; curves
                                                                  into OUT

All methods start from a learning rate of 0.001 and the same weights, and see the same batches. The
paper compares SGD, SGD with Nesterov's momentum (SGDN) and Adam, each with and without
hypergradient descent (-HD). The row "SGD, tuned lr" is not in the paper. It shows the result of a
search for one constant learning rate.
"""

import argparse
import csv
import gzip
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import fetch_openml, load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from gputune.ground.errors import InputError
from gputune.models import MLP, LogisticRegression
from gputune.optim import SGDHD, AdamHD

sys.path.append(str(Path(__file__).parents[1]))
from benchmark.report import positive, table

MODELS = {"logreg": "logistic regression", "mlp": "MLP"}

BATCH = 128
ALPHA0 = 1e-3
DECAY = 1e-4
WIDTH = 1000
GRID = (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)  # further constant rates for SGD
TUNED = "SGD, tuned lr"

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
_PLAIN = {"lr": ALPHA0, "weight_decay": DECAY}
_ADAPTED = {**_PLAIN, "hypergrad_lr": 1e-3, "rule": "additive", "lr_min": None}
_NESTEROV = {"momentum": 0.9, "nesterov": True}
METHODS: dict[str, Optimizer] = {
    "SGD": partial(torch.optim.SGD, **_PLAIN),
    "SGD-HD": partial(SGDHD, **_ADAPTED),
    "SGDN": partial(torch.optim.SGD, **_PLAIN, **_NESTEROV),
    "SGDN-HD": partial(SGDHD, **_ADAPTED, **_NESTEROV),
    "Adam": partial(torch.optim.Adam, **_PLAIN),
    "Adam-HD": partial(AdamHD, **{**_ADAPTED, "hypergrad_lr": 1e-7}),
}

# validation loss on MNIST after epoch 1 and epoch 10, from the result files of the paper's program
PUBLISHED = {
    ("logreg", "SGD"): (0.7690, 0.3737),
    ("logreg", "SGD-HD"): (0.3158, 0.2878),
    ("logreg", "SGDN"): (0.3717, 0.2846),
    ("logreg", "SGDN-HD"): (0.2792, 0.2719),
    ("logreg", "Adam"): (0.2979, 0.2719),
    ("logreg", "Adam-HD"): (0.2953, 0.2723),
    ("mlp", "SGD"): (1.9954, 0.4074),
    ("mlp", "SGD-HD"): (0.3289, 0.2405),
    ("mlp", "SGDN"): (0.4149, 0.1499),
    ("mlp", "SGDN-HD"): (0.2089, 0.0833),
    ("mlp", "Adam"): (0.1229, 0.0802),
}

TRAIN_ROWS = 60_000
VALID_ROWS = 10_000
PIXELS = 28 * 28
# The first classes of MNIST's training rows; other data sets have files of the same names and
# sizes.
FIRST_CLASSES = (5, 0, 4, 1, 9)
# Mean and deviation of MNIST's training pixels in [0, 1], from the paper's program.
MEAN = 0.1307
DEVIATION = 0.3081
GET_FILES = (
    "torchvision.datasets.MNIST('data', download=True) puts the four files into data/MNIST/raw "
    "(--data DIR); without --data the script runs on scikit-learn's digits."
)


@dataclass(frozen=True)
class Data:
    """Standardized pixels, rows x pixels in float32, and the digits as int64.

    ``is_mnist`` is True if these are the rows of the paper's numbers.
    """

    name: str
    X: Tensor
    y: Tensor
    X_valid: Tensor
    y_valid: Tensor
    is_mnist: bool


def load(source: str | None) -> Data:
    """Return MNIST from a folder or from "openml"; for None return scikit-learn's digits.

    scikit-learn has 1,797 digits of 8 x 8 pixels. A stratified fifth of them, always the same, is
    for validation. Raises InputError if loading fails.
    """
    if source is None:
        X, y = load_digits(return_X_y=True)
        X, X_valid, y, y_valid = train_test_split(
            X / 16, y, test_size=0.2, stratify=y, random_state=0
        )
        name = "scikit-learn's digits"
        mean = X.mean()
        deviation = X.std()
    else:
        X, y = _openml() if source == "openml" else _idx_files(Path(source))
        if X.shape != (TRAIN_ROWS + VALID_ROWS, PIXELS) or tuple(y[:5]) != FIRST_CLASSES:
            raise InputError(
                None,
                f"--data must be MNIST: {TRAIN_ROWS + VALID_ROWS} images of {PIXELS} pixels, the "
                f"first classes {FIRST_CLASSES}; got {len(X)} images of {X.shape[1]} pixels, the "
                f"first classes {tuple(map(int, y[:5]))}. {GET_FILES}",
            )
        (X, X_valid), (y, y_valid) = (np.split(part, [TRAIN_ROWS]) for part in (X, y))
        name = f"MNIST from {'OpenML' if source == 'openml' else source}"
        mean = 255 * MEAN
        deviation = 255 * DEVIATION
    x, x_valid = (
        torch.tensor(part, dtype=torch.float32).sub_(mean).div_(deviation) for part in (X, X_valid)
    )
    classes, classes_valid = (torch.tensor(part, dtype=torch.int64) for part in (y, y_valid))
    return Data(name, x, classes, x_valid, classes_valid, is_mnist=source is not None)


def _idx_files(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read images and classes, training rows first, from idx files, plain or compressed by gzip."""
    images = []
    classes = []
    try:
        for part, rows in (("train", TRAIN_ROWS), ("t10k", VALID_ROWS)):
            for kind, shape, found in (
                ("images-idx3", (rows, 28, 28), images),
                ("labels-idx1", (rows,), classes),
            ):
                path = folder / f"{part}-{kind}-ubyte"
                raw = (path if path.exists() else path.with_name(f"{path.name}.gz")).read_bytes()
                if raw[:2] == b"\x1f\x8b":  # some browsers decompress a file and leave its name
                    raw = gzip.decompress(raw)
                # A header of 4 bytes and 4 for the length of each axis comes before the pixels.
                found.append(np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape))
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(
            None,
            f"--data must be a folder of MNIST's four idx files, got {folder}: {error}. {GET_FILES}",
        ) from error
    return np.concatenate(images).reshape(-1, PIXELS), np.concatenate(classes)


def _openml() -> tuple[np.ndarray, np.ndarray]:
    try:
        # liac-arff: the other parser needs pandas, which gputune does not install
        bunch = fetch_openml("mnist_784", version=1, as_frame=False, parser="liac-arff")
    except OSError as error:  # no network, no such host, a time-out, a server's refusal
        raise InputError(
            None,
            f"--data openml needs a network that reaches openml.org, got: {error}. {GET_FILES}",
        ) from error
    return bunch.data, bunch.target.astype(np.int64)


@dataclass(frozen=True)
class Run:
    """One training: mean losses of each epoch (E,), and the learning rate of each step (T,)."""

    train_loss: np.ndarray
    valid_loss: np.ndarray
    lr: np.ndarray


Runs = dict[str, dict[str, list[Run]]]
"""Model -> method -> one run for each seed."""


def compare(data: Data, models: Sequence[str], *, epochs: int, seeds: int, width: int) -> Runs:
    """Train every model with every method.

    The tuned SGD is the best of the grid and of the paper's rate.
    """
    runs: Runs = {}
    total = len(models) * (len(METHODS) + len(GRID)) * seeds * epochs
    with tqdm(total=total, unit=" epochs", disable=None, leave=False, dynamic_ncols=True) as bar:
        for model in models:
            bar.set_description(model)
            options = {"epochs": epochs, "width": width, "bar": bar}

            def repeat(
                optimizer: Optimizer, model: str = model, options: Any = options
            ) -> list[Run]:
                return [
                    train(model, optimizer, data, seed=seed, **options) for seed in range(seeds)
                ]

            runs[model] = {method: repeat(optimizer) for method, optimizer in METHODS.items()}
            tried = {lr: repeat(partial(torch.optim.SGD, lr=lr, weight_decay=DECAY)) for lr in GRID}
            tried[ALPHA0] = runs[model]["SGD"]
            runs[model][TUNED] = min(
                tried.values(), key=lambda repeats: median(repeats, "valid_loss")[-1]
            )
    return runs


def train(
    model: str, optimizer: Optimizer, data: Data, *, epochs: int, seed: int, width: int, bar: tqdm
) -> Run:
    """Train one model; the seed determines the starting weights and the batches of every epoch."""
    torch.manual_seed(seed)
    hidden = {"width": width, "depth": 2, "activation": "relu"}
    kind: Any = LogisticRegression if model == "logreg" else partial(MLP, **hidden)
    network = kind(data.X.shape[1], 10)
    stepper = optimizer(network.parameters())
    train_loss = []
    valid_loss = []
    rates = []
    for _ in range(epochs):
        losses = []
        for rows in torch.randperm(len(data.y)).split(BATCH):
            stepper.zero_grad()
            loss = cross_entropy(network(data.X[rows]), data.y[rows])
            loss.backward()
            stepper.step()
            losses.append(float(loss.detach()))
            rates.append(float(stepper.param_groups[0]["lr"]))
        train_loss.append(float(np.mean(losses)))
        with torch.no_grad():
            valid_loss.append(float(cross_entropy(network(data.X_valid), data.y_valid)))
        bar.update()
    return Run(np.array(train_loss), np.array(valid_loss), np.array(rates))


def median(repeats: Iterable[Run], what: str) -> np.ndarray:
    """Return the median of a curve over seeds; a diverged value (NaN) is the worst of all."""
    curves = [getattr(run, what) for run in repeats]
    return np.median([np.where(np.isnan(curve), np.inf, curve) for curve in curves], axis=0)


def report(data: Data, runs: Runs, width: int) -> str:
    """Return the table as a page of Markdown: settings, validation losses, and the published
    losses.
    """
    first = next(iter(runs.values()))["SGD"]
    epochs = len(first[0].valid_loss)
    seeds = len(first)
    shown = sorted({1, epochs})
    head = "|".join(["model|method", *(f"epoch {e}" for e in shown), "lr at the end"])
    head += "|published: epoch 1|published: epoch 10" if data.is_mnist else ""
    rows = []
    for model, methods in runs.items():
        for method, repeats in methods.items():
            loss = median(repeats, "valid_loss")
            lr = median(repeats, "lr")
            numbers = [*((loss[e - 1], ".4f") for e in shown), (lr[-1], ".3g")]
            cells = [
                format(number, form) if np.isfinite(number) else "diverged"
                for number, form in numbers
            ]
            if data.is_mnist:
                known = (
                    PUBLISHED.get((model, method)) if model == "logreg" or width == WIDTH else None
                )
                cells += [f"{loss:.4f}" for loss in known] if known else ["-", "-"]
            rows.append("|".join([MODELS[model], method, *cells]))
    hidden = f" (2 hidden layers of {width} units)" if "mlp" in runs else ""
    what = (
        f"Validation loss on {data.name}: {len(data.y)} rows to train on, {len(data.y_valid)} to "
        f"validate, {data.X.shape[1]} pixels; {', '.join(MODELS[m] for m in runs)}{hidden};\n"
        f"batches of {BATCH}, weight decay {DECAY:g}, start at lr {ALPHA0:g}, epochs: {epochs}, "
        f"{f'the medians of {seeds} runs' if seeds > 1 else 'one run each'}."
    )
    return "\n\n".join([what, table(head, rows), _notes(data, width)]) + "\n"


def _notes(data: Data, width: int) -> str:
    rates = ", ".join(f"{lr:g}" for lr in (ALPHA0, *GRID))
    tuned = (
        f"{TUNED}: the best of {len(GRID) + 1} constant rates ({rates}) by the validation loss "
        f"shown here, so it\ntook {len(GRID) + 1} runs and its loss is a little optimistic."
    )
    if not data.is_mnist:
        return (
            f"{tuned}\nThe published numbers are of MNIST and are shown for MNIST only: --data "
            "openml or --data DIR."
        )
    other = (
        ""
        if width == WIDTH
        else f" The published MLP has {WIDTH} units a layer, so it is not shown."
    )
    return (
        f"{tuned}\nPublished: result files of github.com/gbaydin/hypergradient-descent; '-' where "
        f"none is known.{other}"
    )


def write(out: Path, page: str, runs: Runs) -> list[Path]:
    """Write the table, the losses of each epoch, the rates of each step and the figure.

    Returns their paths.
    """
    paths = [out / name for name in ("table.md", "losses.csv", "learning_rates.csv", "curves.svg")]
    paths[0].write_text(page)
    with paths[1].open("w", newline="") as losses, paths[2].open("w", newline="") as rates:
        by_epoch = csv.writer(losses)
        by_step = csv.writer(rates)
        by_epoch.writerow(["model", "method", "seed", "epoch", "train_loss", "valid_loss", "lr"])
        by_step.writerow(["model", "method", "seed", "step", "lr"])
        for model, methods in runs.items():
            for method, repeats in methods.items():
                for seed, run in enumerate(repeats):
                    ends = run.lr.reshape(len(run.valid_loss), -1)[:, -1]
                    curves = zip(run.train_loss, run.valid_loss, ends)
                    by_epoch.writerows(
                        [model, method, seed, e, *row] for e, row in enumerate(curves, 1)
                    )
                    by_step.writerows(
                        [model, method, seed, t, lr] for t, lr in enumerate(run.lr, 1)
                    )
    draw(paths[3], runs)
    return paths


def draw(path: Path, runs: Runs) -> None:
    """Draw the medians: losses by epoch, and below them the rates by step.

    Hypergradients can make a rate negative.
    """
    figure = Figure(figsize=(6.5 * len(runs), 8), layout="constrained")
    for column, (model, methods) in zip(
        figure.subplots(2, len(runs), squeeze=False).T, runs.items()
    ):
        for ax, what, below in zip(column, ("valid_loss", "lr"), ("epoch", "step")):
            for k, (method, repeats) in enumerate(methods.items()):
                curve = median(repeats, what)
                curve[~np.isfinite(curve)] = np.nan
                # A dashed line is the plain method. A solid line of the same color has
                # hypergradient
                # descent.
                style = {
                    "color": f"C{k // 2}",
                    "linestyle": ":" if method == TUNED else ("--", "-")[k % 2],
                }
                marker = "o" if len(curve) == 1 else ""
                ax.plot(range(1, len(curve) + 1), curve, label=method, marker=marker, **style)
            title = "validation loss" if what == "valid_loss" else "learning rate"
            ax.set(title=f"{MODELS[model]}: {title}", xlabel=below)
        column[0].set_yscale("log")
        column[1].set_yscale("asinh", linear_width=ALPHA0)
        column[0].legend()
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> int:
    """Return 0, or 2 if the data cannot be loaded or the folder cannot be made."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", metavar="DIR|openml", help="MNIST; default: scikit-learn's digits")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--epochs", type=positive, default=10)
    add("--seeds", type=positive, default=1, help="runs of each method; medians are shown")
    add("--width", type=positive, default=WIDTH, help=f"of the MLP's layers (default {WIDTH})")
    add("--out", type=Path, help="folder for the table, the curves (CSV) and the figure (SVG)")
    options = parser.parse_args(arguments)
    models = list(dict.fromkeys(options.models))
    try:
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
        data = load(options.data)
    except (InputError, OSError) as error:
        of_out = f"--out must be a folder or a new name for one, got {options.out}: {error}."
        print(f"error: {error if isinstance(error, InputError) else of_out}", file=sys.stderr)
        return 2
    runs = compare(data, models, epochs=options.epochs, seeds=options.seeds, width=options.width)
    page = report(data, runs, options.width)
    print(page, end="")
    if options.out:
        print("\nwritten:", ", ".join(map(str, write(options.out, page, runs))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
