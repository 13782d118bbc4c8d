"""What is remembered outlives the process, in a list that is this user's alone; any other list is not used."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest

from gputune.study import code
from gputune.study.code import is_remembered, remember


@pytest.fixture
def later(monkeypatch):
    """As in a later process."""
    return lambda: monkeypatch.setattr(code, "_here", set())


@pytest.fixture
def folder(tmp_path, monkeypatch, later):
    later()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "gputune"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_remembered_outlives_the_process_and_nobody_else_may_write_it(folder, later):
    before = os.umask(0)
    try:
        assert not is_remembered("a") and not folder.exists()
        remember("a")
    finally:
        os.umask(before)
    remember("b\udcff")  # a path may hold any byte
    later()
    assert is_remembered("a") and is_remembered("b\udcff") and not is_remembered("c")
    assert (mode(folder), mode(folder / "trusted-code")) == (0o700, 0o600)
    (folder / "trusted-code").unlink()
    assert not is_remembered("a")


def test_the_same_is_kept_once_and_a_full_list_drops_its_older_half(folder, later, monkeypatch):
    monkeypatch.setattr(code, "MOST", 4)
    for text in "aababcd":
        remember(text)
    assert len((folder / "trusted-code").read_text().split()) == 4
    remember("e")
    later()
    assert [is_remembered(text) for text in "abcde"] == [False, False, True, True, True]


def test_a_line_that_was_cut_spoils_no_other(folder, later):
    remember("a")
    with (folder / "trusted-code").open("a") as file:
        file.write("\nabc")
    remember("b")
    later()
    assert is_remembered("a") and is_remembered("b")


def test_many_may_write_at_once(folder, later):
    texts = [str(i) for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(remember, texts))
    later()
    assert all(map(is_remembered, texts))


@pytest.mark.parametrize("place", ["gputune", "gputune/trusted-code"])
def test_a_list_that_others_may_write_is_not_used(folder, later, place):
    remember("a")
    (folder.parent / place).chmod(0o777)
    later()
    with pytest.warns(UserWarning, match=rf"not used, since '.*{place}' is not yours, or others may write"):
        assert not is_remembered("a")
    with pytest.warns(UserWarning, match="remove it, or take that right away .chmod go-w."):
        remember("b")
    assert is_remembered("b")  # this process knows it all the same
    (folder.parent / place).chmod(0o700)
    later()
    assert is_remembered("a") and not is_remembered("b")


def test_a_list_of_another_user_is_not_used(folder, later, monkeypatch):
    remember("a")
    later()
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.warns(UserWarning, match="is not yours"):
        assert not is_remembered("a")


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_file_is_not_used(folder, later, kind, tmp_path):
    remember("a")
    later()
    place, elsewhere = folder / "trusted-code", tmp_path / "elsewhere"
    place.rename(elsewhere)
    make = {"link": lambda: place.symlink_to(elsewhere), "pipe": lambda: os.mkfifo(place), "folder": place.mkdir}
    make[kind]()
    if kind != "link":
        place.chmod(0o700)
    with nullcontext() if kind == "link" else pytest.warns(UserWarning, match="not used"):
        assert not is_remembered("a")


def test_without_a_home_nothing_outlives_the_process(monkeypatch, later, tmp_path):
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.chdir(tmp_path)
    me, homeless = os.geteuid(), "1234567"

    def nobody(*_):
        raise KeyError(homeless)

    monkeypatch.setattr("pwd.getpwuid", nobody)
    for home, state, user in ((None, "", me), (None, "state", me), ("home", "", me), (str(tmp_path), "", me + 1)):
        later()
        monkeypatch.setenv("XDG_STATE_HOME", state)  # one that is relative counts for nothing
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        monkeypatch.delenv("HOME", raising=False) if home is None else monkeypatch.setenv("HOME", home)
        remember("a")
        assert is_remembered("a")
        later()
        assert not is_remembered("a")
    assert not list(tmp_path.iterdir())


def test_the_usual_folder_is_in_the_home(monkeypatch, later, tmp_path):
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    remember("a")
    later()
    assert is_remembered("a")
    assert (tmp_path / ".local" / "state" / "gputune" / "trusted-code").is_file()


def test_a_folder_that_cannot_be_made_stops_nothing(folder):
    folder.write_text("a file of that name")
    remember("a")
    assert is_remembered("a") and folder.read_text() == "a file of that name"
