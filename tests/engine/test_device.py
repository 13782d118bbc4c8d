"""Which device "auto" is: nobody has a GPU here, so one is named, and its speeds are given."""

import pytest
import torch

import gputune
from gputune.engine import backend, choice
from gputune.engine.backend import Findings, Speed, choose_device, keep_findings, read_findings
from gputune.engine.backends.selection import choose_backend
from gputune.engine.choice import (
    DeviceChoice,
    Workload,
    device_for,
    device_for_solver,
    work_of_a_step,
)
from problems import fill, needs_compiled_code

CPU = torch.device("cpu")
GPU = torch.device("cuda")
CONFIGS = fill(*({"lr": lr, "width": 64, "batch_size": 32} for lr in (1e-3, 1e-2)))
WORK = {
    "kind": "mlp",
    "configs": CONFIGS,
    "rows": [320, 320],
    "n_features": 64,
    "n_outputs": 10,
    "epochs": 50,
}

pytestmark = [pytest.mark.cpu, needs_compiled_code]


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine with a GPU and no stored findings; returns the places of speed measurements."""
    monkeypatch.setattr(backend, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "device_name", lambda device: f"a {device.type}")
    monkeypatch.setattr(choice, "device_name", lambda device: f"a {device.type}")
    monkeypatch.setattr(
        choice, "choose_device", lambda word: GPU if word == "auto" else torch.device(word)
    )
    measured = []

    def measure(device, backend):
        measured.append((device.type, backend))
        return SPEEDS[device.type]

    monkeypatch.setattr(choice, "measure_speed", measure)
    return measured


SPEEDS = {"cpu": Speed(0.0, 1e-4), "cuda": Speed(1e-3, 1e-6)}
"""2,000 steps of a member in the work above, in 2 folds x 2 trials; of a chunk 500."""


def test_what_is_soon_done_stays_on_the_cpu_and_no_gpu_is_asked(machine):
    work = Workload(**WORK)
    assert work.seconds(SPEEDS["cpu"], by_member=True) == pytest.approx(0.2)
    assert device_for("auto", work) == DeviceChoice(
        CPU, "compiled code takes about 0.2 s on the CPU"
    )
    assert machine == [("cpu", "compiled")]


def test_what_is_long_goes_where_it_is_done_first(machine):
    long = Workload(**WORK | {"epochs": 5000})
    assert long.seconds(SPEEDS["cuda"], by_member=False) == pytest.approx(50.2)
    words = "compiled code takes about 20 s on the CPU, a cuda about 50 s"
    assert device_for("auto", long) == DeviceChoice(CPU, words)
    many = Workload(**WORK | {"epochs": 5000, "configs": CONFIGS * 50})
    assert device_for("auto", many) == DeviceChoice(GPU)
    assert machine == [("cpu", "compiled"), ("cuda", "recorded")]  # once on a machine


@pytest.mark.parametrize(("broken", "device"), [("cpu", GPU), ("cuda", CPU)])
def test_a_device_that_cannot_be_timed_is_not_taken(monkeypatch, broken, device):
    def measure(device, backend):
        if device.type == broken:
            raise OSError("no such code")
        return SPEEDS[device.type]

    monkeypatch.setattr(choice, "measure_speed", measure)
    long = Workload(**WORK | {"epochs": 5000, "configs": CONFIGS * 50})
    with pytest.raises(OSError):
        device_for("auto", long)
    monkeypatch.delenv("GPUTUNE_STRICT_BACKENDS")
    if broken == "cpu":
        with pytest.warns(
            RuntimeWarning, match="CPU failed, so the GPU trains: OSError: no such code"
        ):
            assert device_for("auto", long) == DeviceChoice(device)
    else:
        assert device_for("auto", long) == DeviceChoice(
            device, "timing a cuda failed: OSError: no such code"
        )


def test_a_speed_that_is_known_is_not_measured_and_trials_that_a_sampler_will_ask_for_count(
    machine,
):
    keep_findings(CPU, Findings(None, {"compiled": SPEEDS["cpu"]}))
    device_for("auto", Workload(**WORK))
    assert machine == []
    assert device_for("auto", Workload(**WORK, repeats=100.0)).why.startswith(
        "compiled code takes about 20 s"
    )


@pytest.mark.parametrize(
    ("word", "given", "device"),
    [
        ("auto", {"kind": "module"}, GPU),  # which no compiled code trains
        ("auto", {"backend": "recorded"}, GPU),
        ("auto", {"differentiated": True}, GPU),
        ("auto", {"configs": fill({"optimizer": "adamhd"})}, GPU),
        ("auto", {"held_by": GPU}, GPU),
        ("auto", {"backend": "compiled"}, CPU),
        ("cuda", {}, GPU),
        ("cpu", {}, CPU),
    ],
    ids=str,
)
def test_what_is_asked_for_or_never_compiled_needs_no_speed(word, given, device, machine):
    assert device_for(word, Workload(**WORK | given)) == DeviceChoice(device)
    assert machine == []


def test_what_is_solved_stays_on_the_cpu(machine):
    found = device_for("auto", Workload(**WORK, solved=True))
    assert (
        found == device_for_solver("auto")
        and found.device == CPU
        and "run one after another" in found.why
    )
    assert device_for_solver("cuda") == DeviceChoice(GPU) and machine == []


def test_a_gpu_that_failed_its_laws_is_not_taken():
    keep_findings(GPU, Findings({"eager": "a law", "recorded": "another"}, {}))
    found = device_for("auto", Workload(**WORK | {"configs": CONFIGS * 50, "epochs": 5000}))
    assert found == DeviceChoice(
        CPU, "gputune check found that 'a law' does not hold for this backend on this device"
    )


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (Findings(), ("recorded", "")),
        (Findings({}, {"eager": Speed(2e-3, 0), "recorded": Speed(1e-3, 0)}), ("recorded", "")),
        (Findings({}, {"eager": Speed(1e-3, 0), "recorded": Speed(2e-3, 0)}), ("eager", "")),
        (
            Findings({"recorded": "a law"}, {}),
            ("eager", Findings({"recorded": "a law"}).why_not("recorded")),
        ),
        (Findings({}, {"recorded": Speed(2e-3, 0), "kernel": Speed(1e-3, 0)}), ("kernel", "")),
        (Findings({}, {"recorded": Speed(1e-3, 0), "kernel": Speed(2e-3, 0)}), ("recorded", "")),
        (Findings(None, {"recorded": Speed(2e-3, 0), "kernel": Speed(1e-3, 0)}), ("recorded", "")),
        (Findings({"kernel": "a law"}, {"kernel": Speed(1e-3, 0)}), ("recorded", "")),
    ],
)
def test_what_the_check_found_says_how_a_gpu_trains(found, expected):
    keep_findings(GPU, found)
    choice = choose_backend("auto", GPU, torch.float32)
    assert (choice.name, choice.told) == expected
    for others in ((torch.float64, "mlp"), (torch.float32, "module")):  # which no kernel trains
        assert choose_backend("auto", GPU, *others).name != "kernel"


@pytest.mark.parametrize(
    ("failed", "options", "said"),
    [
        (
            {"compiled": "a law"},
            {"device": "cpu"},
            "recorded steps, slower than in compiled code: gputune check found",
        ),
        (None, {}, "the CPU (device='cuda' takes the GPU): compiled code"),
    ],
)
def test_a_search_says_where_and_how_it_trains_and_why(failed, options, said, capsys, iris):
    """On a machine with a GPU that would be used if the user asked for it."""
    keep_findings(CPU, Findings(failed, {}))
    study = gputune.tune("mlp", *iris, n_trials=2, max_epochs=2, cv=2, **options)
    assert f"note: trials train {'in' if failed else 'on'} {said}" in capsys.readouterr().err
    assert len(study.trials) == 2
    assert failed or read_findings(CPU).speeds["compiled"] == SPEEDS["cpu"]


def test_the_cost_of_a_step_is_that_of_its_parameters():
    config = CONFIGS[0]
    assert work_of_a_step(config, 64, 10, 320, "mlp") == 1.0
    assert work_of_a_step(config | {"batch_size": 500}, 64, 10, 74, "mlp") == 2.0
    assert work_of_a_step(config, 64, 10, 320, "linear") == pytest.approx(650 / 8970)


OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
    "driver."
)


@pytest.mark.parametrize(
    ("built", "hidden", "driver", "said"),
    [
        (None, None, None, r"torch .* is built without CUDA. Install a build with CUDA"),
        ("13.0", "", None, "CUDA_VISIBLE_DEVICES='' hides every GPU. Unset it"),
        ("13.0", "-1", None, "CUDA_VISIBLE_DEVICES='-1' hides every GPU"),
        ("13.0", None, OLD, "torch says: The NVIDIA driver on your system is too old"),
        (
            "13.0",
            None,
            "Found no NVIDIA driver on your system.",
            "torch says: Found no NVIDIA driver",
        ),
        ("13.0", None, None, "torch finds no GPU. Look at the output of nvidia-smi"),
    ],
)
def test_a_gpu_that_is_not_there(built, hidden, driver, said, monkeypatch):
    def init():
        if driver:
            raise RuntimeError(f"{driver}\nMore words.")

    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1 if driver == OLD else 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    for word in ("cuda", "cuda:3"):
        with pytest.raises(
            gputune.InputError, match=rf"this machine \(cpu\), got '{word}'. {said}"
        ):
            choose_device(word)
