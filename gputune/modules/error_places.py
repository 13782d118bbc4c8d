"""Describes an error of a user's code with the line of the user's code that raised it."""

import traceback
from pathlib import Path

import torch

_LIBRARIES = Path(torch.__file__).parent, Path(__file__).parents[1]
"""Folders whose code is not the user's: PyTorch and gputune."""


def describe_error(error: Exception) -> str:
    """Return the type, the message and the line of an error, as text.

    The line is the last line of the traceback outside of PyTorch and gputune. Without such a line,
    the text has only the type and the message.
    """
    text = type(error).__name__
    if str(error):
        text += f": {str(error).rstrip('.')}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if frame.line and not any(map(path.is_relative_to, _LIBRARIES)):
            return f"{text} ({path.name}, line {frame.lineno}: {frame.line})"
    return text
