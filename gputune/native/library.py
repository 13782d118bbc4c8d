"""Build and load the C code that trains members on a CPU.

A member is one trial on one fold. One part of the C code is built when gputune is installed.
Another part (the training steps of a user's module) is generated and built on the user's machine.
The libraries do not depend on Python or torch and are loaded through ctypes. One wheel therefore
works with all Python and torch versions and all x86-64 levels of the processor. Generated code is
built once per machine and stored in the user's cache.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import lock_descriptor

from gputune.ground.errors import warn
from gputune.ground.files import cache_folder, is_users, open_to_others, scratch_folder

FOLDER = Path(__file__).parent
LEVELS = (4, 3, 1)
"""Levels of x86-64 processors: 4 has AVX-512, 3 has AVX2 with FMA, and every x86-64 processor has
level 1.

Other processors have only level 1.
"""


class NotBuiltError(Exception):
    """Raised if a compiled library or kernel is missing or cannot be built. The message gives
    the reason."""


@functools.lru_cache(maxsize=2)
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """Load gputune's compiled C library for float32 or float64, at the processor's highest level.

    Raises NotBuiltError if there is no library or it cannot be loaded.
    """
    kind = "double" if dtype == torch.float64 else "float"
    built = {}
    for level in LEVELS:
        for path in FOLDER.glob(f"_{kind}{level}.*"):
            built[level] = str(path)
    if 1 not in built:
        raise NotBuiltError(
            "this installation of gputune has no compiled code: install gcc or clang and then "
            "gputune again, or install a wheel of gputune that was built for this platform"
        )
    try:
        best = ctypes.CDLL(built[1]).processor_level()
        # LEVELS is in descending order.
        loaded = ctypes.CDLL(next(path for level, path in built.items() if level <= best))
        loaded.train_members.restype = ctypes.c_int
        loaded.draw_uniform.restype = None
        loaded.draw_streams.restype = None
        loaded.step_functions.restype = ctypes.c_void_p
    except (OSError, AttributeError) as error:
        raise NotBuiltError(
            f"gputune's compiled code cannot be loaded, install gputune again: {error}"
        ) from error
    return loaded


def fill_uniform(seed: int, parts: Sequence[torch.Tensor]) -> bool:
    """Fill float32 tensors, one after the other, with the random numbers of ``torch.rand`` for a
    seed.

    Returns False if gputune's compiled C library is missing.
    """
    assert all(part.is_contiguous() and part.dtype == torch.float32 for part in parts)
    try:
        loaded = library(torch.float32)
    except NotBuiltError:
        return False
    places = (ctypes.c_void_p * len(parts))(*(part.data_ptr() for part in parts))
    counts = (ctypes.c_int64 * len(parts))(*(part.numel() for part in parts))
    loaded.draw_uniform(
        ctypes.c_int64(seed & 0xFFFFFFFF), ctypes.c_int64(len(parts)), places, counts
    )
    return True


def fill_streams(seeds: Sequence[int], counts: Sequence[int], out: torch.Tensor) -> None:
    """Fill a float32 tensor with the random numbers of several streams, one stream after another.

    Stream i has the first ``counts[i]`` numbers of ``torch.rand`` for the seed ``seeds[i]``. One
    call for many streams lets other threads run meanwhile. Raises NotBuiltError if gputune's
    compiled C library is missing.
    """
    assert out.is_contiguous() and out.dtype == torch.float32 and out.numel() == sum(counts)
    loaded = library(torch.float32)
    numbers = ctypes.c_int64 * len(seeds)
    loaded.draw_streams(
        ctypes.c_int64(len(seeds)),
        numbers(*(seed & 0xFFFFFFFF for seed in seeds)),
        numbers(*counts),
        ctypes.c_void_p(out.data_ptr()),
    )


_NUMBERS = (
    "folds trials inputs width outputs layers optimizer classes rows epoch horizon row_score loss"
).split()
_BEFORE = "x center scale copies y target target_center target_scale weights present order lengths".split()
_AFTER = """widths activations sizes schedule lr decay momentum dropout ema loss_number draws draw_start draw_rows
theta first second average valid valid_start scored means nanoseconds lag queue
steps_done""".split()

ACTIVATIONS = ("relu", "gelu", "silu", "tanh")
OPTIMIZERS = ("sgd", "nesterov", "adam", "adamw")
ROW_SCORES = ("hit", "log likelihood", "squared error", "absolute error")
NUMBER_LOSSES = ("mse", "mae", "huber", "quantile")
"""The position of a name in each of these tuples is its code in the C library."""


class MemberWork(ctypes.Structure):
    """The argument of the C function ``train_members``: sizes and the addresses of arrays.

    ``work.h`` describes each field.
    """

    _fields_ = (
        *((name, ctypes.c_int64) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in _BEFORE),
        ("longest", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in _AFTER),
    )


def make_work(numbers: Mapping[str, int], arrays: Mapping[str, torch.Tensor | None]) -> MemberWork:
    """Return a MemberWork with the given sizes and the addresses of contiguous tensors.

    None becomes NULL. The tensors must live longer than the MemberWork.
    """
    assert all(tensor is None or tensor.is_contiguous() for tensor in arrays.values())
    work = MemberWork(**numbers)
    for name, tensor in arrays.items():
        if tensor is not None:
            setattr(work, name, tensor.data_ptr())
    return work


# Not -O3: it needs twice the build time for code that is no faster, and training with each new
# shape waits for the build.
FLAGS = (
    "-O2 -ftree-vectorize -march=native -fno-math-errno -fno-trapping-math -fopenmp-simd -shared "
    "-fPIC"
).split()
# Seconds of a build without kernels: the start of the compiler, and the headers.
_HEADER_SECONDS = 0.1
# Seconds per character of C code: at first of a residual network and gcc 12 on one EPYC core, then
# of the last build of this process.
_compiler_speed = [3e-5]
# Clang and older compilers refuse these options, and choose well without them.
_WHOLE_VECTORS = ("-mprefer-vector-width=512", "-fvect-cost-model=dynamic")
COMPILERS = ("cc", "gcc", "clang")


@functools.lru_cache(maxsize=64)
def build(source: str, dtype: torch.dtype) -> ctypes.CDLL:
    """Compile C code, or find its library in the cache, and return the loaded library.

    The code may include the headers in this folder. Raises NotBuiltError if it cannot be built or
    loaded.
    """
    compiler = find_compiler()
    if compiler is None:
        raise NotBuiltError("there is no C compiler (cc, gcc or clang) on this machine's PATH")
    name = _file_name(source, dtype, compiler)
    try:
        folder = code_folder()
        for path in _cached(folder, name, ".so"):
            with contextlib.suppress(OSError):
                return _load(path)
            with contextlib.suppress(OSError):  # the file does not load, so it is removed
                path.unlink()
        if folder is not None and os.access(folder, os.W_OK):
            # An OSError means that something else is at this path, or that the disk is full.
            with contextlib.suppress(OSError), _only_builder(folder / name):
                for path in _cached(folder, name, ".so"):  # built by another process meanwhile
                    return _load(path)
                return _load(_build(compiler, source, folder / name))
        # A loaded library no longer needs its file, so the folder can be removed. On Windows it
        # cannot be removed while the library is loaded.
        with scratch_folder() as private:
            return ctypes.CDLL(str(_build(compiler, source, private / name)))
    except OSError as error:
        raise NotBuiltError(f"the C code of a step could not be made or loaded: {error}") from error


def _file_name(source: str, dtype: torch.dtype, compiler: str) -> str:
    """Return the beginning of the file name of the library that is built from C code.

    The name has a hash of everything that the build depends on, including the processor, because
    different machines may share a home folder.
    """
    headers = [header.read_text() for header in sorted(FOLDER.glob("*.h"))]
    parts = [source, *headers, " ".join(FLAGS), compiler, _processor()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return f"steps-{'double' if dtype == torch.float64 else 'float'}-{key}"


def _load(path: Path) -> ctypes.CDLL:
    """Load a compiled library from a file in the cache.

    If the cache is on a file system mounted with noexec, a copy of the file is loaded.
    """
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        with scratch_folder() as private:
            return ctypes.CDLL(str(shutil.copy(path, private)))


@dataclass(frozen=True)
class Kernels:
    """The compiled C functions (kernels) of a member's training step.

    ``addresses`` has their memory addresses. ``take_steps`` is the C function that runs the kernel
    calls of a step.
    """

    addresses: "ctypes.Array[ctypes.c_void_p]"
    take_steps: Callable[..., None]


_kernels: dict[tuple[str, torch.dtype], tuple[int | None, ctypes.CDLL]] = {}


def build_kernels(bodies: Sequence[str], dtype: torch.dtype) -> Kernels:
    """Compile C functions with the given bodies. Return their addresses, and the function that
    calls them.

    Only functions that this process has not built yet are compiled. Raises NotBuiltError. A body
    refers to its arrays as P, to Python's numeric values as S, and to sizes as N
    (``native/steps.h``).
    """
    new = _not_built(bodies, dtype)
    if new:
        made = build(_source_of(new, dtype), dtype)
        made.use_library(ctypes.c_void_p(library(dtype).step_functions()))
        for i, body in enumerate(new):
            _kernels[body, dtype] = ctypes.cast(made[f"k{i}"], ctypes.c_void_p).value, made
    built = [_kernels[body, dtype] for body in bodies]
    addresses = (ctypes.c_void_p * len(built))(*(address for address, _ in built))
    take_steps = built[0][1].take_steps
    take_steps.restype = None
    return Kernels(addresses, take_steps)


def build_seconds(bodies: Sequence[str], dtype: torch.dtype) -> float:
    """Estimate the seconds that ``build_kernels`` takes for these functions.

    The result is 0 if this process has built the functions, or if the cache has them. Otherwise the
    estimate is the length of the C code, times the speed of the last build of this process.
    """
    new = _not_built(bodies, dtype)
    compiler = find_compiler()
    if not new or compiler is None:
        return 0.0
    source = _source_of(new, dtype)
    folder = code_folder()
    if any(_cached(folder, _file_name(source, dtype, compiler), ".so")):
        return 0.0
    return _HEADER_SECONDS + len(source) * _compiler_speed[-1]


def _not_built(bodies: Sequence[str], dtype: torch.dtype) -> list[str]:
    """Return the bodies of the C functions that this process has not built yet, sorted."""
    return sorted(body for body in {*bodies} if (body, dtype) not in _kernels)


def _source_of(bodies: Sequence[str], dtype: torch.dtype) -> str:
    """Return the C code of a library with these functions, which are called k0, k1, ..."""
    head = "void k{}(char *const *P, const double *S, const int64_t *N)"
    texts = [f"{head.format(i)} {{\n{body}\n}}" for i, body in enumerate(bodies)]
    double = ["#define DOUBLE"] * (dtype == torch.float64)
    return "\n".join([*double, '#include "steps.h"', *texts, ""])


def find_compiler() -> str | None:
    """Return the path of a C compiler, or None.

    The environment's ``CC`` comes first, then the usual names.
    """
    names = (os.environ.get("CC", ""), *COMPILERS)
    return next(filter(None, map(shutil.which, filter(None, names))), None)


def code_folder() -> Path | None:
    """Return the folder of built code: ``gputune/code`` in the user's cache.

    Return None if the user has no cache folder or it cannot be used. Also return None, with a
    UserWarning, if another user could have written its code.
    """
    base = cache_folder()
    if base is None:
        return None
    folder = base / "code"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if _is_own(folder) and _is_own(base) and open_to_others(base) is None:
            return folder
    except OSError:
        return None
    warn(
        f"{folder} is not used for compiled code, so each process builds this code again. The "
        "folder and the folders above it must belong to you, and only you may write to them. Run "
        "chmod 700, or set XDG_CACHE_HOME to a different folder."
    )
    return None


def _is_own(path: Path) -> bool:
    """Return whether a path is no link, and only this user can write to the file or folder."""
    return is_users(path.lstat()) and not path.is_symlink()


def _cached(folder: Path | None, name: str, ending: str) -> Iterator[Path]:
    """Yield the cached files with a name that have not changed since they were built. Remove the
    others."""
    for path in [] if folder is None else folder.glob(f"{name}-*{ending}"):
        with contextlib.suppress(OSError):
            # Only regular files are read: reading from a pipe or a device could block forever.
            is_file = stat.S_ISREG(path.lstat().st_mode)
            if is_file and _is_own(path) and path.stem == f"{name}-{_digest(path)}":
                yield path
                continue
        with contextlib.suppress(OSError):
            path.unlink()


def _put(built: Path, path: Path, ending: str) -> Path:
    """Move a built file to its final place in one atomic step.

    Returns ``path`` with the file's SHA-256 and the ending appended to its name.
    """
    built.chmod(0o600)
    return built.replace(path.with_name(f"{path.name}-{_digest(built)}{ending}"))


def kept_binary(name: str, source: str, make: Callable[[], bytes]) -> bytes:
    """Return the binary that ``make`` builds from a source, or the cached binary of an earlier run.

    If possible, the binary is stored in the user's cache.
    """
    name = f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    folder = code_folder()
    for path in _cached(folder, name, ".cubin"):
        return path.read_bytes()
    binary = make()
    if folder is not None:
        with contextlib.suppress(OSError), scratch_folder(folder, prefix="build") as private:
            (private / name).write_bytes(binary)
            _put(private / name, folder / name, ".cubin")
    return binary


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _processor() -> str:
    """Return a description of the processor and its features, as far as the system provides one."""
    facts = ("model name", "flags", "Features", "CPU part")
    description = set[str]()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        description = {line for line in lines if line.startswith(facts)}
    details = sorted(description) or [platform.processor()]
    return "\n".join([platform.system(), platform.machine(), *details])


def processor_name() -> str:
    """Return the name of the processor, or "" if the system does not provide it."""
    for line in _processor().splitlines():
        key, _, name = line.partition(":")
        if key.startswith("model name") and name.strip():
            return name.strip()
    # Called last, because this starts a process on some systems.
    return platform.processor()


@contextlib.contextmanager
def _only_builder(path: Path) -> Iterator[None]:
    """Wait until no other process of this user builds the library at ``path``.

    The lock belongs to the operating system and ends with the process. A file system without locks
    has no lock, and two processes may then build the same library.
    """
    lock_path = path.with_name(f"{path.name}.lock")
    lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        with contextlib.suppress(OSError):
            lock_descriptor(lock)
        yield
    finally:
        # Processes that still wait for this file find the built library afterwards.
        with contextlib.suppress(OSError):
            lock_path.unlink()
        os.close(lock)


def _compiler_seconds() -> float:
    """Return a clock that measures a build: the CPU seconds of ended child processes.

    Other programs on the machine hardly change them. Windows does not count them, so the result is
    the time there.
    """
    if os.name != "posix":
        return time.perf_counter()
    times = os.times()
    return times.children_user + times.children_system


def _build(compiler: str, source: str, path: Path) -> Path:
    """Build a library and move it to its final place; return the final path.

    The name of the file has the library's SHA-256. The move is one atomic step, because other
    processes may build the same library.
    """
    with scratch_folder(path.parent, prefix="build") as folder:
        built = folder / path.name
        text = folder / "source.c"
        text.write_text(source)
        arguments = [*FLAGS, f"-I{FOLDER}", str(text), "-o", str(built), "-lm"]
        for options in (_WHOLE_VECTORS, ()):
            begin = _compiler_seconds()
            result = subprocess.run(
                [compiler, *options, *arguments], capture_output=True, text=True
            )
            if result.returncode == 0:
                spent = _compiler_seconds() - begin - _HEADER_SECONDS
                _compiler_speed[:] = [max(0.0, spent) / len(source)]
                return _put(built, path, ".so")
    lines = result.stderr.strip().splitlines()
    reason = lines[0] if lines else f"exit code {result.returncode}"
    raise NotBuiltError(f"{compiler} could not build the C code of a step: {reason}")
