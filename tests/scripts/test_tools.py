"""The developers' scripts: a matrix of versions, a release, all that a GPU can tell, a simulated
cluster.

What each refuses, makes the same, reads and says; all of it where there is time.
"""

import gzip
import importlib.machinery
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"

DOTS = "..F.s..E [ 88%]\n. [100%]\n"


@pytest.mark.parametrize(
    "output, says",
    [
        ("=== 5 passed, 1 skipped in 3 s ===", "5 passed"),
        ("=== 1 failed, 5 passed, 2 errors in 3 s ===", "5 passed, 3 failed"),
        (DOTS, "6 passed, 2 failed"),
    ],
)
def test_tests_are_counted(script, output, says):
    assert script("matrix").result(output) == says


def test_a_row_takes_the_place_of_the_one_of_its_name_and_others_stay(
    script, monkeypatch, tmp_path
):
    matrix = script("matrix")
    monkeypatch.setattr(matrix, "PAGE", tmp_path / "install.md")
    matrix.PAGE.write_text(f"# Page\n\n{matrix.HEAD}\n|---|\n")
    for name, tests in (("newest", "1 passed"), ("floors", "2 passed"), ("newest", "3 passed")):
        matrix.write(name, matrix.line(name, "3.13", tests))
    lines = matrix.PAGE.read_text().splitlines()
    assert lines[:3] == ["# Page", "", matrix.HEAD]
    assert [line.split(" | ")[:3] for line in lines[4:]] == [
        ["| floors", "3.13", "2 passed"],
        ["| newest", "3.13", "3 passed"],
    ]


