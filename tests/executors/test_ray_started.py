"""A cluster that ``ray start`` began, and that asks for a token, is found by itself and by its address."""

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

pytest.importorskip("ray", reason='Ray is not installed: pip install "gputune[ray]"')

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
    """Ports that nobody listens at, none of those that Ray gives its workers (from 10002)."""
    found = []
    for port in range(6390, 6990):
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == number:
            return found
    raise AssertionError("no free port")


@pytest.fixture
def environment():
    """Return what the head and its users share: a token, and where the head notes that it runs."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-token-of-the-tests"}
    # Ray's sockets lie below its folder, and their paths may have 107 letters: no folder of pytest's.
    with TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        own = {"RAY_TMPDIR": folder, "RAY_ADDRESS": "", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
        yield {**os.environ, **token, **own}


@pytest.fixture
def head(environment):
    """Start a head in a session of its own; return its address; end the session."""
    port, client_port = free_ports(2)
    ports = f"--port={port} --ray-client-server-port={client_port}"
    words = f"-m ray.scripts.scripts start --head --block --num-cpus=2 --include-dashboard=false {ports}".split()
    # In a folder without the sources: workers find the package that is installed.
    folder = Path(environment["RAY_TMPDIR"])
    with (folder / "said").open("w") as said:
        own = {"cwd": folder, "env": environment, "start_new_session": True, "stdout": said, "stderr": said}
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
def test_both_ways_in_give_the_table_of_one_machine(head, environment):
    command = [sys.executable, "-P", "-c", SEARCH, "auto", head]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    found = [line.rpartition(" ")[2] for line in done.stdout.splitlines()]
    assert (done.returncode, found) == (0, ["True"] * 2), done.stdout + done.stderr
