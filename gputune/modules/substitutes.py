"""Replacements for operations that torch.func.vmap cannot map over members.

A member is one trial on one fold. In shapes, T counts times, B rows of a minibatch, E and H
features.

The results and derivatives are the same.
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any, Self, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from gputune.modules.trace import Args, Function, Kwargs

_fused = functional.scaled_dot_product_attention
_ATTENDS = signature(functional.multi_head_attention_forward)


class Substitutes(TorchFunctionMode):
    """Inside the context, replaces operations that vmap cannot map, only in this thread.

    - Attention: in evaluation mode, ``nn.MultiheadAttention`` takes a fast path if it sees no
      tensor that requires a gradient, and under vmap it sees none. The fast path has no derivative
      and no batching rule. It is not taken inside a mode like this class. The fused attention
      kernel of a CPU has no batching rule either, and would run member by member.
    - ``normalize`` with the argument ``out``, as in spectral norm.
    - ``rrelu``, whose kernel draws as many random numbers as there are negative inputs.
    - Gradient checkpointing, which has no batching rule: the function is called directly.
    """

    def __init__(self) -> None:
        super().__init__()
        self.slopes = _RandomSlopes()

    def __enter__(self) -> Self:
        _checkpoints.leave_out()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _checkpoints.restore()

    def __torch_function__(
        self, func: Function, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward and not kwargs.get("need_weights", True):
            arguments = _ATTENDS.bind(*args, **kwargs).arguments
            if _is_self_attention(arguments):
                return _self_attention(arguments), None
            # The mode does not reach the functions that this one calls.
            return func(*args, **{**kwargs, "need_weights": True})[0], None
        if func is _fused and args[0].device.type == "cpu":
            return _attention(*args, **kwargs)
        if func is functional.normalize and kwargs.get("out") is not None:
            out: Tensor = kwargs.pop("out")
            return out.copy_(func(*args, **kwargs))
        if func is functional.rrelu:
            return self.slopes.rrelu(*args, **kwargs)
        return func(*args, **kwargs)


class _RandomSlopes:
    """The random slopes of all calls of ``rrelu`` in one pass of a module.

    torch's kernel on a CPU draws one number in [0, 1) for each input that is not positive, in their
    order. The draws of several calls follow each other. A member draws as many numbers as it has
    such inputs, which vmap cannot map. Here a call draws a number for every input, and a member
    takes the numbers that torch's kernel would draw. The result is the same as that of the kernel
    if the module draws no other random numbers.
    """

    def __init__(self) -> None:
        self.draws: list[Tensor] = []
        self.taken: Tensor | int = 0

    def rrelu(
        self,
        input: Tensor,
        lower: float = 1 / 8,
        upper: float = 1 / 3,
        training: bool = False,
        inplace: bool = False,
    ) -> Tensor:
        """Compute ``functional.rrelu`` by operations that vmap supports."""
        if not training:
            return functional.leaky_relu(input, (lower + upper) / 2, inplace)
        self.draws.append(torch.rand(input.numel(), dtype=torch.float64, device=input.device))
        has_slope = input <= 0
        places = self.taken + has_slope.flatten().cumsum(0)
        self.taken = places[-1]
        drawn = torch.cat(self.draws)[(places - 1).clamp_min(0)]
        slopes = (drawn * (upper - lower) + lower).to(input.dtype).view(input.shape)
        factors = torch.where(has_slope, slopes, 1)
        return input.mul_(factors) if inplace else input * factors


class _DirectCall:
    """Replaces torch's autograd function of a reentrant checkpoint by a direct call."""

    @staticmethod
    def apply(function: Callable[..., object], _preserve_rng_state: bool, *args: object) -> object:
        return function(*args)


