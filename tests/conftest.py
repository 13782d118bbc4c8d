"""Conditions of the process that every test relies on."""

import gc
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest

# torch, scikit-learn and gputune are imported where they are used: the process that hands the tests
# to others, which pytest-xdist starts when this file is read, needs none of them, and took five
# seconds for them.

# A shell starts its background jobs with Ctrl-C ignored, which they and all that they start
# inherit: the tests of Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)


DURATIONS = Path(__file__).with_name("durations.txt")
"""Seconds and names of the files that take longest."""


def durations():
    """Seconds of the files that take longest."""
    return {name: int(s) for s, name in map(str.split, DURATIONS.read_text().splitlines())}


class WriteDurations:
    """Adds up the seconds of the tests of each file that runs, and writes the longest of all."""

    def __init__(self):
        self.seconds = Counter()

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid.partition("::")[0]] += report.duration

    def pytest_sessionfinish(self):
        known = Counter(durations() | self.seconds)
        lines = [f"{s:.0f} {name}\n" for name, s in known.most_common() if s >= 2]
        DURATIONS.write_text("".join(lines))


@pytest.fixture(autouse=True, scope="session")
def own_state(tmp_path_factory, pytestconfig):
    """Redirects findings and caches to temporary folders during the
    tests.

    Yields how databases are opened outside of tests.
    """
    import torch

    from gputune.engine.choice import DeviceChoice
    from gputune.study import database

    pragmas = database.PRAGMAS
    with pytest.MonkeyPatch.context() as patch:
        # Ray gives its workers a low priority (15). Beside two busy processes they take 40x longer.
        patch.setenv("RAY_worker_niceness", "0")
        found = tmp_path_factory.mktemp("found")
        # not what the user's check found
        patch.setattr("gputune.engine.backend.cache_folder", lambda: found)
        # a worker that a test starts serves others
        patch.setattr("gputune.executors.worker.IDLE_SECONDS", 900)
        # Waiting for the disk costs 50 ms a study, and no test cuts the power; intervals take most
        # of a score's time.
        patch.setattr(database, "PRAGMAS", ("synchronous = OFF", *pragmas[1:]))
        patch.setattr("gputune.cli.held_out._SAMPLES", 10)
        if "simulated_cuda.torch_cuda" in sys.modules:  # whose binaries are none of a card
            patch.setattr("gputune.native.cuda.kept_binary", lambda name, source, make: make())
        if pytestconfig.getoption("--auto-gpu"):  # whatever is faster
            gpu = DeviceChoice(torch.device("cuda"))
            patch.setattr(
                "gputune.engine.choice._choice_by_speed", lambda gpu, work: DeviceChoice(gpu)
            )
            patch.setattr("gputune.engine.choice._SOLVED", gpu)
            if simulated := sys.modules.get("simulated_cuda.torch_cuda"):
                patch.setattr("gputune.executors.worker.begin_worker", simulated.begin_worker)
        yield pragmas


@pytest.fixture
def durable(monkeypatch, own_state):
    """Studies are on the disk before a call returns, as outside of tests."""
    monkeypatch.setattr("gputune.study.database.PRAGMAS", own_state)


@pytest.fixture
def forget_code(monkeypatch):
    """Return a function that forgets the code that this process has trained, as a later process."""

    def forget():
        monkeypatch.setattr("gputune.study.code._DESCRIBED", {})

    return forget


def pytest_addoption(parser):
    parser.addoption(
        "--all", action="store_true", help="run the tests marked as long too, and fuzz for longer"
    )
    parser.addoption("--write-durations", action="store_true", help=f"write {DURATIONS.name} anew")
    parser.addoption("--gpu", action="store_true", help="run the tests of a GPU, and those alone")
    parser.addoption(
        "--auto-gpu",
        action="store_true",
        help='take the GPU that is there, or simulated, for device="auto", and leave out the '
        "tests marked cpu",
    )


def pytest_configure(config):
    # An error of a backend that is tried ends a test, also in processes that it starts.
    os.environ["GPUTUNE_STRICT_BACKENDS"] = "1"
    # The others take device="auto" for the CPU, in processes that they start too.
    if not (config.getoption("--gpu") or config.getoption("--auto-gpu")):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if config.getoption("--auto-gpu"):  # of the oracle's own fork_rng()
        config.addinivalue_line(
            "filterwarnings", "ignore:CUDA reports that you have .* available:UserWarning"
        )
    if not config.getoption("numprocesses", None):
        from hypothesis import HealthCheck, settings

        settings.register_profile(
            "gputune",
            max_examples=1000 if config.getoption("--all") else 40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        settings.load_profile("gputune")
    if config.getoption("--write-durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(WriteDurations())


def pytest_collection_modifyitems(config, items):
    def left_out(item):
        of_gpu = item.get_closest_marker("gpu") is not None
        too_long = item.get_closest_marker("long") and not config.getoption("--all")
        of_cpu = item.get_closest_marker("cpu") and config.getoption("--auto-gpu")
        return too_long or of_cpu or of_gpu != config.getoption("--gpu")

    config.hook.pytest_deselected(items=[item for item in items if left_out(item)])
    items[:] = [item for item in items if not left_out(item)]
    # the longest file begins first, so that the processes end together
    if hasattr(config, "workerinput"):
        seconds = durations()
        items.sort(key=lambda item: -seconds.get(item.nodeid.partition("::")[0], 0))


def pytest_collection():
    gc.disable()


def pytest_collection_finish():
    gc.enable()
    gc.freeze()  # what was imported stays, and no collection of garbage looks through it again


@pytest.fixture
def recorded_on_cpu(monkeypatch):
    """Let steps be recorded on a CPU too, by the stand-in that is as strict as a CUDA graph."""
    from gputune.modules.recorder import RECORDERS
    from stand_in import StandIn

    monkeypatch.setitem(RECORDERS, "cpu", StandIn)


@pytest.fixture(scope="session")
def iris():
    """Measurements and kinds of 150 irises."""
    from sklearn.datasets import load_iris

    return load_iris(return_X_y=True)
