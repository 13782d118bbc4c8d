"""Optimizers for any PyTorch loop that adapt their learning rate: SGDHD, AdamHD, AdamWHD."""

from gputune.hypergradients.online import SGDHD, AdamHD, AdamWHD

__all__ = ["SGDHD", "AdamHD", "AdamWHD"]
