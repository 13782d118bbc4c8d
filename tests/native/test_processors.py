"""The C code under other compilers, on emulated processors, and watched by sanitizers: the same members.

Each is left out where its compiler or emulator is missing.
"""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from gputune.engine import compiled
from gputune.native.library import FOLDER, Work
from native.emulated import bytes_of, written
from problems import fill, make_data, needs_compiled_code, scoring_of, train_together

HERE = Path(__file__).parent
WATCHED = "-O1 -g -fno-sanitize-recover=all -fsanitize={}"
WAYS = {
    "gcc-14": ("gcc-14", "-O3 -march=native", ""),
    "clang-14": ("clang-14", "-O3 -march=native", ""),
    "clang-19": ("clang-19", "-O3 -march=native", ""),
    "x86-64 of 2006": ("gcc", "-O3", "qemu-x86_64 -cpu core2duo"),
    "AVX2": ("gcc", "-O3 -mavx2 -mfma -mbmi2", "qemu-x86_64 -cpu Haswell"),
    "ARM": ("aarch64-linux-gnu-gcc", "-O3 -static", "qemu-aarch64"),
    "addresses": ("gcc", WATCHED.format("address,undefined"), ""),
    "threads": ("gcc", WATCHED.format("thread"), "setarch -R"),
}


@pytest.fixture(scope="module")
def epochs():
    """Return, for two types, what the compiled code was given for an epoch, and the arrays that it left."""
    seen, run = {}, compiled._run

    def watched(library, numbers, arrays):
        before = {name: bytes_of(value) for name, value in arrays.items()}
        run(library, numbers, arrays)
        seen[arrays["theta"].dtype] = numbers, before, {n: v for n, v in arrays.items() if v is not None}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_run", watched)
        patch.setattr("problems.BACKEND", "compiled")
        rates = [{"lr": 1e-2, "dropout": 0.2}, {"lr": 1e-3, "dropout": 0.5, "weight_decay": 0.1}]
        sizes = [{"width": 19, "batch_size": 16}, {"width": 12, "batch_size": 7}]
        configs = [{**one, **other, "activation": "gelu", "ema": 0.9} for one, other in zip(rates, sizes)]
        for dtype in (torch.float32, torch.float64):
            data = make_data(dtype=dtype, weights=True)
            train_together(data, fill(*configs), epochs=1, scoring=scoring_of(data, "neg_log_loss"))
    return seen


@needs_compiled_code
@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", WAYS)
def test_an_epoch_is_the_same(epochs, tmp_path, way, dtype):
    compiler, flags, runner = WAYS[way]
    for program in (compiler, *runner.split()[:1]):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    double = ["-DDOUBLE"] if dtype == torch.float64 else []
    paths = ["-I", FOLDER, HERE / "members_main.c", "-o", tmp_path / "main"]
    subprocess.run([compiler, *flags.split(), *double, *paths, "-lm", "-lpthread"], check=True)
    numbers, before, after = epochs[dtype]
    (tmp_path / "in").write_bytes(written(numbers, before))
    subprocess.run([*runner.split(), tmp_path / "main", tmp_path / "in", tmp_path / "out"], check=True)
    left, tolerance = (tmp_path / "out").read_bytes(), 1e-12 if double else 1e-4
    for name, _ in Work._fields_:
        if name in after:
            value = np.asarray(after[name])
            found = np.frombuffer(left[: value.nbytes], value.dtype).reshape(value.shape)
            left = left[value.nbytes :]
            if name != "nanoseconds":
                assert np.isfinite(found).all()
                np.testing.assert_allclose(found, value, rtol=0, atol=tolerance * max(1, np.abs(value).max()))
    assert not left


@pytest.mark.long
@pytest.mark.parametrize(
    "processor, level", [("core2duo", 1), ("Nehalem", 1), ("Haswell", 3), ("Haswell,-fma", 1), ("Haswell,-bmi2", 1)]
)
def test_a_processor_is_of_the_level_whose_instructions_it_has(tmp_path, processor, level):
    for program in ("gcc", "qemu-x86_64"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    (tmp_path / "main.c").write_text('#include "members.c"\nint main(void) { return processor_level(); }')
    subprocess.run(["gcc", "-w", "-I", FOLDER, tmp_path / "main.c", "-o", tmp_path / "main", "-lm"], check=True)
    assert subprocess.run(["qemu-x86_64", "-cpu", processor, tmp_path / "main"]).returncode == level
