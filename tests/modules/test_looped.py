"""Modules that cannot be stacked train one by one: every member equals its plain loop, with the
same curves and states.
"""

import copy
import pickle
import threading
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import loguniform
from torch import nn
from torch.nn import functional

import gputune
from gputune.ground.errors import InputError
from gputune.modules.inspection import inspect_module, traits_of
from gputune.modules.looped import LoopChunk, LoopedModule
from gputune.modules.module import StackedModule
from gputune.modules.module_trial import ModuleTrial
from gputune.population.population import populations
from gputune.scoring.metrics import make_scoring
from problems import (
    Linear,
    Net,
    data_of,
    fill,
    grid,
    largest_difference,
    make_data,
    module_loop,
    train_modules,
    variant,
)
from refused import refused


class Gated(nn.Module):
    """Control flow on data, dropout, and a frozen parameter."""

    def __init__(self, n_features, n_outputs, hidden=6, p=0.0):
        super().__init__()
        self.enter = nn.Linear(n_features, hidden)
        self.leave = nn.Linear(hidden, n_outputs)
        self.other = nn.Linear(hidden, hidden)
        self.drop = nn.Dropout(p)
        self.scale = nn.Parameter(torch.full((n_features,), 0.7), requires_grad=False)

    def forward(self, x):
        h = torch.tanh(self.enter(x * self.scale))
        h = h + self.other(h) if h.sum() > 0 else h - self.other(h)
        return self.leave(self.drop(h))


class Recurrent(nn.Module):
    def __init__(self, n_features, n_outputs, kind=nn.GRU):
        super().__init__()
        self.cell = kind(1, 4, batch_first=True)
        self.norm = nn.BatchNorm1d(4)
        self.leave = nn.Linear(4, n_outputs)

    def forward(self, x):
        return self.leave(self.norm(self.cell(x[..., None])[0][:, -1]))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    backward = forward


WithFunction = variant(Linear, lambda self, x: Double.apply(Linear.forward(self, x)))


def with_hook(n_features, n_outputs):
    module = Linear(n_features, n_outputs)
    module.weight.register_hook(lambda slope: slope.clamp(-0.01, 0.01))
    return module


class InPlace(Linear):
    """Writes into a buffer at a place that the data say."""

    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)
        self.register_buffer("seen", torch.zeros(4, dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.seen[int(x[0, 0] > 0)] += 1
        return super().forward(x)


class Annealed(Linear):
    """Counts its steps in a number of its own, which evaluation reads too."""

    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)
        self.step = 0

    def forward(self, x):
        self.step += self.training
        return super().forward(x) / (1 + 0.1 * self.step)


class Normal(Linear):
    """Gives its weights other memory, and decides by a number that it draws."""

    def forward(self, x):
        self.weight.data = nn.functional.normalize(self.weight.data, dim=1)
        return super().forward(x * 2 if self.training and torch.rand(()) < 0.5 else x)


class Remembering(Linear):
    """Its outputs in training depend on a count of minibatches in a plain tensor."""

    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)
        self.seen = torch.zeros(())

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        self.seen = self.seen + 1
        return super().forward(x) / (1 + 0.1 * self.seen)


class Dropping(Linear):
    """Leaves a layer out by a number that it draws."""

    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)
        self.other = nn.Linear(n_features, n_outputs)

    def forward(self, x):
        return super().forward(x) + (self.other(x) if self.training and torch.rand(()) < 0.5 else 0)


MODULES = {
    "control flow": (partial(Gated, p=0.3), "data-dependent control flow"),
    "gru": (Recurrent, ""),
    "lstm": (partial(Recurrent, kind=nn.LSTM), ""),
    "function": (WithFunction, "vmap"),
    "hook": (with_hook, "parameter 'weight' has a hook"),
    "in place": (InPlace, ""),
    "number": (Annealed, "its forward changes 'step', which members would share"),
    "other memory": (Normal, "accessing `data`"),
    "plain tensor": (Remembering, "another gradient"),
}


trained = partial(train_modules, LoopedModule)


OPTIMIZERS = ("nesterov", "adamw", "adamhd", "NAdam")
SHORT = [("control flow", name) for name in OPTIMIZERS] + [(name, "adamw") for name in MODULES]


