"""A check of refusals: an InputError with these words in its message."""

import pytest

from gputune.ground.errors import InputError


def refused(words):
    return pytest.raises(InputError, match=words)
