"""The command line in a process of its own: start-up, a model that outlives its process, a closed pipe."""

import os
import subprocess
import sys

import gputune
from command_line import FAST, kinds, write_table

START = "import sys; from gputune.report.cli import main; sys.exit(main())"
NET = """
import torch

class Net(torch.nn.Linear):
    def __init__(self, n_features, n_outputs, scale=1.0):
        super().__init__(n_features, n_outputs)
        self.scale = scale

    def forward(self, x):
        return self.scale * super().forward(x)
"""


def start(*arguments, **options):
    command = [sys.executable, "-P", "-c", START, *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "80"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return subprocess.Popen(command, **{**pipes, **options})


def finish(*arguments, **options):
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_help_and_version_wait_for_nothing():
    script = """if True:
    import contextlib, io, sys
    from gputune.report.cli import main
    for arguments in (["--help"], ["tune", "--help"], ["--version"], ["tune"]):
        with contextlib.redirect_stderr(io.StringIO()):
            main(arguments)
    heavy = {"torch", "numpy", "scipy", "sklearn", "polars", "pandas", "narwhals", "joblib", "tqdm"}
    print(sorted(heavy & set(sys.modules)))
    """
    ran = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    lines = ran.stdout.split("\n")
    assert lines[-2] == "[]"
    assert f"gputune {gputune.__version__}" in lines
    assert "  gputune tune sklearn:digits" in lines
    assert max(map(len, lines)) <= 80


def test_a_model_predicts_in_a_new_process(tmp_path):
    code, out, err = finish("tune", "sklearn:iris", "--out", "out", *FAST, cwd=tmp_path)
    assert (code, err) == (0, "")
    assert max(map(len, out.split("\n"))) <= 80
    code, out, err = finish("predict", "out/model", "sklearn:iris", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert out.split("\n") == [
        "target",
        *gputune.load_model(tmp_path / "out/model").predict("sklearn:iris"),
        "",
    ]


def test_a_module_of_a_file_predicts_in_a_new_process(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    write_table(tmp_path / "bugs.csv", kind=kinds())
    options = ["--model", "net.py:Net", "--space", "module__scale=0.5,2.0", "lr=1e-3..1e-1:log", *FAST]
    code, _, err = finish("tune", "bugs.csv", "--target", "kind", *options, cwd=tmp_path)
    assert (code, err) == (0, "")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code, out, err = finish("predict", "../gputune-out/model", "../bugs.csv", cwd=elsewhere)
    assert (code, err) == (0, "")
    assert out.startswith("kind\n") and out.count("\n") == 41


def test_a_reader_that_stops_reading_ends_it_quietly(tmp_path):
    assert finish("tune", "sklearn:iris", "--out", "out", *FAST, cwd=tmp_path)[0] == 0
    process = start("trials", "out", "--format", "csv", cwd=tmp_path)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 1
    process.stderr.close()