@pytest.mark.parametrize(("name", "optimizer"), grid(MODULES, OPTIMIZERS, short=SHORT))
def test_a_member_equals_its_plain_loop(name, optimizer):
    build, reason = MODULES[name]
    data = make_data(weights=True)
    configs = fill(
        *({"optimizer": optimizer, "lr": lr, "batch_size": b} for lr, b in ((1e-3, 7), (1e-2, 500)))
    )
    assert reason in traits_of(build, configs[0], data).unstackable
    for population in populations(configs, "module", rows=len(data.folds[0].train)):
        configs = list(population.configs)
        members = trained(build, configs, data, 4)
        for c, config in enumerate(configs):
            alone = module_loop(build, data, 1, config, 4)
            assert largest_difference(members.member(1, c), alone) <= 1e-8
            assert getattr(members.member(1, c), "step", 0) == getattr(alone, "step", 0)


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam", "adamw", "NAdam"])
def test_a_parameter_that_a_step_does_not_use_is_left_as_it_is(optimizer):
    """As zero_grad() of PyTorch's has it, also after a resume: no decay, no momentum, no count of a
    step."""
    data = make_data()
    configs = fill({"optimizer": optimizer, "lr": 0.01, "batch_size": 7, "weight_decay": 0.1})
    traits = traits_of(Dropping, configs[0], data)
    reason = "it uses its parameter 'other.bias' only in some training steps"
    assert traits.unstackable == reason
    begun = trained(Dropping, configs, data, 2)
    found = trained(Dropping, configs, data, 5, begin=begun.state).member(1, 0)
    assert largest_difference(found, module_loop(Dropping, data, 1, configs[0], 5)) <= 1e-8


class Turning(nn.Module):
    """A layer of complex weights, held as such or as their parts."""

    def __init__(self, n_features, n_outputs, parts):
        super().__init__()
        weight = torch.randn(n_features, n_outputs, 2)
        self.weight = nn.Parameter(weight if parts else torch.view_as_complex(weight))

    def forward(self, x):
        weight = self.weight if self.weight.is_complex() else torch.view_as_complex(self.weight)
        return (x.to(weight.dtype) @ weight).abs()


@pytest.mark.parametrize("more", [{}, {"lr_factor__weight": 0.5}, {"optimizer": "RAdam"}])
def test_complex_weights_train_as_their_real_and_imaginary_parts(more):
    data = make_data()
    configs = fill({"lr": 0.01, "batch_size": 7, **more})
    whole, parts = (
        trained(partial(Turning, parts=parts), configs, data, 3).member(1, 0)
        for parts in (False, True)
    )
    torch.testing.assert_close(
        torch.view_as_real(whole.weight), parts.weight, rtol=1e-10, atol=1e-10
    )
    reason = traits_of(partial(Turning, parts=False), configs[0], data).unstackable
    assert reason == "its 'weight' holds complex numbers that change"


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [("adamw", "constant"), ("sgd", "cosine"), ("nesterov", "constant"), ("rmsprop", "one_cycle")],
)
def test_looped_equals_stacked(optimizer, schedule):
    """The same curves and members, for a module that can be either; each goes on from the other's
    state."""

    def build(n_features, n_outputs):
        return nn.Sequential(
            nn.Linear(n_features, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, n_outputs)
        )

    data = make_data("regression")
    configs = [
        c
        | {
            "schedule": schedule,
            "weight_decay": 0.1,
            "momentum": 0.0 if optimizer == "nesterov" else 0.9,
        }
        for c in fill(
            *({"batch_size": 16, "lr": lr, "optimizer": optimizer} for lr in (1e-3, 1e-2))
        )
    ]

    def run(kind, epochs, **begin):
        scoring = make_scoring(None, "regression", None)
        return train_modules(
            kind, build, configs, data, epochs, horizon=6, scoring=scoring, **begin
        )

    one, other = (run(kind, 3) for kind in (StackedModule, LoopedModule))
    whole = run(StackedModule, 6)
    np.testing.assert_allclose(other.curves, one.curves, rtol=1e-7)
    for kind, state in ((LoopedModule, one.state), (StackedModule, other.state)):
        resumed = run(kind, 6, begin=state)
        np.testing.assert_allclose(resumed.curves[:, 3:], whole.curves[:, 3:], rtol=1e-7)
        torch.testing.assert_close(
            resumed.state.buffers[0], whole.state.buffers[0], rtol=1e-7, atol=1e-8
        )


