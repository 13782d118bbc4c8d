"""Where and how chunks train here: in compiled code on a CPU, in a kernel of a GPU, as recorded
steps, or eagerly.

How exactly a GPU multiplies matrices of single precision: as written, or with TF32 where that is
asked for. On how many threads a CPU computes.

What was found of a device, which backends fail their laws there, and how fast they are, is kept in
the user's cache, for one device, one version of torch and one of gputune: ``gputune check`` finds
it, and "auto" is chosen by it.
"""

import json
import math
import os
import platform
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from gputune.data.dataset import Dataset
from gputune.engine.kernel import KernelChunk, lacks, obstacle
from gputune.errors import InputError
from gputune.input_files import read_file
from gputune.modules.module import Traits
from gputune.modules.recorder import RECORDERS, CudaRecorder
from gputune.native.library import OPTIMIZERS, NotBuiltError, library, processor_name
from gputune.optimizers.classes import class_of
from gputune.optimizers.rules import RULES
from gputune.population.population import ModelKind, beyond_adam
from gputune.scratch import cache_folder, write_text
from gputune.types import BY_MEMBER, Backend, BackendWord, Config, Precision
from gputune.version import __version__

_FEW = 20  # members, of which a step is all launches
_DEEPEST = 63  # hidden layers that the compiled code has room for


@dataclass(frozen=True)
class Speed:
    """Seconds of a step: ``step`` whatever trains, and ``member`` for each member more."""

    step: float
    member: float

    def of(self, members: float) -> float:
        """Return the seconds of a step of so many members."""
        return self.step + members * self.member


@dataclass(frozen=True)
class Findings:
    """``failed`` says of a backend which law it fails, None where none was checked; ``speeds`` how
    fast it is."""

    failed: Mapping[Backend, str] | None = None
    speeds: Mapping[Backend, Speed] = field(default_factory=dict)

    def why_not(self, backend: Backend) -> str:
        """Return why a backend is not to be used, in words; "" where nothing is against it."""
        law = (self.failed or {}).get(backend)
        return "" if law is None else f"gputune check found that {law!r} does not hold for it here"


def device_name(device: torch.device) -> str:
    """Return what a person calls a device: the name of the card, or of the processor."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else processor_name() or platform.machine()
    )


def read_findings(device: torch.device) -> Findings:
    """Return what is known of a device; nothing where nothing is, or where it cannot be read."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        if (path := _path(device)) is not None:
            kept = json.loads(read_file(path))
            return Findings(
                kept["failed"], {name: Speed(**speed) for name, speed in kept["speeds"].items()}
            )
    return Findings()


def keep_findings(device: torch.device, found: Findings) -> Path | None:
    """Keep what was found, with the speeds that were known before; return where, None where there
    is no place."""
    known = read_findings(device)
    path = _path(device)
    failed = known.failed if found.failed is None else found.failed
    with suppress(OSError):  # a full disk, or a home that cannot be written
        if path is not None:
            write_text(
                path,
                json.dumps(asdict(Findings(failed, {**known.speeds, **found.speeds})), indent=1),
            )
            return path
    return None


def _path(device: torch.device) -> Path | None:
    if device.type == "cuda" and not torch.cuda.is_available():  # a GPU of a cluster's
        return None
    folder = cache_folder()
    words = f"{device_name(device)} torch {torch.__version__} gputune {__version__}"
    return folder and folder / f"check-{re.sub(r'[^a-z0-9.+]+', '-', words.lower())}.json"


