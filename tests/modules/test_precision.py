"""bfloat16: members equal a plain loop under torch.autocast; parameters and scores are of single
precision."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

import gputune
from gputune.ground.errors import InputError
from gputune.tuning.machine_options import MachineOptions
from gputune.tuning.options import make_options
from reference import train_module

G = torch.Generator().manual_seed(0)
IMAGES = torch.rand(48, 1, 6, 6, generator=G)
LABELS = (IMAGES[:, 0, 2:4, 2:4].mean((1, 2)) > 0.5).long()
CONFIG = {"lr": 0.1, "batch_size": 16, "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0}
SEEN = set()


class Images(nn.Module):
    def __init__(self, n_outputs, p=0.0):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2)
        )
        self.drop = nn.Dropout(p)
        self.head = nn.Sequential(nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, n_outputs))

    def forward(self, x):
        x = self.body(x)
        SEEN.add((x.dtype, self.training))
        return self.head(self.drop(x.flatten(1)))


class Autocast(Images):
    """The same under autocast, with a loss of single precision: a plain loop."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.training):
            return super().forward(x).float()


def largest(a, b):
    """Largest difference between the parameters of two modules."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((x - y).detach().abs().max()) for x, y in pairs)


SMALL = {
    "n_trials": 1,
    "cv": 2,
    "max_epochs": 6,
    "epoch": "last",
    "precision": "bf16",
    "workers": 1,
    "verbose": 0,
}
SPACE = {k: [v] for k, v in CONFIG.items() if k != "optimizer"}


@functools.cache
def plain(kind, epochs, p):
    return train_module(lambda: kind(2, p), IMAGES, LABELS, CONFIG, epochs=epochs)


@pytest.mark.cpu
@pytest.mark.parametrize("backend", ["eager", "recorded", "loop"])
def test_members_equal_a_plain_loop_under_autocast(backend, p=0.3):
    """One by one exactly; stacked to the rounding of their products, which their own kernels order
    otherwise."""
    SEEN.clear()
    space = {**SPACE, "module__p": [p]}
    study = gputune.tune(
        Images, IMAGES, LABELS, space=space, optimizer="sgd", backend=backend, **SMALL
    )
    member = study.best_model().module
    rounded = plain(Autocast, 6, p)
    start = plain(Images, 0, p)
    within = 0.0 if backend == "loop" else 2**-6 * largest(rounded, start)
    assert largest(member, rounded) <= within
    assert largest(member, plain(Images, 6, p)) > 1e-5
    # scores are of single precision
    assert (torch.bfloat16, True) in SEEN and (torch.bfloat16, False) not in SEEN
    assert all(w.dtype == torch.float32 for w in member.parameters())


class Words(nn.Module):
    def __init__(self, n_outputs):
        super().__init__()
        self.code = nn.Embedding(9, 8)
        self.norm = nn.LayerNorm(8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.walk = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, n_outputs)

    def forward(self, ids):
        x = self.code(ids)
        x = x + self.attend(self.norm(x), self.norm(x), self.norm(x), need_weights=False)[0]
        return self.head(self.walk(x)[0][:, -1])


@pytest.mark.cpu
@pytest.mark.parametrize("backend", ["stacked", "loop"])
def test_attention_and_recurrence_train(backend):
    ids = torch.randint(9, (48, 5), generator=G)
    full, rounded = (
        gputune.tune(
            Words,
            ids,
            LABELS,
            space={"lr": [0.01]},
            scoring="neg_log_loss",
            backend=backend,
            **{**SMALL, "precision": precision},
        )
        for precision in ("full", "bf16")
    )
    gap = np.abs(full.curves - rounded.curves).max()
    assert 0 < gap < 0.02


@pytest.mark.long
def test_workers_and_a_custom_loss_are_rounded_too():
    options = {
        **SMALL,
        "n_trials": 2,
        "optimizer": "sgd",
        "loss": nn.CrossEntropyLoss(),
        "memory": "1KB",
    }
    one, two = (
        gputune.tune(
            Images,
            IMAGES,
            LABELS,
            space=SPACE | {"lr": [0.1, 0.2]},
            **{**options, "workers": workers},
        )
        for workers in (1, 2)
    )
    assert [t.score for t in one.trials] == [t.score for t in two.trials]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            "mlp",
            {},
            "precision='bf16' is only for your own modules, but model='mlp' trains in full precision",
        ),
        (
            Images,
            {"dtype": "float64"},
            "precision='bf16' works only with dtype='float32', got dtype='float64'",
        ),
        (
            Images,
            {"method": "hypergradient"},
            "would round the numbers that method='hypergradient' differentiates",
        ),
        (Images, {"precision": "fp16"}, "precision must be one of 'full', 'bf16', got 'fp16'"),
    ],
)
def test_where_it_means_nothing_it_is_refused(model, options, message):
    X = IMAGES if model is Images else IMAGES.flatten(1)
    with pytest.raises(InputError, match=message):
        gputune.tune(model, X, LABELS, **{**SMALL, **options})


def test_a_gpu_without_it_is_named(monkeypatch):
    monkeypatch.setattr(MachineOptions, "device_here", lambda options: torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(InputError, match="needs a GPU that computes in bfloat16"):
        make_options(precision="bf16")


class Transforming(nn.Module):
    """Passes products in bfloat16 to an operation that supports no bfloat16 on a CPU."""

    def __init__(self, n_features, n_outputs, operation):
        super().__init__()
        self.layer = nn.Linear(n_features, n_outputs)
        self.operation = operation

    def forward(self, x):
        outputs = self.layer(x)
        return outputs + 0.1 * OPERATIONS[self.operation](outputs).mean()


def spd(rows):
    """Return a positive definite matrix in bfloat16."""
    return rows.mT @ rows + torch.eye(rows.shape[1], dtype=rows.dtype)


OPERATIONS = {
    "cdist": lambda rows: torch.cdist(rows, rows[:5]),
    "fft": lambda rows: torch.fft.rfft(rows).abs(),
    "inv": lambda rows: torch.linalg.inv(spd(rows)),
    "inverse": lambda rows: spd(rows).inverse(),
    "cholesky": lambda rows: torch.linalg.cholesky(spd(rows)),
    "svdvals": lambda rows: torch.linalg.svdvals(rows),
    "solve": lambda rows: torch.linalg.solve(spd(rows), rows.mT),
    "quantile": lambda rows: rows.quantile(0.5),
}


@pytest.mark.cpu
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_without_bfloat16_train_stacked_as_under_autocast(operation):
    X = torch.randn(48, 4, generator=G)
    stacked, looped = (
        gputune.tune(
            Transforming,
            X,
            LABELS,
            space={"lr": [0.01], "module__operation": [operation]},
            scoring="neg_log_loss",
            backend=backend,
            **SMALL,
        )
        for backend in ("stacked", "loop")
    )
    np.testing.assert_allclose(stacked.curves, looped.curves, atol=0.01)
