"""The statistics of each fold, and one pure transform, used to predict too.

Tables become NumPy arrays. A torch tensor (numbers only) stays where it lies, with the same
numbers.

The robust scale is by median and quartiles, and ends in a smooth clip that keeps outliers within
+-3. Source: Holzmueller et al. (2024), arXiv:2407.04491, section 3. Of the quantile-normal
transform scikit-learn fits the quantiles, plain arrays are kept, and ``normal_scores`` applies it;
``normal_scores_of`` by operations that torch.export and ONNX both have.

Piecewise-linear encoding: a number becomes a feature for each of its bins, 0 below it, 1 above it,
linear within.
Source: Gorishniy et al. (2022), On embeddings for numerical features in tabular deep learning,
arXiv:2203.05556, section 3.2: bins between quantiles, or between the thresholds of a decision tree
on the target. The first bin is open below and the last one above, as there. Departure: a leaf of
the tree has at least a quarter of the rows of equal bins.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from gputune.data.columns import N_BINS, Layout, Raw
from gputune.errors import InputError
from gputune.types import NUMBERS, TENSOR_NUMBERS, Json, Numbers

LIMIT = 20.0
"""Standard deviations from the mean within which a number stays, or as far as the farthest training
row if farther."""
_ROUNDING = 1e-6
"""How much farther than it that may be, so that no training row is clipped by rounding in single
precision."""

Array = TypeVar("Array", np.ndarray, Tensor, Raw)


_no_places = partial(np.empty, 0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Statistics:
    """What is fitted on the training rows of one fold; float64 arrays.

    ``fill``, ``center``, ``scale`` are (D,): a missing value becomes ``fill``, then (x - center) /
    scale.
    ``ranked`` (R,) are the positions of the inputs with a quantile transform instead, ``quantiles``
    (Q, R) their quantiles at equally spaced probabilities from 0 to 1. ``clipped`` are those of the
    inputs that are clipped smoothly once they are scaled. Where a feature is several inputs,
    ``places`` (D',) says of which feature each is made, else it is (0,) and D' is D; ``center`` and
    ``scale`` are (D',). Inputs lie within ``least`` and ``most`` (D',), where there are such ends;
    else these are (0,).
    """

    fill: np.ndarray
    center: np.ndarray
    scale: np.ndarray
    ranked: np.ndarray = field(default_factory=_no_places)
    quantiles: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    clipped: np.ndarray = field(default_factory=_no_places)
    places: np.ndarray = field(default_factory=_no_places)
    least: np.ndarray = field(default_factory=lambda: np.empty(0))
    most: np.ndarray = field(default_factory=lambda: np.empty(0))

    @property
    def n_inputs(self) -> int:
        """Numbers that a row becomes, with which a module is built."""
        return len(self.center)

    def to_json(self) -> Json:
        of_bins = ("places", "least", "most")
        return {
            name: value.tolist()
            for name, value in vars(self).items()
            if name not in of_bins or value.size
        }

    @staticmethod
    def from_json(value: Json) -> "Statistics":
        arrays = {key: np.array(part, dtype=np.float64) for key, part in value.items()}
        for positions in {"ranked", "clipped", "places"} & value.keys():  # not all models have all
            arrays[positions] = np.array(value[positions], dtype=np.int64)
        arrays["quantiles"] = arrays["quantiles"].reshape(
            len(value["quantiles"]), len(value["ranked"])
        )
        return Statistics(**arrays)


@np.errstate(over="ignore", invalid="ignore")  # numbers near the largest: what overflows is clipped
def fit_statistics(
    raw: Raw,
    layout: Layout,
    rows: np.ndarray,
    *,
    numbers: Numbers = "standard",
    target: np.ndarray | None = None,
) -> Statistics:
    """Fit on the given rows only: the mean (for missing values; 0 where there is none), and what
    ``numbers`` asks for.

    "standard": mean 0 and variance 1 over the known values (scale 1 where they are all equal);
    other rows are clipped at ``LIMIT``, or at the farthest of these if farther, since a network's
    outputs run away. "robust": by median and quartiles (half the range where these are equal), then
    clipped smoothly to +-3. "quantile": normal scores, by at most 1000 quantiles of the known
    values; of both, a column that is constant in these rows is only centred. "piecewise": features
    of bins between quantiles; "piecewise-tree": of those that a decision tree makes for the
    ``target`` (n, ...), of which the given rows alone are read; of both, of numbers within the same
    limit. "none": numbers stay as they are. Source: scikit-learn's StandardScaler and
    QuantileTransformer (with ``subsample=None``).
    """
    check_numbers(numbers, raw)
    if isinstance(raw, Tensor):
        part = np.empty((0, 0))  # what needs it is for tables
        mean, scale, farthest = tensor_moments(raw[torch.as_tensor(rows, device=raw.device)])
    else:
        part = raw[rows]
        # a column with no known value in these rows has mean 0 and scale 1
        part[:, np.isnan(part).all(0)] = 0.0
        mean, scale, farthest = _moments(part)
    numeric = layout.numeric
    reach = np.where(
        numeric, np.minimum(np.maximum(LIMIT * scale, farthest * (1 + _ROUNDING)), OPEN[3]), np.inf
    )
    numeric = numeric & (numbers != "none")
    center = np.where(numeric, mean, 0.0)
    scale = np.where(numeric, scale, 1.0)
    fitted = Statistics(mean, center, scale)
    match numbers:
        case "standard":
            least, most = np.where(numeric, [[-1], [1]] * reach / scale, OPEN[2:])
            return replace(fitted, least=least, most=most)
        case "quantile":
            varies = numeric & (np.nanmax(part, 0) > np.nanmin(part, 0))
            center = np.where(varies, 0.0, center)
            scale = np.where(varies, 1.0, scale)
            ranked = np.flatnonzero(varies)
            return replace(
                fitted,
                center=center,
                scale=scale,
                ranked=ranked,
                quantiles=fit_quantiles(part[:, ranked]),
            )
        case "robust":
            low, median, high = np.nanquantile(part, (0.25, 0.5, 0.75), axis=0)
            half = (np.nanmax(part, 0) - np.nanmin(part, 0)) / 2
            spread = np.where(high > low, high - low, half)
            # Departure: a column that is constant in these rows is only centred; the source makes
            # it 0 in all rows.
            center = np.where(numeric, median, 0.0)
            scale = np.where(numeric & (spread > 0), spread, 1.0)
            return replace(fitted, center=center, scale=scale, clipped=np.flatnonzero(numeric))
        case "piecewise" | "piecewise-tree":
            of_rows = target[rows] if numbers == "piecewise-tree" and target is not None else None
            bins = [
                bins_between(bin_edges(x, of_rows)) if cut else OPEN
                for x, cut in zip(part.T, numeric)
            ]
            center, scale, least, most = np.concatenate(bins, axis=1)
            places = layout.places(numbers)
            low, high = (mean[places] - center + [[-1], [1]] * reach[places]) / scale
            least = np.maximum(least, low)
            most = np.minimum(most, high)
            return replace(
                fitted, center=center, scale=scale, places=places, least=least, most=most
            )
    return fitted


def _moments(part: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean, scale and how far the known values (n, D) go from the mean, (D,); as
    ``StandardScaler``."""
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(part)
    mean = scaler.mean_
    scale = scaler.scale_
    farthest = np.nanmax(np.abs(part - scaler.mean_), 0)
    if np.isfinite(scaler.var_).all():
        return mean, scale, farthest
    unit = np.where(np.isfinite(scaler.var_), 1.0, 2.0**600)  # in which no square overflows
    mean, scale, farthest = _moments(part / unit)
    return mean * unit, scale * unit, farthest * unit


def tensor_moments(part: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean, scale and reach of the known values, (D,), summed in float64 on the tensor's
    device.

    The scale is 1 where the deviation is no more than a rounding error. Source: scikit-learn's
    StandardScaler.
    """
    lost = part.isnan()
    count = (~lost).sum(0).clamp(min=1)
    mean = part.nansum(0, dtype=torch.float64) / count
    gap = torch.where(lost, 0.0, part - mean.to(part.dtype))
    farthest = gap.abs().amax(0)
    # in which no square overflows
    unit = torch.where(farthest > torch.finfo(gap.dtype).max ** 0.45, farthest, 1.0)
    variance = gap.div_(unit).square_().sum(0, dtype=torch.float64) / count
    eps = torch.finfo(torch.float64).eps
    constant = variance <= count * eps * variance + (count * (mean / unit) * eps) ** 2
    scale = torch.where(constant, 1.0, variance.sqrt() * unit)
    return mean.cpu().numpy(), scale.cpu().numpy(), farthest.double().cpu().numpy()


def check_numbers(numbers: str, raw: Raw) -> None:
    """Raise InputError for a way to prepare numbers that there is not, or not for tensors."""
    if numbers not in NUMBERS:
        raise InputError(
            f"numbers must be one of {', '.join(map(repr, NUMBERS))}, got {numbers!r}."
        )
    if isinstance(raw, Tensor) and numbers not in TENSOR_NUMBERS:
        raise InputError(
            f"numbers={numbers!r} is not there for tensors; pass a NumPy array or "
            "numbers='standard'."
        )


@np.errstate(over="ignore")  # of a number so far away that it is clipped
def transform(raw: Array, statistics: Statistics) -> Array:
    """Return the inputs of a network, (n, D'), without NaN; type, device and dtype of ``raw``."""
    if isinstance(raw, Tensor):
        parts = (getattr(statistics, name) for name in ("fill", "center", "scale", "least", "most"))
        fill, center, scale, least, most = (
            torch.as_tensor(part, dtype=raw.dtype, device=raw.device) for part in parts
        )
        scaled = (torch.where(raw.isnan(), fill, raw) - center) / scale
        return scaled.clamp_(least, most) if least.numel() else scaled
    x = np.where(np.isnan(raw), statistics.fill, raw)
    x = x[:, statistics.places] if statistics.places.size else x
    normal = [normal_scores(x[:, j], q) for j, q in zip(statistics.ranked, statistics.quantiles.T)]
    x -= statistics.center
    x /= statistics.scale
    if statistics.least.size:
        np.clip(x, statistics.least, statistics.most, out=x)
    for j, scores in zip(statistics.ranked, normal):
        x[:, j] = scores
    x[:, statistics.clipped] = smooth_clip(x[:, statistics.clipped])
    return x


_BOUND = 3.0
_FAR = 1e15
"""Where the smooth clip is its bound up to rounding; the square of what lies beyond may
overflow."""


def smooth_clip(x: Array) -> Array:
    """Return x / sqrt(1 + (x / 3)^2), which is x near 0 and lies within +-3."""
    x = x.clip(-_FAR, _FAR)
    return x / (1 + (x / _BOUND) ** 2) ** 0.5


# scikit-learn's bound on probabilities, which keeps normal scores away from infinity.
_LEAST = 1e-7 - 2.0**-52


def fit_quantiles(part: np.ndarray) -> np.ndarray:
    """Return (Q, R) quantiles of R columns, NaN left out, at Q equally spaced probabilities from 0
    to 1."""
    from sklearn.preprocessing import QuantileTransformer

    if part.shape[1] == 0:
        return np.empty((0, 0))
    fitted = QuantileTransformer(n_quantiles=min(1000, len(part)), subsample=None).fit(part)
    return np.asarray(fitted.quantiles_, dtype=np.float64)


def normal_scores(values: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
    """Return the normal deviate at each value's rank among the quantiles (Q,), within +-5.2.

    A value that fills several quantiles gets the middle of their ranks. Departure from
    scikit-learn: it also moves what lies within an absolute 1e-7 of the outermost quantiles to
    them, which would break columns of tiny numbers.
    """
    from scipy.special import ndtri

    ranks = np.linspace(0.0, 1.0, len(quantiles))
    below = 1.0 - np.interp(-values, -quantiles[::-1], ranks)
    rank = (np.interp(values, quantiles, ranks) + below) / 2
    rank = np.where(values >= quantiles[-1], 1.0, np.where(values <= quantiles[0], 0.0, rank))
    largest = -ndtri(_LEAST)
    return np.asarray(np.clip(ndtri(rank), -largest, largest))


# Wichura's PPND16: numerator and denominator in the middle, and in the tails up to a probability of
# 1.4e-11, which the bound below keeps away. Constant term first.
_MIDDLE_ABOVE = (
    3.3871328727963666080e0,
    1.3314166789178437745e2,
    1.9715909503065514427e3,
    1.3731693765509461125e4,
    4.5921953931549871457e4,
    6.7265770927008700853e4,
    3.3430575583588128105e4,
    2.5090809287301226727e3,
)
_MIDDLE_BELOW = (
    1.0,
    4.2313330701600911252e1,
    6.8718700749205790830e2,
    5.3941960214247511077e3,
    2.1213794301586595867e4,
    3.9307895800092710610e4,
    2.8729085735721942674e4,
    5.2264952788528545610e3,
)
_TAIL_ABOVE = (
    1.42343711074968357734e0,
    4.63033784615654529590e0,
    5.76949722146069140550e0,
    3.64784832476320460504e0,
    1.27045825245236838258e0,
    2.41780725177450611770e-1,
    2.27238449892691845833e-2,
    7.74545014278341407640e-4,
)
_TAIL_BELOW = (
    1.0,
    2.05319162663775882187e0,
    1.67638483018380384940e0,
    6.89767334985100004550e-1,
    1.48103976427480074590e-1,
    1.51986665636164571966e-2,
    5.47593808499534494600e-4,
    1.05075007164441684324e-9,
)


def normal_scores_of(values: Tensor, quantiles: Tensor) -> Tensor:
    """Return (n, R) normal scores of float64 values (n, R) by their quantiles (Q, R): those of
    ``normal_scores``."""
    rank = (_interpolate(values, quantiles) + (1.0 - _interpolate(-values, -quantiles.flip(0)))) / 2
    rank = torch.where(values <= quantiles[0], 0.0, rank)
    return normal_deviate(torch.where(values >= quantiles[-1], 1.0, rank))


def normal_deviate(rank: Tensor) -> Tensor:
    """Return the standard normal deviate of probabilities, which are kept 1e-7 away from 0 and 1.

    Source: Wichura (1988), algorithm AS 241, doi:10.2307/2347330; relative error about 1e-16.
    """
    p = torch.minimum(torch.maximum(rank, _double(_LEAST)), _double(1.0 - _LEAST))
    q = p - 0.5
    r = _double(0.180625) - q * q
    middle = q * _polynomial(r, _MIDDLE_ABOVE) / _polynomial(r, _MIDDLE_BELOW)
    r = (-torch.minimum(p, 1.0 - p).log()).sqrt() - _double(1.6)
    tail = _polynomial(r, _TAIL_ABOVE) / _polynomial(r, _TAIL_BELOW)
    return torch.where(q.abs() <= _double(0.425), middle, torch.where(q < 0, -tail, tail))


def _polynomial(r: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = _double(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * r + _double(coefficient)
    return value


def _double(number: float) -> Tensor:
    """Return a number as a tensor: ONNX would be given a plain one in single precision."""
    return torch.tensor(number, dtype=torch.float64)


def _interpolate(values: Tensor, quantiles: Tensor) -> Tensor:
    """Return (n, R) ranks between 0 and 1, linear between quantiles; anything beyond the outermost
    ones."""
    # the last one not above a value is found by binary search: ONNX has no searchsorted
    last = len(quantiles) - 2
    at = torch.zeros_like(values, dtype=torch.int64)
    for bit in reversed(range(max(1, last).bit_length())):
        further = at + 2**bit
        fits = (further <= last) & (quantiles.gather(0, further.clamp(max=last)) <= values)
        at = torch.where(fits, further, at)
    low = quantiles.gather(0, at)
    high = quantiles.gather(0, at + 1)
    return (at.double() + (values - low) / (high - low)) / (len(quantiles) - 1)


OPEN = np.array([[0.0], [1.0], [-np.finfo(np.float64).max], [np.finfo(np.float64).max]])
"""The one bin of a number that stays as it is."""


def bin_edges(values: np.ndarray, target: np.ndarray | None = None) -> np.ndarray:
    """Return the edges of bins of a feature's values (n,), NaN left out, ascending; fewer where
    values are equal.

    They hold equally many of the values; with a target (n, ...) they are the thresholds of a tree,
    and the ends.
    """
    known = ~np.isnan(values)
    values = values[known]
    if target is None:
        return np.unique(np.quantile(values, np.linspace(0, 1, N_BINS + 1)))
    from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

    target = target[known]
    low = values.min()
    high = values.max()
    is_of_classes = target.ndim == 1 and target.dtype.kind in "iu"
    kind = DecisionTreeClassifier if is_of_classes else DecisionTreeRegressor
    y = (target if is_of_classes else target - target.mean(0)).reshape(len(target), -1)
    least = max(1, len(values) // (4 * N_BINS))
    # Trees compute in single precision, in which values far from 0 may all be equal.
    unit = (values - low) / (high - low) if high > low else np.zeros(len(values))
    fitted = kind(max_leaf_nodes=N_BINS, min_samples_leaf=least, random_state=0)
    tree = fitted.fit(unit[:, None], y).tree_
    inside = low + (high - low) * tree.threshold[tree.children_left >= 0]
    return np.unique(np.clip([low, *inside, high], low, high))


def bins_between(edges: np.ndarray) -> np.ndarray:
    """Return (4, N_BINS): of each bin its lower edge, its width, and the least and the most that
    its feature is."""
    bins = np.zeros((4, N_BINS))
    count = len(edges) - 1
    bins[1] = 1.0
    if count:
        bins[0, :count] = edges[:-1]
        bins[1, :count] = np.diff(edges)
        bins[3, :count] = 1.0
        bins[2, 0], bins[3, count - 1] = OPEN[2:, 0]
    return bins
