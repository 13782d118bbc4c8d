"""The hyperparameters of a study for plots: their values, their axes and their importance.

Importance: a random forest learns to predict the ranks of the trials from their hyperparameters.
gputune then shuffles the values of one hyperparameter. The fall of the forest's R2 is the
importance of this hyperparameter. C counts trials.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gputune.ground.annotations import FloatArray, IntArray
from gputune.ground.errors import InputError, Verbatim
from gputune.ground.text import clean, count, short
from gputune.study.study import Study
from gputune.views.scores import Scale, Scores, axis_scale, number_text, score_view

# Positive values have a logarithmic axis if the largest is at least this many times the smallest.
_DECADES = 100.0
_FARTHEST = 1e300  # limit of an axis, so that its length is a finite number
_LEVELS = 12  # words of a hyperparameter that are shown; rarer words share one level
_TICKS = 6  # numbers that each have a tick
_APART = 0.08  # smallest distance of two ticks, as a share of the axis


@dataclass(frozen=True, eq=False)
class Parameter:
    """The values of one hyperparameter in all trials, and whether its axis is categorical or
    logarithmic."""

    name: str
    label: str  # its name, with a remark if lists were replaced by their median
    # (C,) numbers, or positions in ``levels``; NaN for a trial without it
    values: FloatArray
    levels: tuple[str, ...] = ()  # the words; () for numbers
    log: bool = False  # whether its axis is logarithmic
    hidden: int = 0  # trials with an infinite value

    @property
    def distinct(self) -> FloatArray:
        """The distinct finite values of the hyperparameter, in ascending order."""
        return np.unique(self.values[np.isfinite(self.values)])


def parameters(study: Study) -> tuple[Parameter, ...]:
    """Return all hyperparameters of a study, in the order in which they first occur in the
    trials."""
    names = dict.fromkeys(name for trial in study.trials for name in trial.params)
    return tuple(_parameter(name, study) for name in names)


def varied_parameters(study: Study) -> tuple[Parameter, ...]:
    """Return the hyperparameters that have at least two different values among the trials."""
    return tuple(parameter for parameter in parameters(study) if len(parameter.distinct) > 1)


def _parameter(name: str, study: Study) -> Parameter:
    """Return one hyperparameter with its values in all trials, as numbers or as categories."""
    values: list[Any] = [trial.params.get(name) for trial in study.trials]
    present = [value for value in values if value is not None]
    # A fast path, because most values are plain numbers and checking lists is slow.
    has_plain_types = {int, float}.issuperset(map(type, present))
    is_plain = has_plain_types and all(abs(value) < _FARTHEST for value in present)
    are_numbers = is_plain or all(map(_is_numbers, present))
    if not present or not are_numbers:
        texts: list[str | None] = []
        for trial in study.trials:
            texts.append(short(trial.params[name]) if name in trial.params else None)
        return _words(name, texts)
    label = clean(name)
    if not is_plain:
        if any(isinstance(value, list) for value in present):
            label = f"{label} (median of its values)"
        values = [None if value is None else median(_flat(value)) for value in values]
    numbers = np.array(values, dtype=np.float64)  # NaN for None
    infinite = np.abs(numbers) > _FARTHEST
    numbers[infinite] = np.nan
    log = is_log(name, numbers, study.record.space)
    hidden = int(infinite.sum())
    return Parameter(name, label, numbers, log=log, hidden=hidden)


def is_log(name: str, values: FloatArray, space: str) -> bool:
    """Return True if the axis of a hyperparameter should be logarithmic.

    The axis is logarithmic if the search space samples the logarithm. It is also logarithmic for
    listed values that span decades or have a constant ratio, such as 16, 32, 64.
    """
    levels = np.unique(values[np.isfinite(values)])
    if levels.size < 2 or levels[0] <= 0:
        return False
    distribution = re.search(rf"(?:^|[, |]){re.escape(name)}=(\w+)\(", space)
    if distribution is not None:
        return distribution[1] in ("loguniform", "reciprocal", "log_int")
    if levels[-1] >= _DECADES * levels[0]:
        return True
    ratios = levels[1:] / levels[:-1]
    are_equal = np.allclose(ratios, ratios[0], rtol=1e-6)
    return 3 <= levels.size <= _LEVELS and are_equal


def _words(name: str, texts: Sequence[str | None]) -> Parameter:
    """Return a hyperparameter whose values are categories (texts), with the most frequent category
    first."""
    counts = Counter(text for text in texts if text is not None)
    levels = sorted(counts, key=lambda text: (-counts[text], text))
    if len(levels) > _LEVELS:
        levels = [*levels[: _LEVELS - 1], f"{len(levels) - _LEVELS + 1} others"]
    positions: dict[str | None, float] = {text: place for place, text in enumerate(levels)}
    positions[None] = np.nan
    others = len(levels) - 1
    values = np.array([positions.get(text, others) for text in texts], dtype=float)
    return Parameter(name, clean(name), values, levels=tuple(levels))


def _is_numbers(value: object) -> bool:
    """Return True if a value is a number, or a list of numbers for training segments or layers."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_numbers, value))
    if isinstance(value, bool):
        return False
    # Some integers are too large for a float.
    is_whole = isinstance(value, int) and abs(value) < _FARTHEST
    return is_whole or isinstance(value, float)


