"""The content of a tuned model, and its folder.

Tensors are stored as safetensors, everything else as JSON with both checksums. Each file appears
complete or not at all, and the description is written last. If a file does not fit its checksum,
the error names the file. Nothing is ever unpickled.

``state_dict()`` has only a part of the state of a module. It leaves out buffers with
``persistent=False``, and attributes that are numbers of Python. A model file has them too.
Random values that a constructor stores in plain attributes are not in the file. Instead, the module
is built again from the same random stream.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gputune.data.arrays import ArrayLayout, ArrayStatistics
from gputune.data.columns import AnyRows, Layout
from gputune.data.encode import Statistics
from gputune.data.table import Table
from gputune.data.target_transform import FittedTransform
from gputune.ground.annotations import FloatArray, StrPath
from gputune.ground.errors import InputError, option, warn
from gputune.ground.files import check_model_folder, naming_folder, read_file, write_files
from gputune.ground.types import Config, Json, Task
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
from gputune.modules.pretrained import frozen, lora
from gputune.population.outputs import in_mode
from gputune.population.population import Ensemble, InputKind
from gputune.study.adapter_files import check_base, digest_of, frozen_tensors
from gputune.study.code import class_source, find_class, is_builder, is_changed, source_file
from gputune.study.values import MALFORMED, from_json, sha256, to_json

DESCRIPTION = "model.json"
TENSORS = "model.safetensors"
FORMAT = "gputune model"
FORMAT_VERSION = 3
DRAFTS = ".model"
"""Prefix of files that a killed process may have left in the folder."""

DTYPES = {"float32": torch.float32, "float64": torch.float64}
BUILT_IN: dict[str, type[nn.Module]] = {"mlp": MLP, "logistic": LogisticRegression}
_PLAIN = ("task", "classes", "center", "scale", "target", "info", "residuals", "temperature")
"""The fields of a model that the JSON description holds unchanged."""

_Members = Sequence[tuple[Config, Config]]
"""One pair for each module of a model: the module's size arguments and its other arguments."""


@dataclass(frozen=True, eq=False, repr=False)
class ModelContent:
    """The fields of a ``TunedModel``. See that class for their meaning."""

    module: nn.Module
    layout: Layout | ArrayLayout
    statistics: Statistics | ArrayStatistics
    task: Task
    classes: np.ndarray | None
    center: float | FloatArray
    scale: float | FloatArray
    dtype: torch.dtype
    target: str
    spec: Json
    info: Json
    transform: FittedTransform | None = None
    residuals: FloatArray | None = None
    temperature: float = 1.0


def save_model(model: ModelContent, folder: StrPath) -> None:
    """Write the model into ``folder``; see ``TunedModel.save``."""
    import safetensors.torch

    body = {name: getattr(model, name) for name in _PLAIN} | {
        "dtype": str(model.dtype).removeprefix("torch."),
        "target_transform": None if model.transform is None else model.transform.to_json(),
        "layout": model.layout.to_json(),
        "statistics": model.statistics.to_json(),
        "spec": _full_spec(model),
        "numbers": _saved_numbers(model.module),
        "temporary": _temporary_buffers(model.module),
    }
    state = {}
    frozen = frozen_tensors(model.module)
    if frozen:
        body["base_sha256"] = digest_of(frozen)
    for name, value in _saved_tensors(model.module).items():
        if name in frozen:
            continue
        if not isinstance(value, Tensor) or value.dtype == torch.complex128:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                None,
                f"{type(model.module).__name__} keeps {name!r}, a {kind}, in its state",
                remedy="Only tensors can be saved. Make the attribute a buffer. Instead of complex128, "
                f"use complex64, with {option('dtype', 'float32')}.",
            )
        # A clone: safetensors refuses tensors that share memory, such as tied weights.
        state[name] = value.cpu().clone().contiguous()
    path = Path(folder)
    _check_folder(path)
    tensors = safetensors.torch.save(state)
    text = to_json({**body, "tensors_sha256": sha256(tensors)}, name="the model's spec or info")
    # The head holds the checksum of the body's text.
    head = json.dumps({"format": FORMAT, "version": FORMAT_VERSION, "sha256": sha256(text)})
    files = {TENSORS: tensors, DESCRIPTION: f'{head[:-1]}, "body": {text}}}\n'.encode()}
    remedy = "free disk space and check the permissions of the folder, or choose another folder"
    with naming_folder(path, "the model cannot be saved", remedy):
        path.mkdir(parents=True, exist_ok=True)
        write_files(path, files, prefix=DRAFTS)


