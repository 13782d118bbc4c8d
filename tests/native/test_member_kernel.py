"""The kernel that trains one member a thread block, on a CPU: the plain loop's numbers, in every
order of threads."""

import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import problems
import reference
from gputune.engine import compiled
from gputune.engine.mlp import StackedMLP
from gputune.native.cuda import OPTIONS, MemberKernel, compile_kernel
from gputune.scoring.scores import REGRESSION
from gputune.scoring.validation import Validation
from native.emulated import (
    HERE,
    LARGEST,
    ORDERS,
    Emulator,
    bytes_of,
    kernel_of,
    train_members,
    written,
)
from problems import (
    assert_equals_plain_loop,
    fill,
    make_data,
    needs_compiled_code,
    rows_of,
    scoring_of,
    shape_of,
    train,
    train_together,
    without_class_2,
)
from test_laws import OPTIMIZERS, SIZES, each, epochs_of_50_steps

pytestmark = pytest.mark.cpu  # emulates the kernel itself, from the CPU's arrays

CARDS = {"80": 166_912, "86": 101_376, "89": 101_376, "90": LARGEST, "100": LARGEST, "120": 101_376}
"""Bytes of shared memory that a block may have. Source: CUDA C++ Programming Guide, compute
capabilities."""


@pytest.fixture(scope="session")
def emulator(pytestconfig):
    if shutil.which("g++") is None:
        pytest.skip("the kernel is emulated where g++ is")
    return Emulator(pytestconfig.cache.mkdir("kernels"))


@pytest.fixture
def by_kernel(request, emulator, monkeypatch):
    """Let the kernel train the members of the C code; a parameter has options for this."""

    def run(library, numbers, arrays, report):
        work = dict(numbers), dict(arrays)
        assert train_members(emulator, *work, **getattr(request, "param", {}))

    monkeypatch.setattr(problems, "BACKEND", "compiled")
    monkeypatch.setattr(compiled, "_run", run)


ADAMW = {"optimizer": "adamw", "weight_decay": 0.1}
WIDTHS = [{"width": 16, "batch_size": 16}, {"width": 9, "batch_size": 7, "lr": 1e-2}]
CASES = {
    "two layers": ({}, [{**ADAMW, **sizes} for sizes in WIDTHS]),
    "four layers": ({}, [{**ADAMW, "depth": 4, **sizes} for sizes in WIDTHS]),
    "gelu": (
        {},
        [{"optimizer": "adam", "depth": 1, "width": 19, "batch_size": 31, "activation": "gelu"}],
    ),
    "silu, weights": (
        {"weights": True},
        [
            {"optimizer": "nesterov", "momentum": 0.8, "depth": 3, "activation": "silu", **s}
            for s in WIDTHS
        ],
    ),
    "tanh, regression": (
        {"task": "regression"},
        [
            {"optimizer": "sgd", "weight_decay": 0.01, "activation": "tanh", **s, "lr": 1e-2}
            for s in WIDTHS
        ],
    ),
    "regression, weights, momentum": (
        {"task": "regression", "weights": True},
        [{"optimizer": "sgd", "momentum": 0.9, **sizes} for sizes in WIDTHS],
    ),
    "a minibatch in parts": (
        {"n": 200},
        [{**ADAMW, "width": 48, "batch_size": s} for s in (100, 70, 40)],
    ),
    "moments that are streamed": (
        {},
        [{**ADAMW, "width": w, "batch_size": 16} for w in (128, 100)],
    ),
    "dropout": (
        {"n": 100},
        [
            {**ADAMW, "width": 16, "batch_size": s, "activation": "tanh", "dropout": p}
            for s, p in ((40, 0.2), (9, 0.5))
        ],
    ),
    "a value for each layer": (
        {"n": 100},
        [
            {**ADAMW, "width": w, "batch_size": s, "activation": ("tanh", "relu"), "dropout": p}
            for w, s, p in (((16, 5), 40, (0.2, 0.0)), ((3, 9), 9, (0.0, 0.5)), (8, 9, 0.4))
        ],
    ),
    "many outputs": (
        {"n": 150, "d": 17, "k": 40},
        [{**ADAMW, "depth": 1, **sizes} for sizes in WIDTHS],
    ),
    "a schedule": ({"dtype": torch.float32}, [{**ADAMW, **WIDTHS[0], "schedule": "cosine"}]),
}


