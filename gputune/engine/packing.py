"""A job and its data on their way to another process: code that it could not import, datasets as arrays."""

import sys
from dataclasses import fields
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import torch

from gputune.data.dataset import Dataset, Fold
from gputune.engine.chunk import Job


def packed(job: Job, *, here: bool = True) -> bytes:
    """Pickle a job for a worker. A class or function that it could not import (of a file, a test) goes as code.

    A worker on another machine (``here`` false) could import what is installed, and nothing else.
    """
    known = _importable if here else _installed
    scorer = None if job.scoring is None else job.scoring.scorer
    modules = {
        sys.modules.get(getattr(value, "__module__", None) or "") for value in (job.module_class, scorer)
    }
    hidden = [m for m in modules if m is not None and m.__name__ != "__main__" and not known(m.__name__)]
    if not here:  # the whole package, which its files import from each other
        hidden = list({sys.modules.get(m.__name__.partition(".")[0], m) for m in hidden})
    for module in hidden:
        cloudpickle.register_pickle_by_value(module)
    try:
        packed: bytes = cloudpickle.dumps(job)
    finally:
        for module in hidden:
            cloudpickle.unregister_pickle_by_value(module)
    return packed


def _importable(name: str) -> bool:
    """Whether a fresh process with this one's ``sys.path`` would find the module."""
    path = None
    for end in (i for i, c in enumerate(f"{name}.") if c == "."):
        found = PathFinder.find_spec(name[:end], path)
        if found is None:
            return False
        path = found.submodule_search_locations
    return True


def _installed(name: str) -> bool:
    """Whether a module belongs to Python, to gputune, or to a package that was installed."""
    top = name.partition(".")[0]
    if top == "gputune" or top in sys.stdlib_module_names or top in sys.builtin_module_names:
        return True
    parts = Path(getattr(sys.modules[name], "__file__", None) or "").parts
    return not {"site-packages", "dist-packages"}.isdisjoint(parts)


def to_arrays(value: Any) -> Any:
    """Datasets and folds as dicts, tensors as arrays, so that joblib can map them."""
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, tuple):
        return tuple(to_arrays(item) for item in value)
    if isinstance(value, Dataset | Fold):
        content = {field.name: to_arrays(getattr(value, field.name)) for field in fields(value)}
        return type(value).__name__, content
    return value


def to_tensors(value: Any) -> Any:
    kinds = {kind.__name__: kind for kind in (Dataset, Fold)}
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    # Two folds are a tuple of two as well, of tuples.
    if isinstance(value, tuple) and isinstance(value[0], str) and value[0] in kinds:
        return kinds[value[0]](**{name: to_tensors(item) for name, item in value[1].items()})
    if isinstance(value, tuple):
        return tuple(to_tensors(item) for item in value)
    return value
