"""Plain PyTorch models to start from. Each model is an example of a module that gputune can
tune."""

from .cnn import CNN
from .gru import GRU
from .layers import Dropout
from .logistic_regression import LogisticRegression
from .mlp import MLP
from .realmlp import RealMLP

__all__ = ["CNN", "GRU", "MLP", "Dropout", "LogisticRegression", "RealMLP"]
