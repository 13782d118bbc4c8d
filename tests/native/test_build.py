"""Building generated code: once on a machine, whole or not at all, and with a reason where it
cannot be had."""

import ctypes
import multiprocessing
import os
import stat

import pytest
import torch

from gputune.native import library as built
from gputune.native.library import NotBuiltError, build, code_folder, find_compiler, kept_binary

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C compiler")
SOURCE = "int three(void) { return 3; }\n"


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """Return the folder of built code, which is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(built, "FLAGS", ("-O0", *built.FLAGS[1:]))
    build.cache_clear()
    yield tmp_path / "cache" / "gputune" / "code"
    build.cache_clear()


def three():
    build.cache_clear()
    return build(SOURCE, torch.float32).three()


@needs_compiler
def test_it_is_built_once_for_each_kind_of_processor(monkeypatch, folder):
    assert three() == 3
    (path,) = folder.iterdir()
    assert (stat.S_IMODE(folder.stat().st_mode), stat.S_IMODE(path.stat().st_mode)) == (
        0o700,
        0o600,
    )
    with monkeypatch.context() as patch:
        patch.setattr(built, "_build", lambda *a: pytest.fail("built again"))
        assert three() == 3
    monkeypatch.setattr(built, "_processor", lambda: "another one")
    assert three() == 3 and len(list(folder.iterdir())) == 2


@needs_compiler
def test_the_seconds_of_a_build_are_estimated_from_the_last_build(monkeypatch):
    monkeypatch.setattr(built, "_kernels", {})
    monkeypatch.setattr(built, "_compiler_speed", [1.0])
    bodies = [f"P[0][0] = {i};" for i in range(20)]
    length = len(built._source_of(sorted(bodies), torch.float32))
    assert built.build_seconds(bodies, torch.float32) == pytest.approx(length, abs=0.2)
    built.build_kernels(bodies, torch.float32)
    assert built.build_seconds(bodies, torch.float32) == 0
    built._kernels.clear()
    assert built.build_seconds(bodies, torch.float32) == 0  # the cache has the library
    assert 0 < built.build_seconds(bodies, torch.float64) < 10


@needs_compiler
@pytest.mark.skipif(os.name != "posix", reason="only POSIX counts the CPU time of child processes")
def test_a_compiler_that_waits_for_a_core_does_not_count_as_slow(monkeypatch, tmp_path):
    waiting = tmp_path / "waiting-cc"
    waiting.write_text(f'#!/bin/sh\nsleep 2\nexec {find_compiler()} "$@"\n')
    waiting.chmod(0o755)
    monkeypatch.setenv("CC", str(waiting))
    monkeypatch.setattr(built, "_compiler_speed", [1.0])
    source = f"{SOURCE}\n/* {'a long comment ' * 100} */\n"
    built.build.cache_clear()
    built.build(source, torch.float32)
    assert built._compiler_speed[0] * len(source) < 1


@needs_compiler
def test_processes_that_need_the_same_code_at_once_build_it_once(monkeypatch, tmp_path, folder):
    calls = tmp_path / "calls"
    slow = tmp_path / "slow-cc"
    slow.write_text(f'#!/bin/sh\necho >> {calls}\nsleep 0.3\nexec {find_compiler()} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("CC", str(slow))
    forks = multiprocessing.get_context("fork")
    results = forks.Queue()
    processes = [forks.Process(target=lambda: results.put(three())) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [3, 3, 3]
    for process in processes:
        process.join()
    assert calls.read_text() == "\n"
    (library,) = folder.iterdir()
    assert library.suffix == ".so"


@pytest.mark.parametrize("facts", ["model name : A b\nflags : c\n", "processor : 0\n"])
def test_no_process_asks_for_a_processor_that_a_file_names(monkeypatch, tmp_path, facts):
    (tmp_path / "cpuinfo").write_text(facts)
    monkeypatch.setattr(built, "Path", lambda _: tmp_path / "cpuinfo")
    asked = []
    monkeypatch.setattr(built.platform, "processor", lambda: asked.append(1) or "asked for")
    assert (built.processor_name(), bool(asked)) == (
        ("A b", False) if "name" in facts else ("asked for", True)
    )


def test_the_environments_compiler_comes_first_and_none_is_said(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(built.shutil, "which", lambda name: f"/somewhere/{name}")
        patch.setenv("CC", "my-cc")
        assert find_compiler() == "/somewhere/my-cc"
    monkeypatch.setattr(built.shutil, "which", lambda name: None)
    with pytest.raises(NotBuiltError, match="no C compiler \\(cc, gcc or clang\\)"):
        build(SOURCE, torch.float32)


@pytest.mark.parametrize(
    "does, says",
    [
        ("echo 'it is broken' >&2; exit 3", "could not build the C code of a step: it is broken"),
        ("exit 3", "could not build the C code of a step: exit code 3"),
        ("exit 0", "could not be made or loaded: .*steps-float"),
    ],
)
def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path, does, says):
    broken = tmp_path / "broken-cc"
    broken.write_text(f"#!/bin/sh\n{does}\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(NotBuiltError, match=says):
        build(SOURCE, torch.float32)


def a_link(monkeypatch, folder):
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


SPOILT = {
    "another user's": lambda patch, folder: patch.setattr(
        built.os, "geteuid", lambda: folder.stat().st_uid + 1
    ),
    "open to all": lambda patch, folder: folder.chmod(0o770),
    "a link": a_link,
    "in a folder of all": lambda patch, folder: folder.parent.parent.chmod(0o777),
}


@needs_compiler
@pytest.mark.parametrize("how", SPOILT)
def test_a_cache_that_others_may_write_is_not_used(monkeypatch, folder, how):
    three()
    SPOILT[how](monkeypatch, folder)
    monkeypatch.setattr(
        built, "_cached", lambda folder, *rest: [] if folder is None else pytest.fail("looked")
    )
    with pytest.warns(
        UserWarning, match="gputune/code is not used for compiled code.*chmod 700.*XDG_CACHE_HOME"
    ):
        assert three() == 3


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
    monkeypatch.setattr(built.os, "access", lambda folder, mode: mode != built.os.W_OK)


@needs_compiler
@pytest.mark.parametrize("lose", [no_passwd_entry, no_folder, read_only])
def test_without_a_cache_to_write_to_it_is_built_for_this_process(
    monkeypatch, tmp_path, folder, lose
):
    lose(monkeypatch, tmp_path)
    assert three() == 3
    assert not folder.exists() or not list(folder.iterdir())


def test_a_relative_cache_home_is_ignored_and_users_are_not_asked_for_where_there_are_none(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delattr(built.os, "geteuid")
    (tmp_path / ".cache" / "gputune" / "code").mkdir(parents=True, mode=0o777)
    assert code_folder() == tmp_path / ".cache" / "gputune" / "code"


@needs_compiler
@pytest.mark.parametrize("spoil, mode", [(lambda content: content[:4096], 0o600), (bytes, 0o660)])
def test_a_file_that_is_not_as_it_was_built_or_that_others_may_write_is_built_again(
    folder, spoil, mode
):
    three()
    (path,) = folder.iterdir()
    content = path.read_bytes()
    path.unlink()  # not written over: it is mapped into this process
    path.write_bytes(spoil(content))
    path.chmod(mode)
    assert three() == 3
    (path,) = folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.read_bytes() == content


@needs_compiler
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_or_a_folder_in_the_place_of_built_code_is_not_read(folder, make):
    three()
    (path,) = folder.iterdir()
    path.unlink()
    make(path)
    assert three() == 3


@needs_compiler
def test_code_is_loaded_from_a_copy_where_the_cache_lets_nothing_run(monkeypatch, folder):
    load = ctypes.CDLL
    loaded = []

    def refuse(path):
        if path.startswith(str(folder)):
            raise OSError("failed to map segment from shared object")
        loaded.append(path)
        return load(path)

    monkeypatch.setattr(built.ctypes, "CDLL", refuse)
    assert three() == 3
    (path,) = folder.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(built, "_build", lambda *a: pytest.fail("built again"))
        assert three() == 3
    assert len(loaded) == 2 and path.exists()


def test_a_binary_is_made_once_and_made_again_where_it_is_not_whole(folder):
    made = []

    def binary(source="a"):
        return kept_binary("kernel", source, lambda: made.append(source) or source.encode())

    assert [binary(), binary(), binary("b")] == [b"a", b"a", b"b"] and made == ["a", "b"]
    for path in folder.iterdir():
        path.write_bytes(b"changed")
    assert binary() == b"a" and made == ["a", "b", "a"]
