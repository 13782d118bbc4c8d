"""Classes of torch.optim: by name and by type, their rules, the refused ones, and their state."""

import subprocess
import sys

import pytest
import torch

import reference
from gputune.optimizers.classes import (
    CLASSES,
    RowUpdate,
    check_optimizer,
    class_of,
    make_optimizer,
    optimizer_defaults,
    optimizer_word,
)
from problems import fill
from refused import refused


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ("RAdam", "RAdam"),
        ("torch.optim.NAdam", "NAdam"),
        (torch.optim.Rprop, "Rprop"),
        (torch.optim.Adam, "adam"),
        ("torch.optim.SGD", "sgd"),
        ("RMSprop", "rmsprop"),
        (torch.optim.Muon, "muon"),
        ("nesterov", "nesterov"),
        ("exact", "exact"),
    ],
)
def test_the_word_of_an_optimizer(given, word):
    assert optimizer_word(given, "optimizer", more=("exact",)) == word


class Mine(torch.optim.SGD):
    pass


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            "Radam",
            "^optimizer must be one of sgd, .*or a class of torch.optim.*'Radam'. Did you mean "
            "'RAdam'",
        ),
        ("adamm", "Did you mean 'adam'"),
        (3, "got 3. For example .adamw"),
        (
            torch.optim.Adam([torch.zeros(1)]),
            "^optimizer must be the class, not an instance, .* Pass torch.optim.Adam, .* lr and "
            "optimizer__",
        ),
        (Mine, "got .*test_classes.Mine. For"),
        (
            "LBFGS",
            "^optimizer cannot be torch.optim.LBFGS, which evaluates the loss of a "
            "minibatch several times per step. Choose a different optimizer",
        ),
        (
            torch.optim.SparseAdam,
            "cannot be torch.optim.SparseAdam, which supports only sparse gradients",
        ),
        ("Optimizer", "got 'Optimizer'"),
    ],
)
def test_what_is_no_optimizer_is_refused(given, words):
    with refused(words):
        optimizer_word(given, "optimizer")


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"optimizer": "adam"}, None),
        ({"optimizer": "adam", "optimizer__amsgrad": True}, torch.optim.Adam),
        ({"optimizer": "nesterov", "optimizer__dampening": 0.0}, torch.optim.SGD),
        ({"optimizer": "Adamax"}, torch.optim.Adamax),
    ],
)
def test_a_rule_with_arguments_is_its_class(config, kind):
    assert class_of(config) is kind


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"optimizer": "lion", "optimizer__betas": (0.9, 0.99)},
            "optimizer__betas is for classes .*'lion' is not a class of torch.optim",
        ),
        (
            {"optimizer": "RAdam", "optimizer__beta": 1},
            "not a hyperparameter of torch.optim.RAdam.*mean .optimizer__bet",
        ),
        (
            {"optimizer": "sgd", "optimizer__weight_deacy": 1},
            "torch.optim.SGD, which has lr, momentum, .*Did you mean 'weight_decay'",
        ),
        (
            {"optimizer": "RAdam", "optimizer__foreach": True},
            "optimizer__foreach is not a hyperparameter",
        ),
        (
            {"optimizer": "RAdam", "optimizer__lr": 1},
            "^optimizer__lr must be written without a prefix: 'lr'",
        ),
        (
            {"optimizer": "RAdam", "optimizer__betas": 0.9},
            r"raised TypeError.* as a tuple in a list, \[\(0.9,",
        ),
        (
            {"optimizer": "RAdam", "optimizer__betas": (0.9, 2)},
            "raised ValueError: Invalid beta .*Change the values",
        ),
    ],
)
def test_arguments_that_a_class_has_not_are_refused(config, words):
    with refused(words):
        check_optimizer(*fill(config), "module")


def test_built_in_models_and_stacked_members_have_no_such_class():
    (config,) = fill({"optimizer": "RAdam"})
    with refused(
        "torch.optim.RAdam updates only one member at a time, but model='mlp' .*models.MLP"
    ):
        check_optimizer(config, "mlp")
    with refused(
        "backend='stacked' trains .*, but torch.optim.RAdam updates only .*backend='auto' train the "
        "members one by one"
    ):
        check_optimizer(config, "module", stacked=True)


def test_rates_that_a_class_does_not_know_are_refused():
    with refused(
        "optimizer='RAdam' is a class of torch.optim here and does not support 'beta2'. Leave "
        "this key out"
    ):
        fill({"optimizer": "RAdam", "beta2": 0.9})
    with refused("optimizer='adam' is a class .*does not support 'lr_factor__bias'"):
        fill({"optimizer": "adam", "optimizer__eps": 1e-6, "lr_factor__bias": 2.0})


