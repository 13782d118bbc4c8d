"""RealMLP: a multilayer perceptron for tabular data, with embedded and scaled inputs.

Its initial weights are fitted to the data. Source: Holzmueller et al. (2024), Better by default,
arXiv:2407.04491. The defaults are the defaults of the authors' package.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from .layers import Dropout, check_size

ACTIVATIONS = {
    "selu": torch.selu,
    "mish": functional.mish,
    "relu": torch.relu,
    "silu": functional.silu,
}
EMBEDDINGS = ("pbld", "plr", "pl", "none")

_START_ROWS = 10_000  # rows at most that ``start_from`` uses


class NumberEmbedding(nn.Module):
    """An embedding that turns each numeric feature into ``size`` values.

    It computes periodic functions (waves) of the feature, then a separate linear layer for each
    feature.

    Shape: ``(B, D) -> (B, D * size)``.

    Args:
        n_numbers: number of features D.
        kind: "pbld": cosines with a phase, a linear layer, and the feature itself. "pl": cosines
            and sines, and a linear layer. "plr": "pl" followed by a relu.
        sigma: standard deviation of the initial frequencies.
        waves: number of waves per feature.
        size: number of outputs per feature.
    """

    def __init__(self, n_numbers: int, kind: str, *, sigma: float, waves: int, size: int) -> None:
        super().__init__()
        self.kind = kind
        drawn, out = (waves, size - 1) if kind == "pbld" else (waves // 2, size)
        self.frequency = nn.Parameter(sigma * torch.randn(n_numbers, drawn))
        self.phase = (
            nn.Parameter(math.pi * (2 * torch.rand(n_numbers, drawn) - 1))
            if kind == "pbld"
            else None
        )
        self.weight = nn.Parameter((2 * torch.rand(n_numbers, waves, out) - 1) / math.sqrt(waves))
        self.offset = nn.Parameter((2 * torch.rand(n_numbers, out) - 1) / math.sqrt(waves))

    def forward(self, x: Tensor) -> Tensor:
        """Return the embedding (B, D * size) of numeric features (B, D)."""
        angle = 2 * math.pi * x[..., None] * self.frequency  # (B, D, waves)
        h = (
            torch.cat([angle.cos(), angle.sin()], -1)
            if self.phase is None
            else (angle + self.phase).cos()
        )
        # (D, B, waves) @ (D, waves, out) -> (D, B, out), transposed back to (B, D, out)
        h = (h.transpose(0, 1) @ self.weight).transpose(0, 1) + self.offset
        h = torch.cat([h, x[..., None]], -1) if self.kind == "pbld" else h
        return (h.relu() if self.kind == "plr" else h).flatten(1)


class TangentLinear(nn.Module):
    """A linear layer in the neural tangent parametrization: ``x @ W.T / sqrt(n_in) + bias``.

    The initial W has variance 1.

    Args:
        n_in: number of inputs.
        n_out: number of outputs.
    """

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (B, n_out) for inputs (B, n_in)."""
        return functional.linear(x, self.weight) / math.sqrt(self.weight.shape[1]) + self.bias

    def start_from(self, x: Tensor) -> Tensor:
        """Fit the layer to rows (m, n_in), and return its outputs (m, n_out).

        The outputs get a variance of 1 (before the bias). The bias places the kink of each unit at
        a random mean of five rows.
        """
        h = functional.linear(x, self.weight) / math.sqrt(self.weight.shape[1])
        spread = h.std(0, correction=0)
        spread = torch.where(spread > 0, spread, 1.0)
        self.weight /= spread[:, None]
        h = h / spread
        # unnormalized weights of a uniform point on a simplex
        shares = torch.rand(5, h.shape[1], device=h.device).log()
        rows = torch.randint(len(h), (5, h.shape[1]), device=h.device)
        self.bias.copy_(-(h.gather(0, rows) * shares / shares.sum(0)).sum(0))
        return h + self.bias


