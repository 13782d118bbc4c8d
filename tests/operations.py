"""172 common operations, each in a small net, and the backend that trains it.

An operation is between two linear layers, or it is a loss, an optimizer or an option.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from gputune.models import Dropout
from gputune.scoring.objective import Objective

COMPILED = "compiled"
RECORDED = "recorded"
LOOP = "loop"
WIDTH = 8
ROWS = 24
G = torch.Generator().manual_seed(5)


def _randn(*shape):
    return torch.randn(*shape, generator=G, dtype=torch.float64)


INPUTS = {
    "table": _randn(ROWS, 6),
    "sequence": _randn(ROWS, 4, 6),
    "channels": _randn(ROWS, 3, 6),
    "ids": torch.randint(1, 9, (ROWS, 4), generator=G),
    "image": _randn(ROWS, 4, 6, 6),
}


@dataclass(frozen=True)
class Operation:
    """An operation: the net that has it, the kind of its rows, and the backend that trains it."""

    backend: str
    build: Callable[..., nn.Module]
    rows: str = "table"
    task: str = "multiclass"
    objective: Objective | None = None
    plain_loss: Callable[..., torch.Tensor] | None = None
    config: dict[str, object] = field(default_factory=dict)
    weights: bool = False
    has_plain_loop: bool = True


class Between(nn.Module):
    """A linear layer, the operation, and another linear layer."""

    def __init__(self, n_features, n_outputs, make, out=WIDTH):
        super().__init__()
        self.enter = nn.Linear(n_features, WIDTH)
        self.operation = make()
        self.head = nn.Linear(out, n_outputs)

    def forward(self, x):
        return self.head(self.operation(self.enter(x)))


class OfSequence(Between):
    """The same for sequences (rows, 4, width), of which the mean over the places is taken."""

    def forward(self, x):
        x = self.operation(self.enter(x))
        x = x[0] if isinstance(x, tuple) else x
        return self.head(x.mean(1) if x.dim() == 3 else x)


class OfIds(nn.Module):
    """An embedding of ids (rows, 4)."""

    def __init__(self, n_outputs, make):
        super().__init__()
        self.operation = make()
        self.head = nn.Linear(WIDTH, n_outputs)

    def forward(self, ids):
        x = self.operation(ids)
        return self.head(x.mean(1) if x.dim() == 3 else x)


class OfImage(nn.Module):
    """A factor and a shift of each channel (4, 6, 6), the operation, and a linear layer."""

    def __init__(self, n_outputs, make, out):
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 1.5, 4)[:, None, None])
        self.shift = nn.Parameter(torch.linspace(-0.5, 0.5, 4)[:, None, None])
        self.operation = make()
        self.head = nn.Linear(out, n_outputs)

    def forward(self, x):
        x = self.operation(x * self.factor + self.shift)
        return self.head(x.flatten(1))


class Apply(nn.Module):
    """A function of one tensor."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class WithTensors(nn.Module):
    """A function of x and of parameters with the given shapes."""

    def __init__(self, function, **shapes):
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            size = math.prod(shape)
            self.register_parameter(
                name, nn.Parameter(torch.linspace(-0.5, 0.7, size).reshape(shape))
            )

    def forward(self, x):
        return self.function(x, *self.parameters())


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return checkpoint(lambda v: self.inner(v).tanh(), x, use_reentrant=False)


class DropPath(nn.Module):
    """A block that is left out for some rows."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        if not self.training:
            return x + self.inner(x)
        kept = torch.empty(len(x), 1, dtype=x.dtype).bernoulli_(0.7)
        return x + self.inner(x).tanh() * kept / 0.7


class Noise(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.randn_like(x) if self.training else x


class GumbelSoftmax(nn.Module):
    def forward(self, x):
        return F.gumbel_softmax(x) if self.training else x.softmax(-1)


class Gated(nn.Module):
    """A gated unit: GEGLU or SwiGLU."""

    def __init__(self, activation):
        super().__init__()
        self.enter = nn.Linear(WIDTH, 2 * WIDTH)
        self.activation = activation

    def forward(self, x):
        a, b = self.enter(x).chunk(2, -1)
        return a * self.activation(b)


class Lora(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down = nn.Linear(WIDTH, 2, bias=False)
        self.up = nn.Linear(2, WIDTH, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Experts(nn.Module):
    """A mixture of four experts, of which two are chosen for each row."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.experts = nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, x):
        logits = self.gate(x)
        values, index = logits.topk(2, -1)
        weights = torch.zeros_like(logits).scatter(-1, index, values.softmax(-1))
        return (self.experts(x).view(len(x), 4, WIDTH).tanh() * weights[..., None]).sum(1)


