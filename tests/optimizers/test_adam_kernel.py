"""The kernel of adam is CUDA C++ that NVIDIA's compiler takes; what it computes, the simulated devices test."""

import re
import shutil
import subprocess

import pytest
import torch

from gputune.optimizers.adam_kernel import source


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120"])
def test_it_compiles_without_spills(dtype, architecture, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not here")
    (tmp_path / "adam.cu").write_text(source(dtype))
    command = ["nvcc", "-cubin", f"-arch={architecture}", "-Xptxas", "-v", "adam.cu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert set(re.findall(r"(\d+) bytes spill", done.stderr)) <= {"0"}
    assert max(map(int, re.findall(r"Used (\d+) registers", done.stderr))) <= 64
