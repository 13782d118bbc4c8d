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

from transformer_models import bert, distilbert, gpt2, llama, t5, vit  # noqa: E402

CLASSES = 3
WIDTH = 16
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
        self.model = make(p, WIDTH, CLASSES)

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
        return gputune.lora(
            make(p, WIDTH, CLASSES).double(), targets=targets, modules_to_save=[head]
        )

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


def roberta(p, width, classes):
    config = bert(p, width, classes).config.to_dict()
    config |= {"max_position_embeddings": 514, "pad_token_id": 1, "model_type": "roberta"}
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**config))


@pytest.mark.parametrize(
    "make, limit", [(bert, 512), (distilbert, 512), (gpt2, 1024), (roberta, 512)]
)
def test_rows_longer_than_the_positions_are_refused_with_the_limit(make, limit):
    base = make(0.0, WIDTH, 2)
    ids = torch.randint(2, 50, (12, limit + 1), generator=torch.Generator().manual_seed(0))
    message = (
        rf"X has rows of {limit + 1} tokens, but lora\({type(base).__name__}\) has positions for "
        rf"at most {limit} tokens\..*truncation=True, max_length={limit}\)"
    )
    with pytest.raises(gputune.InputError, match=message):
        gputune.tune(gputune.lora(base), ids, torch.arange(12) % 2, verbose=0)