def _check_folder(folder: Path) -> None:
    """Raise InputError if the folder for a model holds other files too."""
    argument = f"save(folder={str(folder)!r})"
    if folder.exists() and not folder.is_dir():
        raise InputError(argument, "is a file", remedy="Choose another folder.")
    for name in sorted(os.listdir(folder)) if folder.exists() else ():
        if name not in (TENSORS, DESCRIPTION) and not name.startswith(DRAFTS):
            raise InputError(
                argument,
                f"holds {name!r}, which is not part of a model",
                remedy="Pass a new or an empty folder.",
            )


def _full_spec(model: ModelContent) -> Json:
    """Return the recipe to build the module again.

    For a user's class, the recipe includes the current file of the class.
    """
    # A function made the module, and the module has no link to it.
    if model.spec["kind"] != "module" or "made" in model.spec:
        return model.spec
    names = ("kind", "kwargs", "ensemble", "columns", "seeds")
    spec = {name: model.spec[name] for name in names if name in model.spec}
    spec |= class_source(_module_type(model))
    file = source_file(_module_type(model))
    if file is not None and "import" in spec:
        spec["file"] = file
    return spec


def _module_type(model: ModelContent) -> type[nn.Module]:
    """Return the class of a model's module, or of the modules in an ensemble."""
    return type(model.module.members[0] if isinstance(model.module, Ensemble) else model.module)


def read_fields(
    folder: Path, module: Builder | None, *, base: nn.Module | None = None, trust_code: bool
) -> Json:
    """Return the fields of the model that ``save_model`` wrote; see ``load_model``."""
    body = read_description(folder / DESCRIPTION)
    tensors = _read_tensors(folder / TENSORS, body)
    with file_errors(folder / DESCRIPTION):
        fields = _read_content(body)
        spec = fields["spec"]
        kind = str(spec["kind"])
        members = _members(fields)
    if ("lora" in spec or "frozen" in spec) and module is None:
        module = _builder_of(base, spec, folder)
    elif base is not None:
        raise InputError(
            "load_model(base=...)",
            "is only for a model of gputune.lora or gputune.frozen",
            remedy="Leave it out.",
        )
    module_class = _module_class(spec, module, folder, trust_code=trust_code)
    name = name_of(module_class)
    change = ""
    remedy = "Pass the class as it was."
    if kind == "module" and module is None and is_changed(module_class, spec):
        file = source_file(module_class)
        change = f"{file or name!r} has changed since the model was saved"
        remedy = f"{change}. Restore it, or pass the class as it was."
    try:
        modules = _build(module_class, members, fields)
    except Exception as error:  # a user's constructor may raise anything
        sizes, others = members[0]
        reason = f"{type(error).__name__}: {str(error).rstrip('.')}"
        raise InputError(
            None,
            f"{name} could not be built from the saved arguments {sizes | others}: {reason}",
            remedy=remedy,
        ) from error
    network = modules[0]
    if "ensemble" in spec:
        weights = [1 / len(modules)] * len(modules)
        columns = spec.get("columns", ())
        network = Ensemble(modules, weights, fields["task"], columns, tensors.get("present"))
    frozen = frozen_tensors(network)
    if "base_sha256" in body:
        check_base(frozen, body["base_sha256"])
    try:
        _restore(network, frozen | tensors, body.get("numbers", {}), body.get("temporary", ()))
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split()).rstrip(".")  # torch writes a line for each tensor
        raise InputError(
            None, f"{str(folder / TENSORS)!r} does not fit {name}: {reason}", remedy=remedy
        ) from error
    if change:
        warn(f"{change}. Its parameters still fit, but its predictions may differ.")
    return {**fields, "module": in_mode(network, training=False)}


