"""hypergradient(), compared with torch.optim and finite differences for many modules; it changes
none of its inputs.
"""

import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from gputune.hypergradients.first_step import measure
from gputune.hypergradients.hypergradient import _default_tables, hypergradient
from gputune.hypergradients.inner import CHAOTIC, InnerProblem
from gputune.hypergradients.module_training import ModuleTraining
from gputune.models import LogisticRegression
from inner_problems import OF, OPTIMIZERS, Calling, data, network
from problems import living_tensors
from refused import refused

MODES = (
    {"mode": "reverse"},
    {"mode": "reverse", "checkpoint": True},
    *({"mode": m} for m in ("forward", "fd", "auto")),
)
VALUES = {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.02, "beta1": 0.85, "beta2": 0.98}
cross_entropy = functional.cross_entropy


def run(
    module, loss=cross_entropy, given=None, *, hyperparameters=None, optimizer="sgd", **options
):
    batches, valid = given or data()
    options.setdefault("seed", 0)
    values = {"lr": 0.1} if hyperparameters is None else hyperparameters
    return hypergradient(
        module, loss, batches, valid, hyperparameters=values, optimizer=optimizer, **options
    )


def assert_close(found, expected, tolerance=1e-12):
    for name, table in expected.items():
        assert (found[name] - table).abs().max() <= tolerance * table.abs().max(), name


def assert_agree(results, tolerance=1e-12, *, fd=1e-6):
    """All modes give one value and one gradient."""
    for result in results[1:]:
        assert result.value == pytest.approx(results[0].value, rel=tolerance)
        assert_close(result.gradient, results[0].gradient, fd if result.mode == "fd" else tolerance)


def values_of(optimizer):
    shapes = {"lr": (3, 2), "momentum": (2,), "weight_decay": (1, 2)}
    return {name: np.full(shapes.get(name, ()), VALUES[name]) for name in OF[optimizer]}


@functools.cache
def slopes_of_the_value(optimizer):
    """Central differences in the logarithm of every entry."""
    found = values_of(optimizer)
    for name, value in found.items():
        for entry in np.ndindex(value.shape):
            ends = []
            for sign in (1, -1):
                moved = values_of(optimizer)
                moved[name][entry] *= np.exp(sign * 1e-5)
                ends.append(
                    run(network(), hyperparameters=moved, optimizer=optimizer, mode="reverse").value
                )
            value[entry] = (ends[0] - ends[1]) / 2e-5
    return found


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [*((name, MODES[-1]) for name in OPTIMIZERS), *(("adamw", mode) for mode in MODES[:-1])],
)
def test_every_mode_is_the_slope_of_the_value(optimizer, options):
    found = run(network(), hyperparameters=values_of(optimizer), optimizer=optimizer, **options)
    assert options["mode"] == "auto" or (
        found.mode == options["mode"] and found.reason.startswith("requested; ")
    )
    for name, slope in slopes_of_the_value(optimizer).items():
        tolerance = (1e-5 if found.mode == "fd" else 1e-6) * np.abs(slope) + 1e-9
        assert (np.abs(found.log_gradient[name].numpy() - slope) <= tolerance).all(), name


def torch_optimizer(optimizer, params, values):
    """torch's own optimizer; a value missing from ``values`` is the default, also a momentum of
    0.9.
    """
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}.get(optimizer, torch.optim.SGD)
    options = {name: values[name] for name in ("lr", "weight_decay") if name in values}
    if kind is torch.optim.SGD and optimizer != "sgd":
        options |= {"momentum": values.get("momentum", 0.9), "nesterov": optimizer == "nesterov"}
    if "beta1" in values:
        options["betas"] = (values["beta1"], values["beta2"])
    return kind(params, **options)


def trained_by(stepper, module, batches):
    for x, y in batches:
        stepper.zero_grad()
        cross_entropy(module(x), y).backward()
        stepper.step()
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("steps", (50, 5))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_parameters_are_those_of_torch_optim(optimizer, steps):
    given = data(steps)
    module = network()
    values = {name: VALUES[name] for name in OF[optimizer]} if steps > 5 else {"lr": 0.01}
    result = run(module, given=given, hyperparameters=values, optimizer=optimizer)
    theirs = copy.deepcopy(module)
    expected = trained_by(torch_optimizer(optimizer, theirs.parameters(), values), theirs, given[0])
    assert list(result.parameters) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(result.parameters[name], tensor, rtol=1e-11, atol=1e-13)
    x, y = given[1]
    assert result.value == pytest.approx(cross_entropy(theirs(x), y).item(), rel=1e-11)


