"""The oracle: one member, a plain ``nn.Module``, ``torch.optim``, a loop. Slow, obvious, never
clever.

It shares with gputune only the models and the definition of the random streams:

rows     the order of epoch e over n training rows is ``randperm(n)`` of stream (seed, "rows", n, e)
start    layer l of shape (out, in) reads ``rand(out*in + out)`` of stream (seed, "start", l, out,
         in)
dropout  step s of epoch e, hidden layer l reads ``rand(B, padded width)`` of stream (seed,
         "dropout", e, s, l)
"""

import math

import torch
from torch.nn import functional

from gputune.ground.seeding import stream, stream_seed
from gputune.models import MLP
from gputune.optim import SGDHD, AdamHD, AdamWHD
from gputune.population.population import padded_width


def start(module, seed):
    """Give every linear layer of a plain module its keyed start: torch's default law for
    ``nn.Linear``."""
    for number, layer in enumerate(module.layers):
        n_out, n_in = layer.weight.shape
        draw = torch.rand(
            n_out * n_in + n_out,
            generator=stream(seed, "start", number, n_out, n_in),
            dtype=torch.float64,
        )
        draw = (2 * draw - 1) / math.sqrt(n_in)
        with torch.no_grad():
            layer.weight.copy_(draw[: n_out * n_in].view(n_out, n_in))
            layer.bias.copy_(draw[n_out * n_in :])
    return module


def make_optimizer(module, config):
    parameters = module.parameters()
    name = config["optimizer"]
    lr = config["lr"]
    decay = config["weight_decay"]
    momentum = config.get("momentum", 0.0)
    if name.endswith("hd"):
        kind = {"adamhd": AdamHD, "adamwhd": AdamWHD}.get(name, SGDHD)
        more = {} if kind is not SGDHD else {"momentum": momentum, "nesterov": name == "nesterovhd"}
        more["rule"] = config.get("hypergrad_rule", "multiplicative")
        return kind(parameters, lr, hypergrad_lr=config["hypergrad_lr"], weight_decay=decay, **more)
    if hasattr(torch.optim, name):
        words = {
            k.removeprefix("optimizer__"): v
            for k, v in config.items()
            if k.startswith("optimizer__")
        }
        words |= {} if name == "Rprop" else {"weight_decay": decay}
        return getattr(torch.optim, name)(parameters, lr=lr, **words)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=decay)
    if name == "nesterov":
        return torch.optim.SGD(
            parameters, lr=lr, momentum=momentum, weight_decay=decay, nesterov=True
        )
    if name == "adam":
        return torch.optim.Adam(parameters, lr=lr, weight_decay=decay)
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)


def minibatch_loss(output, y, weights):
    """Sum of weight x loss over the sum of weights: cross-entropy or squared error."""
    if y.is_floating_point():
        losses = (output.view(len(y)) - y) ** 2
    else:
        losses = functional.cross_entropy(output, y, reduction="none")
    return (weights * losses).sum() / weights.sum()


def forward_with_dropout(module, x, rate, seed, epoch, step):
    """The plain MLP with the keyed masks in place of ``nn.Dropout``'s own draw. ``rate`` is the rate
    of all hidden layers, or a list of their rates."""
    widths = [layer.out_features for layer in module.layers[:-1]]
    for number, layer in enumerate(module.layers[:-1]):
        x = module.activations[number](layer(x))
        layer_rate = rate[number] if isinstance(rate, list | tuple) else rate
        draw = torch.rand(
            len(x),
            padded_width(max(widths)),
            generator=stream(seed, "dropout", epoch, step, number),
        )[:, : widths[number]]
        x = torch.where(draw >= layer_rate, x / (1 - layer_rate), torch.zeros_like(x))
    return module.layers[-1](x)


def train_mlp(
    x, y, config, *, n_outputs, seed=0, epochs=1, max_epochs=None, weights=None, after_epoch=None
):
    """Train one MLP on rows (n, D) by a plain loop; return the module."""
    module = MLP(
        x.shape[1],
        n_outputs,
        width=config.get("width", 1),
        depth=config["depth"],
        activation=config.get("activation", "relu"),
    ).to(x.dtype)
    start(module, seed)
    rate = config.get("dropout", 0.0)
    drops = any(rate) if isinstance(rate, list | tuple) else rate > 0

    def forward(batch, epoch, step):
        return (
            forward_with_dropout(module, batch, rate, seed, epoch, step) if drops else module(batch)
        )

    return _loop(module, forward, x, y, config, seed, epochs, max_epochs, weights, after_epoch)


def train_module(
    build, x, y, config, *, seed=0, epochs=1, max_epochs=None, weights=None, after_epoch=None
):
    """Train a user's module (``build()`` makes it) by a plain loop; it draws from torch's own
    generator. The key ``init_seed`` of a configuration replaces ``seed`` for the initial weights."""
    with torch.random.fork_rng():
        torch.manual_seed(stream_seed(config.get("init_seed", seed), "module"))
        module = build().to(x.dtype)

    def forward(batch, epoch, step):
        with torch.random.fork_rng():
            torch.manual_seed(stream_seed(seed, "dropout", epoch, step))
            return module(batch)

    return _loop(module, forward, x, y, config, seed, epochs, max_epochs, weights, after_epoch)


def _loop(module, forward, x, y, config, seed, epochs, max_epochs, weights, after_epoch):
    n = len(x)
    size = min(config["batch_size"], len(x))
    weights = torch.ones(n, dtype=x.dtype) if weights is None else weights
    optimizer = make_optimizer(module, config)
    total = (max_epochs or epochs) * math.ceil(n / size)
    done = 0
    for epoch in range(epochs):
        module.train()
        order = torch.randperm(n, generator=stream(seed, "rows", n, epoch))
        for step, rows in enumerate(order.split(size)):
            if config.get("schedule") == "cosine":
                optimizer.param_groups[0]["lr"] = (
                    config["lr"] * 0.5 * (1 + math.cos(math.pi * done / total))
                )
            loss = minibatch_loss(forward(x[rows], epoch, step), y[rows], weights[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
        if after_epoch is not None:
            module.eval()
            after_epoch(epoch, module)
    return module.eval()
