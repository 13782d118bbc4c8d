"""Choose how this machine runs training steps, and set the numeric precision and the CPU threads.

A backend is a way to run the training steps of trials that train together as stacked tensors. The
backends are compiled code on a CPU, a kernel on a GPU, recorded steps (the operations of one step,
recorded once and replayed) and eager steps. A member is one trial on one fold. The settings are the
precision of float32 matrix products on a GPU (full, or TF32 on request) and the number of CPU
threads.

``gputune check`` measures a device: it finds the backends that break a guarantee there, and the
speed of each backend. The user's cache keeps these findings for one device, one version of torch
and one version of gputune. The choice of "auto" is based on them.
"""

import json
import os
import platform
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from gputune.ground.device import on_threads
from gputune.ground.errors import InputError, Verbatim, option
from gputune.ground.files import cache_folder, read_file, write_text
from gputune.ground.types import Precision
from gputune.native.library import processor_name
from gputune.version import __version__

_FEW = 20  # number of members for which the launches decide the time of a step


@dataclass(frozen=True)
class Speed:
    """Measured time of one training step. The step takes ``step`` seconds, plus ``member`` seconds
    for each member (one trial on one fold)."""

    step: float
    member: float

    def of(self, members: float) -> float:
        """Return the estimated seconds of one training step of ``members`` members that train
        together."""
        return self.step + members * self.member


@dataclass(frozen=True)
class Findings:
    """Results of ``gputune check`` for one device.

    ``failed`` maps a backend to the guarantee that the backend breaks. ``failed`` is None if no
    guarantee was checked. ``speeds`` maps a backend to its measured speed.
    """

    failed: Mapping[str, str] | None = None
    speeds: Mapping[str, Speed] = field(default_factory=dict)

    def seconds(self) -> dict[str, float]:
        """Return the seconds of a training step of a few members in each measured backend."""
        return {backend: speed.of(_FEW) for backend, speed in self.speeds.items()}

    def fastest(self) -> str:
        """Return the measured backend with the shortest training step, or "" if none is
        measured."""
        seconds = self.seconds()
        return min(seconds, key=seconds.__getitem__, default="")

    def why_not(self, backend: str) -> str:
        """Return a sentence that says which guarantee a backend breaks on this device, or ""."""
        law = (self.failed or {}).get(backend)
        if law is None:
            return ""
        return f"gputune check found that {law!r} does not hold for this backend on this device"


def device_name(device: torch.device) -> str:
    """Return the product name of a torch device: the name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name() or platform.machine()


def read_findings(device: torch.device) -> Findings:
    """Return the stored results of ``gputune check`` for a device. The results are empty if the
    cache has none or cannot be read."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        path = _path(device)
        if path is not None:
            stored = json.loads(read_file(path))
            speeds = {name: Speed(**speed) for name, speed in stored["speeds"].items()}
            return Findings(stored["failed"], speeds)
    return Findings()


def keep_findings(device: torch.device, findings: Findings) -> Path | None:
    """Store results of ``gputune check`` for a device in the cache file, and keep the speeds that
    the file already has.

    Returns the path of the file, or None if there is no cache or if the file cannot be written.
    """
    stored = read_findings(device)
    failed = stored.failed if findings.failed is None else findings.failed
    merged = Findings(failed, {**stored.speeds, **findings.speeds})
    path = _path(device)
    with suppress(OSError):  # a full disk, or a home that cannot be written
        if path is not None:
            write_text(path, json.dumps(asdict(merged), indent=1))
            return path
    return None


def _path(device: torch.device) -> Path | None:
    """Return the path of the cache file for a device, or None if the GPU is not in this machine."""
    if device.type == "cuda" and not torch.cuda.is_available():  # the GPU belongs to a cluster
        return None
    folder = cache_folder()
    # Findings hold only for these versions.
    machine = f"{device_name(device)} torch {torch.__version__} gputune {__version__}"
    return folder and folder / f"check-{re.sub(r'[^a-z0-9.+]+', '-', machine.lower())}.json"


def choose_device(device: str) -> torch.device:
    """Return the torch device for the user's choice, such as "auto", "cpu", "cuda" or "cuda:1".
    Raises InputError if this machine has no such device."""
    on_gpu = torch.cuda.is_available()
    if device == "auto":
        return torch.device("cuda" if on_gpu else "cpu")
    remedy = ""
    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    with suppress(RuntimeError, TypeError):
        chosen = torch.device(device)
        if chosen.type == "cpu":
            return chosen
        if chosen.type == "cuda":
            if on_gpu and (chosen.index or 0) < len(names) - 1:
                return chosen
            if not on_gpu:
                names = ["cpu"]
                remedy = _why_no_gpu()
    rule = f"must be 'auto' or a device of this machine ({', '.join(names)})"
    raise InputError("device", rule, got=device, remedy=remedy)


