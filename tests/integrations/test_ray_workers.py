"""A search on a Ray cluster of two workers is the search of one machine, bit for bit, whatever the
workers do."""

import importlib
import os
import pickle
import signal
import sys
import warnings
from types import SimpleNamespace
from unittest import mock

import numpy as np
import optuna
import pytest
import torch
from scipy.stats import loguniform

import gputune
import ray_searches
from gputune.engine.job import Job
from gputune.executors import executor
from gputune.executors.processes import pickle_job
from gputune.integrations import ray_tasks
from problems import make_data
from ray_searches import Net
from refused import refused
from study_processes import done, table
from test_docs import ROOT, run_blocks

ray = pytest.importorskip("ray", reason='Ray is not installed: pip install ".[ray]"')

PAGE = ROOT / "docs" / "cluster.md"
LR = {"lr": loguniform(1e-3, 0.1)}
FAST = {"max_epochs": 4, "cv": 3, "verbose": 0, "n_trials": 6}
SAMPLER = gputune.OptunaSampler(optuna.samplers.RandomSampler(seed=0), batch=3)
FEW_STEPS = {"space": {**LR, "batch_size": [64], "width": [4]}, "include_default": False}
# So little memory makes every trial a chunk of its own.
MODULE = {
    **FAST,
    "space": {**LR, "module__hidden": [4, 6]},
    "memory": 1024,
    "include_default": False,
}


@pytest.fixture(scope="module")
def cluster():
    """Connect to a cluster of two workers, which tune() then uses."""
    ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def rows(study):
    """Every trial but its seconds, in a form that compares bits."""
    trials = [
        (t.number, t.params, t.origin, t.state, t.best_epoch, t.fold_scores) for t in study.trials
    ]
    return repr(trials), study.curves.tobytes()


@pytest.mark.parametrize(
    "arguments",
    [
        {"space": {**LR, "width": [4, 8]}, "cv": 2},
        {"space": LR, "method": gputune.Halving(min_epochs=1), "n_trials": 12},
        pytest.param(
            {"space": {"lr": [1e-3, 1e-2, 0.1]}, "method": gputune.Median(every=1, min_epochs=1)},
            marks=pytest.mark.long,
        ),
        {"space": LR, "method": SAMPLER},
        pytest.param(
            {"space": LR, "method": gputune.Hypergradient(outer_steps=1), "n_trials": 3},
            marks=pytest.mark.long,
        ),
        # By default a killed worker's module and a deadline's scorer travel.
        pytest.param(
            {**MODULE, "model": Net, "scoring": ray_searches.share_right}, marks=pytest.mark.long
        ),
    ],
    ids=[
        "random",
        "halving",
        "median",
        "sampler",
        "hypergradient",
        "a module and a scorer, which travel as code",
    ],
)
def test_a_cluster_gives_the_table_of_one_machine(cluster, iris, arguments):
    X, y = iris
    given = {"model": "mlp", **FAST, **arguments}
    here, there = (gputune.tune(X=X, y=y, workers=workers, **given) for workers in (1, "ray"))
    assert rows(there) == rows(here) and there.meta["device"] == "cpu"
    assert there.best_model().predict(X).shape == (150,)


