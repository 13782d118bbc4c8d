"""State that a module's forward changes, and that the first calls do not show."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import gputune

ROWS = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
CLASSES = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    def __init__(self, n_features=6, n_outputs=3):
        super().__init__()
        self.first = nn.Linear(n_features, 8)
        self.last = nn.Linear(8, n_outputs)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


class Cap(Net):
    """Divides by the largest activation of its training, if it is above 2."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        hidden = self.first(x)
        if self.training:
            self.scale = torch.maximum(self.scale, hidden.detach().abs().max())
        return self.last(hidden / self.scale)


def largest_difference(
    start, backend="auto", epochs=30, loss=functional.cross_entropy, weight_decay=0.0
):
    """Return the largest difference of a member's outputs from those of a plain loop on all rows."""
    config = {"batch_size": 40, "optimizer": "sgd", "weight_decay": weight_decay}
    configs = [config | {"lr": lr} for lr in (2.0, 2.2)]
    trained = gputune.train_many(
        lambda: start,
        configs,
        ROWS,
        CLASSES,
        max_epochs=epochs,
        dtype="float64",
        backend=backend,
        loss=None if loss is functional.cross_entropy else loss,
    )
    module = copy.deepcopy(start).double().train()
    optimizer = torch.optim.SGD(module.parameters(), lr=2.0, weight_decay=weight_decay)
    for _ in range(epochs):
        optimizer.zero_grad()
        loss(module(ROWS.double()), CLASSES).backward()
        optimizer.step()
    outputs = trained.member(0).eval()(ROWS.double())
    return float((module.eval()(ROWS.double()) - outputs).detach().abs().max())


@pytest.mark.parametrize("backend", ["stacked", "loop"])
def test_a_buffer_that_first_changes_late_is_kept(backend):
    torch.manual_seed(0)
    start = Cap()
    assert largest_difference(start, backend) < 1e-9


class Monotone(Net):
    """Clamps its weights in each forward, as monotone networks do."""

    def forward(self, x):
        self.last.weight.data = self.last.weight.data.clamp(min=0)
        return self.last(torch.relu(self.first(x)))


@pytest.mark.parametrize("backend", ["auto", "loop"])
def test_a_forward_that_assigns_to_a_parameters_data_is_as_in_a_loop(backend):
    torch.manual_seed(0)
    assert largest_difference(Monotone(), backend, epochs=10) < 1e-9


class HookOnActivations(Net):
    """Clips the gradient of its activations."""

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        if hidden.requires_grad:
            hidden.register_hook(clip)
        return self.last(hidden)


class HookOnLayer(Net):
    """Clips the gradient of a layer's inputs."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.last.register_full_backward_hook(clip_inputs)


def clip(gradient):
    """Clip a gradient by a value that the gradients exceed only after a few steps."""
    return gradient.clamp(-0.03, 0.03)


def clip_inputs(_module, gradients, _of_outputs):
    return (clip(gradients[0]),)


@pytest.mark.parametrize("build", [HookOnActivations, HookOnLayer])
def test_gradient_hooks_act_as_in_a_loop(build):
    torch.manual_seed(0)
    assert largest_difference(build()) < 1e-9


def test_a_gradient_hook_in_a_loss_is_not_stacked():
    def loss(outputs, y):
        if outputs.requires_grad:
            outputs.register_hook(print)
        return functional.cross_entropy(outputs, y)

    with pytest.raises(gputune.InputError, match="registers a hook on the gradient of a tensor"):
        largest_difference(Net(), "stacked", epochs=1, loss=loss)


class Graph(Net):
    """Multiplies its inputs by a sparse matrix."""

    def __init__(self, n_features=6, n_outputs=3):
        super().__init__(n_features, n_outputs)
        self.register_buffer("adjacency", torch.eye(n_features).to_sparse())

    def forward(self, x):
        return super().forward((self.adjacency @ x.T).T)


class GraphOfParts(Net):
    """Builds the sparse matrix from two buffers, as the error of ``Graph`` advises."""

    def __init__(self, n_features=6, n_outputs=3):
        super().__init__(n_features, n_outputs)
        self.register_buffer("indices", torch.arange(n_features).expand(2, -1).clone())
        self.register_buffer("values", torch.ones(n_features))

    def forward(self, x):
        adjacency = torch.sparse_coo_tensor(self.indices, self.values, check_invariants=False)
        return super().forward((adjacency @ x.T).T)


def test_a_sparse_buffer_is_refused_and_the_remedy_works():
    with pytest.raises(gputune.InputError, match="buffer 'adjacency' of Graph is sparse. Make it"):
        gputune.tune(Graph, ROWS, CLASSES, n_trials=1, max_epochs=1, cv=2, verbose=0)
    torch.manual_seed(0)
    assert largest_difference(GraphOfParts(), epochs=10) < 1e-9


class Warm(Net):
    """Halves its outputs in training after 5 steps, which a subclass counts."""

    def forward(self, x):
        outputs = super().forward(x)
        return 0.5 * outputs if self.training and self.count() > 5 else outputs


class CountsInADict(Warm):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.state = {"n": 0}

    def count(self):
        self.state["n"] += 1
        return self.state["n"]


class CountsByALength(Warm):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.steps = []

    def count(self):
        self.steps.append(1)
        return len(self.steps)


class CountsInNumPy(Warm):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.n = np.int64(0)

    def count(self):
        self.n = np.int64(self.n + 1)
        return self.n


class CountsInAnArray(Warm):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.n = np.zeros(1)

    def count(self):
        self.n += 1
        return self.n[0]


@pytest.mark.parametrize("build", [CountsInADict, CountsByALength, CountsInNumPy, CountsInAnArray])
def test_a_count_that_acts_late_is_as_in_a_loop(build):
    torch.manual_seed(0)
    assert largest_difference(build(), epochs=10) < 1e-9


class FillsACache(Net):
    """Keeps a table by number of rows, and its last activations."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.tables = {}
        self.seen = []

    def forward(self, x):
        table = self.tables.setdefault(len(x), torch.ones(len(x), 1))
        self.seen = [x]
        return super().forward(x * table.to(x.dtype))


