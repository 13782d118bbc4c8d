"""Errors of a user's module are found and named before training, as far as possible: ids, shapes,
rows, numbers.
"""

import re
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import gputune
from gputune.ground.errors import InputError
from gputune.modules.construction import call_arguments, hint
from gputune.modules.failures import explain
from gputune.modules.module import StackedModule
from problems import Linear, fill, make_data, shape_of, variant

SMALL = {
    "n_trials": 2,
    "cv": [(np.arange(20), np.arange(20, 30))] * 2,
    "max_epochs": 2,
    "verbose": 0,
}
IDS = torch.randint(9, (30, 5), generator=torch.Generator().manual_seed(0))
ROWS = torch.rand(30, 3, generator=torch.Generator().manual_seed(1))
IMAGES = torch.rand(30, 4, 4, 3, generator=torch.Generator().manual_seed(2))
FIRST = IMAGES.permute(0, 3, 1, 2)  # the channels
LABELS = np.arange(30) % 2


def tune(module, X, y=LABELS, **options):
    return gputune.tune(module, X, y, **{**SMALL, "workers": 1, **options})


def changed(x, row, value):
    x = x.clone()
    x[row].view(-1)[-1] = value
    return x


class Words(nn.Module):
    def __init__(self, n_outputs, n_ids=9):
        super().__init__()
        self.code = nn.Embedding(n_ids, 4)
        self.head = nn.Linear(4, n_outputs)

    def forward(self, ids, weight=None):
        return self.head(self.code(ids).mean(1))


Folded = variant(
    Words, lambda self, ids: self.head(self.code(ids.flatten()).view(len(ids), -1, 4).mean(1))
)
Columns = variant(Words, lambda self, x: self.head(self.code(x[:, 0].long())))


class Image(nn.Module):
    def __init__(self, n_outputs):
        super().__init__()
        self.body = nn.Conv2d(3, 2, 3, padding=1)
        self.head = nn.Linear(2, n_outputs)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class Lazy(nn.Module):
    """Layers with several inputs; the first rows determine their sizes."""

    def __init__(self, n_outputs, first=nn.Identity):
        super().__init__()
        self.first = first()
        self.conv = nn.LazyConv2d(2, 3)
        self.last = nn.LazyLinear(n_outputs)

    def forward(self, image, ids):
        return self.last(torch.cat([self.conv(self.first(image)).mean((2, 3)), ids.float()], 1))


def sequence(n_outputs):
    return nn.Sequential(nn.Conv1d(3, 2, 3), nn.Flatten())


Axes = variant(Linear, lambda self, x: Linear.forward(self, x)[:, None])
Both = variant(Linear, lambda self, x: (Linear.forward(self, x), x))


class Asks(nn.Linear):
    def __init__(self, vocabulary, n_outputs):
        super().__init__(3, n_outputs)


class Unbegun(nn.Module):
    def __init__(self, n_features, early=False):
        self.size = nn.Linear(n_features, 2) if early else n_features


class Divides(Linear):
    def __init__(self, n_features, n_outputs, by=0.0):
        super().__init__(n_features, n_outputs)
        self.by = by

    def forward(self, x):
        return super().forward(x) / self.by


UNBEGUN = r" does not call super\(\).__init__\(\)\. Call it first"
LAZY = r"Lazy raised ValueError on two rows of zeros, .*4D .*Pass X\[:, None\]"


