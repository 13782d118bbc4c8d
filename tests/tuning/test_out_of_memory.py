"""An allocator that fails at the k-th step: parts that fit give the same results, and only the
others fail.
"""

import math
import pickle
from functools import partial, partialmethod

import numpy as np
import pytest
import torch
from scipy.stats import loguniform
from sklearn.datasets import load_iris

import gputune
from gputune.engine.compiled import CompiledChunk
from gputune.engine.job import Job
from gputune.engine.stacked import StackedChunk
from gputune.executors.processes import pickle_job
from gputune.ground.device import is_out_of_memory
from gputune.ground.errors import SearchFailedError
from gputune.population.population import Population
from gputune.sklearn import MLPClassifier, RandomizedSearchCV
from gputune.study.store import Store
from problems import fill

SPACE = {
    "lr": loguniform(1e-4, 0.1),
    "batch_size": [16, 32],
    "width": [8, 16],
    "dropout": [0.0, 0.1],
}


def tune(method="random", **more):
    how = {
        "space": SPACE,
        "n_trials": 8,
        "backend": "eager",
        "cv": 2,
        "max_epochs": 4,
        "verbose": 0,
        "workers": 1,
    }
    return gputune.tune("mlp", *IRIS, method=METHODS[method], **{**how, **more})


METHODS = {"random": "random", "halving": gputune.Halving(min_epochs=2)}
IRIS = load_iris(return_X_y=True)
ONE_SHAPE = {"lr": loguniform(1e-4, 0.1), "width": [8]}
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you "
        "tried ..."
    ),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if ..."),
    torch.AcceleratorError("CUDA error: out of memory", 2),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError(
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"
    ),
    MemoryError(),
]


@pytest.fixture(scope="module")
def whole():
    return {name: tune(name) for name in METHODS}


def fail(monkeypatch, when, error=ERRORS[0]):
    """Let the training raise where ``when(number from 1, number of trials)`` says so, steps or
    compiled epochs."""
    count = [0]
    failed = []

    def allocating(chunk, *arguments, train):
        count[0] += 1
        if when(count[0], len(chunk.network.configs)):
            failed.append(len(chunk.network.configs))
            raise error
        return train(chunk, *arguments)

    for kind, name in ((StackedChunk, "_step"), (CompiledChunk, "advance")):
        monkeypatch.setattr(kind, name, partialmethod(allocating, train=getattr(kind, name)))
    return failed


def assert_close(found, whole):
    np.testing.assert_allclose(found.curves, whole.curves, rtol=0, atol=1e-4)
    assert [t.state for t in found.trials] == [t.state for t in whole.trials]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_counts_as_out_of_memory(error):
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


@pytest.mark.parametrize(("method", "k", "error"), list(zip(METHODS, (1, 12), ERRORS)), ids=str)
def test_a_failure_at_the_kth_step_changes_nothing(whole, monkeypatch, method, k, error):
    failed = fail(monkeypatch, lambda number, trials: number == k, error)
    found = tune(method)
    assert len(failed) == 1
    if failed[0] == 1:  # a chunk of one trial cannot be halved
        assert sum("reason" in trial.detail for trial in found.trials) == 1
        return
    assert_close(found, whole[method])


@pytest.mark.parametrize("method", METHODS)
def test_what_never_fits_together_is_trained_one_by_one(whole, monkeypatch, method):
    failed = fail(monkeypatch, lambda number, trials: trials > 1)
    found = tune(method)
    assert failed
    assert_close(found, whole[method])


@pytest.mark.parametrize("method", METHODS)
def test_a_trial_that_does_not_fit_alone_fails_with_the_reason(
    whole, tmp_path, monkeypatch, method
):
    step = StackedChunk._step

    def allocating(chunk, *arguments):
        if any(
            config["batch_size"] == 16 and config["width"] == 16 for config in chunk.network.configs
        ):
            raise ERRORS[1]
        return step(chunk, *arguments)

    monkeypatch.setattr(StackedChunk, "_step", allocating)
    tune(method, study=tmp_path / "s.db")
    found = gputune.Study.open(tmp_path / "s.db")
    for trial, other in zip(found.trials, whole[method].trials, strict=True):
        big = (trial.params.get("batch_size", 32), trial.params.get("width", 128)) == (16, 16)
        assert ("reason" in trial.detail) == big
        if big:
            assert (
                trial.state == "failed"
                and math.isnan(trial.score)
                and trial.number != found.best_trial.number
            )
            assert trial.detail["reason"].startswith(
                "out of memory: [enforce fail at alloc_cpu.cpp:127]"
            )
        elif method == "random":
            assert trial.fold_scores == pytest.approx(other.fold_scores, abs=1e-4)
    assert any("reason" in trial.detail for trial in found.trials)


LONG = ["random", pytest.param("halving", marks=pytest.mark.long)]


