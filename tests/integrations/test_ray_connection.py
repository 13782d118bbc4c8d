"""The connection to a Ray cluster: missing or unreachable parts are reported before the study
changes.

A cluster that ``ray start`` began, and that asks for a token, is found by itself and by its
address.
"""

import functools
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

import gputune
from command_line import FAST, run
from gputune.ground.errors import MissingExtraError
from gputune.integrations.clusters import ray as ray_cluster
from gputune.tuning.record import recorded_search
from moments import at_finish, environment
from refused import refused
from study_processes import done, table

NO_RAY = 'Ray is not installed: pip install ".[ray]"'
SMALL = {"n_trials": 2, "max_epochs": 2, "cv": 2, "verbose": 0}


def test_a_missing_ray_says_what_to_install(iris, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_cluster, "find_spec", lambda name: None)
    path = tmp_path / "study.db"
    with pytest.raises(
        MissingExtraError,
        match=r"workers='ray' needs Ray, which is not installed. Run pip install",
    ):
        gputune.tune("mlp", *iris, workers="ray", study=path, **SMALL)
    assert not path.exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "auto"])
def test_a_cluster_that_cannot_be_reached_is_named_and_the_study_stays(
    iris, tmp_path, monkeypatch, address
):
    ray = pytest.importorskip("ray", reason=NO_RAY)
    assert not ray.is_initialized()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(ray, "init", None)  # would wait for minutes
    path = tmp_path / "study.db"
    gputune.tune("mlp", *iris, study=path, workers=1, **SMALL)
    before = path.read_bytes()
    message = (
        f"The Ray cluster at '{address}' cannot be used: .*refused.* Start it with 'ray start "
        "--head'"
    )
    with refused(message):
        gputune.tune(
            "mlp", *iris, study=path, workers=gputune.Ray(address), **{**SMALL, "n_trials": 4}
        )
    assert path.read_bytes() == before


@pytest.fixture
def ray(monkeypatch):
    """Return Ray with a record of a cluster on this machine that no longer runs; it finds no other
    cluster.
    """
    ray = pytest.importorskip("ray", reason=NO_RAY)
    services = importlib.import_module("ray._private.services")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(services, "find_gcs_addresses", functools.cache(set))
    monkeypatch.setattr(services, "find_bootstrap_address", lambda folder: "127.0.0.1:1")
    return ray


def test_a_cluster_that_this_machine_no_longer_has_is_found_out_at_once(ray, iris, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ray, "init", None)  # would wait for minutes
        with refused("The Ray cluster at 'auto' cannot be used: .*refused. Start"):
            gputune.tune("mlp", *iris, workers=gputune.Ray("auto"), **SMALL)
    monkeypatch.setattr(
        importlib.import_module("ray._private.services"), "find_bootstrap_address", {}.get
    )
    with refused("at 'auto' cannot be used: Could not find any running Ray"):
        gputune.tune("mlp", *iris, workers=gputune.Ray("auto"), **SMALL)


@pytest.mark.parametrize("kind", ["ray.exceptions.AuthenticationError", "builtins.ConnectionError"])
def test_a_cluster_that_answers_and_does_not_let_in_may_want_a_token(ray, iris, monkeypatch, kind):
    """Ray's errors without any token, and with a wrong token."""
    module, _, name = kind.rpartition(".")
    error = getattr(importlib.import_module(module), name, None)
    if error is None:
        pytest.skip("this Ray knows no tokens")

    def init(**options):
        raise error("no entry")

    monkeypatch.setattr(ray, "init", init)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        message = (
            f"'{address}' cannot be used: no entry.* RAY_AUTH_MODE=token .* token in "
            "RAY_AUTH_TOKEN, .* Nothing"
        )
        with refused(message):
            gputune.tune("mlp", *iris, workers=gputune.Ray(address), **SMALL)
    with pytest.raises(gputune.InputError) as caught:
        gputune.tune("mlp", *iris, workers=gputune.Ray("127.0.0.1:1"), **SMALL)
    assert "token" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"address": "cluster"},
            "must be 'local', 'auto', 'HOST:PORT' or 'ray://HOST:PORT', got 'cluster'",
        ),
        ({"address": "http://a:1"}, "'auto', 'HOST:PORT' or 'ray://HOST:PORT', got 'http://a:1'"),
        ({"cpus": 0}, "Ray.cpus=.... must be an integer of at least 1, got 0"),
        ({"cpus": True}, "Ray.cpus=.... must be an integer of at least 1, got True"),
    ],
)
def test_a_bad_address_or_number_is_named(arguments, message):
    with refused(message):
        gputune.Ray(**arguments)


def test_the_solved_logistic_regression_needs_no_cluster(iris):
    pytest.importorskip("ray", reason=NO_RAY)
    with refused("takes seconds on this machine. Leave workers='ray' out, or train it"):
        gputune.tune("logistic", *iris, workers="ray", **SMALL)


