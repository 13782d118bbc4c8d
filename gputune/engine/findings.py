"""What was found of a device on this machine: which backends fail their laws there, and how fast they are.

It is kept in the user's cache, for one device, one version of torch and one of gputune. ``gputune check`` finds
it; what is chosen for "auto" is chosen by it.
"""

import json
import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from gputune.native.library import processor_name
from gputune.scratch import cache_folder, write_text
from gputune.types import Backend
from gputune.version import __version__


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
    """``failed`` says of a backend which law it fails, None where none was checked; ``speeds`` how fast it is."""

    failed: Mapping[Backend, str] | None = None
    speeds: Mapping[Backend, Speed] = field(default_factory=dict)

    def why_not(self, backend: Backend) -> str:
        """Return why a backend is not to be used, in words; "" where nothing is against it."""
        law = (self.failed or {}).get(backend)
        return "" if law is None else f"gputune check found that {law!r} does not hold for it here"


def device_name(device: torch.device) -> str:
    """Return what a person calls a device: the name of the card, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name() or platform.machine()


def read_findings(device: torch.device) -> Findings:
    """Return what is known of a device; nothing where nothing is, or where it cannot be read."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        if (path := _path(device)) is not None:
            kept = json.loads(path.read_text())
            return Findings(kept["failed"], {name: Speed(**speed) for name, speed in kept["speeds"].items()})
    return Findings()


def keep_findings(device: torch.device, found: Findings) -> Path | None:
    """Keep what was found, with the speeds that were known before; return where, None where there is no place."""
    known, path = read_findings(device), _path(device)
    failed = known.failed if found.failed is None else found.failed
    with suppress(OSError):  # a full disk, or a home that cannot be written
        if path is not None:
            write_text(path, json.dumps(asdict(Findings(failed, {**known.speeds, **found.speeds})), indent=1))
            return path
    return None


def _path(device: torch.device) -> Path | None:
    if device.type == "cuda" and not torch.cuda.is_available():  # a GPU of a cluster's
        return None
    folder = cache_folder()
    words = f"{device_name(device)} torch {torch.__version__} gputune {__version__}"
    return folder and folder / f"check-{re.sub(r'[^a-z0-9.+]+', '-', words.lower())}.json"