def test_a_cache_of_tensors_trains_stacked():
    torch.manual_seed(0)
    assert largest_difference(FillsACache(), "stacked", epochs=3) < 1e-9


class CountsPredictions(Net):
    """Scales its outputs by a number of NumPy that training changes."""

    def __init__(self, n_features=6, n_outputs=3):
        super().__init__(n_features, n_outputs)
        self.n = np.int64(1)

    def forward(self, x):
        if self.training:
            self.n = np.int64(self.n + 1)
        return super().forward(x) / self.n


def test_a_saved_model_keeps_a_number_of_numpy(tmp_path):
    words = {"n_trials": 1, "max_epochs": 3, "cv": 2, "verbose": 0}
    study = gputune.tune(CountsPredictions, ROWS, CLASSES, **words)
    model = study.best_model()
    assert model.module.n > 1 and type(model.module.n) is np.int64
    model.save(tmp_path / "model")
    loaded = gputune.load_model(tmp_path / "model", module=CountsPredictions)
    assert torch.equal(
        torch.as_tensor(loaded.predict_proba(ROWS)), torch.as_tensor(model.predict_proba(ROWS))
    )


class ForManyRows(Net):
    """Uses a layer only for minibatches with more rows than gputune tries."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.extra = nn.Linear(6, 6)

    def uses_extra(self, rows):
        return rows == 40

    def forward(self, x):
        return super().forward(self.extra(x) if self.uses_extra(len(x)) else x)


class ForFewRows(ForManyRows):
    """Uses a layer only for minibatches of the sizes that gputune tries, and in evaluation."""

    def uses_extra(self, rows):
        return rows < 40 or not self.training


@pytest.mark.parametrize("backend", ["auto", "loop"])
@pytest.mark.parametrize("build", [ForManyRows, ForFewRows])
def test_a_layer_for_some_sizes_of_minibatches_is_as_in_a_loop(build, backend, monkeypatch):
    monkeypatch.delenv("GPUTUNE_STRICT_BACKENDS")
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        difference = largest_difference(build(), backend, epochs=5, weight_decay=0.1)
    assert difference < 1e-9
    reasons = [w for w in caught if "only in some training steps" in str(w.message)]
    assert len(reasons) == (backend == "auto")


class Unfreezes(Net):
    """Freezes a layer in its first forward passes."""

    starts_at = 5

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.n = 0
        self.first.weight.requires_grad_(False)

    def forward(self, x):
        self.n += self.training
        if self.n > self.starts_at:
            self.first.weight.requires_grad_(True)
        return super().forward(x)


class UnfreezesAtOnce(Unfreezes):
    starts_at = 0


class Detaches(Net):
    """Does without ``requires_grad_``, as the error of ``Unfreezes`` advises."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.n = 0

    def forward(self, x):
        self.n += self.training
        weight = self.first.weight if self.n > 5 else self.first.weight.detach()
        return self.last(torch.tanh(functional.linear(x, weight, self.first.bias)))


@pytest.mark.parametrize("build", [Unfreezes, UnfreezesAtOnce])
def test_a_parameter_that_forward_unfreezes_is_refused(build):
    says = f"{build.__name__} unfreezes its parameter 'first.weight' in training, .* detach"
    with pytest.raises(gputune.InputError, match=says):
        gputune.tune(build, ROWS, CLASSES, n_trials=1, max_epochs=10, cv=2, verbose=0)


def test_a_parameter_that_forward_detaches_at_first_is_as_in_a_loop():
    torch.manual_seed(0)
    assert largest_difference(Detaches(), epochs=10, weight_decay=0.1) < 1e-9
