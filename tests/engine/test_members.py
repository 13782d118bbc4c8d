"""Members that train in compiled code, one after another, equal members of stacked tensors."""

import time
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from gputune.engine import member_steps
from gputune.engine.member_steps import MemberMemory
from gputune.engine.members import MemberChunk
from gputune.engine.stacked import StackedChunk
from gputune.ground.device import on_threads
from gputune.models import RealMLP
from gputune.modules import calls
from gputune.modules.inspection import traits_of
from gputune.modules.module import StackedModule
from gputune.native import library as built
from gputune.population.traits import Traits
from gputune.scoring.objective import Objective
from gputune.scoring.validation import Validation
from problems import Linear, fill, make_data, scoring_of, shape_of, train

pytestmark = pytest.mark.skipif(built.find_compiler() is None, reason="no C compiler")


class Net(nn.Sequential):
    def __init__(self, n_features, n_outputs):
        inside = (
            nn.Linear(n_features, 7, bias=False),
            nn.BatchNorm1d(7),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.LayerNorm(7),
        )
        super().__init__(*inside, nn.Linear(7, n_outputs))


KEPT = ("1.running_mean", "1.running_var", "1.num_batches_tracked")
TRAITS = Traits(changing=KEPT, least_rows=2)


@pytest.fixture(autouse=True)
def no_grad(monkeypatch):
    monkeypatch.setattr(built, "FLAGS", ("-O0", *built.FLAGS[1:]))  # soon built
    with torch.no_grad():
        yield


def both(data, configs, objective=None, module=Net, traits=TRAITS):
    """The chunk in compiled code, and the same on stacked tensors."""
    network = StackedModule(
        module, configs, shape_of(data), seed=0, traits=traits, objective=objective
    )
    kinds = (MemberChunk, StackedChunk)
    scoring = scoring_of(data)
    return [kind(network, Validation(data, scoring), seed=0, horizon=6) for kind in kinds]


