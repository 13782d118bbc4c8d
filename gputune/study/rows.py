"""The rows of a study file, the learning curves of all trials, and fold reports.

A candidate is a configuration with its trial number. A chunk is a group of trials that train
together. Axes: C trials, F folds, M metrics, K classes.

Floats are raw little-endian float64, because SQLite's REAL turns NaN into NULL and -0.0 into 0.
Each row has a checksum of its key and content, so an undamaged row is recognized wherever it is
found.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Any, Literal, Self, TypeAlias, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from gputune.ground.annotations import FloatArray, IntArray
from gputune.ground.errors import InputError, Verbatim
from gputune.ground.text import size_words
from gputune.ground.types import Config, Json, Outputs, first_metric
from gputune.study.record import OPTION_FORMS, has_form
from gputune.study.values import from_json, to_json

EpochRule = Literal["best", "last"]
ResultState = Literal["complete", "failed", "stopped", "pruned"]
TrialState = ResultState | Literal["waiting"]
Curve: TypeAlias = FloatArray
StoredRow = tuple[Any, ...]
StoredValue = TypeVar("StoredValue")

_LARGE = 2**30
_PADDING = 64
"""The memory limit of stacked curves: bytes that are always allowed, and bytes per byte of the
single curves.

Stacked curves above both limits are refused.
"""

_POINT = re.compile(r"([0-9]{1,9}):([0-9]{1,9})")
_MOST_THREADS = 4096
_FLOAT = np.dtype("<f8")
STATES = get_args(ResultState)
_NUMBERS: list[object] = []  # nested lists of numbers
_NUMBERS.append((float, _NUMBERS))
LINEAGE = {"schedule": [{"epoch": int, "params": dict}], "lineage": [[int]], "copies": [[int]]}
"""The form of a trial's history in population based training."""
_DETAIL = {
    "loss?": float,
    "ratio?": float,
    "usable?": bool,
    "mode?": str,
    "rung?": int,
    "reason?": str,
    "error?": str,
    "slope?": {"": (float, _NUMBERS)},
    "slope_error?": {"": (float, _NUMBERS)},
    **{f"{key}?": form for key, form in LINEAGE.items()},
}

# Each ``from_row`` receives a row with a valid checksum. It raises ValueError for a row that
# gputune cannot have written.


def option_to_row(key: str, value: object) -> StoredRow:
    return key, to_json(value, name=f"meta[{key!r}]")


def option_from_row(key: str, text: str) -> tuple[str, Any]:
    """Return the name and the value of a search option from a row of the table ``meta``."""
    value = from_json(text)
    if key in OPTION_FORMS and not has_form(value, OPTION_FORMS[key]):
        raise ValueError(f"{text[:60]} has a wrong type")
    return key, value


@dataclass(frozen=True)
class Candidate:
    """A configuration with its trial number, before gputune trains the trial."""

    number: int
    params: Config
    origin: str | tuple[int, int]
    """"default", "include", "random", or "batch 3" for a proposal of the Optuna sampler.

    A point of a hypergradient search has (trial number of its starting point, outer step from 1).
    """

    def to_row(self) -> StoredRow:
        origin = self.origin if isinstance(self.origin, str) else "{}:{}".format(*self.origin)
        return int(self.number), to_json(self.params, name=f"trial {self.number}"), origin

    @classmethod
    def from_rows(
        cls, numbers: Sequence[int], params: Sequence[str], origins: Sequence[str]
    ) -> list[Self]:
        values = list(map(from_json, params))
        are_objects = {dict}.issuperset(map(type, values))
        if not are_objects or not {str}.issuperset(map(type, chain.from_iterable(values))):
            raise ValueError(f"parameters {params[0][:60]} are not an object")
        return list(map(cls, numbers, values, map(_origin, origins)))


@lru_cache
def _origin(text: str) -> str | tuple[int, int]:
    point = _POINT.fullmatch(text)
    return (int(point[1]), int(point[2])) if point else text


