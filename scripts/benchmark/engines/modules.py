"""Modules as a user writes them, and a plain loop that trains one.

This file does not use gputune.
"""

from collections.abc import Callable
from hashlib import blake2b

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, max_pool2d, pad, silu
from torch.nn.utils.parametrizations import spectral_norm

from benchmark.engines.torch import accuracy, batches, denormals_as_zero
from benchmark.work import Fold, Trial


class SwiGLU(nn.Module):
    """The first half of the inputs, multiplied by the SiLU of the second half."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, -1)
        return value * silu(gate)


class Block(nn.Module):
    """A residual block of two layers behind a normalization layer."""

    def __init__(
        self, width: int, norm: type[nn.Module], dropout: float, activation: type[nn.Module]
    ) -> None:
        super().__init__()
        self.norm = norm(width)
        self.first = nn.Linear(width, 2 * width if activation is SwiGLU else width)
        self.second = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.second(self.drop(self.activation(self.first(self.norm(x)))))
        return x + added


class Residual(nn.Module):
    """Two residual blocks between two layers."""

    norm: type[nn.Module] = nn.LayerNorm
    dropout = 0.0
    activation: type[nn.Module] = nn.ReLU

    def __init__(self, n_features: int, n_outputs: int, width: int = 48) -> None:
        super().__init__()
        self.enter = nn.Linear(n_features, width)
        self.leave = nn.Linear(width, n_outputs)
        self.blocks = nn.Sequential(
            *(Block(width, self.norm, self.dropout, self.activation) for _ in range(2))
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.leave(self.blocks(self.enter(x)))
        return result


class WithDropout(Residual):
    dropout = 0.1


class WithBatchNorm(Residual):
    norm = nn.BatchNorm1d


class WithSiLU(Residual):
    activation = nn.SiLU


class WithGELU(Residual):
    activation = nn.GELU


class WithHardswish(Residual):
    activation = nn.Hardswish


class WithSwiGLU(Residual):
    activation = SwiGLU


class WithSpectralNorm(Residual):
    """The same network with spectral normalization of the weights of both blocks."""

    def __init__(self, n_features: int, n_outputs: int, width: int = 48) -> None:
        super().__init__(n_features, n_outputs, width)
        for block in self.blocks:
            spectral_norm(block.first)
            spectral_norm(block.second)


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


class SmallConvolutional(nn.Module):
    """Two convolutions with pooling on images of 8 x 8."""

    def __init__(self, n_features: int, n_outputs: int, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.leave = nn.Linear(2 * width * 4, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.leave(self.body(x.view(-1, 1, 8, 8)).flatten(1))
        return result


def _double(inputs: int, outputs: int) -> nn.Sequential:
    """Return the two convolutions of a level of a U-Net."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """A U-Net of three levels on images of 16 x 16. The outputs are means over the pixels."""

    def __init__(self, n_features: int, n_outputs: int, width: int = 8) -> None:
        super().__init__()
        self.down = _double(1, width)
        self.further_down = _double(width, 2 * width)
        self.bottom = _double(2 * width, 4 * width)
        self.enlarge_bottom = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.up = _double(4 * width, 2 * width)
        self.enlarge = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.further_up = _double(2 * width, width)
        self.leave = nn.Conv2d(width, n_outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        large = self.down(x.view(-1, 1, 16, 16))
        middle = self.further_down(max_pool2d(large, 2))
        small = self.bottom(max_pool2d(middle, 2))
        middle = self.up(torch.cat([middle, self.enlarge_bottom(small)], 1))
        large = self.further_up(torch.cat([large, self.enlarge(middle)], 1))
        result: Tensor = self.leave(large).mean((2, 3))
        return result


class CausalBlock(nn.Module):
    """A residual block of two causal convolutions."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.padding = 2 * dilation
        self.first = nn.Conv1d(inputs, outputs, 3, dilation=dilation)
        self.second = nn.Conv1d(outputs, outputs, 3, dilation=dilation)
        self.skip = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.first(pad(x, (self.padding, 0))))
        inner = torch.relu(self.second(pad(inner, (self.padding, 0))))
        return torch.relu(inner + self.skip(x))


