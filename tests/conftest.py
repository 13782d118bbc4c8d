"""What every test takes for granted of the process that runs it."""

import signal

import pytest

from gputune.study import trusted

# A shell starts its background jobs with Ctrl-C ignored, which they and all that they start inherit: the tests of
# Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def own_state(tmp_path_factory):
    """What the tests train is remembered here, also by the processes that they start, and not for this user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture
def another_user(tmp_path, monkeypatch):
    """From here on nothing is remembered of what was trained or saved before."""

    def begin():
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state-of-another"))
        monkeypatch.setattr(trusted, "_here", set())

    return begin
