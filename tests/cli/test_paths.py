"""Files and folders that do not exist: named in the same words, before anything heavy is
imported."""

import subprocess
import sys

import pytest

from gputune.cli import inputs as paths
from gputune.cli.main import main

COMMANDS = {
    "tune": "tune nope.csv --target y",
    "tune an array": "tune nope.npy --target y",
    "train": "train nope/nope.parquet --target y",
    "resume": "resume nope",
    "report": "report nope",
    "predict": "predict nope rows.csv",
    "predict rows": "predict model nope.csv",
    "evaluate": "evaluate nope rows.csv",
    "evaluate rows": "evaluate model nope.csv",
    "export": "export nope --out model.onnx",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "rows.csv").write_text("a,y\n1,2\n")
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "name", [name for name in COMMANDS if name not in ("predict rows", "evaluate rows")]
)
def test_a_path_that_does_not_exist_is_said_as_the_command_says_it(name, here, capsys, monkeypatch):
    arguments = COMMANDS[name].split()
    assert main(arguments) == 2
    found = capsys.readouterr().err
    monkeypatch.setattr(paths, "check_paths", lambda arguments: None)
    assert main(arguments) == 2
    assert found == capsys.readouterr().err and "nope" in found


def test_no_command_imports_torch_for_a_path_that_does_not_exist(here):
    code = (
        "import sys\n"
        "from gputune.cli.main import main\n"
        f"for words in {list(COMMANDS.values())!r}:\n"
        "    assert main(words.split()) == 2\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("error: there is no ") == len(COMMANDS)
