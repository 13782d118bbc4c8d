"""Modules of a user, importable by name so that estimators of them can be pickled."""

import torch
from torch import nn


class Net(nn.Module):
    """One hidden layer; it takes the sizes that the data gives."""

    def __init__(self, n_features, n_outputs, hidden=16, dropout=0.0):
        super().__init__()
        self.first = nn.Linear(n_features, hidden)
        self.last = nn.Linear(hidden, n_outputs)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.last(self.dropout(torch.relu(self.first(x))))


class PlainNet(nn.Module):
    """A module as skorch has it: its sizes are arguments of its own."""

    def __init__(self, inputs=4, hidden=8, outputs=3):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
        )

    def forward(self, x):
        return self.layers(x)


class Probabilities(PlainNet):
    def forward(self, x):
        return super().forward(x).softmax(-1)


class OneNumber(nn.Module):
    """A regression that returns (n,)."""

    def __init__(self, n_features):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_features))
        self.shift = nn.Parameter(torch.tensor(0.0))

    def forward(self, x):
        return x @ self.weight + self.shift


class Conv(nn.Module):
    """A small convolutional net of images, with running statistics."""

    def __init__(self, n_outputs, channels=3):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
        )
        self.last = nn.Linear(4 * channels, n_outputs)

    def forward(self, x):
        return self.last(self.body(x).flatten(1))


class GatedConv(Conv):
    """Its control flow depends on its outputs."""

    def forward(self, x):
        outputs = super().forward(x)
        return outputs if outputs.sum() > 0 else 2 * outputs


class Recurrent(nn.Module):
    """Token ids through an embedding and a recurrent layer of the given class."""

    def __init__(self, n_outputs, layer=nn.GRU):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layer = layer(4, 5, batch_first=True)
        self.last = nn.Linear(5, n_outputs)

    def forward(self, x):
        return self.last(self.layer(self.embed(x))[0][:, -1])


class TwoInputs(nn.Module):
    """An image and a row of a table, by their names."""

    def __init__(self, n_outputs, hidden=4):
        super().__init__()
        self.image = Conv(hidden)
        self.age = nn.Linear(2, hidden)
        self.last = nn.Linear(hidden, n_outputs)

    def forward(self, image, age):
        return self.last(torch.relu(self.image(image) + self.age(age)))


def make_conv(n_outputs, channels):
    return Conv(n_outputs, channels)


def weighed_squares(outputs, y, power=2.0):
    """Row losses of several numbers."""
    return (outputs - y).abs().pow(power).mean(1)


class Scaled(Net):
    """Computes with a multiple of its input, of any shape."""

    def forward(self, x):
        return super().forward((x * 1.5).flatten(1))


class ScaledInPlace(Net):
    """Computes the same, and writes the multiple into its input."""

    def forward(self, x):
        x *= 1.5
        return super().forward(x.flatten(1))
