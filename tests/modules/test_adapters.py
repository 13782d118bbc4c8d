"""LoRA: a member equals a loop in plain PyTorch; bad input is refused; frozen tensors exist once."""

import copy
import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional

import gputune
from gputune.engine.stacked import StackedChunk
from gputune.modules import inspection
from gputune.modules.inspection import traits_of
from gputune.modules.looped import LoopedModule
from gputune.modules.module import StackedModule
from gputune.modules.pretrained import LoraLinear, is_target
from problems import fill, make_data, rows_of, shape_of, train_modules


def refused(*words):
    """A check of refusals: an InputError with these words, in this order, in its message."""
    return pytest.raises(gputune.InputError, match=".*".join(map(re.escape, words)))


class Base(nn.Module):
    """A small transformer-like module with two target layers and a head."""

    def __init__(self, n_features=5, hidden=24, n_outputs=3):
        super().__init__()
        self.enter = nn.Linear(n_features, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.inner = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, n_outputs)

    def forward(self, x):
        h = self.norm(self.enter(x).tanh())
        return self.head(h + functional.gelu(self.inner(h)))


def make_base(**words):
    torch.manual_seed(0)
    return Base(**words)


class PlainLora(nn.Module):
    """A hand-written LoRA layer, without padding."""

    def __init__(self, base, A, B, scale):
        super().__init__()
        self.base, self.scale = base, scale
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.A @ self.B)


def plain_member(builder, base, network_start, config):
    """The module of a hand-written loop, whose A and B begin as the member's first columns."""
    rank = config["rank"]
    scale = config["alpha"] / (math.sqrt(rank) if config.get("rslora") else rank)
    module = copy.deepcopy(base).double().requires_grad_(False)
    for name in ("enter", "inner"):
        start = network_start[f"module.{name}.A"][:, :rank].clone()
        layer = getattr(module, name)
        B = torch.zeros(rank, layer.out_features, dtype=torch.float64)
        setattr(module, name, PlainLora(layer, start, B, scale))
    module.head.requires_grad_(True)
    return module


CONFIGS = fill(
    {"rank": 2, "alpha": 8, "lr": 3e-3, "weight_decay": 0.0, "batch_size": 8},
    {"rank": 4, "alpha": 32, "lr": 1e-3, "weight_decay": 0.1, "batch_size": 8},
    {"rank": 1, "alpha": 8, "lr": 2e-3, "weight_decay": 0.01, "batch_size": 8},
    {"rank": 5, "alpha": 16, "lr": 3e-4, "weight_decay": 0.3, "batch_size": 8, "rslora": True},
)
TARGETS = ["enter", "inner"]


@pytest.mark.parametrize("kind", [StackedModule, LoopedModule])
def test_a_member_equals_a_loop_in_plain_pytorch(kind):
    data = make_data(dtype=torch.float64)
    base = make_base(n_features=data.n_features, n_outputs=data.n_outputs)
    builder = gputune.lora(base.double(), targets=TARGETS, modules_to_save=["head"])
    traits = traits_of(builder, CONFIGS[0], data)
    assert traits.common_rows and not traits.unstackable
    network = kind(builder, CONFIGS, shape_of(data), seed=0, traits=traits)
    start = network.starts()[0]
    backend = "loop" if kind is LoopedModule else "eager"
    epochs = 6
    trained = train_modules(kind, builder, CONFIGS, data, epochs, backend=backend)
    for f in range(data.n_folds):
        x, y, _ = rows_of(data, f)
        for c, config in enumerate(CONFIGS):
            module = plain_member(builder, base, start, config)
            weights = [w for w in module.parameters() if w.requires_grad]
            optimizer = torch.optim.AdamW(
                weights, lr=config["lr"], weight_decay=config["weight_decay"]
            )
            for epoch in range(epochs):
                generator = gputune.ground.seeding.stream(0, "rows", len(x), epoch)
                order = torch.randperm(len(x), generator=generator)
                for rows in order.split(8):
                    optimizer.zero_grad()
                    functional.cross_entropy(module(x[rows]), y[rows]).backward()
                    optimizer.step()
            member = trained.member(f, c)
            assert torch.allclose(member(x), module(x), rtol=1e-10, atol=1e-10)
            layer = member.module.inner
            rank = config["rank"]
            assert torch.allclose(layer.A[:, :rank], module.inner.A, rtol=0, atol=1e-10)
            # the padding is 0 after the training too
            assert not layer.A[:, rank:].any() and not layer.B[rank:].any()
            assert layer.B[:rank].any()


def test_ranks_and_alphas_share_a_population_and_large_ranks_do_not():
    from gputune.population.population import populations

    configs = fill(*({"rank": r, "alpha": a, "lr": 1e-3} for r in (2, 16, 17) for a in (4, 8)))
    groups = populations(configs, "module", rows=30)
    assert sorted(len(group.index) for group in groups) == [2, 4]