def test_defaults_are_those_of_the_class():
    assert optimizer_defaults("NAdam") == {"lr": 2e-3, "weight_decay": 0.0, "momentum": 0.0}
    assert optimizer_defaults("adamw") == {"lr": 1e-3, "weight_decay": 0.01, "momentum": 0.0}
    assert optimizer_defaults("Adadelta")["lr"] == 1.0


def steps(rule, parameters, numbers):
    rule.begin(0)
    for scale in numbers:
        for w in parameters:
            w.grad = (w.detach() - 1) * scale
        rule.step(torch.empty(0), torch.empty(0))


@pytest.mark.parametrize("name", [*CLASSES, "sgd", "adam", "rmsprop"])
def test_a_state_continues_bit_for_bit(name):
    more = {
        "adam": {"optimizer__amsgrad": True},
        "rmsprop": {"optimizer__centered": True},
        "sgd": {"optimizer__dampening": 0.1},
    }
    (config,) = fill({"optimizer": name, "lr": 0.01, "momentum": 0.5, **more.get(name, {})})
    one, other = (
        [torch.linspace(-1, 2, 12).view(3, 4).requires_grad_(), torch.ones(3).requires_grad_()]
        for _ in range(2)
    )
    rule = RowUpdate(config, torch.empty(15), one, steps=9, horizon=1)
    steps(rule, one, [1.0, -0.5, 2.0])
    for w, value in zip(other, one):
        w.data.copy_(value)
    resumed = RowUpdate(config, torch.empty(15), other, steps=9, horizon=1)
    resumed.resume(rule.state())
    for way, parameters in ((rule, one), (resumed, other)):
        steps(way, parameters, [0.3, -1.0])
    assert all(len(row) == 15 for row in rule.state())
    for a, b in zip([*one, *rule.state()], [*other, *resumed.state()], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_state_that_is_longer_than_its_parameter_is_refused(monkeypatch):
    (config,) = fill({"optimizer": "RAdam"})
    w = torch.ones(2, requires_grad=True)
    rule = RowUpdate(config, w, [w], steps=9, horizon=1)
    steps(rule, [w], [1.0])
    rule.optimizer.state[w]["history"] = torch.zeros(5)
    with refused("torch.optim.RAdam keeps more numbers than a parameter of shape \\(2,\\) has"):
        rule.state()


def test_the_oracle_makes_the_same_optimizer():
    (config,) = fill({"optimizer": "NAdam", "optimizer__momentum_decay": 0.01, "weight_decay": 0.1})
    module = torch.nn.Linear(2, 1)
    one = make_optimizer(config, list(module.parameters()))
    other = reference.make_optimizer(module, config)
    assert type(one) is type(other) and one.defaults == other.defaults


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop"])
def test_a_decay_beyond_the_numbers_of_a_precision_is_held_to_them(optimizer):
    (config,) = fill({"optimizer": optimizer, "weight_decay": 1e300})
    weight = torch.ones(2)
    weight.grad = torch.ones(2)
    made = make_optimizer(config, [weight])
    made.step()  # which raises an OverflowError otherwise, of sgd
    assert made.param_groups[0]["weight_decay"] == torch.finfo(torch.float32).max


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adam", "adamw"])
def test_a_rule_takes_the_steps_of_its_class_and_needs_no_compiler(name):
    (config,) = fill(
        {"lr": 0.1, "batch_size": 8, "momentum": 0.5, "weight_decay": 0.1}, optimizer=name
    )
    steps = []
    for make in (make_optimizer, reference_optimizer):
        weight = torch.linspace(-1, 1, 12).requires_grad_()
        optimizer = make(config, [weight])
        for number in range(3):
            weight.grad = torch.linspace(1, 2 + number, 12)
            optimizer.step()
        assert weight.requires_grad and weight.grad_fn is None
        steps.append(weight.detach())
    torch.testing.assert_close(*steps, rtol=0, atol=0)
    assert type(make_optimizer(config, [weight])).__name__ == type(optimizer).__name__


def reference_optimizer(config, parameters):
    """The same optimizer, made by torch.optim."""
    kwargs = {"lr": config["lr"], "weight_decay": config["weight_decay"]}
    if config["optimizer"].startswith("adam"):
        kind = torch.optim.Adam if config["optimizer"] == "adam" else torch.optim.AdamW
        return kind(parameters, betas=(0.9, config["beta2"]), fused=True, **kwargs)
    nesterov = config["optimizer"] == "nesterov"
    return torch.optim.SGD(
        parameters, momentum=config["momentum"], nesterov=nesterov, foreach=True, **kwargs
    )


def test_steps_of_a_rule_do_not_import_the_compiler_of_torch():
    code = """
import sys, torch
from gputune.optimizers.classes import make_optimizer
from gputune.population.population import complete
config = complete({"lr": 0.1, "batch_size": 8}, optimizer="adam", schedule="constant")
weight = torch.ones(3, requires_grad=True)
weight.grad = torch.ones(3)
make_optimizer(config, [weight]).step()
assert weight[0] < 1 and "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
