"""gputune on the simulated devices; ``test_simulated_cuda.py`` runs this in a process that has
them.
"""

import dataclasses
import os
import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import gputune
from command_line import run
from gputune.check import check
from gputune.check.check import LAWS, checks_of
from gputune.data import dataset
from gputune.engine import backend, choice, dropout, plan
from gputune.engine.backend import Findings, Speed, keep_findings, read_findings
from gputune.engine.mlp import StackedMLP
from gputune.engine.stacked import StackedChunk
from gputune.executors import worker
from gputune.ground.device import free_of_gpu
from gputune.modules.module import StackedModule
from gputune.modules.recorder import CudaRecorder
from gputune.native.cuda import kernels
from gputune.optimizers.optimizer import Clock
from gputune.optimizers.rules import RULES
from gputune.optimizers.update import Update
from gputune.population.batches import Batches
from gputune.scoring.validation import Validation
from gputune.sklearn import LogisticRegression, MLPClassifier, RandomizedSearchCV
from gputune.tuning.context import Context
from problems import fill, make_data, scoring_of, shape_of, train
from refused import refused
from simulated_cuda import torch_cuda as cuda

pytestmark = pytest.mark.gpu

# What lands on the current device by mistake, cuda:0, is on the wrong one where it is not asked
# for.
DEVICES = ["cuda:1", pytest.param("cuda:0", marks=pytest.mark.long)]
FAST = {"n_trials": 3, "max_epochs": 3, "cv": 3, "verbose": 0, "dtype": "float64", "workers": 1}


class Net(nn.Module):
    """A user's module with stacked members; its running statistics change in training."""

    def __init__(self, n_features, n_outputs, width=8, dropout=0.0, norm=True):
        super().__init__()
        self.first = nn.Linear(n_features, width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(width, n_outputs)

    def forward(self, x):
        return self.last(self.dropout(torch.relu(self.norm(self.first(x)))))


class Reader(Net):
    """A module that reads a number, for which its members train one by one."""

    def forward(self, x):
        outputs = super().forward(x)
        return outputs if float(outputs.detach().abs().sum()) > 0 else outputs + 1


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Every test counts for itself, and a capture that one made fail is no matter of the next."""
    cuda.forget()
    monkeypatch.setattr(CudaRecorder, "failure", "")
    yield
    cuda.underway = False


def moved(data, device):
    """A Dataset with its tensors on a device."""
    folds = [
        dataclasses.replace(f, train=f.train.to(device), valid=f.valid.to(device))
        for f in data.folds
    ]
    tensors = {k: v.to(device) for k, v in vars(data).items() if isinstance(v, torch.Tensor)}
    return dataclasses.replace(
        data, inputs=tuple(x.to(device) for x in data.inputs), folds=tuple(folds), **tensors
    )


CHECKS = checks_of(torch.device("cuda:1"))
# A recorded step is warmed up and compared as it is: what the two ways to train share is asked of
# the recorded one.
TWICE = {law.name for law, backend in CHECKS if backend == "recorded"}


def as_case(law, backend):
    twice = backend == "eager" and law.name in TWICE
    return pytest.param(law, backend, id=f"{law.name}, {backend}", marks=[pytest.mark.long] * twice)


@pytest.mark.parametrize(("law", "backend"), [as_case(*each) for each in CHECKS])
def test_a_law_of_the_check_holds(law, backend):
    assert law.measure(torch.device("cuda:1"), backend) <= law.allowed
    assert bool(cuda.counts("replay")) == (backend == "recorded" and "fails" not in law.name)


def test_the_check_of_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(check, "LAWS", LAWS[-1:])
    monkeypatch.setattr(choice, "MANY", {"cpu": 5, "cuda": 5})
    monkeypatch.setattr(choice, "_ROWS", 40)  # a step an epoch
    code, out, _ = run("check", "--device", "cuda:1")
    assert code == 0 and re.search(
        r"a GPU that is not there; capability 9.0, [0-9.]+ GiB of 16.0 GiB free", out
    )
    assert "a recording that fails falls back" in out and "cuda:1" in out
    found = read_findings(torch.device("cuda:1"))
    assert found.failed == {} and set(found.speeds) == {"eager", "recorded", "kernel"}


SEARCHES = {
    "eager": ("mlp", {"backend": "eager"}),
    "recorded": ("mlp", {"backend": "recorded"}),
    "halving": ("mlp", {"method": "halving", "n_trials": 9, "max_epochs": 9}),
    "median": ("mlp", {"method": "median", "n_trials": 5, "max_epochs": 8, "backend": "recorded"}),
    "hypergradient": (
        "mlp",
        {"method": gputune.Hypergradient(outer_steps=1), "n_trials": 2, "max_epochs": 2, "cv": 2},
    ),
    "solved": ("logistic", {}),
    "stacked module": (Net, {"backend": "stacked"}),
    "recorded module": (Net, {"backend": "recorded"}),
    "module that draws": (
        Net,
        {"backend": "recorded", "space": {"lr": [0.01, 0.03], "module__dropout": [0.3]}},
    ),
    "module one by one": (Reader, {}),
}


def same_search(X, y, model, options, device):
    """The study of a search on a device; its curves must equal the CPU's."""
    here = {"backend": "eager"} if model == "mlp" else {}
    here |= {"study": None, "verbose": 0}
    expected = gputune.tune(model, X, y, **{**FAST, **options, **here, "device": "cpu"})
    study = gputune.tune(model, X, y, **{**FAST, **options, "device": device})
    np.testing.assert_allclose(study.curves, expected.curves, rtol=1e-9, atol=1e-12)
    return study, expected


# What the searches below do too, of recordings, of errors and of a chunk that is halved.
REPEATED = {"recorded", "halving", "recorded module"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name in REPEATED)) for name in SEARCHES]
)
def test_a_search_gives_the_numbers_of_the_cpu(name, device, iris):
    model, options = SEARCHES[name]
    same_search(*iris, model, options, device)
    recorded = model != "logistic" and options.get("backend") != "eager"
    recorded &= name != "hypergradient" and model is not Reader
    assert bool(cuda.counts("replay")) == recorded


