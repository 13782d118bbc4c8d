"""Searches of LoRA adapters and of heads on a frozen BERT, compared with loops of PEFT and PyTorch.

The base is a BERT of MiniLM's shape with random weights: 6 layers of width 384, 12 heads, no dropout.
Rank 8 on all linear layers of the adapted blocks, and a trained head. 64 rows, 2 folds, 2 epochs,
batches of 4 rows of 16 tokens, or of 8 rows of 32 tokens. Both sides score every epoch.

The loop keeps its base, and makes new adapters with PEFT for each member. It trains only the first 8
trials. Its time is scaled to all trials. Each way runs in its own process with one thread, from a base
in memory to the last score. Times are CPU seconds (user and system), medians of the repeats, and
memory is the growth of the process. "Kept" means that the outputs of the frozen layers are computed
once per row, in gputune and in the loop. 16 trials on 2 folds are 32 members, for which at most 800 MB
are asked.

A second table has a search of 1,000 heads: 5 folds of 10,000 rows with 384 features, 10 epochs,
batches of 256 rows, features kept. It may use all cores, and one minute of wall time is asked.
"""

import os
import resource
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from scipy.stats import loguniform
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn
from torch.nn import functional

import gputune
from benchmark.report import begin_on_one_thread, publish, published, table
from gputune.engine.plan import cores
from gputune.executors.worker import idle
from gputune.modules import kept_features
from gputune.modules.kept_features import NotKept

LAYERS = 6
ROWS = 64
FOLDS = 2
EPOCHS = 2
WIDTH = 384  # of the base, and of the features of the heads
HEADS = 1_000
HEADS_ASKED = 60  # seconds of wall time
LOOPED = 8  # trials that the loop trains
SIZES = {64: (4, 16), 256: (8, 32)}  # rows of a batch, and tokens of a row
HEADS_HEAD = "heads|wall s|asked for|CPU s|memory added (MB)"
HEAD = (
    "adapted|tokens of a step|trials|kept|gputune, CPU s|loop, CPU s|times as fast|asked for|"
    "memory added: gputune, loop (MB)"
)


@dataclass(frozen=True)
class Case:
    """A search: the number of adapted blocks (0: only the head), its size, and the speed that is
    asked for."""

    name: str
    top: int
    tokens: int
    trials: int
    kept: bool = False
    asked: float | None = None
    asked_megabytes: float | None = None

    def __str__(self) -> str:
        return f"{self.name}, {self.tokens} tokens, {self.trials} trials, kept {self.kept}"


CASES = (
    Case("top layer", 1, 64, 8, asked=1.25),
    Case("top layer", 1, 64, 8, kept=True),
    Case("top layer", 1, 64, 32, asked=3.5),
    Case("top layer", 1, 64, 32, kept=True),
    Case("top two layers", 2, 64, 32, asked=2.2),
    Case("head", 0, 64, 32, asked=15),
    Case("head", 0, 64, 32, kept=True),
    Case("all layers", 6, 64, 32, asked=1.3),
    Case("all layers", 6, 256, 8, asked=1.0),
    Case("top layer", 1, 64, 1),
    Case("top two layers", 2, 256, 16, asked_megabytes=800),
    Case("top two layers", 2, 256, 16, kept=True, asked_megabytes=800),
    Case("top two layers", 2, 256, 32),
)


@dataclass(frozen=True)
class Row:
    """CPU seconds and megabytes of a case, one value per repeat."""

    case: dict[str, Any]
    seconds: dict[str, list[float]]
    megabytes: dict[str, list[float]]

    @property
    def ratio(self) -> float:
        return median(self.seconds["loop"]) / median(self.seconds["gputune"])

    def row(self) -> str:
        case = Case(**self.case)
        ratio = f"{self.ratio:.2f}"
        if case.asked is not None and self.ratio < case.asked:
            ratio = f"**{ratio}**"
        seconds = "|".join(f"{median(self.seconds[way]):.1f}" for way in ("gputune", "loop"))
        ours, of_loop = (f"{median(self.megabytes[way]):.0f}" for way in ("gputune", "loop"))
        if case.asked_megabytes is not None and float(ours) > case.asked_megabytes:
            ours = f"**{ours}**"
        memory = f"{ours}, {of_loop}"
        kept = "yes" if case.kept else "no"
        return (
            f"{case.name}|{case.tokens}|{case.trials}|{kept}|{seconds}|{ratio}|"
            f"{case.asked or '-'}|{memory}"
        )


