"""The command line in a process of its own: start-up, a model that outlives its process, a closed
pipe."""

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import gputune
from command_line import FAST, NET, kinds, write_table
from forked import Fork
from gputune.api.study import Study
from gputune.cli.main import main
from gputune.study.store import Store
from study_rows import candidates

START = "import sys; from gputune.cli.main import main; sys.exit(main())"


def finish(*arguments, cwd, code=START):
    process = Fork(code, *arguments, cwd=cwd, COLUMNS="80")
    out, err = process.communicate()
    return process.returncode, out, err


def python(code, *arguments, **how):
    """Run code in a new process, in which sys.argv has the arguments."""
    command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **how)


def test_the_source_says_that_it_is_not_what_was_installed():
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    code = [sys.executable, "-c", "import gputune"]
    done = subprocess.run(code, cwd=root, env=environment, capture_output=True, text=True)
    assert (
        f"gputune is imported from its source, {root / 'gputune'}, which has no compiled code"
        in done.stderr
    )
    assert done.returncode == 1


def test_help_and_version_wait_for_nothing():
    script = """if True:
    import contextlib, io, sys
    from gputune.cli.main import main
    for arguments in (["--help"], ["tune", "--help"], ["--version"], ["tune"]):
        with contextlib.redirect_stderr(io.StringIO()):
            main(arguments)
    heavy = {"torch", "numpy", "scipy", "sklearn", "polars", "pandas", "narwhals", "joblib", "tqdm"}
    print(sorted(heavy & set(sys.modules)))
    """
    lines = python(script, check=True).stdout.split("\n")
    assert lines[-2] == "[]"
    assert f"gputune {gputune.__version__}" in lines
    assert "  gputune tune sklearn:digits" in lines
    assert max(map(len, lines)) <= 80


def modules_of(code, *arguments):
    """Return the names of the modules that a new process has after some code."""
    script = f"{code}\nimport sys\nprint(*sys.modules)"
    return python(script, *arguments, check=True).stdout.split("\n")[-2].split()


@pytest.mark.parametrize("arguments", [("check", "--device", "none"), ("report", "study.db")])
def test_no_garbage_is_looked_for_while_torch_is_imported(arguments, tmp_path):
    """Imports create no garbage, and looking for it takes a large part of a command's start."""
    Store.create(tmp_path / "study.db", {"model": "mlp", "scoring": "accuracy", "folds": 2}).close()
    script = """if True:
    import gc, sys
    from types import SimpleNamespace
    from gputune.cli.main import main

    def find(name, *place):
        if name == "torch":
            print(gc.isenabled())

    sys.meta_path.insert(0, SimpleNamespace(find_spec=find))
    main(sys.argv[1:])
    """
    assert python(script, *arguments, cwd=tmp_path).stdout.split()[0] == "False"


LIBRARIES = {
    "joblib",
    "matplotlib",
    "narwhals",
    "pandas",
    "polars",
    "scipy",
    "sklearn",
    "torch",
    "tqdm",
}


def test_import_and_status_wait_for_no_library(tmp_path):
    own = [name for name in modules_of("import gputune") if name.startswith("gputune")]
    assert sorted(own) == [
        "gputune",
        "gputune.ground",
        "gputune.ground.errors",
        "gputune.ground.memory",
        "gputune.ground.text",
        "gputune.version",
    ]
    with Store.create(
        tmp_path / "study.db", {"model": "mlp", "scoring": "accuracy", "folds": 2}
    ) as store:
        store.add_trials(candidates(range(1)))
    modules = modules_of(
        "import sys; from gputune.cli.main import main; main(sys.argv[1:])", "status", tmp_path
    )
    assert "gputune.cli.study" in modules and not LIBRARIES & set(modules)


@pytest.mark.long
def test_tune_loads_only_what_it_uses():
    libraries = set(modules_of("import torch, scipy.stats, sklearn.model_selection"))
    modules = [name for name in modules_of("import gputune; gputune.tune") if name not in libraries]
    own = [name for name in modules if name.startswith("gputune")]
    assert len(own) < 190 and len(modules) - len(own) < 40
    assert not {"polars", "matplotlib", "optuna", "ray", "loky", "torch._inductor"} & set(modules)


@pytest.mark.parametrize(("call", "frozen"), [("main()", True), ("main(['--version'])", False)])
def test_a_process_that_ends_with_its_command_looks_for_no_garbage_then(call, frozen):
    script = (
        f"import gc; from gputune.cli.main import main; {call}; print(gc.get_freeze_count() > 0)"
    )
    assert (
        python(script, "--version", check=True).stdout
        == f"gputune {gputune.__version__}\n{frozen}\n"
    )


WITHOUT_POSIX = """
import os, signal, sys
from gputune.cli.main import main

ARGUMENTS = sys.argv[1:]
main(["tune", "--out", "before", *ARGUMENTS])  # so that other libraries have imported what they choose by the system
MODULES = {"fcntl", "grp", "posix", "pwd", "resource", "termios"}
NAMES = "O_DIRECTORY O_NOFOLLOW O_NONBLOCK SIGALRM SIGHUP SIGKILL fork geteuid getuid pread pthread_kill"
for name in [name for name in sys.modules if name.split(".")[0] == "gputune" or name in MODULES]:
    del sys.modules[name]
for name in f"{NAMES} pthread_sigmask register_at_fork sched_getaffinity sysconf uname".split():
    delattr(os if hasattr(os, name) else signal, name)

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Missing())
sys.platform = "win32"
from gputune import Study
from gputune.cli.main import main
assert main(["tune", "--out", "after", *ARGUMENTS]) == 0
assert main(["status", "after"]) == 0
trials = [Study.open(f"{out}/study.db").columns() for out in ("before", "after")]
print(all(trials[0][name] == trials[1][name] for name in trials[0] if name != "seconds"), os.listdir("after"))
"""


