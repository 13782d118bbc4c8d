"""nn.RNN, nn.GRU and nn.LSTM written out in operations that can be mapped over members, and differentiated twice.

One product gives the input's part of all gates at all times; what is left of a step is a product with the hidden state
and a few elementwise operations. The parameters are the module's own, under their own names.
Source: the equations of torch.nn.RNN, GRU and LSTM, whose order of gates is kept.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

KINDS = (nn.RNN, nn.GRU, nn.LSTM)

State: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""(layers x directions, B, H), of an LSTM two of them: hidden state and cell."""


def run_recurrent(rnn: nn.RNNBase, x: Tensor, hx: State | None = None) -> tuple[Tensor, State]:
    """Return what ``rnn(x, hx)`` returns: outputs at all times, and the state after the last."""
    if isinstance(x, PackedSequence):
        raise TypeError("a packed sequence has other rows at every time, which are not mapped")
    alone = x.dim() == 2
    x = x[:, None] if alone else x.transpose(0, 1) if rnn.batch_first else x  # (T, B, D)
    states = [] if hx is None else [hx] if isinstance(hx, Tensor) else list(hx)
    states = [state[:, None] if alone else state for state in states]
    last: list[list[Tensor]] = []
    for layer in range(rnn.num_layers):
        sides = []
        for side in range(1 + rnn.bidirectional):
            place = layer * (1 + rnn.bidirectional) + side
            outputs, *ends = _run_direction(rnn, x, [state[place] for state in states], layer, side)
            sides.append(outputs)
            last.append(ends)
        x = torch.cat(sides, -1) if len(sides) > 1 else sides[0]
        if rnn.dropout and layer < rnn.num_layers - 1:
            x = functional.dropout(x, rnn.dropout, rnn.training)
    ends = [torch.stack(parts) for parts in zip(*last)]
    ends = [end[:, 0] for end in ends] if alone else ends
    outputs = x[:, 0] if alone else x.transpose(0, 1) if rnn.batch_first else x
    return outputs, ends[0] if len(ends) == 1 else (ends[0], ends[1])


def _run_direction(rnn: nn.RNNBase, x: Tensor, start: list[Tensor], layer: int, side: int) -> list[Tensor]:
    """Return the outputs (T, B, H) of one layer in one direction, and its state after the last time."""
    suffix = f"l{layer}" + "_reverse" * side
    w_ih, w_hh = getattr(rnn, f"weight_ih_{suffix}"), getattr(rnn, f"weight_hh_{suffix}")
    b_ih, b_hh = (getattr(rnn, f"bias_{part}_{suffix}") if rnn.bias else None for part in ("ih", "hh"))
    project = getattr(rnn, f"weight_hr_{suffix}") if rnn.proj_size else None
    if not start:
        size = rnn.proj_size or rnn.hidden_size
        start = [x.new_zeros(x.shape[1], size)] + [x.new_zeros(x.shape[1], rnn.hidden_size)] * (
            rnn.mode == "LSTM"
        )
    times = range(len(x)) if side == 0 else range(len(x) - 1, -1, -1)
    if rnn.mode == "LSTM":
        outputs, ends = _lstm(functional.linear(x, w_ih, _sum(b_ih, b_hh)), w_hh, start, times, project)
    elif rnn.mode == "GRU":
        outputs, ends = _gru(functional.linear(x, w_ih, b_ih), w_hh, b_hh, start, times)
    else:
        activation = torch.tanh if rnn.mode == "RNN_TANH" else torch.relu
        outputs, ends = _rnn(functional.linear(x, w_ih, _sum(b_ih, b_hh)), w_hh, start, times, activation)
    return [torch.stack(outputs if side == 0 else outputs[::-1]), *ends]


Outcome = tuple[list[Tensor], list[Tensor]]
"""Outputs at all times, in the order in which they were computed, and the state after the last."""


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a + b


def _rnn(
    gates: Tensor, w_hh: Tensor, start: list[Tensor], times: range, activation: Callable[[Tensor], Tensor]
) -> Outcome:
    """h = activation(x's part + W h)."""
    (h,), outputs, steps = start, [], gates.unbind(0)
    for t in times:
        h = activation(steps[t] + functional.linear(h, w_hh))
        outputs.append(h)
    return outputs, [h]


def _gru(gates: Tensor, w_hh: Tensor, b_hh: Tensor | None, start: list[Tensor], times: range) -> Outcome:
    """r, z = sigmoid(x's part + W h + b); n = tanh(x's part + r (W h + b)); h = (1 - z) n + z h."""
    (h,), outputs, size = start, [], w_hh.shape[-1]
    both, new = (part.unbind(0) for part in torch.split(gates, [2 * size, size], -1))
    for t in times:
        own_both, own_new = torch.split(functional.linear(h, w_hh, b_hh), [2 * size, size], -1)
        r, z = torch.sigmoid(both[t] + own_both).chunk(2, -1)
        n = torch.tanh(new[t] + r * own_new)
        h = n + z * (h - n)
        outputs.append(h)
    return outputs, [h]


def _lstm(gates: Tensor, w_hh: Tensor, start: list[Tensor], times: range, project: Tensor | None) -> Outcome:
    """i, f, g, o of x's part + W h; c = sigmoid(f) c + sigmoid(i) tanh(g); h = sigmoid(o) tanh(c), projected."""
    (h, c), outputs, steps = start, [], gates.unbind(0)
    for t in times:
        i, f, g, o = (steps[t] + functional.linear(h, w_hh)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        h = h if project is None else functional.linear(h, project)
        outputs.append(h)
    return outputs, [h, c]
