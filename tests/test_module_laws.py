"""The laws of users' modules: in every backend, a member equals a plain PyTorch loop after 51
steps.
"""

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from torch import nn

import reference
from gputune.engine.job import Job, train_chunk
from gputune.engine.train import BegunChunk
from gputune.models import CNN
from gputune.modules.inspection import traits_of
from gputune.native import library as built
from gputune.population.population import Population
from problems import fill, largest_difference, make_data, variant

# of three steps each
EPOCHS = 17
HALF = 8
G = torch.Generator().manual_seed(3)
N = 61
IMAGES = torch.rand(N, 2, 6, 6, generator=G, dtype=torch.float64)
SEQUENCES = torch.randn(N, 3, 3, generator=G, dtype=torch.float64)
SIGNALS = torch.randn(N, 2, 9, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
IDS = torch.randint(9, (N, 4), generator=G)
NUMBERS = torch.randn(N, 2, generator=G, dtype=torch.float64)


class Convolutions(nn.Sequential):
    def __init__(self, n_outputs):
        # A bias before a BatchNorm has a slope of rounding errors, of which Adam makes steps.
        first = (
            nn.Conv2d(2, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        then = (
            nn.Conv2d(4, 3, 2, bias=False),
            nn.BatchNorm2d(3),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        super().__init__(*first, *then, nn.Dropout(0.1), nn.Linear(3, n_outputs))


class Recurrent(nn.Module):
    def __init__(self, n_features, n_outputs, kind):
        super().__init__()
        self.cell = kind(
            n_features, 4, num_layers=2, batch_first=True, dropout=0.2, bidirectional=True
        )
        self.head = nn.Linear(8, n_outputs)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


class Encoder(nn.Module):
    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.enter = nn.Linear(n_features, 4)
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(4, n_outputs)

    def forward(self, x):
        return self.head(self.encoder(self.enter(x)).mean(1))


class TwoInputs(nn.Module):
    def __init__(self, n_outputs):
        super().__init__()
        self.code = nn.Embedding(9, 3)
        self.head = nn.Linear(5, n_outputs)

    def forward(self, ids, number):
        return self.head(torch.cat([self.code(ids).mean(1), number], 1))


class Shared(nn.Module):
    """One weight twice: as an embedding of ids and to compare with."""

    def __init__(self, n_outputs):
        super().__init__()
        self.code = nn.Embedding(9, 3)
        self.head = nn.Linear(9, n_outputs)
        self.inner = nn.Linear(3, 9, bias=False)
        self.inner.weight = self.code.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.inner(self.code(ids).mean(1))))


class Residual(nn.Module):
    """A block with a way around it, convolutions of one channel each, a norm of groups."""

    def __init__(self, n_outputs):
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.inner = nn.Conv2d(4, 4, 3, 2, padding=1, groups=4, bias=False)
        self.norm = nn.GroupNorm(2, 4)
        self.around = nn.Conv2d(4, 4, 1, 2, bias=False)
        self.drop = nn.Dropout2d(0.1)
        self.head = nn.Linear(4, n_outputs)

    def forward(self, x):
        x = torch.relu_(self.enter(x))
        x = self.drop(self.norm(self.inner(x))) + self.around(x)
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Masked(Encoder):
    """Attention that leaves the padding of ids out."""

    def __init__(self, n_outputs):
        super().__init__(3, n_outputs)
        self.code = nn.Embedding(9, 3, padding_idx=0)
        self.encoder.use_nested_tensor = False

    def forward(self, ids):
        left_out = ids == 0
        x = self.encoder(self.enter(self.code(ids)), src_key_padding_mask=left_out)
        return self.head(x.masked_fill(left_out[..., None], 0.0).mean(1))


def branch(self, x):
    """A decision on activations, which vmap refuses."""
    outputs = Convolutions.forward(self, x)
    return outputs * 2 if outputs.mean() > 0.1 else outputs


Branching = variant(Convolutions, branch)

CASES = {
    "cnn": (Convolutions, (IMAGES,)),
    "signals": (
        partial(CNN, input_shape=(2, 9), channels=3, dropout=0.1, spatial_dims=1),
        (SIGNALS,),
    ),
    "gru": (partial(Recurrent, kind=nn.GRU), (SEQUENCES,)),
    "lstm": (partial(Recurrent, kind=nn.LSTM), (SEQUENCES,)),
    "encoder": (Encoder, (SEQUENCES,)),
    "two inputs": (TwoInputs, (IDS, NUMBERS)),
    "shared": (Shared, (IDS,)),
    "residual": (Residual, (IMAGES,)),
    "masked": (Masked, (IDS,)),
    "branching": (Branching, (IMAGES,)),
}
# An eager step is a recorded one without the recording; a masked encoder is an encoder, one that
# branches is a cnn.
CODED = ("signals", "gru", "encoder", "two inputs", "shared")
SHORT = {
    "eager": ("cnn",),
    "recorded": ("cnn", "gru", "lstm", "two inputs", "shared", "residual", "masked", "branching"),
    "loop": ("branching",),
    "coded": CODED,
}
# Cases in which a state holds what others have not: buffers, one weight under two names.
RESUMED = {"recorded": ("cnn",), "loop": ("branching",), "coded": ("shared",)}


def ways(short):
    """Pairs of a backend and a case; pairs that repeat other pairs are marked long."""
    pairs = [(b, name) for b in short for name in (CODED if b == "coded" else CASES)]
    marked = [pytest.param(b, n, marks=() if n in short[b] else pytest.mark.long) for b, n in pairs]
    return pytest.mark.parametrize(("backend", "name"), marked)


CONFIGS = fill(*({"lr": lr, "batch_size": 16} for lr in (1e-3, 3e-3, 1e-2)))
WHOLE = Population("module", (0, 1, 2), tuple(CONFIGS))


@pytest.fixture(autouse=True)
def soon_built(monkeypatch):
    monkeypatch.setattr(built, "FLAGS", ("-O0", *built.FLAGS[1:]))


class Rows:
    """Several inputs, as the oracle indexes and passes one."""

    def __init__(self, parts):
        self.parts = parts
        self.dtype = next((part.dtype for part in parts if part.is_floating_point()), torch.float64)

    def __len__(self):
        return len(self.parts[0])

    def __getitem__(self, rows):
        return Rows([part[rows] for part in self.parts])


def plain(builder, **sizes):
    """Build the module as a loop of one's own calls it: with all inputs of a batch."""
    module = builder(**sizes)
    forward = module.forward
    module.forward = lambda rows: forward(*rows.parts)
    return module


def case(name, dtype=torch.float64):
    build, inputs = CASES[name]
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    data = replace(
        make_data(folds=2, dtype=dtype), inputs=tuple(x[None] for x in inputs), copies=(0, 0)
    )
    return build, replace(data, scaling=(None,) * len(inputs))


def job_of(build, data, backend, epochs=EPOCHS):
    """A job with modules that train by a backend; "coded" is compiled code made from recorded
    steps.
    """
    traits = replace(traits_of(build, CONFIGS[0], data), coded=backend == "coded")
    backend = "recorded" if backend == "coded" else backend
    options = {"module_class": build, "backend": backend, "traits": {WHOLE.arguments: traits}}
    return Job(seed=0, epochs=epochs, horizon=EPOCHS, **options)


@cache
def alone(name, trial, dtype=torch.float64):
    """The plain loop's module of a case, fold 1 and a trial, which is trained once."""
    build, data = case(name, dtype)
    rows = data.folds[1].train
    sizes = {"n_outputs": 3} | ({"n_features": 3} if name in ("gru", "lstm", "encoder") else {})
    x = Rows([part[0, rows] for part in data.inputs])
    return reference.train_module(
        partial(plain, build, **sizes), x, data.y[rows], CONFIGS[trial], epochs=EPOCHS
    )


@ways(SHORT)
@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:enable_nested_tensor")
def test_a_member_is_what_a_plain_loop_makes(name, backend):
    build, data = case(name)
    assert bool(traits_of(build, CONFIGS[0], data).unstackable) == (name == "branching")
    members = train_chunk(job_of(build, data, backend), data, WHOLE)
    assert all(
        largest_difference(members.member(1, c), alone(name, c)) <= 1e-8
        for c in range(len(CONFIGS))
    )


@ways(RESUMED)
@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:enable_nested_tensor")
def test_other_members_halving_and_a_resume_change_nothing(name, backend):
    """Two of three go on from half the epochs, one of them by itself: both are still the plain
    loop's."""
    build, data = case(name)
    begun = train_chunk(job_of(build, data, backend, HALF), data, WHOLE)
    job = job_of(build, data, backend)
    for kept in ([0, 2], [2]):
        configs = tuple(CONFIGS[c] for c in kept)
        chunk = BegunChunk("module", tuple(range(len(kept))), configs, begun.state.select(kept))
        members = train_chunk(job, data, chunk)
        assert largest_difference(members.member(1, len(kept) - 1), alone(name, 2)) <= 1e-8


# The bias of an encoder's keys has a slope of rounding errors alone too, since its softmax knows no
# shift.
@pytest.mark.parametrize("name", ["cnn", pytest.param("gru", marks=pytest.mark.long), "shared"])
def test_single_precision_is_that_of_a_plain_loop(name):
    build, data = case(name, torch.float32)
    for backend in ("recorded", "coded")[: 1 + (name in CODED)]:
        members = train_chunk(job_of(build, data, backend), data, WHOLE)
        assert largest_difference(members.member(1, 0), alone(name, 0, torch.float32)) <= 1e-3