# Whose products are of every kind; double precision, where factors are not rounded, shows that
# fragments are in place.
BY_TENSOR_CORES = ("tanh, regression", "a minibatch in parts", "many outputs")
EACH_CASE = [
    *((case, {}) for case in CASES),
    *((case, {"tf32": True}) for case in BY_TENSOR_CORES),
    ("four layers", {"rows": 8}),
]


@needs_compiled_code
@pytest.mark.parametrize(("case", "by_kernel"), EACH_CASE, indirect=["by_kernel"])
def test_law_1_together_equals_alone(case, by_kernel):
    options, configs = CASES[case]
    assert_equals_plain_loop(make_data(**options), fill(*configs), epochs=2)


@needs_compiled_code
@pytest.mark.parametrize("task", ["multiclass", "regression"])
def test_law_1_for_the_linear_model(task, by_kernel):
    configs = fill({"lr": 1e-2, "batch_size": 9}, {"lr": 1e-3, "batch_size": 100})
    assert_equals_plain_loop(make_data(task, copies=False), configs, kind="linear", epochs=2)


@needs_compiled_code
@pytest.mark.parametrize(("loss", "number"), [("mae", 0.0), ("huber", 0.3), ("quantile", 0.9)])
def test_losses_of_numbers_are_those_of_stacked_steps(loss, number, by_kernel):
    configs = fill({"width": 9, "batch_size": 16}, {"width": 5, "batch_size": 16, "lr": 1e-2})
    data = make_data("regression", copies=False, weights=True)
    flat = []
    for backend in ("eager", "compiled"):
        network = StackedMLP("mlp", configs, shape_of(data), seed=0, loss=loss, loss_number=number)
        trained = train(network, data, configs, seed=0, epochs=2, horizon=2, backend=backend)
        flat.append(trained.flat)
    torch.testing.assert_close(*flat, rtol=0, atol=1e-10)


@needs_compiled_code
@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("task", ["multiclass", "regression"])
@each(OPTIMIZERS)
def test_law_1_over_the_grid(optimizer, task, dtype, by_kernel):
    kinds = [{**optimizer, "depth": depth, "lr": lr} for depth, lr in ((1, 1e-2), (2, 1e-3))]
    for width, size in SIZES:
        configs = fill(*({**kind, "width": width, "batch_size": size} for kind in kinds))
        data = make_data(task, dtype=dtype)
        assert_equals_plain_loop(data, configs, epochs=epochs_of_50_steps(data, size))


