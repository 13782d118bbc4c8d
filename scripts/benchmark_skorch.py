"""skorch's side of the benchmark: its classifier of the same network, without a split of its own and callbacks."""

import skorch
import torch
from benchmark_cores import over_cores
from benchmark_torch import denormals_as_zero, make_network
from benchmark_work import Fold, Outcome, Trial, Work
from torch import nn


def train_with_skorch(work: Work, cores: int) -> Outcome:
    """Train the work with one process a core."""
    return over_cores(fit, work, cores)


def fit(fold: Fold, trial: Trial, epochs: int) -> float:
    """Train one classifier on one fold; return its accuracy on the validation rows."""
    X, y, X_valid, y_valid = fold
    torch.manual_seed(0)
    classifier = skorch.NeuralNetClassifier(
        make_network(X.shape[1], trial["width"], int(y.max()) + 1),
        criterion=nn.CrossEntropyLoss,  # of logits, as everywhere else; the default wants probabilities
        optimizer=torch.optim.Adam,
        optimizer__fused=True,
        lr=trial["lr"],
        batch_size=trial["batch_size"],
        max_epochs=epochs,
        iterator_train__shuffle=True,
        iterator_valid__batch_size=len(X_valid),
        train_split=None,
        callbacks="disable",
        verbose=0,
    )
    with denormals_as_zero():
        classifier.fit(X, y)
    return float(classifier.score(X_valid, y_valid))
