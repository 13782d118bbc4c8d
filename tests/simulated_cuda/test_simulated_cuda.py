"""gputune on two CUDA devices that are not there: ``on_device.py``, in a process that loads them
before torch."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent
# the device leans on what PyTorch has inside, which was looked at in this version alone
SUPPORTED = "2.13."


@pytest.fixture(scope="session")
def device(pytestconfig):
    """The simulated device, built, if it was not before: g++ takes ten seconds."""
    compiler = shutil.which("g++")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("the simulated device needs Linux and g++")
    if not torch.__version__.startswith(SUPPORTED) or torch.version.cuda is not None:
        pytest.skip(
            f"the simulated device needs a CPU build of torch {SUPPORTED}x, here is "
            f"{torch.__version__}"
        )
    source = HERE / "device.cpp"
    built_from = hashlib.sha256(
        source.read_bytes() + f"{torch.__version__} {TORCH}".encode()
    ).hexdigest()
    path = pytestconfig.cache.mkdir("simulated_cuda") / f"{built_from[:16]}.so"
    if path.exists():
        return path
    include = [f"-I{TORCH / 'include'}", f"-I{TORCH / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    draft = path.with_suffix(f".{os.getpid()}")
    options = ["-std=c++20", "-O0", "-w", "-shared", "-fPIC", *include, "-o", str(draft)]
    subprocess.run([compiler, *options, str(source), *libraries], check=True)
    return draft.replace(path)


def run(device, folder, *arguments, seconds):
    """Run pytest with the simulated device; return (exit code, end of output), 124 after the time
    limit.
    """
    environment = {**os.environ, "SIMULATED_CUDA": str(device), "PYTHONPATH": str(HERE.parent)}
    plugins = ["-p", "simulated_cuda.torch_cuda", "-p", "no:cacheprovider"]
    # A test that hangs says where, long before the time is up; Ctrl-C then leaves pytest to tell
    # what has failed.
    shown = ["--tb=short", "--durations=5", "-o", f"faulthandler_timeout={seconds // 4}"]
    ended = ["timeout", "--signal=INT", "--kill-after=60", str(seconds)]
    command = [*ended, sys.executable, "-P", "-m", "pytest", *plugins, *shown, *arguments]
    said = folder / "said.txt"  # no pipe, which processes that are left over would hold open
    with said.open("w") as file:
        done = subprocess.run(
            command, env=environment, cwd=HERE.parents[1], stdout=file, stderr=subprocess.STDOUT
        )
    return done.returncode, said.read_text()


def test_all_other_tests_see_no_gpu():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and torch.cuda.device_count() == 0


def test_gputune_on_a_gpu(device, pytestconfig, tmp_path):
    everything = ["--all"] * pytestconfig.getoption("--all")
    files = HERE / "on_device.py", HERE / "kernel_on_device.py"
    code, said = run(device, tmp_path, "--gpu", *everything, *files, seconds=1200)
    assert code == 0, said


ALONE = {"simulated_cuda", "test_structure.py"}  # this folder, and tests that read only the source
PARTS = sorted(
    {path.relative_to(HERE.parent).parts[0] for path in HERE.parent.rglob("test_*.py")} - ALONE
)


@pytest.mark.long
@pytest.mark.parametrize("part", PARTS)
def test_the_suite_where_auto_is_a_gpu(part, device, tmp_path):
    """All tests except tests of the CPU, or of parts that the simulated device lacks: cuDNN.

    Both cores: ``pytest --all --numprocesses 2 --dist worksteal tests/simulated_cuda -k
    where_auto``.
    """
    code, said = run(device, tmp_path, "--auto-gpu", HERE.parent / part, seconds=3600)
    assert code == 0, said


@pytest.mark.long
def test_the_script_for_a_card(device, tmp_path):
    """All of it that a simulated device can run; none of its speeds is a GPU's."""
    (tmp_path / "sitecustomize.py").write_text("from simulated_cuda import torch_cuda\n")
    path = os.pathsep.join([str(tmp_path), str(HERE.parent)])
    where = {"SIMULATED_CUDA": str(device), "PYTHONPATH": path, "XDG_CACHE_HOME": str(tmp_path)}
    environment = {**os.environ, **where}
    script = HERE.parents[1] / "scripts/on_gpu"
    command = [sys.executable, script, "--device", "cuda:1", "--tiny", "--out", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = json.loads((tmp_path / "on-a-gpu-that-is-not-there/summary.json").read_text())["steps"]
    assert [step["step"] for step in steps if step.get("exit code") == 0] == [
        "check",
        "tests",
        "rivals",
    ]
