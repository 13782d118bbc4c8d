"""The compiled library: the processor's level, the same members at every level, and a reason if it
is missing.

And under other compilers, on emulated processors, and watched by sanitizers, each where its program
is there.
"""

import ctypes
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import gputune
from gputune.engine import compiled
from gputune.native import library as native
from gputune.native.library import (
    FOLDER,
    LEVELS,
    MemberWork,
    NotBuiltError,
    fill_streams,
    fill_uniform,
    library,
)
from native.emulated import bytes_of, written
from problems import (
    Linear,
    fill,
    largest_difference,
    make_data,
    needs_compiled_code,
    scoring_of,
    train_together,
)
from refused import refused

SOURCES = Path(__file__).parents[2]
ROWS = [[0.0, 1.0], [1.0, 0.0], [0.5, 2.0], [2.0, 1.0]] * 5
LABELS = [0, 1, 0, 1] * 5
SMALL = {"n_trials": 1, "max_epochs": 1, "cv": 2}


@pytest.fixture(autouse=True)
def fresh():
    """Every test looks for the libraries anew."""
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Return a folder that holds copies of the libraries, and in which they are looked for."""
    for path in native.FOLDER.glob("_*.so"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    return tmp_path


@needs_compiled_code
@pytest.mark.parametrize("kind, dtype", [("float", torch.float32), ("double", torch.float64)])
def test_it_is_of_the_processors_level_or_of_the_next_one_that_was_built(folder, kind, dtype):
    (first,) = folder.glob(f"_{kind}1.*")
    there = [level for level in LEVELS if level <= ctypes.CDLL(str(first)).processor_level()]
    for level in there:
        assert f"_{kind}{level}." in library(dtype)._name
        library.cache_clear()
        (path,) = folder.glob(f"_{kind}{level}.*")
        path.unlink()


@needs_compiled_code
@pytest.mark.parametrize("level", LEVELS)
def test_an_older_processor_gets_the_library_of_its_level(folder, monkeypatch, level):
    class OfLevel(ctypes.CDLL):
        def processor_level(self):
            return level

    best = next(path for n in LEVELS if n <= level for path in folder.glob(f"_float{n}.*"))
    monkeypatch.setattr(ctypes, "CDLL", OfLevel)
    assert library(torch.float32)._name == str(best)


def test_the_levels_together_are_built_for_what_a_processor_is_asked_for():
    """-march=x86-64-v3 would allow more, such as lzcnt, which a virtual machine may hide beside
    AVX2."""
    asked = set(
        re.findall(
            r'supports\("(\w+)"\)', (SOURCES / "gputune" / "native" / "members.c").read_text()
        )
    )
    modules = tomllib.loads((SOURCES / "pyproject.toml").read_text())["tool"]["setuptools"][
        "ext-modules"
    ]
    assert {module["name"][-1] for module in modules} == set(map(str, LEVELS))
    for module in modules:
        flags = {
            flag[2:]
            for flag in module["extra-compile-args"]
            if flag.startswith("-m") and "=" not in flag
        }
        assert (
            flags
            == {"1": set(), "3": {f for f in asked if "512" not in f}, "4": asked}[
                module["name"][-1]
            ]
        )


@needs_compiled_code
@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**63 - 1])
def test_uniform_draws_are_those_of_torch(seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.empty(n) for n in (1, 623, 1250, 17)]
    assert fill_uniform(seed, parts)
    for part in parts:
        assert torch.equal(part, torch.rand(part.shape, generator=generator))


@needs_compiled_code
def test_streams_are_drawn_one_after_another():
    seeds = [5, 2**63 - 1, 0]
    counts = [700, 0, 33]
    out = torch.empty(sum(counts))
    fill_streams(seeds, counts, out)
    for seed, count, part in zip(seeds, counts, out.split(counts)):
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(part, torch.rand(count, generator=generator))


@needs_compiled_code
def test_members_are_the_same_at_every_level(folder, monkeypatch):
    monkeypatch.setattr("problems.BACKEND", "compiled")
    data = make_data()
    config = {"lr": 1e-2, "width": 19, "batch_size": 16, "activation": "gelu"}
    found = []
    for level in LEVELS:
        library.cache_clear()
        found.append(train_together(data, fill(config))[0])
        folder.joinpath(f"_double{level}.abi3.so").unlink(missing_ok=level > 1)
    for members in found[1:]:
        for place, member in members.items():
            assert largest_difference(member, found[0][place]) < 1e-10


@pytest.mark.cpu  # a GPU is not expected to train in compiled code
def test_without_compiled_code_the_reason_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    with pytest.raises(NotBuiltError, match="no compiled code.*install gcc or clang"):
        library(torch.float32)
    gputune.tune("mlp", ROWS, LABELS, **SMALL)
    said = (
        "note: trials train in recorded steps, slower than in compiled code: this installation of "
        "gputune has no"
    )
    assert said in capsys.readouterr().err
    gputune.tune("mlp", ROWS, LABELS, optimizer="adamhd", **SMALL)  # which is never compiled
    assert "slower" not in capsys.readouterr().err
    with refused("backend='compiled' .* no compiled code.*choose backend='auto'"):
        gputune.tune("mlp", ROWS, LABELS, backend="compiled", **SMALL)


KNOWS = "compiled code supports only the optimizers sgd, nesterov, adam, adamw"


@pytest.mark.usefixtures("recorded_on_cpu")
@pytest.mark.parametrize(
    ("what", "backend", "says"),
    [
        (
            {"model": "mlp", "optimizer": "adamhd"},
            "recorded",
            "eagerly: steps of the optimizer 'adamhd' cannot be recorded",
        ),
        ({"model": "mlp", "optimizer": "adamhd"}, "compiled", f"eagerly: {KNOWS}"),
        (
            {"model": Linear},
            "compiled",
            "in recorded steps: a module trains in compiled code only if",
        ),
    ],
)
@needs_compiled_code
def test_a_backend_that_knows_none_of_the_trials_says_so(capsys, what, backend, says):
    gputune.tune(**what, X=ROWS, y=LABELS, backend=backend, **SMALL)
    reason = says.partition(": ")[2]
    assert f"({reason}" in capsys.readouterr().err.split("plan:")[1]


@pytest.mark.cpu  # a GPU is not expected to train in compiled code
@needs_compiled_code
@pytest.mark.parametrize("machine", [None, b"\xb7\x00"], ids=["damaged", "another processor's"])
def test_a_library_that_cannot_be_loaded_is_said_and_members_train_in_recorded_steps(
    folder, capsys, machine
):
    for path in folder.iterdir():
        built = path.read_bytes()  # bytes 18 and 19 of an ELF file are its machine
        path.unlink()
        path.write_bytes(b"no library" if machine is None else built[:18] + machine + built[20:])
    with pytest.raises(NotBuiltError, match="cannot be loaded, install gputune again: .*_float1"):
        library(torch.float32)
    gputune.tune("mlp", ROWS, LABELS, **SMALL)
    assert (
        "recorded steps, slower than in compiled code: gputune's compiled code cannot be"
        in capsys.readouterr().err
    )


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
    """Return, for two types, the compiled code's input for an epoch, and the arrays after it."""
    seen = {}
    run = compiled._run

    def watched(library, numbers, arrays, report):
        before = {name: bytes_of(value) for name, value in arrays.items()}
        run(library, numbers, arrays, report)
        seen[arrays["theta"].dtype] = (
            numbers,
            before,
            {n: v for n, v in arrays.items() if v is not None},
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_run", watched)
        patch.setattr("problems.BACKEND", "compiled")
        rates = [{"lr": 1e-2, "dropout": 0.2}, {"lr": 1e-3, "dropout": 0.5, "weight_decay": 0.1}]
        sizes = [{"width": 19, "batch_size": 16}, {"width": 12, "batch_size": 7}]
        configs = [
            {**one, **other, "activation": "gelu", "ema": 0.9} for one, other in zip(rates, sizes)
        ]
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
    paths = ["-I", FOLDER, SOURCES / "tests/native/members_main.c", "-o", tmp_path / "main"]
    subprocess.run([compiler, *flags.split(), *double, *paths, "-lm", "-lpthread"], check=True)
    numbers, before, after = epochs[dtype]
    (tmp_path / "in").write_bytes(written(numbers, before))
    subprocess.run(
        [*runner.split(), tmp_path / "main", tmp_path / "in", tmp_path / "out"], check=True
    )
    left = (tmp_path / "out").read_bytes()
    tolerance = 1e-12 if double else 1e-4
    for name, _ in MemberWork._fields_:
        if name in after:
            value = np.asarray(after[name])
            found = np.frombuffer(left[: value.nbytes], value.dtype).reshape(value.shape)
            left = left[value.nbytes :]
            if name != "nanoseconds":
                assert np.isfinite(found).all()
                np.testing.assert_allclose(
                    found, value, rtol=0, atol=tolerance * max(1, np.abs(value).max())
                )
    assert not left


@pytest.mark.long
@pytest.mark.parametrize(
    "processor, level",
    [("core2duo", 1), ("Nehalem", 1), ("Haswell", 3), ("Haswell,-fma", 1), ("Haswell,-bmi2", 1)],
)
def test_a_processor_is_of_the_level_whose_instructions_it_has(tmp_path, processor, level):
    for program in ("gcc", "qemu-x86_64"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    (tmp_path / "main.c").write_text(
        '#include "members.c"\nint main(void) { return processor_level(); }'
    )
    subprocess.run(
        ["gcc", "-w", "-I", FOLDER, tmp_path / "main.c", "-o", tmp_path / "main", "-lm"], check=True
    )
    assert subprocess.run(["qemu-x86_64", "-cpu", processor, tmp_path / "main"]).returncode == level
