"""A chunk in the middle of its training, in a file beside the study: what a stopped search goes on
from.

A file says which search, trials and configurations it belongs to, and carries a checksum of its
content. It appears whole or not at all, and is gone when its trials have ended. Also where the
states of trials wait for their next rung.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gputune.engine.train import State
from gputune.errors import warn
from gputune.scratch import flush, scratch_folder
from gputune.types import Config

_FORMAT = 1
_WRITING_SHARE = 20
_RESERVE = 2**24  # bytes that a checkpoint leaves on the disk, for the results of what trains
_TRIES = 100
_NAME = re.compile(r"\d+-[0-9a-f]{16}\.(safetensors|tmp)")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Trials (by number) after so many epochs: ``curves`` (C, epochs, F), and the state of those
    still ``alive``."""

    trials: tuple[int, ...]
    alive: tuple[int, ...]  # positions in ``trials``
    curves: np.ndarray
    state: State
    seconds: float  # of training so far


class CheckpointFolder:
    """The checkpoints of one search. ``identity`` is a digest of all that its numbers depend on but
    the trials."""

    def __init__(self, folder: Path, identity: str) -> None:
        # wherever this process goes meanwhile
        self.folder = folder.absolute()
        self.identity = identity
        # of each file that there may be, those that have not ended
        self._trials: dict[Path, set[int]] = {}

    def path(self, trials: Sequence[int]) -> Path:
        """Return where the checkpoint of these trials lies, and remember to remove it when they
        have ended."""
        name = hashlib.sha256(json.dumps(list(trials)).encode()).hexdigest()[:16]
        path = self.folder / f"{min(trials)}-{name}.safetensors"
        self._trials.setdefault(path, set(trials))
        return path

    def write(self, checkpoint: Checkpoint, configs: Sequence[Config]) -> None:
        """Keep a checkpoint in the place of an older one of the same trials. Raises OSError where
        it cannot."""
        tensors = {
            str(i): buffer.cpu().contiguous() for i, buffer in enumerate(checkpoint.state.buffers)
        }
        tensors["curves"] = torch.from_numpy(np.ascontiguousarray(checkpoint.curves))
        facts = {key: getattr(checkpoint, key) for key in ("trials", "alive", "seconds")}
        facts |= {
            "format": _FORMAT,
            "search": self.identity,
            "configs": _digest_of_configs(configs),
        }
        text = json.dumps({**facts, "epoch": checkpoint.state.epoch})
        path = self.path(checkpoint.trials)
        draft = path.with_suffix(".tmp")
        size = sum(tensor.nbytes for tensor in tensors.values())
        for _ in range(_TRIES):
            self.folder.mkdir(mode=0o700, exist_ok=True)
            # Another process may remove the folder as long as nothing is in it.
            with suppress(FileNotFoundError):
                if shutil.disk_usage(self.folder).free < size + _RESERVE:
                    raise OSError(
                        errno.ENOSPC, f"it would leave less than {_RESERVE >> 20} MB for results"
                    )
                draft.unlink(missing_ok=True)  # of a write that was killed; a link is not followed
                draft.touch(mode=0o600, exist_ok=False)
                break
        else:
            raise OSError(errno.ENOENT, "its folder goes again and again")
        _save(tensors, draft, {"facts": text, "checksum": _checksum(text, tensors)})
        flush(draft)
        os.replace(draft, path)
        flush(self.folder)

    def read(self, configs: Mapping[int, Config]) -> list[Checkpoint]:
        """Return the checkpoints of trials that all still wait, by the number of each its
        configuration.

        A file that is damaged, or of another search, is left out with one warning for all.
        """
        checkpoints = []
        ignored = []
        for path in sorted(self.folder.glob("*.safetensors")):
            if not (_NAME.fullmatch(path.name) and path.is_file()):
                continue
            try:
                checkpoint = self._read(path, configs)
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                ignored.append(
                    f"{path.name!r} {error if type(error) is ValueError else 'is damaged'}"
                )
                continue
            self.path(checkpoint.trials)
            checkpoints.append(checkpoint)
        if ignored:
            warn(
                f"{len(ignored)} of the checkpoints in {str(self.folder)!r} cannot be used "
                f"({ignored[0]}); what they are of is trained from its start."
            )
        return checkpoints

    def _read(self, path: Path, configs: Mapping[int, Config]) -> Checkpoint:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            facts = json.loads(metadata["facts"])
            if facts["format"] != _FORMAT or facts["search"] != self.identity:
                raise ValueError("is of another search")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if metadata["checksum"] != _checksum(metadata["facts"], tensors):
            raise ValueError("does not fit its checksum")
        trials = tuple(int(trial) for trial in facts["trials"])
        known = [configs[trial] for trial in trials if trial in configs]
        if len(known) == len(trials) and _digest_of_configs(known) != facts["configs"]:
            raise ValueError("is of other configurations")
        curves = tensors.pop("curves").numpy()
        buffers = tuple(tensors[str(i)] for i in range(len(tensors)))
        return Checkpoint(
            trials, tuple(facts["alive"]), curves, State(facts["epoch"], buffers), facts["seconds"]
        )

    def drop(self, ended: Iterable[int]) -> None:
        """Remove the files of which no trial trains any more, and the folder with the last of
        them."""
        ended = set(ended)
        for path, trials in list(self._trials.items()):
            trials -= ended
            if not trials:
                del self._trials[path]
                self._remove(path, path.with_suffix(".tmp"))
        self._remove()

    def clear(self) -> None:
        """Remove all files, also those that could not be used: no trial of the search waits any
        more."""
        with suppress(OSError):  # there is no folder
            self._remove(*(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)))

    def _remove(self, *files: Path) -> None:
        for remove in (*(file.unlink for file in files), self.folder.rmdir):
            with suppress(OSError):  # what cannot be removed does no harm
                remove()


