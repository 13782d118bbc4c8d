"""The memory that may be taken: what the system has, or less where a limit is set."""

import resource
import sys
from pathlib import Path

import pytest

from gputune import memory
from gputune.memory import free_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_it_is_some_of_the_machines_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_GROUP", tmp_path / "none")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    lines = map(str.split, Path("/proc/meminfo").read_text().splitlines())
    total = next(int(words[1]) * 1024 for words in lines if words[0] == "MemTotal:")
    assert 0 < free_memory() < total


def test_a_limit_of_the_process_or_of_its_group_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_GROUP", tmp_path / "memory.max")
    memory._GROUP.write_text("1000000\n")
    assert free_memory() == 1_000_000
    memory._GROUP.write_text("max\n")
    assert free_memory() > 1_000_000
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    monkeypatch.setattr(resource, "getrlimit", lambda which: (taken + (1 << 30), -1))
    assert free_memory() <= 1 << 30
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1000, -1))
    assert free_memory() == 0


def test_a_system_that_says_nothing_sets_no_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "Path", lambda name: tmp_path / "none")
    monkeypatch.setattr(memory, "_GROUP", tmp_path / "none")
    monkeypatch.setattr(sys, "platform", "win32")
    assert free_memory() == sys.maxsize