def test_a_capture_that_fails_leaves_a_search_as_it_was(device, iris, tmp_path, capsys):
    cuda.fail_next_capture = cuda.INVALID
    words = f"recording a step on {device} failed: CUDA error.*Nothing is lost"
    with pytest.warns(RuntimeWarning, match=words):
        study, _ = same_search(*iris, "mlp", {"study": tmp_path / "study.db", "verbose": 1}, device)
    assert not cuda.counts("replay")
    assert torch.cuda.current_stream(device).default
    for found in (study, gputune.Study.open(tmp_path / "study.db")):
        assert re.match(words, found.record.notes[-1])
    said = capsys.readouterr().err
    assert "recorded" in said and re.search(f"note: {words}", said)
    gputune.tune("mlp", *iris, **{**FAST, "verbose": 1}, device=device)
    assert "recorded" not in capsys.readouterr().err


def test_a_chunk_that_does_not_fit_is_halved(device, iris, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    options = {"n_trials": 16, "space": {"lr": [0.01, 0.02], "width": [64]}, "backend": "eager"}
    with cuda.memory_limit(1 << 20, device):
        same_search(*iris, "mlp", options, device)
    assert cuda.counts("out of memory")


def test_several_processes_are_refused(device, iris, tmp_path):
    with refused(
        f"workers=2 is too many: each GPU can have only one process, and this search has 1 GPU, {device}"
    ):
        gputune.tune(
            "mlp", *iris, **{**FAST, "workers": 2}, device=device, study=tmp_path / "study.db"
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", [pytest.param("mlp", marks=pytest.mark.long), Net])
def test_the_best_is_trained_again_on_all_rows(model, device, iris):
    study, expected = same_search(
        *iris, model, {"space": {"lr": [0.01, 0.03]}, "n_trials": 2}, device
    )
    found, own = (s.best_model().predict_proba(iris[0]) for s in (study, expected))
    np.testing.assert_allclose(found, own, atol=1e-6)


def test_a_search_continues_where_it_ended(device, iris, tmp_path):
    options = {**FAST, "device": device, "backend": "recorded"}
    whole = gputune.tune("mlp", *iris, **options)
    gputune.tune("mlp", *iris, **options, timeout=1e-9, study=tmp_path / "study.db")
    study = gputune.tune("mlp", *iris, **options, study=tmp_path / "study.db")
    assert study.curves.tobytes() == whole.curves.tobytes()


def test_a_module_is_built_without_a_context_on_other_gpus(iris):
    for device in ("cpu", "cuda:0"):
        cuda.forget()
        gputune.tune(Net, *iris, **FAST, device=device)
        assert set(cuda.counts("context")) <= {"0"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long) for name in ("recorded", "hypergradient")]
    + ["module that draws"],
)
def test_the_default_device_of_torch_changes_nothing(name, iris):
    torch.set_default_device("cuda:1")
    try:
        same_search(*iris, *SEARCHES[name], "cuda:0")
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("mode", ["reverse", "forward", "fd"])
def test_a_hypergradient_is_where_its_module_is(mode):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, generator=generator, dtype=torch.float64).to("cuda:0")
    pairs = [(x, (x[:, 0] > 0).long())]
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(x)
    options = {"hyperparameters": {"lr": [0.1, 0.2]}, "optimizer": "momentum", "mode": mode}
    slopes = []
    for default in (None, "cuda:1"):
        torch.set_default_device(default)
        try:
            found = gputune.hypergradient(
                module, functional.cross_entropy, 3 * pairs, *pairs, **options
            )
        finally:
            torch.set_default_device(None)
        slopes.append(found.gradient["lr"])
        assert slopes[-1].device == x.device and slopes[-1].all()
    assert torch.equal(*slopes)


