"""A user's class, function or partial is run from its file once a process, and described so that
another finds it."""

import functools
import hashlib
import importlib
import inspect
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

import gputune
from gputune.ground.errors import UntrustedCodeError
from gputune.models import MLP
from gputune.modules.construction import build_module
from gputune.population.population import Shape
from gputune.study import code as sources
from gputune.study.code import class_from_file, class_source, find_class, is_changed
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
    assert issubclass(found, nn.Module) and found.__name__ == "Net" and sys.path == path_before
    source = class_source(found)
    digest = hashlib.sha256(NET.encode()).hexdigest()
    assert source == {"path": str(net.resolve()), "class": "Net", "sha256": digest}
    assert find_class(source, trust_code=True) is found and sources.source_file(found) == str(
        net.resolve()
    )
    assert sys.modules["beside"].calls == [1]  # the file ran once
    assert class_from_file(net, "Outer.Inner") is nn.Linear
    net.write_text(NET + "\n")
    second = class_from_file(net, "Net")
    assert (
        second is not found
        and is_changed(second, source)
        and not is_changed(second, class_source(second))
    )
    class_source(found)
    assert find_class(source) is found  # which this process has trained


def test_a_class_of_a_package_is_found_by_import():
    digest = hashlib.sha256(inspect.getsource(MLP).encode()).hexdigest()
    assert class_source(MLP) == {"import": "gputune.models.mlp:MLP", "sha256": digest}
    assert find_class({"import": "gputune.models.mlp:MLP"}, trust_code=True) is MLP
    assert class_source(type("Net", (nn.Module,), {"__module__": "__main__"})) == {
        "import": "__main__:Net"
    }


def test_an_imported_class_that_has_changed_is_another_model(tmp_path, monkeypatch, forget_code):
    """Also where a class that it inherits from has."""
    monkeypatch.syspath_prepend(tmp_path)
    base = "from torch import nn\n\nclass Base(nn.Module):\n    size = 1\n"
    (tmp_path / "own_nets.py").write_text(base + "\nclass Net(Base):\n    pass\n")
    first = importlib.import_module("own_nets").Net
    source = class_source(first)
    (tmp_path / "own_nets.py").write_text(
        base.replace("1", "22") + "\nclass Net(Base):\n    pass\n"
    )
    assert class_source(first) == source  # what was imported is what it was
    sys.modules.pop("own_nets")
    importlib.invalidate_caches()
    forget_code()
    second = find_class(source, trust_code=True)
    assert second.size == 22 and is_changed(second, source)
    assert class_source(second)["sha256"] != source["sha256"]
    assert find_class(class_source(second)) is second
    sys.modules.pop("own_nets")


NAMES = {"Nett": "Module, Net", **dict.fromkeys(("number", "Settings", "Outer", ""), "Net")}


def test_a_name_that_is_no_module_class(net):
    for name, held in NAMES.items():
        with refused(rf"net\.py' has no torch.nn.Module class '{name}'; it has .*{held}"):
            class_from_file(net, name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def", r"does not run \(SyntaxError: "),
        ("import no_such_package", r"does not run \(ModuleNotFoundError: .*no_such_package"),
        ("1 / 0", r"does not run \(ZeroDivisionError: "),
        ("raise SystemExit(3)", r"does not run \(SystemExit: 3\). Correct it"),
    ],
)
def test_a_file_that_does_not_run_or_is_no_source(net, text, message):
    net.write_text(text)
    for _ in range(2):  # nothing half-made is left behind
        with refused(message):
            class_from_file(net, "Net")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"path": "no.py", "class": "Net"},
            r"model names the file '.*no\.py', which does not exist. Check the path",
        ),
        (
            {"import": "no_such_package:Net"},
            "the module 'no_such_package' cannot be imported .*. Make its package importable",
        ),
        ({"import": "gputune.models:Missing"}, "has no torch.nn.Module class 'Missing'"),
        (
            {"import": "own_pack.nets:Net"},
            "'own_pack.nets' cannot be imported .ZeroDivisionError: ",
        ),
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
    importlib.invalidate_caches()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with files that count their runs."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "ran", [], raising=False)
    (tmp_path / "own_pack").mkdir()
    (tmp_path / "own_pack" / "__init__.py").write_text("import sys\nsys.ran.append('pack')\n")
    (tmp_path / "own_pack" / "nets.py").write_text(
        "import sys\nfrom torch import nn\n\nsys.ran.append('nets')\n\n\nclass "
        "Net(nn.Module):\n    pass\n"
    )
    yield tmp_path / "own_pack"
    forget(monkeypatch, "own_pack", "own_pack.nets")


SOURCE = {"import": "own_pack.nets:Net"}


def test_no_file_of_a_package_runs_without_permission(package):
    with pytest.raises(UntrustedCodeError, match="'Net' is in 'own_pack.nets', and loading it"):
        find_class(SOURCE)
    assert sys.ran == [] and "own_pack" not in sys.modules
    found = find_class(SOURCE, trust_code=True)
    assert sys.ran == ["pack", "nets"]
    assert find_class(SOURCE) is found  # which this process has imported


def test_a_file_next_to_a_script_is_found_where_it_lay(net):
    source = {"import": "net:Net", "file": str(net)}
    with pytest.raises(UntrustedCodeError, match=rf"{net}"):
        find_class(source)
    assert find_class(source, trust_code=True).__name__ == "Net"