@pytest.mark.parametrize("optimizer", ["adamw", "sgdhd", "RAdam", "Adafactor"])
def test_halving_and_a_resume_change_nothing(optimizer):
    data = make_data()
    configs = fill(
        *({"batch_size": 16, "lr": lr, "optimizer": optimizer} for lr in (1e-3, 1e-2, 1e-1))
    )
    for build in (Recurrent, Annealed):
        whole, begun = (trained(build, configs, data, epochs) for epochs in (6, 2))
        resumed = trained(build, configs[1:], data, 6, begin=begun.state.select([1, 2]))
        for f in range(data.n_folds):
            for c in range(2):
                one = resumed.member(f, c)
                other = whole.member(f, c + 1)
                assert largest_difference(one, other) <= 1e-9
                assert getattr(one, "step", 0) == getattr(other, "step", 0)


def test_a_member_that_diverges_leaves_the_others_as_they_are():
    data = make_data("regression")
    configs = fill(*({"batch_size": 16, "lr": lr, "optimizer": "sgd"} for lr in (1e-3, 1e30)))
    scoring = make_scoring(None, "regression", None)
    both, alone = (trained(Gated, own, data, 4, scoring=scoring) for own in (configs, configs[:1]))
    assert both.alive == (0,) and np.isnan(both.curves[1]).any()
    np.testing.assert_array_equal(both.curves[0], alone.curves[0])


def rows():
    return torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3


def search(model, **words):
    X, y = rows()
    space = {"lr": [1e-3, 1e-2], "batch_size": [16]}
    options = {
        "space": space,
        "cv": 2,
        "max_epochs": 4,
        "n_trials": 2,
        "include_default": False,
        "verbose": 0,
    }
    return gputune.tune(model, X, y, **options | words)


def pretrained():
    torch.manual_seed(3)
    backbone = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh())
    backbone(torch.randn(20, 4))
    return backbone


class Headed(nn.Module):
    def __init__(self, n_outputs, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(8, n_outputs)

    def forward(self, x):
        return self.head(self.backbone(x))


def alike(backbone, copies):
    """Return functions that give the backbone in each module, or copies of it."""
    given = copy.deepcopy if copies else lambda part: part
    whole = nn.Sequential(backbone, nn.Linear(8, 3))
    return {
        "attribute": lambda n_outputs: Headed(n_outputs, given(backbone)),
        "sequence": lambda n_outputs: nn.Sequential(given(backbone), nn.Linear(8, n_outputs)),
        "same": lambda: given(whole),
        "argument": Headed
        if not copies
        else lambda n_outputs, backbone: Headed(n_outputs, given(backbone)),
    }


@pytest.mark.parametrize(
    "words", [{"backend": "loop"}, {"backend": "stacked"}, {"optimizer": ["RAdam"]}], ids=repr
)
@pytest.mark.parametrize("name", ["attribute", "sequence", "same", "argument"])
def test_a_pretrained_part_that_modules_share_is_copied_for_each_member(name, words):
    """Members and folds that train one parameter see each other's validation rows."""
    found = []
    space = {"lr": [1e-3, 1e-1], "batch_size": [16], "optimizer": words.get("optimizer", ["adamw"])}
    for copies in (False, True):
        backbone = pretrained()
        build = alike(backbone, copies)[name]
        if name == "argument":
            space = space | {"module__backbone": [backbone]}
        study = search(
            build, space=space, scoring="neg_log_loss", backend=words.get("backend", "auto")
        )
        found.append([trial.fold_scores for trial in study.trials])
        for key, value in pretrained().state_dict().items():
            assert torch.equal(backbone.state_dict()[key], value), key
        assert len(pickle.dumps(copy.deepcopy(backbone)))
    np.testing.assert_array_equal(*found)
    assert np.isfinite(found).all()


def test_a_saved_model_of_a_shared_part_has_one_for_each_member(tmp_path):
    build = alike(pretrained(), False)["sequence"]
    model = search(build).ensemble()
    model.save(tmp_path / "model")
    again = gputune.load_model(tmp_path / "model", module=build)
    np.testing.assert_array_equal(again.predict_proba(rows()[0]), model.predict_proba(rows()[0]))


@pytest.mark.parametrize("how", ["lock", "hook"])
def test_a_shared_part_that_cannot_be_copied_is_refused(how):
    backbone = pretrained()
    if how == "lock":
        backbone.lock = threading.Lock()
    else:
        backbone[0].weight.register_hook(lambda slope: 2 * slope)
    with refused(
        r"modules of .* share '0\.0\.weight', .* copy\.deepcopy of a module raised .*Create the shared part"
    ):
        search(alike(backbone, False)["sequence"])


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch.compile's own
def test_of_a_compiled_module_the_module_itself_trains():
    def compiled(n_features, n_outputs):
        return torch.compile(Gated(n_features, n_outputs))

    with pytest.warns(
        gputune.InputWarning, match=r"compiled returns torch\.compile\(module\)\. .*Leave torch"
    ):
        found = search(compiled)
    assert [t.fold_scores for t in found.trials] == [t.fold_scores for t in search(Gated).trials]


def convolutions(n_outputs):
    blocks = (
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
        for a, b in ((3, 16), (16, 32), (32, 64))
    )
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(1024, n_outputs))


