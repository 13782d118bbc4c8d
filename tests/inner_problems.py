"""Small inner trainings for the tests of hypergradients: stacked networks whose members may all be unlike."""

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gputune.hypergradients.inner import CHAOTIC, HYPERPARAMETERS, Clock, Hypergradients

OPTIMIZERS = ("sgd", "momentum", "nesterov", "adam", "adamw")
OF = {
    "sgd": ("lr", "weight_decay"),
    "momentum": ("lr", "momentum", "weight_decay"),
    "nesterov": ("lr", "momentum", "weight_decay"),
    "adam": ("lr", "weight_decay", "beta1", "beta2"),
    "adamw": ("lr", "weight_decay", "beta1", "beta2"),
}
CALM = {"sgd": 0.1, "momentum": 0.03, "nesterov": 0.03, "adam": 0.01, "adamw": 0.01}
DIMS, ROWS, VALID = (5, 3), 120, 30  # inputs and outputs; training rows; validation rows


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
    """P networks inputs-width-outputs. Member p is the same whatever stands beside it.

    ``widths`` are padded to ``width``, ``sizes`` of minibatches to the largest; ``active`` (P, T) says who steps when;
    ``cosine`` members have a rate that falls along half a cosine.
    """

    kept = 0

    def __init__(
        self,
        steps: int = 20,
        *,
        widths: Sequence[int] = (6,),
        width: int | None = None,
        sizes: Sequence[int] | None = None,
        active: np.ndarray | None = None,
        cosine: Sequence[bool] | None = None,
        seeds: Sequence[int] | None = None,
        loss: str = "cross_entropy",
        activation: Callable[[Tensor], Tensor] = torch.tanh,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.members, self.steps = len(widths), steps
        self.widths, self.width = tuple(widths), width or max(widths)
        self.batch_sizes = tuple(sizes or [16] * self.members)
        self.seeds = tuple(seeds or [0] * self.members)
        self.cosine = tuple(cosine or [False] * self.members)
        self.active = np.ones((self.members, steps), dtype=bool) if active is None else active
        self.totals = self.active.sum(1)
        self.loss, self.activation, self.dtype = loss, activation, dtype
        inputs, outputs = DIMS
        h = self.width
        self.shapes = [(inputs, h), (h,), (h, outputs), (outputs,)]
        self.entries = [math.prod(shape) for shape in self.shapes]
        self.layer = torch.tensor([0, 0, 1, 1]).repeat_interleave(torch.tensor(self.entries))
        self._make_data()
        starts = [self._start(seed, own) for seed, own in zip(self.seeds, self.widths)]
        self.first = torch.stack(starts).to(dtype)
        self.minibatches = self._minibatches()

    def _make_data(self) -> None:
        g = torch.Generator().manual_seed(0)
        inputs, outputs = DIMS
        x = torch.randn(ROWS + VALID, inputs, generator=g, dtype=torch.float64)
        true = torch.randn(inputs, outputs, generator=g, dtype=torch.float64)
        noise = torch.randn(ROWS + VALID, outputs, generator=g, dtype=torch.float64)
        scores = x @ true + 0.5 * noise
        self.x = x.to(self.dtype)
        self.y = scores.argmax(1) if self.loss == "cross_entropy" else scores.tanh().to(self.dtype)

    def _start(self, seed: int, own: int) -> Tensor:
        g = torch.Generator().manual_seed(1000 + seed)
        inputs, outputs = DIMS
        parts = []
        for (rows, columns), padded in zip(((inputs, own), (own, outputs)), (self.shapes[0], self.shapes[2])):
            for shape, whole in (((rows, columns), padded), ((columns,), padded[1:])):
                drawn = (torch.rand(shape, generator=g, dtype=torch.float64) * 2 - 1) / math.sqrt(rows)
                part = torch.zeros(whole, dtype=torch.float64)
                part[tuple(slice(0, n) for n in shape)] = drawn
                parts.append(part.flatten())
        return torch.cat(parts)

    def _minibatches(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """x (P, B, D), y and shares (P, B) of every step; a member's k-th minibatch depends on its seed and k alone."""
        generators = [torch.Generator().manual_seed(2000 + seed) for seed in self.seeds]
        rows = torch.zeros(self.members, max(self.batch_sizes), dtype=torch.long)
        share = torch.zeros(rows.shape, dtype=self.dtype)
        for p, size in enumerate(self.batch_sizes):
            share[p, :size] = 1 / size
        found = []
        for step in range(self.steps):
            for p in np.flatnonzero(self.active[:, step]):
                size = self.batch_sizes[p]
                rows[p, :size] = torch.randperm(ROWS, generator=generators[p])[:size]
            found.append((self.x[rows], self.y[rows], share))
        return found

    def alone(self, p: int, *, width: int | None = None) -> "StackedNets":
        """Member p by itself, with the steps that it takes, unpadded if no width is given."""
        return StackedNets(
            int(self.totals[p]), widths=self.widths[p : p + 1], width=width, sizes=self.batch_sizes[p : p + 1],
            cosine=self.cosine[p : p + 1], seeds=self.seeds[p : p + 1], loss=self.loss,
            activation=self.activation, dtype=self.dtype,
        )  # fmt: skip

    def own(self, weights: Tensor, p: int) -> Tensor:
        """The entries of member p, without its padding."""
        n = self.widths[p]
        first, bias, second, last = (
            part.view(shape) for part, shape in zip(weights[p].split(self.entries), self.shapes)
        )
        return torch.cat([first[:, :n].flatten(), bias[:n], second[:n].flatten(), last])

    def start(self) -> Tensor:
        return self.first.clone()

    def clock(self, step: int) -> Clock:
        done = self.active[:, :step].sum(1)
        active = self.active[:, step]
        factor = None
        if any(self.cosine):
            falling = 0.5 * (1 + np.cos(np.pi * done / self.totals))
            factor = np.where(self.cosine, falling, 1.0)
        return Clock(np.minimum(done, self.totals - 1), None if active.all() else active, factor)

    def outputs(self, weights: Tensor, x: Tensor) -> Tensor:
        parts = [part.view(self.members, *shape) for part, shape in zip(weights.split(self.entries, 1), self.shapes)]
        hidden = self.activation(torch.baddbmm(parts[1][:, None], x, parts[0]))
        return torch.baddbmm(parts[3][:, None], hidden, parts[2])

    def row_losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """(P, B)"""
        if self.loss == "cross_entropy":
            return functional.cross_entropy(outputs.transpose(1, 2), y, reduction="none")
        return functional.mse_loss(outputs, y, reduction="none").mean(-1)

    def losses(self, weights: Tensor, step: int) -> Tensor:
        x, y, share = self.minibatches[step]
        return (self.row_losses(self.outputs(weights, x), y) * share).sum(1)

    def validation(self, weights: Tensor) -> Tensor:
        x, y = (whole[ROWS:].expand(self.members, *whole[ROWS:].shape) for whole in (self.x, self.y))
        return self.row_losses(self.outputs(weights, x), y).mean(1)


class Quadratics:
    """P members with one weight each and the loss a w^2 / 2, on every minibatch and for validation."""

    kept = 0

    def __init__(self, a: Tensor, w0: Tensor, steps: int) -> None:
        self.a, self.w0, self.steps = a, w0, steps
        self.totals = np.full(len(a), steps)
        self.layer = torch.zeros(1, dtype=torch.long)

    def start(self) -> Tensor:
        return self.w0[:, None].clone()

    def clock(self, step: int) -> Clock:
        return Clock(np.full(len(self.a), step))

    def losses(self, weights: Tensor, step: int) -> Tensor:
        return self.a * weights[:, 0] ** 2 / 2

    def validation(self, weights: Tensor) -> Tensor:
        return self.losses(weights, 0)


def tables_of(
    optimizer: str, members: int = 1, *, segments: int = 1, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Calm hyperparameters, no two alike: lr for segments x 2 layers, the others for fewer."""
    base = {
        "lr": CALM.get(optimizer, 0.1),
        "momentum": 0.0 if optimizer == "sgd" else 0.8,
        "weight_decay": 0.02,
        "beta1": 0.85,
        "beta2": 0.98,
    }
    shape = {
        "lr": (segments, 2), "momentum": (segments, 1), "weight_decay": (1, 2), "beta1": (1, 1),
        "beta2": (min(2, segments), 2),
    }  # fmt: skip
    tables = {}
    for name in HYPERPARAMETERS:
        table = torch.full((members, *shape[name]), base[name], dtype=torch.float64)
        spread = torch.linspace(-1, 1, table.numel() + 2, dtype=torch.float64)[1:-1].view(table.shape)
        between = name in ("momentum", "beta1", "beta2")
        tables[name] = table + 0.5 * spread * table * (1 - table) if between else table * (0.5 * spread).exp()
    return {name: table.to(dtype) for name, table in tables.items()}


class _Live(TorchDispatchMode):
    """Adds up the bytes of all tensors made inside that are still alive, graphs included."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):  # what is read before it is made was there before
            self._know(tensor, counted=False)
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            self._know(tensor, counted=True)
        return made

    def _know(self, tensor: object, *, counted: bool) -> None:
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() * counted
        if key not in self.known:
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes of tensors that were alive at once while it ran, beside those that it was given."""
    with _Live() as mode:
        run()
    return mode.peak
