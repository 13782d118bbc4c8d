"""scripts/on_gpu: what it lays out, what it leaves out, what it says of a step; the whole of it where there is time."""

import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/on_gpu"


@pytest.fixture(scope="module")
def on_gpu():
    loader = importlib.machinery.SourceFileLoader("on_gpu", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("on_gpu", loader))
    loader.exec_module(module)
    return module


@pytest.mark.long
def test_a_plain_python_imports_it(on_gpu, tmp_path, monkeypatch):
    """Where all that is missing in one with torch and scikit-learn alone is missing; joblib brings cloudpickle."""
    monkeypatch.setattr(on_gpu, "find_spec", lambda name: None if name != "cloudpickle" else name)
    path = str(on_gpu.importable(tmp_path))
    for name in ("polars", "pandas", "pyarrow", "matplotlib", "optuna", "ray", "onnx", "pytest", "hypothesis"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError({name!r})")
    search = "n_trials=1, max_epochs=1, cv=2, device='cpu'"
    code = (
        "import gputune.check.check, gputune.cli.main, gputune.engine.backend, tqdm.auto; "
        f"print(gputune.tune('mlp', [[0.], [1.]] * 9, [0, 1] * 9, {search}))"
    )
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Study(mlp, 1 trial" in done.stdout


def test_what_is_missing_is_named(on_gpu, monkeypatch):
    monkeypatch.setattr(on_gpu, "find_spec", lambda name: None)
    monkeypatch.setattr(on_gpu.shutil, "which", lambda name: None)
    missing = {name: missing for name, _, _, missing in on_gpu.steps("cuda", tiny=True)}
    assert missing == {
        "check": "", "tests": "pytest is not installed", "sanitizer-memcheck": "it is not installed",
        "sanitizer-racecheck": "it is not installed", "rivals": "",
    }  # fmt: skip


def test_all_steps_have_their_time(on_gpu):
    assert sum(seconds for _, _, seconds, _ in on_gpu.steps("cuda", tiny=False)) <= 9 * 60 + 20
    assert on_gpu.SECONDS < 9 * 60


def test_what_became_of_a_step(on_gpu, tmp_path):
    python = [sys.executable, "-c"]
    done = on_gpu.run("a", [*python, "print('said'); exit(3)"], 60, "", tmp_path, dict(os.environ))
    assert done["exit code"] == 3 and (tmp_path / "a.txt").read_text() == "said\n"
    late = on_gpu.run("b", [*python, "import time; time.sleep(60)"], 0.2, "", tmp_path, dict(os.environ))
    assert late["stopped after"] == 0.2
    assert on_gpu.run("c", [], 1, "no time is left", tmp_path, {}) == {"step": "c", "left out": "no time is left"}


@pytest.mark.cpu
def test_without_a_gpu_it_says_so(on_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["on_gpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="sees no GPU"):
        on_gpu.main()
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_the_whole_on_a_cpu(tmp_path):
    command = [sys.executable, SCRIPT, "--device", "cpu", "--tiny", "--out", tmp_path]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 0
    (folder,) = tmp_path.glob("on-*")
    summary = json.loads((folder / "summary.json").read_text())
    assert [step["step"] for step in summary["steps"] if step.get("exit code") == 0] == ["check", "rivals"]
    assert json.loads((folder / "check.txt").read_text())["ok"]
    rates = json.loads((folder / "rivals.txt").read_text())["member-steps a second"]
    assert rates["gputune, eager"] > 0 and rates["gputune, recorded"] > 0 and rates["plain loop"] > 0
