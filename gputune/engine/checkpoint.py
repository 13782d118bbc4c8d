"""Checkpoint files, from which a stopped search resumes the training of unfinished trials. The
files are next to the study. A chunk is a group of trials of one tensor shape that train together.

A checkpoint file stores the identity of its search, its trials and configurations, and a checksum
of its content. gputune writes a file completely or not at all, and removes the file when its trials
have ended. This module also stores the states of trials that wait for their next rung.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gputune.ground.errors import warn
from gputune.ground.files import flush, scratch_folder
from gputune.ground.text import count
from gputune.ground.types import Config
from gputune.population.population import Population
from gputune.population.state import State, WaitingPlace

_FORMAT = 1
# Training lasts at least 20x as long as writing, so checkpoints take at most 5% of the time.
_WRITING_SHARE = 20
# bytes that a checkpoint leaves free on the disk for the results of running trials
_RESERVE = 2**24
_TRIES = 100
# The smallest trial and a digest of all trials.
_NAME = re.compile(r"\d+-[0-9a-f]{16}\.(safetensors|tmp)")
# Errors while a file is read that is damaged or belongs to another search.
_UNUSABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The scores so far and the state of trials in the middle of their training, to resume them
    later.

    ``trials`` are the trial numbers. ``curves`` (C, epochs, F) are the scores of C trials on F
    folds after each epoch.

    ``state`` has the parameters and the optimizer state of only the trials that still train
    (``alive``). ``note`` is a text of the search method about these trials.
    """

    trials: tuple[int, ...]
    alive: tuple[int, ...]  # positions in ``trials``
    curves: np.ndarray
    state: State
    seconds: float  # time that the training has taken until now
    note: str = ""


class CheckpointFolder:
    """The folder with the checkpoint files of one search, and methods to write, read and remove
    them.

    ``identity`` is a digest of everything that the search's results depend on, except the trials.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        # absolute: the process may change its working directory
        self.folder = folder.absolute()
        self.identity = identity
        # path of each file that may exist -> its trials that have not ended
        self._trials: dict[Path, set[int]] = {}

    def path(self, trials: Sequence[int], note: str = "") -> Path:
        """Return the path of the checkpoint file for these trials and the note of a search method.

        ``drop`` removes the file when all of the trials have ended.
        """
        text = json.dumps(list(trials)) + note
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        path = self.folder / f"{min(trials)}-{name}.safetensors"
        self._trials.setdefault(path, set(trials))
        return path

    def write(self, checkpoint: Checkpoint, configs: Sequence[Config]) -> None:
        """Write a checkpoint file, which replaces an older file of the same trials. Raises OSError
        if writing fails."""
        tensors = _numbered(checkpoint.state)
        # a copy: an array that comes from a worker of a cluster may be read-only
        tensors["curves"] = torch.from_numpy(np.array(checkpoint.curves, order="C"))
        facts = {
            "trials": checkpoint.trials,
            "alive": checkpoint.alive,
            "seconds": checkpoint.seconds,
            "format": _FORMAT,
            "search": self.identity,
            "configs": _digest_of_configs(configs),
            "epoch": checkpoint.state.epoch,
        }
        if checkpoint.note:
            facts["note"] = checkpoint.note
        text = json.dumps(facts)
        path = self.path(checkpoint.trials, checkpoint.note)
        draft = path.with_suffix(".tmp")
        size = sum(tensor.nbytes for tensor in tensors.values())
        for _ in range(_TRIES):
            self.folder.mkdir(mode=0o700, exist_ok=True)
            # Another process may remove the folder while it is empty, so several attempts are made.
            with suppress(FileNotFoundError):
                if shutil.disk_usage(self.folder).free < size + _RESERVE:
                    message = f"it would leave less than {_RESERVE >> 20} MB for results"
                    raise OSError(errno.ENOSPC, message)
                # left by a write that was killed; a link is not followed
                draft.unlink(missing_ok=True)
                draft.touch(mode=0o600, exist_ok=False)
                break
        else:
            raise OSError(errno.ENOENT, "another process keeps removing its folder")
        # The draft is flushed before it is renamed, so a file with the final name is always
        # complete.
        _save(tensors, draft, {"facts": text, "checksum": _checksum(text, tensors)})
        flush(draft)
        os.replace(draft, path)
        flush(self.folder)

    def read(self, configs: Mapping[int, Config]) -> list[Checkpoint]:
        """Return the stored checkpoints of unfinished trials.

        ``configs`` maps the trial number of each unfinished trial to its configuration. The method
        skips files that are damaged or belong to another search, with one warning for all of these
        files.
        """
        checkpoints = []
        ignored = []
        for path in sorted(self.folder.glob("*.safetensors")):
            if not (_NAME.fullmatch(path.name) and path.is_file()):
                continue
            try:
                checkpoint = self._read(path, configs)
            except _UNUSABLE as error:
                reason = error if type(error) is ValueError else "is damaged"
                ignored.append(f"{path.name!r} {reason}")
                continue
            self.path(checkpoint.trials, checkpoint.note)
            checkpoints.append(checkpoint)
        if ignored:
            warn(
                f"{count(len(ignored), 'checkpoint')} in {str(self.folder)!r} cannot be used "
                f"({ignored[0]}). Their trials train from the start."
            )
        return checkpoints

    def newer(
        self, trials: Sequence[int], configs: Sequence[Config], epoch: int
    ) -> Checkpoint | None:
        """Return the stored checkpoint of exactly these trials if it has more than ``epoch``
        epochs, otherwise None.

        A file that cannot be used gives None, because ``read`` warns about such files.
        """
        path = self.path(trials)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads(file.metadata()["facts"])
            if facts["epoch"] <= epoch:
                return None
            return self._read(path, dict(zip(trials, configs)))
        except _UNUSABLE:
            return None

    def _read(self, path: Path, configs: Mapping[int, Config]) -> Checkpoint:
        """Return the checkpoint in a file. Raises ValueError if the file does not belong to this
        search."""
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            facts = json.loads(metadata["facts"])
            if facts["format"] != _FORMAT or facts["search"] != self.identity:
                raise ValueError("belongs to a different search")
            tensors = _tensors_of(file)
        if metadata["checksum"] != _checksum(metadata["facts"], tensors):
            raise ValueError("does not match its checksum")
        trials = tuple(int(trial) for trial in facts["trials"])
        waiting = [configs[trial] for trial in trials if trial in configs]
        if len(waiting) == len(trials) and _digest_of_configs(waiting) != facts["configs"]:
            raise ValueError("belongs to different configurations")
        curves = tensors.pop("curves").numpy()
        state = _numbered_state(facts["epoch"], tensors)
        note = str(facts.get("note", ""))
        return Checkpoint(trials, tuple(facts["alive"]), curves, state, facts["seconds"], note)

    def drop(self, ended: Iterable[int]) -> None:
        """Remove each checkpoint file when all of its trials have ended. Removes the folder with
        its last file."""
        ended = set(ended)
        for path, trials in list(self._trials.items()):
            trials -= ended
            if not trials:
                del self._trials[path]
                self._remove(path, path.with_suffix(".tmp"))
        self._remove()

    def drop_others(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Remove the files of all other checkpoints, which these checkpoints replace."""
        latest = {self.path(checkpoint.trials, checkpoint.note) for checkpoint in checkpoints}
        for path in self._trials.keys() - latest:
            del self._trials[path]
            self._remove(path, path.with_suffix(".tmp"))

    def clear(self) -> None:
        """Remove all checkpoint files, including unusable files, after every trial of the search
        has ended."""
        with suppress(OSError):  # there is no folder
            files = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
            self._remove(*files)

    def _remove(self, *files: Path) -> None:
        # A file or folder that cannot be removed does no harm.
        for file in files:
            with suppress(OSError):
                file.unlink()
        with suppress(OSError):
            self.folder.rmdir()


