"""The two files of a model folder: tensors as safetensors, everything else as JSON that carries both checksums.

Each file appears whole or not at all, and the description comes last. A folder that does not fit its checksums is
refused by an error that names the file; nothing is ever unpickled.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gputune.errors import InputError
from gputune.scratch import scratch_folder
from gputune.study.rows import from_json, to_json

if TYPE_CHECKING:
    from torch import Tensor  # reading a description must not wait for torch

TENSORS, DESCRIPTION = "model.safetensors", "model.json"
FORMAT, FORMAT_VERSION = "gputune model", 1
DRAFTS = ".model"
"""How what a killed process may have left in the folder begins."""


def write_model(folder: Path, state: Mapping[str, "Tensor"], body: Mapping[str, Any]) -> None:
    """Write a model's tensors and description into ``folder``, which is made where it is missing.

    A model that lies there is replaced. Raises InputError for a folder that holds anything else, and for what
    cannot be written.
    """
    import safetensors.torch

    _check_free(folder)
    # Clones: safetensors refuses tensors that share memory, as tied weights do.
    tensors = safetensors.torch.save({key: value.cpu().clone().contiguous() for key, value in state.items()})
    text = to_json({**body, "tensors_sha256": _sha256(tensors)}, name="the model's spec or info")
    head = json.dumps({"format": FORMAT, "version": FORMAT_VERSION, "sha256": _sha256(text.encode())})
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, {TENSORS: tensors, DESCRIPTION: f'{head[:-1]}, "body": {text}}}\n'.encode()})


def read_model(folder: Path) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """Return the tensors (on the CPU) and the description that ``write_model`` wrote.

    Raises InputError, saying which file and what to do, for a folder that is missing, incomplete, damaged or
    of a newer gputune.
    """
    import safetensors
    import safetensors.torch

    body = read_description(folder / DESCRIPTION)
    path = folder / TENSORS
    raw = _read(path)
    with blaming(path):
        if _sha256(raw) != body["tensors_sha256"]:
            raise ValueError(f"it does not fit the SHA-256 in {DESCRIPTION}")
        try:
            return safetensors.torch.load(raw), body
        except safetensors.SafetensorError as error:
            raise ValueError(f"it is no safetensors file ({error})") from error


def write_text(path: Path, text: str) -> None:
    """Write text to a file, which has it whole or stays as it was; what UTF-8 lacks is written as an escape."""
    content = text.encode(errors="backslashreplace")
    if path.exists() and not path.is_file():  # a pipe, a terminal
        path.write_bytes(content)
        return
    place = path.resolve()
    if not place.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    _write(place.parent, {place.name: content})


@contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Turn what reading an odd file raises into an error that names the file."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"{str(path)!r} is damaged: {reason}; restore it from a copy, or save the model again."
        ) from error


def _check_free(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"save(folder={str(folder)!r}): a file has that name; choose another.")
    held = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    foreign = [name for name in held if name not in (TENSORS, DESCRIPTION) and not name.startswith(DRAFTS)]
    if foreign:
        raise InputError(
            f"save(folder={str(folder)!r}): the folder holds {foreign[0]!r}, which is no part of a model; "
            "give a new or an empty folder."
        )


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all files in a folder of their own, then put them in their place, in order."""
    with scratch_folder(folder, prefix=DRAFTS) as drafts:
        for name, content in files.items():
            with (drafts / name).open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name in files:
            os.replace(drafts / name, folder / name)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> bytes:
    if not path.parent.is_dir():
        raise InputError(f"there is no model folder {str(path.parent)!r}; check the path.")
    if not path.is_file():
        inner = path.parent / "model"
        remedy = f"did you mean {str(inner)!r}?" if (inner / path.name).exists() else "save the model again."
        raise InputError(f"the model folder {str(path.parent)!r} has no {path.name}; {remedy}")
    return path.read_bytes()


def read_description(path: Path) -> dict[str, Any]:
    """Return the description of a model from its file, without the tensors; errors as of ``read_model``."""
    with blaming(path):
        head = json.loads(_read(path))
        if head["format"] != FORMAT:
            raise ValueError("it is no description of a gputune model")
        if head["version"] > FORMAT_VERSION:
            raise InputError(
                f"{str(path)!r} has model format {head['version']}, this gputune reads up to {FORMAT_VERSION}; "
                "upgrade gputune."
            )
        text = json.dumps(head["body"], separators=(",", ":"))
        if _sha256(text.encode()) != head["sha256"]:
            raise ValueError("it was changed after it was written")
        return dict(from_json(text))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
