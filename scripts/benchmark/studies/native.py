"""CPU seconds per epoch of the compiled code of each level, and of a build for this processor."""

import ctypes
import shlex
import statistics
import subprocess
import tomllib
from argparse import Namespace
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from sklearn.datasets import load_digits

import gputune
from benchmark.report import Clock, publish, table
from gputune.engine import compiled
from gputune.native.library import FOLDER, LEVELS, find_compiler, make_work

WIDTHS = (16, 32, 64, 128, 256)
BATCH_SIZES = (32, 256)
ACTIVATIONS = ("relu", "gelu")
DTYPES = ("float32", "float64")
ROWS = 600
REPEATS = 15
PROJECT = Path(__file__).parents[3] / "pyproject.toml"
NATIVE = {4: "-march=native -mprefer-vector-width=512", 3: "-march=native -mno-avx512f"}
"""Level -> the flags in place of its own. Without them the compiler of level 3 would take what
level 4 has."""

HOW = """\
One epoch of {rows} rows of digits in 2 folds, two hidden layers, on one thread: the CPU seconds of a level's code over
those of the same code built with `{native}` (level 3),
by {compiler}. Each number is the median of {repeats} pairs, measured in turn.
"""


def run(options: Namespace) -> int:
    repeats = options.repeats or REPEATS
    compiler = find_compiler()
    if compiler is None:
        raise SystemExit("--native needs a C compiler")
    best = ctypes.CDLL(str(next(FOLDER.glob("_float1.*")))).processor_level()
    rows = []
    with TemporaryDirectory() as folder:
        for dtype, level in product(DTYPES, [n for n in LEVELS if n in NATIVE and n <= best]):
            pair = [
                build(Path(folder), compiler, dtype, level, native=native)
                for native in (False, True)
            ]
            for activation, width, size in product(ACTIVATIONS, WIDTHS, BATCH_SIZES):
                ratio = compare(pair, epoch(dtype, activation, width, size), repeats)
                rows.append((dtype, level, activation, width, size, ratio))
                print(*rows[-1][:-1], f"{ratio:.3f}", flush=True)
    how = HOW.format(
        rows=ROWS,
        native="` (level 4) and `".join(NATIVE.values()),
        compiler=compiler,
        repeats=repeats,
    )
    head = "dtype|level|activation|width|batch size|times the CPU seconds"
    found = table(head, ("{}|{}|{}|{}|{}|{:.2f}".format(*row) for row in rows))
    return publish(
        options.out, "native", "Compiled code beside -march=native", how, found, rows=rows
    )


def build(folder: Path, compiler: str, dtype: str, level: int, *, native: bool) -> ctypes.CDLL:
    """Return the library with the package's build flags, or with the flags of this processor."""
    modules = tomllib.loads(PROJECT.read_text())["tool"]["setuptools"]["ext-modules"]
    name = f"_{'double' if dtype == 'float64' else 'float'}{level}"
    flags: list[str] = next(
        one["extra-compile-args"] for one in modules if one["name"].endswith(name)
    )
    if native:
        flags = [flag for flag in flags if not flag.startswith("-m")] + shlex.split(NATIVE[level])
    flags += ["-DDOUBLE"] * (dtype == "float64")
    path = folder / f"{name}{native}.so"
    subprocess.run(
        [compiler, *flags, "-shared", "-fPIC", FOLDER / "members.c", "-o", path, "-lm"], check=True
    )
    return ctypes.CDLL(str(path))


class _Asked(Exception):
    """The arguments with which a search calls the library for one epoch."""


def epoch(
    dtype: str, activation: str, width: int, batch_size: int
) -> tuple[dict[str, int], dict[str, Any]]:

    def ask(library: object, numbers: object, arrays: object, report: object) -> None:
        raise _Asked(numbers, arrays)

    X, y = load_digits(return_X_y=True)
    space = {"width": [width], "depth": [2], "activation": [activation], "batch_size": [batch_size]}
    trials = max(1, 64 // width)
    with mock.patch.object(compiled, "_run", ask):
        try:
            gputune.tune(
                "mlp",
                X[:ROWS],
                y[:ROWS],
                space=space,
                n_trials=trials,
                cv=2,
                max_epochs=1,
                dtype=dtype,
                workers=1,
                backend="compiled",
                verbose=0,
            )
        except _Asked as asked:
            return asked.args
    raise AssertionError("no epoch was trained")


def compare(
    pair: Sequence[ctypes.CDLL], work: tuple[dict[str, int], dict[str, Any]], repeats: int
) -> float:
    """Return the median ratio of the CPU seconds per epoch of two libraries, which take turns."""
    numbers, arrays = work
    start = {
        name: arrays[name].clone()
        for name in ("theta", "first", "second")
        if arrays[name] is not None
    }
    taken: list[list[float]] = [[], []]
    for turn in range(repeats + 1):  # the first warms up
        for which in (0, 1) if turn % 2 else (1, 0):
            for name, value in start.items():
                arrays[name].copy_(value)
            place = ctypes.c_int64(0)
            stop = ctypes.c_int32(0)
            clock = Clock()
            pair[which].train_members(
                ctypes.byref(make_work(numbers, arrays)), ctypes.byref(place), ctypes.byref(stop)
            )
            taken[which].append(clock()[1])
    return statistics.median(own / native for own, native in list(zip(*taken, strict=True))[1:])
