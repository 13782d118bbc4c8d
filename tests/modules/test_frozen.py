"""A frozen body with a trained head, and kept features: equal to training without them."""

import gc
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import gputune
from gputune.modules import kept_features
from gputune.modules.inspection import traits_of
from gputune.modules.kept_features import NotKept, find_calls, with_kept_features
from gputune.modules.looped import LoopedModule
from gputune.modules.module import StackedModule
from problems import fill, make_data, rows_of, shape_of, train_modules

X = torch.randn(60, 2, 5, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0, :2].sum(1) > 0).long()
ROWS = []  # the number of rows in each call of a body
WORDS = {"cv": 2, "verbose": 0, "max_epochs": 2, "random_state": 0}


def refused(*words):
    """A check of refusals: an InputError with these words, in this order, in its message."""
    return pytest.raises(gputune.InputError, match=".*".join(map(re.escape, words)))


class Body(nn.Module):
    """A body with dropout and batch norm, which stay in evaluation mode."""

    def __init__(self, d=5):
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(d, 12)
        self.norm = nn.BatchNorm1d(12)
        self.drop = nn.Dropout(0.5)
        self.norm.running_mean.uniform_(-1, 1)

    def forward(self, x):
        ROWS.append(len(x))
        return self.drop(self.norm(self.enter(x.flatten(1)).tanh()))


class Head(nn.Module):
    def __init__(self, n_features, n_outputs, hidden=6):
        super().__init__()
        self.inner = nn.Linear(n_features, hidden)
        self.outer = nn.Linear(hidden, n_outputs)

    def forward(self, x):
        return self.outer(self.inner(x).relu())


class Tower(nn.Module):
    """A frozen stem, two blocks, and a head: a base for adapters in the last block."""

    def __init__(self, drop=0.0):
        super().__init__()
        torch.manual_seed(1)
        self.places = nn.Parameter(torch.randn(2, 5))
        self.blocks = nn.ModuleList([nn.Linear(5, 8), nn.Linear(8, 8)])
        self.drop = nn.Dropout(drop)
        self.last = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        h = x + self.places
        for block in self.blocks:
            h = self.drop(block(h).tanh())
        return self.head(self.last(h).relu().mean(1))


def tower_lora(drop=0.0, **words):
    base = Tower(drop).double()
    return gputune.lora(base, targets=["last"], modules_to_save=["head"], **words)


@pytest.mark.parametrize("kind", [StackedModule, LoopedModule])
def test_a_head_equals_a_loop_in_plain_pytorch(kind):
    data = make_data(dtype=torch.float64)
    body = Body(data.n_features).double()
    builder = gputune.frozen(body, Head)
    configs = fill(
        {"lr": 3e-3, "weight_decay": 0.0, "batch_size": 8},
        {"lr": 1e-3, "weight_decay": 0.1, "batch_size": 8},
    )
    backend = "loop" if kind is LoopedModule else "eager"
    trained = train_modules(kind, builder, configs, data, 4, backend=backend)
    start = kind(builder, configs, shape_of(data), seed=0).starts()[0]
    body.eval()
    for f in range(data.n_folds):
        x, y, _ = rows_of(data, f)
        for c, config in enumerate(configs):
            head = Head(12, data.n_outputs).double()
            head.load_state_dict(
                {name: start[f"module.head.{name}"].clone() for name in head.state_dict()}
            )
            optimizer = torch.optim.AdamW(
                head.parameters(), lr=config["lr"], weight_decay=config["weight_decay"]
            )
            for epoch in range(4):
                generator = gputune.ground.seeding.stream(0, "rows", len(x), epoch)
                for rows in torch.randperm(len(x), generator=generator).split(8):
                    optimizer.zero_grad()
                    with torch.no_grad():
                        features = body(x[rows])
                    functional.cross_entropy(head(features), y[rows]).backward()
                    optimizer.step()
            member = trained.member(f, c)
            assert torch.allclose(member(x), head(body(x)), rtol=1e-10, atol=1e-10)
            assert member.module.body.enter.weight.data_ptr() == body.enter.weight.data_ptr()


