"""Searches with members that train in the kernel, on the simulated devices;
``test_simulated_cuda.py`` runs this too.
"""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.cuda import _utils

import gputune
import problems
from gputune.check.check import LAWS
from gputune.engine import kernel
from gputune.native.library import NotBuiltError
from gputune.tuning.trainer import Trainer
from problems import Linear, fill, largest_difference, make_data, train_together
from refused import refused
from simulated_cuda import torch_cuda as cuda
from simulated_cuda.on_device import moved
from test_laws import OPTIMIZERS, SIZES, each, epochs_of_50_steps

pytestmark = pytest.mark.gpu

DEVICE = "cuda:1"  # what lands on the current device by mistake is on the wrong one
SPACE = {"lr": [1e-3, 1e-2], "batch_size": [25, 32], "width": [9, 16]}
# Folds of 112 and 113 rows.
FAST = {
    "n_trials": 4,
    "max_epochs": 3,
    "cv": 4,
    "scoring": "neg_log_loss",
    "verbose": 0,
    "workers": 1,
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Start every test with empty counts, and forget kernels and failures of earlier tests."""
    cuda.forget()
    monkeypatch.setattr(kernel, "_kernels", {})
    monkeypatch.setattr(kernel.KernelChunk, "failure", "")


def search(iris, model="mlp", **options):
    given = {**FAST, "space": SPACE, "device": DEVICE, "backend": "kernel", **options}
    return gputune.tune(model, *iris, **given)


SEARCHES = {
    "widths": ("mlp", {"space": {**SPACE, "width": [9, (9, 20), 20]}, "include_default": False}),
    "accuracy, with dropout": (
        "mlp",
        {"space": {**SPACE, "dropout": [0.2]}, "scoring": "accuracy"},
    ),
    "halving": ("mlp", {"method": gputune.Halving(min_epochs=1), "n_trials": 9, "max_epochs": 9}),
    "median": ("mlp", {"method": "median", "n_trials": 5, "class_weight": "balanced"}),
    "linear": (
        "logistic",
        {"optimizer": "nesterov", "space": {"lr": [0.1, 0.2], "batch_size": [10, 40]}},
    ),
}
LONG = {"median"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in SEARCHES]
)
def test_a_search_has_the_table_of_compiled_code(name, iris):
    model, options = SEARCHES[name]
    expected = search(iris, model, **options, device="cpu", backend="compiled")
    study = search(iris, model, **options)
    np.testing.assert_allclose(study.curves, expected.curves, rtol=1e-5, atol=1e-5)
    assert cuda.counts("launch")["kernel"] and not cuda.counts("replay")
    one, other = (s.best_model().predict_proba(iris[0]) for s in (study, expected))
    np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("task", ["multiclass", "regression"])
@each(OPTIMIZERS)
def test_members_over_the_grid_of_the_laws_are_those_of_compiled_code(optimizer, task, monkeypatch):
    data = make_data(task, dtype=torch.float32)
    kinds = [{**optimizer, "depth": depth, "lr": lr} for depth, lr in ((1, 1e-2), (2, 1e-3))]
    for width, size in SIZES:
        configs = fill(*({**kind, "width": width, "batch_size": size} for kind in kinds))
        epochs = epochs_of_50_steps(data, size)
        monkeypatch.setattr(problems, "BACKEND", "compiled")
        expected, _ = train_together(data, configs, epochs=epochs)
        monkeypatch.setattr(problems, "BACKEND", "kernel")
        members, _ = train_together(moved(data, DEVICE), configs, epochs=epochs)
        for key in expected:
            assert largest_difference(members[key], expected[key]) <= 1e-5
    assert cuda.counts("launch")["kernel"]


def test_tf32_is_of_the_kernel_too(iris):
    exact, study = (
        search(iris, n_trials=2, max_epochs=2, tf32=tf32).curves for tf32 in (False, True)
    )
    assert cuda.counts("launch")["kernel"] and not cuda.counts("replay")
    assert 1e-6 < abs(study - exact).max() < 1e-2


@pytest.mark.long
def test_a_regression_has_the_table_of_compiled_code(iris):
    rows = (iris[0][:, :3], iris[0][:, 3])
    options = {"scoring": "r2", "optimizer": "sgd", "n_trials": 2}
    expected = search(rows, **options, device="cpu", backend="compiled")
    np.testing.assert_allclose(
        search(rows, **options).curves, expected.curves, rtol=1e-5, atol=1e-5
    )


def test_a_search_continues_where_it_ended_and_launches_change_no_bit(iris, tmp_path, monkeypatch):
    monkeypatch.setattr(kernel, "_FIRST_TURNS", 10**6)  # a launch for an epoch
    whole = search(iris, n_trials=2)
    launches = cuda.counts("launch")["kernel"]
    cuda.forget()
    monkeypatch.setattr(kernel, "_FIRST_TURNS", 0)  # one step
    monkeypatch.setattr(kernel, "_SECONDS", 0.0)
    path = tmp_path / "study.db"
    search(iris, n_trials=2, timeout=1e-9, study=path)
    study = search(iris, n_trials=2, study=path)
    assert study.curves.tobytes() == whole.curves.tobytes()
    assert cuda.counts("launch")["kernel"] >= 3 * launches


def test_the_plan_says_what_the_kernel_trains(iris, capsys):
    space = {
        "depth": [2, 5],
        "lr": [1e-3],
        "width": [16],
        "batch_size": [32],
        "numbers": ["none", "piecewise"],
    }
    search(iris, space=space, include_default=False, n_trials=4, max_epochs=1, verbose=1)
    said = capsys.readouterr().err
    assert "2 kernel (as requested), 2 recorded (the kernel does not support depth of 5" in said
    compiled = re.findall(
        "compiling the kernel for members of (.*): some seconds, once on this machine", said
    )
    assert sorted(compiled) == ["4-16-16-3", "64-16-16-3"]


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (
            "mlp",
            {"optimizer": "rmsprop"},
            "does not support .*rmsprop.*. Choose backend='recorded', which records steps, or",
        ),
        ("mlp", {"dtype": "float64"}, "does not support .*float64.*. Choose"),
        (
            Linear,
            {"space": {"lr": [0.1]}},
            "supports only the built-in MLP and linear models, but this is your own",
        ),
    ],
)
def test_the_plan_names_unsupported_options(model, options, words, iris):
    with refused(words):
        search(iris, model, **options)
    assert "kernel" not in cuda.counts("launch")


CLUSTER = SimpleNamespace(device=DEVICE, cluster=SimpleNamespace(name="ray"))


def test_a_cluster_has_no_kernel():
    trainer = Trainer(data=make_data(), kind="mlp", seed=0, horizon=1, cluster=CLUSTER)
    with refused("backend='kernel' is for a GPU of this machine, but workers='ray'"):
        trainer.with_backend("kernel", [], print)


def test_a_kernel_that_cannot_be_compiled_leaves_recorded_steps(iris, monkeypatch, capsys):
    def fail(*source, **options):
        raise RuntimeError("Kernel compilation failed:\nmember.cu(3): error: x\nmore")

    monkeypatch.setattr(_utils, "_nvrtc_compile", fail)
    said = re.escape(
        f"member.cu cannot be compiled for {DEVICE}: Kernel compilation failed: member.cu(3): "
        "error: x."
    )
    with pytest.warns(RuntimeWarning, match=f"{said} Training continues with PyTorch's kernels"):
        study = search(iris, verbose=1)
    shown = capsys.readouterr().err
    assert cuda.counts("replay") and ", recorded (" in shown and ", kernel" not in shown
    assert any(re.match(said, note) for note in study.record.notes)
    expected = search(iris, device="cpu", backend="compiled")
    np.testing.assert_allclose(study.curves, expected.curves, rtol=1e-5, atol=1e-5)
    (law,) = (law for law in LAWS if law.backends == ("kernel",))
    with pytest.raises(NotBuiltError, match=said):
        law.measure(torch.device(DEVICE), "kernel")
