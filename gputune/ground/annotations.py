"""Type aliases for arrays and paths, used only in type annotations."""

import os
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

FloatArray: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.int64]
StrPath: TypeAlias = str | os.PathLike[str]