def test_a_python_that_is_not_there_is_a_row_that_says_so(script, monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.which", lambda name: None)
    row = script("matrix").tried("newest", tmp_path / "newest")
    assert "not run: there is no python3.13 here" in row and row.count("|") == 10


LIBRARIES = {
    f"gputune/native/_{kind}{level}.abi3.so": 1000
    for kind in ("float", "double")
    for level in (1, 3, 4)
}


def make_wheel(folder, **files):
    path = folder / "gputune-1-cp311-abi3-linux_x86_64.whl"
    with zipfile.ZipFile(path, "w") as content:
        for name, size in {"gputune/__init__.py": 1, **files}.items():
            content.writestr(name, b"x" * size)
    return path


@pytest.mark.parametrize(
    "files, says",
    [
        ({}, "has 0 of 6 libraries; is there a C compiler?"),
        ({**LIBRARIES, "gputune/native/_float4.abi3.so": 400_000}, "take 405,000 of 400,000 bytes"),
        ({**LIBRARIES, "tests/test_laws.py": 1}, "holds .*tests/test_laws.py"),
        ({**LIBRARIES, "gputune/tests/test_laws.py": 1}, "holds .*gputune/tests/test_laws.py"),
    ],
)
def test_a_wheel_that_is_not_as_it_must_be_is_refused(script, tmp_path, files, says):
    with pytest.raises(SystemExit, match=says):
        script("release").check(make_wheel(tmp_path, **files))
    script("release").check(make_wheel(tmp_path, **LIBRARIES))


def test_a_source_package_of_another_hour_is_the_same_bytes(script, tmp_path):
    packed = []
    for moment in (1, 2):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name in ("b", "a")[:: 3 - 2 * moment]:
                member = tarfile.TarInfo(name)
                member.size = 3
                member.mtime = moment
                member.uid = moment
                member.uname = str(moment)
                tar.addfile(member, io.BytesIO(b"abc"))
        path = tmp_path / "source.tar.gz"
        path.write_bytes(gzip.compress(buffer.getvalue(), mtime=moment))
        script("release").date(path, 1_700_000_000)
        packed.append(path.read_bytes())
    assert packed[0] == packed[1]
    with tarfile.open(path) as tar:
        assert [(m.name, m.mtime, tar.extractfile(m).read()) for m in tar] == [
            (n, 1.7e9, b"abc") for n in "ab"
        ]


def test_a_wheel_is_named_after_the_glibc_that_it_needs(script, tmp_path, monkeypatch):
    release = script("release")
    asked = []
    monkeypatch.setattr(release, "run", lambda *words: asked.append(words) or "new.whl")
    wheel = make_wheel(tmp_path)
    with zipfile.ZipFile(wheel, "a") as content:
        content.writestr("gputune/native/_float1.abi3.so", b"..GLIBC_2.9..GLIBC_2.29..GLIBC_2.2.5")
    assert release.renamed("python", wheel) == tmp_path / "new.whl"
    assert asked[0][-2:] == ("manylinux_2_29_x86_64", wheel)


@pytest.mark.long
def test_the_packages_are_built_installed_and_used(tmp_path):
    words = [sys.executable, SCRIPTS / "release.py", "--out", tmp_path]
    ran = subprocess.run(words, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    names = {path.name.split("-")[0] + path.suffix for path in tmp_path.iterdir()}
    assert names == {"gputune.whl", "gputune.gz"} and ran.stdout.count("\n  held-out ") == 2


@pytest.fixture(scope="module")
def on_gpu():
    loader = importlib.machinery.SourceFileLoader("on_gpu", str(SCRIPTS / "on_gpu"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("on_gpu", loader))
    loader.exec_module(module)
    return module


@pytest.mark.long
def test_a_plain_python_imports_it(on_gpu, tmp_path, monkeypatch):
    """Where all that is missing in one with torch and scikit-learn alone is missing; joblib brings
    cloudpickle."""
    monkeypatch.setattr(on_gpu, "find_spec", lambda name: None if name != "cloudpickle" else name)
    path = str(on_gpu.importable(tmp_path))
    for name in (
        "polars",
        "pandas",
        "pyarrow",
        "matplotlib",
        "optuna",
        "ray",
        "onnx",
        "pytest",
        "hypothesis",
    ):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError({name!r})")
    search = "n_trials=1, max_epochs=1, cv=2, device='cpu'"
    code = (
        "import gputune.check.check, gputune.cli.main, gputune.engine.backend, tqdm.auto; "
        f"print(gputune.tune('mlp', [[0.], [1.]] * 9, [0, 1] * 9, {search}))"
    )
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Study(mlp, 1 trial" in done.stdout


def test_what_is_missing_is_named(on_gpu, monkeypatch):
    monkeypatch.setattr(on_gpu, "find_spec", lambda name: None)
    monkeypatch.setattr(on_gpu.shutil, "which", lambda name: None)
    missing = {name: missing for name, _, _, missing in on_gpu.steps("cuda", tiny=True)}
    assert missing == {
        "check": "",
        "tests": "pytest is not installed",
        "sanitizer-memcheck": "it is not installed",
        "sanitizer-racecheck": "it is not installed",
        "rivals": "",
    }


def test_all_steps_have_their_time(on_gpu):
    assert sum(seconds for _, _, seconds, _ in on_gpu.steps("cuda", tiny=False)) <= 9 * 60 + 20
    assert on_gpu.SECONDS < 9 * 60


def test_what_became_of_a_step(on_gpu, tmp_path):
    python = [sys.executable, "-c"]
    done = on_gpu.run("a", [*python, "print('said'); exit(3)"], 60, "", tmp_path, dict(os.environ))
    assert done["exit code"] == 3 and (tmp_path / "a.txt").read_text() == "said\n"
    late = on_gpu.run(
        "b", [*python, "import time; time.sleep(60)"], 0.2, "", tmp_path, dict(os.environ)
    )
    assert late["stopped after"] == 0.2
    assert on_gpu.run("c", [], 1, "no time is left", tmp_path, {}) == {
        "step": "c",
        "left out": "no time is left",
    }


@pytest.mark.cpu
def test_without_a_gpu_it_says_so(on_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["on_gpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="sees no GPU"):
        on_gpu.main()
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_the_whole_on_a_cpu(tmp_path):
    command = [sys.executable, SCRIPTS / "on_gpu", "--device", "cpu", "--tiny", "--out", tmp_path]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONSAFEPATH": "1"}
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 0
    (folder,) = tmp_path.glob("on-*")
    summary = json.loads((folder / "summary.json").read_text())
    assert [step["step"] for step in summary["steps"] if step.get("exit code") == 0] == [
        "check",
        "rivals",
    ]
    assert json.loads((folder / "check.txt").read_text())["ok"]
    rates = json.loads((folder / "rivals.txt").read_text())["member-steps a second"]
    assert (
        rates["gputune, eager"] > 0 and rates["gputune, recorded"] > 0 and rates["plain loop"] > 0
    )
    # where JAX is missing, that is what is missing
    assert "benchmark" not in str(rates["JAX vmap"])


@pytest.fixture
def cluster(script):
    pytest.importorskip("ray", reason='Ray is not installed: pip install ".[ray]"')
    return script("simulate_cluster")


def measured(cluster, **costs):
    free = {"driver": 1e-9, "trip": 0.0, "start": 0.0, "data_bytes": 0, "result_bytes": 0}
    return cluster.Measured(chunks=(2.0,), **{**free, **costs})


def test_starts_and_round_trips_are_added_and_workers_that_cost_nothing_train_all_the_time(cluster):
    for workers in (1, 10, 1000):
        found = cluster.simulate(measured(cluster), workers, bandwidth=1e9)
        assert found == pytest.approx((2 * cluster.PER_WORKER, 1), rel=1e-5)
    seconds, share = cluster.simulate(measured(cluster, trip=0.5, start=3.0), 10, bandwidth=1e9)
    assert seconds == pytest.approx(3 + 2.5 * cluster.PER_WORKER, rel=1e-5)
    assert share == pytest.approx(2 * cluster.PER_WORKER / seconds)
    assert measured(cluster, trip=0.5).scheduling == pytest.approx(0.2)


def test_too_many_workers_wait_for_the_one_process(cluster):
    busy = measured(cluster, driver=0.02)
    assert busy.most_workers == pytest.approx(100)
    assert cluster.simulate(busy, 50, bandwidth=1e9)[1] > 0.9
    seconds, share = cluster.simulate(busy, 1000, bandwidth=1e9)
    # its hands are never still
    assert seconds == pytest.approx(0.02 * 1000 * cluster.PER_WORKER, rel=0.01)
    assert share == pytest.approx(0.1, rel=0.01)


@pytest.mark.long
def test_a_search_is_measured_and_reported(cluster):
    with cluster.connected(2):
        found = cluster.measure(trials=7, epochs=1)
    assert len(found.chunks) >= 2 and min(found.chunks) > 0
    assert found.driver > 0 and found.trip > 0 and found.start > 0
    # 1797 rows of some 60 numbers that vary; a score for each of five folds.
    assert found.data_bytes > 1797 * 60 * 4 and found.result_bytes == 5 * 8
    text = cluster.report(found, bandwidth=125e6)
    rows = re.findall(r"^ +(\d+) +(\d+\.\d) +(\d+\.\d)% +(\d+\.\d)$", text, re.M)
    assert [int(row[0]) for row in rows] == list(cluster.SIZES)
    assert all(float(share) <= 100 for _, _, share, _ in rows)


def test_size_counts_tokens_without_docstrings_imports_and_comments(script):
    """A formatter moves no token, so that packed and unpacked code have the same size."""
    size = script("size")
    packed = (
        'import os\n\n"""Not a docstring: it is not first."""\na, b = 1, [2,\n3]  # a comment\n'
    )
    unpacked = packed.replace("[2,\n3]", "[\n    2,\n    3]")
    documented = (
        f'"""A docstring\nof two lines."""\n{packed}def f():\n    """Another one."""\n    return '
        "1\n"
    )
    assert size.python_size(packed) == size.Size(files=1, tokens=12, lines=3)
    assert size.python_size(unpacked).tokens == 12
    assert size.python_size(documented) == size.Size(files=1, tokens=12 + 7, lines=5)
    assert size.other_size("int x = 1;\n\n") == size.Size(files=1, tokens=5, lines=1)


def test_size_has_a_row_for_each_package_and_the_python_of_the_product(script, monkeypatch, capsys):
    size = script("size")
    before = {"gputune/data/a.py": b"x = 1\n"}
    now = {
        **before,
        "gputune/data/b.py": b"f(x)\n",
        "models/mlp.py": b"y\n",
        "gputune/native/m.h": b"int x;\n",
        "tests/t.py": b"t\n",
    }
    monkeypatch.setattr(size, "files_of_tree", lambda: now)
    monkeypatch.setattr(size, "files_of_commit", {"abc": before}.get)
    monkeypatch.setattr("sys.argv", ["size.py", "abc"])
    size.main()
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.endswith("compared with abc")
    assert [row.split() for row in rows] == [
        ["gputune/data", "2", "+1", "7", "+4", "3.5", "+0.5"],
        ["models", "1", "+1", "1", "+1", "1.0", "+1.0"],
        ["tests", "1", "+1", "1", "+1", "1.0", "+1.0"],
        ["other", "languages", "1", "+1", "3", "+3", "3.0", "+3.0"],
        ["product,", "Python", "3", "+2", "8", "+5", "2.7", "-0.3"],
    ]
