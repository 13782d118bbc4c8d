"""How exactly a GPU multiplies matrices of single precision: as written, or with TF32 where that is asked for."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def matrix_products(*, tf32: bool) -> Iterator[None]:
    """Let matrix products of a GPU round their factors to TF32 (10 bits of mantissa) inside; as set before otherwise.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if tf32:
        matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        if tf32:
            matmul.fp32_precision = before