class Flat(Net):
    """A module of rows with two axes."""

    def forward(self, x):
        return super().forward(x.flatten(1))


def test_rows_that_a_gpu_has_no_room_for_stay_on_the_host(device, monkeypatch):
    monkeypatch.setattr(dataset, "_DEVICE_SHARE", 0)
    rows = torch.rand(60, 2, 3, generator=torch.Generator().manual_seed(0))
    same_search(
        rows,
        [0, 1] * 30,
        lambda n_outputs: Flat(6, n_outputs),
        {"space": {"lr": [0.01, 0.1]}},
        device,
    )


def test_what_pytorch_keeps_of_a_gpu_is_free(device, monkeypatch):
    before = free_of_gpu(torch.device(device))
    reserved = torch.cuda.memory_reserved(device)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved + 1000)
    assert free_of_gpu(torch.device(device)) == before + 1000


def test_the_scikit_learn_api_has_the_numbers_of_the_cpu(device, iris):
    """Of an estimator, which computes in single precision there, a solved one, and a search of
    estimators."""
    found = []
    for where in (device, "cpu"):
        network = MLPClassifier((8,), max_iter=3, random_state=0, device=where, tol=0)
        solved = LogisticRegression(device=where)
        search = RandomizedSearchCV(
            network,
            {"learning_rate_init": [0.01, 0.03]},
            n_iter=2,
            cv=2,
            scoring="neg_log_loss",
            device=where,
        )
        cuda.forget()
        found.append([each.fit(*iris).predict_proba(iris[0]) for each in (network, solved, search)])
        found[-1].append(search.cv_results_["mean_test_score"])
        assert bool(cuda.counts("launch")) == (where == device)
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def faster(patch, folder):
    """Let a GPU be the faster one for whatever is small."""
    patch.setattr(backend, "cache_folder", lambda: folder)
    patch.setattr(choice, "_SOON", 0.0)
    keep_findings(torch.device("cpu"), Findings(None, {"compiled": Speed(1.0, 1.0)}))
    keep_findings(torch.device("cuda"), Findings(None, {"recorded": Speed(1e-9, 0.0)}))


AUTO = {
    "a module": (lambda *iris: gputune.tune(Net, *iris, **FAST), True),
    "TF32": (
        lambda *iris: gputune.tune("mlp", *iris, **{**FAST, "dtype": "float32"}, tf32=True),
        True,
    ),
    "the faster one": (lambda *iris: gputune.tune("mlp", *iris, **FAST), True),
    "what is small": (lambda *iris: gputune.tune("mlp", *iris, **{**FAST, "verbose": 1}), False),
    "what is solved": (
        lambda *iris: gputune.tune("logistic", *iris, **{**FAST, "verbose": 1}),
        False,
    ),
    "an estimator": (
        lambda *iris: MLPClassifier((8,), max_iter=3, random_state=0).fit(*iris),
        False,
    ),
    "a solved estimator": (lambda *iris: LogisticRegression().fit(*iris), False),
}


