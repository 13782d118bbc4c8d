"""Data on its way to worker processes: data in files is mapped again, and everything arrives
unchanged.
"""

import inspect
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import gputune
from forked import Fork
from gputune.data.arrays import as_arrays
from gputune.data.dataset import ScorerRows
from gputune.executors import processes
from gputune.executors.processes import MappedFile, mapped_file, to_arrays, to_device, to_tensors
from gputune.ground.errors import InputError
from problems import make_data

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
X = np.random.default_rng(0).integers(0, 256, (400, 32, 32, 3), dtype=np.uint8)  # 1.2 MB


@pytest.fixture
def mapped(tmp_path):
    np.save(tmp_path / "x.npy", X)
    return np.load(tmp_path / "x.npy", mmap_mode="r")


@pytest.mark.parametrize(
    "view", [lambda x: x, lambda x: x.transpose(0, 3, 1, 2), lambda x: x[3:], lambda x: x[:, ::2]]
)
def test_what_lies_in_a_file_is_mapped_again(mapped, view):
    data = replace(make_data(), inputs=(as_arrays(view(mapped)).parts[0][None],))
    sent = to_arrays(data, same_machine=True)
    if view(mapped).nbytes > 1 << 20:
        assert isinstance(sent.inputs[0], MappedFile)
    assert np.array_equal(to_tensors(sent).inputs[0][0].numpy(), view(X))
    assert isinstance(to_arrays(data).inputs[0], np.ndarray)  # for another machine


def test_the_rows_of_a_custom_scorer_are_mapped_again_in_their_own_types(mapped):
    rows = ScorerRows(as_arrays(mapped[3:]).select(np.arange(5)), None)
    data = replace(make_data(), scorer_rows=rows)
    sent = to_arrays(data, same_machine=True)
    assert isinstance(sent.scorer_rows.X.parts[0], MappedFile)
    back = to_device(to_tensors(sent), torch.device("cpu")).scorer_rows.X
    assert np.array_equal(back.as_given(), X[3:8])
    assert isinstance(to_arrays(data).scorer_rows.X.parts[0], np.ndarray)  # another machine
    table = replace(data, scorer_rows=ScorerRows(np.ones((3, 2)), None))
    assert isinstance(to_tensors(to_arrays(table)).scorer_rows.X, np.ndarray)


def test_what_may_differ_from_its_file_is_copied(tmp_path, mapped):
    private = np.load(tmp_path / "x.npy", mmap_mode="c")
    private[0] = 0
    assert mapped_file(torch.from_numpy(private)) is None
    assert mapped_file(torch.from_numpy(X)) is None
    (tmp_path / "x.npy").unlink()
    assert mapped_file(as_arrays(mapped).parts[0]) is None


def test_a_file_that_was_replaced_is_not_read(tmp_path, mapped):
    place = mapped_file(as_arrays(mapped).parts[0])
    np.save(tmp_path / "y.npy", X)
    os.replace(tmp_path / "y.npy", tmp_path / "x.npy")
    with pytest.raises(InputError, match="x.npy', which X is mapped from, was moved or replaced"):
        place.array()


def test_halves_arrive():
    x = torch.rand(1, 4, 2, 2).bfloat16()
    data = replace(make_data(), inputs=(x,))
    assert torch.equal(to_tensors(to_arrays(data)).inputs[0], x)


class Image(nn.Module):
    def __init__(self, n_outputs):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 2, 3, stride=8), nn.BatchNorm2d(2), nn.Flatten())
        self.head = nn.Linear(32, n_outputs)

    def forward(self, x):
        return self.head(self.body(x))


SMALL = {
    "space": {"lr": [0.01, 0.02], "batch_size": [100, 200]},
    "n_trials": 2,
    "cv": 2,
    "max_epochs": 2,
    "verbose": 0,
}


def test_workers_train_on_a_mapped_file_as_on_an_array(mapped):
    y = np.arange(400) % 2
    options = {**SMALL, "numbers": "standard"}
    there = gputune.tune(Image, mapped.transpose(0, 3, 1, 2), y, workers=2, memory="1KB", **options)
    here = gputune.tune(Image, X.transpose(0, 3, 1, 2), y, workers=1, memory="1KB", **options)
    assert [t.score for t in there.trials] == [t.score for t in here.trials]


SCRIPT = """
import resource, sys
import numpy as np
from torch import nn
import gputune
from gputune.executors import processes

rows = int(sys.argv[1])
rng = np.random.default_rng(0)
X = rng.integers(0, 256, (rows, 3, 32, 32), dtype=np.uint8)
if sys.argv[2] == "half":
    X = X.astype(np.float16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
options = {"numbers": "standard"} if sys.argv[2] == "bytes" else {}
gputune.tune(
    Image, X, np.arange(rows) % 4, space={"lr": [0.01], "batch_size": [1024]}, n_trials=1, cv=2, max_epochs=1,
    verbose=0, workers=1, **options,
)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, X.nbytes)
"""


def peak(rows, kind):
    """Bytes that a search in a process of its own takes at most beyond its data, and bytes of the
    data."""
    script = SCRIPT.replace("rows =", f"{inspect.getsource(Image)}\nrows =", 1)
    out, err = Fork(script, rows, kind).communicate()
    assert err == ""
    return tuple(map(int, out.split()))


@pytest.mark.parametrize("kind", ["bytes", pytest.param("half", marks=pytest.mark.long)])
def test_images_are_not_copied_whole(kind):
    more, _ = peak(24_000, kind)
    assert more < 330 << 20  # of single precision they would be 281 MiB more


@pytest.mark.long
def test_200_000_images_take_less_than_4_gib():
    more, size = peak(200_000, "bytes")
    assert more + size < 4 << 30 and more < 1 << 30


def test_a_search_in_a_process_that_ends_leaves_its_trials_waiting(monkeypatch):
    """Workers start no more then, and nobody says so to the search before the process waits for
    it."""
    monkeypatch.setattr(processes.Processes, "submit", lambda *arguments: False)
    space = {"x": [0.0, 1.0, 2.0, 3.0]}
    study = gputune.search(
        lambda params, report: 0.0, space, direction="maximize", workers=2, verbose=0
    )
    assert {trial.state for trial in study.trials} == {"waiting"}
