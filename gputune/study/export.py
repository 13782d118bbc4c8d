"""A tuned model written as one file that runs without gputune: ONNX, or PyTorch's own exported program."""

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gputune.errors import InputError
from gputune.extras import import_extra
from gputune.scratch import scratch_folder
from gputune.study.model import TunedModel
from gputune.study.whole_model import WholeModel, description
from gputune.version import __version__

METADATA = "gputune.json"
"""Key of the description, in the metadata of ONNX and among the extra files of a .pt2."""


def export(model: TunedModel, path: str | os.PathLike[str]) -> None:
    """Write the model to a new file, ``.onnx`` or ``.pt2``; see ``TunedModel.export``."""
    path = Path(path)
    writers: dict[str, Callable[[WholeModel, torch.Tensor, str, Path], None]] = {
        ".onnx": _write_onnx,
        ".pt2": _write_program,
    }
    if path.suffix not in writers:
        raise InputError(f"export(path={str(path)!r}) must end in .onnx or .pt2; choose one of them.")
    if path.exists():
        raise InputError(
            f"export(path={str(path)!r}) exists already; give a path that is free, or remove it."
        )
    if not path.parent.is_dir():
        raise InputError(
            f"export(path={str(path)!r}): the folder {str(path.parent)!r} does not exist; make it first."
        )
    if path.suffix == ".onnx":
        for needed in ("onnx", "onnxscript"):
            import_extra(needed, extra="onnx", used_by=f"export({path.name!r})")
    whole = WholeModel(model).eval()
    text = json.dumps({"format": "gputune export", "gputune": __version__, **description(model)})
    # Two rows, since PyTorch takes a size of one for a constant.
    example = torch.zeros(2, len(json.loads(text)["names"]), dtype=torch.float64)
    with scratch_folder(path.parent, prefix=".export") as folder:
        draft = folder / path.name
        with _quiet(), torch.no_grad():
            _exporting(writers[path.suffix], model, whole, example, text, draft)
        os.replace(draft, path)


def _exporting(
    write: Callable[[WholeModel, torch.Tensor, str, Path], None],
    model: TunedModel,
    whole: WholeModel,
    example: torch.Tensor,
    text: str,
    draft: Path,
) -> None:
    """Write, with what the tracing of a user's module may raise put into words."""
    name = type(model.module).__name__
    try:
        write(whole, example, text, draft)
    except OSError:
        raise
    except Exception as error:  # torch.export raises anything, its own and the module's
        cause = error.__cause__ or error
        reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise InputError(
            f"{name} cannot be exported to {draft.suffix}: {type(cause).__name__}: {reason.strip()} Its forward() must "
            "be one that torch.export can trace for any number of rows; save() keeps the model as it is."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the exporters warn of and log, which nobody who tuned a model can act on."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _write_onnx(whole: WholeModel, example: torch.Tensor, text: str, draft: Path) -> None:
    program = _onnx_program(whole, example, text)
    # GELU's error function: ONNX Runtime has none for doubles on a CPU.
    if whole.dtype == torch.float64 and any(node.op_type in ("Erf", "Gelu") for node in program.model.graph):
        whole.network.float()
        whole.dtype = torch.float32
        program = _onnx_program(whole, example, text)
    program.model.metadata_props[METADATA] = text
    program.save(draft, external_data=False)


def _onnx_program(whole: WholeModel, example: torch.Tensor, text: str) -> Any:
    return torch.onnx.export(
        whole,
        (example,),
        dynamo=True,
        verbose=False,
        input_names=["X"],
        output_names=json.loads(text)["outputs"],
        dynamic_shapes=({0: torch.export.Dim("rows")},),
    )


def _write_program(whole: WholeModel, example: torch.Tensor, text: str, draft: Path) -> None:
    program = torch.export.export(whole, (example,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    torch.export.save(program, draft, extra_files={METADATA: text})
