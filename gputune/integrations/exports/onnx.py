"""Export of a tuned model to an ONNX file."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gputune.ground.entry_points import import_extra
from gputune.ground.types import Json
from gputune.integrations.whole_model import (
    WholeModel,
    example_inputs,
    export_errors,
    open_rows,
    trace,
)
from gputune.study.export import METADATA
from gputune.study.model_files import ModelContent


def write_model(model: ModelContent, description: Json, path: Path) -> None:
    """Write a tuned model and its description to a new ONNX file."""
    for library in ("onnx", "onnxscript"):
        import_extra(library, extra="onnx", used_by=f"export({path.name!r})")
    whole = WholeModel(model).eval()
    with export_errors(model, path):
        program = _program(whole, example_inputs(model), description)
        program.model.metadata_props[METADATA] = json.dumps(description)
        program.save(path, external_data=False)


def _program(whole: WholeModel, examples: tuple[Tensor, ...], description: Json) -> Any:
    """Return the ONNX program of a whole model, in float32 if ONNX Runtime lacks its double
    operators."""
    names = description["names"] if description["inputs"] == "arrays" else ["X"]

    def converted_program() -> Any:
        return torch.onnx.export(
            # Traced here: torch.onnx.export would silently fix the number of rows if it cannot keep
            # it open.
            trace(whole, examples),
            dynamo=True,
            verbose=False,
            input_names=names,
            output_names=description["outputs"],
            dynamic_shapes=open_rows(examples, "rows"),
        )

    program = converted_program()
    # GELU's error function: ONNX Runtime lacks it for doubles on a CPU, so the network runs in
    # float32.
    operators = {node.op_type for node in program.model.graph}
    if whole.dtype == torch.float64 and operators & {"Erf", "Gelu"}:
        whole.network.float()
        whole.dtype = torch.float32
        program = converted_program()
    return program
