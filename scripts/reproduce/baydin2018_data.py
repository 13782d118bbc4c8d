"""The handwritten digits of the comparison: MNIST from its idx files or from OpenML, or the ones scikit-learn ships."""

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import fetch_openml, load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from gputune.errors import InputError

TRAIN_ROWS, VALID_ROWS, PIXELS = 60_000, 10_000, 28 * 28
FIRST_CLASSES = (5, 0, 4, 1, 9)  # of MNIST's training rows; other sets have files of the same names and sizes
MEAN, DEVIATION = 0.1307, 0.3081  # of MNIST's training pixels in [0, 1], as the paper's program has them
GET_FILES = (
    "torchvision.datasets.MNIST('data', download=True) puts the four files into data/MNIST/raw; "
    "without --data the script runs on scikit-learn's digits."
)


@dataclass(frozen=True)
class Data:
    """Standardised pixels, rows x pixels in float32, and the digits as int64.

    is_mnist  whether the paper's numbers are of these rows
    """

    name: str
    X: Tensor
    y: Tensor
    X_valid: Tensor
    y_valid: Tensor
    is_mnist: bool


def load(source: str | None) -> Data:
    """Return MNIST from a folder or from "openml", or scikit-learn's digits for None; InputError where it fails."""
    if source is None:
        return bundled_digits()
    if source == "openml":
        return mnist(*_openml(), "MNIST from OpenML")
    return mnist(*_idx_files(Path(source)), f"MNIST from {source}")


def bundled_digits() -> Data:
    """Return scikit-learn's 1,797 digits of 8 x 8 pixels: a stratified fifth is for validation, always the same."""
    X, y = load_digits(return_X_y=True)
    X, X_valid, y, y_valid = train_test_split(X / 16, y, test_size=0.2, stratify=y, random_state=0)
    scale = X.mean(), X.std()
    return Data("scikit-learn's digits", *_tensors(X, y, *scale), *_tensors(X_valid, y_valid, *scale), False)


def mnist(images: np.ndarray, classes: np.ndarray, name: str) -> Data:
    """Return MNIST from its 70,000 rows of pixels in 0..255, the training rows first; InputError for other data."""
    if images.shape != (TRAIN_ROWS + VALID_ROWS, PIXELS) or tuple(classes[:5]) != FIRST_CLASSES:
        raise InputError(
            f"--data must be MNIST: {TRAIN_ROWS + VALID_ROWS} images of {PIXELS} pixels, the first classes "
            f"{FIRST_CLASSES}; got {len(images)} images of {images.shape[1]} pixels, the first classes "
            f"{tuple(map(int, classes[:5]))}. {GET_FILES}"
        )
    scale = 255 * MEAN, 255 * DEVIATION
    train = _tensors(images[:TRAIN_ROWS], classes[:TRAIN_ROWS], *scale)
    return Data(name, *train, *_tensors(images[TRAIN_ROWS:], classes[TRAIN_ROWS:], *scale), True)


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Return the array of this shape in an idx file of unsigned bytes, plain or compressed by gzip.

    The header is two zero bytes, the type (8), the number of axes, then the length of each as a big-endian
    32-bit integer. Raises InputError for anything else.
    """
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":  # some browsers decompress a file and leave its name, so the name says nothing
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"--data: {path} must be readable, got: {error}. {GET_FILES}") from error
    header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
    if not raw.startswith(header) or len(raw) - len(header) != math.prod(shape):
        raise InputError(
            f"--data: {path} must be an idx file of unsigned bytes of shape {shape}, got {len(raw)} bytes that begin "
            f"with {raw[: len(header)].hex(' ') or 'nothing'}. {GET_FILES}"
        )
    return np.frombuffer(raw, np.uint8, offset=len(header)).reshape(shape)


def _idx_files(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    images, classes = [], []
    for part, rows in (("train", TRAIN_ROWS), ("t10k", VALID_ROWS)):
        images.append(read_idx(_find(folder, f"{part}-images-idx3-ubyte"), (rows, 28, 28)))
        classes.append(read_idx(_find(folder, f"{part}-labels-idx1-ubyte"), (rows,)))
    return np.concatenate(images).reshape(-1, PIXELS), np.concatenate(classes)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise InputError(f"--data must be a folder that holds {name} or {name}.gz, got {folder}. {GET_FILES}")


def _openml() -> tuple[np.ndarray, np.ndarray]:
    try:
        # liac-arff: the other parser needs pandas, which gputune does not install
        bunch = fetch_openml("mnist_784", version=1, as_frame=False, parser="liac-arff")
    except OSError as error:  # no network, no such host, a time-out, a server's refusal
        raise InputError(
            f"--data openml needs a network that reaches openml.org, got: {error}. With the four idx files of "
            f"MNIST at hand give their folder, --data DIR: {GET_FILES}"
        ) from error
    return bunch.data, bunch.target.astype(np.int64)


def _tensors(X: np.ndarray, y: np.ndarray, mean: float, deviation: float) -> tuple[Tensor, Tensor]:
    scaled = torch.tensor(X, dtype=torch.float32).sub_(mean).div_(deviation)
    return scaled, torch.tensor(y, dtype=torch.int64)
