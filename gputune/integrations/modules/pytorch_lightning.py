"""Modules of ``pytorch_lightning``, which train like the modules of ``lightning``."""

from gputune.integrations.modules.lightning import own_training, step_of

__all__ = ["own_training", "step_of"]
