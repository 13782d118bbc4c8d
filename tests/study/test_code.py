"""A user's functions are identified by their source and their captured values; the records outlive
the process.

That is in a list which is this user's alone; any other list is not used.
"""

import functools
import os
import stat
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional

import gputune
from gputune.scratch import open_to_others
from gputune.study import code
from gputune.study.code import digest_of_code, is_remembered, remember
from gputune.study.ledger import differences
from gputune.study.record import SearchRecord
from gputune.wording import option
from refused import refused


def powered(power, scale=None):
    scale = torch.ones(1) if scale is None else scale

    def loss(outputs, y):
        return scale.to(outputs) * (outputs[:, 0] - y).abs() ** power

    return loss


class Powered(nn.Module):
    def __init__(self, power):
        super().__init__()
        self._power = power
        self.itself = [self]

    def forward(self, outputs, y):
        return powered(self._power)(outputs, y)


def reading(power, what):
    """The loss, or a module of it, in a file that has set the power."""
    file = {"POWER": power, "torch": torch, "CALLS": power, "__name__": "file"}
    text = (
        "def loss(o, y):\n global CALLS\n CALLS += 1\n return [abs(a - b) ** POWER for a, b in "
        "zip(o, y)]\n"
    )
    exec(
        text + "class Loss(torch.nn.Module):\n def forward(self, o, y): return (o - y) ** POWER",
        file,
    )
    return file[what]


B = torch.tensor([1.0, 2.0])
# fmt: off
LAMBDAS = [lambda o, y: o - y, lambda o, y: y - o, lambda o, y: (lambda z: z + 1)(o), lambda o, y: (lambda z: z + 2)(o)]
# fmt: on
PAIRS = {
    "a closure": (lambda: powered(2), lambda: powered(3)),
    "a tensor": (lambda: powered(2, torch.ones(2)), lambda: powered(2, torch.zeros(2))),
    "a lambda": (lambda: lambda o, y: o - y, lambda: lambda o, y: y - o),
    "lambdas of a line": (lambda: LAMBDAS[0], lambda: LAMBDAS[1]),
    "inner lambdas": (lambda: LAMBDAS[2], lambda: LAMBDAS[3]),
    "a weight": (lambda: nn.CrossEntropyLoss(weight=B), lambda: nn.CrossEntropyLoss(weight=B + 1)),
    "a word": (nn.CrossEntropyLoss, lambda: nn.CrossEntropyLoss(reduction="sum")),
    "a class": (lambda: nn.L1Loss, lambda: nn.MSELoss),
    "a function of torch's": (lambda: functional.mse_loss, lambda: functional.logsigmoid),
    "a partial": (lambda: functools.partial(powered, 2), lambda: functools.partial(powered, 3)),
    "a module": (lambda: Powered(2), lambda: Powered(3)),
    "a module's value": (lambda: reading(2, "loss"), lambda: reading(B, "loss")),
    "that of a class": (lambda: reading(2, "Loss")(), lambda: reading(3, "Loss")()),
    "a method": (lambda: Powered(2).forward, lambda: Powered(3).forward),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
def test_values_that_do_the_same_have_one_digest(pair):
    one, other = pair
    assert digest_of_code(one()) == digest_of_code(one()) != digest_of_code(other())


def test_a_value_that_a_function_sets_itself_is_no_other_code():
    one = reading(2, "loss")
    before = digest_of_code(one)
    one([1], [2])
    assert one.__globals__["CALLS"] == 3 and digest_of_code(one) == before


class Net(nn.Linear):
    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)


MAKE = {
    "loss": powered,
    "training_step": lambda power: lambda module, batch: powered(power)(module(batch[0]), batch[1]),
    "augment": lambda power: lambda x, generator: x * power,
}


@pytest.mark.parametrize("argument", MAKE)
def test_a_study_does_not_continue_with_other_code(argument, tmp_path):
    X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    make = MAKE[argument]
    how = {"space": {"lr": [0.1, 0.01]}, "max_epochs": 1, "cv": 2, "verbose": 0, "workers": 1}
    call = functools.partial(gputune.tune, Net, X, X[:, 0], **how, study=tmp_path / "study.db")
    call(n_trials=1, **{argument: make(2)})
    with refused(
        rf"differs from this call in: {argument} \(its code or its values have changed\)\. Pass"
    ):
        call(n_trials=2, **{argument: make(3)})
    assert len(call(n_trials=2, **{argument: make(2)}).trials) == 2


def test_a_study_of_an_earlier_version_continues_unchecked_and_changed_code_of_a_module_is_another_search():
    here = SearchRecord(objective="the:loss", code={"loss": "a"})
    assert not differences(SearchRecord(objective="the:loss", absent=frozenset({"code"})), here)
    assert differences(SearchRecord(objective="the:loss", code={"loss": "b"}), here)
    # Of an imported class; the table of the study would mix two models.
    there, here = (
        SearchRecord(spec={"kind": "module", "import": "net:Net", "sha256": digest})
        for digest in "ab"
    )
    assert differences(there, here) == [
        f"{option('model')} (its code has changed)"
    ] and not differences(there, there)


