"""The errors of hypergradient(): their words and their remedies."""

import itertools
import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import inner_problems
from gputune.ground.errors import InputError
from gputune.hypergradients import hypergradient as hypergradient_file
from gputune.hypergradients.first_step import MemoryNeed
from gputune.hypergradients.hypergradient import hypergradient
from inner_problems import Calling

EXACT = ("reverse", "forward", "auto")


data = partial(inner_problems.data, 4)
network = partial(inner_problems.network, width=4)


def run(module=None, loss=functional.cross_entropy, *, batches=None, valid=None, **options):
    given = data()
    options = {"hyperparameters": {"lr": 0.1}, "optimizer": "sgd", "seed": 0} | options
    return hypergradient(
        network() if module is None else module,
        loss,
        given[0] if batches is None else batches,
        given[1] if valid is None else valid,
        **options,
    )


def refused(*words, **arguments):
    with pytest.raises(InputError) as caught:
        run(**arguments)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return str(caught.value)


NUMBER = "must be a number or an array of numbers"

REFUSED = [  # hyperparameters, optimizer, words of the message
    (
        {"momentum": 0.9},
        "adam",
        "must be some of lr, weight_decay, beta1, beta2 for adam, got 'momentum'",
        "Leave the name out",
    ),
    (
        {"lr": 0.1, "beta1": 0.9},
        "sgd",
        "must be some of lr, momentum, weight_decay for sgd",
        "'beta1'",
    ),
    ({"rate": 0.1}, "sgd", "'rate'"),
    ({1: 0.1}, "sgd", "got 1"),
    ({}, "sgd", "at least one", "got {}"),
    (None, "sgd", "must be a dict", "got None"),
    (["lr"], "sgd", "must be a dict", "['lr']"),
    ({"lr": 0.0}, "sgd", "hyperparameters['lr'] must be finite and > 0", "got 0.0"),
    ({"lr": [0.1, -0.2]}, "sgd", "finite and > 0", "[0.1, -0.2]"),
    ({"lr": math.nan}, "sgd", "finite and > 0", "got nan"),
    ({"lr": [[0.1, math.nan]]}, "sgd", "finite and > 0", "nan"),
    ({"lr": math.inf}, "sgd", "finite and > 0", "got inf"),
    (
        {"weight_decay": -1e-9},
        "sgd",
        "hyperparameters['weight_decay'] must be finite and >= 0",
        "-1e-09",
    ),
    ({"weight_decay": math.nan}, "sgd", "finite and >= 0"),
    ({"momentum": 1.0}, "sgd", "hyperparameters['momentum'] must be in [0, 1)", "got 1.0"),
    ({"momentum": -0.1}, "momentum", "in [0, 1)"),
    ({"beta1": 1}, "adam", "hyperparameters['beta1'] must be in [0, 1)"),
    ({"beta2": math.nan}, "adamw", "in [0, 1)"),
    ({"lr": [0.1] * 5}, "sgd", "at most one segment per step", "5 segments for 4 minibatches"),
    ({"lr": [[0.1, 0.1]] * 5}, "sgd", "5 segments for 4 minibatches"),
    ({"lr": [[0.1, 0.1, 0.1]]}, "sgd", "2 layers (0, 2)", "got shape (1, 3)"),
    ({"lr": [[0.1]]}, "sgd", "(segments, layers)", "got shape (1, 1)"),
    ({"lr": [[[0.1]]]}, "sgd", "got shape (1, 1, 1)"),
    ({"lr": []}, "sgd", "got shape (0,)"),
    ({"lr": np.ones((0, 2))}, "sgd", "got shape (0, 2)"),
    ({"lr": "fast"}, "sgd", NUMBER, "'fast'"),
    ({"lr": None}, "sgd", NUMBER, "got None"),
    ({"lr": [[0.1], [0.1, 0.2]]}, "sgd", NUMBER),
    ({"lr": 10**400}, "sgd", NUMBER),
    ({"lr": {"value": 0.1}}, "sgd", NUMBER),
]


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_hyperparameters(case):
    hyperparameters, optimizer, *words = case
    refused(*words, hyperparameters=hyperparameters, optimizer=optimizer)