def _read_content(body: Json) -> Json:
    """Return the fields of a saved model (``ModelContent``) from its description, except the
    module."""
    info = dict(body["info"])
    if "row_sample" in info:
        info["row_sample"] = RowSample(info["row_sample"])
    transform = body["target_transform"]
    layout: Layout | ArrayLayout
    statistics: Statistics | ArrayStatistics
    if "shapes" in body["layout"]:
        layout = ArrayLayout.from_json(body["layout"])
        statistics = ArrayStatistics.from_json(body["statistics"])
        statistics.check(layout)
    else:
        layout = Layout.from_json(body["layout"])
        statistics = Statistics.from_json(body["statistics"])
    return {
        **{name: body[name] for name in _PLAIN},
        "layout": layout,
        "statistics": statistics,
        "center": _of_target(body["center"]),
        "scale": _of_target(body["scale"]),
        "dtype": DTYPES[body["dtype"]],
        "spec": dict(body["spec"]),
        "info": info,
        "transform": None if transform is None else FittedTransform.from_json(transform),
    }


def _of_target(value: float | list[float] | np.ndarray) -> float | FloatArray:
    """Return the center or scale of a model's target: a float, or an array with one value per
    column."""
    return np.asarray(value, np.float64) if isinstance(value, list | np.ndarray) else float(value)


def _builder_of(base: nn.Module | None, spec: Json, folder: Path) -> Builder:
    """Return the builder of a saved LoRA or of a saved head, for its base."""
    kind = "LoRA" if "lora" in spec else "head"
    if base is None:
        raise InputError(
            "load_model",
            f"needs the pretrained base of this {kind}, which the folder does not contain",
            remedy=f"Call load_model({str(folder)!r}, base=...) with the base.",
        )
    if "lora" in spec:
        return lora(base, **spec["lora"])
    head = spec["frozen"]
    if head is not None:
        raise InputError(
            "load_model(base=...)",
            f"does not give the class or function {head}, which creates the head",
            remedy=f"Call load_model({str(folder)!r}, module=gputune.frozen(base, {head})).",
        )
    return frozen(base)


def _members(fields: Json) -> _Members:
    """Return the constructor arguments of a model's module, or of each module in an ensemble."""
    spec = fields["spec"]
    layout = fields["layout"]
    statistics = fields["statistics"]
    members = spec.get("ensemble", [spec["kwargs"]])
    columns = spec.get("columns") or [None] * len(members)
    pairs = []
    for member, ends in zip(members, columns, strict=True):
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
        sizes["n_outputs"] = 1 if fields["classes"] is None else len(fields["classes"])
        others = dict(member)
        for name in sizes:
            sizes[name] = others.pop(name, spec["kwargs"].get(name, sizes[name]))
        pairs.append((sizes, others))
    return pairs


def _module_class(spec: Json, module: Builder | None, folder: Path, *, trust_code: bool) -> Builder:
    kind = str(spec["kind"])
    if module is not None:
        argument = "load_model(module=...)"
        if not is_builder(module):
            raise InputError(argument, "must be a subclass of torch.nn.Module", got=module)
        if kind in BUILT_IN:
            raise InputError(
                argument,
                f"must be left out, because {str(folder)!r} holds the built-in {kind!r}",
            )
        return module
    if kind in BUILT_IN:
        return BUILT_IN[kind]
    with file_errors(folder / DESCRIPTION):
        if kind != "module":
            raise ValueError(f"it names an unknown kind of model, {kind!r}")
        return find_class(spec, trust_code=trust_code)


def _build(module_class: Builder, members: _Members, fields: Json) -> list[nn.Module]:
    """Build the module or modules of a saved model, on the CPU."""
    layout = fields["layout"]
    names = None
    kinds = list[InputKind]()
    if isinstance(layout, ArrayLayout):
        names = layout.names
        channels = fields["statistics"].channels
        for shape, dtype, scaled in zip(layout.shapes, layout.dtypes, channels, strict=True):
            kinds.append((shape, torch.float32 if scaled else getattr(torch, dtype)))
    modules = []
    seeds = fields["spec"].get("seeds", [None] * len(members))
    for (sizes, others), seed in zip(members, seeds, strict=True):
        arguments = call_arguments(module_class, sizes, others)
        inputs = kinds or [(sizes["input_shape"], torch.float32)]
        # From the random stream of the training: random values in plain attributes are not in the
        # file.
        with module_stream(seed or 0):
            module = construct(module_class, arguments)
            materialise(module, inputs, names)
        modules.append(convert(module, fields["dtype"]))
    return modules


