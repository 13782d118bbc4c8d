"""gputune check: its laws on this machine, its loop compared with the oracle, and its output if a
law fails.
"""

import json
import math
import os
from dataclasses import replace

import pytest
import torch

import reference
from command_line import run
from gputune.check import check, laws
from gputune.check.check import CASES, LAWS, Law, checks_of
from gputune.engine import backend
from gputune.engine.backend import Findings, Speed, keep_findings, read_findings
from problems import rows_of

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder in which findings are stored."""
    monkeypatch.setattr(backend, "cache_folder", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def two_laws(folder, monkeypatch):
    """One law that holds and one that fails, on a machine with a known speed."""
    found = {"eager": 1e-13, "recorded": 3e-7, "compiled": 0.0}
    broken = Law("a law", lambda device, backend: found[backend])
    lost = Law("another", lambda device, backend: 1 / 0, backends=())
    monkeypatch.setattr(check, "LAWS", (broken, lost))
    monkeypatch.setattr(check, "backends_of", lambda device: ("eager", "recorded", "compiled"))
    monkeypatch.setattr(check, "measure_speed", lambda device, backend: Speed(1e-4, 1e-5))


def on(device):
    """Every check of a device, by name."""
    checks = checks_of(torch.device(device))
    # A recorded step is the eager one.
    marked = [
        pytest.param(
            law,
            b,
            marks=[pytest.mark.long] * (b == "eager" and "recorded" in law.backends),
            id=f"{law.name}, {b}",
        )
        for law, b in checks
    ]
    return pytest.mark.parametrize("law, backend", marked)


@on("cpu")
def test_a_law_holds(law, backend):
    assert law.measure(CPU, backend) <= law.allowed


@pytest.mark.parametrize("name", CASES)
def test_the_loop_is_the_oracle(name):
    case = CASES[name]
    data = case.data(CPU)
    configs = case.complete()
    for fold in range(1, data.n_folds):  # the oracle knows no absent class
        x, y, weights = rows_of(data, fold)
        lengths = {"epochs": case.epochs, "max_epochs": case.horizon}
        expected = reference.train_mlp(
            x, y, configs[0], n_outputs=data.n_outputs, weights=weights, **lengths
        ).state_dict()
        for key, tensor in case.plain_networks[fold, 0].state_dict().items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "law", [law for law in LAWS if "plain loop" in law.name or "members that" in law.name]
)
def test_a_step_that_is_wrong_is_found(law, monkeypatch):
    """As if an update were off by a millionth: by a thousandth in single precision."""
    train_chunk = laws.train_chunk

    def train(job, data, chunk):
        trained = train_chunk(job, data, chunk)
        trained.flat.mul_(1 + 10 * law.allowed)
        return trained

    monkeypatch.setattr(laws, "train_chunk", train)
    if "that leave" in law.name:  # which compares two trainings
        monkeypatch.setattr(laws, "difference", lambda found, expected: math.nan)
    assert not law.measure(CPU, "eager") <= law.allowed


@pytest.mark.parametrize(
    ("case", "part"), [("weights", "weights"), ("regression", "weights"), ("regression", "y")]
)
def test_what_is_read_of_another_fold_is_found(case, part, monkeypatch):
    train_chunk = laws.train_chunk

    def train(job, data, chunk):
        return train_chunk(job, replace(data, **{part: getattr(data, part).roll(1, 0)}), chunk)

    monkeypatch.setattr(laws, "train_chunk", train)
    assert laws.from_plain_loop(CASES[case], CPU, "eager") > 1e-3


@pytest.mark.parametrize(
    ("name", "limit", "value", "message"),
    [
        (
            "members that leave change nothing",
            "_DIVERGING",
            0.1,
            r"\(1, 2, 3\) should stay, but \(0, 1, 2, 3, 4\) did",
        ),
    ],
)
def test_a_drill_must_have_happened(name, limit, value, message, monkeypatch):
    monkeypatch.setattr(f"gputune.check.laws.{limit}", value)
    (law,) = (law for law in LAWS if law.name == name)
    with pytest.raises(RuntimeError, match=message):
        law.measure(CPU, "eager")


def test_the_table(two_laws):
    code, out, err = run("check", "--device", "cpu")
    assert code == 1
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "a law recorded 3e-07 1e-10 0.0 s FAILED" in lines
    assert "a law eager 1e-13 1e-10 0.0 s ok" in lines
    assert "FAILED another, -: ZeroDivisionError: division by zero" in lines
    assert "cpu compiled 3,333 99,010" in lines
    assert any(line.startswith("Your own module trains here with: recorded (") for line in lines)
    assert "has timed it" in out and "⟦" not in out
    assert "2 of 4 checks failed on" in err and "do not trust results" in err


def test_json_and_what_is_kept(two_laws):
    code, out, _ = run("check", "--device", "cpu", "--json")
    told = json.loads(out)
    assert code == 1 and not told["ok"]
    assert [law["difference"] for law in told["laws"]] == [1e-13, 3e-7, 0.0, None]
    assert told["speeds"][2] == {
        "device": "cpu",
        "backend": "compiled",
        "step": 1e-4,
        "member": 1e-5,
    }
    found = read_findings(CPU)
    assert found.failed == {"recorded": "a law", "eager": "another"}
    assert found.speeds["compiled"] == Speed(1e-4, 1e-5)
    assert "'a law' does not hold" in found.why_not("recorded") and not found.why_not("compiled")


def test_what_another_device_fails_is_none_of_the_cpus(two_laws, monkeypatch):
    kept = {}
    monkeypatch.setattr(
        check, "keep_findings", lambda device, findings: kept.update({device.type: findings})
    )
    for name in ("device_name", "_facts"):
        monkeypatch.setattr(check, name, str)
    check.check(torch.device("meta"), print)
    assert (
        kept["meta"].failed == {"recorded": "a law", "eager": "another"}
        and len(kept["meta"].speeds) == 3
    )
    assert kept["cpu"] == Findings(None, {"compiled": Speed(1e-4, 1e-5)})


def test_speeds_alone_forget_no_law(folder):
    keep_findings(CPU, Findings({"eager": "a law"}, {"eager": Speed(1, 2)}))
    keep_findings(CPU, Findings(None, {"recorded": Speed(3, 4)}))
    assert read_findings(CPU) == Findings(
        {"eager": "a law"}, {"eager": Speed(1, 2), "recorded": Speed(3, 4)}
    )


@pytest.mark.parametrize(
    "text", ["", "[]", '{"failed": {}}', '{"failed": {}, "speeds": {"eager": {"a": 1}}}']
)
def test_a_file_that_says_nothing_is_no_finding(text, folder):
    keep_findings(CPU, Findings({}, {})).write_text(text)
    assert read_findings(CPU) == Findings()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_in_the_place_of_the_findings_is_not_waited_for(folder):
    path = keep_findings(CPU, Findings({}, {}))
    path.unlink()
    os.mkfifo(path)
    assert read_findings(CPU) == Findings()


def test_where_there_is_no_place_nothing_is_kept(folder, monkeypatch):
    monkeypatch.setattr(backend, "cache_folder", lambda: None)
    assert keep_findings(CPU, Findings({}, {})) is None
    assert read_findings(CPU) == Findings()


def test_from_how_many_members_on_a_gpu_pays(two_laws):
    speeds = {("cuda", "recorded"): Speed(1e-3, 1e-7), ("cpu", "compiled"): Speed(0, 1.01e-5)}
    report = check.CheckReport("a card", "", (), speeds)
    assert "faster on a card than compiled on the CPU from about 100 members on." in str(report)
    never = check.CheckReport("a card", "", (), speeds | {("cuda", "recorded"): Speed(1e-3, 2e-5)})
    assert "compiled on the CPU never." in str(never)


def test_a_device_that_is_not_there():
    code, _, err = run("check", "--device", "cuda:9")
    assert code == 2 and "--device" in err