def choose_backend(
    word: BackendWord, device: torch.device, dtype: torch.dtype, kind: ModelKind = "mlp"
) -> tuple[Backend, str]:
    """Return the backend of a word, and why "auto" is not the fast one ("" where it is).

    "auto" is "graph" on a GPU, for a user's module, and where gputune has no compiled code; "eager"
    on a GPU where
    ``gputune check`` has found recorded steps wrong, or the slower ones; "kernel" where it has
    found that right and the fastest. Raises InputError where compiled training, a kernel or
    recorded steps are asked for and cannot be had.
    """
    if word == "kernel":
        if why := obstacle(device):
            raise InputError(why)
        return word, ""
    if word == "graph" and device.type not in RECORDERS:
        raise InputError(
            "backend='graph' records steps on a CPU or a CUDA device, and the device is "
            f"{str(device)!r}; choose one of these, or backend='auto'."
        )
    if word in ("eager", "graph", "loop"):
        return word, ""
    if word == "stacked" and kind != "module":
        return "eager", ""
    if word == "auto" and device.type == "cuda":
        found = read_findings(device)
        seconds = {way: speed.of(_FEW) for way, speed in found.speeds.items()}
        fastest = min(seconds, key=seconds.__getitem__, default="graph")
        # which the kernel may train, where its law was checked
        ours = kind != "module" and dtype == torch.float32
        if (
            ours
            and fastest == "kernel"
            and found.failed is not None
            and not found.why_not("kernel")
        ):
            return "kernel", ""
        if why := found.why_not("graph"):
            return "eager", why
        return (
            "eager" if seconds.get("eager", math.inf) < seconds.get("graph", 0.0) else "graph"
        ), ""
    if word == "stacked" or (word == "auto" and (device.type != "cpu" or kind == "module")):
        return ("graph" if device.type in RECORDERS else "eager"), ""
    if device.type != "cpu":
        raise InputError(
            f"backend='compiled' trains on the CPU, and the device is {str(device)!r}; choose "
            "device='cpu', or backend='auto'."
        )
    if word == "auto" and (why := read_findings(device).why_not("compiled")):
        return "graph", why
    try:
        library(dtype)
    except NotBuiltError as error:
        if word == "auto":
            return "graph", str(error)
        raise InputError(
            f"backend='compiled' needs gputune's compiled code, and {error}. Or choose 'auto', "
            "which records steps without it."
        ) from error
    return "compiled", ""


def choose_device(device: str) -> torch.device:
    """Return the device of "auto", "cpu", "cuda" or "cuda:1"; InputError where there is none."""
    on_gpu = torch.cuda.is_available()
    if device == "auto":
        return torch.device("cuda" if on_gpu else "cpu")
    why = ""
    count = torch.cuda.device_count()
    with suppress(RuntimeError, TypeError):
        chosen = torch.device(device)
        if chosen.type == "cpu" or (
            chosen.type == "cuda" and on_gpu and (chosen.index or 0) < count
        ):
            return chosen
        why = f" {_why_no_gpu()}" if chosen.type == "cuda" and not on_gpu else ""
    there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count) if not why)])
    raise InputError(
        f"device must be 'auto' or one that this machine has ({there}), got {device!r}.{why}"
    )


def _why_no_gpu() -> str:
    """Return why torch can use no GPU, and what to do about it."""
    if torch.version.cuda is None:
        page = "https://pytorch.org/get-started/locally"
        return (
            f"torch {torch.__version__} is built without CUDA: install a build with it, see {page}."
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and not hidden.strip("-1 "):
        return f"CUDA_VISIBLE_DEVICES={hidden!r} hides every GPU: unset it."
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]  # says what is wrong with the driver
    except (RuntimeError, AssertionError) as error:
        return f"torch says: {str(error).splitlines()[0]}"
    return "torch finds none: look at what nvidia-smi shows."


def other_gpus(word: str, device: torch.device) -> tuple[torch.device, ...]:
    """Return the GPUs that train beside a device: all others that are visible, for "auto" and
    "cuda"; else none."""
    if device.type != "cuda" or word not in ("auto", "cuda"):
        return ()
    # where the rows lie already
    if device.index not in (None, current := torch.cuda.current_device()):
        return ()
    return tuple(torch.device("cuda", i) for i in range(torch.cuda.device_count()) if i != current)


