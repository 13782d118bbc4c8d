"""What a tuned model consists of, and its folder: tensors as safetensors, everything else as JSON with both checksums.

Each file appears whole or not at all, and the description comes last. A folder that does not fit its checksums is
refused by an error that names the file; nothing is ever unpickled.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gputune.data.arrays import ArrayLayout, ArrayStatistics
from gputune.data.encode import Layout, Statistics
from gputune.data.target_transform import FittedTransform
from gputune.errors import InputError, UntrustedCodeError, warn
from gputune.models import MLP, LogisticRegression
from gputune.modules.construction import Builder, name_of
from gputune.population.network import Ensemble
from gputune.scratch import write_files
from gputune.study.model_modules import TENSORS, arguments_of, build_modules, check_size
from gputune.study.module_source import (
    class_source,
    find_class,
    is_builder,
    is_changed,
    remember_code,
    source_file,
    why_not_found,
)
from gputune.study.record import has_form
from gputune.study.values import MALFORMED, from_json, sha256, to_json
from gputune.types import Config, Json, Task

DESCRIPTION = "model.json"
FORMAT, FORMAT_VERSION = "gputune model", 2
DRAFTS = ".model"
"""How what a killed process may have left in the folder begins."""

DTYPES = {"float32": torch.float32, "float64": torch.float64}
_INFO = {"drop?": [str], "loss?": str, "loss_arguments?": {"": (int, float)}}
BUILT_IN: dict[str, type[nn.Module]] = {"mlp": MLP, "logistic": LogisticRegression}


@dataclass(frozen=True, eq=False, repr=False)
class ModelContent:
    """The fields of a ``TunedModel``, which says what they are."""

    module: nn.Module
    layout: Layout | ArrayLayout
    statistics: Statistics | ArrayStatistics
    task: Task
    classes: np.ndarray | None
    center: float | NDArray[np.float64]
    scale: float | NDArray[np.float64]
    dtype: torch.dtype
    target: str
    spec: Json
    info: Json
    transform: FittedTransform | None = None
    residuals: NDArray[np.float64] | None = None
    temperature: float = 1.0


def save_model(model: ModelContent, folder: str | os.PathLike[str]) -> None:
    """Write the model into ``folder``; see ``TunedModel.save``."""
    import safetensors.torch

    body = {
        "task": model.task,
        "classes": model.classes,
        "center": model.center,
        "scale": model.scale,
        "dtype": str(model.dtype).removeprefix("torch."),
        "target": model.target,
        "target_transform": None if model.transform is None else model.transform.to_json(),
        "layout": model.layout.to_json(),
        "statistics": model.statistics.to_json(),
        "spec": _full_spec(model),
        "info": model.info,
        "residuals": model.residuals,
        "temperature": model.temperature,
    }
    state, place = _state(model.module), Path(folder)
    _check_free(place)
    # Clones: safetensors refuses tensors that share memory, as tied weights do.
    tensors = safetensors.torch.save({key: value.cpu().clone().contiguous() for key, value in state.items()})
    text = to_json({**body, "tensors_sha256": sha256(tensors)}, name="the model's spec or info")
    head = json.dumps({"format": FORMAT, "version": FORMAT_VERSION, "sha256": sha256(text)})
    place.mkdir(parents=True, exist_ok=True)
    files = {TENSORS: tensors, DESCRIPTION: f'{head[:-1]}, "body": {text}}}\n'.encode()}
    write_files(place, files, prefix=DRAFTS)
    module_class = _module_type(model)
    if model.spec["kind"] == "module" and "made" not in model.spec:
        remember_code(module_class)
        if where := why_not_found(module_class):
            call = f"load_model({str(folder)!r}, module={module_class.__name__})"
            warn(
                f"save({str(folder)!r}): the class {module_class.__name__} was defined {where}, so that load_model "
                f"does not find it from elsewhere: pass it there, {call}, or define it in a file of its own and "
                "import it from that."
            )


def read_content(folder: Path, module: Builder | None, *, trust_code: bool) -> ModelContent:
    """Return what ``save_model`` wrote; see ``load_model``."""
    body = read_description(folder / DESCRIPTION)
    state = _read_tensors(folder / TENSORS, body)
    with file_errors(folder / DESCRIPTION):
        layout, statistics = _read_preprocessing(body["layout"], body["statistics"])
        spec, classes, dtype = dict(body["spec"]), body["classes"], DTYPES[body["dtype"]]
        kind = str(spec["kind"])
        if classes is not None and not (isinstance(classes, np.ndarray) and classes.ndim == 1):
            raise ValueError(f"its classes are no list of labels but {type(classes).__name__}")
        members = arguments_of(spec, layout, statistics, 1 if classes is None else len(classes))
        if kind in BUILT_IN:
            check_size([sizes | arguments for sizes, arguments in members], kind, state)
        task, target, info = body["task"], body["target"], dict(body["info"])
        if not has_form(info, _INFO):
            raise ValueError("its info is of another type")
        center, scale, how = (_of_target(body["center"]), _of_target(body["scale"]), body.get("target_transform"))
        transform = None if how is None else FittedTransform.from_json(how)
        residuals = body.get("residuals")  # files of an earlier version have none
        if not (residuals is None or (isinstance(residuals, np.ndarray) and residuals.dtype.kind == "f")):
            raise ValueError("its residuals are no numbers")
        temperature = float(body.get("temperature", 1.0))
        if not 0 < temperature < math.inf:
            raise ValueError(f"its temperature is {temperature}")
    module_class = _module_class(spec, module, folder, trust_code=trust_code)
    file = source_file(module_class) or name_of(module_class)
    changed = kind == "module" and module is None and is_changed(module_class, spec)
    remedy = f"{file!r} has changed since the model was saved: restore it, or " if changed else ""
    modules = build_modules(module_class, members, layout, statistics, dtype, remedy)
    weights, columns = [1 / len(modules)] * len(modules), spec.get("columns", ())
    network = Ensemble(modules, weights, task, columns) if "ensemble" in spec else modules[0]
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split()).rstrip(".")  # torch writes a line for each tensor
        raise InputError(
            f"{str(folder / TENSORS)!r} does not fit {name_of(module_class)}: {reason}; {remedy}pass the class as it "
            "was."
        ) from error
    if changed:
        warn(f"{file!r} has changed since the model was saved; its parameters still fit, but it may predict otherwise.")
    network.eval()
    return ModelContent(
        network,
        layout,
        statistics,
        task,
        classes,
        center,
        scale,
        dtype,
        target,
        spec,
        info,
        transform,
        residuals,
        temperature,
    )


def _of_target(value: float | list[float] | np.ndarray) -> float | NDArray[np.float64]:
    """Return the center or scale of a target, one number or one a column."""
    return np.asarray(value, np.float64) if isinstance(value, list | np.ndarray) else float(value)


def read_description(path: Path) -> Json:
    """Return the description of a model from its file, without the tensors.

    Raises InputError, saying which file and what to do, for a folder that is missing, incomplete, damaged or of a newer
    gputune.
    """
    with file_errors(path):
        head = json.loads(_read(path))
        if head["format"] != FORMAT:
            raise ValueError("it is no description of a gputune model")
        if head["version"] > FORMAT_VERSION:
            raise InputError(
                f"{str(path)!r} has model format {head['version']}, this gputune reads up to {FORMAT_VERSION}; "
                "upgrade gputune."
            )
        text = json.dumps(head["body"], separators=(",", ":"))
        if sha256(text) != head["sha256"]:
            raise ValueError("it was changed after it was written")
        return dict(from_json(text))


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turn what reading an odd file raises into an error that names the file."""
    try:
        yield
    except InputError:
        raise
    except MALFORMED as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"{str(path)!r} is damaged: {reason}; restore it from a copy, or save the model again."
        ) from error


