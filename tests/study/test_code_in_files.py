"""A stranger's study or model runs no code under any name; code of the running program is found by
name.
"""

import functools
import hashlib
import importlib
import inspect
import json
import pickle
import random
import re
import shutil
import sqlite3
import sys
import types
import warnings

import numpy as np
import pandas
import pytest

import gputune
from command_line import run, write_table
from gputune.ground.errors import InputError, UntrustedCodeError
from gputune.models import MLP
from gputune.study import code
from gputune.study.code import class_from_file, class_source, find_class
from gputune.study.rows import checksum
from study_models import make_model, rows
from study_rows import Canary

TRAINED = '''
"""A file of which the user has trained Net. Everything else in it sings if it is called, or merely looked at."""
import functools
import os
import torch
from functools import partial
from os import popen, system
from torch import nn
from torch.nn import Linear as Relinked

def sing(*_, **__):
    os.close(os.open({canary!r}, os.O_CREAT))
    return nn.Linear(1, 1)

class Net(nn.Module):
    def __init__(self, n_features, n_outputs, hidden=3, act=nn.Tanh):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(n_features, hidden), act(), nn.Linear(hidden, n_outputs))

    def forward(self, x):
        return self.body(x)

    @staticmethod
    def build(**_):
        return sing()

    helper = sing

alias, Alias = sing, Net
unnamed, of_system, of_popen = partial(sing, 1), partial(os.system), partial(popen, mode="r")
wrapped = functools.wraps(Net)(lambda **_: sing())

class Other(nn.Module):
    def __init__(self, **_):
        sing()

class Meta(type):
    def __getattr__(cls, name):
        return sing(cls, name)

    def __call__(cls, *_, **__):
        return sing()

class Hooked(metaclass=Meta):
    pass

class HookedNet(nn.Module, metaclass=Meta):
    pass

class Descriptor:
    def __get__(self, *_):
        return sing

class Instance:
    __call__ = sing
    __getattr__ = sing

    @property
    def __class__(self):
        sing()
        return type

class Helper:
    make, value = sing, Descriptor()

    def __init_subclass__(cls, **_):
        sing()

    @classmethod
    def of_class(cls, **_):
        return sing()

    @staticmethod
    def of_nobody(**_):
        return sing()

    class Inner(nn.Module):
        def __init__(self, **_):
            sing()

    @property
    def attribute(self):
        return sing()

instance = Instance()

def __getattr__(name):
    return sing if name != "__path__" else None
'''

OF_FILE = [
    *"""
sing alias Alias Relinked popen system unnamed of_system of_popen wrapped Other Hooked HookedNet Hooked.any.name
HookedNet.any Instance instance instance.any Helper Helper.make Helper.value Helper.of_class Helper.of_nobody
Helper.Inner Helper.attribute Helper.__init_subclass__ Meta Meta.__call__ Net.forward Net.build Net.helper
Net.__init__ Net.__class__ Net.__mro__ Net.__subclasses__ Net.__init__.__globals__ Net.forward.__globals__.sing
no_such_name no_such_name.any torch.os.popen torch.os.system torch.hub.load os.system os.path.os.popen
functools.partial partial nn.Linear nn.Module torch.nn.Sequential sing.__call__ __builtins__ __builtins__.exec
__builtins__.__import__ __loader__ __loader__.load_module __import__ Net. .Net . Net..forward
""".split(),
    "",
    "Net\0",
    "Net()",
    "Net.__dict__['sing']",
    "<lambda>",
    "sing.<locals>.x",
]
"""Names in the file that the user has trained."""

IMPORTED = """
gputune.models:layers.torch.os.popen gputune.models:layers.torch.os.system gputune.models:layers.torch.hub.load
gputune.models:mlp.nn.modules.module.functools.partial gputune.models:layers.check_size gputune.models:nn.Linear
gputune.models:mlp.MLP gputune.models:MLP.forward gputune.models:MLP.__init__ gputune.models:MLP.__class__
gputune.models.mlp:nn.Linear gputune.models.mlp:check_size gputune.models.layers:check_size
gputune.models.layers:torch.load gputune.models.layers:torch.os.popen gputune.models.mlp:Dropout
gputune.models.mlp:ACTIVATIONS gputune:load_model gputune:models.layers.torch.os.popen
gputune.study.code:class_from_file gputune.study.code:importlib.import_module
os:popen os:system os.path:os.popen builtins:exec builtins:eval builtins:__import__ builtins:open posix:system
subprocess:getoutput subprocess:Popen subprocess:check_output pickle:loads torch:load torch:hub.load torch.hub:load
torch.nn:Linear torch.nn.modules.linear:Linear torch.serialization:load torch.utils.cpp_extension:load
runpy:run_path runpy:run_module importlib:import_module code:interact timeit:timeit numpy:load joblib:load
evil:Net evil:sing evil.inner:Net ..evil:Net evil/../evil:Net /evil:Net sys:modules functools:partial operator:call
""".split()