def epoch_of(data, configs, scoring=None):
    """The input of the C code for an epoch."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_run", lambda library, *work: seen.append(work[:2]))
        network = StackedMLP("mlp", configs, shape_of(data), seed=0)
        chunk = compiled.CompiledChunk(network, Validation(data, scoring), seed=0, horizon=2)
        chunk.advance(0)
    return seen[0]


def copied(arrays):
    return {
        name: value.clone()
        if isinstance(value, torch.Tensor)
        else None
        if value is None
        else value.copy()
        for name, value in arrays.items()
    }


def twice(numbers, arrays):
    """The input of the kernel for two epochs, which read the rows in one order."""
    of_epochs = {
        name: torch.stack([arrays[name]] * 2)
        for name in ("order", "means")
        if arrays[name] is not None
    }
    return numbers, {**arrays, **of_epochs}


WRITTEN = ("theta", "first", "second", "scored", "means")


def after(emulator, numbers, arrays, **how):
    """The arrays after an epoch; None if its threads do not come to their ends."""
    arrays = copied(arrays)
    whole = train_members(emulator, numbers, arrays, **how)
    left = {name: bytes_of(arrays[name]) for name in WRITTEN}
    return left if whole else None


SMALL = fill(*({**sizes, "lr": 1e-2} for sizes in WIDTHS))


@needs_compiled_code
@pytest.mark.parametrize(
    ("scoring", "dtype"),
    [
        ("accuracy", torch.float32),
        ("neg_log_loss", torch.float64),
        ("r2", torch.float32),
        ("neg_mean_absolute_error", torch.float64),
    ],
)
def test_an_epoch_is_that_of_the_C_code(scoring, dtype, emulator):
    numbers = scoring in REGRESSION
    data = (
        make_data("regression", dtype=dtype) if numbers else without_class_2(make_data(dtype=dtype))
    )
    words = ("one_cycle", "coslog4")
    configs = [{**config, "schedule": word} for config, word in zip(SMALL, words)]
    numbers, arrays = epoch_of(data, configs, replace(scoring_of(data, scoring), kept_bytes=1))
    by_kernel = copied(arrays)
    by_c = copied(arrays)
    assert train_members(emulator, numbers, by_kernel)
    compiled._run(compiled.library(dtype), numbers, by_c, report=Mock())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for name in WRITTEN:
        if arrays[name] is not None:
            np.testing.assert_allclose(by_kernel[name], by_c[name], rtol=0, atol=tolerance)


@needs_compiled_code
@pytest.mark.parametrize("tf32", [False, True])
def test_order_of_threads_and_launches_change_no_bit(tf32, emulator):
    data = make_data(n=140, weights=True, dtype=torch.float32)
    configs = [{**config, "batch_size": size} for config, size in zip(SMALL, (70, 30))]
    work = twice(*epoch_of(data, configs, scoring_of(data, "neg_log_loss")))
    expected = after(emulator, *work, tf32=tf32, order=0, epochs=2)
    assert expected is not None and np.isfinite(np.frombuffer(expected["means"])).all()
    for how in ({"order": 1}, {"order": 2}, {"order": 2, "pieces": 2, "blocks": 1}):
        assert after(emulator, *work, tf32=tf32, epochs=2, **how) == expected, how


# Of a product of two factors, each of which is off by 2^-11 of it at most, in 10 bits; 2^-16 is for
# the square of that, and for sums of up to 128 numbers in single precision.
OFF = 2**-10 + 2**-16


def product(a, b):
    """The product of two matrices which may be off, and by how much it may be in TF32."""
    (a, da), (b, db) = a, b
    most = (a.abs() + da) @ (b.abs() + db)
    return a @ b, most - a.abs() @ b.abs() + most * OFF


@needs_compiled_code
@pytest.mark.parametrize("by_kernel", [{"tf32": True}], indirect=True)
def test_tf32_is_off_by_rounded_factors(by_kernel):
    """A step of rate 1 moves a parameter by its slope."""
    data = make_data("regression", dtype=torch.float32, copies=False)
    kind = {"depth": 1, "width": 16, "activation": "tanh", "batch_size": 64, "lr": 1.0}
    together, _ = train_together(data, fill({"optimizer": "sgd", **kind}), epochs=1)
    for (fold, _), member in together.items():
        x, y, _ = (None if part is None else part.double() for part in rows_of(data, fold))
        plain = reference.start(
            reference.MLP(5, 1, width=16, depth=1, activation="tanh"), 0
        ).double()
        w, bias, v, shift = (parameter.detach().t() for parameter in plain.parameters())
        z, off = product((x, 0), (w, 0))
        h = (z + bias).tanh(), off
        output, off = product(h, (v, 0))
        slope = 2 * (output + shift - y[:, None]) / len(y), 2 * off / len(y)
        back, off = product(slope, (v.T, 0))
        inner = 1 - h[0] ** 2
        wide = 2 * h[0].abs() * h[1] + h[1] ** 2
        below = back * inner, (back.abs() + off) * (inner.abs() + wide) - (back * inner).abs()
        sums = (
            product((x.T, 0), below),
            [part.sum(0) for part in below],
            product([part.T for part in h], slope),
            [part.sum(0) for part in slope],
        )
        for before, after, (mean, most) in zip((w, bias, v, shift), member.parameters(), sums):
            difference = (before - mean - after.detach().t()).abs()
            assert (difference <= most + 1e-6).all()
            assert difference.max() > 5e-6  # where single precision is off by 1e-7


@needs_compiled_code
def test_other_members_change_no_bit(by_kernel):
    data = make_data(dtype=torch.float32)
    # whose tiles are not of the same size
    configs = fill(*({"width": 16, "batch_size": size} for size in (31, 9)))
    together, _ = train_together(data, configs, epochs=1)
    for c, config in enumerate(configs):
        alone, _ = train_together(data, [config], epochs=1)
        for fold in range(data.n_folds):
            for a, b in zip(alone[fold, 0].parameters(), together[fold, c].parameters()):
                assert torch.equal(a, b)


BARRIERS = {
    "queue": 0,
    "gathered": 1,
    "sloped": 2,
    "ended": 3,
    "forward": (10, 11, 12),
    "backward": (21, 22),
}
EACH_BARRIER = [number for numbers in BARRIERS.values() for number in np.atleast_1d(numbers)]


@needs_compiled_code
@pytest.mark.parametrize("tf32", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("barrier", EACH_BARRIER)
def test_a_barrier_that_is_left_out_is_found(barrier, tf32, emulator):
    data = make_data(n=40, dtype=torch.float32)
    work = epoch_of(data, SMALL, scoring_of(data, "neg_log_loss"))
    whole, *others = (after(emulator, *work, tf32=tf32, order=order) for order in range(3))
    assert whole is not None and others == [whole, whole]
    left = [
        after(emulator, *work, tf32=tf32, order=order, left_out=int(barrier)) for order in range(3)
    ]
    assert left != [whole] * 3


def shape(
    inputs=64,
    width=64,
    depth=2,
    outputs=10,
    moments=2,
    activations=None,
    dropout=False,
    classes=True,
    tf32=False,
):
    """A shape of members in single precision."""
    return MemberKernel(
        inputs,
        width,
        depth,
        outputs,
        (0,) * depth if activations is None else activations,
        moments,
        classes,
        dropout,
        torch.float32,
        64,
        tf32,
    )


@pytest.mark.parametrize(
    ("member", "part"),
    [
        ({}, ""),
        ({"depth": 0, "width": 0}, ""),
        ({"inputs": 257}, "inputs of 257 (at most 256)"),
        ({"width": 192}, "width of 192 (at most 128)"),
        ({"depth": 5}, "depth of 5 (at most 4)"),
        ({"outputs": 65}, "outputs of 65 (at most 64)"),
        ({"dtype": torch.float64}, "dtype='float64' (only float32)"),
        (
            {"shared": CARDS["86"]},
            "170,752 bytes of weights and 20,352 bytes of activations of 8 rows on chip (the card "
            "has 101,376 bytes)",
        ),
        ({"width": 32, "shared": CARDS["86"]}, ""),
    ],
)
def test_unsupported_options_are_named(member, part):
    most = {"inputs": 256, "width": 128, "depth": 1, "outputs": 64, "shared": LARGEST}
    member = most | member
    shared = member.pop("shared")
    dtype = member.pop("dtype", torch.float32)
    assert (
        replace(shape(**member), dtype=dtype).with_largest_tile(shared).unsupported(shared) == part
    )


def test_the_page_says_what_fits_which_card():
    page = (HERE.parents[1] / "docs/gpu.md").read_text()
    rows = re.findall(
        r"^\| (\d+) \| (\d) of (\d+) \| (\d+) \| (\S+) \| (\S+) \| (\S+) \|$", page, re.M
    )
    for inputs, depth, width, outputs, *said in rows:
        member = shape(*map(int, (inputs, width, depth, outputs)))
        fitted = [
            (member.with_largest_tile(CARDS[card]), CARDS[card]) for card in ("90", "80", "86")
        ]
        assert said == ["-" if tile.unsupported(card) else str(tile.rows) for tile, card in fitted]
    assert len(rows) == 10


SHAPES = {
    "16": shape(16, 16),
    "32": shape(width=32, activations=(3, 3), moments=1),
    "64": shape(),
    "64, four layers": shape(depth=4, activations=(1, 0, 2, 1), dropout=True),
    "128": shape(30, 128),
    "many inputs": shape(256, 64, 1, 64),
    "linear, regression": shape(100, 0, 0, 1, classes=False),
}


def machine_code(kernel, card, folder):
    """The output of nvcc, which compiles a kernel into ``kernel.cubin``."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not here")
    (folder / "kernel.cu").write_text(kernel.source)
    command = ["nvcc", "-cubin", f"-arch=sm_{card}", *OPTIONS, "-Xptxas", "-v", "kernel.cu"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr


@pytest.mark.long
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("card", CARDS)
def test_it_compiles_without_spills(name, card, tf32, tmp_path):
    kernel = replace(SHAPES[name], tf32=tf32).with_largest_tile(CARDS[card])
    if kernel.shared > CARDS[card]:
        pytest.skip("the weights do not fit on this card: it does not know such members there")
    said = machine_code(kernel, card, tmp_path)
    assert set(re.findall(r"(\d+) bytes spill", said)) == {"0"}
    (registers,) = map(int, re.findall(r"Used (\d+) registers", said))
    assert registers * kernel.threads <= 65_536 and registers <= 255


@pytest.mark.long
@pytest.mark.parametrize("tf32", [False, True])
def test_its_machine_code_is_products(tf32, tmp_path):
    """Each barrier is there once. Products read four numbers at once, one such read for 7 of them;
    or fragments."""
    if shutil.which("nvdisasm") is None:
        pytest.skip("nvdisasm is not here")
    machine_code(shape(tf32=tf32), "90", tmp_path)
    done = subprocess.run(
        ["nvdisasm", "-c", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
    )
    found = re.findall(
        r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z0-9]+)(\.128|\.64|\.1688\.F32\.TF32)?",
        done.stdout,
    )
    counts = Counter("".join(word) for word in found)
    assert counts["BAR"] == len(EACH_BARRIER)
    if tf32:
        products = counts["HMMA.1688.F32.TF32"]
        assert products > (counts["LDS"] + counts["LDS.64"]) / 6 and counts["FFMA"] < 4 * products
    else:
        assert counts["FFMA"] > 7 * counts["LDS.128"] > 7 * counts["LDS"] / 2 and not counts["HMMA"]