def test_a_class_of_the_running_program_needs_no_word(monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", main := types.ModuleType("__main__"))
    exec("from torch import nn\nclass Net(nn.Module): pass\nLinear = nn.Linear", main.__dict__)
    assert find_class({"import": "__main__:Net"}) is main.Net
    for name in ("Other", "Linear", "nn.Linear"):  # which are not the program's own
        with refused(f"'{name}' is in the script, notebook or prompt of its training, and"):
            find_class({"import": f"__main__:{name}"})


NETS = """
import functools
from torch import nn

class Net(nn.Module):
    def __init__(self, n_outputs, hidden=3, kind=nn.Tanh):
        super().__init__()
        self.layers = nn.Sequential(nn.LazyLinear(hidden), kind(), nn.Linear(hidden, n_outputs))

    def forward(self, x):
        return self.layers(x)

def make(input_shape, n_outputs, hidden=4):
    return nn.Sequential(nn.Linear(*input_shape, hidden), nn.Tanh(), nn.Linear(hidden, n_outputs))

rectified = functools.partial(Net, kind=nn.ReLU)
"""

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(60) % 3
SPACE = {"lr": [1e-2], "batch_size": [16], "module__hidden": [5, 6]}
WORDS = {
    "space": SPACE,
    "cv": 2,
    "max_epochs": 2,
    "n_trials": 2,
    "include_default": False,
    "verbose": 0,
}


@pytest.fixture
def nets(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(NETS)
    return path


@pytest.mark.parametrize("name", ["Net", "make", "rectified"])
def test_what_a_file_has_is_searched_resumed_saved_and_loaded(nets, tmp_path, name):
    study = gputune.tune(f"{nets}:{name}", X, Y, study=tmp_path / "s.db", **WORDS)
    model = gputune.Study.open(tmp_path / "s.db").best_model(X, Y)
    assert (
        model.module[0].out_features in (5, 6)
        if name == "make"
        else model.module.layers[0].in_features == 4
    )
    model.save(tmp_path / "model")
    loaded = gputune.load_model(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict_proba(X), study.best_model().predict_proba(X))


def variadic(*sizes, n_outputs):
    return nn.Linear(*sizes, n_outputs)


def test_a_partial_without_a_name_is_written_with_its_keywords_or_refused(nets):
    net = class_from_file(nets, "Net")
    for partial, keywords in (
        (functools.partial(net, hidden=7), {"hidden": 7}),
        (functools.partial(net, 1, 7), {"n_outputs": 1, "hidden": 7}),
    ):
        source = class_source(partial)
        assert (
            source["keywords"] == keywords
            and source["class"] == "Net"
            and not is_changed(partial, source)
        )
        found = find_class(source, trust_code=True)
        assert (
            found.func is net
            and build_module(found, {}, Shape(2, 1), seed=0).layers[0].out_features == 7
        )
    named = class_from_file(nets, "rectified")
    assert (
        class_source(named)["class"] == "rectified"
        and find_class(class_source(named), trust_code=True) is named
    )
    with refused(
        r"a partial of variadic that cannot be stored \(it has arguments without a keyword"
    ):
        class_source(functools.partial(variadic, 2))
    with refused("a partial of Net that cannot be stored .*Assign the partial to a name"):
        gputune.tune(functools.partial(net, kind=nn.ELU), X, Y, **WORDS)


def test_a_builder_gets_what_its_signature_has():
    seen = []

    def positional(n_outputs, input_shape, *, width=2):
        seen.append((n_outputs, input_shape, width))
        return nn.Linear(input_shape[0], n_outputs)

    def counted(num_classes, n_features):
        seen.append((num_classes, n_features))
        return nn.Linear(n_features, num_classes)

    def anything(**words):
        seen.append(sorted(words))
        return nn.Linear(words["n_features"], words["n_outputs"])

    partial = functools.partial
    wide = {"width": 5}
    builders = (
        positional,
        anything,
        partial(positional, n_outputs=4),
        counted,
        counted,
        partial(counted, num_classes=4),
    )
    for builder, arguments in zip(builders, (wide, wide, {}, {}, {"num_classes": 1}, {})):
        build_module(builder, arguments, Shape(3, 2, input_shape=(3,)), seed=0)
    calls = [
        (2, (3,), 5),
        ["n_features", "n_outputs", "width"],
        (4, (3,), 2),
        (2, 3),
        (1, 3),
        (4, 3),
    ]
    # the second to see whether modules share tensors
    assert seen == [call for call in calls for _ in range(2)]


def test_a_builder_that_does_not_build_is_named():
    for builder, arguments, message in (
        (lambda n_outputs: n_outputs, {}, "must return a torch.nn.Module, got int"),
        (lambda n_outputs: 1 / 0, {}, r"<lambda>\(n_outputs=2\) raised ZeroDivisionError"),
        (
            lambda n_outputs: n_outputs,
            {"depth": 3},
            r"module__depth is not an argument of <lambda>\(n_outputs\)",
        ),
        (lambda n_outputs: n_outputs, {"n_outputs": 3}, "module__n_outputs is set by the data"),
    ):
        with refused(message):
            build_module(builder, arguments, Shape(3, 2), seed=0)


def test_a_function_of_this_process_is_searched_in_workers():
    study = gputune.tune(here, X, Y, **WORDS | {"workers": 2, "memory": 1024})
    assert [trial.state for trial in study.trials] == ["complete"] * 2
    assert here.__module__ in sys.modules


def here(n_features, n_outputs, hidden=2):
    return nn.Sequential(nn.Linear(n_features, hidden), nn.Linear(hidden, n_outputs))