def trains_as(
    backend: Backend,
    kind: ModelKind,
    config: Config,
    traits: Traits | None = None,
    *,
    data: Dataset | None = None,
) -> Backend:
    """Return how trials like this one train where ``backend`` was chosen: as it says, or eagerly if
    it cannot.

    ``traits`` say whether members of a user's module can be stacked; a class of torch.optim trains
    each alone. Of a module that can be stacked, whose inside is unknown, no code is compiled,
    unless it is ``coded``; its steps are recorded in place of that, as are those of optimizers and
    clipping that the compiled code does not know. What a kernel knows depends on the ``data`` and
    on their device too; where a kernel, or a recording, has failed on a GPU, this process makes
    none any more.
    """
    if kind == "module":
        if (traits and traits.loop_reason) or backend == "loop" or class_of(config):
            return "loop"
        if backend in BY_MEMBER:
            backend = "graph"
        if traits and traits.coded and backend == "graph" and config["optimizer"] in RULES:
            return "compiled"
    if backend == "kernel":
        assert data is not None
        if not KernelChunk.failure and not lacks(config, kind, data):
            return "kernel"
        backend = "graph"
    elif backend == "compiled":
        if (
            config["optimizer"] in OPTIMIZERS
            and config["clip_norm"] == math.inf
            and not beyond_adam(config)
        ):
            return "compiled" if config["depth"] <= _DEEPEST else "eager"
        backend = "graph"
    if (
        backend == "graph"
        and CudaRecorder.failure
        and data is not None
        and data.device.type == "cuda"
    ):
        return "eager"
    return backend if config["optimizer"] in RULES else "eager"


# The setting belongs to the process. Searches in several threads may end in any order: the last one
# puts it back.
_TF32 = threading.Lock()
_tf32_users = 0
_before_tf32 = "none"


@contextmanager
def matrix_products(*, tf32: bool) -> Iterator[None]:
    """Let matrix products of a GPU round their factors to TF32 (10 bits of mantissa) inside; as set
    before otherwise.

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
    """Let torch compute with so many threads inside, and take numbers below 1e-38 (float32) for
    zero.

    The momentum of units that no longer learn decays into such denormal numbers, which a CPU
    handles so slowly that the training of a wide network took twice as long.
    """
    flushed = bool(torch.tensor(1e-39, dtype=torch.float32) * 1 == 0)
    torch.set_flush_denormal(True)
    try:
        with on_threads(threads):
            yield
    finally:
        torch.set_flush_denormal(flushed)


@contextmanager
def on_threads(threads: int) -> Iterator[None]:
    """Let torch compute with so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_tf32(tf32: object, dtype: str, workers: object, device: torch.device) -> None:
    """Raise InputError where TF32 is asked for and there is none; it is set in this process
    alone."""
    if not isinstance(tf32, bool):
        raise InputError(f"tf32 must be True or False, got {tf32!r}.")
    if not tf32:
        return
    if device.type != "cuda" or dtype != "float32":
        where = f"device={str(device)!r}, dtype={dtype!r}"
        why = f"is for matrix products of single precision on a GPU, got {where}; leave tf32 out."
    elif (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        has = (
            f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}, where it "
            "would do nothing"
        )
        why = f"needs a GPU of compute capability 8.0 (Ampere) or newer, and {has}; leave tf32 out."
    elif workers not in ("auto", 1):
        why = f"is for a search in one process, got workers={workers!r}; leave one of them out."
    else:
        return
    raise InputError(f"tf32=True {why}")


def check_precision(
    precision: Precision, dtype: str, device: torch.device, *, descends: bool
) -> None:
    """Raise InputError where bfloat16 is asked for and would mean nothing, or is not to be had."""
    if precision == "full":
        return
    option = f"precision={precision!r}"
    if dtype != "float32":
        raise InputError(
            f"{option} goes with dtype='float32', got dtype={dtype!r}; leave one of them out."
        )
    if descends:
        raise InputError(
            f"{option} rounds what method='hypergradient' differentiates; leave one of them out."
        )
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError(
            f"{option} needs a GPU that computes in bfloat16, which this one does not; leave it "
            "out."
        )
