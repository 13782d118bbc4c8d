"""Draws outside of PyTorch's default generator are found, also rare ones, and such modules train
one by one."""

import functools
import os
import random
import secrets
import uuid
from random import random as draw

import numpy as np
import pytest
import sklearn.utils
import torch
from numpy.random import rand
from scipy import stats
from torch import nn

import gputune
from gputune.modules.host_draws import drawing_code
from gputune.modules.host_generators import generator_states
from gputune.modules.inspection import inspect_module
from gputune.modules.module_trial import ModuleTrial
from problems import Linear, fill, make_data, variant

NUMPY = np.random.default_rng(0)
LEGACY = np.random.RandomState(0)
PYTHON = random.Random(0)
TORCH = torch.Generator()


class Policy:
    def __init__(self):
        self.generator = random.Random(3)

    def choose(self, x):
        return self.generator.choice([x, -x])

    @property
    def share(self):
        return self.generator.random()

    @staticmethod
    def uniform():
        return random.uniform(0, 1)

    @classmethod
    def factor(cls):
        return cls.uniform()

    def __call__(self, x):
        return np.random.rand() * x


class Holds(Linear):
    """Has generators of its own, as attributes and in a dict."""

    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)
        self.own = np.random.default_rng(1)
        self.several = {"a": random.Random(1)}
        self.policy = Policy()
        self.calls = []


def flip(x):
    return x if random.random() < 0.5 else -x


def wrapped(function):
    @functools.wraps(function)
    def inner(*arguments):
        return function(*arguments)

    return inner


def seldom(self, x):
    if self.training and len(self.calls) == 50:
        x = x * random.random()
    return x


def imports_inside(self, x):
    from random import gauss

    import numpy.random as generators

    return x * generators.rand() if self is None else x * gauss(0, 1)


def by_a_local_name(self, x):
    own = self.own
    return x * own.normal()


def by_a_default(self, x, generators=random):
    return x * generators.random()


DRAWING = {
    "random": lambda self, x: x * random.random(),
    "an imported name": lambda self, x: x * draw(),
    "numpy.random": lambda self, x: x * np.random.normal(),
    "an imported name of NumPy": lambda self, x: x * rand(),
    "a generator of the file": lambda self, x: x * NUMPY.normal(),
    "a legacy generator of the file": lambda self, x: x * LEGACY.rand(),
    "a Python generator of the file": lambda self, x: x * PYTHON.random(),
    "a torch.Generator of the file": lambda self, x: x * torch.rand(5, generator=TORCH),
    "an attribute": lambda self, x: x * self.own.normal(),
    "a dict": lambda self, x: x * self.several["a"].random(),
    "a helper": lambda self, x: flip(x),
    "a decorated helper": lambda self, x: wrapped(flip)(x),
    "a method of an attribute": lambda self, x: self.policy.choose(x),
    "a property": lambda self, x: x * self.policy.share,
    "a static method": lambda self, x: x * Policy.uniform(),
    "a class method": lambda self, x: x * Policy.factor(),
    "an object that is called": lambda self, x: self.policy(x),
    "an object that is made": lambda self, x: Policy().choose(x),
    "the system": lambda self, x: x * os.urandom(1)[0],
    "uuid": lambda self, x: x * (uuid.uuid4().int % 2),
    "secrets": lambda self, x: x * secrets.randbelow(2),
    "a generator without a seed": lambda self, x: x * np.random.default_rng().normal(),
    "a distribution of SciPy": lambda self, x: x * stats.norm.rvs(),
    "a partial": lambda self, x: x * functools.partial(random.uniform, 0, 1)(),
    "a comprehension": lambda self, x: sum(x * random.random() for _ in range(2)),
    "a nested function": lambda self, x: (lambda: self.own.normal())() * x,
    "a branch that is taken seldom": seldom,
    "imports inside": imports_inside,
    "a local name": by_a_local_name,
    "a default": by_a_default,
}


@pytest.mark.parametrize("name", DRAWING)
def test_code_that_draws_is_found_without_running_it(name):
    inner = DRAWING[name]
    module = variant(Holds, lambda self, x: Linear.forward(self, inner(self, x)))(5, 3)
    assert drawing_code(nn.Sequential(module))


def test_an_overridden_forward_a_hook_a_loss_and_a_step_are_read():
    base = variant(Linear, lambda self, x: Linear.forward(self, x * random.random()))

    class Calls(base):
        def forward(self, x):
            return super().forward(x)

    def step(module, batch):
        return module(batch[0]).sum() * module.own.normal()

    assert drawing_code(Calls(5, 3)).endswith("<lambda> calls random.random")
    hooked = Linear(5, 3)
    hooked.register_forward_hook(lambda module, inputs, output: output * random.random())
    assert drawing_code(hooked)
    assert drawing_code(Linear(5, 3), [lambda outputs, y: (outputs - y).abs() * random.random()])
    assert drawing_code(Holds(5, 3), step=step).endswith("step uses a numpy.random.Generator")


