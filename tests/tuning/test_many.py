"""``train_many``: every module is what a plain loop trains, and bad input is refused."""

import time
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional

import gputune
import reference
from gputune.engine.job import Job, train_chunk
from gputune.population.population import complete, module_arguments, populations
from problems import Net, data_of, largest_difference, scoring_of
from refused import refused

EPOCHS = 4
GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(61, 5, generator=GENERATOR, dtype=torch.float64)
LABELS = torch.arange(61) % 3
NUMBERS = X[:, 0].sin() + 0.1 * torch.randn(61, generator=GENERATOR, dtype=torch.float64)
CONFIGS = [
    {"lr": 0.03, "batch_size": 16},
    {"lr": 0.01, "batch_size": 16, "init_seed": 4},
    {"lr": 0.01, "batch_size": 64, "weight_decay": 0.1, "init_seed": 4},
    {"lr": 0.1, "batch_size": 7, "optimizer": "sgd"},
]


def alone(config, x, y, scores):
    """The module of a plain loop, and its score after each epoch."""
    full = complete(config, optimizer="adamw", schedule="constant")
    curve = []
    n_outputs = 1 if y.is_floating_point() else 3
    build = partial(Net, x.shape[1], n_outputs, **module_arguments(full))
    module = reference.train_module(
        build, x, y, full, epochs=EPOCHS, after_epoch=lambda _, net: curve.append(scores(net))
    )
    return module, curve


def accuracy(x, y):
    return lambda net: float((net(x).argmax(1) == y).double().mean())


def negative_error(x, y):
    return lambda net: -functional.mse_loss(net(x)[:, 0], y).item()


CLASSES = (LABELS, accuracy, "accuracy")
REGRESSION = (NUMBERS, negative_error, "neg_loss")


@pytest.mark.parametrize(
    ("y", "score", "name", "backend"),
    [
        (*CLASSES, "recorded"),
        (*REGRESSION, "auto"),
        (*CLASSES, "loop"),
        pytest.param(*CLASSES, "auto", marks=pytest.mark.long),
        pytest.param(*REGRESSION, "recorded", marks=pytest.mark.long),
        pytest.param(*REGRESSION, "loop", marks=pytest.mark.long),
    ],
)
def test_every_module_and_curve_is_that_of_a_plain_loop(y, score, name, backend):
    options = {"max_epochs": EPOCHS, "dtype": "float64", "backend": backend}
    trained = gputune.train_many(Net, CONFIGS, X, y, cv=3, **options)
    assert trained.scoring == name
    assert trained.curves.shape == (len(CONFIGS), EPOCHS, 3)
    for number, config in enumerate(CONFIGS):
        for fold, (train, valid) in enumerate(trained.folds):
            scores = score(X[valid], y[valid])
            module, curve = alone(config, X[train], y[train], scores)
            assert largest_difference(trained.member(number, fold), module) <= 1e-10
            assert np.abs(trained.curves[number, :, fold] - curve).max() <= 1e-10


def test_without_folds_all_rows_train_and_are_scored():
    trained = gputune.train_many(Net, CONFIGS[:2], X, LABELS, max_epochs=EPOCHS, dtype="float64")
    ((train, valid),) = trained.folds
    assert train.tolist() == valid.tolist() == list(range(61))
    module, curve = alone(CONFIGS[1], X, LABELS, accuracy(X, LABELS))
    assert largest_difference(trained.member(-1), module) <= 1e-10
    assert trained.curves[1, :, 0].tolist() == pytest.approx(curve)


def test_the_state_is_stacked_for_torch_func():
    trained = gputune.train_many(Net, CONFIGS, X.numpy(), LABELS.numpy(), cv=2, max_epochs=2)
    state = trained.state
    assert state["body.0.weight"].shape == (4, 2, 6, 5)
    template = trained.member(0)

    def outputs(tensors):
        return torch.func.functional_call(template, tensors, X.float())

    stacked = torch.vmap(torch.vmap(outputs))(state)
    for number in range(4):
        for fold in range(2):
            expected = trained.member(number, fold)(X.float())
            torch.testing.assert_close(stacked[number, fold], expected)


def test_configurations_of_different_shapes_train_in_groups():
    configs = [{"lr": 0.01, "module__hidden": hidden} for hidden in (3, 6, 3)]
    trained = gputune.train_many(Net, configs, X, LABELS, max_epochs=EPOCHS, dtype="float64")
    for number, config in enumerate(configs):
        module, _ = alone(config, X, LABELS, accuracy(X, LABELS))
        assert largest_difference(trained.member(number), module) <= 1e-10
    with refused(r"tensors of 2 different shapes.*member\(config, fold\)\.state_dict\(\)"):
        trained.state  # noqa: B018


def test_equal_configurations_are_trained_as_often_as_they_are_passed():
    trained = gputune.train_many(Net, [{"lr": 0.1}] * 3, X, LABELS, max_epochs=1)
    assert trained.curves.shape == (3, 1, 1)
    assert largest_difference(trained.member(0), trained.member(2)) <= 1e-6


def test_a_configuration_that_diverges_leaves_the_others_unchanged():
    configs = [{"lr": 0.01}, {"lr": 1e30, "optimizer": "sgd"}, {"lr": 0.02}]
    trained = gputune.train_many(Net, configs, X, NUMBERS, max_epochs=EPOCHS, dtype="float64")
    assert np.isnan(trained.curves[1, -1]).all()
    assert trained.state["body.0.bias"][1].isnan().all()
    module, _ = alone(configs[2], X, NUMBERS, negative_error(X, NUMBERS))
    assert largest_difference(trained.member(2), module) <= 1e-10
    with pytest.raises(gputune.DivergedError, match=r"Configuration 1 diverged.*Lower its lr"):
        trained.member(1)