class _Checkpoints:
    """Leaves out gradient checkpointing while at least one thread asks for it.

    Checkpointing saves memory and computes parts of a module twice. The results are the same
    without it. Other threads of the process train without checkpointing meanwhile.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0

    def leave_out(self) -> None:
        """Call checkpointed functions directly, until ``restore`` is called as often."""
        with self.lock:
            self.users += 1
            if self.users == 1:
                self.reentrant = checkpoint.CheckpointFunction
                self.other = checkpoint._checkpoint_without_reentrant_generator
                vars(checkpoint).update(
                    CheckpointFunction=_DirectCall,
                    _checkpoint_without_reentrant_generator=self._generator,
                )

    def restore(self) -> None:
        """End one ``leave_out``."""
        with self.lock:
            self.users -= 1
            if self.users == 0:
                vars(checkpoint).update(
                    CheckpointFunction=self.reentrant,
                    _checkpoint_without_reentrant_generator=self.other,
                )

    def _generator(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Replace torch's generator. Torch calls the function between the two steps of it."""
        contexts = args[2]
        if contexts is not checkpoint.noop_context_fn:  # the function runs inside of a context
            yield from self.other(*args, **kwargs)
            return
        yield


_checkpoints = _Checkpoints()


def _is_self_attention(arguments: Kwargs) -> bool:
    """Return whether an attention call is unmasked self-attention of rows (T, B, E) with one weight
    matrix."""
    for name in ("bias_k", "bias_v", "add_zero_attn", "key_padding_mask", "attn_mask", "is_causal"):
        value = arguments.get(name)
        if value is not None and value is not False:
            return False
    x = arguments["query"]
    if x is not arguments["key"] or x is not arguments["value"] or x.dim() != 3:
        return False
    return arguments["in_proj_weight"] is not None and not arguments.get("use_separate_proj_weight")


def _self_attention(arguments: Kwargs) -> Tensor:
    """Compute the self-attention of rows (T, B, E).

    The rows are read in the layout of ``batch_first``, so that they are not copied.
    """
    rows = arguments["query"].transpose(0, 1)
    dropout = arguments["dropout_p"] if arguments.get("training", True) else 0.0
    # (B, T, 3 * E)
    parts = functional.linear(rows, arguments["in_proj_weight"], arguments["in_proj_bias"])
    # (B, heads, T, E / heads)
    query, key, value = (
        part.view(*part.shape[:2], arguments["num_heads"], -1).transpose(1, 2)
        for part in parts.chunk(3, -1)
    )
    outputs = _attention(query, key, value, dropout_p=dropout).permute(2, 0, 1, 3).flatten(2)
    # The result has torch's layout (T, B, E), because a dropout after it draws in the order of
    # memory.
    return functional.linear(outputs, arguments["out_proj_weight"], arguments["out_proj_bias"])


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute ``functional.scaled_dot_product_attention`` by operations that vmap supports."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(
            ~attn_mask, -torch.inf
        )
    if attn_mask is not None or is_causal or enable_gqa:
        result: Tensor = torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
        return result
    # torch's softmax checks for rows that a mask leaves empty, which costs 5x as much. There is no
    # mask here.
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    # (..., L, E) @ (..., E, S) -> (..., L, S)
    weights = ((query * scale) @ key.mT).softmax(-1)
    return functional.dropout(weights, dropout_p) @ value if dropout_p else weights @ value


def make_mappable(module: nn.Module) -> None:
    """Replace a module's computations that vmap cannot map, in place. The results stay the same."""
    for part in module.modules():
        if _averages(part):
            part.forward = partial(_cumulative_batch_norm, part)  # type: ignore[method-assign]
        if isinstance(part, nn.RNNBase) and type(part) in (nn.RNN, nn.GRU, nn.LSTM):
            part.forward = partial(run_recurrent, part)
        if type(part) is nn.LSTMCell:
            part.forward = partial(run_lstm_cell, part)  # type: ignore[method-assign]


def _averages(module: nn.Module) -> TypeGuard[_BatchNorm]:
    """Return whether a module is a BatchNorm with a cumulative average (``momentum=None``)."""
    return isinstance(module, _BatchNorm) and module.momentum is None and module.track_running_stats


@contextmanager
def counting_on_device(module: nn.Module) -> Iterator[None]:
    """Inside the context, BatchNorms with a cumulative average count batches in a tensor, as after
    ``make_mappable``."""
    changed = [part for part in module.modules() if _averages(part) and "forward" not in vars(part)]
    for part in changed:
        make_mappable(part)
    try:
        yield
    finally:
        for part in changed:
            del vars(part)["forward"]


