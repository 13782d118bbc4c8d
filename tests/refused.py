"""What is refused: by an InputError whose message has these words."""

import pytest

from gputune.errors import InputError


def refused(words):
    return pytest.raises(InputError, match=words)
