"""Scale the features of a table by the statistics of each fold's training rows.

The function ``transform`` is the same for training and prediction.

Tables become NumPy arrays. A torch tensor (numbers only) stays on its device and gets the same
values.

In shapes, n counts rows, D features, D' network inputs, Q quantiles, R columns with a quantile
transform.

Robust scale: by median and quartiles, followed by a smooth clip that keeps outliers within +-3.
Source: Holzmueller et al. (2024), arXiv:2407.04491, section 3.

Quantile-normal transform: scikit-learn fits the quantiles, and gputune stores them as plain arrays.
``normal_scores`` applies them. ``normal_scores_of`` does the same with operations that both
torch.export and ONNX have.

Piecewise-linear encoding: a numeric column becomes one feature for each of its bins. The feature is
0 below the bin, 1 above it, and linear within it. Source: Gorishniy et al. (2022), On embeddings
for numerical features in tabular deep learning, arXiv:2203.05556, section 3.2. Bins lie between
quantiles, or between the thresholds of a decision tree on the target. As in the source, the first
bin is open below and the last one above. Departure: a leaf of the tree has at least a quarter of
the rows of equally filled bins.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from gputune.data.columns import N_BINS, Layout, Raw
from gputune.ground.errors import InputError, option
from gputune.ground.types import NUMBERS, TENSOR_NUMBERS, Json, Numbers

LIMIT = 20.0
"""The distance from the mean, in standard deviations, at which numbers are clipped.

If the farthest training row is farther from the mean, numbers are clipped at that distance instead.
"""
_ROUNDING = 1e-6
"""The relative tolerance on the distance from the mean to the farthest training row.