def test_a_search_without_features_of_posix(tmp_path):
    code, out, err = finish("sklearn:iris", *FAST, cwd=tmp_path, code=WITHOUT_POSIX)
    assert (code, "Traceback" in err) == (0, False)
    assert "Trials   3 of 3 trials finished" in out
    assert re.fullmatch(r"True \['(model', 'study.db|study.db', 'model)'\]", out.split("\n")[-2])


def test_a_model_predicts_in_a_new_process(tmp_path):
    code, out, err = finish("tune", "sklearn:iris", "--out", "out", *FAST, cwd=tmp_path)
    assert code == 0 and "Traceback" not in err
    assert max(map(len, out.split("\n"))) <= 80
    command = [sys.executable, "-P", "-m", "gputune", "predict", "out/model", "sklearn:iris"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    predicted = gputune.load_model(tmp_path / "out/model").predict("sklearn:iris")
    assert done.stdout.split("\n") == ["target", *predicted, ""]


def test_a_module_of_a_file_predicts_in_a_new_process(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    write_table(tmp_path / "bugs.csv", kind=kinds())
    options = ["--model", "net.py:Net", "--space", "module__hidden=2,3", "lr=1e-3..1e-1:log", *FAST]
    code, _, err = finish("tune", "bugs.csv", "--target", "kind", *options, "-q", cwd=tmp_path)
    assert (code, err) == (0, "")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    model = ["predict", "../gputune-out/model", "../bugs.csv"]
    code, out, err = finish(*model, cwd=elsewhere)
    assert code == 2 and not out and "--module FILE.py:NAME, or add --trust-code" in err
    code, out, err = finish(*model, "--module", "../net.py:Net", cwd=elsewhere)
    assert (code, err) == (0, "")
    assert out.startswith("kind\n") and out.count("\n") == 41


def test_a_reader_that_stops_reading_ends_it_quietly(tmp_path):
    assert finish("tune", "sklearn:iris", "--out", "out", *FAST, cwd=tmp_path)[0] == 0
    process = Fork(START, "trials", "out", "--format", "csv", cwd=tmp_path)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1
    process.stderr.close()


FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")


@pytest.mark.parametrize(
    ("streams", "code"),
    [
        pytest.param(">/dev/full", 1, marks=FULL),
        pytest.param(">/dev/full 2>&1", 1, marks=FULL),
        (">&-", 0),
        ("<&- >&- 2>&-", 0),
    ],
)
def test_a_closed_or_full_stream_ends_in_an_exit_code(tmp_path, streams, code):
    with Store.create(
        tmp_path / "study.db", {"model": "mlp", "scoring": "accuracy", "folds": 2}
    ) as store:
        store.add_trials(candidates(range(1)))
    command = [sys.executable, "-P", "-c", START, "status", "study.db"]
    ran = subprocess.run(
        ["sh", "-c", f'exec "$@" {streams}', "sh", *command], cwd=tmp_path, stderr=subprocess.PIPE
    )
    assert ran.returncode == code
    assert ran.stderr == b"" or ran.stderr.startswith(
        b"gputune: error: the result cannot be written to standard output"
    )
    assert ran.stderr.count(b"\n") <= 1


def test_a_search_outlives_its_standard_error(tmp_path, monkeypatch, capsys):
    class Dead(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr("sys.stderr", Dead())
    assert main(["tune", "sklearn:iris", "--out", str(tmp_path / "out"), *FAST]) == 0
    assert "3 complete" in capsys.readouterr().out


@pytest.fixture
def own_process(monkeypatch):
    """Let the command of ``sys.argv`` run in this process; return the exit code of its end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    codes = []

    def leave(code):
        codes.append(code)
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield codes
    for number, handler in before.items():
        signal.signal(number, handler)


def test_sigterm_while_the_best_is_trained_again_ends_in_words(
    tmp_path, monkeypatch, capsys, own_process
):
    monkeypatch.setattr(
        Study, "best_model", lambda study, **more: signal.raise_signal(signal.SIGTERM)
    )
    monkeypatch.setattr(
        sys, "argv", ["gputune", "tune", "sklearn:iris", "--out", str(tmp_path / "out"), *FAST]
    )
    assert main() == 143
    assert (
        "interrupted: 3 of 3 trials are finished. The results are kept in"
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):  # from here on nothing is left to be done
        signal.raise_signal(signal.SIGINT)
    assert own_process == [130]


def test_ctrl_c_while_a_library_is_imported_and_at_the_very_end(tmp_path):
    # A library that makes another error of it, as numpy does.
    (tmp_path / "torch.py").write_text(
        "import signal\ntry: signal.raise_signal(signal.SIGINT)\nexcept KeyboardInterrupt: raise "
        "ImportError"
    )
    ran = python(START, "tune", "sklearn:iris", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "gputune: interrupted.\n")
    late = f"import atexit, signal; atexit.register(signal.raise_signal, signal.SIGINT); {START}"
    ran = python(late, "--version")
    assert (ran.returncode, ran.stderr) == (130, "gputune: interrupted.\n")