@pytest.fixture
def later(monkeypatch):
    """As in a later process."""
    return lambda: monkeypatch.setattr(code, "_remembered", set())


@pytest.fixture
def folder(tmp_path, monkeypatch, later):
    later()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "gputune"


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
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "trusted-code")]
    assert modes == [0o700, 0o600]
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


def test_many_may_write_at_once_and_a_line_that_was_cut_spoils_no_other(folder, later):
    remember("a")
    with (folder / "trusted-code").open("a") as file:
        file.write("\nabc")
    texts = [str(i) for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(remember, texts))
    later()
    assert all(map(is_remembered, ["a", *texts]))


@pytest.mark.parametrize("place", ["gputune", "gputune/trusted-code"])
def test_a_list_that_others_may_write_or_own_is_not_used(folder, later, monkeypatch, place):
    remember("a")
    (folder.parent / place).chmod(0o777)
    later()
    with pytest.warns(
        UserWarning, match=rf"does not use .* because '.*{place}' is not yours, or others may write"
    ):
        assert not is_remembered("a")
    with pytest.warns(UserWarning, match="Remove it, or withdraw their permission .chmod go-w."):
        remember("b")
    assert is_remembered("b")  # this process knows it all the same
    (folder.parent / place).chmod(0o700)
    later()
    assert is_remembered("a") and not is_remembered("b")
    later()
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.warns(UserWarning, match="is not yours"):
        assert not is_remembered("a")


def test_a_list_below_a_folder_that_others_may_write_to_is_not_used(tmp_path, monkeypatch, later):
    state = tmp_path / "above" / "state"
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    remember("a")
    (tmp_path / "link").symlink_to(tmp_path / "above")
    used = {
        (state, 0o777): False,
        (state, 0o1777): True,
        (state, 0o772): False,
        (state, 0o755): True,
        (state.parent, 0o777): False,
        (state.parent, 0o707): False,
        (state.parent, 0o1777): True,
    }
    for home in (state, tmp_path / "link" / "state"):
        monkeypatch.setenv("XDG_STATE_HOME", str(home))
        for (folder, mode), is_used in used.items():
            later()
            folder.chmod(mode)
            words = rf"does not use .* because '.*({folder.name}|link)', which contains it, belongs to another"
            with nullcontext() if is_used else pytest.warns(UserWarning, match=words):
                assert is_remembered("a") == is_used
            folder.chmod(0o755)


def test_a_group_of_one_user_is_no_other_user(tmp_path, monkeypatch):
    """Many systems give each user a group of the same name, and folders that it may write to."""
    me = os.geteuid()
    other = 12345
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(0o775)
    user = types.SimpleNamespace(pw_gid=os.stat(folder).st_gid or 777, pw_name="ann")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: user)
    status = types.SimpleNamespace(st_uid=me, st_gid=user.pw_gid, st_mode=0o40775)
    whole = type(folder).stat
    monkeypatch.setattr(
        type(folder), "stat", lambda path, **how: status if path == folder else whole(path, **how)
    )
    for name, members, is_open in (
        ("ann", [], False),
        ("ann", ["ann"], False),
        ("ann", ["bob"], True),
        ("staff", [], True),
    ):
        group = types.SimpleNamespace(gr_name=name, gr_mem=members)
        monkeypatch.setattr("grp.getgrgid", lambda gid, group=group: group)
        assert (open_to_others(folder / "list") == folder) == is_open
    status.st_uid = other
    status.st_mode = 0o40755
    assert open_to_others(folder / "list") == folder


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_file_is_not_used(folder, later, kind, tmp_path):
    remember("a")
    later()
    place = folder / "trusted-code"
    elsewhere = tmp_path / "elsewhere"
    place.rename(elsewhere)
    make = {
        "link": lambda: place.symlink_to(elsewhere),
        "pipe": lambda: os.mkfifo(place),
        "folder": place.mkdir,
    }
    make[kind]()
    if kind != "link":
        place.chmod(0o700)
    with nullcontext() if kind == "link" else pytest.warns(UserWarning, match="does not use"):
        assert not is_remembered("a")


def test_without_a_home_nothing_outlives_the_process(monkeypatch, later, tmp_path):
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.chdir(tmp_path)
    me = os.geteuid()
    homeless = "1234567"

    def nobody(*_):
        raise KeyError(homeless)

    monkeypatch.setattr("pwd.getpwuid", nobody)
    for home, state, user in (
        (None, "", me),
        (None, "state", me),
        ("home", "", me),
        (str(tmp_path), "", me + 1),
    ):
        later()
        monkeypatch.setenv("XDG_STATE_HOME", state)  # one that is relative counts for nothing
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        monkeypatch.delenv("HOME", raising=False) if home is None else monkeypatch.setenv(
            "HOME", home
        )
        remember("a")
        assert is_remembered("a")
        later()
        assert not is_remembered("a")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    later()
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))  # the usual one
    remember("a")
    later()
    assert is_remembered("a")
    assert (tmp_path / ".local" / "state" / "gputune" / "trusted-code").is_file()


def test_a_folder_that_cannot_be_made_stops_nothing(folder):
    folder.write_text("a file of that name")
    remember("a")
    assert is_remembered("a") and folder.read_text() == "a file of that name"
