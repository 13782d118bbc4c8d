"""A user's class is run from its file once a process, and described so that another process finds it."""

import hashlib
import importlib
import inspect
import os
import shutil
import sys
import types
import weakref

import pytest
from torch import nn

from gputune.errors import UntrustedCodeError
from gputune.models import MLP
from gputune.study import code
from gputune.study.module_source import (
    class_from_file,
    class_source,
    find_class,
    is_changed,
    remember_code,
    source_file,
    why_not_found,
)
from refused import refused

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
    (tmp_path / "beside.py").write_text("calls = []\ndef count():\n    calls.append(1)\n    return len(calls)\n")
    path = tmp_path / "net.py"
    path.write_text(NET)
    yield path
    sys.modules.pop("beside", None)


def test_a_class_of_a_file_and_the_way_back(net):
    path_before = list(sys.path)
    found = class_from_file(str(net), "Net")
    assert issubclass(found, nn.Module) and found.__name__ == "Net" and sys.path == path_before
    source = class_source(found)
    digest = hashlib.sha256(NET.encode()).hexdigest()
    assert source == {"path": str(net.resolve()), "class": "Net", "sha256": digest}
    assert find_class(source, trust_code=True) is found and source_file(found) == str(net.resolve())
    assert sys.modules["beside"].calls == [1]  # the file ran once
    assert class_from_file(net, "Outer.Inner") is nn.Linear
    net.write_text(NET + "\n")
    second = class_from_file(net, "Net")
    assert second is not found and is_changed(second, source) and not is_changed(second, class_source(second))
    with refused(r"net\.py' has changed since the model was trained; restore it"):
        find_class(source, trust_code=True)
    assert find_class(source, trust_code=True, or_changed=True) is second


def test_a_class_of_a_package_is_found_by_import():
    digest = hashlib.sha256(inspect.getsource(MLP).encode()).hexdigest()
    assert class_source(MLP) == {"import": "gputune.models.mlp:MLP", "sha256": digest}
    assert find_class({"import": "gputune.models.mlp:MLP"}, trust_code=True) is MLP
    assert class_source(type("Net", (nn.Module,), {"__module__": "__main__"})) == {"import": "__main__:Net"}


def test_an_imported_class_that_has_changed_is_another_model(tmp_path, monkeypatch):
    """Also where a class that it inherits from has."""
    monkeypatch.syspath_prepend(tmp_path)
    base = "from torch import nn\n\nclass Base(nn.Module):\n    size = 1\n"
    (tmp_path / "own_nets.py").write_text(base + "\nclass Net(Base):\n    pass\n")
    first = importlib.import_module("own_nets").Net
    source = class_source(first)
    (tmp_path / "own_nets.py").write_text(base.replace("1", "22") + "\nclass Net(Base):\n    pass\n")
    assert class_source(first) == source  # what was imported is what it was
    sys.modules.pop("own_nets")
    importlib.invalidate_caches()
    second = find_class(source, trust_code=True, or_changed=True)
    assert second.size == 22 and class_source(second)["sha256"] != source["sha256"]
    assert find_class(class_source(second), trust_code=True) is second
    with refused("the module class 'own_nets:Net' has changed since the search was begun"):
        find_class(source, trust_code=True)
    sys.modules.pop("own_nets")


@pytest.mark.parametrize(
    ("name", "held"), [("Nett", "Module, Net"), ("number", "Net"), ("Settings", "Net"), ("Outer", "Net"), ("", "Net")]
)
def test_a_name_that_is_no_module_class(net, name, held):
    with refused(rf"net\.py' has no torch.nn.Module class '{name}'; it has .*{held}"):
        class_from_file(net, name)


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
        with refused(message):
            class_from_file(net, "Net")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "no.py", "class": "Net"}, r"model: the file '.*no\.py' does not exist; check the path"),
        ({"import": "no_such_package:Net"}, "the module class 'no_such_package:Net' cannot be imported"),
        ({"import": ":Net"}, "the module class ':Net' cannot be imported"),
        ({"import": ""}, "the module class '' cannot be imported"),
        ({"import": "gputune.models:Missing"}, "has no torch.nn.Module class 'Missing'"),
        ({"import": "own_pack.nets:Net"}, "'own_pack.nets:Net' cannot be imported .ZeroDivisionError: .*correct its"),
    ],
)
def test_a_class_that_is_not_there(source, message, package):
    (package / "nets.py").write_text("1 / 0")
    with refused(message):
        find_class(source, trust_code=True)


def forget(monkeypatch, *names):
    """As in another process: the modules are imported anew."""
    for name in names:
        sys.modules.pop(name, None)
    monkeypatch.setattr(code, "_FILES", weakref.WeakKeyDictionary())
    importlib.invalidate_caches()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose files count how often they run."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "ran", [], raising=False)
    (tmp_path / "own_pack").mkdir()
    (tmp_path / "own_pack" / "__init__.py").write_text("import sys\nsys.ran.append('pack')\n")
    (tmp_path / "own_pack" / "nets.py").write_text(
        "import sys\nfrom torch import nn\n\nsys.ran.append('nets')\n\n\nclass Net(nn.Module):\n    pass\n"
    )
    yield tmp_path / "own_pack"
    forget(monkeypatch, "own_pack", "own_pack.nets")


