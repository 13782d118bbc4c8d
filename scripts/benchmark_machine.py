"""Where a benchmark ran: machine, versions, commit, and a file name made of them."""

import json
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import joblib
import torch

ROOT = Path(__file__).parents[1]


def describe_machine() -> dict[str, Any]:
    """Return what a reader needs to judge the times, or to measure again."""
    return {
        "cpu": cpu_model(),
        "cores": joblib.cpu_count(),
        "card": card(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {
            name: version(name) for name in ("gputune", "torch", "scikit-learn", "numpy", "scipy", "joblib")
        },
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def cpu_model() -> str:
    """Return the processor's name as the system has it."""
    listing = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", listing.read_text(), re.M) if listing.exists() else None
    return found[1].strip() if found else (platform.processor() or platform.machine())


def card() -> str | None:
    """Return the GPU's name, None where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def commit() -> str:
    """Return the commit of the source tree, with "-dirty" where files differ from it; "unknown" without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_both(out: Path, machine: dict[str, Any], what: str, page: str, numbers: Any) -> tuple[Path, Path]:
    """Write numbers as JSON and the page as Markdown into a folder, made if need be; return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    in_json, in_words = (out / f"{file_stem(machine, what)}{suffix}" for suffix in (".json", ".md"))
    in_json.write_text(json.dumps(numbers, indent=1, allow_nan=False) + "\n")
    in_words.write_text(page)
    return in_json, in_words


def file_stem(machine: dict[str, Any], what: str = "training") -> str:
    """Return for example "training-amd-epyc-9r14-2-cores", or the card's name where there is one."""
    name = machine["card"] or f"{machine['cpu']} {machine['cores']} cores"
    plain = re.sub(r"\((r|tm)\)", "", name.lower())
    return f"{what}-" + re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