def read_description(path: Path) -> Json:
    """Return the description of a model from its file, without the tensors.

    Raises:
        FileNotFoundError: the folder does not exist.
        InputError: the folder is incomplete, damaged or of a newer gputune. The message names the file and the remedy.
    """
    with file_errors(path):
        head = json.loads(_read(path, bytes_per_byte=_JSON_BYTES))
        if head["format"] != FORMAT:
            raise ValueError("it is not a description of a gputune model")
        version = head["version"]
        if version > FORMAT_VERSION:
            raise InputError(
                None,
                f"{str(path)!r} has model format {version}, but this gputune reads formats up to "
                f"{FORMAT_VERSION}",
                remedy="Upgrade gputune.",
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
            None,
            f"{str(path)!r} is damaged: {reason}",
            remedy="Restore it from a copy, or save the model again.",
        ) from error


def _read_tensors(path: Path, body: Mapping[str, object]) -> dict[str, Tensor]:
    """Return the tensors of a model file, on the CPU."""
    import safetensors.torch

    raw = _read(path)
    with file_errors(path):
        if sha256(raw) != body["tensors_sha256"]:
            raise ValueError(f"it does not fit the SHA-256 in {DESCRIPTION}")
        try:
            return safetensors.torch.load(raw)
        except safetensors.SafetensorError as error:
            raise ValueError(f"it is not a safetensors file ({error})") from error


_JSON_BYTES = 30
"""The largest number of bytes of memory per byte of JSON: "[]," becomes a Python object."""


def _read(path: Path, bytes_per_byte: int = 1) -> bytes:
    folder = path.parent
    check_model_folder(folder)
    if not path.exists():
        inner = folder / "model"
        remedy = "Save the model again."
        if (inner / path.name).exists():
            remedy = f"Did you mean {str(inner)!r}?"
        raise InputError(
            None, f"the model folder {str(folder)!r} has no {path.name}", remedy=remedy
        )
    return read_file(path, bytes_per_byte=bytes_per_byte)


_Numbers = dict[str, bool | int | float]
"""Values of numeric attributes, by the path of the submodule and the name of the attribute."""


def _saved_tensors(module: nn.Module) -> dict[str, object]:
    """Return the parameters and all buffers of a module by name.

    This includes the buffers that ``state_dict()`` leaves out.
    """
    return dict(module.named_buffers()) | dict(module.state_dict())


def _temporary_buffers(module: nn.Module) -> list[str]:
    """Return the names of the buffers of a module that ``state_dict()`` leaves out."""
    persistent = module.state_dict().keys()
    return [name for name, _ in module.named_buffers() if name not in persistent]


def _saved_numbers(module: nn.Module) -> _Numbers:
    """Return the numeric attributes of a module's submodules, for example a count of calls."""
    numbers: _Numbers = {}
    for path, part in _counting_parts(module):
        for name, value in vars(part).items():
            if isinstance(value, np.number):
                value = value.item()
            if type(value) in (bool, int, float) and name != "training":
                numbers[f"{path}.{name}".lstrip(".")] = value
    return numbers


def _restore(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, object],
    temporary: Collection[str],
) -> None:
    """Copy saved tensors and numeric attributes into a new module.

    A numeric attribute is ignored if the class no longer has it.

    Args:
        module: the module to change, in place.
        tensors: the result of ``_saved_tensors``.
        numbers: the result of ``_saved_numbers``.
        temporary: the result of ``_temporary_buffers``.

    Raises:
        RuntimeError: the tensors do not fit, as in ``load_state_dict``.
    """
    module.load_state_dict(
        {name: tensor for name, tensor in tensors.items() if name not in temporary}
    )
    for name in temporary:
        path, _, key = name.rpartition(".")
        part = module.get_submodule(path) if path in dict(module.named_modules()) else None
        if part is None or (key not in part._buffers and hasattr(part, key)):
            raise RuntimeError(f"Unexpected key(s): {name!r}, which is not a buffer there.")
        part.register_buffer(key, tensors[name], persistent=False)  # a forward may have added it
    for path, part in _counting_parts(module):
        for key, before in list(vars(part).items()):
            value = numbers.get(f"{path}.{key}".lstrip("."))
            plain = before.item() if isinstance(before, np.number) else before
            if key != "training" and _is_like(value, plain) and value != plain:
                setattr(part, key, type(before)(value))