@pytest.mark.parametrize("name", AUTO)
def test_what_auto_trains_on_a_gpu(name, iris, monkeypatch, tmp_path, capsys):
    train, taken = AUTO[name]
    if name == "the faster one":
        faster(monkeypatch, tmp_path)
    train(*iris)
    assert bool(cuda.counts("launch")) == bool(cuda.counts("to device")) == taken
    said = "trials train on the CPU" in capsys.readouterr().err
    assert said == name.startswith("what is")


@pytest.mark.parametrize("where", DEVICES)
def test_a_tensor_that_lies_on_a_gpu_trains_there(where, iris):
    X = torch.from_numpy(iris[0]).to(where)
    y = iris[1]
    study = gputune.tune("mlp", X, y, **FAST)
    np.testing.assert_array_equal(
        study.curves, gputune.tune("mlp", X, y, **FAST, device=where).curves
    )


def chunk(
    device,
    *,
    module=False,
    sizes=(10, 10, 10),
    trials=({},) * 3,
    recorded=True,
    data=None,
    **shared,
):
    """Members in stacked tensors, by default of one batch size and recorded."""
    data = moved(data or make_data(folds=5, dtype=torch.float32), device)
    each = (
        {"lr": 0.01 * i, "batch_size": size, **trial}
        for i, (size, trial) in enumerate(zip(sizes, trials), 1)
    )
    configs = fill(*({"width": 8, **shared, **config} for config in each))
    kind, how = (StackedModule, partial(Net, norm=False)) if module else (StackedMLP, "mlp")
    network = kind(how, configs, shape_of(data), seed=0)
    return StackedChunk(
        network, Validation(data, scoring_of(data)), seed=0, horizon=9, recorded=recorded
    )


def launches_of(members):
    """The most launches that a step of recorded members takes; a product that adds a bias copies it
    first."""
    most = 0
    for shape in set(members.batches.shapes):
        cuda.forget()
        members.steps.take(shape, lambda: pytest.fail("a step was not recorded"))
        launches = cuda.counts("launch")
        most = max(most, sum(launches.values()) + launches["baddbmm.out"])
    return most


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({}, 39),
        ({"sizes": (9, 10, 13)}, 39),
        ({"schedule": "cosine", "clip_norm": 1.0, "ema": 0.9}, 40),
        ({"sizes": (9, 10, 13), "dropout": 0.1}, 47),
    ],
)
def test_a_step_takes_few_launches(options, most, device):
    members = chunk(device, **options)
    for epoch in range(5):
        members.advance(epoch)
    assert launches_of(members) == most


ALL_OPTIONS = (
    {"schedule": "cosine", "clip_norm": 0.1, "dropout": 0.2, "momentum": 0.5},
    {
        "schedule": "coslog4",
        "weight_decay_schedule": "flat_cos",
        "ema": 0.9,
        "dropout": 0.1,
        "momentum": 0.9,
    },
    {
        "weight_decay": 0.1,
        "lr_factor__bias0": 3.0,
        "weight_decay_factor__weight1": 0.0,
        "momentum": 0.1,
    },
)


@pytest.mark.parametrize("optimizer", [*RULES, "sgd without momentum"])
def test_a_step_with_all_options_is_the_same_recorded_and_as_it_is(optimizer):
    """Of three members with options of their own, the recorded steps of kernels, the others of
    PyTorch's operations."""
    word, _, without = optimizer.partition(" ")
    trials = [{**trial, **({"momentum": 0.0} if without else {})} for trial in ALL_OPTIONS]
    data = moved(make_data(weights=True, folds=3), "cuda:1")
    shared = data.weights[:1].expand(3, -1)  # one row of memory for all folds, as of an estimator
    data = dataclasses.replace(
        data, weights=shared, present=torch.tensor([[True, True, False], *[[True] * 3] * 2])
    )
    options = {"sizes": (9, 10, 13), "trials": trials, "data": data, "optimizer": word}
    recorded, plain = (chunk("cuda:1", **options, recorded=recorded) for recorded in (True, False))
    for epoch in range(5):
        recorded.advance(epoch)
        plain.advance(epoch)
    for one, other in zip(recorded._state(), plain._state(), strict=True):
        torch.testing.assert_close(one.cpu(), other.cpu(), rtol=1e-9, atol=1e-12)
    assert launches_of(recorded) <= 50 or word in ("muon", "schedulefree")  # which have no kernel


