"""A module's state other than its parameters is the same after ``save`` and ``load_model``."""

import numpy as np
import pytest
import torch
from torch import nn

import gputune
from gputune.study.model_files import _saved_numbers as saved_numbers
from gputune.study.model_files import _saved_tensors as saved_tensors
from refused import refused

ROWS = np.random.default_rng(0).normal(1, 1, size=(60, 3)).astype(np.float32)
CLASSES = (ROWS[:, 0] > 1).astype(int)


class Base(nn.Module):
    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.layer = nn.Linear(n_features, n_outputs)
        self.hold(n_features)

    def hold(self, n_features):
        """Make the tested module."""


class Buffer(Base):
    """Updates a buffer that ``state_dict()`` leaves out."""

    def hold(self, n_features):
        self.register_buffer("mean", torch.zeros(n_features), persistent=False)

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.5).add_(x.mean(0), alpha=0.5)
        return self.layer(x + self.mean)


class Assigned(Buffer):
    """Assigns that buffer instead of writing into it."""

    def forward(self, x):
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        return self.layer(x + self.mean)


class Counted(Base):
    """Counts in an integer buffer that ``state_dict()`` leaves out."""

    def hold(self, n_features):
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x):
        if self.training:
            self.steps += 1
        return self.layer(x) / (1 + self.steps)


class Complex(Base):
    """Updates a complex buffer that ``state_dict()`` leaves out."""

    def hold(self, n_features):
        self.register_buffer(
            "phase", torch.zeros(n_features, dtype=torch.complex64), persistent=False
        )

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.phase.add_(0.1j * x.mean(0))
        return self.layer(x + self.phase.imag)


class Number(Base):
    """Counts in a number of Python, and notes its first call in a flag."""

    def hold(self, n_features):
        self.steps = 0
        self.begun = False

    def forward(self, x):
        if self.training:
            self.steps += 1
            self.begun = True
        return self.layer(x) / (1 + self.steps) if self.begun else self.layer(x)


class Drawn(Base):
    """Draws fixed features into a buffer that ``state_dict()`` leaves out."""

    def hold(self, n_features):
        self.register_buffer("features", torch.randn(n_features, n_features), persistent=False)

    def forward(self, x):
        return self.layer(x @ self.features)


class DrawnPlain(Base):
    """Draws fixed features into plain attributes, by torch and by NumPy."""

    def hold(self, n_features):
        self.features = torch.randn(n_features, n_features)
        self.order = [int(i) for i in np.random.permutation(n_features)]

    def forward(self, x):
        return self.layer((x @ self.features.to(x.dtype))[:, self.order])


def spectral(n_features, n_outputs):
    inner = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(n_features, 4))
    return nn.Sequential(inner, nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, n_outputs))


def lazy(n_outputs):
    return nn.Sequential(
        nn.LazyLinear(4), nn.LazyBatchNorm1d(momentum=None), nn.LazyLinear(n_outputs)
    )


def parallel(n_features, n_outputs):
    return nn.DataParallel(Buffer(n_features, n_outputs))


MODULES = [Buffer, Number, Drawn, spectral]
MORE_MODULES = [Assigned, Counted, Complex, DrawnPlain, lazy, parallel]


def tuned(module, **options):
    given = {"n_trials": 2, "max_epochs": 3, "cv": 2, "verbose": 0, "random_state": 5, **options}
    return gputune.tune(module, ROWS, CLASSES, **given)


@pytest.mark.parametrize(
    "module", [*MODULES, *(pytest.param(module, marks=pytest.mark.long) for module in MORE_MODULES)]
)
def test_a_loaded_model_predicts_as_the_saved_one(module, tmp_path):
    study = tuned(module)
    one = study.best_model()
    several = study.ensemble(size=2, candidates=2, refit=2, verbose=0)
    for number, model in enumerate((one, several)):
        expected = model.predict_proba(ROWS)
        loaded = model
        for times in range(2):  # a loaded model is saved as well
            folder = tmp_path / f"{number}-{times}"
            loaded.save(folder)
            loaded = gputune.load_model(folder, module=module)
            np.testing.assert_array_equal(loaded.predict_proba(ROWS), expected)
        assert saved_numbers(loaded.module) == saved_numbers(model.module)
        for name, tensor in saved_tensors(model.module).items():
            torch.testing.assert_close(saved_tensors(loaded.module)[name], tensor, rtol=0, atol=0)


def test_a_model_follows_its_search_also_after_a_resume_and_in_workers(tmp_path):
    expected = tuned(Buffer).best_model().predict_proba(ROWS)
    stored = tuned(Buffer, study=tmp_path / "study.db")
    again = gputune.Study.open(tmp_path / "study.db").best_model(ROWS, CLASSES)
    for model in (stored.best_model(), again):
        np.testing.assert_array_equal(model.predict_proba(ROWS), expected)


@pytest.mark.long
@pytest.mark.parametrize("module", [Buffer, Number])
def test_workers_give_the_same_search(module):
    np.testing.assert_array_equal(tuned(module, workers=2).curves, tuned(module).curves)


@pytest.mark.long
def test_an_export_has_the_buffers(tmp_path):
    model = tuned(Buffer).best_model()
    model.export(tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    _, probabilities = program(torch.from_numpy(model.encoded(ROWS)))
    np.testing.assert_allclose(probabilities, model.predict_proba(ROWS), atol=1e-6)


class Fewer(Buffer):
    """The class as it was before it had the buffer."""

    def hold(self, n_features):
        self.mean = 0.0

    forward = Base.forward


def test_a_buffer_that_the_class_lacks_is_named(tmp_path):
    tuned(Buffer).best_model().save(tmp_path / "model")
    with refused(r"does not fit Fewer: Unexpected key\(s\): 'mean', which is not a buffer there"):
        gputune.load_model(tmp_path / "model", module=Fewer)


class DoubleComplex(Complex):
    """Has complex parameters and buffers, which are complex128 with ``dtype="float64"``."""

    def hold(self, n_features):
        super().hold(n_features)
        self.turn = nn.Parameter(torch.ones(n_features, dtype=torch.complex64))
        self.register_buffer("scale", torch.tensor(1 + 1j))

    def forward(self, x):
        return super().forward(x * (self.turn * self.scale).real)


def test_complex_numbers_of_double_precision_are_refused(tmp_path):
    model = tuned(DoubleComplex, dtype="float64").best_model()
    with refused("keeps '.*', a torch.complex128, in its state.* Instead of complex128, use"):
        model.save(tmp_path / "model")