_FACTS = {"threads": int, "at_once?": int}


@dataclass(frozen=True)
class PlannedChunk:
    """Trials that always train together, in this order, with ``threads`` threads per step.

    ``stage`` is the beginning of the chunk: the epochs done before it (halving), or the outer step
    (hypergradient search), otherwise 0.

    ``at_once`` is the number of chunks of the plan that may train at the same time. It decides when
    a search that is good enough ends.
    """

    number: int
    stage: int
    trials: tuple[int, ...]
    threads: int
    at_once: int = 1

    def to_row(self) -> StoredRow:
        facts = {"threads": self.threads}
        if self.at_once > 1:
            facts["at_once"] = self.at_once
        return self.number, self.stage, to_json(list(self.trials)), to_json(facts)

    @classmethod
    def from_row(cls, number: int, stage: int, trials: str, facts: str) -> Self:
        members = from_json(trials)
        shared = from_json(facts)
        if not has_form(members, [int]) or not members or not has_form(shared, _FACTS):
            raise ValueError(f"its trials are {trials[:60]}, and its facts are {facts[:60]}")
        threads = min(max(1, shared["threads"]), _MOST_THREADS)
        return cls(number, stage, tuple(members), threads, max(1, shared.get("at_once", 1)))


@dataclass(frozen=True, eq=False)
class Result:
    """The outcome of training one candidate. Scores follow scikit-learn: greater is better."""

    number: int
    state: ResultState
    score: float
    fold_scores: Sequence[float]  # (F,)
    best_epoch: int
    seconds: float
    curve: Curve  # (epochs, F); with several metrics (epochs, F, M), the one that ranks first
    detail: Json = field(default_factory=dict)  # facts from the search method

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise InputError("Result(state=...)", f"must be one of {STATES}", got=self.state)
        folds = len(self.fold_scores)
        if folds < 1 or self.curve.ndim not in (2, 3) or self.curve.shape[1] != folds:
            shape = f"shape {self.curve.shape} and {folds} fold_scores in trial {self.number}"
            raise InputError(
                "Result(curve=...)",
                "must be (epochs, F) with one column for each of the fold_scores",
                got=Verbatim(shape),
            )

    @classmethod
    def of_curve(
        cls,
        number: int,
        curve: Curve,
        *,
        epochs: int,
        rule: EpochRule,
        seconds: float,
        detail: Json | None = None,
    ) -> Self:
        """Return the result of a trial with this curve, after ``epochs`` trained epochs.

        If the score of any fold is NaN at any of these epochs, the state is "failed" and the score
        is NaN. The earliest epoch wins a tie. A "stopped" trial was cut short by a deadline and is
        scored on its trained epochs. With several metrics, the first metric decides the best epoch,
        the score and the state.
        """
        detail = detail or {}
        done = first_metric(curve, axes=2)[:epochs]
        diverged = np.flatnonzero(np.isnan(done).any(1))
        if len(diverged) or epochs == 0:
            at = int(diverged[0]) if len(diverged) else 0
            folds = tuple(done[at].tolist()) if epochs else (np.nan,) * curve.shape[1]
            return cls(number, "failed", math.nan, folds, at, seconds, curve, detail)
        mean = done.mean(1)
        # argmax returns the first maximum: the earliest epoch wins a tie.
        at = int(mean.argmax()) if rule == "best" else epochs - 1
        folds = tuple(done[at].tolist())
        state: ResultState = "complete" if epochs == len(curve) else "stopped"
        return cls(number, state, float(mean[at]), folds, at + 1, seconds, curve, detail)

    @property
    def metrics(self) -> Curve:
        """Fold scores (F, M) by all metrics at the best epoch; NaN if the trial failed."""
        # (epochs, F) -> (epochs, F, 1)
        table = self.curve if self.curve.ndim == 3 else self.curve[..., None]
        is_scored = self.state != "failed" and 0 < self.best_epoch <= len(table)
        return table[self.best_epoch - 1] if is_scored else np.full(table.shape[1:], np.nan)

    def replaces(self, stored: "Result") -> bool:
        """Return whether this result may replace a stored result of the same trial.

        Only the result of a stopped trial is replaced, and only if no epochs are lost.
        """
        if stored.state != "stopped":
            return False
        return self.state != "stopped" or self._n_scored() >= stored._n_scored()

    def _n_scored(self) -> int:
        """Return the number of epochs with scores."""
        is_missing = np.isnan(first_metric(self.curve, axes=2)).any(1)
        return int((~is_missing).sum())

    def to_row(self) -> StoredRow:
        # One score per metric: their number gives the shape of the curve when it is read.
        others = [] if self.curve.ndim == 2 else self.metrics.mean(0)[1:]
        return (
            int(self.number),
            str(self.state),
            _pack([self.score, *others]),
            _pack(self.fold_scores),
            int(self.best_epoch),
            _pack([self.seconds]),
            _pack(self.curve),
            to_json(self.detail, name=f"detail of trial {self.number}"),
        )

    @classmethod
    def from_rows(
        cls, numbers: Sequence[int], states: Sequence[ResultState], *columns: Any
    ) -> list[Self]:
        scores, fold_scores, epochs, seconds, curves, details = columns
        means = _table(scores)  # (trials, metrics)
        folds = _table(fold_scores)  # (trials, F)
        (times,) = _table(seconds).T  # (trials,)
        are_times = (times >= 0) & (times < 1e15) | np.isnan(times)
        if min(epochs) < 0 or max(epochs) >= 2**31 or not are_times.all():
            raise ValueError("its best epoch or seconds are out of range or have a wrong type")
        n_metrics = means.shape[1]
        # (epochs, F); with several metrics (epochs, F, M)
        shape = (-1, folds.shape[1]) if n_metrics == 1 else (-1, folds.shape[1], n_metrics)
        tables = [np.frombuffer(curve, dtype=_FLOAT).reshape(shape) for curve in curves]
        return list(
            map(
                cls,
                numbers,
                states,
                means[:, 0].tolist(),
                map(tuple, folds.tolist()),
                epochs,
                times.tolist(),
                tables,
                map(read_detail, details),
            )
        )