@pytest.mark.parametrize(
    "seed", [pytest.param(s, marks=() if s == 5 else pytest.mark.long) for s in range(10)]
)
def test_rounding_does_not_make_members_train_one_by_one(seed):
    """Of units that are on or off by rounding alone, images of some seeds have one."""
    torch.manual_seed(seed)
    images = torch.randn(31, 3, 32, 32)
    y = torch.randint(10, (31,))
    traits = inspect_module(ModuleTrial(convolutions, *fill({}), data_of(images, 10, y)))
    assert traits.unstackable == ""


class Hiding(Remembering):
    """Takes single precision alone, and draws."""

    def forward(self, x):
        if self.weight.dtype != torch.float32:
            raise TypeError("float32 alone")
        return super().forward(functional.dropout(x, 0.2, self.training))


@pytest.mark.parametrize(
    ("build", "says"), [(Remembering, "it has"), (Hiding, "it draws random numbers, and has")]
)
def test_a_gradient_that_differs_by_more_than_rounding_is_found_in_single_precision(build, says):
    traits = inspect_module(ModuleTrial(build, *fill({}), data_of(rows()[0], 3)))
    assert (
        traits.unstackable == f"{says} another gradient for stacked members than for single members"
    )


def noisy_step(module, batch):
    x, y = batch
    return functional.cross_entropy(module(x + torch.randn_like(x)[torch.randperm(len(x))]), y)


def test_a_training_step_that_draws_has_the_same_draws_alone_and_stacked():
    words = {"training_step": noisy_step, "scoring": "neg_log_loss"}
    found = [
        search(Net, backend=backend, **words).curves for backend in ("loop", "loop", "stacked")
    ]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_allclose(found[0], found[2], rtol=1e-5)


def test_an_average_of_the_weights_is_scored_alone_as_it_is_stacked():
    words = {
        "space": {"lr": [1e-2, 0.1], "batch_size": [16], "ema": [0.9]},
        "scoring": "neg_log_loss",
    }
    loop, stacked = (
        search(Linear, backend=backend, **words).curves for backend in ("loop", "stacked")
    )
    np.testing.assert_allclose(loop, stacked, rtol=1e-5)


def test_a_training_step_that_branches_on_a_draw_has_the_same_draws_alone_and_stacked():
    def step(module, batch):
        return noisy_step(module, batch) * (2 if torch.rand(()).item() < 0.5 else 1)

    words = {"training_step": step, "scoring": "neg_log_loss", "dtype": "float64"}
    words |= {"space": {"optimizer": ["sgd"], "lr": [0.01, 0.1]}}
    loop, stacked = (
        search(Net, backend=backend, **words).curves for backend in ("loop", "stacked")
    )
    np.testing.assert_allclose(loop, stacked, rtol=1e-10)