def assert_alike(chunk, other, epochs=(0, 1)):
    """Train both, and compare their members and scores."""
    for epoch in epochs:
        chunk.advance(epoch)
        other.advance(epoch)
        for mine, theirs in zip(
            (chunk.flat, *chunk.moments), (other.flat, *other.moments), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
        assert np.allclose(chunk.scores(), other.scores())


ABSENT = torch.tensor([[True, True, True], [True, False, True], [True, True, True]])
CASES = {
    "rates": (make_data(), [{"lr": 0.01}, {"lr": 0.03, "schedule": "cosine"}]),
    "weights and a target to predict": (
        make_data("regression", weights=True),
        [{"lr": 0.01, "weight_decay": 0.1}],
    ),
    "absent classes": (replace(make_data(copies=False), present=ABSENT), [{"lr": 0.01}]),
    "what members differ in": (
        make_data(),
        [
            {"lr": 0.01, "beta2": 0.9, "ema": 0.5, "lr_factor:0": 0.5},
            {"lr": 0.02, "clip_norm": 0.1, "weight_decay": 0.3, "weight_decay_schedule": "linear"},
        ],
    ),
    "momentum": (
        make_data(),
        [{"lr": 0.01, "momentum": m, "optimizer": "nesterov"} for m in (0.5, 0.9)],
    ),
    "another rule": (make_data(), [{"lr": 0.001 * i, "optimizer": "rmsprop"} for i in (1, 2)]),
    "the numbers of their loss": (
        make_data("regression"),
        [{"lr": 0.01, "loss__delta": delta} for delta in (0.1, 2.0)],
        Objective("huber"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_members_are_those_of_stacked_tensors(name):
    data, configs, *objective = CASES[name]
    assert_alike(
        *both(data, fill(*({"batch_size": 9, **config} for config in configs)), *objective)
    )


@pytest.mark.parametrize(
    "goal, rates",
    [("binary", (0.0, 0.1, 0.4)), ("regression", (0.0, 0.1, 0.4)), ("binary", (0.0,))],
)
def test_realmlp_with_a_dropout_of_each_member_and_its_schedule(goal, rates):
    """Nothing is drawn where all rates are 0."""
    data = make_data(goal)
    configs = fill(
        *(
            {
                "lr": 0.01,
                "batch_size": 9,
                "dropout": rate,
                "dropout_schedule": word,
                "schedule": "coslog4",
                "lr_factor__scale": 6.0,
                "module__width": 5,
                "module__depth": 2,
            }
            for rate, word in zip(rates, ("constant", "flat_cos", "linear"))
        )
    )
    chunk, other = both(data, configs, module=RealMLP, traits=traits_of(RealMLP, configs[0], data))
    assert (chunk.code.members[0].draws is not None) == any(rates)
    assert_alike(chunk, other)


def test_trials_leave_and_draws_are_made_a_few_steps_ahead(monkeypatch):
    monkeypatch.setattr(calls, "_DRAW_BYTES", 2 * 2 * 9 * 7 * 8)
    data = make_data()
    decays = (
        {"beta2": 0.9, "weight_decay": 0.1},
        {},
        {"weight_decay_schedule": "linear", "weight_decay": 0.1},
        {},
    )
    chunk, other = both(data, fill(*({"lr": 0.01, "batch_size": 9, **decay} for decay in decays)))
    assert chunk.code.ahead == 2
    for epoch, stays in enumerate(([1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 0])):
        for one in (chunk, other):
            one.select(np.flatnonzero(stays[: len(one.places)]))
        assert_alike(chunk, other, [epoch])


def test_folds_of_different_lengths_share_the_random_numbers_of_full_minibatches():
    """The folds have 30 and 31 training rows: three minibatches of 9, then one of 3 or 4."""
    chunk, other = both(make_data(), fill({"lr": 0.01, "batch_size": 9}))
    first, second = chunk.code.draws
    assert first.buffers[9][0].data_ptr() == second.buffers[9][0].data_ptr()
    assert first.buffers.keys() - second.buffers.keys() == {3}
    assert_alike(chunk, other)


def test_chunks_that_share_released_code_train_in_turns(monkeypatch):
    """Each release frees the random numbers, so their addresses change."""
    monkeypatch.setattr(member_steps, "_KEPT_DRAWS", 0)
    configs = fill({"lr": 0.01, "batch_size": 9})
    chunk, other = both(make_data(), configs)
    options = {"seed": 0, "horizon": 6, "code": chunk.code}
    second = MemberChunk(chunk.network, chunk.validation, **options)
    second_other = StackedChunk(other.network, other.validation, seed=0, horizon=6)
    for epoch in range(3):
        for one, expected in ((chunk, other), (second, second_other)):
            assert_alike(one, expected, [epoch])
            if epoch < 2:
                one.release()
                assert not any(x.untyped_storage().nbytes() for x in chunk.code._draw_buffers())
        if epoch == 1:
            chunk.code.allocate()
    assert second.n_releases == chunk.code.n_releases == 4


def test_a_loss_parameter_that_only_some_trials_set():
    rates = ({"lr": 0.01, "batch_size": 9, "loss__label_smoothing": x} for x in (0.0, 0.1))
    chunk, other = both(make_data(), fill(*rates), Objective("cross_entropy"))
    assert_alike(chunk, other)
    for one in (chunk, other):
        one.select([0])  # without smoothing
    assert_alike(chunk, other, [2])


def test_threads_change_nothing_and_an_error_of_one_is_raised(monkeypatch):
    states = []
    configs = fill(*({"lr": lr, "batch_size": 9} for lr in (0.01, 0.02, 0.03)))
    for threads in (1, 2):
        with on_threads(threads):
            chunk, _ = both(make_data(), configs)
            chunk.advance(0)
            states.append(chunk.flat.clone())
    chunk.code.kernels = None
    with on_threads(2), pytest.raises(AttributeError):
        chunk.advance(1)
    assert torch.equal(*states)


@pytest.mark.parametrize(
    "given, says",
    [
        ({"optimizer": "adamwhd"}, nullcontext()),
        (
            {"objective": Objective("mse", augment=lambda x, g: x + torch.fft.rfft(x).abs().sum())},
            pytest.warns(
                RuntimeWarning,
                match="'adamw' train in recorded steps, which are slower .*_r2c has no C code",
            ),
        ),
    ],
)
def test_what_is_in_no_code_trains_in_another_way(given, says):
    data = make_data("regression")
    configs = fill({"lr": 0.01, "batch_size": 9}, optimizer=given.pop("optimizer", "adamw"))
    network = StackedModule(
        Net, configs, shape_of(data), seed=0, traits=replace(TRAITS, coded=True), **given
    )
    with says:
        trained = train(
            network,
            data,
            configs,
            seed=0,
            epochs=1,
            horizon=1,
            scoring=scoring_of(data),
            backend="compiled",
        )
    assert np.isfinite(trained.curves).all()


def next_chunk(chunk, configs):
    """A chunk with the data and the module of another chunk, which may use its compiled steps."""
    network = chunk.network.with_configs(configs)
    return MemberChunk(network, chunk.validation, seed=0, horizon=6, code=chunk.code)


def test_a_later_chunk_with_more_trials_uses_the_same_compiled_steps():
    data = make_data()
    rates = ({"lr": 0.01, "batch_size": 9}, {"lr": 0.03, "batch_size": 9, "weight_decay": 0.1})
    first, _ = both(data, fill(*rates))
    first.advance(0)
    more = fill(*rates, {"lr": 0.02, "batch_size": 9, "weight_decay": 0.2})
    _, other = both(data, more)
    chunk = next_chunk(first, more)
    assert chunk.code is first.code
    assert_alike(chunk, other)
    # the first chunk is not disturbed
    _, other = both(data, fill(*rates))
    other.advance(0)
    assert_alike(first, other, [1])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # the updates have a table of beta2 only if the members differ
        ({}, {"beta2": 0.9}),
        ({"batch_size": 9}, {"batch_size": 8}),
        ({"ema": 0.5}, {"ema": 0.0}),
        ({"optimizer": "nesterov", "momentum": 0.5}, {"optimizer": "nesterov", "momentum": 0.0}),
        ({"loss__label_smoothing": 0.0}, {"loss__label_smoothing": 0.1}),
    ],
)
def test_compiled_steps_that_do_not_fit_a_later_chunk_are_written_again(before, after):
    data = make_data()
    first, _ = both(
        data, fill({"lr": 0.01, "batch_size": 9, **before}), module=Linear, traits=Traits()
    )
    later = fill({"lr": 0.01, "batch_size": 9}, {"lr": 0.02, "batch_size": 9, **after})
    if "batch_size" in after:
        later = [replaced | after for replaced in later]
    fresh, other = both(data, later, module=Linear, traits=Traits())
    chunk = MemberChunk(fresh.network, first.validation, seed=0, horizon=6, code=first.code)
    assert chunk.code is not first.code
    assert_alike(chunk, other)


@pytest.mark.parametrize("rows", [7, None])
def test_outputs_on_validation_rows_are_of_the_code_too(monkeypatch, rows):
    data = make_data()
    configs = fill(*({"lr": lr, "batch_size": 9} for lr in (0.01, 0.1)))
    if rows is not None:  # blocks of 7 rows; the last one has fewer
        monkeypatch.setattr(member_steps, "_CACHED_NUMBERS", 0)
        monkeypatch.setattr(member_steps, "_FEWEST_ROWS", rows)
        assert all(len(fold.valid) > rows and len(fold.valid) % rows for fold in data.folds)
    chunk, _ = both(data, configs, module=Linear, traits=Traits())
    assert chunk.code.members[0].block_rows == (rows or len(data.folds[0].valid))
    chunk.advance(0)
    expected = StackedChunk.scores(chunk)
    monkeypatch.setattr(StackedModule, "outputs", lambda *args: pytest.fail("computed by torch"))
    assert np.allclose(chunk.scores(), expected, rtol=1e-12)


def test_the_share_of_scoring_is_that_of_the_outputs(monkeypatch):
    write = MemberMemory.write_outputs

    def slow(memory, *given):
        time.sleep(0.05)
        write(memory, *given)

    chunk, _ = both(make_data(), fill({"batch_size": 9}), module=Linear, traits=Traits())
    chunk.advance(0)
    assert 0 < chunk.scoring_share < 1
    monkeypatch.setattr(MemberMemory, "write_outputs", slow)
    chunk.advance(1)
    assert 0.5 < chunk.scoring_share < 1