def _flat(value: Any) -> list[float]:
    """Return the numbers of a nested list, such as values per layer, as one flat list."""
    if not isinstance(value, list):
        return [float(value)]
    return [number for part in value for number in _flat(part)]


def parameter_scale(parameter: Parameter, *, pad: float = 0.0) -> Scale:
    """Return the axis scale of a hyperparameter, with a tick for each category or distinct number.

    If there are too many numbers, matplotlib chooses round numbers as ticks. At least one trial must
    have the hyperparameter.
    """
    if parameter.levels:
        edge = 0.5 if pad else 0.0
        last = max(len(parameter.levels) - 1, 0 if pad else 1)
        return Scale(-edge, last + edge, ticks=tuple(enumerate(parameter.levels)))
    values = parameter.distinct
    scale = axis_scale(float(values[0]), float(values[-1]), log=parameter.log, pad=pad)
    if len(values) > _TICKS or (np.diff(scale(values)) < _APART).any():
        return scale
    return replace(scale, ticks=tuple((value, number_text(value)) for value in values.tolist()))


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of a parallel-coordinates plot: a hyperparameter or the score.

    Attributes:
        column: key of the column in the table of trials.
        label: name of the axis.
        scale: scale of its values.
        heights: (C,) position of each trial on the axis, in [0, 1].
    """

    column: str
    label: str
    scale: Scale
    heights: FloatArray


def parallel_axes(view: Scores) -> list[Axis]:
    """Return the axes of a parallel-coordinates plot: the hyperparameters that varied, then the
    score."""
    axes = []
    for parameter in varied_parameters(view.study):
        scale = parameter_scale(parameter)
        heights = np.clip(scale(parameter.values), 0, 1)
        axes.append(Axis(f"params_{parameter.name}", parameter.label, scale, heights))
    scale = view.scale(pad=0.0)
    heights = np.clip(scale(view.values), 0, 1)
    axes.append(Axis("score", view.measure.name, scale, heights))
    return axes


@dataclass(frozen=True, eq=False)
class DescentPath:
    """The path from one starting point in a hypergradient search: scores and values by outer
    step."""

    start: int
    steps: IntArray  # (n,) outer steps, 0 for the starting point
    scores: FloatArray  # (n,) scores in the sign of their name
    values: dict[str, FloatArray]  # hyperparameter -> (n,) values
    usable: NDArray[np.bool_]  # (n,) False if the guard rejected the slope as noise


def descended(study: Study) -> tuple[Parameter, ...]:
    """Return the hyperparameters that a hypergradient search changed, or () for any other
    search."""
    numbers = {parameter.name: parameter for parameter in parameters(study) if not parameter.levels}
    moved = study.record.changed_hyperparameters
    return tuple(numbers[name] for name in moved if name in numbers)


def descent_paths(study: Study) -> tuple[DescentPath, ...]:
    """Return the paths from all starting points of a hypergradient search, best score first.

    The result is () for any other search.
    """
    columns = descended(study)
    scores = score_view(study).values
    points: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for row in study.order if columns else ():
        trial = study.trials[row]
        if isinstance(trial.origin, tuple) and trial.state != "waiting":
            start, step = trial.origin
            points[start].append((step, row))
    paths = []
    for start, steps_and_rows in points.items():
        steps, rows = np.array(sorted(steps_and_rows)).T
        values = {column.name: column.values[rows] for column in columns}
        details = [study.trials[row].detail for row in rows]
        usable = np.array([bool(detail.get("usable", True)) for detail in details])
        paths.append(DescentPath(start, steps, scores[rows], values, usable))
    return tuple(paths)


# Fewest and most trials for a forest. If there are more, a random sample is used.
FEWEST = 10
MOST = 2000

_TREES = 32
_SHUFFLES = 5


@dataclass(frozen=True, eq=False)
class Importance:
    """The importance of each hyperparameter, measured by a random forest on trials not used to fit
    it."""

    names: tuple[str, ...]  # most important first
    labels: tuple[str, ...]
    # (n,) fall of R2 when a hyperparameter is shuffled: from 0 (not important) up to 2 (the only
    # important one).
    drops: FloatArray
    # (n,) standard deviation of the fall over the shuffles and the two halves
    errors: FloatArray
    fit: float  # R2 of the forest; near or below 0 the falls mean nothing
    trials: int  # number of trials that it learned from


def importance(study: Study, *, seed: int = 0) -> Importance:
    """Return the permutation importance of the hyperparameters that varied (Breiman 2001).

    The function uses the rank of the score of every finished trial. A diverged trial has the lowest
    rank. A forest that was fitted on one half of the trials predicts the other half.

    Args:
        study: the study.
        seed: seed of the forests, the shuffles and the sample of trials.

    Raises:
        InputError: fewer than ten trials are finished, or no hyperparameter varied.
    """
    columns = varied_parameters(study)
    done = np.flatnonzero([trial.state != "waiting" for trial in study.trials])
    if len(done) < FEWEST or not columns:
        rule = f"needs {FEWEST} finished trials and a hyperparameter that varies"
        got = f"{count(len(done), 'trial')} and {count(len(columns), 'hyperparameter')}"
        remedy = "Search further."
        has_copies = any(trial.detail.get("copies") for trial in study.trials)
        if not columns and (len(done) >= FEWEST or has_copies):
            got = f"{count(len(done), 'trial')} with equal hyperparameters"
            remedy = "Search a space with several values."
            if has_copies:
                remedy = "Population based training has copied one trial to all other trials."
        raise InputError("importance", rule, got=Verbatim(got), remedy=remedy)
    from scipy.stats import rankdata
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    drawn = np.random.default_rng(seed).permutation(len(done))[:MOST]
    scores = np.array([study.trials[row].score for row in done])
    scores[~np.isfinite(scores)] = -np.inf
    # Ranks in [0, 1]. The best trial has 1, and equal scores have equal ranks.
    ranks = (rankdata(scores) - 1) / (len(scores) - 1)
    table = np.stack([column.values for column in columns], axis=1)
    # A missing value is placed below all others, so that a tree can separate it.
    below = np.nanmin(table, axis=0) - 1.0
    table = np.where(np.isnan(table), below, table)
    first, second = np.array_split(drawn, 2)
    fits = []
    drops = []
    for train, test in ((first, second), (second, first)):
        forest = RandomForestRegressor(
            _TREES,
            min_samples_leaf=2,
            max_features=0.5,
            random_state=seed,
        )
        forest.fit(table[done[train]], ranks[train])
        held_out = (table[done[test]], ranks[test])
        fits.append(forest.score(*held_out))
        falls = permutation_importance(
            forest,
            *held_out,
            n_repeats=_SHUFFLES,
            random_state=seed,
            scoring="r2",
        )
        drops.append(falls.importances)
    # (hyperparameters, 2 * _SHUFFLES)
    falls = np.concatenate(drops, axis=1)
    order = np.argsort(-falls.mean(1), kind="stable")
    return Importance(
        names=tuple(columns[i].name for i in order),
        labels=tuple(columns[i].label for i in order),
        drops=falls.mean(1)[order],
        errors=falls.std(1)[order],
        fit=float(np.mean(fits)),
        trials=len(drawn),
    )
