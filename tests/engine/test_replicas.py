"""With several replicas, each network of a trial is that of a plain loop with the replica's seed, and
the scores are those of the networks' mean prediction."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, r2_score

import problems
import reference
from gputune.data.dataset import with_replicas
from gputune.ground.seeding import replica_seed, stream_seed
from gputune.models import RealMLP
from gputune.modules.looped import LoopedModule
from gputune.modules.module import StackedModule
from gputune.population.population import module_arguments
from gputune.population.state import Selection
from problems import (
    TOLERANCE,
    fill,
    largest_difference,
    make_data,
    needs_compiled_code,
    rows_of,
    scoring_of,
    shape_of,
    train,
    train_modules,
    train_together,
    without_class_2,
)

R = 3
EPOCHS = 3
CONFIGS = fill(
    {"batch_size": 8, "lr": 0.01, "width": 6, "depth": 1},
    {"batch_size": 16, "lr": 0.03, "width": 5, "depth": 2, "activation": "tanh"},
)


def loop_outputs(data, fold, config, seed):
    """The network of a plain loop, and its outputs on the fold's validation rows, by epoch."""
    x, y, weights = rows_of(data, fold)
    valid = data.x[data.copies[fold], data.folds[fold].valid]
    outputs = []

    def after_epoch(epoch, module):
        with torch.no_grad():
            outputs.append(module(valid))

    module = reference.train_mlp(
        x,
        y,
        config,
        n_outputs=data.n_outputs,
        seed=seed,
        epochs=EPOCHS,
        weights=weights,
        after_epoch=after_epoch,
    )
    return module, outputs


def score_of_mean(data, fold, outputs):
    """The score of the mean prediction of several networks, by scikit-learn."""
    target = data.target[data.folds[fold].valid].numpy()
    if data.task == "regression":
        mean = torch.stack(outputs).mean(0).double() * data.scale[fold] + data.center[fold]
        return r2_score(target, mean[:, 0].numpy())
    mean = torch.stack(outputs).double().softmax(-1).mean(0).numpy()
    return -log_loss(target, mean, labels=range(data.n_outputs))


@pytest.mark.parametrize("backend", ["eager", pytest.param("compiled", marks=needs_compiled_code)])
@pytest.mark.parametrize("task", ["multiclass", "regression"])
def test_each_network_is_that_of_a_plain_loop_and_the_score_is_that_of_their_mean(backend, task):
    single = make_data(task, weights=True)
    data = with_replicas(single, R)
    assert (data.n_folds, data.n_splits) == (2 * R, 2)
    scoring = scoring_of(data, "r2" if task == "regression" else "neg_log_loss")
    for config in CONFIGS:
        options = {"backend": backend, "seed": 5, "epochs": EPOCHS, "horizon": EPOCHS}
        network = problems.StackedMLP("mlp", [config], shape_of(data), seed=5)
        trained = train(network, data, [config], scoring=scoring, **options)
        assert trained.curves.shape == (1, EPOCHS, 2)
        for split in range(2):
            by_replica = []
            for replica in range(R):
                fold = replica * 2 + split
                alone, outputs = loop_outputs(single, split, config, replica_seed(5, replica))
                assert largest_difference(trained.member(fold, 0), alone) <= TOLERANCE[data.dtype]
                by_replica.append(outputs)
            expected = [score_of_mean(single, split, of_epoch) for of_epoch in zip(*by_replica)]
            np.testing.assert_allclose(trained.curves[0, :, split], expected, rtol=1e-8)


def test_replicas_differ_and_the_first_is_the_network_without_replicas():
    data = make_data()
    alone, _ = train_together(data, CONFIGS[:1])
    several, _ = train_together(with_replicas(data, 2), CONFIGS[:1])
    for split in range(2):
        assert largest_difference(several[split, 0], alone[split, 0]) == 0
        assert largest_difference(several[2 + split, 0], alone[split, 0]) > 0.1
    assert with_replicas(data, 1) is data


@pytest.mark.parametrize("backend", ["eager", pytest.param("compiled", marks=needs_compiled_code)])
def test_a_class_that_a_fold_lacks_has_no_share_in_the_mean(backend):
    data = with_replicas(without_class_2(make_data()), 2)
    network = problems.StackedMLP("mlp", CONFIGS[:1], shape_of(data), seed=0)
    scoring = replace(scoring_of(data, "accuracy"), kept_bytes=1 << 20)
    trained = train(
        network,
        data,
        CONFIGS[:1],
        scoring=scoring,
        backend=backend,
        seed=0,
        epochs=2,
        horizon=2,
    )
    assert np.isfinite(trained.curves).all()
    (kept,) = trained.outputs_of([0]).values()
    of_fold_1 = kept.values[len(data.folds[0].valid) :]
    assert np.isneginf(of_fold_1[:, 2]).all()
    np.testing.assert_allclose(np.exp(of_fold_1[:, :2]).sum(1), 1, rtol=1e-5)


def started(data, fold, config, seed):
    """A RealMLP that starts from a fold's rows as in a search."""
    module = RealMLP(data.n_features, data.n_outputs, **module_arguments(config)).double()
    torch.manual_seed(stream_seed(seed, "start_from"))
    module.start_from(*rows_of(data, fold)[:2])
    return module


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        (StackedModule, "eager"),
        (LoopedModule, "loop"),
        pytest.param(StackedModule, "compiled", marks=needs_compiled_code),
    ],
)
def test_each_network_of_a_module_is_that_of_a_plain_loop(kind, backend):
    single = make_data("regression", n=40)
    data = with_replicas(single, 2)
    configs = fill(
        {"batch_size": 16, "lr": 0.01, "module__width": 6, "module__depth": 1},
        {"batch_size": 16, "lr": 0.03, "module__width": 6, "module__depth": 1},
    )
    trained = train_modules(
        kind,
        RealMLP,
        configs,
        data,
        2,
        scoring=scoring_of(data, "r2"),
        backend="compiled" if backend == "compiled" else "eager",
        coded=backend == "compiled",
    )
    for fold in range(4):
        split = data.split_of(fold)
        seed = replica_seed(0, data.replica_of(fold))
        x, y, _ = rows_of(single, split)
        for trial, config in enumerate(configs):
            build = partial(started, single, split, config, seed)
            alone = reference.train_module(build, x, y, config, seed=seed, epochs=2)
            worst = largest_difference(trained.member(fold, trial), alone)
            assert worst <= TOLERANCE[data.dtype]


def test_a_selected_trial_keeps_all_its_networks():
    data = with_replicas(make_data(), 2)
    configs = fill(*[{"batch_size": 16, "lr": lr, "width": 6} for lr in (0.01, 0.02, 0.03)])
    network = problems.StackedMLP("mlp", configs, shape_of(data), seed=0)
    options = {"seed": 0, "epochs": 3, "horizon": 3, "scoring": scoring_of(data)}

    def drop_first(trained):
        return Selection((1, 2)) if trained.epochs == 1 else False

    selected = train(network, data, configs, after_epoch=drop_first, **options)
    complete = train(network, data, configs, **options)
    for fold in range(4):
        for trial in (1, 2):
            difference = largest_difference(
                selected.member(fold, trial), complete.member(fold, trial)
            )
            assert difference <= 1e-10
