"""State in plain attributes, and state that predictions change: refused where predictions depend on
it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import gputune
from refused import refused

ROWS = np.random.default_rng(0).normal(1, 1, size=(60, 3)).astype(np.float32)
CLASSES = (ROWS[:, 0] > 1).astype(int)


def tune(model):
    return gputune.tune(model, ROWS, CLASSES, n_trials=1, max_epochs=2, cv=2, verbose=0)


class Net(nn.Module):
    """Takes the mean square of the rows that it has seen in training from its inputs."""

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.layer = nn.Linear(n_features, n_outputs)
        self.begin(n_features)

    def forward(self, x):
        if self.training:
            self.keep(x.detach().square().mean(0))
        return self.layer(x - self.mean())


class Attribute(Net):
    def begin(self, n_features):
        self.held = torch.zeros(n_features)

    def keep(self, mean):
        self.held = 0.5 * (self.held + mean)

    def mean(self):
        return self.held


class InPlace(Attribute):
    def keep(self, mean):
        self.held.mul_(0.5).add_(mean, alpha=0.5)


class Listed(Net):
    def begin(self, n_features):
        self.held = [torch.zeros(n_features)]

    def keep(self, mean):
        self.held[0] = 0.5 * (self.held[0] + mean)

    def mean(self):
        return self.held[0]


class InAnObject(Net):
    def begin(self, n_features):
        self.held = SimpleNamespace(mean=torch.zeros(n_features))

    def keep(self, mean):
        self.held.mean = 0.5 * (self.held.mean + mean)

    def mean(self):
        return self.held.mean


class OfNumPy(Net):
    def begin(self, n_features):
        self.held = np.zeros(n_features, dtype=np.float32)

    def keep(self, mean):
        self.held += mean.numpy()

    def mean(self):
        return torch.from_numpy(self.held)


class Part(nn.Module):
    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.part = Attribute(n_features, n_outputs)

    def forward(self, x):
        return self.part(x)


HIDDEN = {
    Attribute: "held",
    InPlace: "held",
    Listed: "held",
    InAnObject: "held",
    OfNumPy: "held",
    Part: "part.held",
}


@pytest.mark.parametrize("module", HIDDEN)
def test_state_in_a_plain_attribute_is_refused_with_the_remedy(module):
    remedies = {
        Listed: "Store the numbers of this list in tensors of a fixed shape, and register each",
        InAnObject: r"Store the numbers of this \w+ in tensors of a fixed shape, and register each",
        OfNumPy: r"Make it a tensor and a buffer .*: self.register_buffer\('held', torch.from_numpy\(array\)\)",
    }
    remedy = remedies.get(module, r"Make it a buffer .*: self.register_buffer\('held', tensor\)")
    words = f"keeps state in {HIDDEN[module]!r}, a plain attribute, and .* lose this attribute. {remedy}"
    with refused(words):
        tune(module)


class Evaluated(Net):
    """Changes a buffer at each prediction."""

    def begin(self, n_features):
        self.register_buffer("seen", torch.zeros(n_features))

    def forward(self, x):
        with torch.no_grad():
            self.seen.mul_(0.5).add_(x.square().mean(0), alpha=0.5)
        return self.layer(x - self.seen)


def test_a_buffer_that_predictions_change_is_refused():
    with refused("changes 'seen' in evaluation mode, .* Change it only if self.training is True"):
        tune(Evaluated)


class Caching(Net):
    """Keeps activations, makes a table at its first call, and counts calls, without effect on
    outputs.
    """

    def begin(self, n_features):
        self.last = None
        self.calls = torch.zeros(())
        self.log = []
        self.register_buffer("table", None, persistent=False)

    def forward(self, x):
        if self.table is None:
            self.table = x.new_ones(x.shape[1])
        if not hasattr(self, "scale"):
            self.register_buffer("scale", x.new_full((x.shape[1],), 2.0), persistent=False)
        self.last = x
        self.calls = self.calls + 1
        self.log.append(len(x))
        return self.layer(x * self.table * self.scale)


def test_what_outputs_do_not_show_is_taken_and_may_be_saved_after_a_prediction(tmp_path):
    model = tune(Caching).best_model()
    expected = model.predict_proba(ROWS)
    model.save(tmp_path / "model")  # with the buffers that the prediction has made
    np.testing.assert_array_equal(
        gputune.load_model(tmp_path / "model", module=Caching).predict_proba(ROWS), expected
    )


class Started(Net):
    """Takes its centre from the training rows, into a buffer that ``state_dict()`` leaves out."""

    def begin(self, n_features):
        self.register_buffer("centre", torch.zeros(n_features), persistent=False)

    def start_from(self, x, y):
        self.centre.copy_(x.square().mean(0))

    def forward(self, x):
        return self.layer(x - self.centre)


class StartedPlain(Started):
    """Puts it into a plain attribute."""

    def begin(self, n_features):
        self.centre = torch.zeros(n_features)

    def start_from(self, x, y):
        self.centre = x.square().mean(0)


def test_what_start_from_sets_reaches_the_model_or_is_refused(tmp_path):
    model = tune(Started).best_model()
    np.testing.assert_allclose(model.module.centre, 1, rtol=1e-5)  # a table is standardised
    model.save(tmp_path / "model")
    loaded = gputune.load_model(tmp_path / "model", module=Started)
    np.testing.assert_array_equal(loaded.predict_proba(ROWS), model.predict_proba(ROWS))
    with refused("sets 'centre', a plain attribute, in start_from, and .* Make it a buffer"):
        tune(StartedPlain)
