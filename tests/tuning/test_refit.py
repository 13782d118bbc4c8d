"""A refit from a file trains as one from memory does, on what this machine has of what the search had."""

import numpy as np
import pandas
import pytest
import torch
from sklearn.datasets import load_iris

import gputune
from gputune.study.record import Arguments, SearchRecord
from gputune.tuning import refit
from gputune.tuning.choices import recorded_model


def machine(monkeypatch, *devices, **kept):
    def choose(device):
        if device == "auto":
            return torch.device(devices[-1])
        if device not in devices:
            raise gputune.InputError("no such device")
        return torch.device(device)

    monkeypatch.setattr(refit, "choose_device", choose)
    record = SearchRecord(dtype="float32", arguments=Arguments(kept=kept))
    return tuple(refit._machine(record).values())


@pytest.mark.parametrize(
    ("devices", "kept", "expected"),
    [
        (["cpu"], {}, ("auto", "auto", False, 1)),
        (["cpu"], {"device": "cpu", "backend": "eager", "workers": 4}, ("cpu", "eager", False, 1)),
        (["cpu", "cuda"], {"device": "cuda", "backend": "graph", "tf32": True}, ("cuda", "graph", True, 1)),
        (["cpu"], {"device": "cuda", "backend": "graph", "tf32": True}, ("auto", "graph", False, 1)),
        (["cpu"], {"device": "cuda", "backend": "kernel"}, ("auto", "auto", False, 1)),
        (["cpu", "cuda"], {"device": "cpu", "backend": "eager", "workers": {"address": "auto", "cpus": 1}},
         ("auto", "eager", False, 1)),
    ],
)  # fmt: skip
def test_what_the_machine_has_is_kept(monkeypatch, devices, kept, expected):
    assert machine(monkeypatch, *devices, **kept) == expected


def test_a_refit_from_a_file_trains_as_one_from_memory(tmp_path, monkeypatch):
    iris = load_iris(return_X_y=True)
    how = {"backend": "eager", "device": "cpu", "numbers": "quantile", "schedule": "cosine", "max_epochs": 2}
    study = gputune.tune("mlp", *iris, study=tmp_path / "study.db", n_trials=1, cv=2, verbose=0, workers=1, **how)
    trained = []
    choose = refit.choose_backend
    monkeypatch.setattr(refit, "choose_backend", lambda word, *where: trained.append(word) or choose(word, *where))
    models = [study.best_model(), gputune.Study.open(study.file).best_model(*iris)]
    assert set(trained) == {"eager"}
    first, second = (dict(model.module.named_parameters()) for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_optimizer_of_a_later_version_is_refused_by_name():
    with pytest.raises(gputune.InputError, match="searched with optimizer='adamx', which this gputune does not have"):
        recorded_model({"kind": "mlp"}, "adamx", trust_code=False)


def test_a_file_with_the_target_and_what_was_left_out_predicts_without_a_warning():
    x = np.random.default_rng(0).normal(size=30)
    frame = pandas.DataFrame({"x": x, "one": 1, "id": [f"id {i}" for i in range(30)], "price": 2 * x + 0.5})
    study = gputune.tune(
        "mlp", frame.drop(columns="price"), frame["price"], n_trials=1, max_epochs=1, cv=2, workers=1, verbose=0
    )
    assert study.best_model().predict(frame).shape == (30,)