def test_the_page_of_the_cluster(cluster, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_blocks(PAGE, capsys)


def test_the_data_goes_to_the_store_once_and_threads_are_the_cpus(
    cluster, iris, monkeypatch, capsys
):
    sent = []
    threads = []
    put = ray_tasks.to_arrays
    submit = ray_tasks.RayTasks.submit
    monkeypatch.setattr(ray_tasks, "to_arrays", lambda data: sent.append(data) or put(data))

    def submitted(tasks, *chunk):
        threads.append(tasks.threads)
        return submit(tasks, *chunk)

    monkeypatch.setattr(ray_tasks.RayTasks, "submit", submitted)
    workers = gputune.Ray("auto", cpus=2)
    # Few steps: two threads that wait for each other on cores that something else keeps busy take
    # long for many.
    given = {**FAST, **FEW_STEPS, "max_epochs": 2, "n_trials": 6, "verbose": 1}
    gputune.tune(
        "mlp", *iris, method=gputune.Halving(min_epochs=1, factor=2), workers=workers, **given
    )
    assert len(sent) == 1 and set(threads) == {2}
    assert "on 1 Ray worker, compiled;" in capsys.readouterr().err


@pytest.fixture
def orders(tmp_path, monkeypatch):
    """Return the folder of orders to workers."""
    folder = tmp_path / "orders"
    folder.mkdir()
    monkeypatch.setitem(ray_searches.ORDERS, "folder", str(folder))
    return folder


def test_a_killed_worker_loses_nothing_and_doubles_nothing(cluster, iris, tmp_path, orders):
    gputune.tune(Net, *iris, workers=1, study=tmp_path / "here.db", **MODULE)
    (orders / "once").touch()
    with pytest.warns(
        UserWarning, match="a Ray worker was lost while it trained 1 trial, which another"
    ):
        gputune.tune(Net, *iris, workers="ray", study=tmp_path / "there.db", **MODULE)
    assert not (orders / "once").exists()
    assert table(tmp_path / "there.db") == table(tmp_path / "here.db")
    assert done(tmp_path / "there.db") == 6


# each loss is a process that imports torch; tests/executors/test_workers.py has one of this machine
@pytest.mark.long
def test_a_chunk_that_ends_every_worker_is_given_up_and_nothing_else_is_lost(
    cluster, iris, tmp_path, orders, monkeypatch
):
    monkeypatch.setattr(executor, "MAX_LOST_WORKERS", 2)
    given = {**MODULE, "space": {**LR, "module__hidden": [4]}, "include": [{"module__hidden": 6}]}
    gputune.tune(Net, *iris, workers=1, study=tmp_path / "here.db", **given)
    (orders / "always").touch()
    path = tmp_path / "there.db"
    message = "have lost 2 workers one after the other, .* smaller memory"
    with warnings.catch_warnings(), pytest.raises(gputune.ClusterError, match=message):
        warnings.simplefilter("ignore", UserWarning)
        gputune.tune(Net, *iris, workers="ray", study=path, **given)
    small = [t.number for t in gputune.Study.open(path).trials if t.params["module__hidden"] == 4]
    assert len(small) == 6
    assert [t.number for t in gputune.Study.open(path).trials if t.state == "complete"] == small
    (orders / "always").unlink()
    gputune.tune(Net, *iris, workers="ray", study=path, **given)
    assert table(path) == table(tmp_path / "here.db")


def test_a_deadline_stops_the_workers_and_a_later_call_continues(cluster, iris, tmp_path):
    # No trial ends within the time. How many begin depends on whether the workers are warm.
    given = {
        **FAST,
        "space": LR,
        "study": tmp_path / "study.db",
        "max_epochs": 100_000,
        "memory": 1024,
    }
    study = gputune.tune("mlp", *iris, workers="ray", timeout=1.0, **given)
    states = [trial.state for trial in study.trials]
    assert "stopped" in states and set(states) <= {"stopped", "waiting"}
    with pytest.raises(ValueError, match="no score for such rows"):
        gputune.tune("mlp", *iris, workers="ray", **{**FAST, "scoring": ray_searches.fails_there})


class CtrlC(gputune.callbacks.Callback):
    """Ctrl-C when the first trial is finished."""

    def on_trials_end(self, trials):
        """Send the signal."""
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    "method",
    [gputune.Halving(min_epochs=1), pytest.param("random", marks=pytest.mark.long)],
    ids=["halving", "random"],
)
def test_ctrl_c_ends_the_tasks_and_the_same_call_continues(
    cluster, iris, tmp_path, monkeypatch, method
):
    sent = []
    monkeypatch.setattr(
        ray_tasks, "pickle_job", lambda job, **how: sent.append(job) or pickle_job(job, **how)
    )
    path = tmp_path / "study.db"
    given = {**FAST, "space": LR, "n_trials": 12, "method": method}
    given |= {"memory": 1024, "checkpoint_seconds": 1e-9}
    with pytest.raises(
        gputune.SearchInterrupted, match="interrupted: .* of 12 trials are finished"
    ):
        gputune.tune("mlp", *iris, workers="ray", study=path, callbacks=[CtrlC()], **given)
    assert done(path) < 12
    gputune.tune("mlp", *iris, workers="ray", study=path, **given)
    gputune.tune("mlp", *iris, workers=1, study=tmp_path / "here.db", **given)
    assert table(path) == table(tmp_path / "here.db")
    # Workers keep no checkpoints: a folder beside the study is none of theirs.
    assert {job.checkpointing for job in sent} == {None}


