"""A short summary by which a study knows the data it was made from."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gputune.data.table import Table
from gputune.data.target import Target


def fingerprint(X: Table | Tensor, y: Target | np.ndarray) -> dict[str, Any]:
    """Return ``rows``, ``columns`` and ``sha256``, the hex digest of X's names, kinds and values and of y's.

    Equal values in an array, a frame or a file of the same names and kinds give the same digest; a tensor has
    its own, which depends on its dtype.
    """
    digest = hashlib.sha256()
    if isinstance(X, Tensor):
        values = X.detach().cpu().contiguous()
        digest.update(f"{tuple(values.shape)} {values.dtype}".encode())
        # Bytes, since NumPy has no bfloat16.
        digest.update(values.view(-1).view(torch.uint8).numpy().data)
        rows, columns = values.shape
    else:
        digest.update(json.dumps([X.names, X.kinds]).encode())
        for column in X.columns:
            _add(digest, column)
        rows, columns = len(X), len(X.names)
    _add(digest, y.labels if isinstance(y, Target) else y)
    return {"rows": rows, "columns": columns, "sha256": digest.hexdigest()}


def table_size(found: Mapping[str, Any], origin: Mapping[str, Any] | None) -> dict[str, int]:
    """Return the rows and columns of a fingerprint; of a table that was cut, the rows that are held out count too."""
    return {"rows": (origin or {}).get("rows", found["rows"]), "columns": found["columns"]}


def rows_difference(held: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Return what differs between the rows of a study and those that were ``found``, by their numbers."""
    counts = [f"{held[n]} {n} then, {found[n]} now" for n in ("rows", "columns") if held[n] != found[n]]
    return "; ".join(counts) or f"{held['rows']} rows then and now, of other names or values"


def _add(digest: "hashlib._Hash", values: np.ndarray) -> None:
    """Add numbers, booleans or text (None = missing) of any length, so that no two lists look alike."""
    if values.dtype.kind in "OU":
        # One JSON text, since it keeps "a", "b" apart from "ab", and None from "None".
        digest.update(json.dumps(values.tolist()).encode())
        return
    numbers = values.astype(np.float64) + 0.0  # -0.0 becomes 0.0
    numbers[np.isnan(numbers)] = np.nan  # NaN has many bit patterns
    digest.update(f"{len(numbers)} numbers".encode())
    digest.update(numbers.data)


def digest_of(*arrays: np.ndarray) -> str:
    """Return the SHA-256, in hex, of arrays: their shapes, types and contents."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape} {array.dtype.str};".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