def test_features_of_a_body_are_computed_once():
    ROWS.clear()
    body = Body(10)
    space = {"lr": [1e-3, 1e-2], "module__hidden": [4, 6], "batch_size": [8]}
    words = WORDS | {"max_epochs": 20}
    study = gputune.tune(gputune.frozen(body, Head), X, Y, space=space, **words)
    assert len(study.trials) == 4
    # 4 trials x 20 epochs without kept features; the module is tried on 31 rows a few times
    assert ROWS.count(60) == 1 and sum(ROWS) < 20 * 60
    model = study.best_model()
    assert isinstance(model.module.module.head, Head)
    assert model.predict(X.numpy()).shape == (60,)


@pytest.mark.parametrize("builder", [lambda: gputune.frozen(Body(10).double()), tower_lora])
def test_a_search_with_kept_features_equals_a_search_without(builder, monkeypatch):
    space = {"lr": [1e-3, 1e-2], "batch_size": [8]}
    words = WORDS | {"space": space, "scoring": "neg_log_loss", "max_epochs": 4, "dtype": "float64"}
    kept = gputune.tune(builder(), X, Y, **words)

    def refuse(*_):
        raise NotKept("a test")

    monkeypatch.setattr("gputune.modules.kept_features._check", refuse)
    plain = gputune.tune(builder(), X, Y, **words)
    for trial, other in zip(kept.trials, plain.trials, strict=True):
        assert trial.score == pytest.approx(other.score, rel=1e-12)


def dataset(builder, **words):
    """The data of a search after the features were kept, and the text of the plan."""
    data = make_data(n=40, d=10)
    inputs = torch.randn(1, 40, 2, 5, generator=torch.Generator().manual_seed(0))
    data = replace(data, inputs=(inputs,), scaling=(None,), copies=(0,) * data.n_folds, **words)
    return with_kept_features(builder, fill({"lr": 1e-3}), data)


def test_only_features_that_a_later_layer_reads_are_kept():
    data, text = dataset(tower_lora())
    assert data.names == ("gputune_input_0", "gputune_kept_0"), text
    assert data.inputs[1].shape == (1, 40, 2, 8)  # of the second block only
    assert text == "features of frozen layers are kept (5.0 KiB)"
    data, _ = dataset(gputune.frozen(Body(10)))
    assert data.names == ("gputune_kept_0",)
    assert data.inputs[0].shape == (1, 40, 12)


def test_a_base_inside_of_a_trained_module_is_stacked_with_kept_features():
    class Classifier(nn.Module):
        """The blocks are in a submodule, like the encoder in a classifier of transformers."""

        def __init__(self):
            super().__init__()
            self.tower = Tower()
            self.score = nn.Linear(2, 3)

        def forward(self, x):
            return self.score(self.tower(x))

    builder = gputune.lora(Classifier(), targets=["last"], modules_to_save=["score"])
    data, text = dataset(builder)
    assert text == "features of frozen layers are kept (2.5 KiB)"
    traits = traits_of(builder, fill({"lr": 1e-3})[0], data)
    assert not traits.unstackable and traits.common_rows


def test_inputs_with_names_keep_their_names():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(5, 8)
            self.last = nn.Linear(8, 2)

        def forward(self, mask, input_ids):
            return self.last(self.inner(input_ids).tanh()).mean(1) * mask

    builder = gputune.lora(Named().double(), targets=["last"])
    data = make_data(n=40, d=10, k=2)
    rows = torch.randn(1, 40, 2, 5, dtype=torch.float64)
    mask = torch.rand(1, 40, 1, dtype=torch.float64)
    inputs = {"input_ids": rows, "mask": mask}  # in another order than the arguments
    data = replace(
        data,
        inputs=tuple(inputs.values()),
        names=tuple(inputs),
        scaling=(None,) * 2,
        copies=(0,) * data.n_folds,
        dtype=torch.float64,
    )
    kept, text = with_kept_features(builder, fill({"lr": 1e-3}), data)
    assert kept.names == ("input_ids", "mask", "gputune_kept_0"), text
    module = builder()
    names = {name: x[0] for name, x in zip(kept.names, kept.inputs, strict=True)}
    expected = module(input_ids=rows[0], mask=mask[0])
    assert torch.allclose(module(**names), expected, rtol=1e-12, atol=1e-12)


