"""A user's class is run from its file once a process, and described so that another process finds it."""

import hashlib
import importlib
import inspect
import sys

import pytest
from torch import nn

from gputune.errors import InputError
from gputune.models import MLP
from gputune.study.module_source import check_unchanged, class_from_file, class_source, find_class

NET = """
import dataclasses
import beside

runs = beside.count()

@dataclasses.dataclass
class Settings:
    width: "int" = 3

class Outer:
    from torch.nn import Linear as Inner

from torch.nn import Module
class Net(Module):
    pass

number = 3
"""


@pytest.fixture
def net(tmp_path):
    (tmp_path / "beside.py").write_text(
        "calls = []\ndef count():\n    calls.append(1)\n    return len(calls)\n"
    )
    path = tmp_path / "net.py"
    path.write_text(NET)
    yield path
    sys.modules.pop("beside", None)


def test_a_class_of_a_file_and_the_way_back(net):
    path_before = list(sys.path)
    found = class_from_file(str(net), "Net")
    assert issubclass(found, nn.Module) and found.__name__ == "Net"
    assert sys.path == path_before
    source = class_source(found)
    digest = hashlib.sha256(NET.encode()).hexdigest()
    assert source == {"path": str(net.resolve()), "class": "Net", "sha256": digest}
    assert find_class(source) is found
    assert sys.modules["beside"].calls == [1]  # the file ran once


def test_a_changed_file_is_another_module(net):
    first = class_from_file(net, "Net")
    net.write_text(NET + "\n")
    second = class_from_file(net, "Net")
    assert second is not first
    with pytest.raises(InputError, match=r"net\.py' has changed since the model was trained; restore it"):
        find_class(class_source(first))


def test_a_class_of_a_package_is_found_by_import():
    digest = hashlib.sha256(inspect.getsource(MLP).encode()).hexdigest()
    assert class_source(MLP) == {"import": "gputune.models.mlp:MLP", "sha256": digest}
    assert find_class({"import": "gputune.models.mlp:MLP"}) is MLP
    assert class_source(type("Net", (nn.Module,), {"__module__": "__main__"})) == {"import": "__main__:Net"}


def test_an_imported_class_that_has_changed_is_another_model(tmp_path, monkeypatch):
    """Also where a class that it inherits from has; a model that was trained is loaded all the same."""
    monkeypatch.syspath_prepend(tmp_path)
    base = "from torch import nn\n\nclass Base(nn.Module):\n    size = 1\n"
    (tmp_path / "own_nets.py").write_text(base + "\nclass Net(Base):\n    pass\n")
    first = importlib.import_module("own_nets").Net
    source = class_source(first)
    (tmp_path / "own_nets.py").write_text(base.replace("1", "22") + "\nclass Net(Base):\n    pass\n")
    assert class_source(first) == source  # what was imported is what it was
    sys.modules.pop("own_nets")
    importlib.invalidate_caches()
    second = find_class(source)
    assert second.size == 22 and class_source(second)["sha256"] != source["sha256"]
    check_unchanged(second, class_source(second))
    with pytest.raises(
        InputError, match="the module class 'own_nets:Net' has changed since the search was begun"
    ):
        check_unchanged(second, source)
    sys.modules.pop("own_nets")


@pytest.mark.parametrize(
    ("name", "held"),
    [("Nett", "Module, Net"), ("number", "Net"), ("Settings", "Net"), ("Outer", "Net"), ("", "Net")],
)
def test_a_name_that_is_no_module_class(net, name, held):
    with pytest.raises(InputError, match=rf"net\.py' has no torch.nn.Module class '{name}'; it has .*{held}"):
        class_from_file(net, name)


def test_a_nested_class(net):
    assert class_from_file(net, "Outer.Inner") is nn.Linear


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def", r"does not run \(SyntaxError: "),
        ("import no_such_package", r"does not run \(ModuleNotFoundError: .*no_such_package"),
        ("1 / 0", r"does not run \(ZeroDivisionError: "),
        ("raise SystemExit(3)", r"does not run \(SystemExit: 3\); correct it"),
    ],
)
def test_a_file_that_does_not_run(net, text, message):
    net.write_text(text)
    for _ in range(2):  # nothing half-made is left behind
        with pytest.raises(InputError, match=message):
            class_from_file(net, "Net")


def test_a_missing_file_and_a_missing_package(tmp_path):
    with pytest.raises(InputError, match=r"the module file '.*net\.py' does not exist; check the path"):
        class_from_file(tmp_path / "net.py", "Net")
    for place in ("no_such_package:Net", ":Net", ""):
        with pytest.raises(InputError, match=rf"the module class '{place}' cannot be imported"):
            find_class({"import": place})
    with pytest.raises(InputError, match=r"has no torch.nn.Module class 'Missing'"):
        find_class({"import": "gputune.models:Missing"})
