"""A new integration is one file, in the folder of its kind: these toys need no other change."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import loguniform

import gputune
from gputune.cli.flags import CommandLine, option_groups
from gputune.ground.entry_points import integrations
from gputune.ground.errors import Reference
from gputune.tuning.record import recorded_search
from gputune.tuning.rules import COMPUTE

TOYS = Path(__file__).parent / "toys"
X = np.random.default_rng(0).normal(size=(60, 2))
Y = (X[:, 0] > 0).astype(int)
FAST = {"max_epochs": 3, "cv": 2, "verbose": 0, "random_state": 0}


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """Put the toys among the integrations, as if their files were in the folders of gputune."""
    for folder in TOYS.iterdir():
        package = importlib.import_module(f"gputune.integrations.{folder.name}")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A file with rows, because a search of rows in memory cannot resume from its study file."""
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    rows = [f"{first:.3f},{second:.3f},{label}" for (first, second), label in zip(X, Y)]
    path.write_text("\n".join(["first,second,label", *rows]))
    return path


def search(rows=X, target=Y, **options):
    return gputune.tune("mlp", rows, target, **{**FAST, "n_trials": 4, **options})


def toy_cluster():
    return importlib.import_module("gputune.integrations.clusters.toy")


def test_the_folder_lists_what_there_is():
    assert integrations("clusters") == ["ray", "toy"]
    assert integrations("exports") == ["onnx", "pt2", "txt"]
    assert integrations("loggers") == ["mlflow", "notes", "tensorboard", "wandb"]
    assert integrations("modules") == ["lightning", "pytorch_lightning"]
    assert integrations("studies") == ["optuna"]


def test_a_cluster_in_one_file_trains_a_search(table, tmp_path):
    toy_cluster().TRAINED.clear()
    path = tmp_path / "study.db"
    space = {"lr": loguniform(1e-3, 0.1), "width": [4, 8]}
    there = search(table, "label", workers="toy", space=space, study=path)
    trained = sorted(number for chunk in toy_cluster().TRAINED for number in chunk)
    assert trained == [0, 1, 2, 3]
    here = search(table, "label", workers=1, space=space)
    assert np.array_equal(there.curves, here.curves)
    # the study file names the cluster, so that a search resumes there
    again = recorded_search(path, there.record, {})
    assert again.options.machine.workers == toy_cluster().Toy()


def test_a_cluster_in_one_file_has_its_own_checks_and_messages():
    with pytest.raises(gputune.InputError, match=r"device must be 'cpu' on the toy cluster"):
        search(workers="toy", device="cuda")
    with pytest.raises(gputune.InputError, match=r"workers='toy' is only for gputune.tune"):
        gputune.search(
            lambda params, report: 0.0, {"lr": [0.1]}, direction="minimize", workers="toy"
        )
    with pytest.raises(gputune.InputError, match=r"workers='toy' is not for the logistic"):
        gputune.tune("logistic", X, Y, workers="toy", **FAST)
    message = r"workers must be a number of processes, 'auto', 'ray', 'toy' or gputune.Ray\(...\)"
    with pytest.raises(gputune.InputError, match=message):
        search(workers="toys")


def test_a_cluster_in_one_file_has_a_flag(table, tmp_path):
    rule = option_groups()[COMPUTE]["toy"]
    assert rule.help == "Train on a Toy cluster"
    assert rule.details == "Without an address, the cluster is local."
    interface = CommandLine()
    assert interface.argument(Reference.parse("workers='toy'")) == "--toy"
    assert interface.argument(Reference.parse("Toy(address='a')")) == "--toy a"


def test_an_unknown_cluster_in_a_study_file(table, tmp_path):
    path = tmp_path / "study.db"
    study = search(table, "label", study=path, n_trials=1)
    study.record.arguments.kept["workers"] = {"cluster": "os", "address": "local"}
    with pytest.raises(gputune.InputError, match=r"has no cluster 'os', only ray, toy. Add its"):
        recorded_search(path, study.record, {})
    study.record.arguments.kept["workers"] = {"cluster": "toy", "address": "toys:1"}
    with pytest.raises(gputune.UntrustedCodeError, match="names the Toy cluster 'toys:1'"):
        recorded_search(path, study.record, {})


def test_a_format_in_one_file_exports_a_model(tmp_path):
    model = search(n_trials=1).best_model()
    model.export(tmp_path / "model.txt")
    written = json.loads((tmp_path / "model.txt").read_text())
    assert (written["format"], written["module"]) == ("gputune export", "MLP")
    assert written["outputs"] == ["label", "probabilities"]
    with pytest.raises(gputune.InputError, match=r"must end in \.onnx, \.pt2 or \.txt\."):
        model.export(tmp_path / "model.doc")


def test_a_logger_in_one_file_receives_the_trials():
    logger = gputune.callbacks.Notes()
    study = search(n_trials=3, callbacks=[logger])
    assert sorted(logger.scores) == sorted(trial.score for trial in study.trials)
    with pytest.raises(AttributeError, match=r"'gputune.callbacks' has no attribute 'Note'"):
        gputune.callbacks.Note  # noqa: B018