def test_the_module_itself_as_a_layer_is_named():
    rooted = Calling(
        lambda m, x: m.last(x * m.weight),
        weight=nn.Parameter(torch.ones(5).double()),
        last=network(),
    )
    refused(
        "3 layers (the module itself, last.0, last.2)",
        module=rooted,
        hyperparameters={"lr": [[0.1]]},
    )


OPTIONS = {  # name -> rule, values that break it
    "optimizer": (
        "must be one of sgd, momentum, nesterov, adam, adamw",
        "rmsprop",
        "",
        None,
        ["sgd"],
        torch.optim.SGD,
    ),
    "mode": ("must be 'auto', 'reverse', 'forward' or 'fd'", "backward", None, 3, ["reverse"]),
    "truncate": ("must be an integer of at least 1, or None", 0, -1, 1.5, True, "all"),
    "checkpoint": ("must be True or False", "sqrt"),
    "memory": ("must be a positive number of bytes", "much", 0, -5, math.nan, True),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    rule, *values = OPTIONS[name]
    for value in values:
        refused(f"{name} {rule}", repr(value), **{name: value})


def test_truncate_and_checkpoint_belong_to_reverse_mode():
    for mode, options in itertools.product(
        ("forward", "fd"), ({"truncate": 2}, {"checkpoint": True})
    ):
        words = "'auto' with truncate or checkpoint", repr(mode), "mode='reverse'"
        refused(*words, mode=mode, **options)


@pytest.mark.parametrize(
    ("hyperparameters", "optimizer"),
    (
        ({"weight_decay": 0.0}, "sgd"),
        ({"momentum": [0.5, 0.0]}, "nesterov"),
        ({"beta1": 0}, "adam"),
    ),
)
def test_finite_differences_at_zero(hyperparameters, optimizer):
    name = next(iter(hyperparameters))
    refused(
        f"hyperparameters[{name!r}] must be above 0 for mode='fd'",
        "Use mode='reverse' or 'forward'",
        hyperparameters=hyperparameters,
        optimizer=optimizer,
        mode="fd",
    )
    for mode in ("reverse", "forward"):
        result = run(hyperparameters=hyperparameters, optimizer=optimizer, mode=mode)
        assert result.gradient[name].isfinite().all() and (result.gradient[name] != 0).any()


X, Y = data()[1]
SHAPES = (
    "The module or the loss raised RuntimeError for ",
    "Check the shapes and dtypes of x and y.",
)
NUMPY = "Make x and y tensors with torch.from_numpy."


@pytest.mark.parametrize(
    ("given", "words"),
    (
        ({"batches": []}, ("at least one minibatch", "got none")),
        ({"batches": iter(())}, ("at least one minibatch",)),
        ({"batches": 5}, ("batches must be the minibatches (x, y)", "got int")),
        ({"batches": (X, Y)}, ("batches[0] must be a pair (x, y)", "got Tensor")),
        ({"batches": X}, ("batches[0] must be a pair (x, y)", "got Tensor")),
        ({"batches": [*data()[0], 1]}, ("batches[4] must be a pair (x, y)", "got int")),
        ({"batches": [(1, 2, 3)]}, ("batches[0] must be a pair (x, y)", "got 3 values", "one x")),
        ({"batches": [{"x": 1, "y": 2}]}, ("batches[0] must be a pair (x, y)", "got dict")),
        ({"batches": "ab"}, ("batches[0] must be a pair (x, y)", "got str")),
        ({"valid": X}, ("valid must be a pair (x, y)", "got Tensor")),
        ({"valid": (X,)}, ("valid must be a pair (x, y)", "got 1 values")),
        ({"valid": data()[0]}, ("valid must be a pair (x, y)", "got 4 values")),
        ({"valid": 7}, ("valid must be a pair (x, y)", "got int")),
        (
            {"batches": [(X[:, :3], Y)]},
            ("batches[0]", *SHAPES, "mat1 and mat2 shapes cannot be multiplied"),
        ),
        ({"batches": [(X, Y.double())]}, ("batches[0]", *SHAPES)),
        ({"batches": [(X.float(), Y)]}, ("batches[0]", *SHAPES, "same dtype")),
        ({"valid": (X[:, :3], Y)}, ("valid", *SHAPES)),
        ({"batches": [(X.numpy(), Y.numpy())]}, ("batches[0]", NUMPY)),
        ({"batches": [(X, Y.numpy())]}, ("batches[0]", NUMPY)),
        ({"valid": (X.numpy(), Y)}, ("valid", NUMPY)),
        (
            {"loss": lambda y, output: functional.cross_entropy(output, y)},
            (
                "The module or the loss computes with integers for batches[0]",
                "Check the order of the arguments",
            ),
        ),
    ),
)
def test_data(given, words):
    refused(*words, **given)


@pytest.mark.parametrize("mode", (*EXACT, "fd"))
def test_several_validation_pairs_are_refused_before_the_training(mode):
    trained = []

    def loss(output, y):
        trained.append(y)
        return output.sum() if isinstance(y, tuple) else functional.cross_entropy(output, y)

    words = (
        "The module or the loss raised TypeError for valid",
        "If valid holds several pairs (x, y)",
        "torch.cat",
    )
    refused(*words, loss=loss, valid=data()[0][:2], mode=mode)
    assert len(trained) == 1

    picky = Calling(lambda m, x: m.inner(x.view(-1, 5)), inner=network())
    refused(
        "The module or the loss raised AttributeError for valid", module=picky, valid=data()[0][:2]
    )


COMPLEX = Calling(
    lambda m, x: (x.to(torch.complex128) @ m.weight).abs(),
    weight=nn.Parameter(torch.ones(5, 3, dtype=torch.complex128)),
)


@pytest.mark.parametrize(
    ("module", "words"),
    (
        (nn.Linear, ("must be a torch.nn.Module", "got type")),
        (lambda x: x, ("must be a torch.nn.Module", "got function")),
        (nn.Sequential(nn.Tanh()), ("nothing to train",)),
        (
            nn.Sequential(nn.LazyLinear(4)),
            ("must have all its parameters", "'0.weight'", "Call module(x) once before"),
        ),
        (network().requires_grad_(False), ("nothing to train",)),
        (
            nn.Sequential(nn.Linear(5, 4).double(), nn.Linear(4, 3)),
            (
                "one floating dtype on one device",
                "torch.float32 on cpu, torch.float64 on cpu",
                "module.to(",
            ),
        ),
        (COMPLEX, ("one floating dtype", "torch.complex128 on cpu")),
        (
            network(nn.InstanceNorm1d(4, track_running_stats=True)),
            ("must not keep running statistics in '2' (InstanceNorm1d)", "nn.BatchNorm1d"),
        ),
    ),
)
def test_module(module, words):
    refused(*words, module=module)


class Counter(nn.Module):
    """Remembers how often it was called, in place or by a new tensor, in training or in
    evaluation."""

    def __init__(self, *, in_place, when):
        super().__init__()
        self.in_place = in_place
        self.when = when
        self.register_buffer("calls", torch.zeros(()).double())

    def forward(self, x):
        if self.training == (self.when == "batches[0]"):
            self.calls = self.calls.add_(1) if self.in_place else self.calls + 1
        return x * (1 + self.calls)


@pytest.mark.parametrize("mode", (*EXACT, "fd"))
def test_buffers_that_change(mode):
    for in_place, when in itertools.product((False, True), ("batches[0]", "valid")):
        counter = Counter(in_place=in_place, when=when)
        refused(
            f"the buffer '2.calls' changes in {when}",
            "Keep no running state",
            module=network(counter),
            mode=mode,
        )
        assert counter.calls == 0 and counter.training


class Teacher(nn.Linear):
    """Moves its frozen weight in place."""

    def forward(self, x):
        self.weight.add_(1)
        return super().forward(x)


@pytest.mark.parametrize(
    ("middle", "words"),
    (
        (
            Teacher(4, 4).double().requires_grad_(False),
            "module must not change its state when it is called, but the parameter '2.weight' changes in "
            "batches[0]",
        ),
        (spectral_norm(nn.Linear(4, 4)), "'2.parametrizations.weight.0._u' changes"),
    ),
)
def test_a_state_that_changes(middle, words):
    module = network(middle)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    refused(words, module=module)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


DEPEND = "must depend on the parameters"
cross_entropy = functional.cross_entropy


@pytest.mark.parametrize(
    ("loss", "words"),
    (
        (lambda output, y: output, ("one number for batches[0]", "got (8, 3)", ".mean()")),
        (lambda output, y: cross_entropy(output, y, reduction="none"), ("got (8,)",)),
        (
            lambda output, y: cross_entropy(output, y).item(),
            ("one number for batches[0]", "got float"),
        ),
        (lambda output, y: None, ("got NoneType",)),
        ("cross_entropy", ("loss must be a function loss(module(x), y)", "'cross_entropy'")),
        (lambda output, y: torch.zeros(()), (DEPEND, "batches[0]", ".detach()")),
        (lambda output, y: output.detach().mean(), (DEPEND,)),
        (lambda output, y: (output.argmax(1) == y).sum(), (DEPEND,)),
    ),
)
def test_loss(loss, words):
    for mode in ("auto", "fd"):
        refused(*words, loss=loss, mode=mode)


@pytest.mark.parametrize("mode", EXACT)
def test_a_validation_loss_that_depends_on_nothing(mode):
    def loss(output, y):
        return functional.cross_entropy(output, y) if len(y) == 8 else output.detach().mean()

    refused("it depends on no parameter for valid", loss=loss, mode=mode)


@pytest.mark.parametrize("mode", (*EXACT, "fd"))
def test_parameters_that_are_read_from_behind(mode):
    module = network()
    kept = list(module.parameters())

    def loss(output, y):
        return functional.cross_entropy(output, y) + kept[2].square().sum()

    words = "reads the parameter '2.weight' from a separate variable", "module.parameters()"
    refused(*words, module=module, loss=loss, mode=mode)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        return slope * (1 - x.tanh() ** 2)


class Numeric(torch.autograd.Function):
    """Its backward leaves autograd without a word."""

    @staticmethod
    def forward(ctx, x):
        ctx.kept = x.detach()
        return x.tanh()

    @staticmethod
    def backward(ctx, slope):
        return slope.detach() * (1 - ctx.kept.tanh() ** 2)


class Partial(Numeric):
    """The missing part of its second derivative is symmetric."""

    @staticmethod
    def backward(ctx, slope):
        return slope * (1 - ctx.kept.tanh() ** 2)


class Refusing(Numeric):
    """As torch's own operations without a second derivative do."""

    @staticmethod
    def backward(ctx, slope):
        raise RuntimeError("the derivative for aten::odd is not implemented.")


def applied(function):
    return Calling(lambda m, x: function(x))


ATTENTION = "Run it inside torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or call"


def attend(m, x):
    x = x.view(-1, 2, 2)
    return m.inner(x, x, x, need_weights=False)[0].flatten(1)


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize(
    ("middle", "words"),
    (
        (applied(Once.apply), ("(Once)", "incomplete")),
        (applied(Numeric.apply), ("(Numeric)", "incomplete")),
        (applied(Partial.apply), ("(Partial)", "incomplete")),
        (weight_norm(nn.Linear(4, 4)), ("(WeightNormInterface)", "incomplete", "weight_norm")),
        (
            applied(Refusing.apply),
            ("(the derivative for aten::odd is not implemented). Replace it, or call",),
        ),
        (
            Calling(attend, inner=nn.MultiheadAttention(2, 1, batch_first=True)),
            ("scaled_dot_product", ATTENTION),
        ),
        (
            applied(lambda x: x + (x.round() - x).detach()),
            ("a .detach() of a tensor that depends on the parameters",),
        ),
    ),
)
def test_operations_without_a_second_derivative(middle, words, mode):
    module = network(middle)
    refused("cannot be differentiated twice", *words, "mode='fd'", module=module, mode=mode)
    if "incomplete" in words:
        result = run(module, mode="fd")  # as the message says
        assert result.gradient["lr"].isfinite() and result.gradient["lr"] != 0


@pytest.mark.parametrize("mode", EXACT)
def test_a_detached_path_is_no_second_derivative(mode):
    def loss(output, y):
        return functional.cross_entropy(output * output.detach().norm(), y)

    refused("a .detach() of a tensor that depends on the parameters", loss=loss, mode=mode)


@pytest.mark.parametrize(
    "module",
    (
        network(applied(Numeric.apply)),
        network(weight_norm(nn.Linear(4, 4))),
        # what is left of its second derivative is symmetric: 0
        nn.Sequential(nn.Linear(5, 3), applied(Once.apply)),
    ),
)
def test_in_single_precision_most_are_seen_too(module):
    (x, y), valid = data()[0][0], data()[1]
    refused(
        "incomplete",
        module=module.float(),
        batches=[(x.float(), y)],
        valid=(valid[0].float(), valid[1]),
    )


@pytest.mark.parametrize(
    "middle",
    (
        nn.ReLU(),
        nn.Hardtanh(-0.1, 0.1),
        nn.Dropout(0.5),
        nn.Sequential(nn.Unflatten(1, (1, 4)), nn.MaxPool1d(2, 1), nn.Flatten(), nn.Linear(3, 4)),
        # a float64 module that computes in float32 inside
        applied(lambda x: x.float().sigmoid().to(x.dtype)),
        applied(torch.round),
    ),
)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_what_has_kinks_or_steps_or_little_precision_is_not_refused(middle, dtype):
    def lower(pair):
        return pair[0].to(dtype), pair[1]

    batches, valid = data()
    run(
        network(middle).to(dtype),
        batches=[lower(pair) for pair in batches],
        valid=lower(valid),
        mode="reverse",
    )


def test_other_errors_of_torch_stay_themselves():
    def loss(output, y):
        raise NotImplementedError('"this kernel" not implemented for my device')

    with pytest.raises(NotImplementedError, match="not implemented for my device"):
        run(loss=loss)


def numbers(text):
    """Sizes in a message, in bytes: of reverse, checkpointed, forward mode, and of the budget."""
    units = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    return [float(size) * units[unit] for size, unit in re.findall(r"([\d.]+) (KiB|MiB|GiB)", text)]


def test_memory_beyond_the_budget_says_what_fits():
    options = {"batches": inner_problems.data(100)[0], "hyperparameters": {"lr": [0.1] * 2}}
    text = refused(
        "memory does not suffice for mode='reverse': reverse needs about",
        mode="reverse",
        memory=1,
        **options,
    )
    assert text.endswith("Use smaller minibatches or a larger memory.")
    whole, blocks, tangents, budget = numbers(text)
    assert whole > blocks > tangents > budget
    text = refused("mode='reverse'", mode="reverse", memory=int(1.1 * blocks), **options)
    assert "Use checkpoint=True (fits), mode='forward' (fits), truncate=" in text
    steps = int(re.search(r"truncate=(\d+) \(fits\)", text)[1])
    fitting = ({"checkpoint": True}, {"mode": "forward"}, {"truncate": steps})
    for option in fitting:
        run(memory=int(1.1 * blocks), **options, **option)
    refused("mode='reverse'", memory=int(1.1 * blocks), truncate=steps + 1, **options)
    refused(
        "mode='reverse'",
        "mode='forward' (fits)",
        checkpoint=True,
        memory=int(1.1 * tangents),
        **options,
    )
    refused("mode='forward'", "larger memory.", mode="forward", memory=100, **options)
    refused("mode='forward'", "larger memory.", memory=100, **options)


def test_large_sizes_are_in_larger_units(monkeypatch):
    def large(*_):
        return MemoryNeed(step=3 * 2**30, state=2**20)

    monkeypatch.setattr(hypergradient_file, "measure", large)
    refused(
        "reverse needs about 12.0 GiB for 4 steps",
        "1.0 MiB may be used",
        mode="reverse",
        memory="1MB",
    )


def test_fixed_values_are_checked_as_the_others_are():
    refused("fixed must have other names than hyperparameters, got lr in both", fixed={"lr": 0.1})
    refused(
        "fixed must be some of lr, momentum, weight_decay for sgd, got 'beta1'",
        fixed={"beta1": 0.9},
    )
    refused("fixed must be a dict with at least one hyperparameter", "got 3", fixed=3)
    refused("fixed['momentum'] must be in [0, 1), got 1.0", fixed={"momentum": 1.0})


@pytest.mark.filterwarnings("ignore:The validation loss is nan")
@pytest.mark.parametrize("mode", (*EXACT, "fd"))
def test_a_loss_that_is_not_a_number_is_seen(mode):
    result = run(loss=lambda output, y: functional.cross_entropy(output, y) * math.nan, mode=mode)
    assert math.isnan(result.value) and result.gradient["lr"].isnan() and math.isnan(result.ratio)
    empty = (data()[1][0][:0], data()[1][1][:0])
    assert math.isnan(run(valid=empty, mode=mode).value)