def _why_no_gpu() -> str:
    """Return a sentence that says why torch cannot use a GPU, and the remedy if it is known."""
    if torch.version.cuda is None:
        page = "https://pytorch.org/get-started/locally"
        return (
            f"torch {torch.__version__} is built without CUDA. Install a build with CUDA: {page}."
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and not hidden.strip("-1 "):
        return f"CUDA_VISIBLE_DEVICES={hidden!r} hides every GPU. Unset it."
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]  # says what is wrong with the driver
    except (RuntimeError, AssertionError) as error:
        return f"torch says: {str(error).splitlines()[0]}"
    return "torch finds no GPU. Look at the output of nvidia-smi."


def other_gpus(word: str, device: torch.device) -> tuple[torch.device, ...]:
    """Return the other visible GPUs on which a search trains, in addition to ``device``.

    The result is empty unless the user asked for "auto" or "cuda".
    """
    if device.type != "cuda" or word not in ("auto", "cuda"):
        return ()
    # The rows are already on a GPU that is not the current one: only that GPU trains.
    if device.index not in (None, current := torch.cuda.current_device()):
        return ()
    return tuple(torch.device("cuda", i) for i in range(torch.cuda.device_count()) if i != current)


# The setting belongs to the process, and searches in several threads may end in any order: the last
# one restores it.
_TF32 = threading.Lock()
_tf32_users = 0
_before_tf32 = "none"


@contextmanager
def matrix_products(*, tf32: bool) -> Iterator[None]:
    """Let float32 matrix products on a GPU round their factors to TF32 inside the ``with`` block.
    TF32 has 10 bits of mantissa.

    If ``tf32`` is False, torch's setting does not change.

    Source:
        https://docs.pytorch.org/docs/stable/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices
    """
    global _tf32_users, _before_tf32
    if not tf32:
        yield
        return
    matmul = torch.backends.cuda.matmul
    with _TF32:
        if not _tf32_users:
            _before_tf32 = matmul.fp32_precision
        _tf32_users += 1
        matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        with _TF32:
            _tf32_users -= 1
            if not _tf32_users:
                matmul.fp32_precision = _before_tf32


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch use ``threads`` threads and round denormal numbers to zero inside the ``with``
    block.

    Denormal numbers are values below 1e-38 in float32. The momentum of units that no longer learn
    decays into them, and a CPU handles them very slowly. Rounding them to zero made the training of
    a wide network 2x faster.
    """
    # torch has no getter for this setting: a product with a denormal number shows it.
    flushed = bool(torch.tensor(1e-39, dtype=torch.float32) * 1 == 0)
    torch.set_flush_denormal(True)
    try:
        with on_threads(threads):
            yield
    finally:
        torch.set_flush_denormal(flushed)


def check_tf32(tf32: object, dtype: str, workers: object, device: torch.device) -> None:
    """Raise InputError if the user requested TF32, but the device, the dtype or the workers exclude
    it. gputune sets TF32 only in this process."""
    if not isinstance(tf32, bool):
        raise InputError("tf32", "must be True or False", got=tf32)
    if not tf32:
        return
    if device.type != "cuda" or dtype != "float32":
        raise InputError(
            "tf32=True",
            "works only for float32 matrix products on a GPU",
            got=Verbatim(f"{option('device', str(device))} and {option('dtype', dtype)}"),
            remedy=f"Leave {option('tf32')} out.",
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        name = torch.cuda.get_device_name(device)
        version = ".".join(map(str, capability))
        raise InputError(
            "tf32=True",
            f"has no effect below compute capability 8.0 (Ampere), and {name} has {version}",
            remedy=f"Leave {option('tf32')} out.",
        )
    if workers not in ("auto", 1):
        raise InputError(
            "tf32=True",
            "works only for a search in one process",
            got=Verbatim(option("workers", workers)),
            remedy="Leave one of them out.",
        )


def check_precision(
    precision: Precision, dtype: str, device: torch.device, *, descends: bool
) -> None:
    """Raise InputError if the user requested bfloat16, but it has no effect or is not supported.

    Args:
        descends: Whether this is a hypergradient search. bfloat16 would round the values that the
            search differentiates.
    """
    if precision == "full":
        return
    argument = f"precision={precision!r}"
    if dtype != "float32":
        raise InputError(
            argument,
            f"works only with {option('dtype', 'float32')}",
            got=Verbatim(option("dtype", dtype)),
            remedy="Leave one of them out.",
        )
    if descends:
        raise InputError(
            argument,
            f"would round the numbers that {option('method', 'hypergradient')} differentiates",
            remedy="Leave one of them out.",
        )
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError(
            argument,
            "needs a GPU that computes in bfloat16, but this GPU does not",
            remedy=f"Leave {option('precision')} out.",
        )