def running_norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorm layers with running statistics and torch's own forward pass, by their
    paths."""
    norms = {}
    for path, part in module.named_modules():
        if (
            isinstance(part, _BatchNorm)
            and type(part).forward is _BatchNorm.forward
            and part.running_mean is not None
        ):
            norms[path] = part
    return norms


def differentiate_statistics(module: nn.Module) -> tuple[str, ...]:
    """Make the running statistics of each BatchNorm differentiable functions of its input, in
    place.

    Returns the names of the statistics.
    """
    # torch's own kernel writes them outside of the graph, without a derivative.
    names = []
    for path, part in running_norms(module).items():
        part.forward = partial(_differentiable_batch_norm, part)  # type: ignore[method-assign]
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            names.append(f"{path}.{name}".lstrip("."))
    return tuple(names)


def _differentiable_batch_norm(norm: _BatchNorm, x: Tensor) -> Tensor:
    """Compute ``norm(x)`` for a BatchNorm so that its running statistics are differentiable in
    ``x``. The count of minibatches may be a tensor of any type."""
    mean = norm.running_mean
    var = norm.running_var
    count = norm.num_batches_tracked
    assert mean is not None and var is not None and count is not None
    if not norm.training:
        columns = (-1, *[1] * (x.dim() - 2))
        outputs = (x - mean.view(columns)) * (var.view(columns) + norm.eps).rsqrt()
        if norm.weight is None:
            return outputs
        return outputs * norm.weight.view(columns) + norm.bias.view(columns)
    outputs = functional.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    norm.num_batches_tracked = count = count + 1
    share: Tensor | float = 1 / count.to(mean.dtype) if norm.momentum is None else norm.momentum
    norm.running_mean = mean + share * (x.mean(axes) - mean)
    norm.running_var = var + share * (x.var(axes) - var)
    return outputs


def _cumulative_batch_norm(norm: _BatchNorm, x: Tensor) -> Tensor:
    """Compute ``norm(x)`` for a BatchNorm with ``momentum=None``, a cumulative average.

    torch would convert its count of batches to a Python number, which vmap does not support.
    """
    mean = norm.running_mean
    var = norm.running_var
    assert mean is not None and var is not None and norm.num_batches_tracked is not None
    if not norm.training:
        return functional.batch_norm(x, mean, var, norm.weight, norm.bias, False, 0.0, norm.eps)
    batch_mean = torch.zeros_like(mean)
    batch_var = torch.zeros_like(var)
    outputs = functional.batch_norm(
        x, batch_mean, batch_var, norm.weight, norm.bias, True, 1.0, norm.eps
    )
    count = norm.num_batches_tracked.add_(1).to(mean.dtype)
    for running, batch in ((mean, batch_mean), (var, batch_var)):
        running.add_((batch - running) / count)  # vmap does not map lerp_
    return outputs


RecurrentState: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""State of a recurrent network, (layers x directions, B, H). An LSTM has two states: hidden and
cell."""


def run_recurrent(
    rnn: nn.RNNBase, x: Tensor, hx: RecurrentState | None = None
) -> tuple[Tensor, RecurrentState]:
    """Compute ``rnn(x, hx)`` by operations that vmap supports.

    Returns the outputs at all times, and the state after the last time.
    """
    if isinstance(x, PackedSequence):
        raise TypeError(
            "a packed sequence may have fewer rows at later times, which stacked members do not support"
        )
    is_one_row = x.dim() == 2
    states = [] if hx is None else [hx] if isinstance(hx, Tensor) else list(hx)
    # rows (T, B, D), states (layers x directions, B, H)
    if is_one_row:
        x = x[:, None]
        states = [state[:, None] for state in states]
    elif rnn.batch_first:
        x = x.transpose(0, 1)
    last: list[list[Tensor]] = []
    for layer in range(rnn.num_layers):
        sides = []
        for side in range(1 + rnn.bidirectional):
            begin = [state[len(last)] for state in states]
            outputs, *end = _run_direction(rnn, x, begin, layer, side)
            sides.append(outputs)
            last.append(end)
        x = torch.cat(sides, -1) if rnn.bidirectional else sides[0]
        if rnn.dropout and layer < rnn.num_layers - 1:
            x = functional.dropout(x, rnn.dropout, rnn.training)
    ends = [torch.stack(parts) for parts in zip(*last)]
    if is_one_row:
        x = x[:, 0]
        ends = [state[:, 0] for state in ends]
    elif rnn.batch_first:
        x = x.transpose(0, 1)
    return x, ends[0] if len(ends) == 1 else (ends[0], ends[1])