@contextmanager
def kernels_anew():
    """Let kernels be compiled again inside, and once more after it."""
    caches = kernels, dropout.uniform_kernel
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_a_gpu_draws_what_the_cpu_draws(device, monkeypatch):
    drawn = [
        dropout.MlpDraws([7, 3], layers=2, width=400, seed=1, device=torch.device(where))
        for where in (device, "cpu")
    ]
    cuda.forget()
    for draws in drawn:
        draws.fill(2, 0)
    assert cuda.counts("launch")["kernel"] == 1
    for step, rows in enumerate((7, 3)):
        one, other = (
            draws.at(torch.tensor(step, device=draws.buffer.device), rows) for draws in drawn
        )
        assert torch.equal(one.cpu(), other)
    wrong = Path(dropout.SOURCE).read_text().replace("1812433253u", "1812433254u")
    monkeypatch.setattr(
        "gputune.native.cuda.source", lambda path, dtype: "typedef float real;\n" + wrong
    )
    with (
        kernels_anew(),
        pytest.warns(
            RuntimeWarning, match=f"The dropout draws of {device} differ from PyTorch's draws"
        ),
    ):
        assert dropout.uniform_kernel(torch.device(device)) is None


def test_a_step_as_it_is_copies_nothing_to_the_gpu(device):
    members = chunk(device, sizes=(9, 10, 13), recorded=False)
    members.advance(0)
    members.batches.begin(1)
    cuda.forget()
    for step, shape in enumerate(members.batches.shapes):
        members._step(shape, (1, step))
    assert not cuda.counts("to device") and not cuda.counts("wait")


@pytest.fixture
def no_kernels(monkeypatch):
    """NVRTC is not there."""

    def fail(source, name):
        raise OSError("Could not find any NVRTC library")

    monkeypatch.setattr(torch.cuda, "_compile_kernel", fail)
    with kernels_anew():
        yield


@pytest.mark.filterwarnings("ignore:.* cannot be compiled for:RuntimeWarning")
def test_steps_are_recorded_without_kernels_too(iris, device, no_kernels):
    same_search(*iris, "mlp", {"backend": "recorded"}, device)
    assert cuda.counts("replay") and "kernel" not in cuda.counts("launch")


@pytest.mark.parametrize("module", [False, True])
def test_an_epoch_of_recorded_steps_copies_nothing_and_waits_for_nothing(module, device):
    members = chunk(device, module=module)
    for epoch in range(5):
        members.advance(epoch)
    steps = len(members.batches.shapes)
    members.batches.begin(5)  # the rows of an epoch are drawn on the host
    cuda.forget()
    for shape in members.batches.shapes:
        members.steps.take(shape, lambda: pytest.fail("a step was not recorded"))
    assert cuda.counts("replay") == {"": steps}
    assert not cuda.counts("to device") and not cuda.counts("to host") and not cuda.counts("wait")


def test_a_profile_has_the_time_of_the_gpu(device):
    """Launching takes the host a moment; the simulated device a millisecond an operation."""
    data = moved(make_data(), device)
    configs = fill({"batch_size": 10, "width": 8})
    network = StackedMLP("mlp", configs, shape_of(data), seed=0)
    cuda.forget()
    spent = train(
        network, data, configs, seed=0, epochs=3, horizon=3, scoring=scoring_of(data)
    ).spent
    launches = sum(cuda.counts("launch").values())
    assert 0.7 * launches < 1000 * (spent.steps + spent.scores) <= launches
    assert spent.scores < spent.steps / 3


