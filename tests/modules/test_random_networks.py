"""Random networks made of the common operations equal a plain PyTorch loop in every backend."""

import random
from functools import partial

import pytest
import torch
from torch import nn

from gputune.native import library as built
from operations import COMPILED, OPERATIONS, WIDTH, Between, GumbelSoftmax, OfSequence, Operation
from trained_operations import check

pytestmark = pytest.mark.skipif(built.find_compiler() is None, reason="no C compiler")

NETWORKS = 200
SHORT = 3  # networks of the default run
MOST = 3  # operations in a network
OPTIMIZERS = (("sgd", 0.0), ("sgd", 0.5), ("nesterov", 0.5))
INPUTS = {Between: torch.zeros(5, WIDTH), OfSequence: torch.zeros(5, 4, WIDTH)}
# PyTorch draws the slopes of RReLU and Gumbel noise in another order than stacked members, so
# networks in which other layers draw too train one by one.
DRAWN_FIRST = (nn.RReLU, GumbelSoftmax)


class Chain(nn.Module):
    """Several operations, one after the other, each on a bounded input and next to a shortcut."""

    def __init__(self, makes):
        super().__init__()
        self.parts = nn.ModuleList(make() for make in makes)

    def forward(self, x):
        for part in self.parts:
            x = x + 0.5 * first(part(x.tanh()))
        return x


def first(value):
    return value[0] if isinstance(value, tuple) else value


def keeps_shape(make, x):
    try:
        return first(make()(x)).shape == x.shape
    except RuntimeError:  # another width
        return False


def parts_of(net):
    """The operations that fit into a network of this class and keep the shape, by name."""
    parts = {}
    for name, operation in OPERATIONS.items():
        is_layer = operation.build.func is net and not (operation.objective or operation.config)
        if is_layer and operation.backend == COMPILED and operation.task == "multiclass":
            make = operation.build.keywords["make"]
            if make not in DRAWN_FIRST and keeps_shape(make, INPUTS[net]):
                parts[name] = make
    return parts


PARTS = {net: parts_of(net) for net in INPUTS}


def network(seed):
    """The names of a random network's operations, and the network as an operation of the table."""
    draw = random.Random(seed)
    net = draw.choice([Between, Between, OfSequence])
    names = draw.sample(sorted(PARTS[net]), draw.randint(1, MOST))
    makes = [PARTS[net][name] for name in names]
    rows = "sequence" if net is OfSequence else "table"
    optimizer, momentum = draw.choice(OPTIMIZERS)
    config = {"optimizer": optimizer, "momentum": momentum}
    build = partial(net, make=partial(Chain, makes))
    return names, Operation(COMPILED, build, rows, config=config)


@pytest.mark.parametrize(
    "seed",
    [pytest.param(n, marks=() if n < SHORT else pytest.mark.long) for n in range(NETWORKS)],
)
def test_a_random_network_equals_a_plain_loop(monkeypatch, seed):
    monkeypatch.setattr(built, "FLAGS", ("-O0", *built.FLAGS[1:]))
    names, operation = network(seed)
    print("operations:", *names, sep="\n  ")
    check(operation, monkeypatch)
