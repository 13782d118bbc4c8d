"""A saved model predicts the same in a new process; a folder that is not whole is refused and runs
nothing."""

import hashlib
import json
import os
import pickle
import re
import shutil
import sys
import types
import warnings
from dataclasses import replace
from operator import methodcaller

import numpy as np
import pandas
import pytest
import torch
from torch import nn

from gputune.ground.errors import UntrustedCodeError
from gputune.ground.files import scratch_folder
from gputune.models import LogisticRegression
from gputune.study.code import class_from_file, class_source
from gputune.study.model import load_model
from refused import refused
from study_models import make_model, rows
from study_rows import Canary

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, n_features, n_outputs, width=4, act=nn.ReLU):
        super().__init__()
        self.seq = nn.Sequential(nn.Linear(n_features, width), act(), nn.Linear(width, n_outputs))

    def forward(self, x):
        return self.seq(x)
"""


@pytest.fixture
def frame():
    return pandas.DataFrame(rows())


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "model"


@pytest.fixture
def saved(frame, folder):
    """A folder that holds a model."""
    make_model(frame).save(folder)
    return folder


@pytest.fixture
def net(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(NET)
    return path


def save_net(frame, net, folder):
    """Save a model of the class in net.py, built with other than its default arguments."""
    net_class = class_from_file(net, "Net")
    kwargs = {"width": 6, "act": nn.Tanh}
    spec = {"kind": "module", "kwargs": kwargs, **class_source(net_class)}
    model = make_model(frame, module=lambda **size: net_class(**size, **kwargs), spec=spec)
    model.save(folder)
    return model


def edit(folder, change):
    """Rewrite model.json with ``change`` applied to its body, and checksums that fit again."""
    path = folder / "model.json"
    whole = json.loads(path.read_text())
    change(whole["body"])
    text = json.dumps(whole["body"], separators=(",", ":"))
    whole["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(whole))


OBJECTS = np.array(["no", "yes"], dtype=object)
# sizes follow from the layout
LOGISTIC = {"module": LogisticRegression, "spec": {"kind": "logistic", "kwargs": {}}}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"classes": (3, 1, 2), "numbers": "robust"},
        {"classes": (False, True), "numbers": "quantile"},
        {"classes": (0.1, 0.3), "numbers": "piecewise"},
        {"classes": None, "dtype": torch.float64},
        {"classes": None, "numbers": "quantile"},
        {"numbers": "piecewise", "dtype": torch.float64},
        {"classes": OBJECTS},
        LOGISTIC,
    ],
)
def test_a_loaded_model_is_the_saved_one_bit_for_bit(frame, folder, options):
    model = make_model(frame, **options)
    model.save(folder)
    before = torch.random.get_rng_state()
    loaded = load_model(str(folder))
    assert torch.equal(torch.random.get_rng_state(), before)
    got = loaded.predict(frame)
    wanted = model.predict(frame)
    np.testing.assert_array_equal(got, wanted)
    assert got.dtype == wanted.dtype and not loaded.module.training
    for name in ("task", "center", "scale", "dtype", "target", "spec", "layout"):
        assert getattr(loaded, name) == getattr(model, name)
    assert loaded.statistics.to_json() == model.statistics.to_json()
    assert loaded.info["score"] == model.info["score"] and np.isnan(loaded.info["held_out"])
    for key, value in model.module.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[key], value)
    if model.classes is not None:
        np.testing.assert_array_equal(loaded.predict_proba(frame), model.predict_proba(frame))
        assert got.dtype == model.classes.dtype and set(got.tolist()) <= set(model.classes.tolist())


class Tied(nn.Module):
    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.a = nn.Linear(n_features, n_outputs)
        self.b = nn.Linear(n_features, n_outputs)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.a(x) + self.b(x)


def test_tied_weights_are_saved(frame, folder):
    here = type("Here", (Tied,), {})
    model = make_model(
        frame, module=here, spec={"kind": "module", "kwargs": {}, **class_source(here)}
    )
    model.save(folder)
    np.testing.assert_array_equal(
        load_model(folder, module=here).predict(frame), model.predict(frame)
    )


def test_a_model_is_replaced_by_the_next_one_and_anything_else_is_left_unchanged(frame, saved):
    killed = scratch_folder(saved, prefix=".model")
    (killed.__enter__() / "model.json").write_text("half of it")
    make_model(frame, classes=None).save(saved)
    assert load_model(saved).classes is None
    killed.__exit__(None, None, None)
    assert sorted(p.name for p in saved.iterdir()) == ["model.json", "model.safetensors"]
    (other := saved.with_name("other")).mkdir()
    (other / "thesis.tex").write_text("precious")
    with refused(r"save\(folder='.*other'\) holds 'thesis.tex', which is not part"):
        make_model(frame).save(other)
    with refused(r"is a file. Choose another"):
        make_model(frame).save(other / "thesis.tex")
    assert [p.read_text() for p in other.iterdir()] == ["precious"]


def test_a_save_that_fails_leaves_the_old_model_or_one_that_is_found(frame, saved, monkeypatch):
    replace_file = os.replace

    def full(descriptor):
        raise OSError(28, "No space left on device")

    def killed(source, target):
        replace_file(source, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", full)
        make_model(frame, classes=None).save(saved)
    assert load_model(saved).classes.tolist() == ["no", "yes"] and len(list(saved.iterdir())) == 2
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        make_model(frame, classes=None).save(saved)
    with refused(r"model\.safetensors' is damaged: it does not fit the SHA-256 in model\.json"):
        load_model(saved)


class Odd(LogisticRegression):
    def get_extra_state(self):
        return {"a": 1}


def test_what_cannot_be_written_is_named_before_anything_is(frame, folder):
    of_json = "the model's spec or info holds .* cannot be stored"
    for content, words in (
        ({"spec": {"kind": "mlp", "kwargs": {"width": print}}}, of_json),
        ({"info": {"when": object()}}, of_json),
        (
            {"module": Odd(2, 2)},
            "Odd keeps '_extra_state', a dict, in its state. Only tensors can be saved",
        ),
    ):
        with refused(words):
            replace(make_model(frame), **content).save(folder)
    assert not folder.exists()


def test_a_missing_changed_or_cut_file_is_named(frame, folder):
    with pytest.raises(
        FileNotFoundError, match=r"there is no model folder '.*model'. Check the path"
    ):
        load_model(folder)
    for name in ("model.json", "model.safetensors"):
        make_model(frame).save(folder)
        (folder / name).unlink()
        with refused(rf"the model folder '.*' has no {re.escape(name)}\. Save the model again"):
            load_model(folder)
    make_model(frame).save(saved := folder)
    for name in ("model.json", "model.safetensors"):
        content = (saved / name).read_bytes()
        for place in range(0, len(content) - 2, len(content) // 40):
            flipped = bytearray(content)
            flipped[place] ^= 1
            for spoiled in (content[:place], flipped):
                (saved / name).write_bytes(spoiled)
                with refused(
                    rf"{re.escape(name)}' (is damaged: .* Restore it from a copy|has model format \d+, but this)"
                ):
                    load_model(saved)
        (saved / name).write_bytes(content)
    load_model(saved)
    path = saved / "model.json"
    path.write_text(path.read_text().replace('"version": 3', '"version": 4', 1))
    with refused(
        r"model\.json' has model format 4, but this gputune reads formats up to 3. Upgrade"
    ):
        load_model(saved)
    for other in (
        '{"format": "other"}',
        "[]",
        "3",
        "{}",
        '{"format": "gputune model", "version": "x"}',
    ):
        path.write_text(other)
        with refused(r"model\.json' is damaged: "):
            load_model(saved)


def put(key, value):
    return lambda body: body.__setitem__(key, value)


def sized(**kwargs):
    return lambda body: body["spec"]["kwargs"].update(kwargs)


DAMAGED = r"model\.json' is damaged: "
KEYS = "layout statistics classes dtype spec center target info".split()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *((methodcaller("pop", key), DAMAGED) for key in KEYS),
        (put("dtype", "float8"), DAMAGED),
        (put("layout", {"columns": [{"name": "x"}]}), DAMAGED),
        (put("statistics", [1]), DAMAGED),
        (put("spec", {"kind": "resnet", "kwargs": {}}), DAMAGED),
        (put("spec", {"kind": "module", "kwargs": {}}), DAMAGED),
        (put("spec", {"kind": "module", "kwargs": {}, "path": 3}), DAMAGED),
        (put("classes", {"torch": "os:system"}), DAMAGED),
        (sized(width=7), r"model\.safetensors' does not fit MLP: .*size mismatch"),
        (
            sized(width=-1),
            "MLP could not be built from the saved arguments .*width must be at least 1",
        ),
    ],
)
def test_a_description_that_makes_no_sense_is_named(saved, change, words):
    edit(saved, change)
    with refused(words):
        load_model(saved)


@pytest.mark.parametrize("write", [lambda o, f: pickle.dump(o, f), lambda o, f: torch.save(o, f)])
def test_nothing_is_unpickled(saved, tmp_path, write):
    canary = tmp_path / "unpickled"
    with (saved / "model.safetensors").open("wb") as file:
        write(Canary(canary), file)
    with refused("does not fit the SHA-256"):
        load_model(saved)
    digest = hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()
    edit(saved, put("tensors_sha256", digest))  # by someone who knows the format
    with refused(r"model\.safetensors' is damaged: it is not a safetensors file"):
        load_model(saved)
    (saved / "model.json").write_bytes(pickle.dumps(Canary(canary)))
    with refused(r"model\.json' is damaged"):
        load_model(saved)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary))).close()
    assert canary.exists()  # it would have sung


def test_a_users_class_is_found_again_and_a_change_of_its_file_is_reported(
    frame, folder, net, forget_code
):
    model = save_net(frame, net, folder)
    wanted = model.predict_proba(frame)
    np.testing.assert_array_equal(load_model(folder).predict_proba(frame), wanted)
    net_class = class_from_file(net, "Net")
    forget_code()
    net.write_text(NET + "# a word")
    words = r"net\.py', and loading it runs that code\. Import the class into this program, pass it"
    with pytest.raises(UntrustedCodeError, match=words):
        load_model(folder)
    fits = r"net\.py' has changed since the model was saved. Its parameters still fit, but its predictions may differ"
    with pytest.warns(UserWarning, match=fits):
        np.testing.assert_array_equal(
            load_model(folder, trust_code=True).predict_proba(frame), wanted
        )
    wider = NET.replace("nn.Linear(width", "nn.Linear(width, 3), act(), nn.Linear(3")
    unlike = {
        wider: "does not fit Net: .*",
        NET.replace("width", "size"): "Net could not be built from the saved .*",
    }
    for text, words in unlike.items():
        net.write_text(text)
        with refused(rf"{words}. '.*net\.py' has changed since .*\. Restore it, or pass the class"):
            load_model(folder, trust_code=True)
    net.unlink()
    with refused(r"net\.py', which does not exist. Check the path"):
        load_model(folder, trust_code=True)
    np.testing.assert_array_equal(load_model(folder, module=net_class).predict_proba(frame), wanted)


def test_a_relative_path_is_kept_as_a_full_one(frame, folder, net, monkeypatch):
    monkeypatch.chdir(net.parent)
    save_net(frame, "net.py", folder)
    monkeypatch.chdir("/")
    assert load_model(folder).spec["path"] == str(net)
    edit(
        folder,
        put("spec", {"kind": "module", "kwargs": {"dict": {}}, "import": "no_such_package:Net"}),
    )
    with refused(r"'no_such_package' cannot be imported .*. Make its package importable"):
        load_model(folder, trust_code=True)


@pytest.mark.parametrize(
    "place",
    [
        {"path": "{folder}/evil.py"},
        {"path": "evil.py"},
        {"path": "{folder}/../model/evil.py"},
        {"path": "/proc/self/cwd/evil.py"},
        {"import": "evil:Net"},
        {"import": "no_such_module:Net", "file": "evil.py"},
        {"import": "__main__:Evil", "file": "evil.py"},
    ],
)
def test_code_runs_only_when_that_is_said(frame, folder, net, place, monkeypatch, tmp_path):
    canary = tmp_path / "ran"
    save_net(frame, net, folder)
    evil = f"open({str(canary)!r}, 'w').close()\n{NET}\nEvil = Net\n"
    (folder / "evil.py").write_text(evil)
    source = {"class": "Net", "sha256": hashlib.sha256(evil.encode()).hexdigest()}
    source |= {key: text.format(folder=folder) for key, text in place.items()}
    kwargs = {"width": 6, "act": {"torch": "torch.nn:Tanh"}}
    edit(folder, put("spec", {"kind": "module", "kwargs": kwargs, **source}))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend("")  # as at a prompt, in a notebook
    words = r"evil.*', and loading it runs that .* or pass trust_code=True"
    with pytest.raises(UntrustedCodeError, match=words):
        load_model(".")
    net_class = class_from_file(net, "Net")
    model = load_model(".", module=net_class)
    model.save(tmp_path / "again")  # keeps where this class lies, and trusts no other
    assert load_model(tmp_path / "again").spec["path"] == str(net)
    with pytest.raises(UntrustedCodeError):
        load_model(".")
    assert not canary.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the digest of a file is not that of a class
        assert type(load_model(".", trust_code=True).module).__name__ == "Net"
    assert canary.exists()
    sys.modules.pop("evil", None)


def test_a_class_of_a_script_or_notebook_is_found_there(
    frame, folder, monkeypatch, tmp_path, forget_code
):
    main = types.ModuleType("__main__")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "__main__", main)
        exec(NET, main.__dict__)
        net_class = main.Net
        spec = {"kind": "module", "kwargs": {}, **class_source(net_class)}
        model = make_model(frame, module=net_class, spec=spec)
        model.save(folder)
        np.testing.assert_array_equal(load_model(folder).predict(frame), model.predict(frame))
        main.__file__ = str(tmp_path / "train.py")
        (tmp_path / "train.py").write_text(NET)
        model.save(folder.with_name("of-script"))
    forget_code()
    with pytest.raises(UntrustedCodeError, match=r"the script, notebook or prompt of its training"):
        load_model(folder)
    with pytest.raises(UntrustedCodeError, match=r"'.*train\.py', and loading it runs that code"):
        load_model(folder.with_name("of-script"))
    for how in ({"trust_code": True}, {"module": net_class}):
        loaded = load_model(folder.with_name("of-script"), **how)
        np.testing.assert_array_equal(loaded.predict(frame), model.predict(frame))


def test_the_module_argument_is_checked(frame, saved, folder, net):
    with refused(
        r"load_model\(module=...\) must be left out, because '.*' holds the built-in 'mlp'"
    ):
        load_model(folder, module=LogisticRegression)
    shutil.rmtree(folder)
    save_net(frame, net, folder)
    for odd in (nn.Linear(1, 1), int, "Net"):
        with refused(r"must be a subclass of torch\.nn\.Module, got"):
            load_model(folder, module=odd)
    with refused(
        r"LogisticRegression could not be built .* is not an argument of .* Pass the class as it was"
    ):
        load_model(folder, module=LogisticRegression)
