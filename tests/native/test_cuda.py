"""The kernels are CUDA C++ that NVIDIA's compiler accepts; the simulated devices test their
results.
"""

import re
import shutil
import subprocess

import pytest
import torch

from gputune.engine import dropout
from gputune.native.cuda import kernels, source
from gputune.optimizers import update
from gputune.population import batches

FILES = [update.SOURCE, batches.SOURCE, dropout.SOURCE]


@pytest.mark.long
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120"])
def test_it_compiles_without_spills(path, dtype, architecture, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not here")
    (tmp_path / "kernel.cu").write_text(source(path, dtype))
    command = ["nvcc", "-cubin", f"-arch={architecture}", "-Xptxas", "-v", "kernel.cu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert set(re.findall(r"(\d+) bytes spill", done.stderr)) <= {"0"}
    assert max(map(int, re.findall(r"Used (\d+) registers", done.stderr))) <= 64


@pytest.mark.parametrize(
    ("error", "version", "said"),
    [
        (
            OSError("Could not find any NVRTC library"),
            "13.0",
            r"library\. pip install 'nvidia-cuda-nvrtc==13\.0\.\*'",
        ),
        (
            OSError("Could not find any NVRTC library"),
            "12.8",
            r"library\. pip install 'nvidia-cuda-nvrtc-cu12==12\.8",
        ),
        (
            RuntimeError("Kernel compilation failed:\nlines"),
            "13.0",
            r"failed: lines\. Training continues with PyTorch's kernels",
        ),
        (RuntimeError(), "13.0", r"RuntimeError\. Training continues with PyTorch's kernels"),
    ],
)
def test_kernels_that_cannot_be_compiled_are_said(error, version, said, monkeypatch):
    def fail(source, name):
        raise error

    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "_compile_kernel", fail)
    kernels.cache_clear()
    with pytest.warns(RuntimeWarning, match=f"update.cu cannot be compiled for cuda:1: .*{said}"):
        assert kernels(FILES[0], update.NAMES, torch.device("cuda:1"), torch.float32) is None
    kernels.cache_clear()