class Nested(nn.Module):
    """Layers in the order of named_modules: the root, "block.first", "last"; one is frozen, one
    shares the first's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.last_but_named_first = None
        self.block = nn.ModuleDict({"frozen": nn.Linear(5, 5), "first": nn.Linear(5, 5)})
        self.again = nn.Linear(5, 5)
        self.last = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(5))
        self.block["frozen"].requires_grad_(False)
        self.again.weight = self.block["first"].weight
        self.again.bias = self.block["first"].bias
        self.double()

    def forward(self, x):
        hidden = torch.tanh(self.block["first"](self.block["frozen"](x) * self.scale))
        return self.last(torch.tanh(self.again(hidden)))


def test_segments_and_layers_are_the_steps_and_submodules_they_are_said_to_be():
    given = data(7)
    module = Nested()
    rates = torch.tensor(
        [[0.1, 0.2, 0.3], [0.05, 0.25, 0.15], [0.3, 0.1, 0.2]], dtype=torch.float64
    )
    result = run(module, given=given, hyperparameters={"lr": rates})
    theirs = copy.deepcopy(module)
    layers = [[theirs.scale], theirs.block["first"].parameters(), theirs.last.parameters()]
    stepper = torch.optim.SGD([{"params": list(layer)} for layer in layers], lr=1.0)
    for step, (x, y) in enumerate(given[0]):
        segment = [0, 0, 1, 1, 2, 2, 2][step]  # from floor(s * 7 / 3) on
        for group, rate in zip(stepper.param_groups, rates[segment]):
            group["lr"] = float(rate)
        stepper.zero_grad()
        cross_entropy(theirs(x), y).backward()
        stepper.step()
    trained = {name: p.detach() for name, p in theirs.named_parameters() if p.requires_grad}
    assert result.parameters.keys() == trained.keys()
    for name, expected in trained.items():
        torch.testing.assert_close(result.parameters[name], expected, rtol=1e-12, atol=1e-14)
    assert (result.gradient["lr"] != 0).all()


@pytest.mark.parametrize(
    ("value", "shape"),
    (
        (0.1, ()),
        (1, ()),
        (np.float32(0.1), ()),
        (np.array(0.1), ()),
        (torch.tensor(0.1, requires_grad=True), ()),
        ([0.1], (1,)),
        ((0.1, 0.2), (2,)),
        (np.array([0.1, 0.2, 0.3]), (3,)),
        (torch.tensor([0.1, 0.2], requires_grad=True), (2,)),
        ([[0.1, 0.2]], (1, 2)),
        (np.full((3, 2), 0.1), (3, 2)),
    ),
)
def test_gradients_have_the_shape_of_what_was_given(value, shape):
    mode = {(): "fd", (3,): "forward", (3, 2): "forward"}.get(shape, "reverse")
    result = run(network(), hyperparameters={"lr": value}, mode=mode)
    found = result.gradient["lr"]
    assert tuple(found.shape) == tuple(result.log_gradient["lr"].shape) == shape
    assert found.dtype == torch.float64 and not found.requires_grad
    numbers = torch.as_tensor(value).detach().double()
    torch.testing.assert_close(result.log_gradient["lr"], found * numbers, rtol=1e-7, atol=0)
    assert isinstance(result.value, float) and isinstance(result.ratio, float)


@pytest.mark.parametrize("options", MODES)
def test_the_module_is_left_as_it_was(options):
    module = network(nn.Dropout(0.5), nn.LayerNorm(6))
    module.register_buffer("kept", torch.ones(2))
    module[2].eval()
    module[0].bias.requires_grad_(False)
    for p in module.parameters():
        p.grad = torch.full_like(p, 7)
    state = copy.deepcopy(module.state_dict())
    flags = [part.training for part in module.modules()]
    objects = [id(tensor) for tensor in (*module.parameters(), *module.buffers())]
    draws = torch.get_rng_state()
    given = data()
    before = [tensor.clone() for pair in (*given[0], given[1]) for tensor in pair]
    run(module, given=given, **options)
    assert torch.equal(torch.get_rng_state(), draws)
    assert [part.training for part in module.modules()] == flags and False in flags
    assert [id(tensor) for tensor in (*module.parameters(), *module.buffers())] == objects
    assert [p.requires_grad for p in module.parameters()] == [True, False, True, True, True, True]
    assert all((p.grad == 7).all() for p in module.parameters())
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert all(
        torch.equal(a, b)
        for a, b in zip(before, (tensor for pair in (*given[0], given[1]) for tensor in pair))
    )


class Remembering(nn.Module):
    """One layer under two names; keeps activations in an attribute, a dict and a list, and may
    fail."""

    def __init__(self, *, second_name, fails=False):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(5, 5).double()
        self.last = nn.Linear(5, 3).double()
        if second_name:
            self.b = self.a
        self.kept = {}
        self.log = []
        self.fails = fails

    def forward(self, x):
        self.hidden = self.kept["hidden"] = torch.tanh(self.a(x))
        self.log.append(self.hidden)
        if self.fails and not self.training:
            raise RuntimeError("it fails")
        return self.last((self.b if hasattr(self, "b") else self.a)(self.hidden))


@pytest.mark.parametrize("options", MODES)
def test_a_submodule_with_two_names_is_left_as_it_was(options):
    module = Remembering(second_name=True)
    plain = run(Remembering(second_name=False), **options)
    objects = list(module.parameters())
    values = [p.detach().clone() for p in objects]
    for _ in range(2):
        result = run(module, **options)
        assert result.value == plain.value and torch.equal(
            result.gradient["lr"], plain.gradient["lr"]
        )
    assert all(a is b for a, b in zip(module.parameters(), objects, strict=True))
    assert module.b is module.a and module.b.weight is objects[0]
    assert all(torch.equal(p, value) for p, value in zip(objects, values))
    assert not hasattr(module, "hidden") and module.kept == {} and module.log == []


def test_a_submodule_with_two_names_is_left_as_it_was_after_an_error():
    module = Remembering(second_name=True, fails=True).eval()
    objects = list(module.parameters())
    hook = module.a.register_forward_hook(lambda *_: None)
    draws = torch.get_rng_state()
    state = copy.deepcopy(module.state_dict())
    with refused("it fails"):
        run(module)
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert all(a is b for a, b in zip(module.parameters(), objects, strict=True))
    assert module.b.weight is objects[0] and not hasattr(module, "hidden")
    assert not any(part.training for part in module.modules())
    assert list(module.a._forward_hooks) == [hook.id]


def test_draws_are_the_same_under_one_seed_in_all_modes():
    noisy = Calling(
        lambda m, x: m.inner(x + 0.3 * torch.randn(x.shape, dtype=x.dtype)), inner=network()
    )
    draws = torch.get_rng_state()
    assert_agree([run(noisy, seed=1, **options) for options in MODES])  # in evaluation too
    assert torch.equal(torch.get_rng_state(), draws)
    results = [run(network(nn.Dropout(0.5)), seed=5, **options) for options in MODES]
    assert_agree(results)
    trained, (x, y) = network(nn.Dropout(0.5)), data()[1]
    trained.load_state_dict(results[0].parameters)
    assert results[0].value == pytest.approx(cross_entropy(trained.eval()(x), y).item(), rel=1e-12)
    assert run(network(nn.Dropout(0.5)), seed=6).value != results[0].value
    assert run(network(nn.Dropout(0.0)), seed=5).value != results[0].value


def test_without_a_seed_one_is_drawn():
    module = network(nn.Dropout(0.5))
    torch.manual_seed(3)
    first = run(module, seed=None)
    second = run(module, seed=None)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    seeds = [int(torch.randint(2**62, ())) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert [first.value, second.value] == [run(module, seed=seed).value for seed in seeds]
    assert first.value != second.value


@pytest.mark.parametrize(
    ("off", "options"),
    [(torch.no_grad, MODES[-1]), *((torch.inference_mode, mode) for mode in MODES[:-1])],
)
def test_it_works_where_gradients_are_off(off, options):
    expected = run(network(nn.LayerNorm(6)), **options)
    with off():  # the module's tensors and the data are made there too
        module = network(nn.LayerNorm(6))
        module[0].weight.requires_grad_(True)
        found = run(module, given=data(), **options)
    assert found.value == expected.value
    assert torch.equal(found.gradient["lr"], expected.gradient["lr"])
    assert not found.gradient["lr"].is_inference()
    given = data()
    with torch.inference_mode():
        made_there = data()
    assert (
        run(network(), given=made_there, **options).value
        == run(network(), given=given, **options).value
    )


class Tokens(nn.Module):
    """Rows of integers through an embedding and a middle layer, to 3 classes."""

    def __init__(self, middle, inputs=5):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 4)
        self.middle = middle
        self.last = nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        hidden = self.middle(self.embedding(x))
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.last(hidden.mean(1))


def image(*layers):
    return nn.Sequential(Calling(lambda m, x: x[:, :4].reshape(-1, 1, 2, 2)), *layers)


def attention():
    inner = nn.MultiheadAttention(4, 2, batch_first=True)
    return Calling(lambda m, x: m.inner(x, x, x, need_weights=False), inner=inner)


def tokens(given):
    return [((10 * x).long().abs() % 9, y) for x, y in given]


MODULES = {
    "layer norm": lambda: network(nn.LayerNorm(6), nn.GELU()),
    "group norm": lambda: network(nn.GroupNorm(2, 6), nn.SiLU()),
    "batch norm": lambda: network(nn.BatchNorm1d(6, track_running_stats=False)),
    "running statistics": lambda: network(
        nn.BatchNorm1d(6), nn.Tanh(), nn.BatchNorm1d(6, affine=False)
    ),
    "cumulative statistics": lambda: network(nn.BatchNorm1d(6, momentum=None)),
    "conv": lambda: image(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Tanh(), nn.Linear(3, 3)),
    "embedding": lambda: Tokens(nn.Identity()),
    "gru": lambda: Tokens(nn.GRU(4, 4, batch_first=True)),
    "lstm": lambda: Tokens(nn.LSTM(4, 4, batch_first=True)),
    "attention": lambda: Tokens(attention()),
    "transformer": lambda: Tokens(
        nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, activation="gelu", batch_first=True)
    ),
}


@pytest.mark.parametrize("kind", MODULES)
def test_modules(kind):
    module = MODULES[kind]().double()
    batches, valid = data()
    if isinstance(module, Tokens):
        batches, (valid,) = tokens(batches), tokens([valid])
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no second derivative
        results = [
            run(module, given=(batches, valid), optimizer="adam", **options)
            for options in MODES[:-1]
        ]
    assert_agree(results, 1e-10, fd=1e-5)


@pytest.mark.parametrize("options", MODES[:4])
def test_running_statistics_are_those_of_a_plain_loop(options):
    """Which torch's own modules keep; the slope is how the loop's own loss in evaluation mode moves
    with its rate."""
    module = image(
        nn.Conv2d(1, 3, 2, bias=False), nn.BatchNorm2d(3), nn.Flatten(), nn.Tanh(), nn.Linear(3, 3)
    )
    before = copy.deepcopy(module.double().train().state_dict())
    (batches, (x, y)), rate = data(), 0.3

    def plain(lr):
        theirs = copy.deepcopy(module)
        trained_by(torch.optim.SGD(theirs.parameters(), lr, momentum=0.9), theirs, batches)
        return theirs.eval(), cross_entropy(theirs(x), y).item()

    values = {"lr": rate, "momentum": 0.9}
    found = run(module, given=(batches, (x, y)), hyperparameters=values, **options)
    theirs, value = plain(rate)
    assert found.value == pytest.approx(value, rel=1e-11)
    slope = (plain(rate + 1e-5)[1] - plain(rate - 1e-5)[1]) / 2e-5
    assert float(found.gradient["lr"]) == pytest.approx(
        slope, rel=1e-5 if found.mode == "fd" else 1e-7
    )
    for name, tensor in found.parameters.items():
        torch.testing.assert_close(
            tensor, theirs.state_dict()[name].double(), rtol=1e-11, atol=1e-13
        )
    assert "2.running_var" in found.parameters
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert module.training and "forward" not in vars(module[2])


@pytest.mark.parametrize("loss", (functional.mse_loss, functional.l1_loss, nn.HuberLoss()))
def test_losses_of_a_regression(loss):
    batches, (x, _) = data()
    *pairs, valid = [(x, x.sin().sum(1, keepdim=True)) for x in (*(x for x, _ in batches), x)]
    assert_agree(
        [run(network(outputs=1), loss, (pairs, valid), **options) for options in MODES], fd=1e-5
    )


def test_a_loss_may_have_parameters_and_weights_of_its_own():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros((), dtype=torch.float64))
            self.register_buffer("weight", torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))

        def forward(self, output, y):
            return functional.cross_entropy(output, y, weight=self.weight) * self.log_scale.exp()

    loss = Weighted()
    expected = run(network(), functools.partial(cross_entropy, weight=loss.weight))
    found = run(network(), loss)
    assert_close(found.gradient, expected.gradient)
    assert list(found.parameters) == list(expected.parameters) and loss.log_scale.grad is None


@pytest.mark.parametrize("options", MODES)
def test_a_loss_that_reads_the_parameters_of_the_module_sees_the_trained_ones(options):
    module = network()

    def with_decay(output, y):
        return cross_entropy(output, y) + 0.1 / 2 * sum(
            p.square().sum() for p in module.parameters()
        )

    found = run(module, with_decay, **options)
    expected = run(module, hyperparameters={"lr": 0.1, "weight_decay": 0.1})
    for name, trained in expected.parameters.items():
        torch.testing.assert_close(found.parameters[name], trained, rtol=1e-12, atol=1e-14)
    assert found.value > expected.value


@pytest.mark.parametrize("options", MODES)
def test_parameters_that_some_minibatches_do_not_use(options):
    parts = {"left": network(), "right": network(), "never": nn.Linear(2, 2).double()}
    branches = Calling(lambda m, x: m.left(x) if x[0, 0] > 0 else m.right(x), **parts)
    given = data(8)
    assert {bool(x[0, 0] > 0) for x, _ in given[0]} == {True, False}
    values = {"lr": [[0.1] * 5, [0.2] * 5]}
    found = run(branches, given=given, hyperparameters=values, optimizer="adam", **options)
    expected = run(branches, given=given, hyperparameters=values, optimizer="adam", mode="reverse")
    assert_close(found.gradient, expected.gradient, 1e-5 if found.mode == "fd" else 1e-12)
    assert (found.gradient["lr"][:, 4] == 0).all() and found.gradient["lr"].isfinite().all()


def test_parameters_without_entries():
    none = nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))
    empty = Calling(lambda m, x: m.inner(x) + m.none.sum(), none=none, inner=network())
    found = run(empty, hyperparameters={"lr": [[0.1, 0.1, 0.1]]})
    assert_close(
        {"lr": found.gradient["lr"][:, 1:]},
        run(network(), hyperparameters={"lr": [[0.1, 0.1]]}).gradient,
    )
    assert found.gradient["lr"][0, 0] == 0 and found.parameters["none"].shape == (0, 3)


def test_minibatches_from_a_data_loader_a_generator_and_of_unlike_sizes():
    (x, y), valid = data(1, rows=20)[0][0], data()[1]
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    expected = run(network(), given=([(x[:8], y[:8]), (x[8:16], y[8:16]), (x[16:], y[16:])], valid))
    for batches in (loader, iter(loader), (pair for pair in loader)):
        assert run(network(), given=(batches, list(valid))).gradient == expected.gradient


def test_x_may_be_anything_that_the_module_takes():
    pieces = Calling(lambda m, x: m.inner(torch.cat([x["left"], x["right"]], 1)), inner=network())
    batches, valid = data()
    parted = [({"left": x[:, :2], "right": x[:, 2:]}, y) for x, y in (*batches, valid)]
    found = run(pieces, given=(parted[:-1], parted[-1]))
    assert_close(found.gradient, run(network()).gradient)


def test_truncated():
    values = {"lr": [0.1, 0.2, 0.3]}
    whole, last = (
        run(network(), given=data(9), hyperparameters=values, truncate=n, mode="reverse")
        for n in (None, 3)
    )
    assert last.value == pytest.approx(whole.value, rel=1e-13)
    # The last segment is the last three steps: before it, its rate has no effect.
    assert_close(last.gradient, {"lr": whole.gradient["lr"] * torch.tensor([0, 0, 1])})


def test_auto_takes_the_fastest_mode_that_fits():
    steps = 40
    values = {"lr": [0.1, 0.1, 0.1]}
    given = data(steps)
    training = ModuleTraining(network(), cross_entropy, *given, seed=0)
    tables = {
        **_default_tables("sgd", 0.0, training.start()),
        "lr": torch.full((1, 3, 1), 0.1).double(),
    }
    sizes = measure(InnerProblem(training, "sgd", tables)).of_modes(steps, 3)

    def chosen(memory, values=values):
        result = run(network(), given=given, hyperparameters=values, memory=memory)
        return result.mode, result.reason.split(";")[0]

    assert chosen(None, {"lr": 0.1}) == (
        "forward",
        "one hyperparameter, so that forward mode is no slower than reverse",
    )
    assert (
        chosen("1GB")
        == chosen(sizes["reverse"])
        == ("reverse", "reverse takes the same time for any number of hyperparameters")
    )
    between = (sizes["checkpointed"] + sizes["reverse"]) // 2
    assert chosen(between) == ("reverse", "reverse fits into memory only with checkpoints")
    assert sizes["forward"] < sizes["checkpointed"] - 1
    assert chosen(sizes["forward"]) == ("forward", "reverse does not fit")
    reason = run(network(), given=given, hyperparameters=values, memory="1MB").reason
    assert (
        "for 40 steps" in reason
        and "for 3 hyperparameters" in reason
        and "1.0 MiB may be used" in reason
    )


@pytest.mark.parametrize("mode", ("reverse", "forward"))
def test_the_ratio_flags_chaotic_training_and_nothing_else(mode):
    def ratio(optimizer, lr, steps):
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3)
        ).double()
        given = data(steps, rows=32, inputs=10)
        return run(
            module, given=given, hyperparameters={"lr": lr}, optimizer=optimizer, mode=mode
        ).ratio

    with pytest.warns(
        RuntimeWarning, match="Training is chaotic: it amplifies a small change .* times"
    ):
        assert ratio("momentum", 0.8, 60) > CHAOTIC
    assert ratio("momentum", 0.003, 30) < 20
    assert ratio("adam", 0.001, 30) < 20


@pytest.mark.parametrize("options", MODES)
def test_a_training_that_diverges_is_handled(options):
    def steep(output, y):
        return (output**4).sum()

    with pytest.warns(
        RuntimeWarning, match="The validation loss is (nan|inf). Look for NaN in the minibatches"
    ):
        result = run(network(), steep, hyperparameters={"lr": 10.0}, **options)
    assert not np.isfinite(result.value) and result.chaotic
    assert not result.gradient["lr"].isfinite() and not result.ratio <= CHAOTIC


def test_fixed_values_are_used_and_not_differentiated():
    both = run(network(), hyperparameters={"lr": 0.1, "momentum": 0.7, "weight_decay": [0.1, 0.01]})
    one = run(
        network(), hyperparameters={"lr": 0.1}, fixed={"momentum": 0.7, "weight_decay": [0.1, 0.01]}
    )
    assert set(one.gradient) == {"lr"} and not one.chaotic
    assert one.value == pytest.approx(both.value, rel=1e-12)
    torch.testing.assert_close(one.gradient["lr"], both.gradient["lr"], rtol=1e-12, atol=0)


def test_half_precision_runs():
    result = run(network().bfloat16(), given=data(dtype=torch.bfloat16))
    assert result.gradient["lr"].dtype == torch.bfloat16
    assert result.value == pytest.approx(run(network()).value, rel=0.05)


def test_a_result_is_shown_in_one_line():
    shown = repr(run(network(), hyperparameters={"lr": 0.1, "weight_decay": [0.1, 0.2]}))
    assert (
        shown.startswith("HypergradientResult(value ")
        and "weight_decay: (2,)" in shown
        and len(shown) < 160
    )


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_call_leaves_no_tensor_behind(mode):
    given = data()
    run(network(), given=given, **mode)  # what is kept once for all calls
    before = living_tensors()
    run(network(), given=given, **mode)
    assert living_tensors() <= before


@pytest.mark.parametrize("options", [*MODES, {"optimizer": "exact"}], ids=str)
def test_the_default_device_of_a_program_is_left_unchanged(options):
    exact = "optimizer" in options
    module = LogisticRegression(5, 3).double() if exact else network()
    wanted = {"C": 1.0} if exact else {"lr": [0.1, 0.2], "momentum": 0.5}
    found = []
    given = data(2)
    for device in (None, "meta"):  # which holds no numbers
        torch.set_default_device(device)
        try:
            found.append(
                run(
                    module,
                    given=given,
                    hyperparameters=wanted,
                    **{"optimizer": "momentum", **options},
                )
            )
        finally:
            torch.set_default_device(None)
    for name in wanted:
        assert torch.equal(*(each.gradient[name] for each in found))
