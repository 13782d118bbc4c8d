"""Which batch sizes of a module train together in a search, and that a search gives the same scores."""

import numpy as np
import pytest
import torch
from torch import nn

import gputune
from gputune.callbacks import Callback
from gputune.engine import plan
from gputune.modules import kept_features
from gputune.modules.kept_features import NotKept

X = torch.randn(60, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = (X[:, 0] > 0).long()
SPACE = {"lr": [1e-3, 1e-2], "batch_size": [4, 6, 16]}
OPTIONS = {"space": SPACE, "n_trials": 6, "include_default": False, "cv": 2, "dtype": "float64"}


class Body(nn.Module):
    """A large frozen body, and a small head."""

    def __init__(self, n_features, n_outputs, p=0.0, norm=False, branches=False, across=False):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(n_features, 64), nn.Tanh(), nn.Linear(64, 64))
        self.body.requires_grad_(False)
        self.inner = nn.Linear(64, 4)
        self.drop = nn.Dropout(p)
        self.norm = nn.BatchNorm1d(4) if norm else nn.Identity()
        self.head = nn.Linear(4, n_outputs)
        self.branches = branches
        self.across = across

    def forward(self, x):
        if self.branches and bool((x > 100).any()):
            x = x.clamp(max=100)
        h = self.norm(self.drop(self.inner(self.body(x).tanh())))
        if self.across and self.training:
            h = h - h.mean(0)
        return self.head(h)


class Small(nn.Module):
    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.head = nn.Linear(n_features, n_outputs)

    def forward(self, x):
        return self.head(x)


def own_loss(outputs, y):
    return nn.functional.cross_entropy(outputs, y, reduction="none")


def tune(model, **more):
    return gputune.tune(model, X, Y, **(OPTIONS | {"max_epochs": 3, "verbose": 0} | more))


@pytest.fixture(autouse=True)
def free_updates(monkeypatch):
    """Batch sizes train together if the module allows it, however small its frozen layers are."""
    monkeypatch.setattr(plan, "_LARGE_FROZEN", 0)


def apart(monkeypatch):
    monkeypatch.setattr(plan, "_why_apart", lambda *_: "this test asks for it")


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"class_weight": "balanced"},
        {"method": gputune.Halving(min_epochs=1, factor=2), "max_epochs": 4},
        {"method": gputune.PopulationBased(interval=1), "max_epochs": 4},
        {"schedule": "cosine", "backend": "eager"},
    ],
    ids=["plain", "class weights", "halving", "population based", "schedule"],
)
def test_a_search_has_the_scores_of_separate_batch_sizes(more, monkeypatch, capsys):
    together = tune(Body, scoring="neg_loss", **more, verbose=1)
    assert "the batch sizes 4, 6 and 16 train together" in capsys.readouterr().err
    apart(monkeypatch)
    separate = tune(Body, scoring="neg_loss", **more, verbose=1)
    assert "train separately, because this test asks for it" in capsys.readouterr().err
    assert np.array_equal(np.isnan(together.curves), np.isnan(separate.curves))
    np.testing.assert_allclose(together.curves, separate.curves, rtol=1e-9)
    assert len(np.unique(together.curves)) > 6


def test_adapters_of_different_ranks_and_batch_sizes_train_together(monkeypatch, capsys):
    base = nn.Sequential(
        nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2)
    )
    builder = gputune.lora(base.double(), targets=["0", "2"], modules_to_save=["4"])
    more = {"space": SPACE | {"rank": [2, 4], "alpha": [4, 8]}, "n_trials": 12}
    together = tune(builder, scoring="neg_loss", **more, verbose=1)
    assert "the batch sizes 4, 6 and 16 train together" in capsys.readouterr().err
    apart(monkeypatch)
    separate = tune(builder, scoring="neg_loss", **more)
    np.testing.assert_allclose(together.curves, separate.curves, rtol=1e-9)


@pytest.mark.parametrize(
    ("model", "more", "reason"),
    [
        (Body, {"module__p": [0.2]}, "the module draws random numbers in training"),
        (Body, {"module__norm": [True]}, "a training step of the module changes 'norm"),
        (Body, {"module__branches": [True]}, "the module branches on a tensor's value"),
        (Body, {"module__across": [True]}, "a row may affect the outputs of other rows"),
    ],
)
def test_the_plan_says_why_batch_sizes_train_separately(model, more, reason, capsys):
    tune(model, space=SPACE | more, max_epochs=1, verbose=1)
    assert f"the batch sizes 4, 6 and 16 train separately, because {reason}" in (
        capsys.readouterr().err
    )


def test_batch_sizes_without_large_frozen_layers_train_separately(monkeypatch, capsys):
    monkeypatch.undo()
    tune(Small, max_epochs=1, verbose=1)
    reason = "the shared frozen layers would save less than the additional updates take"
    assert f"train separately, because {reason}" in capsys.readouterr().err


def test_batch_sizes_of_a_head_on_a_large_body_train_together(monkeypatch, capsys):
    monkeypatch.undo()
    layers = [nn.Linear(6, 1024), nn.Tanh(), nn.Linear(1024, 1024), nn.Tanh(), nn.Linear(1024, 8)]
    body = nn.Sequential(*layers)
    monkeypatch.setattr(kept_features, "_check", refuse_features)
    tune(gputune.frozen(body), max_epochs=1, verbose=1)
    assert "the batch sizes 4, 6 and 16 train together" in capsys.readouterr().err


def refuse_features(*_):
    raise NotKept("this test asks for it")


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"loss": own_loss}, "only losses with a name are added up over pieces of a minibatch"),
        ({"augment": lambda x, generator: x}, "augment changes whole minibatches"),
        ({"backend": "loop"}, "they train one by one"),
    ],
)
def test_options_that_need_whole_minibatches_keep_batch_sizes_apart(more, reason, capsys):
    tune(Body, max_epochs=1, verbose=1, **more)
    assert f"train separately, because {reason}" in capsys.readouterr().err


def test_a_killed_search_continues_to_the_same_scores(tmp_path):
    class Kill(Callback):
        def on_epoch(self, curves):
            raise KeyboardInterrupt

    options = {"scoring": "neg_loss", "study": tmp_path / "study.db", "checkpoint_seconds": 1e-9}
    with pytest.raises(KeyboardInterrupt):
        tune(Body, **options, callbacks=[Kill()])
    resumed = tune(Body, **options)
    expected = tune(Body, scoring="neg_loss")
    assert np.array_equal(resumed.curves, expected.curves)
    assert len(resumed.trials) == 6


def test_members_in_compiled_code_train_one_batch_size_at_a_time():
    from gputune.engine.backends.base import TrialWork
    from gputune.engine.backends.selection import way_of
    from gputune.population.traits import Traits
    from problems import fill

    (config,) = fill({})
    work = TrialWork("module", config, Traits(coded=True), mixes_sizes=True)
    assert way_of("compiled", work) == ("recorded", "compiled code trains one batch size at a time")
