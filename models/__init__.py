"""Plain PyTorch models to begin from: an example each of what one's own module may look like."""

from .cnn import CNN
from .dropout import Dropout
from .gru import GRU
from .logistic_regression import LogisticRegression
from .mlp import MLP
from .realmlp import RealMLP

__all__ = ["CNN", "GRU", "MLP", "Dropout", "LogisticRegression", "RealMLP"]
