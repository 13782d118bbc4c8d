"""Searches with three batch sizes whose trials train together, compared with one population per size.

The base is a BERT of MiniLM's shape with random weights, as in the benchmark of LoRA. 64 rows of 16
tokens, 2 folds, 24 trials: 8 learning rates with each of the batch sizes 4, 8 and 16. The features of
the frozen layers are not kept. The search of an MLP has 2,000 rows with 20 features, two hidden layers
of 64 units, no frozen layers, and the batch sizes 16, 32 and 64.

Each way runs in its own process with one thread, and the ways take turns. Times are CPU seconds (user
and system) of the whole search, medians of the repeats. "Together" joins the populations even if
gputune's estimate would keep them apart. "gputune" says what the estimate chooses.
"""

from argparse import Namespace
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import gputune
from benchmark.report import begin_on_one_thread, publish, published, table
from benchmark.studies.lora import Case, Pooled, in_process, make_base, make_rows, targets_of
from gputune.engine import plan
from gputune.modules import kept_features
from gputune.modules.kept_features import NotKept

TRIALS = 24
FOLDS = 2
ROWS = Case("rows", 1, 64, TRIALS)  # 16 tokens
HEAD = "what trains|batch sizes|epochs|together, CPU s|apart, CPU s|together is faster by|gputune"


class Mlp(nn.Module):
    """A network without frozen layers."""

    def __init__(self, n_features: int, n_outputs: int) -> None:
        super().__init__()
        sizes = (n_features, 64, 64)
        hidden = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in zip(sizes, sizes[1:])]
        self.layers = nn.Sequential(*hidden, nn.Linear(64, n_outputs))

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.layers(x)
        return outputs


@dataclass(frozen=True)
class Row:
    """CPU seconds of a search, one value per repeat, and the way that gputune's estimate chooses."""

    name: str
    sizes: list[int]
    epochs: int
    together: list[float]
    apart: list[float]
    chosen: str

    @property
    def ratio(self) -> float:
        return median(self.apart) / median(self.together)

    def row(self) -> str:
        sizes = ", ".join(map(str, self.sizes))
        seconds = f"{median(self.together):.1f}|{median(self.apart):.1f}"
        return f"{self.name}|{sizes}|{self.epochs}|{seconds}|{self.ratio:.2f}|{self.chosen}"


CASES = (
    ("head", [4, 8, 16], 2),
    ("top layer", [4, 8, 16], 2),
    ("MLP", [16, 32, 64], 10),
)


def run(options: Namespace) -> int:
    """Measure the chosen cases, and write them next to the earlier ones."""
    machine = begin_on_one_thread()
    rows = {row.name: row for row in published(options.out, "sizes", machine, "rows", Row)}
    for name, sizes, epochs in CASES:
        if options.rows and not any(word in name for word in options.rows):
            continue
        rows[name] = measure(name, sizes, epochs, options.repeats or 3)
        print(rows[name].row(), flush=True)
        found = [rows[case[0]] for case in CASES if case[0] in rows]
        parts = (__doc__ or "", table(HEAD, (row.row() for row in found)))
        publish(options.out, "sizes", "Batch sizes", *parts, machine=machine, rows=found)
    return 0


def measure(name: str, sizes: list[int], epochs: int, repeats: int) -> Row:
    """Measure one search in both ways."""
    base = make_base()
    seconds: dict[str, list[float]] = {"together": [], "apart": []}
    why_apart = plan._why_apart
    for _ in range(repeats):
        for way, spent in seconds.items():
            reason = "" if way == "together" else "the benchmark asks for it"
            plan._why_apart = lambda *_, reason=reason: reason
            spent.append(in_process(lambda: search(name, base, sizes, epochs))[0])
    plan._why_apart = why_apart
    clause = plan_of(name, base, sizes)
    return Row(name, sizes, epochs, *seconds.values(), "together" if clause else "apart")


def search(name: str, base: nn.Module, sizes: list[int], epochs: int, **options: Any) -> None:
    """Run the search, without kept features."""

    def refuse(*_: object) -> None:
        raise NotKept("this benchmark measures without them")

    kept_features._check = refuse
    builder: Any = Mlp
    X, y = make_rows(ROWS)
    if name == "MLP":
        draws = torch.Generator().manual_seed(0)
        X = torch.randn(2000, 20, generator=draws)
        y = (X[:, :3].sum(1) > 0).long()
    elif name == "head":
        builder = gputune.frozen(Pooled(base))
    else:
        builder = gputune.lora(base, targets_of(1), modules_to_save=["classifier"])
    rates = [1e-4 * (number + 1) for number in range(TRIALS // len(sizes))]
    words = {"include_default": False, "cv": FOLDS, "workers": 1, "verbose": 0}
    space = {"lr": rates, "batch_size": sizes, "weight_decay": [0.01]}
    gputune.tune(
        builder, X, y, space=space, n_trials=TRIALS, max_epochs=epochs, **(words | options)
    )


def plan_of(name: str, base: nn.Module, sizes: list[int]) -> bool:
    """Return whether gputune's estimate lets the batch sizes of a search train together."""
    reasons = []
    why_apart = plan._why_apart

    def watched(*arguments: Any) -> str:
        reasons.append(why_apart(*arguments))
        return reasons[-1]

    plan._why_apart = watched
    try:
        search(name, base, sizes, 1)
    finally:
        plan._why_apart = why_apart
    return not any(reasons)
