"""The reasons for not training in the kernel, and the splitting of launches; the simulated devices
test its training.
"""

import re
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.cuda import _utils

from gputune.engine import kernel
from gputune.engine.backends.selection import choose_backend, trains_as
from gputune.engine.kernel import KernelChunk, lacks
from problems import fill, make_data
from refused import refused

GPU = torch.device("cuda", 0)
CARD = SimpleNamespace(
    multi_processor_count=4,
    shared_memory_per_block_optin=232_448,
    shared_memory_per_multiprocessor=233_472,
)


@pytest.fixture
def card(monkeypatch):
    """A card that the kernel is for, on a machine with NVRTC."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: CARD)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_utils, "_get_gpu_rtc_library", lambda: None)


NVRTC = (
    "NVRTC library. pip install 'nvidia-cuda-{}.*' brings the library. Or choose backend='graph'."
)


@pytest.mark.parametrize(
    ("device", "capability", "version", "words"),
    [
        (
            "cpu",
            (9, 0),
            "13.0",
            "trains on a GPU, but the device is 'cpu'. Choose device='cuda' or backend='auto'.",
        ),
        (
            "cuda:0",
            (7, 5),
            "13.0",
            "8.0 (Ampere) or newer, but a card has 7.5. Choose backend='graph' or backend='auto'.",
        ),
        ("cuda:0", (9, 0), "13.0", NVRTC.format("nvrtc==13.0")),
        ("cuda:0", (9, 0), "12.8", NVRTC.format("nvrtc-cu12==12.8")),
    ],
)
def test_where_it_cannot_be_had(device, capability, version, words, card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(
        _utils,
        "_get_gpu_rtc_library",
        Mock(side_effect=OSError("Could not find any NVRTC library")),
    )
    with refused(re.escape(words)):
        choose_backend("kernel", torch.device(device), torch.float32)


@pytest.mark.parametrize(
    ("config", "data", "part"),
    [
        ({}, {}, ""),
        ({"clip_norm": 1.0}, {}, "clip_norm"),
        ({"ema": 0.9}, {}, "ema"),
        ({"beta2": 0.9}, {}, "beta2"),
        ({"optimizer": "rmsprop"}, {}, "the optimizer 'rmsprop' (sgd, nesterov, adam, adamw)"),
        ({"depth": 5}, {}, "5"),
        ({"width": 129}, {}, "192"),
        ({}, {"d": 300}, "300"),
        ({}, {"k": 70}, "70"),
        ({}, {"dtype": torch.float64}, "float64"),
    ],
)
def test_unsupported_trials_are_recorded(config, data, part, card):
    (config,) = fill({"width": 16, **config})
    data = make_data(**{"dtype": torch.float32, **data})
    found = lacks(config, "mlp", data)
    assert part in found and bool(part) == bool(found)
    assert trains_as("kernel", "mlp", config, data=data) == ("recorded" if part else "kernel")


@pytest.fixture
def chunk():
    """One member with 10 steps and two members with 4, on a card with two blocks."""
    chunk = object.__new__(KernelChunk)
    chunk.turns = np.cumsum([2] * 4 + [1] * 6)
    return chunk


@pytest.mark.parametrize(
    ("pace", "ahead", "ends"),
    [
        (np.inf, None, [10]),  # fewer turns than the first launch has
        (16.0, None, [2, 4, 8, 10]),  # 4 turns in a quarter of a second
        (0.1, None, [*range(1, 11)]),
        (np.inf, 3, [3, 6, 9, 10]),
    ],
)
def test_a_launch_is_short_and_ends_with_its_draws(pace, ahead, ends, chunk):
    chunk.pace = pace
    chunk.draws = None if ahead is None else SimpleNamespace(ahead=ahead)
    found = []
    begin = 0
    while begin < 10:
        found.append(begin := chunk._end(begin))
    assert found == ends


def test_a_card_holds_as_many_blocks_as_its_memory_and_its_threads(card):
    of = kernel._blocks(SimpleNamespace(shared=100_000, threads=256), GPU)
    assert of == 4 * 2
    assert kernel._blocks(SimpleNamespace(shared=1000, threads=256), GPU) == 4 * 8
    assert kernel._blocks(SimpleNamespace(shared=232_448, threads=1024), GPU) == 4
