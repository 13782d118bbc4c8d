"""What every test takes for granted of the process that runs it."""

import gc
import signal

import pytest
from hypothesis import HealthCheck, settings
from sklearn.datasets import load_iris

from gputune.modules.recorder import RECORDERS
from gputune.study import trusted
from stand_in import StandIn

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


def pytest_addoption(parser):
    parser.addoption(
        "--all", action="store_true", help="run the tests marked as long too, and fuzz for longer"
    )


def pytest_configure(config):
    examples = 1000 if config.getoption("--all") else 60
    settings.register_profile(
        "gputune", max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    settings.load_profile("gputune")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all"):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if not item.get_closest_marker("long")]


def pytest_collection():
    gc.disable()


def pytest_collection_finish():
    gc.enable()
    gc.freeze()  # what was imported stays, and no collection of garbage looks through it again


@pytest.fixture
def recorded_on_cpu(monkeypatch):
    """Let steps be recorded on a CPU too, by the stand-in that is as strict as a CUDA graph."""
    monkeypatch.setitem(RECORDERS, "cpu", StandIn)


@pytest.fixture(scope="session")
def iris():
    """Measurements and kinds of 150 irises."""
    return load_iris(return_X_y=True)
