"""Checks of the files and folders that a command names, before the slow imports."""

import os
import sys
import time
from argparse import Namespace
from pathlib import Path

from gputune.cli.arguments import MODEL, study_file
from gputune.ground.files import MISSING_TABLE, check_file, check_model_folder
from gputune.study.database import check_study_file
from gputune.study.file_system import check_one_process

_ARRAYS = (".npz", ".npy", ".pt", ".pth")  # which have no other remedy than the right path


def check_paths(arguments: Namespace) -> None:
    """Raise an error if a file or folder that a command reads does not exist.

    Without this check, the command would raise the same error after some seconds of imports. The
    command itself checks the content of the files.
    """
    command = arguments.command
    if command == "resume":
        check_one_process(study_file(arguments.study), joins=arguments.wait)
    if command == "resume" and arguments.wait:
        _wait_for_study(arguments.study, quiet=arguments.verbose == 0)
    if command in ("resume", "report"):
        check_study_file(study_file(arguments.study))
    if command in ("predict", "evaluate", "export"):
        check_model_folder(Path(arguments.folder))
    if command in ("predict", "evaluate"):
        _check_rows(arguments.file)
    # The command says first that the result cannot be written.
    if command in ("tune", "train") and _can_write(arguments):
        _check_rows(arguments.file)


_LOOK_SECONDS = 0.5
"""The time between two looks for a study that another process will create."""


def _wait_for_study(place: str, *, quiet: bool) -> None:
    """Wait until another process has created a study. A signal ends the wait."""
    is_said = quiet
    while not study_file(place).is_file():
        if not is_said:
            print(f"waiting for the study {study_file(place)}", file=sys.stderr, flush=True)
            is_said = True
        time.sleep(_LOOK_SECONDS)


def _can_write(arguments: Namespace) -> bool:
    """Return True if the command can write into the folder for its result, or can create that
    folder."""
    if arguments.study is None:
        return True
    out = Path(arguments.study)
    there = next(place for place in (out, *out.absolute().parents) if place.exists())
    is_writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    return bool(arguments.study) and is_writable and not (out / MODEL).exists()


def _check_rows(file: str) -> None:
    """Raise FileNotFoundError if the input is neither a file nor a data set of scikit-learn."""
    if file.startswith("sklearn:") or os.path.exists(file):
        return
    path = Path(file)
    if path.suffix.lower() in _ARRAYS:
        check_file(path)
    else:
        check_file(path, missing=MISSING_TABLE)
