"""Models of transformers in gputune.tune: their logits, and the loss that they compute.

Skipped without transformers.
"""

import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import gputune
from gputune.modules.construction import build_module
from gputune.population.population import Shape

transformers = pytest.importorskip("transformers")

from transformer_models import tiny_bert  # noqa: E402

DRAWS = torch.Generator().manual_seed(0)
IDS = torch.randint(2, 20, (40, 4), generator=DRAWS)
X = {"input_ids": IDS, "attention_mask": (torch.rand(40, 4, generator=DRAWS) < 0.8).long()}
Y = IDS[:, 0] % 3
SPACE = {"lr": [3e-2, 1e-3], "batch_size": [8]}
OPTIONS = {"space": SPACE, "n_trials": 2, "max_epochs": 2, "cv": 2, "dtype": "float64"}


def classifier(n_outputs):
    return transformers.BertForSequenceClassification(tiny_bert(n_outputs))


class Logits(nn.Module):
    """A classifier that returns a tensor."""

    def __init__(self, n_outputs):
        super().__init__()
        self.model = classifier(n_outputs)

    def forward(self, **inputs):
        return self.model(**inputs).logits


def language_model():
    return transformers.BertForMaskedLM(tiny_bert())


def score(logits, y):
    return -float(nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten().long()))


@pytest.fixture(scope="module")
def study():
    return gputune.tune(classifier, X, Y, verbose=0, **OPTIONS)


def test_gputune_takes_the_logits_and_stacks_the_members(capsys):
    study = gputune.tune(classifier, X, Y, **OPTIONS)
    assert "cannot be stacked" not in capsys.readouterr().err
    expected = gputune.tune(Logits, X, Y, verbose=0, **OPTIONS)
    assert np.array_equal(study.curves, expected.curves)
    assert len(np.unique(study.curves)) > 1


@pytest.mark.long
def test_the_model_predicts_and_is_saved_and_loaded(study, tmp_path):
    model = study.best_model()
    assert type(model.module) is transformers.BertForSequenceClassification
    assert model.predict_proba(X).shape == (40, 3)
    with torch.no_grad():
        logits = model.module.double()(**X).logits
    assert np.array_equal(logits.argmax(1).numpy(), model.predict(X))
    model.save(tmp_path / "model")
    loaded = gputune.load_model(tmp_path / "model")
    assert np.allclose(loaded.predict_proba(X), model.predict_proba(X), atol=1e-6)
    assert study.ensemble().predict(X).shape == (40,)


@pytest.mark.long
def test_a_pretrained_instance_is_the_start_of_every_trial():
    torch.manual_seed(0)
    base = classifier(3)
    before = {name: w.clone() for name, w in base.state_dict().items()}

    def pretrained():
        return base

    study = gputune.tune(pretrained, X, Y, verbose=0, **OPTIONS)
    assert study.best_model().predict(X).shape == (40,)
    assert all(torch.equal(w, before[name]) for name, w in base.state_dict().items())


@pytest.mark.long
def test_a_regression_with_one_logit():
    target = Y.double() + torch.randn(40, generator=DRAWS).double()
    study = gputune.tune(classifier, X, target, verbose=0, **OPTIONS)
    assert study.record.task == "regression" and np.isfinite(study.curves).all()


def step(module, batch):
    x, y = batch
    return module(**x, labels=y).loss


def test_gputune_takes_the_loss_that_the_model_computes_from_labels(capsys):
    options = {**OPTIONS, "task": "custom", "scoring": score}
    study = gputune.tune(language_model, X, IDS, **options)
    shown = capsys.readouterr().err
    note = "note: language_model trains on the loss that it computes from its argument labels"
    assert note in " ".join(shown.split()) and "cannot be stacked" not in shown
    assert study.curves[:, -1].max() > study.curves[:, 0].min()


@pytest.mark.long
def test_the_loss_from_labels_is_that_of_a_training_step():
    options = {**OPTIONS, "task": "custom", "scoring": score, "verbose": 0}
    study = gputune.tune(language_model, X, IDS, **options)
    expected = gputune.tune(language_model, X, IDS, training_step=step, **options)
    assert np.array_equal(study.curves, expected.curves)