Without a tolerance, rounding in single precision could clip a training row.
"""

_LARGEST = np.finfo(np.float64).max  # stands for no limit, because JSON has no infinity
_ONE_BIN = np.array([[0.0], [1.0], [-_LARGEST], [_LARGEST]])
"""The bin of a numeric column that stays unchanged: lower edge, width, least and most, (4, 1)."""

Array = TypeVar("Array", np.ndarray, Tensor, Raw)


_no_places = partial(np.empty, 0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Statistics:
    """The means, scales and other values fitted on one fold's training rows, as float64 arrays.

    A missing value becomes ``fill`` (D,). Each input then becomes ``(x - center) / scale``.

    - ``center`` and ``scale`` are (D',), where D' is the number of inputs of the network.
    - ``places`` (D',) holds the index of each input's feature, if a feature becomes several inputs.
      Otherwise ``places`` is empty, and D' = D.
    - ``ranked`` (R,) holds the positions of the inputs with a quantile transform instead.
      ``quantiles`` (Q, R) are their quantiles at equally spaced probabilities from 0 to 1.
    - ``clipped`` holds the positions of the inputs that are clipped smoothly after scaling.
    - ``least`` and ``most`` (D',) are the limits of the inputs. Without limits they are (0,).
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
        """The number of values per row that a network receives. gputune builds the network for this
        number."""
        return len(self.center)

    def to_json(self) -> Json:
        lists = {name: array.tolist() for name, array in vars(self).items()}
        # Left out when unset, as in models that older versions saved.
        for name in ("places", "least", "most"):
            if not lists[name]:
                del lists[name]
        return lists

    @staticmethod
    def from_json(value: Json) -> "Statistics":
        arrays = {name: np.array(numbers, dtype=np.float64) for name, numbers in value.items()}
        for name in {"ranked", "clipped", "places"} & value.keys():
            arrays[name] = np.array(value[name], dtype=np.int64)
        # An empty list has lost its second axis.
        shape = (len(value["quantiles"]), len(value["ranked"]))
        arrays["quantiles"] = arrays["quantiles"].reshape(shape)
        return Statistics(**arrays)


@np.errstate(over="ignore", invalid="ignore")  # overflowing numbers are clipped anyway
def fit_statistics(
    raw: Raw,
    layout: Layout,
    rows: np.ndarray,
    *,
    numbers: Numbers = "standard",
    target: np.ndarray | None = None,
) -> Statistics:
    """Fit the statistics for scaling a table's features on the training rows ``rows`` only.

    The mean fills missing values. The mean is 0 if all values are missing. ``numbers`` selects the
    transform:

    - "standard": mean 0 and variance 1 over the known values. The scale is 1 if they are all equal.
      Other rows are clipped at ``LIMIT``, or at the farthest training row if that is farther,
      because a network's outputs would grow without bound.
    - "robust": by median and quartiles (half the range if the quartiles are equal), then clipped
      smoothly to +-3.
    - "quantile": normal scores, by at most 1000 quantiles of the known values.
    - "piecewise": features of bins between quantiles.
    - "piecewise-tree": features of bins between the thresholds of a decision tree.
    - "none": numbers stay unchanged.

    For "robust" and "quantile", a column that is constant in these rows is only centered. For both
    piecewise encodings, numbers are clipped at the same limit as for "standard".

    Source: scikit-learn's StandardScaler and QuantileTransformer (with ``subsample=None``).

    Args:
        raw: the features of all rows, (n, D).
        layout: the layout of the features.
        rows: the positions of the training rows.
        numbers: the preparation of numeric features.
        target: the target (n, ...) for "piecewise-tree". Only the training rows of the target are
            read.
    """
    check_numbers(numbers, raw)
    if isinstance(raw, Tensor):
        part = np.empty((0, 0))  # read only by transforms for tables
        mean, scale, farthest = tensor_moments(raw[torch.as_tensor(rows, device=raw.device)])
    else:
        part = raw[rows]
        # A column without a known value in these rows gets mean 0 and scale 1.
        part[:, np.isnan(part).all(0)] = 0.0
        mean, scale, farthest = _moments(part)
    # (D,): the distance from the mean at which each number is clipped
    reach = np.maximum(LIMIT * scale, farthest * (1 + _ROUNDING))
    reach = np.where(layout.numeric, np.minimum(reach, _LARGEST), np.inf)
    numeric = layout.numeric & (numbers != "none")
    center = np.where(numeric, mean, 0.0)
    scale = np.where(numeric, scale, 1.0)
    fitted = Statistics(mean, center, scale)
    match numbers:
        case "standard":
            most = np.where(numeric, reach / scale, _LARGEST)
            return replace(fitted, least=-most, most=most)
        case "quantile":
            varies = numeric & (np.nanmax(part, 0) > np.nanmin(part, 0))
            ranked = np.flatnonzero(varies)
            return replace(
                fitted,
                center=np.where(varies, 0.0, center),
                scale=np.where(varies, 1.0, scale),
                ranked=ranked,
                quantiles=fit_quantiles(part[:, ranked]),
            )
        case "robust":
            low, median, high = np.nanquantile(part, (0.25, 0.5, 0.75), axis=0)
            half = (np.nanmax(part, 0) - np.nanmin(part, 0)) / 2
            spread = np.where(high > low, high - low, half)
            # Departure: a column that is constant in these rows is only centered. The source makes
            # it 0 in all rows.
            return replace(
                fitted,
                center=np.where(numeric, median, 0.0),
                scale=np.where(numeric & (spread > 0), spread, 1.0),
                clipped=np.flatnonzero(numeric),
            )
        case "piecewise" | "piecewise-tree":
            train_target = None
            if numbers == "piecewise-tree" and target is not None:
                train_target = target[rows]
            bins = []
            for values, is_number in zip(part.T, numeric):
                bins.append(
                    bins_between(bin_edges(values, train_target)) if is_number else _ONE_BIN
                )
            # D arrays (4, bins) -> (4, D')
            center, scale, least, most = np.concatenate(bins, axis=1)
            places = layout.places(numbers)
            # The limits of the number, mean -+ reach, in the units of each bin.
            middle = mean[places] - center
            least = np.maximum(least, (middle - reach[places]) / scale)
            most = np.minimum(most, (middle + reach[places]) / scale)
            return replace(
                fitted, center=center, scale=scale, places=places, least=least, most=most
            )
    return fitted


def _moments(part: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each column's mean, scale and largest distance from the mean, each (D,).

    Missing values among ``part`` (n, D) are ignored.

    Mean and scale are computed by scikit-learn's StandardScaler.
    """
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(part)
    mean = scaler.mean_
    scale = scaler.scale_
    farthest = np.nanmax(np.abs(part - scaler.mean_), 0)
    if np.isfinite(scaler.var_).all():
        return mean, scale, farthest
    unit = np.where(np.isfinite(scaler.var_), 1.0, 2.0**600)  # units that keep squares finite
    mean, scale, farthest = _moments(part / unit)
    return mean * unit, scale * unit, farthest * unit


def tensor_moments(part: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each column's mean, scale and largest distance from the mean, each (D,), for a tensor.

    Missing values are ignored.

    Sums are in float64 on the tensor's device. The scale is 1 if the deviation is not larger than a
    rounding error. Source: scikit-learn's StandardScaler.
    """
    missing = part.isnan()
    count = (~missing).sum(0).clamp(min=1)
    mean = part.nansum(0, dtype=torch.float64) / count
    deviations = torch.where(missing, 0.0, part - mean.to(part.dtype))
    farthest = deviations.abs().amax(0)
    # units that keep squares finite
    unit = torch.where(farthest > torch.finfo(deviations.dtype).max ** 0.45, farthest, 1.0)
    # in place: ``deviations`` is as large as the data
    variance = deviations.div_(unit).square_().sum(0, dtype=torch.float64) / count
    eps = torch.finfo(torch.float64).eps
    # The same bound as scikit-learn's check for constant features.
    constant = variance <= count * eps * variance + (count * (mean / unit) * eps) ** 2
    scale = torch.where(constant, 1.0, variance.sqrt() * unit)
    return mean.cpu().numpy(), scale.cpu().numpy(), farthest.double().cpu().numpy()


def check_numbers(numbers: str, raw: Raw) -> None:
    """Raise InputError for an unknown value of ``numbers``, or one that tensors do not support.

    ``numbers`` names the scaling of numeric columns, such as "standard" or "quantile".
    """
    if numbers not in NUMBERS:
        raise InputError("numbers", f"must be one of {', '.join(map(repr, NUMBERS))}", got=numbers)
    if isinstance(raw, Tensor) and numbers not in TENSOR_NUMBERS:
        raise InputError(
            option("numbers", numbers),
            "does not support tensors",
            remedy=f"Pass a NumPy array, or use {option('numbers', 'standard')} and a space without "
            "other values of numbers.",
        )


@np.errstate(over="ignore")  # a number that overflows is clipped anyway
def transform(raw: Array, statistics: Statistics) -> Array:
    """Fill missing values and scale features (n, D). Return the inputs of a network, (n, D').

    The result has the type, device and dtype of ``raw``, and no NaN.
    """
    if isinstance(raw, Tensor):
        to_tensor = partial(torch.as_tensor, dtype=raw.dtype, device=raw.device)
        known = torch.where(raw.isnan(), to_tensor(statistics.fill), raw)
        scaled = (known - to_tensor(statistics.center)) / to_tensor(statistics.scale)
        if not statistics.least.size:
            return scaled
        return scaled.clamp_(to_tensor(statistics.least), to_tensor(statistics.most))
    x = np.where(np.isnan(raw), statistics.fill, raw)
    # (n, D) -> (n, D'): a feature with bins is repeated once per bin
    if statistics.places.size:
        x = x[:, statistics.places]
    # Before centering, since the quantiles are in the units of the column.
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
"""``smooth_clip`` first clips its input to this limit, because larger squares may overflow. At the
limit, the result already equals the bound of 3, up to rounding."""


def smooth_clip(x: Array) -> Array:
    """Limit values smoothly to +-3: x / sqrt(1 + (x / 3)^2), which is close to x near 0."""
    x = x.clip(-_FAR, _FAR)
    return x / (1 + (x / _BOUND) ** 2) ** 0.5


# scikit-learn's bound on probabilities, which keeps normal scores away from infinity.
_LEAST = 1e-7 - 2.0**-52


def fit_quantiles(part: np.ndarray) -> np.ndarray:
    """Return the quantiles (Q, R) of R columns, for scaling each column to a normal distribution.

    The Q probabilities are equally spaced from 0 to 1. NaN is ignored.
    """
    from sklearn.preprocessing import QuantileTransformer

    if part.shape[1] == 0:
        return np.empty((0, 0))
    fitted = QuantileTransformer(n_quantiles=min(1000, len(part)), subsample=None).fit(part)
    return np.asarray(fitted.quantiles_, dtype=np.float64)


def normal_scores(values: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
    """Map values to a standard normal distribution by their rank among the quantiles (Q,).

    The results lie within +-5.2.

    A value that equals several quantiles gets the middle of their ranks. Departure from
    scikit-learn: scikit-learn also moves values within an absolute 1e-7 of the outermost quantiles
    to these quantiles. That would break columns of tiny numbers.
    """
    from scipy.special import ndtri

    ranks = np.linspace(0.0, 1.0, len(quantiles))
    below = 1.0 - np.interp(-values, -quantiles[::-1], ranks)
    rank = (np.interp(values, quantiles, ranks) + below) / 2
    rank = np.where(values <= quantiles[0], 0.0, rank)
    rank = np.where(values >= quantiles[-1], 1.0, rank)
    largest = -ndtri(_LEAST)
    return np.asarray(np.clip(ndtri(rank), -largest, largest))


# Wichura's PPND16: numerator and denominator in the middle, and in the tails down to a probability
# of 1.4e-11. ``_LEAST`` keeps probabilities above that. Constant term first.
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
    """Map float64 values (n, R) to a standard normal distribution by their quantiles (Q, R).

    The results equal the results of ``normal_scores``, but torch.export and ONNX support all
    operations used here.
    """
    below = 1.0 - _interpolate(-values, -quantiles.flip(0))
    rank = (_interpolate(values, quantiles) + below) / 2
    rank = torch.where(values <= quantiles[0], 0.0, rank)
    return normal_deviate(torch.where(values >= quantiles[-1], 1.0, rank))


def normal_deviate(rank: Tensor) -> Tensor:
    """Return the standard normal quantiles of probabilities.

    Probabilities are first limited to 1e-7 from 0 and 1, which keeps the result finite.

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
    """Return a number as a float64 tensor, because ONNX would store a plain number in single
    precision."""
    return torch.tensor(number, dtype=torch.float64)


def _interpolate(values: Tensor, quantiles: Tensor) -> Tensor:
    """Return the ranks (n, R), from 0 to 1, of values among quantiles (Q, R).

    Between two quantiles the rank is interpolated linearly.

    Ranks of values beyond the outermost quantiles are undefined.
    """
    # A binary search finds the last quantile that is not above a value: ONNX has no searchsorted.
    last = len(quantiles) - 2
    at = torch.zeros_like(values, dtype=torch.int64)
    for bit in reversed(range(max(1, last).bit_length())):
        further = at + 2**bit
        fits = (further <= last) & (quantiles.gather(0, further.clamp(max=last)) <= values)
        at = torch.where(fits, further, at)
    low = quantiles.gather(0, at)
    high = quantiles.gather(0, at + 1)
    return (at.double() + (values - low) / (high - low)) / (len(quantiles) - 1)


def bin_edges(values: np.ndarray, target: np.ndarray | None = None) -> np.ndarray:
    """Return the ascending edges of the bins into which a feature's values (n,) are cut.

    NaN is ignored.

    Without a target, each bin holds equally many values. With a target (n, ...), the edges are the
    thresholds of a decision tree and the two ends. Equal edges are merged, so a feature with equal
    values may have fewer bins.
    """
    known = ~np.isnan(values)
    values = values[known]
    if target is None:
        return np.unique(np.quantile(values, np.linspace(0, 1, N_BINS + 1)))
    from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

    target = target[known]
    low = values.min()
    high = values.max()
    if target.ndim == 1 and target.dtype.kind in "iu":
        tree_type = DecisionTreeClassifier
    else:
        tree_type = DecisionTreeRegressor
        target = target - target.mean(0)
    # Trees compute in single precision, where values far from 0 may all be equal.
    unit = (values - low) / (high - low) if high > low else np.zeros(len(values))
    model = tree_type(
        max_leaf_nodes=N_BINS,
        min_samples_leaf=max(1, len(values) // (4 * N_BINS)),
        random_state=0,
    )
    tree = model.fit(unit[:, None], target.reshape(len(target), -1)).tree_
    inside = low + (high - low) * tree.threshold[tree.children_left >= 0]
    return np.unique(np.clip([low, *inside, high], low, high))


def bins_between(edges: np.ndarray) -> np.ndarray:
    """Return the lower edge, width, lower limit and upper limit of each bin, (4, N_BINS)."""
    bins = np.zeros((4, N_BINS))
    count = len(edges) - 1
    bins[1] = 1.0
    if count:
        bins[0, :count] = edges[:-1]
        bins[1, :count] = np.diff(edges)
        bins[3, :count] = 1.0
        # The first bin is open below, the last one above.
        bins[2, 0] = -_LARGEST
        bins[3, count - 1] = _LARGEST
    return bins