@dataclass(frozen=True)
class Checkpointing:
    """How the chunks of a job keep their state: ``numbers`` are those of its trials, by their place
    in the search."""

    folder: CheckpointFolder
    numbers: tuple[int, ...]
    seconds: float  # at least so long between two checkpoints of a chunk

    def expect(self, index: Sequence[int]) -> None:
        """Remember that a worker may write a file of the trials at these places."""
        self.folder.path([self.numbers[i] for i in index])

    def keep(self, checkpoint: Checkpoint, configs: Sequence[Config]) -> float:
        """Write a checkpoint, or warn where it cannot be written; return the seconds until the next
        is due."""
        begin = time.monotonic()
        try:
            self.folder.write(checkpoint, configs)
        except OSError as error:
            warn(
                f"no checkpoint could be written in {str(self.folder.folder)!r} ({error}). The "
                "training goes on; were it stopped now, more of it would be repeated. Make room "
                "on the disk."
            )
        return max(self.seconds, pause_after(time.monotonic() - begin))


def pause_after(writing: float) -> float:
    """Return the seconds of training before the next checkpoint, when one took so long to write."""
    return _WRITING_SHARE * writing


def _digest_of_configs(configs: Sequence[Config]) -> str:
    return hashlib.sha256(repr([sorted(config.items()) for config in configs]).encode()).hexdigest()


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a file. Raises OSError where the disk is full."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        array = tensor.numpy()
        digest.update(f"{name}:{array.dtype}:{array.shape}:".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


class StateCache:
    """Where the states of trials wait for their next rung: in memory up to a limit, then in files
    that go with it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self.states: dict[int, State | Path] = {}
        self.folder: Path | None = None
        self.end = ExitStack()

    def park(self, trial: int, state: State) -> None:
        """Keep the state (one row) of a trial."""
        if self.size + state.nbytes <= self.limit:
            self.size += state.nbytes
            # A copy of its own: a row of a chunk would keep the whole chunk alive.
            self.states[trial] = State(
                state.epoch, tuple(buffer.clone() for buffer in state.buffers)
            )
            return
        if self.folder is None:
            self.folder = self.end.enter_context(scratch_folder())
        path = self.folder / f"{trial}.safetensors"
        tensors = {str(i): buffer.contiguous() for i, buffer in enumerate(state.buffers)}
        try:
            _save(tensors, path, {"epoch": str(state.epoch)})
        except OSError as error:
            raise OSError(
                f"no room for the states of trials that wait for their rung: {str(path.parent)!r} "
                f"takes no more ({error}). Make room there, let TMPDIR name a folder of a larger "
                "disk, or allow more memory=."
            ) from error
        self.states[trial] = path

    def look(self, trial: int) -> State:
        """Return the state of a trial, which stays."""
        if isinstance(state := self.states[trial], State):
            return state
        with safe_open(state, framework="pt") as file:
            buffers = tuple(file.get_tensor(str(i)) for i in range(len(list(file.keys()))))
            return State(int(file.metadata()["epoch"]), buffers)

    def take(self, trials: Sequence[int]) -> State:
        """Return the states of some trials, all after one number of epochs, and keep them no
        longer."""
        states = [self.look(trial) for trial in trials]
        for trial in trials:
            self.drop(trial)
        return State.stack(states)

    def drop(self, trial: int) -> None:
        """Forget the state of a trial that has left."""
        state = self.states.pop(trial, None)
        if isinstance(state, State):
            self.size -= state.nbytes
        elif state is not None:
            state.unlink()

    def close(self) -> None:
        """Remove the files."""
        self.end.close()