@pytest.mark.parametrize(
    ("module", "X", "message"),
    [
        (
            Words,
            changed(IDS, 27, 9),
            r"X has the id 9 in row 27, but the embedding 'code' of Words has 9 entries",
        ),
        (
            Words,
            changed(IDS, 27, -1),
            r"X has the id -1 in row 27, .* for ids 0 to 8. Give such ids other numbers",
        ),
        (
            Words,
            (changed(IDS, 3, 20), ROWS),
            r"X\[0\] has the id 20 in row 3, .* Give it num_embeddings=21",
        ),
        (
            Words,
            changed(changed(IDS, 3, 12), 27, 20),
            "has the id 20 in row 27, .* num_embeddings=21 or more",
        ),
        (Words, {"ids": changed(IDS, 3, 9), "weight": ROWS}, r"X\['ids'\] has the id 9 in row 3"),
        (Words, changed(IDS.repeat(1, 20), 8, 9), "X has the id 9 in row 8"),
        (Folded, changed(IDS, 3, 9), "X has the id 9, but the embedding 'code'"),
        (
            partial(Columns, n_ids=4),
            IDS.double(),
            "computes the id -1 .* a tensor of integers, .* which leaves codes",
        ),
        (Words, IDS.numpy(), "For token ids pass a tensor of integers"),
        (Words, IDS.to(torch.int16), r"begin the forward pass with x.long\(\)"),
        (Image, IMAGES, r"channels of X seem to come last, .* X.transpose\(0, 3, 1, 2\)"),
        (
            Image,
            IMAGES[..., 0],
            r"X lacks the axis of the channels, .* after the rows\. Pass X\[:, None\]",
        ),
        (
            Image,
            FIRST.mul(255).byte(),
            r"x.float\(\), or let numbers='standard' convert bytes to floats",
        ),
        (Image, FIRST > 0.5, r"Begin the forward pass with x.float\(\)\."),
        (
            Image,
            FIRST.long(),
            r"Integers, .* are passed unchanged\. Begin the forward pass with x.float\(\)\.",
        ),
        (
            Image,
            IMAGES.flatten(1),
            r"a row of X is 48 numbers\. Pass X.reshape\(-1, channels, height, width\)",
        ),
        (Image, (IMAGES, IMAGES), "gputune passes several inputs in order, .* leave y out"),
        (Image, IDS.to(torch.uint8)[:, None, None, :3].expand(-1, 3, 3, -1), "numbers='standard'"),
        (
            sequence,
            IMAGES[:, 0].repeat(1, 3, 1),
            r"come last, .* X.transpose\(0, 2, 1\) for an array, X.permute",
        ),
        (
            partial(Lazy, first=partial(nn.BatchNorm2d, 1)),
            {"image": IMAGES[..., 0], "ids": IDS},
            LAZY,
        ),
        (Axes, ROWS, r"got \(20, 1, 2\) .* Pool or flatten the axes after the rows"),
        (Both, ROWS, "got tuple .* return only the first, or pass a training_step"),
        (
            Asks,
            ROWS,
            r"Asks\(vocabulary, n_outputs\) requires 'vocabulary', .* 'module__vocabulary' .*functools.partial",
        ),
        (Unbegun, ROWS, f"An __init__ of Unbegun{UNBEGUN}"),
        (partial(Unbegun, early=True), ROWS, f"An __init__ of Unbegun{UNBEGUN}"),
    ],
)
def test_what_a_module_does_not_take_is_named_with_a_remedy(module, X, message):
    with pytest.raises(InputError, match=message):
        tune(module, X)
    assert hint("something else", [ROWS]) == ""


def test_what_the_remedies_say_is_taken():
    assert tune(partial(Columns, n_ids=4), (IDS % 4).double(), numbers="none").best_trial.score > 0
    assert tune(Asks, ROWS, space={"module__vocabulary": [7]}).best_trial.score > 0


def test_one_configuration_that_is_not_finite_is_a_result_and_all_are_refused():
    with pytest.raises(InputError, match=r"Divides\(by=0.0\) returns outputs that are"):
        tune(Divides, ROWS, space={"module__by": [0.0]})
    study = tune(Divides, ROWS, space={"module__by": [1.0, 0.0]}, include_default=False)
    assert sorted(trial.state for trial in study.trials) == ["complete", "failed"]


@pytest.mark.parametrize("numbers", ["none", "standard"])
def test_lazy_layers_of_several_inputs_get_their_sizes(numbers, tmp_path):
    X = {"image": FIRST if numbers == "none" else FIRST.mul(255).byte(), "ids": IDS}
    model = tune(Lazy, X, numbers=numbers).best_model()
    model.save(tmp_path / "model")
    loaded = gputune.load_model(tmp_path / "model", module=Lazy)
    np.testing.assert_array_equal(loaded.predict_proba(X), model.predict_proba(X))


class Picky(Linear):
    """Fails on a row with a large number, which none of those has on which it is tried."""

    def forward(self, x):
        if bool((x > 50).any()):
            raise ArithmeticError("too large")
        return super().forward(x)


# An embedding whose ids are made of two columns, so that no single one tells of them.
Codes = variant(Words, lambda self, x: self.head(self.code((x[:, 0] * x[:, 1] + x[:, 2]).long())))
CODES = torch.zeros(100, 3)
# the sum of products is above 2 in row 50 alone
CODES[50] = 1.5
CODES[60, :2] = 1
CODES[70, 2] = 1
CODES[40:43] = 2 * torch.eye(3)
LARGE = (
    "Picky raised ArithmeticError in fold 1, after {} epochs?: too large. It fails on row {} of "
    "X, which belongs to the {} rows"
)


@pytest.mark.parametrize(
    ("module", "X", "message"),
    [
        (Picky, changed(torch.rand(100, 3), 45, 1e6), LARGE.format(0, 45, "training")),
        (Picky, changed(torch.rand(100, 3), 95, 1e6), LARGE.format(1, 95, "validation")),
        (partial(Codes, n_ids=3), CODES, "raised IndexError in fold 1, .* fails on row 50 of X"),
    ],
)
def test_a_row_that_fails_in_one_fold_is_named(module, X, message):
    folds = [(np.arange(0, 40), np.arange(40, 45)), (np.arange(0, 80), np.arange(90, 100))]
    with pytest.raises(InputError, match=message):
        tune(module, X, np.arange(100) % 2, cv=folds, numbers="none")


