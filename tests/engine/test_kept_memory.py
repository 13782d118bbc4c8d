"""A process keeps the memory of freed tensors while a module trains, and returns it afterwards."""

import os
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

import gputune
from gputune.engine import train
from gputune.ground import memory

GNU = memory._gnu_allocator() is not None


def resident():
    """Return the bytes of main memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def faults_of_a_large_tensor():
    """Make and free a tensor of 64 MiB a few times, and return the number of page faults of the
    last time."""
    faults = 0
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16 << 20)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return faults


@pytest.fixture(autouse=True)
def usual_allocator(monkeypatch):
    """The allocator as in a new process, whatever earlier tests have left."""
    monkeypatch.setattr(memory, "_users", 0)
    if GNU:
        usual = memory._USUAL_OWN_MEMORY, memory._USUAL_TRIM
        memory._set_thresholds(memory._gnu_allocator(), *usual)


@pytest.mark.skipif(not GNU, reason="only the GNU C library is set")
def test_freed_memory_is_kept_for_the_next_tensor_and_returned_at_the_end():
    with memory.keep_freed_memory():
        with memory.keep_freed_memory():
            assert faults_of_a_large_tensor() < 100
        assert faults_of_a_large_tensor() < 100
        inside = resident()
    assert resident() < inside - (32 << 20)
    assert faults_of_a_large_tensor() > 100


@pytest.mark.skipif(not GNU, reason="only the GNU C library is set")
@pytest.mark.parametrize("setting", memory._SETTINGS)
def test_an_allocator_that_the_user_has_set_is_left_unchanged(monkeypatch, setting):
    monkeypatch.setenv(setting, "glibc.malloc.trim_threshold=1000000")
    monkeypatch.setattr(memory, "_gnu_allocator", memory._gnu_allocator.__wrapped__)
    with memory.keep_freed_memory():
        assert faults_of_a_large_tensor() > 100


class Net(nn.Linear):
    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)


def test_a_module_trains_with_kept_memory(monkeypatch):
    begun = []
    keep = memory.keep_freed_memory
    monkeypatch.setattr(train, "keep_freed_memory", lambda: begun.append(1) or keep())
    X, y = torch.randn(40, 3), torch.arange(40) % 2
    options = {"cv": 2, "n_trials": 1, "max_epochs": 1, "workers": 1, "verbose": 0}
    gputune.tune("mlp", X, y, **options)
    assert not begun
    gputune.tune(Net, X, y, **options)
    assert begun
    assert memory._users == 0
