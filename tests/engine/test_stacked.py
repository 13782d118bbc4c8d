"""Recorded steps: how often they are recorded, that nothing of an epoch waits, and where graphs are
used at all."""

import dataclasses
import gc
import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gputune
from gputune.engine import dropout
from gputune.engine.job import Job, run_in_parts
from gputune.engine.mlp import StackedMLP
from gputune.engine.reuse import ChunkPool
from gputune.engine.stacked import StackedChunk
from gputune.modules.recorder import RECORDERS, Replays
from gputune.population.population import Population
from gputune.scoring import validation
from gputune.scoring.validation import Validation
from problems import Linear, fill, make_data, scoring_of, shape_of
from stand_in import CaptureError, StandIn


def configs_of(count, optimizer="adamw", **more):
    return fill(
        *(
            {"optimizer": optimizer, "lr": 1e-3 * (i + 1), "batch_size": 9, **more}
            for i in range(count)
        )
    )


def make_chunk(data, configs, *, recorded=True):
    network = StackedMLP("mlp", configs, shape_of(data), seed=0)
    return StackedChunk(
        network, Validation(data, scoring_of(data)), seed=0, horizon=20, recorded=recorded
    )


class Counting(StandIn):
    """The stand-in, which counts."""

    captures = 0
    warm_ups = 0

    def capture(self, step):
        Counting.captures += 1
        return super().capture(step)

    def warm_up(self, step):
        Counting.warm_ups += 1
        super().warm_up(step)


@pytest.fixture
def counted(monkeypatch):
    Counting.captures = Counting.warm_ups = 0
    monkeypatch.setitem(RECORDERS, "cpu", Counting)
    return Counting


@pytest.fixture(autouse=True)
def no_grad(recorded_on_cpu):
    with torch.no_grad():
        yield


def test_a_step_is_taken_three_times_as_it_is_and_then_replayed(counted, monkeypatch):
    data = make_data(folds=3)
    asked = []
    chunk = make_chunk(data, configs_of(2))
    monkeypatch.setattr(StackedChunk, "_step", lambda chunk, shape, key: asked.append(shape))
    shapes = chunk.batches.shapes  # 40 or 41 rows: four whole minibatches, one of 4 or 5
    assert [shape.parts[0].rows for shape in shapes] == [9, 9, 9, 9, 5]
    assert [shape.parts[0].full for shape in shapes] == [True] * 4 + [False]
    for epoch in range(6):
        chunk.advance(epoch)
    assert counted.warm_ups == 3 + 3 and counted.captures == 2
    assert len(asked) == 3 + 1 + 3 + 1


def test_few_steps_are_recorded_as_trials_leave_one_by_one(counted):
    data = make_data()
    count = 12
    slots = []
    configs = configs_of(count, batch_size=5)
    found, expected = (make_chunk(data, configs, recorded=recorded) for recorded in (True, False))
    for epoch in range(count):
        for chunk in (found, expected):
            chunk.advance(epoch)
        np.testing.assert_array_equal(found.scores(), expected.scores())
        slots.append(len(found.configs))
        left = len(found.places)
        if left == 1:
            break
        for chunk in (found, expected):
            chunk.select([c for c in range(left) if c != epoch % left])
        assert len(found.places) == len(expected.places) == left - 1
        torch.testing.assert_close(found.flat, expected.flat, rtol=1e-10, atol=1e-12)
        for moment, other in zip(found.moments, expected.moments, strict=True):
            torch.testing.assert_close(moment, other, rtol=1e-9, atol=1e-15)
        assert found.network.configs == expected.network.configs
    # The tensors are made anew where fewer than three quarters are left.
    assert " ".join(map(str, slots)) == "12 12 12 12 8 8 8 5 5 3 2 1"
    # Once a size for whole minibatches, and for the last short one where it came a fourth time.
    assert counted.captures == 6 + 1


def test_trials_that_leave_before_anything_is_recorded_are_gone_at_once():
    chunk = make_chunk(make_data(), configs_of(8))
    chunk.select([0, 1, 2, 4, 5, 6, 7])
    assert len(chunk.configs) == 7 and chunk.flat is chunk._flat