@dataclass(frozen=True)
class Heads:
    """A search of 1,000 heads: wall-clock seconds, CPU seconds and megabytes, one per repeat."""

    wall: list[float]
    seconds: list[float]
    megabytes: list[float]

    def row(self) -> str:
        wall = f"{median(self.wall):.0f}"
        if median(self.wall) > HEADS_ASKED:
            wall = f"**{wall}**"
        return (
            f"{HEADS:,}|{wall}|{HEADS_ASKED}|{median(self.seconds):.0f}|"
            f"{median(self.megabytes):.0f}"
        )


def run(options: Namespace) -> int:
    """Measure the chosen cases, and write them next to the earlier ones."""
    machine = begin_on_one_thread()
    rows = {str(row.case): row for row in published(options.out, "lora", machine, "rows", Row)}
    for case in CASES:
        if options.rows and not any(word in str(case) for word in options.rows):
            continue
        row = measure(case, options.repeats or 3)
        rows[str(row.case)] = row
        print(f"{case}: {row.ratio:.2f}x", flush=True)
        _publish(options, machine, rows)
    name = f"{HEADS:,} heads"
    if not options.rows or any(word in name for word in options.rows):
        _publish(options, machine, rows, [measure_heads(options.repeats or 3)])
    return 0


def _publish(
    options: Namespace,
    machine: dict[str, Any],
    rows: dict[str, Row],
    heads: list[Heads] | None = None,
) -> None:
    """Write all measured cases, so that an interrupted measurement loses only one.

    ``heads`` are the new figures of the search of heads, or None for the earlier ones.
    """
    found = [rows[str(vars(case))] for case in CASES if str(vars(case)) in rows]
    if heads is None:
        heads = published(options.out, "lora", machine, "heads", Heads)
    parts = [__doc__ or "", table(HEAD, (row.row() for row in found))]
    if heads:
        parts.append(table(HEADS_HEAD, (row.row() for row in heads)))
    title = "LoRA and heads on a frozen base"
    publish(options.out, "lora", title, *parts, machine=machine, rows=found, heads=heads)


def measure_heads(repeats: int) -> Heads:
    """Measure the search of heads on all cores."""
    wall = []
    seconds = []
    megabytes = []
    for _ in range(repeats):
        begin = perf_counter()
        spent, grown = in_process(with_heads, threads=None)
        wall.append(perf_counter() - begin)
        seconds.append(spent)
        megabytes.append(grown)
    return Heads(wall, seconds, megabytes)


