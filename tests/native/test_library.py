"""Building the compiled library: once on a machine, whole or not at all, and with a reason where it cannot be had."""

import hashlib
import os
import stat

import pytest
import torch

import gputune
from forked import Fork
from gputune.native import library as built
from gputune.native.library import NotBuiltError, cache_folder, find_compiler, library
from problems import Linear
from refused import refused

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C compiler")
ROWS = [[0.0, 1.0], [1.0, 0.0], [0.5, 2.0], [2.0, 1.0]] * 5
LABELS = [0, 1, 0, 1] * 5
QUICK = ("-O0", *built.FLAGS[1:])
SMALL = {"n_trials": 1, "max_epochs": 1, "cv": 2}


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Every test begins without a built library, which is built quickly here, and leaves none behind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(built, "FLAGS", ("-O0", *built.FLAGS[1:]))  # soon built
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
    code = f"import torch; from gputune.native import library as built; built.FLAGS = {QUICK}\n"
    code += "assert built.library(torch.float32).train_members"
    running = [Fork(code) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
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
        "note: trials train in recorded steps, slower than compiled ones: there is no C compiler"
        in capsys.readouterr().err
    )
    with refused("backend='compiled' .* there is no C compiler.*choose 'auto'"):
        gputune.tune("mlp", ROWS, LABELS, backend="compiled", **SMALL)


def test_what_is_never_compiled_is_not_called_slower(monkeypatch, capsys):
    monkeypatch.setattr(built.shutil, "which", lambda name: None)
    gputune.tune("mlp", ROWS, LABELS, optimizer="adamhd", **SMALL)
    assert "eagerly" not in capsys.readouterr().err


@pytest.mark.usefixtures("recorded_on_cpu")
@pytest.mark.parametrize(
    ("what", "backend", "says"),
    [
        ({"model": "mlp", "optimizer": "adamhd"}, "graph", "eagerly: backend='graph' knows sgd,"),
        pytest.param(
            {"model": "mlp", "optimizer": "adamhd"}, "compiled",
            "eagerly: backend='compiled' knows MLPs and linear models with sgd,", marks=needs_compiler,
        ),
        pytest.param(
            {"model": Linear}, "compiled",
            "in recorded steps: backend='compiled' knows MLPs and linear models with sgd,", marks=needs_compiler,
        ),
    ],
)  # fmt: skip
def test_a_backend_that_knows_none_of_the_trials_says_so(capsys, what, backend, says):
    gputune.tune(**what, X=ROWS, y=LABELS, backend=backend, **SMALL)
    assert f"note: all trials train {says}" in capsys.readouterr().err


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
def test_a_build_is_whole_on_disk_and_this_users_alone(monkeypatch, tmp_path):
    synced = []
    monkeypatch.setattr(built.os, "fsync", lambda number: synced.append(os.fstat(number).st_ino))
    umask = os.umask(0)
    try:
        library(torch.float32)
    finally:
        os.umask(umask)
    folder = tmp_path / "cache" / "gputune"
    (path,) = folder.iterdir()
    assert (stat.S_IMODE(folder.stat().st_mode), stat.S_IMODE(path.stat().st_mode)) == (0o700, 0o600)
    assert path.stem.endswith(hashlib.sha256(path.read_bytes()).hexdigest())
    assert synced == [path.stat().st_ino]


def private_builds(monkeypatch):
    """Return a list that gets the folder of each build from now on; the builds are not in the cache."""
    folders, build = [], built._build
    monkeypatch.setattr(
        built, "_build", lambda c, path, **k: folders.append(path.parent) or build(c, path, **k)
    )
    return folders


def foreign(monkeypatch, folder):
    monkeypatch.setattr(built.os, "geteuid", lambda: folder.stat().st_uid + 1)


def open_to_all(monkeypatch, folder):
    folder.chmod(0o770)


def a_link(monkeypatch, folder):
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


def within_a_folder_of_all(monkeypatch, folder):
    folder.parent.chmod(0o777)


@needs_compiler
@pytest.mark.parametrize("spoil", [foreign, open_to_all, a_link, within_a_folder_of_all])
def test_a_cache_that_others_may_write_is_not_used(monkeypatch, tmp_path, spoil):
    library(torch.float32)
    library.cache_clear()
    spoil(monkeypatch, tmp_path / "cache" / "gputune")
    monkeypatch.setattr(built, "_kept", lambda *a: pytest.fail("looked for a library where others may write"))
    folders = private_builds(monkeypatch)
    with pytest.warns(
        UserWarning, match="cache/gputune is not used for compiled code.*chmod 700.*XDG_CACHE_HOME"
    ):
        assert library(torch.float32).train_members
    (folder,) = folders
    assert tmp_path not in folder.parents and not folder.exists()


def no_passwd_entry(monkeypatch, tmp_path):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)


def no_folder(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))


def read_only(monkeypatch, tmp_path):
    monkeypatch.setattr(built.os, "access", lambda folder, mode: mode != os.W_OK)


@needs_compiler
@pytest.mark.parametrize("lose", [no_passwd_entry, no_folder, read_only])
def test_without_a_cache_to_write_to_it_is_built_for_this_process(monkeypatch, tmp_path, lose):
    lose(monkeypatch, tmp_path)
    folders = private_builds(monkeypatch)
    assert library(torch.float32).train_members
    (folder,) = folders
    assert tmp_path not in folder.parents and not folder.exists()


def test_a_relative_cache_home_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert cache_folder() == tmp_path / ".cache" / "gputune"
    assert not (tmp_path / "here").exists()


def test_users_are_not_asked_for_where_the_system_has_none(monkeypatch, tmp_path):
    monkeypatch.delattr(built.os, "geteuid")
    (tmp_path / "cache" / "gputune").mkdir(parents=True)
    (tmp_path / "cache" / "gputune").chmod(0o777)
    assert cache_folder() == tmp_path / "cache" / "gputune"


def flipped(content):
    return content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]


@needs_compiler
@pytest.mark.parametrize(
    "spoil, mode", [(flipped, 0o600), (lambda content: content[:4096], 0o600), (bytes, 0o660)]
)
def test_a_file_that_is_not_as_it_was_built_or_that_others_may_write_is_built_again(tmp_path, spoil, mode):
    library(torch.float32)
    library.cache_clear()
    (path,) = (tmp_path / "cache" / "gputune").iterdir()
    content = path.read_bytes()
    path.unlink()  # not written over: it is mapped into this process
    path.write_bytes(spoil(content))
    path.chmod(mode)
    assert library(torch.float32).train_members
    (path,) = path.parent.iterdir()
    assert path.stem.endswith(hashlib.sha256(path.read_bytes()).hexdigest())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("writes", ["", "no library"])
def test_a_compiler_that_writes_no_library_is_tried_anew_and_said(monkeypatch, tmp_path, writes):
    liar = tmp_path / "liar"
    liar.write_text(
        f"#!/bin/sh\nwhile [ $# -gt 0 ]; do if [ $1 = -o ]; then printf '{writes}' > $2; fi; shift; done\n"
    )
    liar.chmod(0o755)
    monkeypatch.setenv("CC", str(liar))
    for _ in range(2):
        with pytest.raises(NotBuiltError, match="compiled code could not be made or loaded: .*members-float"):
            library(torch.float32)
    assert len(list((tmp_path / "cache" / "gputune").iterdir())) == 1