def test_frozen_tensors_exist_once_and_are_not_converted():
    data = make_data()
    base = make_base(n_features=data.n_features, n_outputs=data.n_outputs).bfloat16()
    builder = gputune.lora(base, targets=["inner"])
    first, second = builder(), builder()
    assert first.module.enter.weight is second.module.enter.weight
    assert first.module.enter.weight.data_ptr() == base.enter.weight.data_ptr()
    assert first.module.inner.base.weight.data_ptr() == second.module.inner.base.weight.data_ptr()
    first.to(torch.float64)
    assert first.module.enter.weight.dtype == torch.bfloat16
    assert first.module.inner.A.dtype == torch.float64
    assert all(w.requires_grad for w in base.parameters())  # the base itself is unchanged
    looped = LoopedModule(builder, CONFIGS[:2], shape_of(data), seed=0)
    pointer = looped.plain(looped.shape.device).module.enter.weight.data_ptr()
    assert pointer == base.enter.weight.data_ptr()


def test_a_base_in_bfloat16_trains_in_single_precision():
    data = make_data()
    base = make_base(n_features=data.n_features, n_outputs=data.n_outputs).bfloat16()
    builder = gputune.lora(base, targets=TARGETS, modules_to_save=["head"])
    for kind, backend in ((StackedModule, "eager"), (LoopedModule, "loop")):
        trained = train_modules(kind, builder, CONFIGS, data, 2, backend=backend)
        assert traits_of(builder, CONFIGS[0], data).common_rows
        module = trained.member(0, 1).module
        assert module.inner.A.dtype == module.head.weight.dtype == data.dtype
        assert module.inner.base.weight.data_ptr() == base.inner.weight.data_ptr()
        assert module.inner.B.any()


def test_a_frozen_tensor_moves_to_a_device_only_once():
    base = make_base()
    builder = gputune.lora(base, targets=["inner"])
    first, second = builder().to("meta"), builder().to("meta")
    assert first.module.enter.weight is second.module.enter.weight
    assert first.module.enter.weight.is_meta and not base.enter.weight.is_meta
    assert first.module.inner.A is not second.module.inner.A


def test_a_search_finds_a_model_and_a_resumed_search_equals_it(tmp_path):
    x = torch.randn(48, 5, generator=torch.Generator().manual_seed(0))
    y = (x[:, :2].sum(1) > 0).long()
    base = make_base(n_outputs=2)
    builder = gputune.lora(base, targets=TARGETS, modules_to_save=["head"])
    space = {
        "rank": [1, 2, 4],
        "alpha": [4, 8],
        "rslora": [False, True],
        "lr": [1e-3, 1e-2],
        "lr_factor__B": [1, 4],
        "dropout": [0.0, 0.1],
        "batch_size": [8],
    }
    words = {"space": space, "n_trials": 6, "cv": 2, "verbose": 0, "random_state": 1}
    study = gputune.tune(builder, x, y, max_epochs=3, study=tmp_path / "a.db", **words)
    again = gputune.tune(builder, x, y, max_epochs=3, **words)
    assert [t.score for t in study.trials] == [t.score for t in again.trials]
    assert {t.params["rank"] for t in study.trials} <= {1, 2, 4}
    assert isinstance(study.best_model().module.module.inner, LoraLinear)
    assert study.best_model().predict(x.numpy()).shape == (48,)


def test_a_base_is_tried_only_once_before_the_training(monkeypatch):
    inspected = []
    inspect = inspection.inspect_module

    def counted(trial):
        inspected.append(len(trial.y))
        return inspect(trial)

    monkeypatch.setattr(inspection, "inspect_module", counted)
    # The first layer is adapted, so no features are kept.
    base = make_base(n_features=8, n_outputs=2)
    builder = gputune.lora(base, targets=TARGETS, modules_to_save=["head"])
    x, y = torch.randn(48, 8), torch.arange(48) % 2
    gputune.tune(builder, x, y, space={"lr": [1e-3]}, cv=2, max_epochs=1, verbose=0)
    assert inspected == [7]  # rows: a pass of a pretrained module takes long


def test_targets_are_those_of_peft():
    paths = ["encoder.0.query", "encoder.1.query", "encoder.1.out.dense", "encoder.1.xdense"]
    assert [p for p in paths if is_target(p, ["query"])] == paths[:2]
    assert [p for p in paths if is_target(p, ["dense"])] == [paths[2]]
    assert [p for p in paths if is_target(p, r".*\.1\..*")] == paths[1:]
    assert not is_target("encoder.0.query", "query")  # a regular expression for the whole name


def test_all_linear_leaves_out_what_trains_as_a_whole():
    module = gputune.lora(make_base(), modules_to_save=["head"])()
    adapted = [name for name, part in module.module.named_modules() if isinstance(part, LoraLinear)]
    assert adapted == ["enter", "inner"]
    assert module.module.head.weight.requires_grad


def test_the_fast_path_of_a_transformer_layer_does_not_ignore_adapters():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    base = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    module = gputune.lora(base, targets=["linear1", "linear2"])().eval()
    x = torch.randn(3, 4, 16)
    with torch.no_grad():
        before = module(x)
        for part in module.modules():
            if isinstance(part, LoraLinear):
                part.B.fill_(1.0)
        assert not torch.allclose(module(x), before)
    # the base itself still takes it
    assert base.layers[0].activation_relu_or_gelu