class TCN(nn.Module):
    """A temporal convolutional network on sequences of 20 steps of 8 numbers."""

    def __init__(self, n_features: int, n_outputs: int, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            CausalBlock(n_features // 20, width, 1),
            CausalBlock(width, width, 2),
            CausalBlock(width, width, 4),
        )
        self.leave = nn.Linear(width, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        steps = x.unflatten(1, (20, -1)).transpose(1, 2)
        result: Tensor = self.leave(self.body(steps)[:, :, -1])
        return result


class Graph(nn.Module):
    """Three graph convolutions on graphs of up to 16 nodes, padded to 16.

    A row has 4 numbers for each node, and then a number for each node that is below 0 if the node
    is padding. The nodes are patches of an image; neighbors share an edge of the grid.
    """

    neighbors: Tensor

    def __init__(self, n_features: int, n_outputs: int, width: int = 32) -> None:
        super().__init__()
        place = torch.arange(16)
        apart = (place[:, None] // 4 - place // 4).abs() + (place[:, None] % 4 - place % 4).abs()
        self.register_buffer("neighbors", (apart <= 1).float())
        self.enter = nn.Linear(4, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.leave = nn.Linear(width, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        is_node = (x[:, 64:] >= 0).to(x.dtype)
        edges = self.neighbors * is_node[:, None, :] * is_node[:, :, None]
        mean = edges / edges.sum(2, keepdim=True).clamp(min=1)
        nodes = torch.relu(self.enter(x[:, :64].unflatten(1, (16, 4))))
        for layer in self.layers:
            nodes = nodes + torch.relu(layer(mean @ nodes))
        total = (nodes * is_node[:, :, None]).sum(1)
        result: Tensor = self.leave(total / is_node.sum(1, keepdim=True).clamp(min=1))
        return result


class MixtureOfExperts(nn.Module):
    """A layer in which each row uses the two best of four experts, between two layers."""

    def __init__(self, n_features: int, n_outputs: int, width: int = 32) -> None:
        super().__init__()
        self.enter = nn.Linear(n_features, width)
        self.gate = nn.Linear(width, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
            for _ in range(4)
        )
        self.leave = nn.Linear(width, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))
        best, which = self.gate(x).topk(2, -1)
        shares = torch.zeros(len(x), 4, dtype=x.dtype).scatter(1, which, best.softmax(-1))
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        result: Tensor = self.leave(x + (shares[:, :, None] * outputs).sum(1))
        return result


class MixerBlock(nn.Module):
    """A block of an MLP-Mixer: an MLP over the patches, then one over the channels."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.patch_norm = nn.LayerNorm(width)
        self.patch_mlp = nn.Sequential(
            nn.Linear(patches, 2 * patches), nn.GELU(), nn.Linear(2 * patches, patches)
        )
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.patch_mlp(self.patch_norm(x).transpose(1, 2)).transpose(1, 2)
        added: Tensor = self.mlp(self.norm(x))
        return x + added


class Mixer(nn.Module):
    """An MLP-Mixer of two blocks on 16 patches of an image."""

    def __init__(self, n_features: int, n_outputs: int, width: int = 32) -> None:
        super().__init__()
        self.enter = nn.Linear(n_features // 16, width)
        self.blocks = nn.Sequential(MixerBlock(16, width), MixerBlock(16, width))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.blocks(self.enter(x.unflatten(1, (16, -1))))
        result: Tensor = self.leave(self.norm(patches).mean(1))
        return result


class PaddedAttention(nn.Module):
    """Attention over up to 16 patches of an image, without those that are padding.

    The columns are those of ``Graph``.
    """

    def __init__(self, n_features: int, n_outputs: int, width: int = 32) -> None:
        super().__init__()
        self.enter = nn.Linear(4, width)
        self.place = nn.Parameter(torch.zeros(16, width))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.enter(x[:, :64].unflatten(1, (16, 4))) + self.place
        is_padding = x[:, 64:] < 0
        mixed, _ = self.attention(
            patches, patches, patches, key_padding_mask=is_padding, need_weights=False
        )
        result: Tensor = self.leave(self.norm(patches + mixed).mean(1))
        return result


def stream_seed(*key: object) -> int:
    """Return the seed that gputune with ``random_state=0`` uses for a purpose such as ``"rows"``.

    The result does not fit into torch's signed integers without the shift.
    """
    text = "/".join(str(part) for part in (0, *key))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def fit(module_class: Callable[..., nn.Module], fold: Fold, trial: Trial, epochs: int) -> float:
    """Train one module on one fold, as fast as a plain loop can.

    The initial weights and the order of the rows are those of gputune with ``random_state=0``. A
    difference in the accuracies is then no effect of the random numbers. Returns the accuracy on
    the validation rows.
    """
    x, y = map(torch.from_numpy, fold[:2])
    torch.manual_seed(stream_seed("module"))
    module = module_class(n_features=x.shape[1], n_outputs=int(y.max()) + 1)
    optimizer = torch.optim.Adam(module.parameters(), lr=trial["lr"], fused=True)
    with denormals_as_zero():
        for epoch in range(epochs):
            module.train()
            order = torch.Generator().manual_seed(stream_seed("rows", len(x), epoch))
            for rows, labels in batches(x, y, trial["batch_size"], order):
                optimizer.zero_grad()
                cross_entropy(module(rows), labels).backward()
                optimizer.step()
            module.eval()
            last = accuracy(module, fold)
    return last