def test_a_search_says_what_trains_one_by_one_and_why(capsys):
    study = search(Gated, verbose=1)
    said = capsys.readouterr().err
    sentence = (
        "note: Gated trains one by one, because its members cannot be stacked: its forward says: "
        "vmap: It looks"
    )
    assert (
        said.count(sentence) == 1 and "2 trials in 2 chunks of 1" in said and ", loop (its" in said
    )
    assert any("one by one" in note for note in study.record.notes)
    assert isinstance(study.best_model().module, Gated)


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        (
            Gated,
            {"backend": "stacked"},
            "backend='stacked': the members of Gated cannot be stacked: .*backend='auto'",
        ),
        ("mlp", {"backend": "loop"}, "backend='loop' trains the members of your own module"),
        (
            Gated,
            {"method": "hypergradient", "space": {"lr": loguniform(1e-3, 1e-1)}},
            "members of Gated train one by one, because.*Hypergradients need stacked members",
        ),
        (
            Linear,
            {"backend": "stacked", "optimizer": "RAdam"},
            "backend='stacked' trains .*, but torch.optim.RAdam updates only one member",
        ),
        (
            Linear,
            {"method": "hypergradient", "optimizer": "RAdam"},
            "cannot differentiate optimizer='RAdam', which trial 0 has",
        ),
        (
            Linear,
            {"method": "hypergradient", "space": {"optimizer__eps": [1e-6], "lr": [1e-3]}},
            "optimizer__eps=1e-06, which trial 0 passes to a class of torch.optim",
        ),
        (
            "mlp",
            {"space": {"optimizer": ["adam", "RAdam"]}},
            "torch.optim.RAdam updates only .*model='mlp' trains all members",
        ),
    ],
)
def test_what_cannot_be_had_is_refused(model, words, message):
    with pytest.raises(InputError, match=message):
        search(model, **words)


def test_a_class_of_torch_optim_trains_one_by_one_in_a_search(tmp_path, capsys):
    """By type and by name, its arguments searched, with halving, a study, a resume, a refit and a
    page."""
    betas = [(0.9, 0.999), (0.8, 0.99)]
    space = {
        "optimizer": [torch.optim.RAdam, "adam"],
        "optimizer__betas": betas,
        "lr": [1e-3, 1e-1],
    }
    words = {
        "space": space,
        "n_trials": 8,
        "method": "halving",
        "study": tmp_path / "study.db",
        "verbose": 1,
    }
    study = search(Linear, **words)
    said = capsys.readouterr().err
    for name in ("RAdam", "Adam"):
        sentence = (
            f"trials train one by one, because torch.optim.{name} updates only one member at a time"
        )
        assert said.count(sentence) == 1 and any(sentence in note for note in study.record.notes)
    assert "8 trials in 8 chunks of 1" in said and "loop (torch.optim.RAdam updates" in said
    again = gputune.Study.open(tmp_path / "study.db")
    assert [t.params for t in again.trials] == [t.params for t in study.trials]
    assert (
        search(Linear, **words, include=[{"optimizer": "RAdam", "lr": 3e-3}]).best_score
        >= study.best_score
    )
    model = again.best_model(*rows())
    alone = next(t for t in study.trials if t.params["optimizer"] == "RAdam")
    assert isinstance(model.module, Linear) and alone.params["optimizer__betas"] in betas
    again.report(tmp_path / "page.html")
    assert "optimizer__betas" in (tmp_path / "page.html").read_text()


def test_an_epoch_does_not_join_the_states_of_all_members(monkeypatch):
    """Only a checkpoint needs one tensor with the optimizer's state of all members."""
    calls = []
    moments = LoopChunk.moments
    counted = property(lambda chunk: calls.append(chunk) or moments.fget(chunk))
    monkeypatch.setattr(LoopChunk, "moments", counted)
    configs = fill({"batch_size": 16, "lr": 0.01})
    trained = train_modules(LoopedModule, Gated, configs, make_data(), 3, backend="loop")
    assert not calls
    assert trained.state.epoch == 3
    assert calls