def test_recorded_steps_serve_new_values_and_are_recorded_again_for_new_constants(counted):
    configs = configs_of(3, optimizer="adam", weight_decay=0.1)
    found, expected = (make_chunk(make_data(), configs, recorded=on) for on in (True, False))
    values = {"lr": 0.5, "weight_decay": 0.1}, {"weight_decay": 0.0}, {"batch_size": 5}
    captures = []
    for epoch in range(16):
        for chunk in (found, expected):
            chunk.advance(epoch)
        torch.testing.assert_close(found.flat, expected.flat, rtol=1e-10, atol=1e-12)
        if epoch % 4 == 3 and epoch < 15:
            captures.append(counted.captures)
            new = {**found.network.configs[1], **values[epoch // 4]}
            for chunk in (found, expected):
                chunk.select([0, 2, 1], [None, None, new])
    # The weight decay is a constant of adam's step while all trials have the same value.
    assert captures == [2, 2, 4] and counted.captures > 4


class NothingWaits(TorchDispatchMode):
    """Refuses every operation that reads a number of a tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert torch.Tag.data_dependent_output not in func.tags, func
        assert (
            torch.Tag.dynamic_output_shape not in func.tags or func is torch.ops.aten.index.Tensor
        ), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sizes", [(9, 9), (9, 13)])
def test_nothing_waits_for_the_device_inside_an_epoch(counted, sizes, monkeypatch):
    data = make_data(weights=True)
    configs = fill(*({"batch_size": size, "dropout": 0.2, "schedule": "cosine"} for size in sizes))
    chunk = make_chunk(data, configs)
    for epoch in range(4):
        chunk.advance(epoch)
    captures = counted.captures
    monkeypatch.setattr(Tensor := torch.Tensor, "numpy", lambda tensor: pytest.fail("numpy"))
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: pytest.fail("tolist"))
    monkeypatch.setattr(
        StackedChunk, "_step", lambda chunk, shape, key: pytest.fail("a step was not replayed")
    )
    with NothingWaits():
        chunk.advance(4)
    assert counted.captures == captures > 0


def test_a_step_that_asks_the_host_is_found_out(monkeypatch):
    chunk = make_chunk(make_data(folds=3), configs_of(2))
    step = StackedChunk._step

    def asking(chunk, shape, key):
        step(chunk, shape, key)
        if bool(chunk.flat.isfinite().all()):
            return

    monkeypatch.setattr(StackedChunk, "_step", asking)
    with pytest.raises(CaptureError, match="waits for the device"):
        chunk.advance(0)


def test_draws_of_dropout_that_do_not_fit_are_made_part_by_part(monkeypatch):
    data = make_data(folds=3)
    configs = configs_of(2, dropout=0.3, width=8)
    whole = make_chunk(data, configs)
    monkeypatch.setattr(dropout, "_DRAW_BYTES", 2 * 4 * 2 * 9 * 16)
    parts = make_chunk(data, configs)
    assert (whole.draws.ahead, parts.draws.ahead) == (5, 2)
    for epoch in range(5):
        whole.advance(epoch)
        parts.advance(epoch)
    assert torch.equal(whole.flat, parts.flat)


def test_graphs_are_dropped_before_a_chunk_is_halved(monkeypatch):
    """Memory runs out in a replay: when the halves begin, all recordings have been dropped."""
    data = make_data()
    left = []
    begun = []
    take = Replays.take

    class Watched(StandIn):
        def __init__(self, device):
            super().__init__(device)
            gc.collect()
            begun.append(sum(tape() is not None for tape in left))

        def capture(self, step):
            tape = super().capture(step)
            left.append(weakref.ref(tape.__self__))
            return tape

    def failing(steps, shape, step):
        take(steps, shape, step)
        if steps.steps and len(begun) == 1:  # the chunk of four; its halves come after it
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setitem(RECORDERS, "cpu", Watched)
    monkeypatch.setattr(Replays, "take", failing)
    configs = configs_of(4)
    job = Job(seed=0, epochs=5, horizon=5, scoring=scoring_of(data), backend="recorded")
    chunk = Population("mlp", (0, 1, 2, 3), tuple(configs))
    outcomes = run_in_parts(job, data, chunk)
    assert [outcome.index for outcome in outcomes] == [(0, 1), (2, 3)]
    # the second half replays what the first one recorded
    assert len(left) == 1 + 2 and begun[:2] == [0, 0]
    monkeypatch.setattr(Replays, "take", take)
    (whole,) = run_in_parts(dataclasses.replace(job, pool=ChunkPool()), data, chunk)
    np.testing.assert_allclose(
        np.concatenate([o.curves for o in outcomes]), whole.curves, rtol=1e-9
    )


def both_searches(model, X, y, **options):
    """A search with eager steps and one with recorded steps; their curves agree."""
    options |= {"cv": 3, "scoring": "neg_log_loss", "dtype": "float64", "verbose": 0}
    eager, found = (gputune.tune(model, X, y, backend=b, **options) for b in ("eager", "recorded"))
    np.testing.assert_allclose(found.curves, eager.curves, rtol=1e-8)
    return eager, found


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [("mlp", "adam"), ("logistic", "sgd"), ("mlp", "adamhd"), (Linear, "sgd")],
)
def test_a_search_is_the_same(model, optimizer):
    rng = np.random.RandomState(0)
    X = rng.randn(60, 4)
    y = rng.randint(3, size=60)
    with torch.enable_grad():
        eager, found = both_searches(model, X, y, optimizer=optimizer, n_trials=5, max_epochs=4)
        assert found.best_model().predict(X).tolist() == eager.best_model().predict(X).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(9, 9), (9, 13)])
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam", "adamw"])
def test_on_a_gpu_graphs_give_the_numbers_of_eager_training(optimizer, sizes):
    X = np.random.RandomState(0).randn(200, 5)
    y = np.random.RandomState(1).randint(3, size=200)
    space = [{"batch_size": [size], "dropout": [0.0, 0.2], "lr": [1e-3, 1e-2]} for size in sizes]
    options = {"n_trials": 8, "max_epochs": 6, "optimizer": optimizer, "device": "cuda"}
    with torch.enable_grad():
        both_searches("mlp", X, y, space=space, **options)


def test_large_validation_rows_are_freed_and_read_again(monkeypatch):
    chunk = make_chunk(make_data(), configs_of(2), recorded=False)
    chunk.advance(0)
    before = chunk.scores()
    rows = next(iter(chunk.validation.kept.values()))
    chunk.release()  # the rows of small data stay
    assert next(iter(chunk.validation.kept.values())) is rows
    monkeypatch.setattr(validation, "_RELEASED_BYTES", 0)
    chunk.release()
    assert not chunk.validation.kept
    np.testing.assert_array_equal(chunk.scores(), before)
