"""TensorBoard, MLflow and Weights & Biases, each with the real package."""

import json
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
from sklearn.datasets import load_iris
from torch import nn

import gputune
from gputune.callbacks import MLflow, TensorBoard, WandB
from gputune.ground.errors import MissingExtraError
from gputune.integrations.logged_values import plain_params, trial_numbers
from study_rows import candidates, result

X, Y = load_iris(return_X_y=True)
SPACE = {"lr": [1e-3, 1e-2, 3e-2], "activation": ["relu", "tanh"], "width": 8}
FAST = {
    "max_epochs": 3,
    "cv": 3,
    "verbose": 0,
    "workers": 1,
    "n_trials": 5,
    "space": SPACE,
    "include_default": False,
}


def tune(callback, **options):
    return gputune.tune("mlp", X, Y, callbacks=[callback], **{**FAST, **options})


def test_values_as_loggers_take_them():
    params = {"lr": 0.1, "act": nn.ReLU, "none": None, "flag": True, "word": "relu"}
    assert plain_params(params) == params | {
        "act": "torch.nn.modules.activation.ReLU",
        "none": "None",
    }
    rows = list(zip(candidates([0]), [result(0, state="failed", score=np.nan)]))
    (trial,) = gputune.Study.from_rows({}, rows).trials
    numbers = trial_numbers(trial)
    assert (
        "score" not in numbers
        and numbers["params/lr"] == 0.1
        and "params/activation" not in numbers
    )
    several = trial_numbers(replace(trial, metrics={"f1": (0.5, 0.75), "roc_auc": (np.nan, 1.0)}))
    assert several == {**numbers, "metrics/f1": 0.625}


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():  # its own parts warn of each other
        warnings.simplefilter("ignore", DeprecationWarning)
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        study = tune(TensorBoard(tmp_path), scoring=["accuracy", "neg_log_loss"])
        for trial, curve, losses in zip(
            study.trials, study.curves, study.curves_of("neg_log_loss")
        ):
            events = EventAccumulator(str(tmp_path / f"trial-{trial.number:05d}")).Reload()
            assert [e.step for e in events.Scalars("score")] == [1, 2, 3]
            for name, values, last in (
                ("score", curve, trial.score),
                ("metrics/neg_log_loss", losses, trial.scores["neg_log_loss"]),
            ):
                np.testing.assert_allclose(
                    [e.value for e in events.Scalars(name)], values.mean(1), rtol=1e-6
                )
                assert events.Scalars(f"final {name}")[0].value == pytest.approx(last)
            summary = events.summary_metadata.items()
            (start,) = (
                one.plugin_data.content
                for tag, one in summary
                if tag == "_hparams_/session_start_info"
            )
            assert trial.params["activation"].encode() in start and b"lr" in start
        best = EventAccumulator(str(tmp_path / "search")).Reload().Scalars("best score")
        assert best[-1].step == 15 and best[-1].value == pytest.approx(study.best_score)
        assert [e.value for e in best] == sorted(e.value for e in best)


def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    sent = []
    batches = []
    whole = mlflow.MlflowClient.log_batch

    def counted(client, run_id, metrics=(), **more):
        sent.append(len(metrics))
        return whole(client, run_id, metrics=metrics, **more)

    class Counting(MLflow):
        def on_trials_end(self, trials):
            batches.append(len(trials.trials))
            super().on_trials_end(trials)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", counted)
    with warnings.catch_warnings():  # of SQLAlchemy and of MLflow's own parts
        warnings.simplefilter("ignore")
        scoring = {"accuracy": "accuracy", "f1 (mean)": "f1_macro"}
        study = tune(Counting("iris", tracking_uri=uri, run_name="first"), scoring=scoring)
        # the options, each batch, the best
        assert len(sent) == 2 + len(batches) and sum(batches) == 5
        client = mlflow.MlflowClient(tracking_uri=uri)
        (run,) = client.search_runs([client.get_experiment_by_name("iris").experiment_id])
        assert run.info.status == "FINISHED" and run.info.run_name == "first"
        assert run.data.params["model"] == "mlp" and run.data.params["best/trial"] == str(
            study.best_trial.number
        )
        assert run.data.params["best/lr"] == str(study.best_params["lr"])
        assert run.data.metrics["best_score"] == study.best_score
        for name, value in (
            ("score", lambda trial: trial.score),
            # MLflow takes no brackets
            ("metrics/f1 _mean_", lambda trial: trial.scores["f1 (mean)"]),
            ("params/lr", lambda trial: trial.params["lr"]),
        ):
            history = {m.step: m.value for m in client.get_metric_history(run.info.run_id, name)}
            assert history == {trial.number: value(trial) for trial in study.trials}
        # Many trials at once are few requests, within what a server takes.
        sent.clear()
        callback = MLflow("iris", tracking_uri=uri)
        rows = list(zip(candidates(range(400)), map(result, range(400))))
        many = gputune.Study.from_rows({"model": "mlp"}, rows)
        callback.on_study_start(many)
        callback.on_trials_end(many)
        assert sent[1:] == [1000, 1000, 401]
        # one that waits
        callback.on_study_end(gputune.Study.from_rows({}, [*rows, (candidates([400])[0], None)]))
        assert client.get_run(callback.run_id).info.status == "KILLED"