def _read_tensors(path: Path, body: Mapping[str, object]) -> dict[str, Tensor]:
    """Return the tensors, on the CPU."""
    import safetensors.torch

    raw = _read(path)
    with file_errors(path):
        if sha256(raw) != body["tensors_sha256"]:
            raise ValueError(f"it does not fit the SHA-256 in {DESCRIPTION}")
        try:
            return safetensors.torch.load(raw)
        except safetensors.SafetensorError as error:
            raise ValueError(f"it is no safetensors file ({error})") from error


def _read(path: Path) -> bytes:
    if not path.parent.is_dir():
        raise InputError(f"there is no model folder {str(path.parent)!r}; check the path.")
    if not path.is_file():
        inner = path.parent / "model"
        remedy = f"did you mean {str(inner)!r}?" if (inner / path.name).exists() else "save the model again."
        raise InputError(f"the model folder {str(path.parent)!r} has no {path.name}; {remedy}")
    return path.read_bytes()


def _check_free(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"save(folder={str(folder)!r}): a file has that name; choose another.")
    for name in sorted(entry.name for entry in folder.iterdir()) if folder.exists() else ():
        if name not in (TENSORS, DESCRIPTION) and not name.startswith(DRAFTS):
            raise InputError(
                f"save(folder={str(folder)!r}): the folder holds {name!r}, which is no part of a model; "
                "give a new or an empty folder."
            )


