"""The options of a search that stand by themselves, checked before anything is read or trained."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from gputune.callbacks.callback import check_callbacks
from gputune.engine.plan import parse_memory
from gputune.errors import InputError
from gputune.executors.ray_connection import Ray, check_ray
from gputune.search.descent import Hypergradient
from gputune.search.halving import Halving
from gputune.search.median import Median
from gputune.search.optuna_sampler import OptunaSampler
from gputune.types import SCHEDULES, BackendWord

Method = Literal["random"] | Halving | Median | Hypergradient | OptunaSampler


def _kept(default: Any) -> Any:
    """Return an option that a study file holds as it was given, where a file can hold it."""
    return field(default=default, metadata={"kept": True})


@dataclass(frozen=True, kw_only=True)
class Options:
    """Every argument of ``tune`` but model, optimizer, X, y and groups, as it was given."""

    space: Any = None
    n_trials: int = _kept(64)
    include: Sequence[Mapping[str, Any]] = ()
    include_default: bool = _kept(True)
    method: Any = "random"
    cv: Any = 5
    scoring: Any = _kept(None)
    positive: Any = None
    task: Any = None
    class_weight: Any = _kept(None)
    sample_weight: Any = None
    columns: Any = "auto"
    numbers: Any = "standard"
    schedule: str = "constant"
    max_epochs: int = _kept(50)
    epoch: Any = "best"
    timeout: float | None = None
    study: Any = None
    checkpoint_seconds: float = _kept(60.0)
    device: str = _kept("auto")
    backend: BackendWord = _kept("auto")
    dtype: str = _kept("float32")
    tf32: bool = _kept(False)
    memory: int | str | None = _kept(None)
    workers: int | str | Ray = _kept("auto")
    random_state: Any = 0
    callbacks: Any = ()
    verbose: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", check_method(self.method))
        object.__setattr__(self, "callbacks", check_callbacks(self.callbacks))
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("epoch", self.epoch, ("best", "last"))
        _one_of("columns", self.columns, ("auto", "keep", "drop-constant"))
        _one_of("numbers", self.numbers, ("standard", "quantile", "none"))
        _one_of("backend", self.backend, ("auto", "eager", "compiled", "graph"))
        _one_of("dtype", self.dtype, ("float32", "float64"))
        _whole("max_epochs", self.max_epochs)
        if self.workers == "ray":
            object.__setattr__(self, "workers", Ray())
        if isinstance(self.workers, Ray):
            check_ray(self.device)
        elif isinstance(self.workers, str) and self.workers != "auto":
            raise InputError(
                f"workers must be a number of processes, 'auto', 'ray' or gputune.Ray(...), got {self.workers!r}."
            )
        elif self.workers != "auto":
            _whole("workers", self.workers)
        if self.timeout is not None and not (_is_number(self.timeout) and self.timeout > 0):
            raise InputError(f"timeout is a number of seconds above 0, or None, got {self.timeout!r}.")
        if not (_is_number(self.checkpoint_seconds) and self.checkpoint_seconds > 0):
            raise InputError(
                f"checkpoint_seconds is a number of seconds above 0, got {self.checkpoint_seconds!r}."
            )
        if not (self.study is None or isinstance(self.study, str | os.PathLike)):
            raise InputError(
                f"study is the path of a file, or None, got {self.study!r}; of a study that is open give its file."
            )
        if self.study is not None:  # wherever a module of the user's goes meanwhile
            object.__setattr__(self, "study", Path(self.study).absolute())
        parse_memory(self.memory)
        device = self.device_here()
        if self.tf32 is not False:
            check_tf32(self, device)
        object.__setattr__(self, "random_state", draw_seed(self.random_state))

    def device_here(self) -> torch.device:
        """Return the device of this process; on a cluster ``device`` is that of the tasks, and this what there is."""
        return choose_device("auto" if isinstance(self.workers, Ray) else self.device)


NAMES = frozenset(option.name for option in fields(Options))
KEPT = tuple(option.name for option in fields(Options) if option.metadata.get("kept"))


def check_tf32(options: Options, device: torch.device) -> None:
    """Raise InputError where TF32 is asked for and there is none; it is set in this process alone."""
    if not isinstance(options.tf32, bool):
        raise InputError(f"tf32 must be True or False, got {options.tf32!r}.")
    if device.type != "cuda" or options.dtype != "float32":
        raise InputError(
            "tf32=True is for matrix products of single precision on a GPU, got "
            f"device={str(device)!r}, dtype={options.dtype!r}; leave tf32 out."
        )
    if options.workers not in ("auto", 1):
        raise InputError(
            f"tf32=True is for a search in one process, got workers={options.workers!r}; leave one of them out."
        )


def check_method(method: Any) -> Method:
    """Return the search method of a word or of a value."""
    words: dict[str, Method] = {
        "random": "random",
        "halving": Halving(),
        "median": Median(),
        "hypergradient": Hypergradient(),
    }
    if isinstance(method, str) and method in words:
        return words[method]
    if isinstance(method, Halving | Median | Hypergradient | OptunaSampler):
        return method
    raise InputError(
        "method must be 'random', 'halving', 'median', 'hypergradient', gputune.Halving(...), gputune.Median(...), "
        f"gputune.Hypergradient(...) or gputune.OptunaSampler(...), got {method!r}."
    )


def method_meta(method: Method) -> str | dict[str, Any]:
    """Return a method as a study file holds it."""
    if isinstance(method, str):
        return method
    if isinstance(method, OptunaSampler):
        halving = None if method.halving is None else asdict(method.halving)
        return {"name": "optuna", "sampler": type(method.sampler).__name__, "halving": halving}
    return {"name": method_name(method), **asdict(method)}


def method_name(method: Method) -> str:
    """Return the word for a method."""
    if isinstance(method, OptunaSampler):
        return "optuna"
    return method if isinstance(method, str) else type(method).__name__.lower()


def method_again(meta: str | Mapping[str, Any]) -> Method:
    """Return the method that ``method_meta`` wrote, for a refit; a sampler has no part in that."""
    if isinstance(meta, str):
        return check_method(meta)
    if meta["name"] == "optuna":
        return "random"
    options = {key: value for key, value in meta.items() if key != "name"}
    kinds = {"halving": Halving, "median": Median, "hypergradient": Hypergradient}
    again: Method = kinds[meta["name"]](**options)
    return again


def draw_seed(random_state: Any) -> int:
    """Return an integer as it is; otherwise one draw from a RandomState or Generator, or from the system (None)."""
    if _is_number(random_state) and not isinstance(random_state, float | np.floating):
        if not 0 <= random_state < 2**32:
            raise InputError(
                f"random_state must be in [0, 2**32), as scikit-learn has it, got {random_state}."
            )
        return int(random_state)
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(2**31))
    if random_state is None or isinstance(random_state, np.random.Generator):
        return int(np.random.default_rng(random_state).integers(2**31))
    raise InputError(
        f"random_state is an integer, a numpy RandomState or Generator, or None, got {random_state!r}."
    )


def choose_device(device: str) -> torch.device:
    """Return the device of "auto", "cpu", "cuda" or "cuda:1"; InputError where there is none."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = None
    with contextlib.suppress(RuntimeError, TypeError):
        chosen = torch.device(device)
    count = torch.cuda.device_count()
    if chosen is not None and chosen.type == "cpu":
        return chosen
    if chosen is not None and chosen.type == "cuda" and (chosen.index or 0) < count:
        return chosen
    there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
    raise InputError(f"device must be 'auto' or one that this machine has ({there}), got {device!r}.")


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def _whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise InputError(f"{name} must be an integer of at least 1, got {value!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