def records_of(path):
    """Yield the records of a .wandb file: a header of 7 bytes, then LevelDB's log, in blocks of 32
    KiB."""
    raw = path.read_bytes()
    at = 7
    record = b""
    while at + 7 <= len(raw):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length = int.from_bytes(raw[at + 4 : at + 6], "little")
        kind = raw[at + 6]
        record += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with warnings.catch_warnings():  # of its own parts
        warnings.simplefilter("ignore")
        study = tune(
            WandB("iris", name="first", folder=tmp_path), scoring=["accuracy", "neg_log_loss"]
        )
        wandb.teardown()  # the end of a process: what W&B's own process holds is written

    def values(items):
        return {
            item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items
        }

    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = {}
    config = {}
    summary = {}
    for record in map(wandb_internal_pb2.Record.FromString, records_of(path)):
        if row := values(record.history.item):
            rows[row["trial"]] = row
        config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        summary |= values(record.summary.update)
    assert config["model"] == "mlp" and config["folds"] == 3
    assert rows.keys() == {trial.number for trial in study.trials}
    for trial in study.trials:
        row = rows[trial.number]
        assert (row["score"], row["params/activation"]) == (trial.score, trial.params["activation"])
        assert row["metrics/neg_log_loss"] == trial.scores["neg_log_loss"]
    assert max(row["best_score"] for row in rows.values()) == study.best_score
    assert summary["best_trial"] == study.best_trial.number


def records_by_run(folder):
    """Return the run records and the history rows of all offline runs: name -> (run, rows)."""
    from wandb.proto import wandb_internal_pb2

    runs = {}
    for path in folder.glob("wandb/offline-run-*/*.wandb"):
        rows = []
        run = None
        for record in map(wandb_internal_pb2.Record.FromString, records_of(path)):
            if record.WhichOneof("record_type") == "run":
                run = record.run
            if record.history.item:
                rows.append(
                    {
                        item.key or "/".join(item.nested_key): json.loads(item.value_json)
                        for item in record.history.item
                    }
                )
        runs[run.display_name] = (run, rows)
    return runs


def test_weights_and_biases_with_a_run_for_each_trial(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = WandB(
        "iris",
        name="search",
        folder=tmp_path,
        entity="team",
        tags=["nightly", "iris"],
        per_trial=True,
    )
    with warnings.catch_warnings():  # of its own parts
        warnings.simplefilter("ignore")
        study = tune(logger, n_trials=2)
        wandb.teardown()
    runs = records_by_run(tmp_path)
    assert runs.keys() == {"search", "trial-00000", "trial-00001"}
    for run, _ in runs.values():
        assert (run.project, run.entity, run.run_group) == ("iris", "team", "search")
        assert list(run.tags) == ["nightly", "iris"]
    assert runs["search"][0].job_type == "search"
    for trial, curve in zip(study.trials, study.curves):
        run, rows = runs[f"trial-{trial.number:05d}"]
        assert run.job_type == "trial"
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert config["lr"] == trial.params["lr"]
        assert [row["_step"] for row in rows] == [1, 2, 3]
        np.testing.assert_allclose([row["score"] for row in rows], curve.mean(1))


@pytest.mark.parametrize(
    ("argument", "variable", "mode"),
    [
        (None, None, "offline"),
        (None, "online", None),  # W&B reads the variable itself
        (None, "disabled", None),
        ("online", "disabled", "online"),
    ],
)
def test_the_mode_of_weights_and_biases(argument, variable, mode, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    begun = []
    monkeypatch.setattr(wandb, "init", lambda **options: begun.append(options))
    WandB(mode=argument, group="g").on_study_start(gputune.Study.from_rows({}, []))
    assert (begun[0]["mode"], begun[0]["group"], begun[0]["tags"]) == (mode, "g", None)


def test_disabled_weights_and_biases_writes_nothing(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(tmp_path)
    assert len(tune(WandB("iris", per_trial=True), n_trials=2).trials) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_mlflow_with_a_run_for_each_trial(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger = MLflow("iris", tracking_uri=uri, tags={"team": "a"}, per_trial=True)
        study = tune(logger, n_trials=2)
        client = mlflow.MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name("iris").experiment_id
        runs = {run.info.run_name: run for run in client.search_runs([experiment])}
        assert len(runs) == 3
        for trial, curve in zip(study.trials, study.curves):
            run = runs[f"trial-{trial.number:05d}"]
            assert run.data.tags["mlflow.parentRunId"] == logger.run_id
            assert run.data.tags["team"] == "a" and run.info.status == "FINISHED"
            assert run.data.params["lr"] == str(trial.params["lr"])
            history = client.get_metric_history(run.info.run_id, "score")
            assert {m.step: m.value for m in history} == pytest.approx(
                dict(enumerate(curve.mean(1).tolist(), start=1))
            )
        assert client.get_run(logger.run_id).data.tags["team"] == "a"


def test_tensorboard_without_runs_of_trials(tmp_path):
    pytest.importorskip("tensorboard")
    tune(TensorBoard(tmp_path, per_trial=False), n_trials=2)
    assert [folder.name for folder in tmp_path.iterdir()] == ["search"]


@pytest.mark.parametrize(
    ("package", "make"),
    [("tensorboard", lambda: TensorBoard("runs")), ("mlflow", MLflow), ("wandb", WandB)],
)
def test_a_missing_extra(package, make, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf'needs {package}.*pip install "\.\[{package}\]"'):
        make()
