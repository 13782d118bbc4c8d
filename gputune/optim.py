"""Optimizers that adapt their own learning rate, for any PyTorch training loop: SGDHD, AdamHD,
AdamWHD."""

from gputune.hypergradients.online import SGDHD, AdamHD, AdamWHD

__all__ = ["SGDHD", "AdamHD", "AdamWHD"]