@pytest.mark.parametrize(
    "targets, remedy",
    [(["iner"], "Did you mean 'inner'?"), (r"layers\..*", "For example 'enter', 'inner', 'head'.")],
)
def test_targets_that_match_nothing_are_refused(targets, remedy):
    with refused("targets", "must match a linear layer of Base", remedy):
        gputune.lora(make_base(), targets=targets)


def test_a_layer_that_is_never_called_is_refused():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter = nn.Linear(5, 8)
            self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            h = self.enter(x)[:, None]
            return self.head((h + self.mix(h, h, h)[0])[:, 0])

    data = make_data()
    base = Attention()
    base.enter = nn.Linear(data.n_features, 8)
    builder = gputune.lora(base, targets=["out_proj", "enter"], modules_to_save=["head"])
    with refused("targets", "never calls this layer", "Leave this layer out of the targets."):
        traits_of(builder, CONFIGS[0], data)
    # "all-linear" does not contain it
    assert not traits_of(gputune.lora(base), CONFIGS[0], data).unused


def test_batch_norm_in_training_is_refused():
    data = make_data()
    base = nn.Sequential(nn.Linear(data.n_features, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    with refused("base", "a batch norm whose statistics change", "FrozenBatchNorm2d"):
        traits_of(gputune.lora(base, targets=["0"]), CONFIGS[0], data)


def test_a_rank_above_the_size_of_a_layer_is_refused():
    data = make_data()
    builder = gputune.lora(make_base(n_features=data.n_features), targets=["enter"])
    large = fill({"rank": data.n_features + 1})[0]
    with refused("rank", f"must be at most {data.n_features}", "Use smaller ranks"):
        traits_of(builder, large, data)


def test_a_base_that_trains_completely_is_refused():
    base = nn.Sequential(nn.Sequential(nn.Linear(5, 4)), nn.Linear(4, 3))
    with refused("modules_to_save", "contains all parameters of the base", "Name only the head"):
        gputune.lora(base, targets=["1"], modules_to_save=["0", "1"])


def test_a_name_of_modules_to_save_must_exist():
    with refused("modules_to_save", "must name modules of Base", "Did you mean 'head'?"):
        gputune.lora(make_base(), modules_to_save=["haed"])


def test_a_base_that_does_not_fit_is_refused(monkeypatch):
    module = gputune.lora(make_base(), targets=["inner"])()

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(nn, "Parameter", full)
    with refused("base", "does not fit into the free memory of 'meta'", "Use a smaller base"):
        module.to("meta")


def test_a_base_that_is_no_module_is_refused():
    with refused("base", "must be a torch.nn.Module with its weights", "got", "not its class"):
        gputune.lora(Base)


def test_the_keys_of_a_lora_are_refused_for_other_modules():
    x, y = torch.randn(20, 5), torch.arange(20) % 2
    with pytest.raises(gputune.InputError, match="must have only the keys"):
        gputune.tune(Base, x, y, space={"rank": [2, 4]}, verbose=0)


class Killed(BaseException):
    """Stands for a SIGKILL."""


@pytest.mark.parametrize(
    "targets",
    # without and with kept features
    [pytest.param(TARGETS, marks=pytest.mark.long), ["inner"]],
)
def test_a_killed_search_resumes_in_the_middle_and_equals_an_uninterrupted_one(
    targets, tmp_path, monkeypatch
):
    x = torch.randn(48, 1, 5, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0, :2].sum(1) > 0).long()
    base = nn.Sequential(nn.Flatten(), make_base(n_outputs=2))
    builder = gputune.lora(base, targets=targets, modules_to_save=["head"])
    space = {"rank": [1, 2, 4], "alpha": [4, 8], "lr": [1e-3, 1e-2], "batch_size": [8]}
    words = {"space": space, "n_trials": 5, "max_epochs": 8, "cv": 2, "random_state": 1}
    words |= {"verbose": 0, "workers": 1, "checkpoint_seconds": 1e-9}
    whole = gputune.tune(builder, x, y, study=tmp_path / "whole.db", **words)
    trained = []
    advance = StackedChunk.advance
    for moment in (3, 2, 3):  # the epochs before each kill
        left = [moment]

        def killed(chunk, epoch, left=left):
            if not left[0]:
                raise Killed
            left[0] -= 1
            trained.append(epoch)
            advance(chunk, epoch)

        with monkeypatch.context() as patch:
            patch.setattr(StackedChunk, "advance", killed)
            with pytest.raises(Killed):
                gputune.tune(builder, x, y, study=tmp_path / "killed.db", **words)
    assert max(trained) > 3  # a resumed search continues from a checkpoint
    resumed = gputune.tune(builder, x, y, study=tmp_path / "killed.db", **words)
    assert [t.params for t in resumed.trials] == [t.params for t in whole.trials]
    for curve, other in zip(resumed.curves, whole.curves, strict=True):
        assert curve.tobytes() == other.tobytes()
    assert resumed.best_score == whole.best_score