@dataclass(frozen=True, eq=False)
class FoldReport:
    """Details of one trial on its folds: confusion matrix and column importance.

    Details that were not requested are empty.

    Attributes:
        trial: the number of the trial.
        confusion: (K, K) the number of rows of the true class (first axis) that are predicted as
            each class.
        columns: names of the columns of X, most important first.
        drops: (n,) mean decrease of the score when one column is shuffled among the rows of a fold.
        errors: (n,) standard deviation of these decreases over shuffles and folds.
    """

    trial: int
    confusion: IntArray
    columns: tuple[str, ...]
    drops: FloatArray
    errors: FloatArray


def _table(values: Sequence[bytes]) -> Curve:
    """Return an array of floats with one row per trial.

    Raises:
        ValueError: trials have different numbers of floats.
    """
    size, *others = {*map(len, values)}
    if size % 8:
        raise ValueError(f"{size} bytes are not float64 numbers")
    if others:
        raise ValueError("its rows have different lengths")
    return np.frombuffer(b"".join(values), dtype=_FLOAT).reshape(len(values), -1)


def outputs_to_row(number: int, outputs: Outputs) -> StoredRow:
    values = np.ascontiguousarray(outputs.values, dtype="<f4")
    return int(number), int(outputs.epoch), int(values.shape[1]), values.tobytes()


def outputs_from_row(number: int, epoch: int, width: int, values: bytes) -> tuple[int, Outputs]:
    """Return the trial number and the outputs that a row of the table ``outputs`` holds."""
    return number, Outputs(epoch, np.frombuffer(values, dtype="<f4").reshape(-1, width))


