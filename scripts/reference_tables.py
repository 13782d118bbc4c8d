"""Write the tables of the reference that the code knows: space keys, optimizers, metrics.

    python -P scripts/reference_tables.py

Each table stands in a page of docs/reference, between two comments. tests/test_site.py fails if a
page is older than the code.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from gputune.engine.backends.selection import trains_as
from gputune.engine.kernel import OPTIMIZERS as KERNEL_OPTIMIZERS
from gputune.ground.types import (
    DEFAULT_LR,
    DEFAULTS,
    OPTIMIZERS,
    default_momentum,
    default_weight_decay,
)
from gputune.models import CNN, GRU
from gputune.modules.pretrained import ADAPTER_DEFAULTS
from gputune.optimizers.rules import RULES
from gputune.scoring.scores import LABEL_SCORES, OF_TASK
from gputune.spaces.config import FLAGS, KEYS, OPTIMIZERS_WITH, RANGES, WORDS, legal_keys
from gputune.spaces.named import SPACES
from gputune.spaces.portfolios import PORTFOLIOS
from gputune.spaces.space import default_space

REFERENCE = Path(__file__).resolve().parents[1] / "docs" / "reference"
_Kind = Literal["mlp", "logistic", "module"]
# model -> kind of model, and an optimizer for which it has every key
_MODELS: Mapping[str, tuple[_Kind, str]] = {
    "mlp": ("mlp", "adamwhd"),
    "logistic (trained)": ("logistic", "adamwhd"),
    "logistic (solved)": ("logistic", "exact"),
    "module": ("module", "adamwhd"),
}
_MEANING = {
    "lr": "learning rate, the initial one if a schedule or the optimizer changes it",
    "hypergrad_lr": "how fast the optimizer adapts its learning rate",
    "batch_size": "rows per minibatch",
    "width": "units of each hidden layer; a tuple has the units of each layer and excludes `depth`",
    "depth": "number of hidden layers",
    "dropout": "dropout rate; of a module, the rate of its `gputune.models.Dropout` layers; of a LoRA, of its inputs",
    "weight_decay": "weight decay",
    "momentum": "momentum",
    "beta2": "decay of the squared gradients",
    "clip_norm": "largest norm of the gradient of a minibatch",
    "ema": "decay of an average of the weights, which is scored and saved",
    "C": "inverse strength of the penalty, as in scikit-learn",
    "l1_ratio": "share of the l1 penalty",
    "rank": "rank of the matrices of a LoRA, at most the smaller side of each adapted layer",
    "alpha": "scale of a LoRA: its update is multiplied by alpha / rank",
    "rslora": "whether the update of a LoRA is multiplied by alpha / sqrt(rank) instead",
    "init_seed": "seed of the initial weights",
    "activation": "activation of the hidden layers",
    "optimizer": "optimizer; for a module also a class of `torch.optim`",
    "schedule": "change of the learning rate over `max_epochs`",
    "weight_decay_schedule": "change of the weight decay over `max_epochs`",
    "dropout_schedule": "change of the dropout rate over `max_epochs`",
    "hypergrad_rule": "rule by which the optimizer adapts its learning rate",
    "penalty": "scikit-learn's name of the penalty; gputune translates it to `C` and `l1_ratio`",
    "numbers": "how numeric columns are scaled",
}


def main() -> None:
    """Write every table into its page."""
    for page, text in pages().items():
        (REFERENCE / page).write_text(text)


def pages() -> dict[str, str]:
    """Return the pages with their tables as the code has them now."""
    texts: dict[str, str] = {}
    for (page, name), table in _TABLES.items():
        text = texts.get(page) or (REFERENCE / page).read_text()
        start = f"<!-- {name}: written by scripts/reference_tables.py -->\n"
        pattern = re.compile(f"{re.escape(start)}.*?<!-- end -->", re.DOTALL)
        before, *after = pattern.split(text)
        if len(after) != 1:
            raise ValueError(f"{page} has {len(after)} places for the table {name!r}, not one")
        texts[page] = f"{before}{start}\n{table()}\n<!-- end -->{after[0]}"
    return texts


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [" | ".join(titles), "|".join(["---"] * len(titles))]
    for row in rows:
        lines.append(" | ".join(row))
    return "".join(f"| {line} |\n" if "---" not in line else f"|{line}|\n" for line in lines)


def _codes(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _space_keys() -> str:
    rows = []
    for key in KEYS:
        models = []
        for model, (kind, optimizer) in _MODELS.items():
            if key in legal_keys(kind, optimizer):
                models.append(model)
        if key in ADAPTER_DEFAULTS:
            models.append("`gputune.lora`")
        if key in RANGES:
            values = RANGES[key].rule
        elif key in FLAGS:
            values = "True or False"
        else:
            values = f"one of {_codes(WORDS[key])}"
        if len(models) == len(_MODELS):
            models = ["all"]
        elif len(models) == len(_MODELS) - 1 and "logistic (solved)" not in models:
            models = ["all that train"]
        rows.append((f"`{key}`", _MEANING[key], values, _default(key), ", ".join(models)))
    return _table(("Key", "Meaning", "Type and range", "Default", "Models"), rows)


def _default(key: str) -> str:
    """Return the value of a key that a configuration lacks."""
    if key == "lr":
        return f"{DEFAULT_LR:g}"
    if key in ("weight_decay", "momentum"):
        return "see [optimizers](optimizers.md)"
    if key == "rank":
        return f"{ADAPTER_DEFAULTS[key]}, or the smallest side of the adapted layers if smaller"
    if key == "optimizer":
        return "`optimizer=` of the search"
    if key == "numbers":
        return "`numbers=` of the search"
    if key == "penalty":
        return "-"
    if key == "init_seed":
        return "`random_state=` of the search"
    return _number((DEFAULTS | ADAPTER_DEFAULTS)[key])


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f"`{value}`" if isinstance(value, str) else str(value)


_DEFAULT_SPACES: Sequence[tuple[str, _Kind, str, object]] = (
    ("mlp", "mlp", "adamw", None),
    ("mlp with sgd or nesterov", "mlp", "sgd", None),
    ("module", "module", "adamw", None),
    ("cnn", "module", "adamw", CNN),
    ("gru", "module", "adamw", GRU),
    ("logistic (solved)", "logistic", "exact", None),
)


def _default_spaces() -> str:
    rows = []
    for title, kind, optimizer, builder in _DEFAULT_SPACES:
        space = default_space(kind, optimizer, builder)
        keys = []
        for key, choices in space.items():
            if isinstance(choices, list):
                values = ", ".join(f"{value:g}" for value in choices)
            else:
                low, high = choices.support()  # type: ignore[union-attr]
                values = f"{low:g} to {high:g}, log-uniform"
            keys.append(f"`{key}`: {values}")
        rows.append((title, "; ".join(keys)))
    return _table(("Model", "Default space"), rows)


def _named_spaces() -> str:
    rows = []
    for name, space in SPACES.items():
        keys: list[str] = []
        for part in space("classes"):
            keys += [key for key in part if key not in keys]
        n_portfolio = len(PORTFOLIOS.get(name, ()))
        rows.append((f"`{name}`", _codes(keys), str(n_portfolio)))
    return _table(("`space=`", "Keys, for classes", "Configurations that run first"), rows)


def _optimizers() -> str:
    rows = []
    for name in OPTIMIZERS:
        config = {**DEFAULTS, "optimizer": name}
        as_mlp = trains_as("compiled", "mlp", config)
        as_module = trains_as("recorded", "module", config)
        keys = [key for key, names in OPTIMIZERS_WITH.items() if name in names]
        rows.append(
            (
                f"`{name}`",
                _codes(keys),
                f"{default_weight_decay(name):g}",
                f"{default_momentum(name):g}" if "momentum" in keys else "-",
                _BACKENDS[as_mlp],
                _BACKENDS[as_module],
                "yes" if name in RULES else "no",
                "yes" if name in KERNEL_OPTIMIZERS else "no",
            )
        )
    titles = (
        "Optimizer",
        "Its keys besides `lr`",
        "Default `weight_decay`",
        "Default `momentum`",
        "`mlp` on a CPU",
        "Module",
        "C code of a module's step",
        '`backend="kernel"`',
    )
    return _table(titles, rows)


_BACKENDS = {
    "compiled": "compiled",
    "recorded": "recorded steps",
    "eager": "stacked operations",
    "loop": "one by one",
}


def _metrics() -> str:
    on_device: dict[str, list[str]] = {}
    for task, scores in OF_TASK.items():
        of_labels = LABEL_SCORES if task in ("binary", "multiclass") else ()
        one_class = {"f1", "precision", "recall", "jaccard"} if task == "multiclass" else set()
        on_device[task] = sorted({*scores, *of_labels} - one_class)
    rows = []
    for name in sorted(set().union(*on_device.values())):
        tasks = [task for task, names in on_device.items() if name in names]
        rows.append((f"`{name}`", ", ".join(tasks)))
    return _table(("`scoring=`", "Tasks"), rows)


_TABLES: Mapping[tuple[str, str], Callable[[], str]] = {
    ("space-keys.md", "keys"): _space_keys,
    ("space-keys.md", "default spaces"): _default_spaces,
    ("space-keys.md", "named spaces"): _named_spaces,
    ("optimizers.md", "optimizers"): _optimizers,
    ("metrics.md", "metrics"): _metrics,
}


if __name__ == "__main__":
    main()
