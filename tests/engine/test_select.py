"""A chunk whose trials are kept, repeated and re-configured trains each trial as a plain loop with a
piecewise schedule does."""

import itertools
import math

import numpy as np
import pytest
import torch

import reference
from gputune.engine.members import MemberChunk
from gputune.engine.mlp import StackedMLP
from gputune.ground.seeding import stream, stream_seed
from gputune.models import MLP
from gputune.modules.looped import LoopedModule
from gputune.modules.module import StackedModule
from gputune.modules.recorder import CpuRecorder
from gputune.native import library
from gputune.population.state import Selection, State
from gputune.scoring.objective import Objective
from problems import (
    Net,
    fill,
    largest_difference,
    make_data,
    needs_compiled_code,
    rows_of,
    scoring_of,
    shape_of,
    train,
    train_modules,
)

EPOCHS = 5  # of the horizon of the schedules
CHANGES = 2, 3  # epochs after which trials are selected
KEYS = {"lr": "lr", "weight_decay": "weight_decay", "momentum": "momentum"}


def plain_loop(module, forward, x, y, segments):
    """Train a module; after a segment's epochs, the optimizer goes on with new hyperparameters."""
    optimizer = reference.make_optimizer(module, segments[0][0])
    (group,) = optimizer.param_groups
    average = None
    epoch = 0
    for config, epochs in segments:
        group.update({name: config[key] for key, name in KEYS.items() if name in group})
        size = min(config["batch_size"], len(x))
        steps = math.ceil(len(x) / size)
        for epoch in range(epoch, epoch + epochs):  # noqa: B020
            order = torch.randperm(len(x), generator=stream(0, "rows", len(x), epoch))
            for step, rows in enumerate(order.split(size)):
                at = (epoch + step / steps) / EPOCHS
                if config["schedule"] == "cosine":
                    group["lr"] = config["lr"] * 0.5 * (1 + math.cos(math.pi * at))
                outputs = forward(x[rows], epoch, step, config["dropout"])
                loss = torch.nn.functional.cross_entropy(
                    outputs, y[rows], label_smoothing=config.get("loss__label_smoothing", 0.0)
                )
                optimizer.zero_grad()
                loss.backward()
                if config["clip_norm"] < math.inf:
                    torch.nn.utils.clip_grad_norm_(module.parameters(), config["clip_norm"])
                optimizer.step()
                now = [p.detach().clone() for p in module.parameters()]
                if config["ema"]:
                    share = 1 if average is None else 1 - config["ema"]
                    average = [a.lerp(p, share) for a, p in zip(average or now, now)]
        epoch += 1
    if average is not None:
        for parameter, value in zip(module.parameters(), average):
            parameter.data.copy_(value)
    return module


def lineages(configs, selections):
    """The segments of each trial that is left: a list of (configuration, epochs)."""
    segments = [[(config, 0)] for config in configs]
    epoch = 0
    for after, selection in [*selections, (EPOCHS, None)]:
        for parts in segments:
            parts[-1] = (parts[-1][0], after - epoch)
        epoch = after
        if selection is None:
            return segments
        slots = selection.trials if selection.slots is None else selection.slots
        parents = [list(segments[slot]) for slot in slots]
        for parts, config in zip(parents, selection.configs or itertools.repeat(None)):
            parts.append((config or parts[-1][0], 0))
        segments = parents


def select_at(selections):
    """What trains after each epoch."""
    decisions = dict(selections)
    return lambda trained: decisions.get(trained.epochs, False)


def changed(config, **values):
    return {**config, **values}


def selections_of(configs, **values):
    """Repeat trial 0 with other values, keep trial 2; then drop the middle one."""
    new = changed(configs[0], **values)
    return [
        (CHANGES[0], Selection((0, 1, 2), (0, 0, 2), (None, new, None))),
        (CHANGES[1], Selection((1, 2))),
    ]


