"""The compiled training of members: C that was built as gputune was installed, and C that is
generated and built here.

The libraries know nothing of Python or of torch: they are loaded through ctypes, and one wheel
serves all versions and levels of the processor. Generated code is built once on each machine, and
kept in the user's cache.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gputune.errors import warn
from gputune.scratch import cache_folder, is_users, open_to_others, scratch_folder

FOLDER = Path(__file__).parent
LEVELS = (4, 3, 1)
"""Of x86-64: AVX-512; AVX2 with FMA; what every such processor has. Level 1 alone on other
processors."""


class NotBuiltError(Exception):
    """Why there is no compiled library here."""


@functools.lru_cache(maxsize=2)
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """Return the library for float32 or float64 at the processor's level. Raises NotBuiltError."""
    kind = "double" if dtype == torch.float64 else "float"
    built = {level: path for level in LEVELS for path in FOLDER.glob(f"_{kind}{level}.*")}
    if 1 not in built:
        raise NotBuiltError(
            "this installation of gputune has no compiled code, as none could be built when it "
            "was installed: install gcc or clang, and then gputune anew, or a wheel of it that "
            "was built for this platform"
        )
    try:
        best = ctypes.CDLL(str(built[1])).processor_level()
        loaded = ctypes.CDLL(
            str(next(built[level] for level in LEVELS if level <= best and level in built))
        )
        loaded.train_members.restype = ctypes.c_int
        loaded.draw_uniform.restype = None
    except (OSError, AttributeError) as error:
        raise NotBuiltError(
            f"gputune's compiled code cannot be loaded, install gputune anew: {error}"
        ) from error
    return loaded


def fill_uniform(seed: int, parts: Sequence[torch.Tensor]) -> bool:
    """Fill float32 tensors with what ``torch.rand`` draws from a seed, in turn; return False where
    no library is."""
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


_NUMBERS = (
    "folds trials inputs width outputs layers activation optimizer classes rows epoch horizon "
    "row_score loss"
).split()
_BEFORE = "x center scale copies y target target_center target_scale weights present order lengths".split()
_AFTER = """widths sizes schedule lr decay momentum dropout ema loss_number draws draw_start draw_rows theta first
second average valid valid_start scored means nanoseconds queue""".split()

ACTIVATIONS = ("relu", "gelu", "silu", "tanh")
OPTIMIZERS = ("sgd", "nesterov", "adam", "adamw")
ROW_SCORES = ("hit", "log likelihood", "squared error", "absolute error")
NUMBER_LOSSES = ("mse", "mae", "huber", "quantile")
"""In the order of the library's numbers for them."""


class Work(ctypes.Structure):
    """What the library is asked to do, sizes and where the arrays lie; ``work.h`` says what each
    field is."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in _BEFORE),
        ("longest", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in _AFTER),
    )


def make_work(numbers: Mapping[str, int], arrays: Mapping[str, torch.Tensor | None]) -> Work:
    """Return a Work of numbers and of contiguous tensors (None: NULL), which must outlive it."""
    assert all(tensor is None or tensor.is_contiguous() for tensor in arrays.values())
    return Work(
        **numbers,
        **{name: None if tensor is None else tensor.data_ptr() for name, tensor in arrays.items()},
    )


# Not -O3: it takes twice the time to build code that is no faster, and that each new shape waits
# for.
FLAGS = (
    "-O2 -ftree-vectorize -march=native -fno-math-errno -fno-trapping-math -fopenmp-simd -shared "
    "-fPIC"
).split()
# Clang and older compilers say no to these, and choose well without.
_WHOLE_VECTORS = ("-mprefer-vector-width=512", "-fvect-cost-model=dynamic")
COMPILERS = ("cc", "gcc", "clang")


@functools.lru_cache(maxsize=64)
def build(source: str, dtype: torch.dtype) -> ctypes.CDLL:
    """Return the library of C code, which may include the headers of this folder. Raises
    NotBuiltError."""
    compiler = find_compiler()
    if compiler is None:
        raise NotBuiltError("there is no C compiler (cc, gcc or clang) on this machine's PATH")
    # Named by all that a build depends on; a home folder may be shared by machines of other kinds.
    headers = (header.read_bytes() for header in sorted(FOLDER.glob("*.h")))
    parts = [
        source.encode(),
        *headers,
        *(part.encode() for part in (" ".join(FLAGS), compiler, _processor())),
    ]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    name = f"steps-{'double' if dtype == torch.float64 else 'float'}-{key}"
    try:
        folder = code_folder()
        for path in _cached(folder, name, ".so"):
            with contextlib.suppress(OSError):
                return _load(path)
            with contextlib.suppress(OSError):  # it does not load
                path.unlink()
        if folder is not None and os.access(folder, os.W_OK):
            # something else lies in its place, or the disk is full
            with contextlib.suppress(OSError):
                return _load(_build(compiler, source, folder / name))
        # What is loaded needs its file no more; Windows keeps it from being removed.
        with scratch_folder() as private:
            return ctypes.CDLL(str(_build(compiler, source, private / name)))
    except OSError as error:
        raise NotBuiltError(f"the C code of a step could not be made or loaded: {error}") from error


def _load(path: Path) -> ctypes.CDLL:
    """Load a library of the cache, or a copy of it where the cache is on a file system mounted with
    noexec."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        with scratch_folder() as private:
            return ctypes.CDLL(str(shutil.copy(path, private)))