def run_lstm_cell(
    cell: nn.LSTMCell, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Compute ``cell(input, hx)`` by operations that vmap supports.

    The input is (B, D) or (D,), and a state (B, H) or (H,). Returns the next hidden state and cell.
    """
    if hx is None:
        zeros = input.new_zeros(*input.shape[:-1], cell.hidden_size)
        hx = (zeros, zeros)
    bias = cell.bias_ih + cell.bias_hh if cell.bias else None
    gates = functional.linear(input, cell.weight_ih, bias)
    h, c = _lstm(cell.weight_hh, None, gates, *hx)
    return h, c


def _run_direction(
    rnn: nn.RNNBase, x: Tensor, state: list[Tensor], layer: int, side: int
) -> list[Tensor]:
    """Return the outputs (T, B, H) of one layer in one direction, and its state after the last
    time."""
    suffix = f"l{layer}" + "_reverse" * side
    w_ih = getattr(rnn, f"weight_ih_{suffix}")
    w_hh = getattr(rnn, f"weight_hh_{suffix}")
    b_ih = getattr(rnn, f"bias_ih_{suffix}") if rnn.bias else None
    b_hh = getattr(rnn, f"bias_hh_{suffix}") if rnn.bias else None
    project = getattr(rnn, f"weight_hr_{suffix}") if rnn.proj_size else None
    if not state:
        state = [x.new_zeros(x.shape[1], rnn.proj_size or rnn.hidden_size)]
        if rnn.mode == "LSTM":
            state.append(x.new_zeros(x.shape[1], rnn.hidden_size))
    if rnn.mode != "GRU" and b_ih is not None:
        b_ih = b_ih + b_hh
    # (T, B, D) -> (T, B, gates * H), for all times at once.
    gates = functional.linear(x, w_ih, b_ih)
    parts = [gates]
    if rnn.mode == "GRU":
        parts = list(torch.split(gates, [2 * rnn.hidden_size, rnn.hidden_size], -1))
    steps = [*zip(*(part.unbind(0) for part in parts))]
    outputs = []
    for step in reversed(steps) if side else steps:
        if rnn.mode == "GRU":
            state = _gru(w_hh, b_hh, *step, *state)
        elif rnn.mode == "LSTM":
            state = _lstm(w_hh, project, *step, *state)
        else:
            activation = torch.tanh if rnn.mode == "RNN_TANH" else torch.relu
            state = [activation(step[0] + functional.linear(state[0], w_hh))]
        outputs.append(state[0])
    return [torch.stack(outputs[::-1] if side else outputs), *state]


def _gru(w_hh: Tensor, b_hh: Tensor | None, gates: Tensor, x: Tensor, h: Tensor) -> list[Tensor]:
    """Return the next state of a GRU, (B, H).

    r, z = sigmoid(x's part + W h + b); n = tanh(x's part + r (W h + b)); h = (1 - z) n + z h.
    """
    size = w_hh.shape[-1]
    both, new = torch.split(functional.linear(h, w_hh, b_hh), [2 * size, size], -1)
    r, z = torch.sigmoid(gates + both).chunk(2, -1)
    n = torch.tanh(x + r * new)
    return [n + z * (h - n)]


def _lstm(w_hh: Tensor, project: Tensor | None, x: Tensor, h: Tensor, c: Tensor) -> list[Tensor]:
    """Return the next hidden state and cell of an LSTM.

    The gates i, f, g, o are the parts of x's part + W h; c = sigmoid(f) c + sigmoid(i) tanh(g); h =
    sigmoid(o) tanh(c), projected if ``project`` is given.
    """
    i, f, g, o = (x + functional.linear(h, w_hh)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return [h if project is None else functional.linear(h, project), c]
