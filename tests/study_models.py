"""Small tuned models with weights from a seed, shared by the tests of the model files."""

import numpy as np
import torch

from gputune.data.columns import fit_layout
from gputune.data.encode import fit_statistics
from gputune.data.table import as_table
from gputune.models import MLP
from gputune.study.model import TunedModel


def rows(n=30):
    """A mixed frame of n rows as a dict of columns: two numbers (one with a gap), a text and a
    boolean."""
    rng = np.random.default_rng(0)
    age = rng.normal(40, 10, n)
    age[3] = np.nan
    return {
        "age": age,
        "income": rng.lognormal(8, 1, n),
        "city": np.array(["Rome", "Oslo", "Lima"])[np.arange(n) % 3],
        "member": np.arange(n) % 2 == 0,
    }


def make_model(
    frame, *, classes=("no", "yes"), dtype=torch.float32, numbers="standard", module=None, spec=None
):
    """A TunedModel for the frame; ``classes=None`` is a regression with center 100 and scale 10."""
    table = as_table(frame)
    layout = fit_layout(table)
    statistics = fit_statistics(layout.raw(table), layout, np.arange(len(table)), numbers=numbers)
    labels = None if classes is None else np.array(classes)
    size = {"n_features": statistics.n_inputs, "n_outputs": 1 if labels is None else len(labels)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = (MLP(**size, width=8, depth=1) if module is None else module(**size)).to(dtype)
    task = "regression" if labels is None else "binary" if len(labels) == 2 else "multiclass"
    return TunedModel(
        module=module.eval(),
        layout=layout,
        statistics=statistics,
        task=task,
        classes=labels,
        center=100.0 if labels is None else 0.0,
        scale=10.0 if labels is None else 1.0,
        dtype=dtype,
        target="outcome",
        spec=spec or {"kind": "mlp", "kwargs": {**size, "width": 8, "depth": 1}},
        info={"score": 0.1 + 0.2, "held_out": float("nan"), "params": {"lr": 1e-3}},
    )
