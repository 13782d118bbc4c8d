"""Files of a trained LoRA: an adapter in PEFT's format, and the digest of the frozen base.

Source of the format: PEFT 0.21, https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gputune.data.arrays import ArrayStatistics
from gputune.data.encode import Statistics
from gputune.data.source import bytes_of
from gputune.ground.annotations import StrPath
from gputune.ground.errors import InputError, InputWarning, option, warn
from gputune.ground.files import naming_folder, write_files
from gputune.ground.types import Config, Json, Params
from gputune.modules.pretrained import (
    ADAPTER_DEFAULTS,
    Adapted,
    LoraLinear,
    default_heads,
    is_transposed,
    member_parts,
    task_type,
)

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_DRAFTS = ".adapter"
"""Prefix of files that a killed process may have left in the folder."""


def frozen_tensors(module: nn.Module) -> Params:
    """Return the frozen parameters of the adapted modules inside a module, by their full names.

    A saved model does not contain them.
    """
    frozen = {}
    for path, part in module.named_modules():
        if isinstance(part, Adapted):
            for name, w in part.named_parameters(prefix=path, remove_duplicate=False):
                if not w.requires_grad:
                    frozen[name] = w.detach()
    return frozen


def digest_of(tensors: Params) -> str:
    """Return the SHA-256 of tensors: their names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        w = tensors[name].cpu().contiguous()
        digest.update(f"{name} {w.dtype} {tuple(w.shape)}".encode())
        digest.update(bytes_of(w.view(-1).view(torch.uint8)))
    return digest.hexdigest()


def check_base(tensors: Params, expected: object) -> None:
    """Raise InputError if the frozen tensors are not the ones with which a model was trained."""
    if digest_of(tensors) != expected:
        raise InputError(
            "load_model(base=...)",
            "has other weights than the base with which the model was trained",
            remedy="Pass the pretrained module with the same weights and the same dtype.",
        )


def _name_of(module: nn.Module) -> str:
    """Return the name of a module's class, without the wrapper of a frozen base."""
    return type(module.module if isinstance(module, Adapted) else module).__name__


def _name_in_base(path: str) -> str:
    """Return the name that a part of an ``Adapted`` module has in the base."""
    return path.removeprefix("module.")


class AdapterFiles:
    """Saves the adapter of a tuned LoRA. ``TunedModel`` inherits the method."""

    if TYPE_CHECKING:
        module: nn.Module
        statistics: Statistics | ArrayStatistics

        @property
        def params(self) -> Config: ...

    def save_adapter(self, folder: StrPath) -> None:
        """Write ``adapter_model.safetensors`` and ``adapter_config.json`` into ``folder``, in PEFT's
        format.

        ``peft.PeftModel.from_pretrained(base, folder)`` loads the adapter into the base. The model
        must come from a search of ``gputune.lora``. An ``InputWarning`` says if the search scaled the
        inputs, because PEFT does not scale them.

        Args:
            folder: the folder, which is created if it does not exist.

        Raises:
            InputError: the model has no adapter, it is an ensemble, or the folder cannot be
                written.
        """
        import safetensors.torch

        adapted = self.module
        if not isinstance(adapted, Adapted) or not member_parts(adapted):
            raise InputError(
                None,
                f"A {_name_of(adapted)} has no adapter",
                remedy="Search gputune.lora(base), and save one of its models. Save an ensemble "
                "with save().",
            )
        if _scales_inputs(self.statistics):
            warn(
                "The adapter expects inputs as gputune scaled them in the search, but PEFT scales "
                "no inputs, so it will predict differently. Search again with "
                f"{option('numbers', 'none')} on inputs with your own scaling.",
                InputWarning,
            )
        tensors, config = _adapter(adapted, self.params)
        # PEFT reads the format from the metadata.
        raw = safetensors.torch.save(tensors, metadata={"format": "pt"})
        path = Path(folder)
        remedy = "free disk space and check the permissions of the folder, or choose another folder"
        with naming_folder(path, "the adapter cannot be saved", remedy):
            path.mkdir(parents=True, exist_ok=True)
            text = json.dumps(config, indent=2, sort_keys=True)
            files = {TENSORS: raw, CONFIG: text.encode()}
            write_files(path, files, prefix=_DRAFTS)


def _scales_inputs(statistics: Statistics | ArrayStatistics) -> bool:
    """Return whether gputune changes the numbers of the inputs before the module."""
    if isinstance(statistics, ArrayStatistics):
        return any(channels is not None for channels in statistics.channels)
    is_plain = not statistics.center.any() and bool((statistics.scale == 1).all())
    changed = (statistics.ranked, statistics.clipped, statistics.places, statistics.least)
    return not is_plain or any(len(part) > 0 for part in changed)


def _adapter(adapted: Adapted, params: Config) -> tuple[Params, Json]:
    """Return the tensors of an adapter under PEFT's names, and PEFT's configuration.

    ``params`` are the hyperparameters of the trial.
    """
    tensors: dict[str, Tensor] = {}
    ranks = {}
    transposed = []
    inside = set[str]()
    for path, part in adapted.named_modules():
        if not isinstance(part, LoraLinear):
            continue
        name = _name_in_base(path)
        # The padding is exactly 0, and no trained column of A is.
        used = part.A.detach().any(0).nonzero()
        rank = int(used.max()) + 1
        ranks[name] = rank
        transposed.append(is_transposed(part.base))
        tensors[f"base_model.model.{name}.lora_A.weight"] = part.A[:, :rank].T
        tensors[f"base_model.model.{name}.lora_B.weight"] = part.B[:rank].T
        inside |= {f"{path}.A", f"{path}.B"}
    saved = []
    for name, w in adapted.named_parameters():
        if w.requires_grad and name not in inside:
            tensors[f"base_model.model.{_name_in_base(name)}"] = w
    for path in adapted.trained:
        saved.append(_name_in_base(path))
    base = adapted.module
    values = ADAPTER_DEFAULTS | params
    config: Json = {
        "peft_type": "LORA",
        "task_type": _task_type(base, saved),
        "r": max(ranks.values()),
        "lora_alpha": values["alpha"],
        "use_rslora": values["rslora"],
        "lora_dropout": float(params.get("dropout", 0.0)),
        "target_modules": list(ranks),
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(transposed),
        "bias": "none",
        "inference_mode": True,
        "base_model_name_or_path": getattr(getattr(base, "config", None), "_name_or_path", None),
    }
    contiguous = {name: w.detach().cpu().clone().contiguous() for name, w in tensors.items()}
    return contiguous, config


def _task_type(base: nn.Module, saved: Sequence[str]) -> str | None:
    """Return PEFT's task type of an adapter, or None.

    With a task type, PEFT expects the tensors of the classifier's head in the file.
    """
    heads = default_heads(base)
    return task_type(base) if set(heads) <= set(saved) else None
