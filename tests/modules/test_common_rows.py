"""Members of a module with frozen parameters read the rows of their fold without copies for each
member: the results are those of plain modules, and the frozen part is computed once."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.nn import functional

from gputune.engine import plan
from gputune.engine.plan import Planner
from gputune.modules import mapped
from gputune.modules.inspection import traits_of
from gputune.modules.module import StackedModule
from gputune.population.batches import Batches
from gputune.population.population import populations
from gputune.scoring.validation import Validation
from problems import (
    fill,
    largest_difference,
    make_data,
    module_loop,
    peak_bytes,
    shape_of,
    train_modules,
)


class Frozen(nn.Module):
    """A frozen body, dropout, and a trained head; ``forward`` may branch on its rows."""

    def __init__(self, n_features, n_outputs, p=0.0, norm=False):
        super().__init__()
        self.body = nn.Linear(n_features, 16).requires_grad_(False)
        self.drop = nn.Dropout(p)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.inner = nn.Linear(16, 8)
        self.head = nn.Linear(8, n_outputs)

    def forward(self, x):
        h = self.drop(self.body(x).tanh())
        return self.head(self.norm(self.inner(h)).relu())


class Branching(Frozen):
    def forward(self, x):
        if bool((x > 100).any()):
            x = x.clamp(max=100)
        return super().forward(x)


class Writing(Frozen):
    def forward(self, x):
        x[:, 0] = 0
        return super().forward(x)


CONFIGS = fill(
    {"lr": 3e-3, "batch_size": 8},
    {"lr": 1e-2, "batch_size": 8, "weight_decay": 0.1},
    {"lr": 1e-3, "batch_size": 8},
)


@pytest.mark.parametrize("build", [Frozen, Branching, Writing])
def test_members_with_common_rows_equal_plain_loops(build):
    data = make_data(dtype=torch.float64)
    assert traits_of(build, CONFIGS[0], data).common_rows
    for backend in ("eager", "recorded"):
        trained = train_modules(StackedModule, build, CONFIGS, data, 2, backend=backend)
        for f in range(data.n_folds):
            for c, config in enumerate(CONFIGS):
                expected = module_loop(build, data, f, config, 2)
                assert largest_difference(trained.member(f, c), expected) < 1e-10


def test_common_rows_give_the_results_of_mapped_rows_with_dropout_and_statistics():
    data = make_data(dtype=torch.float64)
    config = {"batch_size": 8, "module__p": 0.3, "module__norm": True}
    configs = fill(config | {"lr": 3e-3}, config | {"lr": 1e-2})
    traits = traits_of(Frozen, configs[0], data)
    assert traits.common_rows and traits.draws
    members = []
    for common in (True, False):
        network = StackedModule(
            Frozen, configs, shape_of(data), seed=0, traits=replace(traits, common_rows=common)
        )
        flat = network.start()
        params = network.blocks.views(flat)
        grads = network.trained.views(torch.zeros(network.trained.size).to(flat))
        batches = Batches(data, [8, 8], data.y[None], seed=0, exact=True, least_rows=2)
        for batch in batches.at(0, 0):
            network.gradient(params, batch, grads)
        members.append((grads, params, network.outputs(params, 1, [data.x[0]])))
    (grads, params, outputs), (other_grads, other_params, other_outputs) = members
    for name, gradient in grads.items():
        assert torch.allclose(gradient, other_grads[name], rtol=1e-10, atol=1e-12), name
    for name, tensor in params.items():
        assert torch.allclose(tensor, other_params[name], rtol=1e-12, atol=1e-12), name
    assert torch.allclose(outputs, other_outputs, rtol=1e-12, atol=1e-12)


def gradient_bytes(folds):
    """The most bytes that a step with common rows takes, in addition to its arguments."""
    data = make_data(n=240, folds=folds)
    traits = traits_of(Frozen, CONFIGS[0], data)
    configs = fill(*({"batch_size": 64} for _ in range(8)))
    network = StackedModule(Frozen, configs, shape_of(data), seed=0, traits=traits)
    flat = network.start()
    params = network.blocks.views(flat)
    grads = network.trained.views(torch.zeros(network.trained.size))
    batches = Batches(data, [64] * 8, data.y[None], seed=0, exact=True)
    (batch,) = batches.at(0, 0)
    return peak_bytes(lambda: network.gradient(params, batch, grads))


def test_a_step_has_the_activations_of_one_fold_at_a_time():
    assert gradient_bytes(4) < 1.2 * gradient_bytes(2)


def test_wide_common_rows_are_scored_in_small_blocks():
    data = make_data(n=240, dtype=torch.float32)
    traits = traits_of(Frozen, CONFIGS[0], data)
    blocks = {}
    for widest in (64, 1 << 17, 1 << 22):
        for common in (True, False):
            known = replace(traits, widest=widest, common_rows=common)
            network = StackedModule(Frozen, CONFIGS, shape_of(data), seed=0, traits=known)
            blocks[widest, common] = Validation(data, None)._block_rows(network, 3)
    assert blocks[64, True] > 64
    assert blocks[1 << 17, True] == 5  # 3 trials x 2^17 values x 4 bytes x 5 rows <= 8 MiB
    assert blocks[1 << 22, True] == 4
    assert blocks[1 << 17, False] == blocks[1 << 22, False] == 64


class Embedded(Frozen):
    """Reads ids by a frozen embedding, which has no product."""

    def __init__(self, n_features, n_outputs, convolves=False):
        super().__init__(n_features, n_outputs)
        self.table = nn.Embedding(100, n_features).requires_grad_(False)
        self.convolution = nn.Conv1d(1, 1, 1) if convolves else nn.Identity()

    def forward(self, x):
        x = self.table(x.argmax(1)) + x
        return self.convolution(super().forward(x)[:, None])[:, 0]


def test_the_share_of_weights_before_the_first_trained_layer_is_known():
    data = make_data()
    d, k = data.n_features, data.n_outputs
    expected = 16 * d / (16 * d + 16 * 8 + 8 * k)
    for build in (Frozen, Embedded):
        traits = traits_of(build, CONFIGS[0], data)
        assert traits.shared == pytest.approx(expected) and not traits.convolves
    convolving = {**CONFIGS[0], "module__convolves": True}
    traits = traits_of(Embedded, convolving, data)
    assert traits.shared == 0 and traits.convolves


class Convolved(nn.Module):
    """A trained layer before or behind a frozen convolution."""

    def __init__(self, n_features, n_outputs, behind):
        super().__init__()
        self.behind = behind
        self.trained = nn.Linear(n_features, n_features)
        self.convolution = nn.Conv1d(1, 1, 1).requires_grad_(False)
        self.head = nn.Linear(n_features, n_outputs)

    def forward(self, x):
        if self.behind:
            x = self.trained(x)
        x = self.convolution(x[:, None])[:, 0]
        return self.head(x if self.behind else self.trained(x))


@pytest.mark.parametrize("behind", [True, False])
def test_a_convolution_behind_a_trained_layer_is_noticed(behind):
    config = {**CONFIGS[0], "module__behind": behind}
    assert traits_of(Convolved, config, make_data()).convolves == behind


def test_a_module_without_frozen_parameters_maps_its_rows():
    class Trained(Frozen):
        def __init__(self, n_features, n_outputs):
            super().__init__(n_features, n_outputs)
            self.requires_grad_(True)

    assert not traits_of(Trained, CONFIGS[0], make_data()).common_rows


def test_the_frozen_part_runs_on_the_rows_of_a_fold_once(monkeypatch):
    data = make_data()
    traits = traits_of(Frozen, CONFIGS[0], data)
    network = StackedModule(Frozen, CONFIGS, shape_of(data), seed=0, traits=traits)
    shapes = []
    linear = nn.Linear.forward

    def watched(module, x):
        if module.out_features == 16:
            shapes.append(torch._C._functorch.is_batchedtensor(x))
        return linear(module, x)

    monkeypatch.setattr(nn.Linear, "forward", watched)
    network.outputs(network.blocks.views(network.start()), 0, [data.x[0]])
    assert shapes == [False]  # once, on rows without an axis of members


def test_the_plan_puts_more_trials_into_a_chunk_if_the_frozen_part_is_large(monkeypatch):
    class Wide(Frozen):
        def __init__(self, n_features, n_outputs):
            super().__init__(n_features, n_outputs)
            self.extra = nn.Linear(1000, 100).requires_grad_(False)

    data = make_data()
    configs = fill(*({"lr": 1e-3 * (i + 1), "batch_size": 8} for i in range(6)))
    groups = populations(configs, "module", rows=30)
    monkeypatch.setattr("gputune.engine.backends.base._CACHE_BYTES", 1)
    for build, chunks in ((Wide, 1), (Frozen, 6)):
        traits = traits_of(build, configs[0], data)
        known = {groups[0].arguments: traits}
        planner = Planner(
            data, None, 1, traits=known, parameters=traits.parameters, backend="eager"
        )
        if build is Frozen:
            known[groups[0].arguments] = replace(traits, frozen=1)
        assert len(planner.plan(groups, 1).chunks) == chunks
    assert plan._useful_bytes(replace(traits, common_rows=False)) == 0


def test_differentiable_outputs_equal_the_outputs():
    data = make_data(dtype=torch.float64)
    traits = traits_of(Frozen, CONFIGS[0], data)
    network = StackedModule(Frozen, CONFIGS, shape_of(data), seed=0, traits=traits)
    params = network.blocks.views(network.start())
    members = {name: w.flatten(0, 1) for name, w in params.items()}
    rows = [x.repeat_interleave(3, 0) for x in data.inputs]  # (folds x trials, rows, ...)
    if len(data.inputs[0]) == 1:
        rows = [x.expand(data.n_folds, *x.shape[1:]).repeat_interleave(3, 0) for x in data.inputs]
    outputs = network.differentiable(members, rows, None).view(data.n_folds, 3, -1, data.n_outputs)
    for f in range(data.n_folds):
        expected = network.outputs(params, f, [rows[0][3 * f]])
        assert torch.allclose(outputs[f], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(5,), (7, 5), (7, 3, 5)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_with_few_outputs_on_common_rows_is_one_product(shape, has_bias, monkeypatch):
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=draws, dtype=torch.float64)
    weight = torch.randn(4, 2, 5, generator=draws, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, 2, generator=draws, dtype=torch.float64, requires_grad=True)
    tensors = [weight, bias] if has_bias else [weight]
    monkeypatch.setattr(mapped, "_Linear", None)  # one product for each member
    with mapped.Mapped():
        outputs = vmap(lambda *w: functional.linear(x, *w))(*tensors)
    expected = torch.stack([functional.linear(x, *w) for w in zip(*tensors)])
    assert torch.allclose(outputs, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(outputs.square().sum(), tensors)
    others = torch.autograd.grad(expected.square().sum(), tensors)
    for gradient, other in zip(gradients, others, strict=True):
        assert torch.allclose(gradient, other, rtol=1e-12, atol=1e-12)


def test_shared_outputs_of_frozen_layers_are_no_memory_of_a_member():
    data = make_data()

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(data.n_features, 1000).requires_grad_(False)
            self.inner = nn.Linear(1000, 8)
            self.head = nn.Linear(8, data.n_outputs)

        def forward(self, x):
            return self.head(self.inner(self.body(x)))

    assert traits_of(Wide, fill({"lr": 1e-3})[0], data).widest == 8