class Attention(nn.Module):
    """Attention of two heads with projections."""

    def __init__(self, **options):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.options = options

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        options = dict(self.options)
        if "dropout_p" in options and not self.training:
            options["dropout_p"] = 0.0
        x = F.scaled_dot_product_attention(q, k, v, **options)
        return x.transpose(1, 2).flatten(2)


class GroupedQueries(nn.Module):
    """Attention of four query heads that share two heads of keys and values."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q = self.q(x).unflatten(-1, (4, 2)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, 2, 2)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x.transpose(1, 2).flatten(2)


class Multihead(nn.Module):
    def __init__(self, mask=None, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mask = mask
        self.options = options

    def forward(self, x):
        options = dict(self.options)
        if self.mask == "causal":
            options["attn_mask"] = torch.ones(4, 4, dtype=torch.bool).triu(1)
        elif self.mask == "padding":
            # the first place is never left out
            options["key_padding_mask"] = (x[..., 0] > 0.5) & (torch.arange(4) > 0)
        return self.attention(x, x, x, **options)[0]


class Rotary(nn.Module):
    def forward(self, x):
        angle = torch.arange(4, dtype=x.dtype)[:, None] * torch.linspace(1, 0.1, WIDTH // 2).to(x)
        a, b = x[..., ::2], x[..., 1::2]
        turned = (a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos())
        return torch.stack(turned, -1).flatten(-2)


class StateSpace(nn.Module):
    def __init__(self):
        super().__init__()
        self.decay = nn.Parameter(torch.linspace(0.1, 0.9, WIDTH))

    def forward(self, x):
        place = torch.arange(4, dtype=x.dtype)[:, None] * self.decay
        return (x * place.exp()).cumsum(1) * (-place).exp()


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.places = nn.Linear(4, 4)
        self.channels = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = x + F.gelu(self.places(self.norm(x).mT)).mT
        return x + F.gelu(self.channels(x))


class Cell(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell = kind(WIDTH, WIDTH)

    def forward(self, x):
        h = torch.zeros_like(x[:, 0])
        for i in range(x.shape[1]):
            h = self.cell(x[:, i], h)
        return h


class LSTMCell(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(WIDTH, WIDTH)

    def forward(self, x):
        h, c = self.cell(x[:, 0])
        for i in range(1, x.shape[1]):
            h, c = self.cell(x[:, i], (h, c))
        return h


class TokensAndPlaces(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(9, WIDTH)
        self.places = nn.Embedding(4, WIDTH)

    def forward(self, ids):
        return self.tokens(ids) + self.places(torch.arange(4))


class OneHot(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 9 * WIDTH).view(9, WIDTH))

    def forward(self, ids):
        return F.one_hot(ids, 9).to(self.weight.dtype) @ self.weight


class OfChannels(Between):
    """A linear layer, the operation on (rows, 3, width), and a linear layer of the mean."""

    def forward(self, x):
        return self.head(self.operation(self.enter(x)).mean(1))


class OwnBilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.bilinear = nn.Bilinear(WIDTH, WIDTH, WIDTH)

    def forward(self, x):
        return self.bilinear(x, x.tanh())


class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4 * 9, WIDTH)

    def forward(self, x):
        x = x.reshape(len(x), 4, 2, 3, 2, 3).permute(0, 2, 4, 1, 3, 5)
        return self.linear(x.reshape(len(x), 4, 36))


def _nll(output, y):
    return F.nll_loss(output.log_softmax(-1), y)


def _square(x):
    return x.view(-1, 2, 4)[..., :2]


def _jitter(x, generator):
    return x + 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype)


def _spectral():
    return parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))


def _weight():
    return parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))


def _old_weight():
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))


def _orthogonal():
    return parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH))


def between(backend, function, *, out=WIDTH, **more):
    """A function or a module's class in the table's net."""
    is_class = isinstance(function, type) and issubclass(function, nn.Module)
    make = function if is_class else partial(Apply, function)
    return Operation(backend, partial(Between, make=make, out=out), **more)


def layer(backend, make, *, out=WIDTH, **more):
    """The module that ``make`` builds, in the table's net."""
    return Operation(backend, partial(Between, make=make, out=out), **more)


