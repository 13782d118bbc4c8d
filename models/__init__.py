"""Plain PyTorch models to begin from: an example each of what one's own module may look like."""

from .cnn import CNN
from .gru import GRU
from .layers import Dropout
from .logistic_regression import LogisticRegression
from .mlp import MLP
from .realmlp import RealMLP

__all__ = ["CNN", "GRU", "MLP", "Dropout", "LogisticRegression", "RealMLP"]
