"""Cases of members that train together, and how far each is from the network that is trained alone."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from gputune.data.dataset import Dataset, Fold
from gputune.engine.job import Job, train_chunk
from gputune.engine.train import Trained
from gputune.models import MLP
from gputune.modules.construction import build_module
from gputune.population.population import Population, Shape, complete, padded_width, populations
from gputune.scoring.metrics import make_scoring
from gputune.scoring.scoring import Scoring
from gputune.seeding import stream
from gputune.types import Backend, Config, Task

Forward = Callable[[Tensor, int, int], Tensor]
"""Outputs (B, K) of a minibatch (B, ...), of an epoch and a step."""


def plain_mlp(config: Config, n_features: int, n_outputs: int, seed: int) -> tuple[nn.Module, Forward]:
    """Return an MLP in double precision with its keyed start, and its outputs while it trains, dropout included."""
    sizes = {name: config[name] for name in ("width", "depth", "activation")}
    module = MLP(n_features, n_outputs, **sizes).double()
    for number, layer in enumerate(module.layers):
        assert isinstance(layer, nn.Linear)
        n_out, n_in = layer.weight.shape
        key = (seed, "start", number, n_out, n_in)
        draw = torch.rand(n_out * n_in + n_out, generator=stream(*key), dtype=torch.float64)
        draw = (2 * draw - 1) / math.sqrt(n_in)  # torch's default law for nn.Linear
        with torch.no_grad():
            layer.weight.copy_(draw[: n_out * n_in].view(n_out, n_in))
            layer.bias.copy_(draw[n_out * n_in :])

    def forward(x: Tensor, epoch: int, step: int) -> Tensor:
        for number, layer in enumerate(module.layers[:-1]):
            x = module.act(layer(x))
            if rate := config["dropout"]:
                size = (len(x), padded_width(config["width"]))
                draw = torch.rand(size, generator=stream(seed, "dropout", epoch, step, number))
                x = torch.where(draw[:, : config["width"]] >= rate, x / (1 - rate), torch.zeros_like(x))
        outputs: Tensor = module.layers[-1](x)
        return outputs

    return module, forward


_ROWS, _FEATURES, _CLASSES, _FOLDS = 61, 5, 3, 3  # folds of 40 and 41 rows: not all take equally many steps


class Net(nn.Module):
    """A module as a user writes one."""

    def __init__(self, n_features: int, n_outputs: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(n_features, 6), nn.LayerNorm(6)
        self.last = nn.Linear(6, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs (B, K)."""
        outputs: Tensor = self.last(torch.tanh(self.norm(self.first(x))))
        return outputs