SOURCE = {"import": "own_pack.nets:Net"}


@pytest.fixture
def trusted(package, monkeypatch, another_user):
    """The package, remembered by another process; what it ran is forgotten."""
    another_user()
    remember_code(find_class(SOURCE, trust_code=True))
    forget(monkeypatch, "own_pack", "own_pack.nets")
    sys.ran.clear()
    return package


def test_no_file_of_a_package_runs_that_was_not_remembered(package, monkeypatch, another_user):
    another_user()
    words = r"'Net' is in '.*own_pack/nets.py', and loading it runs that code, which you have not trained or saved"
    with pytest.raises(UntrustedCodeError, match=words):
        find_class(SOURCE)
    assert sys.ran == [] and "own_pack" not in sys.modules
    remember_code(find_class(SOURCE, trust_code=True))
    assert sys.ran == ["pack", "nets"]
    forget(monkeypatch, "own_pack", "own_pack.nets")
    assert find_class(SOURCE).__name__ == "Net" and len(sys.ran) == 4


@pytest.mark.parametrize("name", ["__init__.py", "nets.py"])
def test_a_package_that_has_changed_is_trusted_anew(trusted, monkeypatch, name):
    remember_code(find_class(SOURCE))
    (trusted / name).write_text((trusted / name).read_text() + "# a word\n")
    assert find_class(SOURCE).__name__ == "Net"  # which this process has already
    forget(monkeypatch, "own_pack", "own_pack.nets")
    sys.ran.clear()
    with pytest.raises(UntrustedCodeError, match="own_pack/nets.py"):
        find_class(SOURCE)
    assert sys.ran == []


@pytest.mark.parametrize("linked", [False, True])
def test_a_package_of_the_same_content_elsewhere_is_another_one(trusted, monkeypatch, tmp_path, linked):
    """Also by a link: what lies beside it, such as compiled code, would be run with it."""
    copy = shutil.copy if not linked else os.symlink
    (tmp_path / "down" / "own_pack").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "down")
    for name in ("__init__.py", "nets.py"):
        copy(trusted / name, tmp_path / "down" / "own_pack" / name)
    with pytest.raises(UntrustedCodeError, match="down/own_pack/nets.py"):
        find_class(SOURCE)
    assert sys.ran == []


def test_a_loaded_class_that_nobody_has_trained_is_not_built(another_user):
    another_user()
    with pytest.raises(UntrustedCodeError, match=r"'Linear' is in '.*linear.py'"):
        find_class({"import": "torch.nn.modules.linear:Linear"})


def test_a_file_beside_a_script_is_found_where_it_lay(net, monkeypatch, another_user):
    another_user()
    source = {"import": "net:Net", "file": str(net)}
    with pytest.raises(UntrustedCodeError, match=rf"{net}"):
        find_class(source)
    monkeypatch.syspath_prepend(net.parent)
    remember_code(importlib.import_module("net").Net)
    sys.path.remove(str(net.parent))
    forget(monkeypatch, "net")
    assert find_class(source).__name__ == "Net"
    with refused(r"'pack.net:Net' cannot be imported .*; it was in '.*net.py'; make its"):
        find_class({**source, "import": "pack.net:Net"})


def run_as_main(monkeypatch, code, file=None):
    main = types.ModuleType("__main__")
    if file is not None:
        file.write_text(code)
        main.__file__ = str(file)
    monkeypatch.setitem(sys.modules, "__main__", main)
    exec(code, main.__dict__)
    return main


def test_a_class_of_the_running_program_needs_no_word(monkeypatch, another_user):
    another_user()
    main = run_as_main(monkeypatch, "from torch import nn\nclass Net(nn.Module): pass\nLinear = nn.Linear")
    assert find_class({"import": "__main__:Net"}) is main.Net
    assert why_not_found(main.Net) == "in a notebook or at a prompt"
    for name in ("Other", "Linear", "nn.Linear"):  # which are not the program's own
        with refused(f"'{name}' was defined in a script, in a notebook or at a prompt, and"):
            find_class({"import": f"__main__:{name}"})


def test_a_class_that_no_import_reaches_is_told():
    class Net(nn.Module):
        pass

    assert why_not_found(Net) == f"in {__name__!r}, where no import reaches it"
    assert why_not_found(MLP) is None


def test_a_file_that_is_no_source_is_not_read(net):
    with net.open("r+b") as file:
        file.truncate(2**24 + 1)
    with refused(r"net\.py' is too large for a Python file; check the path"):
        find_class({"path": str(net), "class": "Net", "sha256": "0"})
