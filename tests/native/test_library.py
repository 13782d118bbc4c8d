"""Building the compiled library: once on a machine, whole or not at all, and with a reason where it cannot be had."""

import subprocess
import sys

import pytest
import torch

import gputune
from gputune.errors import InputError
from gputune.native import library as built
from gputune.native.library import NotBuiltError, find_compiler, library
from problems import Linear

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C compiler")
ROWS = [[0.0, 1.0], [1.0, 0.0], [0.5, 2.0], [2.0, 1.0]] * 5
LABELS = [0, 1, 0, 1] * 5
SMALL = {"n_trials": 1, "max_epochs": 1, "cv": 2}


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Every test begins without a built library, and leaves none behind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.cache_clear()
    yield
    library.cache_clear()


@needs_compiler
def test_it_is_built_once_for_each_type(monkeypatch, tmp_path):
    for dtype in (torch.float32, torch.float64):
        assert library(dtype).train_members
    files = sorted(path.name[:14] for path in (tmp_path / "cache" / "gputune").iterdir())
    assert files == ["members-double", "members-float-"]
    library.cache_clear()
    monkeypatch.setattr(built, "_build", lambda *a, **k: pytest.fail("built again"))
    assert library(torch.float32).train_members


@needs_compiler
def test_another_processor_has_a_build_of_its_own(monkeypatch, tmp_path):
    library(torch.float32)
    monkeypatch.setattr(built, "_processor", lambda: "another one")
    library.cache_clear()
    library(torch.float32)
    assert len(list((tmp_path / "cache" / "gputune").iterdir())) == 2


@needs_compiler
def test_processes_that_build_at_once_all_get_it(tmp_path):
    code = "import torch; from gputune.native.library import library; assert library(torch.float32).train_members"
    running = [subprocess.Popen([sys.executable, "-P", "-c", code]) for _ in range(3)]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    (left,) = (tmp_path / "cache" / "gputune").iterdir()
    assert left.suffix == ".so"


def test_the_environments_compiler_comes_first(monkeypatch):
    monkeypatch.setattr(built.shutil, "which", lambda name: f"/somewhere/{name}")
    monkeypatch.setenv("CC", "my-cc")
    assert find_compiler() == "/somewhere/my-cc"
    monkeypatch.delenv("CC")
    assert find_compiler() == "/somewhere/cc"


def test_without_a_compiler_the_reason_is_said(monkeypatch, capsys):
    monkeypatch.setattr(built.shutil, "which", lambda name: None)
    with pytest.raises(NotBuiltError, match="no C compiler \\(cc, gcc or clang\\)"):
        library(torch.float32)
    gputune.tune("mlp", ROWS, LABELS, **SMALL)
    assert (
        "note: trials train eagerly, slower than compiled ones: there is no C compiler"
        in capsys.readouterr().err
    )
    with pytest.raises(InputError, match="backend='compiled' .* there is no C compiler.*choose 'auto'"):
        gputune.tune("mlp", ROWS, LABELS, backend="compiled", **SMALL)


def test_what_is_never_compiled_is_not_called_slower(monkeypatch, capsys):
    monkeypatch.setattr(built.shutil, "which", lambda name: None)
    gputune.tune("mlp", ROWS, LABELS, optimizer="adamhd", **SMALL)
    assert "eagerly" not in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["graph", pytest.param("compiled", marks=needs_compiler)])
@pytest.mark.parametrize(
    "what", [{"model": "mlp", "optimizer": "adamhd"}, {"model": Linear}], ids=["adamhd", "module"]
)
def test_a_backend_that_knows_none_of_the_trials_says_so(capsys, backend, what):
    gputune.tune(**what, X=ROWS, y=LABELS, backend=backend, **SMALL)
    said = capsys.readouterr().err
    assert (
        f"note: all trials train eagerly: backend='{backend}' knows MLPs and linear models with sgd," in said
    )


def test_a_module_with_the_compiled_backend_needs_a_compiler_before_it_trains(monkeypatch):
    monkeypatch.setattr(built.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="backend='compiled' .* there is no C compiler"):
        gputune.tune(Linear, ROWS, LABELS, backend="compiled", **SMALL)


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'it is broken' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(NotBuiltError, match="broken-cc could not build gputune's C code: it is broken"):
        library(torch.float32)
    broken.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(NotBuiltError, match="broken-cc could not build gputune's C code: exit code 3"):
        library(torch.float32)
    assert not list((tmp_path / "cache" / "gputune").iterdir())


@needs_compiler
def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(NotBuiltError, match="file/gputune/members-float.* could not be made or loaded"):
        library(torch.float32)


@needs_compiler
def test_a_broken_file_in_the_cache_is_named(tmp_path):
    library(torch.float32)
    (path,) = (tmp_path / "cache" / "gputune").iterdir()
    path.unlink()  # not written over: it is mapped into this process
    path.write_bytes(b"nothing of a library")
    code = (
        "import torch; from gputune.native.library import NotBuiltError, library\n"
        "try: library(torch.float32)\n"
        "except NotBuiltError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert "could not be made or loaded" in done.stdout
