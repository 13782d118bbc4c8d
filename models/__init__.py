"""Plain PyTorch models that also come stacked: one module for P members, trained as one tensor program."""

from .logistic_regression import LogisticRegression
from .mlp import MLP
from .stacked import StackedLinear

__all__ = ["MLP", "LogisticRegression", "StackedLinear"]