def test_frozen_tensors_are_not_in_the_state():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    builder = gputune.lora(base, targets=["0"], modules_to_save=["2"])
    trained = gputune.train_many(builder, [{"rank": 2}, {"rank": 1}], X, LABELS, max_epochs=1)
    names = dict(trained.member(0).named_parameters())
    frozen = {name for name, w in names.items() if not w.requires_grad}
    assert frozen == {"module.0.base.bias", "module.0.base.weight"}
    assert frozen.isdisjoint(trained.state)
    assert names.keys() - frozen <= trained.state.keys()


def test_losses_scores_and_weights_of_your_own():
    weights = np.linspace(0, 1, 61)
    trained = gputune.train_many(
        Net,
        [{"lr": 0.02, "batch_size": 64}],
        X,
        NUMBERS,
        loss=lambda outputs, y: (outputs[:, 0] - y).abs(),
        scoring="neg_mean_absolute_error",
        sample_weight=weights,
        max_epochs=EPOCHS,
        dtype="float64",
    )
    error = (trained.member(0)(X)[:, 0] - NUMBERS).abs().mean().item()
    assert trained.curves[0, -1, 0] == pytest.approx(-error)


def test_targets_of_any_shape():
    images = torch.rand(20, 1, 4, 4)
    build = partial(nn.Conv2d, 1, 1, 3, padding=1)

    def make():
        return build()

    trained = gputune.train_many(make, [{"lr": 0.1}], images, images, max_epochs=2)
    assert trained.scoring == "neg_loss"
    assert trained.curves[0, 1, 0] > trained.curves[0, 0, 0]


def test_it_shows_its_progress_only_on_request(capfd):
    gputune.train_many(Net, [{}], X, LABELS, max_epochs=1)
    assert capfd.readouterr() == ("", "")
    trained = gputune.train_many(Net, [{}], X, LABELS, max_epochs=1, verbose=1)
    assert "plan: 1 trial" in capfd.readouterr().err
    assert repr(trained) == ("TrainedModules(1 configuration, 1 fold, 1 epoch, scoring='accuracy')")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"configs": []}, "configs must be a list of at least one dict"),
        ({"configs": {"lr": 0.1}}, "configs must be a list of at least one dict"),
        ({"configs": [{"lr": 0.1}, {"learning_rate": 1}]}, r"configs\[1\].*Did you mean 'lr'"),
        ({"configs": [{"lr": -1}]}, r"configs\[0\]\['lr'\] must be a finite number > 0"),
        ({"module": "mlp"}, "module must be a torch.nn.Module class or a function"),
        ({"module": Net(5, 3)}, "must be a class, not an instance"),
        ({"X": pd.DataFrame(X.numpy())}, "X must be an array, a tensor.*gputune.tune reads tables"),
        ({"X": [[1.0]]}, "X must be an array, a tensor"),
        ({"X": X * torch.nan}, "must be finite"),
        ({"y": LABELS.tolist()}, "y must be an array or a tensor"),
        ({"y": LABELS[:60]}, "y must have one value per row of X"),
        ({"y": LABELS + 1}, "y must hold the classes 0 to 2.*got 1, 2, 3.*LabelEncoder"),
        ({"cv": 1}, "cv"),
        ({"max_epochs": 0}, "max_epochs"),
        ({"loss": 3}, "loss"),
    ],
)
def test_bad_input_is_refused(arguments, words):
    given = {"module": Net, "configs": [{"lr": 0.1}], "X": X, "y": LABELS, **arguments}
    with refused(words):
        gputune.train_many(**given)


def test_a_member_that_does_not_exist_is_refused():
    trained = gputune.train_many(Net, [{}], X, LABELS, max_epochs=1)
    with refused(r"member\(config\) must be an integer from 0 to 0, got 1"):
        trained.member(1)
    with refused(r"member\(fold\) must be an integer from 0 to 0, got 3"):
        trained.member(0, 3)


def test_an_unknown_argument_has_a_suggestion():
    with pytest.raises(TypeError, match="Did you mean 'max_epochs'"):
        gputune.train_many(Net, [{}], X, LABELS, epochs=3)


def test_the_call_costs_little_more_than_the_engine():
    """At most 0.2 s of CPU time for 64 small members and 10 epochs."""
    configs = [{"lr": 10 ** (-4 + number / 32), "batch_size": 32} for number in range(64)]
    full = [complete(config, optimizer="adamw", schedule="constant") for config in configs]
    data = data_of(X.float(), 3, LABELS)
    (chunk,) = populations(full, "module", rows=61)
    scoring = scoring_of(data)

    def engine():
        options = {"module_class": Net, "backend": "recorded", "scoring": scoring}
        train_chunk(Job(seed=0, epochs=10, horizon=10, **options), data, chunk)

    def call():
        gputune.train_many(Net, configs, X, LABELS, backend="recorded")

    seconds = {engine: [], call: []}
    for _ in range(3):  # the first of each fills caches
        for function, taken in seconds.items():
            begin = time.process_time()
            function()
            taken.append(time.process_time() - begin)
    assert min(seconds[call]) - min(seconds[engine]) <= 0.2
