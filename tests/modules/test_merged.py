"""Members that vmap refuses train on merged rows: each equals a member that trains alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import gputune
from gputune.engine.backends.base import TrialWork
from gputune.engine.backends.selection import way_of
from gputune.ground.errors import InputError
from gputune.modules.inspection import traits_of
from gputune.modules.looped import LoopedModule
from gputune.modules.merged import MergedModule
from problems import Linear, fill, largest_difference, make_data, shape_of, train_modules
from refused import refused


class Double(torch.autograd.Function):
    """An operation without a batching rule."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Base(nn.Module):
    """A residual net with an operation that vmap refuses, and a head."""

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.enter = nn.Linear(n_features, 8)
        self.norm = nn.LayerNorm(8)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, n_outputs))

    def forward(self, x):
        h = self.norm(torch.tanh(self.enter(x)))
        return self.head(h + Double.apply(self.inner(h)))


def lora(n_features=5, n_outputs=3, dtype=torch.float64):
    torch.manual_seed(0)
    base = Base(n_features, n_outputs).to(dtype)
    return gputune.lora(base, targets=["enter", "inner"], modules_to_save=["head"])


class Attends(nn.Module):
    """Attention that owns trained parameters itself, on rows of features."""

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.embed = nn.Linear(1, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, n_outputs)

    def forward(self, x):
        h = self.embed(x[..., None])
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.head(Double.apply(h).mean(1))


CONFIGS = fill(
    {"lr": 3e-3, "batch_size": 8, "weight_decay": 0.1},
    {"lr": 1e-2, "batch_size": 8},
    {"lr": 1e-3, "batch_size": 8, "optimizer": "adamw"},
)
RANKS = [
    config | {"rank": rank, "alpha": alpha}
    for config, rank, alpha in zip(CONFIGS, (1, 3, 5), (4, 8, 16))
]
BUILDERS = {
    "trained": (Base, CONFIGS),
    "attention": (Attends, CONFIGS),
    "lora": (lora(), RANKS),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_members_on_merged_rows_equal_members_that_train_one_by_one(name):
    build, configs = BUILDERS[name]
    data = make_data()
    traits = traits_of(build, configs[0], data)
    assert "vmap" in traits.unstackable and traits.merges
    merged = train_modules(MergedModule, build, configs, data, 3, backend="merged")
    looped = train_modules(LoopedModule, build, configs, data, 3, backend="loop")
    for f in range(data.n_folds):
        x = data.x[f]
        for c in range(len(configs)):
            member = merged.member(f, c)
            expected = looped.member(f, c)
            with torch.no_grad():
                assert torch.allclose(member(x), expected(x), rtol=1e-10, atol=1e-10)
            if name != "attention":  # the gradient of the bias of keys is only rounding
                assert largest_difference(member, expected) < 1e-10


class SecondAxis(Base):
    """The rows are on the second axis of a layer."""

    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)
        self.mix = nn.GRU(1, 4)
        self.last = nn.Linear(4, n_outputs)

    def forward(self, x):
        times = Double.apply(x.T[..., None])
        return self.last(self.mix(times)[0][-1])


class Centered(Base):
    def forward(self, x):
        return super().forward(x - x.mean(0))


class Branches(Base):
    def forward(self, x):
        outputs = super().forward(x)
        return outputs if outputs.sum() > 0 else outputs * 2


class Drops(Base):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Counts(Base):
    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)
        self.count = nn.BatchNorm1d(n_features, affine=False)

    def forward(self, x):
        return super().forward(self.count(x))


class Bare(Base):
    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)
        self.shift = nn.Parameter(torch.zeros(n_outputs))

    def forward(self, x):
        return super().forward(x) + self.shift


class ReadsWeight(Base):
    def forward(self, x):
        return super().forward(x) + self.inner.weight.sum()


REFUSED = {
    SecondAxis: "SecondAxis calls its layer 'mix' with tensors whose first axis is not the rows",
    Centered: "a row may affect the outputs of other rows",
    Branches: "it branches on a tensor's value, which may differ between members",
    Drops: "it draws random numbers",
    Counts: "its forward pass changes 'count.num_batches_tracked'",
    Bare: "the module itself owns a trained parameter, not one of its layers",
    ReadsWeight: "it gives other outputs for stacked members than for single members",
}


@pytest.mark.parametrize("build", REFUSED)
def test_a_module_whose_rows_cannot_be_merged_trains_one_by_one(build):
    traits = traits_of(build, CONFIGS[0], make_data())
    assert traits.unstackable and not traits.merges
    assert traits.unmergeable == REFUSED[build]


def test_the_plan_gives_the_reason(capsys):
    X = torch.randn(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(60) % 3
    words = {"n_trials": 3, "cv": 2, "max_epochs": 3, "random_state": 0, "dtype": "float64"}
    words |= {"workers": 1}
    study = gputune.tune(Base, X, y, **words)
    said = capsys.readouterr().err
    assert "note: Base trains on merged rows, because its members cannot be stacked: " in said
    assert ", merged (its members cannot be stacked: " in said.split("plan:")[1]
    expected = gputune.tune(Base, X, y, **words, verbose=0, backend="loop")
    np.testing.assert_allclose(study.curves, expected.curves, rtol=1e-10)
    with refused("backend='stacked': the members of Base cannot be stacked"):
        gputune.tune(Base, X, y, **words, verbose=0, backend="stacked")


def test_other_trials_train_in_other_backends():
    data = make_data()
    traits = traits_of(Base, CONFIGS[0], data)

    def way(traits, config=CONFIGS[0], name="merged"):
        return way_of(name, TrialWork("module", config, traits))

    assert way(traits) == ("merged", "")
    name, reason = way(traits, fill({"optimizer": "RAdam"})[0], name="recorded")
    assert name == "loop" and "its members cannot be stacked" in reason and "RAdam" in reason
    stackable = traits_of(Linear, CONFIGS[0], data)
    reason = "only members that cannot be stacked train on merged rows"
    assert way(stackable) == ("eager", reason)
    refused_traits = traits_of(Centered, CONFIGS[0], data)
    assert way(refused_traits, name="recorded").name == "loop"
    name, reason = way(refused_traits)
    assert name == "loop" and reason.endswith("a row may affect the outputs of other rows")
    name, reason = way(replace(traits, slow="merged rows are slower"), name="compiled")
    assert name == "loop" and reason.endswith("merged rows are slower")
    name, reason = way_of("merged", TrialWork("mlp", CONFIGS[0]))
    assert (name, reason) == ("eager", "only your own modules train on merged rows")


def test_hypergradients_need_stacked_members():
    data = make_data()
    traits = traits_of(Base, CONFIGS[0], data)
    network = MergedModule(Base, CONFIGS, shape_of(data), seed=0, traits=traits)
    with pytest.raises(InputError, match="Base train on merged rows, because .* Hypergradients"):
        network.differentiable({}, [], None)