def test_the_plan_says_why_features_are_not_kept(monkeypatch):
    data, text = dataset(tower_lora(drop=0.1))
    assert data.names is None
    assert text == (
        "features of frozen layers are not kept: 'drop', which comes before the first trained "
        "layer, has other outputs in training than in evaluation, such as with dropout"
    )
    first = gputune.lora(Tower(), targets=[r"blocks.0"], modules_to_save=["head"])
    _, text = dataset(first)
    assert text.endswith(
        "no frozen linear or convolution layer comes before the first trained layer"
    )
    monkeypatch.setattr("gputune.modules.kept_features.free_memory", lambda: 4000)
    _, text = dataset(tower_lora())
    assert text.endswith("they take 5.0 KiB, and only 1.0 KiB of memory are for them")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_features_on_disk_are_mapped_and_deleted_with_their_tensors(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("gputune.modules.kept_features.free_memory", lambda: 0)
    body = Body(10).to(dtype)
    expected, _ = dataset(gputune.frozen(body, features_folder=None))
    assert expected.names is None
    kept, text = dataset(gputune.frozen(body, features_folder=tmp_path))
    (file,) = tmp_path.iterdir()
    assert text.startswith("features of frozen layers are kept on disk (")
    with torch.no_grad():
        outputs = body.eval()(expected.inputs[0][0].to(dtype))
    assert kept.inputs[0].dtype == dtype and torch.allclose(kept.inputs[0][0], outputs)
    assert file.stat().st_size == kept.inputs[0].nbytes
    del kept
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_search_with_features_on_disk_equals_a_search_with_features_in_memory(tmp_path, workers):
    words = WORDS | {"space": {"lr": [1e-3, 1e-2], "batch_size": [8]}, "workers": workers}
    torch.manual_seed(0)
    base = nn.Sequential(nn.Flatten(), nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 2))
    curves = []
    for folder in (None, str(tmp_path)):
        body = gputune.frozen(base[:3], features_folder=folder)
        adapters = gputune.lora(base, targets=["3"], features_folder=folder)
        curves.append([gputune.tune(builder, X, Y, **words).curves for builder in (body, adapters)])
    assert np.array_equal(curves[0], curves[1])
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_folder_for_features_is_checked(tmp_path, monkeypatch):
    for folder in (tmp_path / "missing", 3):
        with refused("features_folder", "must be an existing folder", "Create it, or leave it out"):
            gputune.frozen(Body(), features_folder=folder)
        with refused("features_folder", "must be an existing folder"):
            tower_lora(features_folder=folder)
    usage = SimpleNamespace(free=1 << 10)
    monkeypatch.setattr("gputune.modules.kept_features.shutil.disk_usage", lambda folder: usage)
    _, text = dataset(tower_lora(features_folder=tmp_path))
    assert text.endswith(f"they take 5.0 KiB, and {str(tmp_path)!r} has only 1.0 KiB of free space")
    with pytest.raises(NotKept, match="features_folder is only for training on the CPU"):
        kept_features._check_size(1, torch.device("cuda"), tmp_path)


@pytest.mark.parametrize("numbers", ["standard", "none"])
def test_features_of_inputs_that_each_fold_scales_are_not_kept(numbers, capsys):
    ROWS.clear()
    words = WORDS | {"numbers": numbers, "verbose": 1, "space": {"lr": [1e-3], "batch_size": [8]}}
    study = gputune.tune(gputune.frozen(Body(10)), X.flatten(1), Y, **words)
    assert len(study.trials) == 1
    is_scaled = "the inputs are scaled by the training rows of each fold" in capsys.readouterr().err
    assert is_scaled == (numbers == "standard")


