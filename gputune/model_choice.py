"""What the ``model`` argument means: a built-in name, a user's class, or a class in a file."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from gputune.engine.population import ModelKind
from gputune.errors import InputError
from gputune.study.module_source import class_from_file, class_source, find_class
from gputune.types import OPTIMIZERS

SearchedModel = Literal["mlp", "logistic", "module"]

_KINDS: dict[SearchedModel, ModelKind] = {"mlp": "mlp", "logistic": "linear", "module": "module"}


@dataclass(frozen=True)
class ModelChoice:
    """A checked model: which space it has, which engine trains it, and how a saved model builds it again."""

    searched: SearchedModel
    optimizer: str
    module_class: type[nn.Module] | None

    @property
    def solved(self) -> bool:
        """Whether it is solved to convergence instead of trained."""
        return self.optimizer == "exact"

    @property
    def kind(self) -> ModelKind:
        """The engine's word for its stacked form."""
        return _KINDS[self.searched]

    @property
    def spec(self) -> dict[str, Any]:
        """What a study and a model folder store of it: plain JSON."""
        if self.module_class is None:
            return {"kind": self.searched}
        return {"kind": "module", **class_source(self.module_class)}

    @property
    def name(self) -> str:
        """What a person calls it."""
        return self.searched if self.module_class is None else self.module_class.__name__


def choose_model(model: Any, optimizer: str | None) -> ModelChoice:
    """Check ``model`` and ``optimizer`` and return the choice.

    Raises InputError for another model, a file or class that cannot be imported, an optimizer that does not fit.
    """
    searched, module_class = _resolve(model)
    allowed = (*OPTIMIZERS, "exact") if searched == "logistic" else OPTIMIZERS
    optimizer = optimizer or ("exact" if searched == "logistic" else "adamw")
    if optimizer not in allowed:
        name = model if isinstance(model, str) else searched
        raise InputError(
            f"optimizer for model={name!r} must be one of {', '.join(allowed)}, got {optimizer!r}."
        )
    return ModelChoice(searched, optimizer, module_class)


def choose_again(spec: dict[str, Any], optimizer: str, *, trust_code: bool) -> ModelChoice:
    """Return the choice that a study stored.

    Raises InputError where a user's class is gone or has changed, UntrustedCodeError where its code is not trusted.
    """
    module_class = find_class(spec, trust_code=trust_code) if spec["kind"] == "module" else None
    return ModelChoice(spec["kind"], optimizer, module_class)


def _resolve(model: Any) -> tuple[SearchedModel, type[nn.Module] | None]:
    if model == "mlp" or model == "logistic":
        return model, None
    if isinstance(model, str) and ":" in model:
        path, _, name = model.rpartition(":")
        return "module", class_from_file(path, name)
    if isinstance(model, type) and issubclass(model, nn.Module):
        return "module", model
    if isinstance(model, nn.Module):
        raise InputError(
            "model must be the class, not an instance, since every trial builds its own: pass "
            f"{type(model).__name__}."
        )
    raise InputError(
        f"model must be 'mlp', 'logistic', a torch.nn.Module class or 'FILE.py:CLASS', got {model!r}."
    )