class RealMLP(nn.Module):
    """A network for tabular data that returns logits (classes) or values (regression).

    In evaluation mode a regression clips its outputs to the range of the targets that
    ``start_from`` received.

    Shape: ``(B, D) -> (B, K)``.

    Source: Holzmueller et al. (2024), Better by default, arXiv:2407.04491.

    Args:
        n_features: number of inputs D.
        n_outputs: number of outputs K.
        feature_groups: for each feature, 0 if it is numeric, or the index (from 1) of its category
            if it is one level of a one-hot category. None: all features are numeric.
        width: units of every hidden layer, at least 1.
        depth: number of hidden layers, at least 1.
        activation: "selu", "mish", "relu", "silu" or "auto". "auto" is "mish" for one output and
            "selu" for more.
        parametric: whether every unit learns the strength of its activation.
        embedding: embedding of numeric features, "pbld", "plr", "pl" or "none". "pbld" uses cosines
            with a phase, a linear layer and the feature itself. "pl" uses cosines and sines and a
            linear layer. "plr" adds a relu to "pl".
        sigma: standard deviation of the initial frequencies of the embedding, above 0. Larger
            values let the first layer follow faster changes of a feature.
        waves: number of waves (cosines, or cosines and sines) per numeric feature, at least 2. Even
            for "pl" and "plr", which have as many cosines as sines.
        size: number of outputs per embedded numeric feature, at least 2.
        scaling: whether every input is multiplied by a learned factor.
        one_hot: largest number of levels of a category whose one-hot features stay as inputs, at
            least 0. Larger categories are embedded.
        category_size: size of the embedding vector of a category, at least 1.
        dropout: dropout rate after every activation, in [0, 1).

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import gputune, torch
        >>> groups = [0, 0, 1, 1, 1]  # two numbers and a category of three levels
        >>> model = gputune.models.RealMLP(5, 1, feature_groups=groups)
        >>> model(torch.zeros(2, 5)).shape
        torch.Size([2, 1])
    """

    low: Tensor
    high: Tensor
    numbers: Tensor
    plain: Tensor

    def __init__(
        self,
        n_features: int,
        n_outputs: int,
        *,
        feature_groups: Sequence[int] | None = None,
        width: int = 256,
        depth: int = 3,
        activation: str = "auto",
        parametric: bool = True,
        embedding: str = "pbld",
        sigma: float = 0.1,
        waves: int = 16,
        size: int = 4,
        scaling: bool = True,
        one_hot: int = 8,
        category_size: int = 8,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("width", width, 1),
            ("depth", depth, 1),
            ("waves", waves, 2),
            ("size", size, 2),
        ):
            check_size(name, value, least)
        if activation not in (*ACTIVATIONS, "auto"):
            raise ValueError(
                f"activation must be auto, {', '.join(ACTIVATIONS)}, got {activation!r}."
            )
        if embedding not in EMBEDDINGS:
            raise ValueError(
                f"embedding must be one of {', '.join(EMBEDDINGS)}, got {embedding!r}."
            )
        if embedding in ("pl", "plr") and waves % 2:
            raise ValueError(f"waves must be even for the embedding {embedding!r}, got {waves}.")
        word = ("mish" if n_outputs == 1 else "selu") if activation == "auto" else activation
        self.activation = ACTIVATIONS[word]
        self._split(list(feature_groups or [0] * n_features), one_hot)
        number = len(self.numbers)
        kept = len(self.plain)
        embedded = embedding != "none" and number > 0
        self.embedding = (
            NumberEmbedding(number, embedding, sigma=sigma, waves=waves, size=size)
            if embedded
            else None
        )
        self.categories = nn.ParameterList(
            torch.randn(len(own), category_size) for own in self.levels
        )
        inputs = number * (size if embedded else 1) + kept + len(self.levels) * category_size
        self.scale = nn.Parameter(torch.ones(inputs)) if scaling else None
        sizes = [inputs, *[width] * depth]
        names = ["first", *map(str, range(1, depth))]
        hidden = {name: TangentLinear(a, b) for name, a, b in zip(names, sizes[:-1], sizes[1:])}
        self.layers = nn.ModuleDict(hidden | {"last": TangentLinear(width, n_outputs)})
        self.slopes = (
            nn.ParameterList(torch.ones(width) for _ in range(depth)) if parametric else None
        )
        self.drop = Dropout(dropout)
        self.register_buffer("low", torch.full((n_outputs,), -math.inf))
        self.register_buffer("high", torch.full((n_outputs,), math.inf))

    def _split(self, groups: Sequence[int], one_hot: int) -> None:
        """Split the features into numeric features, unchanged features and large categories."""
        members = {
            group: [j for j, of in enumerate(groups) if of == group]
            for group in sorted({*groups} - {0})
        }
        self.levels = [own for own in members.values() if len(own) > one_hot]
        plain = sorted(j for own in members.values() if len(own) <= one_hot for j in own)
        # Buffers, because index lists would be copied to a GPU at every step.
        for name, places in (
            ("numbers", [j for j, group in enumerate(groups) if group == 0]),
            ("plain", plain),
            *((f"levels{i}", own) for i, own in enumerate(self.levels)),
        ):
            self.register_buffer(name, torch.tensor(places, dtype=torch.int64), persistent=False)

    def _features(self, x: Tensor) -> Tensor:
        """Return the inputs (B, D') of the first layer: embedded and plain features, categories."""
        numbers = x[:, self.numbers]
        parts = [numbers if self.embedding is None else self.embedding(numbers), x[:, self.plain]]
        # (B, levels) @ (levels, category_size) -> (B, category_size)
        parts += [
            x[:, self.get_buffer(f"levels{i}")] @ weight for i, weight in enumerate(self.categories)
        ]
        h = torch.cat(parts, 1)
        return h if self.scale is None else h * self.scale

    def _hidden(self) -> Iterator[tuple[nn.Module, Tensor | None]]:
        """Yield each hidden layer with the activation strengths of its units."""
        layers = list(self.layers.values())[:-1]
        return zip(layers, self.slopes if self.slopes is not None else [None] * len(layers))

    def _activated(self, h: Tensor, slope: Tensor | None) -> Tensor:
        """Apply the activation to hidden units h. With ``slope`` (width,), mix it with the identity
        in each unit."""
        active = self.activation(h)
        return active if slope is None else h + (active - h) * slope

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (B, K) for rows (B, D)."""
        h = self._features(x)
        for layer, slope in self._hidden():
            h = self.drop(self._activated(layer(h), slope))
        output: Tensor = self.layers["last"](h)
        return output if self.training else output.clamp(self.low, self.high)

    @torch.no_grad()
    def start_from(self, x: Tensor, y: Tensor) -> None:
        """Fit the initial weights to training rows x (n, D), and store the range of numeric targets
        y.

        A search calls this method once per fold, before training.
        """
        if y.is_floating_point():
            self.low.copy_(y.amin(0))
            self.high.copy_(y.amax(0))
        h = self._features(x[:: -(-len(x) // _START_ROWS)])
        for layer, slope in self._hidden():
            h = self._activated(layer.start_from(h), slope)
        self.layers["last"].start_from(h)
