"""Models of transformers train stacked: with masks, with dropout, and with every kind of attention.

Skipped without transformers.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

import gputune
from gputune.data.dataset import Fold
from gputune.modules.inspection import traits_of
from gputune.modules.looped import LoopedModule
from gputune.modules.module import StackedModule
from problems import fill, grid, make_data, train_modules

transformers = pytest.importorskip("transformers")

CLASSES = 3
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_labels": CLASSES,
}


class Encoder(nn.Module):
    """The encoder of T5 with a head on the first token, without attention to padding."""

    def __init__(self, config):
        super().__init__()
        self.encoder = transformers.T5EncoderModel(config)
        self.head = nn.Linear(config.d_model, CLASSES)

    def forward(self, input_ids, attention_mask=None):
        outputs = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        return self.head(outputs.last_hidden_state[:, 0])


def bert(p):
    config = transformers.BertConfig(
        vocab_size=50, hidden_dropout_prob=p, attention_probs_dropout_prob=p, **SIZES
    )
    return transformers.BertForSequenceClassification(config)


def distilbert(p):
    config = transformers.DistilBertConfig(
        vocab_size=50,
        dim=16,
        n_layers=2,
        n_heads=2,
        hidden_dim=24,
        dropout=p,
        attention_dropout=p,
        seq_classif_dropout=p,
        num_labels=CLASSES,
    )
    return transformers.DistilBertForSequenceClassification(config)


def gpt2(p):
    config = transformers.GPT2Config(
        vocab_size=50,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=p,
        embd_pdrop=p,
        attn_pdrop=p,
        num_labels=CLASSES,
        pad_token_id=0,
        use_cache=False,
    )
    return transformers.GPT2ForSequenceClassification(config)


def llama(p):
    config = transformers.LlamaConfig(
        vocab_size=50,
        num_key_value_heads=2,
        pad_token_id=0,
        attention_dropout=p,
        use_cache=False,
        **SIZES,
    )
    return transformers.LlamaForSequenceClassification(config)


def vit(p):
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_dropout_prob=p,
        attention_probs_dropout_prob=p,
        **SIZES,
    )
    return transformers.ViTForImageClassification(config)


def t5(p):
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=p
    )
    return Encoder(config)


# the function that builds the model, the targets of a LoRA, and the name of the head
KINDS = {
    "bert": (bert, ["query", "value"], "classifier"),
    "distilbert": (distilbert, ["q_lin", "v_lin"], "classifier"),
    "gpt2": (gpt2, ["c_attn"], "score"),
    "llama": (llama, ["q_proj", "v_proj"], "score"),
    "vit": (vit, ["q_proj", "v_proj"], "classifier"),
    "t5": (t5, ["q", "v"], "head"),
}


class Logits(nn.Module):
    """A model of transformers that returns only its logits."""

    def __init__(self, make, p):
        super().__init__()
        self.model = make(p)

    def forward(self, **inputs):
        outputs = self.model(**inputs)
        return getattr(outputs, "logits", outputs)


@cache
def dataset(name):
    """Images or token ids, with a padding mask that is all ones in some minibatches."""
    rows = 20
    draws = torch.Generator().manual_seed(1)
    y = torch.randint(CLASSES, (rows,), generator=draws)
    if name == "vit":
        inputs = {"pixel_values": torch.randn(rows, 3, 8, 8, generator=draws).double()}
    else:
        ids = torch.randint(2, 50, (rows, 6), generator=draws)
        lengths = torch.full((rows,), 6)
        lengths[::5] = 4
        mask = (torch.arange(6) < lengths[:, None]).long()
        inputs = {"input_ids": ids * mask, "attention_mask": mask}
    data = make_data(n=rows, k=CLASSES, folds=2)
    return replace(
        data,
        inputs=tuple(x[None] for x in inputs.values()),
        scaling=(None,) * len(inputs),
        copies=(0, 0),
        names=tuple(inputs),
        y=y,
        folds=(
            Fold(train=torch.arange(12), valid=torch.arange(12, 20)),
            Fold(train=torch.arange(8, 20), valid=torch.arange(8)),
        ),
    )


CONFIGS = fill({"lr": 3e-3, "batch_size": 4}, {"lr": 1e-3, "batch_size": 4, "weight_decay": 0.1})


def builder_of(name, way, p):
    make, targets, head = KINDS[name]
    if way == "lora":
        torch.manual_seed(0)
        return gputune.lora(make(p).double(), targets=targets, modules_to_save=[head])

    def build(n_outputs):
        assert n_outputs == CLASSES
        return Logits(make, p)

    return build


@pytest.mark.parametrize(
    ("name", "way", "p"),
    grid(
        KINDS,
        ["plain", "lora"],
        [0.0, 0.1],
        short=[("bert", "plain", 0.1), ("gpt2", "lora", 0.1), ("t5", "plain", 0.0)],
    ),
)
def test_members_train_stacked_and_equal_members_that_train_one_by_one(name, way, p):
    data = dataset(name)
    build = builder_of(name, way, p)
    traits = traits_of(build, CONFIGS[0], data)
    assert not traits.unstackable
    assert traits.draws == bool(p)
    stacked = train_modules(StackedModule, build, CONFIGS, data, 3, backend="recorded")
    looped = train_modules(LoopedModule, build, CONFIGS, data, 3, backend="loop")
    inputs = dict(zip(data.names, (x[0] for x in data.inputs)))
    for f in range(2):
        for c in range(2):
            # Outputs, because the gradient of the bias of keys is only rounding, which Adam scales.
            with torch.no_grad():
                outputs = stacked.member(f, c)(**inputs)
                expected = looped.member(f, c)(**inputs)
            assert float((outputs - expected).abs().max() / expected.abs().max()) < 1e-10