OF_PROGRAM = """
cleanup os.system os.popen Net.build Net.forward Relinked Alias alias unnamed instance Helper.make no_such_name
Hooked Helper.of_nobody torch.hub.load __builtins__.exec Net.__init__.__globals__
""".split()
"""Names in the program that runs, which is the same file here."""


def save_in_model(folder, spec, kwargs):
    """Write a spec into a model folder, with a checksum that fits."""
    path = folder / "model.json"
    whole = json.loads(path.read_text())
    whole["body"]["spec"] = {"kind": "module", "kwargs": kwargs, **spec}
    text = json.dumps(whole["body"], separators=(",", ":"))
    whole["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(whole))


def save_in_study(study, spec):
    """Write a spec into a study, with a checksum that fits."""
    value = json.dumps({"kind": "module", **spec})
    raw = sqlite3.connect(study)
    raw.execute("PRAGMA synchronous = OFF")
    raw.execute(
        "UPDATE meta SET value = ?, checksum = ? WHERE key = 'spec'",
        (value, checksum("spec", value)),
    )
    raw.commit()
    raw.close()


OF_MODELS = {"load_model", "predict FILE", "evaluate FILE", "export FILE"}
"""The entry points that read a model folder. The others read a study."""


class Scene:
    """A folder with the files of a user's training, and a stranger's changed copy of it."""

    def __init__(self, folder):
        self.folder = folder
        self.canary = folder / "canary"
        self.file = folder / "trained.py"
        self.table = write_table(folder / "t.csv", kind=["ant", "bee"] * 20)
        self.file.write_text(TRAINED.format(canary=str(self.canary)))
        (folder / "evil.py").write_text(
            f"open({str(self.canary)!r}, 'w').close()\n{self.file.read_text()}"
        )
        self.out = folder / "o"
        options = [
            "--trials",
            "1",
            "--epochs",
            "1",
            "--cv",
            "2",
            "--workers",
            "1",
            "--out",
            self.out,
        ]
        answer = run(
            "tune", self.table, "--target", "kind", "--model", f"{self.file}:Net", *options
        )
        assert answer[::2] == (0, "")
        self.model = self.out / "model"
        self.study = self.out / "study.db"
        self.evil = folder / "evil"
        self.evil_study = folder / "evil" / "study.db"
        shutil.copytree(self.out, self.evil)

    @property
    def touch(self):
        return f"echo x >> '{self.canary}'"

    def arguments(self):
        """Arguments for popular functions that would make the canary sing."""
        evil = str(self.folder / "evil.py")
        text = f"open({str(self.canary)!r}, 'w')"
        payload = pickle.dumps(Canary(self.canary), protocol=0).decode()
        return [
            {"cmd": self.touch},
            {"command": self.touch},
            {},
            {"args": self.touch, "shell": True},
            {"source": text},
            {"path": evil, "name": "Net"},
            {"path_name": evil},
            {"name": "evil"},
            {"mod_name": "evil"},
            {"repo_or_dir": str(self.folder), "model": "Net", "source": "local"},
            {"stmt": text},
            {"f": evil},
            {"data": payload},
        ]

    def entries(self):
        """Every way in, by name: each raises InputError, or ends with code 2."""
        folder = self.evil / "model"
        study = self.evil_study
        table = self.table

        def command(*arguments):
            return lambda: _refused_command(*arguments)

        def opened(method, *given, **options):
            return lambda: getattr(gputune.Study.open(study), method)(*given, **options)

        return {
            "load_model": lambda: gputune.load_model(folder),
            "best_model": opened("best_model"),
            "best_model(X, y)": opened("best_model", str(table), "kind", check=False),
            "ensemble": opened("ensemble"),
            "oof_predictions": opened("oof_predictions"),
            "report": opened("report", self.folder / "page.html", confusion=True),
            "predict FILE": command("predict", folder, table),
            "evaluate FILE": command("evaluate", folder, table),
            "export FILE": command("export", folder, "--out", self.folder / "x.pt2"),
            "resume": command("resume", self.evil, "-q"),
            "resume for more": command("resume", self.evil, "--trials", "3", "-q"),
            "report FILE": command(
                "report", self.evil, "--out", self.folder / "page.html", "--importance"
            ),
        }

    def attack(self, spec, kwargs, entries):
        """Read a stranger's files through several entry points; all of them must refuse, and the
        song must not be sung.
        """
        if not OF_MODELS.isdisjoint(entries):
            save_in_model(self.evil / "model", spec, kwargs)
        if not OF_MODELS.issuperset(entries):
            save_in_study(self.evil_study, spec)
        for name in entries:
            try:
                self.entries()[name]()
            except InputError:
                pass
            else:
                pytest.fail(f"{name} has taken {spec} with {kwargs}")
            assert not self.canary.exists(), (name, spec, kwargs)

    def spec(self, name, **more):
        """The spec of a name in the trained file."""
        digest = hashlib.sha256(self.file.read_bytes()).hexdigest()
        return {"path": str(self.file), "class": name, "sha256": digest, **more}


def _refused_command(*arguments):
    exit_code, _, err = run(*arguments)
    assert "Traceback" not in err, err
    if exit_code == 2:
        raise InputError(None, err)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A process that has trained nothing, in the stranger's folder."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("scene")
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        made = Scene(folder)
        patch.setattr(code, "_DESCRIBED", {})
        main = types.ModuleType("__main__")
        exec(made.file.read_text() + "\ncleanup = sing\n", main.__dict__)
        patch.setitem(sys.modules, "__main__", main)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield made
        for name in ("trained", "evil"):
            sys.modules.pop(name, None)


def names_and_arguments(scene, *, in_each_way=False):
    """Each name as the spec of a study or a model gives it, with arguments that would make it
    sing."""
    arguments = scene.arguments()
    for place, name in enumerate(OF_FILE):
        given = arguments[place % 3]
        ways = [
            (scene.spec(name), given),
            ({"import": f"trained:{name}", "file": str(scene.file)}, {}),
            (scene.spec(name, made="function", keywords=given or {"x": 1}), {}),
        ]
        yield from ways if in_each_way else [ways[place % 3]]
    for name in OF_PROGRAM:
        yield (
            {
                "import": f"__main__:{name}",
                "made": "function",
                "keywords": {"command": scene.touch},
            },
            {},
        )
    for number, place in enumerate(IMPORTED):
        given = _fitting(arguments, place)
        file = str(scene.folder / "evil.py")
        ways = [({"import": place, "made": "function"}, given)]
        ways += [({"import": place, "keywords": given or {"x": 1}, "file": file}, {})]
        yield from ways if in_each_way else [ways[number % 2]]
    for path in ("evil.py", str(scene.folder / "evil.py"), "/proc/self/cwd/evil.py"):
        yield {"path": path, "class": "Net", "sha256": scene.spec("Net")["sha256"]}, {}


def _fitting(arguments, place):
    """The arguments that a function of the standard library takes."""
    words = {
        "popen": 0,
        "system": 1,
        "Popen": 3,
        "exec": 4,
        "eval": 4,
        "class_from_file": 5,
        "run_path": 6,
        "import_module": 7,
        "run_module": 8,
        "hub.load": 9,
        "timeit": 10,
        "load": 11,
        "loads": 12,
    }
    fitting = [number for word, number in words.items() if place.endswith(word)]
    return arguments[fitting[0] if fitting else 2]


def random_specs(scene, number, seed=0):
    """Names that are put together at random, of parts that lead somewhere and parts that do not."""
    draw = random.Random(seed)
    parts = [part for name in [*OF_FILE, *OF_PROGRAM] for part in name.split(".")]
    packages = ["trained", "evil", "__main__", *(place.partition(":")[0] for place in IMPORTED)]
    arguments = scene.arguments()
    digest = scene.spec("Net")["sha256"]
    for _ in range(number):
        # one part alone may be a class that is allowed
        name = ".".join(draw.choices(parts, k=draw.randint(2, 5)))
        spec = {"import": f"{draw.choice(packages)}:{name}"}
        if draw.random() < 0.6:
            spec = {
                "path": draw.choice([str(scene.file)] * 3 + ["evil.py", str(scene.table)]),
                "class": name,
            }
        for key, value in {"made": "function", "sha256": digest, "file": "evil.py"}.items():
            if draw.random() < 0.3:
                spec[key] = value
        if draw.random() < 0.5:
            spec["keywords"] = draw.choice(arguments)
        yield spec, draw.choice(arguments)


def test_no_name_of_a_stranger_runs_code(scene):
    entries = list(scene.entries())
    for turn, (spec, kwargs) in enumerate(names_and_arguments(scene)):
        scene.attack(spec, kwargs, [entries[turn % len(entries)]])


def test_names_that_are_put_together_at_random_run_nothing(scene):
    for turn, (spec, kwargs) in enumerate(random_specs(scene, 25)):
        scene.attack(spec, kwargs, ["best_model" if turn % 8 == 0 else "load_model"])


@pytest.mark.long
def test_every_name_by_every_way_in_runs_nothing(scene):
    entries = list(scene.entries())
    for spec, kwargs in [
        *names_and_arguments(scene, in_each_way=True),
        *random_specs(scene, 200, seed=1),
    ]:
        scene.attack(spec, kwargs, entries)


def test_arguments_of_a_stranger_are_plain_data(scene, forget_code):
    """An argument of a class of this program that calls its own arguments."""
    forget_code()
    class_source(class_from_file(scene.file, "Net"))
    relu = {"act": {"torch": "torch.nn:ReLU"}}
    save_in_model(scene.evil / "model", scene.spec("Net"), relu)
    gputune.load_model(scene.evil / "model")
    homes = (
        "torch.nn",
        "torch.nn.functional",
        "torch.nn.modules.module",
        "torch.nn.parallel.distributed",
    )
    inner = "functional.torch torch boolean_dispatch warnings.warn functools.partial RRef __getattr__".split()
    names = [
        "os:system",
        "torch.hub:load",
        "builtins:exec",
        "torchvision.ops:MLP",
        "torch.nn.__init__:os",
    ]
    names += [f"{home}:{name}" for home in homes for name in inner]
    for value in [{"torch": name} for name in names]:
        for kwargs in (
            {"act": value},
            {"act": {"tuple": [value]}},
            {"hidden": {"pairs": [[1, value]]}},
        ):
            scene.attack(scene.spec("Net"), kwargs, ["load_model"])
        scene.attack(scene.spec("Net", keywords={"act": value}), {}, ["best_model"])


def test_it_would_have_sung(scene):
    """The code in the attacks does run if the user permits it."""
    for name in (
        "sing",
        "Other",
        "Hooked.any",
        "no_such_name",
        "Helper.value",
        "Helper.of_nobody",
        "Net.helper",
    ):
        save_in_model(scene.evil / "model", scene.spec(name), {})
        with pytest.raises(InputError):  # it makes no module that fits
            gputune.load_model(scene.evil / "model", trust_code=True)
        assert scene.canary.exists(), name
        scene.canary.unlink()


NETS = """
import functools
from torch import nn
from torch.nn import Linear as Relinked

class Net(nn.Module):
    def __init__(self, n_features, n_outputs, hidden=3):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(n_features, hidden), nn.Linear(hidden, n_outputs))

    def forward(self, x):
        return self.body(x)

    class Deep:
        class Net(nn.Linear):
            def __init__(self, n_features, n_outputs):
                super().__init__(n_features, n_outputs)

        @staticmethod
        def build(n_features, n_outputs):
            return nn.Linear(n_features, n_outputs)

def make(n_features, n_outputs, hidden=4):
    return Net(n_features, n_outputs, hidden)

def clean_up(n_features, n_outputs):
    raise AssertionError

small, made, of_another = (functools.partial(kind, hidden=5) for kind in (Net, make, Relinked))
"""

LEGITIMATE = {
    "class": lambda nets: nets.Net,
    "nested class": lambda nets: nets.Net.Deep.Net,
    "static method": lambda nets: nets.Net.Deep.build,
    "function": lambda nets: nets.make,
    "partial": lambda nets: nets.small,
    "partial of a function": lambda nets: nets.made,
    "partial without a name": lambda nets: functools.partial(nets.Net, hidden=2),
    "partial of a function without a name": lambda nets: functools.partial(nets.make, hidden=2),
    "gputune.models": lambda nets: MLP,
}


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """The modules of users, by where they come from: a file, a package."""
    for path in (tmp_path / "nets.py", tmp_path / "own_pack" / "nets.py"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(NETS)
    (tmp_path / "own_pack" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    of_file = sys.modules[class_from_file(tmp_path / "nets.py", "Net").__module__]
    yield {"a file": of_file, "a package": importlib.import_module("own_pack.nets")}
    for name in ("own_pack", "own_pack.nets"):
        sys.modules.pop(name, None)


def saved(builder, folder):
    """Save a model like a search would, and return its predictions."""
    kwargs = {} if "hidden" not in str(inspect.signature(builder)) else {"hidden": 2}
    frame = pandas.DataFrame(rows())
    spec = {"kind": "module", "kwargs": kwargs, **class_source(builder)}
    model = make_model(frame, module=functools.partial(builder, **kwargs), spec=spec)
    model.save(folder)
    return frame, model.predict_proba(frame)


@pytest.mark.parametrize("kind", LEGITIMATE)
def test_it_is_loaded_in_this_process_and_later_with_permission(
    modules, forget_code, kind, tmp_path
):
    made = {
        place: saved(LEGITIMATE[kind](nets), tmp_path / place) for place, nets in modules.items()
    }
    for options in ({}, {"trust_code": True}):
        for place, (frame, expected) in made.items():
            model = gputune.load_model(tmp_path / place, **options)
            np.testing.assert_array_equal(model.predict_proba(frame), expected)
        forget_code()
    frame.to_csv(tmp_path / "rows.csv")
    command = ("predict", tmp_path / "a file", tmp_path / "rows.csv", "--proba")
    if kind != "gputune.models":
        assert run(*command)[0] == 2
    exit_code, out, err = run(*command, "--trust-code")
    assert exit_code == 0 and len(out.splitlines()) == 31, err


def test_only_what_was_trained_of_a_file_is_found_again(modules, forget_code):
    nets = modules["a file"]
    source = class_source(nets.make)
    assert find_class(source) is nets.make
    for name in ("Net", "Net.Deep.build", "clean_up", "small", "Relinked", "make.__globals__"):
        with pytest.raises(
            UntrustedCodeError,
            match=f"{re.escape(name)}' is in '.*nets.py', and loading it runs that",
        ):
            find_class({**source, "class": name})
    forget_code()
    with pytest.raises(UntrustedCodeError):
        find_class(source)
    assert find_class(source, trust_code=True) is nets.make
    with pytest.raises(UntrustedCodeError):  # the permission was for one call
        find_class(source)


def test_classes_of_an_imported_module_need_no_word_and_its_functions_do(modules, forget_code):
    forget_code()
    for name in ("Net", "Net.Deep.Net"):
        assert find_class({"import": f"own_pack.nets:{name}"}).__qualname__ == name
    for name in ("make", "small", "of_another", "Net.Deep.build", "clean_up"):
        source = {"import": f"own_pack.nets:{name}"}
        with pytest.raises(UntrustedCodeError, match="is in 'own_pack.nets', and loading it runs"):
            find_class(source)
        assert find_class(source, trust_code=True) is not None
    # also by the file that was imported
    file = modules["a package"].__file__
    assert find_class({"path": file, "class": "Net"}) is modules["a package"].Net
    script = {"import": "__main__:Net", "file": file}
    assert find_class(script) is modules["a package"].Net


def test_a_lazy_module_is_not_loaded_by_a_name(monkeypatch):
    class Lazy(types.ModuleType):
        def __getattribute__(self, name):
            raise AssertionError(f"{name} was asked")

    monkeypatch.setitem(sys.modules, "lazy_pack", Lazy("lazy_pack"))
    monkeypatch.setitem(sys.modules, "odd_pack", object())
    for place in ("lazy_pack:Net", "odd_pack:Net", "lazy_pack.inner:Net"):
        with pytest.raises(InputError):
            find_class({"import": place})
