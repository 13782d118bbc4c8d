"""Modules as a user writes them, and a plain loop that trains one.

This file does not use gputune.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmark.engines.torch import accuracy, batches, denormals_as_zero
from benchmark.work import Fold, Trial


class Block(nn.Module):
    """A residual block of two layers behind a normalization layer."""

    def __init__(self, width: int, norm: type[nn.Module], dropout: float) -> None:
        super().__init__()
        self.norm = norm(width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.second(self.drop(torch.relu(self.first(self.norm(x)))))
        return x + added


class Residual(nn.Module):
    """Two residual blocks between two layers."""

    norm: type[nn.Module] = nn.LayerNorm
    dropout = 0.0

    def __init__(self, n_features: int, n_outputs: int, width: int = 48) -> None:
        super().__init__()
        self.enter = nn.Linear(n_features, width)
        self.leave = nn.Linear(width, n_outputs)
        self.blocks = nn.Sequential(*(Block(width, self.norm, self.dropout) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.leave(self.blocks(self.enter(x)))
        return result


class WithDropout(Residual):
    dropout = 0.1


class WithBatchNorm(Residual):
    norm = nn.BatchNorm1d


class Branching(Residual):
    """The same network with control flow that depends on activations, which cannot be stacked."""

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = super().forward(x)
        return outputs if outputs.sum() < 1e9 else -outputs


class Recurrent(nn.Module):
    """A GRU on sequences of 20 steps of 8 numbers."""

    kind: type[nn.RNNBase] = nn.GRU

    def __init__(self, n_features: int, n_outputs: int, width: int = 32) -> None:
        super().__init__()
        self.body = self.kind(n_features // 20, width, batch_first=True)
        self.leave = nn.Linear(width, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.leave(self.body(x.unflatten(1, (20, -1)))[0][:, -1])
        return result


class WithLSTM(Recurrent):
    kind = nn.LSTM


class Encoder(nn.Module):
    """A transformer encoder on sequences of 16 half rows of an image."""

    def __init__(self, n_features: int, n_outputs: int, width: int = 32) -> None:
        super().__init__()
        self.enter = nn.Linear(n_features // 16, width)
        self.leave = nn.Linear(width, n_outputs)
        self.place = nn.Parameter(torch.zeros(16, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.leave(
            self.body(self.enter(x.unflatten(1, (16, -1))) + self.place).mean(1)
        )
        return result


class Convolutional(nn.Module):
    """Two convolutions with batch norm and pooling on images of 28 x 28."""

    def __init__(self, n_features: int, n_outputs: int, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.leave = nn.Linear(2 * width * 49, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.leave(self.body(x.view(-1, 1, 28, 28)).flatten(1))
        return result


def fit(module_class: Callable[..., nn.Module], fold: Fold, trial: Trial, epochs: int) -> float:
    """Train one module on one fold, as fast as a plain loop can.

    Returns its accuracy on the validation rows.
    """
    x, y = map(torch.from_numpy, fold[:2])
    torch.manual_seed(0)
    module = module_class(n_features=x.shape[1], n_outputs=int(y.max()) + 1)
    optimizer = torch.optim.Adam(module.parameters(), lr=trial["lr"], fused=True)
    with denormals_as_zero():
        for _ in range(epochs):
            module.train()
            for rows, labels in batches(x, y, trial["batch_size"]):
                optimizer.zero_grad()
                cross_entropy(module(rows), labels).backward()
                optimizer.step()
            module.eval()
            last = accuracy(module, fold)
    return last