CASES = {
    "adamw": ({"optimizer": "adamw", "weight_decay": 0.1}, {"lr": 0.02, "weight_decay": 0.05}),
    "a decay begins": ({"optimizer": "adamw", "weight_decay": 0.0}, {"weight_decay": 0.2}),
    "momentum": ({"optimizer": "nesterov", "momentum": 0.8}, {"momentum": 0.6, "lr": 0.03}),
    "clipping": ({"optimizer": "sgd", "clip_norm": 1.0}, {"clip_norm": 0.1}),
    "average": ({"optimizer": "adamw", "ema": 0.9}, {"ema": 0.5, "schedule": "cosine"}),
    "batch size": ({"optimizer": "adamw", "schedule": "cosine"}, {"batch_size": 16, "lr": 0.02}),
    "dropout begins": ({"optimizer": "adam"}, {"dropout": 0.2, "batch_size": 11}),
}


def configs_of(values, **more):
    rates = ({"lr": lr, "batch_size": 9, **more, **values} for lr in (0.01, 0.02, 0.03))
    return fill(*rates)


def trained_mlps(data, configs, selections, **more):
    network = StackedMLP("mlp", configs, shape_of(data), seed=0)
    options = {"seed": 0, "epochs": EPOCHS, "horizon": EPOCHS, "scoring": scoring_of(data)}
    after = select_at(selections)
    return train(network, data, configs, after_epoch=after, **options | more)


_TRAINED = {}  # the slow loop trains a member once for all backends


def plain_mlp(data, fold, segments):
    key = repr((fold, segments))
    if key not in _TRAINED:
        _TRAINED[key] = _plain_mlp(data, fold, segments)
    return _TRAINED[key]


def _plain_mlp(data, fold, segments):
    x, y, _ = rows_of(data, fold)
    config = segments[0][0]
    sizes = {key: config[key] for key in ("width", "depth", "activation")}
    module = reference.start(MLP(x.shape[1], data.n_outputs, **sizes).double(), 0)

    def forward(batch, epoch, step, rate):
        return reference.forward_with_dropout(module, batch, rate, 0, epoch, step)

    return plain_loop(module, forward, x, y, segments)


@pytest.mark.usefixtures("recorded_on_cpu")
@pytest.mark.parametrize(
    "backend", ["eager", "recorded", pytest.param("compiled", marks=needs_compiled_code)]
)
@pytest.mark.parametrize("case", CASES)
def test_built_in_models_continue_from_a_slot_with_other_values(case, backend):
    values, change = CASES[case]
    data = make_data(n=41, folds=2)
    configs = configs_of(values, width=7)
    selections = selections_of(configs, **change)
    trained = trained_mlps(data, configs, selections, backend=backend)
    assert trained.alive == (1, 2)
    assert np.isfinite(trained.curves[1:]).all() and np.isnan(trained.curves[0, 3:]).all()
    segments = lineages(configs, selections)
    for fold, (trial, parts) in itertools.product(range(2), zip((1, 2), segments)):
        expected = plain_mlp(data, fold, parts)
        assert largest_difference(trained.member(fold, trial), expected) <= 1e-10


class Normed(Net):
    """A module with running statistics."""

    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)
        # without a bias, whose gradient would be rounding only, which adam makes large
        self.body[0] = torch.nn.Linear(n_features, 6, bias=False)
        self.body.insert(1, torch.nn.BatchNorm1d(6))


MODULE_CASES = {
    "adamw": ({"optimizer": "adamw"}, {"lr": 0.02, "weight_decay": 0.05, "schedule": "cosine"}),
    "a decay and smoothing begin": (
        {"optimizer": "adam", "weight_decay": 0.0, "loss__label_smoothing": 0.0},
        {"weight_decay": 0.2, "loss__label_smoothing": 0.1},
    ),
}


def trained_modules(kind, data, configs, selections, backend):
    return train_modules(
        kind,
        Normed,
        configs,
        data,
        EPOCHS,
        objective=Objective("cross_entropy"),
        backend=backend,
        scoring=scoring_of(data),
        after_epoch=select_at(selections),
        coded=backend == "compiled",
    )


def plain_module(data, fold, segments):
    key = repr((fold, segments))
    if key not in _TRAINED:
        _TRAINED[key] = _plain_module(data, fold, segments)
    return _TRAINED[key]