def test_memory_that_runs_out_in_a_worker_halves_the_chunk(cluster, iris, orders, monkeypatch):
    parts = []
    end = executor.Queue._end_chunk
    monkeypatch.setattr(
        executor.Queue, "_end_chunk", lambda queue, c, o: parts.append(len(o)) or end(queue, c, o)
    )
    # One task at a time, so that the plan keeps the trials together.
    given = {**MODULE, "memory": None, "workers": gputune.Ray(cpus=2), "max_epochs": 3, "cv": 2}
    given["space"] = {**LR, "module__hidden": [6], "batch_size": [10]}
    whole = gputune.tune(Net, *iris, **given)
    (orders / "full once").touch()
    halved = gputune.tune(Net, *iris, **given)
    assert parts == [1, 2] and not (orders / "full once").exists()
    np.testing.assert_allclose(halved.curves, whole.curves, rtol=0, atol=1e-4)


def test_a_trial_that_fits_no_worker_fails_by_itself(cluster, iris, orders):
    (orders / "full").touch()
    study = gputune.tune(Net, *iris, workers="ray", **MODULE)
    assert {t.state for t in study.trials if t.params["module__hidden"] == 4} == {"complete"}
    large = [t for t in study.trials if t.params["module__hidden"] == 6]
    assert {(t.state, t.detail["reason"]) for t in large} == {("failed", "out of memory: no room")}


@pytest.mark.cpu  # workers that load the simulated device find all of this folder
def test_what_a_worker_cannot_import_is_named(cluster, iris):
    message = "A Ray worker has no module 'problems', which your module or scorer imports"
    with refused(message):
        gputune.tune(
            "mlp", *iris, workers="ray", **{**FAST, "scoring": ray_searches.lacks_a_module}
        )


@pytest.fixture
def begun(iris, tmp_path):
    """Return a call that goes on with a study on the cluster, and the table that must stay."""
    path = tmp_path / "study.db"
    gputune.tune("mlp", *iris, study=path, space=LR, workers=1, **{**FAST, "n_trials": 2})

    def go_on(**more):
        return gputune.tune(
            "mlp", *iris, study=path, space=LR, **{**FAST, "workers": "ray", **more}
        )

    return go_on, path


def test_a_worker_with_another_version_is_named(cluster, begun, monkeypatch):
    go_on, path = begun
    before = table(path)
    monkeypatch.setattr(ray_tasks, "__version__", "9.9.9")
    with refused(
        f"on .* has gputune {gputune.__version__}, but this process has gputune 9.9.9. Install"
    ):
        go_on()
    monkeypatch.undo()
    torch_here = torch.__version__.partition("+")[0]
    monkeypatch.setattr(torch, "__version__", "9.8.7+cu999")
    with refused(f"has torch {torch_here}, but this process has torch 9.8.7. Install"):
        go_on()
    assert table(path)[: len(before)] == before
    monkeypatch.undo()
    assert [trial.state for trial in go_on().trials] == ["complete"] * 6


