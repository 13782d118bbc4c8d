"""LoRA: the checks of its arguments, and its defaults."""

import re

import pytest
import torch
from torch import nn

import gputune
from gputune.modules.pretrained import LoraLinear


def refused(*words):
    """A check of refusals: an InputError with these words, in this order, in its message."""
    return pytest.raises(gputune.InputError, match=".*".join(map(re.escape, words)))


class Base(nn.Module):
    """Two layers and a head."""

    def __init__(self, n_features=5, hidden=24, n_outputs=3):
        super().__init__()
        self.enter = nn.Linear(n_features, hidden)
        self.inner = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, n_outputs)

    def forward(self, x):
        h = self.enter(x).tanh()
        return self.head(h + self.inner(h).relu())


def make_base(**words):
    torch.manual_seed(0)
    return Base(**words)


@pytest.mark.parametrize(
    "words, message",
    [
        (
            {"targets": "layer.*(query"},
            ["targets must be a valid regular expression", "missing )", "Correct it, or pass"],
        ),
        ({"targets": 5}, ["targets must be 'all-linear', a regular", "got 5", "For example"]),
        ({"targets": ["enter", 5]}, ["targets must be 'all-linear', a regular", "For example"]),
        (
            {"modules_to_save": "head"},
            ["modules_to_save must be a list of names, got 'head'", "Pass ['head']."],
        ),
        ({"modules_to_save": 5}, ["modules_to_save must be a list of names", "For example"]),
    ],
)
def test_arguments_of_another_type_are_refused(words, message):
    with refused(*message):
        gputune.lora(make_base(), **words)


def test_a_set_of_targets_is_a_list_in_order():
    assert gputune.lora(make_base(), targets={"inner", "enter"}).pretrained.targets == (
        "enter",
        "inner",
    )


IN_THE_SPACE = " It is a key of the space: gputune.tune(..., space={{{!r}: [...]}})."


@pytest.mark.parametrize(
    "function, word, hint",
    [
        (gputune.lora, "target_modules", " Did you mean 'targets'?"),
        (gputune.lora, "module_to_save", " Did you mean 'modules_to_save'?"),
        (gputune.lora, "r", IN_THE_SPACE.format("rank").replace("'", '"')),
        (gputune.lora, "lora_alpha", IN_THE_SPACE.format("alpha").replace("'", '"')),
        (gputune.lora, "zzz", ""),
        (gputune.frozen, "body", " Did you mean 'base'?"),
    ],
)
def test_an_unknown_argument_is_a_type_error_with_a_hint(function, word, hint):
    with pytest.raises(TypeError) as error:
        function(make_base(), **{word: 4})
    name = function.__name__
    assert str(error.value) == f"{name}() got an unexpected keyword argument {word!r}.{hint}"


@pytest.mark.parametrize(
    "word, key",
    [("r", "rank"), ("lora_alpha", "alpha"), ("lora_dropout", "dropout"), ("use_rslora", "rslora")],
)
def test_the_names_of_peft_in_a_space_are_refused_with_ours(word, key):
    x, y = torch.randn(20, 5), torch.arange(20) % 2
    with refused("space must have only the keys", f"Did you mean {key!r}?"):
        gputune.tune(gputune.lora(make_base(n_outputs=2)), x, y, space={word: [1]}, verbose=0)


WORDS = {"n_trials": 2, "cv": 2, "max_epochs": 1, "verbose": 0}


def test_the_default_rank_is_at_most_the_smallest_side_of_the_adapted_layers():
    x, y = torch.randn(24, 5), torch.arange(24) % 2
    base = make_base(n_outputs=2)
    study = gputune.tune(gputune.lora(base), x, y, space={"lr": [1e-3]}, **WORDS)
    assert study.best_model().module.module.head.A.shape == (24, 2)
    layers = [part for part in study.best_model().module.modules() if isinstance(part, LoraLinear)]
    assert [int(part.A.detach().any(0).sum()) for part in layers] == [2, 2, 2]
    assert [float(part.scale) for part in layers] == [4.0, 4.0, 4.0]  # alpha / rank
    # The targets of a trial decide its default rank.
    space = {"module__targets": [["inner"], ["head"]], "lr": [1e-3]}
    builder = gputune.lora(base, targets=["inner"])
    study = gputune.tune(builder, x, y, space=space, **WORDS)
    ranks = {}
    for trial in study.trials:
        module = study.best_model(trial=trial.number).module
        (layer,) = (part for part in module.modules() if isinstance(part, LoraLinear))
        ranks[tuple(trial.params["module__targets"])] = int(layer.A.detach().any(0).sum())
    assert ranks == {("inner",): 8, ("head",): 2}


def test_equal_targets_as_a_list_are_not_moved_into_the_space():
    x, y = torch.randn(24, 5), torch.arange(24) % 2
    space = {"module__targets": [["enter"], ["inner"]], "rank": [2], "lr": [1e-3]}
    builder = gputune.lora(make_base(n_outputs=2), targets=["inner"])
    study = gputune.tune(builder, x, y, space=space, **WORDS)
    (default,) = (trial for trial in study.trials if trial.origin == "default")
    assert default.params["module__targets"] == ["inner"]
    assert not [note for note in study.record.notes if "moved into the space" in note]


@pytest.mark.parametrize("function", [gputune.lora, gputune.frozen])
def test_a_table_for_a_pretrained_base_is_not_scaled_by_default(function):
    torch.manual_seed(0)
    x, y = 3 + 5 * torch.randn(24, 5), torch.arange(24) % 2
    base = make_base(n_outputs=2)
    for X in (x, x.numpy()):
        study = gputune.tune(function(base), X, y, space={"lr": [1e-3]}, **WORDS)
        model = study.best_model()
        assert study.record.numbers == "none"
        with torch.no_grad():
            expected = model.module(x).argmax(1)
        assert (model.predict(X) == expected.numpy()).all()
    study = gputune.tune(function(base), x, y, space={"lr": [1e-3]}, numbers="standard", **WORDS)
    assert study.record.numbers == "standard"


def test_the_plan_says_that_a_table_is_not_scaled(capsys):
    x, y = torch.randn(24, 5), torch.arange(24) % 2
    words = WORDS | {"space": {"lr": [1e-3]}, "verbose": 1}
    gputune.tune(gputune.lora(make_base(n_outputs=2)), x, y, **words)
    said = "note: the columns are not scaled, because the base is pretrained; numbers='standard'"
    assert said in " ".join(capsys.readouterr().err.split())


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, input_ids):
        return self.head(self.words(input_ids).mean(1))


def test_an_id_outside_the_vocabulary_of_the_base_is_refused():
    ids, y = torch.arange(96).reshape(24, 4) % 9, torch.arange(24) % 2
    ids[3] = 20
    builder = gputune.lora(Words(), targets=["head"])
    with refused(
        "X['input_ids'] has the id 20 in row 3, but the embedding 'words'",
        "The vocabulary of the pretrained Words does not contain this id.",
        "Check that X comes from the tokenizer of the base",
    ):
        gputune.tune(builder, {"input_ids": ids}, y, space={"lr": [1e-3]}, **WORDS)
