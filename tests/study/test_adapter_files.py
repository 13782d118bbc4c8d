"""A saved LoRA: the trained part, a digest of the base, and an adapter in PEFT's format."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import gputune


class Base(nn.Module):
    def __init__(self, shift=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(5, 24)
        self.inner = nn.Linear(24, 24)
        self.head = nn.Linear(24, 2)
        self.inner.weight.data += shift

    def forward(self, x):
        return self.head(self.inner(self.enter(x).tanh()).relu())


X = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


@pytest.fixture(scope="module")
def model():
    builder = gputune.lora(Base(), targets=["enter", "inner"], modules_to_save=["head"])
    space = {"rank": [3], "alpha": [6], "lr": [1e-2], "batch_size": [8]}
    words = {"n_trials": 1, "max_epochs": 2, "cv": 2, "verbose": 0}
    return gputune.tune(builder, X, Y, space=space, **words).best_model()


def refused(*words):
    return pytest.raises(gputune.InputError, match=".*".join(map(re.escape, words)))


def test_a_saved_lora_has_only_the_trained_part_and_checks_its_base(model, tmp_path):
    folder = tmp_path / "model"
    model.save(folder)
    names = set(load_file(folder / "model.safetensors"))
    assert "module.inner.A" in names and "module.head.weight" in names
    assert not any(name.endswith(("enter.base.weight", "inner.base.weight")) for name in names)
    loaded = gputune.load_model(folder, base=Base())
    expected = model.predict_proba(X.numpy())
    assert (loaded.predict_proba(X.numpy()) == expected).all()
    with refused("needs the pretrained base of this LoRA", "base=...) with the base."):
        gputune.load_model(folder)
    with refused("load_model(base=...)", "has other weights", "Pass the pretrained module"):
        gputune.load_model(folder, base=Base(shift=1e-6))


def test_an_adapter_in_the_format_of_peft_gives_the_same_outputs(model, tmp_path):
    model.save_adapter(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 3 and config["lora_alpha"] == pytest.approx(6)
    assert config["target_modules"] == ["enter", "inner"] and config["modules_to_save"] == ["head"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    base = Base()
    with torch.no_grad():
        for name in ("enter", "inner"):
            A = tensors[f"base_model.model.{name}.lora_A.weight"]
            B = tensors[f"base_model.model.{name}.lora_B.weight"]
            assert len(A) == B.shape[1] == 3  # without the padding
            base.get_submodule(name).weight += config["lora_alpha"] / config["r"] * B @ A
        base.head.weight.copy_(tensors["base_model.model.head.weight"])
        base.head.bias.copy_(tensors["base_model.model.head.bias"])
        assert torch.allclose(base(X), model.module(X), atol=1e-5)


def test_other_models_have_no_adapter_and_no_base(tmp_path):
    words = {"n_trials": 1, "max_epochs": 1, "cv": 2, "verbose": 0}
    model = gputune.tune("mlp", X.numpy(), Y.numpy(), **words).best_model()
    with refused("A MLP has no adapter", "Search gputune.lora(base)"):
        model.save_adapter(tmp_path)
    model.save(tmp_path / "model")
    with refused("load_model(base=...)", "is only for a model of gputune.lora", "Leave it out."):
        gputune.load_model(tmp_path / "model", base=Base())


def test_an_adapter_of_scaled_inputs_warns(tmp_path, recwarn):
    words = {"n_trials": 1, "max_epochs": 1, "cv": 2, "verbose": 0, "space": {"lr": [1e-2]}}
    builder = gputune.lora(Base(), targets=["inner"])
    for X_given, scales in ((X, ("standard",)), (X[:, None], ("standard",)), (X, ("auto", "none"))):
        base = builder if X_given is X else gputune.lora(nn.Sequential(nn.Flatten(), Base()))
        for numbers in scales:
            scaled = gputune.tune(base, X_given, Y, numbers=numbers, **words).best_model()
            recwarn.clear()
            scaled.save_adapter(tmp_path)
            messages = [str(w.message) for w in recwarn if w.category is gputune.InputWarning]
            if numbers == "standard":
                (message,) = messages
                assert "expects inputs as gputune scaled them" in message
                assert "Search again with numbers='none'" in message
            else:
                assert not messages
