"""Small inner trainings for the tests of hypergradients."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from gputune.hypergradients.inner import CHAOTIC, HYPERPARAMETERS, Hypergradients, StepPosition

OPTIMIZERS = ("sgd", "momentum", "nesterov", "adam", "adamw")
OF = {"sgd": ("lr", "weight_decay")}
OF |= dict.fromkeys(("momentum", "nesterov"), ("lr", "momentum", "weight_decay"))
OF |= dict.fromkeys(("adam", "adamw"), ("lr", "weight_decay", "beta1", "beta2"))
CALM = {"sgd": 0.1, "momentum": 0.03, "nesterov": 0.03, "adam": 0.01, "adamw": 0.01}
# inputs and outputs; rows: of training, validation, a minibatch
DIMS = (5, 3)
ROWS = 120
VALID = 30
BATCH = 16


Pair = tuple[Tensor, Tensor]


def data(
    steps: int = 6,
    *,
    rows: int = 8,
    inputs: int = 5,
    outputs: int = 3,
    dtype: torch.dtype = torch.float64,
) -> tuple[list[Pair], Pair]:
    """Minibatches and a validation pair that can be learned a little."""
    g = torch.Generator().manual_seed(1)
    true = torch.randn(inputs, outputs, generator=g, dtype=torch.float64)

    def pair(n: int) -> Pair:
        x = torch.randn(n, inputs, generator=g, dtype=torch.float64)
        noise = torch.randn(n, outputs, generator=g, dtype=torch.float64)
        return x.to(dtype), (x @ true + noise).argmax(1)

    return [pair(rows) for _ in range(steps)], pair(40)


def network(*middle: nn.Module, inputs: int = 5, width: int = 6, outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(inputs, width), nn.Tanh(), *middle, nn.Linear(width, outputs))
    return nn.Sequential(*layers).double()


class Calling(nn.Module):
    """Calls a function of itself, with its parts, and x."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Any) -> Tensor:
        return self.function(self, x)


def chaotic(ratio: Tensor) -> Tensor:
    """Which members are chaotic, or no longer finite."""
    return ~(ratio <= CHAOTIC)


def usable(result: Hypergradients) -> Tensor:
    """Which members have finite gradients that are not noise."""
    finite = [table.isfinite().flatten(1).all(1) for table in result.gradients.values()]
    return ~chaotic(result.ratio) & torch.stack(finite).all(0)


def rule_of(optimizer: str) -> str:
    """The update rule of an optimizer: momentum is sgd with a heavy ball."""
    return "sgd" if optimizer == "momentum" else optimizer


class StackedNets:
    """P networks inputs-width-outputs; each has a seed for its starting weights and minibatches."""

    kept = 0

    def __init__(
        self,
        steps: int = 20,
        *,
        seeds: Sequence[int] = (0,),
        width: int = 6,
        loss: str = "cross_entropy",
        activation: Callable[[Tensor], Tensor] = torch.tanh,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.members = len(seeds)
        self.steps = steps
        self.totals = np.full(self.members, steps)
        self.loss = loss
        self.activation = activation
        inputs, outputs = DIMS
        self.shapes = [(inputs, width), (width,), (width, outputs), (outputs,)]
        self.entries = [math.prod(shape) for shape in self.shapes]
        self.layer = torch.tensor([0, 0, 1, 1]).repeat_interleave(torch.tensor(self.entries))
        g = torch.Generator().manual_seed(0)
        x, true, noise = (
            torch.randn(n, m, generator=g, dtype=torch.float64)
            for n, m in ((ROWS + VALID, inputs), (inputs, outputs), (ROWS + VALID, outputs))
        )
        scores = x @ true + 0.5 * noise
        self.x = x.to(dtype)
        self.y = scores.argmax(1) if loss == "cross_entropy" else scores.tanh().to(dtype)
        self.first = torch.stack([self._start(seed) for seed in seeds]).to(dtype)
        draws = [torch.Generator().manual_seed(2000 + seed) for seed in seeds]
        self.rows = [
            torch.stack([torch.randperm(ROWS, generator=g)[:BATCH] for g in draws])
            for _ in range(steps)
        ]

    def _start(self, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(1000 + seed)
        ends = [self.shapes[i][0] ** -0.5 for i in (0, 0, 2, 2)]
        drawn = [torch.rand(n, generator=g, dtype=torch.float64) for n in self.entries]
        return torch.cat([(2 * part - 1) * end for part, end in zip(drawn, ends)])

    def start(self) -> Tensor:
        return self.first.clone()

    def clock(self, step: int) -> StepPosition:
        return StepPosition(np.full(self.members, step))

    def _losses(self, weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The means (P,) over rows (P, B)."""
        parts = [
            part.view(self.members, *shape)
            for part, shape in zip(weights.split(self.entries, 1), self.shapes)
        ]
        hidden = self.activation(torch.baddbmm(parts[1][:, None], x, parts[0]))
        outputs = torch.baddbmm(parts[3][:, None], hidden, parts[2])
        if self.loss == "cross_entropy":
            return functional.cross_entropy(outputs.transpose(1, 2), y, reduction="none").mean(1)
        return functional.mse_loss(outputs, y, reduction="none").mean((1, 2))

    def losses(self, weights: Tensor, step: int) -> Tensor:
        rows = self.rows[step]
        return self._losses(weights, self.x[rows], self.y[rows])

    def validation(self, weights: Tensor) -> Tensor:
        x, y = (
            whole[ROWS:].expand(self.members, *whole[ROWS:].shape) for whole in (self.x, self.y)
        )
        return self._losses(weights, x, y)


class Quadratics:
    """P members with one weight each and the loss a w^2 / 2, on every minibatch and for
    validation."""

    kept = 0

    def __init__(self, a: Tensor, w0: Tensor, steps: int) -> None:
        self.a = a
        self.w0 = w0
        self.steps = steps
        self.totals = np.full(len(a), steps)
        self.layer = torch.zeros(1, dtype=torch.long)

    def start(self) -> Tensor:
        return self.w0[:, None].clone()

    def clock(self, step: int) -> StepPosition:
        return StepPosition(np.full(len(self.a), step))

    def losses(self, weights: Tensor, step: int) -> Tensor:
        return self.a * weights[:, 0] ** 2 / 2

    def validation(self, weights: Tensor) -> Tensor:
        return self.losses(weights, 0)


def tables_of(
    optimizer: str, members: int = 1, *, segments: int = 1, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Calm hyperparameters, no two alike: lr for segments x 2 layers, the others for fewer."""
    base = {
        "lr": CALM[optimizer],
        "momentum": 0.0 if optimizer == "sgd" else 0.8,
        "weight_decay": 0.02,
    }
    base |= {"beta1": 0.85, "beta2": 0.98}
    shape = {
        "lr": (segments, 2),
        "momentum": (segments, 1),
        "weight_decay": (1, 2),
        "beta1": (1, 1),
        "beta2": (min(2, segments), 2),
    }
    tables = {}
    for name in HYPERPARAMETERS:
        table = torch.full((members, *shape[name]), base[name], dtype=torch.float64)
        spread = torch.linspace(-1, 1, table.numel() + 2, dtype=torch.float64)[1:-1].view(
            table.shape
        )
        between = name in ("momentum", "beta1", "beta2")
        tables[name] = (
            table + 0.5 * spread * table * (1 - table) if between else table * (0.5 * spread).exp()
        )
    return {name: table.to(dtype) for name, table in tables.items()}