@dataclass(frozen=True)
class Checkpointing:
    """Settings for writing checkpoint files, from which a stopped search resumes.

    ``numbers`` has the trial number for each position of a trial in the search.
    """

    folder: CheckpointFolder
    numbers: tuple[int, ...]
    seconds: float  # least time between two checkpoints of a chunk

    def expect(self, index: Sequence[int]) -> None:
        """Register the checkpoint file that a worker may write for the trials at these positions in
        the search."""
        self.folder.path([self.numbers[i] for i in index])

    def newer(self, chunk: Population, epoch: int) -> Checkpoint | None:
        """Return the stored checkpoint of a chunk if it has more than ``epoch`` epochs, otherwise
        None."""
        trials = tuple(self.numbers[i] for i in chunk.index)
        return self.folder.newer(trials, chunk.configs, epoch)

    def keep(self, checkpoint: Checkpoint, configs: Sequence[Config]) -> float:
        """Write a checkpoint file and return the seconds until the next checkpoint is due. Warns if
        writing fails."""
        begin = time.monotonic()
        self.write(checkpoint, configs)
        return max(self.seconds, pause_after(time.monotonic() - begin))

    def keep_only(
        self, checkpoints: Sequence[Checkpoint], configs: Sequence[Sequence[Config]]
    ) -> None:
        """Write several checkpoint files that are valid only together, then remove all others.

        The older files stay if writing fails. ``configs`` has the configurations of each file.
        """
        for checkpoint, of_checkpoint in zip(checkpoints, configs):
            if not self.write(checkpoint, of_checkpoint):
                return
        self.folder.drop_others(checkpoints)

    def write(self, checkpoint: Checkpoint, configs: Sequence[Config]) -> bool:
        """Write a checkpoint file. Warn and return False if writing fails."""
        try:
            self.folder.write(checkpoint, configs)
        except OSError as error:
            warn(
                f"No checkpoint could be written in {str(self.folder.folder)!r} ({error}). "
                "Training continues. If the search is stopped now, a resumed search repeats more "
                "of its training. Free some space on the disk."
            )
            return False
        return True