def test_the_command_line_says_what_is_wrong(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    quick = [option for option in FAST if option not in ("--workers", "1")]
    code, out, err = run("tune", "sklearn:iris", "--ray", "auto", "--workers", "2", "--trials", "1")
    assert (code, out) == (
        2,
        "",
    ) and "--workers 2 and --ray exclude each other. Leave one out." in err
    code, out, err = run("tune", "sklearn:iris", *quick, "--ray", "somewhere")
    assert (code, out) == (2, "") and "--ray must be 'local', 'auto', 'HOST:PORT'" in err
    monkeypatch.setattr(ray_cluster, "find_spec", lambda name: None)
    code, out, err = run("tune", "sklearn:iris", *quick, "--ray")
    assert (code, out) == (2, "") and 'pip install ".[ray]"' in err
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_a_signal_to_a_cluster_of_its_own_and_resume(tmp_path, monkeypatch):
    """SIGTERM, because Ray changes its handler when it connects; Ctrl-C is tested with a shared
    cluster.
    """
    pytest.importorskip("ray", reason=NO_RAY)
    options = ["--trials", "11", "--epochs", "20", "--memory", "1KB", "--seed", "3"]
    told = at_finish(2, "os.kill(os.getpid(), signal.SIGTERM)")
    program = told + "import sys; from gputune.cli.main import main; sys.exit(main())"
    command = [
        sys.executable,
        "-P",
        "-c",
        program,
        "tune",
        "sklearn:iris",
        *options,
        "--out",
        "out",
        "--ray",
    ]
    stopped = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    path = tmp_path / "out" / "study.db"
    assert stopped.returncode == 143 and " of 11 trials are finished" in stopped.stderr, (
        stopped.stderr
    )
    assert "resume" in stopped.stdout or "--ray" in stopped.stdout
    assert 2 <= done(path) < 12
    monkeypatch.chdir(tmp_path)
    record = gputune.Study.open(path).record
    assert recorded_search(path, record, {}).options.machine.workers == gputune.Ray("local")
    # it would go on with Ray, but may go on here
    code, _, err = run("resume", "out", "-q", "--workers", "1")
    assert code == 0, err
    assert run("tune", "sklearn:iris", *options, "--workers", "1", "--out", "whole")[0] == 0
    assert table(path) == table(tmp_path / "whole" / "study.db")


SEARCH = """
import sys
import gputune
from sklearn.datasets import load_iris
X, y = load_iris(return_X_y=True)
common = {"n_trials": 2, "max_epochs": 2, "cv": 2, "memory": 1024, "verbose": 0}
here = gputune.tune("mlp", X, y, workers=2, **common)
for address in sys.argv[1:]:
    there = gputune.tune("mlp", X, y, workers=gputune.Ray(address), **common)
    print(address, (there.curves == here.curves).all())
"""


def free_ports(number):
    """Free ports outside of the range that Ray gives its workers (from 10002)."""
    found = []
    for port in range(6390, 6990):
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == number:
            return found
    raise AssertionError("no free port")


@pytest.fixture
def token_environment():
    """Return the environment that the head and its users share: a token, and the place of the
    head's record.
    """
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-token-of-the-tests"}
    # Ray's sockets lie below its folder, and their paths may have 107 letters: no folder of
    # pytest's.
    with TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        own = {
            "RAY_TMPDIR": folder,
            "RAY_ADDRESS": "",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        yield {**os.environ, **token, **own}


@pytest.fixture
def head(token_environment):
    """Start a head in a session of its own; return its address; end the session."""
    pytest.importorskip("ray", reason=NO_RAY)
    port, client_port = free_ports(2)
    ports = f"--port={port} --ray-client-server-port={client_port}"
    words = (
        "-m ray.scripts.scripts start --head --block --num-cpus=2 --include-dashboard=false "
        f"{ports}"
    ).split()
    # In a folder without the sources: workers find the package that is installed.
    folder = Path(token_environment["RAY_TMPDIR"])
    with (folder / "said").open("w") as said:
        own = {
            "cwd": folder,
            "env": token_environment,
            "start_new_session": True,
            "stdout": said,
            "stderr": said,
        }
        process = subprocess.Popen([sys.executable, "-P", *words], **own)
    try:
        wait_until_started(process, folder / "said")
        yield f"127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_started(process, said):
    """The address is noted for "auto" by then; the port answers before."""
    while "Ray runtime started" not in said.read_text():
        assert process.poll() is None, said.read_text()
        time.sleep(0.1)


@pytest.mark.long
def test_both_ways_in_give_the_table_of_one_machine(head, token_environment):
    """Of a head that was started with a token."""
    command = [sys.executable, "-P", "-c", SEARCH, "auto", head]
    done = subprocess.run(command, env=token_environment, capture_output=True, text=True)
    found = [line.rpartition(" ")[2] for line in done.stdout.splitlines()]
    assert (done.returncode, found) == (0, ["True"] * 2), done.stdout + done.stderr