def with_heads() -> None:
    """Search heads on a small frozen body."""
    torch.manual_seed(0)
    # With a third axis, gputune does not scale the inputs.
    X = torch.randn(10_000, 1, WIDTH)
    y = (X[:, 0, :8].sum(1) + torch.randn(10_000) > 0).long()
    body = nn.Sequential(nn.Flatten(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
    space = {
        "lr": loguniform(1e-4, 1e-1),
        "weight_decay": loguniform(1e-5, 1e-1),
        "batch_size": [256],
    }
    builder = gputune.frozen(body)
    gputune.tune(builder, X, y, space=space, n_trials=HEADS, cv=5, max_epochs=10, verbose=0)


def measure(case: Case, repeats: int) -> Row:
    """Measure one case. The ways take turns."""
    base = make_base()
    ids, y = make_rows(case)
    looped = min(LOOPED, case.trials)
    ways: dict[str, Callable[[], object]] = {
        "gputune": lambda: with_gputune(case, base, ids, y),
        "loop": lambda: with_loop(case, base, ids, y, looped),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    megabytes: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, function in ways.items():
            spent, grown = in_process(function)
            seconds[way].append(spent * (case.trials / looped if way == "loop" else 1.0))
            megabytes[way].append(grown)
    return Row(dict(vars(case)), seconds, megabytes)


def in_process(function: Callable[[], object], threads: int | None = 1) -> tuple[float, float]:
    """Return the CPU seconds of a function in a child process, and the growth of its memory in
    megabytes.

    The CPU seconds include those of its worker processes, and the memory does not. ``threads`` is
    the number of threads of torch, or None for all cores.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        torch.set_num_threads(threads or cores())
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        function()
        for pool in idle:  # the CPU seconds of a worker count when it has ended
            pool.shutdown(wait=True)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        grown = (usage.ru_maxrss - before) / 1024
        of_workers = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = sum(use.ru_utime + use.ru_stime for use in (usage, of_workers))
        os.write(writing, f"{spent} {grown}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        spent, grown = map(float, pipe.read().split())
    return spent, grown


def make_base() -> nn.Module:
    """Return a BERT of MiniLM's shape for two classes, without dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        intermediate_size=1536,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
    )
    base: nn.Module = BertForSequenceClassification(config)
    return base


def make_rows(case: Case) -> tuple[Tensor, Tensor]:
    """Return token ids (n, T) and classes (n,)."""
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 30522, (ROWS, SIZES[case.tokens][1]), generator=draws)
    return ids, torch.arange(ROWS) % 2


def targets_of(top: int) -> str:
    """Return a regular expression for the linear layers of the last ``top`` blocks."""
    numbers = "|".join(str(number) for number in range(LAYERS - top, LAYERS))
    return rf"bert\.encoder\.layer\.({numbers})\..*(query|key|value|dense)"


class Pooled(nn.Module):
    """The body of a BERT: the pooled output of its rows."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.bert = base.bert

    def forward(self, ids: Tensor) -> Tensor:
        pooled: Tensor = self.bert(ids).pooler_output
        return pooled


def rates_of(case: Case) -> list[float]:
    return [1e-4 * (number + 1) for number in range(case.trials)]


def with_gputune(case: Case, base: nn.Module, ids: Tensor, y: Tensor) -> None:
    """Run the search with gputune."""
    if not case.kept:

        def refuse(*_: object) -> None:
            raise NotKept("this benchmark measures without them")

        kept_features._check = refuse
    if case.top:
        builder = gputune.lora(base, targets_of(case.top), modules_to_save=["classifier"])
    else:
        builder = gputune.frozen(Pooled(base))
    batch = SIZES[case.tokens][0]
    space = {"lr": rates_of(case), "batch_size": [batch], "weight_decay": [0.01]}
    gputune.tune(
        builder,
        ids,
        y,
        space=space,
        n_trials=case.trials,
        include_default=False,
        cv=FOLDS,
        max_epochs=EPOCHS,
        workers=1,
        verbose=0,
    )


def with_loop(case: Case, base: nn.Module, ids: Tensor, y: Tensor, looped: int) -> None:
    """Run the first ``looped`` trials of the search in a plain loop that keeps its base."""
    batch = SIZES[case.tokens][0]
    base.requires_grad_(False)
    first = LAYERS - case.top
    kept = first_layers(base, ids, first) if case.kept else None
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(np.zeros(ROWS), y)
    for train, valid in ((torch.as_tensor(a), torch.as_tensor(b)) for a, b in folds):
        for rate in rates_of(case)[:looped]:
            model, unload = new_member(case, base)
            weights = [w for w in model.parameters() if w.requires_grad]
            optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01)

            def logits(rows: Tensor, model: nn.Module = model) -> Tensor:
                if kept is None:
                    out: Tensor = model(ids[rows]).logits
                    return out
                return last_layers(base, kept[rows], first)

            for _ in range(EPOCHS):
                model.train()
                for rows in train[torch.randperm(len(train))].split(batch):
                    optimizer.zero_grad()
                    functional.cross_entropy(logits(rows), y[rows]).backward()
                    optimizer.step()
                model.eval()
                with torch.no_grad():
                    (logits(valid).argmax(1) == y[valid]).float().mean()
            unload()


def new_member(case: Case, base: nn.Module) -> tuple[nn.Module, Callable[[], object]]:
    """Return a model with new trained tensors around the base, and a function that removes them."""
    base.classifier.requires_grad_(True)
    if not case.top:
        base.classifier.reset_parameters()
        return base, lambda: None
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=8, lora_alpha=8, target_modules=targets_of(case.top), modules_to_save=["classifier"]
    )
    model = get_peft_model(base, config)
    return model, model.unload


def first_layers(base: nn.Module, ids: Tensor, number: int) -> Tensor:
    """Return the hidden states (n, T, d) of all rows before block ``number``."""
    with torch.no_grad():
        hidden = base.bert.embeddings(ids)
        for block in base.bert.encoder.layer[:number]:
            hidden = _tensor(block(hidden))
    return hidden


def last_layers(base: nn.Module, hidden: Tensor, number: int) -> Tensor:
    """Return the logits for hidden states before block ``number``."""
    for block in base.bert.encoder.layer[number:]:
        hidden = _tensor(block(hidden))
    logits: Tensor = base.classifier(base.bert.pooler(hidden))
    return logits


def _tensor(output: Any) -> Tensor:
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result