def sequence(backend, make, *, out=WIDTH):
    return Operation(backend, partial(OfSequence, make=make, out=out), "sequence")


def of_sequence(backend, function, *, out=WIDTH):
    return sequence(backend, partial(Apply, function), out=out)


def ids(backend, make):
    return Operation(backend, partial(OfIds, make=make), "ids")


def image(backend, make, *, out):
    return Operation(backend, partial(OfImage, make=make, out=out), "image")


def of_image(backend, function, *, out):
    return image(backend, partial(Apply, function), out=out)


def _by_rows(loss):
    """The mean of a loss, as a plain loop computes it."""
    return lambda output, y, weights: loss(output, y)


def loss(backend, function, *, task="multiclass"):
    """A loss that the user passes as a callable."""
    plain = Between if task == "multiclass" else OneOutput
    return Operation(
        backend,
        partial(plain, make=nn.Tanh),
        task=task,
        objective=Objective(function),
        plain_loss=_by_rows(function),
    )


class OneOutput(Between):
    def forward(self, x):
        return super().forward(x)[:, 0]


def optimizer(name, **config):
    config = {"optimizer": name, **config}
    is_plain = name in ("sgd", "nesterov", "adam", "adamw")
    build = partial(Between, make=nn.Tanh)
    return Operation(COMPILED, build, config=config, has_plain_loop=is_plain)


def option(backend, *, make=nn.Tanh, **options):
    return Operation(backend, partial(Between, make=make), has_plain_loop=False, **options)


_INDEX = torch.tensor([3, 0, 5, 5, 1, 7, 2, 0])
_TABLE_MASK = torch.ones(WIDTH, WIDTH)
_CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)


def _gather(x):
    return x.gather(1, _INDEX.expand(len(x), WIDTH))


def _outer(x):
    return torch.einsum("bi,bj->bij", x, x).flatten(1)


def _cdist(x):
    return torch.cdist(x[:, :, None], x[:, :4, None] + 1.0).flatten(1)


def _unfold(x):
    return x.unfold(1, 4, 2).flatten(1)


def _windows(x):
    return F.unfold(x, 3, padding=1)