def test_nvrtc_compiles_it_once_on_a_machine(monkeypatch, tmp_path):
    """The calls of NVRTC; neither it nor a driver is needed here."""
    asked = []
    kernel = shape()

    def compile(source, name, nvcc_options):
        asked.append((source, name, tuple(nvcc_options)))
        return b"machine code", name

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("torch.cuda._utils._nvrtc_compile", compile)
    loaded = {"train_members": Mock()}
    monkeypatch.setattr("torch.cuda._utils._cuda_load_module", Mock(return_value=loaded))
    for _ in range(2):
        assert compile_kernel(kernel, torch.device("cuda")) is loaded["train_members"]
    assert asked == [(kernel.source, "train_members", OPTIONS)]
    loaded["train_members"].set_shared_memory_config.assert_called_with(kernel.shared)


@pytest.fixture(scope="module")
def program(emulator, tmp_path_factory):
    """Build, with a sanitizer, a program that trains two small epochs, and scores them: returns its
    folder."""
    data = make_data(n=40, dtype=torch.float32)
    numbers, arrays = twice(*epoch_of(data, SMALL, scoring_of(data, "neg_log_loss")))

    def build(sanitizer, tf32=False):
        folder = tmp_path_factory.mktemp(sanitizer)
        (folder / "in").write_bytes(
            written(numbers, {name: bytes_of(array) for name, array in arrays.items()})
        )
        (folder / "kernel.cu").write_text(replace(kernel_of(numbers, arrays), tf32=tf32).source)
        watched = [
            "g++",
            "-std=c++17",
            "-O1",
            "-g",
            "-w",
            f"-fsanitize={sanitizer}",
            f"-I{HERE}",
            f"-I{folder}",
        ]
        main = [
            *watched,
            '-DKERNEL="kernel.cu"',
            "-c",
            HERE / "kernel_main.cpp",
            "-o",
            folder / "main.o",
        ]
        subprocess.run(main, check=True)
        fibers = [
            "g++",
            "-std=c++17",
            "-O1",
            "-w",
            "-c",
            HERE / "emulation.cpp",
            "-o",
            folder / "fibers.o",
        ]
        subprocess.run(fibers, check=True)
        objects = [folder / "main.o", folder / "fibers.o"]
        subprocess.run([*watched, *objects, "-o", folder / "main", "-lpthread"], check=True)
        return folder

    return build


def watched(folder, *, order, left_out=-1):
    """The output of a sanitizer for these epochs; empty means that there is no error."""
    environment = {
        **os.environ,
        "ORDER": str(order),
        "LEFT_OUT": str(left_out),
        "TSAN_OPTIONS": "exitcode=66",
    }
    command = ["setarch", "-R", folder / "main", folder / "in", folder / "out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    said = [
        line for line in done.stderr.splitlines() if "doesn't fully support makecontext" not in line
    ]
    assert bool(done.returncode) == bool(said), done.stderr
    return "\n".join(said)


@needs_compiled_code
@pytest.mark.long
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("order", range(3), ids=ORDERS)
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_sanitizers_find_nothing(sanitizer, order, tf32, program):
    assert watched(program(sanitizer, tf32), order=order) == ""


@needs_compiled_code
@pytest.mark.long
@pytest.mark.parametrize("tf32", [False, True])
def test_a_sanitizer_finds_each_barrier_that_is_left_out(tf32, program):
    folder = program("thread", tf32)
    said = {
        int(barrier): watched(folder, order=0, left_out=int(barrier)) for barrier in EACH_BARRIER
    }
    assert all("data race" in races for races in said.values()), said