def _read_preprocessing(layout: Json, statistics: Json) -> tuple[Layout | ArrayLayout, Statistics | ArrayStatistics]:
    if "shapes" in layout:
        return ArrayLayout.from_json(layout), ArrayStatistics.from_json(statistics)
    return Layout.from_json(layout), Statistics.from_json(statistics)


def _state(module: nn.Module) -> dict[str, Tensor]:
    state = module.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"{type(module).__name__} keeps {name!r}, a {type(value).__name__}, in its state; "
                "only tensors can be saved, make it a buffer."
            )
    return state


def _full_spec(model: ModelContent) -> Json:
    """Return how the module is built again; of a user's class with the file where it lies now."""
    if model.spec["kind"] != "module" or "made" in model.spec:  # by a function, of which the module knows nothing
        return model.spec
    source, file = class_source(_module_type(model)), source_file(_module_type(model))
    beside = {"file": file} if file is not None and "import" in source else {}
    kept: Config = {key: model.spec[key] for key in ("kind", "kwargs", "ensemble", "columns") if key in model.spec}
    return {**kept, **source, **beside}


def _module_type(model: ModelContent) -> type[nn.Module]:
    """Return the class of the module, or of the members of an ensemble."""
    return type(model.module.members[0] if isinstance(model.module, Ensemble) else model.module)


def _module_class(spec: Mapping[str, object], module: Builder | None, folder: Path, *, trust_code: bool) -> Builder:
    kind = str(spec["kind"])
    if module is not None and not is_builder(module):
        raise InputError(f"load_model(module=...) must be a subclass of torch.nn.Module, got {module!r}.")
    if module is not None and kind in BUILT_IN:
        raise InputError(f"load_model(module=...): {str(folder)!r} holds the built-in {kind!r}; leave module out.")
    if known := module or BUILT_IN.get(kind):
        return known
    with file_errors(folder / DESCRIPTION):
        if kind != "module":
            raise ValueError(f"it names an unknown kind of model, {kind!r}")
    or_pass = f"Or pass the class: load_model({str(folder)!r}, module=...)."
    try:
        with file_errors(folder / DESCRIPTION):
            return find_class(spec, trust_code=trust_code, or_changed=True)
    except UntrustedCodeError as error:
        raise UntrustedCodeError(error.code, f"If you trust it, pass trust_code=True. {or_pass}") from error
    except InputError as error:
        raise InputError(f"{error} {or_pass}") from error