def _plain_module(data, fold, segments):
    x, y, _ = rows_of(data, fold)
    with torch.random.fork_rng():
        torch.manual_seed(stream_seed(0, "module"))
        module = Normed(x.shape[1], data.n_outputs).double()
    return plain_loop(module, lambda batch, *_: module(batch), x, y, segments)


@pytest.fixture
def quick_builds(monkeypatch):
    monkeypatch.setattr(library, "FLAGS", ("-O0", *library.FLAGS[1:]))


@pytest.mark.usefixtures("quick_builds")
@pytest.mark.parametrize("way", ["stacked", "recorded", "coded", "loop"])
@pytest.mark.parametrize("case", MODULE_CASES)
def test_modules_continue_from_a_slot_with_other_values(case, way, monkeypatch):
    if way == "coded" and library.find_compiler() is None:
        pytest.skip("no C compiler")
    if way == "recorded":
        monkeypatch.setattr(CpuRecorder, "repays", 1)
    values, change = MODULE_CASES[case]
    data = make_data(n=41, folds=2)
    configs = configs_of(values)
    selections = selections_of(configs, **change)
    kind = LoopedModule if way == "loop" else StackedModule
    backend = {"stacked": "eager", "coded": "compiled"}.get(way, way)
    trained = trained_modules(kind, data, configs, selections, backend)
    assert isinstance(trained.chunk, MemberChunk) == (way == "coded")
    assert way != "recorded" or trained.chunk.steps.begun
    segments = lineages(configs, selections)
    for fold, (trial, parts) in itertools.product(range(2), zip((1, 2), segments)):
        expected = plain_module(data, fold, parts)
        assert largest_difference(trained.member(fold, trial), expected) <= 1e-10


@pytest.mark.usefixtures("recorded_on_cpu")
@pytest.mark.parametrize(
    "backend", ["eager", "graph", pytest.param("compiled", marks=needs_compiled_code)]
)
def test_a_stored_state_continues_with_another_batch_size(backend):
    data = make_data(n=41, folds=2)
    (config,) = configs_of({"schedule": "cosine", "optimizer": "adamw"}, width=7)[:1]
    new = changed(config, batch_size=13, lr=0.02)
    first = trained_mlps(data, [config, config], [], epochs=3)
    assert first.state.steps.tolist() == [[3 * math.ceil(20 / 9), 3 * math.ceil(21 / 9)]] * 2
    selections = [(3, Selection((0,), configs=(new,)))]
    begun = {"begin": first.state.select([1]), "backend": backend}
    rest = trained_mlps(data, [new], [], **begun)
    assert (rest.state.steps - first.state.steps[:1]).tolist() == [[2 * 2, 2 * 2]]
    (segments,) = lineages([config], selections)
    for fold in range(2):
        assert largest_difference(rest.member(fold, 0), plain_mlp(data, fold, segments)) <= 1e-10


def test_states_without_counts_are_joined_with_others():
    buffers = (torch.zeros(1, 2, 3),)
    old = State(4, buffers)
    new = State(4, buffers, torch.tensor([[10, 12]]))
    assert State.stack([old, old]).steps is None
    joined = State.stack([old, new])
    np.testing.assert_array_equal(joined.lag(np.array([[3, 3], [3, 3]])), [[0, 2], [0, 0]])
    assert State.stack([joined, old]).select([1, 1]).steps.tolist() == [[10, 12], [10, 12]]


@pytest.mark.parametrize(
    ("kind", "change"),
    [("mlp", {"width": 8}), ("mlp", {"ema": 0.5}), ("module", {"batch_size": 8})],
)
def test_a_configuration_of_other_tensors_is_refused(kind, change):
    data = make_data(n=41)
    configs = configs_of({}, width=7)
    selections = selections_of(configs, **change)
    with pytest.raises(ValueError, match="cannot continue from the state of the configuration"):
        if kind == "mlp":
            trained_mlps(data, configs, selections)
        else:
            trained_modules(StackedModule, data, configs, selections, "eager")
