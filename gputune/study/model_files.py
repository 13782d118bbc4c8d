"""A tuned model into a folder and back: what is written of it, and how its module is built again."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gputune.data.encode import Layout, Statistics
from gputune.engine.entry import entry
from gputune.engine.vmap import materialise
from gputune.errors import InputError
from gputune.models import MLP, LogisticRegression
from gputune.seeding import keyed_draws
from gputune.study.folder import DESCRIPTION, TENSORS, blaming, read_model, write_model
from gputune.study.model import TunedModel
from gputune.study.module_source import find_class

DTYPES = {"float32": torch.float32, "float64": torch.float64}
BUILT_IN: dict[str, type[nn.Module]] = {"mlp": MLP, "logistic": LogisticRegression}


def save_model(model: TunedModel, folder: str | os.PathLike[str]) -> None:
    """Write the model into ``folder``; see ``TunedModel.save``."""
    body = {
        "task": model.task,
        "classes": model.classes,
        "center": model.center,
        "scale": model.scale,
        "dtype": str(model.dtype).removeprefix("torch."),
        "target": model.target,
        "layout": model.layout.to_json(),
        "statistics": model.statistics.to_json(),
        "spec": _with_full_path(model.spec),
        "info": model.info,
    }
    write_model(Path(folder), _state(model.module), body)


@entry
def load_model(folder: str | os.PathLike[str], module: type[nn.Module] | None = None) -> TunedModel:
    """Return the model that ``TunedModel.save`` wrote into ``folder``, on the CPU and ready to predict.

    A user's own class is imported from where it was when the model was saved, which runs that file (if it is
    still the same, by its SHA-256) or that package; ``module=`` gives the class instead and imports nothing,
    which is the way to open a folder from someone else. Nothing is unpickled. Raises InputError, saying which
    file and what to do, for a folder that is missing, incomplete, damaged or of a newer gputune, and for a class
    that is gone or changed.
    """
    folder = Path(folder)
    state, body = read_model(folder)
    with blaming(folder / DESCRIPTION):
        layout, statistics = Layout.from_json(body["layout"]), Statistics.from_json(body["statistics"])
        spec, classes, dtype = dict(body["spec"]), body["classes"], DTYPES[body["dtype"]]
        kind, kwargs = str(spec["kind"]), dict(spec["kwargs"])
        sizes = {
            "n_features": len(layout.feature_names),
            "n_outputs": 1 if classes is None else len(classes),
        }
    module_class = _module_class(spec, kind, module, folder)
    network = _built(module_class, {**sizes, **kwargs}, dtype)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())  # torch writes a line for each tensor
        raise InputError(
            f"{str(folder / TENSORS)!r} does not fit {module_class.__name__}: {reason} Pass the class as it was."
        ) from error
    with blaming(folder / DESCRIPTION):
        return TunedModel(
            module=network.eval(),
            layout=layout,
            statistics=statistics,
            task=body["task"],
            classes=classes,
            center=float(body["center"]),
            scale=float(body["scale"]),
            dtype=dtype,
            target=body["target"],
            spec=spec,
            info=dict(body["info"]),
        )


def _state(module: nn.Module) -> dict[str, Tensor]:
    state = module.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"{type(module).__name__} keeps {name!r}, a {type(value).__name__}, in its state; "
                "only tensors can be saved, make it a buffer."
            )
    return state


def _with_full_path(spec: dict[str, Any]) -> dict[str, Any]:
    return {**spec, "path": str(Path(spec["path"]).resolve())} if "path" in spec else spec


def _built(module_class: type[nn.Module], arguments: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    try:
        with keyed_draws(
            torch.device("cpu"), 0, "load"
        ):  # its start is thrown away, the caller's stream is not
            module = module_class(**arguments)
            materialise(module, arguments["n_features"])
            return module.to(dtype)
    except Exception as error:  # a user's constructor may raise anything
        raise InputError(
            f"{module_class.__name__} could not be built from the saved arguments {arguments}: "
            f"{type(error).__name__}: {error}; pass the class as it was."
        ) from error


def _module_class(spec: dict[str, Any], kind: str, given: Any, folder: Path) -> type[nn.Module]:
    if given is not None and not (isinstance(given, type) and issubclass(given, nn.Module)):
        raise InputError(f"load_model(module=...) must be a subclass of torch.nn.Module, got {given!r}.")
    if kind in BUILT_IN:
        if given is not None:
            raise InputError(
                f"load_model(module=...): {str(folder)!r} holds the built-in {kind!r}; leave module out."
            )
        return BUILT_IN[kind]
    if given is not None:
        return given
    with blaming(folder / DESCRIPTION):
        if kind != "module":
            raise ValueError(f"it names an unknown kind of model, {kind!r}")
        # A folder from elsewhere must not bring its own code and have it run.
        path = Path(spec["path"]) if "path" in spec else None
        if path is not None and (not path.is_absolute() or path.resolve().is_relative_to(folder.resolve())):
            raise ValueError(
                f"the module file {str(path)!r} lies in the model folder, and code from there is not run"
            )
    try:
        with blaming(folder / DESCRIPTION):
            return find_class(spec)
    except InputError as error:
        raise InputError(f"{error} Or pass the class: load_model({str(folder)!r}, module=...).") from error