def test_an_epoch_of_scores_takes_few_launches(device, monkeypatch):
    """1,000 trials of width 256 on 5,000 rows; two of width 16 stand for them, in blocks that are
    as many."""
    data = moved(make_data(n=5000, folds=5, dtype=torch.float32), device)
    configs = fill(*[{"batch_size": 100, "width": 16}] * 2)
    network = StackedMLP("mlp", configs, shape_of(data), seed=0)
    params = network.blocks.views(network.start())
    validation = Validation(data, scoring_of(data))
    cuda.forget()
    scores = validation.scores(network, params, trials=1000 * 256 // 16)
    assert sum(cuda.counts("launch").values()) <= 300
    assert list(validation.kept) == [(fold, 262) for fold in range(5)]
    np.testing.assert_allclose(scores, validation.scores(network, params, trials=2))
    with cuda.memory_limit(300 << 20, device):  # 256 MiB would be nearly all
        assert Validation(data, None).block_bytes == 8 << 20


def test_what_a_search_computes_has_deterministic_kernels(device, iris):
    torch.use_deterministic_algorithms(True)
    try:
        lasso = {"l1_ratio": [1.0], "C": [1.0]}
        gputune.tune("logistic", *iris, **{**FAST, "n_trials": 1}, space=lasso, device=device)
        with pytest.raises(RuntimeError, match="median.* on CUDA does not have a deterministic"):
            torch.rand(3, device=device).median(0)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_replay_that_is_not_the_step_is_the_last_one(device, iris, monkeypatch):
    """One number of a recording is wrong; it is found before anything was made of it."""
    replay = cuda.Graph.replay

    def wrong(graph):
        replay(graph)
        flats = [place for _, place in graph.tape.places if len(place.shape) == 1]
        size = max(place.shape for place in flats)
        for place in flats:
            if place.shape == size:  # parameters, gradient and moments
                place.tensor()[12] += 1

    monkeypatch.setattr(cuda.Graph, "replay", wrong)
    options = {"backend": "recorded", "space": {"lr": [1e-3, 1e-2]}, "n_trials": 3}
    with pytest.warns(
        RuntimeWarning, match="a recorded step differs from the step itself by .* of its size. N"
    ):
        same_search(*iris, "mlp", options, device)
    assert cuda.counts("replay") == {"": 1}


def test_memory_that_runs_out_in_a_capture_halves_the_chunk(device, iris):
    """The allocator of torch < 2.13 then takes every later call for one inside a capture: halves
    are not recorded."""
    cuda.fail_next_capture = torch.OutOfMemoryError("CUDA out of memory.")
    options = {"backend": "recorded", "space": {"lr": [1e-3, 1e-2]}, "n_trials": 3}
    with pytest.warns(RuntimeWarning, match="recording a step on .* failed: captures_underway"):
        same_search(*iris, "mlp", options, device)
    assert torch.cuda.current_stream(device).default


def test_a_gpu_that_has_failed_is_said(device, iris, monkeypatch):
    def synchronize(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    cuda.fail_next_capture = cuda.INVALID
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(
        RuntimeError, match=f"{device} has failed, and this process cannot use it any more: CUDA"
    ):
        gputune.tune("mlp", *iris, **FAST, backend="recorded", device=device)


@pytest.mark.parametrize("model", ["mlp", Net])
def test_recordings_outlive_their_chunk(model, device, iris, monkeypatch):
    """Halving makes chunks anew at every rung; in the memory of the last one their steps are
    recorded already."""
    # which trains, and records, to measure memory
    monkeypatch.setattr(Context, "_need", lambda *given: None)
    space = {"lr": [1e-3 * 2**i for i in range(9)], "batch_size": [25]}
    options = {
        "space": space,
        "n_trials": 9,
        "backend": "recorded",
        "method": gputune.Halving(min_epochs=3),
    }
    same_search(*iris, model, {**options, "max_epochs": 9, "include_default": False}, device)
    assert cuda.counts("capture") == {"": 1}
    # 3 rungs of 3 epochs of 4 steps, of which 3 warm up and one is taken both ways
    assert cuda.counts("replay") == {"": 9 * 4 - 3}


class Seen(Net):
    """A module that notes on which device it trains."""

    def forward(self, x):
        (Path(os.environ["SEEN"]) / str(x.device)).touch()
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "method"),
    [
        (Seen, "random"),
        *(
            pytest.param("mlp", name, marks=pytest.mark.long)
            for name in ("halving", "hypergradient")
        ),
    ],
)
def test_all_gpus_of_a_machine_train(model, method, iris, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SEEN", str(tmp_path))
    monkeypatch.setattr(worker, "begin_worker", cuda.begin_worker)
    monkeypatch.setattr(plan, "_GPUS_PAY", 0)
    options = {
        **FAST,
        "workers": "auto",
        "verbose": 1,
        "method": method,
        "space": {"lr": [1e-3, 2e-3, 4e-3, 8e-3]},
    }
    options |= {"scoring": "neg_log_loss", "n_trials": 2 if method == "hypergradient" else 4}
    study = gputune.tune(model, *iris, **options, device="cuda")
    assert "on 2 GPUs" in capsys.readouterr().err
    if model is Seen:
        assert {path.name for path in tmp_path.iterdir()} >= {"cuda:0", "cuda:1"}
    one = gputune.tune(model, *iris, **options, device="cuda:0")
    assert "GPUs" not in capsys.readouterr().err
    np.testing.assert_allclose(study.curves, one.curves, rtol=1e-9, atol=1e-12)


def test_a_second_gpu_is_for_what_is_long(iris, capsys):
    gputune.tune("mlp", *iris, **{**FAST, "workers": "auto", "verbose": 1}, device="cuda")
    assert "GPUs" not in capsys.readouterr().err
    with refused("workers=3 is too many: .* this search has 2 GPUs, cuda:0, cuda:1. Leave"):
        gputune.tune("mlp", *iris, **{**FAST, "workers": 3}, device="cuda")


def _after(owner, name, change):
    """A method that does its usual work, and then something to its object."""
    method = getattr(owner, name)

    def changed(self, *args, **kwargs):
        result = method(self, *args, **kwargs)
        change(self)
        return result

    return owner, name, changed


def _on_cpu(owner, name):
    """A method with a result that stays on the CPU."""
    method = getattr(owner, name)
    return owner, name, lambda *args, **kwargs: method(*args, **kwargs).cpu()


def _in_step(change):
    return _after(StackedChunk, "_step", change)


def _set(**values):
    """Set attributes, each to the result of a function of the object."""

    def change(self):
        for name, make in values.items():
            setattr(self, name, make(self))

    return change


MUTATIONS = {
    "positions on the CPU": _after(
        Batches, "_set_sizes", _set(positions=lambda b: b.positions.cpu())
    ),
    "learning rates on the CPU": _on_cpu(Clock, "table"),
    "a target on the CPU": _on_cpu(StackedMLP, "targets"),
    "dropout's rates on the CPU": _after(
        StackedMLP, "__init__", _set(rates=lambda net: net.rates.cpu())
    ),
    "a read in a step": _in_step(lambda chunk: chunk.grad.sum().item()),
    "a copy in a step": _in_step(lambda chunk: torch.ones(2).to(chunk.grad.device)),
    "a draw in a step": _in_step(lambda chunk: chunk.grad.uniform_()),
    "a shape by numbers in a step": _in_step(lambda chunk: chunk.grad[chunk.grad > 0]),
    "a result that outlives its step": _in_step(_set(last=lambda chunk: chunk.grad + 1)),
    "memory that was never written": _after(
        Update,
        "__init__",
        _set(moments=lambda update: [torch.empty_like(m) for m in update.moments]),
    ),
}
"""Ten errors, put into gputune one at a time: what is wrong -> where, and what is there instead."""


def one_search(iris, device, seen={}):  # noqa: B006
    """A search that uses everything the mutations change; its curves must equal the CPU's."""
    space = {"lr": [1e-3, 1e-2], "batch_size": [16, 25], "dropout": [0.2]}
    options = {**FAST, "space": space, "include_default": False}
    if "curves" not in seen:
        seen["curves"] = gputune.tune("mlp", *iris, **options, device="cpu", backend="eager").curves
    curves = gputune.tune("mlp", *iris, **options, device=device, backend="recorded").curves
    np.testing.assert_allclose(curves, seen["curves"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [None, *MUTATIONS])
def test_an_error_is_found(name, iris, monkeypatch):
    if name is None:
        one_search(iris, "cuda:1")
        return
    monkeypatch.setattr(*MUTATIONS[name])
    with pytest.raises((RuntimeError, RuntimeWarning, AssertionError)):
        one_search(iris, "cuda:1")
