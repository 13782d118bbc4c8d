"""Random numbers used as indices: each backend equals members that train one by one."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import gputune
from gputune.engine import choice
from gputune.native import library as built
from problems import variant

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(built.find_compiler() is None, reason="no C compiler"),
]

G = torch.Generator().manual_seed(0)
X = torch.randn(120, 5, generator=G, dtype=torch.float64)
Y = (X[:, 0] > 0).long() + (X[:, 1] > 1)
SEARCH = {
    "n_trials": 2,
    "cv": 2,
    "workers": 1,
    "verbose": 0,
    "dtype": "float64",
    "max_epochs": 3,
    "scoring": "neg_log_loss",
    "space": {"lr": [3e-3, 1e-2]},
}


class Net(nn.Module):
    """A network with a table of noise levels, as diffusion models have, and an embedding of
    them."""

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.enter = nn.Linear(n_features, 6)
        self.leave = nn.Linear(6, n_outputs)
        self.code = nn.Embedding(20, n_features)
        self.register_buffer("level", torch.linspace(1, 0.1, 20))

    def forward(self, x):
        return self.leave(torch.relu(self.enter(x)))


def mixup(module, batch):
    x, y = batch
    order = torch.randperm(len(x))
    outputs = module(0.7 * x + 0.3 * x[order])
    return 0.7 * functional.cross_entropy(outputs, y) + 0.3 * functional.cross_entropy(
        outputs, y[order]
    )


def noisy(self, x):
    if self.training:
        step = torch.randint(20, (len(x),))
        x = x * self.level[step][:, None] + self.code(step)
    return Net.forward(self, x)


def mixed_inside(self, x):
    h = torch.relu(self.enter(x))
    return self.leave(0.7 * h + 0.3 * h[torch.randperm(len(h))] if self.training else h)


def from_the_end(self, x):
    return Net.forward(
        self, x + self.code.weight[torch.randint(-20, 0, (len(x),))] if self.training else x
    )


def sorted_draws(self, x):
    return Net.forward(
        self, 0.5 * x + 0.5 * x[torch.rand(len(x)).argsort()] if self.training else x
    )


def chosen_by_weight(self, x):
    rows = torch.multinomial(torch.ones(len(x)), len(x), replacement=True)
    return Net.forward(self, 0.5 * x + 0.5 * x[rows] if self.training else x)


def masked(self, x):
    kept = torch.empty_like(x).bernoulli_(0.7).bool() & (torch.rand(x.shape) < 0.9)
    return Net.forward(self, torch.where(kept, x, 0.0) if self.training else x)


def written(self, x):
    if self.training:
        x = x.clone()
        x[:, torch.randint(5, (1,))] = 0.0
    return Net.forward(self, x)


CASES = {
    "mixup": (Net, {"training_step": mixup}, "compiled"),
    "noise levels": (variant(Net, noisy), {}, "compiled"),
    "mixed inside": (variant(Net, mixed_inside), {}, "compiled"),
    "from the end": (variant(Net, from_the_end), {}, "compiled"),
    "masked": (variant(Net, masked), {}, "compiled"),
    "sorted draws": (
        variant(Net, sorted_draws),
        {},
        "compiled",
    ),
    "chosen by weight": (
        variant(Net, chosen_by_weight),
        {},
        "recorded (compiled code cannot train this module: its random numbers depend",
    ),
    "written": (
        variant(Net, written),
        {},
        "compiled",
    ),
}

SHORT = ("mixup", "noise levels", "written")


@pytest.fixture(autouse=True)
def everything_is_tried(monkeypatch):
    """Plan as for a large search; compiled code is used if it is available."""
    monkeypatch.setattr(choice, "WORTH_SECONDS", 0)
    monkeypatch.setattr(choice, "CODED_SHARE", -np.inf)
    monkeypatch.setattr(
        choice, "_seconds", lambda job, data, chunk, backend: 2.0 if backend == "loop" else 1.0
    )
    monkeypatch.setattr(built, "FLAGS", ("-O0", *built.FLAGS[1:]))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SHORT else pytest.mark.long) for name in CASES]
)
def test_each_backend_gives_what_plain_modules_give(name, capsys):
    module, options, plan = CASES[name]
    expected = gputune.tune(module, X, Y, **SEARCH, **options, backend="loop").curves
    for backend in ("eager", "stacked", "auto"):
        found = gputune.tune(
            module, X, Y, **{**SEARCH, "verbose": 1}, **options, backend=backend
        ).curves
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)
    assert plan in capsys.readouterr().err.split("plan:")[-1]