class Branching(transformers.BertForSequenceClassification):
    """Reads a value of a tensor, which stacked members cannot do."""

    def forward(self, **inputs):
        outputs = super().forward(**inputs)
        if float(outputs.logits.detach().sum()) > 1e9:
            outputs.logits = -outputs.logits
        return outputs


def branching(n_outputs):
    return Branching(tiny_bert(n_outputs))


def test_the_plan_says_why_members_are_not_stacked(capsys):
    gputune.tune(branching, X, Y, **OPTIONS)
    shown = " ".join(capsys.readouterr().err.split())
    assert "because its members cannot be stacked: its forward says: " in shown
    assert "use torch.where instead of if or .item()" in shown


@pytest.mark.long
def test_a_model_is_exported(study, tmp_path):
    study.best_model().export(tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    labels, probabilities = program(*X.values())
    assert probabilities.shape == (40, 3) and len(labels) == 40


# --- bad input


def body():
    return transformers.BertModel(tiny_bert())


@dataclass
class LossOnly(transformers.utils.ModelOutput):
    loss: torch.Tensor = None


class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Embedding(20, 1)

    def forward(self, input_ids, attention_mask):
        return LossOnly(loss=self.layer(input_ids).mean())


class NoLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Embedding(20, 20)

    def forward(self, input_ids, attention_mask, labels=None):
        return self.layer(input_ids)


@pytest.mark.parametrize(
    ("model", "target", "options", "message"),
    [
        (
            body,
            Y,
            {},
            r"body returns BaseModelOutput\w+ with 'last_hidden_state', 'pooler_output', but "
            r"neither logits nor a loss. Use a model with a head, such as "
            r"AutoModelForSequenceClassification, or put a head on this model with gputune.frozen",
        ),
        (Loss, Y, {}, r"Loss returns LossOnly with 'loss', but no logits. Use a model with a head"),
        (
            body,
            IDS,
            {"task": "custom", "scoring": score},
            r"A custom target has no default loss. Give loss=callable\(outputs, y\)",
        ),
        (
            language_model,
            IDS,
            {"task": "custom"},
            r"scoring is required for a custom target if a training_step or the module itself "
            r"computes the loss, .* such as scoring=lambda outputs, y: ",
        ),
        (
            NoLoss,
            IDS,
            {"task": "custom", "scoring": score},
            r"NoLoss receives labels, but its output has no loss, got Tensor. Pass loss=callable",
        ),
    ],
)
def test_bad_input(model, target, options, message):
    with pytest.raises(gputune.InputError, match=message):
        gputune.tune(model, X, target, verbose=0, **OPTIONS, **options)


def test_the_target_in_a_dict_of_inputs_and_a_list_of_dicts_are_refused():
    message = r"y is missing. Take it out of X: labels = X.pop\('labels'\), and pass y=labels"
    with pytest.raises(gputune.InputError, match=message):
        gputune.tune(language_model, {**X, "labels": IDS}, verbose=0, **OPTIONS)
    message = "X is a list of dicts. Pass a torch Dataset whose items are these dicts, or a dict"
    with pytest.raises(gputune.InputError, match=message):
        gputune.tune(language_model, [{"input_ids": row} for row in IDS], verbose=0, **OPTIONS)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            transformers.BertForSequenceClassification,
            "model is the class BertForSequenceClassification of transformers, which gputune cannot "
            "call without a config or pretrained weights. Pass a function that returns the model: "
            "def make_model(n_outputs): return BertForSequenceClassification(BertConfig("
            "num_labels=n_outputs)).",
        ),
        (
            transformers.AutoModelForSequenceClassification,
            "return AutoModelForSequenceClassification.from_pretrained(..., num_labels=n_outputs).",
        ),
        (transformers.BertConfig, "return AutoModelForSequenceClassification.from_config(config)."),
    ],
)
def test_a_class_of_transformers_is_no_builder(model, message):
    with pytest.raises(gputune.InputError, match=re.escape(message)):
        gputune.tune(model, X, Y, **OPTIONS)


def test_a_class_of_transformers_with_its_config_in_the_space_is_a_builder():
    arguments = {"config": tiny_bert(3)}
    shape = Shape(n_features=4, n_outputs=3)
    module = build_module(transformers.BertForSequenceClassification, arguments, shape, seed=0)
    assert module(**X).logits.shape == (40, 3)