def pause_after(writing: float) -> float:
    """Return the least seconds of training before the next checkpoint file is written.

    ``writing`` is the time in seconds that writing the last checkpoint took.
    """
    return _WRITING_SHARE * writing


def _digest_of_configs(configs: Sequence[Config]) -> str:
    """Return a SHA-256 digest of configurations, which does not depend on the order of their
    keys."""
    text = repr([sorted(config.items()) for config in configs])
    return hashlib.sha256(text.encode()).hexdigest()


def _numbered(state: State) -> dict[str, Tensor]:
    """Return the tensors of a training state as a dict on the CPU, for a safetensors file. The key
    of a tensor is its index as text."""
    tensors = {str(i): buffer.cpu().contiguous() for i, buffer in enumerate(state.buffers)}
    if state.steps is not None:
        tensors["steps"] = state.steps.contiguous()
    return tensors


def _numbered_state(epoch: int, tensors: Mapping[str, Tensor]) -> State:
    """Return the training state from a dict of tensors with their indices as keys.

    Files of older versions have no step counts.
    """
    buffers = dict(tensors)
    steps = buffers.pop("steps", None)
    return State(epoch, tuple(buffers[str(i)] for i in range(len(buffers))), steps)


def _tensors_of(file: Any) -> dict[str, Tensor]:
    """Return the tensors of an open safetensors file as a dict by name."""
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write tensors and metadata to a safetensors file. Raises OSError if the disk is full."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 digest of a text and of the names, types, shapes and values of tensors."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        array = tensor.numpy()
        digest.update(f"{name}:{array.dtype}:{array.shape}:".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


class StateCache:
    """Storage for the training states of paused trials. A trial waits for its next rung, the epoch
    up to which it trains next.

    The states stay in memory up to ``limit`` bytes. Further states go to temporary files, which
    ``close`` removes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self.states: dict[int, State | Path] = {}
        self.folder: Path | None = None
        self.end = ExitStack()

    def park(self, trial: int, state: State) -> None:
        """Store the training state of a paused trial until the trial continues.

        The state must not be a view of larger tensors, which would stay in memory.
        """
        size = state.nbytes
        if self.size + size <= self.limit:
            self.size += size
            self.states[trial] = state
            return
        if self.folder is None:
            self.folder = self.end.enter_context(scratch_folder())
        path = self.folder / f"{trial}.safetensors"
        try:
            _save(_numbered(state), path, {"epoch": str(state.epoch)})
        except OSError as error:
            raise OSError(
                "The states of trials that wait for their rung do not fit into "
                f"{str(self.folder)!r} ({error}). Free some space there, set TMPDIR to a folder "
                "on a larger disk, or allow more memory (the option 'memory')."
            ) from error
        self.states[trial] = path

    def look(self, trial: int) -> State:
        """Return the training state of a paused trial, and keep the state in the cache."""
        state = self.states[trial]
        if isinstance(state, State):
            return state
        with safe_open(state, framework="pt") as file:
            return _numbered_state(int(file.metadata()["epoch"]), _tensors_of(file))

    def take(self, trials: Sequence[int]) -> State:
        """Remove the training states of paused trials from the cache, and return the states stacked
        as one.

        All of the trials have trained for the same number of epochs.
        """
        states = list(map(self.look, trials))
        for trial in trials:
            self.drop(trial)
        return State.stack(states)

    def settle(self, places: Collection[WaitingPlace] | None = None) -> None:
        """Copy states that wait in the tensors of a chunk to tensors of their own.

        ``places`` are the chunks in which other trials are about to continue. None means that the
        states of all chunks are copied. They are copied too if the chunks take too much memory,
        because a chunk holds its tensors as long as one of its trials waits.
        """
        waiting = dict[int, State]()
        for trial, state in self.states.items():
            if isinstance(state, State) and state.place is not None:
                waiting[trial] = state
        held = {state.place for state in waiting.values() if state.place is not None}
        if sum(place.nbytes for place in held) > self.limit:
            places = None
        for trial, state in waiting.items():
            if places is None or state.place in places:
                self.states[trial] = state.cpu()

    def drop(self, trial: int) -> None:
        """Delete the training state of a trial that does not continue."""
        state = self.states.pop(trial, None)
        if isinstance(state, State):
            self.size -= state.nbytes
        elif state is not None:
            state.unlink()

    def close(self) -> None:
        """Remove the temporary files with the training states of paused trials."""
        self.end.close()