def ranked(scores: FloatArray, pruned: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Return the positions of trials, best first, (C,).

    Pruned trials follow the others. Trials without a finite score come last. Ties keep their order.
    """
    finite = np.isfinite(scores)
    return np.lexsort((np.where(finite, -scores, 0.0), pruned, ~finite))  # stable: ties keep order


def stack_curves(curves: Sequence[Curve | None]) -> Curve:
    """Return learning curves of different lengths as one array (C, epochs, F) or (C, epochs, F, M).

    The array is NaN beyond the end of a curve.

    Raises:
        InputError: the array would be huge.
    """
    known = [curve for curve in curves if curve is not None]
    shape = [0, 0]
    if known:
        shape = np.max([curve.shape for curve in known], axis=0).tolist()
    size = sum(curve.nbytes for curve in known)
    stacked_size = 8 * len(curves) * math.prod(shape)
    if stacked_size > max(_LARGE, _PADDING * size):
        raise InputError(
            None,
            f"The learning curves of {len(curves)} trials, {shape[0]} epochs and {shape[1]} folds "
            f"would take {size_words(stacked_size)} as one array, but they hold only "
            f"{size_words(size)}, because few trials trained that long",
            remedy="gputune cannot make a report or a plot of these curves.",
        )
    stacked = np.full((len(curves), *shape), np.nan)
    for target, curve in zip(stacked, curves):
        if curve is not None:
            target[: len(curve), : curve.shape[1]] = curve
    stacked.flags.writeable = False
    return stacked


class Lazy:
    """A field of a study that is computed at its first use.

    In an opened study, the field holds a function until then.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, study: object, owner: type | None = None) -> Any:
        if study is None:
            raise AttributeError(self.name)  # tells dataclass: no default
        value = vars(study)[self.name]
        if callable(value):
            value = vars(study)[self.name] = value()
        # With several metrics the study keeps all curves. The field shows the curves of the first
        # metric, which ranks.
        return value[..., 0] if self.name == "curves" and value.ndim == 4 else value

    def __set__(self, study: object, value: object) -> None:
        vars(study)[self.name] = value


def read_detail(text: str) -> Json:
    """Return the details of a trial's result, such as the reason of a failure.

    Raises:
        ValueError: the text is not the detail of a result.
    """
    facts: Json = {} if text == "{}" else from_json(text)
    if facts != {} and not has_form(facts, _DETAIL):
        raise ValueError("its detail has a wrong type")
    return facts


def read_rows(
    make: Callable[..., Iterable[StoredValue]], rows: Sequence[StoredRow]
) -> list[StoredValue]:
    """Return the values of table rows after a check. The last column of each row is its checksum.

    Raises:
        ValueError: a row is damaged.
    """
    *columns, stored = zip(*rows)
    if list(stored) != checksums(columns):
        raise ValueError("does not fit its checksum")
    try:
        return list(make(*columns))
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"cannot be read ({error})") from error


@lru_cache(maxsize=4096)
def _lead(kind: type, size: int) -> bytes:
    return f"{kind.__name__}:{size}:".encode()


def checksums(columns: Iterable[Sequence[str | bytes | int]]) -> list[str]:
    """Return 64 bits of SHA-256 of each row's values, as 16 hex digits.

    Each value is preceded by its type and length, so that different rows always give different
    bytes.
    """
    parts: list[Iterable[bytes]] = []
    for values in columns:
        raws = [value if isinstance(value, bytes) else str(value).encode() for value in values]
        parts += (map(_lead, map(type, values), map(len, raws)), raws)
    return [hashlib.sha256(b"".join(row)).hexdigest()[:16] for row in zip(*parts)]


def checksum(*values: str | bytes | int) -> str:
    """Return the checksum of one row of a table, see ``checksums``."""
    return checksums(zip(values))[0]


def _pack(values: Sequence[float] | Curve) -> bytes:
    return np.ascontiguousarray(values, dtype=_FLOAT).tobytes()
