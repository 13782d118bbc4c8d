"""The compiled training of members: its C source, built once on each machine by the compiler that is there.

Plain C with the compiler's own vector types takes a second or two to build, where compiling the same step through
``torch.compile`` took about nine, for every shape anew.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gputune.scratch import scratch_folder

FOLDER = Path(__file__).parent
SOURCES = ("members.c", "product.h", "functions.h", "update.h", "member.h", "step.h")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# Clang and older compilers say no to it, and choose well without.
_WHOLE_VECTORS = "-mprefer-vector-width=512"
COMPILERS = ("cc", "gcc", "clang")


class NotBuiltError(Exception):
    """Why there is no compiled library here."""


@functools.lru_cache(maxsize=2)
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """Return the library for float32 or float64, built where no earlier run has left it. Raises NotBuiltError."""
    compiler = find_compiler()
    if compiler is None:
        raise NotBuiltError("there is no C compiler (cc, gcc or clang) on this machine's PATH")
    double = dtype == torch.float64
    name = f"members-{'double' if double else 'float'}-{_key(compiler)}"
    folder = cache_folder()
    try:
        if folder is not None and (kept := _kept(folder, name)) is not None:
            return kept
        if folder is not None and os.access(folder, os.W_OK):
            return _load(_build(compiler, folder / name, double=double))
        # What is loaded needs its file no more; Windows keeps it from being removed.
        with scratch_folder() as private:
            return _load(_build(compiler, private / name, double=double))
    except (OSError, AttributeError) as error:
        raise NotBuiltError(f"gputune's compiled code could not be made or loaded: {error}") from error


def find_compiler() -> str | None:
    """Return the path of a C compiler: that of the environment's ``CC``, or one of the usual names."""
    for name in (os.environ.get("CC", ""), *COMPILERS):
        if name and (path := shutil.which(name)):
            return path
    return None


def cache_folder() -> Path | None:
    """Return the folder of built libraries: ``gputune`` in the user's cache.

    None where there is no such folder, or, with a UserWarning, where its code could be another user's.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        if not base.is_absolute():  # which the XDG rule has ignored
            base = Path.home() / ".cache"
        folder = base / "gputune"
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        # In a folder that anyone may write to, without the sticky bit, ours could be exchanged for another.
        safe = _is_own(folder) and base.stat().st_mode & 0o1002 != 0o0002
    except (OSError, RuntimeError):  # RuntimeError: no HOME, and a user without an entry in passwd
        return None
    if not safe:
        warnings.warn(
            f"{folder} is not used for compiled code, which each process now builds for itself: it must belong to "
            "you and be writable by nobody else. Mend that (chmod 700), or set XDG_CACHE_HOME to another folder.",
            stacklevel=3,
        )
    return folder if safe else None


def _is_own(path: Path) -> bool:
    """Whether a file or folder, no link, belongs to this user, and no other may write to it."""
    if not hasattr(os, "geteuid"):  # Windows, where a user's cache is the user's
        return True
    status = path.lstat()
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022 and not path.is_symlink()


def _kept(folder: Path, name: str) -> ctypes.CDLL | None:
    """Return the library that an earlier run left. One that is not as it was built, or does not load, is removed."""
    for path in folder.glob(f"{name}-*.so"):
        with contextlib.suppress(OSError, AttributeError):
            if _is_own(path) and path.stem == f"{name}-{_digest(path)}":
                return _load(path)
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.train_members.restype = ctypes.c_int
    return loaded


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _key(compiler: str) -> str:
    """Name a build by all that it depends on; a home folder may be shared by machines of other kinds."""
    parts = [(FOLDER / name).read_bytes() for name in SOURCES]
    parts += [" ".join(FLAGS).encode(), compiler.encode(), _processor().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """The processor and what it can do, as far as the system says it."""
    facts = ("model name", "flags", "Features", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    said = sorted({line for line in lines if line.startswith(facts)})
    return "\n".join([platform.system(), platform.machine(), platform.processor(), *said])


def processor_name() -> str:
    """Return the name of the processor, "" where the system does not say it."""
    lines = (line for line in _processor().splitlines() if line.startswith("model name"))
    return next((line.partition(":")[2].strip() for line in lines), platform.processor())


def _build(compiler: str, path: Path, *, double: bool) -> Path:
    """Return ``path`` with the SHA-256 of what was built added to its name.

    Built into a file of its own and put in its place at once: another process may be doing the same.
    """
    with scratch_folder(path.parent, prefix="build") as folder:
        built = folder / path.name
        words = [*FLAGS, *["-DDOUBLE"] * double, str(FOLDER / "members.c"), "-o", str(built), "-lm"]
        for more in ([_WHOLE_VECTORS], []):
            done = _run([compiler, *more, *words])
            if done.returncode == 0:
                return _keep(built, path)
    said = done.stderr.strip().splitlines()
    raise NotBuiltError(
        f"{compiler} could not build gputune's C code: {said[0] if said else f'exit code {done.returncode}'}"
    )


def _keep(built: Path, path: Path) -> Path:
    """Put a file in its place, whole even after a power cut, for this user alone."""
    built.chmod(0o600)
    with built.open("rb+") as file:
        os.fsync(file.fileno())
    return built.replace(path.with_name(f"{path.name}-{_digest(built)}.so"))


def _run(words: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run a compiler; one whose process is interrupted ends with all that it has started."""
    with (
        _held_back() as let_through,
        subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
        ) as compiler,
    ):
        try:
            let_through()
            out, err = compiler.communicate()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(compiler.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(words, compiler.returncode, out, err)


@contextlib.contextmanager
def _held_back() -> Iterator[Callable[[], object]]:
    """Hold signals back until the function that is given is called: one may come before a new process is known here."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield lambda: None
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield partial(signal.pthread_sigmask, signal.SIG_SETMASK, before)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_NUMBERS = (
    "folds", "trials", "inputs", "width", "outputs", "layers", "activation", "optimizer", "classes", "rows", "epoch",
    "horizon",
)  # fmt: skip
_BEFORE = ("x", "copies", "y", "weights", "present", "order", "lengths")
_AFTER = (
    "widths", "sizes", "schedule", "lr", "decay", "momentum", "dropout", "draws", "draw_start", "draw_rows", "theta",
    "first", "second", "valid", "valid_start", "scored", "accuracy", "nanoseconds", "queue",
)  # fmt: skip

ACTIVATIONS = ("relu", "gelu", "silu", "tanh")
OPTIMIZERS = ("sgd", "nesterov", "adam", "adamw")
"""In the order of the library's numbers for them."""


class Work(ctypes.Structure):
    """What the library is asked to do, sizes and where the arrays lie; ``member.h`` says what each field is."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in _BEFORE),
        ("longest", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in _AFTER),
    )


def make_work(numbers: Mapping[str, int], arrays: Mapping[str, Any]) -> Work:
    """Return a Work of numbers and of contiguous tensors or arrays (None: NULL), which must outlive it."""
    return Work(**numbers, **{name: _address(value) for name, value in arrays.items()})


def _address(value: np.ndarray | torch.Tensor | None) -> int | None:
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        assert value.is_contiguous()
        return value.data_ptr()
    assert value.flags.c_contiguous
    return value.ctypes.data