class Tires(Linear):
    """Fails once it has been called often enough, on whatever rows, or in training alone."""

    def __init__(self, n_features, n_outputs, after, evaluates=False):
        super().__init__(n_features, n_outputs)
        self.after = after
        self.calls = 0
        self.evaluates = evaluates

    def forward(self, x):
        self.calls += self.training or self.evaluates
        if self.calls > self.after and (self.training or self.evaluates):
            raise RuntimeError("tired")
        return super().forward(x)


@pytest.mark.parametrize(
    ("evaluates", "finding"),
    [
        (True, "No single row of X is the cause"),
        (False, "In evaluation mode it fails on no row"),
    ],
)
def test_a_failure_that_no_row_causes_names_the_configuration(evaluates, finding):
    space = {
        "module__after": [10],
        "module__evaluates": [evaluates],
        "lr": [0.1],
        "batch_size": [4],
    }
    message = (
        rf"Tires\(module__after=10, module__evaluates={evaluates}\) raised RuntimeError after \d epochs?: tired. "
        rf"{finding}.* Correct its forward pass, or leave these values out of the space\.$"
    )
    with pytest.raises(InputError, match=message):
        tune(Tires, ROWS, space=space, include_default=False, n_trials=1, max_epochs=9)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("out of memory"), RuntimeError("CUDA error: misaligned")]
)
def test_what_a_device_says_is_no_fault_of_a_row(error, monkeypatch):
    def fail(*_):
        raise error

    data = make_data()
    network = StackedModule(Linear, fill({}), shape_of(data), seed=0)
    monkeypatch.setattr(Linear, "forward", fail)
    assert explain(error, network, network.start(), data, 1) is error


class Bare(nn.Module):
    pass


class Wide(nn.Module):
    def __init__(self, n_outputs, width=4):
        super().__init__()


class Passing(Wide):
    """It passes all arguments on; its base class has no n_features, so it gets none."""

    def __init__(self, *args, **words):
        super().__init__(*args, **words)


def test_a_module_without_an_init_of_its_own_gets_no_arguments():
    assert call_arguments(Bare, {"n_features": 3, "n_outputs": 2}, {}) == {}
    assert call_arguments(lambda **sizes: Bare(), {"n_features": 3}, {}) == {"n_features": 3}
    sizes = {"n_features": 3, "n_outputs": 2, "input_shape": (3,)}
    assert call_arguments(Passing, sizes, {"width": 2}) == {"n_outputs": 2, "width": 2}
    with pytest.raises(InputError, match="module__size is not an argument of Bare"):
        call_arguments(Bare, {}, {"size": 3})
    with pytest.raises(InputError, match=r"Did you mean 'module__width'\?"):
        call_arguments(lambda n_features, width: Bare(), {"n_features": 3}, {"widht": 3})


def test_a_module_can_require_the_groups_of_its_features():
    table = pd.DataFrame(
        {
            "size": ROWS[:, 0].numpy(),
            "sunny": LABELS == 1,
            "town": np.array(["north", "south", "west"])[np.arange(30) % 3],
        }
    )
    received = set()

    def net(n_features, n_outputs, feature_groups):
        received.add(feature_groups)
        return nn.Linear(n_features, n_outputs)

    study = tune(net, table, n_trials=1, max_epochs=1)
    assert [trial.state for trial in study.trials] == ["complete"]
    # a number; a boolean; three levels of a category
    assert received == {(0, 1, 2, 2, 2)}


class Unknown(nn.Module):
    """Looks a key up that is not there."""

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.layer = nn.Linear(n_features, n_outputs)
        self.names = {}

    def forward(self, x):
        x = x * self.names["scale"]
        return self.layer(x)


class Asserting(Unknown):
    def forward(self, x):
        raise AssertionError


@pytest.mark.parametrize(
    ("build", "rule"),
    [
        (
            Unknown,
            "raised KeyError: 'scale' (test_hints.py, line {}: x = x * self.names[\"scale\"])",
        ),
        (Asserting, "raised AssertionError (test_hints.py, line {}: raise AssertionError)"),
    ],
)
def test_an_error_of_a_forward_names_the_line(build, rule):
    line = build.forward.__code__.co_firstlineno + 1
    with pytest.raises(InputError, match=re.escape(rule.format(line))):
        gputune.tune(build, torch.zeros(20, 3), torch.arange(20) % 2, cv=2, verbose=0)


def test_an_error_of_a_loss_names_the_line():
    def loss(outputs, y):
        raise ValueError("no")

    line = loss.__code__.co_firstlineno + 1
    words = f'ValueError: no (test_hints.py, line {line}: raise ValueError("no"))'
    with pytest.raises(InputError, match=re.escape(words)):
        gputune.tune(
            lambda: nn.Sequential(nn.Linear(3, 2)),
            torch.zeros(20, 3),
            torch.arange(20) % 2,
            cv=2,
            verbose=0,
            loss=loss,
        )