@pytest.mark.cpu  # the plan of a GPU trains three members first, to measure them
@pytest.mark.parametrize("method", LONG)
def test_a_size_that_did_not_fit_is_not_tried_again(monkeypatch, method):
    """Chunks of 6 trials with memory for 2: one chunk of 6 fails, one of 3, and no other of that
    search.
    """
    call = partial(
        tune, method, space=ONE_SHAPE, n_trials=12, cv=3, include_default=False, memory=800_000
    )
    whole = call()
    failed = fail(monkeypatch, lambda number, trials: trials > 2)
    found = call()
    assert failed == [6, 3]
    np.testing.assert_allclose(found.curves, whole.curves, rtol=0, atol=1e-4)
    call()
    assert failed == [6, 3, 6, 3]  # another search, for which there may be more memory


def test_the_frozen_plan_stays_whole_when_a_chunk_does_not_fit(tmp_path, monkeypatch):
    fail(monkeypatch, lambda number, trials: trials > 2)
    tune(space=ONE_SHAPE, study=tmp_path / "s.db")
    with Store.open(tmp_path / "s.db") as store:
        assert max(len(chunk.trials) for chunk in store.plan()) > 2


def test_workers_remember_what_did_not_fit():
    """A job arrives again with every chunk, and still knows the failures in this process."""
    chunk = Population("mlp", tuple(range(8)), tuple(fill(*({"width": 8} for _ in range(8)))))
    wider = Population("mlp", (8, 9), tuple(fill({"width": 100}, {"width": 100})))
    sent = pickle_job(Job(seed=0, epochs=1, horizon=1))
    first = pickle.loads(sent)
    second = pickle.loads(sent)
    first.pool.note_too_big(chunk)
    assert (second.pool.trials_at_once(chunk), second.pool.trials_at_once(wider)) == (4, 2)
    learned = Job(seed=0, epochs=1, horizon=1, pool=second.pool)
    second.pool.note_too_big(chunk.part(0, 4))
    assert pickle.loads(pickle_job(learned)).pool.trials_at_once(chunk) == 2
    # another search
    assert (
        pickle.loads(pickle_job(Job(seed=0, epochs=1, horizon=1))).pool.trials_at_once(chunk) == 8
    )
    assert pickle.loads(pickle_job(learned)).pool.trials_at_once(chunk) == 2


def test_parts_that_have_not_begun_when_time_is_over_wait(tmp_path, monkeypatch):
    """A timeout holds to within one epoch of a chunk, in however many parts that trains."""
    whole = tune(space=ONE_SHAPE)
    with monkeypatch.context() as patch:
        fail(patch, lambda number, trials: trials > 3)
        cut = tune(space=ONE_SHAPE, study=tmp_path / "s.db", timeout=1e-9)
    states = [trial.state for trial in cut.trials]
    assert 1 <= states.count("stopped") <= 3 and set(states) == {"stopped", "waiting"}
    assert_close(tune(space=ONE_SHAPE, study=tmp_path / "s.db"), whole)


def test_a_search_of_which_nothing_fits_says_so_and_another_error_is_raised(monkeypatch):
    with monkeypatch.context() as patch:
        fail(patch, lambda number, trials: True)
        with pytest.raises(
            SearchFailedError, match="did not fit into memory .* Search smaller widths"
        ):
            tune()
    fail(
        monkeypatch, lambda number, trials: number == 3, RuntimeError("shapes cannot be multiplied")
    )
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        tune()


def test_the_bar_takes_back_what_was_lost(monkeypatch):
    told = []
    monkeypatch.setattr(
        "gputune.tuning.progress.Progress.advance", lambda bar, number, curves: told.append(number)
    )
    fail(monkeypatch, lambda number, trials: number == 6)  # in the second epoch
    tune(space={"lr": [1e-3, 1e-2, 1e-1]})
    assert sum(told) == 3 * 4 and told[:2] == [3, -3]


def test_the_search_of_scikit_learns_kind_is_halved_too(monkeypatch):
    def search():
        model = MLPClassifier(max_iter=3, random_state=0)
        space = {"learning_rate_init": [1e-3, 1e-2, 1e-1], "hidden_layer_sizes": [(8, 8)]}
        return RandomizedSearchCV(model, space, n_iter=3, cv=3, random_state=0).fit(*IRIS)

    whole = search()
    with monkeypatch.context() as patch:
        failed = fail(patch, lambda number, trials: number == 2)
        found = search()
    assert failed and failed[0] > 1
    np.testing.assert_allclose(
        found.cv_results_["mean_test_score"], whole.cv_results_["mean_test_score"], atol=1e-4
    )
    fail(monkeypatch, lambda number, trials: True)
    with pytest.raises(
        MemoryError, match="This trial does not fit into memory, even if it trains alone. Make it"
    ):
        search()