OPERATIONS = {
    # activations
    "nn.ReLU": between(COMPILED, nn.ReLU),
    "nn.ReLU6": between(COMPILED, nn.ReLU6),
    "nn.LeakyReLU": between(COMPILED, nn.LeakyReLU),
    "nn.PReLU": between(COMPILED, nn.PReLU),
    "nn.RReLU": between(COMPILED, nn.RReLU),
    "nn.ELU": between(COMPILED, nn.ELU),
    "nn.SELU": between(COMPILED, nn.SELU),
    "nn.CELU": between(COMPILED, nn.CELU),
    "nn.GELU": between(COMPILED, nn.GELU),
    "nn.GELU(approximate='tanh')": layer(COMPILED, partial(nn.GELU, approximate="tanh")),
    "nn.SiLU": between(COMPILED, nn.SiLU),
    "nn.Mish": between(COMPILED, nn.Mish),
    "nn.Hardswish": between(COMPILED, nn.Hardswish),
    "nn.Hardsigmoid": between(COMPILED, nn.Hardsigmoid),
    "nn.Hardtanh": between(COMPILED, nn.Hardtanh),
    "nn.Hardshrink": between(COMPILED, nn.Hardshrink),
    "nn.Softshrink": between(COMPILED, nn.Softshrink),
    "nn.Softplus": between(COMPILED, nn.Softplus),
    "nn.Softsign": between(COMPILED, nn.Softsign),
    "nn.Tanhshrink": between(COMPILED, nn.Tanhshrink),
    "nn.Tanh": between(COMPILED, nn.Tanh),
    "nn.Sigmoid": between(COMPILED, nn.Sigmoid),
    "nn.LogSigmoid": between(COMPILED, nn.LogSigmoid),
    "nn.Threshold": layer(COMPILED, partial(nn.Threshold, 0.1, -0.2)),
    "nn.GLU": layer(COMPILED, nn.GLU, out=WIDTH // 2),
    "GEGLU": layer(COMPILED, partial(Gated, F.gelu)),
    "SwiGLU": layer(COMPILED, partial(Gated, F.silu)),
    "x * sigmoid(x)": between(COMPILED, lambda x: x * torch.sigmoid(x)),
    "nn.Softmax": layer(COMPILED, partial(nn.Softmax, -1)),
    "nn.LogSoftmax": layer(COMPILED, partial(nn.LogSoftmax, -1)),
    "nn.Softmin": layer(COMPILED, partial(nn.Softmin, -1)),
    "F.gumbel_softmax": between(COMPILED, GumbelSoftmax),
    # functions of each entry
    "torch.sin": between(COMPILED, torch.sin),
    "torch.cos": between(COMPILED, torch.cos),
    "torch.tan": between(COMPILED, torch.tan),
    "torch.atan": between(COMPILED, torch.atan),
    "torch.sinh": between(COMPILED, torch.sinh),
    "exp(-x * x)": between(COMPILED, lambda x: torch.exp(-x * x)),
    "x.square()": between(COMPILED, torch.square),
    "x ** 3": between(COMPILED, lambda x: x**3),
    "x.abs().sqrt()": between(COMPILED, lambda x: x.abs().sqrt()),
    "x.abs().pow(1.5)": between(COMPILED, lambda x: x.abs().pow(1.5)),
    "torch.log1p": between(COMPILED, lambda x: torch.log1p(x.relu())),
    "torch.erf": between(COMPILED, torch.erf),
    "torch.clamp": between(COMPILED, lambda x: x.clamp(-0.5, 0.5)),
    "torch.where": between(COMPILED, lambda x: torch.where(x > 0, x, 0.1 * x)),
    "x > 0": between(COMPILED, lambda x: x * (x > 0).to(x.dtype)),
    # reductions
    "torch.logsumexp": between(COMPILED, lambda x: x + x.logsumexp(-1, keepdim=True)),
    "x.max(-1)": between(COMPILED, lambda x: x.view(-1, 4, 2).max(-1)[0], out=WIDTH // 2),
    "x.amax": between(COMPILED, lambda x: x - x.amax(-1, keepdim=True)),
    "x.norm": between(COMPILED, lambda x: x / (x.norm(dim=-1, keepdim=True) + 0.1)),
    "F.normalize": between(COMPILED, partial(F.normalize, dim=-1)),
    "F.cosine_similarity": between(
        COMPILED, lambda x: x + F.cosine_similarity(x, x.flip(-1) + 1, dim=-1)[:, None]
    ),
    "x.std": between(COMPILED, lambda x: x / (x.std(-1, keepdim=True) + 0.1)),
    "x.var": between(COMPILED, lambda x: x / (x.var(-1, keepdim=True) + 0.1)),
    "x.prod": between(COMPILED, lambda x: x + x.prod(-1, keepdim=True)),
    "torch.cumsum": between(COMPILED, lambda x: x.cumsum(-1)),
    "torch.cumprod": between(COMPILED, lambda x: x.cumprod(-1)),
    "torch.median": between(COMPILED, lambda x: x - x.median(-1, keepdim=True)[0]),
    "max over places": of_sequence(COMPILED, lambda x: x.max(1)[0]),
    "amax over places": of_sequence(COMPILED, lambda x: x.amax(1)),
    # selection
    "torch.sort": between(COMPILED, lambda x: x.sort(-1)[0]),
    "torch.topk": between(COMPILED, lambda x: x.topk(4, -1)[0], out=4),
    "x[:, index]": between(COMPILED, lambda x: x[:, _INDEX]),
    "torch.gather": between(COMPILED, _gather),
    "mixture of experts": layer(COMPILED, Experts),
    # movement
    "torch.flip": between(COMPILED, lambda x: torch.maximum(x, x.flip(-1))),
    "F.pad": between(COMPILED, lambda x: F.pad(x, (1, 1)), out=WIDTH + 2),
    "torch.roll": between(COMPILED, lambda x: x + x.roll(1, -1).tanh()),
    "x.repeat": between(COMPILED, lambda x: x.repeat(1, 2), out=2 * WIDTH),
    "x.repeat_interleave": between(COMPILED, lambda x: x.repeat_interleave(2, 1), out=2 * WIDTH),
    "x.unfold": between(COMPILED, _unfold, out=12),
    "torch.triu": between(COMPILED, lambda x: x @ torch.triu(_TABLE_MASK.to(x)) / 8),
    "torch.cat": between(COMPILED, lambda x: torch.cat([x, x.tanh()], -1), out=2 * WIDTH),
    # products
    "torch.einsum": between(COMPILED, _outer, out=WIDTH * WIDTH),
    "torch.matmul": layer(
        COMPILED, partial(WithTensors, lambda x, w: (x[:, None] @ w)[:, 0], w=(WIDTH, WIDTH))
    ),
    "torch.bmm": between(
        COMPILED, lambda x: torch.bmm(_square(x), _square(x).tanh()).flatten(1), out=4
    ),
    "torch.cdist": between(COMPILED, _cdist, out=4 * WIDTH),
    "torch.fft.rfft": between(RECORDED, lambda x: torch.fft.rfft(x).abs(), out=WIDTH // 2 + 1),
    "nn.Bilinear": layer(COMPILED, OwnBilinear),
    # norms
    "nn.LayerNorm": layer(COMPILED, partial(nn.LayerNorm, WIDTH)),
    "nn.LayerNorm(elementwise_affine=False)": layer(
        COMPILED, partial(nn.LayerNorm, WIDTH, elementwise_affine=False)
    ),
    "nn.RMSNorm": layer(COMPILED, partial(nn.RMSNorm, WIDTH)),
    "nn.BatchNorm1d": layer(COMPILED, partial(nn.BatchNorm1d, WIDTH)),
    "nn.BatchNorm1d(affine=False)": layer(COMPILED, partial(nn.BatchNorm1d, WIDTH, affine=False)),
    "nn.BatchNorm1d(track_running_stats=False)": layer(
        COMPILED, partial(nn.BatchNorm1d, WIDTH, track_running_stats=False)
    ),
    "nn.BatchNorm1d(momentum=None)": layer(COMPILED, partial(nn.BatchNorm1d, WIDTH, momentum=None)),
    "nn.BatchNorm1d of (B, C, L)": Operation(
        COMPILED, partial(OfChannels, make=partial(nn.BatchNorm1d, 3)), "channels"
    ),
    "nn.GroupNorm": layer(COMPILED, partial(nn.GroupNorm, 2, WIDTH)),
    "weight_norm": layer(COMPILED, _weight),
    "nn.utils.weight_norm": layer(COMPILED, _old_weight),
    "spectral_norm": layer(COMPILED, _spectral),
    "orthogonal": layer(RECORDED, _orthogonal),
    # draws, and modules with parts
    "nn.Dropout": layer(COMPILED, partial(nn.Dropout, 0.3)),
    "nn.AlphaDropout": layer(COMPILED, partial(nn.AlphaDropout, 0.3)),
    "gputune.models.Dropout": option(COMPILED, make=Dropout, config={"dropout": 0.3}),
    "torch.randn_like": layer(COMPILED, Noise),
    "drop path": layer(COMPILED, DropPath),
    "nn.Identity": layer(COMPILED, nn.Identity),
    "LoRA": layer(COMPILED, Lora),
    "checkpoint": layer(COMPILED, Checkpointed),
    # sequences
    "nn.MultiheadAttention": sequence(COMPILED, Multihead),
    "nn.MultiheadAttention, weights": sequence(COMPILED, partial(Multihead, need_weights=True)),
    "nn.MultiheadAttention, padding": sequence(COMPILED, partial(Multihead, "padding")),
    "nn.MultiheadAttention, causal": sequence(COMPILED, partial(Multihead, "causal")),
    "scaled_dot_product_attention": sequence(COMPILED, Attention),
    "scaled_dot_product_attention, causal": sequence(COMPILED, partial(Attention, is_causal=True)),
    "scaled_dot_product_attention, dropout": sequence(COMPILED, partial(Attention, dropout_p=0.2)),
    "scaled_dot_product_attention, grouped queries": sequence(COMPILED, GroupedQueries),
    "nn.TransformerEncoderLayer": sequence(
        COMPILED, partial(nn.TransformerEncoderLayer, WIDTH, 2, 16, 0.0, batch_first=True)
    ),
    "nn.TransformerEncoderLayer, gelu, dropout": sequence(
        COMPILED, partial(nn.TransformerEncoderLayer, WIDTH, 2, 16, 0.1, "gelu", batch_first=True)
    ),
    "nn.LSTM": sequence(COMPILED, partial(nn.LSTM, WIDTH, WIDTH, batch_first=True)),
    "nn.GRU": sequence(COMPILED, partial(nn.GRU, WIDTH, WIDTH, batch_first=True)),
    "nn.RNN": sequence(COMPILED, partial(nn.RNN, WIDTH, WIDTH, batch_first=True)),
    "nn.LSTM, two layers, dropout": sequence(
        COMPILED, partial(nn.LSTM, WIDTH, WIDTH, 2, batch_first=True, dropout=0.2)
    ),
    "nn.GRU, bidirectional": sequence(
        COMPILED,
        partial(nn.GRU, WIDTH, WIDTH, batch_first=True, bidirectional=True),
        out=2 * WIDTH,
    ),
    "nn.LSTMCell": sequence(COMPILED, LSTMCell),
    "nn.GRUCell": sequence(COMPILED, partial(Cell, nn.GRUCell)),
    "nn.RNNCell": sequence(COMPILED, partial(Cell, nn.RNNCell)),
    "rotary embedding": sequence(COMPILED, Rotary),
    "state space by cumsum": sequence(COMPILED, StateSpace),
    "nn.Flatten": sequence(COMPILED, nn.Flatten, out=4 * WIDTH),
    "MLP-Mixer": sequence(COMPILED, Mixer),
    # ids
    "nn.Embedding": ids(COMPILED, partial(nn.Embedding, 9, WIDTH)),
    "nn.Embedding(padding_idx)": ids(COMPILED, partial(nn.Embedding, 9, WIDTH, padding_idx=1)),
    "nn.Embedding(max_norm)": ids(COMPILED, partial(nn.Embedding, 9, WIDTH, max_norm=1.0)),
    "tokens and places": ids(COMPILED, TokensAndPlaces),
    "F.one_hot @ weight": ids(COMPILED, OneHot),
    "nn.EmbeddingBag": ids(COMPILED, partial(nn.EmbeddingBag, 9, WIDTH)),
    # images and signals
    "nn.Conv1d": Operation(
        COMPILED, partial(OfChannels, make=partial(nn.Conv1d, 3, 3, 3, padding=1)), "channels"
    ),
    "nn.Conv2d": image(COMPILED, partial(nn.Conv2d, 4, 3, 3), out=48),
    "nn.Conv2d, depthwise": image(COMPILED, partial(nn.Conv2d, 4, 4, 3, groups=4), out=64),
    "nn.Conv2d, 1x1": image(COMPILED, partial(nn.Conv2d, 4, 3, 1), out=108),
    "nn.ConvTranspose2d": image(
        COMPILED, partial(nn.ConvTranspose2d, 4, 2, 3, stride=2, padding=1), out=242
    ),
    "nn.MaxPool2d": image(COMPILED, partial(nn.MaxPool2d, 2), out=36),
    "nn.AvgPool2d": image(COMPILED, partial(nn.AvgPool2d, 2), out=36),
    "nn.AdaptiveAvgPool2d(1)": image(COMPILED, partial(nn.AdaptiveAvgPool2d, 1), out=4),
    "nn.AdaptiveAvgPool2d(3)": image(COMPILED, partial(nn.AdaptiveAvgPool2d, 3), out=36),
    "x.mean((2, 3))": of_image(COMPILED, lambda x: x.mean((2, 3)), out=4),
    "nn.Upsample": image(COMPILED, partial(nn.Upsample, scale_factor=2), out=576),
    "F.interpolate, bilinear": of_image(
        COMPILED, partial(F.interpolate, scale_factor=2, mode="bilinear"), out=576
    ),
    "nn.PixelShuffle": image(COMPILED, partial(nn.PixelShuffle, 2), out=144),
    "nn.BatchNorm2d": image(COMPILED, partial(nn.BatchNorm2d, 4), out=144),
    "nn.InstanceNorm2d": image(COMPILED, partial(nn.InstanceNorm2d, 4, affine=True), out=144),
    "nn.GroupNorm of images": image(COMPILED, partial(nn.GroupNorm, 2, 4), out=144),
    "nn.Dropout2d": image(COMPILED, partial(nn.Dropout2d, 0.3), out=144),
    "nn.Unfold": of_image(COMPILED, _windows, out=4 * 9 * 36),
    "patch embedding": image(COMPILED, Patches, out=4 * WIDTH),
    # losses
    "loss='mse'": Operation(COMPILED, partial(Between, make=nn.Tanh), task="regression"),
    "nn.MSELoss()": loss(COMPILED, nn.MSELoss(), task="regression"),
    "nn.L1Loss()": loss(COMPILED, nn.L1Loss(), task="regression"),
    "nn.HuberLoss()": loss(COMPILED, nn.HuberLoss(), task="regression"),
    "nn.SmoothL1Loss()": loss(COMPILED, nn.SmoothL1Loss(), task="regression"),
    "nn.PoissonNLLLoss()": loss(COMPILED, nn.PoissonNLLLoss(), task="regression"),
    "nn.CrossEntropyLoss()": loss(COMPILED, nn.CrossEntropyLoss()),
    "nn.CrossEntropyLoss(weight)": loss(COMPILED, nn.CrossEntropyLoss(_CLASS_WEIGHTS)),
    "nn.CrossEntropyLoss(label_smoothing)": loss(
        COMPILED, nn.CrossEntropyLoss(label_smoothing=0.1)
    ),
    "nn.NLLLoss()": loss(COMPILED, _nll),
    "nn.MultiMarginLoss()": loss(COMPILED, nn.MultiMarginLoss()),
    # optimizers
    "sgd": optimizer("sgd", momentum=0.5),
    "nesterov": optimizer("nesterov", momentum=0.5),
    "adam": optimizer("adam"),
    "adamw": optimizer("adamw", weight_decay=0.1),
    "rmsprop": optimizer("rmsprop"),
    "lion": optimizer("lion"),
    "muon": optimizer("muon"),
    "schedulefree": optimizer("schedulefree"),
    # options
    "clip_norm": option(COMPILED, config={"clip_norm": 0.1}),
    "ema": option(COMPILED, config={"ema": 0.9}),
    "dropout_schedule": option(
        COMPILED, make=Dropout, config={"dropout": 0.3, "dropout_schedule": "linear"}
    ),
    "class_weight": Operation(COMPILED, partial(Between, make=nn.Tanh), weights=True),
    "augment": option(COMPILED, objective=Objective("cross_entropy", augment=_jitter)),
}


PAGE = Path(__file__).parents[1] / "docs" / "reference" / "operations.md"
_HEAD = """\
# Operations of modules

The table shows the fastest backend of a CPU that trains a module with each operation:

- **compiled**: the step of a member is C code.
- **recorded**: the operations of PyTorch run on stacked members, and their calls are recorded once.

`gputune check --module net.py:Net` prints the backend of your own module, and why a faster one does
not train it. [Stacked modules](../stacked-modules.md) explains the backends. gputune's tests train
each of these operations and hold this table. They also compare every backend with a plain PyTorch
loop in float64.
"""


def page():
    """Return the text of the page, with one row for each operation."""
    rows = [f"| `{name}` | {operation.backend} |\n" for name, operation in OPERATIONS.items()]
    return _HEAD + "\n| Operation | Backend |\n|---|---|\n" + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