@dataclass(frozen=True)
class Kernels:
    """Kernels of a member's step that are built, by their addresses, and what takes the calls of
    them."""

    addresses: "ctypes.Array[ctypes.c_void_p]"
    take_steps: Callable[..., None]


_kernels: dict[tuple[str, torch.dtype], tuple[int | None, ctypes.CDLL]] = {}


def build_kernels(bodies: Sequence[str], dtype: torch.dtype) -> Kernels:
    """Return the kernels of these bodies in C; those that this process has not are built. Raises
    NotBuiltError.

    A body knows its places as P, numbers of the host as S, and sizes as N (``native/steps.h``).
    """
    if new := sorted(body for body in {*bodies} if (body, dtype) not in _kernels):
        head = "void k{}(char *const *P, const double *S, const int64_t *N)"
        texts = [f"{head.format(i)} {{\n{body}\n}}" for i, body in enumerate(new)]
        double = ["#define DOUBLE"] * (dtype == torch.float64)
        made = build("\n".join([*double, '#include "steps.h"', *texts, ""]), dtype)
        for i, body in enumerate(new):
            _kernels[body, dtype] = ctypes.cast(made[f"k{i}"], ctypes.c_void_p).value, made
    built = [_kernels[body, dtype] for body in bodies]
    addresses = (ctypes.c_void_p * len(built))(*(address for address, _ in built))
    take_steps = built[0][1].take_steps
    take_steps.restype = None
    return Kernels(addresses, take_steps)


def find_compiler() -> str | None:
    """Return the path of a C compiler: that of the environment's ``CC``, or one of the usual
    names."""
    names = (os.environ.get("CC", ""), *COMPILERS)
    return next((path for name in names if name and (path := shutil.which(name))), None)


def code_folder() -> Path | None:
    """Return the folder of built code: ``gputune/code`` in the user's cache.

    None where there is no such folder, or, with a UserWarning, where its code could be another
    user's.
    """
    if (base := cache_folder()) is None:
        return None
    folder = base / "code"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if _is_own(folder) and _is_own(base) and open_to_others(base) is None:
            return folder
    except OSError:
        return None
    warn(
        f"{folder} is not used for compiled code, which each process now builds for itself: it "
        "and the folders that it is in must belong to you and be writable by nobody else. Mend "
        "that (chmod 700), or set XDG_CACHE_HOME to another folder."
    )
    return None


def _is_own(path: Path) -> bool:
    """Whether a file or folder, no link, is this user's alone to write."""
    return is_users(path.lstat()) and not path.is_symlink()


def _cached(folder: Path | None, name: str, ending: str) -> Iterator[Path]:
    """Yield the files of a name that are as they were built; all others are removed."""
    for path in [] if folder is None else folder.glob(f"{name}-*{ending}"):
        with contextlib.suppress(OSError):
            # A pipe or a device would keep whoever reads it waiting.
            is_file = stat.S_ISREG(path.lstat().st_mode)
            if is_file and _is_own(path) and path.stem == f"{name}-{_digest(path)}":
                yield path
                continue
        with contextlib.suppress(OSError):
            path.unlink()


def _put(built: Path, path: Path, ending: str) -> Path:
    """Put what was built in its place at once; return ``path`` with its SHA-256 and the ending
    added to its name."""
    built.chmod(0o600)
    return built.replace(path.with_name(f"{path.name}-{_digest(built)}{ending}"))


def kept_binary(name: str, source: str, make: Callable[[], bytes]) -> bytes:
    """Return what ``make`` makes of a source, or what an earlier run made of it and left in the
    user's cache."""
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
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _processor() -> str:
    """The processor and what it can do, as far as the system says it."""
    facts = ("model name", "flags", "Features", "CPU part")
    said = set[str]()
    with contextlib.suppress(OSError):
        said = {
            line
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith(facts)
        }
    return "\n".join(
        [platform.system(), platform.machine(), *(sorted(said) or [platform.processor()])]
    )


def processor_name() -> str:
    """Return the name of the processor, "" where the system does not say it."""
    lines = (line for line in _processor().splitlines() if line.startswith("model name"))
    # platform.processor() starts a process on some systems.
    return next((line.partition(":")[2].strip() for line in lines), "") or platform.processor()


def _build(compiler: str, source: str, path: Path) -> Path:
    """Return ``path`` with the SHA-256 of what was built in its name, put there at once: others may
    build it too."""
    with scratch_folder(path.parent, prefix="build") as folder:
        built = folder / path.name
        text = folder / "source.c"
        text.write_text(source)
        words = [*FLAGS, f"-I{FOLDER}", str(text), "-o", str(built), "-lm"]
        for more in (_WHOLE_VECTORS, ()):
            done = subprocess.run([compiler, *more, *words], capture_output=True, text=True)
            if done.returncode == 0:
                return _put(built, path, ".so")
    said = done.stderr.strip().splitlines()
    raise NotBuiltError(
        f"{compiler} could not build the C code of a step: "
        f"{said[0] if said else f'exit code {done.returncode}'}"
    )
