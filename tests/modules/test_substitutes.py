"""What is put in the place of an operation of PyTorch's gives its numbers, and its derivatives."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional

from gputune.modules.inspection import traits_of
from gputune.modules.substitutes import Substitutes, run_recurrent
from problems import fill, make_data

PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
LATER = torch.ones(5, 5, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("more", [{}, {"scale": 0.3}, {"is_causal": True}, {"dropout_p": 0.4}, {"attn_mask": True}])
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
@pytest.mark.parametrize("masks", [{}, {"src_key_padding_mask": PADDING}, {"src_mask": LATER, "is_causal": True}])
@pytest.mark.parametrize("training", [False, True])
def test_a_transformer_is_mapped_over_members(training, masks):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2 if training else 0.0, batch_first=True).double()
    layer.train(training)
    params = {k: w.detach() for k, w in layer.named_parameters()}
    members = {k: torch.stack([w, 2 * w]) for k, w in params.items()}
    x = torch.randn(3, 5, 8, dtype=torch.float64)

    def loss(own):
        return torch.func.functional_call(layer, own, (x,), masks).square().sum()

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
    "kind", [nn.GRU, nn.LSTM, nn.RNN, partial(nn.RNN, nonlinearity="relu"), partial(nn.LSTM, proj_size=2)]
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


def _states(end):
    return [end] if isinstance(end, torch.Tensor) else list(end)


class Packed(nn.Module):
    """The columns of a row one after another, packed; the last state counts."""

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.cell, self.leave = nn.GRU(1, 4, batch_first=True), nn.Linear(4, n_outputs)

    def forward(self, x):
        lengths = torch.full((len(x),), x.shape[1])
        packed = nn.utils.rnn.pack_padded_sequence(x[..., None], lengths, batch_first=True)
        return self.leave(self.cell(packed)[1][-1])


def test_packed_sequences_train_one_by_one():
    (config,) = fill({})
    assert traits_of(Packed, config, make_data()).unstackable
