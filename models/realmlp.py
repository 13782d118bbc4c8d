"""RealMLP: a multilayer perceptron for tables with embedded numbers, scaled inputs and a start that
the data give.

Source: Holzmueller et al. (2024), Better by default, arXiv:2407.04491; defaults as its authors'
    package has them.
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

_START_ROWS = 10_000  # that a start looks at


class NumberEmbedding(nn.Module):
    """Each number as ``size`` of them: waves of it, then a linear layer of its own. (B, D) -> (B, D
    * size).

    "pbld": cosines with a phase, a linear layer, and the number itself; "pl": cosines and sines and
    a linear layer; "plr": that with a relu. ``sigma`` is the standard deviation of the frequencies,
    of which there are ``waves``.
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
        angle = 2 * math.pi * x[..., None] * self.frequency  # (B, D, waves)
        h = (
            torch.cat([angle.cos(), angle.sin()], -1)
            if self.phase is None
            else (angle + self.phase).cos()
        )
        h = (h.transpose(0, 1) @ self.weight).transpose(0, 1) + self.offset
        h = torch.cat([h, x[..., None]], -1) if self.kind == "pbld" else h
        return (h.relu() if self.kind == "plr" else h).flatten(1)


class TangentLinear(nn.Module):
    """A linear layer in the neural tangent parametrisation: x W^T / sqrt(inputs) + bias, W of
    variance 1."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight) / math.sqrt(self.weight.shape[1]) + self.bias

    def start_from(self, x: Tensor) -> Tensor:
        """Give the outputs on rows a variance of 1, and each unit its kink among the rows; return
        the outputs.

        The kink lies at a random mean of five rows.
        """
        h = functional.linear(x, self.weight) / math.sqrt(self.weight.shape[1])
        spread = h.std(0, correction=0)
        spread = torch.where(spread > 0, spread, 1.0)
        self.weight /= spread[:, None]
        h = h / spread
        shares = torch.rand(5, h.shape[1], device=h.device).log()  # of a uniform point of a simplex
        rows = torch.randint(len(h), (5, h.shape[1]), device=h.device)
        self.bias.copy_(-(h.gather(0, rows) * shares / shares.sum(0)).sum(0))
        return h + self.bias


class RealMLP(nn.Module):
    """A network for tables that returns logits (classes) or values (regression).

    ``depth`` hidden layers of ``width`` units with ``activation``, "auto": "mish" for one output,
    "selu" for more; with
    ``parametric`` every unit learns how much of it. ``embedding`` is that of numbers ("pbld",
    "plr", "pl", "none"; see
    ``NumberEmbedding``), with ``scaling`` every input is multiplied by a number that is learned.

    ``feature_groups`` says of each feature 0 where it is a number, else (from 1) of which category
    it is a level: one of more than ``one_hot`` levels is embedded as ``category_size`` numbers.
    None: all are numbers.

    Shape: ``(B, D) -> (B, K)``. In evaluation mode, and for numbers, outputs lie within the targets
    that ``start_from`` was given. Raises ValueError for an argument out of range.
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
        """Say which features are numbers, which stay as they are, and which are the levels of a
        large category."""
        members = {
            group: [j for j, of in enumerate(groups) if of == group]
            for group in sorted({*groups} - {0})
        }
        self.levels = [own for own in members.values() if len(own) > one_hot]
        plain = sorted(j for own in members.values() if len(own) <= one_hot for j in own)
        # Buffers: places that are lists would be sent to a GPU at every step.
        for name, places in (
            ("numbers", [j for j, group in enumerate(groups) if group == 0]),
            ("plain", plain),
            *((f"levels{i}", own) for i, own in enumerate(self.levels)),
        ):
            self.register_buffer(name, torch.tensor(places, dtype=torch.int64), persistent=False)

    def _features(self, x: Tensor) -> Tensor:
        numbers = x[:, self.numbers]
        parts = [numbers if self.embedding is None else self.embedding(numbers), x[:, self.plain]]
        parts += [
            x[:, self.get_buffer(f"levels{i}")] @ weight for i, weight in enumerate(self.categories)
        ]
        h = torch.cat(parts, 1)
        return h if self.scale is None else h * self.scale

    def _hidden(self) -> Iterator[tuple[nn.Module, Tensor | None]]:
        """Yield the hidden layers, each with its units' slopes."""
        layers = list(self.layers.values())[:-1]
        return zip(layers, self.slopes if self.slopes is not None else [None] * len(layers))

    def _activated(self, h: Tensor, slope: Tensor | None) -> Tensor:
        active = self.activation(h)
        return active if slope is None else h + (active - h) * slope

    def forward(self, x: Tensor) -> Tensor:
        h = self._features(x)
        for layer, slope in self._hidden():
            h = self.drop(self._activated(layer(h), slope))
        output: Tensor = self.layers["last"](h)
        return output if self.training else output.clamp(self.low, self.high)

    @torch.no_grad()
    def start_from(self, x: Tensor, y: Tensor) -> None:
        """Fit the start to training rows (n, D), and remember the range of their targets where
        these are numbers."""
        if y.is_floating_point():
            self.low.copy_(y.amin(0))
            self.high.copy_(y.amax(0))
        h = self._features(x[:: -(-len(x) // _START_ROWS)])
        for layer, slope in self._hidden():
            h = self._activated(layer.start_from(h), slope)
        self.layers["last"].start_from(h)