def _counting_parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the submodules that may keep a counter, such as a number of steps, as an attribute.

    PyTorch's own classes are left out, because their attributes are only settings.
    """
    for path, part in module.named_modules():
        if type(part).__module__.partition(".")[0] != "torch":
            yield path, part


def _is_like(value: object, before: object) -> bool:
    """Return True if a saved value may replace an attribute's value, because both have a numeric
    type."""
    kinds = (bool,) if type(before) is bool else (int, float)
    return type(before) in (bool, int, float) and type(value) in kinds


SAMPLE_SIZE = 1024
"""The number of digests that a model keeps. With fewer training rows the answer is exact."""

# bytes per digest: enough to tell a million rows apart from 1024, and short in the file
_BYTES = 6
_ROWS = 8192  # rows per batch of digests
_AnyLayout = Layout | ArrayLayout
_Bits: TypeAlias = NDArray[np.uint64]


class RowSample(str):
    """A sample of row digests in hexadecimal, which ``print(model.info)`` shows in a few words."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{len(self) // (2 * _BYTES)} row digests>"


def sample_of_rows(layout: _AnyLayout, X: AnyRows, y: np.ndarray) -> RowSample:
    """Return the smallest digests of the training rows, in hexadecimal, for ``share_of_rows``.

    Args:
        layout: the layout of the model, which describes the content of a row.
        X: the training rows.
        y: (n, ...) class codes or numbers of these rows.
    """
    content = b""
    smallest = np.unique(_digests(layout, X, y))[:SAMPLE_SIZE]
    for digest in smallest.tolist():
        content += digest.to_bytes(_BYTES, "big")
    return RowSample(content.hex())


def share_of_rows(sample: str, layout: _AnyLayout, X: AnyRows, y: np.ndarray) -> float:
    """Return the estimated share, 0 to 1, of rows that equal rows on which the model was trained.

    Args:
        sample: the result of ``sample_of_rows``.
        layout: the layout of the model.
        X: the rows.
        y: (n, ...) class codes or numbers of these rows.

    Raises:
        ValueError: ``sample`` is not a result of ``sample_of_rows``.
    """
    content = bytes.fromhex(sample)
    numbers = []
    for start in range(0, len(content), _BYTES):
        numbers.append(int.from_bytes(content[start : start + _BYTES], "big"))
    trained = np.array(numbers, dtype=np.uint64)
    digests = _digests(layout, X, y)
    if len(trained) >= SAMPLE_SIZE:  # otherwise it holds all training rows
        digests = digests[digests <= trained.max()]
    if len(digests) == 0:
        return 0.0
    return float(np.isin(digests, trained).mean())


def _digests(layout: _AnyLayout, X: AnyRows, y: np.ndarray) -> _Bits:
    """Return a digest of each row's encoded values and target, (n,)."""
    target = np.asarray(y, dtype=np.float64)
    target = target.reshape(len(y), -1)
    digests = []
    for start in range(0, len(X), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(X)))
        columns = []
        for part in _inputs(layout, X, rows):
            values = part.double().reshape(len(rows), -1)
            columns.append(values.numpy(force=True))
        columns.append(target[rows])
        numbers = np.concatenate(columns, axis=1) + 0.0  # -0.0 becomes 0.0
        numbers[np.isnan(numbers)] = np.nan  # NaN has many bit patterns
        for row in numbers:
            digest = hashlib.blake2b(row.tobytes(), digest_size=_BYTES).digest()
            digests.append(int.from_bytes(digest, "big"))
    return np.array(digests, dtype=np.uint64)


def _inputs(layout: _AnyLayout, X: AnyRows, rows: np.ndarray) -> tuple[Tensor, ...]:
    """Return the encoded values of some rows, (n, ...) for each input."""
    if isinstance(layout, ArrayLayout):
        return layout.raw(X).select(rows).gathered()
    if isinstance(X, Tensor):
        return (layout.raw(X[rows]),)
    assert isinstance(X, Table)
    return (torch.from_numpy(layout.raw(X.select(rows))),)
