"""Export of a tuned model to a ``.pt2`` file, the format of ``torch.export``."""

import json
from pathlib import Path

import torch

from gputune.ground.types import Json
from gputune.integrations.whole_model import WholeModel, example_inputs, export_errors, trace
from gputune.study.export import METADATA
from gputune.study.model_files import ModelContent


def write_model(model: ModelContent, description: Json, path: Path) -> None:
    """Write a tuned model and its description to a new ``.pt2`` file."""
    whole = WholeModel(model).eval()
    with export_errors(model, path):
        program = trace(whole, example_inputs(model))
        torch.export.save(program, path, extra_files={METADATA: json.dumps(description)})
