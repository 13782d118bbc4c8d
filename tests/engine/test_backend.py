"""The choice of a backend for chunks: by the user's word, the device and the needs of a trial."""

import pytest
import torch

import gputune
from gputune.engine.backends.selection import choose_backend, trains_as
from gputune.ground.types import OPTIMIZERS
from problems import fill, needs_compiled_code
from refused import refused

CPU = torch.device("cpu")
GPU = torch.device("cuda", 1)
META = torch.device("meta")


@pytest.mark.parametrize(
    ("word", "device", "kind", "backend"),
    [
        pytest.param("auto", CPU, "mlp", "compiled", marks=[needs_compiled_code, pytest.mark.cpu]),
        ("eager", CPU, "mlp", "eager"),
        ("auto", GPU, "mlp", "recorded"),
        ("recorded", GPU, "mlp", "recorded"),
        ("eager", GPU, "mlp", "eager"),
        ("stacked", GPU, "module", "recorded"),
        ("auto", META, "mlp", "eager"),
    ],
)
def test_the_backend_of_a_word(word, device, kind, backend):
    choice = choose_backend(word, device, torch.float32, kind)
    assert (choice.name, choice.told) == (backend, "")


def test_what_cannot_be_had_is_refused():
    with refused("trains on the CPU, but the device is 'cuda:1'. Choose device='cpu'"):
        choose_backend("compiled", GPU, torch.float32)
    with refused("a CPU or a CUDA device, but the device is 'meta'. Choose one of these"):
        choose_backend("recorded", META, torch.float32)
    words = "'auto', 'kernel', 'compiled', 'recorded', 'eager', 'merged', 'loop', 'stacked'"
    with refused(f"backend must be one of {words}, got 'fast'"):
        gputune.tune("mlp", [[0.0], [1.0]], [0, 1], backend="fast")


@pytest.mark.parametrize(
    ("backend", "kind", "config", "way"),
    [
        ("compiled", "mlp", {}, "compiled"),
        ("compiled", "linear", {}, "compiled"),
        ("compiled", "mlp", {"ema": 0.9}, "compiled"),
        ("compiled", "mlp", {"clip_norm": 1.0}, "recorded"),
        ("compiled", "mlp", {"optimizer": "adamhd"}, "eager"),
        ("compiled", "mlp", {"depth": 64}, "eager"),
        ("compiled", "module", {}, "recorded"),
        ("compiled", "module", {"optimizer": "adamhd"}, "eager"),
        ("recorded", "module", {}, "recorded"),
        ("kernel", "module", {}, "recorded"),
        ("eager", "module", {}, "eager"),
        ("eager", "mlp", {}, "eager"),
    ],
)
def test_how_a_trial_trains(backend, kind, config, way):
    assert trains_as(backend, kind, {**fill({})[0], **config}) == way


def test_the_optimizers_whose_steps_are_recorded():
    taken = [
        word
        for word in OPTIMIZERS
        if trains_as("recorded", "mlp", {"optimizer": word}) == "recorded"
    ]
    assert taken == ["sgd", "nesterov", "adam", "adamw", "rmsprop", "lion", "muon", "schedulefree"]
