"""The scikit-learn face: estimators that are fitted for all configurations and folds at once."""

from gputune.sklearn.logistic import LogisticRegression
from gputune.sklearn.mlp import MLPClassifier, MLPRegressor
from gputune.sklearn.net import NeuralNetClassifier, NeuralNetRegressor

__all__ = [
    "LogisticRegression",
    "MLPClassifier",
    "MLPRegressor",
    "NeuralNetClassifier",
    "NeuralNetRegressor",
]
