"""Augmentations that draw from the generator that they are given: stacked, with equal numbers."""

import numpy as np
import pytest
import torch

import gputune
from gputune.native import library as built
from gputune.scoring.objective import Objective
from operations import COMPILED, RECORDED, DropPath, option
from problems import Linear
from trained_operations import check

ROWS = np.random.default_rng(0).normal(size=(60, 3))
CLASSES = (ROWS[:, 0] > 0).astype(int)
OPTIONS = {
    "n_trials": 2,
    "max_epochs": 2,
    "cv": 2,
    "scoring": "neg_log_loss",
    "dtype": "float64",
    "space": {"lr": [0.01, 0.1]},
    "verbose": 0,
}

AUGMENTATIONS = {
    "rand": lambda x, generator: x + torch.rand(x.shape, generator=generator, device=x.device),
    "randn": lambda x, generator: x + torch.randn(x.shape, generator=generator, device=x.device),
    "randint": lambda x, generator: (
        x + torch.randint(0, 5, x.shape, generator=generator, device=x.device)
    ),
    "randperm": lambda x, generator: (
        (x + x[torch.randperm(len(x), generator=generator, device=x.device)]) / 2
    ),
    "normal_": lambda x, generator: x + torch.empty_like(x).normal_(generator=generator),
    "normal": lambda x, generator: (
        x + torch.normal(0.0, 1.0, x.shape, generator=generator, device=x.device)
    ),
    "bernoulli": lambda x, generator: x * torch.bernoulli(x.sigmoid(), generator=generator),
    "exponential_": lambda x, generator: x + torch.empty_like(x).exponential_(generator=generator),
}


def tune(augment, **options):
    return gputune.tune(Linear, ROWS, CLASSES, augment=augment, **{**OPTIONS, **options})


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_augmentation_that_draws_from_its_generator_is_stacked(name):
    stacked = tune(AUGMENTATIONS[name], backend="stacked")  # refuses what it cannot stack
    alone = tune(AUGMENTATIONS[name], backend="loop")
    np.testing.assert_allclose(stacked.curves, alone.curves, rtol=1e-12)


def test_an_augmentation_that_draws_from_another_generator_is_named(capsys):
    tune(lambda x, generator: x + torch.randn_like(x), verbose=1)
    said = " ".join(capsys.readouterr().err.split())
    assert "<lambda> draws random numbers without its argument generator; pass g" in said


def crop(x, generator):
    """Rows in another order, of which some columns are masked, with noise that is written into."""
    order = torch.randperm(len(x), generator=generator, device=x.device)
    kept = torch.empty_like(x).bernoulli_(0.8, generator=generator)
    noise = torch.rand(x.shape, generator=generator, dtype=x.dtype)
    noise.mul_(0.1)
    return (x + x[order]) / 2 * kept + noise


def shift(x, generator):
    steps = torch.randint(0, 3, x.shape, generator=generator, device=x.device)
    return x + torch.normal(0.0, 0.1, x.shape, generator=generator, dtype=x.dtype) * steps


def by_values(x, generator):
    return x * torch.bernoulli(x.sigmoid(), generator=generator)


def sometimes(x, generator):
    return -x if torch.rand(1, generator=generator).item() < 0.5 else x


def always_same(x, generator):
    return x + torch.rand(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)


CODED = {
    "crop, and drop path in the module": (crop, COMPILED),
    "shift": (shift, COMPILED),
    "draws that depend on values": (by_values, RECORDED),
    "control flow": (sometimes, RECORDED),
    "another generator": (always_same, RECORDED),
}


@pytest.mark.skipif(built.find_compiler() is None, reason="no C compiler")
@pytest.mark.parametrize("name", CODED)
def test_each_backend_augments_with_the_same_numbers(monkeypatch, name):
    monkeypatch.setattr(built, "FLAGS", ("-O0", *built.FLAGS[1:]))
    augment, backend = CODED[name]
    objective = Objective("cross_entropy", augment=augment)
    check(option(backend, make=DropPath, objective=objective), monkeypatch)
