"""Substitutes of PyTorch's operations and layers give the same numbers and the same derivatives."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from gputune.modules.inspection import traits_of
from gputune.modules.mapped import Mapped
from gputune.modules.module import StackedModule
from gputune.modules.substitutes import Substitutes, run_lstm_cell, run_recurrent
from problems import fill, largest_difference, make_data, module_loop, train_modules

MEMBERS = 3

LAYERS = {
    "vectors": (nn.Linear(4, 3), (4,)),
    "rows": (nn.Linear(4, 3, bias=False), (5, 4)),
    "sequences": (nn.Linear(4, 3), (2, 5, 4)),
    "sequences, turned": (nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Linear(4, 3)), (5, 8)),
    "layer norm": (nn.LayerNorm((2, 4)), (5, 3, 2, 4)),
    "layer norm of a vector": (nn.LayerNorm(4, elementwise_affine=False), (4,)),
    "group norm": (nn.GroupNorm(2, 4), (5, 4)),
    "group norm of images": (
        nn.Sequential(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4, affine=False)),
        (5, 2, 3, 3),
    ),
    "conv1d": (nn.Conv1d(4, 6, 3, groups=2, stride=2), (5, 4, 9)),
    "conv2d": (nn.Conv2d(2, 4, 3, padding="same", padding_mode="zeros"), (5, 2, 6, 7)),
    "conv2d of one image": (nn.Conv2d(2, 4, 3, bias=False), (2, 6, 7)),
    "conv3d": (nn.Conv3d(2, 3, 2, dilation=2), (5, 2, 4, 4, 4)),
    "pools": (nn.Sequential(nn.Conv2d(2, 4, 2), nn.MaxPool2d(2), nn.AvgPool2d(2)), (5, 2, 9, 9)),
    "pools of one image": (
        nn.Sequential(nn.Conv2d(2, 4, 2), nn.MaxPool2d(3, 1), nn.AvgPool2d(2)),
        (2, 9, 9),
    ),
    "a mean": (nn.Sequential(nn.Conv2d(2, 4, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(1)), (5, 2, 5, 5)),
    "batch norm": (nn.BatchNorm1d(4), (5, 4)),
    "batch norm in evaluation": (nn.BatchNorm1d(4).eval(), (5, 4)),
    "batch norm of images": (nn.BatchNorm2d(4, affine=False), (5, 4, 3, 3)),
    "batch norm alone": (nn.BatchNorm1d(4, track_running_stats=False), (5, 4, 3)),
}


def computed(
    layer: nn.Module, tensors: dict[str, Tensor], x: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    held = {name: tensor + 0 for name, tensor in tensors.items()}  # what a layer writes into
    return functional_call(layer, held, (x,)), {k: held[k] for k in dict(layer.named_buffers())}


@pytest.mark.parametrize("name", LAYERS)
def test_a_mapped_layer_is_that_of_each_member(name):
    layer, shape = LAYERS[name]
    layer = layer.double()
    torch.manual_seed(0)
    x = torch.randn(MEMBERS, *shape, dtype=torch.float64, requires_grad=True)
    tensors = {
        k: torch.stack([t.detach() + 0.1 * m for m in range(MEMBERS)])
        for k, t in layer.state_dict().items()
    }
    leaves = [
        x,
        *(t.requires_grad_() for k, t in tensors.items() if k in dict(layer.named_parameters())),
    ]

    def results(mapped: bool) -> list[Tensor]:
        if mapped:
            with Mapped():
                outputs, after = vmap(lambda own, rows: computed(layer, own, rows))(tensors, x)
        else:
            each = [
                computed(layer, {k: t[m] for k, t in tensors.items()}, x[m]) for m in range(MEMBERS)
            ]
            outputs = torch.stack([one for one, _ in each])
            after = {k: torch.stack([buffers[k] for _, buffers in each]) for k in each[0][1]}
        slopes = torch.autograd.grad(outputs.sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(s.pow(2).sum() for s in slopes), leaves)
        return [outputs, *slopes, *second, *after.values()]

    for found, expected in zip(results(True), results(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_running_statistics_are_written_where_members_have_their_own():
    x = torch.randn(MEMBERS, 5, 4)
    means = torch.zeros(4, MEMBERS)
    variance = torch.ones(4)
    with Mapped():
        vmap(
            lambda rows, mean: functional.batch_norm(rows, mean, variance, training=True),
            in_dims=(0, 1),
        )(x, means)
    torch.testing.assert_close(means.T, 0.1 * x.mean(1))
    assert torch.equal(variance, torch.ones(4))


def test_the_row_of_an_embeddings_padding_has_no_gradient():
    ids = torch.tensor([[0, 3, 1], [3, 3, 2]])
    weights = torch.randn(MEMBERS, 4, 2, requires_grad=True)
    with Mapped():
        found = vmap(lambda weight: functional.embedding(ids, weight, -1))(weights)
    expected = torch.stack([functional.embedding(ids, weight, 3) for weight in weights])
    slopes = [torch.autograd.grad(outputs.sin().sum(), weights)[0] for outputs in (found, expected)]
    assert torch.equal(found, expected) and torch.equal(*slopes) and not slopes[0][:, 3].any()


def test_weights_that_all_members_share_are_mapped_as_torch_does():
    weight = torch.randn(3, 4)
    x = torch.randn(MEMBERS, 5, 4)
    indices = functional.max_pool2d(x[None], 2, return_indices=True)[1]
    with Mapped():
        assert torch.equal(
            vmap(lambda rows: functional.linear(rows, weight))(x), functional.linear(x, weight)
        )
        assert torch.equal(
            vmap(lambda rows: functional.max_pool2d(rows[None], 2, return_indices=True)[1])(x)[
                :, 0
            ],
            indices[0],
        )
        assert torch.equal(functional.linear(x, weight), x @ weight.T)


PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
LATER = torch.ones(5, 5, dtype=torch.bool).triu(1)


@pytest.mark.parametrize(
    "more", [{}, {"scale": 0.3}, {"is_causal": True}, {"dropout_p": 0.4}, {"attn_mask": True}]
)
def test_attention(more):
    query, key, value = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64)
    if "attn_mask" in more:
        more = {"attn_mask": torch.rand(5, 5) > 0.2}
    torch.manual_seed(0)
    expected = functional.scaled_dot_product_attention(query, key, value, **more)
    torch.manual_seed(0)
    with Substitutes():
        found = functional.scaled_dot_product_attention(query, key, value, **more)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("error")  # torch warns of what it maps by a loop
@pytest.mark.parametrize(
    "masks", [{}, {"src_key_padding_mask": PADDING}, {"src_mask": LATER, "is_causal": True}]
)
@pytest.mark.parametrize("training", [False, True])
def test_a_transformer_is_mapped_over_members(training, masks):
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.2 if training else 0.0, batch_first=True
    ).double()
    layer.train(training)
    params = {k: w.detach() for k, w in layer.named_parameters()}
    members = {k: torch.stack([w, 2 * w]) for k, w in params.items()}
    x = torch.randn(3, 5, 8, dtype=torch.float64)

    def loss(own):
        return functional_call(layer, own, (x,), masks).square().sum()

    torch.manual_seed(0)
    with Substitutes():
        found = vmap(grad(loss), randomness="same")(members)
    for c in range(2):
        torch.manual_seed(0)
        expected = grad(loss)({k: w[c] for k, w in members.items()})
        for name, slope in expected.items():
            torch.testing.assert_close(found[name][c], slope, rtol=1e-9, atol=1e-9)


WORDS = [
    {},
    {"batch_first": True, "num_layers": 2, "bidirectional": True},
    {"bias": False, "num_layers": 2, "dropout": 0.4},
]


@pytest.mark.parametrize("words", WORDS, ids=repr)
@pytest.mark.parametrize(
    "kind",
    [nn.GRU, nn.LSTM, nn.RNN, partial(nn.RNN, nonlinearity="relu"), partial(nn.LSTM, proj_size=2)],
)
def test_what_is_written_out_equals_torch(kind, words):
    torch.manual_seed(0)
    rnn = kind(3, 4, **words).double()
    x = torch.randn(5, 6, 3, dtype=torch.float64, requires_grad=True)
    state = [torch.randn_like(part) for part in _states(rnn(x)[1])]
    for start in (None, state[0] if len(state) == 1 else tuple(state)):
        results = []
        for call in (rnn, partial(run_recurrent, rnn)):
            torch.manual_seed(1)
            outputs, end = call(x, start)
            slopes = torch.autograd.grad(outputs.square().sum(), (x, *rnn.parameters()))
            results.append((outputs, *_states(end), *slopes))
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    one = [call(x[0], None)[0] for call in (rnn.eval(), partial(run_recurrent, rnn))]
    torch.testing.assert_close(*one)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (3,)])
def test_the_substitute_of_an_lstm_cell_equals_torch(shape, bias):
    torch.manual_seed(0)
    cell = nn.LSTMCell(3, 4, bias=bias).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    state = [torch.randn(*shape[:-1], 4, dtype=torch.float64, requires_grad=True) for _ in "hc"]
    for begin in (None, tuple(state)):
        results = []
        for call in (cell, partial(run_lstm_cell, cell)):
            h, c = call(x, begin)
            sources = (x, *cell.parameters(), *(begin or ()))
            slopes = torch.autograd.grad(h.square().sum() + c.sin().sum(), sources)
            results.append((h, c, *slopes))
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def _states(end):
    return [end] if isinstance(end, torch.Tensor) else list(end)


class Packed(nn.Module):
    """The columns of a row one after another, packed; the last state counts."""

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.cell = nn.GRU(1, 4, batch_first=True)
        self.leave = nn.Linear(4, n_outputs)

    def forward(self, x):
        lengths = torch.full((len(x),), x.shape[1])
        packed = nn.utils.rnn.pack_padded_sequence(x[..., None], lengths, batch_first=True)
        return self.leave(self.cell(packed)[1][-1])


def test_packed_sequences_train_one_by_one():
    (config,) = fill({})
    assert traits_of(Packed, config, make_data()).unstackable


class Hidden(nn.Module):
    """Two layers with something between them."""

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.first = nn.Linear(n_features, 6)
        self.inner = nn.Linear(6, 6)
        self.last = nn.Linear(6, n_outputs)
        self.begin()

    def begin(self):
        """Change a layer."""

    def between(self, h):
        return torch.tanh(self.inner(h))

    def forward(self, x):
        return self.last(self.between(self.first(x)))


class OldSpectral(Hidden):
    def begin(self):
        self.inner = nn.utils.spectral_norm(self.inner, n_power_iterations=2)


class NewSpectral(Hidden):
    def begin(self):
        self.inner = nn.utils.parametrizations.spectral_norm(self.inner)


class SpectralImages(Hidden):
    def begin(self):
        self.inner = nn.utils.spectral_norm(nn.Conv1d(2, 2, 3, padding=1))

    def between(self, h):
        return torch.tanh(self.inner(h.view(-1, 2, 3))).flatten(1)


class RandomSlopes(Hidden):
    """Draws in two layers, one of which writes in place."""

    def begin(self):
        self.slopes = nn.RReLU(0.2, 0.7)

    def between(self, h):
        h = self.inner(self.slopes(h))
        return functional.rrelu(h, training=self.training, inplace=True)


class Checkpointed(Hidden):
    def between(self, h):
        return checkpoint(lambda h: super(Checkpointed, self).between(h), h, use_reentrant=False)


class CheckpointedOnce(Hidden):
    """The older implementation of torch."""

    def between(self, h):
        return checkpoint(super().between, h, use_reentrant=True)


class CheckpointedDropout(Hidden):
    def between(self, h):
        def inside(h, *, rate):
            return functional.dropout(torch.tanh(self.inner(h)), rate, self.training)

        return checkpoint(inside, h, use_reentrant=False, rate=0.3)


SUBSTITUTED = (
    OldSpectral,
    NewSpectral,
    SpectralImages,
    RandomSlopes,
    Checkpointed,
    CheckpointedOnce,
    CheckpointedDropout,
)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # in evaluation mode
@pytest.mark.parametrize("build", SUBSTITUTED)
@pytest.mark.parametrize("recorded", [False, True])
def test_stacked_members_equal_the_plain_loop(build, recorded):
    data = make_data()
    configs = fill({"lr": 0.01, "batch_size": 16}, {"lr": 0.003, "batch_size": 16})
    assert traits_of(build, configs[0], data).unstackable == ""
    backend = "recorded" if recorded else "eager"
    trained = train_modules(StackedModule, build, configs, data, 3, backend=backend)
    for c, config in enumerate(configs):
        alone = module_loop(build, data, 0, config, 3)
        assert largest_difference(trained.member(0, c), alone) <= 1e-10


def test_random_slopes_before_other_draws_train_one_by_one():
    class After(RandomSlopes):
        def forward(self, x):
            return functional.dropout(super().forward(x), 0.4, self.training)

    (config,) = fill({})
    assert "draws random numbers" in traits_of(After, config, make_data()).unstackable


def test_checkpoints_outside_of_stacked_members_are_those_of_torch():
    calls = []

    def counted(x):
        calls.append(x)
        return x.sin()

    def times_called(**options):
        calls.clear()
        x = torch.ones(2, requires_grad=True)
        checkpoint(counted, x, **options).sum().backward()
        return len(calls)

    for reentrant in (False, True):
        with Substitutes():
            assert times_called(use_reentrant=reentrant) == 1
            with Substitutes():
                pass
            assert times_called(use_reentrant=reentrant) == 1
        assert times_called(use_reentrant=reentrant) == 2
    with Substitutes():  # its context may do more than save memory
        contexts = partial(torch.utils.checkpoint.create_selective_checkpoint_contexts, [])
        assert times_called(use_reentrant=False, context_fn=contexts) == 2
