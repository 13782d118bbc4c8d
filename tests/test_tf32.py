"""TF32: set while a search or its best model trains, and refused where it would mean nothing; no
GPU is needed."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import gputune
from command_line import run
from gputune.engine.backend import matrix_products
from gputune.tuning.machine_options import MachineOptions
from gputune.tuning.options import make_options
from refused import refused

MATMUL = torch.backends.cuda.matmul
SEEN = []


class Net(nn.Module):
    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.layer = nn.Linear(n_features, n_outputs)

    def forward(self, x):
        SEEN.append(MATMUL.fp32_precision)
        return self.layer(x)


def test_it_is_set_only_inside():
    before = MATMUL.fp32_precision
    with matrix_products(tf32=False):
        assert MATMUL.fp32_precision == before != "tf32"
    with pytest.raises(KeyError), matrix_products(tf32=True):
        assert MATMUL.fp32_precision == "tf32"
        raise KeyError
    assert MATMUL.fp32_precision == before


def test_searches_in_two_threads_leave_it_as_it_was():
    """The one that began first ends first."""
    before = MATMUL.fp32_precision
    first = matrix_products(tf32=True)
    second = matrix_products(tf32=True)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert MATMUL.fp32_precision == "tf32"
    second.__exit__(None, None, None)
    assert MATMUL.fp32_precision == before


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("method", ["random", "hypergradient"])
def test_a_search_and_its_best_model_train_with_it(tf32, method, monkeypatch):
    """As on a GPU, but for the check that there is one."""
    monkeypatch.setattr("gputune.engine.backend.check_tf32", lambda *_: None)
    before = MATMUL.fp32_precision
    word = "tf32" if tf32 else MATMUL.fp32_precision
    X = np.random.RandomState(0).randn(40, 3)
    y = np.arange(40) % 2
    common = {
        "n_trials": 1,
        "include_default": False,
        "cv": 2,
        "max_epochs": 2,
        "workers": 1,
        "verbose": 0,
    }
    study = gputune.tune(
        Net, X, y, space={"lr": 0.1}, method=method, optimizer="sgd", tf32=tf32, **common
    )
    assert word in SEEN and MATMUL.fp32_precision == before
    SEEN.clear()
    study.best_model()
    assert word in SEEN and MATMUL.fp32_precision == before
    SEEN.clear()


@pytest.mark.parametrize(
    ("given", "device", "message"),
    [
        (
            {},
            "cpu",
            "tf32=True works only for float32 matrix products on a GPU, got device='cpu' and "
            "dtype='float32'. Leave tf32 out.",
        ),
        ({"dtype": "float64"}, "cuda", "got device='cuda' and dtype='float64'. Leave tf32 out."),
        (
            {"workers": 2},
            "cuda",
            "tf32=True works only for a search in one process, got workers=2. Leave one of them "
            "out.",
        ),
        ({"tf32": 1}, "cuda", "tf32 must be True or False, got 1."),
    ],
)
def test_where_it_means_nothing_it_is_refused(given, device, message, monkeypatch):
    monkeypatch.setattr(MachineOptions, "device_here", lambda options: torch.device(device))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with refused(re.escape(message)):
        make_options(**{"tf32": True, **given})


def test_what_is_solved_has_none(monkeypatch):
    monkeypatch.setattr("gputune.engine.backend.check_tf32", lambda *_: None)
    with refused("solved with optimizer='exact' uses double precision"):
        gputune.tune(
            "logistic", np.eye(6), np.arange(6) % 2, optimizer="exact", tf32=True, verbose=0
        )


def test_gpus_have_it_from_ampere_on(monkeypatch):
    monkeypatch.setattr(MachineOptions, "device_here", lambda options: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert make_options(tf32=True).machine.tf32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with refused("no effect below .* 8.0 .* and Tesla T4 has 7.5. Leave tf32 out"):
        make_options(tf32=True)


def test_the_command_line_asks_for_it():
    code, _, error = run("tune", "sklearn:iris", "--tf32", "--device", "cpu")
    assert code == 2 and "--tf32 works only for float32 matrix products" in error
