"""A tuned model into a folder and back: what is written of it, and how its module is built again."""

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gputune.data.encode import Layout, Statistics
from gputune.engine.module import materialise
from gputune.errors import InputError, UntrustedCodeError
from gputune.models import MLP, LogisticRegression
from gputune.seeding import keyed_draws
from gputune.study.content import ModelContent
from gputune.study.model_folder import DESCRIPTION, TENSORS, blaming, read_model, write_model
from gputune.study.module_source import (
    class_source,
    find_class,
    is_changed,
    remember_code,
    source_file,
    why_not_found,
)

DTYPES = {"float32": torch.float32, "float64": torch.float64}
BUILT_IN: dict[str, type[nn.Module]] = {"mlp": MLP, "logistic": LogisticRegression}


def save_model(model: ModelContent, folder: str | os.PathLike[str]) -> None:
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
        "spec": _full_spec(model),
        "info": model.info,
    }
    write_model(Path(folder), _state(model.module), body)
    if model.spec["kind"] == "module":
        remember_code(type(model.module))
        _say_where_it_is_looked_for(type(model.module), folder)


def read_content(folder: Path, module: type[nn.Module] | None, *, trust_code: bool) -> ModelContent:
    """Return what ``save_model`` wrote; see ``load_model``."""
    state, body = read_model(folder)
    with blaming(folder / DESCRIPTION):
        layout, statistics = Layout.from_json(body["layout"]), Statistics.from_json(body["statistics"])
        spec, classes, dtype = dict(body["spec"]), body["classes"], DTYPES[body["dtype"]]
        kind, kwargs = str(spec["kind"]), dict(spec["kwargs"])
        sizes = {
            "n_features": len(layout.feature_names),
            "n_outputs": 1 if classes is None else len(classes),
        }
        if classes is not None and not (isinstance(classes, np.ndarray) and classes.ndim == 1):
            raise ValueError(f"its classes are no list of labels but {type(classes).__name__}")
        if kind in BUILT_IN:
            _check_size({**sizes, **kwargs}, kind, state)
    module_class = _module_class(spec, kind, module, folder, trust_code)
    changed = kind == "module" and module is None and is_changed(module_class, spec)
    network = _filled(module_class, {**sizes, **kwargs}, dtype, state, folder, changed=changed)
    with blaming(folder / DESCRIPTION):
        return ModelContent(
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


def _check_size(arguments: dict[str, Any], kind: str, state: dict[str, Tensor]) -> None:
    """Raise ValueError for a network that is larger than its tensors, before it takes the memory."""
    words = {"n_features": 0, "n_outputs": 0, "width": 128, "depth": 2 if kind == "mlp" else 0, "members": 1}
    D, K, H, depth, members = (int(arguments.get(word) or least) for word, least in words.items())
    numbers = (D + 1) * H + (depth - 1) * (H + 1) * H + (H + 1) * K if depth else (D + 1) * K
    held = sum(tensor.numel() for tensor in state.values())
    if numbers * members > held:
        raise ValueError(
            f"it describes a network of {numbers * members} parameters, and {TENSORS} holds {held}"
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


def _full_spec(model: ModelContent) -> dict[str, Any]:
    """Return how the module is built again; of a user's class with the file where it lies now."""
    if model.spec["kind"] != "module":
        return model.spec
    source, file = class_source(type(model.module)), source_file(type(model.module))
    beside = {"file": file} if file is not None and "import" in source else {}
    return {"kind": "module", "kwargs": model.spec["kwargs"], **source, **beside}


def _say_where_it_is_looked_for(module_class: type[nn.Module], folder: str | os.PathLike[str]) -> None:
    if place := why_not_found(module_class):
        name = module_class.__name__
        warnings.warn(
            f"save({str(folder)!r}): the class {name} was defined {place}, so that load_model does not find it from "
            f"elsewhere: pass it there, load_model({str(folder)!r}, module={name}), or define it in a file of its own "
            "and import it from that.",
            stacklevel=4,
        )


def _filled(
    module_class: type[nn.Module],
    arguments: dict[str, Any],
    dtype: torch.dtype,
    state: dict[str, Tensor],
    folder: Path,
    *,
    changed: bool,
) -> nn.Module:
    """Build the module and load its state; where its source has ``changed`` an error or a warning says so."""
    name, file = module_class.__name__, source_file(module_class) or module_class.__name__
    remedy = f"{file!r} has changed since the model was saved: restore it, or " if changed else ""
    try:
        # Its start is thrown away, the caller's stream is not.
        with keyed_draws(torch.device("cpu"), 0, "load"):
            network = module_class(**arguments)
            materialise(network, arguments["n_features"])
            network = network.to(dtype)
    except Exception as error:  # a user's constructor may raise anything
        raise InputError(
            f"{name} could not be built from the saved arguments {arguments}: {type(error).__name__}: {error}; "
            f"{remedy}pass the class as it was."
        ) from error
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split()).rstrip(".")  # torch writes a line for each tensor
        raise InputError(
            f"{str(folder / TENSORS)!r} does not fit {name}: {reason}; {remedy}pass the class as it was."
        ) from error
    if changed:
        warnings.warn(
            f"{file!r} has changed since the model was saved; its parameters still fit, but it may predict otherwise.",
            stacklevel=3,
        )
    return network


def _module_class(
    spec: dict[str, Any], kind: str, given: Any, folder: Path, trust_code: bool
) -> type[nn.Module]:
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
    or_pass = f"Or pass the class: load_model({str(folder)!r}, module=...)."
    try:
        with blaming(folder / DESCRIPTION):
            return find_class(spec, trust_code=trust_code, or_changed=True)
    except UntrustedCodeError as error:
        raise UntrustedCodeError(error.code, f"If you trust it, pass trust_code=True. {or_pass}") from error
    except InputError as error:
        raise InputError(f"{error} {or_pass}") from error