def test_rows_that_see_each_other_are_not_kept():
    class Centered(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter = nn.Linear(5, 4)

        def forward(self, x):
            h = self.enter(x).mean(1)
            return h - h.mean(0)

    _, text = dataset(gputune.frozen(Centered()))
    assert text.endswith("the rows of a minibatch change each other's outputs in 'body'")


def test_a_frozen_layer_behind_a_trained_tensor_is_not_kept():
    class Tied(nn.Module):
        """Reads a trained weight before a frozen layer, without a call of the trained layer."""

        def __init__(self):
            super().__init__()
            self.head = nn.Linear(5, 5)
            self.frozen = nn.Linear(5, 5).requires_grad_(False)

        def forward(self, x):
            return self.head(self.frozen(x @ self.head.weight))

    x = torch.randn(6, 5)
    module = Tied()
    with pytest.raises(NotKept, match="returns other outputs with kept features"):
        find_calls(module, lambda rows, training: module.train(training)(x[rows]), 6)


def test_searched_targets_keep_no_features():
    builder = tower_lora()
    data, _ = dataset(builder)
    configs = fill({"module__targets": ["last"]}, {"module__targets": ["blocks.1"]})
    data = make_data(n=40, d=10)
    _, text = with_kept_features(builder, configs, data)
    assert text.endswith("trials adapt different layers (module__targets)")


def test_a_saved_head_needs_its_base(tmp_path):
    body = Body(10)
    space = {"lr": [1e-2], "batch_size": [8]}
    for head, words in ((None, {"base": body}), (Head, {"module": gputune.frozen(body, Head)})):
        study = gputune.tune(gputune.frozen(body, head), X, Y, space=space, **WORDS)
        model = study.best_model()
        folder = tmp_path / str(head is None)
        model.save(folder)
        loaded = gputune.load_model(folder, **words)
        assert (loaded.predict_proba(X.numpy()) == model.predict_proba(X.numpy())).all()
        with refused("needs the pretrained base of this head", "base=...) with the base"):
            gputune.load_model(folder)
    with refused("does not give the class or function Head", "module=gputune.frozen(base, Head)"):
        gputune.load_model(folder, base=body)
    other = Body(10)
    other.enter.weight.data += 1e-3
    with refused("has other weights than the base"):
        gputune.load_model(folder, module=gputune.frozen(other, Head))
    with refused("A BodyAndHead has no adapter", "Search gputune.lora(base)"):
        model.save_adapter(tmp_path / "adapter")


def test_a_resumed_search_of_a_head_equals_an_uninterrupted_one(tmp_path):
    body = Body(10)
    space = {"lr": [1e-3, 1e-2, 3e-2], "batch_size": [8]}
    words = WORDS | {"space": space}
    file = tmp_path / "study.db"
    gputune.tune(gputune.frozen(body), X, Y, study=file, **(words | {"timeout": 1e-9}))
    resumed = gputune.tune(gputune.frozen(body), X, Y, study=file, **words)
    whole = gputune.tune(gputune.frozen(body), X, Y, **words)
    assert [t.score for t in resumed.trials] == [t.score for t in whole.trials]


def test_bad_bodies_and_heads_are_refused():
    with refused("base", "must be a torch.nn.Module with its weights", "not its class"):
        gputune.frozen(Body)
    with refused("base", "is a Flatten without parameters", "compute the features yourself"):
        gputune.frozen(nn.Flatten())
    with refused("head", "must be a class or function", "Pass the class"):
        gputune.frozen(Body(), nn.Linear(12, 2))
    with refused("head", "must return a torch.nn.Module", "got list", "Return the module."):
        gputune.tune(gputune.frozen(Body(10), lambda n_outputs: []), X, Y, **WORDS)
    with refused("base", "raised RuntimeError on two rows of zeros", "takes the inputs of X"):
        gputune.tune(gputune.frozen(Body(3)), X, Y, **WORDS)

    class Pair(Body):
        def forward(self, x):
            return super().forward(x), x

    with refused("base", "must return one tensor with the features", "got tuple", "calls Pair"):
        gputune.tune(gputune.frozen(Pair(10)), X, Y, **WORDS)
