"""Callbacks of ``tune(callbacks=...)``, and loggers.

Each logger is an integration. It is imported when a program uses its name for the first time.
"""

from typing import TYPE_CHECKING, Any

from gputune.ground.entry_points import integration, integrations
from gputune.tuning.callbacks import Callback, StopSearch

if TYPE_CHECKING:
    from gputune.integrations.loggers.mlflow import MLflow
    from gputune.integrations.loggers.tensorboard import TensorBoard
    from gputune.integrations.loggers.wandb import WandB

__all__ = ["Callback", "MLflow", "StopSearch", "TensorBoard", "WandB"]


def __getattr__(name: str) -> Any:
    """Import a logger, such as ``gputune.callbacks.MLflow``, when a program uses the name for the
    first time."""
    module = name.lower()
    if module in integrations("loggers"):
        logger = getattr(integration("loggers", module), name, None)
        if logger is not None:
            return logger
    raise AttributeError(f"module 'gputune.callbacks' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
