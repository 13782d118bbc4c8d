"""Bold and colored text for a terminal.

Text is plain if the output is not a terminal, if ``TERM=dumb``, or if ``NO_COLOR``
(https://no-color.org) is set.
"""

import os
import re
from dataclasses import dataclass
from typing import TextIO

_RESET = "\x1b[0m"
_BOLD = "\x1b[1m"
_YELLOW = "\x1b[33m"
_RED = "\x1b[31m"

_LABELS = re.compile(
    r"^(Data|Inputs|Columns|Task|Search|Preset|Method|Sampler|Halving|Median|Copies|Schedule|Memory|Device|Plan|Time"
    r"|Scores|Ended|Trials|Trial \d+|Score|Others|Folds|Curve|Study|Model|Next|Resume|Note|Best|Running"
    r"|Written|Report)(?= )",
    re.MULTILINE,
)
"""The labels at the beginning of lines in the text that a search prints at its end."""

_WARNING = re.compile(r"^Warning(?= )", re.MULTILINE)


@dataclass(frozen=True)
class Style:
    """Makes text for one stream bold or colored. Without color, all methods return plain text."""

    has_color: bool = False

    @classmethod
    def of(cls, stream: TextIO) -> "Style":
        """Return the style for a stream. It has color only if the stream is a terminal that
        supports color."""
        wants_color = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        return cls(wants_color and stream.isatty())

    def bold(self, text: str) -> str:
        """Return the text in bold, or unchanged if the stream has no color."""
        return self._in(_BOLD, text)

    def warning(self, text: str) -> str:
        """Return the text in the color of a warning, or unchanged if the stream has no color."""
        return self._in(_YELLOW, text)

    def error(self, text: str) -> str:
        """Return the text in the color of an error, or unchanged if the stream has no color."""
        return self._in(_RED, text)

    def labeled(self, text: str) -> str:
        """Return the text at the end of a search with bold labels and colored warnings."""
        if not self.has_color:
            return text
        with_labels = _LABELS.sub(lambda label: self.bold(label[1]), text)
        return _WARNING.sub(lambda label: self.warning(label[0]), with_labels)

    def _in(self, code: str, text: str) -> str:
        return f"{code}{text}{_RESET}" if self.has_color else text
