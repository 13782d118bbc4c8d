"""The content of a tuned model, and its folder.

Tensors are stored as safetensors, everything else as JSON with both checksums. Each file appears
complete or not at all, and the description is written last. If a file does not fit its checksum,
the error names the file. Nothing is ever unpickled.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gputune.data.arrays import ArrayLayout, ArrayStatistics
from gputune.data.columns import Layout
from gputune.data.encode import Statistics
from gputune.data.target_transform import FittedTransform
from gputune.errors import InputError, UntrustedCodeError, warn
from gputune.input_files import check_model_folder, read_file
from gputune.models import MLP, LogisticRegression
from gputune.modules.calls import convert
from gputune.modules.construction import (
    Builder,
    call_arguments,
    construct,
    materialise,
    module_stream,
    name_of,
)
from gputune.population.population import Ensemble, InputKind
from gputune.scratch import naming_folder, write_files
from gputune.study import module_source
from gputune.study.model_fields import read_content
from gputune.study.module_state import (
    read_numbers,
    read_seeds,
    read_temporary,
    restore,
    saved_numbers,
    saved_tensors,
    temporary_buffers,
)
from gputune.study.values import MALFORMED, from_json, sha256, to_json
from gputune.types import Config, Json, Task
from gputune.wording import per_interface

DESCRIPTION = "model.json"
TENSORS = "model.safetensors"
FORMAT = "gputune model"
FORMAT_VERSION = 3
DRAFTS = ".model"
"""Prefix of files that a killed process may have left in the folder."""

BUILT_IN: dict[str, type[nn.Module]] = {"mlp": MLP, "logistic": LogisticRegression}
_PLAIN = ("task", "classes", "center", "scale", "target", "info", "residuals", "temperature")
"""The fields of a model that its description holds unchanged."""

_Members = Sequence[tuple[Config, Config]]
"""For each module, its size arguments and its other arguments."""


@dataclass(frozen=True, eq=False, repr=False)
class ModelContent:
    """The fields of a ``TunedModel``, which documents them."""

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

    body = {name: getattr(model, name) for name in _PLAIN} | {
        "dtype": str(model.dtype).removeprefix("torch."),
        "target_transform": None if model.transform is None else model.transform.to_json(),
        "layout": model.layout.to_json(),
        "statistics": model.statistics.to_json(),
        "spec": _full_spec(model),
        "numbers": saved_numbers(model.module) if model.spec["kind"] == "module" else {},
        "temporary": temporary_buffers(model.module),
    }
    state = saved_tensors(model.module)
    place = Path(folder)
    saved = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if odd := [(name, type(value).__name__) for name, value in state.items() if name not in saved]:
        what = "{!r}, a {}, in its state; only tensors can be saved, make it a buffer.".format(
            *odd[0]
        )
        raise InputError(f"{type(model.module).__name__} keeps {what}")
    if place.exists() and not place.is_dir():
        raise InputError(f"save(folder={str(place)!r}): a file has that name; choose another.")
    for name in sorted(os.listdir(place)) if place.exists() else ():
        if name not in (TENSORS, DESCRIPTION) and not name.startswith(DRAFTS):
            raise InputError(
                f"save(folder={str(place)!r}): the folder holds {name!r}, which is no part of a "
                "model; give a new or an empty folder."
            )
    # Clones: safetensors refuses tensors that share memory, such as tied weights.
    tensors = safetensors.torch.save(
        {key: value.cpu().clone().contiguous() for key, value in saved.items()}
    )
    text = to_json({**body, "tensors_sha256": sha256(tensors)}, name="the model's spec or info")
    # The head holds the checksum of the body's text.
    head = json.dumps({"format": FORMAT, "version": FORMAT_VERSION, "sha256": sha256(text)})
    files = {TENSORS: tensors, DESCRIPTION: f'{head[:-1]}, "body": {text}}}\n'.encode()}
    remedy = "make room on its disk and check the rights of the folder, or choose another folder"
    with naming_folder(place, "the model cannot be saved", remedy):
        place.mkdir(parents=True, exist_ok=True)
        write_files(place, files, prefix=DRAFTS)
    if model.spec["kind"] == "module" and "made" not in model.spec:
        module_class = _module_type(model)
        module_source.remember_code(module_class)
        if where := module_source.why_not_found(module_class):
            call = f"load_model({str(folder)!r}, module={module_class.__name__})"
            warn(
                f"save({str(folder)!r}): the class {module_class.__name__} was defined {where}, "
                f"so that load_model does not find it from elsewhere: pass it there, {call}, or "
                "define it in a file of its own and import it from that."
            )


def _full_spec(model: ModelContent) -> Json:
    """Return the recipe to build the module again.

    For a user's class it includes the current file of the class.
    """
    # A function made the module, and the module has no link to it.
    if model.spec["kind"] != "module" or "made" in model.spec:
        return model.spec
    source = module_source.class_source(_module_type(model))
    file = module_source.source_file(_module_type(model))
    kept = {
        key: model.spec[key]
        for key in ("kind", "kwargs", "ensemble", "columns", "seeds")
        if key in model.spec
    }
    return {**kept, **source, **({"file": file} if file is not None and "import" in source else {})}


def _module_type(model: ModelContent) -> type[nn.Module]:
    """Return the class of the module, or of the members of an ensemble."""
    return type(model.module.members[0] if isinstance(model.module, Ensemble) else model.module)


def read_fields(folder: Path, module: Builder | None, *, trust_code: bool) -> Json:
    """Return the fields of the model that ``save_model`` wrote; see ``load_model``."""
    body = read_description(folder / DESCRIPTION)
    state = _read_tensors(folder / TENSORS, body)
    with file_errors(folder / DESCRIPTION):
        known = read_content(body)
        spec = known["spec"]
        members = _members(known)
        seeds = read_seeds(spec, len(members))
        numbers = read_numbers(body)
        temporary = read_temporary(body, state)
        if (kind := str(spec["kind"])) in BUILT_IN:
            _check_size(members, kind, state)
    module_class = _module_class(spec, module, folder, trust_code=trust_code)
    file = module_source.source_file(module_class)
    name = name_of(module_class)
    changed = kind == "module" and module is None and module_source.is_changed(module_class, spec)
    change = f"{file or name!r} has changed since the model was saved"
    remedy = (
        f"{change}: restore it, or pass the class as it was."
        if changed
        else "pass the class as it was."
    )
    try:
        modules = _build(module_class, members, seeds, known)
    except Exception as error:  # a user's constructor may raise anything
        raise InputError(
            f"{name} could not be built from the saved arguments {members[0][0] | members[0][1]}: "
            f"{type(error).__name__}: {str(error).rstrip('.')}; {remedy}"
        ) from error
    weights = [1 / len(modules)] * len(modules)
    columns = spec.get("columns", ())
    network = (
        Ensemble(modules, weights, known["task"], columns) if "ensemble" in spec else modules[0]
    )
    try:
        restore(network, state, numbers, temporary)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split()).rstrip(".")  # torch writes a line for each tensor
        raise InputError(
            f"{str(folder / TENSORS)!r} does not fit {name}: {reason}; {remedy}"
        ) from error
    if changed:
        warn(f"{change}; its parameters still fit, but it may predict otherwise.")
    return {**known, "module": network.eval()}


def _members(known: Json) -> _Members:
    """Return the arguments of the modules of a model: several for an ensemble."""
    spec = known["spec"]
    layout = known["layout"]
    statistics = known["statistics"]
    members = [dict(member) for member in spec.get("ensemble", [spec["kwargs"]])]
    pairs = []
    for member, ends in zip(members, spec.get("columns") or [None] * len(members), strict=True):
        if isinstance(layout, Layout):
            begin, end = ends or (0, statistics.n_inputs)
            D = end - begin
            groups = layout.groups(statistics.places)[begin:end]
            sizes: Config = {"n_features": D, "input_shape": (D,), "feature_groups": groups}
        else:
            sizes = {
                "n_features": layout.n_features,
                "input_shape": layout.shapes[0],
                "feature_groups": None,
            }
        sizes["n_outputs"] = 1 if known["classes"] is None else len(known["classes"])
        sizes |= {
            name: value for name, value in {**spec["kwargs"], **member}.items() if name in sizes
        }
        pairs.append((sizes, {name: value for name, value in member.items() if name not in sizes}))
    return pairs


def _check_size(members: _Members, kind: str, state: dict[str, Tensor]) -> None:
    """Raise ValueError for networks that are larger than their tensors, before memory is
    allocated."""
    numbers = 0
    standard = {"width": 128, "depth": 2 if kind == "mlp" else 0}
    for sizes, others in members:
        words = {**standard, **sizes, **others}
        D = int(words["n_features"] or 0)
        K = int(words["n_outputs"] or 0)
        width = words["width"]
        if isinstance(width, tuple):  # one per layer
            numbers += sum((a + 1) * b for a, b in pairwise((D, *map(int, width), K)))
        elif depth := int(words["depth"]):  # no loop: the depth in a file may be huge
            H = int(width)
            # input layer, hidden layers, output layer; each with biases
            numbers += (D + 1) * H + (depth - 1) * (H + 1) * H + (H + 1) * K
        else:
            numbers += (D + 1) * K
    there = sum(tensor.numel() for tensor in state.values())
    if numbers > there:
        raise ValueError(
            f"it describes a network of {numbers} parameters, and {TENSORS} holds {there}"
        )


def _module_class(
    spec: Mapping[str, object], module: Builder | None, folder: Path, *, trust_code: bool
) -> Builder:
    kind = str(spec["kind"])
    if module is not None and not module_source.is_builder(module):
        raise InputError(
            f"load_model(module=...) must be a subclass of torch.nn.Module, got {module!r}."
        )
    if module is not None and kind in BUILT_IN:
        raise InputError(
            f"load_model(module=...): {str(folder)!r} holds the built-in {kind!r}; leave module "
            "out."
        )
    if known := module or BUILT_IN.get(kind):
        return known
    or_pass = per_interface(
        python=f"Or pass the class: load_model({str(folder)!r}, module=...).",
        command="Or say where the class is now: --model FILE.py:NAME.",
    )
    try:
        with file_errors(folder / DESCRIPTION):
            if kind != "module":
                raise ValueError(f"it names an unknown kind of model, {kind!r}")
            return module_source.find_class(spec, trust_code=trust_code, or_changed=True)
    except UntrustedCodeError as error:
        raise UntrustedCodeError(error.rule, f"{error.remedy} {or_pass}") from error
    except InputError as error:
        raise InputError(None, f"{error.message} {or_pass}") from error


def _build(
    module_class: Builder, members: _Members, seeds: Sequence[int | None], known: Json
) -> list[nn.Module]:
    """Build the modules of a model, on the CPU."""
    layout = known["layout"]
    statistics = known["statistics"]
    names = None
    kinds = list[InputKind]()
    if isinstance(layout, ArrayLayout):
        parts = zip(layout.shapes, layout.dtypes, statistics.channels, strict=True)
        kinds = [
            (shape, torch.float32 if scaled else getattr(torch, dtype))
            for shape, dtype, scaled in parts
        ]
        names = layout.names
    modules = []
    for (sizes, arguments), seed in zip(members, seeds):
        words = call_arguments(module_class, sizes, arguments)
        inputs = kinds or [(sizes["input_shape"], torch.float32)]
        # From the random stream of the training: random values in plain attributes are not in the
        # file.
        with module_stream(seed or 0):
            module = construct(module_class, words)
            materialise(module, inputs, names)
        modules.append(convert(module, known["dtype"]))
    return modules


def read_description(path: Path) -> Json:
    """Return the description of a model from its file, without the tensors.

    Raises:
        InputError: the folder is missing, incomplete, damaged or of a newer gputune. The message
            names the file and the remedy.
    """
    with file_errors(path):
        head = json.loads(_read(path, bytes_per_byte=_JSON_BYTES))
        if head["format"] != FORMAT:
            raise ValueError("it is no description of a gputune model")
        if head["version"] > FORMAT_VERSION:
            raise InputError(
                f"{str(path)!r} has model format {head['version']}, this gputune reads up to "
                f"{FORMAT_VERSION}; upgrade gputune."
            )
        # The separators of ``to_json``: an unchanged body gives the same text.
        text = json.dumps(head["body"], separators=(",", ":"))
        if sha256(text) != head["sha256"]:
            raise ValueError("it was changed after it was written")
        return dict(from_json(text))


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turn the errors from reading a damaged file into an error that names the file."""
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


_JSON_BYTES = 30
"""The largest number of bytes of memory per byte of JSON: "[]," becomes a Python object."""


def _read(path: Path, bytes_per_byte: int = 1) -> bytes:
    check_model_folder(path.parent)
    if not path.exists():
        inner = path.parent / "model"
        remedy = (
            f"did you mean {str(inner)!r}?"
            if (inner / path.name).exists()
            else "save the model again."
        )
        raise InputError(f"the model folder {str(path.parent)!r} has no {path.name}; {remedy}")
    return read_file(path, bytes_per_byte=bytes_per_byte)
