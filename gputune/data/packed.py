"""The rows of folds as short text, for a study file."""

import base64
import zlib
from collections.abc import Sequence

import numpy as np

from gputune.data.dataset import Rows


def pack_folds(folds: Sequence[Rows]) -> list[list[str]]:
    """Return (train, valid) row positions as pairs of text; sorted ones take a few bits a row."""
    return [[_pack(train), _pack(valid)] for train, valid in folds]


def unpack_folds(packed: Sequence[Sequence[str]]) -> list[Rows]:
    """Return the row positions, int64, that ``pack_folds`` packed, in the same order."""
    return [(_unpack(train), _unpack(valid)) for train, valid in packed]


def _pack(rows: np.ndarray) -> str:
    steps = np.diff(np.asarray(rows, dtype="<i8"), prepend=0)
    return base64.b64encode(zlib.compress(steps.astype("<i8").tobytes())).decode()


def _unpack(text: str) -> np.ndarray:
    steps = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<i8")
    return np.cumsum(steps, dtype=np.int64)
