"""The slow way to train one network, on the CPU: a plain module, ``torch.optim`` and a loop.

It shares with the engine only the models and the definition of the random streams.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from gputune.models import MLP
from gputune.population.population import padded_width
from gputune.seeding import stream
from gputune.types import Config

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
                size = (len(x), padded_width(module.width))
                draw = torch.rand(size, generator=stream(seed, "dropout", epoch, step, number))
                x = torch.where(draw[:, : module.width] >= rate, x / (1 - rate), torch.zeros_like(x))
        outputs: Tensor = module.layers[-1](x)
        return outputs

    return module, forward


def train_plainly(
    network: tuple[nn.Module, Forward],
    rows: tuple[Tensor, Tensor, Tensor],
    config: Config,
    *,
    seed: int,
    epochs: tuple[int, int],
    present: Tensor | None = None,
) -> nn.Module:
    """Train a module for some of all ``epochs`` on x (n, ...), y (n,) and weights (n,); return it.

    ``network`` is the module with its outputs while it trains; ``present`` (K,) are the classes that take part.
    """
    (module, forward), (x, y, weights), (some, all_epochs) = network, rows, epochs
    size = min(config["batch_size"], len(x))
    optimizer = _optimizer(module, config)
    steps, step = all_epochs * math.ceil(len(x) / size), 0
    for epoch in range(some):
        order = torch.randperm(len(x), generator=stream(seed, "rows", len(x), epoch))
        for number, batch in enumerate(torch.split(order, size)):
            if config["schedule"] == "cosine":
                optimizer.param_groups[0]["lr"] = config["lr"] * 0.5 * (1 + math.cos(math.pi * step / steps))
            outputs = forward(x[batch], epoch, number)
            if present is not None:
                outputs = outputs.masked_fill(~present, -math.inf)
            loss = (weights[batch] * _losses(outputs, y[batch])).sum() / weights[batch].sum()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            step += 1
    return module.eval()


def _losses(outputs: Tensor, y: Tensor) -> Tensor:
    if y.is_floating_point():
        return (outputs.view(len(y)) - y) ** 2
    return functional.cross_entropy(outputs, y, reduction="none")


def _optimizer(module: nn.Module, config: Config) -> torch.optim.Optimizer:
    parameters, name = module.parameters(), config["optimizer"]
    lr, weight_decay = config["lr"], config["weight_decay"]
    if name in ("adam", "adamw"):
        kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
        return kind(parameters, lr, weight_decay=weight_decay)
    momentum, nesterov = config["momentum"], name == "nesterov"
    return torch.optim.SGD(parameters, lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