@dataclass(frozen=True, eq=False)
class Case:
    """Members that train together: what is special in their rows, and the configurations, filled with ``shared``."""

    configs: tuple[Config, ...]
    shared: Config = dataclasses.field(default_factory=dict)
    task: Task = "multiclass"
    weights: bool = False
    absent: bool = False
    module: bool = False
    dtype: torch.dtype = torch.float64
    epochs: int = 6
    horizon: int = 9

    def complete(self) -> tuple[Config, ...]:
        """Return the configurations with every key that training reads."""
        filled = ({"width": 8, "batch_size": 10, **self.shared, **config} for config in self.configs)
        return tuple(complete(config, optimizer="adamw", schedule="constant") for config in filled)

    def data(self, device: torch.device) -> Dataset:
        """Return rows whose folds are of unequal length, each with its own copy of the inputs."""
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(_FOLDS, _ROWS, _FEATURES, generator=generator, dtype=torch.float64)
        weights = torch.rand(_FOLDS, _ROWS, generator=generator, dtype=torch.float64)
        codes = torch.randint(_CLASSES, (_ROWS,), generator=generator)
        numbers = torch.randn(_ROWS, generator=generator, dtype=torch.float64)
        center, scale = torch.zeros(_FOLDS).double(), torch.ones(_FOLDS).double()
        y, target, present = codes, codes, None
        if self.task == "regression":
            center, scale = torch.linspace(0.1, 0.3, _FOLDS).double(), torch.linspace(1, 1.5, _FOLDS).double()
            y, target = ((numbers - center[:, None]) / scale[:, None]).to(self.dtype), numbers
        folds, each = [], torch.arange(_ROWS) % _FOLDS
        for f in range(_FOLDS):
            train, valid = each != f, each == f
            if self.absent and f == 0:  # this fold learns nothing of the last class
                train &= codes < _CLASSES - 1
            folds.append(Fold(*(mask.nonzero()[:, 0].to(device) for mask in (train, valid))))
        if self.absent:
            present = torch.ones(_FOLDS, _CLASSES, dtype=torch.bool, device=device)
            present[0, -1] = False
        return Dataset(
            inputs=(x.to(device, self.dtype),),
            dtype=self.dtype,
            copies=tuple(range(_FOLDS)),
            y=y.to(device),
            weights=weights.to(device, self.dtype) if self.weights else None,
            folds=tuple(folds),
            present=present,
            center=center.to(device),
            scale=scale.to(device),
            n_outputs=1 if self.task == "regression" else _CLASSES,
            task=self.task,
            target=target.to(device),
        )

    def chunks(self, data: Dataset) -> list[Population]:
        """Return the configurations as they train together."""
        rows = max(len(fold.train) for fold in data.folds)
        return populations(self.complete(), "module" if self.module else "mlp", rows=rows)

    def job(self, backend: Backend, scoring: Scoring | None = None) -> Job:
        """Return what trains them."""
        module = Net if self.module else None
        return Job(
            seed=0, epochs=self.epochs, horizon=self.horizon, backend=backend, scoring=scoring, module_class=module
        )

    def trained(
        self, device: torch.device, backend: Backend, scoring: Scoring | None = None
    ) -> list[tuple[Population, Trained]]:
        """Train all members on a device."""
        data = self.data(device)
        job = self.job(backend, scoring)
        return [(chunk, train_chunk(job, data, chunk)) for chunk in self.chunks(data)]

    @cached_property
    def alone(self) -> dict[tuple[int, int], nn.Module]:
        """The network of each (fold, configuration), trained alone in double precision on the CPU."""
        data = self.data(torch.device("cpu"))
        places = product(range(_FOLDS), enumerate(self.complete()))
        return {(f, c): self._alone(data, f, config) for f, (c, config) in places}

    def _alone(self, data: Dataset, fold: int, config: Config) -> nn.Module:
        """Return the network that a plain loop trains on a fold."""
        rows, present = data.folds[fold].train, None if data.present is None else data.present[fold]
        x = data.x[fold, rows].double()
        y = data.y[fold, rows].double() if self.task == "regression" else data.y[rows]
        weights = torch.ones(len(x)).double() if data.weights is None else data.weights[fold, rows].double()
        if self.module:
            module = build_module(Net, {}, Shape(data.n_features, data.n_outputs), seed=0).double()
        else:
            module, with_dropout = plain_mlp(config, data.n_features, data.n_outputs, seed=0)
        rates = {"lr": config["lr"], "weight_decay": config["weight_decay"]}
        kinds: dict[str, type[torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        if (kind := kinds.get(config["optimizer"], torch.optim.SGD)) is torch.optim.SGD:
            rates |= {"momentum": config["momentum"], "nesterov": config["optimizer"] == "nesterov"}
        optimizer, size = kind(module.parameters(), **rates), min(config["batch_size"], len(x))
        steps, step = self.horizon * math.ceil(len(x) / size), 0
        for epoch in range(self.epochs):
            order = torch.randperm(len(x), generator=stream(0, "rows", len(x), epoch))
            for number, batch in enumerate(torch.split(order, size)):
                if config["schedule"] == "cosine":
                    optimizer.param_groups[0]["lr"] = config["lr"] * 0.5 * (1 + math.cos(math.pi * step / steps))
                outputs = module(x[batch]) if self.module else with_dropout(x[batch], epoch, number)
                if present is not None:
                    outputs = outputs.masked_fill(~present, -math.inf)
                if self.task == "regression":
                    losses = (outputs.view(len(batch)) - y[batch]) ** 2
                else:
                    losses = functional.cross_entropy(outputs, y[batch], reduction="none")
                loss = (weights[batch] * losses).sum() / weights[batch].sum()
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                step += 1
        return module.eval()


def scoring_of(case: Case, name: str) -> Scoring:
    """Return a scoring of the case's task."""
    return make_scoring(name, case.task, None if case.task == "regression" else np.arange(_CLASSES))


def from_plain_loop(case: Case, device: torch.device, backend: Backend) -> float:
    """Return the largest difference of any member from the network that a plain loop trains alone."""
    worst = []
    for chunk, trained in case.trained(device, backend):
        for (c, place), fold in product(enumerate(chunk.index), range(_FOLDS)):
            modules = trained.member(fold, c), case.alone[fold, place]
            pairs = zip(*(module.state_dict().values() for module in modules), strict=True)
            worst += [difference(a, b) for a, b in pairs]
    return float(np.max(worst))


def from_eager(case: Case, device: torch.device, backend: Backend) -> float:
    """Return the largest difference of members from those that the same device trains eagerly."""
    pairs = zip(case.trained(device, backend), case.trained(device, "eager"), strict=True)
    return float(np.max([difference(a.flat, b.flat) for (_, a), (_, b) in pairs]))


def difference(values: Tensor, expected: Tensor) -> float:
    """Return max |difference| / max |expected|; NaN where either has one."""
    values, expected = values.detach().cpu().double(), expected.detach().cpu().double()
    return float((values - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
