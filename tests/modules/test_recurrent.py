"""Recurrent layers, written out, equal torch's own, and their stacked members a plain loop."""

from functools import partial

import pytest
import torch
from torch import nn

from gputune.modules.inspection import traits_of
from gputune.modules.substitutes import run_recurrent
from problems import fill, make_data

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