class DrawsWhenMade(Linear):
    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)
        self.weight.data += random.random() + np.random.rand()

    def forward(self, x):
        return super().forward(x)


def test_code_that_draws_only_from_torch_is_left_as_it_is():
    def forward(self, x):
        noise = torch.randn_like(x) + nn.functional.dropout(x, 0.5, self.training)
        return Linear.forward(self, x * np.sqrt(2) + noise * random.__name__.count("x"))

    module = nn.Sequential(
        variant(Holds, forward)(5, 3), nn.Dropout(), nn.LSTM(3, 3), DrawsWhenMade(3, 3)
    )
    assert (
        drawing_code(module, ["mse", None, nn.MSELoss(), nn.MSELoss, nn.functional.mse_loss]) == ""
    )


class Touchy:
    """Says when it is looked at in a way that runs its code."""

    @property
    def __class__(self):
        LOOKS.append("__class__")
        return Touchy

    def __getattr__(self, name):
        LOOKS.append(name)
        raise AttributeError(name)

    def __hash__(self):
        LOOKS.append("__hash__")
        return 1

    def __eq__(self, other):
        LOOKS.append("__eq__")
        return False


TOUCHY = Touchy()
LOOKS = []


def test_objects_that_code_refers_to_run_nothing():
    module = variant(
        Holds, lambda self, x: Linear.forward(self, x) if TOUCHY is self.touchy.other else x
    )(5, 3)
    module.touchy = TOUCHY
    LOOKS.clear()  # pytest has looked as well
    assert drawing_code(module, [TOUCHY], TOUCHY) == ""
    generator_states(module, [lambda outputs, y: TOUCHY])
    assert LOOKS == []


class LayerDrop(nn.Module):
    """Leaves its second layer out in 2% of the steps. Its forwards on the rows of a minibatch are
    counted."""

    calls = 0

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.first = nn.Linear(n_features, 8)
        self.second = nn.Linear(8, 8)
        self.last = nn.Linear(8, n_outputs)

    def forward(self, x):
        LayerDrop.calls += self.training and len(x) == 16
        h = torch.tanh(self.first(x))
        is_left_out = self.training and random.random() < 0.02
        return self.last(h if is_left_out else h + self.second(h))


def shuffles(self, x):
    return Linear.forward(self, x * sklearn.utils.shuffle([1.0, 2.0])[0])


def draws_from_a_list(self, x):
    generator = getattr(self, "".join(["several"]))["a"]
    return Linear.forward(self, x * generator.random())


@pytest.mark.parametrize(
    ("forward", "source"),
    [(shuffles, "numpy.random"), (draws_from_a_list, "a random.Random of its own")],
)
def test_draws_that_no_code_shows_are_found_by_the_states_of_generators(forward, source):
    module = variant(Holds, forward)
    assert drawing_code(module(5, 3)) == ""
    traits = inspect_module(ModuleTrial(module, *fill({}), make_data()))
    assert traits.unstackable.startswith(f"it draws from {source}, and a stacked")
    assert traits.host_draws and traits.draws and traits.evaluation_draws


def search(model, **more):
    X = torch.linspace(-1, 1, 64 * 3).reshape(64, 3).sin()
    options = {
        "n_trials": 2,
        "max_epochs": 2,
        "cv": 2,
        "verbose": 0,
        "space": {"batch_size": [16], "lr": [1e-2, 1e-3]},
    }
    return gputune.tune(model, X, (X.sum(1) > 0).long(), **{**options, **more})


@pytest.mark.cpu  # on a GPU, gputune also measures the memory of a few steps
@pytest.mark.parametrize("seed", range(12))
def test_a_layer_that_is_left_out_by_a_rare_draw_is_left_out_in_each_step(seed):
    random.seed(seed)
    LayerDrop.calls = 0
    before = random.getstate()
    study = search(LayerDrop, random_state=seed)
    assert LayerDrop.calls == 2 * 2 * 2 * 2  # trials, folds, epochs, minibatches
    assert any("LayerDrop.forward calls random.random" in note for note in study.record.notes)
    assert random.getstate() == before


class Noisy(Linear):
    """Draws from all generators that gputune seeds, when it is made and in each forward in
    training."""

    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)
        self.weight.data += random.random() + np.random.rand()

    def forward(self, x):
        noise = random.random() + np.random.rand() + torch.rand(()) if self.training else 0.0
        return super().forward(x + noise)


def test_draws_from_python_and_numpy_follow_the_seed_of_the_search():
    curves = []
    for seed in range(2):
        random.seed(seed)
        np.random.seed(seed)
        curves.append(search(Noisy, scoring="neg_log_loss").curves)
    np.testing.assert_array_equal(*curves)
    assert (search(Noisy, scoring="neg_log_loss", random_state=1).curves != curves[0]).all()