def test_a_worker_without_the_package_is_named(cluster, begun, monkeypatch):
    """The sent code is read and run by a worker in which importing the package fails."""
    go_on, path = begun
    before = table(path)
    make = ray_tasks.make_task

    def make_bare(ray):
        sent = ray.cloudpickle.dumps(make(SimpleNamespace(remote=lambda task: task)))

        def bare(*arguments):
            missing = {
                name: None
                for name in ("gputune", *sys.modules)
                if name.partition(".")[0] == "gputune"
            }
            with mock.patch.dict(sys.modules, missing):
                return pickle.loads(sent)(*arguments)

        return ray.remote(bare)

    monkeypatch.setattr(ray_tasks, "make_task", make_bare)
    with refused("has no gputune, but this process has gputune .*. Install gputune=="):
        go_on()
    assert table(path)[: len(before)] == before


def test_a_cluster_without_nodes_ends_the_search(cluster, begun, monkeypatch):
    go_on, _ = begun
    nodes = ray_tasks.RayCluster._nodes
    asked = []
    # at once, while its tasks are on their way
    monkeypatch.setattr(ray_tasks, "_COUNT_SECONDS", -1)

    def lost(cluster):
        asked.append(1)
        return nodes(cluster) if len(asked) < 5 else []

    monkeypatch.setattr(ray_tasks.RayCluster, "_nodes", lost)
    message = "The cluster has lost its nodes. .* Finished results are kept"
    with pytest.raises(gputune.ClusterError, match=message):
        go_on()
    monkeypatch.undo()
    assert [trial.state for trial in go_on().trials] == ["complete"] * 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"device": "cuda"},
            "With workers='ray' and device='cuda', a task needs 1 CPU and a GPU on one node, but no node",
        ),
        (
            {"device": "cuda:1"},
            "device must be 'auto', 'cpu' or 'cuda' with workers='ray', .* got 'cuda:1'",
        ),
        (
            {"workers": gputune.Ray(cpus=3)},
            "3 CPUs on one node, .* .nodes: 2 CPUs and 0 GPUs.. Start nodes",
        ),
        (
            {"workers": gputune.Ray("127.0.0.1:1")},
            "connected to a Ray cluster already. Call ray.shutdown.. ",
        ),
    ],
)
def test_what_the_cluster_has_not_is_refused_and_the_study_stays(
    cluster, begun, arguments, message
):
    go_on, path = begun
    before = table(path)
    with refused(message):
        go_on(**arguments)
    assert table(path) == before


def test_a_package_that_is_not_installed_travels_whole(tmp_path, monkeypatch):
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "__init__.py").write_text("")
    (tmp_path / "nets" / "layers.py").write_text("WIDTH = 7\ndef width(): return WIDTH\n")
    net = "from nets.layers import width\nclass Net:\n    size = staticmethod(width)"
    (tmp_path / "nets" / "net.py").write_text(net)
    monkeypatch.syspath_prepend(tmp_path)
    Net = importlib.import_module("nets.net").Net
    sent = pickle_job(Job(seed=0, epochs=1, horizon=1, module_class=Net), same_machine=False)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != str(tmp_path)])
    for name in ("nets", "nets.net", "nets.layers"):
        monkeypatch.setitem(sys.modules, name, None)  # as where it is not installed
    assert pickle.loads(sent).module_class.size() == 7


def test_tasks_on_nodes_with_gpus():
    node = {"CPU": 8.0, "GPU": 4.0}
    of = ray_tasks._tasks_on
    assert [of(node, cpus, "cuda") for cpus in (1, 3, 9)] == [4, 2, 0]
    assert [of(node, 1, "cpu"), of(node, 3, "cpu"), of({"CPU": 8.0}, 1, "cuda")] == [8, 2, 0]


def test_all_of_a_dataset_moves():
    data = make_data(weights=True)
    moved = ray_tasks.to_device(data, torch.device("meta"))
    tensors = [moved.x, moved.y, moved.weights, moved.center, moved.scale, moved.target]
    tensors += [rows for fold in moved.folds for rows in (fold.train, fold.valid)]
    assert {str(tensor.device) for tensor in tensors} == {"meta"} and moved.copies == data.copies
