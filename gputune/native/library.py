"""The compiled training of members: its C source, built once on each machine by the compiler that is there.

Plain C with the compiler's own vector types takes a second or two to build, where compiling the same step through
``torch.compile`` took about nine, for every shape anew.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

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
    path = cache_folder() / f"members-{'double' if double else 'float'}-{_key(compiler)}.so"
    try:
        if not path.exists():
            _build(compiler, path, double=double)
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise NotBuiltError(f"{path} could not be made or loaded: {error}") from error
    found.train_members.restype = ctypes.c_int
    return found


def find_compiler() -> str | None:
    """Return the path of a C compiler: that of the environment's ``CC``, or one of the usual names."""
    for name in (os.environ.get("CC", ""), *COMPILERS):
        if name and (path := shutil.which(name)):
            return path
    return None


def cache_folder() -> Path:
    """Return the folder of built libraries: ``gputune`` in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gputune"


def _key(compiler: str) -> str:
    """Name a build by all that it depends on; a home folder may be shared by machines of other kinds."""
    parts = [(FOLDER / name).read_bytes() for name in SOURCES]
    parts += [" ".join(FLAGS).encode(), compiler.encode(), _processor().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """The processor and what it can do, as far as the system says it."""
    wanted = ("model name", "flags", "Features", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    said = sorted({line for line in lines if line.startswith(wanted)})
    return "\n".join([platform.system(), platform.machine(), platform.processor(), *said])


def _build(compiler: str, path: Path, *, double: bool) -> None:
    """Build into a file of its own and put that in its place at once: another process may be doing the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        words = [
            *FLAGS,
            *(["-DDOUBLE"] if double else []),
            str(FOLDER / "members.c"),
            "-o",
            str(built),
            "-lm",
        ]
        for more in ([_WHOLE_VECTORS], []):
            done = subprocess.run([compiler, *more, *words], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                built.replace(path)
                return
    said = done.stderr.strip().splitlines()
    raise NotBuiltError(
        f"{compiler} could not build gputune's C code: {said[0] if said else f'exit code {done.returncode}'}"
    )
