"""gputune on two CUDA devices that are not there: ``on_device.py``, in a process that loads them before torch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent
SUPPORTED = "2.13."  # the device leans on what PyTorch has inside, which was looked at in this version alone


@pytest.fixture(scope="session")
def device(tmp_path_factory):
    """The simulated device, built."""
    compiler = shutil.which("g++")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("the simulated device needs Linux and g++")
    if not torch.__version__.startswith(SUPPORTED) or torch.version.cuda is not None:
        pytest.skip(
            f"the simulated device needs a CPU build of torch {SUPPORTED}x, here is {torch.__version__}"
        )
    path = tmp_path_factory.mktemp("simulated") / "device.so"
    include = [f"-I{TORCH / 'include'}", f"-I{TORCH / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    options = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", *include, "-o", str(path)]
    subprocess.run([compiler, *options, str(HERE / "device.cpp"), *libraries], check=True)
    return path


def run(device, *arguments):
    """The end of pytest on the simulated device: (exit code, what it said)."""
    environment = {**os.environ, "SIMULATED_CUDA": str(device), "PYTHONPATH": str(HERE.parent)}
    plugins = ["-p", "simulated_cuda.torch_cuda", "-p", "no:cacheprovider"]
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "--gpu",
        *plugins,
        *arguments,
        str(HERE / "on_device.py"),
    ]
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_all_other_tests_see_no_gpu():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and torch.cuda.device_count() == 0


def test_gputune_on_a_gpu(device):
    code, said = run(device, "--tb=short")
    assert code == 0, said
