"""The scikit-learn API: estimators and searches that train all configurations and folds
together."""

from gputune.sklearn.dataset import SliceDict
from gputune.sklearn.descent import HypergradientSearchCV
from gputune.sklearn.halving import HalvingRandomSearchCV
from gputune.sklearn.logistic import LogisticRegression
from gputune.sklearn.mlp import MLPClassifier, MLPRegressor
from gputune.sklearn.nested import NestedScores, nested_cv
from gputune.sklearn.net import NeuralNet, NeuralNetClassifier, NeuralNetRegressor
from gputune.sklearn.search import GridSearchCV, RandomizedSearchCV

__all__ = [
    "GridSearchCV",
    "HalvingRandomSearchCV",
    "HypergradientSearchCV",
    "LogisticRegression",
    "MLPClassifier",
    "MLPRegressor",
    "NestedScores",
    "NeuralNet",
    "NeuralNetClassifier",
    "NeuralNetRegressor",
    "RandomizedSearchCV",
    "SliceDict",
    "nested_cv",
]
