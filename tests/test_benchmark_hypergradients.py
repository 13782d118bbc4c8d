"""The benchmark of hypergradients, with few members: the modes agree before a ratio is shown. No time is asserted."""

import json
import math
from importlib import import_module
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def script(monkeypatch):
    """Import a file of scripts/ as Python does when it is run from there."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return import_module


@pytest.fixture
def benchmark(script):
    return script("benchmark.studies.hypergradients")


@pytest.fixture
def small(script, benchmark, monkeypatch):
    """The command with 10 members and one epoch."""
    main = script("benchmark.__main__")
    monkeypatch.setattr(benchmark, "MEMBERS", (10,))
    return lambda out: main.main(["--hypergradients", "--epochs", "1", "--repeats", "1", "--out", str(out)])


@pytest.mark.parametrize("optimizer", ("sgd", "adam"))
def test_the_same_work_gives_the_same_numbers(benchmark, optimizer):
    kinds = benchmark.kinds(optimizer, 10, 2)
    results = {name: run() for name, run in kinds.items()}
    assert benchmark.disagreement(results) < 1e-4
    weights = results["plain"]
    assert weights.shape == (10, 64 * 32 + 32 + 32 * 10 + 10)
    assert not torch.equal(weights[0], weights[1])  # the rates differ
    ten = benchmark.slopes(results["reverse, 10 rates"])
    assert ten.shape == (10, 5, 2)
    assert all(ten[:, s, layer].abs().min() > 0 for s in range(5) for layer in range(2))
    for name in ("reverse, 1 rate", "finite differences, 1 rate"):
        torch.testing.assert_close(benchmark.slopes(results[name]), ten.sum((1, 2)), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", ("forward, 1 rate", "checkpointed, 10 rates", "plain"))
def test_what_differs_is_seen(benchmark, kind):
    results = {name: run() for name, run in benchmark.kinds("sgd", 5, 1).items()}
    tensor = results[kind] if kind == "plain" else results[kind].gradients["lr"]
    tensor[0] *= 1.5
    assert benchmark.disagreement(results) > benchmark.AGREEMENT
    tensor[0] = math.nan
    assert math.isnan(benchmark.disagreement(results))


def test_the_report_is_written(small, tmp_path, capsys):
    threads = torch.get_num_threads()
    assert small(tmp_path) == 0
    assert torch.get_num_threads() == threads
    (numbers,), (page,) = tmp_path.glob("hypergradients-*.json"), tmp_path.glob("hypergradients-*.md")
    costs = json.loads(numbers.read_text())["costs"]
    assert [(c["optimizer"], c["members"], c["steps"]) for c in costs] == [("sgd", 10, 10), ("adam", 10, 10)]
    text = page.read_text()
    assert text in capsys.readouterr().out
    for cost in costs:
        assert len(cost["seconds"]) == 7 and min(cost["seconds"].values()) > 0
        for kind, seconds in cost["seconds"].items():
            plain, optimised = (seconds / cost["seconds"][base] for base in ("plain", "optimised"))
            row = f"| {cost['optimizer']} | 10 | 10 | {kind} | {seconds * 1e3:.2f} | {plain:.2f} | {optimised:.2f} |"
            assert row in text


@pytest.mark.long
@pytest.mark.parametrize("worst", (0.01, math.nan))
def test_no_ratio_is_shown_where_results_differ(benchmark, small, monkeypatch, tmp_path, capsys, worst):
    found = iter((0.0, worst))  # of the second work
    monkeypatch.setattr(benchmark, "disagreement", lambda results: next(found))
    assert small(tmp_path) == 1
    out = capsys.readouterr().out
    assert out.startswith("NO RATIO: slopes or weights that must be the same differ by") and "|" not in out
    assert list(tmp_path.iterdir()) == []
